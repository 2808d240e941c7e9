"""The public Copernicus-FM encoder rebuilt, and the parts of its pretraining model: see public_formulation.py.

Facts: arXiv 2503.11849 and the public repository zhu-xlab/Copernicus-FM (Copernicus-FM/src: model_vit.py,
dynamic_hypernetwork_pretrain.py, flexivit, aurora/fourier.py; timm's Block). No line is theirs. What costs time there
costs time here, on purpose and no more than there: kernels are generated anew in each forward pass, the resize matrix
and its pseudo-inverse too (256 interpolations and a float32 SVD on the CPU, then a copy that waits for the device),
expansions take float64 on the device and check their range, which waits for it, as does each "is any row unknown?".
Names and shapes of the state dict are the published ones.

Shapes: B batch, C channels, H W image, D encoder width, E decoder width, p q kernel sides, L patch tokens, T = 1 + L,
K = 128 code width, X = 16*16*D generated values of a channel, V = k*k*C values of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.sensors import Sensor

CODE, SIDE, SCALE = 128, 16, 0.01
"""Width of a channel's code, side of a generated kernel, factor on what is generated."""


class Expansion:
    """Sines and cosines at wavelengths from lower to upper, in float64: (...,) -> (..., dim) float32.

    Raises:
        ValueError: checked, and a magnitude outside lower..upper that is not 0.
    """

    def __init__(self, lower: float, upper: float, checked: bool = True) -> None:
        self.lower, self.upper, self.checked = lower, upper, checked

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        inside = torch.logical_and(x.abs() >= self.lower, (x.abs() <= self.upper).all())
        fits = torch.logical_or(inside, x == 0).all()
        if self.checked and not fits:  # on a GPU: waits
            raise ValueError(f"a value lies outside {self.lower}..{self.upper}")
        x = x.double()
        wavelengths = torch.logspace(
            math.log10(self.lower), math.log10(self.upper), dim // 2, base=10, device=x.device, dtype=x.dtype
        )
        phase = torch.einsum("...i,j->...ij", x, 2 * math.pi / wavelengths)
        return torch.cat([phase.sin(), phase.cos()], dim=-1).float()


