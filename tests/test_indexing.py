"""The indexing job: resumed after a kill, redone for what has changed, never trusted when stale, full disks."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_grid
from test_run import command, copernicus

from copernicus.datasets.expand import expand
from copernicus.datasets.index import index_shards, read_index, stamps, to_index
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import write_shard, write_shards
from copernicus.platform.indexing import open_index, update_index


def quiet(done: float, total: float, note: str) -> None:
    """No progress bar."""


def small_shards(folder: Path, count: int, per_shard: int = 1) -> list[str]:
    few = tuple(name for name in SENSORS if name not in ("s5p_co", "s5p_o3"))
    return [str(p) for p in write_shards((make_grid(i, few) for i in range(count)), folder, per_shard)]


def test_the_command_says_what_the_shards_hold(tmp_path, shards):
    for shard in shards.glob("*.tar"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    with open(tmp_path / "example-000001.tar", "r+b") as file:
        file.truncate((tmp_path / "example-000001.tar").stat().st_size // 2)
    output = copernicus(tmp_path, "data", "index", ".")
    assert "17 grids in 2 shards" in output or "18 grids in 2 shards" in output
    assert "1 truncated_tar" in output
    assert "example-000001.tar" in output
    assert f"Index: {tmp_path}/index.parquet" in output
    assert "Next: copernicus" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["example-000000.tar", "example-000001.tar", "index.parquet"]
    found = to_index(read_index(str(tmp_path / "index.parquet")))
    assert list(found) == list(index_shards(str(tmp_path)))
    assert {p.reason for p in found.problems} == {"truncated_tar"}


def test_what_is_wrong_with_the_input_leaves_nothing(tmp_path):
    assert "does not exist" in copernicus(tmp_path, "data", "index", "nowhere.tar", code=2)
    small_shards(tmp_path / "a", 1)
    small_shards(tmp_path / "b", 1)
    assert "--out" in copernicus(tmp_path, "data", "index", "a", "b", code=2)
    (tmp_path / "other.parquet").write_text("mine")
    assert "is not an index" in copernicus(tmp_path, "data", "index", "a", "--out", "other.parquet", code=2)
    assert (tmp_path / "other.parquet").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "b", *["example-000000.tar"] * 2, "other.parquet"]


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_read(monkeypatch):
    from rich.console import Console

    from copernicus.platform import data_jobs

    monkeypatch.setattr(data_jobs, "expand", lambda shards: ["hf://datasets/a/b/x.tar"])
    with pytest.raises(InputError, match=r"hf:// can only be read.*--out"):
        data_jobs.index_command(["hf://datasets/a/b"], None, False, Console())


def test_only_what_changed_is_read_again(tmp_path):
    folder = tmp_path / "shards"
    small_shards(folder, 4)
    path = str(folder / "index.parquet")
    first = update_index(expand(str(folder)), path, quiet)
    seen: list[float] = []

    def watch(done: float, total: float, note: str) -> None:
        seen.append(done)

    assert update_index(expand(str(folder)), path, watch).equals(first)
    assert seen == [], "nothing to do"
    write_shard([make_grid(9)], folder / "example-000001.tar")
    write_shard([make_grid(7)], folder / "example-000004.tar")
    again = to_index(update_index(expand(str(folder)), path, watch))
    assert seen == [3, 4, 5], "three were known"
    assert list(again) == list(index_shards(str(folder)))
    (folder / "example-000000.tar").unlink()
    assert list(to_index(update_index(expand(str(folder)), path, watch))) == list(index_shards(str(folder)))


def test_a_stale_index_next_to_the_shards_is_not_used(tmp_path):
    folder, keep = tmp_path / "shards", tmp_path / "keep"
    small_shards(folder, 3)
    shards = expand(str(folder))
    beside = str(folder / "index.parquet")
    update_index(shards, beside, quiet)
    assert list(open_index(shards, None, keep, quiet)) == list(index_shards(shards))
    assert not keep.exists(), "the one next to the shards was good"
    write_shard([make_grid(9)], folder / "example-000001.tar")
    assert [g.key for g in open_index(shards, None, keep, quiet)] == [make_grid(i).key for i in (0, 9, 2)]
    (made,) = keep.glob("*.parquet")
    assert stamps(read_index(str(made)))[shards[1]] != stamps(read_index(beside))[shards[1]]


def test_a_vanished_shard_is_a_problem_by_name(tmp_path):
    shards = small_shards(tmp_path / "shards", 3)
    Path(shards[1]).unlink()
    index = to_index(update_index(shards, str(tmp_path / "index.parquet"), quiet))
    assert len(index) == 2
    assert [(p.where, p.reason) for p in index.problems] == [(shards[1], "unreadable")]
    assert index.grids_seen == 3


@pytest.mark.slow
def test_killed_it_goes_on_where_it_stopped(tmp_path):
    folder = tmp_path / "shards"
    small_shards(folder, 150)
    job = subprocess.Popen(
        command("data", "index", "shards"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = folder / "index.parquet.parts"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and job.poll() is None and len(list(parts.glob("*.parquet"))) < 10:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (folder / "index.parquet").exists()
    kept = {p.name: p.stat().st_ino for p in parts.glob("*.parquet")}
    assert len(kept) >= 10
    first = next(iter(kept))
    (parts / first).write_bytes((parts / first).read_bytes()[:100])  # what a power failure may leave
    copernicus(tmp_path, "data", "index", "shards")
    assert not parts.exists()
    assert list(to_index(read_index(str(folder / "index.parquet")))) == list(index_shards(str(folder)))
    assert pq.read_metadata(folder / "index.parquet").num_rows == 150


@pytest.mark.slow
def test_a_full_disk_is_said_and_leaves_the_old_index(tmp_path):
    small_shards(tmp_path / "shards", 40)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("may not mount a small disk")
    try:
        path = disk / "index.parquet"
        copernicus(tmp_path, "data", "index", "shards/example-000000.tar", "--out", str(path))
        before = path.read_bytes()
        output = copernicus(tmp_path, "data", "index", "shards", "--out", str(path), code=1)
        assert "No space left on device" in output
        assert "Traceback" not in output
        assert path.read_bytes() == before
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert os.listdir(disk) == []


def test_an_index_of_more_shards_serves_some_of_them_and_stays_as_it_is(tmp_path):
    folder = tmp_path / "shards"
    shards = small_shards(folder, 4)
    update_index(shards, str(folder / "index.parquet"), quiet)
    before = (folder / "index.parquet").read_bytes()
    some = [shards[2], shards[0]]
    assert [g.shard for g in open_index(some, None, tmp_path / "keep", quiet)] == some
    assert [g.shard for g in open_index(some, str(folder / "index.parquet"), tmp_path / "keep", quiet)] == some
    assert (folder / "index.parquet").read_bytes() == before
    assert not (tmp_path / "keep").exists()


def test_another_file_of_that_name_next_to_the_shards_does_not_stop_a_run(tmp_path):
    shards = small_shards(tmp_path / "shards", 2)
    (tmp_path / "shards" / "index.parquet").write_text("someone else's")
    assert len(open_index(shards, None, tmp_path / "keep", quiet)) == 2
    assert (tmp_path / "shards" / "index.parquet").read_text() == "someone else's"
    with pytest.raises(InputError, match="is not an index"):
        open_index(shards, str(tmp_path / "shards" / "index.parquet"), tmp_path / "keep", quiet)


def test_the_index_of_a_store_lies_in_that_store():
    from copernicus.datasets.index import default_path

    shards = [f"s3://b/d/{n}.tar?endpoint_override=localhost:9000&scheme=http" for n in "ab"]
    assert default_path(shards) == "s3://b/d/index.parquet?endpoint_override=localhost:9000&scheme=http"
