"""The Copernicus-FM encoder: a vision transformer for any sensor, with kernels and metadata made on the fly.

Facts: paper arXiv 2503.11849 and its public implementation. Names and shapes of the state dict are the published ones.
Shapes: B batch, C channels, H W image, D width, h w token grid, L = h*w patch tokens, T = 1 + L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.sensors import METADATA_FIELDS, InputError, Sensor
from copernicus.models import fourier
from copernicus.models.initialise import initialise
from copernicus.models.language import LanguageTable
from copernicus.models.patch_embed import PatchEmbed, SpectralPatchEmbed, VariablePatchEmbed, token_grid
from copernicus.models.position import resize_table, sincos_table

_METADATA_LIMITS = ((-180.0, 360.0), (-90.0, 90.0), (-1e7, 1e7), (0.0, fourier.AREA_KM2[1]))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(z_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z_BTD)))


class Block(nn.Module):
    """Pre-norm transformer block, MLP ratio 4."""

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        z_BTD = z_BTD + self.attn(self.norm1(z_BTD))
        return z_BTD + self.mlp(self.norm2(z_BTD))


def check_metadata(metadata_B4: Tensor | None, batch: int) -> Tensor:
    """The rows as a (B, 4) tensor, all unknown for None.

    Raises:
        InputError: another shape, or a value no place, date or area can have; the message names row and field.
    """
    if metadata_B4 is None:
        return torch.full((batch, len(METADATA_FIELDS)), torch.nan)
    if tuple(metadata_B4.shape) != (batch, len(METADATA_FIELDS)):
        raise InputError(
            f"metadata has shape {tuple(metadata_B4.shape)}; for a batch of {batch} images it is "
            f"({batch}, {len(METADATA_FIELDS)}): {', '.join(METADATA_FIELDS)}"
        )
    lower, upper = torch.tensor(_METADATA_LIMITS, dtype=metadata_B4.dtype, device=metadata_B4.device).T
    wrong_B4 = (metadata_B4 < lower) | (metadata_B4 > upper)
    if bool(wrong_B4.any()):
        row, field = (int(i) for i in wrong_B4.nonzero()[0])
        low, high = _METADATA_LIMITS[field]
        raise InputError(
            f"metadata row {row}: {METADATA_FIELDS[field]} is {float(metadata_B4[row, field]):g}, outside "
            f"{low:g}..{high:g} (NaN means unknown)"
        )
    return metadata_B4


def embed_metadata(
    metadata_B4: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    layers: tuple[nn.Linear, nn.Linear, nn.Linear],
    cartesian: bool,
) -> Tensor:
    """Sum of the embeddings of place, area and day: (B, 1, D), to be added to every token.

    A row's unknown value takes the learned token instead of its expansion, before the same Linear; the public code
    does so for the whole batch as soon as one row is unknown. The expansions are made where the metadata lie (on the
    CPU: no wait for the device).

    Args:
        metadata_B4: rows of (lon, lat, days, token area), checked.
        tokens: learned (1, 1, D) stand-ins for unknown place, area and time.
        layers: Linear(D -> D) of place, area and time.
        cartesian: place as unit-sphere coordinates.
    """
    lon_B, lat_B, days_B, area_B = metadata_B4.unbind(1)
    known_B3 = ~torch.stack([lon_B.isnan() | lat_B.isnan(), area_B.isnan(), days_B.isnan()], dim=1)
    lon_B, lat_B, days_B, area_B = metadata_B4.nan_to_num().unbind(1)
    dim, device = tokens[0].shape[-1], tokens[0].device
    expanded_B3D = torch.stack(
        [
            fourier.encode_coordinates(lon_B, lat_B, dim, cartesian),
            fourier.encode_area(area_B, dim),
            fourier.encode_days(days_B, dim),
        ],
        dim=1,
    )
    unknown_13D = torch.cat(tokens, dim=1)
    chosen_B3D = torch.where(known_B3[..., None].to(device), expanded_B3D.to(device), unknown_13D)
    place_BD, area_BD, time_BD = (layer(chosen_B3D[:, i]) for i, layer in enumerate(layers))
    return (place_BD + area_BD + time_BD)[:, None]


def default_levels(depth: int) -> tuple[int, ...]:
    """Blocks whose outputs feed dense decoders: the published ones for base and large, else four spread evenly."""
    if depth in (12, 24):
        return {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}[depth]
    count = min(4, depth)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))


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
        if embed_dim % 4 or embed_dim % num_heads:
            raise InputError(f"embed_dim={embed_dim} must be a multiple of 4 and of num_heads={num_heads}")
        self.embed_dim = embed_dim
        self.global_pool = global_pool
        self.cartesian = cartesian
        self.language = language if language is not None else LanguageTable()
        grid = image_size // patch_size
        with torch.device("meta"):  # layers fill themselves from the global random state; initialise() does not
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid**2, embed_dim), requires_grad=False)
            self.coord_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.scale_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.time_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.patch_embed_spectral = SpectralPatchEmbed(embed_dim)
            self.patch_embed_variable = VariablePatchEmbed(embed_dim, self.language)
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

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """Whether it encodes the sensor: any, of wavelengths or a variable of one band."""
        return sensor.spectral or sensor.channels == 1

    def patch_tokens(self, x_BCHW: Tensor, sensor: Sensor, patch_kernel: int | None) -> tuple[Tensor, Tensor]:
        """Normalised image -> tokens (B, D, h, w) and the channels' codes (C, 128).

        Raises:
            InputError: not a batch of the sensor's bands, or an image smaller than one patch.
        """
        if x_BCHW.ndim != 4 or x_BCHW.shape[1] != sensor.channels:
            raise InputError(
                f"sensor {sensor.name!r}: expected a batch of shape (B, {sensor.channels}, H, W), "
                f"got {tuple(x_BCHW.shape)}"
            )
        patch_kernel = patch_kernel or sensor.patch_kernel
        token_grid(x_BCHW.shape[2], x_BCHW.shape[3], patch_kernel)
        embed: PatchEmbed = self.patch_embed_spectral if sensor.spectral else self.patch_embed_variable
        code_CK = embed.code(sensor)
        return embed(x_BCHW, code_CK, patch_kernel), code_CK

    def embed(
        self, x_BCHW: Tensor, metadata_B4: Tensor, sensor: Sensor, patch_kernel: int | None
    ) -> tuple[Tensor, tuple[int, int], Tensor]:
        """What enters the first block: tokens (B, T, D), the class token first; their grid; the channels' codes."""
        tokens_BDhw, code_CK = self.patch_tokens(x_BCHW, sensor, patch_kernel)
        grid = (tokens_BDhw.shape[2], tokens_BDhw.shape[3])
        unknown = (self.coord_token, self.scale_token, self.time_token)
        layers = (self.coord_fc, self.scale_fc, self.time_fc)
        added_BTD = resize_table(self.pos_embed, grid) + embed_metadata(metadata_B4, unknown, layers, self.cartesian)
        patches_BLD = tokens_BDhw.flatten(2).transpose(1, 2) + added_BTD[:, 1:]
        return torch.cat([self.cls_token + added_BTD[:, :1], patches_BLD], dim=1), grid, code_CK

    def forward_tokens(
        self,
        x_BCHW: Tensor,
        metadata: Tensor | None,
        *,
        sensor: Sensor,
        patch_kernel: int | None = None,
        levels: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, T, D) after the last block, un-normed; patch tokens (B, D, h, w) after each block in levels."""
        z_BTD, grid, _ = self.embed(x_BCHW, check_metadata(metadata, x_BCHW.shape[0]), sensor, patch_kernel)
        taken: dict[int, Tensor] = {}
        for index, block in enumerate(self.blocks):
            z_BTD = block(z_BTD)
            if index in levels:
                taken[index] = z_BTD[:, 1:].transpose(1, 2).unflatten(2, grid)
        if missing := [level for level in levels if level not in taken]:
            raise InputError(f"levels {missing} do not exist: the encoder has blocks 0..{len(self.blocks) - 1}")
        return z_BTD, [taken[level] for level in levels]

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
        x_BCHW = x_BCHW.to(self.cls_token.device)
        return sensor.normalize(x_BCHW) if normalize else x_BCHW
