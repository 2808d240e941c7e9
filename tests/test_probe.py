"""The probe against scikit-learn, numpy and the published protocol's arithmetic."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_encoders import BandMeans, GridEncoder
from bench_files import write_cloud, write_flood, write_no2
from evaluation_parts import LABELS
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from copernicus.datasets import TASKS, InputError
from copernicus.models.heads import LinearHead
from copernicus.platform.features import SplitFeatures, TaskFeatures, encode_task
from copernicus.platform.optimiser import SGD, one_cycle
from copernicus.platform.probe import ProbeSettings, run_probe
from copernicus.platform.training import evaluate, loss_and_count, train

EUROSAT = TASKS["eurosat_s2"]


def pooled(
    samples: dict[str, int], dim: int = 20, classes: int = 10, spread: float = 4.0, flips: int = 1
) -> TaskFeatures:
    """Gaussian clusters of unequal scale and offset per dimension."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, dim))
    offset, scale = rng.normal(scale=100, size=dim), np.logspace(-2, 2, dim)
    splits = {}
    for name, count in samples.items():
        target = rng.integers(classes, size=count)
        z = centres[target] + rng.normal(scale=spread / 2, size=(flips, count, dim))
        splits[name] = SplitFeatures(((z * scale + offset).astype(np.float32),), target, tuple(map(str, range(count))))
    return TaskFeatures("eurosat_s2", splits)


def sklearn_accuracy(features: TaskFeatures, split: str) -> float:
    train, other = features.splits["train"], features.splits[split]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return 100 * model.fit(train.levels[0][0], train.targets).score(other.levels[0][0], other.targets)


def test_linear_probe_reaches_what_logistic_regression_reaches():
    features = pooled({"train": 600, "val": 400, "test": 2000})
    result = run_probe(features, EUROSAT, ProbeSettings.for_task(EUROSAT), seed=0)
    reference = sklearn_accuracy(features, "test")
    assert 40 < reference < 95  # neither trivial nor impossible
    assert result.test["oa"] == pytest.approx(reference, abs=3)
    assert result.samples == {"train": 600, "val": 400, "test": 2000}
    assert len(result.curves) == 50
    assert result.val["oa"] == max(row["val_oa"] for row in result.curves)
    assert result.curves[result.best_epoch - 1]["val_oa"] == result.val["oa"]
    assert all(row["val_oa"] < result.val["oa"] for row in result.curves[: result.best_epoch - 1])


def test_linear_probe_on_the_real_subset(tmp_path):
    folder = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).parents[1] / "../shared/data"))
    if not (folder / "eurosat_s2_subset").is_dir():
        pytest.skip(f"no real images in {folder} (set COPERNICUS_REAL_DATA)")
    features = encode_task(BandMeans(), EUROSAT, folder / "eurosat_s2_subset", tmp_path, image_size=64)
    result = run_probe(features, EUROSAT, ProbeSettings.for_task(EUROSAT, lr=1.0), seed=0)
    reference = sklearn_accuracy(features, "val")
    assert result.val["oa"] == pytest.approx(reference, abs=7.5)  # three of forty images
    assert result.samples == {"train": 120, "val": 40, "test": 40}


def test_labels_are_learned_as_one_regression_per_label_learns_them():
    rng = np.random.default_rng(4)
    centres, splits = rng.normal(size=(6, 12)), {}
    for name, count in {"train": 500, "val": 200, "test": 500}.items():
        target = (rng.random((count, 6)) < 0.3).astype(np.int64)
        z = (target @ centres + rng.normal(scale=1.5, size=(count, 12))) * np.logspace(-2, 2, 12)
        splits[name] = SplitFeatures((z[None].astype(np.float32),), target, tuple(map(str, range(count))))
    settings = ProbeSettings.for_task(LABELS, lr=1.0, epochs=20)
    result = run_probe(TaskFeatures("labels", splits), LABELS, settings, seed=0)
    train, test = splits["train"], splits["test"]
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression()))
    model.fit(train.levels[0][0], train.targets)
    expected = average_precision_score(test.targets, model.predict_proba(test.levels[0][0]), average="micro")
    assert 0.5 < expected < 0.9
    assert result.test["map"] == pytest.approx(100 * expected, abs=2)
    assert result.confusion is None


