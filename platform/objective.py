"""What a pretraining step computes: the plan that all ranks share, the model, and the loss of each row and sensor.

Shapes: B rows of this rank's share, S sensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from copernicus.datasets.order import Order, generator
from copernicus.datasets.sensors import Sensor
from copernicus.datasets.shards import Problem
from copernicus.datasets.slices import DrawReader
from copernicus.models.language import LanguageTable
from copernicus.models.zoo import create_model
from copernicus.platform.experiment import Pretrain

CHECKPOINT_FILE = "checkpoint.pt"


@dataclass(frozen=True)
class Plan:
    """What every worker needs to know, and nothing that differs between them."""

    settings: Pretrain
    seed: int
    order: Order
    sensors: tuple[Sensor, ...]
    sizes: dict[str, int]
    problems: tuple[Problem, ...]  # found while indexing
    grids_seen: int  # usable or not
    whole_epoch: tuple[int, int] = (0, 0)  # see Coverage.expected
    warning: str = ""  # about the data as a whole
    language: LanguageTable = field(default_factory=LanguageTable)  # opened on the driver: workers need no file

    @property
    def steps_per_epoch(self) -> float:
        return self.order.samples_per_epoch / self.settings.batch_size

    def reader(self, augment: bool) -> DrawReader:
        drop = self.settings.metadata_drop if augment else 0.0
        return DrawReader(self.sensors, self.sizes, self.seed, augment, drop, self.settings.s2_offset)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to ``min_lr``, set at every step (arXiv 2503.11849)."""
        s = self.settings
        peak, epoch = s.blr * s.batch_size / 256, step / self.steps_per_epoch
        if epoch < s.warmup_epochs:
            return peak * epoch / s.warmup_epochs
        progress = (epoch - s.warmup_epochs) / max(s.epochs - s.warmup_epochs, 1e-9)
        return s.min_lr + (peak - s.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def channels(self, step: int, sensor: Sensor) -> list[int] | None:
        """The channels that this step trains on: 75-100 % of a many-band sensor's, the same on every rank."""
        if sensor.channels < 3:
            return None
        low, high = self.settings.channel_fraction
        rng = generator("channels", self.seed, step, sensor.name)
        count = int(rng.integers(max(1, int(low * sensor.channels)), int(high * sensor.channels) + 1))  # as published
        return sorted(rng.permutation(sensor.channels)[:count].tolist())


class PerRowLoss(torch.nn.Module):
    """The autoencoder as one module for DDP: a batch, in the sensors' units -> the loss of every row and sensor, (B, S).

    Every sensor runs in every step, absent rows as zeros that get no weight in the loss: so all ranks touch the same
    parameters, whichever sensors their grids have.
    """

    def __init__(self, autoencoder: torch.nn.Module, sensors: tuple[Sensor, ...]):
        super().__init__()
        self.autoencoder = autoencoder
        self.sensors = sensors

    def forward(self, batch: dict[str, torch.Tensor], channels: dict[str, list[int] | None]) -> torch.Tensor:
        losses = []
        for index, sensor in enumerate(self.sensors):
            result = self.autoencoder.forward_sensor(  # type: ignore[operator]
                sensor.normalize(batch[f"x_{sensor.name}"]),
                sensor,
                batch["metadata"][:, index],
                batch[f"noise_{sensor.name}"],
                channels=channels.get(sensor.name),
            )
            losses.append(result.loss_B)
        return torch.stack(losses, dim=1)


def weigh(loss_BS: torch.Tensor, present_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of the mean over the sensors that the row has, and the number of rows that have any."""
    present = present_BS.to(loss_BS.dtype)
    rows = (loss_BS * present).sum(1) / present.sum(1).clamp(min=1)
    return rows.sum(), (present.sum(1) > 0).sum()


def build_autoencoder(plan: Plan) -> torch.nn.Module:
    """The model that the plan's settings describe, its initial weights drawn from the experiment's seed."""
    settings = plan.settings
    return create_model(
        f"{settings.model.name}_mae",
        seed=plan.seed,
        mask_ratio=settings.mask_ratio,
        norm_pix_loss=settings.norm_pix_loss,
        language=plan.language,
        **settings.model.overrides(),
    )


def freeze_unreached(loss_module: PerRowLoss, plan: Plan) -> None:
    """Freeze parameters that no sensor of this run reaches (such as a hypernetwork for variables when none is trained):
    DDP would wait for their gradients."""
    from copernicus.platform.stream import tensors

    empty = plan.reader(augment=False).batch([None])
    loss_module(tensors(empty, torch.device("cpu")), {}).sum().backward()
    for parameter in loss_module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
