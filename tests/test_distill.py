"""Distillation in pretraining: its part of the loss, its settings, and runs on Ray, undisturbed and not."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from conftest import make_grid
from dinov2 import save_dinov2
from test_models_mae import CHANNELS, EXPECTED, METADATA, NOISE, SAMPLES, published_model, stand_in_teacher
from test_pretrain import plan, run, settings

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import write_shards
from copernicus.models import create_model, load_weights
from copernicus.models.distillation import distillation_loss
from copernicus.models.teacher import load_teacher
from copernicus.platform.objective import PerRowLoss, Plan, build_autoencoder, freeze_unreached
from copernicus.platform.schema import Distill
from copernicus.platform.to_device import tensors


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("teacher"))


def distilling(**changes) -> Plan:
    chosen = settings(Path("x"), distill=Distill("unused"), sensors=["s1_grd", "s2_toa"], **changes)
    return dataclasses.replace(plan(chosen), distill_dim=768)


def test_a_step_s_loss_is_the_published_one():
    """The goldens' whole step by way of the platform: images already normalised, so sensors that leave them as they are."""
    sensors = tuple(dataclasses.replace(s, mean=0.0, std=1.0, scale=1.0) for s in SENSORS.values())
    chosen = dataclasses.replace(plan(settings(Path("x"), distill=Distill("unused"))), sensors=sensors)
    module = PerRowLoss(published_model(), sensors, stand_in_teacher)
    rows = len(SAMPLES["s2_toa"])
    batch = {"metadata": torch.stack([METADATA[s.name] for s in sensors], dim=1)}
    batch |= {f"x_{name}": x for name, x in SAMPLES.items()} | {f"noise_{name}": n for name, n in NOISE.items()}
    loss = module(batch, CHANNELS)
    assert loss.shape == (rows, len(sensors) + 1)
    present = chosen.present(torch.ones(rows, len(sensors), dtype=torch.bool))
    total, count = chosen.weigh(loss, present)
    torch.testing.assert_close((total / count).reshape(1), EXPECTED["loss_total"], atol=0, rtol=1e-5)
    torch.testing.assert_close(0.1 * loss[:, -1].mean().reshape(1), EXPECTED["loss_distill"], atol=0, rtol=1e-5)


def test_rows_without_the_teacher_s_image_have_no_distillation():
    chosen = distilling()
    loss = torch.tensor([[1.0, 3.0, 0.5], [5.0, 9.0, 0.7], [9.0, 2.0, 0.2], [9.0, 9.0, 9.0]])
    present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    assert chosen.losses == ("s1_grd", "s2_toa", "distill")
    assert chosen.present(present)[:, 2].tolist() == [True, False, True, False]
    total, rows = chosen.weigh(loss, chosen.present(present))
    assert float(total) == pytest.approx((1 + 3) / 2 + 0.1 * 0.5 + 5 + 2 + 0.1 * 0.2)
    assert rows == 3
    heavy = distilling()
    heavy = dataclasses.replace(heavy, settings=dataclasses.replace(heavy.settings, distill=Distill("unused", 2.0)))
    assert float(heavy.weigh(loss, heavy.present(present))[0]) == pytest.approx(2 + 2 * 0.5 + 5 + 2 + 2 * 0.2)


def test_without_distillation_nothing_changes():
    chosen = plan(settings(Path("x")))
    present = torch.tensor([[True] * 8])
    assert chosen.losses == tuple(SENSORS)
    assert chosen.present(present) is present


