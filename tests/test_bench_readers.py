"""The benchmark's specs and readers, against files written here and numbers computed here."""

import copy
import datetime
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from bench_files import EUROSAT_FILE_BANDS, noise_bench, write_cloud, write_eurosat, write_flood, write_no2, write_tif

from copernicus.datasets import SENSORS, TASKS, InputError, get_task
from copernicus.datasets.bench.raster import find_date
from copernicus.datasets.bench.resize import published_mask, published_nearest, resize_image, resize_label
from copernicus.datasets.bench.tasks import VARIANTS


def days(*date: int) -> int:
    return (datetime.date(*date) - datetime.date(1970, 1, 1)).days


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_eurosat(
        folder / "eurosat_s2", {"train": [("River", 1), ("AnnualCrop", 7), ("SeaLake", 3)], "val": [("River", 2)]}
    )
    write_cloud(folder / "cloud_s3", {"val": 2})
    write_flood(folder / "flood_s1", {"val": 2})
    write_no2(folder / "airquality_s5p/no2", {"val": 2})
    return folder


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    noise_bench(folder)
    return folder


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read().astype(np.float64)


@pytest.mark.parametrize("name", [*TASKS, *VARIANTS])
def test_every_spec_is_whole(name):
    task = get_task(name)
    assert task.name == name
    assert set(task.splits) == {"train", "val", "test"}
    assert task.input_size % task.sensor.patch_kernel == 0
    assert "copernicus_fm_vit_b16" in task.published
    assert task.dates == len(task.sensors("default")) == len(task.sensors("published"))
    assert sorted(task.file_bands) == sorted(task.sensor.bands) or not task.file_bands
    if task.label_codes:
        assert set(task.label_codes.values()) - {task.ignore_index} == set(range(task.num_classes))


@pytest.mark.parametrize("preset", ["default", "published"])
def test_eurosat_is_read_in_the_sensors_band_order(bench, preset):
    task = TASKS["eurosat_s2"]
    dataset = task.open(bench, "train", preset, image_size=64)
    assert [dataset[i]["id"] for i in range(3)] == ["River_1", "AnnualCrop_7", "SeaLake_3"]
    assert [int(sample["target"]) for sample in dataset] == [8, 0, 9]
    raw = read(bench / "eurosat_s2/all_imgs/River/River_1.tif")
    image = dataset[0]["image"].numpy()
    assert image.shape == (13, 64, 64)
    assert dataset[0]["image"].dtype == torch.float32
    for channel, (band, mean, std) in enumerate(zip(task.sensor.bands, task.sensor.mean, task.sensor.std, strict=True)):
        expected = (raw[EUROSAT_FILE_BANDS.index(band)] - mean) / std
        np.testing.assert_allclose(image[channel], expected, rtol=1e-5, atol=1e-5)


def test_bands_are_found_by_name_when_the_file_names_them(tmp_path):
    write_eurosat(tmp_path, {"train": [("River", 1)]})
    path = tmp_path / "all_imgs/River/River_1.tif"
    before = TASKS["eurosat_s2"].open(tmp_path, "train")[0]["image"]
    raw = read(path).astype(np.uint16)
    write_tif(path, raw[::-1].copy(), 32633, 500_000, 5_300_640, 10)
    with rasterio.open(path, "r+") as file:
        file.descriptions = EUROSAT_FILE_BANDS[::-1]
    assert torch.equal(TASKS["eurosat_s2"].open(tmp_path, "train")[0]["image"], before)


def test_eurosat_metadata(bench):
    # EPSG:32633: 500 km easting is the central meridian, 15 degrees east; the tile spans 640 m to its east and south.
    default = TASKS["eurosat_s2"].open(bench, "train")[0]["metadata"]
    published = TASKS["eurosat_s2"].open(bench, "train", "published")[0]["metadata"]
    metres_per_degree = 111_320 * np.cos(np.radians(47.85))
    assert float(default[0]) == pytest.approx(15 + 320 / metres_per_degree, abs=2e-5)
    assert float(published[0] - default[0]) == pytest.approx(5 / metres_per_degree, abs=2e-6)  # half a pixel
    assert 47.8 < float(default[1]) < 47.9
    assert default[2].isnan()
    assert float(published[3]) == pytest.approx(0.0256)
    assert float(default[3]) == pytest.approx(0.0256 * (64 / 224) ** 2)