def test_one_seed_one_result_and_the_global_random_state_stays():
    features = pooled({"train": 101, "val": 50, "test": 50}, flips=4)
    settings = ProbeSettings(lr=0.1, epochs=4, batch_size=20)
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    first = run_probe(features, EUROSAT, settings, seed=3)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    torch.manual_seed(99)
    torch.rand(7)
    assert run_probe(features, EUROSAT, settings, seed=3) == first
    assert run_probe(features, EUROSAT, settings, seed=4).curves != first.curves


class Asked:
    """A split with the interface alone (no arrays to look at), which notes what it is asked for."""

    def __init__(self, split: SplitFeatures) -> None:
        self.split, self.ids, self.flips = split, split.ids, split.flips
        self.drawn: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.split)

    def load(self, index, flips, device="cpu"):
        self.drawn.extend(zip(flips.tolist(), index.tolist(), strict=True))
        return self.split.load(index, flips, device)


def test_flips_are_drawn_for_each_sample_and_epoch():
    features = pooled({"train": 64, "val": 3, "test": 3}, flips=4)
    orders = {}
    for batch_size in (16, 32):
        asked = Asked(features.splits["train"])
        splits = {**features.splits, "train": asked}
        settings = ProbeSettings(lr=0.1, epochs=20, batch_size=batch_size)
        head = LinearHead(20, 10, seed=1)
        curves = train(head, asked, splits["val"], EUROSAT, settings, seed=1).curves
        assert curves == run_probe(features, EUROSAT, settings, seed=1).curves  # gathered in one go: the same draws
        epochs = [asked.drawn[64 * e : 64 * (e + 1)] for e in range(20)]
        assert all(sorted(n for _, n in epoch) == list(range(64)) for epoch in epochs)
        assert len({tuple(n for _, n in epoch) for epoch in epochs}) == 20  # a new order each time
        share = np.bincount([flip for flip, _ in asked.drawn], minlength=4) / len(asked.drawn)
        assert np.abs(share - 0.25).max() < 0.05
        orders[batch_size] = [{n: flip for flip, n in epoch} for epoch in epochs]
    assert orders[16] == orders[32]  # a draw depends on seed, epoch and sample, not on the batches


def test_many_chunks_are_one(monkeypatch):
    """What is gathered at once does not show in the result, nor does a batch larger than it."""
    features = pooled({"train": 101, "val": 50, "test": 50}, flips=4)
    settings = ProbeSettings(lr=0.1, epochs=3, batch_size=20)
    whole = run_probe(features, EUROSAT, settings, seed=3)
    for chunk in (7, 45):
        monkeypatch.setattr("copernicus.platform.training.CHUNK", chunk)
        assert run_probe(features, EUROSAT, settings, seed=3) == whole


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.0), (50, 0.1), (7, 0.4), (1, 0.0), (300, 1 / 3)])
def test_the_schedule_is_torchs(steps, warmup):
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=0.7, total_steps=steps, pct_start=warmup, anneal_strategy="cos"
    )
    rates, momenta = one_cycle(0.7, steps, warmup)
    for step in range(steps):
        assert (rates[step], momenta[step]) == (optimiser.param_groups[0]["lr"], optimiser.param_groups[0]["momentum"])
        optimiser.step()
        if step + 1 < steps:
            schedule.step()


