"""``kind: embed``: all images of the shards through an encoder, chunk by chunk, on a pool of Ray Data actors.

What comes of a chunk is the same whoever makes it (`embed_worker`). Chunks that an interrupted run has finished are
found by their manifests and not begun again; the means of all grids are put together when every chunk is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from copernicus.datasets.expand import expand
from copernicus.datasets.image_names import grid_number
from copernicus.datasets.index import GridIndex, from_surveys
from copernicus.datasets.raw import read_layout
from copernicus.datasets.raw_index import survey_layout
from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.datasets.shards import LEADING_AXES, Problem
from copernicus.datasets.slices import DrawReader
from copernicus.models.encoder import Encoder
from copernicus.platform.cell import WORTH_A_WORKER
from copernicus.platform.embed_worker import (
    DONE,
    GRIDS,
    IMAGES,
    Chunk,
    ChunkEmbedder,
    ChunkPlan,
    chunk_tables,
    grid_schema,
)
from copernicus.platform.encode_splits import Pool, cause_of
from copernicus.platform.encoding import encoder_identity
from copernicus.platform.grid_means import GRIDS_FILE
from copernicus.platform.indexing import open_index
from copernicus.platform.language import variables
from copernicus.platform.schema import Embed
from copernicus.platform.session import autoscales
from copernicus.platform.skipped import unusable_share
from copernicus.platform.sweep import ASKED_FOR

VERSION = 1
"""Of how images are read and encoded; chunks of another are made anew."""


class EmbedFailed(RuntimeError):
    """Embedding ended without its result; it goes on where it stopped with the same command. ``problems``: what could not
    be used."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()):
        super().__init__(message)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class EmbedResult:
    """``images``, ``grids``: in the product. ``lost``: images that could not be used. ``new``: images that this run embedded, in
    ``seconds``. ``empty``: grids without a single image that could be used."""

    folder: Path
    width: int
    images: int
    grids: int
    lost: int
    new: int
    seconds: float
    bytes: int
    empty: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def grids_file(self) -> Path:
        return self.folder / GRIDS_FILE


def sensors_of(settings: Embed) -> tuple[Sensor, ...]:
    return tuple(SENSORS[name] for name in settings.sensors)


def open_images(settings: Embed, keep: Path, on_index: Callable[[float, float, str], None]) -> GridIndex:
    """The grids to embed, those that have any of the sensors.

    Raises:
        InputError: there is none.
    """
    if settings.geotiffs:
        whole = from_surveys([survey_layout(read_layout(settings.geotiffs))])
    else:
        whole = open_index(expand(settings.shards), settings.index, keep, on_index)
    index = whole.having(settings.sensors)
    known = np.array([grid_number(key) is not None for key in index.keys])
    strange = tuple(
        Problem(key, "bad_grid_id", "no seven digits of a cell of the globe")
        for key in index.keys
        if grid_number(key) is None
    )
    if not known.any():
        raise InputError(f"embed.shards: no grid of the globe among {len(index)}; the first: {strange[0]}")
    return dataclasses.replace(index, rows=index.rows[known], problems=(*index.problems, *strange))


def image_count(index: GridIndex, sensors: Sequence[Sensor]) -> int:
    """Images in the shards, repeated ones among them."""
    total = 0
    for sensor in sensors:
        at = index.table[sensor.name].take(index.rows).combine_chunks().drop_null()
        axes = len(LEADING_AXES[sensor.name])
        count: Any = len(at)
        if axes and len(at):
            sides = [pc.list_element(at.field("shape"), axis) for axis in range(axes)]
            count = pc.sum(
                pc.cast(sides[0], "int64") if axes == 1 else pc.multiply(pc.cast(sides[0], "int64"), sides[1])
            ).as_py()
        total += count
    return total


def pool_size(settings: Embed, images: int) -> int:
    """Workers: as many as the YAML says, or as the nodes have room for; none, and this process embeds, where there is hardly
    anything to embed."""
    if settings.workers is not None:
        return settings.workers
    if autoscales():
        return ASKED_FOR
    if images < WORTH_A_WORKER and not settings.gpus_per_worker:
        return 0
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    asked = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    room = (min(node.get(name, 0.0) / amount for name, amount in asked.items() if amount) for node in nodes)
    return max(1, sum(math.floor(n + 1e-9) for n in room))


def make_plan(settings: Embed, encoder: Encoder, folder: Path) -> ChunkPlan:
    """How chunks are read and encoded.

    Raises:
        InputError: a size that the sensor's patches do not fit.
    """
    sensors = sensors_of(settings)
    sizes = {s.name: settings.image_size.get(s.name, s.image_size) for s in sensors}
    reader = DrawReader(sensors, sizes, augment=False, s2_offset=settings.s2_offset)
    sensor, table = sensors[0], getattr(encoder, "language", None)  # embeddings of names are no weights
    content = {
        "version": VERSION, "encoder": encoder_identity(encoder, sensor, sizes[sensor.name]), "sizes": sizes,
        "s2_offset": settings.s2_offset, "batch_size": settings.batch_size, "precision": settings.precision,
        "device": "cuda" if settings.gpus_per_worker else "cpu", "language": table.digests(variables(sensors)) if table else {},
    }  # fmt: skip
    identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    precision: Any = settings.precision
    return ChunkPlan(str(folder.absolute()), reader, settings.grids_per_chunk, settings.batch_size, precision, identity)


