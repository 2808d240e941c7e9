"""Series, several labels, splits that are encoded when used, the limit of the cache, and the pool of actors."""

import dataclasses
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_encoders import GridEncoder
from bench_files import write_cloud, write_eurosat

from copernicus.datasets import TASKS, InputError
from copernicus.datasets.bench.task import Task
from copernicus.models.zoo import create_encoder
from copernicus.platform import eviction
from copernicus.platform.encoding import FLIPS, encode_images
from copernicus.platform.features import LiveSplit, SplitFeatures, encode_task, load_features
from copernicus.platform.probe import ProbeSettings, run_probe

EUROSAT, CLOUD = TASKS["eurosat_s2"], TASKS["cloud_s3"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    listed = {
        split: [(name, first + i) for i in range(count) for name in ("River", "Forest", "SeaLake")]
        for split, first, count in (("train", 0, 7), ("val", 100, 2), ("test", 200, 2))
    }
    write_eurosat(folder / "eurosat_s2", listed)
    write_cloud(folder / "cloud_s3", {"train": 5, "val": 2, "test": 2})
    return folder


@pytest.fixture(scope="module")
def vit():
    return create_encoder("copernicus_fm_base", EUROSAT.sensor, 0, embed_dim=192, depth=2, num_heads=4).eval()


@dataclasses.dataclass(frozen=True)
class SeriesTask(Task):
    """EuroSAT's images as series of one to three dates, with several labels each."""

    def open(self, folder, split, preset="default", image_size=None):
        return SeriesDataset(self, folder, split, preset, image_size)


class SeriesDataset:
    def __init__(self, task, folder, split, preset, size):
        self.task, self.split, self.preset, self.size, self.root = task, split, preset, size, folder
        self.below = EUROSAT.open(folder, split, preset, size)
        self.ids = self.below.ids

    def __len__(self):
        return len(self.below)

    def fingerprint(self):
        return hashlib.sha256(b"series" + self.below.fingerprint().encode()).hexdigest()

    def __getitem__(self, index):
        sample = self.below[index]
        factors = torch.tensor([1.0, 0.3, -0.5])[: index % 3 + 1]
        return {
            **sample,
            "image": factors[:, None, None, None] * sample["image"],
            "metadata": sample["metadata"].repeat(len(factors), 1),
            "target": torch.nn.functional.one_hot(sample["target"], 10),
        }


SERIES = SeriesTask(
    **{f.name: getattr(EUROSAT, f.name) for f in dataclasses.fields(Task)}
    | {"name": "series", "kind": "multilabel", "metric": "mAP"}
)


def test_a_series_is_the_mean_of_its_dates_features(bench, tmp_path):
    encoder = GridEncoder(13)
    features = encode_task(encoder, SERIES, bench, tmp_path, image_size=64, batch_size=4)
    train = features.splits["train"]
    dataset = SERIES.open(bench, "train", image_size=64)
    assert {len(sample["image"]) for sample in dataset} == {1, 2, 3}
    assert train.targets.shape == (21, 10)
    assert train.targets.dtype == np.int64
    for n, sample in enumerate(dataset):
        assert train.targets[n].tolist() == sample["target"].tolist()
        for flip, axes in enumerate(FLIPS):
            dates = [
                encoder.encode(x[None].flip(axes), EUROSAT.sensor, m[None], normalize=False)[0]
                for x, m in zip(sample["image"], sample["metadata"], strict=True)
            ]
            expected = sum(date.detach().double() for date in dates) / len(dates)
            np.testing.assert_allclose(train.levels[0][flip, n], expected, rtol=1e-4, atol=1e-5)
    live = encode_task(encoder, SERIES, bench, tmp_path, image_size=64, keep="live").splits["train"]
    index, flips = np.array([4, 2, 9]), np.array([0, 3, 1])
    (cached_BD,), labels = train.load(index, flips)
    (live_BD,), live_labels = live.load(index, flips)
    torch.testing.assert_close(cached_BD, live_BD, rtol=1e-5, atol=1e-6)
    assert torch.equal(labels, live_labels)


def test_dense_series_are_means_of_maps():
    task = dataclasses.replace(TASKS["cloud_s3"])
    encoder = GridEncoder(21)
    generator = torch.Generator().manual_seed(0)
    series = [torch.randn(t, 21, 16, 16, generator=generator) for t in (2, 1)]
    metadata = [torch.zeros(len(x), 4) for x in series]
    levels = encode_images(encoder, task, series, metadata, (task.sensor,))
    for n, x_TCHW in enumerate(series):
        dates = encoder.encode_dense(x_TCHW, task.sensor, torch.zeros(len(x_TCHW), 4), normalize=False)
        for level, date in zip(levels, dates, strict=True):
            torch.testing.assert_close(level[n], date.mean(0))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_pooled_features_of_a_vit_are_equal_up_to_rounding_cached_and_live(bench, tmp_path, vit, precision):
    options = {"image_size": 32, "precision": precision}
    cached = encode_task(vit, EUROSAT, bench, tmp_path, batch_size=7, **options).splits["train"]
    live = encode_task(vit, EUROSAT, bench, tmp_path, keep="live", **options).splits["train"]
    assert isinstance(cached, SplitFeatures)
    assert isinstance(live, LiveSplit)
    assert live.ids == cached.ids
    assert (live.flips, live.dims, len(live)) == (cached.flips, cached.dims, len(cached)) == (4, (192,), 21)
    assert np.array_equal(live.targets, cached.targets)
    live = pickle.loads(pickle.dumps(live))  # as a trial of another process gets it
    rng = np.random.default_rng(0)
    for batch in (4, 5, 21):
        index, flips = rng.permutation(21)[:batch], rng.integers(4, size=batch)
        (z_BD,), target = cached.load(index, flips)
        (live_BD,), live_target = live.load(index, flips)
        # The same bits, unless the processor's matrix product sums in another order for another number of rows.
        torch.testing.assert_close(z_BD, live_BD, rtol=1e-6, atol=1e-6)
        assert torch.equal(target, live_target)


def test_bf16_is_another_precision_and_another_entry(bench, tmp_path, vit):
    kept = {p: encode_task(vit, EUROSAT, bench, tmp_path, image_size=32, precision=p) for p in ("float32", "bf16")}
    assert not kept["bf16"].cached
    a, b = (kept[p].splits["val"].levels[0] for p in ("float32", "bf16"))
    assert 1e-5 < np.abs(a - b).max() / np.abs(a).max() < 0.05
    with pytest.raises(InputError, match="precision 'fp8' must be one of float32, bf16"):
        encode_task(vit, EUROSAT, bench, tmp_path, image_size=64, precision="fp8")


def test_a_probe_is_the_same_from_the_cache_and_by_encoding_again(bench, tmp_path, vit):
    results = {}
    for keep in ("cached", "live"):
        features = encode_task(vit, EUROSAT, bench, tmp_path, image_size=64, keep=keep)
        settings = ProbeSettings(lr=0.1, epochs=3, batch_size=8)
        results[keep] = run_probe(features, EUROSAT, settings, seed=1)
    assert results["live"].curves[-1]["train_loss"] == pytest.approx(
        results["cached"].curves[-1]["train_loss"], rel=1e-5
    )
    for split in ("val", "test"):
        live, cached = getattr(results["live"], split), getattr(results["cached"], split)
        assert live["oa"] == cached["oa"]
        assert live["loss"] == pytest.approx(cached["loss"], rel=1e-5)
    assert results["live"].best_epoch == results["cached"].best_epoch


def test_dense_features_agree_to_a_step_of_float16(bench, tmp_path):
    encoder = create_encoder("copernicus_fm_base", CLOUD.sensor, 0, embed_dim=192, depth=4, num_heads=4).eval()
    cached = encode_task(encoder, CLOUD, bench, tmp_path, image_size=48).splits["train"]
    live = encode_task(encoder, CLOUD, bench, tmp_path, image_size=48, keep="live").splits["train"]
    index, flips = np.array([3, 0, 4, 1]), np.array([1, 3, 0, 2])
    (levels, target), (live_levels, live_target) = cached.load(index, flips), live.load(index, flips)
    assert cached.levels[0].dtype == np.float16
    assert torch.equal(target, live_target)
    expected = CLOUD.open(bench, "train", image_size=48)[0]["target"].flip((-2, -1))
    assert torch.equal(target[1], expected)
    for level, other in zip(levels, live_levels, strict=True):
        torch.testing.assert_close(level, other, rtol=2**-10, atol=1e-5)
        assert (level == other).double().mean() > 0.99, "a step apart where rounding was close, else equal"


def test_what_does_not_fit_is_encoded_when_used(bench, tmp_path, caplog):
    def keep(cache_gb, keep="auto"):
        with caplog.at_level(logging.INFO):
            features = encode_task(
                GridEncoder(13), EUROSAT, bench, tmp_path, image_size=64, cache_gb=cache_gb, keep=keep
            )
        return [name for name, split in features.splits.items() if isinstance(split, SplitFeatures)]

    per_sample = 16 * 4  # bytes of a feature; a label takes 8
    others, train = 2 * 6 * (per_sample + 8), 21 * (4 * per_sample + 8)
    assert keep(0) == []
    assert keep((others + train - 1) / 1e9) == ["val", "test"]
    assert "features of train" in caplog.text
    assert keep((others + train) / 1e9) == ["train", "val", "test"]
    assert keep(0) == ["train", "val", "test"], "what is there is used"
    with pytest.raises(InputError, match="keep 'sometimes' one of auto, cached, live"):
        keep(0, "sometimes")


def test_a_disk_without_room_is_said_before_encoding(bench, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 100))
    with pytest.raises(InputError, match=r"its features take 0\.0 GB .* has room for 0\.0 GB"):
        encode_task(GridEncoder(13), EUROSAT, bench, tmp_path / "cache", image_size=64, keep="cached")
    features = encode_task(GridEncoder(13), EUROSAT, bench, tmp_path / "cache", image_size=64)
    assert all(isinstance(split, LiveSplit) for split in features.splits.values())


