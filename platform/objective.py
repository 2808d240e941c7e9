"""What a pretraining step computes: the plan that all ranks share, the model, and the loss of each row and sensor.

Shapes: B rows of this rank's share, S sensors, N = S losses of a row, or S + 1 with the distillation's as the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from copernicus.datasets.order import Order, generator
from copernicus.datasets.sensors import InputError, Sensor
from copernicus.datasets.shards import Problem
from copernicus.datasets.slices import DrawReader
from copernicus.models.distillation import RGB_SENSOR, Teacher, imitation_loss, rgb_view
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.published import blank_batch
from copernicus.models.zoo import create_model
from copernicus.platform.schema import Pretrain
from copernicus.platform.to_device import tensors

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
    distill_dim: int = 0  # the teacher's width; 0: no distillation
    language: LanguageTable = field(default_factory=LanguageTable)  # opened on the driver: workers need no file

    @property
    def steps_per_epoch(self) -> float:
        return self.order.samples_per_epoch / self.settings.batch_size

    @property
    def published(self) -> bool:
        """The public code's quirks are wanted; each has a function in `datasets.published` or `models.published`."""
        return self.settings.preset == "published"

    @property
    def losses(self) -> tuple[str, ...]:
        """What the columns of `PerRowLoss`'s answer are."""
        return (*(s.name for s in self.sensors), *(("distill",) if self.settings.distill else ()))

    def present(self, present_BS: torch.Tensor) -> torch.Tensor:
        """Which losses a row has, (B, N): the distillation's where it has the image that the teacher sees."""
        if not self.settings.distill:
            return present_BS
        return torch.cat([present_BS, present_BS[:, [self.losses.index(RGB_SENSOR.name)]]], dim=1)

    def weigh(self, loss_BN: torch.Tensor, present_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `weigh`; the distillation's loss is added to its row's with its weight."""
        total, rows = weigh(loss_BN[:, : len(self.sensors)], present_BN[:, : len(self.sensors)])
        if self.settings.distill:
            total = total + self.settings.distill.weight * (loss_BN[:, -1] * present_BN[:, -1]).sum()
        return total, rows

    def reader(self, augment: bool) -> DrawReader:
        drop = self.settings.metadata_drop if augment and not self.published else 0.0
        return DrawReader(self.sensors, self.sizes, self.seed, augment, drop, self.settings.s2_offset, self.published)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to ``min_lr``, set at every step (arXiv 2503.11849)."""
        s = self.settings
        peak, epoch = s.blr * s.batch_size / 256, step / self.steps_per_epoch
        if epoch < s.warmup_epochs:
            return peak * epoch / s.warmup_epochs
        progress = (epoch - s.warmup_epochs) / max(s.epochs - s.warmup_epochs, 1e-9)
        return s.min_lr + (peak - s.min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    def channels(self, step: int, sensor: Sensor) -> list[int] | None:
        """The channels that this step trains on: 75-100 % of a many-band sensor's, the same on every rank.

        As published, but that their order there is random, which matters to its decoder alone (`MaskedAutoencoder._compare`).
        """
        if sensor.channels < 3:
            return None
        low, high = self.settings.channel_fraction
        rng = generator("channels", self.seed, step, sensor.name)
        fewest = math.ceil(low * sensor.channels - 1e-9)
        count = int(rng.integers(fewest, max(fewest, int(high * sensor.channels)) + 1))
        chosen = rng.permutation(sensor.channels)[:count].tolist()
        return chosen if self.published else sorted(chosen)

    def metadata(self, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """What a training step sees of a batch's metadata, (B, S, 4). By default all: draws were made unknown one by one,
        by the reader. Published: place, time and area of a sensor are each dropped from all rows, on every rank, or from
        none; and what one row lacks the others lose (`blank_batch`)."""
        metadata_BS4 = batch["metadata"]
        if not self.published:
            return metadata_BS4
        draws = generator("metadata", self.seed, step).random((len(self.sensors), 3))
        unknown_S4 = np.repeat(draws < self.settings.metadata_drop, (2, 1, 1), axis=1)
        metadata_BS4 = metadata_BS4.masked_fill(torch.from_numpy(unknown_S4).to(metadata_BS4.device), torch.nan)
        return blank_batch(metadata_BS4, batch["present"])


class PerRowLoss(torch.nn.Module):
    """The autoencoder as one module for DDP: a batch, in the sensors' units -> the loss of every row and sensor, and with
    a teacher the distillation's, (B, N).

    Every sensor runs in every step, absent rows as zeros that get no weight in the loss: so all ranks touch the same
    parameters, whichever sensors their grids have.
    """

    def __init__(self, autoencoder: MaskedAutoencoder, sensors: tuple[Sensor, ...], teacher: Teacher | None = None):
        super().__init__()
        assert not isinstance(teacher, torch.nn.Module), "it would be trained, averaged over ranks and saved"
        self.autoencoder = autoencoder
        self.sensors = sensors
        self.teacher = teacher
        self.autocast: torch.dtype | None = None
        """What matrix products are computed in; None: float32."""

    def forward(self, batch: dict[str, torch.Tensor], channels: dict[str, list[int] | None]) -> torch.Tensor:
        device = batch["metadata"].device.type
        with torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            return self._losses(batch, channels)

    def _losses(self, batch: dict[str, torch.Tensor], channels: dict[str, list[int] | None]) -> torch.Tensor:
        images = {sensor.name: sensor.normalize(batch[f"x_{sensor.name}"]) for sensor in self.sensors}
        masked = [
            self.autoencoder.hide(
                images[sensor.name],
                sensor,
                batch["metadata"][:, index],
                batch[f"noise_{sensor.name}"],
                channels.get(sensor.name),
            )
            for index, sensor in enumerate(self.sensors)
        ]
        if self.teacher is None:
            return torch.stack(self.autoencoder.losses(masked)[0], dim=1)
        optical = [sensor.name for sensor in self.sensors].index(RGB_SENSOR.name)
        rgb = rgb_view(images[RGB_SENSOR.name], batch["metadata"][:, optical])
        losses, (tokens_BTD,) = self.autoencoder.losses(masked, [rgb])
        return torch.stack([*losses, imitation_loss(self.autoencoder, tokens_BTD, self.teacher, rgb.x_BCHW)], dim=1)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What ``pretrain.precision`` means on a device: bfloat16, or None for float32.

    Raises:
        InputError: bf16 on hardware without instructions for it, where a step would take many times as long.
    """
    if precision == "float32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch 2.9 has no public way to ask
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and not able:
        raise InputError(f"pretrain.precision: this {device.type} device computes no bf16; set float32")
    return torch.bfloat16 if able else None


def weigh(loss_BS: torch.Tensor, present_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over rows of the mean over the sensors that the row has, and the number of rows that have any."""
    present = present_BS.to(loss_BS.dtype)
    rows = (loss_BS * present).sum(1) / present.sum(1).clamp(min=1)
    return rows.sum(), (present.sum(1) > 0).sum()


def build_autoencoder(plan: Plan) -> MaskedAutoencoder:
    """The model that the plan's settings describe, its initial weights drawn from the experiment's seed."""
    settings = plan.settings
    model: MaskedAutoencoder = create_model(
        f"{settings.model.name}_mae",
        seed=plan.seed,
        mask_ratio=settings.mask_ratio,
        norm_pix_loss=settings.norm_pix_loss,
        published=plan.published,
        distill_dim=plan.distill_dim,
        language=plan.language,
        **settings.model.overrides(),
    )
    return model


def freeze_unreached(loss_module: PerRowLoss, plan: Plan) -> None:
    """Freeze parameters that no sensor of this run reaches (such as a hypernetwork for variables when none is trained):
    DDP would wait for their gradients."""
    empty = plan.reader(augment=False).batch([None])
    loss_module(tensors(empty, torch.device("cpu")), {}).sum().backward()
    for parameter in loss_module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
