"""The climate probe: ridge regressions from places, embeddings, or both, to values of cells (climatology).

How well a linear function of embeddings tells a cell's climate, beside what its coordinates alone tell. Cells are split at
random, and also by blocks of some degrees: neighbours have nearly the same climate and nearly the same images, so that a
random split flatters (spatial autocorrelation); no block has cells in two splits. The strength of the ridge is chosen by
cross-validation within the training cells, whose folds are drawn as the split is.

Cross-validation needs the data once: the products X'X, X'Y and Y'Y of each fold give every fold's error for every strength.

Shapes: N cells, D inputs, V targets, F folds, A strengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import lpmv

from copernicus.datasets.order import generator
from copernicus.datasets.sensors import InputError
from copernicus.platform.embed_map import LATITUDE, LONGITUDE
from copernicus.platform.statistics import Estimate, interval

TRAIN, VAL, TEST = 0, 1, 2
PARTS = {"val": VAL, "test": TEST}
SHARES = (0.6, 0.2, 0.2)
FOLDS = 5
STRENGTHS = tuple(10.0**power for power in np.arange(3, -8.5, -0.5))
"""What is added to X'X / N of standardised inputs, whose mean eigenvalue is 1; times N, it is scikit-learn's alpha."""
DEGREE = 8
"""Of the spherical harmonics: 81 functions, the finest some 2,500 km long."""
RESAMPLES = 1000
FEWEST_UNITS = 10
"""Of which a percentile interval is drawn: of fewer it is far from 95 % (`statistics.COVERAGE`)."""


@dataclass(frozen=True)
class Cells:
    """The cells of a probe: rows and columns of the map, and their targets (N, V)."""

    rows: np.ndarray
    columns: np.ndarray
    targets_NV: np.ndarray

    @property
    def lon(self) -> np.ndarray:
        return LONGITUDE[self.columns]

    @property
    def lat(self) -> np.ndarray:
        return LATITUDE[self.rows]


@dataclass(frozen=True)
class Score:
    """Errors of one regression on the cells of one part (val or test). ``units``: blocks, or cells. ``rmse``: in the variable's units; both with 95 %
    bootstrap intervals over cells, or over blocks where the split is by blocks. ``r2``: 1 is perfect, 0 the part's mean."""

    split: str
    inputs: str
    variable: str
    part: str
    cells: int
    units: int
    rmse: Estimate
    r2: Estimate
    strength: float


@dataclass(frozen=True)
class Probe:
    """One split with one kind of input: its scores, and what it says of every cell (N, V)."""

    split: str
    inputs: str
    scores: tuple[Score, ...]
    predicted_NV: np.ndarray
    parts_N: np.ndarray


