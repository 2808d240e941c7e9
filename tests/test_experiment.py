"""The experiment YAML: what is right gives the settings it says; what is wrong gives one line that helps."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import SENSORS
from copernicus.platform.experiment import ExperimentError, load_experiment
from copernicus.platform.schema import Distill, Experiment, Pretrain

EXPERIMENTS = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))

TEXT = """
name: trial
kind: pipeline
seed: 4
miniature: {out: planet, grids: 32}
pretrain:
  shards: ["${miniature.out}/pretrain"]
  model: {name: copernicus_fm_base, embed_dim: 32, depth: 2, num_heads: 4}
  sensors: [s2_toa, dem]
  image_size: {s2_toa: 64}
  epochs: 3
  batch_size: 16
sweep:
  data: ${miniature.out}/bench
  tasks: [eurosat_s2, flood_s1]
  encoders:
    pretrained: {weights: pretrain}
    random: {weights: none}
  search:
    lr: {low: 0.001, high: 1.0}
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Paths in an experiment are relative to the working directory: an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*overrides: str, text: str = TEXT) -> Experiment:
    Path("trial.yaml").write_text(text)
    return load_experiment("trial.yaml", overrides)


def complaint(*overrides: str, text: str = TEXT) -> str:
    with pytest.raises(ExperimentError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert "override" in message or message.startswith("trial.yaml"), "names the file or the override"
    return message


# --- What is right ---------------------------------------------------------------------------------------------------


def test_values_defaults_and_interpolation():
    e = load()
    assert (e.name, e.kind, e.seed) == ("trial", "pipeline", 4)
    assert e.pretrain is not None
    assert e.sweep is not None
    assert e.pretrain.shards == ["planet/pretrain"]
    assert e.sweep.data == "planet/bench"
    assert e.pretrain.model.encoder_overrides() == {"embed_dim": 32, "depth": 2, "num_heads": 4}
    assert e.pretrain.blr == Pretrain().blr
    assert list(e.sweep.encoders) == ["pretrained", "random"]
    assert e.sweep.search["lr"].high == 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        e.pretrain.epochs = 9  # type: ignore[misc]


def test_what_is_written_reads_back_the_same():
    e = load("pretrain.clip_grad_norm=1.5", "sweep.encoders.random.seed=3")
    again = load(text=e.to_yaml())
    assert again == e
    assert again.fingerprint == e.fingerprint


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("pretrain.epochs=5", "pretrain.epochs", 5),
        ("pretrain.blr=1e-3", "pretrain.blr", 0.001),
        ("pretrain.norm_pix_loss=false", "pretrain.norm_pix_loss", False),
        ("pretrain.clip_grad_norm=null", "pretrain.clip_grad_norm", None),
        ("pretrain.sensors=[s1_grd,dem]", "pretrain.sensors", ["s1_grd", "dem"]),
        ("pretrain.betas=[0.9, 0.99]", "pretrain.betas", [0.9, 0.99]),
        ("pretrain.image_size={s2_toa: 96, dem: 128}", "pretrain.image_size", {"s2_toa": 96, "dem": 128}),
        ("pretrain.image_size.dem=64", "pretrain.image_size", {"s2_toa": 64, "dem": 64}),
        ("sweep.tasks[1]=cloud_s3", "sweep.tasks", ["cloud_s3", "eurosat_s2"]),
        ("sweep.search.lr.low=0.01", "sweep.search.lr.low", 0.01),
        ("sweep.encoders.random.model.depth=6", "sweep.encoders.random.model.depth", 6),
        ("tracking.uri=http://127.0.0.1:5000", "tracking.uri", "http://127.0.0.1:5000"),
        ("name=other", "name", "other"),
    ],
)
def test_an_override_sets_its_key_and_no_other(override, path, value):
    def get(e: Experiment):
        found = e
        for part in path.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)  # type: ignore[assignment]
        return found

    plain, changed = load(), load(override)
    assert get(changed) == value
    differing = {k for k in {*plain.parameters(), *changed.parameters()}
                 if plain.parameters().get(k) != changed.parameters().get(k)}  # fmt: skip
    assert all(
        k == path or k.startswith(f"{path}.") or path.startswith("sweep.encoders.random.model") for k in differing
    )


