"""Quick looks against scikit-learn, and what they promise: deterministic, one test, no dense task."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from copernicus.datasets import TASKS, InputError
from copernicus.platform.features import SplitFeatures, TaskFeatures
from copernicus.platform.quick_probes import NEIGHBOURS, PENALTIES, QUICK, RIDGES, fit_logistic, run_quick

EUROSAT = TASKS["eurosat_s2"]
LABELS = dataclasses.replace(EUROSAT, name="labels", kind="multilabel", metric="mAP", classes=tuple("abcd"))
COUNTS = {"train": 240, "val": 120, "test": 300}


def clusters(task, dim: int = 12) -> TaskFeatures:
    """Overlapping clusters on scales from 0.01 to 100, one dimension constant; flipped copies are nonsense."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(task.num_classes, dim))
    scale, splits = np.logspace(-2, 2, dim), {}
    for name, count in COUNTS.items():
        if task.kind == "multilabel":
            target = (rng.random((count, 4)) < 0.4).astype(np.int64)
            z = target @ centres
        else:
            target = rng.integers(10, size=count)
            z = centres[target]
        z = (z + rng.normal(scale=0.8, size=z.shape)) * scale + 5
        z[:, 3] = 7
        flips = np.stack([z, rng.normal(size=z.shape)]) if name == "train" else z[None]
        splits[name] = SplitFeatures((flips.astype(np.float32),), target, tuple(map(str, range(count))))
    return TaskFeatures(task.name, splits)


@pytest.fixture(scope="module")
def features():
    return {task.name: clusters(task) for task in (EUROSAT, LABELS)}


def arrays(features: TaskFeatures):
    """Standardised features and targets of the splits."""
    z = {name: split.levels[0][0].astype(np.float64) for name, split in features.splits.items()}
    scaler = StandardScaler().fit(z["train"])
    return {name: scaler.transform(value) for name, value in z.items()}, {
        name: split.targets for name, split in features.splits.items()
    }


def score(task, scores: np.ndarray, target: np.ndarray) -> float:
    if task.kind == "multilabel":
        return 100 * average_precision_score(target, scores, average="micro")
    return 100 * float((scores.argmax(1) == target).mean())


def expect(task, result, name, candidates, scorer, z, target):
    """That the result is the candidate that is best on validation, and all figures those of the other implementation."""
    validation = [score(task, scorer(value, z["val"]), target["val"]) for value in candidates]
    key = f"val_{task.metric_key}"
    assert [row[name] for row in result.curves] == list(candidates)
    assert [row[key] for row in result.curves] == pytest.approx(validation, abs=0.05)
    best = int(np.argmax([row[key] for row in result.curves]))
    assert (result.best_epoch, result.chosen) == (best + 1, {name: candidates[best]})
    assert best > 0 or candidates[0] != candidates[-1]
    expected = score(task, scorer(candidates[best], z["test"]), target["test"])
    assert result.test[task.metric_key] == pytest.approx(expected, abs=0.05)
    assert result.samples == COUNTS
    chance = 25 if task is EUROSAT else 55
    assert chance < expected < 99


@pytest.mark.parametrize("task", [EUROSAT, LABELS], ids=lambda task: task.kind)
def test_ridge(features, task):
    z, target = arrays(features[task.name])
    wanted = target["train"] if task is LABELS else np.eye(10)[target["train"]]

    def scorer(l2, x):
        return Ridge(alpha=l2 * COUNTS["train"], solver="cholesky").fit(z["train"], wanted).predict(x)

    expect(task, run_quick(features[task.name], task, "ridge"), "l2", RIDGES, scorer, z, target)


@pytest.mark.parametrize("task", [EUROSAT, LABELS], ids=lambda task: task.kind)
def test_nearest_neighbours(features, task):
    z, target = arrays(features[task.name])
    wanted = target["train"] if task is LABELS else np.eye(10)[target["train"]]

    def scorer(k, x):
        distance, neighbour = NearestNeighbors(n_neighbors=int(k), metric="cosine").fit(z["train"]).kneighbors(x)
        weight = np.exp((1 - distance) / 0.07)
        return (weight[..., None] * wanted[neighbour]).sum(1) / weight.sum(1, keepdims=True)

    counts = [float(k) for k in NEIGHBOURS if k <= COUNTS["train"]]
    expect(task, run_quick(features[task.name], task, "knn"), "k", counts, scorer, z, target)