def test_new_features_send_old_ones_away_but_not_those_in_use(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(eviction, "GRACE_S", -1.0)

    def encode(seed, cache_gb):
        return encode_task(
            GridEncoder(13, seed=seed), EUROSAT, bench, tmp_path, image_size=64, cache_gb=cache_gb, keep="cached"
        )

    used, idle = encode(0, None), encode(1, None).folders
    encode(2, 1e-9)
    assert all(folder.is_dir() for folder in used.folders.values())
    assert not any(folder.is_dir() for folder in idle.values())
    folders = used.folders
    del used
    encode(3, 1e-9)
    assert not any(folder.is_dir() for folder in folders.values())
    with pytest.raises(InputError, match="they are not there; run the same command again"):
        load_features(folders["val"])


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from bench_encoders import GridEncoder
from copernicus.datasets import TASKS
from copernicus.platform.features import encode_task
def slow(split, done, samples):
    print(split, done, flush=True)
    time.sleep(0.1)
encode_task(GridEncoder(13), TASKS["eurosat_s2"], sys.argv[2], sys.argv[3], image_size=64, batch_size=1, progress=slow)
"""


def test_who_waits_goes_on_with_what_a_killed_process_had_encoded(bench, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(Path(__file__).parent), str(bench), str(tmp_path / "c")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line == "train 5\n":
            break
    killer = threading.Timer(0.3, os.kill, (first.pid, signal.SIGKILL))
    killer.start()
    seen = []
    features = encode_task(
        GridEncoder(13), EUROSAT, bench, tmp_path / "c", image_size=64, batch_size=1, progress=lambda *s: seen.append(s)
    )
    killer.join()
    assert first.wait() == -signal.SIGKILL
    first.stdout.close()
    trained = [done for split, done, _ in seen if split == "train"]
    assert len(trained) <= 21 - 5
    assert trained[-1] == 21
    reference = encode_task(GridEncoder(13), EUROSAT, bench, tmp_path / "r", image_size=64, batch_size=1)
    for split in features.splits:
        np.testing.assert_array_equal(features.splits[split].levels[0], reference.splits[split].levels[0])
    assert sorted(n.split("-")[0] for n in os.listdir(tmp_path / "c/eurosat_s2")) == ["test", "train", "val"]


def test_what_the_dense_benchmark_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    from dense_cache import Measured, count

    # 10 + 5 samples an epoch, 4 x 10 + 5 + 6 to keep; a sample takes 2 s to encode, 0.5 s to load, 3 MB.
    counted = count(Measured(2.0, 0.5, 0.1, 3_000_000), (10, 5, 6), epochs=100)
    assert counted.gb == pytest.approx(51 * 0.003)
    assert counted.once == pytest.approx(102 / 3600)
    assert (counted.load, counted.again) == (pytest.approx(750 / 3600), pytest.approx(3000 / 3600))
    assert counted.pays == pytest.approx(102 / 22.5)  # each epoch saves 15 x 1.5 s
    assert count(Measured(0.4, 0.5, 0.1, 3_000_000), (10, 5, 6), epochs=100).pays == float("inf")


@pytest.fixture(scope="module")
def session():
    from copernicus.platform.session import ray_session

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with ray_session() as resources:
        yield resources


@pytest.mark.slow
def test_a_pool_of_actors_gives_the_same_bits_and_outlives_a_killed_one(bench, tmp_path, session, vit):
    import psutil

    options = {"image_size": 64, "batch_size": 1}
    plain = encode_task(vit, EUROSAT, bench, tmp_path / "plain", **options)
    killed, seen = [], []

    def progress(split, done, samples):
        seen.append((split, done, samples))
        if len(seen) == 3:
            for process in psutil.Process().children(recursive=True):
                if "BatchEncoder" in "".join(process.cmdline()) and not killed:
                    killed.append(process.pid)
                    process.kill()
        if not killed:
            time.sleep(0.2)

    pooled = encode_task(
        vit, EUROSAT, bench, tmp_path / "pool", workers=2, cpus_per_worker=0.5, progress=progress, **options
    )
    assert killed
    assert seen[-1][1] == seen[-1][2]
    for split in plain.splits:
        assert pooled.splits[split].ids == plain.splits[split].ids
        np.testing.assert_array_equal(pooled.splits[split].levels[0], plain.splits[split].levels[0])
        np.testing.assert_array_equal(pooled.splits[split].targets, plain.splits[split].targets)
    assert len(os.listdir(tmp_path / "pool/eurosat_s2")) == 3
    with pytest.raises(InputError, match="a worker with 1000 CPUs and 0 GPUs fits no node"):
        encode_task(vit, EUROSAT, bench, tmp_path / "more", workers=1, cpus_per_worker=1000, **options)


@pytest.mark.slow
def test_an_actor_says_what_is_wrong_in_the_words_of_the_reader(tmp_path, session, vit):
    listed = {"train": [("River", i) for i in range(4)], "val": [("River", 5)], "test": [("Forest", 1)]}
    write_eurosat(tmp_path / "eurosat_s2", listed)
    (tmp_path / "eurosat_s2/all_imgs/River/River_2.tif").write_bytes(b"none")
    with pytest.raises(InputError, match=r"River_2\.tif: cannot be read as GeoTIFF"):
        encode_task(vit, EUROSAT, tmp_path, tmp_path / "cache", image_size=64, workers=1)
    assert os.listdir(tmp_path / "cache/eurosat_s2") == []
