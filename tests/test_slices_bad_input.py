"""Reading draws from shards that are wrong or hostile: each fault is named and counted, and the rest is used."""

import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, make_grid
from test_slices import ALL, members, write_tar

from copernicus.datasets.index import index_shards
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import Problem
from copernicus.datasets.slices import Draw, DrawReader


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


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


def read_all(folder: Path) -> tuple[dict[str, Draw], list[Problem]]:
    """A draw of every usable grid, and all problems: of the headers, then of what was drawn."""
    index = index_shards(str(folder))
    reader = DrawReader(ALL, SIZES)
    draws = {g.key: reader.read(g, 0) for g in index}
    return draws, [*index.problems, *(p for d in draws.values() for p in d.problems)]


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
    draws, (problem,) = read_all(shard.parent)
    assert not victim.exists(), "the payload ran"
    assert problem.where == f"{shard}:{KEY}.s2_toa.pth"
    assert problem.reason == "unsafe_or_broken_pth"
    present = dict(zip(SENSORS, draws[KEY].present, strict=True))
    assert present == {name: name != "s2_toa" for name in SENSORS}
    assert all(draws[key].present.all() for key in GOOD)


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
    draws, (problem,) = read_all(tmp_path)
    assert (problem.where, problem.reason) == (f"{shard}:{KEY}.{member}.pth", reason)
    assert re.search(detail, problem.detail), problem.detail
    assert draws[KEY].present.sum() == 7
    index = list(SENSORS).index(member)
    assert not draws[KEY].present[index]
    assert (draws[KEY].images[member] == 0).all()
    assert np.isnan(draws[KEY].metadata[index]).all()
    assert all(np.isfinite(d.images[name]).all() for d in draws.values() for name in SENSORS)


def test_random_bytes_and_an_empty_member_are_named(tmp_path, contents):
    contents[f"{KEY}.dem.pth"] = b""
    contents[f"{KEY}.s1_grd.pth"] = bytes(range(256)) * 40
    contents[f"{KEY}.s5p_co.pth"] = contents[f"{KEY}.s5p_co.pth"][:-200]
    write_tar(tmp_path / "a.tar", contents)
    draws, problems = read_all(tmp_path)
    assert {p.where.rpartition(":")[2] for p in problems} == {f"{KEY}.{m}.pth" for m in ("dem", "s1_grd", "s5p_co")}
    assert {p.reason for p in problems} == {"unsafe_or_broken_pth"}
    assert all(p.detail for p in problems)
    assert draws[KEY].present.sum() == 5


def test_a_partly_unknown_image_is_used(tmp_path, contents):
    dem = torch.full((256, 256), torch.nan)
    dem[100:150] = 500.0
    contents[f"{KEY}.dem.pth"] = saved(dem)
    write_tar(tmp_path / "a.tar", contents)
    index = index_shards(str(tmp_path))
    sample = DrawReader(ALL, SIZES, augment=False).read(index[1], 0)
    assert sample.problems == []
    values = SENSORS["dem"].normalize(sample.images["dem"])
    assert set(np.unique(np.round(values, 6))) == {np.float32(0.0), np.float32(0.05)}


def test_a_crop_that_shows_nothing_of_an_image_is_no_fault(tmp_path, contents):
    dem = torch.full((256, 256), torch.nan)
    dem[-40:] = 500.0
    contents[f"{KEY}.dem.pth"] = saved(dem)
    write_tar(tmp_path / "a.tar", contents)
    grid = index_shards(str(tmp_path))[1]
    draws = [DrawReader(ALL, SIZES).read(grid, epoch) for epoch in range(20)]
    assert all(d.problems == [] and d.present.all() for d in draws)
    assert 2 < sum(bool(np.isnan(d.images["dem"]).all()) for d in draws) < 20


def test_a_grid_without_json_is_named_and_left_out(tmp_path, contents):
    del contents[f"{KEY}.json"]
    shard = write_tar(tmp_path / "a.tar", contents)
    draws, problems = read_all(tmp_path)
    assert [(p.where, p.reason) for p in problems] == [(f"{shard}:{KEY}", "missing_json")]
    assert list(draws) == GOOD
    assert all(d.present.all() for d in draws.values())


@pytest.mark.parametrize(
    "text",
    [b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b"", b"[" * 100_000],
    ids=["cut off", "list", "not UTF-8", "string", "empty", "nested too deep"],
)
def test_a_broken_json_is_named(tmp_path, contents, text):
    contents[f"{KEY}.json"] = text
    shard = write_tar(tmp_path / "a.tar", contents)
    draws, (problem,) = read_all(tmp_path)
    assert (problem.where, problem.reason) == (f"{shard}:{KEY}.json", "bad_json")
    assert problem.detail
    assert list(draws) == GOOD
    assert all(d.present.all() for d in draws.values())


