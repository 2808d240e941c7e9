"""Reading draws from shards: against values decoded independently, and against data that is wrong or hostile."""

import dataclasses
import datetime
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIDES, SIZES, make_grid

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import write_shards
from copernicus.datasets.slices import DEM_DAYS, DrawReader, GridIndex, collate, index_shards

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


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def index(shards) -> GridIndex:
    return index_shards(str(shards), list(SENSORS))


def test_the_index_finds_every_grid_in_shard_order(shards, index):
    assert [g.key for g in index.grids] == [make_grid(i).key for i in range(24)]
    assert [Path(g.shard).name for g in index.grids] == ["example-000000.tar"] * 12 + ["example-000001.tar"] * 12
    assert index.problems == ()
    lacking = [i for i, g in enumerate(index.grids) if "s1_grd" not in g.members]
    assert lacking == [5, 11, 17, 23]
    assert all("s5p_co" not in index.grids[i].members for i in lacking)


def test_the_index_keeps_only_grids_with_a_wanted_sensor(shards):
    assert len(index_shards(str(shards), ["s1_grd"]).grids) == 20
    with pytest.raises(InputError, match="s7_none"):
        index_shards(str(shards), ["s7_none"])


def test_values_equal_an_independent_decode_and_normalisation(shards, index):
    """Unaugmented, unresampled: (x * scale - mean) / std of the first date."""
    whole = {name: side for name, side in SIDES.items() if name not in ("s1_grd", "s2_toa")}  # 40: no whole tokens
    reader = DrawReader(tuple(SENSORS[name] for name in whole), whole, augment=False)
    raw = members(shards / "example-000000.tar")
    sample = reader.read(index.grids[0], epoch=-1)
    assert sample.problems == []
    for sensor in reader.sensors:
        array = torch.load(io.BytesIO(raw[f"{sample.key}.{sensor.name}.pth"]), weights_only=True).double().numpy()
        image = array[None] if sensor.name == "dem" else array[0]
        scale, mean, std = (np.reshape(v, (-1, 1, 1)) for v in (sensor.scale, sensor.mean, sensor.std))
        np.testing.assert_allclose(sample.images[sensor.name], (image * scale - mean) / std, rtol=1e-4, atol=1e-5)


