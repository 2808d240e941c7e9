"""`copernicus plan` for sweeps: encoder passes, cached features, trials and hours, from published split sizes.

Shapes: D encoder width, h w token grid, K outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from copernicus.datasets.bench import get_task
from copernicus.models.blocks import default_levels
from copernicus.models.flops import Image, Shape, encoder
from copernicus.models.initialise import shapes_only
from copernicus.models.patches import token_grid
from copernicus.models.zoo import ZOO
from copernicus.platform.cell import Cell
from copernicus.platform.encoding import FLIPS
from copernicus.platform.measured import (
    ASSUMED,
    COUNTED,
    GIVEN,
    MEASURED,
    PROBE_EPOCH_NUMBERS,
    PROBE_EPOCH_S,
    TRIAL_S,
)
from copernicus.platform.plan import Cluster, Rate, processor_rate
from copernicus.platform.plan_table import Line, nodes, size, span
from copernicus.platform.probe import ProbeSettings, make_head
from copernicus.platform.schema import FROZEN, QUICK, Experiment, Model, Pretrain, Sweep

TRAINED = 3
"""Forward and backward, in forwards."""


@dataclass(frozen=True)
class CellPlan:
    """One task with one encoder.

    Attributes:
        runs: trials and repetitions with other seeds.
        passes: of images through the encoder, forward; of a tuned one the backward pass counts as two more.
        kept: bytes of cached features.
        encoder_flops: of all passes; head_flops: of all trials' dense heads.
        probe_s: processor seconds of linear heads.
    """

    cell: Cell
    runs: int
    passes: int
    kept: int
    encoder_flops: float
    head_flops: float
    probe_s: float


@dataclass(frozen=True)
class SweepPlan:
    """All cells. ``unknown``: encoders of other packages, whose operations are not counted."""

    settings: Sweep
    cluster: Cluster
    cells: tuple[CellPlan, ...]
    encoder_rate: Rate
    head_rate: Rate
    unknown: tuple[str, ...]

    @property
    def kept(self) -> int:
        return sum(cell.kept for cell in self.cells)

    @property
    def encoding_s(self) -> float:
        """Of one worker."""
        return sum(cell.encoder_flops for cell in self.cells) / self.encoder_rate.flops_per_s

    @property
    def heads_s(self) -> float:
        return sum(cell.head_flops for cell in self.cells) / self.head_rate.flops_per_s + sum(
            c.probe_s for c in self.cells
        )

    @property
    def starts_s(self) -> float:
        return sum(cell.runs for cell in self.cells) * TRIAL_S.value

    @property
    def hours(self) -> float:
        """Of all workers, each busy all the time."""
        return (self.encoding_s + self.heads_s + self.starts_s) / self.cluster.workers / 3600

    @property
    def warnings(self) -> list[str]:
        found = []
        limit = self.settings.cache_gb
        if limit is not None and self.kept > limit * 1e9 and self.settings.features == "auto":
            found.append(
                f"features take {size(self.kept)} and sweep.cache_gb is {limit:g}: splits that do not fit are encoded whenever "
                "they are used, in every epoch of every trial; raise it, or sweep fewer tasks at a time"
            )
        if self.unknown:
            found.append(f"the operations of {', '.join(self.unknown)} are not known, and not in the hours")
        return found


def plan_sweep(experiment: Experiment, settings: Sweep, cluster: Cluster) -> SweepPlan:
    """Estimate a sweep. Early stopping (``scheduler: asha``) is not counted: hours are an upper bound with it."""
    cells, unknown = [], []
    for task_name in settings.tasks:
        for name, given in settings.encoders.items():
            model = given.model or (experiment.pretrain.model if experiment.pretrain else None)
            assert model is not None, "checked when the experiment was loaded"
            protocol = given.protocol or settings.protocol
            cell = Cell(
                task_name, name, model, given.weights, given.seed, None, protocol, given.blocks, given.lora_rank
            )
            cells.append(plan_cell(cell, settings))
            if model.name not in ZOO and name not in unknown:
                unknown.append(name)
    if cluster.rate is not None:
        rates = [cluster.rate, cluster.rate]
    else:
        as_pretraining = Pretrain(cpus_per_worker=settings.cpus_per_trial)
        rates = [
            processor_rate(cluster.gpu, dataclasses.replace(as_pretraining, precision=precision))
            for precision in (settings.precision if cluster.gpu != "cpu" else "float32", "float32")
        ]
    return SweepPlan(settings, cluster, tuple(cells), rates[0], rates[1], tuple(unknown))


def plan_cell(cell: Cell, settings: Sweep) -> CellPlan:
    """See `CellPlan`."""
    task = get_task(cell.task)
    splits = {split: task.splits[split] for split in ("train", "val", "test")}
    trials, seeds = cell.trials(settings), len(cell.seeds(settings, 0))
    runs = trials + seeds
    side = settings.image_size.get(cell.task, task.input_size)
    shape = _shape(cell.model)
    tokens = token_grid(side, side, task.sensor.patch_kernel)
    dim = shape.embed_dim if shape else 0
    frozen, forward = cell.protocol in FROZEN, 0.0
    if shape is not None:
        image = Image(task.sensor, task.sensor.channels, side)
        # A frozen encoder's kernels are generated once, a tuned one's at every step; plain ones have none.
        made = 0.0 if frozen or cell.model.name.startswith("vit") else 1 / task.supervised.batch_size
        forward = sum(p.sample + made * p.step for p in encoder(shape, image, tokens[0] * tokens[1]))
    copies = len(FLIPS) * splits["train"] + splits["val"] + splits["test"]
    epochs = settings.epochs
    images = task.dates
    if frozen:
        passes = worked = copies * images
    else:
        passes = (runs * epochs * (splits["train"] + splits["val"]) + seeds * splits["test"]) * images
        worked = (runs * epochs * (TRAINED * splits["train"] + splits["val"]) + seeds * splits["test"]) * images
    levels = len(default_levels(shape.depth)) if shape and task.dense else 1
    numbers = dim * (levels * tokens[0] * tokens[1] if task.dense else 1)
    kept = copies * numbers * (2 if task.dense else 4) if frozen else 0
    head = probe_s = 0.0
    if task.dense and dim:
        samples = runs * epochs * (TRAINED * splits["train"] + splits["val"])
        head = samples * head_flops(cell.task, settings.head, (dim,) * levels, tokens)
    elif cell.protocol not in QUICK:
        probe_s = runs * epochs * PROBE_EPOCH_S.value * splits["train"] * dim / PROBE_EPOCH_NUMBERS
    return CellPlan(cell, runs, passes, kept, forward * worked, head, probe_s)


@functools.lru_cache(maxsize=256)
def head_flops(task_name: str, kind: str, dims: tuple[int, ...], grid: tuple[int, int]) -> float:
    """Forward operations of a dense task's head for one sample, as torch counts them on tensors without memory."""
    task = get_task(task_name)
    with shapes_only():
        head = make_head(dims, task, ProbeSettings.for_task(task, head=kind), seed=0).to("meta").eval()
    levels = [torch.empty(1, dim, *grid, device="meta") for dim in dims]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head(levels, grid)
    return float(counter.get_total_flops())


