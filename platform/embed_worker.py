"""Embedding a chunk of grids: every image read, encoded and written as a row, and each grid's mean beside them.

Images are batched by sensor, for each has a shape of its own, and the last batch of a chunk is filled up with empty images:
all batches of a sensor have one shape, so that an embedding depends on its image, the encoder and the size of a batch alone,
not on the chunk that it is in, on who computes it or on how often that was begun.

A chunk is three files, each written aside and moved to its place: ``images/`` (a row an image), ``grids/`` (a row a grid)
and, last, ``done/``: what they hold and what was left out. Chunks that are done are not begun again.

Shapes: B batch, C channels, H W pixels, D width, N images of a chunk, G its grids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from copernicus.datasets.images import GridImage, ImageKey, read_images
from copernicus.datasets.index import GridEntry, GridIndex
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import Problem, grid_name
from copernicus.datasets.slices import DrawReader
from copernicus.datasets.storage import Stamp
from copernicus.models.encoder import Encoder
from copernicus.platform.encoding import Precision, device_of, frozen

IMAGES, GRIDS, DONE = "images", "grids", "done"
PASSING = ("unreadable", "changed")
"""Reasons that another attempt may not meet: chunks that have them are begun again."""


def image_schema(width: int) -> pa.Schema:
    """Columns of the published product: a row an image, ``embedding`` of D numbers."""
    text = pa.string()
    return pa.schema([
        ("grid_id_coord", text), ("modality", text), ("local_id_coord", text), ("date", text),
        ("embedding", pa.list_(pa.float32(), width)),
    ])  # fmt: skip


def grid_schema(width: int) -> pa.Schema:
    """A row a grid: the mean over its images, and how many of them there are of each sensor."""
    return pa.schema([
        ("grid_id_coord", pa.string()), ("embedding", pa.list_(pa.float32(), width)), ("images", pa.int32()),
        *((f"images_{name}", pa.int32()) for name in SENSORS),
    ])  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """What one chunk holds. ``identity``: of the grids, their shards and all else that its numbers depend on. ``lost``: images
    that could not be used."""

    number: int
    identity: str
    grids: int
    images: int
    lost: int = 0
    empty: tuple[str, ...] = ()  # grids without any image that could be used
    problems: tuple[Problem, ...] = ()
    bytes: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> Chunk:
        values = json.loads(text)
        problems = tuple(Problem(**p) for p in values.pop("problems"))
        return Chunk(**{**values, "empty": tuple(values["empty"])}, problems=problems)


@dataclass(frozen=True)
class ChunkPlan:
    """Everything a worker needs to know but the encoder and the index. ``identity``: of encoder and reading."""

    folder: str
    reader: DrawReader
    grids_per_chunk: int
    batch_size: int
    precision: Precision
    identity: str

    def numbers(self, chunk: int, grids: int) -> range:
        """The chunk's grids among all in the index."""
        return range(chunk * self.grids_per_chunk, min((chunk + 1) * self.grids_per_chunk, grids))

    def path(self, kind: str, chunk: int) -> Path:
        return Path(self.folder) / kind / f"chunk-{chunk:06d}.{'json' if kind == DONE else 'parquet'}"

    def chunk_identity(self, grids: Sequence[tuple[str, Stamp]]) -> str:
        """Of keys of grids, and of their shards as they were indexed."""
        return hashlib.sha256(
            json.dumps([self.identity, [[key, *stamp] for key, stamp in grids]]).encode()
        ).hexdigest()[:16]

    def done(self, chunk: int, grids: Sequence[tuple[str, Stamp]]) -> Chunk | None:
        """The chunk, where an earlier attempt has finished it, with nothing left out that might be read another time."""
        try:
            found = Chunk.from_json(self.path(DONE, chunk).read_text())
            size = sum(self.path(kind, chunk).stat().st_size for kind in (IMAGES, GRIDS))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        passing = any(problem.reason in PASSING for problem in found.problems)
        same = found.identity == self.chunk_identity(grids) and found.bytes == size
        return found if same and not passing else None


@dataclass
class Embedded:
    """A chunk's numbers: rows in order of grid, sensor, patch and date. ``listed``: images that there should be."""

    keys: list[ImageKey] = field(default_factory=list)
    embeddings_ND: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    problems: list[Problem] = field(default_factory=list)
    listed: int = 0


