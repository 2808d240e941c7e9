"""What a side of the training benchmarks is asked to do, and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copernicus.platform.schema import Model, Pretrain

SEED = 0


@dataclass(frozen=True)
class Work:
    """One run: ``steps`` of a model over the same shards in the same order, the first ``skip`` of them not measured.

    model: a model's name and sizes, as in ``pretrain.model``. sizes: sensor -> side of the images, pixels.
    batch_size: of all workers together. Each worker computes on ``threads`` threads and has one process that reads for it.
    """

    shards: tuple[str, ...]
    grids: int
    model: dict[str, Any]
    sizes: dict[str, int]
    batch_size: int
    steps: int
    skip: int
    workers: int = 1
    threads: int = 1

    @property
    def settings(self) -> Pretrain:
        # The last epoch may be cut short by nobody: steps are rounded up to whole epochs.
        epochs = -(-self.steps * self.batch_size // self.grids)
        return Pretrain(
            shards=list(self.shards),
            model=Model(**self.model),
            image_size=dict(self.sizes),
            epochs=epochs,
            batch_size=self.batch_size,
            blr=1e-4,
            warmup_epochs=1.0,
            val_fraction=0.0,
            workers=self.workers,
            # Held-out losses and checkpoints are not what is compared: none before the end.
            val_every=epochs,
            checkpoint_every=epochs,
            checkpoint_minutes=1e6,
            max_failures=0,
        )


@dataclass(frozen=True)
class Result:
    """seconds: wall time of each step after the skipped ones. core_s: processor time of all processes in the measured
    window, a step. losses: of all steps, the skipped ones too: both sides must have trained the same."""

    seconds: list[float]
    core_s: float
    losses: list[float] = field(default_factory=list)

    @property
    def mean_s(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def temporary(folder: Path) -> dict[str, str]:
    """The environment of a measurement's process."""
    return {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder)}
