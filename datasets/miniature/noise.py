"""Randomness as a function of place: hashed lattices, smooth noise on the sphere and on a plane, keyed generators.

Every function here gives the same value for the same arguments, whoever asks and in whatever order; that is what makes
the miniature planet one planet, at any zoom, on any number of workers.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np

EARTH_RADIUS_KM = 6371.0
_MIX = tuple(np.array(m, np.uint64) for m in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_SHIFT = tuple(np.array(n, np.uint64) for n in (29, 30, 27, 11))


def keyed_rng(seed: int, purpose: str, *ids: int) -> np.random.Generator:
    """A generator of its own for each (seed, purpose, ids)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *ids])))


@lru_cache(maxsize=4096)
def stream(seed: int, purpose: str) -> int:
    """A 64-bit number that tells one field's lattice from another's."""
    return int(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]).generate_state(1, np.uint64)[0])


def _absorb(hashed: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
    h = (hashed ^ np.asarray(coordinate).astype(np.int64, copy=False).view(np.uint64)) * _MIX[0]
    return h ^ (h >> _SHIFT[0])


def _finish(h: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64, and its upper bits as a number in [0, 1)."""
    h = (h ^ (h >> _SHIFT[1])) * _MIX[1]
    h = (h ^ (h >> _SHIFT[2])) * _MIX[2]
    return (h >> _SHIFT[3]) * 2.0**-53


def _start(key: int) -> np.ndarray:
    return np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)


def hash_unit(key: int, *coordinates: np.ndarray) -> np.ndarray:
    """Integer coordinates, broadcast -> a number in [0, 1) for each point, as good as random."""
    h = _start(key)
    for coordinate in coordinates:
        h = _absorb(h, coordinate)
    return _finish(h)


@lru_cache(maxsize=64)
def _amplitudes(octaves: int, gain: float) -> np.ndarray:
    """Of the octaves, so that the sum has unit variance."""
    amplitudes = gain ** np.arange(octaves)
    return amplitudes / np.sqrt(np.sum(amplitudes**2))


# Variance of one octave of trilinear value noise: of the corners (1/3) times, per axis, the mean of f^2 + (1-f)^2 with
# f the quintic fade (181/231).
_SPHERE_STD = np.sqrt((181 / 231) ** 3 / 3)


def sphere_noise(
    key: int, unit_N3: np.ndarray, wavelength_km: float, octaves: int, gain: float = 0.5, ridged: bool = False
) -> np.ndarray:
    """Smooth noise at points of the unit sphere, zero mean and unit variance; each octave halves the wavelength.

    Args:
        ridged: fold each octave at zero, for mountain chains; the result then lies in about 0..1, 1 on the crests.
    """
    total = np.zeros(len(unit_N3))
    amplitudes = gain ** np.arange(octaves) if ridged else _amplitudes(octaves, gain)
    for octave in range(octaves):
        p_3N = unit_N3.T * (EARTH_RADIUS_KM / wavelength_km * 2.0**octave) + 31.7 * (octave + 1)
        floor_3N = np.floor(p_3N)
        t_3N = p_3N - floor_3N
        f_3N = t_3N**3 * (t_3N * (t_3N * 6 - 15) + 10)
        # The two lattice planes on either side, axis by axis: 2, then 4, then 8 corners.
        corner_32N = floor_3N.astype(np.int64)[:, None] + np.arange(2)[:, None]
        h_2N = _absorb(_start(key + octave), corner_32N[0])
        h_22N = _absorb(h_2N[:, None], corner_32N[1])
        values_222N = _finish(_absorb(h_22N[:, :, None], corner_32N[2])) * 2 - 1
        along_z = values_222N[:, :, 0] + f_3N[2] * (values_222N[:, :, 1] - values_222N[:, :, 0])
        along_y = along_z[:, 0] + f_3N[1] * (along_z[:, 1] - along_z[:, 0])
        noise = (along_y[0] + f_3N[0] * (along_y[1] - along_y[0])) / _SPHERE_STD
        total += amplitudes[octave] * (np.exp(-np.abs(noise) * 3) if ridged else noise)
    return total / amplitudes.sum() if ridged else total


_PLANE_STD = 151 / 315 / np.sqrt(3)  # of a cubic B-spline over uniform values: mean sum of squared weights, per axis


_TAPS = np.arange(-1, 3)


def _spline_weights(position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in lattice steps -> the lattice nodes they need, and (positions, nodes) cubic B-spline weights."""
    cell = np.floor(position_N).astype(np.int64)
    t = position_N - cell
    s = 1 - t
    first, last = min(cell[0], cell[-1]) - 1, max(cell[0], cell[-1]) + 2  # positions ascend or descend
    if last - first < 4 * len(cell):
        nodes = np.arange(first, last + 1)
        column_N = cell - 1 - first
    else:  # pixels wider than the lattice's steps: most nodes between them are not needed
        nodes = (cell[:, None] + _TAPS).ravel()
        column_N = 4 * np.arange(len(cell))
    weights = np.zeros((len(cell), len(nodes)))
    flat, at = weights.reshape(-1), np.arange(len(cell)) * len(nodes) + column_N
    t2, s2 = t * t, s * s
    flat[at] = s2 * s / 6
    flat[at + 1] = 2 / 3 - t2 * (1 - t / 2)
    flat[at + 2] = 2 / 3 - s2 * (1 - s / 2)
    flat[at + 3] = t2 * t / 6
    return nodes, weights


def plane_noise(
    key: int, east_W: np.ndarray, north_H: np.ndarray, wavelength: float, octaves: int, gain: float = 0.5
) -> np.ndarray:
    """Smooth noise (H, W) on a raster with these coordinates, zero mean and unit variance; wavelength in their unit."""
    total = np.zeros((len(north_H), len(east_W)))
    for octave, amplitude in enumerate(_amplitudes(octaves, gain)):
        steps = 2.0**octave / wavelength
        rows, weights_row = _spline_weights(north_H * steps + 17.3 * octave)
        columns, weights_column = _spline_weights(east_W * steps + 17.3 * octave)
        values = hash_unit(key + octave, rows[:, None], columns[None, :]) * 2 - 1
        total += (amplitude / _PLANE_STD) * (weights_row @ values @ weights_column.T)
    return total


@lru_cache(maxsize=64)
def spline_matrix(nodes: int, pixels: int) -> np.ndarray:
    """(pixels, nodes): interpolates values at evenly spaced nodes, the outer ones on the raster's outer pixels, with a
    natural cubic spline."""
    from scipy.interpolate import CubicSpline

    if nodes == 1:
        return np.ones((pixels, 1))
    return CubicSpline(np.arange(nodes), np.eye(nodes), bc_type="natural")(np.linspace(0, nodes - 1, pixels))
