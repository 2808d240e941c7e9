"""The benchmark tasks that the miniature Earth shares folders, sensors and maps among, read back with plain tools.

EuroSAT-S2, Cloud-S3, Flood-S1 and AQ-NO2-S5P: test_miniature.py.
"""

import csv
import dataclasses
import datetime
import json
import re
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from rasterio.warp import transform

from copernicus.datasets.bench import TASKS as BENCH_TASKS
from copernicus.datasets.bench import VARIANTS, get_task
from copernicus.datasets.miniature import legends, preview, write_miniature
from copernicus.datasets.miniature.planet import Cover, Planet, Window
from copernicus.datasets.miniature.preview_tasks import task_rows
from copernicus.datasets.miniature.raster import tile_name
from copernicus.datasets.miniature.regional import biomass_name
from copernicus.datasets.miniature.tasks import TASKS

SEED = 3
TASK_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip
LC100_CODES = (0, 20, 30, 40, 50, 60, 70, 80, 90, 100, *range(111, 117), *range(121, 127), 200)
MAPS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "cloud_s2": ("cloud", (0, 1, 2, 3), ()),
    "lc100seg_s3": ("lc100", LC100_CODES, ()),
    "dfc2020_s1": ("dfc", (1, 2, 4, 5, 6, 7, 9, 10), (3, 8)),
    "dfc2020_s2": ("dfc", (1, 2, 4, 5, 6, 7, 9, 10), (3, 8)),
    "biomass_s3": ("biomass", (), ()),
    "aq_o3_s5p": ("label_annual", (), ()),
}
"""Folder of the labels; the stored codes of classes 0, 1, ...; those that are ignored."""
ELSEWHERE = ("eurosat_s2", "cloud_s3", "flood_s1", "aq_no2_s5p")


@pytest.fixture(scope="module")
def earth(tmp_path_factory):
    out = tmp_path_factory.mktemp("earth") / "new"
    return write_miniature(out, 1, SEED, "tiny", tasks=[task for task in TASKS if task not in ELSEWHERE])


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as tif:
        return tif.read()


def kind(path: Path) -> tuple:
    """Bands, height, width, type, reference system."""
    with rasterio.open(path) as tif:
        return tif.count, tif.height, tif.width, tif.dtypes[0], str(tif.crs)


def centre(path: Path) -> tuple[float, float]:
    with rasterio.open(path) as tif:
        west, south, east, north = tif.bounds
        (lon,), (lat,) = transform(tif.crs, "EPSG:4326", [(west + east) / 2], [(south + north) / 2])
    return lon, lat


def rows(root: Path, pattern: str, counts: tuple[int, int, int], header: int = 0) -> list[list[str]]:
    """Of the three split files, which have so many; no two are equal."""
    found = []
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        part = list(csv.reader((root / pattern.format(split)).open(newline="")))[header:]
        assert len(part) == count
        found += part
    assert len({row[0] for row in found}) == len(found)
    return found


def ndvi(red: np.ndarray, infrared: np.ndarray) -> np.ndarray:
    return (infrared.astype(float) - red) / (infrared.astype(float) + red)


def test_tiles_have_their_names_in_the_military_grid():
    for place, tile in {(11.575, 48.137): "32UPU", (-74.0, 40.7): "18TWL", (151.2, -33.87): "56HLH"}.items():
        assert tile_name(*place) == tile


def test_cloud_s2_layout_and_labels(earth):
    root = earth.bench / "cloud_s2"
    values: dict[int, list[np.ndarray]] = {code: [] for code in range(4)}
    darker = []
    for (name,) in rows(root, "{}.csv", (6, 3, 3)):
        match = re.fullmatch(r"ROI_\d{5}__(?P<date>\d{8})T\d{6}_\d{8}T\d{6}_T(?P<tile>\d\d[C-X][A-Z][A-V])", name)
        datetime.datetime.strptime(match["date"], "%Y%m%d")
        image, label = root / "s2_toa" / f"{name}.tif", root / "cloud" / f"{name}.tif"
        epsg = f"EPSG:{326 if match['tile'][2] >= 'N' else 327}{match['tile'][:2]}"
        assert kind(image) == (13, 64, 64, "uint16", epsg)
        assert kind(label) == (1, 64, 64, "uint8", epsg)
        assert centre(image) == centre(label)
        cirrus, blue, code = read(image)[10], read(image)[1], read(label)[0]  # B10 comes after B09
        for number, found in values.items():
            found.append(cirrus[code == number])
        if (code == 3).any() and (code == 0).any():
            darker.append(np.median(blue[code == 3]) < np.median(blue[code == 0]))
    clear, thick, thin, shadow = (np.mean(np.concatenate(values[code])) for code in range(4))
    assert thick > thin > max(clear, shadow)
    assert len(darker) >= 3
    assert np.mean(darker) > 0.7


