"""What a pretraining step draws at random, each draw keyed by what it is for: never by worker, process or order.

The same (seed, epoch, grid) masks the same patches whichever worker meets the grid, and after a resumed run too.
Shapes: B batch, L patch tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.sensors import Sensor

CHANNEL_SHARE = 0.75
"""At least this share of a multispectral sensor's bands takes part in a step (published: s2_toa and s3_olci)."""

MULTISPECTRAL_BANDS = 4
"""A spectral sensor of fewer bands (radar) always uses all of them."""


def keyed_rng(*key: int | str) -> np.random.Generator:
    """A generator that depends on the key alone."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


@dataclass(frozen=True)
class Draws:
    """Random arguments of ``MaskedAutoencoder.forward``, each sensor name -> value."""

    noise: dict[str, Tensor]
    channels: dict[str, list[int]]
    metadata: dict[str, Tensor]


def draw_step(
    samples: Mapping[str, Tensor],
    sensors: Mapping[str, Sensor],
    metadata: Mapping[str, Tensor],
    grids: Sequence[str],
    *,
    seed: int,
    epoch: int,
    drop_prob: float = 0.0,
    subset_channels: bool = True,
) -> Draws:
    """Masking noise, channel subsets and metadata dropout for one batch.

    Args:
        samples: sensor name -> images (B, C, H, W); only their shapes are read.
        sensors: sensor name -> what its channels are.
        metadata: sensor name -> (B, 4) rows.
        grids: the B grids' keys.
        seed, epoch: the run's seed and the pass over the data.
        drop_prob: probability with which a row's place, time and area are each made unknown (published: 0, so that
            the learned tokens for the unknown were never trained, although the benchmark relies on them).
        subset_channels: False uses all bands, as validation should.

    Returns:
        New tensors; the metadata passed in is not changed. The channel subset is one per batch, for its rows pass
        through one kernel; it is keyed by the batch's first grid.
    """
    noise, channels, dropped = {}, {}, {}
    for name, x_BCHW in samples.items():
        sensor = sensors[name]
        tokens = (x_BCHW.shape[2] // sensor.patch_kernel) * (x_BCHW.shape[3] // sensor.patch_kernel)
        rows = [keyed_rng(seed, epoch, grid, name, "mask").random(tokens, dtype=np.float32) for grid in grids]
        noise[name] = torch.from_numpy(np.stack(rows))
        if subset_channels and sensor.spectral and sensor.channels >= MULTISPECTRAL_BANDS:
            rng = keyed_rng(seed, epoch, grids[0], name, "channels")
            count = rng.integers(int(CHANNEL_SHARE * sensor.channels), sensor.channels, endpoint=True)
            channels[name] = sorted(int(c) for c in rng.permutation(sensor.channels)[:count])
        dropped[name] = metadata[name].clone()
        if drop_prob:
            for row, grid in enumerate(grids):
                place, time, area = keyed_rng(seed, epoch, grid, name, "metadata").random(3) < drop_prob
                dropped[name][row, torch.tensor([place, place, time, area])] = torch.nan
    return Draws(noise, channels, dropped)
