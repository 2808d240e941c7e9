"""What a search tries, and that a resumed one finds the same."""

import math

import numpy as np
import pytest

from copernicus.platform.journal import FAILED, FINISHED, SEARCH, STOPPED, Trial
from copernicus.platform.schema import Space
from copernicus.platform.search_space import optuna_search, planned, trial_count

LR = Space(low=1e-4, high=1.0)


def test_a_grid_has_every_combination_once():
    search = {"lr": Space(values=[0.1, 0.01]), "batch_size": Space(values=[16, 32, 64])}
    grid = planned(search, "grid", 99, 0, "eurosat_s2")
    assert len(grid) == 6 == trial_count(search, "grid", 99)
    assert {(s["lr"], s["batch_size"]) for s in grid} == {(a, b) for a in (0.1, 0.01) for b in (16, 32, 64)}


def test_random_settings_are_log_uniform_and_keyed():
    drawn = [s["lr"] for s in planned({"lr": LR}, "random", 2000, 0, "eurosat_s2")]
    exponents = np.log10(drawn)
    assert exponents.min() >= -4
    assert exponents.max() <= 0
    counts, _ = np.histogram(exponents, bins=4, range=(-4, 0))
    assert abs(counts - 500).max() < 90, "each decade has a quarter, give or take 4.6 deviations"
    assert drawn[:3] == [s["lr"] for s in planned({"lr": LR}, "random", 3, 0, "eurosat_s2")], "more trials go on"
    assert drawn[:3] != [s["lr"] for s in planned({"lr": LR}, "random", 3, 1, "eurosat_s2")]
    both = planned({"lr": LR, "weight_decay": Space(low=0, high=1, log=False)}, "random", 500, 0, "eurosat_s2")
    assert [s["lr"] for s in both] == drawn[:500], "another dimension leaves this one as it is"
    assert abs(np.corrcoef(np.log([s["lr"] for s in both]), [s["weight_decay"] for s in both])[0, 1]) < 0.15


def test_values_are_drawn_among_those_given():
    drawn = [s["batch_size"] for s in planned({"batch_size": Space(values=[16, 64])}, "random", 200, 0, "eurosat_s2")]
    assert set(drawn) == {16.0, 64.0}


def test_nothing_to_search():
    assert planned({}, "random", 8, 0, "eurosat_s2") == []
    assert trial_count({}, "optuna", 8) == 0
    assert planned({"lr": LR}, "optuna", 8, 0, "eurosat_s2") is None
    assert trial_count({"lr": LR}, "optuna", 8) == 8


def trial(number: int, lr: float, score: float, status: str = FINISHED) -> Trial:
    metrics = {} if status == FAILED else {"val/oa": score}
    return Trial("c", SEARCH, number, {"lr": lr}, metrics, status=status)


def test_optuna_goes_on_from_what_is_known():
    """Of forty known trials the best lie at 0.01: what is suggested next gathers there, as it does not without them."""
    known = [trial(i, lr, -abs(math.log10(lr) + 2)) for i, lr in enumerate(np.logspace(-4, 0, 40))]

    def suggested(done):
        search = optuna_search({"lr": LR}, "val/oa", "max", 0, "eurosat_s2", done)
        return [math.log10(search.suggest(str(n))["lr"]) for n in range(20)]

    told, untold = suggested(known), suggested([])
    assert np.median(np.abs(np.array(told) + 2)) < 0.5 < np.median(np.abs(np.array(untold) + 2))


def test_optuna_does_not_repeat_its_first_suggestions_after_an_interruption():
    first = optuna_search({"lr": LR}, "val/oa", "max", 0, "eurosat_s2", []).suggest("a")["lr"]
    done = [trial(0, first, 1.0), trial(1, 0.5, 0.0, FAILED), trial(2, 0.2, 0.5, STOPPED)]
    second = optuna_search({"lr": LR}, "val/oa", "max", 0, "eurosat_s2", done).suggest("b")["lr"]
    assert second != pytest.approx(first)