def test_the_last_override_wins_and_a_section_can_be_left_out():
    assert load("seed=1", "seed=2").seed == 2
    alone = load("sweep=null", "kind=pretrain")
    assert alone.sweep is None
    assert load("sweep=null").sweep is None


def test_a_value_may_hold_an_equals_sign():
    assert load("tracking.uri=postgresql://host/db?sslmode=require").tracking.uri.endswith("?sslmode=require")


def test_a_password_is_used_but_not_shown():
    e = load("tracking.uri=postgresql://someone:secret@host/db")
    assert e.tracking.uri == "postgresql://someone:secret@host/db"
    assert "secret" not in e.to_yaml() + str(e.parameters())
    assert e.parameters()["tracking.uri"] == "postgresql://someone:***@host/db"


def test_what_the_environment_hides_is_not_shown_either(monkeypatch):
    monkeypatch.setenv("STORE_SECRET", "hunter2")
    e = load("pretrain.shards=['s3://me:${oc.env:STORE_SECRET}@bucket/a.tar']")
    assert e.pretrain is not None
    assert e.pretrain.shards == ["s3://me:hunter2@bucket/a.tar"]
    assert "hunter2" not in e.to_yaml() + str(e.parameters())


def test_an_override_of_a_section_replaces_it_whole():
    e = load("sweep.search.lr={values: [1e-3, 0.1]}", "sweep.encoders={mine: {weights: none}}")
    assert e.sweep is not None
    assert e.sweep.search["lr"].values == [0.001, 0.1]
    assert e.sweep.search["lr"].low is None
    assert list(e.sweep.encoders) == ["mine"]


def test_environment_variables_are_filled_in(monkeypatch, elsewhere):
    (elsewhere / "bench").mkdir()
    monkeypatch.setenv("BENCH_FOLDER", str(elsewhere / "bench"))
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    e = load("sweep.data=${oc.env:BENCH_FOLDER}", "name=${oc.env:NOT_SET_HERE,fallback}")
    assert e.sweep is not None
    assert e.sweep.data == str(elsewhere / "bench")
    assert e.name == "fallback"


def test_what_the_experiment_makes_need_not_exist_and_what_does_is_found(elsewhere):
    (elsewhere / "weights.pth").write_bytes(b"")
    (elsewhere / "more").mkdir()
    e = load("sweep.encoders.file={weights: weights.pth}", "pretrain.shards=[more, 'planet/pretrain/a-{0..3}.tar']")
    assert e.pretrain is not None
    assert e.pretrain.shards[1] == "planet/pretrain/a-{0..3}.tar"
    assert load("sweep.encoders.hub={weights: hf://someone/model/file.pth}")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: p.stem)
def test_every_experiment_that_is_shipped_is_valid(path, elsewhere, monkeypatch):
    text = path.read_text()
    assert text.startswith("#"), "the header says what it yields, how long it takes, and the command"
    assert f"copernicus run experiments/{path.name}" in text
    for variable in set(re.findall(r"\$\{oc\.env:(\w+)\}", text)):  # such as a folder of downloaded data
        monkeypatch.setenv(variable, str(elsewhere / variable))
    for _ in range(20):
        try:
            e = load_experiment(path)
            break
        except ExperimentError as error:
            missing = re.search(r"no such file or folder: (.+)$", str(error))
            if missing is None or elsewhere not in Path(missing[1]).absolute().parents:
                raise
            Path(missing[1]).mkdir(parents=True)  # data that a reader of the header would have put there
    assert load(text=e.to_yaml()) == e


