"""The fifteen tasks of Copernicus-Bench, drawn from the miniature planet: folders, writers of samples and of splits.

The layout is the published one: names, folders, types, codes. Where two tasks share a folder, their samples are the
same places and are written together. A sample is a pure function of (seed, folder, number), so samples can be written
by any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copernicus.datasets.miniature import split_files
from copernicus.datasets.miniature.air_quality import write_no2, write_o3
from copernicus.datasets.miniature.climate_zones import make_climate_zone
from copernicus.datasets.miniature.clouds import write_cloud_s2, write_cloud_s3
from copernicus.datasets.miniature.flood import write_flood
from copernicus.datasets.miniature.land_cover import (
    write_bigearthnet,
    write_dfc2020,
    write_eurosat_s1,
    write_eurosat_s2,
)
from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.miniature.regional import write_biomass, write_lc100
from copernicus.datasets.sensors import InputError


@dataclass(frozen=True)
class TaskScale:
    """Pixels a side of a sample and samples per split."""

    size: int
    splits: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TaskFolder:
    """A folder of samples, which serves one task or two.

    ``write_sample(planet, size, number, root)`` returns what ``write_split(root, split, samples)`` lists.
    """

    tasks: tuple[str, ...]
    directory: str
    write_sample: Callable[[Planet, int, int, Path], Any]
    write_split: Callable[[Path, str, list[Any]], None]


FOLDERS = (
    TaskFolder(("cloud_s2",), "cloud_s2", write_cloud_s2, split_files.list_names),
    TaskFolder(("cloud_s3",), "cloud_s3", write_cloud_s3, split_files.list_names),
    TaskFolder(("eurosat_s1",), "eurosat_s1", write_eurosat_s1, split_files.list_eurosat),
    TaskFolder(("eurosat_s2",), "eurosat_s2", write_eurosat_s2, split_files.list_eurosat),
    TaskFolder(
        ("bigearthnet_s1", "bigearthnet_s2"), "bigearthnet_s1s2", write_bigearthnet, split_files.list_bigearthnet
    ),
    TaskFolder(("lc100cls_s3", "lc100seg_s3"), "lc100_s3", write_lc100, split_files.list_lc100),
    TaskFolder(("dfc2020_s1", "dfc2020_s2"), "dfc2020_s1s2", write_dfc2020, split_files.list_dfc2020),
    TaskFolder(("flood_s1",), "flood_s1", write_flood, split_files.list_floods),
    TaskFolder(("lcz_s2",), "lcz_s1s2", make_climate_zone, split_files.write_climate_zones),
    TaskFolder(("biomass_s3",), "biomass_s3", write_biomass, split_files.list_static),
    TaskFolder(("aq_no2_s5p",), "airquality_s5p/no2", write_no2, split_files.list_names),
    TaskFolder(("aq_o3_s5p",), "airquality_s5p/o3", write_o3, split_files.list_names),
)
TASKS: dict[str, TaskFolder] = {task: folder for folder in FOLDERS for task in folder.tasks}


def check_tasks(names: Iterable[str]) -> None:
    """Raises InputError for a name that is no task's; the message lists those that are."""
    for name in names:
        if name not in TASKS:
            raise InputError(f"miniature: no task {name!r}; the tasks are {', '.join(TASKS)}")
