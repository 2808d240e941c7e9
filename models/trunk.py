"""A vision transformer but for its patch embedding: what plain ones and DOFA share.

Shapes: B batch, C channels, H W image, D width, h w token grid, L = h*w patch tokens, T = 1 + L.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.blocks import Block, check_sizes, default_levels, through_blocks
from copernicus.models.encoder import images_for
from copernicus.models.initialise import initialise
from copernicus.models.patches import check_whole
from copernicus.models.position import resize_table, sincos_table

NORM_EPS = 1e-6


class Trunk(nn.Module):
    """A vision transformer but for its patch embedding, which subclasses give: see ``patch_tokens``.

    Args:
        grid: side of the stored position table, in tokens; other grids take it resized.
        embed_dim: width D, a multiple of 4 and of num_heads.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: outputs of ``head``; 0 for none.
        global_pool: True: features are the mean of the patch tokens, then ``fc_norm``; False: ``norm``, then the
            class token.
        learned_position: the table is trained (timm) or fixed (MAE, DOFA); both start as sines and cosines.
    """

    inputs = ""
    patch_embed: nn.Module
    patch_size: int
    """Side of a patch, pixels."""

    def __init__(
        self,
        patch_embed: nn.Module,
        grid: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        global_pool: bool,
        learned_position: bool,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, num_heads, depth)
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.patch_embed = patch_embed
        with torch.device("meta"):  # as in vit.py: initialise() fills them, without the global random state
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, embed_dim), requires_grad=learned_position)
            self.blocks = nn.ModuleList(Block(embed_dim, num_heads, NORM_EPS) for _ in range(depth))
            norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
            if global_pool:
                self.fc_norm = norm
            else:
                self.norm = norm
            self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.grid = grid

    def fill(self, seed: int, skip: Sequence[str] = ()) -> None:
        """Initial weights, decided by the seed alone."""
        initialise(self, seed, skip)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_table(self.embed_dim, self.grid))

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """Whether it encodes the sensor."""
        raise NotImplementedError

    def patch_tokens(self, x_BCHW: Tensor, sensor: Sensor) -> Tensor:
        """Normalised image -> tokens (B, D, h, w), without positions."""
        raise NotImplementedError

    def forward_tokens(
        self, x_BCHW: Tensor, *, sensor: Sensor, levels: Sequence[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T, D) after the last block, un-normed; patch tokens (B, D, h, w) after each block in levels.

        Raises:
            InputError: an image that the model cannot take, or a level that it does not have.
        """
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != sensor.channels:
            raise InputError(
                f"sensor {sensor.name!r}: expected a batch of shape (B, {sensor.channels}, H, W), "
                f"got {tuple(x_BCHW.shape)}"
            )
        tokens_BDhw = self.patch_tokens(x_BCHW, sensor)
        grid = (tokens_BDhw.shape[2], tokens_BDhw.shape[3])
        class_B1D = self.cls_token.expand(len(x_BCHW), -1, -1)
        z_BTD = torch.cat([class_B1D, tokens_BDhw.flatten(2).transpose(1, 2)], dim=1)
        z_BTD = z_BTD + resize_table(self.pos_embed, grid)
        return through_blocks(self.blocks, z_BTD, grid, levels)

    def forward_features(self, x_BCHW: Tensor, *, sensor: Sensor) -> Tensor:
        """Normalised image -> features (B, D)."""
        z_BTD, _ = self.forward_tokens(x_BCHW, sensor=sensor)
        if self.global_pool:
            return self.fc_norm(z_BTD[:, 1:].mean(dim=1))
        return self.norm(z_BTD)[:, 0]

    def forward(self, x_BCHW: Tensor, *, sensor: Sensor) -> Tensor:
        """Normalised image -> logits (B, num_classes); without classes, features."""
        return self.head(self.forward_features(x_BCHW, sensor=sensor))

    def encode(self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Features (B, D) of images in the sensor's raw units; ``normalize=False`` for values already normalised.

        ``metadata`` is of no use to this model and is not read.
        """
        return self.forward_features(self._prepare(x_BCHW, sensor, normalize), sensor=sensor)

    def encode_dense(
        self,
        x_BCHW: Tensor,
        sensor: Sensor,
        metadata: Tensor | None = None,
        normalize: bool = True,
        levels: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Un-normed patch tokens, one (B, D, h, w) per level, for dense decoders; see ``default_levels``."""
        chosen = default_levels(len(self.blocks)) if levels is None else levels
        return self.forward_tokens(self._prepare(x_BCHW, sensor, normalize), sensor=sensor, levels=chosen)[1]

    def _prepare(self, x_BCHW: Tensor, sensor: Sensor, normalize: bool) -> Tensor:
        x_BCHW = images_for(self.cls_token, x_BCHW, sensor)
        if self.takes(sensor):  # what it does not take is refused by name, further on
            check_whole(x_BCHW.shape[-2], x_BCHW.shape[-1], self.patch_size)
        return sensor.normalize(x_BCHW) if normalize else x_BCHW
