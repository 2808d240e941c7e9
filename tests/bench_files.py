"""Tiny benchmark tasks on disk, in the published layout: what the tests of readers, features and probes open."""

import json
from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin

EUROSAT_FILE_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"]


def write_tif(path: Path, values_CHW: np.ndarray, epsg: int, left: float, top: float, pixel: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = values_CHW.shape
    with rasterio.open(
        path, "w", driver="GTiff", width=width, height=height, count=count, dtype=values_CHW.dtype,
        crs=f"EPSG:{epsg}", transform=from_origin(left, top, pixel, pixel),
    ) as file:  # fmt: skip
        file.write(values_CHW)


def write_eurosat(root: Path, samples: dict[str, list[tuple[str, int]]], size: int = 64, seed: int = 0) -> None:
    """``samples``: split -> (class, number). Band i is drawn around 1000 + 100 i + 1000 x the class's rank here."""
    rng = np.random.default_rng(seed)
    classes = sorted({name for listed in samples.values() for name, _ in listed})
    for split, listed in samples.items():
        for name, number in listed:
            level = 1000 + 100 * np.arange(13)[:, None, None] + 1000 * classes.index(name)
            values = rng.normal(level, 50, (13, size, size)).astype(np.uint16)
            write_tif(root / f"all_imgs/{name}/{name}_{number}.tif", values, 32633, 500_000, 5_300_640, 10)
        (root / f"eurosat-{split}.txt").write_text("".join(f"{name}_{number}.jpg\n" for name, number in listed))


def write_cloud(root: Path, counts: dict[str, int], size: int = 48, seed: int = 0) -> None:
    """Left half clear (stored 1), right half cloud (stored 3, ten times as bright), the first row invalid (0, NaN)."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        names = [
            f"S3A_OL_1_EFR____202007{i % 28 + 1:02d}T154217_20200703T154517_{split}{i:03d}_002_01_01.tif"
            for i in range(count)
        ]
        for name in names:
            label = np.ones((1, size, size), np.uint8)
            label[:, :, size // 2 :] = 3
            label[:, 0] = 0
            values = (rng.uniform(9, 11, (21, size, size)) * np.where(label == 3, 10, 1)).astype(np.float32)
            values[:, 0] = np.nan
            write_tif(root / "s3_olci" / name, values, 4326, 10, 50, 0.003)
            write_tif(root / "cloud_multi" / name, label, 4326, 10, 50, 0.003)
        (root / f"{split}.csv").write_text("\n".join(names) + "\n")


def write_flood(root: Path, counts: dict[str, int], size: int = 32, seed: int = 0) -> None:
    """A flooded bottom half (label 2) that is dark after the event; the last column is outside (3)."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        listed = {}
        for i in range(count):
            key = f"{split}{i:04d}"
            listed[key] = {"path": f"130/01/{key}", "info": {"datasets": {}}}
            folder = root / "data" / "130" / "01" / key
            label = np.zeros((1, size, size), np.uint8)
            label[:, size // 2 :] = 2
            label[:, :, -1] = 3
            for image, date in (("SL2", "20191201"), ("SL1", "20191225"), ("MS1", "20200106")):
                for band, level in (("IVV", 0.10), ("IVH", 0.03)):
                    values = rng.normal(level, level / 10, (1, size, size)).astype(np.float32)
                    if image == "MS1":
                        values[label == 2] /= 10
                    write_tif(folder / f"{image}_{band}_130_01_{date}.tif", values, 3857, 1e6, 6e6, 10)
            write_tif(folder / "MK0_MLU_130_01_20200106.tif", label, 3857, 1e6, 6e6, 10)
            write_tif(folder / "MK0_MNA_130_01_20200106.tif", np.ones_like(label), 3857, 1e6, 6e6, 10)
        (root / f"grid_dict_{split}.json").write_text(json.dumps(listed))


def write_no2(root: Path, counts: dict[str, int], size: int = 56, seed: int = 0) -> None:
    """The label is 5 + 1e5 x the column; its first row is -inf, its second 1e20."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        names = [f"EEA_1kmgrid_2021_no2_avg_{split}_{i}" for i in range(count)]
        for name in names:
            values = (rng.uniform(1e-5, 9e-5) + rng.normal(0, 1e-6, (1, size, size))).astype(np.float32)
            label = 5 + 1e5 * values
            label[:, 0], label[:, 1] = -np.inf, 1e20
            write_tif(root / f"s5p_annual/{name}/2021-01-01_2021-12-31.tif", values, 3035, 4e6, 3e6, 1113.2)
            write_tif(root / f"label_annual/{name}.tif", label.astype(np.float32), 3035, 4e6, 3e6, 1113.2)
        (root / f"{split}.csv").write_text("\n".join(names) + "\n")
