"""What of the data could not be used, counted: nothing is left out in silence."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from copernicus.datasets.index import UNREAD, GridIndex
from copernicus.datasets.raw_index import SURPLUS
from copernicus.datasets.shards import Problem


def skipped_metrics(problems: Iterable[Problem], share: float) -> dict[str, float]:
    """For MLflow: how many problems there are, by reason, and the share of the grids that they are about."""
    problems = list(problems)
    counts = Counter(p.reason for p in problems)
    metrics = {f"data/skipped_{reason}": float(n) for reason, n in counts.items()}
    return {"data/skipped_total": float(sum(counts.values())), "data/skipped_share": share, **metrics}


def too_many_skipped(problems: list[Problem], share: float, limit: float) -> str:
    """Why a run stops, with the first problems by name."""
    shown = "; ".join(str(p) for p in problems[:5])
    return (
        f"{share:.1%} of the grids could not be used in full, above pretrain.max_skipped={limit:.1%}. "
        f"{len(problems)} problems, the first: {shown}. Repair the shards or raise the limit"
    )


def unusable_share(index: GridIndex) -> float:
    """The share of the grids that the index found something wrong with. A shard that could not be opened at all names no
    grids: its share of the shards stands for its share of the grids."""
    lost = sum(shard.stamp == UNREAD for shard in index.shards) / len(index.shards)
    return max(len(grids_of(index.problems)) / index.grids_seen, lost)


def problems_in(columns: dict[str, np.ndarray]) -> list[Problem]:
    """What a batch's draws could not use."""
    return [Problem(*fields) for row in columns["problems"] for fields in json.loads(str(row))]


def grids_of(problems: Iterable[Problem]) -> set[str]:
    """The grids that problems are about, each as its shard and key; a shard stands for itself where it names no grid."""
    where = {p.where for p in problems if p.reason != SURPLUS}
    found = {w: re.match(r".*\.tar[^:/]*:[^.]*|.*:\d{7}(?=\.)", w) for w in where}
    return {match[0] if match else w for w, match in found.items()}
