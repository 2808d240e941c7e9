"""The reading benchmark's own parts: both sides make the same images, and what it counts is what was used."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from copernicus.datasets.augment import apply_crop, random_crop
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))


@pytest.mark.parametrize(("side", "size"), [(40, 64), (40, 40), (80, 40)])
def test_the_public_sides_crop_is_the_same_image_as_ours(side, size):
    from reading.public import _crop

    x_CHW = torch.from_numpy(np.random.default_rng(0).normal(size=(3, side, side)).astype(np.float32))
    for seed in range(20):
        ours = torch.from_numpy(apply_crop(x_CHW.numpy(), random_crop(np.random.default_rng(seed), side, side), size))
        torch.testing.assert_close(_crop(x_CHW, np.random.default_rng(seed), size), ours, rtol=1e-4, atol=1e-4)


def test_the_floor_reads_the_numbers_that_a_draw_uses(tmp_path):
    from reading.made import SMALL, draw_ranges, make_shards

    shards = make_shards(tmp_path, SMALL, 4, 2)
    draws = draw_ranges(SMALL, shards, np.random.default_rng(0))
    assert sorted(shard for shard, _ in draws) == sorted([*shards, *shards])
    for shard, ranges in draws:
        stored = _arrays(shard)
        with open(shard, "rb") as file:
            for sensor, (offset, size) in zip(sorted(SENSORS), ranges, strict=True):  # as a tar lists them
                file.seek(offset)
                data = file.read(size)
                images = [image for array in stored[sensor] for image in _images(array, sensor)]
                assert any(image.tobytes() == data for image in images)


def test_repeated_shards_hold_the_same_arrays_under_keys_of_their_own(tmp_path):
    from reading.made import SMALL, make_shards, repeat_shard

    (one,) = make_shards(tmp_path / "one", SMALL, 2, 2)
    shards = repeat_shard(one, tmp_path / "more", 3)
    assert len({key for shard in shards for key in _keys(shard)}) == 6
    for shard in shards:
        for sensor, arrays in _arrays(shard).items():
            for array, original in zip(arrays, _arrays(one)[sensor], strict=True):
                np.testing.assert_array_equal(array, original)


def test_usage_and_memory_are_those_of_the_whole_tree(tmp_path):
    from reading.measure import memory_bytes, tree, usage

    (tmp_path / "data").write_bytes(bytes(30_000_000))
    grandchild = "import sys; x = open(sys.argv[1], 'rb').read() * 3; print('ready', flush=True); sys.stdin.read()"
    child = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    command = [sys.executable, "-c", child, grandchild, str(tmp_path / "data")]
    before = usage(os.getpid())
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(tree(process.pid)) == 2
        assert 90e6 < memory_bytes(process.pid) < 200e6
        assert 30e6 < usage(process.pid).read_bytes < 40e6
        assert usage(process.pid).cpu_s > 0
        process.communicate("")
    # What an ended child used stays counted with its parent.
    assert usage(os.getpid()).since(before).read_bytes > 30e6


def _members(shard):
    import io
    import tarfile

    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if extension.endswith(".pth"):
                yield (
                    key,
                    extension.removesuffix(".pth"),
                    torch.load(io.BytesIO(tar.extractfile(member).read())).numpy(),
                )


def _keys(shard):
    return {key for key, _, _ in _members(shard)}


def _arrays(shard):
    arrays: dict[str, list[np.ndarray]] = {}
    for _, sensor, array in _members(shard):
        arrays.setdefault(sensor, []).append(array)
    return arrays


def _images(array, sensor):
    return array.reshape(-1, *array.shape[len(LEADING_AXES[sensor]) :])