def _shape(model: Model) -> Shape | None:
    if model.name not in ZOO:
        return None
    sizes: Mapping[str, int] = {**ZOO[model.name][1], **model.encoder_overrides()}
    return Shape(sizes["embed_dim"], sizes["depth"])


def sweep_lines(plan: SweepPlan) -> list[list[Line]]:
    """The rows, in sections."""
    settings, cluster = plan.settings, plan.cluster
    runs = sum(cell.runs for cell in plan.cells)
    frozen = [cell for cell in plan.cells if cell.cell.protocol in FROZEN]
    what = [
        Line("cells", f"{len(plan.cells)}: {len(settings.tasks)} tasks x {len(settings.encoders)} encoders", GIVEN),
        Line(
            "trials, repetitions included",
            f"{runs:,}",
            GIVEN,
            "sweep.trials, sweep.seeds; stopped early ones count as whole",
        ),
        Line("samples", "published splits", ASSUMED, "the benchmark's tables; smaller copies take less"),
    ]
    passes = [
        Line("encoder passes, frozen", f"{sum(c.passes for c in frozen):,}", COUNTED, "four flips of train, val and test, once"),
        Line("encoder passes, tuned", f"{sum(c.passes for c in plan.cells) - sum(c.passes for c in frozen):,}", COUNTED, "every epoch of every trial"),
        Line("cached features", size(plan.kept), COUNTED, f"sweep.cache_gb={settings.cache_gb}"),
    ]  # fmt: skip
    largest = sorted(plan.cells, key=lambda cell: -cell.kept)[:3]
    passes += [Line(f"  {cell.cell.key}", size(cell.kept)) for cell in largest if cell.kept]
    dense = any(cell.head_flops for cell in plan.cells)
    time = [
        Line("workers", f"{cluster.workers} on {nodes(cluster.nodes)}", GIVEN),
        Line("encoders, of one worker", span(plan.encoding_s), plan.encoder_rate.status, plan.encoder_rate.source),
        Line("heads, of one worker", span(plan.heads_s), plan.head_rate.status if dense else PROBE_EPOCH_S.status,
             plan.head_rate.source if dense else PROBE_EPOCH_S.source),
        Line("trials' own time", span(plan.starts_s), MEASURED, TRIAL_S.source),
        Line("the sweep", span(plan.hours * 3600), "", "if every worker is busy all the time"),
    ]  # fmt: skip
    for name, price in (("cost", cluster.price), ("cost, spot", cluster.spot_price)):
        if price is not None:
            cost = price * plan.hours * cluster.nodes
            time.append(Line(name, f"{cost:,.0f}", GIVEN, f"{price:g} a node hour, {nodes(cluster.nodes)}"))
    return [what, passes, time]
