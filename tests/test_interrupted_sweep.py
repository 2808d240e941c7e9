"""Ctrl-C in the middle of a search: the sweep goes on where it stopped, and does nothing twice."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest
from test_run import command, copernicus, interruptible, runs

from copernicus.datasets.miniature import write_miniature

SWEEP = """
name: searched
kind: sweep
sweep:
  data: planet/bench
  tasks: [eurosat_s2]
  encoders:
    random: {weights: none, model: {name: copernicus_fm_base, embed_dim: 32, depth: 2, num_heads: 4}}
  search:
    lr: {low: 0.01, high: 0.1}
  trials: 6
  seeds: 2
  epochs: 400
  image_size: {eurosat_s2: 64}
"""


@pytest.mark.slow
def test_ctrl_c_in_a_search_is_resumable(tmp_path):
    write_miniature(tmp_path / "planet", 2, 0, "tiny")
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    process = subprocess.Popen(
        command("run", "sweep.yaml"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=interruptible,
    )
    try:
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and process.poll() is None:
            if list(tmp_path.glob("runs/searched-*/sweep/trials.jsonl")):
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stdout.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, process.stdout.read().decode()
    finally:
        if process.poll() is None:
            process.kill()
    (folder,) = tmp_path.glob("runs/searched-*/sweep")
    before = [json.loads(line)["key"] for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert 1 <= len(before) < 8, "interrupted too late to say anything"
    assert not list(folder.glob("*/best.json")), "a cut-off search has no best setting"
    copernicus(tmp_path, "run", "sweep.yaml")
    after = [json.loads(line)["key"] for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(after) == len(set(after)) == 6 + 2
    assert after[: len(before)] == before
    found = runs(tmp_path)
    keys = [r["tags"]["trial_key"] for r in found.values() if r["tags"]["kind"] == "trial"]
    assert sorted(keys) == sorted(after), "each trial is one MLflow run"
    assert {r["status"] for r in found.values()} == {"FINISHED"}
