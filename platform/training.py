"""The training loop that probes, fine-tuning and training from scratch share: a model on a task's three splits.

Protocol of the benchmark's public code: for classification SGD with weight decay 1e-4, for dense tasks AdamW with torch's
weight decay; one-cycle cosine schedule per step, by default without warm-up (which also moves SGD's momentum and Adam's
first beta between 0.85 and 0.95); the epoch with the best validation metric is tested, once. Regressions minimise the mean
absolute error over known pixels. No gradient is clipped.

What the loop asks of a split is ``len``, ``ids``, ``flips`` and ``load(index, flips, device) -> (inputs, target)``; of a
model, that it maps ``inputs`` to outputs (see ``predict``). Features from a cache, features encoded on the spot and images
are all the same to it.

Shapes: B batch, N samples, D feature width, K outputs, H W label size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copernicus.datasets.bench.task import Task
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import InputError
from copernicus.models.upernet import AUX_WEIGHT, KeyedDropout2d
from copernicus.platform.metrics import Evaluation
from copernicus.platform.optimiser import Optimiser, make_optimiser, one_cycle, set_step

if TYPE_CHECKING:
    from copernicus.platform.probe import ProbeSettings

logger = logging.getLogger(__name__)
Report = Callable[[int, dict[str, float]], None]
Batch = tuple[list[Tensor], Tensor]
CHECKPOINT = "trial.pt"
CHUNK = 16384
"""Samples whose pooled features are gathered at once: 50 MB of 768 float32."""


class Split(Protocol):
    """What the loop asks of a split."""

    def __len__(self) -> int: ...

    @property
    def ids(self) -> Any:
        """Names of the samples."""
        ...

    @property
    def flips(self) -> int:
        """How many flips there are to draw from."""
        ...

    def load(self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu") -> Batch:
        """Some samples, each in the flip of that number: the model's inputs, and targets flipped alike."""
        ...


@dataclasses.dataclass
class Course:
    """What training has come to; ``best`` is the state of what is trained, at the best epoch."""

    epoch: int = 0
    curves: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def train(
    model: nn.Module,
    train_split: Split,
    val_split: Split,
    task: Task,
    settings: ProbeSettings,
    seed: int,
    report: Report | None = None,
    device: str | torch.device = "cpu",
    folder: Path | None = None,
) -> Course:
    """Train what requires gradients, and leave the model as it was at the best epoch.

    Every draw (order, flips, dropout) depends on (seed, epoch, sample or step) alone; torch's and numpy's global random
    states are neither read nor written.

    Args:
        model: on its device.
        report: called after each epoch, counted from 1, with its figures; may raise to end the trial.
        folder: keeps a checkpoint of each epoch there, and goes on from one that is there.

    Raises:
        InputError: fewer than two training samples, no known target, or a checkpoint of another trial.
        FloatingPointError: the loss was not finite in the first epoch. Later, training ends there with a warning.
    """
    if len(train_split) < 2:
        raise InputError(f"{task.name}: {len(train_split)} training sample; a probe needs at least 2")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = make_optimiser(trained, settings.lr, settings.weight_decay, adam=task.dense)
    steps = len(list(batches(np.arange(len(train_split)), settings.batch_size)))
    schedule = one_cycle(settings.lr, settings.epochs * steps, settings.warmup_epochs / settings.epochs)
    dropouts = [module for module in model.modules() if isinstance(module, KeyedDropout2d)]
    trial = {**dataclasses.asdict(settings), "task": task.name, "seed": seed}
    course = Course()
    if folder is not None:
        trial["start"] = digest(model)
        course = _resume(folder, trial, model, optimiser)
    key = task.metric_key
    for epoch in range(course.epoch + 1, settings.epochs + 1):
        lr = schedule[0][(epoch - 1) * steps]
        # The n-th flip belongs to sample n, not to the n-th place in the order.
        flips_N = generator("probe flips", seed, epoch).integers(train_split.flips, size=len(train_split))
        order = generator("probe order", seed, epoch).permutation(len(train_split))
        losses = []
        model.train()
        indices = list(batches(order, settings.batch_size))
        for number, (inputs, target) in enumerate(read(train_split, indices, flips_N, device)):
            step = (epoch - 1) * steps + number
            set_step(optimiser, schedule[0][step], schedule[1][step])
            for dropout in dropouts:
                dropout.step = step
            loss, _ = loss_and_count(predict(model, inputs, target, task), target, task)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.detach())
        # Looked at once an epoch: to look at a number makes a GPU wait.
        values = torch.stack(losses).tolist()
        train_loss = sum(value * len(index) for value, index in zip(values, indices, strict=True)) / len(order)
        if not math.isfinite(train_loss):
            if not course.curves:
                raise FloatingPointError(
                    f"{task.name}: the loss is {train_loss} in epoch {epoch}; lower lr ({settings.lr:g})"
                )
            logger.warning(
                "%s: the loss is %s in epoch %d (lr %g); training ends", task.name, train_loss, epoch, settings.lr
            )
            break
        val = measure(model, val_split, task, settings.batch_size, device).main(len(val_split))
        before = course.curves[-1][f"best_val_{key}"] if course.curves else None
        # A figure that is no number is worse than any.
        better = (
            before is None or math.isnan(before) or (val[key] > before if task.higher_is_better else val[key] < before)
        )
        if better:
            course.best_epoch, course.best = epoch, {k: v.clone() for k, v in trained_state(model).items()}
        row = {"train_loss": train_loss, "lr": lr, **{f"val_{name}": value for name, value in val.items()}}
        course.curves.append({**row, f"best_val_{key}": val[key] if before is None or better else before})
        course.epoch = epoch
        if folder is not None:
            _save(folder, trial, model, optimiser, course)
        if report is not None:
            report(epoch, course.curves[-1])
    model.load_state_dict(course.best, strict=False)
    return course


def batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive batches; a last batch of one joins the one before: batch normalisation needs two."""
    starts = list(range(0, len(order), batch_size))
    if len(order) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    for number, start in enumerate(starts):
        yield order[start : starts[number + 1] if number + 1 < len(starts) else len(order)]


def read(
    split: Split, indices: Iterable[np.ndarray], flips_N: np.ndarray, device: str | torch.device
) -> Iterator[Batch]:
    """The batches of these samples, each sample in the flip that ``flips_N`` has for it."""
    indices = list(indices)
    pooled = _pooled(split)
    if pooled is not None:
        yield from _read_pooled(*pooled, indices, flips_N, device)
        return
    with ThreadPoolExecutor(1) as ahead:  # the next batch is read, or encoded, while this one is trained on
        following = None
        for number in range(len(indices)):
            batch = following or ahead.submit(split.load, indices[0], flips_N[indices[0]], device)
            following = None
            if number + 1 < len(indices):
                index = indices[number + 1]
                following = ahead.submit(split.load, index, flips_N[index], device)
            yield batch.result()


def _pooled(split: Split) -> tuple[np.ndarray, np.ndarray] | None:
    """Features (F, N, D) and targets of a split that keeps them as arrays, one vector per sample."""
    levels = getattr(split, "levels", None)
    if not isinstance(levels, tuple) or not isinstance(levels[0], np.ndarray) or levels[0].ndim != 3:
        return None
    return levels[0], split.targets  # type: ignore[attr-defined]


def _read_pooled(
    z_FND: np.ndarray, targets_N: np.ndarray, indices: list[np.ndarray], flips_N: np.ndarray, device: str | torch.device
) -> Iterator[Batch]:
    """As ``split.load``, many batches at once: to gather 64 vectors takes as long as to train on them."""
    flips, samples, dim = z_FND.shape
    z_RD = z_FND.reshape(flips * samples, dim)
    place = 0
    while place < len(indices):
        stop, gathered = place, 0
        while stop < len(indices) and (stop == place or gathered + len(indices[stop]) <= CHUNK):
            gathered += len(indices[stop])
            stop += 1
        index = np.concatenate(indices[place:stop])
        z_BD = torch.from_numpy(np.take(z_RD, flips_N[index] * samples + index, axis=0)).to(device).float()
        target = torch.from_numpy(targets_N[index]).to(device).long()
        sizes = [len(one) for one in indices[place:stop]]
        for z, t in zip(z_BD.split(sizes), target.split(sizes), strict=True):
            yield [z], t
        place = stop


def predict(model: nn.Module, inputs: list[Tensor], target: Tensor, task: Task) -> Any:
    """(B, K) logits; dense: (B, K, H, W) logits, or (B, H, W) normalised values.

    A model that has an auxiliary output while it is trained gives a pair.
    """
    if not task.dense:
        return model(inputs)
    outputs = model(inputs, tuple(target.shape[-2:]))
    if task.kind != "regression":
        return outputs
    return tuple(output[:, 0] for output in outputs) if isinstance(outputs, tuple) else outputs[:, 0]


def loss_and_count(outputs: Any, target: Tensor, task: Task) -> tuple[Tensor, Any]:
    """Mean loss over the known targets (0 where there are none), and their number.

    Args:
        outputs: as ``predict`` gives them; of a pair, the second counts ``AUX_WEIGHT`` times.
    """
    if isinstance(outputs, tuple):
        (loss, known), (auxiliary, _) = (loss_and_count(output, target, task) for output in outputs)
        return loss + AUX_WEIGHT * auxiliary, known
    if task.kind == "multilabel":
        return F.multilabel_soft_margin_loss(outputs, target.float()), len(target)
    if task.kind == "classification":
        return F.cross_entropy(outputs, target), len(target)
    if task.kind == "regression":
        known = ~target.isnan()
        count = known.sum()
        return (outputs - target)[known].abs().sum() / count.clamp(min=1), count
    ignore = -100 if task.ignore_index is None else task.ignore_index
    count = (target != ignore).sum()
    return F.cross_entropy(outputs, target, ignore_index=ignore, reduction="sum") / count.clamp(min=1), count


def measure(
    model: nn.Module,
    split: Split,
    task: Task,
    batch_size: int,
    device: str | torch.device = "cpu",
    part: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Loss and metrics over a split's samples, unflipped, or over one part of them.

    Args:
        part: (which, of how many): a share of whole batches. The parts' evaluations merge to the split's.
    """
    evaluation = Evaluation(task)
    indices = [np.arange(start, min(start + batch_size, len(split))) for start in range(0, len(split), batch_size)]
    which, parts = part
    indices = indices[which * len(indices) // parts : (which + 1) * len(indices) // parts]
    model.eval()
    with torch.inference_mode():
        for inputs, target in read(split, indices, np.zeros(len(split), np.int64), device):
            output = predict(model, inputs, target, task)
            loss, known = loss_and_count(output, target, task)
            scores = output.sigmoid() if task.kind == "multilabel" else output
            evaluation.update(scores, target, (float(loss), int(known)))
    return evaluation


def evaluate(
    model: nn.Module, split: Split, task: Task, batch_size: int, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Loss and metrics over all samples of a split, and the published mean over batches.

    Raises:
        InputError: no target of the split is known.
    """
    return measure(model, split, task, batch_size, device).compute(len(split))


def predict_split(
    model: nn.Module, split: Split, task: Task, index: np.ndarray, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Predictions for some samples, for pictures, and their targets.

    Returns:
        class ids, (B,) or (B, H, W) int64; of a multilabel task, probabilities (B, K) and 0 or 1; of a regression,
        (B, H, W) in the target's units, NaN where unknown.
    """
    model.eval()
    with torch.inference_mode():
        inputs, target = split.load(index, np.zeros_like(index), device)
        output = predict(model, inputs, target, task)
        if task.kind == "regression":
            output, target = (values * task.target_std + task.target_mean for values in (output, target))
        else:
            output = output.sigmoid() if task.kind == "multilabel" else output.max(dim=1).indices
    return output.cpu().numpy(), target.cpu().numpy()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that require gradients, and buffers (running statistics)."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def digest(model: nn.Module) -> str:
    """Of all weights: tells a checkpoint of another start."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        array = value.detach().cpu().contiguous()
        total.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        total.update(array.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _save(folder: Path, trial: dict[str, Any], model: nn.Module, optimiser: Optimiser, course: Course) -> None:
    """Beside the last one, then in its place: a checkpoint is there whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CHECKPOINT}-{uuid.uuid4().hex}"
    try:
        state = {"model": trained_state(model), "optimiser": optimiser.state_dict(), **vars(course)}
        with open(partial, "wb") as file:
            torch.save({"trial": trial, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, folder / CHECKPOINT)
    finally:
        partial.unlink(missing_ok=True)


def _resume(folder: Path, trial: dict[str, Any], model: nn.Module, optimiser: Optimiser) -> Course:
    path = folder / CHECKPOINT
    if not path.exists():
        return Course()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        kept = state.pop("trial")
    except Exception as error:
        raise InputError(f"{path} is no checkpoint of a trial ({error}); remove it to start again") from error
    if kept != trial:
        differ = sorted(name for name in kept.keys() | trial.keys() if kept.get(name) != trial.get(name))
        raise InputError(f"{path} is of a trial with another {', '.join(differ)}; give another folder, or remove it")
    model.load_state_dict(state.pop("model"), strict=False)
    optimiser.load_state_dict(state.pop("optimiser"))
    return Course(**state)
