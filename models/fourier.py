"""Fourier expansion of scalars (wavelengths, bandwidths, coordinates, areas, days) into vectors.

Copernicus-FM takes the expansion of Aurora (Bodnar et al., arXiv 2405.13063): sines and cosines at wavelengths spaced
evenly in their logarithm. Shapes: B batch, D width of the expansion.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from copernicus.datasets.sensors import InputError

WAVELENGTH_NM = (100.0, 1e9)
BANDWIDTH_NM = (1.0, 1e9)
DEGREES = (0.0001, 720.0)
UNIT_SPHERE = (1e-7, 2.0)
AREA_KM2 = (0.001, 5.1e8)  # up to the surface of the Earth
DAYS = (1.0, 365.25)


@functools.cache
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def _angular_frequencies(lower: float, upper: float, count: int, device: torch.device) -> Tensor:
    wavelengths = torch.logspace(math.log10(lower), math.log10(upper), count, base=10, dtype=torch.float64)
    return (2 * math.pi / wavelengths).to(device)


def fourier_expansion(x: Tensor, limits: tuple[float, float], dim: int, bounded: bool = True) -> Tensor:
    """concat(sin(2 pi x / w), cos(2 pi x / w)) for dim/2 wavelengths w, log-spaced from limits[0] to limits[1].

    Computed in float64, for x / w reaches 1e9. The public code refuses magnitudes outside the limits (0 excepted).
    Here a magnitude in (0, lower) counts as lower, so that a place 10 m from the pole or the date line does not stop a
    run; one above upper is an error.

    Args:
        x: (...) values.
        limits: the shortest and the longest wavelength, in the unit of x.
        dim: even width of the expansion.
        bounded: False takes any value (time: the expansion is periodic on purpose).

    Returns:
        (..., dim) float32.

    Raises:
        InputError: bounded, and a magnitude above the upper limit.
    """
    lower, upper = limits
    if bounded:
        magnitude = x.abs()
        if bool((magnitude > upper).any()):
            raise InputError(f"value {float(magnitude.max()):g} is beyond {upper:g}, the largest that can be encoded")
        x = _not_below(x, lower)
    return _expand(x, limits, dim)


def _not_below(x: Tensor, lower: float) -> Tensor:
    magnitude = x.abs()
    return torch.where((magnitude > 0) & (magnitude < lower), x.sign() * lower, x)


def _expand(x: Tensor, limits: tuple[float, float], dim: int) -> Tensor:
    phase = x.double()[..., None] * _angular_frequencies(*limits, dim // 2, x.device)
    return torch.cat([phase.sin(), phase.cos()], dim=-1).float()


def encode_coordinates(lon_B: Tensor, lat_B: Tensor, dim: int, cartesian: bool = False) -> Tensor:
    """Degrees east and north -> (B, D): half for each angle, or, cartesian, a third for each axis of the unit sphere.

    The cartesian expansion is padded with zeros where three even parts do not fill D. Like the two functions below, this
    one does not look whether its values are possible, which would make a GPU wait: ``vit.check_metadata`` does.
    """
    if not cartesian:
        angles = (_not_below(angle_B, DEGREES[0]) for angle_B in (lon_B + 180, lat_B + 90))
        halves = [_expand(angle_B, DEGREES, dim // 2) for angle_B in angles]
        return torch.cat(halves, dim=-1)
    lon_B, lat_B = torch.deg2rad(lon_B), torch.deg2rad(lat_B)
    axes = (lat_B.cos() * lon_B.cos(), lat_B.cos() * lon_B.sin(), lat_B.sin())
    part = dim // 6 * 2
    # The shift keeps the sum above the shortest wavelength: -1 maps to 1e-7, not to 0.
    expanded = [_expand(_not_below(axis_B + 1 + 1e-7, UNIT_SPHERE[0]), UNIT_SPHERE, part) for axis_B in axes]
    return torch.nn.functional.pad(torch.cat(expanded, dim=-1), (0, dim - 3 * part))


def encode_area(area_km2_B: Tensor, dim: int) -> Tensor:
    """Ground area of one token, km^2 -> (B, D)."""
    return _expand(_not_below(area_km2_B, AREA_KM2[0]), AREA_KM2, dim)


def encode_days(days_B: Tensor, dim: int) -> Tensor:
    """Days since 1970-01-01 -> (B, D)."""
    return _expand(days_B, DAYS, dim)
