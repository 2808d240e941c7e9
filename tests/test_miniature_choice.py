"""Which tasks a miniature writes: said in a YAML or on the command line, in the words of a sweep."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from copernicus.datasets.bench import TASKS as BENCH_TASKS
from copernicus.datasets.miniature.tasks import TASKS
from copernicus.datasets.sensors import InputError
from copernicus.platform.cli import app
from copernicus.platform.experiment import ExperimentError, load_experiment
from copernicus.platform.schema import Miniature

TEXT = """
name: trial
kind: sweep
miniature: {out: planet, tasks: "${sweep.tasks}"}
sweep:
  data: ${miniature.out}/bench
  tasks: [flood_s1, eurosat_s2]
  encoders:
    random: {weights: none, model: {name: copernicus_fm_base}}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("trial.yaml").write_text(TEXT)
    return lambda *overrides: load_experiment("trial.yaml", overrides)


def test_the_miniature_has_the_benchmarks_tasks_where_the_benchmark_looks_for_them():
    assert {task: folder.directory for task, folder in TASKS.items()} == {
        name: task.directory for name, task in BENCH_TASKS.items()
    }


@pytest.mark.parametrize(
    ("said", "written"),
    [
        (None, list(BENCH_TASKS)),
        (["all"], list(BENCH_TASKS)),
        ([], []),
        (["s5p", "flood_s1"], ["flood_s1", "aq_no2_s5p", "aq_o3_s5p"]),
        (["lc100seg_s3-series", "lc100seg_s3"], ["lc100seg_s3"]),
    ],
)
def test_tasks_are_said_in_a_sweeps_words(said, written):
    assert Miniature(tasks=said).task_names() == written


def test_a_sweep_and_its_miniature_agree(load):
    chosen = load("sweep.tasks=[cloud_s2]").miniature
    assert chosen is not None
    assert chosen.tasks == ["cloud_s2"]
    load("miniature.tasks=[bigearthnet_s1]", "sweep.tasks=[bigearthnet_s2]")  # they share a folder
    with pytest.raises(
        ExperimentError, match=r"miniature\.tasks: lacks flood_s1, which sweep.tasks looks for in planet/b"
    ):
        load("miniature.tasks=[eurosat_s2]")
    with pytest.raises(ExperimentError, match=r"miniature\.tasks: no task or group of tasks 'eurosat'"):
        load("miniature.tasks=[eurosat]")


def test_what_is_written_beside_does_not_change_the_results(load):
    assert load("miniature.tasks=[all]").fingerprint == load().fingerprint
    assert load("miniature.seed=1").fingerprint != load().fingerprint


def test_the_command_names_a_task_that_it_does_not_know(tmp_path):
    out = tmp_path / "planet"
    result = CliRunner().invoke(app, ["data", "miniature", "--out", str(out), "--tasks", "eurosat_s2, cloud"])
    assert isinstance(result.exception, InputError)
    assert "no task or group of tasks 'cloud'" in str(result.exception)
    assert not out.exists()