def test_published_resizing_aligns_the_corners(bench):
    dataset = TASKS["eurosat_s2"].open(bench, "train", "published")
    raw = TASKS["eurosat_s2"].open(bench, "train", "published", image_size=64)[0]["image"].numpy()
    image = dataset[0]["image"].numpy()
    assert image.shape == (13, 224, 224)
    position = np.linspace(0, 63, 224)  # corners aligned: the first and last pixel centres coincide
    low = np.minimum(position.astype(int), 62)
    weight = position - low
    rows = raw[:, low] * (1 - weight)[None, :, None] + raw[:, low + 1] * weight[None, :, None]
    expected = rows[:, :, low] * (1 - weight) + rows[:, :, low + 1] * weight
    np.testing.assert_allclose(image, expected, atol=2e-4)


def test_default_resizing_keeps_the_mean_and_the_place():
    image = torch.zeros(1, 64, 64)
    image[:, 32:] = 1
    small = resize_image(image, 16, "bilinear")
    assert float(small.mean()) == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(small.flip(-2), 1 - small)


def test_label_resizing():
    label = np.arange(8)[None, :].repeat(8, 0)
    assert resize_label(label, 4)[0].tolist() == [1, 3, 5, 7]
    assert published_mask(label, 4)[0].tolist() == published_nearest(label, 4)[0].tolist() == [0, 2, 4, 6]
    for resize in (resize_label, published_mask, published_nearest):
        assert resize(label, 16)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]


@pytest.mark.parametrize("preset", ["default", "published"])
def test_cloud_labels_scale_and_date(bench, preset):
    task = TASKS["cloud_s3"]
    sample = task.open(bench, "val", preset, image_size=48)[1]
    assert sample["target"].dtype == torch.int64
    assert sample["target"][0].unique().tolist() == [255]
    assert sample["target"][1:, :24].unique().tolist() == [0]
    assert sample["target"][1:, 24:].unique().tolist() == [2]
    raw = read(bench / f"cloud_s3/s3_olci/{sample['id']}.tif")
    expected = np.nan_to_num(raw * np.array(SENSORS["s3_olci"].scale)[:, None, None])
    np.testing.assert_allclose(sample["image"].numpy(), expected, rtol=1e-5)
    assert sample["metadata"][2] == days(2020, 7, 2)
    assert float(sample["metadata"][3]) == pytest.approx(5.76)
    assert float(sample["metadata"][0]) == pytest.approx(10 + (24.5 if preset == "published" else 24) * 0.003, abs=1e-5)
    assert task.sensor.wavelengths_nm[-1] == 1020