def test_of_patched_sensors_one_patch_is_read_the_same_for_radar_and_optical(tmp_path):
    grid = make_grid(3)
    for name in ("s1_grd", "s2_toa"):  # a constant that says which patch and date it is
        for p in range(2):
            for d in range(3):
                grid.arrays[name][p, d] = 100 * p + d
    write_shards([grid], tmp_path)
    (found,) = index_shards(str(tmp_path), list(SENSORS)).grids
    reader = DrawReader(ALL, SIZES, seed=4)
    seen = set()
    for epoch in range(60):
        sample = reader.read(found, epoch)
        value = {}
        for name in ("s1_grd", "s2_toa"):
            sensor = SENSORS[name]
            x = sample.images[name] * np.reshape(sensor.std, (-1, 1, 1)) + np.reshape(sensor.mean, (-1, 1, 1))
            assert np.ptp(x) < 0.05
            value[name] = round(float(x.mean()))
        assert value["s1_grd"] // 100 == value["s2_toa"] // 100
        seen.add((value["s1_grd"] // 100, value["s1_grd"] % 100, value["s2_toa"] % 100))
    assert len({(p, d) for p, d, _ in seen}) == 6, "every patch and date comes up"
    assert any(a != b for _, a, b in seen), "dates are drawn for each sensor on its own"


def test_shapes_are_fixed_and_what_is_missing_is_masked(index):
    reader = DrawReader(ALL, SIZES)
    for number in (0, 5):
        sample = reader.read(index.grids[number], epoch=0)
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
    draws = [reader.read(index.grids[i], epoch=0) for i in (0, 5)] + [reader.empty()]
    batch = collate(draws, ALL)
    assert batch["x_s2_toa"].shape == (3, 13, 32, 32)
    assert batch["noise_dem"].shape == (3, 4)
    assert batch["metadata"].shape == (3, 8, 4)
    assert batch["present"].sum(1).tolist() == [8, 6, 0]
    assert batch["key"].tolist() == [draws[0].key, draws[1].key, ""]
    np.testing.assert_array_equal(batch["x_dem"][1], draws[1].images["dem"])
    assert [json.loads(p) for p in batch["problems"]] == [[], [], []]


def digest(sample) -> list:
    arrays = [*sample.images.values(), *sample.noise.values(), sample.present, sample.metadata]
    return [float(np.nan_to_num(a.astype(np.float64)).sum()) for a in arrays]


def test_a_draw_depends_on_seed_epoch_draw_and_grid_alone(index):
    reader = DrawReader(ALL, SIZES, seed=2, metadata_drop=0.3)
    forward = {i: digest(reader.read(index.grids[i], 1, 0)) for i in range(4)}
    np.random.seed(0)
    torch.manual_seed(0)
    backward = {i: digest(reader.read(index.grids[i], 1, 0)) for i in reversed(range(4))}
    assert forward == backward
    other = [
        digest(reader.read(index.grids[0], 2, 0)),
        digest(reader.read(index.grids[0], 1, 1)),
        digest(dataclasses.replace(reader, seed=3).read(index.grids[0], 1, 0)),
    ]
    assert all(o != forward[0] for o in other)
    assert len({tuple(o) for o in other}) == 3


def test_another_process_draws_the_same(shards, index):
    script = (
        "import sys, json; sys.path.insert(0, sys.argv[2])\n"
        "from test_slices import ALL, SIZES, DrawReader, SENSORS, digest, index_shards\n"
        "index = index_shards(sys.argv[1], list(SENSORS))\n"
        "print(json.dumps(digest(DrawReader(ALL, SIZES, seed=2).read(index.grids[1], 3))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(shards), str(Path(__file__).parent)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert json.loads(done.stdout) == digest(DrawReader(ALL, SIZES, seed=2).read(index.grids[1], 3))


def test_sensors_do_not_share_their_randomness(index):
    """Adding a sensor to a run leaves the others' draws as they were."""
    few = DrawReader((SENSORS["dem"], SENSORS["s2_toa"]), SIZES).read(index.grids[0], 0)
    everything = DrawReader(ALL, SIZES).read(index.grids[0], 0)
    for name in ("dem", "s2_toa"):
        np.testing.assert_array_equal(few.images[name], everything.images[name])
        np.testing.assert_array_equal(few.noise[name], everything.noise[name])
    assert not np.array_equal(everything.noise["s5p_co"], everything.noise["s5p_no2"])


def test_metadata_follow_the_json(shards, index):
    """Centre crops leave centres where the names put them; days count from 1970; areas cover the ground."""
    reader = DrawReader(ALL, SIZES, augment=False)
    names = json.loads(members(shards / "example-000000.tar")[f"{index.grids[2].key}.json"])
    sample = reader.read(index.grids[2], epoch=-1)
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
    (found,) = index_shards(str(tmp_path), ["s2_toa"]).grids
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
    (found,) = index_shards(str(tmp_path), list(SENSORS)).grids
    reader = DrawReader((SENSORS["s3_olci"], SENSORS["s5p_o3"]), SIZES)
    rows = np.array([reader.read(found, epoch).metadata for epoch in range(30)])
    assert set(rows[:, 0, DAYS][~np.isnan(rows[:, 0, DAYS])]) == {18276.0}  # 2020-01-15, the only date it names
    assert 0.4 < np.isnan(rows[:, 0, DAYS]).mean() < 0.95  # two dates of three have no name
    assert np.isnan(rows[:, 1, DAYS]).all()
    assert np.abs(rows[:, :, LON] - -9.75).max() < 0.3
    assert np.abs(rows[:, :, LAT] - 40).max() < 0.3


def test_metadata_are_dropped_in_groups_with_the_probability_asked(index):
    reader = DrawReader((SENSORS["s5p_no2"], SENSORS["dem"]), SIZES, metadata_drop=0.25)
    rows = np.array([reader.read(index.grids[0], epoch).metadata for epoch in range(300)])
    unknown = np.isnan(rows)
    np.testing.assert_array_equal(unknown[..., LON], unknown[..., LAT])
    for column in (LON, DAYS, AREA):  # binomial(600, 0.25): deviation 0.018
        assert 0.18 < unknown[..., column].mean() < 0.32
    together = (unknown[..., LON] & unknown[..., DAYS]).mean()
    assert together < 0.12  # independent: 0.06
    validation = dataclasses.replace(reader, augment=False).read(index.grids[0], -1)
    assert not np.isnan(validation.metadata).any()


def test_masking_noise_is_uniform(index):
    reader = DrawReader((SENSORS["s5p_no2"],), SIZES)
    noise = np.concatenate([reader.read(index.grids[0], epoch).noise["s5p_no2"] for epoch in range(200)])
    assert noise.min() >= 0
    assert noise.max() < 1
    assert np.histogram(noise, 4, (0, 1))[0].min() > 150  # of 800, expected 200, deviation 12


def test_held_out_grids_stay_held_out_when_shards_are_added(shards, index):
    part = index_shards(str(shards / "example-000000.tar"), list(SENSORS))
    small, large = ([{g.key for g in side.grids} for side in i.split(0.3, seed=1)] for i in (part, index))
    assert small[0] <= large[0]
    assert small[1] <= large[1]
    assert large[0] | large[1] == {g.key for g in index.grids}
    assert not large[0] & large[1]
    assert 2 <= len(large[1]) <= 14
    assert {g.key for g in index.split(0.3, seed=2)[1].grids} != large[1]
    assert index.split(0.0, seed=1)[1].grids == ()
    assert len(index.split(1e-9, seed=1)[1].grids) == 1


def test_the_fingerprint_says_whether_the_data_are_the_same(shards, index, tmp_path):
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for name in ("example-000000.tar", "example-000001.tar"):
        (copied / name).write_bytes((shards / name).read_bytes())
    assert index_shards(str(copied), list(SENSORS)).fingerprint == index.fingerprint
    (copied / "example-000001.tar").unlink()
    assert index_shards(str(copied), list(SENSORS)).fingerprint != index.fingerprint


def test_a_size_that_tokens_do_not_fill_is_refused():
    with pytest.raises(InputError, match=r"33.*s2_toa.*16"):
        DrawReader((SENSORS["s2_toa"],), {"s2_toa": 33})


# --- Bad input -------------------------------------------------------------------------------------------------------


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture
def contents(shards) -> dict[str, bytes]:
    """The members of four good grids."""
    keys = [make_grid(i).key for i in range(4)]
    return {n: d for n, d in members(shards / "example-000000.tar").items() if n.split(".")[0] in keys}


def read_all(folder: Path) -> tuple[GridIndex, list]:
    index = index_shards(str(folder), list(SENSORS))
    reader = DrawReader(ALL, SIZES)
    return index, [reader.read(g, 0) for g in index.grids]


KEY = make_grid(1).key
GOOD = [make_grid(i).key for i in (0, 2, 3)]


def test_the_payload_of_these_tests_would_work(tmp_path):
    """Otherwise the next tests could not fail."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "created"))).close()
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize("form", ["torch", "legacy", "bare pickle"])
def test_a_pickle_that_wants_to_run_something_never_runs(tmp_path, contents, form):
    victim = tmp_path / "created"
    payload = Payload(victim)
    if form == "bare pickle":
        data = pickle.dumps(payload)
    else:
        buffer = io.BytesIO()
        torch.save({"x": torch.zeros(2), "y": payload}, buffer, _use_new_zipfile_serialization=form == "torch")
        data = buffer.getvalue()
    contents[f"{KEY}.s2_toa.pth"] = data
    shard = write_tar(tmp_path / "shards" / "a.tar", contents)
    index, draws = read_all(shard.parent)
    assert not victim.exists(), "the payload ran"
    (problem,) = [p for d in draws for p in d.problems]
    assert problem.where == f"{shard}:{KEY}.s2_toa.pth"
    assert problem.reason == "unsafe_or_broken_pth"
    present = dict(zip(SENSORS, draws[1].present, strict=True))
    assert present == {name: name != "s2_toa" for name in SENSORS}
    assert all(d.present.all() for d in draws if d.key in GOOD)
    assert index.problems == ()


@pytest.mark.parametrize(
    ("member", "value", "reason", "detail"),
    [
        ("s2_toa", torch.zeros(2, 3, 12, 40, 40, dtype=torch.int16), "wrong_shape", r"\(2, 3, 12, 40, 40\)"),
        ("s2_toa", torch.zeros(3, 13, 40, 40), "wrong_shape", "5 axes"),
        ("s5p_no2", torch.zeros(3, 2, 28, 28), "wrong_shape", "1 channels"),
        ("s5p_no2", torch.zeros(0, 1, 28, 28), "wrong_shape", "0"),
        ("dem", torch.zeros(1, 256, 256), "wrong_shape", "2 axes"),
        ("dem", torch.full((256, 256), torch.nan), "all_nan", ""),
        ("s1_grd", torch.full((2, 3, 2, 40, 40), torch.inf), "all_nan", "patch and date"),
        ("s3_olci", {"image": torch.zeros(2)}, "unsafe_or_broken_pth", "dict"),
        ("s3_olci", [1, 2], "unsafe_or_broken_pth", "list"),
        ("dem", torch.zeros(256, 256).to_sparse(), "unsafe_or_broken_pth", "sparse"),
        ("dem", torch.zeros(256, 256, dtype=torch.complex64), "unsafe_or_broken_pth", "complex"),
        ("dem", torch.zeros(256, 256, device="meta"), "unsafe_or_broken_pth", "meta"),
    ],
)
def test_an_unusable_tensor_is_named_and_the_rest_of_its_grid_is_used(
    tmp_path, contents, member, value, reason, detail
):
    contents[f"{KEY}.{member}.pth"] = saved(value)
    shard = write_tar(tmp_path / "a.tar", contents)
    _, draws = read_all(tmp_path)
    (problem,) = [p for d in draws for p in d.problems]
    assert (problem.where, problem.reason) == (f"{shard}:{KEY}.{member}.pth", reason)
    assert re.search(detail, problem.detail), problem.detail
    assert draws[1].present.sum() == 7
    index = list(SENSORS).index(member)
    assert not draws[1].present[index]
    assert (draws[1].images[member] == 0).all()
    assert np.isnan(draws[1].metadata[index]).all()
    assert all(np.isfinite(d.images[name]).all() for d in draws for name in SENSORS)


def test_random_bytes_and_an_empty_member_are_named(tmp_path, contents):
    contents[f"{KEY}.dem.pth"] = b""
    contents[f"{KEY}.s1_grd.pth"] = bytes(range(256)) * 40
    contents[f"{KEY}.s5p_co.pth"] = contents[f"{KEY}.s5p_co.pth"][:-200]
    write_tar(tmp_path / "a.tar", contents)
    _, draws = read_all(tmp_path)
    assert {p.where.rpartition(":")[2] for p in draws[1].problems} == {
        f"{KEY}.{m}.pth" for m in ("dem", "s1_grd", "s5p_co")
    }
    assert {p.reason for p in draws[1].problems} == {"unsafe_or_broken_pth"}
    assert all(p.detail for p in draws[1].problems)


def test_a_partly_unknown_image_is_used(tmp_path, contents):
    dem = torch.full((256, 256), torch.nan)
    dem[100:150] = 500.0
    contents[f"{KEY}.dem.pth"] = saved(dem)
    write_tar(tmp_path / "a.tar", contents)
    index = index_shards(str(tmp_path), list(SENSORS))
    sample = DrawReader(ALL, SIZES, augment=False).read(index.grids[1], 0)
    assert sample.problems == []
    assert set(np.unique(np.round(sample.images["dem"], 6))) == {np.float32(0.0), np.float32(0.05)}


def test_a_grid_without_json_is_named_and_left_out(tmp_path, contents):
    del contents[f"{KEY}.json"]
    shard = write_tar(tmp_path / "a.tar", contents)
    index, draws = read_all(tmp_path)
    assert [(p.where, p.reason) for p in index.problems] == [(f"{shard}:{KEY}", "missing_json")]
    assert [d.key for d in draws] == GOOD
    assert all(d.present.all() for d in draws)


@pytest.mark.parametrize(
    "text",
    [b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"", b"[" * 100_000],
    ids=["cut off", "list", "not UTF-8", "string", "empty", "nested too deep"],
)
def test_a_broken_json_is_named(tmp_path, contents, text):
    contents[f"{KEY}.json"] = text
    shard = write_tar(tmp_path / "a.tar", contents)
    _, draws = read_all(tmp_path)
    (problem,) = draws[1].problems
    assert (problem.where, problem.reason) == (f"{shard}:{KEY}.json", "bad_json")
    assert problem.detail
    assert not draws[1].present.any()
    assert all(d.present.all() for d in draws if d.key in GOOD)


@pytest.mark.parametrize("name", ["no place", "0748119_-10.00_40.00/20209999", "a/b/c/d/20200101"])
def test_a_name_of_another_form_is_named(tmp_path, contents, name):
    names = json.loads(contents[f"{KEY}.json"])
    names["dem"] = [[name]]
    contents[f"{KEY}.json"] = json.dumps(names).encode()
    write_tar(tmp_path / "a.tar", contents)
    _, draws = read_all(tmp_path)
    (problem,) = draws[1].problems
    assert problem.reason == "bad_json"
    assert name.split("/")[-1] in problem.detail
    assert draws[1].present.sum() == 7


def test_a_key_that_is_no_grid_number_matters_only_where_names_give_no_place(tmp_path, contents):
    renamed = {n.replace(KEY, "elsewhere"): d for n, d in contents.items()}
    names = json.loads(contents[f"{KEY}.json"])
    del names["dem"]
    renamed["elsewhere.json"] = json.dumps(names).encode()
    write_tar(tmp_path / "a.tar", renamed)
    _, draws = read_all(tmp_path)
    (problem,) = [p for d in draws for p in d.problems]
    assert problem.where.endswith("elsewhere.dem.pth")
    assert problem.reason == "bad_json"
    assert draws[1].present.sum() == 7


def test_a_truncated_shard_gives_what_is_whole_and_names_the_loss(tmp_path, contents):
    shard = write_tar(tmp_path / "a.tar", contents)
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = next(m for m in tar if m.name.startswith(GOOD[1]))
    shard.write_bytes(data[: third.offset_data + third.size // 2])
    index, draws = read_all(tmp_path)
    assert [d.key for d in draws] == [GOOD[0], KEY]
    assert all(d.present.all() and not d.problems for d in draws)
    cut = [p for p in index.problems if p.reason == "truncated_tar"]
    assert len(cut) == 1
    assert cut[0].where == str(shard)
    assert third.name in cut[0].detail


def test_a_file_that_is_no_tar_is_named_while_others_are_read(tmp_path, contents):
    write_tar(tmp_path / "b.tar", contents)
    (tmp_path / "a.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    index, draws = read_all(tmp_path)
    assert {(p.where, p.reason) for p in index.problems} == {
        (str(tmp_path / "a.tar"), "truncated_tar"),
        (str(tmp_path / "c.tar"), "truncated_tar"),
    }
    assert len(draws) == 4


def test_a_shard_that_shrinks_or_vanishes_after_indexing_is_named(tmp_path, contents):
    one = {n: d for n, d in contents.items() if n.startswith(KEY)}
    last = {f"{KEY}.dem.pth": one.pop(f"{KEY}.dem.pth")}
    shard = write_tar(tmp_path / "a.tar", one | last)
    (grid,) = index_shards(str(tmp_path), list(SENSORS)).grids
    reader = DrawReader(ALL, SIZES)
    offset, size = grid.members["dem"]
    shard.write_bytes(shard.read_bytes()[: offset + 100])
    sample = reader.read(grid, 0)
    (problem,) = sample.problems
    assert (problem.where, problem.reason) == (f"{shard}:{KEY}.dem.pth", "unreadable")
    assert f"100 of {size} bytes" in problem.detail
    assert sample.present.sum() == 7
    shard.unlink()
    sample = reader.read(grid, 0)
    (problem,) = sample.problems
    assert problem.reason == "unreadable"
    assert "No such file" in problem.detail
    assert not sample.present.any()


def test_folders_without_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no shards"):
        index_shards(str(tmp_path), list(SENSORS))
    (tmp_path / "notes.txt").write_text("no tar here")
    with pytest.raises(InputError, match=r"holds no shards"):
        index_shards(str(tmp_path), list(SENSORS))
    with pytest.raises(InputError, match=r"nowhere.*does not exist"):
        index_shards(str(tmp_path / "nowhere"), list(SENSORS))
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    with pytest.raises(InputError, match=r"no grid.*a\.tar: truncated_tar"):
        index_shards(str(tmp_path), list(SENSORS))
