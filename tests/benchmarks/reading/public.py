"""The public pipeline of Copernicus-Pretrain, rebuilt from its description for the reading benchmark.

WebDataset over the shards -> shuffle buffer -> default decode (whole grids, pickles loaded) -> grids that lack a sensor
dropped -> one random patch and date of each sensor, a view of the whole array -> random resized crop and flip -> batches
-> WebLoader. The crop is its own here, so that what we improve in ours does not improve it too; the images agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import webdataset
from reading.work import Work

from copernicus.datasets.augment import random_crop
from copernicus.datasets.shards import LEADING_AXES, parse_image_name


def prepare(work: Work) -> None:
    torch.set_num_threads(1)


def index(work: Work) -> None:
    """It has none: shards are read from front to back."""


def stream(work: Work, index: None) -> Iterator[int]:
    shards = list(work.shards)
    dataset = webdataset.WebDataset(
        shards, resampled=not work.once, shardshuffle=len(shards) if work.once else False
    ).shuffle(work.shuffle_buffer)
    dataset = dataset.decode().select(partial(_complete, sensors=tuple(work.sizes))).map(partial(_select, work=work))
    if work.task == "batches":
        dataset = dataset.batched(
            work.batch_size, collation_fn=partial(_collate, names=(*work.sizes, "metadata")), partial=True
        )
    for delivered in webdataset.WebLoader(dataset, batch_size=None, num_workers=work.workers):
        yield len(delivered["metadata"]) if work.task == "batches" else 1


def _complete(sample: dict[str, Any], sensors: tuple[str, ...]) -> bool:
    return all(f"{name}.pth" in sample for name in sensors)


def _select(sample: dict[str, Any], work: Work) -> dict[str, Any]:
    rng = np.random.default_rng()
    out: dict[str, Any] = {}
    metadata = []
    for name, size in work.sizes.items():
        array, names = sample[f"{name}.pth"], sample["json"][name]
        at = tuple(int(rng.integers(n)) for n in array.shape[: len(LEADING_AXES[name])])
        for i in at or (0,):
            names = names[i]
        image = parse_image_name(names)
        metadata.append((image.lon, image.lat, image.days))
        x_CHW = array[at] if at else array[None]
        out[name] = _crop(x_CHW, rng, size) if work.task == "batches" else x_CHW
    out["metadata"] = np.array(metadata, np.float32)
    return out


def _crop(x_CHW: torch.Tensor, rng: np.random.Generator, size: int) -> torch.Tensor:
    crop = random_crop(rng, *x_CHW.shape[-2:])
    x_CHW = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
    if x_CHW.shape[-2:] != (size, size):
        # Where nothing shrinks, antialiasing changes nothing and costs twice the time: the public side is spared it.
        shrinks = crop.height > size or crop.width > size
        x_CHW = F.interpolate(x_CHW[None], (size, size), mode="bilinear", antialias=shrinks)[0]
    return x_CHW.flip(-1) if crop.flip else x_CHW


def _collate(samples: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([torch.as_tensor(s[name]) for s in samples]) for name in names}