def test_eurosat_s1_layout_and_labels(earth):
    root, planet = earth.bench / "eurosat_s1", Planet(SEED)
    levels: dict[str, list[np.ndarray]] = {}
    for (line,) in rows(root, "eurosat-{}.txt", (10, 5, 5)):
        label, _, number = line.removesuffix(".jpg").partition("_")
        assert number.isdigit()
        path = root / "all_imgs" / label / line.replace(".jpg", ".tif")
        bands, height, width, dtype, crs = kind(path)
        assert (bands, height, width, dtype) == (2, 64, 64, "float32")
        assert re.fullmatch(r"EPSG:32[67]\d\d", crs)
        levels.setdefault(label, []).append(read(path).mean(axis=(1, 2)))
        if label in ("Forest", "SeaLake", "Residential"):
            cover = planet.surface(Window(*centre(path), 1, 10.0)).cover[0, 0]
            assert cover == {"Forest": Cover.FOREST, "SeaLake": Cover.SEA_LAKE, "Residential": Cover.RESIDENTIAL}[label]
    assert len(levels) == 10
    vv = {label: np.median([level[0] for level in found]) for label, found in levels.items()}
    assert max(vv, key=vv.get) in ("Residential", "Industrial")
    assert min(vv, key=vv.get) == "SeaLake"
    assert all(level[0] > level[1] for found in levels.values() for level in found)  # VV, then VH


def test_bigearthnet_layout_and_labels(earth):
    root, planet = earth.bench / "bigearthnet_s1s2", Planet(SEED)
    with open(root / "multilabel-val.csv", newline="") as file:
        header = next(csv.reader(file))
    assert header[:3] == ["s1_path", "s2_path", "Urban fabric"]
    assert len(header) == 2 + 19
    assert header[2 + 6].startswith("Land principally occupied by agriculture, with")
    present = []
    for s1, s2, *labels in rows(root, "multilabel-{}.csv", (10, 5, 5), header=1):
        assert set(labels) <= {"0", "1"}
        present.append([label == "1" for label in labels])
        tile = re.fullmatch(r"(S1[AB]_IW_GRDH_1SDV_\d{8}T\d{6})/(\1_(\d\d[A-Z]{3})_\d+_\d+)/\2_allbands\.tif", s1)[3]
        assert re.fullmatch(r"(S2[AB]_MSIL2A_\d{8}T\d{6})/(\1_\d+_\d+)/\2_allbands\.tif", s2)
        dates = [
            datetime.datetime.strptime(re.search(pattern, name)["date"], "%Y%m%dT%H%M%S")
            for pattern, name in (
                (r"^.{16}_(?P<date>\d{8}T\d{6})", s1.split("/")[-1]),
                (r"^.{10}_(?P<date>\d{8}T\d{6})", s2.split("/")[-1]),
            )
        ]
        assert abs(dates[0] - dates[1]) < datetime.timedelta(days=5)
        radar, optical = root / "BigEarthNet-S1-5%" / s1, root / "BigEarthNet-S2-5%" / s2
        assert kind(radar)[:4] == (2, 64, 64, "float32")
        assert kind(optical)[:4] == (12, 64, 64, "uint16")
        assert kind(radar)[4] == kind(optical)[4]
        assert centre(radar) == centre(optical)
        assert tile_name(*centre(radar)) == tile
        cover = planet.surface(Window(*centre(radar), 64, 10.0)).cover
        for column, kinds in ((0, Cover.RESIDENTIAL), (2, Cover.ANNUAL_CROP), (4, Cover.PASTURE)):
            share = np.mean(cover == kinds)
            if abs(share - 0.06) > 0.03:  # roads, which the map does not have, count to what lies beside them
                assert present[-1][column] == (share > 0.06)
        forest = np.mean(cover == Cover.FOREST)
        assert any(present[-1][8:11]) == (forest > 0.05) or 0.02 < forest < 0.16
        if not any(present[-1][:8]) and (present[-1][17] or present[-1][18]):
            assert np.mean(np.isin(cover, (Cover.SEA_LAKE, Cover.RIVER))) > 0.01
    counts = np.sum(present, axis=0)
    assert (counts[[0, 1, 2, 4, 8, 17]] > 0).all()
    assert counts.max() < len(present)
    assert np.min(np.sum(present, axis=1)) >= 1


