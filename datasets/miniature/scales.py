"""How large a miniature is: sizes of arrays, numbers of samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from copernicus.datasets.miniature.pretrain import PretrainScale
from copernicus.datasets.miniature.tasks import TASKS, TaskScale

ScaleName = Literal["tiny", "small", "full"]


@dataclass(frozen=True)
class Scale:
    """Of the pretraining grids and of each task."""

    pretrain: PretrainScale
    tasks: dict[str, TaskScale]


_SMALL = PretrainScale(
    patches=1,
    local_dates=2,
    s3_dates=2,
    s5p_dates=4,
    local_size=64,
    s3_size=32,
    s5p_size=28,
    dem_size=192,
    grids_per_shard=32,
)
_FULL = PretrainScale(
    patches=4,
    local_dates=4,
    s3_dates=8,
    s5p_dates=12,
    local_size=264,
    s3_size=96,
    s5p_size=28,
    dem_size=960,
    grids_per_shard=100,
)
_NAMES = get_args(ScaleName)
# Of each task's folder: pixels a side where small and as published; samples of train, val, test in the three scales.
# What Sentinel-3 sees at 300 m has a label of three times as many pixels (LC100, biomass).
_TASKS = {
    "cloud_s2": ((64, 512), (6, 3, 3), (60, 24, 24), (300, 100, 100)),
    "cloud_s3": ((64, 256), (12, 6, 6), (60, 24, 24), (300, 100, 100)),
    "eurosat_s1": ((64, 64), (10, 5, 5), (180, 80, 80), (1600, 500, 500)),
    "eurosat_s2": ((64, 64), (40, 20, 20), (180, 80, 80), (1600, 500, 500)),
    "bigearthnet_s1": ((64, 120), (10, 5, 5), (100, 30, 30), (500, 150, 150)),
    "lc100cls_s3": ((32, 96), (6, 3, 3), (100, 30, 30), (500, 150, 150)),
    "dfc2020_s1": ((64, 256), (8, 4, 4), (60, 24, 24), (300, 100, 100)),
    "flood_s1": ((64, 224), (12, 6, 6), (60, 24, 24), (300, 100, 100)),
    "lcz_s2": ((32, 32), (17, 4, 4), (170, 51, 51), (1700, 510, 510)),
    "biomass_s3": ((32, 96), (4, 2, 2), (60, 24, 24), (300, 100, 100)),
    "aq_no2_s5p": ((56, 56), (12, 6, 6), (60, 24, 24), (300, 100, 100)),
    "aq_o3_s5p": ((56, 56), (6, 3, 3), (60, 24, 24), (300, 100, 100)),
}


def _task_scales(number: int) -> dict[str, TaskScale]:
    scales = {}
    for task, folder in TASKS.items():
        sides, *counts = _TASKS[folder.tasks[0]]
        splits = tuple(zip(("train", "val", "test"), counts[number], strict=True))
        scales[task] = TaskScale(sides[_NAMES[number] == "full"], splits)
    return scales


SCALES: dict[str, Scale] = {
    name: Scale(_FULL if name == "full" else _SMALL, _task_scales(number)) for number, name in enumerate(_NAMES)
}
