"""Features on disk by content address: whole entries that any number of processes write, share, check and evict.

``CACHE/<task>/<split>-<digest>/`` is an entry: one .npy per level (F, N, ...), targets.npy (N, ...), and content.json with
the samples' ids, the arrays' types and shapes, a crc32 per array and batch, and its own sha256.

- **Written** in ``.<entry>.partial``, by position and in any order, and renamed when whole. Each batch that is in the files
  is noted in a journal; who is killed leaves both, and the next to encode the same goes on from there, after reading
  back what the journal tells of. Nobody encodes the same beside another: a lock, which dies with its process, makes the
  second wait and find the entry. Where a file system knows no locks both encode, and the first to end is kept.
- **Found** again only if sizes, types and shapes are right and, up to ``VERIFY_BYTES``, all checksums; what is damaged is
  named, thrown away and encoded anew.
- **Evicted**, the least recently used first, when a new entry exceeds the limit. An entry in use is not: who has it open
  holds a shared lock on its content.json. What was used in the last ``GRACE_S`` seconds stays too, since features travel
  between processes by their path.

`teacher_cache` keeps another kind: single vectors by the pixels that were seen, in files that only grow. Nothing of its
records would serve arrays that are mapped as a whole, nor the other way round.

Shapes: F flips, N samples, B batch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from copernicus.platform.eviction import CONTENT, PARTIAL, Lease, exclusive, remove

logger = logging.getLogger(__name__)

VERIFY_BYTES = 4 << 30
"""Entries up to this size are read in full when they are found, at 1-3 GB/s; of larger ones sizes are compared, and
`faults` reads them on demand."""

JOURNAL = "journal"


class Damaged(Exception):
    """An entry is not what was stored; the message says where."""


@dataclass(frozen=True)
class Chunk:
    """Samples ``start`` to ``stop`` of all arrays: ``arrays`` tells of each its type, its whole shape and a crc32."""

    start: int
    stop: int
    arrays: dict[str, tuple[str, tuple[int, ...], int]]

    @property
    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (dtype, shape) for name, (dtype, shape, _) in self.arrays.items()}

    def to_json(self) -> str:
        return json.dumps([self.start, self.stop, self.arrays])

    @classmethod
    def from_json(cls, text: str) -> Chunk:
        start, stop, arrays = json.loads(text)
        return cls(start, stop, {name: (dtype, tuple(shape), crc) for name, (dtype, shape, crc) in arrays.items()})


class Writer:
    """Writes batches into an entry's files, at their places. Several writers, on any nodes, may share a folder."""

    def __init__(self, folder: Path, samples: int) -> None:
        self.folder, self.samples = folder, samples
        self._journal = folder / f"{JOURNAL}-{uuid.uuid4().hex}"

    def write(self, start: int, levels: Sequence[np.ndarray], targets: np.ndarray) -> Chunk:
        """Keep samples from ``start`` on: levels of (F, B, ...), targets (B, ...).

        Raises:
            OSError: they cannot be written.
        """
        arrays = {f"level{i}": level for i, level in enumerate(levels)}
        kept = {name: self._put(name, array, start) for name, array in arrays.items()}
        kept["targets"] = self._put("targets", targets[None], start)
        chunk = Chunk(start, start + len(targets), kept)
        with open(self._journal, "a") as file:
            file.write(chunk.to_json() + "\n")
        return chunk

    def _put(self, name: str, array_FB: np.ndarray, start: int) -> tuple[str, tuple[int, ...], int]:
        shape = (array_FB.shape[0], self.samples, *array_FB.shape[2:])
        if name == "targets":
            shape = shape[1:]
        dtype = array_FB.dtype.str
        header = _header(array_FB.dtype, shape)
        row = array_FB[0, 0].nbytes
        crc = 0
        fd = os.open(self.folder / f"{name}.npy", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # All writers write the same header and the same length: none of them need be the first.
            _pwrite(fd, header, 0)
            os.ftruncate(fd, len(header) + len(array_FB) * self.samples * row)
            for flip, array_B in enumerate(array_FB):
                data = np.ascontiguousarray(array_B).tobytes()
                crc = zlib.crc32(data, crc)
                _pwrite(fd, data, len(header) + (flip * self.samples + start) * row)
        finally:
            os.close(fd)
        return dtype, shape, crc


def resume(folder: Path, samples: int) -> list[Chunk]:
    """The batches that an interrupted writer left in a folder, those that can be read back as they were written."""
    chunks: list[Chunk] = []
    journals = sorted(folder.glob(f"{JOURNAL}-*"))
    for journal in journals:
        for line in journal.read_text().splitlines():
            with contextlib.suppress(ValueError, TypeError):  # the line that a kill cut off
                chunks.append(Chunk.from_json(line))
    kept: dict[int, Chunk] = {}
    for chunk in chunks:
        if chunk.layout == chunks[0].layout and chunk.stop <= samples and not _damage(folder, chunk):
            kept[chunk.start] = chunk
    found = [chunk for start, chunk in sorted(kept.items()) if not any(c.start < start < c.stop for c in kept.values())]
    if found:
        again = folder / f"{JOURNAL}-{uuid.uuid4().hex}"
        again.write_text("".join(chunk.to_json() + "\n" for chunk in found))
    for journal in journals:
        journal.unlink()
    return found


def missing(done: Sequence[Chunk], samples: int, batch_size: int) -> list[tuple[int, int]]:
    """Batches (start, stop) that are still to be encoded."""
    batches, position = [], 0
    for start, stop in [*sorted((chunk.start, chunk.stop) for chunk in done), (samples, samples)]:
        batches += [(at, min(at + batch_size, start)) for at in range(position, start, batch_size)]
        position = stop
    return batches


def finish(folder: Path, chunks: Sequence[Chunk], ids: Sequence[str]) -> None:
    """Write content.json, once all batches are in the files; what was written is then on the disk."""
    chunks = sorted(chunks, key=lambda chunk: chunk.start)
    covered = [chunk.start for chunk in chunks] + [len(ids)]
    assert covered == [0] + [chunk.stop for chunk in chunks], covered
    assert all(chunk.layout == chunks[0].layout for chunk in chunks)
    for journal in folder.glob(f"{JOURNAL}-*"):
        journal.unlink()
    content = {"ids": list(ids), "chunks": [chunk.to_json() for chunk in chunks]}
    text = json.dumps(content)
    (folder / CONTENT).write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@dataclass(frozen=True)
class Opened:
    """An entry, memory-mapped; ``lease`` keeps it from being evicted as long as it lives."""

    levels: tuple[np.ndarray, ...]
    targets: np.ndarray
    ids: tuple[str, ...]
    chunks: tuple[Chunk, ...]
    lease: Lease


def open_entry(entry: Path) -> Opened:
    """Map an entry, after a look at its sizes, types and shapes.

    Raises:
        FileNotFoundError: there is none.
        Damaged: it is not as it was stored.
    """
    lease = Lease(entry / CONTENT)
    ids, chunks = _content(entry)
    arrays = {}
    for name, (dtype, shape) in chunks[0].layout.items():
        path = entry / f"{name}.npy"
        size = len(_header(np.dtype(dtype), shape)) + int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise Damaged(f"{path.name} has {path.stat().st_size if path.is_file() else 'no'} bytes, expected {size}")
        try:
            # Labels of images are small; those of pixels are left where they are, as the features.
            array = np.load(path, mmap_mode="r" if len(shape) > 2 else None)
        except (ValueError, EOFError, OSError) as error:
            raise Damaged(f"{path.name}: {error}") from error
        if (array.dtype, array.shape) != (np.dtype(dtype), shape):
            raise Damaged(f"{path.name} holds {array.dtype} {array.shape}, expected {dtype} {shape}")
        arrays[name] = array
    targets = arrays.pop("targets")
    lease.touch()
    return Opened(tuple(arrays.values()), targets, ids, chunks, lease)


def _content(entry: Path) -> tuple[tuple[str, ...], tuple[Chunk, ...]]:
    try:
        outer = json.loads((entry / CONTENT).read_text())
        text = outer["content"]
        if hashlib.sha256(text.encode()).hexdigest() != outer["sha256"]:
            raise Damaged(f"{CONTENT}: its checksum is wrong")
        content = json.loads(text)
        return tuple(content["ids"]), tuple(Chunk.from_json(chunk) for chunk in content["chunks"])
    except (ValueError, KeyError, TypeError) as error:  # UnicodeDecodeError is a ValueError
        raise Damaged(f"{CONTENT} is not as it was written ({error!r})") from error


def faults(entry: str | Path) -> list[str]:
    """Read an entry in full: what in it is not as it was stored, in words; empty if all is well.

    Raises:
        FileNotFoundError: there is no such entry.
    """
    entry = Path(entry)
    try:
        opened = open_entry(entry)
    except Damaged as error:
        return [str(error)]
    found = []
    for chunk in opened.chunks:
        for name in _damage(entry, chunk):
            found.append(f"{name}.npy: samples {opened.ids[chunk.start]} .. {opened.ids[chunk.stop - 1]} have changed")
    return found


def find(entry: Path, discard: bool = False) -> Opened | None:
    """An entry that is there and sound, else None.

    Args:
        discard: throw away what is damaged. For who holds the entry's lock: another may just have replaced it.
    """
    try:
        opened = open_entry(entry)
        if sum(level.nbytes for level in opened.levels) <= VERIFY_BYTES and (found := faults(entry)):
            raise Damaged(found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else ""))
        return opened
    except FileNotFoundError:
        if not entry.is_dir():
            return None
        damage = f"{CONTENT} is missing"
    except Damaged as error:
        damage = str(error)
    if discard:
        logger.warning("cached features %s are damaged and are encoded again: %s", entry, damage)
        remove(entry)
    return None