def s3_images(root: Path, place: str) -> dict[str, np.ndarray]:
    paths = sorted((root / "s3_olci" / place).iterdir())
    assert 1 <= len(paths) <= 4
    for path in paths:
        first, last = re.fullmatch(r"S3A_(\d{8}T\d{6})_(\d{8}T\d{6})\.tif", path.name).groups()
        assert first < last
        assert kind(path) == (21, 32, 32, "float32", "EPSG:4326")
        with rasterio.open(path) as tif:
            assert tif.res[1] == pytest.approx(0.002695, rel=1e-3)
    return {path.name: read(path) for path in paths}


def label_of(root: Path, folder: str, place: str, dtype: str) -> np.ndarray:
    """(96, 96), on the very ground of the images."""
    path = root / folder / f"{place}.tif"
    assert kind(path) == (1, 96, 96, dtype, "EPSG:4326")
    with rasterio.open(path) as label, rasterio.open(next((root / "s3_olci" / place).iterdir())) as image:
        np.testing.assert_allclose(label.bounds, image.bounds, atol=1e-9)
        assert label.res[1] == pytest.approx(0.000898, rel=1e-3)
    return read(path)[0]


def test_lc100_layout_and_labels(earth):
    root = earth.bench / "lc100_s3"
    assert (root / "multilabel-test.csv").read_text().splitlines()[0] == ",".join(str(i) for i in range(24))
    static = dict(rows(root, "static_fnames-{}.csv", (6, 3, 3)))
    places = rows(root, "multilabel-{}.csv", (6, 3, 3), header=1)
    assert [place for place, *_ in places] == list(static)
    pixels: dict[int, list[np.ndarray]] = {}
    dates = 0
    for place, *present in places:
        number, lon, lat = place.split("_")
        assert int(number) == round((float(lat) + 90) / 0.25) * 1440 + round((float(lon) + 180) / 0.25)
        images = s3_images(root, place)
        dates += len(images)
        label = label_of(root, "lc100", place, "uint8")
        np.testing.assert_allclose(centre(root / "lc100" / f"{place}.tif"), (float(lon), float(lat)), atol=1e-9)
        assert set(np.unique(label)) <= set(LC100_CODES)
        assert [int(one) for one in present] == [int(np.mean(label == code) >= 0.02) for code in LC100_CODES]
        greenness = ndvi(images[static[place]][7], images[static[place]][16])
        for code in np.unique(label[1::3, 1::3]):
            pixels.setdefault(int(code), []).append(greenness[label[1::3, 1::3] == code])
    assert len(places) < dates < 4 * len(places)
    assert len(pixels) > 10
    green = {code: np.median(np.concatenate(found)) for code, found in pixels.items()}
    assert green[60] < green[40]
    assert green[80] < min(green[30], green[40], green[111])


def test_biomass_layout_and_labels(earth):
    root, planet = earth.bench / "biomass_s3", Planet(SEED)
    forest, open_land, explained = [], [], []
    for place, name in rows(root, "static_fnames-{}.csv", (4, 2, 2)):
        tile = re.fullmatch(r"([NS])(\d\d)([EW])(\d{3})_ESACCI-BIOMASS-L4-AGB-MERGED-100m-2020-fv4\.0_\d\d_\d\d", place)
        lon, lat = centre(root / "biomass" / f"{place}.tif")
        top = int(tile[2]) * (1 if tile[1] == "N" else -1)
        left = int(tile[4]) * (1 if tile[3] == "E" else -1)
        assert top - 10 <= lat <= top
        assert left <= lon < left + 10
        image = s3_images(root, place)[name]
        label = label_of(root, "biomass", place, "uint16").astype(float)
        assert label.max() < 900
        cover = planet.surface(Window(lon, lat, 96, 100.0)).cover
        forest.append(label[cover == Cover.FOREST])
        open_land.append(label[np.isin(cover, (Cover.ANNUAL_CROP, Cover.BARE))])
        assert (label[np.isin(cover, (Cover.SEA_LAKE, Cover.RIVER))] == 0).all()
        if label.std() > 20:
            bands = np.column_stack([image.reshape(21, -1).T, np.ones(32 * 32)])
            tonnes = label.reshape(32, 3, 32, 3).mean(axis=(1, 3)).ravel()
            rest = tonnes - bands @ np.linalg.lstsq(bands, tonnes, rcond=None)[0]
            explained.append(1 - rest.var() / tonnes.var())
    assert np.mean(np.concatenate(forest)) > 5 * np.mean(np.concatenate(open_land))
    assert 0.3 < np.median(explained) < 0.97  # by a pixel's bands alone, clouds and snow included
    assert biomass_name(140.5, -32.75) == "S30E140_ESACCI-BIOMASS-L4-AGB-MERGED-100m-2020-fv4.0_11_02"


