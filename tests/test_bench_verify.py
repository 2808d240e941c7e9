"""Verification of a benchmark's folders: sound ones, and files broken for real, each named while all others stay sound."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from bench_files import noise_bench, noise_lcz, write_cloud, write_eurosat, write_flood, write_no2
from test_run import copernicus

from copernicus.datasets.bench.tasks import TASKS, VARIANTS, get_task
from copernicus.datasets.bench.verify import (
    SCHEMA,
    Row,
    compare,
    find_tasks,
    from_table,
    list_split,
    to_table,
    verify_samples,
)
from copernicus.datasets.sensors import InputError

COUNTS = {"train": 3, "val": 1, "test": 2}
CLASSES = ("Forest", "River")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    numbers = iter(range(100))
    write_eurosat(
        folder / "eurosat_s2", {s: [(CLASSES[i % 2], next(numbers)) for i in range(n)] for s, n in COUNTS.items()}
    )
    write_cloud(folder / "cloud_s3", COUNTS)
    write_flood(folder / "flood_s1", COUNTS)
    write_no2(folder / "airquality_s5p" / "no2", COUNTS)
    return folder


@pytest.fixture
def bench(sound, tmp_path) -> Path:
    """A copy to break things in."""
    return Path(shutil.copytree(sound, tmp_path / "bench"))


def verified(folder: Path, name: str) -> list[Row]:
    """All rows of a task, without Ray."""
    rows = []
    for split in get_task(name).splits:
        row, entries = list_split(name, folder, split)
        rows += [row, *verify_samples(name, folder, split, entries)]
    compare(rows)
    return rows


def faults(rows: list[Row]) -> dict[tuple[str, str], set[str]]:
    return {(row.split, row.sample): set(row.faults) for row in rows if row.faults}


def notes(rows: list[Row]) -> dict[tuple[str, str], set[str]]:
    """Without those that all of these small splits have."""
    found = {(row.split, row.sample): set(row.notes) - {"other_size", "subset"} for row in rows}
    return {key: reasons for key, reasons in found.items() if reasons}


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A GeoTIFF's values replaced; the place stays."""
    with rasterio.open(path) as file:
        values, crs, transform = change(file.read()), file.crs, file.transform
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[1], width=values.shape[2], count=len(values), dtype=values.dtype,
        crs=crs, transform=transform,
    ) as file:  # fmt: skip
        file.write(values)


def entries(folder: Path, name: str, split: str = "train") -> list[str]:
    return [entry.id for entry in list_split(name, folder, split)[1]]


# --- what is there --------------------------------------------------------------------------------------------------


def test_tasks_are_found_from_above_and_from_within(sound, tmp_path):
    assert find_tasks(sound) == ["cloud_s3", "eurosat_s2", "flood_s1", "aq_no2_s5p"]
    assert find_tasks(sound / "airquality_s5p") == ["aq_no2_s5p"]
    assert find_tasks(sound / "cloud_s3") == ["cloud_s3"]  # its split files are called like those of other tasks
    assert find_tasks(sound / "airquality_s5p" / "no2") == ["aq_no2_s5p"]
    shutil.copytree(sound / "eurosat_s2", tmp_path / "mine")
    assert find_tasks(tmp_path / "mine") == ["eurosat_s2"]
    assert find_tasks(tmp_path) == []


@pytest.mark.parametrize("name", ["cloud_s3", "eurosat_s2", "flood_s1", "aq_no2_s5p"])
def test_sound_tasks(sound, name):
    rows = verified(sound, name)
    assert faults(rows) == {}
    assert notes(rows) == {}
    assert [row.split for row in rows if not row.sample] == ["train", "val", "test"]
    assert {row.split: sum(r.split == row.split and r.sample != "" for r in rows) for row in rows} == COUNTS
    assert all(row.notes.keys() == {"subset"} for row in rows if not row.sample)
    assert rows[0].notes["subset"] == f"3 samples, published are {TASKS[name].splits['train']}"
    assert from_table(to_table(rows)) == rows
    one = rows[1]
    record = TASKS[name].open(sound, "train")._samples.records[0]
    values = np.concatenate([rasterio.open(path).read() for date in record.images for path in date]).astype(np.float64)
    assert one.finite == pytest.approx(np.isfinite(values).mean())
    assert (one.low, one.high) == pytest.approx((np.nanmin(values), np.nanmax(values)))


