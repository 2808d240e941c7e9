"""Statistics over seeds and tasks: pure functions of numbers, which know nothing of runs, tasks or tables.

Shape suffixes: R resamples, N runs (seeds), T tasks, E encoders.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from copernicus.datasets.order import generator

RESAMPLES = 10_000
COVERAGE = {2: 50, 3: 75, 4: 81, 5: 85, 10: 90}
"""How often (per cent) the percentile bootstrap's "95 %" interval holds the mean of a normal distribution, by the number
of values. Up to three values it is the range from the least to the greatest (the least alone is drawn in 1 of 27 resamples,
more than the 1 in 40 that are cut off), which misses only where all lie on one side: 1 - 2^(1-n). Beyond, as simulated:
tests/test_statistics.py does it again."""


@dataclass(frozen=True)
class Summary:
    """Mean of n values, their sample standard deviation (n - 1), the 95 % percentile bootstrap interval of the mean
    (``low``, ``high``), and the half-width ``ci95`` of Student's. NaN: unknown, of a single value."""

    n: int
    mean: float
    std: float
    low: float
    high: float
    ci95: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}" if self.n > 1 else f"{self.mean:.2f}"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; NaN bounds: no interval is known."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]")


def summarise(values: Sequence[float], *key: int | str) -> Summary:
    """The summary of some values; ``key`` names them, for the bootstrap's draws.

    Raises:
        ValueError: no values.
    """
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, math.nan, math.nan, math.nan, math.nan)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    low, high = interval(resample(values, *key).mean(-1))
    return Summary(n, mean, std, low, high, float(t.ppf(0.975, n - 1)) * std / math.sqrt(n))


def resample(values_N: Sequence[float], *key: int | str, resamples: int = RESAMPLES) -> np.ndarray:
    """(R, N): the values drawn with replacement, R times. The draws depend on ``key`` and N alone, so that an encoder
    more in a table changes nothing of the others'."""
    values = np.asarray(values_N, dtype=float)
    return values[generator("bootstrap", *key).integers(len(values), size=(resamples, len(values)))]


def interval(replicas_R: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval (Efron 1979) of a statistic's bootstrap replicas."""
    low, high = np.quantile(replicas_R, (0.025, 0.975))
    return float(low), float(high)


def interquartile_mean(values_xN: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis: floor(N / 4) values are left out at either end.

    As in Agarwal et al. 2021 (arXiv 2108.13264), over runs x tasks of normalised scores.
    """
    values = np.sort(values_xN, axis=-1)
    cut = values.shape[-1] // 4
    return values[..., cut : values.shape[-1] - cut].mean(-1)


def ranks(values_xE: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, 1 for the greatest; equal ones share the mean of their ranks."""
    from scipy.stats import rankdata

    return rankdata(-np.asarray(values_xE, dtype=float), method="average", axis=-1)


def improvement(a_xN: np.ndarray, b_xM: np.ndarray) -> np.ndarray:
    """P(A > B) + P(A = B) / 2 for a run of A and one of B, over all pairs of runs along the last axes (Mann-Whitney U / NM;
    Agarwal et al. 2021 average it over tasks)."""
    a, b = a_xN[..., :, None], b_xM[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def signed_rank(differences_T: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, exact for any number of differences, with ties.

    Zeros are left out (Wilcoxon 1945) and equal magnitudes share the mean of their ranks. Under the null hypothesis all 2^T
    signs are equally likely; doubled ranks are whole numbers, so that the distribution of their sum is counted exactly.
    The smallest p that T differences can give is 2^(1-T). NaN without differences; 1 where all are zero.
    """
    from scipy.stats import rankdata

    d = np.asarray(differences_T, dtype=float)
    if len(d) == 0:
        return math.nan
    greatest = np.abs(d).max()
    if greatest == 0:
        return 1.0
    d = np.round(d / greatest, 12)  # rounding errors make no order
    d = d[d != 0]
    doubled = np.rint(2 * rankdata(np.abs(d))).astype(int)
    counts: list[int] = [
        1
    ]  # of sign patterns, by the sum of the positive ones' ranks; Python's integers do not overflow
    for rank in doubled:
        counts = [
            (counts[s] if s < len(counts) else 0) + (counts[s - rank] if s >= rank else 0)
            for s in range(len(counts) + rank)
        ]
    observed = int(doubled[d > 0].sum())
    tail = min(sum(counts[: observed + 1]), sum(counts[observed:]))
    return min(1.0, 2 * tail / 2 ** len(d))


def paired_t(differences_N: Sequence[float]) -> float:
    """Two-sided p of Student's t test that paired differences have mean 0.

    NaN where it cannot tell: fewer than two pairs, or differences that do not vary (a closed-form probe gives every seed the
    same score; that is no evidence of certainty).
    """
    from scipy.stats import t

    n = len(differences_N)
    if n < 2:
        return math.nan
    mean = math.fsum(differences_N) / n
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in differences_N) / (n - 1))
    if std <= 1e-9 * max(map(abs, differences_N)):
        return math.nan
    return float(2 * t.sf(abs(mean) / (std / math.sqrt(n)), n - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm 1979: family-wise error, no assumption on dependence). NaN stays NaN and does
    not count."""
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    corrected, highest = [math.nan] * len(ps), 0.0
    for place, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - place) * p))
        corrected[i] = highest
    return corrected