def coordinates(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """(N, 5): longitude and latitude, degrees, and the place on the unit sphere, which knows no date line."""
    lam, phi = np.radians(lon), np.radians(lat)
    return np.stack([lon, lat, np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], -1)


def harmonics(lon: np.ndarray, lat: np.ndarray, degree: int = DEGREE) -> np.ndarray:
    """(N, (degree + 1)^2 - 1): real spherical harmonics but for the constant, orthogonal over the sphere."""
    lam, height = np.radians(lon), np.sin(np.radians(lat))
    columns = []
    for n in range(1, degree + 1):
        for m in range(n + 1):
            legendre = math.sqrt(math.factorial(n - m) / math.factorial(n + m)) * lpmv(m, n, height)
            columns.append(legendre * np.cos(m * lam))
            if m:
                columns.append(legendre * np.sin(m * lam))
    return np.stack(columns, -1)


def blocks_of(lon: np.ndarray, lat: np.ndarray, degrees: float) -> np.ndarray:
    """The number of the block, so many degrees a side, that each place lies in."""
    across = math.ceil(360 / degrees)
    return np.floor((lat + 90) / degrees).astype(int) * across + np.floor((lon + 180) / degrees).astype(int) % across


def split_cells(units_N: np.ndarray, seed: int, shares: Sequence[float], purpose: str) -> np.ndarray:
    """(N,) a part of each cell, its share of the cells about as asked. Cells of one unit (a block, or a cell of its own) go
    to one part; units are taken in an order of the seed, each to the part that lacks the most."""
    units, inverse, counts = np.unique(units_N, return_inverse=True, return_counts=True)
    given = np.zeros(len(shares))
    part = np.empty(len(units), int)
    wanted = np.asarray(shares) * len(units_N)
    for unit in generator("climate", purpose, seed).permutation(len(units)):
        part[unit] = int(np.argmax((wanted - given) / wanted))
        given[part[unit]] += counts[unit]
    return part[inverse]


@dataclass(frozen=True)
class Moments:
    """Sums over some cells: how many, of inputs and targets, and of their products."""

    count: float
    x_D: np.ndarray
    y_V: np.ndarray
    xx_DD: np.ndarray
    xy_DV: np.ndarray
    yy_V: np.ndarray

    @staticmethod
    def of(x_ND: np.ndarray, y_NV: np.ndarray) -> Moments:
        return Moments(len(x_ND), x_ND.sum(0), y_NV.sum(0), x_ND.T @ x_ND, x_ND.T @ y_NV, (y_NV**2).sum(0))

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def solve(moments: Moments, strengths: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Weights (A, D, V) and intercepts (A, V) of ridge regressions, inputs standardised by these cells' own deviations;
    the intercept is free."""
    n = moments.count
    mean_D, mean_V = moments.x_D / n, moments.y_V / n
    covariance_DD = moments.xx_DD / n - np.outer(mean_D, mean_D)
    cross_DV = moments.xy_DV / n - np.outer(mean_D, mean_V)
    deviation_D = np.sqrt(np.clip(np.diag(covariance_DD), 0, None))
    # An input that is constant but for rounding has no say.
    used_D = deviation_D > 1e-7 * np.maximum(np.abs(mean_D), 1e-30)
    scale_D = np.where(used_D, 1 / np.where(used_D, deviation_D, 1), 0.0)
    values_D, vectors_DD = np.linalg.eigh(covariance_DD * np.outer(scale_D, scale_D))
    rotated_DV = vectors_DD.T @ (cross_DV * scale_D[:, None])
    weights = [
        (vectors_DD @ (rotated_DV / (np.clip(values_D, 0, None) + s)[:, None])) * scale_D[:, None] for s in strengths
    ]
    weights_ADV = np.stack(weights)
    return weights_ADV, mean_V - np.einsum("d,adv->av", mean_D, weights_ADV)


def squared_errors(moments: Moments, weights_ADV: np.ndarray, intercepts_AV: np.ndarray) -> np.ndarray:
    """(A, V): sums of squared errors over the cells of the moments."""
    products_ADV = np.einsum("de,aev->adv", moments.xx_DD, weights_ADV)
    return (
        moments.yy_V
        - 2 * np.einsum("dv,adv->av", moments.xy_DV, weights_ADV)
        - 2 * intercepts_AV * moments.y_V
        + np.einsum("adv,adv->av", products_ADV, weights_ADV)
        + 2 * intercepts_AV * np.einsum("d,adv->av", moments.x_D, weights_ADV)
        + moments.count * intercepts_AV**2
    )


def fit_ridge(
    x_ND: np.ndarray, y_NV: np.ndarray, folds_N: np.ndarray, strengths: Sequence[float] = STRENGTHS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights (D, V), intercepts (V,) and strengths (V,) of regressions whose strength has the least error over the folds."""
    x_ND, y_NV = x_ND.astype(np.float64), y_NV.astype(np.float64)
    # Of shifted inputs the products keep their digits; the shift comes back in the intercept.
    shift_D, shift_V = x_ND.mean(0), y_NV.mean(0)
    x_ND, y_NV = x_ND - shift_D, y_NV - shift_V
    parts = [Moments.of(x_ND[folds_N == fold], y_NV[folds_N == fold]) for fold in np.unique(folds_N)]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    errors_AV = np.zeros((len(strengths), y_NV.shape[1]))
    for part in parts:
        errors_AV += squared_errors(part, *solve(whole - part, strengths))
    best_V = errors_AV.argmin(0)
    weights_ADV, intercepts_AV = solve(whole, strengths)
    each_V = np.arange(y_NV.shape[1])
    weights_DV = weights_ADV[best_V, :, each_V].T
    intercept_V = intercepts_AV[best_V, each_V] + shift_V - shift_D @ weights_DV
    return weights_DV, intercept_V, np.asarray(strengths)[best_V]


def probe(
    cells: Cells, inputs: Mapping[str, np.ndarray], names: Sequence[str], split: str, seed: int, block_degrees: float
) -> list[Probe]:
    """Fit and score every kind of input, given (N, D) each, on one split.

    Raises:
        InputError: too few blocks for training, validation and test.
    """
    units_N = blocks_of(cells.lon, cells.lat, block_degrees) if split == "blocks" else np.arange(len(cells.rows))
    parts_N = split_cells(units_N, seed, SHARES, f"{split} parts")
    train_N = parts_N == TRAIN
    units = {part: len(np.unique(units_N[parts_N == part])) for part in (TRAIN, *PARTS.values())}
    if units[TRAIN] < FOLDS or min(units.values()) < 2:
        raise InputError(
            f"climate: {len(np.unique(units_N))} blocks of {block_degrees:g} degrees are too few to split by; lower "
            "climate.block_degrees, or leave blocks out of climate.splits"
        )
    folds = split_cells(units_N[train_N], seed, [1 / FOLDS] * FOLDS, f"{split} folds")
    probes = []
    for kind, x_ND in inputs.items():
        weights_DV, intercept_V, strength_V = fit_ridge(x_ND[train_N], cells.targets_NV[train_N], folds)
        predicted_NV = x_ND.astype(np.float64) @ weights_DV + intercept_V
        scores = []
        for part, number in PARTS.items():
            there = parts_N == number
            errors = score(cells.targets_NV[there], predicted_NV[there], units_N[there], seed, split, part)
            scores += [
                Score(split, kind, name, part, int(there.sum()), units[number], rmse, r2, float(strength))
                for name, (rmse, r2), strength in zip(names, errors, strength_V, strict=True)
            ]
        probes.append(Probe(split, kind, tuple(scores), predicted_NV.astype(np.float32), parts_N))
    return probes


def score(
    y_NV: np.ndarray, predicted_NV: np.ndarray, units_N: np.ndarray, *key: int | str
) -> list[tuple[Estimate, Estimate]]:
    """RMSE and R2 of each target, with intervals over resampled units; without, where those are fewer than `FEWEST_UNITS`."""
    y_NV = y_NV.astype(np.float64)
    centred_NV = y_NV - y_NV.mean(0)  # R2 does not change, and sums of squares keep their digits
    per_cell = np.concatenate([np.ones((len(y_NV), 1)), (y_NV - predicted_NV) ** 2, centred_NV, centred_NV**2], 1)
    _, inverse = np.unique(units_N, return_inverse=True)
    sums = np.zeros((inverse.max() + 1, per_cell.shape[1]))
    np.add.at(sums, inverse, per_cell)
    rng = generator("bootstrap", "climate", *key)
    count = len(sums)
    draws = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) @ sums for _ in range(RESAMPLES)])
    everything = np.concatenate([sums.sum(0)[None], draws])
    variables = y_NV.shape[1]
    n, squared, first, second = np.split(everything, [1, 1 + variables, 1 + 2 * variables], axis=1)
    rmse = np.sqrt(squared / n)
    r2 = 1 - squared / np.maximum(second - first**2 / n, 1e-300)
    if count < FEWEST_UNITS:
        return [(Estimate(float(rmse[0, v])), Estimate(float(r2[0, v]))) for v in range(variables)]
    return [
        tuple(Estimate(float(values[0, v]), *interval(values[1:, v])) for values in (rmse, r2))  # type: ignore[misc]
        for v in range(variables)
    ]
