"""Reading draws from shards: values against an independent decoding, shapes, metadata and keyed randomness."""

import dataclasses
import datetime
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIDES, SIZES, make_grid

from copernicus.datasets.index import GridIndex, index_shards
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import write_shards
from copernicus.datasets.slices import DEM_DAYS, DrawReader

ALL = tuple(SENSORS.values())
LON, LAT, DAYS, AREA = range(4)


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def write_tar(path: Path, contents: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def index(shards) -> GridIndex:
    return index_shards(str(shards))


def test_the_index_finds_every_grid_in_shard_order(shards, index):
    assert [g.key for g in index] == [make_grid(i).key for i in range(24)]
    assert [Path(g.shard).name for g in index] == ["example-000000.tar"] * 12 + ["example-000001.tar"] * 12
    assert index.problems == ()
    lacking = [i for i, g in enumerate(index) if "s1_grd" not in g.sensors]
    assert lacking == [5, 11, 17, 23]
    assert all("s5p_co" not in index[i].sensors for i in lacking)


def test_the_index_keeps_only_grids_with_a_wanted_sensor(shards):
    assert len(index_shards(str(shards)).having(["s1_grd"])) == 20


def test_values_equal_an_independent_decode(shards, index):
    """Unaugmented, unresampled: the first date."""
    whole = {name: side for name, side in SIDES.items() if name not in ("s1_grd", "s2_toa")}  # 40: no whole tokens
    reader = DrawReader(tuple(SENSORS[name] for name in whole), whole, augment=False)
    raw = members(shards / "example-000000.tar")
    sample = reader.read(index[0], epoch=-1)
    assert sample.problems == []
    for sensor in reader.sensors:
        array = torch.load(io.BytesIO(raw[f"{sample.key}.{sensor.name}.pth"]), weights_only=True).double().numpy()
        image = array[None] if sensor.name == "dem" else array[0]
        np.testing.assert_array_equal(sample.images[sensor.name], image.astype(np.float32))


def test_of_patched_sensors_one_patch_is_read_the_same_for_radar_and_optical(tmp_path):
    grid = make_grid(3)
    for name in ("s1_grd", "s2_toa"):  # a constant that says which patch and date it is
        for p in range(2):
            for d in range(3):
                grid.arrays[name][p, d] = 100 * p + d
    write_shards([grid], tmp_path)
    (found,) = index_shards(str(tmp_path))
    reader = DrawReader(ALL, SIZES, seed=4)
    seen = set()
    for epoch in range(60):
        sample = reader.read(found, epoch)
        value = {}
        for name in ("s1_grd", "s2_toa"):
            x = sample.images[name]
            assert np.ptp(x) < 0.05
            value[name] = round(float(x.mean()))
        assert value["s1_grd"] // 100 == value["s2_toa"] // 100
        seen.add((value["s1_grd"] // 100, value["s1_grd"] % 100, value["s2_toa"] % 100))
    assert len({(p, d) for p, d, _ in seen}) == 6, "every patch and date comes up"
    assert any(a != b for _, a, b in seen), "dates are drawn for each sensor on its own"


def test_shapes_are_fixed_and_what_is_missing_is_masked(index):
    reader = DrawReader(ALL, SIZES)
    for number in (0, 5):
        sample = reader.read(index[number], epoch=0)
        for i, sensor in enumerate(ALL):
            side = SIZES[sensor.name]
            assert sample.images[sensor.name].shape == (sensor.channels, side, side)
            assert sample.images[sensor.name].dtype == np.float32
            assert sample.noise[sensor.name].shape == ((side // sensor.patch_kernel) ** 2,)
            absent = number == 5 and sensor.name in ("s1_grd", "s5p_co")
            assert sample.present[i] == (not absent)
            assert np.isnan(sample.metadata[i]).all() == absent
            assert (sample.images[sensor.name] == 0).all() == absent
        assert sample.problems == []


def test_a_batch_stacks_draws(index):
    reader = DrawReader(ALL, SIZES)
    draws = [reader.read(index[i], epoch=0) for i in (0, 5)]
    batch = reader.batch([(index[0], 0, 0), (index[5], 0, 0), None])
    assert batch["x_s2_toa"].shape == (3, 13, 32, 32)
    assert batch["noise_dem"].shape == (3, 4)
    assert batch["metadata"].shape == (3, 8, 4)
    assert batch["present"].sum(1).tolist() == [8, 6, 0]
    assert batch["key"].tolist() == [draws[0].key, draws[1].key, ""]
    assert batch["epoch"].tolist() == [0, 0, -1]
    for number, draw in enumerate(draws):
        for name in SENSORS:
            np.testing.assert_array_equal(batch[f"x_{name}"][number], draw.images[name])
            np.testing.assert_array_equal(batch[f"noise_{name}"][number], draw.noise[name])
        np.testing.assert_array_equal(batch["metadata"][number], draw.metadata)
    assert all((batch[f"x_{name}"][2] == 0).all() for name in SENSORS)
    assert [json.loads(p) for p in batch["problems"]] == [[], [], []]


def digest(sample) -> list:
    arrays = [*sample.images.values(), *sample.noise.values(), sample.present, sample.metadata]
    return [float(np.nan_to_num(a.astype(np.float64)).sum()) for a in arrays]


def test_a_draw_depends_on_seed_epoch_draw_and_grid_alone(index):
    reader = DrawReader(ALL, SIZES, seed=2, metadata_drop=0.3)
    forward = {i: digest(reader.read(index[i], 1, 0)) for i in range(4)}
    np.random.seed(0)
    torch.manual_seed(0)
    backward = {i: digest(reader.read(index[i], 1, 0)) for i in reversed(range(4))}
    assert forward == backward
    other = [
        digest(reader.read(index[0], 2, 0)),
        digest(reader.read(index[0], 1, 1)),
        digest(dataclasses.replace(reader, seed=3).read(index[0], 1, 0)),
    ]
    assert all(o != forward[0] for o in other)
    assert len({tuple(o) for o in other}) == 3


def test_another_process_draws_the_same(shards, index):
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[2])\n"
        "from test_slices import ALL, SIZES, DrawReader, SENSORS, digest, index_shards\n"
        "index = index_shards(sys.argv[1])\n"
        "print(json.dumps(digest(DrawReader(ALL, SIZES, seed=2).read(index[1], 3))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(shards), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert json.loads(done.stdout) == digest(DrawReader(ALL, SIZES, seed=2).read(index[1], 3))


def test_sensors_do_not_share_their_randomness(index):
    """Adding a sensor to a run leaves the others' draws as they were."""
    few = DrawReader((SENSORS["dem"], SENSORS["s2_toa"]), SIZES).read(index[0], 0)
    everything = DrawReader(ALL, SIZES).read(index[0], 0)
    for name in ("dem", "s2_toa"):
        np.testing.assert_array_equal(few.images[name], everything.images[name])
        np.testing.assert_array_equal(few.noise[name], everything.noise[name])
    assert not np.array_equal(everything.noise["s5p_co"], everything.noise["s5p_no2"])


def test_metadata_follow_the_json(shards, index):
    """Centre crops leave centres where the names put them; days count from 1970; areas cover the ground."""
    reader = DrawReader(ALL, SIZES, augment=False)
    names = json.loads(members(shards / "example-000000.tar")[f"{index[2].key}.json"])
    sample = reader.read(index[2], epoch=-1)
    for i, sensor in enumerate(ALL):
        row = sample.metadata[i]
        assert (row[LON], row[LAT]) == pytest.approx((-9.5, 40.0), abs=1e-4)
        ground_m = SIDES[sensor.name] * sensor.gsd_m
        tokens = (SIZES[sensor.name] / sensor.patch_kernel) ** 2
        assert row[AREA] == pytest.approx(ground_m**2 / tokens / 1e6, rel=1e-5)
        if sensor.name == "dem":
            continue
        first = names[sensor.name][0]
        text = first
        while isinstance(text, list):
            text = text[0]
        date = datetime.datetime.strptime(text.rsplit("/", 1)[1], "%Y%m%d").date()
        assert row[DAYS] == (date - datetime.date(1970, 1, 1)).days
    assert sample.metadata[list(SENSORS).index("dem"), DAYS] == DEM_DAYS
    assert (datetime.date(2015, 1, 1) - datetime.date(1970, 1, 1)).days == DEM_DAYS


def test_names_count_from_the_patch_where_it_has_one(tmp_path):
    grid = make_grid(0)
    for p in range(2):
        for d in range(3):
            grid.images["s2_toa"][p][d] = [
                f"0748119_-10.00_40.00/{p}_{-10 + p / 10:.4f}_{40 - p / 10:.4f}/2020010{d + 1}"
            ]
    write_shards([grid], tmp_path)
    (found,) = index_shards(str(tmp_path))
    reader = DrawReader((SENSORS["s2_toa"],), SIZES)
    rows = np.array([reader.read(found, epoch).metadata[0] for epoch in range(40)])
    # 40 pixels of 10 m: no crop moves the centre by more than 0.002 degrees.
    patch = np.round((rows[:, LON] + 10) * 10)
    assert set(patch) == {0, 1}
    np.testing.assert_allclose(rows[:, LON], -10 + patch / 10, atol=0.003)
    np.testing.assert_allclose(rows[:, LAT], 40 - patch / 10, atol=0.003)
    assert set(rows[:, DAYS]) == {18262.0, 18263.0, 18264.0}  # 2020-01-01 is day 18262


def test_names_that_do_not_cover_an_image_leave_its_place_to_the_grid_and_its_date_unknown(tmp_path, shards):
    contents = {n: d for n, d in members(shards / "example-000000.tar").items() if n.startswith(make_grid(1).key)}
    names = json.loads(contents[f"{make_grid(1).key}.json"])
    names["s3_olci"] = names["s3_olci"][:1]  # the array has three dates
    del names["s5p_o3"]
    write_tar(tmp_path / "short.tar", contents | {f"{make_grid(1).key}.json": json.dumps(names).encode()})
    (found,) = index_shards(str(tmp_path))
    reader = DrawReader((SENSORS["s3_olci"], SENSORS["s5p_o3"]), SIZES)
    rows = np.array([reader.read(found, epoch).metadata for epoch in range(30)])
    assert set(rows[:, 0, DAYS][~np.isnan(rows[:, 0, DAYS])]) == {18276.0}  # 2020-01-15, the only date it names
    assert 0.4 < np.isnan(rows[:, 0, DAYS]).mean() < 0.95  # two dates of three have no name
    assert np.isnan(rows[:, 1, DAYS]).all()
    assert np.abs(rows[:, :, LON] - -9.75).max() < 0.3
    assert np.abs(rows[:, :, LAT] - 40).max() < 0.3


def test_metadata_are_dropped_in_groups_with_the_probability_asked(index):
    reader = DrawReader((SENSORS["s5p_no2"], SENSORS["dem"]), SIZES, metadata_drop=0.25)
    rows = np.array([reader.read(index[0], epoch).metadata for epoch in range(300)])
    unknown = np.isnan(rows)
    np.testing.assert_array_equal(unknown[..., LON], unknown[..., LAT])
    for column in (LON, DAYS, AREA):  # binomial(600, 0.25): deviation 0.018
        assert 0.18 < unknown[..., column].mean() < 0.32
    together = (unknown[..., LON] & unknown[..., DAYS]).mean()
    assert together < 0.12  # independent: 0.06
    validation = dataclasses.replace(reader, augment=False).read(index[0], -1)
    assert not np.isnan(validation.metadata).any()


def test_masking_noise_is_uniform(index):
    reader = DrawReader((SENSORS["s5p_no2"],), SIZES)
    noise = np.concatenate([reader.read(index[0], epoch).noise["s5p_no2"] for epoch in range(200)])
    assert noise.min() >= 0
    assert noise.max() < 1
    assert np.histogram(noise, 4, (0, 1))[0].min() > 150  # of 800, expected 200, deviation 12


def test_held_out_grids_stay_held_out_when_shards_are_added(shards, index):
    part = index_shards(str(shards / "example-000000.tar"))
    small, large = ([{g.key for g in side} for side in i.split(0.3, seed=1)] for i in (part, index))
    assert small[0] <= large[0]
    assert small[1] <= large[1]
    assert large[0] | large[1] == {g.key for g in index}
    assert not large[0] & large[1]
    assert 2 <= len(large[1]) <= 14
    assert {g.key for g in index.split(0.3, seed=2)[1]} != large[1]
    assert len(index.split(0.0, seed=1)[1]) == 0
    assert len(index.split(1e-9, seed=1)[1]) == 1


def test_the_fingerprint_says_whether_the_data_are_the_same(shards, index, tmp_path):
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for name in ("example-000000.tar", "example-000001.tar"):
        (copied / name).write_bytes((shards / name).read_bytes())
    assert index_shards(str(copied)).fingerprint == index.fingerprint
    (copied / "example-000001.tar").unlink()
    assert index_shards(str(copied)).fingerprint != index.fingerprint


def test_a_size_that_tokens_do_not_fill_is_refused():
    with pytest.raises(InputError, match=r"33.*s2_toa.*16"):
        DrawReader((SENSORS["s2_toa"],), {"s2_toa": 33})
