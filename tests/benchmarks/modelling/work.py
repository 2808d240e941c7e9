"""What both sides of the model benchmark are given: shapes, encoder cases, and seeded random inputs at published sizes.

Shapes: B batch, C channels, H W image, L patch tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from copernicus.datasets.sensors import SENSORS, Sensor
from copernicus.models.initialise import generator

MASK_RATIO = 0.7
TEACHER_DIM = 768


@dataclass(frozen=True)
class Shape:
    """Widths, depths and heads of encoder and decoder."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    @property
    def encoder(self) -> dict[str, Any]:
        return {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}

    @property
    def decoder(self) -> dict[str, Any]:
        return {
            "decoder_embed_dim": self.decoder_embed_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_num_heads": self.decoder_num_heads,
        }


BASE = Shape()
QUICK = Shape(192, 2, 3, 128, 1, 4)
"""Says whether everything runs, and nothing about speed."""


@dataclass(frozen=True)
class Case:
    """An image to encode. sensor: its name in SENSORS; side, patch_kernel: pixels."""

    sensor: str
    side: int
    patch_kernel: int

    @property
    def title(self) -> str:
        return f"{self.sensor} {self.side} px k{self.patch_kernel}"


CASES = {
    case.title: case
    for case in (
        Case("s1_grd", 224, 16), Case("s2_toa", 224, 16), Case("s3_olci", 96, 8),
        Case("s5p_no2", 28, 4), Case("s5p_no2", 56, 4), Case("dem", 960, 64),
    )
}  # fmt: skip


def metadata_rows(sensor: Sensor, batch: int) -> Tensor:
    """(B, 4) rows of lon, lat, days, token area; all known."""
    rng = generator(batch, f"metadata {sensor.name}")
    lon_B, lat_B = torch.rand(batch, generator=rng) * 340 - 170, torch.rand(batch, generator=rng) * 160 - 80
    days_B = 18262 + 300 * torch.rand(batch, generator=rng)
    return torch.stack([lon_B, lat_B, days_B, torch.full((batch,), sensor.token_area_km2)], dim=1)


def normal_images(sensor: Sensor, batch: int, side: int) -> Tensor:
    return torch.randn(batch, sensor.channels, side, side, generator=generator(side, f"images {sensor.name}"))


def encoder_input(case: Case, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Normalised images (B, C, H, W) and metadata (B, 4)."""
    sensor = SENSORS[case.sensor]
    return normal_images(sensor, batch, case.side).to(device), metadata_rows(sensor, batch).to(device)


def drawn_channels() -> dict[str, list[int]]:
    """One draw of bands for the sensors that drop some: about seven eighths, the mean of 75-100 %."""
    drawn = {}
    for name in ("s2_toa", "s3_olci"):
        count = SENSORS[name].channels
        order = torch.randperm(count, generator=generator(0, f"channels {name}"))
        drawn[name] = sorted(order[: round(count * 0.875)].tolist())
    return drawn


@dataclass(frozen=True)
class Batch:
    """A step's input on the device, of all eight sensors; metadata and noise by sensor; bands to use."""

    samples: dict[str, Tensor]
    metadata: dict[str, Tensor]
    noise: dict[str, Tensor]
    channels: dict[str, list[int]]

    @classmethod
    def make(cls, batch: int, device: str) -> Batch:
        tokens = {name: (s.image_size // s.patch_kernel) ** 2 for name, s in SENSORS.items()}
        return cls(
            {name: normal_images(s, batch, s.image_size).to(device) for name, s in SENSORS.items()},
            {name: metadata_rows(s, batch).to(device) for name, s in SENSORS.items()},
            {
                name: torch.rand(batch, tokens[name], generator=generator(0, f"noise {name}")).to(device)
                for name in SENSORS
            },
            drawn_channels(),
        )


class StandInTeacher:
    """In the place of DINOv2, which costs both sides the same: red, green, blue (B, 3, H, W) -> tokens (B, L, 768)."""

    def __init__(self, device: str) -> None:
        self.weight = torch.randn(3, TEACHER_DIM, generator=generator(0, "teacher")).to(device)

    def __call__(self, rgb_B3HW: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(rgb_B3HW, 14, 14).flatten(2).transpose(1, 2)
        return torch.tanh(pooled @ self.weight)
