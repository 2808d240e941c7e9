"""Pictures of predictions: every kind of task draws, and shows what it says."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from bench_files import noise_bench
from matplotlib.image import imread

from copernicus.datasets import TASKS
from copernicus.datasets.bench import VARIANTS, get_task
from copernicus.platform.probe import Examples, ProbeResult
from copernicus.platform.trial_pictures import draw_confusion, draw_trial, view


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise")
    noise_bench(folder)
    return folder


KINDS = (
    "eurosat_s1",
    "bigearthnet_s2",
    "dfc2020_s2",
    "flood_s1",
    "aq_no2_s5p",
    "aq_no2_s5p-seasonal",
    "lc100cls_s3-series",
)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_task_draws(bench, name):
    task = get_task(name)
    dataset = task.open(bench, "val", image_size=2 * task.sensor.patch_kernel)
    samples = [dataset[i] for i in range(min(2, len(dataset)))]
    target = np.stack([sample["target"].numpy() for sample in samples])
    predicted = np.where(target == task.ignore_index, 0, target) if task.kind != "regression" else np.nan_to_num(target)
    confusion = None if task.kind in ("multilabel", "regression") else np.eye(task.num_classes, dtype=np.int64)
    result = ProbeResult(task.metric_key, {}, {}, 1, [], {}, confusion=confusion)
    result = dataclasses.replace(result, examples=Examples(tuple(s["id"] for s in samples), predicted, target))
    drawn = draw_trial(task, dataset, result, "a title")
    assert set(drawn) == {"predictions.png"} | ({"confusion.png"} if confusion is not None else set())
    for png in drawn.values():
        assert imread(io.BytesIO(png)).std() > 0.01


def test_a_confusion_matrix_is_darkest_where_most_of_a_class_went():
    task = TASKS["eurosat_s2"]
    confusion = np.eye(10, dtype=np.int64) * 5
    right, wrong = (imread(io.BytesIO(draw_confusion(task, matrix, ""))) for matrix in (confusion, confusion[::-1]))

    def dark(image, x, y):
        """Share of dark blue in a tenth of the picture's width, at a corner of the matrix."""
        height, width = image.shape[:2]
        cut = image[int(y * height) : int((y + 0.1) * height), int(x * width) : int((x + 0.1) * width), :3]
        return ((cut[..., 2] - cut[..., 0] > 0.25) & (cut[..., 0] < 0.3)).mean()

    assert dark(right, 0.85, 0.55) > dark(wrong, 0.85, 0.55)
    assert right.shape == wrong.shape


def test_an_image_is_shown_in_true_colour():
    task = TASKS["eurosat_s2"]
    x_CHW = np.zeros((13, 8, 8), np.float32)
    x_CHW[task.sensor.bands.index("B04"), :4] = 1  # red above, green below
    x_CHW[task.sensor.bands.index("B03"), 4:] = 1
    image = view(task, x_CHW)
    assert image.shape == (8, 8, 3)
    np.testing.assert_allclose(image[0, 0], [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(image[7, 0], [0, 1, 0], atol=1e-6)
    assert view(TASKS["aq_no2_s5p"], np.ones((1, 4, 4), np.float32)).shape == (4, 4)
    assert view(TASKS["eurosat_s1"], np.ones((2, 4, 4), np.float32)).shape == (4, 4, 3)
    assert all(name.split("-")[0] in TASKS for name in VARIANTS)