def test_the_optimiser_is_torchs():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(3, 4, generator=generator), torch.randn(4, generator=generator), torch.randn(2)]
    ours, theirs = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    reference = torch.optim.SGD(theirs, lr=0.1, weight_decay=0.01, foreach=False)
    mine = SGD(ours, lr=0.1, weight_decay=0.01)
    for step in range(30):
        for optimiser in (mine, reference):
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = 0.1 / (1 + step)
            optimiser.param_groups[0]["momentum"] = 0.85 + step / 300
        for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third never gets a gradient
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        if step == 15:  # a resumed optimiser goes on alike
            state = mine.state_dict()
            mine = SGD(ours, lr=0.1, weight_decay=0.01)
            mine.load_state_dict(state)
            mine.param_groups[0].update({k: reference.param_groups[0][k] for k in ("lr", "momentum")})
        mine.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_schedule_is_one_cycle_without_warmup():
    features = pooled({"train": 40, "val": 5, "test": 5})
    curves = run_probe(features, EUROSAT, ProbeSettings(lr=0.5, epochs=10, batch_size=20), seed=0).curves
    steps = 20
    low = 0.5 / 25 / 1e4  # torch's one-cycle: from the maximum to initial / 1e4, where initial = maximum / 25
    expected = [low + (0.5 - low) * (1 + np.cos(np.pi * (step + 1) / steps)) / 2 for step in range(0, steps, 2)]
    assert [row["lr"] for row in curves] == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    write_cloud(folder / "cloud_s3", {"train": 12, "val": 5, "test": 5})
    write_flood(folder / "flood_s1", {"train": 12, "val": 5, "test": 5}, size=64)
    write_no2(folder / "airquality_s5p/no2", {"train": 40, "val": 13, "test": 13})
    return folder


def test_segmentation_learns_and_ignores(bench, tmp_path):
    task = TASKS["cloud_s3"]
    features = encode_task(BandMeans(), task, bench, tmp_path, image_size=48)
    result = run_probe(
        features, task, ProbeSettings.for_task(task, head="light", lr=1e-2, epochs=15, batch_size=4), seed=0
    )
    assert result.test["miou"] > 90
    assert result.samples["test"] == 5


def test_change_detection_learns(bench, tmp_path):
    task = TASKS["flood_s1"]
    features = encode_task(BandMeans(), task, bench, tmp_path, image_size=64)
    result = run_probe(
        features, task, ProbeSettings.for_task(task, head="light", lr=1e-2, epochs=15, batch_size=4), seed=0
    )
    assert result.test["miou"] > 85


def test_regression_is_scored_in_the_targets_units(bench, tmp_path):
    task = TASKS["aq_no2_s5p"]

    class Brighter(BandMeans):
        def encode_dense(self, x_BCHW, sensor, metadata=None, normalize=True):
            return [1e5 * level for level in super().encode_dense(x_BCHW, sensor, metadata, normalize)]

    features = encode_task(Brighter(), task, bench, tmp_path)
    result = run_probe(
        features, task, ProbeSettings.for_task(task, head="light", lr=1e-2, epochs=15, batch_size=8), seed=0
    )
    target = features.splits["test"].targets * 3.9948 + 5.3167  # 5 + 1e5 x column, 6 to 14
    spread = float(np.nanstd(target))
    assert 1.5 < spread < 4
    assert result.test["rmse"] < spread / 2


class Fixed(torch.nn.Module):
    """A head whose output is its first feature level."""

    def forward(self, levels, size=None):
        return levels[0] if isinstance(levels, list) else levels


def dense_split(outputs: np.ndarray, targets: np.ndarray) -> SplitFeatures:
    return SplitFeatures((outputs[None].astype(np.float32),), targets, tuple(map(str, range(len(targets)))))


def test_miou_is_that_of_the_whole_split():
    task = TASKS["cloud_s3"]
    rng = np.random.default_rng(1)
    target = rng.choice([0, 1, 2, 255], p=[0.6, 0.2, 0.1, 0.1], size=(7, 6, 6)).astype(np.int16)
    predicted = np.where(rng.random(target.shape) < 0.6, target % 255 % 5, rng.integers(3, size=target.shape))
    outputs = np.eye(5)[predicted].transpose(0, 3, 1, 2)

    def miou(target, predicted):
        known = target != 255
        target, predicted = target[known], predicted[known]
        scores = []
        for c in range(5):
            union = ((target == c) | (predicted == c)).sum()
            if union:  # a class that neither occurs nor is predicted has no score
                scores.append(((target == c) & (predicted == c)).sum() / union)
        return 100 * np.mean(scores)

    result = evaluate(Fixed(), dense_split(outputs, target), task, batch_size=3)
    assert result["miou"] == pytest.approx(miou(target, predicted), rel=1e-5)
    batches = [(slice(0, 3), 3), (slice(3, 6), 3), (slice(6, 7), 1)]
    mean = sum(n * miou(target[b], predicted[b]) for b, n in batches) / 7
    assert result["miou_batchmean"] == pytest.approx(mean, rel=1e-5)
    assert abs(result["miou"] - mean) > 0.1
    known = target != 255
    chosen = np.take_along_axis(outputs, np.where(known, target, 0)[:, None], axis=1)[:, 0][known]
    log_sum = np.log(np.exp(outputs).sum(1))[known]
    assert result["loss"] == pytest.approx(float((log_sum - chosen).mean()), rel=1e-5)


