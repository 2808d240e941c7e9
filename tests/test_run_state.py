"""What an experiment keeps between commands, and what it says off a terminal."""

import dataclasses
import io
import json
import os
import re

import pytest
from rich.console import Console

from copernicus.datasets.miniature import write
from copernicus.datasets.miniature.pretrain import PretrainScale
from copernicus.datasets.miniature.tasks import TaskScale
from copernicus.platform.progress import progress_bar
from copernicus.platform.run import State, make_miniature, write_atomically
from copernicus.platform.schema import Miniature


def off_terminal() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=160, force_terminal=False), text


def test_a_state_is_on_disk_as_soon_as_it_is_set(tmp_path):
    folder = tmp_path / "not" / "yet"
    state = State(folder)
    assert state.get("run_id") is None
    assert not folder.exists(), "looking creates nothing"
    state.set(run_id="abc", seconds={"sweep": 1.5})
    state.set(done=True)
    again = State(folder)
    assert (again.get("run_id"), again.get("seconds"), again.get("done")) == ("abc", {"sweep": 1.5}, True)
    assert json.loads((folder / "state.json").read_text()) == {"run_id": "abc", "seconds": {"sweep": 1.5}, "done": True}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_atomically(path, "before")

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "after, cut")
    assert path.read_text() == "before"
    write_atomically(path, "after")  # what the killed one left behind is in nobody's way
    assert path.read_text() == "after"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_off_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    console, text = off_terminal()
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    with progress_bar(console, "training") as update:
        for step in range(1, 101):
            clock[0] += 1.0
            update(step, 100, f"loss {1 / step:.2f}")
    lines = text.getvalue().splitlines()
    assert 3 <= len(lines) <= 8, "a line about every 20 seconds"
    assert all(re.fullmatch(r"  training \d+/100 loss.*", line) for line in lines)
    assert lines[-1].startswith("  training 100/100")
    assert "\x1b" not in text.getvalue()


def test_on_a_terminal_progress_is_a_bar():
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    with progress_bar(console, "training") as update:
        update(3, 10, "loss 0.5")
    assert "3/10" in text.getvalue()
    assert "loss 0.5" in text.getvalue()
    assert "\x1b" in text.getvalue()


def test_a_miniature_is_made_once_and_then_found(tmp_path, monkeypatch):
    splits = (("train", 1), ("val", 1), ("test", 1))
    tasks = {name: TaskScale(16, splits) for name in write.SCALES["tiny"].tasks}
    smallest = write.Scale(PretrainScale(1, 1, 1, 1, 16, 8, 4, 64, 2), tasks)
    monkeypatch.setitem(write.SCALES, "tiny", smallest)
    settings = Miniature(str(tmp_path / "planet"), grids=3, seed=1, scale="tiny", tasks=["eurosat_s2"])
    console, text = off_terminal()
    make_miniature(settings, console)
    said, look = text.getvalue().splitlines()[-2:]
    assert look.endswith("preview.png")
    assert "3 grids in 2 shards" in said
    assert "eurosat_s2 3" in said
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "planet").rglob("*") if p.is_file()}
    assert sum(p.suffix == ".tar" for p in files) == 2
    make_miniature(settings, console)
    assert text.getvalue().splitlines()[-2:] == [said, look]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "planet").rglob("*") if p.is_file()} == files
    # Tasks are added, and are in the picture then.
    make_miniature(dataclasses.replace(settings, tasks=["eurosat_s2", "aq_no2_s5p-seasonal"]), console)
    assert "tasks: eurosat_s2 3, aq_no2_s5p 3; in " in text.getvalue().splitlines()[-2]
    now = {p: p.stat().st_mtime_ns for p in (tmp_path / "planet").rglob("*") if p.is_file()}
    assert {p.name for p, written in files.items() if now[p] != written} == {"miniature.json", "preview.png"}
    assert (tmp_path / "planet" / "bench" / "airquality_s5p" / "no2" / "train.csv").exists()
