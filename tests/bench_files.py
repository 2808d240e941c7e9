"""Tiny benchmark tasks on disk, in the published layout: what the tests of readers, features and probes open."""

import json
from pathlib import Path

import h5py
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


# What follows is noise in the layout, types and value ranges of the published files, as TorchGeo's own test data is:
# radar and radiance from 0 to 1 in float, 16 bits for Sentinel-2, labels of every code there is.

SPLITS = ("train", "val", "test")
DATES = ("20190507T135736_20190507T135744", "20190812T135736_20190812T135744", "20200131T135736_20200131T135744")
SEASONS = ("2021-01-01_2021-04-01", "2021-04-01_2021-07-01", "2021-07-01_2021-10-01", "2021-10-01_2021-12-31")
LC100_CODES = (0, 20, 30, 40, 50, 60, 70, 80, 90, 100, *range(111, 117), *range(121, 127), 200)
CODE_NAMES = {"header": [f"class {i}, with a comma" for i in range(23)], "numbers": [str(i) for i in range(2, 25)]}


def _real(rng: np.random.Generator, bands: int, size: int) -> np.ndarray:
    return rng.random((bands, size, size)).astype(np.float32)


def _digital(rng: np.random.Generator, bands: int, size: int) -> np.ndarray:
    return rng.integers(0, 65536, (bands, size, size)).astype(np.uint16)


def _codes(rng: np.random.Generator, codes: tuple[int, ...], size: int, dtype: type = np.uint8) -> np.ndarray:
    return rng.choice(codes, (1, size, size)).astype(dtype)


def _with_holes(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    values[rng.random(values.shape) < 0.05] = np.nan
    return values


def noise_cloud_s2(root: Path, count: int = 1, size: int = 32) -> None:
    rng = np.random.default_rng(1)
    for split in SPLITS:
        names = [f"ROI_{i:05d}__20200422T141729_20200422T142243_T19GDN_{split}" for i in range(count)]
        for name in names:
            write_tif(root / f"s2_toa/{name}.tif", _digital(rng, 13, size), 32632, 5e5, 5.3e6, 10)
            write_tif(root / f"cloud/{name}.tif", _codes(rng, (0, 1, 2, 3), size), 32632, 5e5, 5.3e6, 10)
        (root / f"{split}.csv").write_text("\n".join(names) + "\n")


def noise_cloud_s3(root: Path, count: int = 1, size: int = 32) -> None:
    rng = np.random.default_rng(2)
    for split in SPLITS:
        names = [f"S3A_OL_1_EFR____20200703T154217_20200703T154517_{split}{i}_002_01_01.tif" for i in range(count)]
        for name in names:
            write_tif(root / "s3_olci" / name, _with_holes(rng, _real(rng, 21, size)), 4326, 10, 50, 0.004112)
            write_tif(root / "cloud_multi" / name, _codes(rng, (0, 1, 2, 3, 4, 5, 255), size), 4326, 10, 50, 0.004112)
            write_tif(root / "cloud_binary" / name, _codes(rng, (0, 1, 2, 255), size), 4326, 10, 50, 0.004112)
        (root / f"{split}.csv").write_text("\n".join(names) + "\n")


def noise_eurosat(root: Path, sensor: str, size: int = 32) -> None:
    rng = np.random.default_rng(3)
    for split in SPLITS:
        names = [f"Residential_{split}", f"AnnualCrop_{split}"]
        for name in names:
            values = _real(rng, 2, size) if sensor == "s1" else _digital(rng, 13, size)
            write_tif(root / f"all_imgs/{name.split('_')[0]}/{name}.tif", values, 32633, 453604, 5165116, 9.8)
        (root / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))


def noise_bigearthnet(root: Path, header: str = "header", count: int = 2, size: int = 32) -> None:
    """``header``: "header" (names of columns), "numbers" (numbered columns) or "" (none)."""
    rng = np.random.default_rng(4)
    for split in SPLITS:
        lines = []
        if header:
            first = ["s1_path", "s2_path"] if header == "header" else ["0", "1"]
            lines.append(",".join([*first, *(f'"{name}"' for name in CODE_NAMES[header][:19])]))
        for i in range(count):
            s1 = f"S1A_IW_GRDH_1SDV_20170613T165043_33UUP_{split}_{i}_allbands"
            s2 = f"S2A_MSIL2A_20170614T101031_N9999_R022_T33UUP_{split}_{i}_allbands"
            paths = [f"{name.split('_33UUP')[0].split('_N9999')[0]}/{name[:-9]}/{name}.tif" for name in (s1, s2)]
            write_tif(root / "BigEarthNet-S1-5%" / paths[0], _real(rng, 2, size), 32629, 5e5, 4.3e6, 10)
            write_tif(root / "BigEarthNet-S2-5%" / paths[1], _digital(rng, 12, size), 32629, 5e5, 4.3e6, 10)
            lines.append(",".join([*paths, *map(str, rng.integers(0, 2, 19))]))
        (root / f"multilabel-{split}.csv").write_text("\n".join(lines) + "\n")


def _noise_olci(root: Path, rng: np.random.Generator, pid: str, dates: int, size: int) -> None:
    for date in DATES[:dates]:
        values = _with_holes(rng, _real(rng, 21, size))
        write_tif(root / f"s3_olci/{pid}/S3A_{date}.tif", values, 4326, -70.25, -55.25, 0.002695)


