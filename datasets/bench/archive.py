"""Where each task's files lie on the Hugging Face hub, and how an archive from there is unpacked.

The zips hold the folder of their task (or of the tasks that share it) at their top; the local climate zones are three plain
HDF5 files. Names and md5 sums are those that TorchGeo's Copernicus-Bench data sets state (torchgeo/datasets/copernicus),
each at the revision for which they are stated there.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

REPOSITORY = "wangyi111/Copernicus-Bench"
_REVISION = "9d252acd3aa0e3da3128e05c6f028647f0e48e5f"
_BLOCK = 1 << 20  # bytes copied at a time

Moved = Callable[[int], None]
"""Called with how many bytes have been dealt with, again and again."""


class ArchiveError(ValueError):
    """A zip that is damaged, or that holds what none of the benchmark's may."""


@dataclass(frozen=True)
class Archive:
    """What is fetched for a task. ``files``: path in the repository -> published md5 (of ``revision``); ``folder``: where
    its files end, below the benchmark's root; a zip brings that folder along."""

    tasks: tuple[str, ...]
    folder: str
    files: tuple[tuple[str, str], ...]
    revision: str = _REVISION

    @property
    def zipped(self) -> bool:
        return self.files[0][0].endswith(".zip")


ARCHIVES = (
    Archive(("cloud_s2",), "cloud_s2", (("l1_cloud_s2/cloud_s2.zip", "39a1f966e76455549a3e6c209ba751c1"),)),
    Archive(
        ("cloud_s3",),
        "cloud_s3",
        (("l1_cloud_s3/cloud_s3.zip", "1f82a8ccf16a0c44f0b1729e523e343a"),),
        "86342afa2409e49d80688fe00c05201c0f46569b",
    ),
    Archive(("eurosat_s1",), "eurosat_s1", (("l2_eurosat_s1s2/eurosat_s1.zip", "e7e7f8fc68fc55a7a689cb654912ff3f"),)),
    Archive(("eurosat_s2",), "eurosat_s2", (("l2_eurosat_s1s2/eurosat_s2.zip", "b2be02ca9767554c717f2e9bd15bbd23"),)),
    Archive(
        ("bigearthnet_s1", "bigearthnet_s2"),
        "bigearthnet_s1s2",
        (("l2_bigearthnet_s1s2/bigearthnetv2.zip", "269355db0449e0da7213c95f30c346d4"),),
    ),
    Archive(
        ("lc100cls_s3", "lc100seg_s3"),
        "lc100_s3",
        (("l2_lc100_s3/lc100_s3.zip", "967d1da6286e0d0e346e425a8f3800e9"),),
    ),
    Archive(
        ("dfc2020_s1", "dfc2020_s2"),
        "dfc2020_s1s2",
        (("l2_dfc2020_s1s2/dfc2020.zip", "f10ba017dab6f38b7a6857b169ea924b"),),
    ),
    Archive(("flood_s1",), "flood_s1", (("l3_flood_s1/flood_s1.zip", "f4337fee5e90203c6d0c3efeb0b97b8a"),)),
    Archive(
        ("lcz_s2",),
        "lcz_s1s2",
        (
            ("l3_lcz_s2/lcz_train.h5", "e0b10cdb7f12e053cda8dd3ff12dbd9e"),
            ("l3_lcz_s2/lcz_val.h5", "be3b503dba5a1405ec6d5a770c2bee33"),
            ("l3_lcz_s2/lcz_test.h5", "4e95788c72a421d636f6f8dc7623d116"),
        ),
    ),
    Archive(("biomass_s3",), "biomass_s3", (("l3_biomass_s3/biomass_s3.zip", "4769ab8c2c23cd8957b99e15e071931c"),)),
    Archive(
        ("aq_no2_s5p", "aq_o3_s5p"),
        "airquality_s5p",
        (("l3_airquality_s5p/airquality_s5p.zip", "92081c7437c5c1daf783868ad7669877"),),
    ),
)


def archives_of(tasks: Sequence[str]) -> list[Archive]:
    """The archives that these tasks need, each once, in the benchmark's order. Variants of a task (``<task>-<mode>``) are
    in the archive of the task."""
    wanted = {name.partition("-")[0] for name in tasks}
    return [archive for archive in ARCHIVES if wanted & set(archive.tasks)]


@dataclass(frozen=True)
class Contents:
    """What a zip says that it holds below its folder. ``taken``: bytes on a disk with blocks of 4 KiB."""

    members: tuple[zipfile.ZipInfo, ...]
    size: int
    taken: int
    left_out: tuple[str, ...]  # files beside the folder, which are not unpacked


def contents(file: BinaryIO, folder: str) -> Contents:
    """Reads a zip's directory and checks it: nothing is unpacked, and a remote file is read at its end alone.

    Raises:
        ArchiveError: no zip; a name that leads out of the folder, or comes twice; a link; a password; members that
            share bytes, so that a small zip could stand for any size; or no such folder in it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ArchiveError(f"no zip that can be read ({error})") from error
    members, left_out, names = [], [], set()
    for info in infos:
        _check(info)
        name = info.filename.rstrip("/")
        if name.partition("/")[0] != folder:
            left_out += [] if info.is_dir() else [info.filename]
            continue
        if info.is_dir():
            continue  # folders come with their files
        if name in names:
            raise ArchiveError(f"member {name!r} comes twice")
        names.add(name)
        members.append(info)
    if not members:
        raise ArchiveError(f"no files in a folder {folder}/")
    total = file.seek(0, os.SEEK_END)
    if sum(info.compress_size for info in infos) > total:
        raise ArchiveError("its members overlap")
    taken = sum(-(-info.file_size // 4096) * 4096 for info in members)
    return Contents(tuple(members), sum(info.file_size for info in members), taken, tuple(left_out))


def _check(info: zipfile.ZipInfo) -> None:
    name = info.orig_filename
    parts = name.removesuffix("/").split("/")
    if "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise ArchiveError(f"member {name!r} leads out of its folder")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveError(f"member {name!r} is a link or a device")
    if info.flag_bits & 1:
        raise ArchiveError(f"member {name!r} wants a password")


def unpack(path: Path, into: Path, folder: str, moved: Moved) -> Contents:
    """Unpacks a zip to ``into/folder``, which must not be there. No member takes more than the size stated for it.

    Raises:
        ArchiveError: see `contents`; or a member is damaged.
        OSError: it cannot be written.
    """
    done = 0
    with open(path, "rb") as file:
        found = contents(file, folder)
        with zipfile.ZipFile(file) as archive:
            for info in found.members:
                target = into / info.filename
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(info) as source, open(target, "xb") as out:
                        while block := source.read(_BLOCK):
                            out.write(block)
                            done += len(block)
                            moved(done)
                except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                    raise ArchiveError(f"member {info.filename!r} is both a file and a folder") from error
                except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
                    raise ArchiveError(f"member {info.filename!r} is damaged ({error})") from error
                if target.stat().st_size != info.file_size:
                    raise ArchiveError(f"member {info.filename!r} is not of the size stated")
    return found