def test_rmse_leaves_out_unknown_targets():
    task = TASKS["aq_no2_s5p"]
    rng = np.random.default_rng(2)
    target = rng.normal(size=(5, 8, 8)).astype(np.float32)
    target[rng.random(target.shape) < 0.3] = np.nan
    target[4] = np.nan  # a batch without any known target
    outputs = rng.normal(size=(5, 1, 8, 8))
    result = evaluate(Fixed(), dense_split(outputs, target), task, batch_size=2)
    error = (outputs[:, 0] - target) * 3.9948
    assert result["rmse"] == pytest.approx(np.sqrt(np.nanmean(error**2)), rel=1e-5)
    batches = [np.sqrt(np.nanmean(error[b : b + 2] ** 2)) for b in (0, 2)]
    assert result["rmse_batchmean"] == pytest.approx(np.mean(batches), rel=1e-5)
    assert result["loss"] == pytest.approx(np.nanmean(np.abs(error)) / 3.9948, rel=1e-5)
    unknown = dense_split(outputs, np.full_like(target, np.nan))
    with pytest.raises(InputError, match="no sample of the split has a known target"):
        evaluate(Fixed(), unknown, task, batch_size=2)


def test_multilabel_is_scored_by_micro_average_precision():
    import dataclasses

    task = dataclasses.replace(EUROSAT, name="many", kind="multilabel", metric="mAP", classes=tuple("abcd"))
    rng = np.random.default_rng(3)
    targets = rng.integers(2, size=(30, 4))
    logits = rng.normal(size=(30, 4)) + targets
    result = evaluate(Fixed(), dense_split(logits, targets), task, batch_size=8)
    expected = 100 * average_precision_score(targets, 1 / (1 + np.exp(-logits)), average="micro")
    assert result["map"] == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_a_known_target_has_a_gradient_of_zero():
    output = torch.zeros(2, 5, 4, 4, requires_grad=True)
    loss, known = loss_and_count(output, torch.full((2, 4, 4), 255), TASKS["cloud_s3"])
    loss.backward()
    assert known == 0
    assert float(loss.detach()) == 0
    assert output.grad.abs().max() == 0


def test_a_search_does_not_open_the_test_split():
    features = pooled({"train": 30, "val": 10})
    result = run_probe(features, EUROSAT, ProbeSettings(lr=0.1, epochs=2), seed=0, test=False)
    assert result.test is None
    assert set(result.samples) == {"train", "val"}


def test_every_epoch_is_reported_and_may_end_the_trial():
    features = pooled({"train": 30, "val": 10, "test": 10})
    seen = []

    def report(epoch, figures):
        seen.append((epoch, sorted(figures)))
        if epoch == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        run_probe(features, EUROSAT, ProbeSettings(lr=0.1, epochs=9), seed=0, report=report)
    assert seen == [
        (e, ["best_val_oa", "lr", "train_loss", "val_loss", "val_oa", "val_oa_batchmean"]) for e in (1, 2, 3)
    ]


