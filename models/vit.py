"""The Copernicus-FM encoder: a vision transformer for any sensor, with kernels and metadata made on the fly.

Facts: paper arXiv 2503.11849 and its public implementation. Names and shapes of the state dict are the published ones.
Shapes: B batch, C channels, H W image, D width, h w token grid, L = h*w patch tokens, X those of them that enter (all,
or the ones that masking keeps), T = 1 + X tokens, N the tokens of several batches one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import METADATA_FIELDS, InputError, Sensor
from copernicus.models.blocks import Block, check_sizes, default_levels, through_blocks
from copernicus.models.derived import Derived
from copernicus.models.encoder import images_for
from copernicus.models.hypernetwork import Kernel, SpectralPatchEmbed, VariablePatchEmbed
from copernicus.models.initialise import initialise
from copernicus.models.language import LanguageTable
from copernicus.models.metadata import check_metadata, embed_metadata
from copernicus.models.patch_embed import embed_patches
from copernicus.models.patches import check_whole, cut_patches, take_patches, token_grid
from copernicus.models.position import fixed_positions, sincos_table


@dataclass(frozen=True)
class View:
    """One sensor's images on their way into the encoder.

    Attributes:
        x_BCHW: normalised images.
        sensor: what the channels are.
        patch_kernel: side of a patch, pixels.
        metadata_B4: checked rows, NaN for unknown.
        kept_BX: the patches that enter (row-major numbers), in this order; None: all.
    """

    x_BCHW: Tensor
    sensor: Sensor
    patch_kernel: int
    metadata_B4: Tensor
    kept_BX: Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """The token grid (h, w) of the whole image."""
        return token_grid(self.x_BCHW.shape[2], self.x_BCHW.shape[3], self.patch_kernel)


def look(
    x_BCHW: Tensor,
    sensor: Sensor,
    metadata: Tensor | None,
    patch_kernel: int | None = None,
    checked: bool = False,
) -> View:
    """A view of all patches of a user's images, checked.

    Args:
        checked: the metadata's values were looked at before; to look at them makes a GPU wait.

    Raises:
        InputError: not a batch of the sensor's bands, an image smaller than one patch, or impossible metadata.
    """
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != sensor.channels:
        raise InputError(
            f"sensor {sensor.name!r}: expected a batch of shape (B, {sensor.channels}, H, W), got {tuple(x_BCHW.shape)}"
        )
    patch_kernel = sensor.patch_kernel if patch_kernel is None else patch_kernel
    if patch_kernel < 1:
        raise InputError(f"sensor {sensor.name!r}: a patch of {patch_kernel} pixels cannot be")
    token_grid(x_BCHW.shape[2], x_BCHW.shape[3], patch_kernel)
    if metadata is None:
        metadata = torch.full((x_BCHW.shape[0], len(METADATA_FIELDS)), torch.nan, device=x_BCHW.device)
    return View(x_BCHW, sensor, patch_kernel, check_metadata(metadata, x_BCHW.shape[0], values=not checked))


class CopernicusFMViT(nn.Module):
    """The encoder.

    Args:
        image_size, patch_size: their ratio is the side of the stored position table; any other image size works too.
        embed_dim: width D, a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: outputs of ``head``; 0 for none.
        global_pool: True: features are the mean of the patch tokens, then ``fc_norm``; False: ``norm``, then the
            class token.
        norm_eps: epsilon of the layer norms (TorchGeo's variant has 1e-5).
        cartesian: metadata's place as unit-sphere coordinates instead of angles.
        language: embeddings of variables' names; stand-ins if None. Not part of the state dict.
        seed: decides the initial weights; the global random state is not used.
    """

    inputs = "sensors with wavelengths, and variables of one band"

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 0,
        global_pool: bool = True,
        norm_eps: float = 1e-6,
        cartesian: bool = False,
        language: LanguageTable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth)
        if image_size < patch_size or patch_size < 1:
            raise InputError(f"image_size={image_size} must hold at least one patch of patch_size={patch_size}")
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.cartesian = cartesian
        self.recompute = False
        """True: activation checkpointing; blocks are computed again in the backward pass, for less memory."""
        self._positions = Derived()
        grid = image_size // patch_size
        with torch.device("meta"):  # layers fill themselves from the global random state; initialise() does not
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, embed_dim), requires_grad=False)
            self.coord_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.scale_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.time_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.patch_embed_spectral = SpectralPatchEmbed(embed_dim)
            self.patch_embed_variable = VariablePatchEmbed(embed_dim, language or LanguageTable())
            self.coord_fc = nn.Linear(embed_dim, embed_dim)
            self.scale_fc = nn.Linear(embed_dim, embed_dim)
            self.time_fc = nn.Linear(embed_dim, embed_dim)
            self.blocks = nn.ModuleList(Block(embed_dim, num_heads, norm_eps) for _ in range(depth))
            norm = nn.LayerNorm(embed_dim, eps=norm_eps)
            if global_pool:
                self.fc_norm = norm
            else:
                self.norm = norm
            self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        initialise(self, seed)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(embed_dim, grid))

    @property
    def language(self) -> LanguageTable:
        """The embeddings of variables' names."""
        return self.patch_embed_variable.language

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """Whether it encodes the sensor: any, of wavelengths or a variable of one band."""
        return sensor.spectral or sensor.channels == 1

    def compile_blocks(self) -> None:
        """torch.compile of every block, in place; names of the state dict stay.

        Crops, draws of channels and hypernetworks lie outside: a training step's shapes do not change, so nothing is
        compiled again. Each other shape is compiled once; after eight (torch's limit), further ones run as they are.
        """
        for module in self.modules():
            if isinstance(module, Block):
                # Without the hooks around it (FSDP's). Symbolic sizes break torch 2.11's layer-norm gradient.
                module.forward = torch.compile(module.forward, dynamic=False)  # type: ignore[method-assign]

    def kernels(self, views: Sequence[View]) -> list[Kernel]:
        """The patch kernels of each view's sensor, fitted to its patches."""
        made: dict[int, Kernel] = {}
        for spectral, embed in ((True, self.patch_embed_spectral), (False, self.patch_embed_variable)):
            mine = [i for i, view in enumerate(views) if view.sensor.spectral == spectral]
            if mine:
                fitted = embed.fitted([views[i].sensor for i in mine], [views[i].patch_kernel for i in mine])
                made |= zip(mine, fitted, strict=True)
        return [made[i] for i in range(len(views))]

    def patch_tokens(self, views: Sequence[View], kernels: Sequence[Kernel]) -> list[Tensor]:
        """The tokens (B, X, D) of each view's patches, before positions and metadata."""
        return [
            embed_patches(
                take_patches(cut_patches(view.x_BCHW, view.patch_kernel, shift=1), view.kept_BX),
                kernel,
                view.patch_kernel,
            )
            for view, kernel in zip(views, kernels, strict=True)
        ]

    def embed(self, views: Sequence[View]) -> tuple[list[Tensor], list[Kernel]]:
        """What enters the first block, for each view: tokens (B, T, D), the class token first; and its kernels."""
        kernels = self.kernels(views)
        unknown = (self.coord_token, self.scale_token, self.time_token)
        layers = (self.coord_fc, self.scale_fc, self.time_fc)
        metadata_S4 = torch.cat([view.metadata_B4 for view in views])
        placed_S1D = embed_metadata(metadata_S4, unknown, layers, self.cartesian)
        sequences = []
        for view, patches_BXD, placed_B1D in zip(
            views, self.patch_tokens(views, kernels), placed_S1D.split([v.x_BCHW.shape[0] for v in views]), strict=True
        ):
            position_1TD = self.positions(view.grid)
            position_BXD = position_1TD[:, 1:] if view.kept_BX is None else position_1TD[0, 1 + view.kept_BX]
            class_B1D = self.cls_token + position_1TD[:, :1] + placed_B1D
            sequences.append(torch.cat([class_B1D, patches_BXD + position_BXD + placed_B1D], dim=1))
        return sequences, kernels

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table of a token grid: (1, 1 + h*w, D)."""
        return fixed_positions(self._positions, self.pos_embed, grid)

    def forward_tokens(
        self,
        x_BCHW: Tensor,
        metadata: Tensor | None,
        *,
        sensor: Sensor,
        patch_kernel: int | None = None,
        levels: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T, D) after the last block, un-normed; patch tokens (B, D, h, w) after each block in levels.

        Raises:
            InputError: see ``forward_features``; or a level that is no block.
        """
        view = look(x_BCHW, sensor, metadata, patch_kernel)
        (z_BTD,), _ = self.embed([view])
        return through_blocks(self.blocks, z_BTD, view.grid, levels, self.recompute)

    def forward_features(
        self,
        x_BCHW: Tensor,
        metadata: Tensor | None = None,
        *,
        sensor: Sensor,
        patch_kernel: int | None = None,
    ) -> Tensor:
        """Image features.

        Args:
            x_BCHW: normalised image, on the model's device.
            metadata: (B, 4) rows of longitude, latitude (degrees), days since 1970-01-01 and area of one token (km^2);
                NaN, or None for all, is unknown.
            sensor: what the channels are.
            patch_kernel: side of a patch in pixels; the sensor's own by default.

        Returns:
            (B, D).

        Raises:
            InputError: the image is not of the sensor's bands, is smaller than a patch, or metadata is out of range.
        """
        z_BTD, _ = self.forward_tokens(x_BCHW, metadata, sensor=sensor, patch_kernel=patch_kernel)
        if self.global_pool:
            return self.fc_norm(z_BTD[:, 1:].mean(dim=1))
        return self.norm(z_BTD[:, 0])

    def forward(
        self,
        x_BCHW: Tensor,
        metadata: Tensor | None = None,
        *,
        sensor: Sensor,
        patch_kernel: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logits (B, num_classes), features (B, D)) of a normalised image; without classes the features twice."""
        features_BD = self.forward_features(x_BCHW, metadata, sensor=sensor, patch_kernel=patch_kernel)
        return self.head(features_BD), features_BD

    def encode(self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Features (B, D) of images in the sensor's raw units; ``normalize=False`` for values already normalised.

        Sides must be multiples of the sensor's patch. (``forward_features`` leaves out what fills none, as published.)

        Gradients flow: wrap the call in ``torch.inference_mode()`` where none are wanted.
        """
        return self.forward_features(self._prepare(x_BCHW, sensor, normalize), metadata, sensor=sensor)

    def encode_dense(
        self,
        x_BCHW: Tensor,
        sensor: Sensor,
        metadata: Tensor | None = None,
        normalize: bool = True,
        levels: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Un-normed patch tokens, one (B, D, h, w) per level, for dense decoders.

        Args:
            levels: indices of the blocks after which to take tokens; see ``default_levels``.
        """
        chosen = default_levels(len(self.blocks)) if levels is None else levels
        return self.forward_tokens(self._prepare(x_BCHW, sensor, normalize), metadata, sensor=sensor, levels=chosen)[1]

    def _prepare(self, x_BCHW: Tensor, sensor: Sensor, normalize: bool) -> Tensor:
        x_BCHW = images_for(self.cls_token, x_BCHW, sensor)
        check_whole(x_BCHW.shape[2], x_BCHW.shape[3], sensor.patch_kernel)
        return sensor.normalize(x_BCHW) if normalize else x_BCHW
