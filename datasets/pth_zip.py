"""The zip around a tensor: its entries and their bytes, found by short reads, nothing in it believed.

Every figure is held against the others: the directory against the end of the file, each entry against the next, an
entry's own header against the directory, a content against its checksum. What passes holds the same entries for torch's
reader, which believes more.

Source: PKWARE's APPNOTE.TXT 6.3.10; what torch writes, from 1.6 to 2.13, is a case of it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

Read = Callable[[int, int], bytes]
"""read(offset, length) gives exactly that many bytes of a file, or raises OSError."""

_EDGE = 1024  # bytes fetched at once from each end of a file: all that torch writes beside the numbers fits
_MOST_DIRECTORY = 1 << 16

STORED, DEFLATED = 0, 8
_DESCRIBED_LATER = 1 << 3  # checksum and sizes follow the content; the header in front of it may leave them zero
_DESCRIPTOR, _WIDE_DESCRIPTOR = 16, 24  # bytes that these then take
_FLAGS = _DESCRIBED_LATER | 1 << 1 | 1 << 2 | 1 << 11  # and: degrees of compression, names in UTF-8
_FOLDER = 1 << 4  # of the attributes of DOS
_END = struct.Struct("<4s4H2IH")
_WIDE_LOCATOR = struct.Struct("<4sIQI")
_WIDE_END = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_ASK_WIDE = 0xFFFFFFFF  # the true figure is 64 bits wide and stands in the extra field


class PthError(Exception):
    """A file that holds no tensor which can be read here, in one line. ``reason`` is its short name: ``wrong_shape`` of a
    tensor without axes or without numbers, else ``unsafe_or_broken_pth``."""

    def __init__(self, message: str, reason: str = "unsafe_or_broken_pth"):
        super().__init__(message)
        self.reason = reason


def shown(text: str | bytes) -> str:
    """A stranger's text, safe to print: ASCII on one line, not too long."""
    return ascii(text.decode("latin-1") if isinstance(text, bytes) else text)[1:-1][:80]


class PthFile:
    """The bytes of one ``.pth``, counted from its begin, with its two ends kept."""

    def __init__(self, read: Read, offset: int, size: int):
        self._read, self._offset, self.size = read, offset, size
        edge = min(max(size, 0), _EDGE)
        self._head = read(offset, edge) if edge else b""
        if not self._head.startswith(b"PK\3\4"):
            raise PthError(_what_else(self._head))
        self._tail_at = size - edge
        self._tail = read(offset + size - edge, edge) if size > edge else self._head

    def get(self, start: int, length: int) -> bytes:
        end = start + length
        if start < 0 or end > self.size:
            raise PthError("its zip points outside the file: cut off or damaged")
        if end <= len(self._head):
            return self._head[start:end]
        if start >= self._tail_at:
            return self._tail[start - self._tail_at : end - self._tail_at]
        return self._read(self._offset + start, length)


def _what_else(head: bytes) -> str:
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):  # the magic number of the older format
        return "saved in torch's format before 1.6, which is all pickle: load it where you trust it and save it again"
    if head.startswith(b"\x80"):
        return "a bare pickle, not a zip as torch.save writes it; it was not run"
    return "not a zip as torch.save writes it" if head else "empty"


class Entry(NamedTuple):
    at: int  # of its local header
    name: bytes
    flags: int
    method: int
    crc: int
    stored: int  # bytes in the file
    size: int  # bytes once inflated
    limit: int  # where the next entry, or the directory, begins


def directory(file: PthFile) -> dict[bytes, Entry]:
    """All entries by name. None overlaps another or the directory."""
    end_at = file.size - _END.size
    signature, *brief, comment = _END.unpack(file.get(end_at, _END.size)) if end_at >= 0 else (b"", 0)
    if signature != b"PK\5\6" or comment:
        raise PthError("its zip does not end with a directory: cut off or damaged")
    wide_at = end_at - _WIDE_LOCATOR.size - _WIDE_END.size
    limit = end_at
    if wide_at >= 0:
        signature, disk, at, _ = _WIDE_LOCATOR.unpack(file.get(end_at - _WIDE_LOCATOR.size, _WIDE_LOCATOR.size))
        if signature == b"PK\6\7":
            record = _WIDE_END.unpack(file.get(wide_at, _WIDE_END.size))
            wide = list(record[4:])
            unknown = (0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF, _ASK_WIDE, _ASK_WIDE)
            fits = all(b in (w, u) for b, w, u in zip(brief, wide, unknown, strict=True))
            if (record[0], record[1], disk, at) != (b"PK\6\6", _WIDE_END.size - 12, 0, wide_at) or not fits:
                raise PthError("the two ends of its zip directory differ: damaged")
            brief, limit = wide, wide_at
    disk, first_disk, here, count, length, start = brief
    if disk or first_disk or here != count or start + length != limit:
        raise PthError("its zip directory is not where the file says: cut off or damaged")
    if length > _MOST_DIRECTORY:
        raise PthError(f"its zip directory is {length} bytes long; a tensor's is below {_MOST_DIRECTORY}")
    entries = sorted(_entries(file.get(start, length), count))
    found: dict[bytes, Entry] = {}
    for (at, name, flags, method, crc, stored, size), limit in zip(
        entries, [*(at for at, *_ in entries[1:]), start], strict=True
    ):
        if flags & ~_FLAGS or method not in (STORED, DEFLATED):
            raise PthError(f"{shown(name)} is encrypted or packed in a way that is not read")
        if method == STORED and stored != size:
            raise PthError(f"{shown(name)} is announced as {size} bytes, but {stored} are stored")
        if at + _LOCAL.size + len(name) + stored > limit:
            raise PthError(f"{shown(name)} overlaps what follows it in the zip")
        found[name] = Entry(at, name, flags, method, crc, stored, size, limit)
    # torch looks names up without regard to case.
    if len({name.lower() for name in found}) != len(entries):
        raise PthError("its zip holds two entries of one name")
    return found


