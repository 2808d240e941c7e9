"""The store of features: whole entries or none, whoever is killed; nothing damaged is used, nothing in use is evicted."""

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from copernicus.platform import eviction
from copernicus.platform.eviction import Lease, contents, evict
from copernicus.platform.feature_store import (
    Damaged,
    Writer,
    faults,
    find,
    finish,
    missing,
    open_entry,
    resume,
    writing,
)

IDS = [f"sample {i}" for i in range(50)]
BATCH = 4


def level(start: int, stop: int) -> np.ndarray:
    """(F 4, B, D 6), told by their place."""
    return (np.arange(4)[:, None, None] * 1e4 + np.arange(start, stop)[None, :, None] * 10 + np.arange(6)).astype("<f4")


def write(folder: Path, start: int, stop: int):
    return Writer(folder, len(IDS)).write(start, [level(start, stop)], np.arange(start, stop) * 3)


def make(entry: Path, pause: float = 0.0) -> int:
    """Write an entry; how many batches there were to write, -1 if it was there."""
    with writing(entry) as folder:
        if folder is None:
            return -1
        chunks = resume(folder, len(IDS))
        todo = missing(chunks, len(IDS), BATCH)
        for start, stop in todo:
            chunks.append(write(folder, start, stop))
            time.sleep(pause)
        finish(folder, chunks, IDS)
        return len(todo)


def is_whole(entry: Path) -> bool:
    opened = open_entry(entry)
    assert opened.ids == tuple(IDS)
    np.testing.assert_array_equal(opened.levels[0], level(0, len(IDS)))
    np.testing.assert_array_equal(opened.targets, np.arange(len(IDS)) * 3)
    return faults(entry) == []


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_feature_store as store
entry = Path(sys.argv[2])
if sys.argv[3] == "make":
    print(store.make(entry, float(sys.argv[4])), flush=True)
else:
    opened = store.open_entry(entry)
    print("open", flush=True)
    time.sleep(60)
"""


def child(entry: Path, what: str, pause: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(entry), what, str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.fixture
def entry(tmp_path) -> Path:
    return tmp_path / "cache/task/train-000000000000000000000123"


def test_an_entry_is_what_was_written_in_any_order(entry):
    with writing(entry) as folder:
        chunks = [write(folder, start, min(start + 7, 50)) for start in (42, 0, 49, 21, 14, 7, 35, 28)]
        assert not entry.exists()
        assert find(entry) is None
        finish(folder, chunks, IDS)
    assert is_whole(entry)
    assert isinstance(open_entry(entry).levels[0], np.memmap)
    assert os.listdir(entry.parent) == [entry.name]
    assert make(entry) == -1


def test_what_is_missing():
    class Done:
        def __init__(self, start, stop):
            self.start, self.stop = start, stop

    assert missing([], 10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert missing([Done(4, 8)], 10, 4) == [(0, 4), (8, 10)]
    assert missing([Done(8, 10), Done(0, 3)], 10, 4) == [(3, 7), (7, 8)]
    assert missing([Done(0, 10)], 10, 4) == []


def test_killed_writers_leave_no_torn_entry_and_their_work_is_kept(entry):
    kills = 0
    for pages in (1, 3, 5):
        process = child(entry, "make", 0.05)
        while process.poll() is None and len(journaled(entry)) < pages:
            time.sleep(0.005)
        kill(process)
        kills += process.returncode == -signal.SIGKILL
        assert find(entry) is None, "whole only when all is there"
    assert kills == 3
    left = make(entry)
    assert 0 < left <= len(range(0, 50, BATCH)) - 5
    assert is_whole(entry)
    assert os.listdir(entry.parent) == [entry.name]


def journaled(entry: Path) -> set[str]:
    lines = set()
    for path in entry.parent.glob(".*.partial/journal-*"):
        try:
            lines.update(path.read_text().splitlines())
        except FileNotFoundError:  # the writer puts several together
            continue
    return lines


def test_what_a_kill_spoilt_is_written_again(entry):
    def interrupted():
        with writing(entry) as folder:
            for start in range(0, 20, BATCH):
                write(folder, start, start + BATCH)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (folder,) = entry.parent.glob(".*.partial")
    with open(folder / "level0.npy", "r+b") as file:  # of samples 8 to 11, in the second flip
        file.seek(file.read().index(level(8, 12)[1].tobytes()) + 5)
        file.write(b"\xff")
    torn = sorted(folder.glob("journal-*"))[-1]
    torn.write_text(torn.read_text() + '[20, 24, {"level')
    assert make(entry) == 8 + 1
    assert is_whole(entry)


def test_two_writers_of_the_same_make_one_entry(entry):
    first, second = child(entry, "make", 0.02), child(entry, "make", 0.02)
    results = sorted(int(process.communicate(timeout=60)[0]) for process in (first, second))
    assert results == [-1, 13], "the second waited, and found it"
    assert is_whole(entry)
    assert os.listdir(entry.parent) == [entry.name]


def test_without_locks_both_write_and_one_is_kept(entry, monkeypatch):
    def refuse(fd, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with writing(entry) as outer:
        chunks = [write(outer, start, min(start + 10, 50)) for start in range(0, 50, 10)]
        assert make(entry) == 13, "another process, meanwhile"
        finish(outer, chunks, IDS)
    assert is_whole(entry)
    assert os.listdir(entry.parent) == [entry.name]


def test_an_error_leaves_nothing(entry):
    def wrong():
        with writing(entry) as folder:
            write(folder, 0, 4)
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        wrong()
    assert os.listdir(entry.parent) == []


def truncate(entry):
    os.truncate(entry / "level0.npy", (entry / "level0.npy").stat().st_size - 1)


def flip_a_byte(entry):
    with open(entry / "level0.npy", "r+b") as file:
        file.seek(-3, 2)
        byte = file.read(1)
        file.seek(-3, 2)
        file.write(bytes([byte[0] ^ 1]))


def other_shape(entry):
    data = (entry / "level0.npy").read_bytes()
    (entry / "level0.npy").write_bytes(data.replace(b"(4, 50, 6)", b"(6, 50, 4)", 1))


def other_ids(entry):
    content = json.loads((entry / "content.json").read_text())
    content["content"] = content["content"].replace("sample 7", "sample 8", 1)
    (entry / "content.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "level0.npy has 4927 bytes, expected 4928"),
        (flip_a_byte, "level0.npy: samples sample 48 .. sample 49 have changed"),
        (other_shape, r"level0.npy holds float32 \(6, 50, 4\), expected <f4 \(4, 50, 6\)"),
        (other_ids, "content.json: its checksum is wrong"),
        (lambda entry: (entry / "content.json").write_text('{"sha256"'), "content.json is not as it was written"),
        (lambda entry: (entry / "content.json").write_bytes(b"\xff\xfe"), "content.json is not as it was written"),
        (lambda entry: (entry / "targets.npy").unlink(), "targets.npy has no bytes, expected"),
        (lambda entry: (entry / "content.json").unlink(), "content.json is missing"),
    ],
)
def test_damage_is_named_and_never_used(entry, caplog, damage, words):
    make(entry)
    damage(entry)
    assert find(entry) is None
    assert entry.is_dir(), "only who holds its lock throws it away"
    if (entry / "content.json").exists():
        (fault,) = faults(entry)
        assert re.search(words, fault)
    with caplog.at_level(logging.WARNING):
        assert make(entry) == 13
    assert str(entry) in caplog.text
    assert re.search(words, caplog.text)
    assert is_whole(entry)


def aged(entry: Path, seconds: float) -> None:
    for path in [*entry.iterdir(), entry]:
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Entries last used 3000, 2000 and 1000 s ago."""
    entries = [tmp_path / f"cache/task{i}/train-{i:024x}" for i in range(3)]
    for i, one in enumerate(entries):
        make(one)
        aged(one, 1000 * (3 - i))
    return entries


