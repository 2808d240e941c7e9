"""`copernicus plan` for embeddings: images, hours and storage, from the shards or from the published counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import GRID_COLUMNS, GRID_ROWS
from copernicus.models.flops import Image, Shape, encoder, forward_flops
from copernicus.models.zoo import ZOO
from copernicus.platform.embed import image_count, sensors_of
from copernicus.platform.measured import (
    ASSUMED,
    COUNTED,
    EMBED_CPU,
    EMBED_CPU_READING,
    EMBED_H100,
    EMBED_H100_READING,
    GIVEN,
    GPUS,
    GRIDS,
    IMAGES,
    MEASURED,
)
from copernicus.platform.plan import Cluster
from copernicus.platform.plan_data import grid_layout, local_index
from copernicus.platform.plan_table import Line, nodes, size, span
from copernicus.platform.schema import Embed, Experiment, Pretrain

TEXTS = 10
"""Bytes of a row beside its embedding: names of grid, patch and date, compressed."""


@dataclass(frozen=True)
class EmbedPlan:
    """``images``: by sensor; ``flops``: of the encoder for all of them; ``reading_s``, ``encoding_s``: of one worker."""

    settings: Embed
    cluster: Cluster
    width: int
    grids: int
    images: dict[str, float]
    status: str
    source: str
    reading_s: float
    encoding_s: float
    rate_status: str
    rate_source: str
    warnings: tuple[str, ...]

    @property
    def total(self) -> float:
        return sum(self.images.values())

    @property
    def seconds(self) -> float:
        return (self.reading_s + self.encoding_s) / self.cluster.workers

    @property
    def rows_bytes(self) -> float:
        return self.total * (4 * self.width + TEXTS)

    @property
    def map_bytes(self) -> float:
        """The .pt has every cell, the others only those with images."""
        filled, every = self.grids * 4.0 * self.width, GRID_ROWS * GRID_COLUMNS * 4.0 * self.width
        return sum(every if name == "pt" else filled for name in self.settings.formats)


def plan_embed(experiment: Experiment, settings: Embed, cluster: Cluster, grids: int | None) -> EmbedPlan:
    """Estimate an embed stage.

    Raises:
        InputError: an index that is none.
    """
    model = settings.encoder.model or (experiment.pretrain.model if experiment.pretrain else None)
    assert model is not None, "checked when the experiment was loaded"
    warnings = []
    count, images, status, source = _images(experiment, settings, grids)
    shape = None
    if model.name in ZOO:
        sizes = {**ZOO[model.name][1], **model.encoder_overrides()}
        shape = Shape(sizes["embed_dim"], sizes["depth"])
    else:
        warnings.append(f"the operations of {model.name} are not known: hours are those of copernicus_fm_base")
    flops = _flops(shape or _BASE, images, settings.image_size)
    reading, encoding, rate_status, rate_source = _rates(cluster)
    if cluster.gpu == "cpu":
        encoding, reading = (rate * settings.cpus_per_worker for rate in (encoding, reading))
    if cluster.rate is not None:
        encoding, rate_status, rate_source = cluster.rate.flops_per_s, cluster.rate.status, cluster.rate.source
    elif cluster.gpu != "cpu" and (cluster.gpu != "h100" or settings.precision != "bf16"):
        sheet = GPUS[cluster.gpu]
        half = settings.precision == "bf16" and sheet.tflops_bf16 is not None
        peak = sheet.tflops_bf16 if half else sheet.tflops_float32
        assert peak is not None
        encoding *= peak / GPUS["h100"].tflops_bf16  # type: ignore[operator]
        rate_status, rate_source = ASSUMED, f"an H100's share of its peak in bf16, and {sheet.sheet}; {rate_source}"
    return EmbedPlan(
        settings, cluster, shape.embed_dim if shape else _BASE.embed_dim, count, images, status, source,
        sum(images.values()) / reading, flops / encoding, rate_status, rate_source, tuple(warnings),
    )  # fmt: skip


_BASE = Shape(768, 12)


def _images(experiment: Experiment, settings: Embed, grids: int | None) -> tuple[int, dict[str, float], str, str]:
    """Grids, images of each sensor, and where the numbers are from."""
    as_pretraining = Pretrain(
        shards=settings.shards, geotiffs=settings.geotiffs, index=settings.index, sensors=settings.sensors
    )
    sensors = sensors_of(settings)
    if grids is None and (found := local_index(as_pretraining)) is not None:
        index, share, source = found
        chosen = index.having(settings.sensors)
        images = {sensor.name: image_count(chosen, [sensor]) / share for sensor in sensors}
        return round(len(chosen) / share), images, COUNTED if share == 1 else ASSUMED, source
    layout, count, source = grid_layout(experiment.miniature, as_pretraining)
    count = grids or count
    axes = {name: shape[: len(shape) - (2 if name == "dem" else 3)] for name, shape in layout.items()}
    images = {sensor.name: count * float(np.prod(axes[sensor.name])) for sensor in sensors}
    whole = sum(float(np.prod(a)) for a in axes.values())
    if "miniature" not in source:  # places with fewer dates and sensors than the layout has room for
        share = IMAGES.value / GRIDS.value / whole
        images = {name: number * share for name, number in images.items()}
        source = f"{source}; {IMAGES.source}"
    return count, images, ASSUMED, source


def _flops(shape: Shape, images: dict[str, float], sides: dict[str, int]) -> float:
    """Forward operations; kernels are kept, and cost nothing."""
    total = 0.0
    for name, number in images.items():
        sensor = SENSORS[name]
        image = Image(sensor, sensor.channels, sides.get(name, sensor.image_size))
        parts = [dataclasses.replace(part, step=0.0) for part in encoder(shape, image, image.tokens)]
        total += number * forward_flops(parts, 1)
    return total


def _rates(cluster: Cluster) -> tuple[float, float, str, str]:
    """Images a second that a worker reads, and operations a second that it encodes with, by the two measured machines."""
    published = {"s1_grd": 16, "s2_toa": 16, "s3_olci": 8, "dem": 1, **{n: 12 for n in SENSORS if n.startswith("s5p_")}}
    flops = _flops(_BASE, {name: float(n) for name, n in published.items()}, {}) / sum(published.values())
    whole, read = (EMBED_CPU, EMBED_CPU_READING) if cluster.gpu == "cpu" else (EMBED_H100, EMBED_H100_READING)
    # Reading and encoding share the worker's Python, and were seen to add up.
    return read.value, flops / (1 / whole.value - 1 / read.value), MEASURED, whole.source


def embed_lines(plan: EmbedPlan) -> list[list[Line]]:
    """The rows, in sections."""
    settings, cluster = plan.settings, plan.cluster
    most = sorted(plan.images.items(), key=lambda item: -item[1])
    what = [
        Line("grids", f"{plan.grids:,}", plan.status, plan.source),
        Line("images", f"{plan.total:,.0f}", plan.status, ", ".join(f"{name} {n:,.0f}" for name, n in most[:4])),
        Line("embeddings", f"{plan.width} numbers each", GIVEN),
    ]
    chunks = -(-plan.grids // settings.grids_per_chunk)
    stored = [
        Line("rows of images", size(plan.rows_bytes), COUNTED, f"float32, {chunks:,} chunks of {settings.grids_per_chunk} grids"),
        Line("means of grids", size(plan.grids * 4.0 * plan.width), COUNTED),
        Line("map", size(plan.map_bytes), COUNTED, f"721 x 1440 x {plan.width}: {', '.join(settings.formats)}"),
    ]  # fmt: skip
    time = [
        Line("workers", f"{cluster.workers} on {nodes(cluster.nodes)}", GIVEN),
        Line("reading, of one worker", span(plan.reading_s), plan.rate_status, plan.rate_source),
        Line("encoding, of one worker", span(plan.encoding_s), plan.rate_status),
        Line("images a second, all workers", f"{plan.total / plan.seconds:,.0f}", plan.rate_status),
        Line("the embedding", span(plan.seconds), "", "if every worker is busy all the time"),
    ]
    for name, price in (("cost", cluster.price), ("cost, spot", cluster.spot_price)):
        if price is not None:
            cost = price * plan.seconds / 3600 * cluster.nodes
            time.append(Line(name, f"{cost:,.0f}", GIVEN, f"{price:g} a node hour, {nodes(cluster.nodes)}"))
    return [what, stored, time]