def test_flood_stacks_before_and_after(bench):
    task = TASKS["flood_s1"]
    default = task.open(bench, "val", image_size=32)[0]
    published = task.open(bench, "val", "published", image_size=32)[0]
    folder = bench / "flood_s1/data/130/01/val0000"
    files = [
        "SL1_IVV_130_01_20191225", "SL1_IVH_130_01_20191225", "MS1_IVV_130_01_20200106", "MS1_IVH_130_01_20200106"
    ]  # fmt: skip
    raw = np.concatenate([read(folder / f"{name}.tif") for name in files]).clip(0, 0.15)
    mean = np.array([0.0981, 0.0253, 0.0981, 0.0253])[:, None, None]
    std = np.array([0.0430, 0.0174, 0.0430, 0.0174])[:, None, None]
    defect = np.array([0.0430, 0.0174, 0.0981, 0.0253])[:, None, None]
    np.testing.assert_allclose(default["image"].numpy(), (raw - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(published["image"].numpy(), (raw - mean) / defect, rtol=1e-4, atol=1e-5)
    assert default["metadata"][:, 2].tolist() == [days(2019, 12, 25), days(2020, 1, 6)]
    assert default["target"][:16, :-1].unique().tolist() == [0]
    assert default["target"][16:, :-1].unique().tolist() == [2]
    assert default["target"][:, -1].unique().tolist() == [task.ignore_index]


def test_flood_missing_pixels_take_the_upper_clamp(tmp_path):
    write_flood(tmp_path, {"train": 1})
    path = tmp_path / "data/130/01/train0000/MS1_IVV_130_01_20200106.tif"
    values = read(path).astype(np.float32)
    values[0, 3, 4], values[0, 3, 5] = np.nan, 7.0
    write_tif(path, values, 3857, 1e6, 6e6, 10)
    image = TASKS["flood_s1"].open(tmp_path, "train", image_size=32)[0]["image"]
    assert image[2, 3, 4:6].tolist() == pytest.approx([(0.15 - 0.0981) / 0.043] * 2, rel=1e-5)


def test_no2_targets_are_normalised_and_masked(bench):
    task = TASKS["aq_no2_s5p"]
    sample = task.open(bench, "val", "published")[0]
    name = sample["id"]
    raw = read(bench / f"airquality_s5p/no2/label_annual/{name}.tif")[0]
    assert sample["target"][:2].isnan().all()
    np.testing.assert_allclose(sample["target"][2:].numpy(), (raw[2:] - 5.3167) / 3.9948, rtol=1e-4, atol=1e-5)
    column = read(bench / f"airquality_s5p/no2/s5p_annual/{name}/2021-01-01_2021-12-31.tif")
    np.testing.assert_allclose(sample["image"].numpy(), column, rtol=1e-5)
    assert sample["metadata"][2:].tolist() == [days(2021, 1, 1), 16.0]


@pytest.mark.parametrize("name", [*TASKS, *VARIANTS])
def test_folder_may_be_the_root_or_its_parent(noise, name):
    task = get_task(name)
    above, below = task.open(noise, "val"), task.open(noise / task.directory, "val")
    assert len(above) == len(below) > 0
    assert torch.equal(above[0]["image"], below[0]["image"])
    with pytest.raises(IndexError):
        above[len(above)]


def test_missing_things_are_named(bench, tmp_path):
    task = TASKS["eurosat_s2"]
    with pytest.raises(InputError, match=r"no folder .*nowhere.*eurosat_s2/"):
        task.open(tmp_path / "nowhere", "val")
    with pytest.raises(InputError, match=r"no split file eurosat-val\.txt .*expected eurosat_s2/eurosat-<split>\.txt"):
        task.open(tmp_path, "val")
    with pytest.raises(InputError, match="no split 'dev'; the splits are train, val, test"):
        task.open(bench, "dev")
    with pytest.raises(InputError, match="no preset 'paper'"):
        task.open(bench, "val", "paper")
    with pytest.raises(InputError, match="image_size 60 must be a positive multiple of the patch kernel, 16"):
        task.open(bench, "val", image_size=60)
    write_eurosat(tmp_path, {"val": [("River", 1), ("Forest", 2), ("Forest", 3)]})
    os.remove(tmp_path / "all_imgs/Forest/Forest_3.tif")
    with pytest.raises(InputError, match=r"Forest_3\.tif is missing"):
        task.open(tmp_path, "val")
    (tmp_path / "eurosat-val.txt").write_text("Jungle_1.jpg\n")
    with pytest.raises(InputError, match=r"unknown classes \['Jungle'\]"):
        task.open(tmp_path, "val")
    (tmp_path / "eurosat-val.txt").write_text("\n")
    with pytest.raises(InputError, match="lists no samples"):
        task.open(tmp_path, "val")
    write_flood(tmp_path, {"val": 1})
    (tmp_path / "grid_dict_val.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"grid_dict_val\.json is not as expected"):
        TASKS["flood_s1"].open(tmp_path, "val")


def test_bad_files_are_named(tmp_path):
    task = TASKS["eurosat_s2"]
    write_eurosat(tmp_path, {"val": [("River", 1), ("River", 2)]})
    (tmp_path / "all_imgs/River/River_1.tif").write_bytes(b"not an image")
    write_tif(tmp_path / "all_imgs/River/River_2.tif", np.ones((12, 64, 64), np.uint16), 32633, 5e5, 5e6, 10)
    dataset = task.open(tmp_path, "val")
    with pytest.raises(InputError, match=r"River_1\.tif: cannot be read as GeoTIFF"):
        dataset[0]
    with pytest.raises(InputError, match=r"River_2\.tif: 12 bands, expected 13"):
        dataset[1]
    write_cloud(tmp_path, {"val": 1})
    name = (tmp_path / "val.csv").read_text().strip()
    write_tif(tmp_path / "cloud_multi" / name, np.full((1, 48, 48), 9, np.uint8), 4326, 10, 50, 0.003)
    with pytest.raises(InputError, match=r"unknown label codes \[9\.0\]"):
        TASKS["cloud_s3"].open(tmp_path, "val")[0]
    with pytest.raises(InputError, match="'20201399' in the name is no date"):
        find_date(Path("MS1_IVV_130_01_20201399.tif"), TASKS["flood_s1"].date_regex)


def test_without_georeference_the_place_is_unknown(tmp_path):
    write_eurosat(tmp_path, {"val": [("River", 1)]})
    path = tmp_path / "all_imgs/River/River_1.tif"
    values = read(path).astype(np.uint16)
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=13, dtype="uint16") as file:
        file.write(values)
    metadata = TASKS["eurosat_s2"].open(tmp_path, "val")[0]["metadata"]
    assert metadata[:3].isnan().all()
    assert not metadata[3].isnan()


def test_fingerprint_follows_the_data(bench, tmp_path):
    write_flood(tmp_path, {"val": 2})
    task = TASKS["flood_s1"]
    before = task.open(tmp_path, "val").fingerprint()
    assert task.open(tmp_path, "val").fingerprint() == before
    label = tmp_path / "data/130/01/val0001/MK0_MLU_130_01_20200106.tif"
    os.utime(label, ns=(1, 1))
    assert task.open(tmp_path, "val").fingerprint() != before


@pytest.mark.parametrize("name", [*TASKS, *VARIANTS])
def test_specs_and_datasets_travel_between_processes(noise, name):
    task = get_task(name)
    assert copy.deepcopy(task) == task
    assert json.dumps(task.published)
    dataset = task.open(noise, "val")
    before = dataset[0]
    copied = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copied[0]["image"], before["image"])
    assert copied.fingerprint() == dataset.fingerprint()


def test_hdf5_is_opened_again_in_a_forked_process(noise):
    dataset = TASKS["lcz_s2"].open(noise, "val")
    before = [dataset[i]["image"] for i in range(len(dataset))]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for sample, expected in zip(loader, before, strict=True):
        assert torch.equal(sample["image"], expected)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("lcz_s2", ["lcz_val.h5"]),
        ("lc100cls_s3", ["multilabel-val.csv", "static_fnames-val.csv", "s3_olci/0200599_val_-70.25_-55.25/*"]),
        ("lc100cls_s3-series", ["s3_olci/0200600_val_-70.25_-55.25/*20190812*"]),
        ("biomass_s3", ["biomass/*val_1.tif"]),
        ("aq_o3_s5p-seasonal", ["s5p_seasonal/*val*/2021-10*"]),
    ],
)
def test_fingerprint_covers_every_file(noise, name, files):
    task = get_task(name)
    for pattern in files:
        (path,) = (noise / task.directory).glob(pattern)
        status, before = path.stat(), task.open(noise, "val").fingerprint()
        os.utime(path, ns=(1, 1))
        assert task.open(noise, "val").fingerprint() != before
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert task.open(noise, "val").fingerprint() == before


