"""The models that the training benchmarks train, and shards for them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reading.made import PUBLISHED, make_shards
from training.work import Work


@dataclass(frozen=True)
class Case:
    model: dict[str, Any]
    sizes: dict[str, int]
    batch_size: int
    steps: int
    skip: int


def sizes(optical: int, ocean: int, air: int, elevation: int) -> dict[str, int]:
    names = {"s1_grd": optical, "s2_toa": optical, "s3_olci": ocean, "dem": elevation}
    return names | {f"s5p_{gas}": air for gas in ("co", "no2", "o3", "so2")}


CASES = {
    "tiny": Case(
        {
            "name": "copernicus_fm_base", "embed_dim": 32, "depth": 2, "num_heads": 4,
            "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4,
        },
        sizes(64, 32, 28, 192), batch_size=8, steps=240, skip=40,
    ),
    "small": Case({"name": "copernicus_fm_small"}, sizes(112, 48, 28, 192), batch_size=8, steps=24, skip=6),
}  # fmt: skip
"""tiny: that of the smoke experiments. small: the smallest one of the zoo, at half the published side."""


def made(folder: Path, grids: int) -> tuple[str, ...]:
    """Shards of noise, in the published sizes (48 MB a grid)."""
    return make_shards(folder / "shards", PUBLISHED, grids, max(1, grids // 4))


def work(case: Case, shards: tuple[str, ...], grids: int, share: float = 1.0) -> Work:
    """``share``: of the case's steps."""
    steps, skip = (max(2, round(share * n)) for n in (case.steps, case.skip))
    return Work(shards, grids, case.model, case.sizes, case.batch_size, steps + skip, skip)


def with_workers(asked: Work, workers: int) -> Work:
    return dataclasses.replace(asked, workers=workers)