def test_dfc2020_layout_and_labels(earth):
    root = earth.bench / "dfc2020_s1s2"
    found: dict[int, list[np.ndarray]] = {}
    for (name,) in rows(root, "dfc-{}-new.csv", (8, 4, 4)):
        assert re.fullmatch(r"ROIs0000_test_dfc_0_p\d+\.tif", name)
        paths = {folder: root / folder / name.replace("dfc", folder) for folder in ("s1", "s2", "dfc")}
        with pytest.warns(NotGeoreferencedWarning), rasterio.open(paths["s1"]) as tif:
            assert tif.transform == Affine.identity()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            assert kind(paths["s1"]) == (2, 64, 64, "float64", "EPSG:4326")
            assert kind(paths["s2"]) == (13, 64, 64, "uint16", "EPSG:4326")
            assert kind(paths["dfc"]) == (1, 64, 64, "int32", "EPSG:4326")
            s1, s2, (label,) = (read(path) for path in paths.values())
        for code in np.unique(label):
            greenness = ndvi(s2[3], s2[7])
            found.setdefault(int(code), []).append(np.stack([s1[0], greenness])[:, label == code])
    assert set(found) <= set(range(1, 11))
    assert {1, 2, 4, 6, 7, 9, 10} <= set(found)
    radar, green = ({c: np.median(np.concatenate(v, axis=1)[i]) for c, v in found.items()} for i in (0, 1))
    assert min(radar, key=radar.get) == 10
    assert max(radar, key=radar.get) in (1, 7)
    assert green[1] > green[9] > green[10]


def test_climate_zones_layout_and_labels(earth):
    root = earth.bench / "lcz_s1s2"
    images, zones = [], []
    for split, count in (("train", 17), ("val", 4), ("test", 4)):
        with h5py.File(root / f"lcz_{split}.h5") as file:
            assert {name: (data.shape, data.dtype.name) for name, data in file.items()} == {
                "sen1": ((count, 32, 32, 8), "float32"),
                "sen2": ((count, 32, 32, 10), "float32"),
                "label": ((count, 17), "uint8"),
            }
            label, sen1, sen2 = file["label"][:], file["sen1"][:], file["sen2"][:]
        assert (label.sum(axis=1) == 1).all()
        assert sen2.min() > 0
        assert np.median(sen2) < 0.5
        # The filtered intensity is near the mean of what the waves carry; VV is stronger.
        np.testing.assert_allclose((sen1[..., :2] ** 2).sum(-1).mean((1, 2)), sen1[..., 4].mean((1, 2)), rtol=0.2)
        assert (sen1[..., 5].mean((1, 2)) > sen1[..., 4].mean((1, 2))).mean() > 0.9
        images.append(sen2)
        zones.append(np.argmax(label, axis=1))
    by_zone = dict(zip(np.concatenate(zones)[:17], np.concatenate(images)[:17], strict=True))
    assert sorted(by_zone) == list(range(17))
    texture = {zone: image[..., 2].std() / image[..., 2].mean() for zone, image in by_zone.items()}
    assert texture[0] > texture[2]  # high-rise casts more shade than low-rise
    assert texture[3] > texture[5]
    green = {zone: ndvi(image[..., 2], image[..., 6]).mean() for zone, image in by_zone.items()}
    assert green[5] > green[2]  # open is greener than compact
    assert green[8] > green[5]  # and sparsely built than open
    assert min(green, key=green.get) == 16
    assert green[10] > green[14]


def test_ozone_layout_and_labels(earth):
    root = earth.bench / "airquality_s5p" / "o3"
    columns, labels = [], []
    for (place,) in rows(root, "{}.csv", (6, 3, 3)):
        assert re.fullmatch(r"EEA_1kmgrid_2021_o3_avg_\d\d_\d\d", place)
        annual = root / "s5p_annual" / place / "2021-01-01_2021-12-31.tif"
        assert len(list((root / "s5p_seasonal" / place).iterdir())) == 4
        assert kind(annual) == kind(root / "label_annual" / f"{place}.tif") == (1, 56, 56, "float32", "EPSG:3035")
        label = read(root / "label_annual" / f"{place}.tif")[0]
        label = np.where(np.abs(label) > 1e10, np.nan, label)
        columns.append(np.nanmean(read(annual)))
        labels.append(np.nanmean(label))
        assert 0.09 < columns[-1] < 0.25
    assert 2000 < np.mean(labels) < 8000  # the published mean is 4654
    assert -0.99 < np.corrcoef(columns, labels)[0, 1] < -0.4  # more above the pole, more at the ground in the south