def test_all_tasks_and_their_variants(tmp_path):
    noise_bench(tmp_path)
    found = find_tasks(tmp_path)
    assert found == [name for task in TASKS for name in (task, *(v for v in VARIANTS if v.startswith(f"{task}-")))]
    for name in found:
        rows = verified(tmp_path, name)
        assert faults(rows) == {}, name
        assert [row.split for row in rows if not row.sample] == ["train", "val", "test"]
        assert sum(row.sample != "" for row in rows) == sum(len(get_task(name).open(tmp_path, s)) for s in COUNTS)
    assert find_tasks(tmp_path / "lc100_s3") == [n for n in found if n.startswith("lc100")]
    shutil.copytree(tmp_path / "airquality_s5p" / "o3", tmp_path / "other" / "mine")
    assert find_tasks(tmp_path / "other" / "mine") == ["aq_o3_s5p", "aq_o3_s5p-seasonal"]  # by the names in its lists
    shutil.rmtree(tmp_path / "bigearthnet_s1s2" / "BigEarthNet-S1-5%")
    assert "bigearthnet_s1" not in find_tasks(tmp_path)
    assert "bigearthnet_s2" in find_tasks(tmp_path)


def test_tables(tmp_path):
    noise_lcz(tmp_path / "lcz_s1s2", count=3)
    with h5py.File(tmp_path / "lcz_s1s2" / "lcz_train.h5", "a") as file:
        file["sen2"][1] = np.nan
        file["label"][2] = 1
        file["sen2"][2] = file["sen2"][0]
    with (
        h5py.File(tmp_path / "lcz_s1s2" / "lcz_test.h5", "a") as file,
        h5py.File(tmp_path / "lcz_s1s2" / "lcz_train.h5") as train,
    ):
        file["sen2"][0] = train["sen2"][0]
    os.truncate(tmp_path / "lcz_s1s2" / "lcz_val.h5", 1000)
    rows = verified(tmp_path, "lcz_s2")
    assert faults(rows) == {
        ("train", "train_000001"): {"all_nan"},
        ("train", "train_000002"): {"refused"},
        ("val", ""): {"bad_split"},
    }
    assert notes(rows) == {("test", "test_000000"): {"same_pixels"}}
    assert all("lcz_" in detail for row in rows for detail in row.faults.values())


# --- files ----------------------------------------------------------------------------------------------------------


def test_each_broken_file_is_named_and_stops_no_other(bench):
    root = bench / "cloud_s3"
    names = entries(bench, "cloud_s3")
    (root / "s3_olci" / f"{names[0]}.tif").write_bytes(b"not a GeoTIFF")
    cut = root / "cloud_multi" / f"{names[1]}.tif"
    cut.write_bytes(cut.read_bytes()[:400])
    (root / "s3_olci" / f"{names[2]}.tif").unlink()
    rows = verified(bench, "cloud_s3")
    assert faults(rows) == {
        ("train", names[0]): {"unreadable"},
        ("train", names[1]): {"unreadable"},
        ("train", names[2]): {"missing_file"},
    }
    details = {row.sample: next(iter(row.faults.values())) for row in rows if row.faults}
    assert str(root / "s3_olci" / f"{names[0]}.tif") in details[names[0]]
    assert str(cut) in details[names[1]]
    assert str(root / "s3_olci" / f"{names[2]}.tif") in details[names[2]]
    assert len([row for row in rows if row.sample]) == sum(COUNTS.values())


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("s3_olci", lambda x: x[:20], "wrong_bands"),
        ("s3_olci", lambda x: np.full_like(x, np.nan), "all_nan"),
        ("cloud_multi", lambda x: np.concatenate([x, x]), "unreadable"),
        ("cloud_multi", lambda x: x + 40, "unknown_codes"),
        ("cloud_multi", lambda x: x[:, :47], "label_size"),
        ("cloud_multi", lambda x: x[:, ::2, ::2], "label_size"),
    ],
)
def test_faults(bench, file, change, reason):
    name = entries(bench, "cloud_s3")[1]
    rewrite(bench / "cloud_s3" / file / f"{name}.tif", change)
    rows = verified(bench, "cloud_s3")
    assert faults(rows) == {("train", name): {reason}}
    (detail,) = (row.faults[reason] for row in rows if row.faults)
    assert name in detail


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("s3_olci", np.ones_like, "constant"),
        ("s3_olci", lambda x: np.where(np.arange(48) < 40, np.nan, x).astype(np.float32), "some_nan"),
        ("cloud_multi", np.zeros_like, "no_label"),
    ],
)
def test_notes(bench, file, change, reason):
    name = entries(bench, "cloud_s3")[1]
    rewrite(bench / "cloud_s3" / file / f"{name}.tif", change)
    rows = verified(bench, "cloud_s3")
    assert faults(rows) == {}
    assert notes(rows) == {("train", name): {reason}}


