"""What a probe asks of an encoder, and how an encoder says what it takes.

Shapes: B batch, C channels, H W image, D feature width, h w token grid.
"""

from __future__ import annotations

from typing import Any, Protocol

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


def check_takes(name: str, kind: Any, sensor: Sensor) -> None:
    """Refuse a sensor that an encoder does not take.

    Args:
        name: of the encoder, for the message.
        kind: the encoder, or its class.

    Raises:
        InputError: it does not take the sensor; the message says what it takes.
    """
    if not kind.takes(sensor):
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