def test_experiments_are_shipped():
    assert {"quickstart.yaml", "quickstart_smoke.yaml"} <= {p.name for p in EXPERIMENTS}
    names = [yaml.safe_load(p.read_text())["name"] for p in EXPERIMENTS]
    assert len(set(names)) == len(names), "two experiments of one name would share a folder's prefix"


# --- The fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    ["seed=5", "pretrain.epochs=4", "pretrain.blr=1e-3", "pretrain.sensors=[dem]", "sweep.trials=9", "sweep.seeds=4",
     "sweep.encoders.random.seed=1", "sweep.search.lr.high=0.5", "miniature.grids=33", "pretrain.model.depth=3",
     "pretrain.image_size.s2_toa=96", "sweep.preset=published", "pretrain.preset=published", "sweep=null", "pretrain.batch_size=8"],
)  # fmt: skip
def test_the_fingerprint_changes_with_what_changes_results(override):
    assert load(override).fingerprint != load().fingerprint


@pytest.mark.parametrize(
    "override",
    ["tracking.uri=sqlite:///other.db", "tracking.experiment=other", "output=elsewhere", "pretrain.workers=1", "pretrain.workers=[1,4]", "pretrain.micro_batch_size=2", "pretrain.hang_minutes=1", "pretrain.parallel=fsdp", "pretrain.compile=true", "pretrain.activation_checkpointing=true",
     "pretrain.cpus_per_worker=1", "pretrain.data_cpus=0.5", "pretrain.max_failures=0", "pretrain.keep_checkpoints=5",
     "pretrain.checkpoint_every=3", "pretrain.max_skipped=0.5", "sweep.cache=elsewhere", "sweep.cpus_per_trial=2",
     "pretrain.clip_grad_norm=null"],
)  # fmt: skip
def test_the_fingerprint_stays_with_what_does_not(override):
    """So that the same experiment on fewer workers, or with a higher limit, resumes instead of starting anew."""
    assert load(override).fingerprint == load().fingerprint


def test_distillation_is_off_unless_a_teacher_is_named(monkeypatch):
    plain, on = load(), load("pretrain.distill={teacher: hf://facebook/dinov2-base}")
    assert plain.pretrain.distill is None
    assert "distill" not in plain.to_yaml()
    assert on.pretrain.distill == Distill("hf://facebook/dinov2-base", 0.1, None)
    assert load("pretrain.distill.teacher=hf://facebook/dinov2-base") == on
    assert on.fingerprint != plain.fingerprint
    cached = load("pretrain.distill={teacher: hf://facebook/dinov2-base, cache: features}")
    assert cached.fingerprint == on.fingerprint, "a cache changes no result"
    assert (
        load("pretrain.distill.teacher=hf://facebook/dinov2-base", "pretrain.distill.weight=1").fingerprint
        != on.fingerprint
    )
    said = complaint(
        "pretrain.distill={teacher: hf://facebook/dinov2-base}", "pretrain.sensors=[dem]", "pretrain.image_size={}"
    )
    assert "add it to pretrain.sensors" in said
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else real(name, *a)
    )
    assert "pip install 'copernicus-platform[distill]'" in complaint(
        "pretrain.distill={teacher: hf://facebook/dinov2-base}"
    )


