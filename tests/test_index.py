"""The index: what it says of shards against an independent reading, its file, and when it is not to be trusted."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_grid
from test_slices import members, write_tar

from copernicus.datasets import index as indexing
from copernicus.datasets.index import GridIndex, index_shards, read_index, to_index, to_table, write_index
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import parse_image_name, write_shards
from copernicus.datasets.survey import survey_shard


def flat(names) -> list[str]:
    return [names] if isinstance(names, str) else [name for inner in names for name in flat(inner)]


def test_offsets_shapes_dates_and_places_are_those_of_the_files(shards):
    for path in sorted(shards.glob("*.tar")):
        raw, contents = path.read_bytes(), members(path)
        for grid in index_shards(str(path)):
            names = json.loads(contents[f"{grid.key}.json"])
            for name, at in grid.sensors.items():
                array = torch.load(io.BytesIO(contents[f"{grid.key}.{name}.pth"]), weights_only=True).numpy()
                assert (at.dtype, at.shape) == (array.dtype.name, array.shape)
                assert raw[at.offset : at.offset + array.nbytes] == array.tobytes()
                assert raw[at.member : at.member + at.size] == contents[f"{grid.key}.{name}.pth"]
                images = [parse_image_name(n) for n in flat(names[name])]
                if name != "dem":
                    assert list(at.days) == [i.days for i in images]
                if len(array.shape) == 5:
                    first = images[:: array.shape[1]]
                    assert (list(at.lon), list(at.lat)) == ([i.lon for i in first], [i.lat for i in first])
                    assert list(at.local) == ["0", "1"]
            assert (grid.lon, grid.lat) == parse_image_name(flat(names["dem"])[0])[1:3]


def test_the_file_gives_the_same_index_back_and_reads_as_a_table(shards, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    table = to_table(survey_shard(str(p)) for p in sorted(folder.glob("*.tar")))
    write_index(table, str(folder / "index.parquet"))
    before, after = to_index(table), to_index(read_index(str(folder / "index.parquet")))
    assert list(before) == list(after)
    assert before.fingerprint == after.fingerprint
    rows = pq.read_table(folder / "index.parquet").to_pylist()
    assert len(rows) == 24
    assert rows[0]["shard"] == "example-000000.tar"
    assert rows[5]["missing"] == ["s1_grd", "s5p_co"]
    assert rows[0]["s2_toa"]["shape"] == [2, 3, 13, 40, 40]

    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    assert [g.shard for g in to_index(read_index(str(moved / "index.parquet")))] == [
        g.shard.replace(str(folder), str(moved)) for g in before
    ]


def test_requiring_all_sensors_leaves_the_whole_grids(shards):
    index = index_shards(str(shards))
    assert len(index.having(list(SENSORS), "any")) == 24
    assert len(index.having(list(SENSORS), "all")) == 20
    assert len(index.having(["s2_toa", "dem"], "all")) == 24
    with pytest.raises(InputError, match="no grid with all of the sensors"):
        GridIndex(index.table, index.shards, index.rows[5:6]).having(["s1_grd"], "all")


def test_a_grid_in_two_shards_is_taken_once_and_named(tmp_path):
    write_shards([make_grid(0), make_grid(1)], tmp_path / "a")
    write_shards([make_grid(1), make_grid(2)], tmp_path / "b")
    index = index_shards([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [g.key for g in index] == [make_grid(i).key for i in range(3)]
    (problem,) = index.problems
    assert problem.reason == "duplicate_grid"
    assert problem.where == f"{tmp_path}/b/example-000000.tar:{make_grid(1).key}"


def test_compressed_and_scattered_members_are_read_whole_and_said_to_be(tmp_path, shards):
    key = make_grid(1).key
    contents = {n: d for n, d in members(shards / "example-000000.tar").items() if n.startswith(key)}
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(contents[f"{key}.dem.pth"])) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:  # fmt: skip
        for name in old.namelist():
            new.writestr(name, old.read(name))
    scattered = io.BytesIO()
    array = torch.load(io.BytesIO(contents[f"{key}.s3_olci.pth"]), weights_only=True)
    torch.save(array.transpose(-1, -2).contiguous().transpose(-1, -2), scattered)
    plain = write_tar(tmp_path / "plain" / "a.tar", contents)
    odd = write_tar(
        tmp_path / "odd" / "a.tar",
        contents | {f"{key}.dem.pth": packed.getvalue(), f"{key}.s3_olci.pth": scattered.getvalue()},
    )
    (expected,), (found,) = index_shards(str(plain)), index_shards(str(odd))
    assert {n: at.whole for n, at in found.sensors.items() if at.whole} == {
        "dem": "compressed", "s3_olci": "not contiguous",
    }  # fmt: skip
    from conftest import SIZES

    from copernicus.datasets.slices import DrawReader

    reader = DrawReader(tuple(SENSORS.values()), SIZES)
    for epoch in range(3):
        a, b = reader.read(expected, epoch), reader.read(found, epoch)
        assert b.problems == []
        for name in SENSORS:
            np.testing.assert_array_equal(a.images[name], b.images[name])


@pytest.mark.parametrize("content", [b"", b"no parquet at all", None])
def test_a_file_that_is_no_index_is_refused(tmp_path, content):
    path = tmp_path / "index.parquet"
    if content is None:
        pq.write_table(pq.ParquetFile(io.BytesIO(_some_parquet())).read(), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"index\.parquet is not an index"):
        read_index(str(path))
    with pytest.raises(InputError, match="copernicus data index"):
        read_index(str(tmp_path / "none.parquet"))


def _some_parquet() -> bytes:
    import pyarrow as pa

    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2]}), sink)
    return sink.getvalue()


def test_a_shard_that_changes_while_it_is_read_is_a_problem_not_an_index(tmp_path, monkeypatch):
    (path,) = write_shards([make_grid(0)], tmp_path)
    real = indexing.survey_shard

    def meddling(uri: str):
        from copernicus.datasets import survey

        located = survey._name

        def name_and_touch(*arguments):
            os.utime(path, ns=(1, 1))
            return located(*arguments)

        monkeypatch.setattr(survey, "_name", name_and_touch)
        return real(uri)

    monkeypatch.setattr(indexing, "survey_shard", meddling)
    index = index_shards(str(path))
    assert len(index) == 0
    (problem,) = index.problems
    assert problem.reason == "unreadable"
    assert "changed while" in problem.detail


def test_what_a_reader_of_tar_and_zip_finds_is_what_tarfile_finds(shards):
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            expected = {m.name for m in tar if m.name.endswith(".pth")}
        found = {f"{g.key}.{name}.pth" for g in index_shards(str(path)) for name in g.sensors}
        assert found == expected


def test_shards_of_several_folders_need_a_place_for_their_index(tmp_path: Path):
    with pytest.raises(InputError, match=r"2 folders.*--out"):
        indexing.default_path([str(tmp_path / "a" / "x.tar"), str(tmp_path / "b" / "x.tar")])
    assert indexing.default_path([str(tmp_path / "x.tar")]) == str(tmp_path / "index.parquet")
    assert indexing.default_path(["s3://bucket/f/x.tar"]) == "s3://bucket/f/index.parquet"
