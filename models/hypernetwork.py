"""The hypernetworks: a patch kernel for each channel from its wavelength and bandwidth, or from its variable's name.

Shapes: C channels, S sensors, K = 128 code width, D width of what is generated for, P = 16*16 pixels of a generated
kernel, N tokens of several sequences in one row, X = 3 K.
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
from copernicus.models.derived import Derived
from copernicus.models.fourier import BANDWIDTH_NM, WAVELENGTH_NM, fourier_expansion
from copernicus.models.language import LANGUAGE_DIM, LanguageTable
from copernicus.models.resize import GENERATED_KERNEL, resize_kernel

CODE_DIM = 128


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


def fit_kernel(kernel: Kernel, patch_kernel: int) -> Kernel:
    """The kernel for patches of k x k pixels: resized where that is the cheaper way round (see the top)."""
    if patch_kernel >= GENERATED_KERNEL:
        return kernel
    generated = (GENERATED_KERNEL, GENERATED_KERNEL)
    weight_CQD = resize_kernel(kernel.weight_CPD, generated, (patch_kernel, patch_kernel))
    return dataclasses.replace(kernel, weight_CPD=weight_CQD)


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
        self._kept = Derived(sampled=True)

    def descriptions(self, sensor: Sensor) -> Tensor:
        """Fourier codes of the bands: (C, K), before the residual block."""
        device, bands = self.fclayer.w1.weight.device, zip(sensor.wavelengths_nm, sensor.bandwidths_nm, strict=True)
        return torch.stack([_band_code(*band, device) for band in bands])

    def sources(self, sensor: Sensor) -> list[Tensor]:
        """All that a sensor's kernels follow from."""
        return list(self.parameters())

    def fitted(self, sensors: Sequence[Sensor], patch_kernels: Sequence[int]) -> list[Kernel]:
        """The kernels of each sensor, fitted to its patches.

        Where no gradients can reach them they are kept for the next batch, until a weight changes. A pass from which
        gradients may come forgets them, for not every optimiser says that it writes.
        """
        wanted = list(zip(sensors, patch_kernels, strict=True))
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            self._kept.clear()
            return [fit_kernel(kernel, size) for kernel, size in zip(self(sensors), patch_kernels, strict=True)]
        device = self.fclayer.w1.weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return [
            self._kept.get((s, k, dtype), self.sources(s), functools.partial(self._fitted_one, s, k)) for s, k in wanted
        ]

    def _fitted_one(self, sensor: Sensor, patch_kernel: int) -> Kernel:
        return fit_kernel(self([sensor])[0], patch_kernel)

    def forward(self, sensors: Sequence[Sensor]) -> list[Kernel]:
        """The kernels of each sensor, made anew."""
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

    def sources(self, sensor: Sensor) -> list[Tensor]:
        return [*super().sources(sensor), self.language.vector(sensor.variable)]

    def descriptions(self, sensor: Sensor) -> Tensor:
        """The projected embedding of the variable's name: (1, K)."""
        if sensor.channels != 1:
            raise InputError(f"sensor {sensor.name!r}: a variable has one band, this one has {sensor.channels}")
        return self.language_proj(self.language.vector(sensor.variable, self.language_proj.weight.device))[None]


class PatchPredictor(nn.Module):
    """Decoder tokens -> pixels, by a Linear layer generated from the channels' codes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight_generator = WeightGenerator(dim)

    def forward(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """Codes (C, K) of each sensor -> its kernels (C, P, E), unscaled, E the decoder's width."""
        return [kernel_CPE for kernel_CPE, _ in self.weight_generator(codes)]
