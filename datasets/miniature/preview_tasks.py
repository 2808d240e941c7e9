"""A few samples of each benchmark task with their labels, read from the files of a miniature, as panels of a picture."""

from __future__ import annotations

import csv
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copernicus.datasets.bench.vocabulary import BIGEARTHNET_CLASSES
from copernicus.datasets.miniature.climate_zones import ZONES
from copernicus.datasets.miniature.land_cover import EUROSAT_COVERS
from copernicus.datasets.miniature.tasks import TASKS

Legend = dict[int, tuple[str, str]]
"""Code -> name and colour."""


@dataclass(frozen=True)
class Panel:
    """An image (H, W, 3) in 0..1, a map of codes (H, W) with a legend, or values (H, W)."""

    title: str
    image: np.ndarray
    legend: Legend | None = None


LC100: Legend = {
    0: ("unknown", "#282828"),
    20: ("shrubs", "#ffbb22"),
    30: ("herbaceous", "#ffff4c"),
    40: ("cropland", "#f096ff"),
    50: ("urban", "#fa0000"),
    60: ("bare", "#b4b4b4"),
    70: ("snow, ice", "#f0f0f0"),
    80: ("inland water", "#0032c8"),
    90: ("wetland", "#0096a0"),
    100: ("moss, lichen", "#fae6a0"),
    111: ("closed, evergreen needles", "#58481f"),
    112: ("closed, evergreen leaves", "#009900"),
    113: ("closed, larch", "#70663e"),
    114: ("closed, deciduous", "#00cc00"),
    115: ("closed, mixed", "#4e751f"),
    116: ("closed, other", "#007800"),
    121: ("open, evergreen needles", "#666000"),
    122: ("open, evergreen leaves", "#8db400"),
    123: ("open, larch", "#8d7400"),
    124: ("open, deciduous", "#a0dc00"),
    125: ("open, mixed", "#929900"),
    126: ("open, other", "#648c00"),
    200: ("sea", "#000080"),
}
DFC: Legend = {
    1: ("forest", "#1b7a2f"),
    2: ("shrubland", "#c8a24a"),
    3: ("savanna", "#dcd159"),
    4: ("grassland", "#a6d96a"),
    5: ("wetland", "#27c0b0"),
    6: ("cropland", "#f29ee0"),
    7: ("urban", "#d7191c"),
    8: ("snow", "#f0f0f0"),
    9: ("barren", "#b0a89f"),
    10: ("water", "#2b6cc4"),
}
CLOUD_S2: Legend = {
    0: ("clear", "#7fbf7b"),
    1: ("thick cloud", "#f7f7f7"),
    2: ("thin cloud", "#a6bddb"),
    3: ("shadow", "#3b3b3b"),
}
CLOUD_S3: Legend = {
    0: ("invalid", "#d7191c"),
    1: ("clear", "#7fbf7b"),
    2: ("sure", "#f7f7f7"),
    3: ("ambiguous", "#a6bddb"),
    4: ("shadow", "#3b3b3b"),
    5: ("snow, ice", "#fdae61"),
}
FLOOD: Legend = {
    0: ("dry", "#d9c89e"),
    1: ("permanent", "#2b6cc4"),
    2: ("flood", "#e34a33"),
    3: ("outside", "#3b3b3b"),
}
_LOOK_AT = 80  # label files of a task, from which the most telling are chosen


def read(path: Path) -> np.ndarray:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # DFC2020 has no places, as published
        with rasterio.open(path) as tif:
            return tif.read()


def stretch(image_CHW: np.ndarray) -> np.ndarray:
    """(H, W, C) in 0..1 between the 2nd and the 98th percentile of all channels together; NaN black."""
    if not np.isfinite(image_CHW).any():
        return np.zeros((*image_CHW.shape[1:], len(image_CHW)))
    low, high = np.nanpercentile(image_CHW, (2, 98))
    scaled = np.clip((image_CHW - low) / max(high - low, 1e-12), 0, 1)
    return np.moveaxis(np.nan_to_num(scaled), 0, -1)


