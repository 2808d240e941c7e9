"""Masked-autoencoder pretraining on one worker of Ray Train: the loop, read top to bottom.

Shapes: B rows of this rank's share, C channels, S sensors, N losses of a row (see objective.py), L tokens.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from copernicus.datasets.index import GridIndex
from copernicus.datasets.order import Coverage
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import Problem
from copernicus.models.masked_autoencoder import parameter_groups
from copernicus.platform.hang_watch import HangWatch
from copernicus.platform.language import variables
from copernicus.platform.mailbox import note, post, stop_run, unrecorded
from copernicus.platform.objective import (
    CHECKPOINT_FILE,
    PerRowLoss,
    Plan,
    autocast_dtype,
    build_autoencoder,
    freeze_unreached,
)
from copernicus.platform.preemption import PreemptionNotice
from copernicus.platform.shared_storage import sees
from copernicus.platform.skipped import grids_of, problems_in, skipped_metrics, too_many_skipped
from copernicus.platform.straggler import Stragglers
from copernicus.platform.teacher_cache import CachedTeacher, open_teacher
from copernicus.platform.to_device import on_device, tensors


def train_worker(config: dict[str, Any]) -> None:
    """What one rank does. Where it makes no step for too long, or its node is about to go, that is noticed beside it."""
    import ray.train

    settings, folder, mailbox = config["plan"].settings, config["folder"], config["mailbox"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    problems = gather(sees(folder, config["token"]), world_size)
    if problem := next(filter(None, problems), None):
        problem = f"output: {problem}; on several nodes it must be a folder that all of them share"
        if ray.train.get_checkpoint() is not None:
            raise OSError(problem)  # it was shared before: this may pass, so that another attempt is worth it
        stop_run(mailbox, rank, problem)
        return
    attempt = gather(time.strftime("%Y%m%dT%H%M%S"), world_size)[0]  # one name for all
    with PreemptionNotice() as notice:
        if settings.hang_minutes is None:
            _train(config, notice, lambda: None)
            return
        tell = functools.partial(note, mailbox)
        with HangWatch(settings.hang_minutes * 60, folder, attempt, rank, world_size, tell) as watch:
            _train(config, notice, watch.progress)


def _train(config: dict[str, Any], notice: PreemptionNotice, progress: Callable[[], None]) -> None:
    """The loop. ``progress`` is called whenever something has moved."""
    import ray
    import ray.train.torch
    import torch.distributed as dist
    from ray.train import CheckpointUploadMode

    from copernicus.platform.parallel import parallelise, restore, whole_state
    from copernicus.platform.stream import Share, batches

    plan: Plan = config["plan"]
    settings, mailbox = plan.settings, config["mailbox"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    device = ray.train.torch.get_device()
    held_out: GridIndex = ray.get(config["held_out"])

    autoencoder = build_autoencoder(plan)
    teacher = open_teacher(settings.distill, device)
    loss_module = PerRowLoss(autoencoder, plan.sensors, teacher)
    freeze_unreached(loss_module, plan)
    refused = ""
    try:
        loss_module.autocast = autocast_dtype(settings.precision, device)
    except InputError as error:
        refused = str(error)
    if refused := next(filter(None, gather(refused, world_size)), ""):
        stop_run(mailbox, rank, refused)
        return
    precisions = set(gather(str(loss_module.autocast or torch.float32), world_size))
    autoencoder.recompute = settings.activation_checkpointing
    if settings.compile if settings.compile is not None else device.type == "cuda":
        autoencoder.compile_blocks()
    model = parallelise(loss_module, settings.parallel, device)
    groups = parameter_groups(loss_module, settings.weight_decay)
    trained = [p for p in loss_module.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == len(trained), "a parameter escaped the optimiser"
    optimizer = torch.optim.AdamW(groups, betas=(settings.betas[0], settings.betas[1]), lr=0.0, fused=True)

    teachers = set(gather(teacher.identity if teacher is not None else None, world_size))
    step, problems, coverage = 0, {str(p): p for p in plan.problems}, Coverage()
    if (found := ray.train.get_checkpoint()) is not None:
        with found.as_directory() as folder:
            # Mapped, not read: where each worker keeps a share, none needs memory for the whole.
            saved = torch.load(Path(folder) / CHECKPOINT_FILE, map_location="cpu", weights_only=True, mmap=True)
            restore(loss_module, optimizer, saved["model"], saved["optimizer"])
        teachers |= {saved.get("teacher")}
        precisions |= {saved["precision"]}
        step, coverage = saved["step"], Coverage({k: tuple(v) for k, v in saved["coverage"].items()})
        problems |= {str(p): p for p in (Problem(*fields) for fields in saved["problems"])}
        for number, (earlier, metrics) in enumerate(
            saved.get("unrecorded", []), 1
        ):  # their driver may have been killed
            post(mailbox, rank, earlier, metrics, wait=number == len(saved.get("unrecorded", [])))
    if len(teachers) > 1:
        stop_run(
            mailbox, rank, "pretrain.distill.teacher: its files differ between nodes, or from those this run began with"
        )
        return

    if len(precisions) > 1:
        found_ones = " and ".join(sorted(p.removeprefix("torch.") for p in precisions))
        stop_run(
            mailbox, rank, f"pretrain.precision: {found_ones} in one run, for its hardware differs between nodes or from "
            "that this run began on; give it the same, or set pretrain.precision and begin anew"
        )  # fmt: skip
        return

    steps = plan.order.steps(settings.batch_size)
    evaluate_at, save_at = (
        {_step_of_epoch(plan, n) for n in range(every, settings.epochs + 1, every)}
        for every in (settings.val_every, settings.checkpoint_every)
    )
    evaluation = Evaluation(plan, held_out, rank, world_size, device, progress)
    slow = Stragglers(gather(socket.gethostname(), world_size))
    if step == 0:
        post(mailbox, rank, 0, evaluation(model, problems))
    started, first_step = time.monotonic(), step
    since, checkpointed, heeded = Coverage(), time.monotonic(), False
    share = Share(config["index"], plan.order, plan.reader(augment=True), settings.batch_size, rank, world_size, step)
    stream = batches(share, settings.data_cpus)
    begun = time.monotonic()
    for columns, batch in on_device(stream, device):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        batch = batch | {"metadata": plan.metadata(batch, step)}
        rows = (batch["present"].sum(1) > 0).sum()
        busy = time.monotonic() - begun  # on its own: what follows waits for other ranks
        if world_size > 1:
            dist.all_reduce(rows)
        optimizer.zero_grad(set_to_none=True)
        total, losses, counts, forward = backward(plan, model, batch, step, world_size / rows.clamp(min=1))
        if settings.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(loss_module.parameters(), settings.clip_grad_norm)
        optimizer.step()
        step += 1
        since.add(columns["epoch"], columns["key"])

        # One reduction carries what else every rank must know: loss, new problems, whether a checkpoint is due by rank
        # 0's clock, or at once for a node is about to go; what each rank needed for itself; each loss.
        due = rank == 0 and time.monotonic() - checkpointed > settings.checkpoint_minutes * 60
        urgent = not heeded and notice.given is not None
        new = [p for p in problems_in(columns) if str(p) not in problems]
        mine = [float(x) for x in (len(new), due, urgent)] + [0.0] * world_size
        mine[3 + rank] = busy + forward
        facts = torch.cat([total[None], losses, counts, losses.new_tensor(mine)])
        if world_size > 1:
            dist.all_reduce(facts)
        facts, rows = facts.cpu(), rows.cpu()  # the step's one wait for a GPU
        progress()
        total, losses, counts, others, busy_W = facts.split([1, len(losses), len(losses), 3, world_size])
        found_new, due, urgent = (bool(n) for n in others)
        heeded |= urgent  # ranks hear of the same node at different times: one checkpoint for all
        if rank == 0 and (lag := slow(busy_W.tolist(), time.monotonic())) is not None:
            note(mailbox, lag)

        if found_new:
            for problem in (p for part in gather(new, world_size) for p in part):
                problems.setdefault(str(problem), problem)
        skipped = len(grids_of(problems.values())) / plan.grids_seen
        metrics = {"train/loss": total.item() / max(rows.item(), 1), "train/lr": plan.learning_rate(step - 1)}
        metrics |= {
            f"train/loss_{name}": (losses[i] / counts[i]).item() for i, name in enumerate(plan.losses) if counts[i] > 0
        }
        metrics["train/samples_seen"] = min(step * settings.batch_size, plan.order.samples)
        metrics["train/epoch"] = metrics["train/samples_seen"] / plan.order.samples_per_epoch
        metrics["train/samples_per_s"] = (step - first_step) * settings.batch_size / (time.monotonic() - started)
        metrics["train/workers"] = world_size
        if isinstance(teacher, CachedTeacher):
            metrics["train/teacher_cached"] = teacher.found / teacher.asked  # of this rank's images
        metrics |= skipped_metrics(problems.values(), skipped)
        if not math.isfinite(metrics["train/loss"]):
            message = (
                f"the loss became {metrics['train/loss']} at step {step}; lower pretrain.blr or set clip_grad_norm"
            )
            stop_run(mailbox, rank, message)
            return
        if skipped > settings.max_skipped:
            post(mailbox, rank, step, metrics, wait=True)
            stop_run(mailbox, rank, too_many_skipped(list(problems.values()), skipped, settings.max_skipped))
            return

        last = step == steps
        if last or step in evaluate_at:
            metrics |= evaluation(model, problems)
        saving = last or step in save_at or due or urgent
        if saving:
            for part in gather(since, world_size):
                coverage.merge(part)
            since, checkpointed = Coverage(), time.monotonic()
            if (fault := uncovered(coverage, plan, step)) is not None:
                stop_run(mailbox, rank, fault)
                return
            metrics["data/epochs_verified"] = float(int(metrics["train/samples_seen"]) // plan.order.samples_per_epoch)
        post(mailbox, rank, step, metrics, wait=last)
        if saving:
            weights, optimizer_state = whole_state(loss_module, optimizer)  # all ranks take part
            checkpoint = None
            if rank == 0:
                state = {
                    "model": weights,
                    "optimizer": optimizer_state,
                    "step": step,
                    "samples_seen": int(metrics["train/samples_seen"]),
                    "coverage": {k: list(v) for k, v in coverage.epochs.items()},
                    "teacher": teacher.identity if teacher is not None else None,
                    "precision": next(iter(precisions)),
                    "architecture": {"name": settings.model.name, **settings.model.encoder_overrides()},
                    "language": plan.language.digests(variables(plan.sensors)),
                    "problems": [[p.where, p.reason, p.detail] for p in problems.values()],
                    "unrecorded": unrecorded(mailbox),  # steps up to this one do not come again
                }
                checkpoint = ray.train.Checkpoint.from_directory(written(state))
            # Training goes on while the storage takes it, unless this process has not long to go.
            mode = CheckpointUploadMode.SYNC if last or urgent else CheckpointUploadMode.ASYNC
            ray.train.report(
                {"step": step, **metrics},
                checkpoint=checkpoint,
                checkpoint_upload_mode=mode,
                delete_local_checkpoint_after_upload=True,
            )
            if urgent and (reasons := [given for given in gather(notice.given, world_size) if given]) and rank == 0:
                note(mailbox, f"{reasons[0]}: saved step {step} of {steps}")
        begun = time.monotonic()


def backward(
    plan: Plan, model: torch.nn.Module, batch: dict[str, torch.Tensor], step: int, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """The forward and backward passes of this rank's share, in parts of ``pretrain.micro_batch_size`` rows.

    Args:
        scale: world size / rows of the global batch. DDP and FSDP average over ranks; this makes the average the mean
            over the global batch's rows, however many ranks and parts it is shared out to.

    Returns:
        the sum of the rows' losses (), of each loss over the rows that have it (N,), how many those are (N,), and the
        seconds until the last part's backward pass, in which ranks wait for each other.
    """
    from copernicus.platform.parallel import averaging

    channels = {s.name: plan.channels(step, s) for s in plan.sensors}
    sums: list[torch.Tensor] = []
    started = forward = time.monotonic()
    parts = split(batch, plan.settings.micro_batch_size)
    for number, part in enumerate(parts, 1):
        with averaging(model, on=number == len(parts)):
            loss_BN = model(part, channels)
            present = plan.present(part["present"]).to(loss_BN.dtype)
            total, _ = plan.weigh(loss_BN, present)
            forward = time.monotonic()
            (total * scale).backward()
        sums.append(torch.cat([total.detach()[None], (loss_BN.detach() * present).sum(0), present.sum(0)]))
    total, rest = torch.stack(sums).sum(0).split([1, 2 * len(plan.losses)])
    losses, counts = rest.chunk(2)
    return total[0], losses, counts, forward - started


def split(batch: dict[str, torch.Tensor], most: int | None) -> list[dict[str, torch.Tensor]]:
    """A batch in parts of at most so many rows, as equal as can be."""
    rows = len(batch["present"])
    count = -(-rows // (most or rows))
    pieces = {name: values.tensor_split(count) for name, values in batch.items()}
    return [{name: parts[i] for name, parts in pieces.items()} for i in range(count)]


class Evaluation:
    """The loss on held-out grids: centre crops, all channels, masks keyed by the grid, so that epochs compare."""

    def __init__(
        self,
        plan: Plan,
        held_out: GridIndex,
        rank: int,
        world_size: int,
        device: torch.device,
        progress: Callable[[], None] = lambda: None,
    ):
        self.progress = progress
        self.plan, self.device, self.world_size = plan, device, world_size
        self.grids = held_out.entries(range(rank, len(held_out), world_size))
        self.most = -(-len(held_out) // world_size)

    @torch.no_grad()
    def __call__(self, model: torch.nn.Module, problems: dict[str, Problem]) -> dict[str, float]:
        """The metrics; what cannot be read is added to ``problems`` on every rank."""
        if not self.most:
            return {}
        new: list[Problem] = []
        module: Any = model.module if hasattr(model, "module") else model  # nothing for DDP to join here
        names, reader = self.plan.losses, self.plan.reader(augment=False)
        facts = torch.zeros(2 * len(names) + 2, dtype=torch.float64, device=self.device)
        size = self.plan.order.share(self.plan.settings.batch_size, self.world_size)
        # As many batches as rank 0, which has the most grids, empty ones if need be: under FSDP a forward fetches
        # parameters from all ranks, which wait for each other. All of one size: what is compiled is compiled once.
        for start in range(0, self.most, size):
            places: list[tuple[Any, int, int] | None] = [(grid, -1, 0) for grid in self.grids[start : start + size]]
            columns = reader.batch(places + [None] * (size - len(places)))
            new += problems_in(columns)
            self.progress()
            batch = tensors(columns, self.device)
            loss_BN = module(batch, {})
            present = self.plan.present(batch["present"]).to(loss_BN.dtype)
            total, rows = self.plan.weigh(loss_BN, present)
            facts += torch.cat([(loss_BN * present).sum(0), present.sum(0), torch.stack([total, rows])]).double()
        if self.world_size > 1:
            torch.distributed.all_reduce(facts)
        problems.update({str(p): p for part in gather(new, self.world_size) for p in part})
        sums, counts = facts[:-2].chunk(2)
        metrics = {f"val/loss_{name}": (sums[i] / counts[i]).item() for i, name in enumerate(names) if counts[i] > 0}
        if facts[-1] > 0:
            metrics["val/loss"] = (facts[-2] / facts[-1]).item()
        return metrics


def gather(mine: Any, world_size: int) -> list[Any]:
    """Every rank's, in rank order."""
    if world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def written(state: dict[str, Any]) -> str:
    """A folder of its own on this node's disk, with the checkpoint's file.

    Raises:
        OSError: the disk is full, say; nothing is left there.
    """
    folder = tempfile.mkdtemp(prefix="copernicus-checkpoint-")
    try:
        with open(Path(folder) / CHECKPOINT_FILE, "wb") as file:  # given a path, torch does not tell why it fails
            torch.save(state, file)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    return folder


def uncovered(coverage: Coverage, plan: Plan, step: int) -> str | None:
    """What is wrong with the epochs that are whole by now: each grid must have been trained exactly as often as asked."""
    whole = min(step * plan.settings.batch_size, plan.order.samples) // plan.order.samples_per_epoch
    for epoch in range(whole):
        if coverage.epochs.get(epoch) != plan.whole_epoch:
            return (
                f"epoch {epoch} did not train each grid {plan.order.draws_per_grid} times: {coverage.epochs.get(epoch)} "
                f"(samples, sum of hashes), expected {plan.whole_epoch}; this is a defect of the program"
            )
    return None


def _step_of_epoch(plan: Plan, epoch: int) -> int:
    """The step with which an epoch's last sample is trained."""
    return -(-epoch * plan.order.samples_per_epoch // plan.settings.batch_size)