def real_data(part: str) -> Path:
    folder = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (folder / part).is_dir():
        pytest.skip(f"no real images in {folder} (set COPERNICUS_REAL_DATA)")
    return folder


def test_real_eurosat_lies_where_its_index_says():
    folder = real_data("eurosat_s2_subset") / "eurosat_s2_subset"
    rows = [line.split(",") for line in (folder / "index.csv").read_text().splitlines()[1:]]
    place = {row[0]: (float(row[3]), float(row[4])) for row in rows}
    for split, count in (("train", 120), ("val", 40), ("test", 40)):
        dataset = TASKS["eurosat_s2"].open(folder, split)
        assert len(dataset) == count
        for i in (0, count - 1):
            sample = dataset[i]
            assert sample["metadata"][:2].tolist() == pytest.approx(place[f"{sample['id']}.tif"], abs=5e-3)
            assert sample["image"].isfinite().all()
            assert TASKS["eurosat_s2"].classes[int(sample["target"])] == sample["id"].split("_")[0]


def test_real_bigearthnet_pairs_show_one_place():
    folder = real_data("bigearthnet_s1s2")
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        radar, optical = (TASKS[name].open(folder, split) for name in ("bigearthnet_s1", "bigearthnet_s2"))
        assert len(radar) == len(optical) == count
        for s1, s2 in zip(radar, optical, strict=True):
            assert torch.equal(s1["target"], s2["target"])
            assert 1 <= int(s1["target"].sum()) <= 10
            assert s1["metadata"][:2].tolist() == pytest.approx(s2["metadata"][:2].tolist(), abs=1e-3)
            assert abs(float(s1["metadata"][2] - s2["metadata"][2])) <= 1  # pairs of the same day, or the next
            assert s2["image"].isfinite().all()
            assert s1["image"].mean((-2, -1)).abs().max() < 2  # land, by the benchmark's statistics of dB