def s1_colour(image_CHW: np.ndarray) -> np.ndarray:
    """VV, VH and their difference, dB."""
    vv, vh = image_CHW
    return np.clip(np.stack([(vv + 22) / 22, (vh + 30) / 24, (vv - vh - 2) / 12], axis=-1), 0, 1)


def s2_colour(image_CHW: np.ndarray, white: float = 3000.0) -> np.ndarray:
    return np.moveaxis(np.clip(image_CHW[[3, 2, 1]] / white, 0, 1), 0, -1)


def s3_colour(image_CHW: np.ndarray) -> np.ndarray:
    return stretch(image_CHW[[7, 5, 3]].astype(np.float64))


def _telling(paths: list[Path], count: int) -> list[tuple[Path, np.ndarray]]:
    """The label files in which the pixels are spread most evenly over most codes, with their codes."""

    def entropy(label: np.ndarray) -> float:
        share = np.unique(label, return_counts=True)[1] / label.size
        return float(-np.sum(share * np.log(share)))

    labels = [(path, read(path)[0]) for path in sorted(paths)[:_LOOK_AT]]
    return sorted(labels, key=lambda item: entropy(item[1]), reverse=True)[:count]


def _eurosat(root: Path, colour: Callable[[np.ndarray], np.ndarray]) -> list[Panel]:
    folders = [root / "all_imgs" / name for name in EUROSAT_COVERS]  # a tiny miniature may lack a class
    return [Panel(folder.name, colour(read(min(folder.glob("*.tif"))))) for folder in folders if folder.exists()]


def _bigearthnet(root: Path) -> list[Panel]:
    with open(root / "multilabel-train.csv", newline="") as file:
        rows = list(csv.reader(file))[1:]
    panels = []
    for s1, s2, *present in sorted(rows, key=lambda row: row[2:].count("1"), reverse=True)[:5]:
        names = [name.partition(",")[0].partition(" or ")[0] for name in BIGEARTHNET_CLASSES]
        text = "; ".join(name for name, one in zip(names, present, strict=True) if one == "1")
        panels.append(Panel("s2", s2_colour(read(root / "BigEarthNet-S2-5%" / s2))))
        panels.append(Panel(textwrap.fill(text, 34), s1_colour(read(root / "BigEarthNet-S1-5%" / s1))))
    return panels