def _entries(directory: bytes, count: int) -> list[tuple[int, bytes, int, int, int, int, int]]:
    """The fields of `Entry`, but for the last."""
    entries = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(directory):
            break
        (signature, _, _, flags, method, _, _, crc, stored, size, names, extras, comments, disk, _, kind, header) = (
            _CENTRAL.unpack_from(directory, at)
        )
        name_at = at + _CENTRAL.size
        extra_at = name_at + names
        at = extra_at + extras + comments
        if signature != b"PK\1\2" or at > len(directory) or disk:
            break
        if kind & _FOLDER and size:  # torch would not read it, and give what happens to be in memory
            raise PthError(f"{shown(directory[name_at:extra_at])} is marked as a folder")
        if extras:
            size, stored, header = _widened(directory[extra_at : extra_at + extras], (size, stored, header))
        entries.append((header, directory[name_at:extra_at], flags, method, crc, stored, size))
    if len(entries) != count or at != len(directory):
        raise PthError("its zip directory is damaged")
    return entries


def _wide_fields(extra: bytes) -> bytes | None:
    """What an extra field holds of 64-bit figures, if there is such a part."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4 + length
        if kind == 1:
            return extra[at - length : at]
    return None


def _widened(extra: bytes, figures: Sequence[int]) -> Sequence[int]:
    """The figures, those that ask for it replaced by the 64-bit ones of the extra field."""
    missing = figures.count(_ASK_WIDE)
    if not missing:
        return figures
    fields = _wide_fields(extra)
    if fields is None or len(fields) < 8 * missing:
        raise PthError("its zip lacks a 64-bit size that it announces")
    wide = iter(struct.unpack_from(f"<{missing}Q", fields))
    return [next(wide) if figure == _ASK_WIDE else figure for figure in figures]


def bound(entry: Entry, most: int) -> Entry:
    """The entry, if its content is ``most`` bytes or less, both as it lies in the file and inflated."""
    if max(entry.size, entry.stored) > most:
        raise PthError(f"{shown(entry.name)} is {entry.size} bytes long; {most} at most")
    return entry


def content_start(file: PthFile, entry: Entry) -> int:
    """Where an entry's content begins, once its local header was held against the directory."""
    head = file.get(entry.at, _LOCAL.size + len(entry.name))
    signature, _, flags, method, _, _, crc, stored, size, name_length, extra_length = _LOCAL.unpack_from(head)
    name = shown(entry.name)
    if (signature, flags, method, name_length) != (b"PK\3\4", entry.flags, entry.method, len(entry.name)) or not (
        head.endswith(entry.name)
    ):
        raise PthError(f"{name} has a zip header that does not match the directory's")
    extra = file.get(entry.at + len(head), extra_length)
    size, stored = _widened(extra, (size, stored))
    described = flags & _DESCRIBED_LATER
    same = (crc, stored, size) == (entry.crc, entry.stored, entry.size)
    if not same and not (described and (crc, stored, size) == (0, 0, 0)):
        raise PthError(f"{name} has a zip header that does not match the directory's")
    start = entry.at + len(head) + extra_length
    # No gap up to the next entry: a damaged length of the extra field would move the numbers, and no one would notice.
    descriptor = 0 if not described else _DESCRIPTOR if _wide_fields(extra) is None else _WIDE_DESCRIPTOR
    if start + entry.stored + descriptor != entry.limit:
        raise PthError(f"{name} does not end where the next entry of the zip begins")
    return start


def content(file: PthFile, entry: Entry) -> bytes:
    """An entry's bytes, inflated if need be, which match its checksum. Bound it first."""
    data = file.get(content_start(file, entry), entry.stored)
    name = shown(entry.name)
    if entry.method == DEFLATED:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflater.decompress(data, entry.size + 1)
        except zlib.error as error:
            raise PthError(f"{name} cannot be inflated ({error})") from None
        if len(data) != entry.size or not inflater.eof or inflater.unused_data:
            raise PthError(f"{name} does not inflate to the {entry.size} bytes announced")
    if zlib.crc32(data) != entry.crc:
        raise PthError(f"{name} does not match its checksum: damaged")
    return data
