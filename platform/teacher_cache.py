"""The teacher's features, kept on disk: what it says of an image it has seen before need not be computed again.

A feature is found by a digest of the teacher, of the numbers it computes in and of the exact pixels, so no setting can make
it wrong: whatever changes them asks for another record. ``FOLDER/<teacher>/`` holds one file per process that wrote, of
records of one size: key (16 bytes), feature (F float32), crc32. Files only grow and are written by one process; any
number of ranks and runs share a folder, and each sees what was there when it opened it, and what it adds itself.

A run that draws new crops meets an image again only when it is repeated: resumed, evaluated at each epoch, or run again
with other settings of the student.

Shapes: B batch, H W image, F teacher width, N records.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from copernicus.models.teacher import DinoTeacher, load_teacher
from copernicus.platform.schema import Distill

logger = logging.getLogger(__name__)

KEY_BYTES = 16
SUFFIX = ".features"


class FeatureStore:
    """Vectors of one width by 16-byte keys, in a folder that other processes write to as well.

    Args:
        folder: made if it is not there.
        dim: numbers in a vector.

    Attributes:
        torn: files whose last record is incomplete, because their writer was killed (or is at it); it is ignored.
        damaged: records met whose checksum was wrong; they count as absent.

    Raises:
        OSError: the folder cannot be read or made.
    """

    def __init__(self, folder: str | Path, dim: int) -> None:
        self.folder, self.dim = Path(folder), dim
        self.record = np.dtype([("key", f"V{KEY_BYTES}"), ("vector", "<f4", (dim,)), ("crc", "<u4")])
        self.torn = self.damaged = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: list[np.ndarray] = []
        heads = [np.empty(0, "<u8")]
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            count, rest = divmod(path.stat().st_size, self.record.itemsize)
            self.torn += bool(rest)
            if count:
                self._files.append(np.memmap(path, self.record, "r", shape=(count,)))
                heads.append(_heads(self._files[-1]))
        # 16 bytes a record: a dict would take ten times as much. The rest of the key is compared in the record.
        head_N = np.concatenate(heads)
        self._order = np.argsort(head_N, kind="stable")
        self._heads = head_N[self._order]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)])
        self._own: dict[bytes, int] = {}
        self._written = 0
        self._path = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:16]}{SUFFIX}"
        self._fd = -1

    def __len__(self) -> int:
        """Records, those met twice counted twice."""
        return len(self._heads) + self._written

    def get(self, key: bytes) -> np.ndarray | None:
        """The vector (F,) float32 that was put under this key, bit by bit; None if there is none."""
        if (row := self._own.get(key)) is not None:
            data = os.pread(self._fd, self.record.itemsize, row * self.record.itemsize)
            if (
                len(data) == self.record.itemsize
                and (vector := self._vector(np.frombuffer(data, self.record)[0], key)) is not None
            ):
                return vector
        head = np.frombuffer(key[:8], "<u8")[0]
        for place in range(np.searchsorted(self._heads, head), len(self._heads)):
            if self._heads[place] != head:
                break
            number = self._order[place]
            file = int(np.searchsorted(self._starts, number, side="right")) - 1
            if (vector := self._vector(self._files[file][number - self._starts[file]], key)) is not None:
                return vector
        return None

    def _vector(self, record: np.void, key: bytes) -> np.ndarray | None:
        """The record's vector, if it is whole and of this key."""
        if zlib.crc32(record.tobytes()[:-4]) != record["crc"]:
            self.damaged += 1
            return None
        return record["vector"].copy() if record["key"].tobytes() == key else None

    def put(self, vectors: dict[bytes, np.ndarray]) -> None:
        """Append vectors; once this returns, a kill of the process loses none of them.

        Raises:
            OSError: they cannot be written; none of them is then there.
        """
        records = np.zeros(len(vectors), self.record)
        for record, (key, vector) in zip(records, vectors.items(), strict=True):
            record["key"], record["vector"] = np.void(key), vector
            record["crc"] = zlib.crc32(record.tobytes()[:-4])
        if self._fd < 0:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        before = self._written * self.record.itemsize
        data = memoryview(records.tobytes())
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            os.ftruncate(self._fd, before)  # what came of it would shift whatever is appended later
            raise
        for key in vectors:
            self._own[key] = self._written
            self._written += 1


class CachedTeacher:
    """A teacher that looks its features up: red, green, blue (B, 3, H, W) -> (B, 1, F), its tokens' mean as the one token.

    Where an image is not known, the whole batch is computed, as it would be without the cache: a matrix product of another
    number of rows rounds otherwise, and a resumed run is to see the same bits. Known images keep what is stored.

    Attributes:
        asked, found: images so far, and those whose feature was stored.
    """

    def __init__(self, teacher: DinoTeacher, store: FeatureStore) -> None:
        self.teacher, self.store = teacher, store
        self.identity, self.dim = teacher.identity, teacher.dim
        self.asked = self.found = 0

    @torch.no_grad()
    def __call__(self, rgb_B3HW: Tensor) -> Tensor:
        keys = self.keys(rgb_B3HW)
        known = {key: vector for key in set(keys) if (vector := self.store.get(key)) is not None}
        self.asked += len(keys)
        self.found += sum(key in known for key in keys)
        if len(known) < len(set(keys)):
            computed_BF = self.teacher(rgb_B3HW).mean(dim=1).cpu().numpy()
            new: dict[bytes, np.ndarray] = {}
            for key, vector in zip(keys, computed_BF, strict=True):
                if key not in known:
                    new.setdefault(key, vector)  # the same image twice in a batch: both rows take the first
            self.store.put(new)
            known |= new
        features_BF = torch.from_numpy(np.stack([known[key] for key in keys]))
        return features_BF.to(rgb_B3HW.device)[:, None]

    def keys(self, rgb_B3HW: Tensor) -> list[bytes]:
        """Of each image: blake2b-128 of the teacher, the type it computes in, the shape and the float32 pixels."""
        kind = rgb_B3HW.device.type
        computes = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        images = rgb_B3HW.detach().float().cpu().contiguous().numpy()
        head = f"{self.identity} {computes} {images.shape[1:]}\0".encode()
        return [hashlib.blake2b(head + image.tobytes(), digest_size=KEY_BYTES).digest() for image in images]


def open_teacher(settings: Distill | None, device: torch.device) -> DinoTeacher | CachedTeacher | None:
    """The teacher that the settings name, on a device, behind its cache if they give one; None without distillation.

    Raises:
        InputError: see `load_teacher`.
        OSError: the cache's folder cannot be read or made.
    """
    if settings is None:
        return None
    teacher = load_teacher(settings.teacher, device)
    if settings.cache is None:
        return teacher
    store = FeatureStore(Path(settings.cache) / teacher.identity, teacher.dim)
    if store.torn:
        logger.warning("%s: %d files end in an incomplete record, which is ignored", store.folder, store.torn)
    return CachedTeacher(teacher, store)


def _heads(file: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each record's key: (N,)."""
    return np.ascontiguousarray(file["key"]).view("<u8").reshape(-1, 2)[:, 0].copy()
