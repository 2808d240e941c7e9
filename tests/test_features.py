"""Features are what the encoder answers to what the reader gives, flipped; the cache finds only what is the same."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_encoders import GridEncoder
from bench_files import write_cloud, write_eurosat, write_flood, write_tif

from copernicus.datasets import TASKS, InputError
from copernicus.platform.features import FLIPS, encode_task


@pytest.fixture
def bench(tmp_path) -> Path:
    listed = {"train": [("River", 1), ("Forest", 1), ("SeaLake", 1)], "val": [("River", 2)], "test": [("Forest", 2)]}
    write_eurosat(tmp_path / "bench/eurosat_s2", listed)
    write_cloud(tmp_path / "bench/cloud_s3", {"train": 3, "val": 2, "test": 1})
    write_flood(tmp_path / "bench/flood_s1", {"train": 3, "val": 1, "test": 1})
    return tmp_path / "bench"


def encode(bench: Path, name: str, encoder, size: int, **options):
    return encode_task(encoder, TASKS[name], bench, bench.parent / "cache", image_size=size, batch_size=2, **options)


def test_pooled_features_of_the_four_flips(bench):
    encoder = GridEncoder(13)
    features = encode(bench, "eurosat_s2", encoder, 64)
    dataset = TASKS["eurosat_s2"].open(bench, "train", image_size=64)
    train = features.splits["train"]
    assert [level.shape for level in train.levels] == [(4, 3, 16)]
    assert train.levels[0].dtype == np.float32
    assert train.ids == ("River_1", "Forest_1", "SeaLake_1")
    assert train.targets.tolist() == [8, 1, 9]
    sensor = TASKS["eurosat_s2"].sensor
    images = {
        "": lambda x: x,
        "h": lambda x: x[:, :, ::-1],
        "v": lambda x: x[:, ::-1],
        "hv": lambda x: x[:, ::-1, ::-1],
    }
    for flip, move in enumerate(images.values()):
        for n, sample in enumerate(dataset):
            x = torch.from_numpy(move(sample["image"].numpy()).copy())[None]
            expected = encoder.encode(x, sensor, sample["metadata"][None], normalize=False)[0].detach().numpy()
            np.testing.assert_allclose(train.levels[0][flip, n], expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(train.levels[0][0], train.levels[0][1], atol=1e-3)
    assert features.splits["val"].flips == 1
    assert features.dims == (16,)


def test_dense_features_and_labels(bench):
    encoder = GridEncoder(21)
    features = encode(bench, "cloud_s3", encoder, 48)
    train = features.splits["train"]
    assert [level.shape for level in train.levels] == [(4, 3, 8, 6, 6)] * 2
    dataset = TASKS["cloud_s3"].open(bench, "train", image_size=48)
    x = dataset[2]["image"][None].flip(FLIPS[3])
    expected = encoder.encode_dense(x, TASKS["cloud_s3"].sensor, dataset[2]["metadata"][None], normalize=False)
    for level, answer in zip(train.levels, expected, strict=True):
        np.testing.assert_allclose(level[3, 2], answer[0].detach().numpy(), rtol=2e-3, atol=1e-3)
    assert train.targets.dtype == np.int16
    assert np.array_equal(train.targets[1], dataset[1]["target"].numpy())


def test_change_detection_subtracts_before_from_after(bench):
    encoder = GridEncoder(2)
    features = encode(bench, "flood_s1", encoder, 32, flips=False)
    sample = TASKS["flood_s1"].open(bench, "train", image_size=32)[1]
    sensor = TASKS["flood_s1"].sensor
    before = encoder.encode_dense(sample["image"][None, :2], sensor, sample["metadata"][None, 0], normalize=False)
    after = encoder.encode_dense(sample["image"][None, 2:], sensor, sample["metadata"][None, 1], normalize=False)
    assert features.splits["train"].flips == 1
    for level, a, b in zip(features.splits["train"].levels, before, after, strict=True):
        np.testing.assert_allclose(level[0, 1], (b - a)[0].detach().numpy(), rtol=2e-3, atol=1e-3)


def test_the_same_is_found_and_anything_else_is_not(bench):
    task = "eurosat_s2"
    encoder = GridEncoder(13)
    first = encode(bench, task, encoder, 64)
    assert not first.cached
    encoder.calls = 0
    again = encode(bench, task, GridEncoder(13), 64)
    assert again.cached
    assert again.folders == first.folders
    assert not encode(bench, task, encoder, 32).cached  # another size
    assert not encode(bench, task, encoder, 64, preset="published").cached
    assert not encode(bench, task, encoder, 64, flips=False).cached
    assert not encode(bench, task, GridEncoder(13, seed=1), 64).cached  # other weights

    class Negated(GridEncoder):  # the same weights, another function
        def encode(self, *args, **options):
            return -super().encode(*args, **options)

    other = encode(bench, task, Negated(13), 64)
    assert not other.cached
    np.testing.assert_array_equal(other.splits["val"].levels[0], -first.splits["val"].levels[0])
    os.utime(bench / "eurosat_s2/all_imgs/River/River_1.tif", ns=(1, 1))
    changed = encode(bench, task, encoder, 64)
    assert changed.folders["train"] != first.folders["train"]
    assert changed.folders["val"] == first.folders["val"]


def test_an_interrupted_encoding_goes_on_where_it_stopped(tmp_path):
    listed = {"train": [("River", i) for i in range(9)], "val": [("River", 10)], "test": [("Forest", 2)]}
    write_eurosat(tmp_path / "bench/eurosat_s2", listed)

    def run(cache, progress=None):
        folder = tmp_path / cache
        encoder = GridEncoder(13)
        options = {"image_size": 64, "batch_size": 1, "progress": progress}
        return encode_task(encoder, TASKS["eurosat_s2"], tmp_path / "bench", folder, **options)

    def stop(split, done, samples):
        if (split, done) == ("train", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cache", stop)
    assert all(name.startswith(".") for name in os.listdir(tmp_path / "cache/eurosat_s2"))
    seen = []
    features = run("cache", lambda *step: seen.append(step))
    assert 1 <= len([step for step in seen if step[0] == "train"]) <= 6  # three at least are not encoded again
    assert seen[-3:] == [("train", 9, 9), ("val", 1, 1), ("test", 1, 1)]
    reference = run("other")
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(features.splits[split].levels[0], reference.splits[split].levels[0])
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path / "cache/eurosat_s2")) == ["test", "train", "val"]


def test_bad_input_stores_nothing(tmp_path):
    listed = {
        "train": [("River", i) for i in range(5)],
        "val": [("River", 10)],
        "test": [("Forest", i) for i in range(3)],
    }
    write_eurosat(tmp_path / "eurosat_s2", listed)
    task, cache = TASKS["eurosat_s2"], tmp_path / "cache"

    class Faulty(GridEncoder):
        """Not finite for the one image that is bright."""

        def encode(self, x_BCHW, *args, **options):
            return super().encode(x_BCHW, *args, **options) / (x_BCHW.mean((1, 2, 3)) < 50)[:, None]

    write_tif(
        tmp_path / "eurosat_s2/all_imgs/River/River_3.tif", np.full((13, 64, 64), 65000, np.uint16), 32633, 0, 0, 10
    )
    with pytest.raises(ValueError, match=r"not finite as float32 for sample River_3$"):
        encode_task(Faulty(13), task, tmp_path, cache, image_size=64)
    assert os.listdir(cache / "eurosat_s2") == []
    (tmp_path / "eurosat_s2/all_imgs/Forest/Forest_2.tif").write_bytes(b"")
    with pytest.raises(InputError, match=r"Forest_2\.tif"):
        encode_task(GridEncoder(13), task, tmp_path, cache, image_size=64)
    assert sorted(name.split("-")[0] for name in os.listdir(cache / "eurosat_s2")) == ["train", "val"]


def test_the_encoder_is_left_as_it_was_and_features_travel_light(bench):
    encoder = GridEncoder(21).train()
    state = torch.random.get_rng_state()
    features = encode(bench, "cloud_s3", encoder, 48)
    assert encoder.training
    assert torch.equal(torch.random.get_rng_state(), state)
    sent = pickle.dumps(features)
    assert len(sent) < 2000 < features.splits["train"].levels[0].nbytes
    received = pickle.loads(sent)
    np.testing.assert_array_equal(received.splits["train"].levels[1], features.splits["train"].levels[1])
    assert isinstance(received.splits["train"].levels[1], np.memmap)