def size(entry: Path) -> int:
    return sum(one.bytes for one in contents(entry.parent.parent) if one.path == entry)


def test_the_least_recently_used_go_first(three):
    cache = three[0].parent.parent
    assert evict(cache, 3 * size(three[0])) == []
    assert evict(cache, float("inf")) == []
    open_entry(three[0])  # a use: now the second is the oldest
    aged_now = three[0].joinpath("content.json").stat().st_mtime
    assert time.time() - aged_now < eviction.GRACE_S
    assert evict(cache, 2 * size(three[0])) == [three[1]]
    assert evict(cache, size(three[0])) == [three[2]]
    assert evict(cache, 0) == [], "used a moment ago: its path may be on its way to another process"
    assert is_whole(three[0])


def test_an_entry_in_use_by_another_process_stays_until_that_is_dead(three, caplog):
    cache = three[0].parent.parent
    process = child(three[0], "hold")
    try:
        assert process.stdout.readline() == "open\n"
        aged(three[0], 3000)
        assert sorted(evict(cache, 0)) == three[1:]
        assert "all of it is in use" in caplog.text
        assert is_whole(three[0])
    finally:
        kill(process)
    aged(three[0], 3000)
    assert evict(cache, 0) == [three[0]]


def test_what_is_mapped_can_be_read_after_its_entry_has_gone(three):
    opened = open_entry(three[0])
    eviction.remove(three[0])
    assert not three[0].exists()
    np.testing.assert_array_equal(opened.levels[0], level(0, 50))
    with pytest.raises(FileNotFoundError):
        open_entry(three[0])


def test_a_lease_is_not_given_on_what_is_being_evicted(three, monkeypatch):
    lock = fcntl.flock

    def late(fd, operation):  # the evictor was faster than this lock
        lock(fd, operation)
        eviction.remove(three[0])

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileNotFoundError):
        Lease(three[0] / "content.json")


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not(entry, tmp_path):
    process = child(entry, "make", 10)
    try:
        while not journaled(entry):
            assert process.poll() is None
            time.sleep(0.01)
        (partial,) = entry.parent.glob(".*.partial")
        aged(partial, 2 * eviction.LEFTOVERS_S)
        assert evict(tmp_path / "cache", 0) == []
        assert partial.is_dir()
    finally:
        kill(process)
    aged(partial, 3600)
    assert evict(tmp_path / "cache", float("inf")) == [], "somebody may go on from it"
    aged(partial, 2 * eviction.LEFTOVERS_S)
    assert evict(tmp_path / "cache", float("inf")) == [partial]
    assert [name for name in os.listdir(entry.parent) if not name.endswith(".lock")] == []


def test_a_damaged_content_is_an_error_of_its_own(entry):
    make(entry)
    truncate(entry)
    with pytest.raises(Damaged, match="expected 4928"):
        open_entry(entry)


def test_what_is_not_the_caches_own_is_left_alone(tmp_path):
    """Somebody's folder given as the cache: a repository, the benchmark's own tasks."""
    others = [tmp_path / "project/.git", tmp_path / "bench/eurosat_s2", tmp_path / "runs/train-latest"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / "precious").write_bytes(b"x" * 100_000)
        for path in (folder / "precious", folder):
            os.utime(path, (1, 1))
    assert evict(tmp_path, 0) == []
    assert all((folder / "precious").exists() for folder in others)