@contextlib.contextmanager
def writing(entry: Path) -> Iterator[Path | None]:
    """A folder in which to write an entry that is not there, alone; None if it was there, or another made it meanwhile.

    Once the block ends well the entry is in place. After an error in what was encoded, or written, nothing is left; after
    an interruption the folder stays, for `resume`.

    Raises:
        OSError: the folder cannot be made, or the entry not be put in its place.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(entry.with_name(f".{entry.name}.lock")) as locked:
        if find(entry, discard=True) is not None:
            yield None
            return
        # Without locks another may be at it: a folder of one's own.
        partial = entry.with_name(f".{entry.name}.{'' if locked else uuid.uuid4().hex + '.'}{PARTIAL}")
        partial.mkdir(exist_ok=True)
        try:
            yield partial
            try:
                os.rename(partial, entry)
            except OSError as error:
                if locked or error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or find(entry) is None:
                    raise
                shutil.rmtree(partial, ignore_errors=True)
        except (ValueError, OSError):  # the same again would end in the same way
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _damage(folder: Path, chunk: Chunk) -> list[str]:
    """The arrays whose part is not as the chunk says."""
    return [name for name in chunk.arrays if not _sound(folder / f"{name}.npy", name, chunk)]


def _sound(path: Path, name: str, chunk: Chunk) -> bool:
    dtype, shape, expected = chunk.arrays[name]
    flips, samples, rest = (1, shape[0], shape[1:]) if name == "targets" else (shape[0], shape[1], shape[2:])
    row = int(np.prod(rest)) * np.dtype(dtype).itemsize
    offset, size, crc = len(_header(np.dtype(dtype), shape)), (chunk.stop - chunk.start) * row, 0
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        for flip in range(flips):
            crc = zlib.crc32(_pread(fd, size, offset + (flip * samples + chunk.start) * row), crc)
    finally:
        os.close(fd)
    return crc == expected


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _pread(fd: int, size: int, offset: int) -> bytes:
    parts = []
    while size and (data := os.pread(fd, size, offset)):
        parts.append(data)
        size, offset = size - len(data), offset + len(data)
    return b"".join(parts)