@pytest.mark.parametrize("name", ["no place", "0748119_-10.00_40.00/20209999", "a/b/c/d/20200101"])
def test_a_name_of_another_form_is_named(tmp_path, contents, name):
    names = json.loads(contents[f"{KEY}.json"])
    names["dem"] = [[name]]
    contents[f"{KEY}.json"] = json.dumps(names).encode()
    write_tar(tmp_path / "a.tar", contents)
    draws, (problem,) = read_all(tmp_path)
    assert problem.where.endswith(f"{KEY}.dem.pth")
    assert problem.reason == "bad_json"
    assert name.split("/")[-1] in problem.detail
    assert draws[KEY].present.sum() == 7


def test_a_key_that_is_no_grid_number_needs_a_name_that_gives_a_place(tmp_path, contents):
    renamed = {n.replace(KEY, "elsewhere"): d for n, d in contents.items()}
    names = json.loads(contents[f"{KEY}.json"])
    renamed["elsewhere.json"] = json.dumps({"s5p_o3": names["s5p_o3"]}).encode()
    write_tar(tmp_path / "named" / "a.tar", renamed)
    draws, problems = read_all(tmp_path / "named")
    assert problems == []
    assert draws["elsewhere"].metadata[list(SENSORS).index("dem"), :2] == pytest.approx([-9.75, 40.0], abs=0.2)
    renamed["elsewhere.json"] = b"{}"
    write_tar(tmp_path / "nameless" / "a.tar", renamed)
    draws, (problem,) = read_all(tmp_path / "nameless")
    assert (problem.where.rpartition(":")[2], problem.reason) == ("elsewhere.json", "bad_json")
    assert list(draws) == GOOD


def test_a_patch_whose_images_name_different_places_is_named(tmp_path, contents):
    names = json.loads(contents[f"{KEY}.json"])
    names["s2_toa"][1][2] = ["0748119_-10.00_40.00/1_33.0000_40.0000/20201015"]
    contents[f"{KEY}.json"] = json.dumps(names).encode()
    write_tar(tmp_path / "a.tar", contents)
    draws, (problem,) = read_all(tmp_path)
    assert (problem.reason, problem.detail) == ("bad_json", "the images of patch 1 name different places")
    assert draws[KEY].present.sum() == 7


def test_a_truncated_shard_gives_what_is_whole_and_names_the_loss(tmp_path, contents):
    shard = write_tar(tmp_path / "a.tar", contents)
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        third = next(m for m in tar if m.name.startswith(GOOD[1]))
    shard.write_bytes(data[: third.offset_data + third.size // 2])
    draws, problems = read_all(tmp_path)
    assert list(draws) == [GOOD[0], KEY]
    assert all(d.present.all() for d in draws.values())
    (cut,) = [p for p in problems if p.reason == "truncated_tar"]
    assert cut.where.startswith(str(shard))
    assert third.name in str(cut)


def test_a_file_that_is_no_tar_is_named_while_others_are_read(tmp_path, contents):
    write_tar(tmp_path / "b.tar", contents)
    (tmp_path / "a.tar").write_bytes(b"<html>404 not found</html>" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    draws, problems = read_all(tmp_path)
    assert {p.where for p in problems} == {str(tmp_path / "a.tar"), str(tmp_path / "c.tar")}
    assert {p.reason for p in problems} <= {"truncated_tar", "damaged_tar"}
    assert len(draws) == 4


@pytest.mark.parametrize("how", ["shrinks", "is rewritten", "vanishes"])
def test_a_shard_that_is_not_the_indexed_one_is_named_and_never_read(tmp_path, contents, how):
    shard = write_tar(tmp_path / "a.tar", {n: d for n, d in contents.items() if n.startswith(KEY)})
    (grid,) = index_shards(str(tmp_path))
    reader = DrawReader(ALL, SIZES)
    assert reader.read(grid, 0).present.all()
    if how == "shrinks":
        shard.write_bytes(shard.read_bytes()[: grid.sensors["dem"].offset + 100])
    elif how == "is rewritten":  # another of the same length, under the same name
        data = bytearray(shard.read_bytes())
        other = tmp_path / "other"
        other.write_bytes(bytes(reversed(data)))
        other.replace(shard)
    else:
        shard.unlink()
    sample = reader.read(grid, 0)
    (problem,) = sample.problems
    assert problem.where == f"{shard}:{KEY}"
    assert problem.reason == ("unreadable" if how == "vanishes" else "changed")
    assert not sample.present.any()
    assert sample.key == KEY


def test_folders_without_shards_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no shards"):
        index_shards(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no tar here")
    with pytest.raises(InputError, match=r"holds no shards"):
        index_shards(str(tmp_path))
    with pytest.raises(InputError, match=r"nowhere.*does not exist"):
        index_shards(str(tmp_path / "nowhere"))
    (tmp_path / "a.tar").write_bytes(b"not a tar")
    with pytest.raises(InputError, match=r"no grid.*a\.tar: (truncated|damaged)_tar"):
        index_shards(str(tmp_path)).having(["dem"])
