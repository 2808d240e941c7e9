"""What a tar holds, from its headers alone: few ranged reads, on a disk or in an object store.

A shard of 5 GB has 900 members and as many headers, 512 bytes each, next to what one wants of a member: its first and
its last kilobyte (see `pth`). `Windows` fetches all three with one request. `walk` follows the headers; shards come from
strangers and copies break, so whatever is wrong with one becomes a `Problem` and nothing else.

A header is decoded by the standard library's `tarfile.TarInfo.frombuf`. What stands between headers is read here: the
walk then never goes back, however sizes and names are forged, and never holds more than a megabyte.

Source: POSIX.1-2017, pax; the GNU tar manual, "Basic Tar Format"; names as WebDataset splits them.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from copernicus.datasets.pth_zip import Read
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import Problem

_BLOCK = 512
_BEFORE = 2 << 10  # of a window: what ends in front of the bytes asked for, here the end of a member
_AFTER = 22 << 10  # and what begins there: the next header, the next member's begin, or all of a small one
_WINDOWS = 4
_MOST_EXTENDED = 1 << 20  # bytes of a header that holds a long name or pax records
_MOST_HEADERS = 1 << 18
_LONGEST_NAME = 1000
_PAX, _PAX_SOLARIS, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _SPARSE = b"x", b"X", b"g", b"L", b"K", b"S"
_EMPTY = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: no content, whatever size they claim


@dataclass(frozen=True)
class Member:
    """A file ``<key>.<extension>`` in a tar: the extension is what follows the base name's first dot, such as ``s1_grd.pth``
    or ``json``, and its content lies at ``offset``, ``size`` bytes long."""

    key: str
    extension: str
    offset: int
    size: int


class Windows:
    """Reads ahead of and behind what is asked for, and keeps the last few windows: one request of 24 KiB serves all that
    `walk` and `pth.locate_tensor` want around the border of two members. Longer reads go past it.

    Args:
        read: read(offset, length), such as a ranged request.
        size: of the file, bytes.
    """

    def __init__(self, read: Read, size: int):
        self._read, self._size = read, size
        self._windows: list[tuple[int, bytes]] = []

    def read(self, offset: int, length: int) -> bytes:
        """Exactly those bytes.

        Raises:
            OSError: they are not all in the file, or reading failed.
        """
        end = offset + length
        if offset < 0 or length < 0 or end > self._size:
            raise OSError(f"no {length} bytes at {offset} in a file of {self._size}")
        for start, data in self._windows:
            if start <= offset and end <= start + len(data):
                return data[offset - start : end - start]
        if length > _AFTER:
            return self._read(offset, length)
        start = max(0, offset - _BEFORE)
        data = self._read(start, min(self._size, offset + _AFTER) - start)
        self._windows = [(start, data), *self._windows[: _WINDOWS - 1]]
        return data[offset - start : end - start]


def walk(read: Read, size: int, name: str) -> Iterator[Member | Problem]:
    """The members of a tar in its order, and what is wrong with it where that is met.

    A member comes after the header that follows it was read, so that with ``Windows(...).read`` the member's begin and
    end are at hand at that moment.

    Args:
        size: of the file, bytes.
        name: of the file, for ``Problem.where``: it stands there alone or as ``name:member``.

    Yields:
        Problem: ``truncated_tar`` (the file is shorter than its headers say, the rest is lost), ``damaged_tar`` (a header
        is; what follows is lost), ``stray_member`` (no file <key>.<extension>: passed over), ``duplicate_member`` (the
        first is used).

    Raises:
        OSError: ``read`` raised it.
    """
    held: Member | Problem | None = None
    for found in _found(read, size, name):
        if held is not None:
            yield held
        held = found
    if held is not None:
        yield held


def list_members(path: str | Path) -> tuple[dict[str, dict[str, tuple[int, int]]], list[Problem]]:
    """What a tar file on disk holds.

    Returns:
        members: key -> {extension -> (offset, size) of the content, bytes}, in the file's order. Only whole members.
        problems: see `walk`.

    Raises:
        InputError: the file cannot be opened or read.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    problems: list[Problem] = []
    try:
        with open(path, "rb", buffering=0) as file:

            def read(offset: int, length: int) -> bytes:
                file.seek(offset)
                data = file.read(length)
                if len(data) != length:
                    raise OSError(None, f"it ends at byte {offset + len(data)}, sooner than when it was opened")
                return data

            for found in walk(read, os.fstat(file.fileno()).st_size, str(path)):
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    members.setdefault(found.key, {})[found.extension] = (found.offset, found.size)
    except OSError as error:
        raise InputError(f"shard {path} cannot be read: {error.strerror}") from None
    return members, problems


class _Damaged(Exception):
    """A header that cannot be followed any further."""


class _Truncated(Exception):
    """The file ends before its headers say."""


@dataclass(frozen=True)
class _Header:
    """A member by all that was said about it: ``start`` of its content, and where the ``next`` header stands."""

    name: str
    start: int
    size: int
    next: int
    plain: bool  # a file, all there
    folder: bool


