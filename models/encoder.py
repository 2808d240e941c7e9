"""What a probe asks of an encoder, and how an encoder says what it takes.

Shapes: B batch, C channels, H W image, D feature width, h w token grid.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from copernicus.datasets.sensors import InputError, Sensor


class Encoder(Protocol):
    """A ``torch.nn.Module`` with the methods below; every model of the zoo but the masked autoencoders is one.

    Attributes:
        inputs: what it takes, in words, for messages: "spectral sensors".
        training: the module's mode.
    """

    inputs: str
    training: bool

    @staticmethod
    def takes(sensor: Sensor) -> bool:
        """Whether an encoder of this class, built for the sensor, encodes it. Asked of the class, before it is built."""
        ...

    def encode(self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Images -> features (B, D), with gradients where the caller's mode has them.

        Args:
            x_BCHW: in the sensor's raw units; with ``normalize=False``, already normalised by the sensor's spec (an
                encoder with statistics of its own undoes that with ``raw_values``).
            sensor: what the channels are.
            metadata: (B, 4) rows of ``METADATA_FIELDS``, NaN (or None for all) where unknown.
        """
        ...

    def encode_dense(
        self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None = None, normalize: bool = True
    ) -> list[Tensor]:
        """Images -> maps for dense heads, shallowest first, each (B, D, h, w); widths and grids may differ."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...
    def train(self, mode: bool = True) -> Any: ...


def images_for(parameter: Tensor, x_BCHW: Any, sensor: Any) -> Tensor:
    """A user's images as float32 where the model lies.

    Args:
        parameter: any of the model's.

    Raises:
        InputError: not a batch of images, no sensor, or a model whose weights are not float32.
    """
    if not isinstance(sensor, Sensor):
        raise InputError(f'the sensor is a {type(sensor).__name__}; give a Sensor, as in SENSORS["s2_toa"]')
    if not isinstance(x_BCHW, Tensor) or x_BCHW.ndim != 4:
        shape = tuple(x_BCHW.shape) if hasattr(x_BCHW, "shape") else type(x_BCHW).__name__
        raise InputError(f"images: expected a tensor of shape (B, {sensor.channels}, H, W), got {shape}")
    if parameter.dtype != torch.float32:
        raise InputError(
            f"the model's weights are {parameter.dtype}; keep them float32, and encode under torch.autocast for speed"
        )
    return x_BCHW.to(parameter.device, torch.float32)


def check_takes(name: str, kind: Any, sensor: Sensor) -> None:
    """Refuse a sensor that an encoder does not take.

    Args:
        name: of the encoder, for the message.
        kind: the encoder, or its class.

    Raises:
        InputError: it does not take the sensor; the message says what it takes.
    """
    try:
        takes = kind.takes(sensor)
    except Exception as error:  # an encoder of somebody's own
        raise InputError(
            f"{name}: its takes(sensor) fails ({type(error).__name__}: {error}); is it a staticmethod?"
        ) from error
    if not takes:
        raise InputError(f"{name} takes {kind.inputs}; {describe(sensor)} is not among them")


def describe(sensor: Sensor) -> str:
    """The sensor in a few words, for messages."""
    if not sensor.spectral:
        return f"sensor {sensor.name!r} (the variable {sensor.variable!r}, no wavelengths)"
    if sensor.channels > 4:
        return f"sensor {sensor.name!r} ({sensor.channels} bands, {sensor.bands[0]} .. {sensor.bands[-1]})"
    return f"sensor {sensor.name!r} ({', '.join(sensor.bands)})"


def raw_values(x_BCHW: Tensor, sensor: Sensor) -> Tensor:
    """Normalised values -> the sensor's raw units: the inverse of ``Sensor.normalize``.

    What was missing was replaced by 0 and returns as the mean.
    """
    scale, mean, std = (x_BCHW.new_tensor(v)[:, None, None] for v in (sensor.scale, sensor.mean, sensor.std))
    return (x_BCHW * std + mean) / scale
