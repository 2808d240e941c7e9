"""Patch embedding by hypernetwork: the kernel for a channel is generated from its wavelength, or its variable's name.

Shapes: B batch, C channels, H W image, K = 128 code width, D embedding width, p q kernel sides, h w token grid,
L = h*w tokens, P = 16*16 pixels of a generated kernel.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.fourier import BANDWIDTH_NM, WAVELENGTH_NM, fourier_expansion
from copernicus.models.language import LANGUAGE_DIM, LanguageTable

CODE_DIM = 128
GENERATED_KERNEL = 16
KERNEL_SCALE = 0.01
"""Factor on generated weights and biases, which keeps them small against what the generator puts out."""


@functools.cache
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def kernel_resize_matrix(size_from: tuple[int, int], size_to: tuple[int, int], device: str = "cpu") -> Tensor:
    """The matrix that turns a flattened kernel of one size into that of another: (to_p*to_q, from_p*from_q) float32.

    FlexiViT's pseudo-inverse resize (arXiv 2212.08013, section 3.4): patches resized by bicubic interpolation, times
    the resized kernel, give what the original patches gave with the original kernel, as nearly as possible.
    """
    if device != "cpu":
        return kernel_resize_matrix(size_from, size_to).to(device)
    p, q = size_from
    units = torch.eye(p * q, dtype=torch.float64).reshape(p * q, 1, p, q)
    resized = F.interpolate(units, size=size_to, mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(resized.reshape(p * q, -1)).float()


def resize_kernel(kernel_CPD: Tensor, size_from: tuple[int, int], size_to: tuple[int, int]) -> Tensor:
    """Resize flattened kernels (C, from_p*from_q, D) -> (C, to_p*to_q, D); the same tensor where sizes agree."""
    if size_from == size_to:
        return kernel_CPD
    return kernel_resize_matrix(size_from, size_to, str(kernel_CPD.device)) @ kernel_CPD


def token_grid(height: int, width: int, patch_kernel: int) -> tuple[int, int]:
    """Token grid (h, w) of a convolution of that kernel and stride, with padding 1.

    Raises:
        InputError: the image is smaller than one patch.
    """
    h, w = ((side + 2 - patch_kernel) // patch_kernel + 1 for side in (height, width))
    if h < 1 or w < 1:
        raise InputError(f"an image of {height} x {width} pixels holds no patch of {patch_kernel} x {patch_kernel}")
    return h, w


class ResidualBlock(nn.Module):
    """x + relu(W2 relu(W1 x)) on channel codes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, dim)
        self.w2 = nn.Linear(dim, dim)

    def forward(self, code_CK: Tensor) -> Tensor:
        return code_CK + F.relu(self.w2(F.relu(self.w1(code_CK))))


class WeightGenerator(nn.Module):
    """One transformer layer over [learned weight tokens, channel codes, a bias token], then a kernel per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.weight_tokens = nn.Parameter(torch.empty(CODE_DIM, CODE_DIM))
        self.bias_token = nn.Parameter(torch.empty(1, CODE_DIM))
        layer = nn.TransformerEncoderLayer(CODE_DIM, nhead=4, dim_feedforward=2048, dropout=0.0, activation="gelu")
        self.transformer_encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.fc_weight = nn.Linear(CODE_DIM, GENERATED_KERNEL**2 * dim)
        self.fc_bias = nn.Linear(CODE_DIM, dim)

    def forward(self, code_CK: Tensor) -> tuple[Tensor, Tensor]:
        """Codes -> kernels (C, P, D), unscaled, and the bias token's output (K,), to which fc_bias applies."""
        tokens = torch.cat([self.weight_tokens, code_CK, self.bias_token])
        out = self.transformer_encoder(tokens)
        kernel_CX = self.fc_weight(out[CODE_DIM:-1] + code_CK)
        return kernel_CX.view(code_CK.shape[0], GENERATED_KERNEL**2, self.dim), out[-1]


