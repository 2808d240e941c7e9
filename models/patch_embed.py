"""Patch embedding by hypernetwork: the kernel for a channel is generated from its wavelength, or its variable's name.

Shapes: B batch, C channels, H W image, K = 128 code width, D width of the tokens, k side of a patch, Q = k*k its pixels,
h w token grid, L = h*w tokens, X tokens looked at (all L, or those kept), P = 16*16 pixels of a generated kernel,
N tokens of several sequences in one row.

A kernel W of 16 x 16 serves any patch size through a fixed matrix M (Q, P), FlexiViT's resize: the kernel for k x k
pixels is M W. For small patches that is what is computed. For patches above 16 x 16 the same product is cheaper the
other way round, (patch M) W: no kernel of k x k is ever made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.attention import attend
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


def cut_patches(x_BCHW: Tensor, patch_kernel: int, shift: int) -> Tensor:
    """Patches of an image as a view (B, h, w, C, k, k).

    Args:
        shift: 1 for what the encoder sees (the convolution's padding moves its grid up and left by one pixel, and zeros
            come in there); 0 for the pixels that a decoder predicts.
    """
    height, width = x_BCHW.shape[2:]
    h, w = token_grid(height, width, patch_kernel) if shift else (height // patch_kernel, width // patch_kernel)
    bottom, right = h * patch_kernel - height - shift, w * patch_kernel - width - shift
    if shift or bottom or right:
        x_BCHW = F.pad(x_BCHW, (shift, right, shift, bottom))
    x_BChkwk = x_BCHW.unflatten(3, (w, patch_kernel)).unflatten(2, (h, patch_kernel))
    return x_BChkwk.permute(0, 2, 4, 1, 3, 5)


def take_patches(patches_BhwCkk: Tensor, chosen_BX: Tensor | None) -> Tensor:
    """Those patches (row-major numbers), or all: (B, X, C, Q). Only what is chosen is copied."""
    if chosen_BX is None:
        return patches_BhwCkk.flatten(4).flatten(1, 2)
    row_B1 = torch.arange(chosen_BX.shape[0], device=chosen_BX.device)[:, None]
    width = patches_BhwCkk.shape[2]
    return patches_BhwCkk[row_B1, chosen_BX // width, chosen_BX % width].flatten(3)


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

    def forward(self, codes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Codes (C, K) of each sensor -> its kernels (C, P, D), unscaled, and the output of its bias token (K,), to
        which ``fc_bias`` applies.

        The sensors do not see each other; they share the matrix products, so that the 128 x 256 D numbers of
        ``fc_weight`` are read once, and get their gradient once.
        """
        lengths = [CODE_DIM + code_CK.shape[0] + 1 for code_CK in codes]
        sequences = [torch.cat([self.weight_tokens, code_CK, self.bias_token]) for code_CK in codes]
        out = self._transform(torch.cat(sequences), lengths).split(lengths)
        entering = torch.cat([o[CODE_DIM:-1] + code_CK for o, code_CK in zip(out, codes, strict=True)])
        kernels = self.fc_weight(entering).unflatten(1, (GENERATED_KERNEL**2, self.dim))
        split = kernels.split([code_CK.shape[0] for code_CK in codes])
        return [(kernel_CPD, o[-1]) for kernel_CPD, o in zip(split, out, strict=True)]

    def _transform(self, z_NK: Tensor, lengths: Sequence[int]) -> Tensor:
        """The post-norm transformer layer, over sequences of these lengths."""
        layer = self.transformer_encoder.layers[0]
        qkv_NX = F.linear(z_NK, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
        seen_NK = attend(qkv_NX, layer.self_attn.num_heads, tuple((1, length) for length in lengths))
        z_NK = layer.norm1(z_NK + layer.self_attn.out_proj(seen_NK))
        return layer.norm2(z_NK + layer.linear2(F.gelu(layer.linear1(z_NK))))


@dataclass(frozen=True)
class Kernel:
    """What a hypernetwork makes for one sensor: its channels' codes after the residual block (C, K), kernels (C, P, D),
    or (C, Q, D) once fitted to small patches, and bias (D,), the two unscaled."""

    code_CK: Tensor
    weight_CPD: Tensor
    bias_D: Tensor


@functools.lru_cache(maxsize=4096)
@torch.inference_mode(False)
def _band_code(wavelength_nm: float, bandwidth_nm: float, device: torch.device) -> Tensor:
    """The code (K,) of one band, kept on the device: each training step draws other bands of a sensor."""
    wavelength_K = fourier_expansion(torch.tensor(wavelength_nm), WAVELENGTH_NM, CODE_DIM)
    return (wavelength_K + fourier_expansion(torch.tensor(bandwidth_nm), BANDWIDTH_NM, CODE_DIM)).to(device)


class SpectralPatchEmbed(nn.Module):
    """The hypernetwork for sensors whose bands have wavelengths and bandwidths."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight_generator = WeightGenerator(dim)
        self.fclayer = ResidualBlock(CODE_DIM)

    def descriptions(self, sensor: Sensor) -> Tensor:
        """Fourier codes of the bands: (C, K), before the residual block."""
        device, bands = self.fclayer.w1.weight.device, zip(sensor.wavelengths_nm, sensor.bandwidths_nm, strict=True)
        return torch.stack([_band_code(*band, device) for band in bands])

    def forward(self, sensors: Sequence[Sensor]) -> list[Kernel]:
        """The kernels of each sensor."""
        described = torch.cat([self.descriptions(sensor) for sensor in sensors])
        codes = self.fclayer(described).split([sensor.channels for sensor in sensors])
        made = self.weight_generator(codes)
        bias_SD = self.weight_generator.fc_bias(torch.stack([bias_K for _, bias_K in made]))
        return [Kernel(code, kernel, bias) for code, (kernel, _), bias in zip(codes, made, bias_SD, strict=True)]


class VariablePatchEmbed(SpectralPatchEmbed):
    """The hypernetwork for variables, described by the language embedding of their name."""

    def __init__(self, dim: int, language: LanguageTable) -> None:
        super().__init__(dim)
        self.language = language
        self.language_proj = nn.Linear(LANGUAGE_DIM, CODE_DIM)

    def descriptions(self, sensor: Sensor) -> Tensor:
        """The projected embedding of the variable's name: (1, K)."""
        if sensor.channels != 1:
            raise InputError(f"sensor {sensor.name!r}: a variable has one band, this one has {sensor.channels}")
        return self.language_proj(self.language.vector(sensor.variable, self.language_proj.weight.device))[None]


def fit_kernel(kernel: Kernel, patch_kernel: int) -> Kernel:
    """The kernel for patches of k x k pixels: resized where that is the cheaper way round (see the top)."""
    if patch_kernel >= GENERATED_KERNEL:
        return kernel
    generated = (GENERATED_KERNEL, GENERATED_KERNEL)
    weight_CQD = resize_kernel(kernel.weight_CPD, generated, (patch_kernel, patch_kernel))
    return dataclasses.replace(kernel, weight_CPD=weight_CQD)


def embed_patches(patches_BXCQ: Tensor, kernel: Kernel, patch_kernel: int) -> Tensor:
    """Patches of k x k pixels and a kernel fitted to them -> tokens (B, X, D); ``KERNEL_SCALE`` comes in here."""
    batch, count = patches_BXCQ.shape[:2]
    if patch_kernel > GENERATED_KERNEL:
        generated, size = (GENERATED_KERNEL, GENERATED_KERNEL), (patch_kernel, patch_kernel)
        patches_BXCQ = patches_BXCQ @ kernel_resize_matrix(generated, size, str(patches_BXCQ.device))
    flat_NV, weight_VD = patches_BXCQ.reshape(batch * count, -1), kernel.weight_CPD.flatten(0, 1)
    tokens_ND = torch.addmm(kernel.bias_D, flat_NV, weight_VD, beta=KERNEL_SCALE, alpha=KERNEL_SCALE)
    return tokens_ND.unflatten(0, (batch, count))


class PatchPredictor(nn.Module):
    """Decoder tokens -> pixels, by a Linear layer generated from the channels' codes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight_generator = WeightGenerator(dim)

    def forward(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes (C, K) of each sensor -> its kernels (C, P, E), unscaled, E the decoder's width."""
        return [kernel_CPE for kernel_CPE, _ in self.weight_generator(codes)]


def predict_patches(z_BXE: Tensor, kernel_CPE: Tensor, patch_kernel: int) -> Tensor:
    """Decoder tokens -> values (B, X, C, Q) of one patch each."""
    generated, size = (GENERATED_KERNEL, GENERATED_KERNEL), (patch_kernel, patch_kernel)
    z_BXE = z_BXE * KERNEL_SCALE
    channels, dim = kernel_CPE.shape[0], kernel_CPE.shape[2]
    if patch_kernel > GENERATED_KERNEL:
        values_BXCP = F.linear(z_BXE, kernel_CPE.reshape(-1, dim)).unflatten(2, (channels, -1))
        return F.linear(values_BXCP, kernel_resize_matrix(generated, size, str(z_BXE.device)))
    kernel_CQE = resize_kernel(kernel_CPE, generated, size)
    return F.linear(z_BXE, kernel_CQE.reshape(-1, dim)).unflatten(2, (channels, -1))
