"""Statistics against scipy, closed forms, brute force and simulation."""

import itertools
import math
import statistics as standard

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from copernicus.platform.statistics import (
    COVERAGE,
    Estimate,
    holm,
    improvement,
    interquartile_mean,
    interval,
    paired_t,
    ranks,
    resample,
    signed_rank,
    summarise,
)

VALUES = [[1.0, 2.0], [90.1, 91.4, 90.7], [5.0, 5.0, 5.0], list(map(float, range(10))), [1e9, 1e9 + 1, 1e9 + 2]]


@pytest.mark.parametrize("values", VALUES)
def test_summaries_equal_independent_ones(values):
    s = summarise(values)
    assert s.n == len(values)
    assert s.mean == pytest.approx(np.mean(values))
    assert s.std == pytest.approx(standard.stdev(values))
    rounding = 1e-12 * abs(s.mean)
    assert min(values) - rounding <= s.low <= s.mean <= s.high <= max(values) + rounding
    if s.std:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert s.mean - s.ci95 == pytest.approx(low)
        assert s.mean + s.ci95 == pytest.approx(high)
    else:
        assert s.ci95 == s.high - s.low == 0


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (11, 2.228)])
def test_students_interval_uses_the_t_of_printed_tables(n, t):
    s = summarise([0.0] * (n - 1) + [1.0])
    assert s.ci95 * math.sqrt(n) / s.std == pytest.approx(t, abs=6e-4)


def test_one_value_has_no_deviation_and_none_is_an_error():
    s = summarise([3.0])
    assert (s.n, s.mean, str(s)) == (1, 3.0, "3.00")
    assert all(map(math.isnan, (s.std, s.low, s.high, s.ci95)))
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_an_estimate_without_an_interval_shows_none():
    assert str(Estimate(0.5)) == "0.50"
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"


def test_the_bootstrap_interval_is_that_of_scipy():
    values = np.random.default_rng(3).gamma(2.0, size=12)
    ours = interval(resample(values, "a").mean(-1))
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * values.std())


def test_resamples_depend_on_their_key_alone():
    one, same, other = resample([1, 2, 3], "task", "a"), resample([1, 2, 3], "task", "a"), resample([1, 2, 3], "b")
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()
    assert one.shape == (10_000, 3)
    assert np.bincount(one.astype(int).reshape(-1))[1:] / 30_000 == pytest.approx([1 / 3] * 3, abs=0.012)


@pytest.mark.parametrize("n", [2, 3])
def test_of_two_or_three_values_the_interval_is_their_range(n):
    values = np.random.default_rng(n).normal(size=n)
    s = summarise(values)
    assert (s.low, s.high) == pytest.approx((values.min(), values.max()))


@pytest.mark.parametrize(("n", "said"), COVERAGE.items())
def test_the_interval_covers_as_often_as_is_said(n, said):
    samples = np.random.default_rng(7).normal(loc=2.0, size=(3000, n))
    bounds = [interval(resample(values, "cover", resamples=1000).mean(-1)) for values in samples]
    covered = np.mean([low <= 2.0 <= high for low, high in bounds])
    assert 100 * covered == pytest.approx(said, abs=2)  # 2.2 standard errors at 50 %, 3.7 at 90 %


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_interquartile_mean_is_scipys_trimmed_mean(values):
    assert interquartile_mean(np.array(values)) == pytest.approx(stats.trim_mean(values, 0.25), abs=1e-9)


def test_the_interquartile_mean_ignores_what_is_far_out():
    assert interquartile_mean(np.array([-1e9, 1.0, 2.0, 1e9])) == 1.5
    np.testing.assert_allclose(interquartile_mean(np.array([[4, 1, 2, 3], [0, 0, 0, 9.0]])), [2.5, 0])


def test_ranks_share_ties():
    np.testing.assert_array_equal(ranks(np.array([3.0, 1.0, 3.0, 2.0])), [1.5, 4, 1.5, 3])
    np.testing.assert_array_equal(ranks(np.array([[1.0, 2.0], [5.0, 5.0]])), [[2, 1], [1.5, 1.5]])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_probability_of_improvement_is_mann_whitneys_u(a, b):
    u = stats.mannwhitneyu(a, b).statistic / (len(a) * len(b))
    assert improvement(np.array(a), np.array(b)) == pytest.approx(u)
    assert improvement(np.array(a), np.array(b)) + improvement(np.array(b), np.array(a)) == pytest.approx(1)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 15])
def test_the_signed_rank_test_is_scipys_where_there_are_no_ties(n):
    d = np.random.default_rng(n).normal(0.5, size=n)
    assert signed_rank(d) == pytest.approx(stats.wilcoxon(d, method="exact").pvalue)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(max_examples=80, deadline=None)
def test_the_signed_rank_test_with_ties_and_zeros_is_all_signs_tried(d):
    kept = [v for v in d if v]
    if not kept:
        assert signed_rank(d) == 1
        return
    rank = stats.rankdata(np.abs(kept))
    observed = sum(r for r, v in zip(rank, kept, strict=True) if v > 0)
    sums = [
        sum(r for r, s in zip(rank, signs, strict=True) if s) for signs in itertools.product((0, 1), repeat=len(kept))
    ]
    low, high = np.mean([s <= observed for s in sums]), np.mean([s >= observed for s in sums])
    assert signed_rank(d) == pytest.approx(min(1, 2 * min(low, high)))
    assert signed_rank([-v for v in d]) == pytest.approx(signed_rank(d))


def test_the_smallest_p_of_the_signed_rank_test():
    for n in (1, 4, 15, 80):
        assert signed_rank([1.0 + i for i in range(n)]) == pytest.approx(2.0 ** (1 - n))
    assert math.isnan(signed_rank([]))
    assert signed_rank([0.1 + 0.2, -0.3]) == 1.0, "a rounding error is no order"


def test_the_paired_t_test_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 6))
    assert paired_t(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired_t([1.0, 3.0]) == pytest.approx(2 * math.atan2(1, 2) / math.pi)  # one degree of freedom: Cauchy


@pytest.mark.parametrize("differences", [[], [1.0], [2.0, 2.0, 2.0], [0.0, 0.0], [0.3, 0.1 + 0.2, 0.3]])
def test_without_variation_the_t_test_says_nothing(differences):
    assert math.isnan(paired_t(differences))


def test_holm_corrects_as_worked_by_hand():
    # 0.01 * 4, 0.02 * 3, then never less than before: max(0.03 * 2, 0.06), max(0.05 * 1, 0.06)
    assert holm([0.03, 0.01, 0.05, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    corrected = holm([0.01, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.02, 0.04])
    assert math.isnan(corrected[1])


def test_holm_keeps_the_family_wise_error():
    draw = np.random.default_rng(5).uniform(size=(4000, 6))  # six true null hypotheses
    assert np.mean([min(holm(list(p))) <= 0.05 for p in draw]) == pytest.approx(1 - (1 - 0.05 / 6) ** 6, abs=0.011)
