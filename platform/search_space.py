"""What a search tries: settings drawn at random, taken from a grid, or suggested by Optuna's TPE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from copernicus.datasets.order import generator
from copernicus.platform.journal import FINISHED, STOPPED, Trial
from copernicus.platform.schema import Space

Settings = dict[str, float]


def planned(search: Mapping[str, Space], searcher: str, trials: int, seed: int, task: str) -> list[Settings] | None:
    """All settings of a search in the order of their numbers; None where a searcher decides as it goes.

    Random draws are keyed by (seed, task, number): encoders are tried with the same settings, and whoever resumes finds
    the same ones.
    """
    if not search:
        return []
    if searcher == "grid":
        names = list(search)
        return [
            dict(zip(names, values, strict=True))
            for values in itertools.product(*(search[name].values or [] for name in names))
        ]
    if searcher == "random":
        return [
            {name: _draw(space, generator("search", name, task, seed, number)) for name, space in search.items()}
            for number in range(trials)
        ]
    return None


def trial_count(search: Mapping[str, Space], searcher: str, trials: int) -> int:
    """How many trials a search has."""
    if not search:
        return 0
    return math.prod(len(space.values or []) for space in search.values()) if searcher == "grid" else trials


def optuna_search(search: Mapping[str, Space], metric: str, mode: str, seed: int, task: str, done: list[Trial]) -> Any:
    """Ray Tune's searcher over Optuna's TPE, told of the trials that are done."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution
    from ray.tune.search.optuna import OptunaSearch

    def distribution(space: Space) -> Any:
        if space.values:
            return CategoricalDistribution(space.values)
        low, high = _ends(space)
        return FloatDistribution(low, high, log=space.log)

    told = [t for t in done if t.status in (FINISHED, STOPPED) and math.isfinite(t.metrics[metric])]
    # Another seed after every interruption: the same one would suggest again what it suggested first.
    drawn = int(generator("search", task, seed, len(done)).integers(2**31))
    return OptunaSearch(
        space={name: distribution(space) for name, space in search.items()},
        metric=metric,
        mode=mode,
        seed=drawn,
        points_to_evaluate=[t.settings for t in told] or None,
        evaluated_rewards=[t.metrics[metric] for t in told] or None,
    )


def _draw(space: Space, rng: Any) -> float:
    if space.values:
        return float(space.values[int(rng.integers(len(space.values)))])
    low, high = _ends(space)
    return float(math.exp(rng.uniform(math.log(low), math.log(high))) if space.log else rng.uniform(low, high))


def _ends(space: Space) -> tuple[float, float]:
    assert space.low is not None
    assert space.high is not None
    return space.low, space.high