def test_the_teacher_is_neither_trained_nor_saved_and_the_student_is(teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    chosen = dataclasses.replace(distilling(), distill_dim=teacher.dim)
    module = PerRowLoss(build_autoencoder(chosen), chosen.sensors, teacher)
    freeze_unreached(module, chosen)
    assert not any("teacher" in name for name, _ in module.named_parameters())
    assert not any("teacher" in name for name in module.state_dict())
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {"autoencoder.student_proj.weight", "autoencoder.student_proj.bias"} <= trained
    with pytest.raises(AssertionError, match="trained"):
        PerRowLoss(build_autoencoder(chosen), chosen.sensors, torch.nn.Identity())


def test_every_rank_touches_the_same_parameters_whatever_its_grids_have(teacher_folder):
    """A share of rows that all lack the image still runs the student: DDP would wait for its gradients."""
    teacher = load_teacher(str(teacher_folder))
    chosen = dataclasses.replace(distilling(), distill_dim=teacher.dim)
    module = PerRowLoss(build_autoencoder(chosen), chosen.sensors, teacher)
    freeze_unreached(module, chosen)
    batch = tensors(chosen.reader(augment=False).batch([None, None]), torch.device("cpu"))
    present = chosen.present(batch["present"])
    assert not present.any()
    chosen.weigh(module(batch, {}), present)[0].backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(grad is not None and not grad.any() for grad in grads.values()), "touched, and left as it is"


def test_the_column_is_the_distillation_loss_of_the_normalised_image(teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    chosen = dataclasses.replace(distilling(), distill_dim=teacher.dim)
    model = build_autoencoder(chosen)
    rng = torch.Generator().manual_seed(0)
    batch = {
        "x_s1_grd": torch.randn((2, 2, 32, 32), generator=rng) - 15,
        "x_s2_toa": (torch.randn((2, 13, 32, 32), generator=rng) * 900 + 1500).to(torch.int16),
        "noise_s1_grd": torch.rand((2, 4), generator=rng), "noise_s2_toa": torch.rand((2, 4), generator=rng),
        "metadata": torch.full((2, 2, 4), torch.nan),
    }  # fmt: skip
    batch["metadata"][:, 1] = torch.tensor([[7.0, 47.0, 18262.0, 0.0256], [8.0, -3.0, 18000.0, torch.nan]])
    with torch.no_grad():
        column = PerRowLoss(model, chosen.sensors, teacher)(batch, {})[:, -1]
        normalised = SENSORS["s2_toa"].normalize(batch["x_s2_toa"])
        torch.testing.assert_close(
            column, distillation_loss(model, teacher, normalised, batch["metadata"][:, 1]), atol=1e-6, rtol=0
        )


@pytest.mark.slow
def test_a_run_learns_from_its_teacher(ray, shards, teacher_folder, tmp_path, monkeypatch):
    """A relative path, two ranks, a cache; the checkpoint has the student's projection and says which teacher it was."""
    monkeypatch.chdir(teacher_folder.parent)
    distill = Distill(teacher_folder.name, weight=1.0, cache=os.path.relpath(tmp_path / "cache"))
    chosen = settings(shards, sensors=["s2_toa", "s5p_o3"], distill=distill, epochs=4, norm_pix_loss=False)
    result, rows = run(chosen, tmp_path / "run")
    val = [metrics["val/loss_distill"] for _, metrics in rows if "val/loss_distill" in metrics]
    assert len(val) == 1 + 4
    assert val[-1] < val[0] - 0.05
    for _, metrics in rows:
        if "train/loss" in metrics:
            parts = {"train/loss_s2_toa", "train/loss_s5p_o3", "train/loss_distill"}
            assert {k for k in metrics if k.startswith("train/loss_")} == parts, "of the chosen sensors alone"
            sensors = (metrics["train/loss_s2_toa"] + metrics["train/loss_s5p_o3"]) / 2
            assert metrics["train/loss"] == pytest.approx(sensors + metrics["train/loss_distill"], rel=1e-5)
    last = next(metrics for _, metrics in reversed(rows) if "train/teacher_cached" in metrics)
    assert 0 < last["train/teacher_cached"] < 1, "held-out images come again, training's do not"
    teacher = load_teacher(str(teacher_folder))
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [teacher.identity]
    saved = torch.load(result.checkpoint, weights_only=True)
    assert saved["teacher"] == teacher.identity
    assert saved["model"]["student_proj.weight"].shape == (24, 32)
    assert not any("teacher" in name for name in saved["model"])
    encoder = create_model("copernicus_fm_base", embed_dim=32, depth=2, num_heads=4, global_pool=True)
    assert load_weights(encoder, result.checkpoint).complete


def test_a_wrong_teacher_is_wrong_input_before_anything_starts(shards, tmp_path):
    with pytest.raises(InputError, match=r"no config.json and no model.safetensors"):
        run(settings(shards, distill=Distill(str(tmp_path))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def train_workers() -> list[psutil.Process]:
    """This process's own."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if any("RayTrainWorker" in part for part in p.cmdline())]


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_run_ends_with_the_same_bits_and_another_teacher_is_refused(ray, teacher_folder, tmp_path):
    """Whether its features are computed or come from a cache that the killed run began to fill."""
    grids = (make_grid(i, ("s2_toa",) if i % 5 == 2 else ()) for i in range(24))
    write_shards(grids, tmp_path / "shards", grids_per_shard=12)
    ours = tmp_path / "teacher"
    ours.mkdir()
    for file in teacher_folder.iterdir():
        (ours / file.name).write_bytes(file.read_bytes())
    chosen = settings(tmp_path / "shards", sensors=["s2_toa", "s5p_o3"], epochs=4, distill=Distill(str(ours)))
    whole, _ = run(chosen, tmp_path / "whole")
    cached = dataclasses.replace(chosen, distill=Distill(str(ours), cache=str(tmp_path / "cache")))
    killed: list[int] = []

    def broken(folder: Path):
        from copernicus.platform.pretrain import pretrain

        def on_metrics(step: int, metrics: dict[str, float]) -> None:
            if step >= 5 and not killed:
                victim = train_workers()[-1]
                killed.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)

        return pretrain(cached, 0, folder, on_metrics, lambda *_: None)

    ended = broken(tmp_path / "broken")
    assert killed
    a, b = (torch.load(r.checkpoint, weights_only=True) for r in (whole, ended))
    assert [name for name in a["model"] if not torch.equal(a["model"][name], b["model"][name])] == []
    moments = [r["optimizer"]["state"] for r in (a, b)]
    assert moments[0].keys() == moments[1].keys()
    assert all(torch.equal(state["exp_avg"], moments[1][name]["exp_avg"]) for name, state in moments[0].items())
    assert len(list((tmp_path / "cache").rglob("*.features"))) > 2, "two ranks, and two after the kill"

    again, rows = run(cached, tmp_path / "again")
    assert rows[-1][1]["train/teacher_cached"] == 1.0
    assert all(
        torch.equal(v, b["model"][k]) for k, v in torch.load(again.checkpoint, weights_only=True)["model"].items()
    )

    save_dinov2(ours, seed=1)
    longer = dataclasses.replace(chosen, epochs=5)
    with pytest.raises(InputError, match="files differ between nodes, or from those this run began with"):
        run(longer, tmp_path / "whole")
