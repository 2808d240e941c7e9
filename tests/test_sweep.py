"""The coordinator of a sweep, on a real local Ray: cells side by side, one that fails, processes that die, what is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
from pathlib import Path

import psutil
import pytest
from bench_files import write_eurosat

from copernicus.datasets import InputError
from copernicus.platform.cell import Cell
from copernicus.platform.journal import FAILED, FINAL, FINISHED, SEARCH, STOPPED, Journal
from copernicus.platform.schema import Encoder, Model, Space, Sweep
from copernicus.platform.session import ray_session
from copernicus.platform.sweep import SweepFailed, cells, sweep, trial_slots

TINY = Model("copernicus_fm_base", embed_dim=32, depth=2, num_heads=4)
CLASSES = ("River", "Forest", "SeaLake")
KINDS = {"good": {}, "other": {"seed": 1}, "quick": {"protocol": "ridge"}, "broken": {"weights": "nowhere.pth"}}


@pytest.fixture(scope="module", autouse=True)
def session():
    with ray_session():
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Sweep:
    root = tmp_path_factory.mktemp("sweep")
    counts = {"train": (0, 8), "val": (8, 12), "test": (12, 16)}
    listed = {split: [(name, i) for i in range(*span) for name in CLASSES] for split, span in counts.items()}
    write_eurosat(root / "bench/eurosat_s2", listed, size=32)
    return Sweep(
        data=str(root / "bench"), tasks=["eurosat_s2"], cache=str(root / "cache"), image_size={"eurosat_s2": 32},
        encoders={name: Encoder(model=TINY, **options) for name, options in KINDS.items()},
        search={"lr": Space(low=0.01, high=0.5)}, searcher="random", trials=3, seeds=2, epochs=4, batch_size=8,
    )  # fmt: skip


def run(settings: Sweep, folder: Path, **listeners):
    heard: list[str] = []

    def on_trial(cell: Cell, trial) -> None:
        assert trial.cell == cell.key
        heard.append(trial.key)

    journal, failed = sweep(settings, cells(settings, None, None), 0, folder, on_trial, **listeners)
    return journal, failed, heard


@pytest.fixture(scope="module")
def swept(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    return folder, *run(settings, folder)


def test_every_trial_once_and_a_failing_cell_stops_no_other(swept):
    folder, journal, failed, heard = swept
    wanted = [f"eurosat_s2-{e}-{SEARCH}-{n}" for e in ("good", "other") for n in range(3)]
    wanted += [f"eurosat_s2-{e}-{FINAL}-{s}" for e in ("good", "other") for s in (1, 2)]
    wanted += [f"eurosat_s2-quick-{FINAL}-1"]  # closed forms search for themselves and draw nothing
    assert sorted(heard) == sorted(wanted)
    assert {t.status for t in journal.trials.values()} == {FINISHED}
    assert list(failed) == ["eurosat_s2-broken"]
    assert "nowhere.pth" in failed["eurosat_s2-broken"]
    assert "Traceback" in (folder / "eurosat_s2-broken-error.txt").read_text()
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == len(wanted)


def test_the_best_by_validation_is_repeated_and_only_then_tested(swept):
    _, journal, _, _ = swept
    for encoder in ("good", "other"):
        searched = journal.of(f"eurosat_s2-{encoder}", SEARCH)
        best = max(searched, key=lambda t: (t.metrics["val/oa"], -t.number))
        finals = journal.of(f"eurosat_s2-{encoder}", FINAL)
        assert [t.settings for t in finals] == [best.settings] * 2
        assert not any(name.startswith("test/") for t in searched for name in t.metrics)
        assert all(t.metrics["samples/test"] == 12 for t in finals)
        assert all(len(t.curve) == 4 for t in [*searched, *finals])
    tried = [[t.settings for t in journal.of(f"eurosat_s2-{e}", SEARCH)] for e in ("good", "other")]
    assert tried[0] == tried[1], "encoders are tried with the same settings"


@pytest.mark.slow
def test_cells_side_by_side_run_their_own_trials(swept, settings, tmp_path):
    """The same figures as one after the other: Ray keeps functions by name, for all processes of a job."""
    _, beside, _, _ = swept
    two = dataclasses.replace(
        settings, encoders={e: settings.encoders[e] for e in ("good", "other")}, seeds=1, max_concurrent=1
    )
    alone, failed, _ = run(two, tmp_path)
    assert not failed
    for encoder in ("good", "other"):
        pairs = zip(*(j.of(f"eurosat_s2-{encoder}", SEARCH) for j in (beside, alone)), strict=True)
        for a, b in pairs:
            assert b.metrics["val/loss"] == pytest.approx(a.metrics["val/loss"], rel=1e-6)
    losses = [alone.of(f"eurosat_s2-{e}", SEARCH)[0].metrics["val/loss"] for e in ("good", "other")]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_every_protocol_runs_in_a_sweep(settings, tmp_path, monkeypatch):
    """With data and cache by relative paths, as YAMLs give them; one search trial and one seed each."""
    monkeypatch.chdir(Path(settings.data).parent)
    options = {
        "knn": {"protocol": "knn"}, "logistic": {"protocol": "logistic"}, "all": {"protocol": "finetune"},
        "last": {"protocol": "finetune", "blocks": 1}, "lora": {"protocol": "finetune", "lora_rank": 2},
        "scratch": {"protocol": "scratch"},
    }  # fmt: skip
    every = dataclasses.replace(
        settings, data="bench", cache="other_cache", features="live", trials=1, seeds=1, epochs=2,
        encoders={name: Encoder(model=TINY, **kind) for name, kind in options.items()},
    )  # fmt: skip
    journal, failed, _ = run(every, tmp_path)
    assert not failed
    for name in options:
        (final,) = journal.of(f"eurosat_s2-{name}", FINAL)
        assert final.status == FINISHED
        assert 0 <= final.metrics["test/oa"] <= 100
    assert not list(tmp_path.glob("*/epochs"))


@pytest.mark.slow
def test_changed_data_are_not_averaged_with_what_they_were(swept, settings, tmp_path):
    folder, _, _, _ = swept
    copied = tmp_path / "bench"
    shutil.copytree(settings.data, copied)
    own = dataclasses.replace(settings, data=str(copied), encoders={"good": settings.encoders["good"]})
    (tmp_path / "sweep").mkdir()
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "sweep/trials.jsonl").write_text("".join(x for x in lines if '"eurosat_s2-good"' in x))
    run(own, tmp_path / "sweep")  # all is done: this notes what the data are
    listing = copied / "eurosat_s2/eurosat-test.txt"
    listing.write_text("".join(listing.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(InputError, match=r"the files of eurosat_s2 have changed since this sweep began"):
        run(own, tmp_path / "sweep")


def test_a_resumed_sweep_does_what_is_left_and_comes_to_the_same(swept, settings, tmp_path):
    folder, whole, _, _ = swept
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    lost = {f"eurosat_s2-good-{SEARCH}-1", f"eurosat_s2-good-{FINAL}-1", f"eurosat_s2-good-{FINAL}-2", f"eurosat_s2-other-{FINAL}-2"}  # fmt: skip
    kept = [line for line in lines if f"{json.loads(line)['cell']}-{json.loads(line)['role']}-{json.loads(line)['number']}" not in lost]  # fmt: skip
    (tmp_path / "trials.jsonl").write_text("".join(kept) + '{"cell": "eurosat_s2-good", "role')  # cut off by a kill
    journal, failed, heard = run(settings, tmp_path)
    assert set(heard) == set(whole.trials)
    assert set(heard[len(kept) :]) == lost, "what is finished is heard of first, and not run again"
    assert list(failed) == ["eurosat_s2-broken"]
    for key in whole.trials:
        a, b = whole.trials[key], journal.trials[key]
        assert a.settings == b.settings
        same = {k: v for k, v in a.metrics.items() if k != "seconds"}
        assert {k: v for k, v in b.metrics.items() if k != "seconds"} == pytest.approx(same)


@pytest.mark.slow
def test_a_cell_whose_process_dies_is_begun_again(settings, tmp_path):
    killed: list[int] = []

    def on_stage(cell: Cell, stage: str) -> None:
        if stage == "search" and not killed:
            (runner,) = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::CellRunner")]
            os.kill(runner.pid, signal.SIGKILL)
            killed.append(runner.pid)

    one = dataclasses.replace(settings, encoders={"good": settings.encoders["good"]})
    journal, failed, heard = run(one, tmp_path, on_stage=on_stage)
    assert killed
    assert not failed
    assert len(heard) == len(set(heard)) == 3 + 2
    assert {t.status for t in journal.trials.values()} == {FINISHED}


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_run_again(settings, tmp_path):
    """Both in the search, where Tune starts it, and among the seeds."""
    chosen = dataclasses.replace(settings, encoders={"good": settings.encoders["good"]}, trials=1, seeds=1, epochs=2000)
    killed: list[int] = []
    over = threading.Event()

    def kill(names: tuple[str, ...]) -> None:
        begun: dict[int, float] = {}  # processor time before that work: the process may have done other
        while not over.is_set() and names:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if names[0] not in "".join(process.cmdline()):
                        continue
                    spent = process.cpu_times().user
                    if spent > begun.setdefault(process.pid, spent) + 0.2:
                        process.kill()
                        killed.append(process.pid)
                        names = names[1:]
                        begun.clear()
                        break
            over.wait(0.05)

    thread = threading.Thread(target=kill, args=(("ray::ImplicitFunc", "ray::run_trial"),))
    thread.start()
    try:
        journal, failed, heard = run(chosen, tmp_path)
    finally:
        over.set()
        thread.join()
    assert len(set(killed)) == 2
    assert not failed
    assert sorted(heard) == ["eurosat_s2-good-final-1", "eurosat_s2-good-search-0"]
    assert {t.status for t in journal.trials.values()} == {FINISHED}
    whole, _, _ = run(chosen, tmp_path / "undisturbed")
    scores = [{k: {n: v for n, v in t.metrics.items() if n != "seconds"} for k, t in j.trials.items()} for j in (journal, whole)]  # fmt: skip
    assert scores[0] == scores[1]


def test_a_sweep_of_which_nothing_works_fails(settings, tmp_path):
    broken = dataclasses.replace(settings, encoders={"broken": settings.encoders["broken"]})
    with pytest.raises(SweepFailed, match=r"every cell failed; eurosat_s2-broken: .*nowhere\.pth"):
        run(broken, tmp_path)


def test_trials_that_fail_are_kept_and_do_not_take_the_cell_with_them(settings, tmp_path):
    """Of these rates one makes the loss infinite at once."""
    one = dataclasses.replace(
        settings, encoders={"good": settings.encoders["good"]}, searcher="grid", seeds=1,
        search={"lr": Space(values=[1e38, 0.1])},
    )  # fmt: skip
    journal, failed, _ = run(one, tmp_path)
    assert not failed
    first, second = journal.of("eurosat_s2-good", SEARCH)
    assert (first.status, second.status) == (FAILED, FINISHED)
    assert "lower lr" in first.error
    (final,) = journal.of("eurosat_s2-good", FINAL)
    assert final.settings == {"lr": 0.1}
    before = (tmp_path / "trials.jsonl").read_text()
    run(one, tmp_path)
    assert (tmp_path / "trials.jsonl").read_text() == before, "a finished cell is not touched again"


@pytest.mark.slow
def test_asha_stops_what_falls_behind_and_repeats_a_setting_that_was_not_stopped(settings, tmp_path):
    one = dataclasses.replace(
        settings, encoders={"good": settings.encoders["good"]}, searcher="optuna", scheduler="asha", trials=12, epochs=24,
        search={"lr": Space(low=1e-5, high=0.5)},
    )  # fmt: skip
    journal, failed, _ = run(one, tmp_path)
    assert not failed
    searched = journal.of("eurosat_s2-good", SEARCH)
    assert [t.number for t in searched] == list(range(12))
    stopped = [t for t in searched if t.status == STOPPED]
    finished = [t for t in searched if t.status == FINISHED]
    assert stopped
    assert finished
    assert all(len(t.curve) < 24 for t in stopped)
    assert all(len(t.curve) == 24 for t in finished)
    assert journal.of("eurosat_s2-good", FINAL)[0].settings in [t.settings for t in finished]


def test_a_cluster_that_grows_is_asked_for_trials(settings, monkeypatch):
    monkeypatch.setenv("COPERNICUS_AUTOSCALING", "1")
    assert trial_slots(dataclasses.replace(settings, max_concurrent=24, gpus_per_trial=1), [{"CPU": 2.0}]) == 24
    assert trial_slots(dataclasses.replace(settings, gpus_per_trial=1), [{"CPU": 2.0}]) == 8
    assert trial_slots(settings, [{"CPU": 64.0}]) == 64


def test_how_many_trials_fit():
    def slots(*nodes: tuple[float, float], **options) -> int:
        return trial_slots(Sweep(**options), [{"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes])

    assert slots((8, 0)) == 8
    assert slots((8, 0), cpus_per_trial=3) == 2
    assert slots((8, 0), cpus_per_trial=0.1) == 80
    assert slots((64, 2), gpus_per_trial=0.25) == 8
    assert slots((64, 2), gpus_per_trial=0.25, max_concurrent=5) == 5
    assert slots((4, 2), gpus_per_trial=0.25, max_concurrent=50) == 4
    assert slots((4, 0), (3, 0), cpus_per_trial=2) == 3, "a trial lies on one node"
    with pytest.raises(InputError, match=r"asks for 8 CPUs and 0 GPUs, which no node has .the largest: 4 and 0"):
        slots((4, 0), (4, 0), cpus_per_trial=8)
    with pytest.raises(InputError, match=r"asks for 1 CPUs and 1 GPUs, which no node has"):
        slots((4, 0), gpus_per_trial=1)


def test_a_journal_of_another_shape_is_no_trial(tmp_path):
    (tmp_path / "trials.jsonl").write_text('{"key": "x", "run_id": "y"}\n')
    assert Journal(tmp_path / "trials.jsonl").trials == {}


def test_cells_take_the_sweeps_protocol_unless_theirs_says_otherwise(settings):
    plan = cells(dataclasses.replace(settings, protocol="knn"), None, None)
    assert {c.name: c.protocol for c in plan} == {"good": "knn", "other": "knn", "quick": "ridge", "broken": "knn"}
