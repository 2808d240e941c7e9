"""Masked-autoencoder pretraining on Ray Train: the driver. What each worker does is in pretrain_worker.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copernicus.datasets.expand import expand
from copernicus.datasets.index import GridIndex, from_surveys
from copernicus.datasets.order import Coverage, Order
from copernicus.datasets.published import published_sensor
from copernicus.datasets.raw import RawLayout, read_layout
from copernicus.datasets.raw_index import survey_layout, unknown_offsets
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import Problem
from copernicus.models.teacher import load_teacher
from copernicus.platform.hang_watch import HangReports
from copernicus.platform.indexing import open_index
from copernicus.platform.language import open_language
from copernicus.platform.mailbox import Listener, new_mailbox, note, reached
from copernicus.platform.objective import CHECKPOINT_FILE, Plan
from copernicus.platform.pretrain_worker import train_worker
from copernicus.platform.schema import Pretrain
from copernicus.platform.session import autoscales
from copernicus.platform.shared_storage import marked
from copernicus.platform.skipped import too_many_skipped, unusable_share

RESIZE_S = 300.0
"""How often an elastic run looks for room for more workers. They begin at the last checkpoint, so that the steps since are
repeated: not at once."""
ROOM_S = 600.0
"""How long a cluster that does not grow may be short of room for the fewest workers, after losing a node."""


class PretrainFailed(RuntimeError):
    """The run cannot go on; the message says why and how to resume."""


@dataclass(frozen=True)
class PretrainResult:
    """``checkpoint``: the file to give to `load_weights`. ``skipped``: everything in the data that was not used."""

    checkpoint: Path
    steps: int
    samples: int
    metrics: dict[str, float]
    skipped: tuple[Problem, ...]


def pretrain(
    settings: Pretrain,
    seed: int,
    folder: Path,
    on_metrics: Callable[[int, dict[str, float]], bool | None],
    on_progress: Callable[[int, int, dict[str, float]], None],
    on_plan: Callable[[Plan, GridIndex, GridIndex], None] = lambda plan, train, held_out: None,
    on_index: Callable[[float, float, str], None] = lambda done, total, note: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> PretrainResult:
    """Pretrain, or go on from the last checkpoint under ``folder``.

    ``on_metrics(step, metrics)`` receives each step's figures once per attempt, in order, and returns False while it only
    keeps them: what is not recorded is in the checkpoints, too, and comes again. ``on_progress(step, steps, metrics)``
    receives the latest of them for display. Both are called on a thread of this process. ``on_index`` follows the
    indexing of shards that no index covers yet; ``on_note`` hears of workers that died, hung, fell behind or wait for room.

    Raises:
        InputError: shards or sizes that do not fit, a cluster too small, or a folder that its nodes do not share.
        PretrainFailed: too much of the data is unusable, the loss diverged, or workers kept failing.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig

    from copernicus.platform.attempts import Attempts, TooManyFailures, cause
    from copernicus.platform.trainer import Trainer, kept_for_reading

    distill_dim = 0
    if settings.distill:
        # Found wrong here rather than on a worker; and workers run in another directory.
        distill_dim = load_teacher(settings.distill.teacher).dim
        settings = dataclasses.replace(settings, distill=settings.distill.absolute())
    warning = ""
    if settings.geotiffs:
        layout = read_layout(settings.geotiffs)
        whole = from_surveys([survey_layout(layout)])
        warning = offset_warning(layout, settings)
    else:
        whole = open_index(expand(settings.shards), settings.index, folder.parent / "index", on_index)
    index = whole.having(settings.sensors, settings.require)
    train, held_out = index.split(settings.val_fraction, seed)
    if not len(train):
        raise InputError(f"pretrain.val_fraction: holds out all {len(index)} grids; lower it")
    sensors = tuple(SENSORS[name] for name in settings.sensors)
    if settings.preset == "published":
        sensors = tuple(map(published_sensor, sensors))
    plan = Plan(
        settings=settings,
        seed=seed,
        order=Order(len(train), seed, settings.epochs, settings.draws_per_grid),
        sensors=sensors,
        sizes={s.name: settings.image_size.get(s.name, s.image_size) for s in sensors},
        problems=whole.problems,
        grids_seen=whole.grids_seen,
        whole_epoch=Coverage.expected(train.keys, settings.draws_per_grid),
        warning=warning,
        distill_dim=distill_dim,
        language=open_language(settings.language),
    )
    plan.reader(augment=True)  # sizes are checked here, not on a worker
    if (share := unusable_share(whole)) > settings.max_skipped:
        raise PretrainFailed(too_many_skipped(list(whole.problems), share, settings.max_skipped))
    check_resources(settings, ray.cluster_resources())
    on_plan(plan, train, held_out)

    steps = plan.order.steps(settings.batch_size)
    fewest, most = settings.worker_range
    mailbox = new_mailbox()
    tell = functools.partial(note, mailbox)
    folder.mkdir(parents=True, exist_ok=True)
    # The hang watch speaks first: Ray and torch, who find out less, wait for longer.
    patience = (settings.hang_minutes or 30.0) * 60 + 300.0
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(patience)
    gpus = {"GPU": settings.gpus_per_worker} if settings.gpus_per_worker else {}
    size: dict[str, Any] = {"num_workers": fewest}
    if fewest < most:
        size = {"num_workers": (fewest, most), "elastic_resize_monitor_interval_s": RESIZE_S}
    attempts: Any = Attempts(
        tell, settings.max_failures, functools.partial(reached, mailbox), None if autoscales() else ROOM_S,
        HangReports(folder),
    )  # fmt: skip
    with (
        marked(folder) as token,
        Listener(mailbox, steps, on_metrics, on_progress, on_note),
        kept_for_reading(settings.data_cpus) if fewest < most else contextlib.nullcontext(),
    ):
        trainer = Trainer(
            train_worker,
            train_loop_config={
                "plan": plan,
                "index": ray.put(train),
                "held_out": ray.put(held_out),
                "mailbox": mailbox,
                "folder": folder,
                "token": token,
            },
            scaling_config=ray.train.ScalingConfig(
                use_gpu=bool(gpus), resources_per_worker={"CPU": settings.cpus_per_worker} | gpus, **size
            ),
            torch_config=TorchConfig(timeout_s=int(patience)),
            run_config=ray.train.RunConfig(
                name="pretrain",
                storage_path=str(folder),
                failure_config=ray.train.FailureConfig(max_failures=-1),  # `Attempts` counts
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                callbacks=[attempts],
            ),
        )
        try:
            result = trainer.fit()
        except ray.train.ControllerError as error:
            if isinstance(stopped := error.controller_failure, TooManyFailures):
                raise PretrainFailed(f"{stopped}; pretrain.max_failures={settings.max_failures}") from error
            raise PretrainFailed(f"Ray Train's controller failed: {cause(error)}") from error
        except ray.train.TrainingFailedError as error:
            raise PretrainFailed(f"training failed: {cause(error)}") from error
    if (reason := ray.get(mailbox.reason.remote())) is not None:
        # What only the workers' hardware or files could tell is the user's to set all the same.
        raise (InputError if reason.startswith(("pretrain.", "output:")) else PretrainFailed)(reason)
    if result.checkpoint is None:
        raise PretrainFailed("training ended without a checkpoint")
    checkpoint = Path(result.checkpoint.path) / CHECKPOINT_FILE
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    skipped = tuple(Problem(*fields) for fields in saved["problems"])
    metrics = {k: v for k, v in (result.metrics or {}).items() if isinstance(v, float)}
    return PretrainResult(checkpoint, saved["step"], saved["samples_seen"], metrics, skipped)