def test_a_regression_without_a_known_value_and_dates_of_other_sizes(bench):
    name = entries(bench, "aq_no2_s5p")[0]
    rewrite(bench / "airquality_s5p" / "no2" / "label_annual" / f"{name}.tif", lambda x: np.full_like(x, np.nan))
    assert notes(verified(bench, "aq_no2_s5p")) == {("train", name): {"no_label"}}
    flood = next((bench / "flood_s1").rglob("train0001/SL1_IVH*.tif"))
    rewrite(flood, lambda x: x[:, :20])
    rows = verified(bench, "flood_s1")
    assert faults(rows) == {("train", "train0001"): {"unreadable"}}
    (detail,) = (row.faults["unreadable"] for row in rows if row.faults)
    assert str(flood) in detail


# --- splits ---------------------------------------------------------------------------------------------------------


def test_listed_twice_leaks_and_twins(bench):
    root = bench / "eurosat_s2"
    first, second, _ = entries(bench, "eurosat_s2")
    (held,) = entries(bench, "eurosat_s2", "val")
    with open(root / "eurosat-train.txt", "a") as file:
        file.write(f"{first}.jpg\n{held}.jpg\n")
    twin = f"{second.split('_')[0]}_999"
    kind = twin.split("_")[0]
    shutil.copy(root / "all_imgs" / kind / f"{second}.tif", root / "all_imgs" / kind / f"{twin}.tif")
    with open(root / "eurosat-test.txt", "a") as file:
        file.write(f"{twin}.jpg\n")
    rows = verified(bench, "eurosat_s2")
    assert faults(rows) == {("train", first): {"listed_twice"}, ("val", held): {"leak"}}
    assert next(row for row in rows if row.split == "val" and row.sample).faults["leak"] == "in train too"
    assert notes(rows) == {("test", twin): {"same_pixels"}}
    assert next(row for row in rows if row.sample == twin).notes["same_pixels"] == f"as {second} of train"


def test_split_files_that_cannot_be_read(bench):
    (bench / "eurosat_s2" / "eurosat-val.txt").unlink()
    rows = verified(bench, "eurosat_s2")
    assert faults(rows) == {("val", ""): {"missing_split"}}
    assert len([row for row in rows if row.sample]) == 5
    (bench / "flood_s1" / "grid_dict_test.json").write_text('{"a": ')
    (bench / "flood_s1" / "grid_dict_val.json").write_text("{}")
    assert faults(verified(bench, "flood_s1")) == {("test", ""): {"bad_split"}, ("val", ""): {"bad_split"}}


def test_a_class_that_is_none(bench):
    with open(bench / "eurosat_s2" / "eurosat-test.txt", "a") as file:
        file.write("Volcano_7.jpg\n")
    assert faults(verified(bench, "eurosat_s2")) == {("test", "Volcano_7"): {"unknown_class"}}


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(bench, tmp_path):
    name = entries(bench, "cloud_s3")[0]
    os.truncate(bench / "cloud_s3" / "s3_olci" / f"{name}.tif", 100)
    output = copernicus(tmp_path, "data", "verify", "bench", "--out", "report.parquet", code=1)
    assert "faults in 1 of the report's rows: report.parquet" in output
    assert "Traceback" not in output
    for said in ("4 tasks of Copernicus-Bench", "cloud_s3", "1197", "subset", "unreadable", name, "a row a sample"):
        assert said in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench", "report.parquet"]
    table = pq.read_table(tmp_path / "report.parquet")
    assert table.schema.equals(SCHEMA)
    assert from_table(table) == [row for task in find_tasks(bench) for row in verified(bench, task)]
    bad = [row for row in table.to_pylist() if not row["ok"]]
    assert [(row["task"], row["split"], row["sample"]) for row in bad] == [("cloud_s3", "train", name)]


def test_folders_of_neither_kind(sound, tmp_path, monkeypatch):
    from copernicus.platform.data_jobs import bench_tasks

    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"folder empty holds no shards .* eurosat_s2"):
        bench_tasks(["empty"])
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    assert bench_tasks(["shards", "s3://bucket/b.tar"]) == []
    with pytest.raises(InputError, match="one after the other"):
        bench_tasks(["shards", str(sound)])
    assert bench_tasks([str(sound / "cloud_s3")]) == [("cloud_s3", sound / "cloud_s3")]