def test_logistic(features):
    z, target = arrays(features["eurosat_s2"])
    models = {
        l2: LogisticRegression(C=1 / (l2 * COUNTS["train"]), tol=1e-9, max_iter=20_000).fit(z["train"], target["train"])
        for l2 in PENALTIES
    }
    result = run_quick(features["eurosat_s2"], EUROSAT, "logistic")
    expect(EUROSAT, result, "l2", PENALTIES, lambda l2, x: models[l2].decision_function(x), z, target)


def test_logistic_for_each_label(features):
    z, target = arrays(features["labels"])

    def scorer(l2, x):
        each = [
            LogisticRegression(C=1 / (l2 * COUNTS["train"]), tol=1e-9, max_iter=20_000)
            .fit(z["train"], target["train"][:, label])
            .predict_proba(x)[:, 1]
            for label in range(4)
        ]
        return np.stack(each, axis=1)

    expect(LABELS, run_quick(features["labels"], LABELS, "logistic"), "l2", PENALTIES, scorer, z, target)


def test_logistic_weights_are_scikit_learns(features):
    z, target = arrays(features["eurosat_s2"])
    indicator = torch.from_numpy(np.eye(10)[target["train"]])
    answer = fit_logistic(torch.from_numpy(z["train"]), indicator, 1e-2, False, np.zeros(130)).reshape(13, 10)
    model = LogisticRegression(C=1 / (1e-2 * COUNTS["train"]), tol=1e-10, max_iter=20_000)
    model.fit(z["train"], target["train"])
    np.testing.assert_allclose(answer[:-1], model.coef_.T, atol=1e-4)
    intercept = answer[-1] - answer[-1].mean()
    np.testing.assert_allclose(intercept, model.intercept_ - model.intercept_.mean(), atol=1e-3)


@pytest.mark.parametrize("protocol", sorted(QUICK))
def test_the_same_again_and_nothing_drawn(features, protocol):
    state = torch.random.get_rng_state()
    first = run_quick(features["eurosat_s2"], EUROSAT, protocol, 0)
    torch.manual_seed(5)
    assert run_quick(features["eurosat_s2"], EUROSAT, protocol, 1) == first
    torch.random.set_rng_state(state)
    assert first.confusion.sum() == COUNTS["test"]
    assert first.test["oa"] == pytest.approx(100 * np.trace(first.confusion) / COUNTS["test"])
    assert first.val["oa"] == max(row["val_oa"] for row in first.curves)


@pytest.mark.parametrize("protocol", sorted(QUICK))
def test_the_test_split_is_asked_for_once_or_not_at_all(features, protocol):
    class Counted:
        def __init__(self, split):
            self.split, self.asked = split, []

        def __len__(self):
            return len(self.split)

        def load(self, index, flips, device="cpu"):
            self.asked += list(index)
            return self.split.load(index, flips, device)

    whole = features["eurosat_s2"]
    counted, val = Counted(whole.splits["test"]), Counted(whole.splits["val"])
    run_quick(TaskFeatures("eurosat_s2", {**whole.splits, "test": counted, "val": val}), EUROSAT, protocol)
    assert val.asked == list(range(len(val))), "for all candidates once"
    assert counted.asked == list(range(len(counted)))
    result = run_quick(TaskFeatures("eurosat_s2", {**whole.splits, "test": None}), EUROSAT, protocol, test=False)
    assert result.test is None
    assert set(result.samples) == {"train", "val"}


def test_refusals(features):
    for protocol in QUICK:
        with pytest.raises(InputError, match=f"cloud_s3: {protocol} looks at one vector per image"):
            run_quick(features["eurosat_s2"], TASKS["cloud_s3"], protocol)
    with pytest.raises(InputError, match="no quick look 'svm'; there are knn, ridge, logistic"):
        run_quick(features["eurosat_s2"], EUROSAT, "svm")
