"""Plain vision transformers: the usual architecture for one sensor, as supervised and random baselines.

Names and shapes of the state dict are those of timm's vision transformers (``timm/models/vision_transformer.py``).
Shapes: B batch, C channels, H W image, D width, p q kernel sides, h w token grid, L = h*w patch tokens, T = 1 + L.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.encoder import describe
from copernicus.models.initialise import generator
from copernicus.models.trunk import Trunk


class ConvPatchEmbed(nn.Module):
    """A convolution whose stride is its kernel; what does not fill a patch at the right and lower edge is not seen."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.conv2d(x_BCHW, self.proj.weight, self.proj.bias, stride=self.proj.stride)


class PlainViT(Trunk):
    """A vision transformer (Dosovitskiy et al., arXiv 2010.11929) for the bands of one sensor.

    Args:
        sensor: the sensor it is for; images of any sensor with the same bands are taken.
        patch_size: side of a patch in pixels; the sensor's own by default (timm's weights: 16).
        image_size: gives the position table's side; the sensor's own by default (timm's weights: 224).
        seed: decides the initial weights; the global random state is not used.
        embed_dim, depth, num_heads, num_classes, global_pool: as in ``Trunk``.
    """

    inputs = "any sensor"
    patch_embed: ConvPatchEmbed

    def __init__(
        self,
        *,
        sensor: Sensor,
        patch_size: int | None = None,
        image_size: int | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 0,
        global_pool: bool = True,
        seed: int = 0,
    ) -> None:
        patch = patch_size or sensor.patch_kernel
        grid = max(1, (image_size or sensor.image_size) // patch)
        embed = ConvPatchEmbed(sensor.channels, embed_dim, patch)
        super().__init__(embed, grid, embed_dim, depth, num_heads, num_classes, global_pool, learned_position=True)
        self.sensor = sensor
        self.patch_size = patch
        self.fill(seed, skip=("patch_embed.proj.weight",))
        # As a Linear layer on a patch's pixels (MAE, arXiv 2111.06377, A.1).
        kernel = self.patch_embed.proj.weight
        bound = (6.0 / (embed_dim + kernel[0].numel())) ** 0.5
        with torch.no_grad():
            kernel.uniform_(-bound, bound, generator=generator(seed, "patch_embed.proj.weight"))

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """True: one can be built for any sensor. The built one refuses images of other bands."""
        return True

    def patch_tokens(self, x_BCHW: Tensor, sensor: Sensor) -> Tensor:
        """Normalised image -> tokens (B, D, h, w), without positions.

        Raises:
            InputError: other bands than the model's, or an image smaller than one patch.
        """
        if sensor.bands != self.sensor.bands:
            raise InputError(f"this plain ViT was made for {describe(self.sensor)}; it cannot take {describe(sensor)}")
        height, width = x_BCHW.shape[-2:]
        if min(height, width) < self.patch_size:
            raise InputError(
                f"an image of {height} x {width} pixels holds no patch of {self.patch_size} x {self.patch_size}"
            )
        return self.patch_embed(x_BCHW)