def test_each_epoch_tells_the_best_so_far(bench, tmp_path):
    curves = run_probe(
        pooled({"train": 60, "val": 200, "test": 10}, spread=8),
        EUROSAT,
        ProbeSettings(lr=300.0, epochs=12, batch_size=20),
        seed=0,
    ).curves
    assert [row["best_val_oa"] for row in curves] == [max(r["val_oa"] for r in curves[: e + 1]) for e in range(12)]
    assert any(row["val_oa"] < row["best_val_oa"] for row in curves)
    task = TASKS["aq_no2_s5p"]
    features = encode_task(BandMeans(), task, bench, tmp_path)
    settings = ProbeSettings.for_task(task, head="light", lr=3e-2, epochs=6, batch_size=8)
    curves = run_probe(features, task, settings, seed=0, test=False).curves
    assert [row["best_val_rmse"] for row in curves] == [min(r["val_rmse"] for r in curves[: e + 1]) for e in range(6)]


def test_what_pictures_need(bench, tmp_path):
    features = pooled({"train": 300, "val": 60, "test": 70})
    result = run_probe(features, EUROSAT, ProbeSettings(lr=0.1, epochs=5), seed=0, examples=70)
    target = features.splits["test"].targets
    assert np.array_equal(result.examples.target, target)
    assert result.examples.ids == features.splits["test"].ids
    assert np.array_equal(result.confusion, confusion_matrix(target, result.examples.predicted, labels=range(10)))
    assert 100 * np.trace(result.confusion) / 70 == pytest.approx(result.test["oa"])
    assert result.test["f1_macro"] == pytest.approx(100 * f1_score(target, result.examples.predicted, average="macro"))
    task = TASKS["aq_no2_s5p"]
    features = encode_task(BandMeans(), task, bench, tmp_path)
    settings = ProbeSettings.for_task(task, head="light", lr=1e-2, epochs=2, batch_size=8)
    result = run_probe(features, task, settings, seed=0, examples=13)
    assert result.confusion is None
    known = features.splits["test"].targets * task.target_std + task.target_mean
    np.testing.assert_allclose(result.examples.target, known, rtol=1e-6)
    rmse = np.sqrt(np.nanmean((result.examples.predicted - known) ** 2))
    assert result.test["rmse"] == pytest.approx(rmse, rel=1e-5)


def test_divergence_is_told():
    features = pooled({"train": 30, "val": 10, "test": 10})
    with pytest.raises(FloatingPointError, match="lower lr"):
        run_probe(features, EUROSAT, ProbeSettings(lr=1e38, epochs=5, batch_size=10), seed=0)


def test_a_last_batch_of_one_is_no_batch():
    features = pooled({"train": 9, "val": 4, "test": 4})
    assert len(run_probe(features, EUROSAT, ProbeSettings(lr=0.1, epochs=2, batch_size=4), seed=0).curves) == 2
    with pytest.raises(InputError, match="1 training sample"):
        run_probe(pooled({"train": 1, "val": 4, "test": 4}), EUROSAT, ProbeSettings(lr=0.1), seed=0)


def test_settings():
    assert ProbeSettings.for_task(EUROSAT) == ProbeSettings(0.1, 50, 64, 1e-4, 0)
    assert ProbeSettings.for_task(TASKS["cloud_s3"], lr=0.5, batch_size=8.0) == ProbeSettings(0.5, 50, 8, 1e-2, 0)
    for wrong in (
        {"lr": 0},
        {"lr": float("nan")},
        {"epochs": 0},
        {"batch_size": 1},
        {"batch_size": 2.5},
        {"weight_decay": -1},
        {"channels": 1},
        {"head": "heavy"},
    ):
        with pytest.raises(InputError, match=f"probe: (no )?{next(iter(wrong))}"):
            ProbeSettings(**{"lr": 0.1, **wrong})


def test_stand_in_is_learnable_end_to_end(bench, tmp_path):
    """A random convolution tells bright cloud from dark ground: reader, flips, features and head fit together."""
    task = TASKS["cloud_s3"]
    features = encode_task(GridEncoder(21, dim=16), task, bench, tmp_path, image_size=48)
    result = run_probe(
        features, task, ProbeSettings.for_task(task, head="light", lr=1e-2, epochs=10, batch_size=4), seed=0
    )
    assert result.test["miou"] > 85
