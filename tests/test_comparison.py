"""Aggregates and paired tests between encoders, against plain loops over the scores and scipy."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from copernicus.datasets.bench import TASKS
from copernicus.platform.comparison import aggregate, normalise, pairs, task_pairs
from copernicus.platform.leaderboard import Leaderboard, Score, anchors
from copernicus.platform.tables import aggregate_note, pair_note

NAMES = ("cloud_s3", "eurosat_s2", "flood_s1", "aq_no2_s5p")
ENCODERS = ("a", "b", "c")


def board(values: dict[tuple[str, str], list[float]]) -> Leaderboard:
    return Leaderboard(
        tuple(Score(task, e, seed, v, v) for (task, e), scores in values.items() for seed, v in enumerate(scores))
    )


def drawn(seeds: int = 4) -> dict[tuple[str, str], list[float]]:
    rng = np.random.default_rng(2)
    found = {}
    for name in NAMES:
        zero, one = anchors(TASKS[name])
        for i, encoder in enumerate(ENCODERS):
            quality = 1 - 0.3 * i + 0.4 * rng.normal(size=seeds)
            found[name, encoder] = list(map(float, zero + (one - zero) * quality))
    return found


VALUES = drawn()
BOARD = board(VALUES)


def test_anchors_are_the_published_random_encoder_and_the_best_published_figure():
    # Table 4 of arXiv 2503.11849: EuroSAT-S2 92.5 and 97.9 (Copernicus-FM), Cloud-S3 60.9 and 63.0 (supervised), AQ-NO2 3.4
    # and 2.8, of which less is better.
    assert anchors(TASKS["eurosat_s2"]) == (92.5, 97.9)
    assert anchors(TASKS["cloud_s3"]) == (60.9, 63.0)
    assert anchors(TASKS["aq_no2_s5p"]) == (3.4, 2.8)
    np.testing.assert_allclose(normalise(TASKS["aq_no2_s5p"], np.array([3.4, 2.8, 3.1, 4.0])), [0, 1, 0.5, -1])
    assert anchors(dataclasses.replace(TASKS["eurosat_s2"], published={"random_vit_b16": None})) is None
    assert anchors(dataclasses.replace(TASKS["eurosat_s2"], published={})) is None


def test_aggregates_equal_plain_loops():
    found = aggregate(BOARD)
    assert [t.name for t in found.tasks] == [t.name for t in found.normalised] == list(NAMES)
    assert found.left_out == ()
    for row in found.rows:
        scaled, means, ranks = [], [], []
        for name in NAMES:
            zero, one = anchors(TASKS[name])
            values = [(v - zero) / (one - zero) for v in VALUES[name, row.encoder]]
            scaled += values
            means.append(sum(values) / len(values))
            mine, others = np.mean(VALUES[name, row.encoder]), [np.mean(VALUES[name, e]) for e in ENCODERS]
            higher = TASKS[name].higher_is_better
            ranks.append(1 + sum((other > mine) if higher else (other < mine) for other in others))
        assert row.iqm.value == pytest.approx(stats.trim_mean(scaled, 0.25))
        assert row.mean.value == pytest.approx(np.mean(means))
        assert row.rank.value == pytest.approx(np.mean(ranks))
        for estimate in (row.iqm, row.mean, row.rank):
            assert estimate.low <= estimate.value <= estimate.high


def test_the_interval_of_the_mean_is_as_wide_as_theory_says():
    """The bootstrap variance of a mean over tasks is the sum of the tasks' (n - 1) / n^2 s^2, over the number squared."""
    row = aggregate(BOARD).rows[0]
    variance = sum(np.var(normalise(TASKS[t], np.array(VALUES[t, "a"]))) / 4 for t in NAMES) / len(NAMES) ** 2
    assert row.mean.high - row.mean.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.04)


def test_another_encoder_moves_no_normalised_score_and_equal_ones_share_ranks():
    more = board({**VALUES, **{(t, "d"): VALUES[t, "a"] for t in NAMES}})
    before, after = aggregate(BOARD), aggregate(more)
    assert [(r.iqm, r.mean) for r in after.rows[:3]] == [(r.iqm, r.mean) for r in before.rows]
    assert after.rows[0].rank.value == after.rows[3].rank.value == before.rows[0].rank.value + 0.5


def test_aggregates_are_over_the_tasks_that_all_have_and_say_so():
    part = {cell: values for cell, values in VALUES.items() if cell != ("flood_s1", "b")}
    found = aggregate(dataclasses.replace(board(part), planned={("flood_s1", "never"): (1,)}))
    assert [t.name for t in found.tasks] == ["cloud_s3", "eurosat_s2", "aq_no2_s5p"]
    assert found.left_out == ("never has no score and is not compared", "Flood-S1 is left out: no score of b")
    assert "Flood-S1 is left out: no score of b." in aggregate_note(found)
    whole = aggregate(board({c: v for c, v in VALUES.items() if c[0] != "flood_s1"}))
    assert [(r.iqm, r.mean, r.rank) for r in found.rows] == [(r.iqm, r.mean, r.rank) for r in whole.rows]


def test_without_a_common_task_there_is_no_aggregate():
    found = aggregate(board({("eurosat_s2", "a"): [1.0], ("flood_s1", "b"): [2.0]}))
    assert found.rows == ()
    assert aggregate_note(found).startswith("No aggregate")
    assert pairs(board({("eurosat_s2", "a"): [1.0], ("flood_s1", "b"): [2.0]})) == []
    assert aggregate(Leaderboard(())).rows == ()


