"""The 15 tasks of Copernicus-Bench (``specs.py``), the other modes of some, and how to choose among them.

The two presets. ``published`` feeds a model exactly what the published evaluation does; ``default`` differs where that
was a defect or an accident. Sources are files of github.com/zhu-xlab/Copernicus-FM, Copernicus-Bench/src/datasets
(``cobench_*_wrapper.py``) and configs/dataset:

=====================  =========================================  ==========================================  ==========
                       published                                  default                                     source
=====================  =========================================  ==========================================  ==========
resizing of images     bilinear, corners aligned, not             bilinear, pixel areas aligned, antialiased  all others
                       antialiased, after normalisation
  lc100*, biomass,     OpenCV's cubic, not antialiased, before    bicubic, pixel areas aligned, antialiased   lc100*,
  aq_*                 normalisation                                                                          biomass, aq
resizing of labels     nearest to the upper left corner           nearest to the pixel's centre               all dense
  biomass_s3           OpenCV's cubic, rounded to whole t/ha      nearest to the pixel's centre               biomass
                       (labels are integers), may overshoot;
                       a missing value spreads
missing values         eurosat, bigearthnet, dfc2020, cloud_s2,   the mean                                    all
                       lcz: NaN stays NaN; infinite everywhere
location               centre of pixel (h // 2, w // 2)           centre of the image                         all
  identity transform   pixel numbers as coordinates               unknown                                     all
  flood_s1             that of the image after, for both dates    each image's own                            flood
token area             (kernel x stored pixel)^2, as if the       follows the resizing: a 64-pixel patch      all
                       image had not been resized                 shown at 224 has (16 x 10 x 64 / 224 m)^2
  biomass_s3           (16 x 300 m)^2, though the kernel is 8     as above                                    biomass
bands                  by position                                by name where the file names them           all
flood_s1               the image after is divided by its mean     both by the same mean and deviation         flood yaml
                       (the deviation configured repeats it)
cloud_s3               stored code - 1 as 8 bits: 255 becomes     255 is ignored like 0                       clouds3
                       254, which no head has
lc100seg_s3            codes that are none become class 0,        255, the fill value, is ignored, other     lc100seg
                       Unknown                                    codes are refused
lcz_s2                 first of the largest of a label's row      a row that is not one-hot is refused        lczs12
=====================  =========================================  ==========================================  ==========

Both presets: class ids of EuroSAT are the alphabetical ranks of the ten names (the published code ranks the names that
a split file lists: all ten in the published ones); the time of an air-quality image is the first day of its period;
missing values are 0 in Sentinel-3 and -5P, in flood_s1 the upper clamp; dfc2020 has no place, whatever its files say. A
series has its images in order of time, as many as there are: the published code fills up to four with the last one, in
whatever order the folder lists them, and its transforms then stop with an error, so there are no published figures.

``bigearthnet_s2`` trained from scratch is configured with a learning rate of 1 for 0.1 epochs: swapped; 0.1 and 50 here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from copernicus.datasets.bench.specs import ENCODERS, SPECS
from copernicus.datasets.bench.task import SENSOR_GROUPS, Task
from copernicus.datasets.sensors import InputError

LEVELS = ("L1", "L2", "L3")

TASKS: dict[str, Task] = {task.name: task for task in SPECS}
"""The benchmark's tasks by name."""


def _variant(name: str, mode: str, **changes: object) -> Task:
    """A task in another mode. The published figures are not of it."""
    task = TASKS[name]
    return dataclasses.replace(
        task,
        name=f"{name}-{mode}",
        title=f"{task.title} ({mode})",
        published=dict.fromkeys(ENCODERS),
        **changes,  # type: ignore[arg-type]
    )


_VARIANTS = (
    _variant(
        "cloud_s3",
        "binary",
        classes=("Clear", "Cloud"),
        label_file="cloud_binary/{name}.tif",
        label_codes={0: 255, 1: 0, 2: 1, 255: 255},
        published_codes={0: 255, 1: 0, 2: 1, 255: 254},
        notes="",
    ),
    _variant("lc100cls_s3", "series", series=True, static_file="", images=(("s3_olci/{image}/*.tif",),)),
    _variant("lc100seg_s3", "series", series=True, images=(("s3_olci/{pid}/*.tif",),)),
    _variant("biomass_s3", "series", series=True, images=(("s3_olci/{pid}/*.tif",),)),
    _variant("aq_no2_s5p", "seasonal", series=True, images=(("s5p_seasonal/{name}/*.tif",),)),
    _variant("aq_o3_s5p", "seasonal", series=True, images=(("s5p_seasonal/{name}/*.tif",),)),
)

VARIANTS: dict[str, Task] = {task.name: task for task in _VARIANTS}
"""Tasks in another mode than the published one, by ``<task>-<mode>``."""

SELECTABLE = (*TASKS, "all", *LEVELS, *SENSOR_GROUPS, *VARIANTS)
"""What ``select_tasks`` takes."""


def get_task(name: str) -> Task:
    """The task of that name: one of ``TASKS``, or ``<task>-<mode>``, one of ``VARIANTS``.

    Raises:
        InputError: no such task; the message lists the names.
    """
    task = TASKS.get(name) or VARIANTS.get(name)
    if task is None:
        raise InputError(
            f"no task {name!r}; the tasks are {', '.join(TASKS)}, and in other modes {', '.join(VARIANTS)}"
        )
    return task


def select_tasks(items: Sequence[str]) -> list[str]:
    """The names of the tasks that are meant, each once, in the order of ``TASKS``, a variant after its task.

    Args:
        items: names of tasks or variants, levels (L1, L2, L3), satellites (s1, s2, s3, s5p) or ``all``. Variants are
            chosen by their names alone.

    Raises:
        InputError: an item is none of these; the message lists them.
    """
    chosen = set()
    for item in items:
        found = {task.name for task in TASKS.values() if item in ("all", task.name, task.level, task.sensor_group)}
        found |= {item} & VARIANTS.keys()
        if not found:
            raise InputError(f"no task or group of tasks {item!r}; valid choices: {', '.join(SELECTABLE)}")
        chosen |= found
    return sorted(chosen, key=[name for task in TASKS for name in (task, *_variants_of(task))].index)


def _variants_of(name: str) -> list[str]:
    return [f"{name}-{mode}" for mode in TASKS[name].modes[1:]]
