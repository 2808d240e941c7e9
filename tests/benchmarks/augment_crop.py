"""What a random resized crop costs, by sensor at the published sizes, on one thread: ours beside torch's kernels.

python tests/benchmarks/augment_crop.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from copernicus.datasets.augment import Crop, apply_crop, random_crop
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import STORED_DTYPE

Method = Callable[[torch.Tensor, Crop, int], torch.Tensor]
CROPS = 30


def ours(x_CHW: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    return torch.from_numpy(apply_crop(x_CHW.numpy(), crop, size))


def antialiased(x_CHW: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    return _torch(x_CHW, crop, size, antialias=True)


def plain_where_growing(x_CHW: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """The same function: where nothing shrinks, antialiasing changes nothing."""
    return _torch(x_CHW, crop, size, antialias=crop.height > size or crop.width > size)


def _torch(x_CHW: torch.Tensor, crop: Crop, size: int, antialias: bool) -> torch.Tensor:
    x = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
    x = F.interpolate(x[None], size=(size, size), mode="bilinear", antialias=antialias)[0]
    return x.flip(-1) if crop.flip else x


def exact(x_CHW: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """In float64, as two products with the matrices of weights: a triangle about each new pixel's centre."""

    def weights(side: int) -> torch.Tensor:
        step = side / size
        centre = (torch.arange(size, dtype=torch.float64) + 0.5) * step
        distance = (torch.arange(side, dtype=torch.float64) + 0.5 - centre[:, None]).abs()
        triangle = (1 - distance / max(step, 1.0)).clamp_min(0)
        return triangle / triangle.sum(dim=1, keepdim=True)

    x = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].double()
    x = weights(crop.height) @ x @ weights(crop.width).T
    return x.flip(-1) if crop.flip else x


def cost_ms(method: Method, x_CHW: torch.Tensor, crops: list[Crop], size: int) -> float:
    """Processor time of a crop: median over seven rounds, after one that is not counted."""
    rounds = []
    for _ in range(8):
        started = time.process_time()
        for crop in crops:
            method(x_CHW, crop, size)
        rounds.append((time.process_time() - started) / len(crops) * 1000)
    return statistics.median(rounds[1:])


def main() -> None:
    torch.set_num_threads(1)
    methods: dict[str, Method] = {
        "ours (apply_crop)": ours, "torch, antialiased": antialiased, "torch, plain where growing": plain_where_growing,
    }  # fmt: skip
    table = Table(title="A random resized crop, ms of processor time (largest error, of the deviation of white noise)")
    for name in ("", *SENSORS, "a sample"):
        table.add_column(name, justify="right" if name else "left")
    costs: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for sensor in SENSORS.values():
        side, size = sensor.stored_size, sensor.image_size
        noise = torch.randn(sensor.channels, side, side, generator=torch.Generator().manual_seed(0)) * 1000
        x_CHW = noise.to(torch.int16 if STORED_DTYPE[sensor.name].kind == "i" else torch.float32)
        crops = [random_crop(generator("benchmark", sensor.name, i), side, side) for i in range(CROPS)]
        for name, method in methods.items():
            costs[name].append(cost_ms(method, x_CHW, crops, size))
            off = max(float((method(x_CHW, c, size) - exact(x_CHW, c, size)).abs().max()) for c in crops[:5])
            errors[name].append(off / 1000)
    for name in methods:
        cells = (f"{ms:.2f} ({error:.0e})" for ms, error in zip(costs[name], errors[name], strict=True))
        table.add_row(name, *cells, f"{sum(costs[name]):.2f}")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
