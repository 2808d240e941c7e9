"""Workers that hang for real, each in a process of its own: every kind of standstill leaves stacks and ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from copernicus.platform.hang_watch import EXIT_CODE, HangReports, hang_report, innermost

BEGIN = """
import ctypes, os, sys, threading, time
from pathlib import Path
from copernicus.platform.hang_watch import HangWatch

def watch(rank=0, world_size=1, seconds=0.5, grace_s=2.0, **more):
    return HangWatch(seconds, Path(sys.argv[1]), "first", rank, world_size, grace_s=grace_s, **more)
"""


def worker(folder: Path, body: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + textwrap.dedent(body), str(folder), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def end(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output, errors. A worker that hangs for good fails the test."""
    try:
        out, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the worker hung although it was watched")
    return process.returncode, out, errors


def stacks(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "stacks").glob("*"))}


HANGS = {
    "sleep": "def stuck(): time.sleep(1000)",
    "lock": "lock = threading.Lock(); lock.acquire()\ndef stuck(): lock.acquire()",
    "pipe": "ends = os.pipe()\ndef stuck(): os.read(ends[0], 1)",
    "thread": "def stuck():\n    t = threading.Thread(target=time.sleep, args=(1000,)); t.start(); t.join()",
    "c holding the lock": "def stuck(): ctypes.PyDLL(None).sleep(1000)",
}


@pytest.mark.parametrize("kind", HANGS)
def test_what_hangs_leaves_its_stacks_and_ends(tmp_path, kind):
    reports = HangReports(tmp_path)
    body = HANGS[kind] + "\nwith watch():\n    stuck()"
    code, _, errors = end(worker(tmp_path, body))
    assert code == (1 if kind.startswith("c ") else EXIT_CODE)
    [(name, text)] = stacks(tmp_path).items()
    assert name == "first-rank0.txt"
    assert "in stuck" in text
    assert "stuck (<string>:" in innermost(text)
    if not kind.startswith("c "):
        assert "in stuck" in errors
    report = reports()
    assert "no step for 0.5 s on 1 of 1 workers" in report
    assert "stuck (<string>:" in report
    assert reports() is None  # told once


def test_training_on_another_thread_than_the_first(tmp_path):
    """As in Ray Train, whose first thread waits for calls."""
    body = """
    def train():
        with watch():
            time.sleep(1000)
    thread = threading.Thread(target=train); thread.start(); thread.join()
    """
    assert end(worker(tmp_path, body))[0] == EXIT_CODE
    [text] = stacks(tmp_path).values()
    assert "in join" in text  # the first thread, and not the one that is summed up
    assert innermost(text).startswith("train (<string>:")


def test_slow_but_moving(tmp_path):
    body = """
    with watch(seconds=2.0, grace_s=20.0) as watched:
        for _ in range(12):
            time.sleep(0.5)  # thrice the limit in all
            watched.progress()
    print("done")
    """
    code, out, _ = end(worker(tmp_path, body))
    assert (code, out) == (0, "done\n")
    assert not (tmp_path / "stacks").exists()


def test_moving_again_within_the_grace(tmp_path):
    body = """
    told = []
    with watch(seconds=0.5, grace_s=60.0, tell=told.append) as watched:
        while not told:
            time.sleep(0.05)
        watched.progress()
        while len(told) < 2:
            watched.progress()
            time.sleep(0.05)
    print("\\n".join(told))
    """
    code, out, _ = end(worker(tmp_path, body))
    assert code == 0
    first, second = out.splitlines()
    assert "no step for 0.5 s" in first
    assert "moves again" in second
    assert not (tmp_path / "stacks").exists()


def test_a_watch_whose_driver_does_not_answer_ends_all_the_same(tmp_path):
    body = """
    def tell(text):
        raise ConnectionError("the driver is gone") if sys.argv[2] == "gone" else time.sleep(1000)
    with watch(tell=tell):
        time.sleep(1000)
    """
    for kind in ("gone", "silent"):
        code, _, errors = end(worker(tmp_path / kind, body, kind))
        assert code == EXIT_CODE
        assert list(stacks(tmp_path / kind)) == ["first-rank0.txt"]
        assert ("the driver is gone" in errors) == (kind == "gone")


def test_two_ranks_in_a_collective_of_which_one_hangs(tmp_path):
    body = """
    import torch, torch.distributed as dist
    rank = int(sys.argv[2])
    def stuck(): time.sleep(1000)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/rendezvous", rank=rank, world_size=2)
    with watch(rank, 2, seconds=1.0, grace_s=3.0) as watched:
        for step in range(100):
            if rank == 1 and step == 3:
                stuck()
            dist.all_reduce(torch.ones(1))
            watched.progress()
    """
    reports = HangReports(tmp_path)
    both = [worker(tmp_path, body, str(rank)) for rank in range(2)]
    ended = [end(process) for process in both]
    # The process group's own watch may end a rank sooner when the other's connection closes.
    assert ended[1][0] == EXIT_CODE, ended
    assert ended[0][0] != 0
    assert list(stacks(tmp_path)) == ["first-rank0.txt", "first-rank1.txt"]
    first, waiting, stuck = reports().splitlines()
    assert "on 2 of 2 workers" in first
    assert waiting.startswith("  rank 0 on ")
    assert "all_reduce (distributed_c10d.py:" in waiting
    assert stuck.startswith("  rank 1 on ")
    assert "stuck (<string>:" in stuck


def test_what_killed_workers_leave_is_no_hang(tmp_path):
    body = """
    import signal
    with watch():
        os.kill(os.getpid(), signal.SIGKILL)
    """
    reports = HangReports(tmp_path)
    assert end(worker(tmp_path, body))[0] == -9
    assert len(stacks(tmp_path)) == 1
    assert reports() is None
    assert end(worker(tmp_path, 'with watch(): print("fine")'))[0] == 0
    assert not (tmp_path / "stacks").exists()


def test_stacks_of_earlier_runs_are_not_told(tmp_path):
    assert end(worker(tmp_path, "with watch(): time.sleep(1000)"))[0] == EXIT_CODE
    assert HangReports(tmp_path)() is None


def test_reports_of_broken_files():
    assert innermost("") == innermost("gibberish\nFile") == "no Python code"
    assert "on 1 of ? workers" in hang_report(Path("x"), ["gibberish"])
