"""``preset="published"`` against plain float64 arithmetic written from the published code's description, for all 15 tasks.

Nothing here calls the readers' own functions: files are read with rasterio, h5py and csv, and resized by matrices.
"""

import csv
import datetime
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import rasterio.warp
from bench_files import EUROSAT_FILE_BANDS, LC100_CODES, noise_bench, write_tif

from copernicus.datasets import TASKS, InputError, get_task
from copernicus.datasets.bench.resize import published_cubic, published_mask, published_nearest

OLCI = np.array([
    0.0139465, 0.0133873, 0.0121481, 0.0115198, 0.0100953, 0.0123538, 0.00879161, 0.00876539, 0.0095103, 0.00773378,
    0.00675523, 0.0071996, 0.00749684, 0.0086512, 0.00526779, 0.00530267, 0.00493004, 0.00549962, 0.00502847,
    0.00326378, 0.00324118,
])  # fmt: skip
S1 = ([-12.548, -20.192], [5.257, 5.912])
S2 = (
    [1353.7, 1117.2, 1041.8, 946.5, 1199.1, 2003.0, 2374.0, 2301.2, 2599.7, 732.1, 12.1, 1820.6, 1118.2],
    [897.3, 736.0, 684.8, 620.0, 791.9, 1341.3, 1595.4, 1545.5, 1750.1, 475.1, 98.3, 1216.5, 736.7],
)
S2_BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
LCZ = (
    [0.112, 0.104, 0.095, 0.120, 0.200, 0.237, 0.230, 0.260, 0.182, 0.112],
    [0.074, 0.068, 0.062, 0.079, 0.134, 0.160, 0.155, 0.175, 0.122, 0.074],
)
FLOOD = ([0.0981, 0.0253, 0.0981, 0.0253], [0.0430, 0.0174, 0.0981, 0.0253])
AREA_10M, AREA_OLCI = (16 * 10 / 1000) ** 2, (8 * 300 / 1000) ** 2
UNKNOWN = (np.nan, np.nan)
CUBIC_UINT16 = [
    [0, 38, 85, 65, 39],
    [0, 78, 175, 90, 0],
    [0, 114, 250, 119, 0],
    [30, 66, 111, 116, 110],
    [75, 18, 0, 107, 217],
]
CUBIC_FLOAT32 = [
    [-4.508755683898926, 37.77597427368164, 84.50395965576172, 65.05390930175781, 39.199764251708984],
    [-19.623315811157227, 77.97932434082031, 175.22799682617188, 89.80979919433594, -0.6668357849121094],
    [-24.000078201293945, 114.4959945678711, 250.0, 119.28399658203125, -16.32798957824707],
    [30.029659271240234, 65.78771209716797, 110.93196868896484, 115.9823989868164, 110.45857238769531],
    [75.05211639404297, 18.24090576171875, -18.519989013671875, 106.9913101196289, 217.26026916503906],
]
NEAREST = {
(14, 18): (
 [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 12, 13],
 [0, 0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 10, 10, 11, 12, 13]),
(26, 22): (
 [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24],
 [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 18, 20, 21, 22, 23, 24]),
}  # fmt: skip
Expected = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    noise_bench(folder)
    return folder


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read().astype(np.float64)


def place(path: Path) -> tuple[float, float]:
    """The centre of the pixel after the middle."""
    with rasterio.open(path) as file:
        a, row, column = file.transform, file.height // 2 + 0.5, file.width // 2 + 0.5
        x, y = a.c + a.a * column, a.f + a.e * row
        if file.crs.to_epsg() == 4326:
            return x, y
        (lon,), (lat,) = rasterio.warp.transform(file.crs, "EPSG:4326", [x], [y])
        return lon, lat


def days(text: str) -> int:
    return (datetime.datetime.strptime(text, "%Y%m%d").date() - datetime.date(1970, 1, 1)).days


def metadata(lonlat: tuple[float, float], date: str | None, area: float) -> np.ndarray:
    return np.array([*lonlat, days(date) if date else np.nan, area])


def normalise(x: np.ndarray, statistics: tuple[list[float], list[float]]) -> np.ndarray:
    mean, std = (np.array(values)[:, None, None] for values in statistics)
    return (x - mean) / std


def bilinear_matrix(stored: int, size: int) -> np.ndarray:
    # The corner pixels' centres stay where they are. Positions in float32, as there: they are off by up to 2e-5 pixels.
    position = np.arange(size, dtype=np.float32) * np.float32((stored - 1) / (size - 1))
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(stored)[None]))


