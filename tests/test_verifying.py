"""`copernicus data verify` as a user meets it: the report, exit codes, duplicates, killed and resumed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from shard_faults import change_array, sound_grid, sound_shards, write_tar
from test_run import command, copernicus, refused
from test_slices import members

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.storage import open_file, read_bytes
from copernicus.datasets.verify import SCHEMA, to_table, verify_shard
from copernicus.platform import parts as job
from copernicus.platform.verifying import Summary, _parts, _stamp, verified, verify_shards

FEW = tuple(name for name in SENSORS if name not in ("s5p_co", "s5p_o3"))
"""Lacking: shards of two small members a grid."""


def rows(report: Path) -> list[dict]:
    return pq.read_table(report).to_pylist()


def test_sound_shards(tmp_path):
    paths = sound_shards(tmp_path / "shards", 4, 2)
    output = copernicus(tmp_path, "data", "verify", "shards")
    assert "4 grids in 2 shards" in output
    assert "Report, a row a member: verify.parquet" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards", "verify.parquet"]
    table = pq.read_table(tmp_path / "verify.parquet")
    assert table.schema.equals(SCHEMA)
    alone = [row for path in paths for row in to_table(verify_shard(str(path))).to_pylist()]
    assert table.to_pylist() == alone
    assert len(alone) == 4 * 9
    # The same command again reads all again, and may write over its own report.
    copernicus(tmp_path, "data", "verify", "shards")
    assert rows(tmp_path / "verify.parquet") == alone


def test_faults_give_code_1_and_are_named(tmp_path):
    sound_shards(tmp_path / "a", 2, 2)
    sound_shards(tmp_path / "b", 3, 3)
    path = tmp_path / "b" / "example-000000.tar"
    contents = members(path)
    key = sound_grid(2).key
    change_array(contents, f"{key}.s1_grd.pth", lambda x: 10 ** (x / 10))
    del contents[f"{key}.dem.pth"]
    write_tar(path, contents)
    (tmp_path / "b" / "example-000001.tar").write_bytes(b"no tar" * 1000)
    output = copernicus(tmp_path, "data", "verify", "a", "b", "--out", "report.parquet", code=1)
    assert "Traceback" not in output
    assert "error: faults in 5 of the report's rows: report.parquet" in output
    for said in ("wrong_unit", f"b/example-000000.tar:{key}.s1_grd.pth", "missing_member", "damaged_tar", "other_size"):
        assert said in output, output
    found = [(r["shard"], r["member"] or r["grid"], [f["reason"] for f in r["faults"]]) for r in rows(tmp_path / "report.parquet") if not r["ok"]]  # fmt: skip
    first, second = str(path), str(tmp_path / "b" / "example-000001.tar")
    assert sorted(found) == sorted([
        (first, f"{key}.s1_grd.pth", ["wrong_unit"]), (first, f"{key}.dem.pth", ["missing_member"]),
        (first, sound_grid(0).key, ["duplicate_grid"]), (first, sound_grid(1).key, ["duplicate_grid"]),
        (second, "", ["damaged_tar"]),
    ])  # fmt: skip


def test_wrong_input_gives_code_2_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in copernicus(tmp_path, "data", "verify", "nowhere.tar", code=2)
    sound_shards(tmp_path, 1, 1, FEW)
    assert "no such folder" in refused(monkeypatch, capsys, "data", "verify", ".", "--out", "none/report.parquet")
    assert "is a folder" in refused(monkeypatch, capsys, "data", "verify", ".", "--out", ".")
    before = (tmp_path / "example-000000.tar").read_bytes()
    output = refused(monkeypatch, capsys, "data", "verify", ".", "--out", "example-000000.tar")
    assert "no report of `copernicus data verify`" in output
    assert [p.name for p in tmp_path.iterdir()] == ["example-000000.tar"]
    assert (tmp_path / "example-000000.tar").read_bytes() == before


def test_many_shards_are_read_by_workers_and_give_the_same(tmp_path, monkeypatch):
    import ray

    paths = [str(p) for p in sound_shards(tmp_path, 4, 1, FEW)]
    Path(paths[2]).unlink()
    verify_shards(paths, str(tmp_path / "here.parquet"), quiet)
    monkeypatch.setattr(job, "FEW_SHARDS", 1)
    monkeypatch.delattr(job.Parts, "_here")

    def full(done: float, total: float, note: str) -> None:
        if done:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        verify_shards(paths, str(tmp_path / "there.parquet"), full)
    assert not ray.is_initialized()
    verify_shards(paths, str(tmp_path / "there.parquet"), quiet)
    assert not ray.is_initialized()
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()
    monkeypatch.undo()
    assert job._little(paths)
    assert not job._little(paths * 9), "too many"
    monkeypatch.setattr(job, "FEW_BYTES", Path(paths[0]).stat().st_size)
    assert not job._little(paths), "too large"


def quiet(done: float, total: float, note: str) -> None:
    """No progress bar."""


def test_a_shard_that_vanished_is_a_row_of_its_own(tmp_path):
    paths = [str(p) for p in sound_shards(tmp_path, 3, 1, FEW)]
    Path(paths[1]).unlink()
    summary = verify_shards(paths, str(tmp_path / "report.parquet"), quiet)
    assert (summary.shards, summary.grids, summary.faulty) == (3, 2, 1)
    bad = [row for row in rows(tmp_path / "report.parquet") if not row["ok"]]
    assert [(row["shard"], row["member"], row["faults"][0]["reason"]) for row in bad] == [(paths[1], "", "unreadable")]


def test_the_summary_is_that_of_the_rows(tmp_path):
    paths = sound_shards(tmp_path, 3, 3)
    table = verified(str(paths[0]))
    summary = Summary(f"{tmp_path}/", 1)
    summary.add(table)
    for sensor in SENSORS:
        own = [row for row in table.to_pylist() if row["sensor"] == sensor]
        tally = summary.sensors[sensor]
        assert (tally.members, tally.faulty, tally.noted) == (3, 0, 3)
        assert (tally.low, tally.high, tally.finite) == (min(r["min"] for r in own), max(r["max"] for r in own), 1)
    assert summary.notes == {"other_size": 24}
    assert [place for place, _ in summary.first["other_size"]] == [
        f"example-000000.tar:{sound_grid(0).key}.{sensor}.pth" for sensor in ("dem", "s1_grd", "s2_toa")
    ]


@pytest.mark.slow
def test_killed_it_goes_on_where_it_stopped_and_reports_the_same(ray, tmp_path):
    paths = sound_shards(tmp_path / "shards", 120, 1, FEW)
    contents = members(paths[7])
    change_array(contents, f"{sound_grid(7).key}.s5p_o3.pth", lambda x: x * 2000)
    write_tar(paths[7], contents)
    verify_shards([str(p) for p in paths], str(tmp_path / "whole.parquet"), quiet)

    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    job = subprocess.Popen(
        command("data", "verify", "shards", "--out", "broken.parquet"), cwd=tmp_path, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    parts = tmp_path / "broken.parquet.parts"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and job.poll() is None and len(list(parts.glob("*.parquet"))) < 10:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "broken.parquet").exists()
    kept = sorted(parts.glob("*.parquet"))
    assert 10 <= len(kept) < 120
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # what a power failure may leave

    seen: list[float] = []
    summary = verify_shards(
        [str(p) for p in paths], str(tmp_path / "broken.parquet"), lambda done, total, note: seen.append(done)
    )
    assert seen[0] == len(kept) - 1
    assert seen[-1] == 120
    assert summary.faulty == 1
    assert pq.read_table(tmp_path / "broken.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not parts.exists()


def test_what_was_kept_of_a_shard_that_changed_is_not_used(tmp_path):
    paths = [str(p) for p in sound_shards(tmp_path / "shards", 2, 1, FEW)]
    report = tmp_path / "report.parquet"
    parts = Path(f"{report}.parts")
    verify_shards(paths, str(report), quiet)
    kept = _parts(str(report))
    kept.make(paths, quiet)
    assert len(list(parts.iterdir())) == 2
    contents = members(Path(paths[0]))
    change_array(contents, f"{sound_grid(0).key}.s5p_co.pth", lambda x: x * 2000)
    write_tar(Path(paths[0]), contents)
    seen: list[float] = []
    summary = verify_shards(paths, str(report), lambda done, total, note: seen.append(done))
    assert seen == [1, 2]
    assert summary.faults == {"out_of_range": 1}


@pytest.mark.slow
def test_shards_and_report_in_an_object_store(tmp_path, s3):
    local = sound_shards(tmp_path / "shards", 4, 2)
    uris = s3.bucket.upload(tmp_path / "shards", "data/")
    report = f"s3://{s3.bucket.name}/reports/verify.parquet"
    output = copernicus(tmp_path, "data", "verify", f"s3://{s3.bucket.name}/data", "--out", report)
    assert "4 grids in 2 shards" in output
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
    found = pq.read_table(io.BytesIO(read_bytes(report))).to_pylist()
    there = dict(zip(map(str, local), uris, strict=True))
    expected = [row for path in local for row in to_table(verify_shard(str(path))).to_pylist()]
    assert found == [{**row, "shard": there[row["shard"]]} for row in expected]
    # Everything is read, and little of it twice: the windows around the headers.
    assert sum(p.stat().st_size for p in local) < s3.proxy.sent("GET", "data/") < 1.5 * sum(p.stat().st_size for p in local)  # fmt: skip


def test_a_store_that_refuses_makes_a_row_that_is_asked_for_again(tmp_path, s3):
    (path,) = sound_shards(tmp_path, 1, 1)
    uri = s3.bucket.put("data/example-000000.tar", path.read_bytes())
    s3.proxy.fail("403", path="data/")
    (row,) = verified(uri).to_pylist()
    assert [fault["reason"] for fault in row["faults"]] == ["unreadable"]
    assert _stamp(verified(uri), uri) is None
    s3.proxy.heal()
    assert verified(uri)["ok"].to_pylist() == [True] * 9
    assert _stamp(verified(uri), uri) == open_file(uri).stamp()