def embed(
    settings: Embed,
    encoder: Encoder,
    index: GridIndex,
    folder: Path,
    on_progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> EmbedResult:
    """Embed what is left, and write the means of all grids.

    ``on_progress(grids done, grids, note)`` is called after every chunk.

    Raises:
        InputError: sizes or a pool that do not fit.
        EmbedFailed: more images than ``max_skipped`` could not be used.
    """
    plan = make_plan(settings, encoder, folder)
    if (share := unusable_share(index)) > settings.max_skipped:
        raise EmbedFailed(_too_many(f"{share:.1%} of the grids", settings, index.problems), index.problems)
    for kind in (IMAGES, GRIDS, DONE):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for part in (folder / kind).glob(".*.part"):
            part.unlink(missing_ok=True)
    numbers = range(-(-len(index) // settings.grids_per_chunk))
    for path in [path for kind in (IMAGES, GRIDS, DONE) for path in (folder / kind).glob("chunk-*")]:
        if int(path.stem.removeprefix("chunk-")) >= len(numbers):  # of more grids than there are now
            path.unlink()
    shards = index.table["shard"].to_numpy()[index.rows]
    grids = [(key, index.shards[shard].stamp) for key, shard in zip(index.keys, shards, strict=True)]
    chunks: dict[int, Chunk] = {}
    for number in numbers:
        if (chunk := plan.done(number, [grids[i] for i in plan.numbers(number, len(index))])) is not None:
            chunks[number] = chunk
    todo = [number for number in numbers if number not in chunks]
    seen = sum(len(plan.numbers(number, len(index))) for number in chunks)
    lost = sum(chunk.lost for chunk in chunks.values())
    total = image_count(index, plan.reader.sensors)

    def refuse_losses(images: int) -> None:
        if lost > settings.max_skipped * images:
            problems = [p for chunk in chunks.values() for p in chunk.problems]
            raise EmbedFailed(_too_many(f"{lost} of {images} images", settings, problems), (*index.problems, *problems))

    started, new = time.monotonic(), 0
    on_progress(seen, len(index), f"{len(chunks)} chunks done before" if chunks else "")
    refuse_losses(total)
    left = total * len(todo) // max(1, len(numbers))
    pool = Pool(pool_size(settings, left), settings.cpus_per_worker, settings.gpus_per_worker)
    with contextlib.closing((_with_ray if pool.workers else _here)(pool, encoder, index, plan, todo)) as run:
        for chunk in run:
            chunks[chunk.number] = chunk
            new += chunk.images
            lost += chunk.lost
            seen += len(plan.numbers(chunk.number, len(index)))
            rate = new / (time.monotonic() - started)
            on_progress(seen, len(index), f"{rate:.1f} images/s")
            refuse_losses(total)
    seconds = time.monotonic() - started
    whole = [chunks[number] for number in numbers]
    refuse_losses(lost + sum(chunk.images for chunk in whole))  # repeated ones, which the index counts, left out
    width = _merge(plan, whole, folder / GRIDS_FILE)
    problems = (*index.problems, *(p for chunk in whole for p in chunk.problems))
    return EmbedResult(
        folder, width, sum(c.images for c in whole), sum(c.grids for c in whole), lost, new, seconds,
        sum(c.bytes for c in whole), tuple(name for c in whole for name in c.empty), problems,
    )  # fmt: skip


def _too_many(what: str, settings: Embed, problems: Sequence[Problem]) -> str:
    shown = "; ".join(str(p) for p in problems[:5])
    return (
        f"{what} could not be used, above embed.max_skipped={settings.max_skipped:.1%}; the first: {shown}. Repair the data, or "
        "raise the limit"
    )


Done: TypeAlias = Generator[Chunk, None, None]


def _here(pool: Pool, encoder: Encoder, index: GridIndex, plan: ChunkPlan, todo: Sequence[int]) -> Done:
    worker = ChunkEmbedder(encoder, index, plan)
    for number in todo:
        yield worker.embed(number)


def _with_ray(pool: Pool, encoder: Encoder, index: GridIndex, plan: ChunkPlan, todo: Sequence[int]) -> Done:
    if not todo:
        return
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayTaskError

    from copernicus.platform.stream import quiet_context

    pool.check()
    # What a worker raises arrives as it is: wrapped in Ray Data's own exception it would have lost its type.
    quiet_context().raise_original_map_exception = True
    device = "cuda" if pool.gpus_per_worker else "cpu"
    most = min(pool.workers, len(todo))
    # Where nodes come as they are asked for, the first to come begins.
    size: dict[str, Any] = {"min_size": 1, "max_size": most} if autoscales() else {"size": most}
    references = ray.put(encoder), ray.put(index)
    rows = ray.data.from_items([{"number": number} for number in todo], override_num_blocks=len(todo)).map_batches(
        ChunkEmbedder,
        batch_size=1,
        fn_constructor_args=(*references, plan, device, max(1, int(pool.cpus_per_worker))),
        compute=ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=2),
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
    )
    try:
        for row in rows.iter_rows():
            yield Chunk.from_json(row["chunk"])
    except RayTaskError as error:
        cause = cause_of(error)
        if isinstance(cause, (OSError, ValueError)):
            raise cause from None
        raise


def _merge(plan: ChunkPlan, chunks: Sequence[Chunk], path: Path) -> int:
    """The means of all grids in one file, a row group a chunk; returns their width."""
    width = 0
    part = path.with_name(f".{path.name}.part")
    writer: pq.ParquetWriter | None = None
    try:
        for table in chunk_tables(plan, GRIDS, chunks):
            if writer is None:
                width = table.schema.field("embedding").type.list_size
                writer = pq.ParquetWriter(part, grid_schema(width), compression="zstd")
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise EmbedFailed("not one image could be used", [p for chunk in chunks for p in chunk.problems])
    part.replace(path)
    return width
