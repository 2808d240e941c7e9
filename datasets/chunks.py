"""The raw layout's archives: 1,000 grids of one sensor in a ``.tar.zst``, numbered alike for all sensors.

    s1_grd_utm_chunk001.tar.zst   s1_grd_utm/images/<grid>/<patch>/<file>.tif     (s2_toa_... alike)
    s5p_co_wgs_chunk001.tar.zst   s5p_l3_wgs/images/CO_column_number_density/<grid>/<file>.tif   (s3, dem alike)

Archives come from strangers. A member is written under names made of its checked parts alone, as a new plain file
within the folder given: nothing outside it can be reached, and links, devices and the like are refused.
"""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tarfile import EOFHeaderError  # type: ignore[attr-defined]
from typing import Any

import pyarrow

from copernicus.datasets.raw import GRID_NAME, PATCH_NAME, RawLayout
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import LEADING_AXES, Problem

GRIDS_PER_CHUNK = 1000
_ARCHIVE = re.compile(rf"({'|'.join(SENSORS)})_(?:\w*_)?(?:chunk|batch)?(\d+)\.tar\.zst", re.ASCII)
_FILE = r"[A-Za-z0-9][\w.+-]{0,199}\.tif"
_LARGEST_MEMBER = 64 << 20  # bytes; published images have up to 4 million
_LARGEST_ARCHIVE = 512 << 30  # bytes, unpacked; 1,000 grids of Sentinel-2 have some 40 billion
_MOST_MEMBERS = 1_000_000  # folders included; 1,000 grids of Sentinel-2 have some 20,000


def find_chunks(folder: Path | str) -> dict[int, dict[str, Path]]:
    """Number of a chunk -> sensor -> its archive, of the ``.tar.zst`` files in a folder and the folders in it.

    Raises:
        InputError: two archives of one sensor and number.
    """
    folder = Path(folder).absolute()
    chunks: dict[int, dict[str, Path]] = {}
    for path in sorted([*folder.glob("*.tar.zst"), *folder.glob("*/*.tar.zst")]):
        if found := _ARCHIVE.fullmatch(path.name):
            archives = chunks.setdefault(int(found[2]), {})
            if (other := archives.setdefault(found[1], path)) != path:
                raise InputError(f"{path} and {other} are both chunk {int(found[2])} of {found[1]}; keep one of them")
    return {number: chunks[number] for number in sorted(chunks)}


def extract_chunk(archives: Mapping[str, Path], into: Path) -> tuple[RawLayout, list[Problem]]:
    """Unpacks the archives of one chunk into an empty folder.

    Returns:
        The layout of what came out, grids in the order of their keys, a patch's images in that of their dates; and a
        problem for each archive that is damaged or cut off (what precedes the damage is kept) and each refused member.

    Raises:
        OSError: the files cannot be written.
    """
    entries: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for sensor, archive in sorted(archives.items()):
        for grid, patch, path in _extract(archive, sensor, into, problems):
            entry = entries.setdefault(grid[:7], {"grid_id_coord": grid})
            if entry["grid_id_coord"] != grid:
                problems.append(
                    Problem(path, "unexpected_member", f"its grid is called {entry['grid_id_coord']} elsewhere")
                )
            elif patch:
                entry.setdefault(sensor, {}).setdefault(patch, []).append(path)
            else:
                entry.setdefault(sensor, []).append(path)
    for entry in entries.values():
        for sensor in entry.keys() & archives.keys():
            listed = entry[sensor]
            if isinstance(listed, dict):
                entry[sensor] = {patch: _in_time(paths) for patch, paths in sorted(listed.items(), key=_number)}
            else:
                entry[sensor] = _in_time(listed)
    packed = {key: zlib.compress(json.dumps(entries[key]).encode(), 1) for key in sorted(entries)}
    return RawLayout(into, "archives", packed), problems


def _number(item: tuple[str, Any]) -> tuple[int, str]:
    return int(item[0].partition("_")[0]), item[0]


def _in_time(paths: Iterable[str]) -> list[str]:
    """By the date and time in the file's name, else by the name."""

    def when(path: str) -> tuple[str, str]:
        name = path.rpartition("/")[2]
        found = re.search(r"\d{8}T\d{6}", name)
        return found[0] if found else name, name

    return sorted(paths, key=when)


def _extract(archive: Path, sensor: str, into: Path, problems: list[Problem]) -> Iterator[tuple[str, str, str]]:
    """Unpacks one archive; yields the grid, the patch and the path below ``into`` of each image written."""
    patch = f"({PATCH_NAME.pattern})/" if "patch" in LEADING_AXES[sensor] else "()"
    expected = re.compile(rf"(?:.*/)?({GRID_NAME.pattern})/{patch}({_FILE})", re.ASCII)
    written = 0
    try:
        with pyarrow.OSFile(str(archive)) as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
            bounded = _Bounded(stream)
            # A reading stream needs no more than ``read``.
            with _Archive.open(fileobj=bounded, mode="r|", tarinfo=_Member) as tar:  # type: ignore[call-overload]
                for member in tar:
                    bounded.next_member()
                    if member.isdir():
                        continue
                    where = f"{archive.name}: {member.name}"
                    if not member.isreg() or member.name.startswith("/") or ".." in member.name.split("/"):
                        problems.append(
                            Problem(where, "unsafe_member", "a link, a device or a path that leads outside")
                        )
                        continue
                    found = expected.fullmatch(member.name)
                    if found is None:
                        problems.append(Problem(where, "unexpected_member", f"not an image of {sensor}"))
                        continue
                    content = tar.extractfile(member)
                    assert content is not None  # of a regular file
                    data = content.read()
                    path = Path(sensor, *filter(None, found.groups()))
                    (into / path).parent.mkdir(parents=True, exist_ok=True)
                    try:
                        with open(into / path, "xb") as image:
                            image.write(data)
                    except FileExistsError:
                        problems.append(Problem(where, "unexpected_member", "it is there twice; the first is used"))
                        continue
                    written += 1
                    yield found[1], found[2], str(path)
            if not tar.whole:
                raise tarfile.ReadError("no end marker, or a damaged header")
            while bounded.read(1 << 20):  # the decompressor compares its checksum at the end
                pass
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the storage's; the decompressor's have no number
            raise
        problems.append(Problem(archive.name, "damaged_archive", f"{error}; {written} images precede the damage"))


class _Bounded:
    """A stream that does not give more than an archive, or one member of it, can have."""

    def __init__(self, stream: pyarrow.NativeFile):
        self._stream, self._total, self._member, self._members = stream, 0, 0, 0

    def next_member(self) -> None:
        self._members, self._member = self._members + 1, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._total, self._member = self._total + len(data), self._member + len(data)
        # Two: what a header announces, and the header's own extensions (long names).
        if self._member > 2 * _LARGEST_MEMBER or self._total > _LARGEST_ARCHIVE or self._members > _MOST_MEMBERS:
            raise tarfile.ReadError(f"member {self._members} or the whole is larger than any published")
        return data


class _Archive(tarfile.TarFile):
    whole = False
    """Ended by an end marker: tarfile takes a damaged or missing header for the end, in silence."""


class _Member(tarfile.TarInfo):
    @classmethod
    def fromtarfile(cls, tarfile: _Archive) -> _Member:  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile)
        except EOFHeaderError:
            tarfile.whole = True
            raise
