"""Fine-tuning and training from scratch: what is trained, that it is a probe's loop, and that a killed trial goes on."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_files import write_cloud, write_eurosat, write_flood, write_no2
from torch import nn

from copernicus.datasets import TASKS, InputError
from copernicus.models import create_model
from copernicus.models.lora import merge_lora
from copernicus.platform.features import encode_task
from copernicus.platform.finetune import FinetuneSettings, ImageSplit, choose_trained, run_finetune
from copernicus.platform.probe import ProbeSettings, run_probe

EUROSAT, CLOUD = TASKS["eurosat_s2"], TASKS["cloud_s3"]
CLASSES = ("Forest", "River", "SeaLake")


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    counts = {"train": 24, "val": 9, "test": 9}
    listed, number = {}, 0
    for split, count in counts.items():
        listed[split] = [(CLASSES[i % 3], number + i) for i in range(count)]
        number += count
    write_eurosat(folder / "eurosat_s2", listed, size=32)
    write_cloud(folder / "cloud_s3", {"train": 6, "val": 3, "test": 3})
    write_flood(folder / "flood_s1", {"train": 4, "val": 2, "test": 2}, size=32)
    write_no2(folder / "airquality_s5p/no2", {"train": 4, "val": 2, "test": 2})
    return folder


def datasets(bench, task, size=32):
    return {split: task.open(bench, split, image_size=size) for split in ("train", "val", "test")}


def small(seed: int = 0):
    return create_model("copernicus_fm_small", embed_dim=32, depth=2, num_heads=4, image_size=64, seed=seed)


def changed(encoder, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in encoder.state_dict().items() if not torch.equal(value, before[name])}


def finetune(bench, task=EUROSAT, seed=0, encoder=None, size=32, folder=None, report=None, **given):
    encoder = small() if encoder is None else encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    settings = FinetuneSettings(**{"lr": 0.05, "epochs": 2, "batch_size": 8, "head": "light", **given})
    result = run_finetune(encoder, datasets(bench, task, size), task, settings, seed, folder=folder, report=report)
    return result, encoder, before


def test_a_frozen_encoder_is_a_probe(bench, tmp_path):
    """With nothing of the encoder trained, images and kept features give the same figures for the same draws."""

    class Still(nn.Module):
        """Features that no gradient moves: the one parameter takes part with weight 0."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner.requires_grad_(False)
            self.idle = nn.Parameter(torch.zeros(()))

        def encode(self, x_BCHW, sensor, metadata=None, normalize=True):
            return self.inner.encode(x_BCHW, sensor, metadata, normalize) + 0 * self.idle

        def encode_dense(self, x_BCHW, sensor, metadata=None, normalize=True):
            return self.inner.encode_dense(x_BCHW, sensor, metadata, normalize)

    given = {"lr": 0.1, "epochs": 4, "batch_size": 8}
    features = encode_task(small().eval(), EUROSAT, bench, tmp_path, image_size=32)
    probed = run_probe(features, EUROSAT, ProbeSettings(**given), seed=5)
    tuned, _, _ = finetune(bench, encoder=Still(small()), seed=5, **given)
    assert tuned.best_epoch == probed.best_epoch
    for mine, kept in zip(tuned.curves, probed.curves, strict=True):
        assert mine == pytest.approx(kept, rel=1e-4)
    assert tuned.test == pytest.approx(probed.test, rel=1e-4)


def test_all_of_it_is_trained(bench):
    result, encoder, before = finetune(bench, epochs=15, lr=0.02)
    moved = changed(encoder, before)
    assert {"cls_token", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.bias", "fc_norm.weight"} <= moved
    assert any(name.startswith("patch_embed_spectral") for name in moved)
    assert "pos_embed" not in moved  # fixed in the model itself
    assert result.test["oa"] == 100  # three classes, a thousand apart
    assert result.samples == {"train": 24, "val": 9, "test": 9}


def test_the_last_blocks_are_trained(bench):
    _, encoder, before = finetune(bench, blocks=1)
    moved = changed(encoder, before)
    assert {"blocks.1.attn.qkv.weight", "fc_norm.weight"} <= moved
    assert all(name.startswith(("blocks.1.", "fc_norm.")) for name in moved)


def test_lora_is_trained_and_merges(bench):
    _, encoder, _ = finetune(bench, lora_rank=2)
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("lora_" in name for name in trained)
    x, sensor = datasets(bench, EUROSAT)["val"][0]["image"][None], EUROSAT.sensor
    adapted = encoder.eval().encode(x, sensor, normalize=False)
    merge_lora(encoder)
    assert torch.equal(encoder.encode(x, sensor, normalize=False), adapted)
    assert not torch.allclose(small().eval().encode(x, sensor, normalize=False), adapted, atol=1e-4)
    small().load_state_dict(encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "size", "head"),
    [("cloud_s3", 48, "light"), ("cloud_s3", 48, "upernet"), ("flood_s1", 32, "light"), ("aq_no2_s5p", 28, "upernet")],
)
def test_dense_tasks(bench, name, size, head):
    task = TASKS[name]
    result, encoder, before = finetune(bench, task, size=size, head=head, channels=8, lr=1e-3, batch_size=2, epochs=2)
    assert "blocks.0.attn.qkv.weight" in changed(encoder, before)
    assert result.samples["test"] == len(datasets(bench, task, size)["test"])
    assert np.isfinite(list(result.test.values())).all()
    again, _, _ = finetune(bench, task, size=size, head=head, channels=8, lr=1e-3, batch_size=2, epochs=2)
    assert again == result  # dropout and all
    other, _, _ = finetune(bench, task, size=size, head=head, channels=8, lr=1e-3, batch_size=2, epochs=2, seed=1)
    assert other.curves != result.curves


