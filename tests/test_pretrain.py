"""Pretraining: the schedule, the loss's weights, and whole runs on Ray with good and bad data."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import resource
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES, make_grid

from copernicus.datasets.index import index_shards
from copernicus.datasets.miniature.raw import write_raw
from copernicus.datasets.order import Order
from copernicus.datasets.raw import read_layout
from copernicus.datasets.raw_index import unknown_offsets
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.slices import DrawReader
from copernicus.models import create_model, load_weights
from copernicus.platform.checkpoint import architecture, trained_language
from copernicus.platform.objective import (
    CHECKPOINT_FILE,
    PerRowLoss,
    Plan,
    autocast_dtype,
    build_autoencoder,
    freeze_unreached,
    weigh,
)
from copernicus.platform.pretrain import PretrainFailed, check_resources, offset_warning, pretrain
from copernicus.platform.pretrain_worker import backward, split, written
from copernicus.platform.schema import Model, Pretrain
from copernicus.platform.to_device import tensors

TINY = Model("copernicus_fm_base", embed_dim=32, depth=2, num_heads=4, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)  # fmt: skip
FEW = ["s2_toa", "s3_olci", "s5p_o3"]
"""A step costs a fifth of one with all eight sensors."""
WORDS = {
    f"Sentinel 5P {gas}": np.random.default_rng(len(gas)).standard_normal(2048).astype(np.float32)
    for gas in ("Ozone", "Nitrogen Dioxide")
}
GOLDENS = json.loads((Path(__file__).parent / "goldens" / "index.json").read_text())


def settings(shards: Path, **changes) -> Pretrain:
    given = {"shards": [str(shards)], "model": TINY, "image_size": SIZES, "epochs": 3, "batch_size": 8, "blr": 0.1,
             "warmup_epochs": 1.0, "val_fraction": 0.1}  # fmt: skip
    return Pretrain(**{**given, **changes})


def plan(chosen: Pretrain, grids: int = 20) -> Plan:
    sensors = tuple(SENSORS[name] for name in chosen.sensors)
    sizes = {s.name: chosen.image_size.get(s.name, s.image_size) for s in sensors}
    return Plan(chosen, 0, Order(grids, 0, chosen.epochs), sensors, sizes, (), grids)


def test_learning_rate_is_the_published_schedule():
    golden = GOLDENS["misc"]["lr_sched"]
    assert golden["args"] == {"warmup_epochs": 10, "lr": 3e-4, "min_lr": 0.0, "epochs": 100}
    chosen = Pretrain(shards=["x"], blr=1.5e-4, batch_size=512, epochs=100, warmup_epochs=10)
    steps = Plan(chosen, 0, Order(51200, 0, 100), (), {}, (), 51200)  # 100 steps an epoch
    for epoch, value in golden["values"].items():
        assert steps.learning_rate(round(float(epoch) * 100)) == pytest.approx(value, rel=1e-6, abs=1e-15)


def test_channels_are_the_same_for_all_and_within_the_published_share():
    chosen = plan(Pretrain(shards=["x"]))
    counts = {len(chosen.channels(step, SENSORS["s2_toa"])) for step in range(200)}
    assert counts == {10, 11, 12, 13}  # 75 % of 13 are 9.75; published: int(0.75 x 13) + 1 to 13
    assert {len(chosen.channels(step, SENSORS["s3_olci"])) for step in range(400)} == set(range(16, 22))
    assert chosen.channels(7, SENSORS["s3_olci"]) == plan(Pretrain(shards=["x"])).channels(7, SENSORS["s3_olci"])
    assert chosen.channels(7, SENSORS["s1_grd"]) is None


def test_weigh_averages_over_the_sensors_present():
    loss = torch.tensor([[1.0, 3.0], [5.0, 100.0], [100.0, 100.0]])
    present = torch.tensor([[True, True], [True, False], [False, False]])
    total, rows = weigh(loss, present)
    assert total == (1 + 3) / 2 + 5
    assert rows == 2


def test_freeze_leaves_exactly_what_the_sensors_reach():
    chosen = plan(Pretrain(shards=["x"], model=TINY, sensors=["s2_toa"], image_size=SIZES))
    module = PerRowLoss(build_autoencoder(chosen), chosen.sensors)
    freeze_unreached(module, chosen)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert any("patch_embed_variable" in name for name in frozen)
    assert not any("patch_embed_spectral.fclayer" in name or "blocks" in name for name in frozen)


def test_precision_is_what_was_asked_for_or_refused(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert autocast_dtype("float32", gpu) is autocast_dtype("auto", cpu) is None
        assert autocast_dtype("auto", gpu) is (torch.bfloat16 if able else None)
        for device in (cpu, gpu):
            if able:
                assert autocast_dtype("bf16", device) is torch.bfloat16
            else:
                with pytest.raises(InputError, match=f"pretrain.precision: this {device.type} device computes no bf16"):
                    autocast_dtype("bf16", device)


def test_autocast_holds_inside_the_loss(shards):
    chosen = plan(settings(shards))
    module = PerRowLoss(build_autoencoder(chosen), chosen.sensors)
    batch = tensors(
        chosen.reader(augment=False).batch([(grid, 0, 0) for grid in index_shards(str(shards))][:4]),
        torch.device("cpu"),
    )
    full = module(batch, {})
    module.autocast = torch.bfloat16
    half = module(batch, {})
    assert full.dtype == half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("preset", ["default", "published"])
def test_parts_of_a_batch_add_up_to_its_gradients(shards, preset):
    """Against one pass over all rows; the parts are of unequal size, and one row has no sensor at all."""
    gradients, figures = {}, {}
    for most in (None, 3, 1):
        chosen = plan(settings(shards, micro_batch_size=most, preset=preset))
        module = PerRowLoss(build_autoencoder(chosen), chosen.sensors)
        freeze_unreached(module, chosen)
        grids = index_shards(str(shards)).entries(range(7))
        batch = tensors(chosen.reader(augment=True).batch([*((g, 0, 0) for g in grids), None]), torch.device("cpu"))
        batch["metadata"] = chosen.metadata(batch, 0)
        *figures[most], seconds = backward(chosen, module, batch, 0, torch.tensor(1 / 7))
        assert seconds > 0
        gradients[most] = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert figures[None][2].max() <= 7
    for most in (3, 1):
        torch.testing.assert_close(figures[most], figures[None])
        torch.testing.assert_close(gradients[most], gradients[None], rtol=1e-4, atol=1e-6)


def test_parts_are_no_larger_than_asked_and_lose_no_row():
    batch = {"present": torch.ones(8, 2), "x": torch.arange(8)}
    for most, sizes in ((None, [8]), (8, [8]), (100, [8]), (7, [4, 4]), (3, [3, 3, 2]), (1, [1] * 8)):
        parts = split(batch, most)
        assert [len(part["x"]) for part in parts] == sizes
        assert torch.cat([part["x"] for part in parts]).tolist() == list(range(8))


def test_a_disk_that_takes_no_checkpoint_is_named_and_left_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            written({"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
    folder = Path(written({"model": torch.ones(3)}))
    assert folder.parent == tmp_path
    assert torch.equal(torch.load(folder / CHECKPOINT_FILE, weights_only=True)["model"], torch.ones(3))


def test_too_few_cpus_are_refused_with_the_sum():
    with pytest.raises(InputError, match=r"2 workers x 1.0 CPU \+ 1.0 CPU for reading = 3 CPUs, but the cluster has 2"):
        check_resources(Pretrain(workers=2, cpus_per_worker=1.0), {"CPU": 2.0})
    with pytest.raises(InputError, match="GPU"):
        check_resources(Pretrain(workers=2, cpus_per_worker=0.5, gpus_per_worker=1.0), {"CPU": 8.0, "GPU": 1.0})
    check_resources(Pretrain(workers=[1, 64], cpus_per_worker=1.0), {"CPU": 2.0})


def run(chosen: Pretrain, folder: Path, on_plan=lambda *_: None, recorded: bool = True):
    rows: list[tuple[int, dict[str, float]]] = []

    def on_metrics(step: int, metrics: dict[str, float]) -> bool:
        rows.append((step, metrics))
        return recorded

    return pretrain(chosen, 0, folder, on_metrics, lambda *_: None, on_plan), rows


@pytest.mark.slow
def test_a_published_run_trains_on_whole_grids_with_the_published_loss(ray, shards, tmp_path):
    """The first step's loss against the model's own sum over sensors (which goldens pin), fed by hand."""
    given = settings(
        shards, preset="published", require="all", metadata_drop=0.0, val_fraction=0.0, epochs=1, workers=1
    )
    result, rows = run(given, tmp_path)
    assert result.samples == 20, "four of the 24 grids lack sensors"
    index = index_shards(str(shards)).having(given.sensors, "all")
    chosen = plan(given)
    batch = DrawReader(tuple(SENSORS.values()), SIZES, published=True).batch(
        [(index[chosen.order.locate(position)[2]], 0, 0) for position in range(8)]
    )
    images = {name: torch.from_numpy(batch[f"x_{name}"]) for name in SENSORS}
    images["s3_olci"][:, [0, 9]] *= 1e-9
    model = create_model("copernicus_fm_base_mae", published=True, **TINY.overrides())
    with torch.no_grad():
        losses = model(
            {name: SENSORS[name].normalize(x) for name, x in images.items()},
            SENSORS,
            {name: torch.from_numpy(batch["metadata"][:, i]) for i, name in enumerate(SENSORS)},
            {name: torch.from_numpy(batch[f"noise_{name}"]) for name in SENSORS},
            {name: chosen.channels(0, SENSORS[name]) for name in ("s2_toa", "s3_olci")},
        )
    metrics = dict(rows)[1]
    assert metrics["train/loss"] == pytest.approx(float(losses["loss"]), rel=1e-4)
    for name in SENSORS:
        assert metrics[f"train/loss_{name}"] == pytest.approx(float(losses[name]), rel=1e-4), name


@pytest.fixture(scope="module")
def trained(ray, shards, tmp_path_factory):
    """A run of two workers, with embeddings for two names: its settings, its folder, what `run` gives, and its plan."""
    folder, plans = tmp_path_factory.mktemp("trained"), []
    np.savez(folder / "words.npz", **WORDS)
    given = {"norm_pix_loss": False, "activation_checkpointing": True, "language": str(folder / "words.npz")}
    chosen = settings(shards, epochs=4, **given)
    return chosen, folder, *run(chosen, folder, lambda plan, *_: plans.append(plan), recorded=False), plans[0]


def test_a_run_learns_and_its_checkpoint_loads(trained):
    _, folder, result, rows, _ = trained
    steps = [step for step, metrics in rows if "train/loss" in metrics]
    assert steps == list(range(1, result.steps + 1)), "each step's figures come once, in order"
    val = [metrics["val/loss"] for _, metrics in rows if "val/loss" in metrics]
    assert len(val) == 1 + 4, "before training and after each epoch"
    assert val[-1] < val[0] - 0.05
    assert result.samples == rows[-1][1]["train/samples_seen"]
    assert result.samples % 4 == 0, "four passes over all training grids"
    assert {f"train/loss_{name}" for name in SENSORS} <= {k for _, metrics in rows for k in metrics}
    assert result.skipped == ()
    assert architecture(result.checkpoint) == ("copernicus_fm_base", {"embed_dim": 32, "depth": 2, "num_heads": 4})
    encoder = create_model("copernicus_fm_base", embed_dim=32, depth=2, num_heads=4, global_pool=True)
    assert load_weights(encoder, result.checkpoint).complete
    assert torch.load(result.checkpoint, weights_only=True)["precision"] == "torch.float32"
    kept = sorted(p.name for p in (folder / "pretrain").glob("checkpoint_2*"))
    assert len(kept) == 2, "keep_checkpoints"


@pytest.mark.slow
def test_figures_that_a_driver_had_not_recorded_when_it_ended_come_again(trained):
    """Its checkpoint is of the last step: no step is trained again."""
    chosen, folder, result, rows, _ = trained
    again, those = run(chosen, folder)
    assert again.steps == result.steps
    assert those == rows


def test_the_number_of_workers_changes_neither_batches_nor_gradients(trained, tmp_path):
    """One rank sees the same global batches as two, of grids with and without radar, and takes the same steps."""
    chosen, _, result, of_two, _ = trained
    _, of_one = run(dataclasses.replace(chosen, workers=1), tmp_path)
    losses = [[m["train/loss"] for _, m in rows if "train/loss" in m][:6] for rows in (of_one, of_two)]
    assert result.steps > len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_language_embeddings_are_used_and_the_checkpoint_says_which(trained):
    chosen, folder, result, _, planned = trained
    file = hashlib.sha256((folder / "words.npz").read_bytes()).hexdigest()
    assert planned.language.describe(list(WORDS)) == f"sha256:{file[:12]}"
    known = {name: hashlib.sha256(vector.tobytes()).hexdigest()[:12] for name, vector in WORDS.items()}
    others = [s.variable for s in SENSORS.values() if s.variable and s.variable not in known]
    assert len(others) == 3
    assert trained_language(result.checkpoint) == known | dict.fromkeys(others, "stand-in")
    for name, vector in WORDS.items():
        assert np.array_equal(build_autoencoder(planned).language.vector(name).numpy(), vector)
    assert build_autoencoder(plan(dataclasses.replace(chosen, language=None))).language.lacking(list(WORDS)) == list(
        WORDS
    )


def damage(folder: Path, out: Path, victim: str, change) -> None:
    """Copy the shards, changing the members of one grid."""
    out.mkdir()
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as old, tarfile.open(out / shard.name, "w", format=tarfile.USTAR_FORMAT) as new:
            for member in old.getmembers():
                data = old.extractfile(member).read()
                if member.name.startswith(victim):
                    data = change(member.name, data)
                if data is not None:
                    member.size = len(data)
                    new.addfile(member, io.BytesIO(data))


class Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_bad_members_are_counted_and_named_and_training_goes_on(ray, shards, tmp_path):
    ran = tmp_path / "payload-ran"
    victim = make_grid(3).key

    def change(name: str, data: bytes) -> bytes | None:
        buffer = io.BytesIO()
        if name.endswith("s2_toa.pth"):
            torch.save(Payload(str(ran)), buffer)
            return buffer.getvalue()
        if name.endswith("s3_olci.pth"):
            torch.save(torch.zeros(3, 5, 32, 32), buffer)
            return buffer.getvalue()
        if name.endswith("s5p_o3.pth"):
            torch.save(torch.full((3, 1, 28, 28), math.nan), buffer)
            return buffer.getvalue()
        return data

    damage(shards, tmp_path / "bad", victim, change)
    result, rows = run(
        settings(tmp_path / "bad", sensors=FEW, val_fraction=0.0, max_skipped=0.2, epochs=2), tmp_path / "run"
    )
    assert not ran.exists(), "a pickle in a shard was run"
    reasons = {p.where.rsplit(":", 1)[1]: p.reason for p in result.skipped}
    assert reasons == {
        f"{victim}.s2_toa.pth": "unsafe_or_broken_pth",
        f"{victim}.s3_olci.pth": "wrong_shape",
        f"{victim}.s5p_o3.pth": "all_nan",
    }
    last = rows[-1][1]
    assert last["data/skipped_total"] == 3
    assert last["data/skipped_wrong_shape"] == 1
    assert last["data/skipped_share"] == pytest.approx(1 / 24)
    assert last["train/samples_seen"] == 48

    with pytest.raises(PretrainFailed, match=r"above pretrain.max_skipped=1.0%.*" + victim):
        run(settings(tmp_path / "bad", val_fraction=0.0, max_skipped=0.01, workers=1), tmp_path / "strict")


def test_a_truncated_shard_and_missing_json_count_before_training(ray, shards, tmp_path):
    victim = make_grid(1).key
    damage(shards, tmp_path / "bad", victim, lambda name, data: None if name.endswith("json") else data)
    second = sorted((tmp_path / "bad").glob("*.tar"))[1]
    with open(second, "r+b") as file:
        file.truncate(second.stat().st_size // 2)
    with pytest.raises(PretrainFailed, match=r"truncated_tar|missing_json"):
        run(settings(tmp_path / "bad", max_skipped=0.05), tmp_path / "strict")
    result, rows = run(settings(tmp_path / "bad", sensors=FEW, max_skipped=0.5, epochs=1, workers=1), tmp_path / "run")
    assert {p.reason for p in result.skipped} >= {"truncated_tar", "missing_json"}
    assert rows[-1][1]["data/skipped_missing_json"] == 1


def test_an_empty_folder_is_wrong_input(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="none"):
        pretrain(settings(tmp_path / "none"), 0, tmp_path / "run", lambda *_: None, lambda *_: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_raw_geotiffs_train_and_an_unknown_offset_is_said(ray, tmp_path):
    write_raw(tmp_path / "raw", 6, s2_baseline=None)
    write_raw(tmp_path / "known", 2, s2_baseline="05.09")
    sensors = ["s2_toa", "dem", "s5p_no2"]
    chosen = settings(tmp_path, sensors=sensors, epochs=1, val_fraction=0.0, batch_size=2)
    chosen = dataclasses.replace(chosen, shards=[], geotiffs=str(tmp_path / "raw"))
    plans = []
    result = pretrain(
        chosen, 0, tmp_path / "run", lambda *_: None, lambda *_: None, lambda plan, *_: plans.append(plan)
    )
    layout = read_layout(tmp_path / "raw")
    assert result.skipped == ()
    assert result.samples == sum(bool(set(sensors) & set(layout.grid(key).images)) for key in layout.keys)
    assert "do not tell their processing baseline" in plans[0].warning
    known = read_layout(tmp_path / "known")
    unknown, looked = unknown_offsets(known)
    assert (unknown, looked > 0, offset_warning(known, chosen)) == (0, True, "")


def test_problems_count_by_grid():
    from copernicus.datasets.shards import Problem
    from copernicus.platform.skipped import grids_of

    problems = [
        Problem("/a/x.tar:0200599.s1_grd.pth", "wrong_shape"), Problem("/a/x.tar:0200599.json", "bad_json"),
        Problem("/a/x.tar:0200600", "missing_json"), Problem("/a/y.tar", "truncated_tar"),
        Problem("s3://b/x.tar?endpoint_override=localhost:9000:0200599.dem.pth", "all_nan"),
        Problem("/raw:0200599.s2_toa:s2/a.b.tif", "unreadable"), Problem("/raw:0200599.dem:dem/c.tif", "unreadable"),
        Problem("/raw:0200601.dem:dem/d.tif", "too_many_dates"),
    ]  # fmt: skip
    assert len(grids_of(problems)) == 5


def test_shards_that_cannot_be_opened_count_by_their_share_of_the_shards(ray, shards, tmp_path, monkeypatch):
    """Half of the shards, not one grid of the many that they hold."""
    from copernicus.datasets import index

    real = index.survey_shard

    def failing(uri: str):
        if uri.endswith("000001.tar"):
            raise OSError("the store does not answer")
        return real(uri)

    monkeypatch.setattr(index, "survey_shard", failing)
    found = index.index_shards(str(shards))
    monkeypatch.setattr("copernicus.platform.pretrain.open_index", lambda *_: found)
    with pytest.raises(PretrainFailed, match=r"50\.0% of the grids"):
        run(settings(shards, max_skipped=0.1), tmp_path / "run")
