"""Verification: sound shards, and members broken for real, each named with its reason while all others stay sound."""

from __future__ import annotations

import datetime
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shard_faults import (
    array_of,
    change_array,
    change_names,
    rename,
    sound_grid,
    sound_shards,
    write_tar,
)
from test_slices import members

from copernicus.datasets import verify
from copernicus.datasets.convert import convert_sites
from copernicus.datasets.plausible import PLAUSIBLE, measure
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import grid_name
from copernicus.datasets.verify import SCHEMA, Row, duplicates, to_table, verify_shard

KEY = sound_grid(1).key
NAME = grid_name(int(KEY))
OTHER = sound_grid(2).key
Contents = dict[str, bytes]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    (path,) = sound_shards(tmp_path_factory.mktemp("sound"), 3, 3)
    return path


@pytest.fixture
def contents(sound) -> Contents:
    return members(sound)


def faults(rows: list[Row]) -> dict[str, set[str]]:
    """Member (or grid, or shard) -> reasons, of the rows that have a fault."""
    return {row.member or row.grid or row.shard: set(row.faults) for row in rows if not row.ok}


def notes(rows: list[Row]) -> dict[str, set[str]]:
    """The same of notes, but for the small fixtures' other size."""
    found = {row.member or row.grid: set(row.notes) - {"other_size"} for row in rows}
    return {member: reasons for member, reasons in found.items() if reasons}


def broken(tmp_path: Path, contents: Contents) -> list[Row]:
    return verify_shard(str(write_tar(tmp_path / "a.tar", contents)))


def test_every_member_of_a_sound_shard_is_sound(sound):
    rows = verify_shard(str(sound))
    raw = members(sound)
    assert [row.member for row in rows] == list(raw)
    assert faults(rows) == notes(rows) == {}
    assert {row.grid for row in rows} == {sound_grid(i).key for i in range(3)}
    for row in rows:
        if row.sensor:
            array = array_of(raw[row.member])
            assert row.member == f"{row.grid}.{row.sensor}.pth"
            assert (row.dtype, row.shape) == (array.dtype.name, array.shape)
            assert (row.finite, row.low, row.high, row.outside) == (1, array.min(), array.max(), 0)
    table = to_table(rows)
    assert table.schema == SCHEMA
    assert table["ok"].to_pylist() == [True] * 27
    sizes = dict(zip(table["member"].to_pylist(), table["notes"].to_pylist(), strict=True))
    assert sizes[f"{KEY}.s2_toa.pth"] == [
        {"reason": "other_size", "detail": "40 x 40 pixels, 3 dates; published are 264 x 264 pixels, 4 dates"}
    ]


def some(array: np.ndarray, share: float, value: float) -> np.ndarray:
    """With this share of its values replaced."""
    flat = array.reshape(-1)
    flat[: max(1, round(share * len(flat)))] = value
    return array


