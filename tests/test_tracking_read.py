"""A leaderboard out of MLflow alone, from a store that MLflow's own client wrote by the contract of tags and metrics."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from boards import plan_cells
from click.testing import Result
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from typer.testing import CliRunner

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import InputError
from copernicus.platform import tracking_read
from copernicus.platform.cli import app
from copernicus.platform.leaderboard import Leaderboard, Score
from copernicus.platform.tracking_read import failures_tag, read_mlflow

TASK_NAMES, ENCODERS, SEEDS = ("eurosat_s2", "aq_no2_s5p"), ("pretrained", 'it\'s "random"'), (1, 2, 3)


def expected() -> Leaderboard:
    scores = []
    for i, task in enumerate(TASK_NAMES):
        for j, encoder in enumerate(ENCODERS):
            for seed in SEEDS:
                value = 3.0 + i + 0.25 * j + 0.01 * seed
                curve = tuple(value + 1 / epoch for epoch in range(1, 5))
                settings = {"lr": 0.1 * 2**-seed, "epochs": 4.0, "blocks": "last 2"}
                scores.append(
                    Score(task, encoder, seed, value, value - 1, settings, "", ("probe", "knn")[j], value + 2, curve)
                )
    return Leaderboard(tuple(scores), plan_cells(TASK_NAMES, ENCODERS, SEEDS))


class Store:
    """Writes runs as a sweep does."""

    def __init__(self, folder: Path):
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment("bench", artifact_location=(folder / "artifacts").as_uri())
        self.clock = 1_700_000_000_000

    def sweep(self, name: str, id_: str, board: Leaderboard, experiment: str | None = None, **tags: str) -> str:
        cells = {"tasks": [t.name for t in board.tasks], "encoders": board.encoders, "seeds": list(SEEDS)}
        tags = {"kind": "sweep", "sweep": name, "sweep_id": id_, "cells": json.dumps(cells)} | tags
        tags = {key: value for key, value in tags.items() if value}
        self.clock += 1000
        return self.client.create_run(experiment or self.experiment, self.clock, tags, name).info.run_id

    def trial(
        self, parent: str, s: Score, sweep: str, id_: str, role: str = "final", status: str = "FINISHED", **tags
    ) -> str:
        metric = TASKS[s.task].metric_key
        tags = {
            "kind": "trial", "task": s.task, "encoder": s.encoder, "protocol": s.protocol, "role": role, "seed": str(s.seed),
            "sweep": sweep, "sweep_id": id_, "trial_key": f"{s.task}-{s.encoder}-{role}-{s.seed}", "weights": "none",
            "git_commit": "abc", "mlflow.parentRunId": parent, **tags,
        }  # fmt: skip
        self.clock += 1000
        run = self.client.create_run(self.experiment, self.clock, tags).info.run_id
        values = {"score": s.test, f"val/{metric}": s.val, "val/loss": 1.0, "val/best_epoch": 3.0, "samples/test": 7.0}
        if role == "final":
            values |= {f"test/{metric}": s.test, f"test/{metric}_batchmean": s.batchmean, "test/loss": 2.0}
        rows = [Metric(k, v, self.clock, len(s.curve)) for k, v in values.items()]
        rows += [Metric(f"val_{metric}", v, self.clock + i, i) for i, v in enumerate(s.curve)]
        params = {**s.settings, "task": s.task, "encoder": s.encoder, "protocol": s.protocol, "model": "vit_small"}
        self.client.log_batch(run, rows, [Param(k, str(v)) for k, v in params.items()], [RunTag("later", "1")])
        if status != "RUNNING":
            self.client.set_terminated(run, status, self.clock + 500)
        return run

    def whole(self, name: str, id_: str, board: Leaderboard, **tags: str) -> dict[tuple[str, str, int], str]:
        parent = self.sweep(name, id_, board, **tags)
        for s in board.scores:
            self.trial(
                parent, dataclasses.replace(s, test=99.0), name, id_, role="search", trial_key=f"search-{s.seed}"
            )
        return {(s.task, s.encoder, s.seed): self.trial(parent, s, name, id_) for s in board.scores}


def bare(board: Leaderboard) -> list[Score]:
    return [dataclasses.replace(s, run_id="") for s in board.scores]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """An empty store: making its tables takes seconds, copying them none."""
    folder = tmp_path_factory.mktemp("template")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def store(template, tmp_path) -> Store:
    (tmp_path / "mlflow.db").write_bytes(template.read_bytes())
    return Store(tmp_path)


def test_the_leaderboard_is_that_of_the_scores(store, monkeypatch):
    monkeypatch.setattr(tracking_read, "PAGE", 5)  # 25 runs are several pages
    runs = store.whole("bench", "id-1", expected())
    title, board = read_mlflow(store.uri)
    assert title == "bench"
    assert bare(board) == list(expected().scores)
    assert [s.settings for s in board.scores] == [s.settings for s in expected().scores]
    assert {(s.task, s.encoder, s.seed): s.run_id for s in board.scores} == runs
    assert board.planned == expected().planned
    assert (board.failures, board.notes, board.missing()) == ({}, (), [])
    assert board.markdown() == expected().markdown()


def test_deleted_runs_do_not_count_and_unfinished_ones_are_missing(store):
    runs = store.whole("bench", "id-1", expected(), failed_cells=failures_tag({"aq_no2_s5p-pretrained": "x" * 9000}))
    store.client.delete_run(runs["eurosat_s2", "pretrained", 2])
    for seed in SEEDS:
        store.client.delete_run(runs["aq_no2_s5p", "pretrained", seed])
        store.client.delete_run(runs["aq_no2_s5p", ENCODERS[1], seed])
    parent = store.client.search_runs([store.experiment], "tags.kind = 'sweep'")[0].info.run_id
    s = next(s for s in expected().scores if s.task == "aq_no2_s5p" and s.encoder == ENCODERS[1])
    store.trial(parent, s, "bench", "id-1", status="RUNNING")
    store.trial(parent, dataclasses.replace(s, seed=2), "bench", "id-1", status="KILLED")
    store.trial(
        parent, dataclasses.replace(s, seed=3), "bench", "id-1", status="FAILED", error="ValueError: no such luck"
    )
    _, board = read_mlflow(store.uri)
    assert board.status("eurosat_s2", "pretrained") == "2 of 3 seeds"
    assert board.status("eurosat_s2", ENCODERS[1]) == ""
    assert board.status("aq_no2_s5p", ENCODERS[1]) == "failed: ValueError: no such luck"
    assert board.status("aq_no2_s5p", "pretrained").startswith("failed: xxx")
    assert "final runs without a score, which count as missing: 1 FAILED, 1 KILLED, 1 RUNNING" in board.notes
    assert len(board.scores) == 5


def test_of_a_trial_that_finished_twice_the_newest_counts_and_that_is_said(store):
    runs = store.whole("bench", "id-1", expected())
    parent = store.client.search_runs([store.experiment], "tags.kind = 'sweep'")[0].info.run_id
    first = expected().scores[0]
    newer = store.trial(parent, dataclasses.replace(first, test=77.0), "bench", "id-1")
    store.trial(parent, dataclasses.replace(first, test=55.0), "bench", "id-1", status="RUNNING")
    _, board = read_mlflow(store.uri)
    (score,) = [s for s in board.scores if (s.task, s.encoder, s.seed) == (first.task, first.encoder, first.seed)]
    assert (score.test, score.run_id) == (77.0, newer)
    assert len(board.scores) == len(runs)
    assert [n for n in board.notes if "more than once" in n and "eurosat_s2 / pretrained, seed 1" in n]


def test_a_trial_that_failed_and_was_run_again_did_not_fail(store):
    store.whole("bench", "id-1", expected())
    parent = store.client.search_runs([store.experiment], "tags.kind = 'sweep'")[0].info.run_id
    first = expected().scores[0]
    store.trial(parent, first, "bench", "id-1", status="FAILED", trial_key="the-first-try", error="full disk")
    _, board = read_mlflow(store.uri)
    assert bare(board) == list(expected().scores)
    assert (board.failures, board.notes) == ({}, ())
    store.trial(parent, dataclasses.replace(first, test=1.0), "bench", "id-1", trial_key="another")
    with pytest.raises(InputError, match="are both of eurosat_s2 / pretrained, seed 1: delete one"):
        read_mlflow(store.uri)


def test_runs_that_lack_something_are_named(store):
    parent = store.sweep("bench", "id-1", expected(), cells="")
    s = expected().scores[0]
    good = store.trial(parent, s, "bench", "id-1")
    unscored = store.trial(parent, dataclasses.replace(s, seed=2, test=math.nan), "bench", "id-1")
    unnamed = store.trial(parent, dataclasses.replace(s, seed=3), "bench", "id-1")
    store.client.delete_tag(unnamed, "task")
    _, board = read_mlflow(store.uri)
    assert [x.run_id for x in board.scores] == [good]
    assert board.planned == {}
    notes = " ".join(board.notes)
    assert f"run {unscored} (eurosat_s2 / pretrained, seed 2) has no test score" in notes
    assert f"run {unnamed} lacks a task" in notes
    assert "what was planned" in notes


def test_sweeps_are_chosen_by_name_or_id_and_joined(store):
    one = Leaderboard(expected().scores[:3], plan_cells(TASK_NAMES[:1], ENCODERS[:1], SEEDS))
    other = Leaderboard(tuple(dataclasses.replace(s, test=s.test + 1) for s in one.scores), one.planned)
    store.whole("first", "aaaaaaaa11", one)
    store.whole("first", "bbbbbbbb22", other)
    store.whole("it's third", "it's'", one)
    with pytest.raises(InputError, match=r"3 sweeps in .*--sweep: .*first \(aaaaaaaa11\)"):
        read_mlflow(store.uri)
    with pytest.raises(InputError, match=r"--sweep: no 'fourth' in .*its sweeps are .*first \(bbbbbbbb22\)"):
        read_mlflow(store.uri, sweeps=["fourth"])
    assert bare(read_mlflow(store.uri, sweeps=["bbbbbbbb22"])[1]) == list(other.scores)
    assert bare(read_mlflow(store.uri, "bench", ["it's third"])[1]) == list(one.scores)
    title, both = read_mlflow(store.uri, sweeps=["first"])
    assert title == "first-bbbbbbbb + first-aaaaaaaa"
    assert both.encoders == ["first-bbbbbbbb/pretrained", "first-aaaaaaaa/pretrained"]
    assert both.values("eurosat_s2", "first-aaaaaaaa/pretrained") == [s.test for s in one.scores]


def test_other_experiments_are_searched_unless_one_is_named(store):
    store.whole("bench", "id-1", expected())
    store.client.create_experiment("empty")
    assert len(read_mlflow(store.uri, "bench")[1].scores) == 12
    with pytest.raises(InputError, match="no sweep in"):
        read_mlflow(store.uri, "empty")
    with pytest.raises(InputError, match=r"--experiment: no 'bensh' in .*bench"):
        read_mlflow(store.uri, "bensh")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("sqlite:///{}/none.db", r"no store .*none\.db"),
        ("sqlite:///{}/text.db", "cannot open"),
        ("sqlite:///{}/empty.db", "no MLflow store"),
        ("postgresql://user:secret@127.0.0.1:1/db", r"cannot open postgresql://user:\*\*\*@"),
        ("http://user:secret@127.0.0.1:1", r"--mlflow http://user:\*\*\*@127"),
    ],
)
def test_what_is_no_store_is_said_and_nothing_is_made(uri, message, tmp_path):
    (tmp_path / "text.db").write_text("this is no database " * 100)
    (tmp_path / "empty.db").touch()
    with pytest.raises(InputError, match=message) as caught:
        read_mlflow(uri.format(tmp_path))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"text.db", "empty.db"}


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["leaderboard", *arguments], catch_exceptions=True)


def test_the_command_rebuilds_everything_from_the_store_alone(store, tmp_path):
    store.whole("bench", "id-1", expected())
    out = str(tmp_path / "built")
    result = command("--mlflow", store.uri, "--sweep", "bench", "--out", out)
    assert result.exit_code == 0, result.output
    assert "3.02 ± 0.01" in result.output
    assert "leaderboard.html" in result.output
    built = {p.name for p in Path(out).iterdir()}
    assert built >= {"leaderboard.html", "leaderboard.csv", "leaderboard.json", "leaderboard_curves.png"}
    assert (tmp_path / "built" / "leaderboard.md").read_text().count("±") > 12
    # What it wrote is a folder as a sweep leaves one.
    again = command(out).output.strip()
    assert again
    assert result.output.startswith(again)


@pytest.mark.parametrize("arguments", [[], ["x", "--mlflow", "sqlite:///y"], ["x", "--sweep", "y"]])
def test_the_command_says_what_it_needs(arguments):
    result = command(*arguments)
    assert isinstance(result.exception, InputError)
    assert "--mlflow" in str(result.exception)