# --- What is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain.epochz=5", ["pretrain.epochz: unknown key", "did you mean 'epochs'", "valid keys: shards, geotiffs"]),
        ("pretain.epochs=5", ["pretain: unknown key", "did you mean 'pretrain'", "sweep"]),
        ("zzz=5", ["zzz: unknown key; valid keys: name, kind, seed"]),
        ("pretrain.model.dept=5", ["pretrain.model.dept: unknown key; did you mean 'depth'"]),
        ("sweep.encoders.mine={weigths: none}", ["sweep.encoders.mine.weigths", "did you mean 'weights'", "model, seed"]),
        ("sweep.encoders.random.model={name: copernicus_fm_base, hight: 2}", ["sweep.encoders.random.model.hight"]),
        ("sweep.search.lr.lo=5", ["sweep.search.lr.lo: unknown key; did you mean 'low'", "values"]),
        ("pretrain.epochs=abc", ["pretrain.epochs", "'abc'", "Integer"]),
        ("pretrain.epochs=2.5", ["pretrain.epochs", "2.5", "Integer"]),
        ("pretrain.epochs=", ["pretrain.epochs", "None", "int"]),
        ("pretrain.epochs=???", ["pretrain.epochs", "issing"]),
        ("pretrain.blr=fast", ["pretrain.blr", "fast", "Float"]),
        ("pretrain.distill={}", ["pretrain.distill.teacher: missing", "hf://facebook/dinov2-base"]),
        ("pretrain.distill=yes", ["pretrain.distill: must be a section with the keys teacher, weight, cache"]),
        ("pretrain.distill={teacher: nowhere}", ["pretrain.distill.teacher: no such file or folder: nowhere"]),
        ("pretrain.distill={teacher: ., weight: 0}", ["pretrain.distill.weight: must be positive", "0"]),
        ("pretrain.distill={teacher: ., cache: 's3://b/c'}", ["pretrain.distill.cache: must be a folder", "s3://b/c"]),
        ("pretrain.distill={teacher: ., temperature: 1}", ["pretrain.distill.temperature: unknown key", "weight, cache"]),
        ("pretrain.model=base", ["pretrain.model: must be a section with the keys name, embed_dim", "'base'"]),
        ("pretrain=[1]", ["pretrain: must be a section"]),
        ("sweep.tasks=eurosat_s2", ["sweep.tasks: must be a list", "'eurosat_s2'"]),
        ("pretrain.shards=planet/pretrain", ["pretrain.shards: must be a list"]),
        ("sweep.encoders=[random]", ["sweep.encoders: must be a section"]),
        ("sweep.encoders.random=none", ["sweep.encoders.random: must be a section with the keys weights", "'none'"]),
        ("sweep.search=null", ["sweep.search: must be a section"]),
        ("pretrain.image_size.s2_toa=big", ["pretrain.image_size.s2_toa", "big"]),
        ("pretrain.precision=fp16", ["pretrain.precision: no 'fp16'", "auto, float32, bf16"]),
        ("pretrain.compile=sometimes", ["pretrain.compile", "sometimes"]),
        ("pretrain.parallel=fsdpp", ["pretrain.parallel: no 'fsdpp'; did you mean 'fsdp'", "ddp, fsdp"]),
        ("pretrain.sensors=[dem,s2_tao]", ["pretrain.sensors[1]: no 's2_tao'", "did you mean 's2_toa'", *SENSORS]),
        ("pretrain.sensors=[]", ["pretrain.sensors: empty", *SENSORS]),
        ("pretrain.image_size={s9: 64}", ["pretrain.image_size.s9: no 's9'", *SENSORS]),
        ("pretrain.image_size.s2_toa=65", ["pretrain.image_size.s2_toa", "multiple of the patch kernel 16", "65"]),
        ("sweep.image_size={flood_s1: -16}", ["sweep.image_size.flood_s1", "multiple", "-16"]),
        ("sweep.image_size={flood: 16}", ["sweep.image_size.flood: no 'flood'", *TASKS]),
        ("sweep.tasks=[eurosat_s3]", ["sweep.tasks[0]: no 'eurosat_s3'", "did you mean 'eurosat_s2'", *TASKS]),
        ("sweep.tasks=[]", ["sweep.tasks: empty", *TASKS]),
        ("pretrain.model.name=copernicus_fm_bas", ["pretrain.model.name", "did you mean 'copernicus_fm_base'"]),
        ("sweep.encoders.random.model={name: resnet}", ["sweep.encoders.random.model.name: no 'resnet'"]),
        ("sweep.encoders={}", ["sweep.encoders: empty"]),
        ("sweep.encoders.a|b={weights: none}", ["sweep.encoders.a|b", "letters, digits"]),
        ("sweep.encoders.mine={weights: mine.pth}", ["sweep.encoders.mine.weights: no such file or folder: mine.pth"]),
        ("pretrain.shards=[nowhere]", ["pretrain.shards: no such file or folder: nowhere"]),
        ("pretrain.shards=['nowhere/a-{0..3}.tar']", ["pretrain.shards: no such file or folder", "nowhere"]),
        ("pretrain.shards=[]", ["pretrain.shards: give shard files", "or else geotiffs"]),
        ("sweep.data=nowhere", ["sweep.data: no such file or folder: nowhere"]),
        ("sweep.data=", ["sweep.data"]),
        ("kind=swep", ["kind: no 'swep'", "did you mean 'sweep'", "pretrain, sweep, embed, climate, pipeline"]),
        ("kind=sweep", ["sweep.encoders.pretrained.weights: this experiment pretrains nothing"]),
        ("pretrain=null", ["sweep.encoders.pretrained.model: missing"]),
        ("name=a/b", ["name: use letters", "'a/b'"]),
        ("miniature.scale=huge", ["miniature.scale: no 'huge'", "small, full"]),
        ("miniature.grids=0", ["miniature.grids: must be positive"]),
        ("sweep.searcher=optunaa", ["sweep.searcher", "did you mean 'optuna'", "optuna, random, grid"]),
        ("sweep.searcher=grid", ["sweep.searcher", "values"]),
        ("sweep.search.momentum={low: 0.1, high: 1}", ["sweep.search.momentum", "lr, weight_decay"]),
        ("sweep.search.lr.values=[0.1]", ["sweep.search.lr: give either low and high, or values"]),
        ("sweep.search.lr.low=2", ["sweep.search.lr: needs low < high"]),
        ("sweep.search.lr.low=-1", ["sweep.search.lr: needs low < high (and low > 0 when log)"]),
        ("sweep.preset=publishd", ["sweep.preset", "did you mean 'published'"]),
        ("pretrain.preset=publishd", ["pretrain.preset", "did you mean 'published'", "default, published"]),
        ("pretrain.epochs=0", ["pretrain.epochs: must be positive, it is 0"]),
        ("pretrain.blr=.nan", ["pretrain.blr: must be positive, it is nan"]),
        ("pretrain.warmup_epochs=-1", ["pretrain.warmup_epochs: must be at least 0"]),
        ("pretrain.mask_ratio=1", ["pretrain.mask_ratio", "below 1"]),
        ("pretrain.max_skipped=2", ["pretrain.max_skipped", "between 0 and 1"]),
        ("pretrain.workers=17", ["pretrain.workers: 17 workers cannot share a global batch of 16"]),
        ("pretrain.workers=[2,17]", ["pretrain.workers: 17 workers cannot share a global batch of 16"]),
        ("pretrain.workers=[3,2]", ["pretrain.workers: must be a number above 0 or two, [fewest, most]; it is [3, 2]"]),
        ("pretrain.workers=[1,2,3]", ["pretrain.workers", "[fewest, most]"]),
        ("pretrain.workers=[]", ["pretrain.workers", "[fewest, most]"]),
        ("pretrain.workers=[1]", ["pretrain.workers", "[fewest, most]"]),
        ("pretrain.workers=two", ["pretrain.workers", "it is two"]),
        ("pretrain.workers=0", ["pretrain.workers", "it is 0"]),
        ("pretrain.workers=true", ["pretrain.workers", "it is True"]),
        ("pretrain.micro_batch_size=0", ["pretrain.micro_batch_size"]),
        ("pretrain.hang_minutes=0", ["pretrain.hang_minutes"]),
        ("pretrain.betas=[0.9]", ["pretrain.betas: must be two numbers"]),
        ("pretrain.channel_fraction=[0.9, 0.1]", ["pretrain.channel_fraction"]),
        ("sweep.data=${oc.env:NOT_SET_HERE}", ["sweep.data: the environment variable NOT_SET_HERE is not set"]),
        ("sweep.data=${nothing.here}", ["sweep.data", "nothing"]),
        ("pretrain.epochs", ["override 'pretrain.epochs'", "key=value"]),
        ("=5", ["override '=5'", "key=value"]),
        ("pretrain.betas=[0.9", ["override 'pretrain.betas=[0.9'", "not valid YAML", "quotes"]),
        ("sweep.tasks[7]=cloud_s3", ["override 'sweep.tasks[7]=cloud_s3'", "out of range"]),
    ],
)  # fmt: skip
def test_one_line_names_the_path_and_the_choices(override, expected, monkeypatch):
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    message = complaint(override)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\n  kind: sweep\n", "trial.yaml:2:7: not valid YAML"),
        ("name: [a, b\n", "trial.yaml:2:1: not valid YAML"),
        ("name: a\nname: b\n", "trial.yaml:2:1: not valid YAML: found duplicate key"),
        ("name: a\n\tkind: b\n", "trial.yaml:2:1: not valid YAML"),
        ("- pretrain\n- sweep\n", "trial.yaml: an experiment is a mapping"),
        ("just words", "unknown key"),
        ("", "kind: a pipeline needs at least one of the sections pretrain, sweep"),
        ("kind: pretrain", "pretrain: missing: an experiment of kind pretrain needs this section"),
        ("kind: sweep\npretrain: {}", "sweep: missing"),
        ("1: 2", "1: unknown key"),
    ],
)
def test_a_text_that_is_no_experiment_is_said_to_be_none(text, expected):
    assert expected in complaint(text=text)


