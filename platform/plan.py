"""`copernicus plan`: what a pretraining run would take on so many GPUs, on paper. Nothing is run, and Ray is not needed.

The arithmetic is here, the constants in `measured.py`, the operations of a step in `copernicus.models.flops`, memory and
checkpoints in `model_memory.py`, what is read in `plan_data.py`, the table in `plan_table.py`. Sweeps: `plan_sweep.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models.distillation import RGB_CHANNELS, RGB_SENSOR
from copernicus.models.flops import Image, Part, Shape, autoencoder, block, forward_flops, training_flops
from copernicus.models.zoo import ZOO
from copernicus.platform.measured import (
    ASSUMED,
    CHECKPOINT_S,
    CPU_BATCH,
    CPU_CORES,
    CPU_NETWORK_GBIT_S,
    CPU_STEP_S,
    GIVEN,
    GPUS,
    H100_BATCH,
    H100_IDLE_S,
    H100_PEAK_GB,
    H100_STEP_S,
    MEASURED,
    READ_MB_S,
    READ_MS,
    READ_MS_PER_MB,
    START_S,
    Constant,
)
from copernicus.platform.model_memory import ModelSize, model_size
from copernicus.platform.plan_data import Data, describe
from copernicus.platform.schema import Experiment, Pretrain

TEACHER_DIM, TEACHER_DEPTH, TEACHER_PATCH = 768, 12, 14
"""The published teacher, DINOv2 ViT-B/14 (arXiv 2304.07193)."""
BASE = Shape(768, 12, distill_dim=TEACHER_DIM)
BACKWARD_SHARE = 2 / 3
"""Of a step's operations: what gradients can be sent beside."""


@dataclass(frozen=True)
class Rate:
    """What a worker computes: operations a second, beside ``idle_s`` that every step costs."""

    flops_per_s: float
    idle_s: float
    status: str
    source: str

    def step_s(self, flops: float) -> float:
        return self.idle_s + flops / self.flops_per_s


@dataclass(frozen=True)
class Cluster:
    """What the run would have.

    Attributes:
        gpu: h100, a100, l4, t4; cpu: workers of ``pretrain.cpus_per_worker`` cores each.
        per_node: workers of a node.
        read_mb_s, network_gbit_s: of a node.
        price, spot_price: of a node and hour, in any currency; None: not said.
        rate: of a worker, measured on this machine; None: by the constants.
    """

    gpu: str
    workers: int
    per_node: int
    read_mb_s: Constant
    network_gbit_s: Constant
    price: float | None = None
    spot_price: float | None = None
    rate: Rate | None = None

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.per_node)


@dataclass(frozen=True)
class PretrainPlan:
    """The estimates: times in seconds, sizes in bytes.

    Attributes:
        batch: samples of a worker in a step.
        step_flops: of a worker's step, forward and backward.
        compute_s, reading_s, storage_s: what a step would take if that alone counted. On CPUs, which training and reading
            share, ``compute_s`` has both, and ``reading_s`` is 0.
        network_s: of a step, to send gradients; ``waited_s``: of it, what the backward pass does not hide.
        step_s: the longest of these.
        data_cpus: that reading needs so that no GPU waits; node_mb_s: what a node then reads.
        traffic: that a node sends in a step.
        evaluation_s, checkpoint_s: of one.
        state, activations, limit: memory of a GPU; limit None: not known.
    """

    settings: Pretrain
    cluster: Cluster
    size: ModelSize
    data: Data
    rate: Rate
    batch: int
    samples_per_epoch: int
    steps: int
    step_flops: float
    compute_s: float
    reading_s: float
    storage_s: float
    network_s: float
    waited_s: float
    step_s: float
    data_cpus: float
    node_mb_s: float
    traffic: float
    evaluation_s: float
    evaluations: int
    checkpoint_s: float
    checkpoints: int
    state: float
    activations: float
    limit: float | None
    warnings: tuple[str, ...]

    @property
    def epoch_s(self) -> float:
        return self.samples_per_epoch / self.settings.batch_size * self.step_s

    @property
    def run_s(self) -> float:
        beside = self.evaluations * self.evaluation_s + self.checkpoints * self.checkpoint_s
        return START_S.value + self.steps * self.step_s + beside

    @property
    def kept_bytes(self) -> int:
        """Of checkpoints on the disk at a time: those that are kept, and one that is being written."""
        return (self.settings.keep_checkpoints + 1) * self.size.checkpoint_bytes

    @property
    def node_hours(self) -> float:
        return self.cluster.nodes * self.run_s / 3600


