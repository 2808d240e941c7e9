"""DOFA: a vision transformer whose patch kernels are generated from wavelengths alone (Xiong et al., arXiv 2403.15356).

Names and shapes of the state dict are the published ones (repository zhu-xlab/DOFA; TorchGeo ``models/dofa.py``, 0.8).
The layout of the generated kernel, (channel, row, column, D), is that of TorchGeo >= 0.7 and of the weights published
since 2025; the first files of 2024 have the same names and shapes, expect another layout and give other features.
Shapes: B batch, C channels, H W image, K = 128 code width, D width, h w token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from copernicus.datasets.sensors import Sensor
from copernicus.models.encoder import check_takes
from copernicus.models.hypernetwork import CODE_DIM, SpectralPatchEmbed
from copernicus.models.patch_embed import embed_patches
from copernicus.models.patches import cut_patches, take_patches, token_grid
from copernicus.models.resize import GENERATED_KERNEL
from copernicus.models.trunk import Trunk

MICROWAVE_NM = 1e6
C_BAND_NM = (3.75e7, 7.5e7)
SENTINEL1 = 5.405
"""What DOFA was trained with in place of Sentinel-1's wavelength: its frequency in GHz."""


class WavelengthPatchEmbed(SpectralPatchEmbed):
    """The hypernetwork of Copernicus-FM's spectral sensors, over the sines and cosines of wavelengths alone."""

    def descriptions(self, sensor: Sensor) -> Tensor:
        """Codes of the bands (C, K), before the residual block."""
        published = [SENTINEL1 if w >= MICROWAVE_NM else w / 1000 for w in sensor.wavelengths_nm]
        return expand_wavelengths(torch.tensor(published, device=self.fclayer.w1.weight.device))


def expand_wavelengths(wavelengths_C: Tensor) -> Tensor:
    """Wavelengths in micrometres (C,) -> (C, K) sines, then cosines, of 1000 x times 10000^(-i / (K/2)), in float32."""
    half = CODE_DIM // 2
    frequency = 1.0 / 10000 ** (torch.arange(half, dtype=torch.float32, device=wavelengths_C.device) / half)
    phase_CF = torch.outer(wavelengths_C * 1000, frequency)
    return torch.cat([phase_CF.sin(), phase_CF.cos()], dim=1)


class DOFA(Trunk):
    """The encoder. Images are normalised by their sensor's statistics, as its authors do by those of each dataset.

    Args:
        image_size: gives the side of the position table (in patches of 16 pixels); other sizes take it resized, which
            the public code does not offer.
        seed: decides the initial weights; the global random state is not used.
        embed_dim, depth, num_heads, num_classes, global_pool: as in ``Trunk``.
    """

    inputs = "sensors with wavelengths: optical ones, and radar in C band (Sentinel-1)"
    patch_embed: WavelengthPatchEmbed
    patch_size = GENERATED_KERNEL
    optional_weights = ("fc_norm.", "head.")
    """Not in the published files: both start afresh."""
    ignored_weights = ("mask_token", "norm.", "projector.")
    """In some published files, left there by pretraining; the public code drops them too."""

    def __init__(
        self,
        *,
        image_size: int = 224,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 0,
        global_pool: bool = True,
        seed: int = 0,
    ) -> None:
        with torch.device("meta"):
            embed = WavelengthPatchEmbed(embed_dim)
        grid = max(1, image_size // GENERATED_KERNEL)
        super().__init__(embed, grid, embed_dim, depth, num_heads, num_classes, global_pool, learned_position=False)
        self.fill(seed)

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """Whether every band has a wavelength that DOFA can tell: below 1 mm, or in C band."""
        low, high = C_BAND_NM
        return sensor.spectral and all(w < MICROWAVE_NM or low <= w <= high for w in sensor.wavelengths_nm)

    def patch_tokens(self, x_BCHW: Tensor, sensor: Sensor) -> Tensor:
        """Normalised image -> tokens (B, D, h, w), without positions.

        Raises:
            InputError: a variable, a radar of another band, or an image smaller than one patch.
        """
        check_takes("DOFA", self, sensor)
        grid = token_grid(x_BCHW.shape[2], x_BCHW.shape[3], GENERATED_KERNEL)
        (kernel,) = self.patch_embed.fitted([sensor], [GENERATED_KERNEL])
        patches_BLCQ = take_patches(cut_patches(x_BCHW, GENERATED_KERNEL, shift=1), None)
        return embed_patches(patches_BLCQ, kernel, GENERATED_KERNEL).transpose(1, 2).unflatten(2, grid)
