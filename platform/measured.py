"""The constants behind `copernicus plan`, in one place: what was measured, on what, by which command; and what is assumed.

A figure that was measured names its entry in LOG.md. One that was not says so, and where its number comes from: data
sheets, published sizes, or a guess that a plan's option replaces.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED, ASSUMED, GIVEN, COUNTED = "measured", "assumed", "given", "counted"
"""Where a figure comes from: a benchmark; a data sheet or a guess; the user; the files or the model's sizes."""


@dataclass(frozen=True)
class Constant:
    """A figure, where it comes from, and what stands behind it."""

    value: float
    status: str
    source: str


@dataclass(frozen=True)
class Processor:
    """What a worker computes with.

    Attributes:
        name: as in ``--gpu``.
        tflops_bf16, tflops_float32: dense peak rates of the data sheet, 10^12 operations a second; None: it has no bf16.
        memory_gb: 10^9 bytes; the smaller one where a GPU is sold with two.
        network_gbit_s: of a whole node, in a common cloud instance.
        sheet: what the figures are from.
    """

    name: str
    tflops_bf16: float | None
    tflops_float32: float
    memory_gb: float
    network_gbit_s: float
    sheet: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Processor("h100", 989, 67, 80, 3200, "NVIDIA's data sheet (SXM, without sparsity); network of AWS p5.48xlarge"),
        Processor(
            "a100", 312, 19.5, 40, 400, "NVIDIA's data sheet (40 GB, without sparsity); network of AWS p4d.24xlarge"
        ),
        Processor("l4", 121, 30.3, 24, 100, "NVIDIA's data sheet (without sparsity); network of AWS g6.48xlarge"),
        Processor("t4", None, 8.1, 16, 100, "NVIDIA's data sheet; network of AWS g4dn.metal"),
    )
}

H100_STEP_S = Constant(0.103, MEASURED, "LOG.md 2026-11-26, an H100: base, batch 64, bf16, blocks compiled")
H100_BATCH = 64
H100_IDLE_S = Constant(0.012, MEASURED, "LOG.md 2026-11-26, an H100: of a step's 103 ms, 12 in which no kernel runs")
H100_PEAK_GB = Constant(25.4, MEASURED, "LOG.md 2026-11-26, an H100: peak memory of that step")
"""That step also passes the distilled student through the encoder; the teacher was a stand-in that costs nothing."""

CPU_STEP_S = Constant(12.72, MEASURED, "LOG.md 2026-11-26: base, batch 4, float32, two cores of an AMD EPYC (Zen 3)")
CPU_BATCH, CPU_CORES = 4, 2

_READING = "LOG.md 2026-11-25, one core, page cache: 69 samples/s at the published sizes, 243 at one token a sensor"
READ_MS = Constant(4.1, MEASURED, _READING)
READ_MS_PER_MB = Constant(1.39, MEASURED, _READING)
"""Processor time to read, crop and collate a sample: so much, and so much for each MB (10^6 bytes) of the batch's row: 7.5
at the published sizes, 0.04 at one token a sensor."""

CHECKPOINT_S = Constant(1.5, MEASURED, "LOG.md 2026-11-25: a report of a checkpoint to Ray Train takes 1-2 s")
START_S = Constant(30.0, ASSUMED, "Ray, workers, first blocks and compilation; not measured on a cluster")

READ_MB_S = Constant(1000.0, ASSUMED, "what storage gives a node: a guess; --read-rate replaces it")
CPU_NETWORK_GBIT_S = Constant(10.0, ASSUMED, "a node without GPUs; --network replaces it")

GRIDS = Constant(310_000, ASSUMED, "the published set: about 220k whole grids and 90k that lack a sensor")
STORED_PATCHES, STORED_DATES = 4, {"s1_grd": 4, "s2_toa": 4, "s3_olci": 8}
ATMOSPHERE_DATES = 12
"""Images of a grid in the published shards: local patches, dates of a sensor."""

PROBE_EPOCH_S = Constant(
    0.17, MEASURED, "LOG.md 2026-11-26: an epoch of a linear probe, 16,200 x 768 features, one core"
)
PROBE_EPOCH_NUMBERS = 16_200 * 768
TRIAL_S = Constant(
    3.3, MEASURED, "LOG.md 2026-11-26: from trial to trial of a small probe, Ray Tune and MLflow included"
)

IMAGES = Constant(18_700_000, ASSUMED, "18.7 million images in the published set")
EMBED_H100 = Constant(
    1839,
    MEASURED,
    "LOG.md 2026-11-26, an H100 with 16 cores: base, batch 64, bf16, published sizes, images/s with reading",
)
EMBED_H100_READING = Constant(3475, MEASURED, "LOG.md 2026-11-26, the same without an encoder")
EMBED_CPU = Constant(
    2.36, MEASURED, "LOG.md 2026-11-26, one core: base, batch 8, float32, published sizes, images/s with reading"
)
EMBED_CPU_READING = Constant(946, MEASURED, "LOG.md 2026-11-26, the same without an encoder")