def noise_lc100(root: Path, header: str = "numbers", count: int = 2, size: int = 10, label_size: int = 32) -> None:
    rng = np.random.default_rng(5)
    for split in SPLITS:
        lines = [",".join(["0", *(["1", *CODE_NAMES["numbers"]][:23])])] if header else []
        static = []
        for i in range(count):
            pid = f"{200599 + i:07d}_{split}_-70.25_-55.25"
            _noise_olci(root, rng, pid, 1 + i % 3, size)
            write_tif(root / f"lc100/{pid}.tif", _codes(rng, LC100_CODES, label_size), 4326, -70.25, -55.25, 0.000898)
            lines.append(",".join([pid, *map(str, rng.integers(0, 2, 23))]))
            static.append(f"{pid},S3A_{DATES[i % 3]}.tif")
        (root / f"multilabel-{split}.csv").write_text("\n".join(lines) + "\n")
        (root / f"static_fnames-{split}.csv").write_text("\n".join(static) + "\n")


def noise_dfc(root: Path, size: int = 32) -> None:
    """Radar in double precision; tagged as degrees, a pixel each: no georeference in truth."""
    rng = np.random.default_rng(6)
    for split in SPLITS:
        name = f"ROIs0000_{split}_dfc_0_p609"
        write_tif(root / f"s1/{name.replace('dfc', 's1')}.tif", rng.random((2, size, size)), 4326, 0, 0, 1)
        write_tif(root / f"s2/{name.replace('dfc', 's2')}.tif", _digital(rng, 13, size), 4326, 0, 0, 1)
        write_tif(root / f"dfc/{name}.tif", _codes(rng, tuple(range(11)), size, np.int32), 4326, 0, 0, 1)
        (root / f"dfc-{split}-new.csv").write_text(f"{name}.tif\n")


def noise_flood(root: Path, size: int = 32) -> None:
    """The images lie a little apart from each other; the one after has values that are missing or above the clamp."""
    rng = np.random.default_rng(7)
    for split in SPLITS:
        folder = root / f"data/1111013/01/{split}"
        for image, date, left in (("SL2", "20211201", 0), ("SL1", "20211225", 500), ("MS1", "20220106", 0)):
            for band in ("IVV", "IVH"):
                values = _real(rng, 1, size) / 4
                if image == "MS1":
                    values = _with_holes(rng, values)
                write_tif(folder / f"{image}_{band}_1111013_01_{date}.tif", values, 3857, 1e6 + left, 6e6, 10)
        write_tif(folder / "MK0_MLU_1111013_01_20220106.tif", _codes(rng, (0, 1, 2, 3), size), 3857, 1e6, 6e6, 10)
        grid = {"path": f"1111013/01/{split}", "info": {"datasets": {}}}
        (root / f"grid_dict_{split}.json").write_text(json.dumps({split: grid}))


def noise_lcz(root: Path, count: int = 2, size: int = 32) -> None:
    rng = np.random.default_rng(8)
    root.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with h5py.File(root / f"lcz_{split}.h5", "w") as file:
            file["label"] = np.eye(17, dtype=np.uint8)[rng.integers(0, 17, count)]
            file["sen1"] = rng.random((count, size, size, 8)).astype(np.float32)
            file["sen2"] = rng.random((count, size, size, 10)).astype(np.float32)


def noise_biomass(root: Path, count: int = 2, size: int = 10, label_size: int = 32) -> None:
    rng = np.random.default_rng(9)
    for split in SPLITS:
        static = []
        for i in range(count):
            pid = f"S30E140_ESACCI-BIOMASS-L4-AGB-MERGED-100m-2020-fv4.0_{split}_{i}"
            _noise_olci(root, rng, pid, 2, size)
            label = rng.integers(0, 100, (1, label_size, label_size)).astype(np.uint16)
            write_tif(root / f"biomass/{pid}.tif", label, 4326, 140, -30, 0.000889)
            static.append(f"{pid},S3A_{DATES[1]}.tif")
        (root / f"static_fnames-{split}.csv").write_text("\n".join(static) + "\n")


def noise_air(root: Path, gas: str, size: int = 32) -> None:
    rng = np.random.default_rng(10)
    for split in SPLITS:
        pid = f"EEA_1kmgrid_2021_{gas}_avg_{split}_13"
        for folder, dates in (("s5p_annual", ("2021-01-01_2021-12-31",)), ("s5p_seasonal", SEASONS)):
            for date in dates:
                values = _with_holes(rng, _real(rng, 1, size))
                write_tif(root / f"{folder}/{pid}/{date}.tif", values, 3035, 4e6, 3e6, 1113.2)
        label = _with_holes(rng, _real(rng, 1, size) * 5000)
        label[:, 0], label[:, 1, ::2], label[:, 1, 1::2] = -np.inf, np.inf, 3e38
        write_tif(root / f"label_annual/{pid}.tif", label, 3035, 4e6, 3e6, 1113.2)
        (root / f"{split}.csv").write_text(f"{pid}\n")


def noise_bench(folder: Path) -> None:
    """All 15 tasks, a sample or two a split."""
    noise_cloud_s2(folder / "cloud_s2")
    noise_cloud_s3(folder / "cloud_s3")
    noise_eurosat(folder / "eurosat_s1", "s1")
    noise_eurosat(folder / "eurosat_s2", "s2")
    noise_bigearthnet(folder / "bigearthnet_s1s2")
    noise_lc100(folder / "lc100_s3")
    noise_dfc(folder / "dfc2020_s1s2")
    noise_flood(folder / "flood_s1")
    noise_lcz(folder / "lcz_s1s2")
    noise_biomass(folder / "biomass_s3")
    noise_air(folder / "airquality_s5p/no2", "no2")
    noise_air(folder / "airquality_s5p/o3", "o3")
