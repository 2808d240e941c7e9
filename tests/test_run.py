"""The command as a user meets it: whole experiments, resumed, interrupted, wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "copernicus.platform.cli", *arguments]


def interruptible() -> None:
    """In a child before it runs: a background job's shell has Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def copernicus(folder: Path, *arguments: str, code: int = 0) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment, capture_output=True, text=True, timeout=540, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def refused(monkeypatch, capsys, *arguments: object) -> str:
    """What the command, called in this process and its working directory, says of wrong input."""
    from copernicus.platform.cli import main

    monkeypatch.setattr(sys, "argv", ["copernicus", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    said = capsys.readouterr().err
    assert exit_.value.code == 2, said
    return said


def runs(folder: Path) -> dict[str, dict]:
    from copernicus.platform.tracking import Tracker

    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "copernicus")
    found = tracker.client.search_runs([tracker.experiment_id], max_results=1000)
    return {r.info.run_id: {"status": r.info.status, "tags": r.data.tags, "metrics": r.data.metrics} for r in found}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("smoke")
    return folder, copernicus(folder, "run", str(EXPERIMENTS / "quickstart_smoke.yaml"))


def test_the_whole_loop(finished):
    folder, output = finished
    for said in (
        "1/3 miniature Earth",
        "2/3 pretraining",
        "3/3 sweep",
        "Leaderboard",
        "copernicus ui",
        "/#/compare-runs?",
    ):
        assert said in output, output
    (result,) = (folder / "runs").glob("quickstart_smoke-*")
    scores = json.loads((result / "leaderboard.json").read_text())["scores"]
    assert {(s["task"], s["encoder"], s["seed"]) for s in scores} == {
        (task, encoder, seed)
        for task in ("eurosat_s2", "flood_s1")
        for encoder in ("pretrained", "random")
        for seed in (1, 2)
    }
    assert (result / "leaderboard.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list((result / "pictures").glob("*.png"))) == 8


def test_stand_ins_for_language_embeddings_are_said_and_recorded(finished):
    from copernicus.platform.tracking import Tracker

    folder, output = finished
    names = "Sentinel 5P Carbon Monoxide, Sentinel 5P Nitrogen Dioxide, Sentinel 5P Ozone, Sentinel 5P Sulfur Dioxide"
    assert " ".join(output.split()).count("no language embedding for 'Sentinel 5P Carbon Monoxide',") == 1
    tracker = Tracker(f"sqlite:///{folder}/mlflow.db", "copernicus")
    found = tracker.client.search_runs([tracker.experiment_id], "tags.kind = 'pretrain'")
    assert [r.data.params["language"] for r in found] == [f"stand-in: {names}, Copernicus Digital Elevation Model"]


def test_every_run_is_recorded_once_and_ended(finished):
    folder, _ = finished
    found = runs(folder)
    assert {r["status"] for r in found.values()} == {"FINISHED"}
    kinds = [r["tags"]["kind"] for r in found.values()]
    assert {k: kinds.count(k) for k in set(kinds)} == {"pipeline": 1, "pretrain": 1, "sweep": 1, "trial": 4 * (2 + 2)}
    by_kind = {r["tags"]["kind"]: (run_id, r) for run_id, r in found.items()}
    parent = by_kind["pipeline"][0]
    assert by_kind["pretrain"][1]["tags"]["mlflow.parentRunId"] == parent
    assert by_kind["sweep"][1]["tags"]["mlflow.parentRunId"] == parent
    trials = [r for r in found.values() if r["tags"]["kind"] == "trial"]
    assert all(t["tags"]["mlflow.parentRunId"] == by_kind["sweep"][0] for t in trials)
    assert len({t["tags"]["trial_key"] for t in trials}) == len(trials)
    for trial in trials:
        tested = any(name.startswith("test/") for name in trial["metrics"])
        assert tested == (trial["tags"]["role"] == "final"), "the test split is opened for the final estimate only"
    assert by_kind["pretrain"][1]["metrics"]["val/loss"] > 0
    assert len(by_kind["pretrain"][1]["tags"]["data_fingerprint"]) == 16


def test_a_finished_experiment_is_not_run_again(finished):
    folder, _ = finished
    before = runs(folder)
    output = copernicus(folder, "run", str(EXPERIMENTS / "quickstart_smoke.yaml"))
    assert "is finished" in output
    assert "/#/compare-runs?" in output
    assert runs(folder).keys() == before.keys()


def test_leaderboard_command(finished):
    folder, _ = finished
    (result,) = (folder / "runs").glob("quickstart_smoke-*")
    output = copernicus(folder, "leaderboard", str(result))
    assert "EuroSAT-S2" in output
    assert "random" in output


def test_wrong_input_leaves_nothing_behind(tmp_path):
    output = copernicus(tmp_path, "run", str(EXPERIMENTS / "quickstart.yaml"), "sweep.tasks=[eurosat_s9]", code=2)
    assert "sweep.tasks[0]: no 'eurosat_s9'; did you mean 'eurosat_s2'?" in output
    assert len(output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def pretraining(folder: Path, shards: Path, name: str) -> Path:
    """An experiment that takes long enough to be interrupted."""
    model = "{name: copernicus_fm_base, embed_dim: 32, depth: 2, num_heads: 4, decoder_embed_dim: 32, decoder_depth: 1, decoder_num_heads: 4}"
    sizes = "{s1_grd: 32, s2_toa: 32, s3_olci: 16, s5p_co: 8, s5p_no2: 8, s5p_o3: 8, s5p_so2: 8, dem: 128}"
    text = (
        f"name: {name}\nkind: pretrain\npretrain:\n  shards: [{shards}]\n  model: {model}\n  image_size: {sizes}\n"
        "  epochs: 12\n  draws_per_grid: 2\n  batch_size: 8\n  blr: 0.03\n  warmup_epochs: 1\n  val_fraction: 0.1\n"
    )
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def final_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    (result,) = (folder / "runs").glob(f"{name}-*")
    state = json.loads((result / "state.json").read_text())
    return torch.load(state["checkpoint"], weights_only=True)["model"]


FEW = ("pretrain.sensors=[s1_grd,s2_toa,s5p_o3]", "pretrain.epochs=25")
"""A step costs a fifth of one with all eight, and there are more."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, shards) -> dict[str, torch.Tensor]:
    """What the experiment comes to when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("whole")
    copernicus(folder, "run", str(pretraining(folder, shards, "whole")), *FEW)
    return final_weights(folder, "whole")


@pytest.mark.slow
@pytest.mark.alone
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(tmp_path, shards, uninterrupted):
    """By Ctrl-C, and, gone on, by kill -9."""
    broken = pretraining(tmp_path, shards, "broken")
    checkpoints: set[Path] = set()
    for how in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(
            command("run", str(broken), *FEW),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=interruptible,
        )
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and process.poll() is None:
                if set(tmp_path.glob("runs/broken-*/pretrain/checkpoint_2*")) - checkpoints:
                    break
                time.sleep(0.2)
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(1)
            process.send_signal(how)
            code = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                process.kill()
        assert code == (130 if how == signal.SIGINT else -signal.SIGKILL)
        checkpoints = set(tmp_path.glob("runs/broken-*/pretrain/checkpoint_2*"))
        before = runs(tmp_path)
        interrupted = [i for i, r in before.items() if r["tags"]["experiment"] == "broken"]
        assert len(interrupted) == 1
        if how == signal.SIGINT:
            assert before[interrupted[0]]["status"] == "KILLED"
    output = copernicus(tmp_path, "run", str(broken), *FEW)
    assert f"Going on with the MLflow run {interrupted[0]}" in output
    after = runs(tmp_path)
    assert after.keys() == before.keys(), "a resumed experiment goes on in the same run"
    assert after[interrupted[0]]["status"] == "FINISHED"

    from copernicus.platform.tracking import Tracker

    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "copernicus")
    steps = [step for step, _ in tracker.history(tracker.find(interrupted[0]), "train/loss")]
    assert steps == list(range(1, steps[-1] + 1)), "every step's figures once, none lost"
    expected, got = uninterrupted, final_weights(tmp_path, "broken")
    assert expected.keys() == got.keys()
    assert [k for k in expected if not torch.equal(expected[k], got[k])] == []