def test_a_cell_with_one_seed_gives_no_interval():
    found = aggregate(board({**VALUES, ("cloud_s3", "b"): [61.0]}))
    assert [math.isnan(r.rank.low) for r in found.rows] == [True] * 3, "all ranks depend on it"
    assert [math.isnan(r.iqm.low) for r in found.rows] == [False, True, False]


def test_tasks_without_published_figures_count_in_ranks_only(monkeypatch):
    monkeypatch.setitem(TASKS, "flood_s1", dataclasses.replace(TASKS["flood_s1"], published={}))
    found = aggregate(board(VALUES))
    assert [t.name for t in found.normalised] == ["cloud_s3", "eurosat_s2", "aq_no2_s5p"]
    assert len(found.tasks) == 4
    assert found.left_out == ("Flood-S1 counts in ranks only: no published figures to normalise by",)
    compared = pairs(board(VALUES))
    assert {(p.tasks, p.tested) for p in compared} == {(4, 3)}
    assert "With 3 tasks no p can be below 0.25" in pair_note(compared)
    (alone,) = pairs(board({("flood_s1", "a"): [1.0, 2.0], ("flood_s1", "b"): [3.0, 4.0]}))
    assert math.isnan(alone.p)
    assert "no p" in pair_note([alone])


def test_pairs_over_tasks_equal_scipys_tests_and_plain_loops():
    found = pairs(BOARD)
    assert [(p.a, p.b) for p in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    for p in found:
        gains, chances = [], []
        for name in NAMES:
            zero, one = anchors(TASKS[name])
            x, y = (np.array(VALUES[name, e]) for e in (p.a, p.b))
            gains.append((x.mean() - y.mean()) / (one - zero))
            sign = 1 if one > zero else -1
            chances.append(stats.mannwhitneyu(sign * x, sign * y).statistic / (len(x) * len(y)))
        assert (p.tasks, p.better, p.worse) == (4, sum(g > 0 for g in gains), sum(g < 0 for g in gains))
        assert p.difference == pytest.approx(np.mean(gains))
        assert p.p == pytest.approx(stats.wilcoxon(gains, method="exact").pvalue)
        assert p.improvement.value == pytest.approx(np.mean(chances))
        assert p.improvement.low <= p.improvement.value <= p.improvement.high
    smallest = min(p.p for p in found)
    assert min(p.p_holm for p in found) == pytest.approx(min(1, 3 * smallest))
    assert "no p can be below 0.12" in pair_note(found)
    assert "too few" in pair_note(found)


def test_pairs_on_a_task_are_over_the_seeds_that_both_have():
    scores = [Score("aq_no2_s5p", "a", s, v, v) for s, v in ((1, 3.0), (2, 3.2), (3, 3.1))]
    scores += [Score("aq_no2_s5p", "b", s, v, v) for s, v in ((3, 3.5), (2, 3.3), (7, 9.0))]
    (p,) = task_pairs(Leaderboard(tuple(scores)))
    assert (p.seeds, p.difference) == (2, pytest.approx(-0.25))
    assert p.p == p.p_holm == pytest.approx(stats.ttest_rel([3.2, 3.1], [3.3, 3.5]).pvalue)
    assert task_pairs(board({("eurosat_s2", "a"): [1.0], ("flood_s1", "b"): [2.0]})) == []


def test_a_clear_winner_over_few_seeds_is_found_on_a_task_and_noise_is_not():
    rng = np.random.default_rng(0)
    clear = {("eurosat_s2", e): list(map(float, m + rng.normal(size=3) * 0.1)) for e, m in (("a", 97.0), ("b", 90.0))}
    (p,) = task_pairs(board(clear))
    assert p.p < 0.001
    false = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        null = board({("eurosat_s2", e): list(map(float, rng.normal(size=3))) for e in "ab"})
        false += task_pairs(null)[0].p < 0.05
    assert false / 300 == pytest.approx(0.05, abs=0.04)


def test_the_one_score_of_a_closed_form_is_certain():
    """Neighbours and ridge depend on no seed: their one score has no deviation, stands for every seed, hides no interval."""
    trained = [Score("eurosat_s2", "a", s, v, v) for s, v in ((1, 90.0), (2, 91.0), (3, 92.0))]
    closed = Leaderboard((*trained, Score("eurosat_s2", "b", 1, 95.0, 95.0, protocol="knn")))
    assert closed.best(TASKS["eurosat_s2"]) == "b"
    assert closed.wins("b", "a") == 1
    (p,) = task_pairs(closed)
    assert (p.seeds, p.difference) == (3, pytest.approx(-4))
    assert p.p == pytest.approx(stats.ttest_1samp([90, 91, 92], 95).pvalue)
    low = [r.rank.low for r in aggregate(closed).rows]
    assert low == [2, 1]
    assert "depend on no seed" in closed.caption
    probe = dataclasses.replace(closed, scores=(*trained, Score("eurosat_s2", "b", 1, 95.0, 95.0)))
    assert probe.best(TASKS["eurosat_s2"]) is None
    assert math.isnan(task_pairs(probe)[0].p)
    assert math.isnan(aggregate(probe).rows[0].rank.low)
    assert "depend on no seed" not in probe.caption
