"""Fine-tuning an encoder, all of it or a part, and training one from scratch: on images instead of kept features.

The loop is ``training.train``, the same as a probe's: optimiser, schedule, choice by validation and the single test are
those of ``training.py``, and so are the heads. What differs is that a batch is of images, flipped by the draws that a
probe makes among kept copies, and that parameters of the encoder are trained beside the head's. Training from scratch is
this with an encoder of random weights. The public supervised runs (``vit_*_sup.yaml``) train everything, with the same
optimisers; their settings are in the tasks' specs.

Shapes: B batch, C channels, H W image, T dates of a series, M metadata fields, D feature width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.lora import add_lora
from copernicus.platform.features import FLIPS, encode_images
from copernicus.platform.probe import ProbeResult, ProbeSettings, make_head, published_weight_decay, run_training
from copernicus.platform.training import Report


@dataclass(frozen=True)
class FinetuneSettings(ProbeSettings):
    """How an encoder is trained with its head. Neither ``blocks`` nor ``lora_rank``: all of it.

    Attributes:
        blocks: train the last so many blocks, and the norm after them.
        lora_rank: train low-rank updates of the attention's weights instead; see ``copernicus.models.lora``.

    Raises:
        InputError: a value that no training can have, or both of these.
    """

    blocks: int | None = None
    lora_rank: int | None = None

    whole: ClassVar[tuple[str, ...]] = (*ProbeSettings.whole, "blocks", "lora_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks is not None and self.lora_rank is not None:
            raise InputError("finetune: blocks and lora_rank are both given; choose one")

    @classmethod
    def for_task(cls, task: Task, **overrides: Any) -> Any:
        """The settings of the public supervised runs of a task, with some replaced."""
        published = dataclasses.asdict(task.supervised)
        return cls(**{**published, "weight_decay": published_weight_decay(task), **overrides})


class ImageSplit:
    """The images of a split, with the interface that features have.

    Args:
        flips: how many of ``FLIPS`` are drawn among.
    """

    def __init__(self, dataset: TaskDataset, flips: int = 1) -> None:
        self.dataset, self.flips = dataset, flips

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def ids(self) -> list[str]:
        return self.dataset.ids

    def load(self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu") -> tuple[list, Tensor]:
        """Some samples, each in the flip of that number.

        Returns:
            [images (B, C, H, W), metadata (B, M) or (B, dates, M)], of series lists of (T, C, H, W) and (T, M); and the
            targets, flipped alike.
        """
        images, metadata, targets = [], [], []
        for number, flip in zip(index.tolist(), flips.tolist(), strict=True):
            sample, axes = self.dataset[number], FLIPS[flip]
            images.append(sample["image"].flip(axes).to(device))
            metadata.append(sample["metadata"].to(device))
            targets.append(sample["target"].flip(axes) if self.dataset.task.dense else sample["target"])
        target = torch.stack(targets).to(device)
        if images[0].ndim == 4:
            return [images, metadata], target
        return [torch.stack(images), torch.stack(metadata)], target


class Tuned(nn.Module):
    """An encoder and a head, from images to the head's outputs."""

    def __init__(self, encoder: Any, head: nn.Module, task: Task, sensors: tuple[Sensor, ...]) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.task, self.sensors = task, sensors

    def forward(self, inputs: list, size: tuple[int, int] | None = None) -> Any:
        """As ``ImageSplit.load`` gives them -> logits (B, K); given the labels' size, what a dense head gives."""
        images, metadata = inputs
        levels = encode_images(self.encoder, self.task, images, metadata, self.sensors)
        return self.head(levels) if size is None else self.head(levels, size)


def run_finetune(
    encoder: Any,
    datasets: Mapping[str, TaskDataset],
    task: Task,
    settings: FinetuneSettings,
    seed: int,
    report: Report | None = None,
    test: bool = True,
    device: str | torch.device = "cpu",
    examples: int = 0,
    folder: str | Path | None = None,
) -> ProbeResult:
    """Train an encoder and a head, keep the epoch that is best on validation, test that one once.

    Args:
        encoder: is trained in place, and left as it was at the best epoch. Of random weights: training from scratch.
        datasets: the task's train, val and test splits; test is not opened if ``test`` is False.
        report, test, examples: as ``run_probe``.
        folder: keeps a checkpoint of each epoch; called again with the same arguments, training goes on after the last
            one, on a CPU to the same bits as if it had never stopped. To be removed by whoever has the result.

    Raises:
        InputError: an encoder that has no such parts to train, wrong data, or a checkpoint of another trial.
        FloatingPointError: the loss was not finite in the first epoch.
    """
    splits = {
        name: ImageSplit(dataset, len(FLIPS) if name == "train" else 1)
        for name, dataset in datasets.items()
        if test or name != "test"
    }
    encoder.to(device)
    choose_trained(encoder, settings, seed)
    sensors = task.sensors(datasets["train"].preset)
    first = np.zeros(1, np.int64)
    encoder.eval()
    with torch.no_grad():
        (images, metadata), _ = splits["train"].load(first, first, device)
        dims = [level.shape[1] for level in encode_images(encoder, task, images, metadata, sensors)]
    head = make_head(dims, task, settings, seed)
    model = Tuned(encoder, head, task, sensors).to(device)
    kept = None if folder is None else Path(folder)
    return run_training(model, splits, task, settings, seed, report, test, device, examples, folder=kept)


def choose_trained(encoder: Any, settings: FinetuneSettings, seed: int) -> None:
    """Leave gradients on for what the settings say is trained. What a model itself keeps fixed stays fixed.

    Raises:
        InputError: the encoder has no blocks, or fewer, or nothing that can be trained.
    """
    if settings.lora_rank is not None:
        add_lora(encoder, settings.lora_rank, seed)
    elif settings.blocks is not None:
        blocks = getattr(encoder, "blocks", None)
        if not isinstance(blocks, nn.ModuleList):
            raise InputError(
                f"finetune: {type(encoder).__name__} has no blocks to train the last {settings.blocks} of; leave out "
                "blocks to train all of it"
            )
        if settings.blocks > len(blocks):
            raise InputError(f"finetune: blocks is {settings.blocks}; {type(encoder).__name__} has {len(blocks)}")
        after = [getattr(encoder, name) for name in ("norm", "fc_norm") if hasattr(encoder, name)]
        trained = {
            parameter
            for module in (*blocks[len(blocks) - settings.blocks :], *after)
            for parameter in module.parameters()
            if parameter.requires_grad
        }
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter in trained)
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise InputError(f"finetune: {type(encoder).__name__} has no parameter that can be trained; probe it instead")