def test_yaml_tags_run_nothing(elsewhere):
    assert "not valid YAML" in complaint(text='name: !!python/object/apply:os.system ["touch created"]')
    assert not (elsewhere / "created").exists()


def test_files_that_cannot_be_read(elsewhere):
    with pytest.raises(ExperimentError, match=r"nowhere\.yaml: No such file"):
        load_experiment("nowhere.yaml")
    with pytest.raises(ExperimentError, match="directory"):
        load_experiment(elsewhere)
    (elsewhere / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ExperimentError, match="not UTF-8"):
        load_experiment("binary.yaml")


@pytest.mark.parametrize("command", ["run", "check"])
def test_the_command_complains_once_exits_with_2_and_creates_nothing(command, elsewhere):
    (elsewhere / "trial.yaml").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-m", "copernicus.platform.cli", command, "trial.yaml", "pretrain.epochz=5"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "error: trial.yaml: pretrain.epochz: unknown key; did you mean 'epochs'?" in lines[0]
    assert [p.name for p in elsewhere.iterdir()] == ["trial.yaml"]


def test_check_prints_the_resolved_experiment_and_creates_nothing(elsewhere):
    (elsewhere / "trial.yaml").write_text(TEXT)
    done = subprocess.run(
        [sys.executable, "-m", "copernicus.platform.cli", "check", "trial.yaml", "seed=9"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip().rpartition("\n")
    assert load(text=printed) == load("seed=9")
    fingerprint = load("seed=9").fingerprint  # the same in another process
    assert re.fullmatch(r"[0-9a-f]{8}", fingerprint)
    assert last == f"ok trial.yaml (pipeline, {fingerprint})"
    assert [p.name for p in elsewhere.iterdir()] == ["trial.yaml"]


@pytest.mark.parametrize("words", [["check", "--foo"], ["chek"], ["run"]])
def test_wrong_words_on_the_command_line_are_wrong_input(words, monkeypatch, capsys):
    from copernicus.platform.cli import main

    monkeypatch.setattr("sys.argv", ["copernicus", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("text", ["3\n", "2.5\n", "- a\n", "true\n"])
def test_a_file_that_is_no_mapping_is_said_to_be_none(tmp_path, text):
    (tmp_path / "number.yaml").write_text(text)
    with pytest.raises(ExperimentError, match=r"number\.yaml: an experiment is a mapping"):
        load_experiment(tmp_path / "number.yaml", [])