def offset_warning(layout: RawLayout, settings: Pretrain) -> str:
    """What the user must know of Sentinel-2's radiometric offset, which is never guessed; empty where all is known."""
    if settings.s2_offset != "auto" or "s2_toa" not in settings.sensors:
        return ""
    unknown, looked = unknown_offsets(layout)
    if not unknown:
        return ""
    return (
        f"of {looked} Sentinel-2 images looked at, {unknown} do not tell their processing baseline: such images are taken "
        "as they are. If they are of baseline 04.00 or later set pretrain.s2_offset=-1000, if of an earlier one 0"
    )


def check_resources(settings: Pretrain, available: dict[str, float]) -> None:
    """Refuse a run that would hang: workers that reserve every CPU leave Ray Data none to read with. What a cluster that
    brings nodes by itself will have is not known.

    Raises:
        InputError: with the sum.
    """
    if autoscales():
        return
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    workers = settings.worker_range[0]
    wanted = workers * settings.cpus_per_worker + settings.data_cpus
    if wanted > cpus:
        raise InputError(
            f"pretrain: {workers} workers x {settings.cpus_per_worker} CPU + {settings.data_cpus} CPU for reading = "
            f"{wanted:g} CPUs, but the cluster has {cpus:g}; lower workers, cpus_per_worker or data_cpus"
        )
    if workers * settings.gpus_per_worker > gpus:
        raise InputError(
            f"pretrain: {workers} workers x {settings.gpus_per_worker} GPU, but the cluster has {gpus:g} GPUs; "
            "lower workers or gpus_per_worker"
        )