def embed_grids(
    encoder: Encoder,
    reader: DrawReader,
    grids: Sequence[GridEntry],
    batch_size: int,
    precision: Precision = "float32",
    readers: int = 1,
) -> Embedded:
    """Embed every image of these grids. Images are read on threads of their own, a grid each, ahead of the encoder.

    An image whose embedding is not finite is left out and named.
    """
    out = Embedded()
    waiting: list[list[tuple[int, GridImage]]] = [[] for _ in reader.sensors]
    parts: list[tuple[list[int], torch.Tensor]] = []

    def encode(sensor: int) -> None:
        batch, waiting[sensor] = waiting[sensor], []
        rows = [row for row, _ in batch]
        z_BD = encode_batch(encoder, reader, sensor, [image for _, image in batch], batch_size, precision)
        parts.append((rows, z_BD))

    with ThreadPoolExecutor(readers) as pool:
        for images, problems, listed in read_ahead(pool, reader, grids, readers + 1):
            out.problems += problems
            out.listed += listed
            for image in images:
                waiting[image.sensor].append((len(out.keys), image))
                out.keys.append(image.key)
                if len(waiting[image.sensor]) == batch_size:
                    encode(image.sensor)
    for sensor in range(len(waiting)):
        if waiting[sensor]:
            encode(sensor)
    if not parts:
        return out
    whole_ND = np.empty((len(out.keys), parts[0][1].shape[1]), np.float32)
    for rows, z_BD in parts:
        whole_ND[rows] = z_BD.cpu().numpy()
    sound_N: list[bool] = np.asarray(np.isfinite(whole_ND).all(1)).tolist()
    for key in itertools.compress(out.keys, (not sound for sound in sound_N)):
        where = "/".join(filter(None, (key.grid, key.modality, key.local, key.date)))
        out.problems.append(Problem(where, "not_finite", "its embedding"))
    out.keys = list(itertools.compress(out.keys, sound_N))
    out.embeddings_ND = whole_ND[sound_N]
    return out


def read_ahead(
    pool: ThreadPoolExecutor, reader: DrawReader, grids: Sequence[GridEntry], depth: int
) -> Iterator[tuple[list[GridImage], list[Problem], int]]:
    """Each grid's images, in order, while the next ones are read."""
    rest = iter(grids)
    running = deque(pool.submit(read_images, reader, grid) for grid in itertools.islice(rest, depth))
    while running:
        result = running.popleft().result()
        running += [pool.submit(read_images, reader, grid) for grid in itertools.islice(rest, 1)]
        yield result


def encode_batch(
    encoder: Encoder,
    reader: DrawReader,
    sensor: int,
    images: Sequence[GridImage],
    batch_size: int,
    precision: Precision,
) -> torch.Tensor:
    """(B, D) float32, where the encoder lies, of at most ``batch_size`` images of one sensor, encoded in a batch of exactly that many."""
    device = device_of(encoder)
    pinned = device.type == "cuda"  # then a copy need not wait for what the GPU has in hand
    x_BCHW = torch.full((batch_size, *images[0].pixels.shape), torch.nan, pin_memory=pinned)
    metadata_B4 = torch.full((batch_size, 4), torch.nan, dtype=torch.float64, pin_memory=pinned)
    for row, image in enumerate(images):
        x_BCHW[row] = torch.from_numpy(image.pixels)
        metadata_B4[row] = torch.tensor(image.metadata, dtype=torch.float64)
    autocast = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with frozen(encoder), autocast:
        x_BCHW, metadata_B4 = (given.to(device, non_blocking=True) for given in (x_BCHW, metadata_B4))
        z_BD = encoder.encode(x_BCHW, reader.sensors[sensor], metadata_B4)
    return z_BD[: len(images)].float()


def grid_means(keys: Sequence[ImageKey], embeddings_ND: np.ndarray) -> pa.Table:
    """Each grid's mean over its images (rows of a grid lie together), summed in float64 in the rows' order."""
    names = [key.grid for key in keys]
    starts = [row for row, name in enumerate(names) if row == 0 or names[row - 1] != name]
    stops = [*starts[1:], len(names)]
    means_GD = np.stack([embeddings_ND[a:b].mean(0, dtype=np.float64) for a, b in zip(starts, stops, strict=True)])
    counts = {
        name: [sum(key.modality == name for key in keys[a:b]) for a, b in zip(starts, stops, strict=True)]
        for name in SENSORS
    }
    columns = [
        pa.array([names[a] for a in starts]), vectors(means_GD.astype(np.float32)),
        pa.array([b - a for a, b in zip(starts, stops, strict=True)], pa.int32()),
        *(pa.array(counts[name], pa.int32()) for name in SENSORS),
    ]  # fmt: skip
    return pa.table(columns, schema=grid_schema(embeddings_ND.shape[1]))


