"""Metrics against scikit-learn and torchmetrics, and that sharing out an evaluation does not change it."""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from evaluation_parts import CLOUD, EUROSAT, LABELS, NO2, Same, evaluate_part, split_of
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference
from torchmetrics.functional import classification as public
from torchmetrics.functional import jaccard_index

from copernicus.datasets import InputError
from copernicus.platform.features import SplitFeatures
from copernicus.platform.metrics import Evaluation, average_precision, class_iou, make_metrics
from copernicus.platform.training import evaluate, measure


def computed(task, split: SplitFeatures) -> dict[str, float]:
    return evaluate(Same(), split, task, batch_size=8)


def test_classes_against_scikit_learn_and_torchmetrics():
    split = split_of(EUROSAT, 300)
    figures = computed(EUROSAT, split)
    scores, target = split.levels[0][0], split.targets
    predicted = scores.argmax(1)
    assert set(predicted) - set(target)  # a class is predicted that does not occur
    assert figures["oa"] == pytest.approx(100 * reference.accuracy_score(target, predicted))
    with pytest.warns(UserWarning, match="not in y_true"):
        assert figures["aa"] == pytest.approx(100 * reference.balanced_accuracy_score(target, predicted))
    assert figures["f1_macro"] == pytest.approx(100 * reference.f1_score(target, predicted, average="macro"))
    tensors = torch.from_numpy(predicted), torch.from_numpy(target)
    assert figures["oa"] == pytest.approx(100 * float(public.multiclass_accuracy(*tensors, 10, average="micro")))
    assert figures["oa"] == pytest.approx(100 * float(public.multiclass_f1_score(*tensors, 10, average="micro")))
    assert figures["f1_macro"] == pytest.approx(100 * float(public.multiclass_f1_score(*tensors, 10)), rel=1e-5)
    confusion = measure(Same(), split, EUROSAT, 8).confusion_KK
    assert np.array_equal(confusion, reference.confusion_matrix(target, predicted, labels=range(10)))


def test_maps_against_scikit_learn_and_the_public_code():
    """The public code calls torchmetrics' jaccard_index and accuracy with these arguments."""
    split = split_of(CLOUD, 20)
    figures = computed(CLOUD, split)
    scores, target = torch.from_numpy(split.levels[0][0]), torch.from_numpy(split.targets).long()
    options = {"task": "multiclass", "num_classes": 5, "ignore_index": 255}
    assert figures["miou"] == pytest.approx(100 * float(jaccard_index(scores, target, **options)), rel=1e-5)
    accuracy = public.multiclass_accuracy(scores, target, 5, average="micro", ignore_index=255)
    assert figures["oa"] == pytest.approx(100 * float(accuracy), rel=1e-5)
    known = target != 255
    flat, predicted = target[known].numpy(), scores.argmax(1)[known].numpy()
    assert set(flat) == {0, 1, 3}
    assert set(predicted) == {0, 1}  # 2 and 4 neither occur nor are predicted; 3 only occurs
    assert figures["miou"] == pytest.approx(100 * reference.jaccard_score(flat, predicted, average="macro"))
    confusion = measure(Same(), split, CLOUD, 8).confusion_KK
    iou = class_iou(confusion)
    expected = reference.jaccard_score(flat, predicted, average=None, labels=[0, 1, 3])
    assert iou[[0, 1, 3]] == pytest.approx(expected)
    assert np.isnan(iou[[2, 4]]).all()


def test_labels_against_scikit_learn_and_torchmetrics():
    split = split_of(LABELS, 200)
    figures = computed(LABELS, split)
    scores, target = torch.from_numpy(split.levels[0][0]).sigmoid(), torch.from_numpy(split.targets)
    s, t = scores.numpy(), split.targets
    assert figures["map"] == pytest.approx(100 * reference.average_precision_score(t, s, average="micro"))
    assert figures["map_macro"] == pytest.approx(
        100 * reference.average_precision_score(t[:, :5], s[:, :5], average="macro")
    )
    assert figures["f1_micro"] == pytest.approx(100 * reference.f1_score(t, s > 0.5, average="micro"))
    assert figures["f1_macro"] == pytest.approx(100 * reference.f1_score(t, s > 0.5, average="macro", zero_division=0))
    for name, average, function in (
        ("map", "micro", public.multilabel_average_precision),
        ("map_macro", "macro", public.multilabel_average_precision),
        ("f1_micro", "micro", public.multilabel_f1_score),
        ("f1_macro", "macro", public.multilabel_f1_score),
    ):
        # A label that never occurs is left out of our mean of average precisions; torchmetrics counts it as 0.
        labels = 5 if name == "map_macro" else 6
        value = function(scores[:, :labels], target[:, :labels], num_labels=labels, average=average)
        assert figures[name] == pytest.approx(100 * float(value), rel=1e-5), name
    batches = [
        100 * reference.average_precision_score(t[b : b + 8], s[b : b + 8], average="micro") for b in range(0, 200, 8)
    ]
    assert figures["map_batchmean"] == pytest.approx(np.mean(batches))


def test_values_against_scikit_learn():
    split = split_of(NO2, 30)
    figures = computed(NO2, split)
    known = ~np.isnan(split.targets)
    values = split.targets[known] * 3.9948, split.levels[0][0][:, 0][known] * 3.9948
    assert figures["rmse"] == pytest.approx(reference.root_mean_squared_error(*values), rel=1e-6)
    assert figures["mae"] == pytest.approx(reference.mean_absolute_error(*values), rel=1e-6)


def test_no_known_target_is_told_and_a_missing_sample_found():
    for task in (CLOUD, NO2):
        split = split_of(task, 4)
        target = np.full_like(split.targets, 255 if task is CLOUD else np.nan)
        with pytest.raises(InputError, match=f"{task.name}: no sample of the split has a known target"):
            computed(task, dataclasses.replace(split, targets=target))
    part = measure(Same(), split_of(EUROSAT, 20), EUROSAT, 8, part=(0, 2))
    with pytest.raises(AssertionError, match="8 samples evaluated of a split of 20"):
        part.compute(20)
    assert np.isnan(average_precision(np.ones(3), np.zeros(3)))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_parts_in_any_order_are_the_whole(data):
    """However samples are shared out, cut into batches and ordered: the same figures, to the last bit."""
    task = data.draw(st.sampled_from([EUROSAT, CLOUD, LABELS, NO2]))
    split = split_of(task, 40, seed=data.draw(st.integers(0, 3)))
    order = np.array(data.draw(st.permutations(range(40))))
    cuts = sorted(data.draw(st.sets(st.integers(1, 39), max_size=6)))
    scores, target = torch.from_numpy(split.levels[0][0]), torch.from_numpy(split.targets)
    target = target if task.kind == "regression" else target.long()
    scores = scores[:, 0] if task.kind == "regression" else scores
    whole = make_metrics(task)
    whole.update(scores, target)
    parts = []
    for index in np.split(order, cuts):
        part = make_metrics(task)
        for batch in np.array_split(index, 2):
            part.update(scores[batch], target[batch])
        parts.append(part)
    first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
    for part in parts:
        first.merge(part)
    assert first.compute() == whole.compute()
    assert first.known == whole.known


def test_workers_merge_to_what_one_process_computes():
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for task in (EUROSAT, CLOUD, LABELS, NO2):
            futures = [pool.submit(evaluate_part, task.name, which, 3) for which in range(3)]
            merged = Evaluation(task)
            for future in reversed(futures):
                merged.merge(future.result())
            assert merged.compute(50) == computed(task, split_of(task, 50))