def counts(values: np.ndarray) -> dict[int, int]:
    return dict(zip(*np.unique(values, return_counts=True), strict=True))


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("preset", ["default", "published"])
def test_the_benchmarks_readers_find_the_targets_that_were_drawn(earth, preset):
    for name in (n for n in (*BENCH_TASKS, *VARIANTS) if n.partition("-")[0] not in ELSEWHERE):
        task = get_task(name)
        folder = earth.bench / TASKS[name.partition("-")[0]].directory
        label_folder, codes, ignored = MAPS.get(name.partition("-")[0], ("", (), ()))
        side = 4 * task.sensor.patch_kernel if task.kind in ("classification", "multilabel") else None
        for split in ("train", "val", "test"):
            samples = task.open(folder, split, preset=preset, image_size=side)
            assert len(samples) == earth.samples[name.partition("-")[0]][split]
            for sample in (samples[i] for i in range(0, len(samples), 3 if side else 5)):
                assert torch.isfinite(sample["image"]).all()
                assert tuple(sample["image"].shape[-2:]) == (side or task.input_size,) * 2
                target, key = sample["target"].numpy(), sample["id"]
                if name.startswith("eurosat"):
                    there = {one.split("_")[0] for one in samples.ids} if preset == "published" else TASK_CLASSES
                    assert sorted(there)[target] == key.split("_")[0]
                elif name == "lcz_s2":
                    with h5py.File(folder / f"lcz_{split}.h5") as file:
                        assert file["label"][int(key.rpartition("_")[2])][target] == 1
                elif task.kind == "multilabel":
                    with open(folder / f"multilabel-{split}.csv", newline="") as file:
                        (row,) = (row for row in csv.reader(file) if key in ",".join(row[:2]))
                    assert target.tolist() == [int(one) for one in row[-len(target) :]]
                elif task.kind == "regression":
                    label = read(folder / label_folder / f"{key}.tif")[0].astype(float)
                    label[np.abs(label) > 1e10] = np.nan
                    values = target * task.target_std + task.target_mean
                    assert np.nanmean(values) == pytest.approx(np.nanmean(label), rel=0.02)
                    assert np.isnan(values).mean() == np.isnan(label).mean()
                else:
                    label = read(folder / label_folder / f"{key}.tif")[0]
                    label = np.where(np.isin(label, ignored), 255, label)
                    drawn = np.append(codes, 255)[np.where(target == 255, -1, target)]
                    assert set(np.unique(drawn)) == set(np.unique(label))
                    if preset == "default":  # each stored pixel becomes as many
                        factor = drawn.size // label.size
                        assert counts(drawn) == {code: factor * number for code, number in counts(label).items()}


def test_trees_are_named_by_what_the_sensors_see():
    """Evergreen needles in the cold, leaves that are shed where winters are mild, kept where there are none."""
    window = Window(10.0, 50.0, 48, 100.0)
    surface = Planet(SEED).surface(window)

    def most_common(temperature: float, season: float) -> int:
        full = np.full_like(surface.temperature, temperature)
        leaves = np.clip(0.5 + 0.2 * surface.broad + (0.35 if temperature < 6 else -0.15), 0, 1)
        changed = dataclasses.replace(surface, temperature=full, season=np.full_like(full, season), evergreen=leaves)
        return int(np.argmax(np.bincount(legends.tree_kinds(changed).ravel())))

    assert most_common(2, 12) == legends.NEEDLES_EVERGREEN
    assert most_common(11, 9) == legends.LEAVES_SHED
    assert most_common(25, 2) == legends.LEAVES_EVERGREEN


def test_preview_is_a_picture(earth):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = preview(earth.folder)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 1_000_000
    tasks = json.loads((earth.folder / "miniature.json").read_text())["tasks"]
    shown = task_rows(earth.bench, tasks, 10)
    assert {task for row in shown for names, _ in row for task in names.split(", ")} == set(tasks)
    assert max(len(row) for row in shown) <= 10
    for panel in (panel for row in shown for _, panel in row if panel.legend):
        assert set(np.unique(panel.image)) <= set(panel.legend)
