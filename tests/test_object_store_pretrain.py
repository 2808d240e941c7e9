"""Shards on an object store: the same index and draws as from disk, few bytes moved, and what happens when it fails."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from object_store import S3
from test_run import command, pretraining
from test_slices import ALL

from copernicus.datasets import slices, storage
from copernicus.datasets.index import GridIndex, index_shards, read_index, to_index, to_table, write_index
from copernicus.datasets.slices import DrawReader
from copernicus.datasets.survey import survey_shard

READER = DrawReader(ALL, SIZES, seed=1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are not slept, silence is noticed after a second, stamps are asked for again."""
    monkeypatch.setattr(storage, "_pause", lambda seconds: None)
    monkeypatch.setattr("copernicus.datasets.store_arrow.SILENCE_S", 1.0)
    slices._remote_stamp.cache_clear()


@pytest.fixture
def remote(s3: S3, shards: Path) -> GridIndex:
    s3.bucket.upload(shards, "data/")
    return index_shards(f"s3://{s3.bucket.name}/data")


def same(a: slices.Draw, b: slices.Draw) -> bool:
    return all(np.array_equal(a.images[n], b.images[n], equal_nan=True) for n in a.images) and np.array_equal(
        a.metadata, b.metadata, equal_nan=True
    )


def test_index_and_draws_are_those_of_the_local_shards(s3, quick, remote, shards):
    local = index_shards(str(shards))
    assert remote.fingerprint == local.fingerprint
    members = sum(len(grid.sensors) + 1 for grid in local)
    assert s3.proxy.sent("GET", r"\.tar") < 26 * 1024 * members, "headers only"
    assert len(s3.proxy.passed("GET", r"\.tar")) <= 2 * members
    for a, b in zip(local, remote, strict=True):
        assert (a.key, a.sensors, a.lon, a.lat) == (b.key, b.sensors, b.lon, b.lat)
    for number in (0, 5, 13):
        assert same(READER.read(local[number], 2), READER.read(remote[number], 2))


def test_an_index_lies_next_to_the_shards_there_too(s3, quick, remote):
    path = f"s3://{s3.bucket.name}/data/index.parquet"
    write_index(to_table(survey_shard(shard.uri) for shard in remote.shards), path)
    assert list(to_index(read_index(path))) == list(remote)


def test_a_draw_moves_at_most_5_percent_more_than_it_uses(s3, quick, remote):
    used = 0
    s3.proxy.clear()
    for grid in remote:
        used += sum(choice.span()[1] for choice in READER.choose(grid, 7).values())
        assert READER.read(grid, 7).problems == []
    moved = s3.proxy.sent("GET", r"\.tar")
    assert used <= moved <= 1.05 * used


@pytest.mark.parametrize("mode", ["500", "503", "cut", "reset", "short", "hang", "refuse"])
def test_a_store_that_fails_for_a_while_costs_nothing(s3, quick, remote, shards, mode):
    local = index_shards(str(shards))
    s3.proxy.fail(mode, times=3, path=r"\.tar")
    for number in range(3):
        sample = READER.read(remote[number], 3)
        assert sample.problems == []
        assert same(sample, READER.read(local[number], 3))
    assert sum(r.fault == mode for r in s3.proxy.passed("GET")) == 3


def test_a_shard_that_never_answers_is_named_and_the_others_are_read(s3, quick, remote):
    s3.proxy.fail("500", path="example-000001")
    draws = [READER.read(grid, 0) for grid in remote]
    good = [d for d, grid in zip(draws, remote, strict=True) if "000000" in grid.shard]
    bad = [d for d, grid in zip(draws, remote, strict=True) if "000001" in grid.shard]
    assert len(good) == len(bad) == 12
    assert all(d.problems == [] for d in good)
    assert not any(d.present.any() for d in bad)
    for draw in bad:
        assert {p.reason for p in draw.problems} == {"unreadable"}
        assert all("example-000001.tar" in str(p) for p in draw.problems)
        assert all(re.search(r"6 (tries|times)|tried 6", p.detail) for p in draw.problems), draw.problems[0]


def test_an_object_that_was_replaced_is_not_read_with_the_old_offsets(s3, quick, remote, shards):
    other = (shards / "example-000001.tar").read_bytes()
    s3.bucket.put("data/example-000000.tar", other)
    slices._remote_stamp.cache_clear()  # ten minutes later
    sample = READER.read(remote[0], 0)
    (problem,) = sample.problems
    assert problem.reason == "changed"
    assert not sample.present.any()


@pytest.mark.slow
def test_pretraining_goes_through_a_store_that_fails_for_a_while(s3, shards, tmp_path):
    s3.bucket.upload(shards, "data/")
    yaml = pretraining(tmp_path, shards, "remote")
    text = yaml.read_text().replace(str(shards), f"s3://{s3.bucket.name}/data/example-{{000000..000001}}.tar")
    yaml.write_text(text.replace("shards: [", "shards: ['").replace(".tar]", ".tar']"))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    job = subprocess.Popen(
        command("run", str(yaml), "pretrain.epochs=3", "pretrain.sensors=[s2_toa,s5p_o3,dem]"),
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    # A fault every half second at most, none before the last one was met: while Ray starts nothing is read, and faults that had
    # gathered would meet one read at all of its six tries.
    deadline, modes, injected = time.monotonic() + 400, itertools.cycle(("503", "500", "cut", "short")), 0
    while True:
        if injected == sum(bool(r.fault) for r in s3.proxy.passed("GET")):
            s3.proxy.fail(next(modes), times=1, path=r"\.tar")
            injected += 1
        try:
            output, _ = job.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            assert time.monotonic() < deadline
        else:
            break
    assert job.returncode == 0, output
    assert {"503", "500", "cut", "short"} <= {r.fault for r in s3.proxy.passed("GET")}
    assert "skipped" not in output
    (result,) = (tmp_path / "runs").glob("remote-*")
    saved = torch.load(json.loads((result / "state.json").read_text())["checkpoint"], weights_only=True)
    grids = len(index_shards(str(shards)).split(0.1, 0)[0])
    assert saved["samples_seen"] == 3 * 2 * grids
    assert saved["problems"] == []