def cubic_matrix(stored: int, size: int) -> np.ndarray:
    """Keys' cubic convolution with a = -0.75; beyond the edge, the edge pixel again."""
    a, matrix = -0.75, np.zeros((size, stored))
    position = (np.arange(size) + 0.5) * stored / size - 0.5
    for i, p in enumerate(position):
        for tap in range(int(np.floor(p)) - 1, int(np.floor(p)) + 3):
            d = abs(p - tap)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(tap, 0), stored - 1)] += weight
    return matrix


def resize(x: np.ndarray, size: int, matrix: Callable[[int, int], np.ndarray]) -> np.ndarray:
    return matrix(x.shape[-2], size) @ x @ matrix(x.shape[-1], size).T


def nearest(label: np.ndarray, size: int) -> np.ndarray:
    rows, columns = (np.arange(size) * stored // size for stored in label.shape)
    return label[rows][:, columns]


def cloud_s2(root: Path, index: int) -> Expected:
    name = (root / "val.csv").read_text().split()[index]
    image = root / f"s2_toa/{name}.tif"
    return (
        resize(normalise(read(image), S2), 512, bilinear_matrix),
        nearest(read(root / f"cloud/{name}.tif")[0], 512),
        metadata(place(image), "20200422", AREA_10M),
    )


def cloud_s3(root: Path, index: int, labels: str = "cloud_multi") -> Expected:
    name = (root / "val.csv").read_text().split()[index]
    image, label = root / "s3_olci" / name, read(root / labels / name)[0]
    radiance = np.nan_to_num(read(image), nan=0) * OLCI[:, None, None]
    ids = (label - 1) % 256  # in 8 bits
    return (
        resize(radiance, 224, bilinear_matrix),
        nearest(ids, 224),
        metadata(place(image), "20200703", AREA_OLCI),
    )


def eurosat(root: Path, index: int) -> Expected:
    name = (root / "eurosat-val.txt").read_text().split()[index].replace(".jpg", ".tif")
    image = root / "all_imgs" / name.split("_")[0] / name
    if root.name.endswith("s1"):
        x = normalise(read(image), S1)
    else:
        x = normalise(read(image)[[EUROSAT_FILE_BANDS.index(band) for band in S2_BANDS]], S2)
    target = {"Residential": 7, "AnnualCrop": 0}[name.split("_")[0]]
    return resize(x, 224, bilinear_matrix), np.array(target), metadata(place(image), None, AREA_10M)


def bigearthnet(root: Path, index: int, sensor: str) -> Expected:
    with open(root / "multilabel-val.csv", newline="") as file:
        row = list(csv.reader(file))[1 + index]
    image = root / f"BigEarthNet-{sensor.upper()}-5%" / row[["s1", "s2"].index(sensor)]
    statistics = S1 if sensor == "s1" else tuple([v for i, v in enumerate(values) if i != 10] for values in S2)
    date = "20170613" if sensor == "s1" else "20170614"
    return (
        resize(normalise(read(image), statistics), 224, bilinear_matrix),  # type: ignore[arg-type]
        np.array(row[2:], int),
        metadata(place(image), date, AREA_10M),
    )


def olci(root: Path, index: int, size: int, area: float) -> tuple[str, np.ndarray, np.ndarray]:
    pid, file = (root / "static_fnames-val.csv").read_text().split()[index].split(",")
    image = root / "s3_olci" / pid / file
    radiance = np.nan_to_num(read(image), nan=0) * OLCI[:, None, None]
    return pid, resize(radiance, size, cubic_matrix), metadata(place(image), file[4:12], area)


def lc100cls(root: Path, index: int) -> Expected:
    pid, image, row = olci(root, index, 96, AREA_OLCI)
    with open(root / "multilabel-val.csv", newline="") as file:
        labels = {line[0]: line[1:] for line in csv.reader(file)}
    return image, np.array(labels[pid], int), row


def lc100seg(root: Path, index: int) -> Expected:
    pid, image, row = olci(root, index, 288, AREA_OLCI)
    label = nearest(read(root / f"lc100/{pid}.tif")[0], 288)
    return image, np.searchsorted(LC100_CODES, label), row


def dfc(root: Path, index: int, sensor: str) -> Expected:
    name = (root / "dfc-val-new.csv").read_text().split()[index]
    x = read(root / sensor / name.replace("dfc", sensor))
    ids = np.array([255, 0, 1, 255, 2, 3, 4, 5, 255, 6, 7])[read(root / "dfc" / name)[0].astype(int)]
    statistics = S1 if sensor == "s1" else S2
    return (
        resize(normalise(x, statistics), 256, bilinear_matrix),
        nearest(ids, 256),
        metadata(UNKNOWN, None, AREA_10M),
    )


def flood(root: Path, index: int) -> Expected:
    folder = root / "data" / list(json.loads((root / "grid_dict_val.json").read_text()).values())[index]["path"]
    dates = [("SL1", "20211225"), ("MS1", "20220106")]
    files = [folder / f"{d}_{band}_1111013_01_{date}.tif" for d, date in dates for band in ("IVV", "IVH")]
    x = np.nan_to_num(np.concatenate([read(file) for file in files]).clip(0, 0.15), nan=0.15)
    lonlat = place(files[2])  # of the image after, for both
    return (
        resize(normalise(x, FLOOD), 224, bilinear_matrix),
        nearest(read(folder / "MK0_MLU_1111013_01_20220106.tif")[0], 224),
        np.stack([metadata(lonlat, date, AREA_10M) for _, date in dates]),
    )


def lcz(root: Path, index: int) -> Expected:
    with h5py.File(root / "lcz_val.h5") as file:
        x, label = file["sen2"][index].transpose(2, 0, 1).astype(np.float64), file["label"][index]
    return resize(normalise(x, LCZ), 112, bilinear_matrix), np.argmax(label), metadata(UNKNOWN, None, AREA_10M)


def biomass(root: Path, index: int) -> Expected:
    pid, image, row = olci(root, index, 288, (16 * 0.3) ** 2)
    label = resize(read(root / f"biomass/{pid}.tif")[0], 288, cubic_matrix)
    return image, label, row  # neither rounded nor normalised: see the test


def air(root: Path, index: int, gas: str, statistics: tuple[float, float]) -> Expected:
    pid = (root / "val.csv").read_text().split()[index]
    image = root / f"s5p_annual/{pid}/2021-01-01_2021-12-31.tif"
    label = nearest(read(root / f"label_annual/{pid}.tif")[0], 56)
    label[~(np.abs(label) <= 1e10)] = np.nan
    return (
        resize(np.nan_to_num(read(image), nan=0), 56, cubic_matrix),
        (label - statistics[0]) / statistics[1],
        metadata(place(image), "20210101", 16.0),
    )


EXPECTED: dict[str, Callable[[Path, int], Expected]] = {
    "cloud_s2": cloud_s2,
    "cloud_s3": cloud_s3,
    "eurosat_s1": eurosat,
    "eurosat_s2": eurosat,
    "bigearthnet_s1": lambda root, index: bigearthnet(root, index, "s1"),
    "bigearthnet_s2": lambda root, index: bigearthnet(root, index, "s2"),
    "lc100cls_s3": lc100cls,
    "dfc2020_s1": lambda root, index: dfc(root, index, "s1"),
    "dfc2020_s2": lambda root, index: dfc(root, index, "s2"),
    "lc100seg_s3": lc100seg,
    "flood_s1": flood,
    "lcz_s2": lcz,
    "biomass_s3": biomass,
    "aq_no2_s5p": lambda root, index: air(root, index, "no2", (5.3167, 3.9948)),
    "aq_o3_s5p": lambda root, index: air(root, index, "o3", (4654.2632, 2589.4207)),
    "cloud_s3-binary": lambda root, index: cloud_s3(root, index, "cloud_binary"),
}


@pytest.mark.parametrize("name", [*TASKS, "cloud_s3-binary"])
def test_published_samples(bench, name):
    task = get_task(name)
    dataset = task.open(bench, "val", "published")
    for index in range(len(dataset)):
        sample = dataset[index]
        image, target, rows = EXPECTED[name](bench / task.directory, index)
        np.testing.assert_allclose(sample["image"].numpy(), image, rtol=1e-5, atol=1e-6 * max(10, np.abs(image).max()))
        np.testing.assert_allclose(sample["metadata"].numpy(), rows, rtol=1e-6, atol=1e-6)
        if name == "biomass_s3":  # whole t/ha, the nearest to the cubic's value, none below 0
            stored = sample["target"].numpy().astype(np.float64) * 117.8162 + 92.3196
            np.testing.assert_allclose(stored, np.rint(stored), atol=1e-4)
            assert np.abs(stored - target.clip(0)).max() < 0.5 + 1e-3
        else:
            np.testing.assert_allclose(sample["target"].numpy(), target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lc100cls_s3-series", "lc100seg_s3-series", "biomass_s3-series"])
def test_published_series_are_the_static_images_of_each_date(bench, name):
    static = get_task(name.split("-")[0])
    series, single = (task.open(bench, "val", "published") for task in (get_task(name), static))
    for index in range(len(single)):
        several, one = series[index], single[index]
        assert several["metadata"][:, 2].tolist() == sorted(several["metadata"][:, 2].tolist())
        (match,) = [i for i, row in enumerate(several["metadata"]) if row[2] == one["metadata"][2]]
        np.testing.assert_array_equal(several["image"][match], one["image"])
        np.testing.assert_array_equal(several["target"], one["target"])


def test_cubic_is_opencvs():
    # cv2.resize(..., interpolation=cv2.INTER_CUBIC) of OpenCV 4.11, its own code (cv2.ipp.setUseIPP(False)).
    stored = np.array([[3, 99, 40], [0, 250, 7], [61, 5, 180]], np.uint16)
    assert published_cubic(stored[None], 5)[0].tolist() == CUBIC_UINT16
    np.testing.assert_allclose(published_cubic(stored[None].astype(np.float32), 5)[0], CUBIC_FLOAT32, rtol=1e-6)


def test_masks_are_resized_as_kornia_did_and_labels_as_opencv_does():
    # kornia 0.8.0 AugmentationSequential(Resize((size, size), align_corners=True), data_keys=["input", "mask"]) and
    # cv2.resize(..., interpolation=cv2.INTER_NEAREST): each rounds its own way, so that they
    # take different rows at these sizes.
    for (stored, size), (mask, label) in NEAREST.items():
        column = np.arange(stored, dtype=np.int32)[:, None].repeat(stored, 1)
        assert published_mask(column, size)[:, 0].tolist() == mask
        assert published_nearest(column, size)[:, 0].tolist() == label


def test_missing_and_unknown_values_by_preset(tmp_path):
    noise_bench(tmp_path)
    path = tmp_path / "eurosat_s1/all_imgs/Residential/Residential_val.tif"
    values = read(path).astype(np.float32)
    values[0, 5, 6] = np.nan
    write_tif(path, values, 32633, 453604, 5165116, 9.8)
    task = TASKS["eurosat_s1"]
    assert task.open(tmp_path, "val", image_size=32)[0]["image"][0, 5, 6] == 0
    assert task.open(tmp_path, "val", "published", image_size=32)[0]["image"][0, 5, 6].isnan()

    label = next((tmp_path / "lc100_s3/lc100").glob("*val*"))
    codes = read(label).astype(np.uint8)
    codes[0, :9], codes[0, 9:] = 77, 255
    write_tif(label, codes, 4326, -70.25, -55.25, 0.000898)
    index = [label.stem in name for name in TASKS["lc100seg_s3"].open(tmp_path, "val").ids].index(True)
    assert TASKS["lc100seg_s3"].open(tmp_path, "val", "published")[index]["target"].unique().tolist() == [0]
    with pytest.raises(InputError, match=r"lc100/.*val.*\.tif: unknown label codes \[77\.0\]; expected \[0, 20, 30"):
        TASKS["lc100seg_s3"].open(tmp_path, "val")[index]
    write_tif(label, np.full_like(codes, 255), 4326, -70.25, -55.25, 0.000898)
    assert TASKS["lc100seg_s3"].open(tmp_path, "val")[index]["target"].unique().tolist() == [-100]

    image = next((tmp_path / "cloud_s2/s2_toa").glob("*val*"))
    with rasterio.open(image, "r+") as file:
        file.transform = rasterio.Affine.identity()
    assert TASKS["cloud_s2"].open(tmp_path, "val", image_size=32)[0]["metadata"][:2].isnan().all()
    assert TASKS["cloud_s2"].open(tmp_path, "val", "published", image_size=32)[0]["metadata"][:2].isfinite().all()


def test_cloud_s3_code_255_by_preset(bench):
    name = (bench / "cloud_s3/val.csv").read_text().strip()
    stored = read(bench / "cloud_s3/cloud_multi" / name)[0]
    assert (stored == 255).any()
    default, published = (TASKS["cloud_s3"].open(bench, "val", p, image_size=32)[0] for p in ("default", "published"))
    assert default["target"][stored == 255].unique().tolist() == [255]
    assert published["target"][stored == 255].unique().tolist() == [254]
    assert (default["target"] == published["target"])[stored != 255].all()