def _static(root: Path) -> dict[str, Path]:
    """Place -> its image of the static mode."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("static_fnames-*.csv")):
        with open(path, newline="") as file:
            found |= {place: root / "s3_olci" / place / name for place, name in csv.reader(file)}
    return found


def _lc100(root: Path) -> list[Panel]:
    images, panels = _static(root), []
    for path, label in _telling(list((root / "lc100").glob("*.tif")), 2):
        panels += [Panel(path.stem, s3_colour(read(images[path.stem]))), Panel("land cover", label, LC100)]
    return panels


def _dfc2020(root: Path) -> list[Panel]:
    panels = []
    for path, label in _telling(list((root / "dfc").glob("*.tif")), 2):
        s1, s2 = (read(root / kind / path.name.replace("dfc", kind)) for kind in ("s1", "s2"))
        panels += [Panel("s1", s1_colour(s1)), Panel("s2", s2_colour(s2)), Panel("land cover", label, DFC)]
    return panels


def _cloud_s2(root: Path) -> list[Panel]:
    panels = []
    for path, label in _telling(list((root / "cloud").glob("*.tif")), 2):
        date = path.stem.split("__")[1][:8]
        panels += [Panel(date, s2_colour(read(root / "s2_toa" / path.name), 8000)), Panel("clouds", label, CLOUD_S2)]
    return panels


def _cloud_s3(root: Path) -> list[Panel]:
    ((path, label),) = _telling(list((root / "cloud_multi").glob("*.tif")), 1)
    return [Panel(path.name[16:24], s3_colour(read(root / "s3_olci" / path.name))), Panel("clouds", label, CLOUD_S3)]


def _flood(root: Path) -> list[Panel]:
    ((path, label),) = _telling(list((root / "data").rglob("MK0_MLU_*.tif")), 1)
    panels = []
    for kind, when in (("SL1", "before"), ("MS1", "after")):
        (vv,), (vh,) = (path.parent.glob(f"{kind}_{band}_*.tif") for band in ("IVV", "IVH"))
        image = np.concatenate([read(vv), read(vh)])
        panels.append(Panel(f"{when}, {vv.stem[-8:]}", s1_colour(10 * np.log10(np.maximum(image, 1e-4)))))
    return [*panels, Panel("water", label, FLOOD)]


def _climate_zones(root: Path) -> list[Panel]:
    import h5py

    with h5py.File(root / "lcz_train.h5") as file:
        zones, images = np.argmax(file["label"][:], axis=1), file["sen2"]
        first = [(name, np.flatnonzero(zones == i)) for i, name in enumerate(ZONES)]
        return [
            Panel(name, np.clip(images[int(found[0])][..., [2, 1, 0]] / 0.3, 0, 1))
            for name, found in first
            if len(found)
        ]


def _biomass(root: Path) -> list[Panel]:
    images, panels = _static(root), []
    labels = [(path, read(path)[0]) for path in sorted((root / "biomass").glob("*.tif"))[:_LOOK_AT]]
    for path, label in sorted(labels, key=lambda item: item[1].std(), reverse=True)[:2]:
        panels.append(Panel(path.stem[:7], s3_colour(read(images[path.stem]))))
        panels.append(Panel(f"{label.min()}..{label.max()} t/ha", label.astype(np.float64)))
    return panels


def _air(root: Path) -> list[Panel]:
    """The place with the widest range at the ground."""
    labels = {path: read(path)[0] for path in sorted((root / "label_annual").glob("*.tif"))[:_LOOK_AT]}
    labels = {path: np.where(np.abs(label) > 1e10, np.nan, label) for path, label in labels.items()}
    path, label = max(labels.items(), key=lambda item: float(np.nanstd(item[1])))
    gas = root.name
    winter = read(root / "s5p_seasonal" / path.stem / "2021-01-01_2021-04-01.tif")[0]
    annual = read(root / "s5p_annual" / path.stem / "2021-01-01_2021-12-31.tif")[0]
    unit = "ug/m3" if gas == "no2" else "ug/m3 days"
    panels = [(f"{gas} column, winter", "mol/m2", winter), (f"{gas} column, year", "mol/m2", annual)]
    return [
        Panel(f"{name}\n{np.nanmin(image):.2g}..{np.nanmax(image):.2g} {of}", image)
        for name, of, image in (*panels, (f"{gas} at the ground", unit, label))
    ]


_PANELS: dict[str, Callable[[Path], list[Panel]]] = {
    "eurosat_s2": lambda root: _eurosat(root, s2_colour),
    "eurosat_s1": lambda root: _eurosat(root, s1_colour),
    "bigearthnet_s1": _bigearthnet,
    "lc100cls_s3": _lc100,
    "dfc2020_s1": _dfc2020,
    "lcz_s2": _climate_zones,
    "cloud_s2": _cloud_s2,
    "cloud_s3": _cloud_s3,
    "flood_s1": _flood,
    "biomass_s3": _biomass,
    "aq_no2_s5p": _air,
    "aq_o3_s5p": _air,
}


def task_rows(bench: Path, tasks: list[str], columns: int) -> list[list[tuple[str, Panel]]]:
    """The panels of all folders of those tasks, each with the tasks' names, in rows of at most ``columns``; a folder's
    panels stay together where they fit."""
    rows: list[list[tuple[str, Panel]]] = [[]]
    for task, panels in _PANELS.items():
        if task not in tasks:
            continue
        folder = TASKS[task]
        new = [(", ".join(folder.tasks), panel) for panel in panels(bench / folder.directory)]
        if len(rows[-1]) + len(new) > columns:
            rows.append([])
        while len(rows[-1]) + len(new) > columns:
            rows[-1], new = new[:columns], new[columns:]
            rows.append([])
        rows[-1] += new
    return [row for row in rows if row]
