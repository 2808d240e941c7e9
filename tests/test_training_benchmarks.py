"""The arithmetic of the training benchmarks: what a stage is, what both sides are asked to do."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_stages_add_up_to_the_first_step():
    from start_latency import stages

    notes = [
        {"t": 101.0, "pid": 1, "name": "python", "event": "start"},
        {"t": 101.5, "pid": 1, "name": "load_experiment", "event": "start"},
        {"t": 109.0, "pid": 2, "name": "python", "event": "start"},  # a worker's
        {"t": 112.0, "pid": 3, "name": "train_worker", "event": "start"},
        {"t": 110.0, "pid": 2, "name": "train_worker", "event": "start"},
        {"t": 113.0, "pid": 2, "name": "post", "event": "end", "rank": 0, "step": 0},
        {"t": 114.0, "pid": 2, "name": "post", "event": "end", "rank": 0, "step": 1},
        {"t": 115.0, "pid": 2, "name": "post", "event": "end", "rank": 0, "step": 2},
    ]
    assert stages(notes, 100.0, {"job accepted": 0.25}) == {
        "job accepted": 0.25, "python starts": 0.75, "imports of the command": 0.5, "worker group started": 8.5,
        "first step": 4.0,
    }  # fmt: skip


def test_a_command_is_noted_and_left_as_it_is(tmp_path):
    """What it does wrong is still said in its words, with its code."""
    marks = tmp_path / "marks.jsonl"
    environment = os.environ | {"PYTHONPATH": str(BENCHMARKS / "starting"), "COPERNICUS_MARKS": str(marks)}
    command = [sys.executable, "-m", "copernicus.platform.cli", "run", "absent.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: absent.yaml: No such file")
    assert [path.name for path in tmp_path.iterdir()] == ["marks.jsonl"]
    notes = [json.loads(line) for line in marks.read_text().splitlines()]
    places = [(n["name"], n["event"]) for n in notes if not n["name"].startswith("import ")]
    assert places == [("python", "start"), ("load_experiment", "start"), ("load_experiment", "end")]


def test_the_places_that_are_noted_exist():
    from start_latency import STAGES

    spec = importlib.util.spec_from_file_location("marks", BENCHMARKS / "starting" / "sitecustomize.py")
    marks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(marks)
    for module, places in marks.WRAPPED.items():
        for place in places:
            assert callable(functools.reduce(getattr, place.split("."), importlib.import_module(module)))
    places = {place for places in marks.WRAPPED.values() for place in places} - {"batches"} | {"python", "first batch"}
    assert {name for _, name, _ in STAGES} <= places


def test_both_sides_take_at_least_the_steps_asked_for():
    from training.cases import CASES, work

    from copernicus.datasets.order import Order

    for case in CASES.values():
        for share in (0.01, 1.0):
            asked = work(case, ("x.tar",), 7, share)
            settings = asked.settings
            assert Order(7, 0, settings.epochs).steps(settings.batch_size) >= asked.steps > asked.skip >= 1
            assert settings.val_fraction == 0