def resized_kernel(kernel_DCpq: Tensor, side: int) -> Tensor:
    """FlexiViT's pseudo-inverse resize of kernels (D, C, 16, 16) -> (D, C, side, side), its matrix made anew."""
    rows = []
    for pixel in range(SIDE * SIDE):
        unit = torch.zeros(SIDE, SIDE)
        unit[pixel // SIDE, pixel % SIDE] = 1.0
        rows.append(F.interpolate(unit[None, None], (side, side), mode="bicubic", antialias=True).flatten())
    matrix = torch.linalg.pinv(torch.stack(rows)).to(kernel_DCpq.device)

    def one(kernel_pq: Tensor) -> Tensor:
        return (matrix @ kernel_pq.reshape(-1)).reshape(side, side)

    return torch.vmap(torch.vmap(one, 0, 0), 1, 1)(kernel_DCpq)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(CODE, CODE), nn.Linear(CODE, CODE)

    def forward(self, code_CK: Tensor) -> Tensor:
        return code_CK + F.relu(self.w2(F.relu(self.w1(code_CK), inplace=True)), inplace=True)


class Generator(nn.Module):
    """Codes (C, K) -> kernels (C, 16*16*D) and a bias (D,)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(CODE, nhead=4, dim_feedforward=2048, dropout=0.0, activation="gelu")
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.fc_weight, self.fc_bias = nn.Linear(CODE, SIDE * SIDE * dim), nn.Linear(CODE, dim)
        self.weight_tokens = nn.Parameter(torch.zeros(CODE, CODE))
        self.bias_token = nn.Parameter(torch.zeros(1, CODE))

    def forward(self, code_CK: Tensor) -> tuple[Tensor, Tensor]:
        out = self.transformer_encoder(torch.cat([torch.cat([self.weight_tokens, code_CK]), self.bias_token]))
        return self.fc_weight(out[CODE:-1] + code_CK), self.fc_bias(out[-1])


class Embed(nn.Module):
    """Image and channels' codes -> tokens (B, L, D) of all patches, by a convolution with padding 1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.weight_generator, self.fclayer = dim, Generator(dim), Residual()

    def convolve(self, x_BCHW: Tensor, code_CK: Tensor, side: int) -> tuple[Tensor, Tensor]:
        code_CK = self.fclayer(code_CK)
        flat_CX, bias_D = self.weight_generator(code_CK)
        kernel_DCpq = flat_CX.view(-1, SIDE, SIDE, self.dim).permute(3, 0, 1, 2)
        if side != SIDE:
            kernel_DCpq = resized_kernel(kernel_DCpq, side)
        z = F.conv2d(x_BCHW, kernel_DCpq * SCALE, bias=bias_D * SCALE, stride=side, padding=1)
        return z.flatten(2).transpose(1, 2), code_CK


class SpectralEmbed(Embed):
    wavelength, bandwidth = Expansion(100, 1e9), Expansion(1, 1e9)

    def forward(self, x_BCHW: Tensor, sensor: Sensor, side: int) -> tuple[Tensor, Tensor]:
        wavelengths_C = torch.tensor(list(sensor.wavelengths_nm), device=x_BCHW.device).float()
        bandwidths_C = torch.tensor(list(sensor.bandwidths_nm), device=x_BCHW.device).float()
        code_CK = self.wavelength(wavelengths_C, CODE) + self.bandwidth(bandwidths_C, CODE)
        return self.convolve(x_BCHW, code_CK, side)


class VariableEmbed(Embed):
    def __init__(self, dim: int, language: Mapping[str, Tensor]) -> None:
        super().__init__(dim)
        self.language = language
        self.language_proj = nn.Linear(2048, CODE)

    def forward(self, x_BCHW: Tensor, sensor: Sensor, side: int) -> tuple[Tensor, Tensor]:
        vector = self.language[sensor.variable].to(x_BCHW.device)
        return self.convolve(x_BCHW, self.language_proj(vector.unsqueeze(0)), side)


class Predictor(nn.Module):
    """Decoder tokens -> values (B, T, V), ordered (channel, row, column)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.weight_generator = dim, Generator(dim)

    def forward(self, y_BTE: Tensor, code_CK: Tensor, side: int) -> Tensor:
        flat_CX, _ = self.weight_generator(code_CK)  # its bias is made and never used
        kernel_ECpq = flat_CX.view(-1, SIDE, SIDE, self.dim).permute(3, 0, 1, 2)
        if side != SIDE:
            kernel_ECpq = resized_kernel(kernel_ECpq, side)
        weight_VE = kernel_ECpq.permute(1, 2, 3, 0).contiguous().view(-1, self.dim) * SCALE
        return F.linear(y_BTE, weight_VE)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        batch, tokens, dim = z_BTD.shape
        q, k, v = self.qkv(z_BTD).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z_BTD)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=eps), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=eps), Mlp(dim)

    def forward(self, z_BTD: Tensor) -> Tensor:
        z_BTD = z_BTD + self.attn(self.norm1(z_BTD))
        return z_BTD + self.mlp(self.norm2(z_BTD))


def resized_positions(table_1TD: Tensor, tokens: int) -> Tensor:
    """The position table for a square grid of so many patch tokens."""
    side, own = int(math.sqrt(tokens)), int(math.sqrt(table_1TD.shape[1] - 1))
    if side == own:
        return table_1TD
    grid = table_1TD[:, 1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    return torch.cat([table_1TD[:, :1], grid.permute(0, 2, 3, 1).reshape(1, side * side, -1)], dim=1)


class PublicEncoder(nn.Module):
    """The encoder as the public benchmark uses it.

    Args:
        language: variable's name -> embedding (2048,), on the CPU.
        cartesian: place as unit-sphere coordinates.
    """

    place_columns: tuple[int, ...] = (0, 1)  # longitude and latitude are looked at for unknowns

    def __init__(
        self,
        language: Mapping[str, Tensor],
        *,
        image_size: int = 224,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_classes: int = 0,
        global_pool: bool = True,
        norm_eps: float = 1e-6,
        cartesian: bool = False,
    ) -> None:
        super().__init__()
        dim, positions = embed_dim, 1 + (image_size // SIDE) ** 2
        self.global_pool, self.cartesian = global_pool, cartesian
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim), requires_grad=False)
        self.coord_token, self.scale_token, self.time_token = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(3))
        self.patch_embed_spectral, self.patch_embed_variable = SpectralEmbed(dim), VariableEmbed(dim, language)
        self.coord_fc, self.scale_fc, self.time_fc = (nn.Linear(dim, dim) for _ in range(3))
        self.blocks = nn.ModuleList(Block(dim, num_heads, norm_eps) for _ in range(depth))
        if global_pool:
            self.fc_norm = nn.LayerNorm(dim, eps=norm_eps)
        else:
            self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        self.place = Expansion(1e-7, 2) if cartesian else Expansion(0.0001, 720)
        self.area, self.days = Expansion(0.001, 5.1e8), Expansion(1, 365.25, checked=False)

    def place_embedding(self, lon_B: Tensor, lat_B: Tensor, dim: int) -> Tensor:
        if self.cartesian:
            lon_B, lat_B = lon_B * math.pi / 180, lat_B * math.pi / 180
            axes = (lon_B.cos() * lat_B.cos(), lon_B.sin() * lat_B.cos(), lat_B.sin())
            out = torch.cat([self.place(axis_B + 1 + 1e-7, dim // 3) for axis_B in axes], dim=-1)
            return torch.cat([out, torch.zeros(len(out), dim - out.shape[-1], device=out.device)], dim=-1)
        return torch.cat([self.place(lon_B + 180, dim // 2), self.place(lat_B + 90, dim // 2)], dim=-1)

    def positions(
        self, table_1TD: Tensor, metadata_B4: Tensor, unknown: Sequence[Tensor], layers: Sequence[nn.Module]
    ) -> Tensor:
        """Table plus metadata (B or 1, T, D); one unknown row makes the whole batch's value unknown."""
        lon_B, lat_B, days_B, area_B = metadata_B4.unbind(1)
        place, area, days = unknown
        dim = table_1TD.shape[-1]
        if not any(torch.isnan(metadata_B4[:, column]).any() for column in self.place_columns):
            place = self.place_embedding(lon_B, lat_B, dim).unsqueeze(1)
        if not torch.isnan(area_B).any():
            area = self.area(area_B, dim).unsqueeze(1)
        if not torch.isnan(days_B).any():
            days = self.days(days_B, dim).unsqueeze(1)
        return table_1TD + layers[0](place) + layers[1](area) + layers[2](days)

    def embed(self, x_BCHW: Tensor, metadata_B4: Tensor, sensor: Sensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patch tokens (B, L, D) with position; the class token (B or 1, 1, D); the channels' codes (C, K)."""
        patch_embed = self.patch_embed_spectral if sensor.spectral else self.patch_embed_variable
        z_BLD, code_CK = patch_embed(x_BCHW, sensor, side)
        position = self.positions(
            resized_positions(self.pos_embed, z_BLD.shape[1]), metadata_B4,
            (self.coord_token, self.scale_token, self.time_token), (self.coord_fc, self.scale_fc, self.time_fc),
        )  # fmt: skip
        return z_BLD + position[:, 1:], self.cls_token + position[:, :1], code_CK

    def forward(
        self, x_BCHW: Tensor, metadata_B4: Tensor, *, sensor: Sensor, patch_kernel: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """(logits, features (B, D)) of normalised images; metadata on the images' device."""
        z_BLD, class_B1D, _ = self.embed(x_BCHW, metadata_B4, sensor, patch_kernel or sensor.patch_kernel)
        z_BTD = torch.cat([class_B1D.expand(len(z_BLD), -1, -1), z_BLD], dim=1)
        for block in self.blocks:
            z_BTD = block(z_BTD)
        features_BD = self.fc_norm(z_BTD[:, 1:].mean(dim=1)) if self.global_pool else self.norm(z_BTD)[:, 0]
        return self.head(features_BD), features_BD
