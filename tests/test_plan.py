"""The plan against torch's own counts, a real checkpoint, bytes really read, and its refusals."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import SIZES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from copernicus.datasets.index import index_shards, read_index, to_index, to_table, write_index
from copernicus.datasets.order import Order
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.survey import survey_shard
from copernicus.models import create_model
from copernicus.models.distillation import RGB_SENSOR, imitation_loss, rgb_view
from copernicus.models.flops import Image, Shape, autoencoder, forward_flops, training_flops
from copernicus.models.masked_autoencoder import MaskedAutoencoder, parameter_groups
from copernicus.platform.cli import app
from copernicus.platform.experiment import load_experiment
from copernicus.platform.measured import GIVEN, Constant
from copernicus.platform.model_memory import model_size
from copernicus.platform.objective import PerRowLoss, Plan, build_autoencoder, freeze_unreached
from copernicus.platform.parallel import whole_state
from copernicus.platform.plan import Cluster, PretrainPlan, Rate, cluster_of, images, plan_pretrain, step_parts
from copernicus.platform.plan_sweep import plan_sweep
from copernicus.platform.schema import Distill, Experiment, Model, Pretrain

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
TINY = {"embed_dim": 32, "depth": 2, "decoder_embed_dim": 16, "decoder_depth": 1}
CHANNELS = {"s2_toa": 10, "s3_olci": 17}


def counted(model: MaskedAutoencoder, batch: int, sides: dict[str, int]) -> tuple[float, float]:
    """(forward, forward and backward) operations of a step with the student, as torch counts them."""
    masked = []
    for sensor in SENSORS.values():
        side = sides[sensor.name]
        x_BCHW = torch.randn(batch, sensor.channels, side, side)
        noise_BL = torch.rand(batch, (side // sensor.patch_kernel) ** 2)
        chosen = list(range(CHANNELS.get(sensor.name, sensor.channels)))
        masked.append((x_BCHW, sensor, torch.full((batch, 4), torch.nan), noise_BL, chosen))
    # Attention spelled out: the counter knows its products, not the fused kernel of the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        rgb = rgb_view(masked[1][0], None)
        losses, (tokens_BTD,) = model.losses([model.hide(*given) for given in masked], [rgb])
        student = imitation_loss(model, tokens_BTD, lambda x: torch.zeros(batch, 1, 24), rgb.x_BCHW)
        forward = counter.get_total_flops()
        (sum(loss.sum() for loss in losses) + student.sum()).backward()
        return forward, counter.get_total_flops()


@pytest.mark.parametrize("recompute", [False, True])
def test_operations_are_those_that_torch_counts(recompute):
    sides = SIZES | {"s1_grd": 64, "dem": 256}
    model = create_model("copernicus_fm_base_mae", num_heads=2, decoder_num_heads=2, distill_dim=24, **TINY)
    model.recompute = recompute
    shown = [Image(s, CHANNELS.get(n, s.channels), sides[n]) for n, s in SENSORS.items()]
    parts = autoencoder(Shape(**TINY, distill_dim=24), shown, Image(RGB_SENSOR, 3, sides["s2_toa"]))
    for batch in (1, 3):
        forward, both = counted(model, batch, sides)
        assert forward_flops(parts, batch) == forward
        assert training_flops(parts, batch, recompute) == pytest.approx(both, rel=0.002)


def test_a_run_s_step_is_what_its_settings_say():
    """All sensors at their sizes, with the mean of the bands that steps draw. LOG.md: at batch 64, with the
    student, 103 ms at 26.2 % of 989 TFLOP/s."""
    shown = {image.sensor.name: image for image in images(Pretrain(shards=["x"], image_size={"dem": 448}))}
    assert shown["s2_toa"].channels == 11.5  # of 10, 11, 12, 13
    assert shown["s3_olci"].channels == 18.5  # of 16..21
    assert shown["s1_grd"].channels == 2
    assert shown["dem"].tokens == 49
    assert step_parts(Pretrain(shards=["x"]))[2] == 0
    _, parts, teacher = step_parts(Pretrain(shards=["x"], distill=Distill("folder")))
    assert training_flops(parts, 64) == pytest.approx(0.103 * 0.262 * 989e12, rel=0.015)
    assert teacher == pytest.approx(46e9, rel=0.05)  # a ViT-B on 256 tokens


def checkpoint_of(settings: Pretrain, folder: Path) -> int:
    """Bytes of a file with what a run saves after a step."""
    sensors = tuple(SENSORS[name] for name in settings.sensors)
    sizes = {s.name: settings.image_size.get(s.name, s.image_size) for s in sensors}
    plan = Plan(settings, 0, Order(8), sensors, sizes, (), 8)
    module = PerRowLoss(build_autoencoder(plan), sensors)
    freeze_unreached(module, plan)
    optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    weights, state = whole_state(module, optimizer)
    torch.save({"model": weights, "optimizer": state, "step": 1}, folder / "checkpoint.pt")
    return (folder / "checkpoint.pt").stat().st_size


@pytest.mark.parametrize("sensors", [list(SENSORS), ["s2_toa"], ["dem"]])
def test_a_checkpoint_is_as_large_as_predicted(tmp_path, sensors):
    model = Model("copernicus_fm_base", **TINY, num_heads=2, decoder_num_heads=2)
    settings = Pretrain(shards=["x"], model=model, image_size=SIZES, sensors=sensors)
    plan = plan_pretrain(Experiment(pretrain=settings), settings, cluster())
    assert plan.size.checkpoint_bytes == pytest.approx(checkpoint_of(settings, tmp_path), rel=0.01)


def test_a_large_model_is_laid_out_without_memory():
    size = model_size("copernicus_fm_base", {})
    model = create_model("copernicus_fm_small_mae")
    small = model_size("copernicus_fm_small", {})
    assert small.parameters == sum(p.numel() for p in model.parameters())
    assert small.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert size.state_bytes("ddp", 8) == (size.parameters * 4 + size.trained * 12, 0)
    kept, whole = size.state_bytes("fsdp", 8)
    assert kept + whole < size.state_bytes("ddp", 8)[0]


def cluster(**changes) -> Cluster:
    given = Constant(1000.0, GIVEN, "")
    return dataclasses.replace(Cluster("h100", 2, 8, given, given), **changes)


def planned(changes: dict | None = None, **others) -> PretrainPlan:
    settings = Pretrain(**{"shards": ["s3://bucket/data"], "data_cpus": 1e6, "batch_size": 128, **(changes or {})})
    return plan_pretrain(Experiment(pretrain=settings), settings, cluster(**others))


@pytest.mark.parametrize("indexed", [False, True])
def test_bytes_of_a_sample_are_those_really_read(shards, tmp_path, indexed):
    """Against what the system says that this process read."""
    index = index_shards(str(shards))
    settings = Pretrain(shards=[str(shards)], image_size=SIZES)
    if indexed:
        write_index(
            to_table(survey_shard(str(p)) for p in sorted(shards.glob("*.tar"))), str(tmp_path / "index.parquet")
        )
        settings = dataclasses.replace(settings, index=str(tmp_path / "index.parquet"))
    plan = plan_pretrain(Experiment(pretrain=settings), settings, cluster())
    reader = Plan(settings, 0, Order(24), tuple(SENSORS.values()), SIZES, (), 24).reader(augment=True)
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("needs Linux's /proc/self/io")
    grids = list(index)
    before = int(re.findall(r"rchar: (\d+)", counter.read_text())[0])
    reader.batch([(grid, 0, 0) for grid in grids])
    read = int(re.findall(r"rchar: (\d+)", counter.read_text())[0]) - before
    assert plan.data.sample_bytes == pytest.approx(read / len(grids), rel=0.01)
    assert plan.data.grids == len(grids) == 24
    assert plan.data.stored_bytes == sum(p.stat().st_size for p in shards.glob("*.tar"))
    assert ("index" in plan.data.source) == indexed


def test_bytes_of_the_published_set_without_its_files():
    """7.5 MB a row at the published sizes; a whole grid is 47.9 MB (datasets/shards.py), a draw reads 5.8 (LOG.md)."""
    data = planned().data
    assert data.stored_bytes / data.grids == pytest.approx(47.9e6, rel=0.005)
    assert data.sample_bytes == pytest.approx(5.8e6, rel=0.03)
    assert data.remote
    assert 3 <= data.requests <= 8


def test_times_and_rates_agree_with_each_other():
    plan = planned({"epochs": 10, "val_fraction": 0.1, "distill": Distill("folder")})
    assert plan.samples_per_epoch == 279_000
    assert plan.steps == math.ceil(2_790_000 / 128)
    # The measured step: 103 ms at 64 samples with the student; the teacher comes on top.
    assert plan.batch == 64
    assert plan.compute_s == pytest.approx(0.103 + 64 * 46e9 / plan.rate.flops_per_s, rel=0.01)
    assert plan.step_s == pytest.approx(max(plan.compute_s, plan.storage_s))
    assert plan.run_s > plan.steps * plan.step_s
    assert plan.evaluations == 11
    half = planned({"epochs": 10, "val_fraction": 0.1, "distill": Distill("folder"), "batch_size": 256}, workers=4)
    assert half.epoch_s == pytest.approx(plan.epoch_s / 2 * (half.step_s / plan.step_s))


@pytest.mark.parametrize(
    ("changes", "others", "message"),
    [
        ({"data_cpus": 4.0}, {}, r"reading cannot keep up: pretrain.data_cpus=4 .* they need data_cpus=\d+"),
        ({}, {"workers": 8, "read_mb_s": Constant(10.0, GIVEN, "")}, r"storage cannot keep up: a node reads"),
        (
            {"batch_size": 256},
            {"workers": 16, "network_gbit_s": Constant(1.0, GIVEN, "")},
            r"the network cannot keep up",
        ),
        ({"batch_size": 16}, {"workers": 16}, r"1 samples a worker are few"),
        ({"batch_size": 1024}, {"gpu": "t4"}, r"a GPU of 16 GB would need \d+"),
        ({"batch_size": 100}, {"workers": 8}, r"8 workers do not divide a batch of 100"),
    ],
)
def test_what_would_wait_or_not_fit_is_said(changes, others, message):
    found = [w for w in planned(changes, **others).warnings if re.search(message, w)]
    assert len(found) == 1
    calm = planned(read_mb_s=Constant(1e6, GIVEN, ""))
    assert not calm.warnings


def test_reading_that_cannot_keep_up_decides_the_step_and_the_said_number_of_cpus_mends_it():
    slow = planned({"data_cpus": 4.0}, read_mb_s=Constant(1e6, GIVEN, ""))
    assert slow.step_s == slow.reading_s > slow.compute_s
    mended = planned({"data_cpus": float(math.ceil(slow.data_cpus))}, read_mb_s=Constant(1e6, GIVEN, ""))
    assert mended.step_s == mended.compute_s
    assert not mended.warnings


def test_memory_grows_with_the_batch_and_falls_with_checkpointing():
    plan = planned({"distill": Distill("folder")})
    assert plan.state + plan.activations == pytest.approx(25.4e9, rel=0.01)  # LOG.md
    plan = planned()
    more, again = planned({"batch_size": 256}), planned({"batch_size": 128, "activation_checkpointing": True})
    assert more.activations > 1.8 * plan.activations
    assert again.activations < 0.3 * plan.activations
    assert again.compute_s > plan.compute_s


def test_a_measured_rate_is_used_as_it_is():
    rate = Rate(1e12, 0.5, "measured", "here")
    plan = planned({}, rate=rate)
    assert plan.compute_s == pytest.approx(0.5 + plan.step_flops / 1e12)


def test_traffic_is_that_of_a_ring():
    assert planned().traffic == 0  # one node
    ddp = planned({"batch_size": 256}, workers=16)
    assert ddp.traffic == pytest.approx(2 * 15 / 16 * 4 * ddp.size.trained)
    fsdp = planned({"batch_size": 256, "parallel": "fsdp"}, workers=16)
    assert fsdp.traffic == pytest.approx(1.5 * ddp.traffic)


def test_a_sweep_s_passes_and_features_are_those_of_the_log():
    """LOG.md 2026-11-26: cloud_s2 6.29 MB a sample and 50 GB, lc100seg_s3 193 GB; EuroSAT 75,600 passes."""
    tasks = ["sweep.tasks=[cloud_s2, lc100seg_s3, eurosat_s2]"]
    experiment = load_experiment(EXPERIMENTS / "sweep_bench.yaml", tasks, here=False)
    assert experiment.sweep is not None
    cells = {c.cell.key: c for c in plan_sweep(experiment, experiment.sweep, cluster()).cells}
    assert cells["cloud_s2-copernicus_fm"].kept / 1e9 == pytest.approx(50, rel=0.02)
    assert cells["lc100seg_s3-copernicus_fm"].kept / 1e9 == pytest.approx(193, rel=0.02)
    assert cells["eurosat_s2-random"].passes == 4 * 16200 + 5400 + 5400
    assert cells["eurosat_s2-random"].kept == 75_600 * 768 * 4
    assert cells["eurosat_s2-scratch"].passes == 25 * 50 * (16200 + 5400) + 5 * 5400
    assert cells["eurosat_s2-scratch"].kept == 0
    assert cells["cloud_s2-random"].head_flops > cells["cloud_s2-random"].encoder_flops  # UPerNet


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments], standalone_mode=False, catch_exceptions=True)


def test_the_command_prints_a_table_without_data_ray_or_a_trace(tmp_path, monkeypatch):
    monkeypatch.delenv("COPERNICUS_PRETRAIN", raising=False)
    monkeypatch.chdir(tmp_path)
    result = run(str(EXPERIMENTS / "pretrain_base.yaml"), "--workers", "64", "--price", "30")
    assert result.exception is None, result.exception
    for text in (
        "8 nodes",
        "201.1 M",
        "reading cannot keep up",
        "assumed",
        "measured",
        "cost",
        "Nothing was run",
    ):
        assert text in result.output
    assert list(tmp_path.iterdir()) == []
    result = run(str(EXPERIMENTS / "sweep_bench.yaml"), "--workers", "8", "--gpu", "a100", "sweep.tasks=[L1]")
    assert result.exception is None, result.exception
    assert "encoder passes, tuned" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "foo"], r"--gpu: no 'foo'; valid choices: h100, a100, l4, t4, cpu, here"),
        (["--workers", "0"], r"--workers: must be at least 1, it is 0"),
        (["--workers", "1000"], r"--workers 1000 cannot share a global batch of 256"),
        (["--gpus-per-node", "0"], r"--gpus-per-node: must be at least 1"),
        (["--read-rate", "-3"], r"--read-rate: must be positive"),
        (["--price", "nan"], r"--price: must be positive"),
        (["--grids", "0"], r"--grids: must be at least 1"),
        (["--gpu", "t4", "pretrain.precision=bf16"], r"pretrain.precision: --gpu t4 computes no bf16"),
        (["kind=sweep", "pretrain=null"], r"sweep: missing"),
        (["pretrain=null"], r"pretrain: missing"),
        (["pretrain.epochs=none"], r"epochs"),
    ],
)
def test_wrong_input_is_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(str(EXPERIMENTS / "pretrain_base.yaml"), *arguments)
    assert isinstance(result.exception, InputError), result.output
    assert re.search(message, str(result.exception))
    assert "\n" not in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_wrong_input_ends_with_code_2_and_no_traceback():
    command = [
        sys.executable,
        "-m",
        "copernicus.platform.cli",
        "plan",
        str(EXPERIMENTS / "pretrain_base.yaml"),
        "--gpu",
        "foo",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --gpu: no 'foo'")
    assert "Traceback" not in done.stderr


def test_a_plan_on_paper_checks_everything_but_files(tmp_path):
    path = EXPERIMENTS / "pretrain_base.yaml"
    with pytest.raises(InputError, match="no such file"):
        load_experiment(path, ["pretrain.shards=[/nowhere]"])
    assert load_experiment(path, ["pretrain.shards=[/nowhere]"], here=False).pretrain is not None
    with pytest.raises(InputError, match="image_size"):
        load_experiment(path, ["pretrain.image_size.dem=100"], here=False)


def test_options_become_constants_that_say_so():
    given = cluster_of(2, "a100", None, 4, 500.0, None, None, None, None)
    assert (given.workers, given.nodes, given.read_mb_s.status) == (2, 1, GIVEN)
    assert given.network_gbit_s.value == 400


def test_the_made_up_index_is_one(tmp_path, monkeypatch):
    """What the control path's benchmark measures is an index like any other, of the published layout."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    from control_path import made_table

    write_index(made_table(250), str(tmp_path / "index.parquet"))
    index = to_index(read_index(str(tmp_path / "index.parquet")))
    assert (len(index), len(index.shards), len(index.problems)) == (250, 3, 0)
    last = index[249]
    assert last.shard.endswith("example-000002.tar")
    assert last.sensors["s2_toa"].shape == (4, 4, 13, 264, 264)
    assert (len(last.sensors["s2_toa"].days), len(last.sensors["s2_toa"].local)) == (16, 4)
    spans = sorted(
        (at.offset, at.offset + math.prod(at.shape) * (2 if at.dtype == "int16" else 4)) for at in last.sensors.values()
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
