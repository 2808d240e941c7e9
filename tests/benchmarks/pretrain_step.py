"""What a pretraining sample costs, by part, on one thread: reading beside the model, as a ratio.

copernicus data miniature --out runs/miniature && python tests/benchmarks/pretrain_step.py experiments/quickstart.yaml
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from copernicus.datasets.index import index_shards
from copernicus.datasets.order import Order
from copernicus.datasets.sensors import SENSORS
from copernicus.models.masked_autoencoder import parameter_groups
from copernicus.platform.experiment import load_experiment
from copernicus.platform.objective import PerRowLoss, Plan, build_autoencoder, weigh
from copernicus.platform.to_device import tensors


def median(repeat: int, part: Callable[[], object]) -> float:
    """Median seconds of a part, after one run that is not counted."""
    part()
    seconds = []
    for _ in range(repeat):
        started = time.perf_counter()
        part()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main(path: str, rows: int = 16, repeat: int = 5) -> None:
    torch.set_num_threads(1)
    experiment = load_experiment(path)
    settings = experiment.pretrain
    assert settings is not None, "the experiment has no pretrain section"
    index = index_shards(settings.shards).having(settings.sensors)
    sensors = tuple(SENSORS[name] for name in settings.sensors)
    sizes = {s.name: settings.image_size.get(s.name, s.image_size) for s in sensors}
    plan = Plan(settings, 0, Order(len(index)), sensors, sizes, (), len(index))
    reader = plan.reader(augment=True)
    module = PerRowLoss(build_autoencoder(plan), sensors)
    optimizer = torch.optim.AdamW(parameter_groups(module, settings.weight_decay), lr=1e-4, fused=True)
    grids = index.entries(range(rows))
    batch = tensors(reader.batch([(grid, 0, 0) for grid in grids]), torch.device("cpu"))

    def loss() -> torch.Tensor:
        total, count = weigh(module(batch, {}), batch["present"])
        return total / count

    def backward() -> None:
        optimizer.zero_grad()
        loss().backward()

    read = median(repeat, lambda: reader.batch([(grid, 1, 0) for grid in grids]))
    forward = median(repeat, loss)
    both = median(repeat, backward)
    update = median(repeat, optimizer.step)
    model = both + update
    table = Table(title=f"{rows} samples of {len(sensors)} sensors, one thread, medians of {repeat}")
    for name in ("part", "ms a sample", "of the model's"):
        table.add_column(name, justify="right" if name != "part" else "left")
    for name, seconds in (("read, crop, collate", read), ("forward", forward), ("backward", both - forward), ("AdamW", update), ("model in all", model)):  # fmt: skip
        table.add_row(name, f"{seconds / rows * 1000:.2f}", f"{seconds / model:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(*sys.argv[1:2])