ARRAYS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "float reflectance": ("s2_toa", lambda x: x.astype(np.float32), "wrong_dtype"),
    "double": ("s1_grd", lambda x: x.astype(np.float64), "wrong_dtype"),
    "no value": ("dem", lambda x: x * np.nan, "all_nan"),
    "infinite": ("s5p_co", lambda x: x + np.inf, "all_nan"),
    "one fill value": ("s1_grd", lambda x: some(x, 0, -9999), "out_of_range"),
    "one fill value of NetCDF": ("s5p_so2", lambda x: some(x, 0, 9.96921e36), "out_of_range"),
    "one missing height": ("dem", lambda x: some(x, 0, -32767), "out_of_range"),
    "micromoles": ("s5p_no2", lambda x: x * 1e6, "out_of_range"),
    "Dobson units": ("s5p_o3", lambda x: x / 4.4615e-4, "out_of_range"),
    "a twentieth negative": ("s2_toa", lambda x: some(x, 0.05, -3), "out_of_range"),
    "a twentieth too bright": ("s3_olci", lambda x: some(x, 0.05, 60000), "out_of_range"),
    "power": ("s1_grd", lambda x: 10 ** (x / 10), "wrong_unit"),
    "reflectance cast to whole numbers": ("s2_toa", lambda x: x // 1000, "wrong_unit"),
    "all alike": ("s3_olci", lambda x: np.full_like(x, 5000), "constant"),
    "no data at all": ("s2_toa", np.zeros_like, "constant"),
    "a band too few": ("s3_olci", lambda x: x[:, :20], "wrong_shape"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_its_sensor_cannot_have_delivered(tmp_path, contents, case):
    sensor, change, reason = ARRAYS[case]
    change_array(contents, f"{KEY}.{sensor}.pth", change)
    assert faults(broken(tmp_path, contents)) == {f"{KEY}.{sensor}.pth": {reason}}


def first_name_only(names, old: str, new: str):
    return [rename(names[0], old, new), *names[1:]]


NAMES: dict[str, tuple[str, Callable, str]] = {
    "before the launch": ("s5p_o3", lambda n: first_name_only(n, "2020", "2017"), "wrong_date"),
    "radar of 2013": ("s1_grd", lambda n: first_name_only(n, "2020", "2013"), "wrong_date"),
    "in the future": ("s2_toa", lambda n: first_name_only(n, "2020", "2099"), "wrong_date"),
    "no date of the calendar": ("s3_olci", lambda n: first_name_only(n, "20200115", "20201315"), "bad_json"),
    "another grid": ("s5p_co", lambda n: rename(n, KEY, OTHER), "wrong_grid"),
    "another grid's place": ("dem", lambda n: rename(n, NAME, f"{KEY}_-9.50_40.00"), "wrong_grid"),
    "latitude first": ("s3_olci", lambda n: rename(n, NAME, f"{KEY}_40.00_-9.75"), "wrong_grid"),
    "a patch elsewhere": ("s1_grd", lambda n: rename(n, "/1_-9.7500_", "/1_-9.4000_"), "far_patch"),
    "a date too few": ("s2_toa", lambda n: [n[0], n[1][:-1]], "bad_nesting"),
    "a patch too few": ("s1_grd", lambda n: n[:1], "bad_nesting"),
    "no dates": ("s5p_so2", lambda n: n[0], "bad_nesting"),
    "one level too deep": ("s3_olci", lambda n: [n], "bad_nesting"),
    "numbers": ("s3_olci", lambda n: [1, 2, 3], "bad_nesting"),
    "nothing": ("dem", lambda n: [], "missing_names"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_do_not_fit(tmp_path, contents, case):
    sensor, change, reason = NAMES[case]
    change_names(contents, KEY, sensor, change)
    assert faults(broken(tmp_path, contents)) == {f"{KEY}.{sensor}.pth": {reason}}


def test_today_is_the_last_day_an_image_can_be_of(sound):
    assert faults(verify_shard(str(sound), datetime.date(2020, 10, 15))) == {}
    found = faults(verify_shard(str(sound), datetime.date(2020, 10, 14)))
    assert set.union(*found.values()) == {"wrong_date"}
    assert len(found) == 3 * 7, "all that have dates"


def test_one_flipped_byte_among_the_numbers_is_found(tmp_path, contents):
    member = f"{KEY}.s2_toa.pth"
    data = contents[member]
    at = data.index(array_of(data).tobytes()) + 12345
    contents[member] = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    rows = broken(tmp_path, contents)
    assert faults(rows) == {member: {"unsafe_or_broken_pth"}}
    assert "checksum" in next(row for row in rows if row.member == member).faults["unsafe_or_broken_pth"]


def test_what_is_lost_or_no_member(tmp_path, contents):
    del contents[f"{KEY}.s1_grd.pth"]
    contents[f"{OTHER}.dem.pth"] = b"PK not really"
    contents[f"{OTHER}.thumbnail.jpg"] = b"\xff\xd8"
    rows = broken(tmp_path, contents)
    assert faults(rows) == {f"{KEY}.s1_grd.pth": {"missing_member"}, f"{OTHER}.dem.pth": {"unsafe_or_broken_pth"}}
    assert notes(rows) == {f"{OTHER}.thumbnail.jpg": {"unknown_member"}}


@pytest.mark.parametrize(
    ("data", "where", "reason"), [(None, KEY, "missing_json"), (b"{", f"{KEY}.json", "bad_json"), (b"[]", f"{KEY}.json", "bad_json")]
)  # fmt: skip
def test_without_its_json_a_grid_is_faulty_and_its_arrays_are_checked_all_the_same(
    tmp_path, contents, data, where, reason
):
    if data is None:
        del contents[f"{KEY}.json"]
    else:
        contents[f"{KEY}.json"] = data
    change_array(contents, f"{KEY}.dem.pth", lambda x: some(x, 0, -32767))
    rows = broken(tmp_path, contents)
    assert faults(rows) == {where: {reason}, f"{KEY}.dem.pth": {"out_of_range"}}
    assert next(row for row in rows if faults([row]).get(where)).grid == KEY


def test_a_key_that_is_no_grids_number(tmp_path, contents):
    renamed = {name.replace(KEY, "9999999"): data for name, data in contents.items()}
    found = faults(broken(tmp_path, renamed))
    assert {reason for reasons in found.values() for reason in reasons} >= {"wrong_grid"}
    assert all(member.startswith("9999999") for member in found)


def test_a_tar_cut_off_in_the_middle(tmp_path, sound):
    data = sound.read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    rows = verify_shard(str(tmp_path / "a.tar"))
    found = faults(rows)
    assert found.pop(str(tmp_path / "a.tar")) == {"truncated_tar"}
    whole = [row.member for row in rows if row.ok]
    assert whole == list(members(sound))[: len(whole)]
    assert 9 <= len(whole) <= 18
    assert all("missing_json" in r or "missing_member" in r for r in found.values())


NOTES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], str]] = {
    "mostly clouds": ("s5p_co", lambda x: np.where(np.arange(28) % 5 < 3, np.nan, x), "low_finite"),
    "a date without a value": ("s5p_no2", lambda x: np.concatenate([x[:2], x[2:] * np.nan]), "empty_images"),
    "a few outliers": ("s5p_so2", lambda x: some(x, 0.005, -0.1), "few_out_of_range"),
    "saturated numbers that wrapped": ("s2_toa", lambda x: some(x, 0.001, -1), "few_out_of_range"),
    "a dead band": ("s3_olci", lambda x: np.where(np.arange(21)[:, None, None] == 4, 1000, x), "constant_bands"),
    "a black image": ("s2_toa", lambda x: np.concatenate([x[:1], np.zeros_like(x[1:])]), "constant_images"),
    "the sea": ("dem", np.zeros_like, "flat"),
}


@pytest.mark.parametrize("case", NOTES)
def test_what_is_worth_knowing_is_no_fault(tmp_path, contents, case):
    sensor, change, reason = NOTES[case]
    change_array(contents, f"{KEY}.{sensor}.pth", lambda x: change(x).astype(x.dtype))
    rows = broken(tmp_path, contents)
    assert faults(rows) == {}
    assert notes(rows) == {f"{KEY}.{sensor}.pth": {reason}}


def test_dates_and_patches_worth_a_note(tmp_path, contents):
    change_names(contents, KEY, "s5p_co", lambda names: [names[0]] * 3)
    change_names(contents, KEY, "s3_olci", lambda names: [rename(n, "/20200115", "") for n in names])
    change_names(contents, KEY, "s1_grd", lambda names: names[:1])
    change_array(contents, f"{KEY}.s1_grd.pth", lambda x: x[:1])
    rows = broken(tmp_path, contents)
    assert faults(rows) == {}
    assert notes(rows) == {
        f"{KEY}.s5p_co.pth": {"repeated_dates"}, f"{KEY}.s3_olci.pth": {"no_date"}, f"{KEY}.s2_toa.pth": {"patch_counts"}
    }  # fmt: skip


def test_a_grid_in_two_shards_is_named_once():
    first: dict[str, str] = {}
    assert duplicates(["a", "a", "b"], "x.tar", first) == []
    (row,) = duplicates(["b", "b", "c"], "y.tar", first)
    assert (row.shard, row.grid, list(row.faults)) == ("y.tar", "b", ["duplicate_grid"])
    assert "x.tar" in row.faults["duplicate_grid"]
    assert first == {"a": "x.tar", "b": "x.tar", "c": "y.tar"}


def test_one_array_is_in_memory_at_a_time(sound, monkeypatch):
    alive: list[weakref.ref] = []
    most = 0
    real = verify.read_tensor

    def watched(*arguments):
        nonlocal most
        if any(ref() is not None for ref in alive):
            gc.collect()
        array = real(*arguments)
        alive.append(weakref.ref(array))
        most = max(most, sum(ref() is not None for ref in alive))
        return array

    monkeypatch.setattr(verify, "read_tensor", watched)
    verify_shard(str(sound))
    assert len(alive) == 24
    assert most == 1


def test_a_shard_that_changes_meanwhile_is_not_reported_on(tmp_path, contents, monkeypatch):
    path = write_tar(tmp_path / "a.tar", contents)
    real = verify.measure

    def meddling(*arguments):
        path.touch()
        return real(*arguments)

    monkeypatch.setattr(verify, "measure", meddling)
    with pytest.raises(OSError, match="changed while it was read"):
        verify_shard(str(path))


def test_shares_and_extremes_are_those_of_a_plain_computation():
    rng = np.random.default_rng(1)
    x = rng.normal(20, 30, (2, 3, 2, 11, 7)).astype(np.float32)
    x[rng.random(x.shape) < 0.3] = np.nan
    x[0, 1] = np.inf
    found = measure(x, SENSORS["s1_grd"])
    known = x[np.isfinite(x)]
    assert found.finite == known.size / x.size
    assert (found.low, found.high) == (known.min(), known.max())
    assert found.outside == np.mean((known < -60) | (known > 30))
    assert found.impossible == (known.max() if known.max() > 100 else None)
    assert (found.images, found.empty, found.blank) == (6, 1, 0)
    for c in range(2):
        band = x[:, :, c][np.isfinite(x[:, :, c])]
        assert (found.lowest_C[c], found.highest_C[c]) == (band.min(), band.max())
    # The scale of each band counts: 40000 is a radiance of 558 in the first and of 130 in the last.
    olci = np.full((1, 21, 4, 4), 55000, np.float32)
    scale = np.array(SENSORS["s3_olci"].scale)
    assert measure(olci, SENSORS["s3_olci"]).outside == np.mean(55000 * scale > PLAUSIBLE["s3_olci"].high)


def test_every_sensor_has_its_range():
    assert PLAUSIBLE.keys() == SENSORS.keys()
    for expected in PLAUSIBLE.values():
        assert expected.floor <= expected.low < expected.high <= expected.ceiling


@pytest.mark.parametrize(
    ("folder", "sensors"),
    [
        ("terramind_examples", {"S2L1C": "s2_toa", "S1RTC": "s1_grd", "DEM": "dem"}),
        ("copernicusfm_tile", {".": "s2_toa"}),
        ("s3_olci_xcube/derived", {"s3_olci": "s3_olci"}),
        ("copdem_grenoble", {".": "dem"}),
    ],
)
def test_real_images_have_no_fault(tmp_path, real_data, folder, sensors):
    if not (real_data / folder).is_dir():
        pytest.skip(f"no {folder} among the real images")
    report = convert_sites(real_data / folder, tmp_path / "shards", sensors)
    assert report.sites
    for shard in report.shards:
        assert faults(verify_shard(str(shard))) == {}