def plan_pretrain(
    experiment: Experiment, settings: Pretrain, cluster: Cluster, grids: int | None = None
) -> PretrainPlan:
    """Estimate a run.

    Args:
        grids: of the data set, where the files are not here.

    Raises:
        InputError: workers or a precision that the run would refuse.
    """
    workers = cluster.workers
    if workers > settings.batch_size:
        raise InputError(
            f"--workers {workers} cannot share a global batch of {settings.batch_size}; raise pretrain.batch_size"
        )
    data = describe(experiment, settings, grids)
    held_out = round(data.grids * settings.val_fraction) if settings.val_fraction else 0
    held_out = max(held_out, 1) if settings.val_fraction else 0
    samples_per_epoch = (data.grids - held_out) * settings.draws_per_grid
    if samples_per_epoch < 1:
        raise InputError(f"{data.grids} grids of which {held_out} are held out leave none to train with")
    batch = -(-settings.batch_size // workers)
    shape, parts, teacher = step_parts(settings)
    flops = training_flops(parts, batch, settings.activation_checkpointing) + batch * teacher
    rate = cluster.rate or processor_rate(cluster.gpu, settings)
    size = model_size(
        settings.model.name, settings.model.overrides(), shape.distill_dim,
        any(SENSORS[name].spectral for name in settings.sensors), not all(SENSORS[name].spectral for name in settings.sensors),
    )  # fmt: skip

    read_s = read_seconds(data.row_bytes)
    compute_s, reading_s = rate.step_s(flops), settings.batch_size * read_s / settings.data_cpus
    if cluster.gpu == "cpu":
        # A worker's threads and the readers take turns on the same cores.
        cpus = workers * settings.cpus_per_worker + settings.data_cpus
        busy = workers * settings.cpus_per_worker * compute_s + settings.batch_size * read_s
        compute_s, reading_s = busy / cpus, 0.0
    per_node = min(cluster.per_node, workers)
    storage_s = batch * per_node * data.sample_bytes / (cluster.read_mb_s.value * 1e6)
    traffic = node_traffic(size, settings.parallel, workers, cluster.nodes)
    network_s = traffic / (cluster.network_gbit_s.value * 1e9 / 8)
    waited_s = max(0.0, network_s - BACKWARD_SHARE * compute_s)
    step_s = max(compute_s + waited_s, reading_s, storage_s)
    trained_s = compute_s + waited_s  # of a step, where data keep up

    steps = -(-samples_per_epoch * settings.epochs // settings.batch_size)
    evaluations = settings.epochs // settings.val_every + 1 if held_out else 0
    evaluation_s = -(-held_out // workers) * (read_s + forward_flops(parts, batch) / batch / rate.flops_per_s)
    by_clock = steps * step_s / (settings.checkpoint_minutes * 60)
    checkpoints = math.ceil(max(by_clock, settings.epochs / settings.checkpoint_every))
    checkpoint_s = CHECKPOINT_S.value + size.checkpoint_bytes / (cluster.read_mb_s.value * 1e6)

    kept, whole = size.state_bytes(settings.parallel, workers)
    state = kept + whole
    activations = activation_bytes(settings, shape, images(settings), size, batch)
    plan = PretrainPlan(
        settings=settings, cluster=cluster, size=size, data=data, rate=rate, batch=batch, samples_per_epoch=samples_per_epoch,
        steps=steps, step_flops=flops, compute_s=compute_s, reading_s=reading_s, storage_s=storage_s, network_s=network_s,
        waited_s=waited_s, step_s=step_s, data_cpus=settings.batch_size * read_s / trained_s,
        node_mb_s=batch * per_node * data.sample_bytes / trained_s / 1e6, traffic=traffic, evaluation_s=evaluation_s,
        evaluations=evaluations, checkpoint_s=checkpoint_s, checkpoints=checkpoints, state=state, activations=activations,
        limit=GPUS[cluster.gpu].memory_gb * 1e9 if cluster.gpu in GPUS else None, warnings=(),
    )  # fmt: skip
    return dataclasses.replace(plan, warnings=tuple(warnings(plan)))


def images(settings: Pretrain) -> list[Image]:
    """What a step shows the model, with the mean number of bands that steps draw."""
    low, high = settings.channel_fraction
    shown = []
    for name in settings.sensors:
        sensor = SENSORS[name]
        fewest = math.ceil(low * sensor.channels - 1e-9)
        most = max(fewest, int(high * sensor.channels))
        channels = sensor.channels if sensor.channels < 3 else (fewest + most) / 2
        shown.append(Image(sensor, channels, settings.image_size.get(name, sensor.image_size)))
    return shown


def step_parts(settings: Pretrain) -> tuple[Shape, list[Part], float]:
    """The model's sizes, its operations in a step, and the teacher's for one sample."""
    sizes: Mapping[str, int] = {**ZOO[settings.model.name][1], **settings.model.overrides()}
    known = {key: sizes[key] for key in ("embed_dim", "depth", "decoder_embed_dim", "decoder_depth") if key in sizes}
    shape = Shape(**known, mask_ratio=settings.mask_ratio, distill_dim=TEACHER_DIM if settings.distill else 0)
    if not settings.distill:
        return shape, autoencoder(shape, images(settings)), 0.0
    side = settings.image_size.get(RGB_SENSOR.name, RGB_SENSOR.image_size)
    student = Image(RGB_SENSOR, len(RGB_CHANNELS), side)
    tokens = max(1, round(side / TEACHER_PATCH)) ** 2
    teacher = TEACHER_DEPTH * block(tokens + 1, TEACHER_DIM) + 2 * tokens * 3 * TEACHER_PATCH**2 * TEACHER_DIM
    return shape, autoencoder(shape, images(settings), student), teacher


def _measured_step(batch: int, bands: float) -> tuple[list[Image], float]:
    """The base model's step of `model_speed.py`: its images, its operations."""
    shown = [
        Image(s, round(bands * s.channels) if n in ("s2_toa", "s3_olci") else s.channels, s.image_size)
        for n, s in SENSORS.items()
    ]
    student = Image(RGB_SENSOR, len(RGB_CHANNELS), RGB_SENSOR.image_size)
    return shown, training_flops(autoencoder(BASE, shown, student), batch)


MEASURED_BANDS = 0.875
"""Of Sentinel-2's and Sentinel-3's bands, in the steps that were measured."""


def processor_rate(gpu: str, settings: Pretrain) -> Rate:
    """Of a worker, by the constants: an H100's share of its peak rate, which other GPUs are taken to reach as well.

    Raises:
        InputError: a precision that the GPU does not have.
    """
    if gpu == "cpu":
        _, flops = _measured_step(CPU_BATCH, MEASURED_BANDS)
        if settings.precision == "bf16":
            raise InputError("--gpu cpu: the constants are of float32; leave pretrain.precision out, or --gpu here")
        rate = flops / (CPU_STEP_S.value * CPU_CORES)
        return Rate(rate * settings.cpus_per_worker, 0.0, CPU_STEP_S.status, CPU_STEP_S.source)
    processor = GPUS[gpu]
    if settings.precision == "bf16" and processor.tflops_bf16 is None:
        raise InputError(f"pretrain.precision: --gpu {gpu} computes no bf16; set float32")
    _, flops = _measured_step(H100_BATCH, MEASURED_BANDS)
    share = flops / (H100_STEP_S.value - H100_IDLE_S.value) / (GPUS["h100"].tflops_bf16 * 1e12)  # type: ignore[operator]
    half = processor.tflops_bf16 is not None and settings.precision != "float32"
    peak = processor.tflops_bf16 if half else processor.tflops_float32
    assert peak is not None
    name = f"{share:.0%} of {peak:g} TFLOP/s ({'bf16' if half else 'float32'})"
    as_measured = gpu == "h100" and half and settings.compile is not False
    source = H100_STEP_S.source if as_measured else f"an H100's share of its bf16 peak, and {processor.sheet}"
    return Rate(share * peak * 1e12, H100_IDLE_S.value, MEASURED if as_measured else ASSUMED, f"{name}: {source}")


def read_seconds(row_bytes: float) -> float:
    """Processor time to read, crop and collate a sample of so many bytes."""
    return (READ_MS.value + READ_MS_PER_MB.value * row_bytes / 1e6) / 1000


def node_traffic(size: ModelSize, parallel: str, workers: int, nodes: int) -> float:
    """Bytes that a node sends in a step: a ring passes each gradient twice; fsdp fetches parameters for the forward and the
    backward pass and passes gradients once. Within a node nothing is counted."""
    if nodes < 2:
        return 0.0
    passes = 2 if parallel == "ddp" else 3
    return passes * (workers - 1) / workers * size.trained * 4


def activation_bytes(settings: Pretrain, shape: Shape, shown: Sequence[Image], size: ModelSize, batch: int) -> float:
    """What a step keeps for its backward pass, beside `ModelSize.state_bytes`: so many bytes for each number of a block's
    tokens as the measured step kept, twice that in float32; and bf16's copy of the parameters."""
    each = _bytes_a_number()
    half = settings.precision != "float32"
    rgb_side = settings.image_size.get(RGB_SENSOR.name, RGB_SENSOR.image_size) if settings.distill else 0
    numbers = _block_numbers(shape, shown, rgb_side)
    kept = batch * numbers * each * (1 if half else 2)
    if settings.activation_checkpointing:
        # Each block's input alone, float32, and all of one block.
        kept = batch * numbers * 4 + kept / (shape.depth + shape.decoder_depth)
    return kept + (2 * size.parameters if half else 0)


@functools.lru_cache(maxsize=1)
def _bytes_a_number() -> float:
    """Of the measured step's memory: what is neither state nor bf16's copy, for each number that enters a block."""
    measured, _ = _measured_step(H100_BATCH, MEASURED_BANDS)
    base = model_size("copernicus_fm_base", {}, TEACHER_DIM)
    rest = H100_PEAK_GB.value * 1e9 - base.state_bytes("ddp", 1)[0] - 2 * base.parameters
    return rest / (H100_BATCH * _block_numbers(BASE, measured, RGB_SENSOR.image_size))


def _block_numbers(shape: Shape, shown: Sequence[Image], student_side: int) -> float:
    """Numbers that enter the blocks for one sample: tokens x width, over all blocks. ``student_side``: 0: no student."""
    student = (student_side // RGB_SENSOR.patch_kernel) ** 2 + 1 if student_side else 0
    encoded = sum(image.kept(shape.mask_ratio) + 1 for image in shown) + student
    decoded = sum(image.tokens + 1 for image in shown)
    return encoded * shape.embed_dim * shape.depth + decoded * shape.decoder_embed_dim * shape.decoder_depth


def warnings(plan: PretrainPlan) -> list[str]:
    """Where the run would wait, or not fit."""
    settings, cluster, found = plan.settings, plan.cluster, []
    trained_s = plan.compute_s + plan.waited_s
    if plan.reading_s > trained_s:
        found.append(
            f"reading cannot keep up: pretrain.data_cpus={settings.data_cpus:g} read "
            f"{settings.batch_size / plan.reading_s:,.0f} samples/s, the workers train {settings.batch_size / trained_s:,.0f}; "
            f"they need data_cpus={math.ceil(plan.data_cpus)} ({math.ceil(plan.data_cpus / cluster.nodes)} a node)"
        )
    if plan.storage_s > trained_s:
        found.append(
            f"storage cannot keep up: a node reads {plan.node_mb_s:,.0f} MB/s when its workers never wait, and gets "
            f"{cluster.read_mb_s.value:,.0f} ({cluster.read_mb_s.status}); copy the shards to local disks, or use fewer GPUs "
            "a node"
        )
    if plan.waited_s > 0.05 * plan.step_s:
        found.append(
            f"the network cannot keep up: {plan.traffic / 1e9:.2f} GB a step from each node take {plan.network_s * 1e3:.0f} ms, "
            f"of which {plan.waited_s * 1e3:.0f} are waited for; give each worker more samples (pretrain.batch_size)"
        )
    if plan.rate.idle_s > 0.25 * plan.compute_s:
        found.append(
            f"{plan.batch} samples a worker are few: {plan.rate.idle_s * 1e3:.0f} of a step's {plan.compute_s * 1e3:.0f} ms do "
            "not depend on their number; use fewer workers, or raise pretrain.batch_size"
        )
    if plan.limit is not None and plan.state + plan.activations > 0.95 * plan.limit:
        found.append(
            f"a GPU of {plan.limit / 1e9:.0f} GB would need {(plan.state + plan.activations) / 1e9:.0f}: set "
            "pretrain.activation_checkpointing or pretrain.parallel=fsdp, or use more workers"
        )
    if settings.batch_size % cluster.workers:
        found.append(
            f"{cluster.workers} workers do not divide a batch of {settings.batch_size}: each takes {plan.batch}, padding "
            "included"
        )
    return found


def cluster_of(
    settings_workers: int, gpu: str, workers: int | None, per_node: int, read_rate: float | None, network: float | None,
    price: float | None, spot_price: float | None, rate: Rate | None,
) -> Cluster:  # fmt: skip
    """The user's options as a cluster.

    Raises:
        InputError: no such processor, or a number that cannot be.
    """
    choices = (*GPUS, "cpu", "here")
    if gpu not in choices:
        raise InputError(f"--gpu: no {gpu!r}; valid choices: {', '.join(choices)}")
    workers = settings_workers if workers is None else workers
    for option, value in (("workers", workers), ("gpus-per-node", per_node)):
        if value < 1:
            raise InputError(f"--{option}: must be at least 1, it is {value}")
    for option, amount in (
        ("read-rate", read_rate),
        ("network", network),
        ("price", price),
        ("spot-price", spot_price),
    ):
        if amount is not None and not (math.isfinite(amount) and amount > 0):
            raise InputError(f"--{option}: must be positive, it is {amount:g}")
    sheet = GPUS.get(gpu)
    wire = CPU_NETWORK_GBIT_S if sheet is None else Constant(sheet.network_gbit_s, ASSUMED, sheet.sheet)
    return Cluster(
        gpu, workers, per_node,
        READ_MB_S if read_rate is None else Constant(read_rate, GIVEN, "--read-rate"),
        wire if network is None else Constant(network, GIVEN, "--network"),
        price, spot_price, rate,
    )  # fmt: skip
