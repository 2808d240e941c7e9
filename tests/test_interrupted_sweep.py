"""Ctrl-C or kill -9 in the middle of a search, a tracking server that is away: nothing is lost, and nothing done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from test_run import command, copernicus, interruptible, runs
from tracking_server import TrackingServer

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


def trials(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines() if line.endswith("}")]
    return [f"{row['cell']}-{row['role']}-{row['number']}" for row in rows]


@pytest.mark.slow
@pytest.mark.alone
def test_an_interrupted_search_is_resumed(tmp_path):
    """By Ctrl-C, and, gone on, by kill -9."""
    write_miniature(tmp_path / "planet", 2, 0, "tiny", tasks=["eurosat_s2"])
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    before: list[str] = []
    for how in (signal.SIGINT, signal.SIGKILL):
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
                if any(
                    len(trials(path.parent)) > len(before)
                    for path in tmp_path.glob("runs/searched-*/sweep/trials.jsonl")
                ):
                    break
                time.sleep(0.05)
            assert process.poll() is None, process.stdout.read().decode()
            process.send_signal(how)
            code = process.wait(timeout=120)
            assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
        finally:
            if process.poll() is None:
                process.kill()
        (folder,) = tmp_path.glob("runs/searched-*/sweep")
        assert trials(folder)[: len(before)] == before
        before = trials(folder)
        assert 1 <= len(before) < 8, "interrupted too late to say anything"
    copernicus(tmp_path, "run", "sweep.yaml")
    after = trials(folder)
    assert len(after) == len(set(after)) == 6 + 2, "no finished trial runs twice"
    assert after[: len(before)] == before
    found = runs(tmp_path)
    keys = [r["tags"]["trial_key"] for r in found.values() if r["tags"]["kind"] == "trial"]
    assert sorted(keys) == sorted(after), "each trial is one MLflow run"
    assert {r["status"] for r in found.values()} == {"FINISHED"}, "none is left running"


@pytest.mark.slow
@pytest.mark.alone
def test_a_tracking_server_that_is_away_costs_no_trial(tmp_path):
    """It dies when the first trial is finished, and comes back when all are."""
    write_miniature(tmp_path / "planet", 2, 0, "tiny", tasks=["eurosat_s2"])
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    with TrackingServer(tmp_path) as server:
        process = subprocess.Popen(
            command("run", "sweep.yaml", f"tracking.uri={server.uri}"),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            journal = Path("nowhere")
            deadline = time.monotonic() + 300
            while time.monotonic() < deadline and process.poll() is None:
                journal = next(tmp_path.glob("runs/searched-*/sweep/trials.jsonl"), journal)
                if journal.exists():
                    break
                time.sleep(0.05)
            server.kill()
            while time.monotonic() < deadline and process.poll() is None and len(trials(journal.parent)) < 6 + 2:
                time.sleep(0.2)
            assert process.poll() is None, process.stdout.read().decode()
            assert len(trials(journal.parent)) == 6 + 2, "the sweep went on without the server"
            server.start()
            output = process.communicate(timeout=240)[0].decode()
            assert process.returncode == 0, output
        finally:
            if process.poll() is None:
                process.kill()
        assert "Leaderboard" in output
        client = MlflowClient(server.uri)
        found = client.search_runs([client.get_experiment_by_name("copernicus").experiment_id])
    trial_runs = [run for run in found if run.data.tags["kind"] == "trial"]
    assert sorted(run.data.tags["trial_key"] for run in trial_runs) == sorted(trials(journal.parent))
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in trial_runs:
        assert "score" in run.data.metrics
        assert "val_oa" in run.data.metrics, "its curve"