def test_series_are_the_mean_of_their_dates(bench):
    """A sample of two equal dates and one of a single date are what they are as plain images."""
    plain = datasets(bench, EUROSAT)["train"]

    class Series:
        """The same images, some of them twice."""

        task, preset, ids = EUROSAT, "default", plain.ids

        def __len__(self):
            return len(plain)

        def __getitem__(self, i):
            sample, dates = plain[i], 1 + i % 2
            image, metadata = (sample[k][None].expand(dates, *sample[k].shape) for k in ("image", "metadata"))
            return {**sample, "image": image, "metadata": metadata}

    index, flips = np.arange(4), np.array([0, 1, 2, 3])
    (x, metadata), target = ImageSplit(Series(), 4).load(index, flips)
    (x_plain, metadata_plain), target_plain = ImageSplit(plain, 4).load(index, flips)
    assert [len(one) for one in x] == [1, 2, 1, 2]
    assert torch.equal(target, target_plain)
    for number in range(4):
        assert all(torch.equal(date, x_plain[number]) for date in x[number])
        assert torch.equal(metadata[number][0].nan_to_num(), metadata_plain[number].nan_to_num())


KILLED = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_finetune import TASKS, finetune
def report(epoch, figures):
    Path({folder!r}, "epoch").write_text(str(epoch))
    time.sleep(600 if epoch == 3 else 0)
finetune(Path({bench!r}), TASKS[{task!r}], folder=Path({folder!r}), report=report, **{given!r})
"""


@pytest.mark.parametrize(
    ("task", "given"),
    [("eurosat_s2", {}), ("cloud_s3", {"size": 48, "head": "upernet", "channels": 8, "lr": 1e-3})],
)
def test_a_killed_trial_goes_on_bit_for_bit(bench, tmp_path, task, given):
    given = {**given, "epochs": 5, "batch_size": 4}
    whole, encoder, _ = finetune(bench, TASKS[task], **given)
    source = KILLED.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), bench=str(bench), task=task, given=given
    )
    process = subprocess.Popen([sys.executable, "-c", source], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 300
    while not (tmp_path / "epoch").exists() or int((tmp_path / "epoch").read_text() or 0) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    seen = []
    resumed, again, _ = finetune(
        bench, TASKS[task], **given, folder=tmp_path, report=lambda epoch, figures: seen.append(epoch)
    )
    assert seen[0] in (3, 4)
    assert seen[-1] == 5
    assert resumed == whole
    assert not changed(again, encoder.state_dict())


def test_a_checkpoint_of_another_trial_is_refused(bench, tmp_path):
    finetune(bench, folder=tmp_path)
    for given, name in (({"lr": 0.01}, "lr"), ({"seed": 4}, "seed, start"), ({"encoder": small(seed=1)}, "start")):
        with pytest.raises(InputError, match=rf"trial\.pt is of a trial with another {name};"):
            finetune(bench, folder=tmp_path, **given)
    path = tmp_path / "trial.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"trial\.pt is no checkpoint"):
        finetune(bench, folder=tmp_path)
    path.unlink()
    assert os.listdir(tmp_path) == []  # and no leftovers of writing it


def test_refusals(bench):
    with pytest.raises(InputError, match="blocks and lora_rank are both given"):
        FinetuneSettings(lr=0.1, blocks=1, lora_rank=2)
    for wrong in ({"blocks": 0}, {"lora_rank": 0}, {"blocks": 1.5}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            FinetuneSettings(lr=0.1, **wrong)
    with pytest.raises(InputError, match="blocks is 3; CopernicusFMViT has 2"):
        choose_trained(small(), FinetuneSettings(lr=0.1, blocks=3), 0)
    with pytest.raises(InputError, match="Linear has no blocks to train the last 1 of"):
        choose_trained(nn.Linear(2, 2), FinetuneSettings(lr=0.1, blocks=1), 0)
    with pytest.raises(InputError, match="Identity has no parameter that can be trained"):
        choose_trained(nn.Identity(), FinetuneSettings(lr=0.1), 0)


def test_settings_are_the_published_supervised_ones():
    supervised = dataclasses.replace(EUROSAT.probe, lr=0.01, batch_size=32)
    task = types.SimpleNamespace(probe=EUROSAT.probe, supervised=supervised, dense=False)
    assert FinetuneSettings.for_task(task) == FinetuneSettings(0.01, 50, 32, 1e-4)
    assert FinetuneSettings.for_task(task, lr=0.2, blocks=3.0).blocks == 3
    task = types.SimpleNamespace(probe=EUROSAT.probe, supervised=supervised, dense=True)
    assert FinetuneSettings.for_task(task).weight_decay == 1e-2  # torch's own, of AdamW
