"""What the features of a benchmark sample are: which flips, which precision, which numbers are stored.

The benchmark augments probes' training images by a horizontal and a vertical flip, each with probability 0.5 (its dense
tasks also rotate some, which a frozen encoder cannot serve from a cache; ours do not). So the four flipped copies of a
training image are all there is to encode, and a probe draws among them; validation and test images are encoded once.

Stored are float32 for pooled features, float16 for dense ones, whatever the encoder computes in: bfloat16 has 8 bits of
significand, float16 11, and what exceeds its range is refused, so under bf16 autocast nothing is lost by storing.

Shapes: F flips, N samples, B batch, T dates, D feature width, h w token grid, H W image, C channels, M metadata fields.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.bench.task import Task
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import Sensor
from copernicus.models.encoder import Encoder

FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""The flipped axes of each copy: none, horizontal, vertical, both."""

Precision = Literal["float32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bf16")

Images: TypeAlias = "Tensor | Sequence[Tensor]"
"""(B, C, H, W); of time series, whose numbers of dates differ, one (T, C, H, W) a sample."""


def collate(samples: Sequence[Mapping[str, Any]]) -> tuple[Images, Images]:
    """Images and metadata of samples as `encode_images` takes them."""
    images, metadata = ([sample[name] for sample in samples] for name in ("image", "metadata"))
    if images[0].ndim == 4:
        return images, metadata
    return torch.stack(images), torch.stack(metadata)


def encode_images(
    encoder: Encoder, task: Task, x_BCHW: Images, metadata: Images, sensors: tuple[Sensor, ...]
) -> list[Tensor]:
    """Features of a batch as the task wants them: [(B, D)], or (B, D, h, w) per level for a dense task.

    Change detection encodes each date on its own and subtracts, after - before; of a time series it is the mean over its
    dates of each date's features.

    Args:
        x_BCHW: normalised images, the channels of all dates in order of time; or of each sample a series (T, C, H, W).
        metadata: (B, M), or (B, dates, M); of each series (T, M).
        sensors: the sensor of each date; of a series, the first is that of all.
    """
    if not isinstance(x_BCHW, Tensor):
        dates = [len(x_TCHW) for x_TCHW in x_BCHW]
        every = _encode(encoder, task, torch.cat(list(x_BCHW)), torch.cat(list(metadata)), sensors[0])
        return [torch.stack([one.mean(0) for one in answer.split(dates)]) for answer in every]
    assert isinstance(metadata, Tensor)
    if task.dates == 1:
        return _encode(encoder, task, x_BCHW, metadata, sensors[0])
    before, after = (
        _encode(encoder, task, x, metadata[:, date], sensor)
        for date, (x, sensor) in enumerate(zip(x_BCHW.chunk(task.dates, dim=1), sensors, strict=True))
    )
    return [b - a for a, b in zip(before, after, strict=True)]


def _encode(encoder: Encoder, task: Task, x_BCHW: Tensor, metadata: Tensor, sensor: Sensor) -> list[Tensor]:
    if task.dense:
        return encoder.encode_dense(x_BCHW, sensor, metadata, normalize=False)
    return [encoder.encode(x_BCHW, sensor, metadata, normalize=False)]


def stored_features(
    encoder: Encoder,
    task: Task,
    x_BCHW: Images,
    metadata: Images,
    sensors: tuple[Sensor, ...],
    precision: Precision,
    ids: Sequence[str],
) -> list[np.ndarray]:
    """The numbers that are kept of a batch: per level (B, D) float32, or (B, D, h, w) float16 of a dense task.

    Args:
        encoder: used in evaluation mode, without gradients, where it lies.
        ids: of the samples, for messages.

    Raises:
        ValueError: features of a sample, which is named, are not finite.
    """
    device = device_of(encoder)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with frozen(encoder), autocast:
        answers = encode_images(encoder, task, _to(x_BCHW, device), _to(metadata, device), sensors)
    dtype = np.dtype(np.float16 if task.dense else np.float32)
    stored = []
    for level, answer in enumerate(answers):
        with np.errstate(over="ignore"):  # what is too large for float16 is found below
            values = answer.float().cpu().numpy().astype(dtype)
        sound_B = np.isfinite(values).reshape(len(values), -1).all(1)
        if not sound_B.all():
            raise ValueError(
                f"{task.name}: the encoder's features (level {level}) are not finite as {dtype} for sample "
                f"{ids[int(sound_B.argmin())]}"
            )
        stored.append(values)
    return stored


def flipped(images: Images, axes: tuple[int, ...]) -> Images:
    return images.flip(axes) if isinstance(images, Tensor) else [image.flip(axes) for image in images]


def stored_targets(task: Task, batch: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Targets of samples as they are kept: (B,) or (B, K) int64, (B, H, W) int16 class ids or float32."""
    targets = torch.stack([sample["target"] for sample in batch]).numpy()
    return targets.astype(np.int16) if task.dense and task.kind != "regression" else targets


def flipped_targets(targets_B: np.ndarray, flips: np.ndarray) -> Tensor:
    """Targets of some samples, those of pixels flipped as the samples are."""
    target = torch.from_numpy(np.asarray(targets_B))
    if target.ndim == 3 and flips.any():
        target = torch.stack([one.flip(FLIPS[flip]) for one, flip in zip(target, flips, strict=True)])
    return target if target.is_floating_point() else target.long()


def device_of(encoder: Any) -> torch.device:
    """Where an encoder's first parameter lies; the CPU for one without any."""
    first = next(iter(encoder.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _to(images: Images, device: torch.device) -> Images:
    return images.to(device) if isinstance(images, Tensor) else [image.to(device) for image in images]


@contextmanager
def frozen(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode without gradients; the mode from before returns afterwards."""
    training = encoder.training
    encoder.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        encoder.train(training)


def encoder_identity(encoder: Encoder, sensor: Sensor, size: int) -> str:
    """A digest of an encoder: its weights, and its answer to a fixed image.

    The answer tells apart encoders of equal weights that compute something else (number of heads, pooling, language
    embeddings, code). It is rounded coarsely, so that another number of threads gives the same digest.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    rng = generator("encoder identity")
    image = torch.from_numpy(rng.standard_normal((1, sensor.channels, size, size), np.float32))
    metadata = torch.tensor([[7.0, 47.0, 18262.0, sensor.token_area_km2]])
    device = device_of(encoder)
    with frozen(encoder):
        image, metadata = image.to(device), metadata.to(device)
        answers = [
            encoder.encode(image, sensor, metadata, normalize=False),
            *(level.mean((-2, -1)) for level in encoder.encode_dense(image, sensor, metadata, normalize=False)),
        ]
    for answer in answers:
        digest.update(coarse(answer.flatten()[:16]))
    return digest.hexdigest()


def reading_identity(sample: Mapping[str, Any]) -> str:
    """A digest of a sample as it is read, coarse likewise: it changes with the code that reads, scales and resizes."""
    digest = hashlib.sha256(str(tuple(sample["image"].shape)).encode())
    for name in ("image", "metadata", "target"):
        values = torch.nan_to_num(sample[name].flatten().double())
        digest.update(coarse(values[:: max(1, len(values) // 64)][:64]))
    return digest.hexdigest()


def coarse(values: Tensor) -> bytes:
    """A byte for each of some values, in 64ths of the largest."""
    values = values.detach().cpu().double()
    return torch.round(values / values.abs().max().clamp(min=1e-30) * 64).to(torch.int8).numpy().tobytes()