def vectors(values_ND: np.ndarray) -> pa.FixedSizeListArray:
    """(N, D) as a parquet column of N lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values_ND).reshape(-1)), values_ND.shape[1])


def unpacked(column: pa.ChunkedArray) -> np.ndarray:
    """Such a column as (N, D)."""
    array = column.combine_chunks()
    return array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), -1)


def write_chunk(encoder: Encoder, plan: ChunkPlan, number: int, grids: Sequence[GridEntry], readers: int) -> Chunk:
    """Embed a chunk and write it. The old manifest goes first: it would speak of files that are others by now."""
    plan.path(DONE, number).unlink(missing_ok=True)
    embedded = embed_grids(encoder, plan.reader, grids, plan.batch_size, plan.precision, readers)
    keys = embedded.keys
    width = embedded.embeddings_ND.shape[1]
    columns = [
        pa.array([getattr(k, name) for k in keys], pa.string()) for name in ("grid", "modality", "local", "date")
    ]
    rows = (
        pa.table([*columns, vectors(embedded.embeddings_ND)], schema=image_schema(width))
        if keys
        else image_schema(0).empty_table()
    )
    means = grid_means(keys, embedded.embeddings_ND) if keys else grid_schema(0).empty_table()
    size = _write(rows, plan.path(IMAGES, number)) + _write(means, plan.path(GRIDS, number))
    seen = {key.grid for key in keys}
    empty = tuple(name for grid in grids if (name := grid_name(int(grid.key))) not in seen)
    chunk = Chunk(
        number, plan.chunk_identity([(grid.key, grid.stamp) for grid in grids]), len(seen), len(keys),
        embedded.listed - len(keys), empty, tuple(embedded.problems), size,
    )  # fmt: skip
    replace_file(plan.path(DONE, number), chunk.to_json().encode())
    return chunk


def _write(table: pa.Table, path: Path) -> int:
    sink = pa.BufferOutputStream()
    # Float32 numbers of an encoder hardly compress: no time is spent on trying, but for the texts beside them.
    texts = [name for name in table.schema.names if name != "embedding"]
    pq.write_table(
        table, sink, compression=dict.fromkeys(texts, "zstd") | {"embedding.list.element": "none"}, use_dictionary=texts
    )
    data = sink.getvalue()
    replace_file(path, data)
    return data.size


def replace_file(path: Path, data: Any) -> None:
    """Write a file so that it is there whole or not at all, whoever else writes it at the same time."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class ChunkEmbedder:
    """Embeds chunks: an actor of Ray Data, or the same object in this process.

    Args:
        encoder, index: themselves, or Ray references to them.
        device: where the encoder is put; None: it stays where it is.
        threads: for torch to use; None: as many as it does.
    """

    def __init__(
        self, encoder: Any, index: Any, plan: ChunkPlan, device: str | None = None, threads: int | None = None
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        self._given = (encoder, index, device)
        self.plan = plan
        self.readers = max(1, threads or torch.get_num_threads())
        self._made: tuple[Encoder, GridIndex] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"chunk": [self.embed(int(number)).to_json() for number in batch["number"]]}

    def embed(self, number: int) -> Chunk:
        encoder, index = self._open()
        grids = index.entries(self.plan.numbers(number, len(index)))
        return write_chunk(encoder, self.plan, number, grids, self.readers)

    def _open(self) -> tuple[Encoder, GridIndex]:
        if self._made is None:  # here and not when made: what is wrong is then said by a call, in whole
            encoder, index, device = self._given
            if not isinstance(encoder, torch.nn.Module):
                import ray

                encoder, index = ray.get([encoder, index])
            self._made = (encoder.to(device) if device is not None else encoder, index)
        return self._made


def chunk_tables(plan: ChunkPlan, kind: str, chunks: Iterable[Chunk]) -> Iterator[pa.Table]:
    """The tables of chunks, one after the other; those without rows left out."""
    for chunk in chunks:
        if chunk.images:
            yield pq.read_table(plan.path(kind, chunk.number))
