"""The miniature planet and what is written of it, read back with plain tools."""

import csv
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.warp import transform

from copernicus.datasets.miniature import preview, write_miniature
from copernicus.datasets.miniature import write as write_module
from copernicus.datasets.miniature.noise import hash_unit, plane_noise, sphere_noise
from copernicus.datasets.miniature.planet import Cover, Planet, Window
from copernicus.datasets.miniature.pretrain import PretrainScale
from copernicus.datasets.miniature.tasks import TaskScale
from copernicus.datasets.sensors import OLCI_SCALE, SENSORS, InputError

SEED, GRIDS = 3, 24


@pytest.fixture(scope="module")
def earth(tmp_path_factory):
    steps = []
    out = tmp_path_factory.mktemp("earth") / "new"
    tasks = ["eurosat_s2", "cloud_s3", "flood_s1", "aq_no2_s5p"]  # the others: test_miniature_tasks.py
    summary = write_miniature(out, GRIDS, SEED, "tiny", progress=lambda *step: steps.append(step), tasks=tasks)
    return summary, steps


@pytest.fixture(scope="module")
def grids(earth):
    """key -> member name without the key -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    for shard in earth[0].shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


def arrays_of(grid: dict[str, bytes]) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(".pth"): torch.load(io.BytesIO(payload), weights_only=True).numpy()
        for name, payload in grid.items()
        if name.endswith(".pth")
    }


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as tif:
        return tif.read()


def centre(path: Path) -> tuple[float, float]:
    with rasterio.open(path) as tif:
        west, south, east, north = tif.bounds
        (lon,), (lat,) = transform(tif.crs, "EPSG:4326", [(west + east) / 2], [(south + north) / 2])
    return lon, lat


# ---------------------------------------------------------------- noise and planet


def test_noise_has_unit_variance_and_is_smooth():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    sphere = sphere_noise(11, points, 300, 3)
    assert abs(sphere.mean()) < 0.05
    assert abs(sphere.std() - 1) < 0.05
    east = np.arange(600) * 10.0
    plane = plane_noise(11, east, -east, 300, 1)
    assert abs(plane.std() - 1) < 0.1
    assert np.abs(np.diff(plane, axis=1)).max() < 0.5  # 10 m of a 300 m lattice


def test_hash_is_even_and_differs_by_key_and_coordinate():
    cells = np.arange(-5000, 5000)
    values = hash_unit(1, cells)
    assert values.min() >= 0
    assert values.max() < 1
    np.testing.assert_allclose(np.histogram(values, 10, (0, 1))[0], 1000, atol=120)
    assert np.mean(values == hash_unit(2, cells)) == 0
    assert abs(np.corrcoef(values, hash_unit(1, cells + 1))[0, 1]) < 0.04


def test_every_window_shows_the_same_planet():
    planet = Planet(SEED)
    wide, narrow = Window(12.31, 47.02, 90, 10.0), Window(12.31, 47.02, 30, 30.0)
    fine, coarse = planet.surface(wide), planet.surface(narrow)
    # The middle pixel of each 3 x 3 block has its centre where the coarse pixel's is.
    np.testing.assert_allclose(wide.lons[1::3], narrow.lons, atol=1e-9)
    assert np.mean(fine.cover[1::3, 1::3] == coarse.cover) > 0.999
    np.testing.assert_allclose(fine.elevation[1::3, 1::3], coarse.elevation, atol=0.5)
    single = planet.surface(Window(float(wide.lons[40]), float(wide.lats[17]), 1, 10.0))
    assert single.cover[0, 0] == fine.cover[17, 40]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planets_have_land_sea_climate_and_a_europe(seed):
    planet = Planet(seed)
    rng = np.random.default_rng(0)
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, 6000)))
    lon = rng.uniform(-180, 180, 6000)
    wide = planet.wide(lon, lat)
    land = wide.elevation > 0
    assert 0.15 < land.mean() < 0.7
    assert wide.temperature[np.abs(lat) < 20].mean() > wide.temperature[np.abs(lat) > 60].mean() + 15
    for field, least in ((wide.urban > 1.15, 0.01), (wide.farm > 0.25, 0.05), (wide.wood > 0.35, 0.03)):
        assert (field & land).mean() > least
    europe = planet.wide(*np.meshgrid(np.linspace(-5, 25, 30), np.linspace(42, 60, 30)))
    assert (europe.elevation > 0).mean() > 0.3


# ---------------------------------------------------------------- pretraining shards


def test_grids_have_the_published_names_axes_and_types(earth, grids):
    summary, _ = earth
    assert [path.name for path in summary.shards] == ["example-000000.tar"]
    assert len(grids) == summary.grids == GRIDS
    axes = {
        "s1_grd": (1, 2, 2, 64, 64),
        "s2_toa": (1, 2, 13, 64, 64),
        "s3_olci": (2, 21, 32, 32),
        "dem": (192, 192),
    } | dict.fromkeys(("s5p_co", "s5p_no2", "s5p_o3", "s5p_so2"), (4, 1, 28, 28))
    leading = {s: (shape[0], 1) for s, shape in axes.items()} | {
        "s1_grd": (1, 2, 1),
        "s2_toa": (1, 2, 1),
        "dem": (1, 1),
    }
    incomplete = 0
    for key, grid in grids.items():
        arrays, names = arrays_of(grid), json.loads(grid["json"])
        assert set(arrays) == set(names)
        incomplete += len(arrays) < 8
        for sensor, array in arrays.items():
            assert array.shape == axes[sensor]
            assert array.dtype == (np.int16 if sensor == "s2_toa" else np.float32)
            leaves = np.array(names[sensor])  # every string in a list of its own
            assert leaves.shape == leading[sensor]
            for leaf in leaves.ravel():
                grid_id, lon, lat = leaf.split("/")[0].split("_")
                assert grid_id == key
                assert int(key) == round((float(lat) + 90) / 0.25) * 1440 + round((float(lon) + 180) / 0.25)
                if sensor in ("s1_grd", "s2_toa"):
                    _, patch_lon, patch_lat = leaf.split("/")[1].split("_")
                    assert abs(float(patch_lon) - float(lon)) < 0.125
                    assert abs(float(patch_lat) - float(lat)) < 0.125
                assert re.search(r"/2021[01]\d[0-3]\d$", leaf) or sensor == "dem"
    assert 0 < incomplete < GRIDS / 2


def test_values_are_in_the_range_that_the_sensors_statistics_expect(grids):
    collected: dict[str, list[np.ndarray]] = {}
    for grid in grids.values():
        for sensor, array in arrays_of(grid).items():
            collected.setdefault(sensor, []).append(array)
    for sensor in ("s1_grd", "s2_toa"):
        z = SENSORS[sensor].normalize(np.concatenate(collected[sensor]))
        assert np.abs(z.mean(axis=(0, 1, 3, 4))).max() < 2
        assert z.std(axis=(0, 1, 3, 4)).min() > 0.15
        assert z.std(axis=(0, 1, 3, 4)).max() < 3
    radiance = np.concatenate(collected["s3_olci"]) * np.array(OLCI_SCALE)[:, None, None]
    assert np.nanmin(radiance) > 0
    assert np.nanmax(radiance) < 10
    assert 0 < np.isnan(radiance).mean() < 0.3
    for gas, low, high in (("co", 0.01, 0.08), ("no2", 0, 2e-3), ("o3", 0.09, 0.25), ("so2", -1e-3, 5e-3)):
        column = np.concatenate(collected[f"s5p_{gas}"])
        assert low < np.nanmin(column)
        assert np.nanmax(column) < high
        assert 0 < np.isnan(column).mean() < 0.5
    dem = np.stack(collected["dem"])
    assert dem.min() >= 0
    assert 200 < dem.max() < 9000


def test_cities_are_bright_in_radar_water_is_dark():
    from copernicus.datasets.miniature.places import find_place
    from copernicus.datasets.miniature.radar import s1_grd

    planet, levels = Planet(SEED), {}
    for cover in (Cover.RESIDENTIAL, Cover.SEA_LAKE, Cover.FOREST):
        lon, lat = find_place(planet, np.random.default_rng(1), cover, 64, 0.5)
        surface = planet.surface(Window(lon, lat, 64, 10.0))
        levels[cover] = np.median(s1_grd(SEED, surface, 18800, 0)[:, surface.cover == cover], axis=1)
    assert (levels[Cover.RESIDENTIAL] > levels[Cover.SEA_LAKE] + 6).all()
    assert (levels[Cover.FOREST] > levels[Cover.SEA_LAKE] + 4).all()


# ---------------------------------------------------------------- determinism and the folder


def tree_hash(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def micro(monkeypatch):
    """The smallest miniature: five grids in three shards, two samples a task."""
    pretrain = PretrainScale(1, 1, 1, 1, 16, 8, 4, 64, 2)
    splits = (("train", 1), ("test", 1))
    tasks = {name: TaskScale(16, splits) for name in write_module.SCALES["tiny"].tasks}
    monkeypatch.setitem(write_module.SCALES, "tiny", write_module.Scale(pretrain, tasks))


@pytest.mark.usefixtures("micro")
def test_same_seed_same_bytes_on_any_number_of_workers(tmp_path):
    some = ["eurosat_s2", "lcz_s2"]
    write_miniature(tmp_path / "one", 5, 5, "tiny")
    write_miniature(tmp_path / "two", 5, 5, "tiny", workers=2)
    write_miniature(tmp_path / "other", 5, 6, "tiny", tasks=some)
    one, two, other = (tree_hash(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    counts = Counter(path.split("/")[1] for path in one if path.startswith("bench/"))
    # One to four dates a place.
    assert 2 * (1 + 1) + 2 * 2 <= counts.pop("lc100_s3") <= 2 * (1 + 4) + 2 * 2
    assert 2 * (1 + 1) + 2 <= counts.pop("biomass_s3") <= 2 * (1 + 4) + 2
    assert counts == {
        "cloud_s2": 2 * 2 + 2,
        "cloud_s3": 2 * 3 + 2,
        "eurosat_s1": 2 + 2,
        "eurosat_s2": 2 + 2,
        "bigearthnet_s1s2": 2 * 2 + 2,
        "dfc2020_s1s2": 2 * 3 + 2,
        "flood_s1": 2 * 8 + 2,
        "lcz_s1s2": 2,
        "airquality_s5p": 2 * (2 * 6 + 2),
    }
    assert one["pretrain/example-000001.tar"] != other["pretrain/example-000001.tar"]
    assert all(one[name] != other[name] for name in one if name in other and name.endswith((".tif", ".h5")))
    assert "bench/lcz_s1s2/lcz_train.h5" in other
    assert {path.split("/")[1] for path in other if path.startswith("bench/")} == {"eurosat_s2", "lcz_s1s2"}


@pytest.mark.usefixtures("micro")
def test_tasks_are_added_to_a_miniature_that_is_there(tmp_path):
    def manifest() -> dict:
        return json.loads((tmp_path / "earth" / "miniature.json").read_text())

    write_miniature(tmp_path / "earth", 2, 0, "tiny", tasks=[])
    assert manifest()["pretrain"]
    assert manifest()["tasks"] == []
    assert not (tmp_path / "earth" / "bench").exists()
    write_miniature(tmp_path / "earth", 2, 0, "tiny", tasks=["aq_no2_s5p"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.t*") if path.is_file()}
    asked = write_miniature(tmp_path / "earth", 2, 0, "tiny", tasks=["dfc2020_s2", "cloud_s2"])
    assert list(asked.samples) == ["cloud_s2", "dfc2020_s2"]
    assert manifest()["tasks"] == ["cloud_s2", "dfc2020_s1", "dfc2020_s2", "aq_no2_s5p"], (
        "a folder's tasks come together"
    )
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    # In whatever order they come, the files are the same.
    write_miniature(tmp_path / "again", 2, 0, "tiny", tasks=["dfc2020_s1", "cloud_s2", "aq_no2_s5p"])
    assert tree_hash(tmp_path / "again") == tree_hash(tmp_path / "earth")
    # Of an interrupted task nothing is taken for done; of what was done nothing is written again.
    (tmp_path / "earth" / "miniature.json").write_text(json.dumps(manifest() | {"tasks": ["aq_no2_s5p"]}))
    lost = next((tmp_path / "earth" / "bench" / "cloud_s2" / "cloud").iterdir())
    lost.unlink()
    write_miniature(tmp_path / "earth", 2, 0, "tiny", tasks=["cloud_s2"])
    assert lost.exists()
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())
    assert manifest()["tasks"] == ["cloud_s2", "aq_no2_s5p"]


@pytest.mark.usefixtures("micro")
def test_a_miniature_is_written_once_and_never_over_something_else(tmp_path):
    out, tasks = tmp_path / "earth", ["cloud_s3"]
    first = write_miniature(out, 2, 0, "tiny", tasks=tasks)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_miniature(out, 2, 0, "tiny", tasks=tasks) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(InputError, match="another miniature"):
        write_miniature(out, 3, 0, "tiny", tasks=tasks)
    # Interrupted shards are written again.
    manifest = json.loads((out / "miniature.json").read_text())
    (out / "miniature.json").write_text(json.dumps(manifest | {"pretrain": False}))
    first.shards[0].unlink()
    write_miniature(out, 2, 0, "tiny", tasks=tasks)
    assert first.shards[0].exists()


def test_wrong_arguments(tmp_path):
    (tmp_path / "something").write_text("else")
    for arguments, message in [
        ((tmp_path, 2, 0), "not empty"),
        ((tmp_path / "something", 2, 0), "is a file"),
        ((tmp_path / "new", 0, 0), "grids=0"),
        ((tmp_path / "new", 2, -1), "seed=-1"),
        ((tmp_path / "new", 2, 0, "huge"), "no scale 'huge'"),
        ((tmp_path / "new", 2, 0, "tiny", 1, None, ["cloud_s1"]), "no task 'cloud_s1'; the tasks are cloud_s2, "),
    ]:
        with pytest.raises(InputError, match=message):
            write_miniature(*arguments)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="no complete miniature"):
        preview(tmp_path)


def test_progress_counts_up_to_the_totals(earth):
    _, steps = earth
    last = {what: (done, total) for what, done, total in steps}
    assert last == {
        "pretrain": (24, 24),
        "cloud_s3": (24, 24),
        "eurosat_s2": (80, 80),
        "flood_s1": (24, 24),
        "aq_no2_s5p": (24, 24),
    }
    assert earth[0].samples["eurosat_s2"] == {"train": 40, "val": 20, "test": 20}


# ---------------------------------------------------------------- benchmark tasks


def test_eurosat_layout_and_labels(earth):
    root = earth[0].bench / "eurosat_s2"
    planet = Planet(SEED)
    classes = {
        "AnnualCrop": Cover.ANNUAL_CROP, "Forest": Cover.FOREST, "HerbaceousVegetation": Cover.HERBACEOUS,
        "Highway": Cover.HIGHWAY, "Industrial": Cover.INDUSTRIAL, "Pasture": Cover.PASTURE,
        "PermanentCrop": Cover.PERMANENT_CROP, "Residential": Cover.RESIDENTIAL, "River": Cover.RIVER,
        "SeaLake": Cover.SEA_LAKE,
    }  # fmt: skip
    seen: set[str] = set()
    means: dict[str, list[np.ndarray]] = {}
    for split, count in (("train", 40), ("val", 20), ("test", 20)):
        lines = (root / f"eurosat-{split}.txt").read_text().splitlines()
        assert len(lines) == count
        assert not seen & set(lines)
        seen |= set(lines)
        for line in lines:
            label = line.split("_")[0]
            path = root / "all_imgs" / label / line.replace(".jpg", ".tif")
            with rasterio.open(path) as tif:
                assert (tif.count, tif.height, tif.width, tif.dtypes[0]) == (13, 64, 64, "uint16")
                assert re.fullmatch(r"EPSG:32[67]\d\d", str(tif.crs))
                assert tif.res == (10, 10)
            lon, lat = centre(path)
            assert planet.surface(Window(lon, lat, 1, 10.0)).cover[0, 0] == classes[label]
            means.setdefault(label, []).append(read(path).mean(axis=(1, 2)))
    band = {label: np.median(values, axis=0) for label, values in means.items()}
    # File order B01..B08, B09, B10, B11, B12, B8A: cirrus (B10) is dark, B8A is as bright as B08.
    for label in ("Forest", "Pasture", "AnnualCrop"):
        assert band[label][9] < 0.1 * band[label][7]
        assert 0.8 < band[label][12] / band[label][7] < 1.25
    assert band["SeaLake"][7] < 0.5 * min(band["Forest"][7], band["Pasture"][7], band["Residential"][7])
    assert band["Industrial"][3] > band["Forest"][3]


def test_band_means_alone_neither_fail_nor_solve_eurosat(earth):
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    paths = sorted((earth[0].bench / "eurosat_s2" / "all_imgs").rglob("*.tif"))
    labels = [path.parent.name for path in paths]
    means = np.stack([read(path).mean(axis=(1, 2)) for path in paths])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    accuracy = cross_val_score(probe, means, labels, cv=4).mean()
    assert 0.25 < accuracy < 0.95  # 80 patches; chance is 0.10


def test_cloud_layout_and_labels(earth):
    root = earth[0].bench / "cloud_s3"
    names = [line for split in ("train", "val", "test") for (line,) in csv.reader((root / f"{split}.csv").open())]
    assert len(set(names)) == 24
    brightness: dict[int, list[np.ndarray]] = {}
    for name in names:
        assert re.match(r"S3[AB]_OL_1_EFR____(?P<date>\d{8}T\d{6}).*\.tif$", name)
        image, multi, binary = (read(root / folder / name) for folder in ("s3_olci", "cloud_multi", "cloud_binary"))
        assert image.shape == (21, 64, 64)
        assert image.dtype == np.float32
        assert multi.dtype == binary.dtype == np.uint8
        np.testing.assert_array_equal(binary, np.array([0, 1, 2, 2, 1, 1])[multi])
        np.testing.assert_array_equal(np.isnan(image).any(axis=0), multi[0] == 0)
        with rasterio.open(root / "s3_olci" / name) as tif:
            assert tif.crs == "EPSG:4326"
            assert -66.5 < tif.xy(32, 32)[1] < 66.5
        for code in np.unique(multi):
            brightness.setdefault(int(code), []).append(image[16][multi[0] == code])
    assert set(brightness) == {0, 1, 2, 3, 4, 5}
    clear, sure, vague, shadow = (np.median(np.concatenate(brightness[code])) for code in (1, 2, 3, 4))
    assert sure > vague > clear > shadow


def test_flood_layout_and_labels(earth):
    root = earth[0].bench / "flood_s1"
    change: dict[int, list[np.ndarray]] = {0: [], 1: [], 2: []}
    outside = 0
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        entries = json.loads((root / f"grid_dict_{split}.json").read_text())
        assert len(entries) == count
        for digest, entry in entries.items():
            assert re.fullmatch(r"[0-9a-f]{32}", digest)
            assert re.fullmatch(rf"\d{{7}}/\d\d/{digest}", entry["path"])
            files = {path.name[:7]: path for path in (root / "data" / entry["path"]).iterdir()}
            assert set(files) == {
                "MK0_MLU", "MK0_MNA", "MS1_IVV", "MS1_IVH", "SL1_IVV", "SL1_IVH", "SL2_IVV", "SL2_IVH",
            }  # fmt: skip
            dates = {kind: re.fullmatch(r".{18}_(?P<date>\d{8})\.tif", p.name)["date"] for kind, p in files.items()}
            assert dates["SL2_IVV"] < dates["SL1_IVV"] < dates["MS1_IVV"] == dates["MK0_MLU"]
            rasters = {kind: read(path)[0] for kind, path in files.items()}
            label = rasters["MK0_MLU"]
            assert label.dtype == np.uint8
            assert rasters["MS1_IVV"].dtype == np.float32
            np.testing.assert_array_equal(rasters["MK0_MNA"] == 0, label == 3)
            outside += (label == 3).any()
            with rasterio.open(files["MK0_MLU"]) as tif:
                assert tif.crs == "EPSG:3857"
            for code, values in change.items():
                if (label == code).any():
                    after, before = (np.mean(rasters[kind][label == code]) for kind in ("MS1_IVV", "SL1_IVV"))
                    values.append(after / before)
    dry, permanent, flooded = (np.median(values) for values in (change[0], change[1], change[2]))
    assert flooded < 0.5
    assert 0.5 < permanent < 2
    assert 0.6 < dry < 1.6
    assert 0 < outside < 24
    assert 12 <= len(change[2]) < 24  # some places stay dry


def test_air_quality_layout_and_labels(earth):
    root = earth[0].bench / "airquality_s5p" / "no2"
    places = [line for split in ("train", "val", "test") for (line,) in csv.reader((root / f"{split}.csv").open())]
    assert len(set(places)) == 24
    columns, labels, within = [], [], []
    for place in places:
        assert re.fullmatch(r"EEA_1kmgrid_2021_no2_avg_\d\d_\d\d", place)
        annual = root / "s5p_annual" / place / "2021-01-01_2021-12-31.tif"
        seasons = sorted((root / "s5p_seasonal" / place).iterdir())
        assert [path.stem for path in seasons] == [
            "2021-01-01_2021-04-01", "2021-04-01_2021-07-01", "2021-07-01_2021-10-01", "2021-10-01_2021-12-31",
        ]  # fmt: skip
        with rasterio.open(annual) as tif:
            assert (tif.crs, tif.res, tif.shape) == ("EPSG:3035", (1113.2, 1113.2), (56, 56))
        column, label = read(annual)[0], read(root / "label_annual" / f"{place}.tif")[0]
        assert column.dtype == label.dtype == np.float32
        label = np.where(np.abs(label) > 1e10, np.nan, label)
        known = np.isfinite(label) & np.isfinite(column)
        columns.append(column[known])
        labels.append(label[known])
        within.append(np.corrcoef(columns[-1], labels[-1])[0, 1])
    correlation = np.corrcoef(np.concatenate(columns), np.concatenate(labels))[0, 1]
    assert 0.5 < correlation < 0.97  # the column tells much of the ground, not all
    assert np.median(within) < 0.97
    assert 2 < np.mean(np.concatenate(labels)) < 15  # the published mean is 5.3 micrograms m-3
