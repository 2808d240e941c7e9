"""Finds the numbers of a tensor inside a ``.pth`` file, or a part of a larger one, and runs nothing that is in it.

``torch.save`` writes a zip: ``<folder>/data.pkl`` says what the tensor is, ``<folder>/data/<key>`` holds its numbers and
``<folder>/byteorder`` the order of their bytes. The numbers are stored as they are, so once their place is known a slice
of the tensor is a slice of the file. Shards come from strangers: `pth_zip` and `pth_pickle` believe nothing they read,
and what is no plain tensor is refused by name.

Source: torch/serialization.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from copernicus.datasets.pth_pickle import Layout, followed
from copernicus.datasets.pth_zip import (
    DEFLATED,
    Entry,
    PthError,
    PthFile,
    Read,
    bound,
    content,
    content_start,
    directory,
    shown,
)

_MOST_PICKLE = 1 << 20  # bytes
_MOST_INFLATED = 1 << 30  # bytes
_MOST_REPEATED = 1 << 24  # numbers in a view that shows some of them more than once, such as an expanded one


@dataclass(frozen=True)
class TensorAt:
    """A tensor in a file. ``offset``: of its first number, in bytes from the file's begin; its numbers follow in C order.
    Unless ``whole`` says why slices cannot be read ("compressed" or "not contiguous"): then ``offset`` means nothing, and
    `read_tensor` is the way."""

    dtype: np.dtype  # u1, i1, i2, i4, i8, f2, f4 or f8, little-endian
    shape: tuple[int, ...]  # at least one axis, none of them 0
    offset: int
    whole: str = ""


def locate_tensor(read: Read, offset: int, size: int) -> TensorAt:
    """Where the tensor lies whose ``.pth`` is ``size`` bytes from ``offset`` on. Two short reads as a rule, one at each
    end; the numbers themselves are neither read nor checked.

    Raises:
        PthError: it is not a plain tensor of an allowed type, or not put together as torch.save does it.
        OSError: ``read`` raised it.
    """
    file = PthFile(read, offset, size)
    layout, storage = _tensor(file)
    start = content_start(file, storage)
    first = offset + start + layout.first * layout.dtype.itemsize
    whole = "compressed" if storage.method == DEFLATED else "" if layout.contiguous else "not contiguous"
    return TensorAt(layout.dtype, layout.shape, 0 if whole else first, whole)


def read_tensor(read: Read, offset: int, size: int) -> np.ndarray:
    """All of that tensor, compressed or not contiguous though it be, after its numbers matched the zip's checksum.

    Returns:
        a new array in C order.

    Raises:
        PthError: as `locate_tensor`; or the numbers do not match the checksum, or do not inflate to what was announced.
        OSError: ``read`` raised it.
    """
    file = PthFile(read, offset, size)
    layout, storage = _tensor(file)
    numbers = np.frombuffer(content(file, storage), layout.dtype)[layout.first :]
    # A stride along an axis of one is never taken, but numpy's arithmetic must not overflow on it.
    steps = [s * layout.dtype.itemsize if n > 1 else 0 for n, s in zip(layout.shape, layout.strides, strict=True)]
    return np.array(np.lib.stride_tricks.as_strided(numbers, layout.shape, steps), order="C")


def _tensor(file: PthFile) -> tuple[Layout, Entry]:
    """What the tensor is and the entry with its numbers, all of which the entry is large enough for."""
    entries = directory(file)
    pickles = [name for name in entries if name.count(b"/") == 1 and name.endswith(b"/data.pkl")]
    if len(pickles) != 1:
        raise PthError(f"a zip with {len(pickles)} data.pkl, not one as torch.save writes it")
    folder = pickles[0].removesuffix(b"data.pkl")
    if not all(name.startswith(folder) for name in entries):
        raise PthError("a zip with more than one folder, not as torch.save writes it")
    if folder + b"byteorder" in entries:
        order = content(file, bound(entries[folder + b"byteorder"], 16))
        if order != b"little":
            raise PthError(f"the byte order of its numbers is {shown(order)!r}; only little is read")
    layout = followed(content(file, bound(entries[pickles[0]], _MOST_PICKLE)))
    shape, size = layout.shape, math.prod(layout.shape)
    if not shape or not size:
        raise PthError(f"shape {shown(str(shape))} has no {'numbers' if shape else 'axes'}", "wrong_shape")
    storage = entries.get(folder + b"data/" + layout.key.encode())
    if storage is None:
        raise PthError(f"its zip lacks data/{layout.key}, the numbers of the tensor")
    if storage.size != layout.count * layout.dtype.itemsize:
        raise PthError(f"announces {layout.count} numbers of {layout.dtype}, but holds {storage.size} bytes of them")
    if storage.method == DEFLATED:  # what is stored is really there, but what inflates might be a bomb
        bound(storage, _MOST_INFLATED)
    last = layout.first + sum((n - 1) * step for n, step in zip(shape, layout.strides, strict=True) if n > 1)
    if last >= layout.count:
        raise PthError(f"its pickle wants number {last} of {layout.count}")
    if size > max(layout.count, _MOST_REPEATED):
        raise PthError(f"repeats its {layout.count} numbers to more than {_MOST_REPEATED}")
    return layout, storage