@functools.cache
@torch.inference_mode(False)
def _spectral_code(wavelengths_nm: tuple[float, ...], bandwidths_nm: tuple[float, ...], device: str) -> Tensor:
    if device != "cpu":
        return _spectral_code(wavelengths_nm, bandwidths_nm, "cpu").to(device)
    wavelength_CK = fourier_expansion(torch.tensor(wavelengths_nm), WAVELENGTH_NM, CODE_DIM)
    return wavelength_CK + fourier_expansion(torch.tensor(bandwidths_nm), BANDWIDTH_NM, CODE_DIM)


class PatchEmbed(nn.Module):
    """Image -> tokens by a generated convolution with stride k and padding 1.

    The padding is the published model's: token t sees pixels t*k-1 .. t*k+k-2, and the last row and column are never
    seen. Its weights expect that.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight_generator = WeightGenerator(dim)
        self.fclayer = ResidualBlock(CODE_DIM)

    def code(self, sensor: Sensor) -> Tensor:
        """The channels' codes (C, K) after the residual block."""
        raise NotImplementedError

    def forward(self, x_BCHW: Tensor, code_CK: Tensor, patch_kernel: int) -> Tensor:
        """Normalised image (B, C, H, W) and its channels' codes -> tokens (B, D, h, w)."""
        kernel_CPD, bias_K = self.weight_generator(code_CK)
        size = (patch_kernel, patch_kernel)
        kernel_CPD = resize_kernel(kernel_CPD, (GENERATED_KERNEL, GENERATED_KERNEL), size)
        kernel_CpqD = KERNEL_SCALE * kernel_CPD.unflatten(1, size)
        bias_D = KERNEL_SCALE * self.weight_generator.fc_bias(bias_K)
        return F.conv2d(x_BCHW, kernel_CpqD.permute(3, 0, 1, 2), bias_D, stride=patch_kernel, padding=1)


class PatchPredictor(nn.Module):
    """Decoder tokens -> pixels, by a Linear layer generated from the channels' codes.

    The published decoder puts out values ordered (channel, row, column) while its targets are ordered (row, column,
    channel); with several channels it pairs them wrongly, and differently for each draw of channels. ``published``
    keeps that; otherwise values come ordered as the targets are.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight_generator = WeightGenerator(dim)

    def forward(self, z_BLD: Tensor, code_CK: Tensor, patch_kernel: int, published: bool) -> Tensor:
        """Tokens (B, L, D) -> values (B, L, k*k*C), of one patch each."""
        kernel_CPD, _ = self.weight_generator(code_CK)
        size = (patch_kernel, patch_kernel)
        kernel_CPD = KERNEL_SCALE * resize_kernel(kernel_CPD, (GENERATED_KERNEL, GENERATED_KERNEL), size)
        ordered = kernel_CPD if published else kernel_CPD.transpose(0, 1)
        return F.linear(z_BLD, ordered.reshape(-1, kernel_CPD.shape[-1]))


class SpectralPatchEmbed(PatchEmbed):
    """For sensors whose bands have wavelengths and bandwidths."""

    def code(self, sensor: Sensor) -> Tensor:
        device = str(self.fclayer.w1.weight.device)
        return self.fclayer(_spectral_code(sensor.wavelengths_nm, sensor.bandwidths_nm, device))


class VariablePatchEmbed(PatchEmbed):
    """For variables, described by the language embedding of their name."""

    def __init__(self, dim: int, language: LanguageTable) -> None:
        super().__init__(dim)
        self.language = language
        self.language_proj = nn.Linear(LANGUAGE_DIM, CODE_DIM)

    def code(self, sensor: Sensor) -> Tensor:
        if sensor.channels != 1:
            raise InputError(f"sensor {sensor.name!r}: a variable has one band, this one has {sensor.channels}")
        vector = self.language.vector(sensor.variable).to(self.language_proj.weight.device)
        return self.fclayer(self.language_proj(vector)[None])