def _found(read: Read, size: int, name: str) -> Iterator[Member | Problem]:
    seen: set[tuple[str, str]] = set()
    try:
        for header in _headers(read, size):
            folder, slash, base = header.name.rpartition("/")
            stem, _, extension = base.partition(".")
            member = Member(folder + slash + stem, extension, header.start, header.size)
            where = f"{name}:{_shown(header.name)}"
            if header.folder:
                continue
            if not header.plain:
                yield Problem(where, "stray_member", "a link, a device or a sparse file")
            elif not stem or not extension or not header.name.isprintable() or len(header.name) > _LONGEST_NAME:
                yield Problem(where, "stray_member", "not named <key>.<extension>")
            elif (member.key, extension) in seen:
                yield Problem(where, "duplicate_member", "the first of that name is used")
            else:
                seen.add((member.key, extension))
                yield member
    except _Truncated as error:
        yield Problem(name, "truncated_tar", f"cut off {str(error) or f'at byte {size}'}, after {len(seen)} members")
    except _Damaged as error:
        yield Problem(name, "damaged_tar", f"{error}; what follows is lost")


def _headers(read: Read, size: int) -> Iterator[_Header]:
    """The members up to the end of the archive.

    Raises:
        _Truncated, _Damaged: there is no going on.
    """
    at = 0
    everywhere: dict[str, str] = {}  # what pax records say of all that follows
    own: dict[str, str] = {}  # what extra headers say of the next member,
    announced = False  # and that there must be one
    for _ in range(_MOST_HEADERS):
        block = _bytes(read, size, at, _BLOCK)
        if not block.strip(b"\0"):
            if announced:
                raise _Damaged(f"a member was announced, but the archive ends at byte {at}")
            return _check_end(read, size, at)
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError):
            raise _Damaged(f"damaged header at byte {at}" if at else "not a tar file") from None
        if info.size < 0:
            raise _Damaged(f"damaged header at byte {at}")
        content = at + _BLOCK
        if info.type in (_PAX, _PAX_SOLARIS, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            if info.size > _MOST_EXTENDED:
                raise _Damaged(f"the header at byte {at} is {info.size} bytes long")
            body = _bytes(read, size, content, info.size)
            if info.type == _GNU_NAME:
                own["path"] = body.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif info.type != _GNU_LINK:
                (everywhere if info.type == _PAX_GLOBAL else own).update(_pax(body, at))
            at, announced = content + _rounded(info.size), True
            continue
        header = _member(read, size, block, info, content, everywhere | own)
        yield header
        at, own, announced = header.next, {}, False
    raise _Damaged(f"more than {_MOST_HEADERS} headers, up to byte {at}")


def _member(read: Read, size: int, block: bytes, info: tarfile.TarInfo, start: int, records: dict[str, str]) -> _Header:
    name = records.get("path", info.name)
    length = info.size
    if "size" in records:
        digits = records["size"]
        if not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise _Damaged(f"damaged pax header before byte {start}")
        length = int(digits)
    if info.type in _EMPTY:
        length = 0
    more = info.type == _SPARSE and block[482] != 0  # its map goes on in further blocks
    begin = start
    while more:
        more = _bytes(read, size, start, _BLOCK)[504] != 0
        start += _BLOCK
        if start - begin > _MOST_EXTENDED:
            raise _Damaged(f"the map of the sparse file {_shown(name)} does not end")
    if start + length > size:
        raise _Truncated(f"within member {_shown(name)} (at byte {size}; the rest is lost)")
    plain = info.isreg() and info.type != _SPARSE and "sparse" not in records
    return _Header(name, start, length, start + _rounded(length), plain, info.isdir())


def _bytes(read: Read, size: int, at: int, length: int) -> bytes:
    if at + length > size:
        raise _Truncated
    return read(at, length)


def _check_end(read: Read, size: int, at: int) -> None:
    """Archives end with zeros, up to a megabyte of them. More, or something behind them, is a lost part: another archive,
    or a copy that stopped and left its space allocated."""
    rest = size - at
    if rest > _MOST_EXTENDED or read(at, rest).strip(b"\0"):
        raise _Damaged(f"the archive ends at byte {at}, but {rest} bytes follow")


def _pax(body: bytes, at: int) -> dict[str, str]:
    """Records "<length> <keyword>=<value>\\n", of which each length counts all of its record; those of use here."""
    records: dict[str, str] = {}
    begin = 0
    while begin < len(body):
        blank = body.find(b" ", begin, begin + 20)
        digits = body[begin : max(blank, begin)]
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = body[blank + 1 : end].partition(b"=")
        if not equals or end > len(body) or not value.endswith(b"\n"):
            raise _Damaged(f"damaged pax header at byte {at}")
        if key in (b"path", b"size"):
            records[key.decode()] = value[:-1].decode("utf-8", "surrogateescape")
        elif key.startswith(b"GNU.sparse."):
            records["sparse"] = "yes"
        begin = end
    return records


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _shown(name: str) -> str:
    """A stranger's name, safe to print on one line."""
    return name[:200] if name.isprintable() else ascii(name)[1:-1][:200]
