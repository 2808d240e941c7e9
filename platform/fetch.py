"""`copernicus data fetch`: archives of Copernicus-Bench from the Hugging Face hub, checked and unpacked.

A download is a file that grows at its end, beside it the stamp (size and checksum) of what it is a part of: so it goes on
where it stopped, and starts anew where the hub has another file by now. It counts only when its checksum is right. It is
unpacked beside the place where it belongs and then renamed, so a task's folder is whole or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from copernicus.datasets.bench.archive import REPOSITORY, Archive, ArchiveError, archives_of, contents, unpack
from copernicus.datasets.bench.tasks import select_tasks
from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import File, Stamp, open_file
from copernicus.datasets.stores import StoreError
from copernicus.platform.run import locked, progress_bar, write_atomically

MANIFEST = ".fetched.json"
WORK = ".fetch"
"""Folder below the benchmark's root that holds what is not whole yet."""

_BLOCK = 8 << 20  # bytes a request
_AHEAD = 4  # requests at a time
_MB = 1e6

Update = Callable[[int], None]
"""Called with bytes done so far."""


class FetchFailed(RuntimeError):
    """The hub, or what came from it, is not as it should be. What is there is kept where it is of use."""


@dataclass(frozen=True)
class Source:
    """One file of an archive on the hub. ``md5``: as published for this revision, else empty."""

    file: File
    name: str
    stamp: Stamp
    md5: str

    @property
    def checksums(self) -> dict[str, str]:
        """Algorithm -> what the file's must be. The hub tells the sha256 of its large files."""
        known = {"md5": self.md5, "sha256": self.stamp.version.lower()}
        return {a: c for a, c in known.items() if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", c) and _fits(a, c)}


def _fits(algorithm: str, digest: str) -> bool:
    return len(digest) == 2 * hashlib.new(algorithm).digest_size


@dataclass(frozen=True)
class Plan:
    """What is to be done for one archive. ``unpacked``: bytes that its files take."""

    archive: Archive
    revision: str
    sources: tuple[Source, ...]
    unpacked: int

    @property
    def size(self) -> int:
        return sum(source.stamp.size for source in self.sources)


def fetch_command(
    tasks: Sequence[str], out: Path, console: Console, revision: str | None = None, keep: bool = False
) -> None:
    """Fetch what these tasks need and is not there yet, and print what came of it.

    Args:
        tasks: names of tasks, levels, satellites, or all.
        out: the benchmark's root, to be made where it is not there.
        revision: of the repository on the hub; None: that of the published md5 sums.
        keep: keep the zips, in ``out``.

    Raises:
        InputError: unknown task, no such file or no access on the hub, or no room on the disk.
        FetchFailed: the hub cannot be reached; or what came is damaged, or not what it should be.
        StoreError: the hub stopped answering on the way.
    """
    out = out.absolute()
    if blocking := [path for path in (out, *out.parents) if path.is_file()]:
        raise InputError(f"--out {out}: {blocking[0]} is a file; give a folder")
    tasks = select_tasks(tasks)
    archives = archives_of(tasks)
    todo = [archive for archive in archives if not _is_there(archive, out, revision, console)]
    plans = [_plan(archive, out, revision) for archive in todo]
    if plans:
        with _new_folder(out), locked(out / WORK, "download"):
            for leftover in (out / WORK).glob("*/unpacked"):
                shutil.rmtree(leftover)
            _check_room(plans, out, keep)
            for number, plan in enumerate(plans, 1):
                _say(console, f"{number}/{len(plans)} {plan.archive.folder}: {_size(plan.size)} to fetch, {_size(plan.unpacked)} unpacked")  # fmt: skip
                _fetch(plan, out, keep, console)
        shutil.rmtree(out / WORK, ignore_errors=True)
    _say(console, f"{', '.join(archive.folder for archive in archives)}: in {out}")
    names = ", ".join(tasks)
    _say(console, f"Next: copernicus data verify {out}, or copernicus run EXPERIMENT.yaml sweep.data={out} 'sweep.tasks=[{names}]'")  # fmt: skip


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[None]:
    """Wrong input leaves nothing behind."""
    existed = out.exists()
    try:
        yield
    except InputError:
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise


def _is_there(archive: Archive, out: Path, revision: str | None, console: Console) -> bool:
    folder, wanted = out / archive.folder, revision or archive.revision
    if not folder.exists():
        return False
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        _say(console, f"{archive.folder}: there already, though not by this command; left as it is", "yellow")
        return True
    if manifest.get("revision") != wanted:
        raise InputError(
            f"{folder} is there, of revision {manifest.get('revision')} and not {wanted}; move it away, or give that --revision"
        )
    _say(console, f"{archive.folder}: there already")
    return True


def _plan(archive: Archive, out: Path, revision: str | None) -> Plan:
    asked = revision or archive.revision
    sources = []
    for path, md5 in archive.files:
        uri = f"hf://datasets/{REPOSITORY}@{asked.replace('/', '%2F')}/{path}"
        file = open_file(uri)
        try:
            stamp = file.stamp()
        except FileNotFoundError:
            raise InputError(
                f"{_hub()} has no {path} of {REPOSITORY} at revision {asked}; check HF_ENDPOINT and --revision"
            ) from None
        except PermissionError as error:
            raise InputError(
                f"{_hub()} gives no access to {REPOSITORY} ({error}); check HF_ENDPOINT, or `hf auth login` or HF_TOKEN"
            ) from None
        except StoreError as error:
            raise FetchFailed(
                f"{_hub()} did not give {path} ({error.said}). Check the network, or set HF_ENDPOINT to a mirror; the same "
                "command goes on where it stopped"
            ) from None
        sources.append(Source(file, path.rpartition("/")[2], stamp, md5 if asked == archive.revision else ""))
    unpacked = sum(source.stamp.size for source in sources)
    if archive.zipped:
        (source,) = sources
        try:
            with io.BufferedReader(_Remote(source), 1 << 20) as directory:
                unpacked = contents(directory, archive.folder).taken
        except ArchiveError as error:
            raise FetchFailed(f"{source.file.uri}: {error}") from None
    return Plan(archive, asked, tuple(sources), unpacked)


class _Remote(io.RawIOBase):
    """A file on the hub for a reader that wants little of it."""

    def __init__(self, source: Source):
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._source.stamp.size}[whence]
        if base + offset < 0:
            raise OSError("before the beginning")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._source.stamp.size - self._at))
        buffer[:length] = self._source.file.read(self._at, length)
        self._at += length
        return length


def _check_room(plans: Sequence[Plan], out: Path, keep: bool) -> None:
    """Zips go as soon as they are unpacked, so they are not all there at one time."""
    needed = stays = 0
    for plan in plans:
        given = plan.archive.zipped and (out / plan.sources[0].name).is_file()
        zipped = plan.size if plan.archive.zipped and not given else 0
        there = 0 if given else sum(_have(_part(plan.archive, out, source), source) for source in plan.sources)
        needed = max(needed, stays + zipped + plan.unpacked - there)
        stays += plan.unpacked + (zipped if keep else 0) - there
    if (free := shutil.disk_usage(out).free) < needed:
        raise InputError(
            f"{out}: {_size(needed)} are needed (zips and what they unpack to), {_size(free)} are free; free some, give "
            "another --out, or fetch fewer tasks"
        )


def _fetch(plan: Plan, out: Path, keep: bool, console: Console) -> None:
    archive = plan.archive
    work = out / WORK / archive.folder
    unpacked = work / "unpacked"
    work.mkdir(parents=True, exist_ok=True)
    files = [_download(archive, source, out, console) for source in plan.sources]
    left_out: tuple[str, ...] = ()
    if archive.zipped:
        with progress_bar(console, "unpacking, MB") as update:
            total = round(plan.unpacked / _MB)
            try:
                found = unpack(files[0], unpacked, archive.folder, lambda n: update(min(round(n / _MB), total), total))
            except ArchiveError as error:
                if files[0].parent == out:
                    raise InputError(f"{files[0]}: {error}; move it away to fetch it anew") from None
                files[0].unlink()
                raise FetchFailed(
                    f"{plan.sources[0].file.uri}: {error}. It is deleted; the same command fetches it anew"
                ) from None
        left_out = found.left_out
    else:
        (unpacked / archive.folder).mkdir(parents=True)
        for source, path in zip(plan.sources, files, strict=True):
            _place(path, unpacked / archive.folder / source.name)
    manifest = {
        "repository": REPOSITORY,
        "revision": plan.revision,
        "files": {s.file.uri.rpartition("/")[2]: {"size": s.stamp.size, **s.checksums} for s in plan.sources},
    }
    write_atomically(unpacked / archive.folder / MANIFEST, json.dumps(manifest, indent=1))
    os.sync()  # before the name says that it is whole
    os.replace(unpacked / archive.folder, out / archive.folder)
    if left_out:
        _say(console, f"  left out, beside {archive.folder}/: {', '.join(left_out[:3])}{', ...' * (len(left_out) > 3)}", "yellow")  # fmt: skip
    if keep and archive.zipped and files[0].parent != out:
        os.replace(files[0], out / plan.sources[0].name)
    shutil.rmtree(work)


def _place(path: Path, target: Path) -> None:
    """A second name, so that whoever is killed before all is in its place finds the download again."""
    try:
        os.link(path, target)
    except OSError:  # a file system without
        os.replace(path, target)


def _download(archive: Archive, source: Source, out: Path, console: Console) -> Path:
    """The file, whole and checked: one that lies in ``out`` already, or what comes from the hub."""
    given = out / source.name
    if archive.zipped and given.is_file():
        if wrong := _wrong(given, source, console):
            raise InputError(f"{given} is there, but {wrong}; move it away to fetch it anew")
        _say(console, f"  {source.name}: the one in {out}")
        return given
    path = _part(archive, out, source)
    stamp = path.with_suffix(".stamp")
    have = _have(path, source)
    if not have:
        path.unlink(missing_ok=True)
        write_atomically(stamp, json.dumps(source.stamp))
    elif have < source.stamp.size:
        _say(console, f"  {source.name}: {_size(have)} are there, going on")
    with progress_bar(console, f"{source.name}, MB") as update:
        total = round(source.stamp.size / _MB)
        _append(source, path, have, lambda n: update(round(n / _MB), total))
    if source.file.stamp() != source.stamp:
        raise FetchFailed(f"{source.file.uri} changed while it was read. The same command fetches it anew")
    if wrong := _wrong(path, source, console):
        path.unlink()
        raise FetchFailed(
            f"{source.file.uri} as {_hub()} gave it is not right: {wrong}. It is deleted; the same command fetches it anew, "
            "--revision main takes what the hub has now"
        )
    return path


def _append(source: Source, path: Path, have: int, update: Update) -> None:
    """Adds what is missing at the end of a file, several requests ahead."""
    starts = deque(range(have, source.stamp.size, _BLOCK))
    coming: deque[Future[bytes]] = deque()
    with open(path, "ab") as file, ThreadPoolExecutor(_AHEAD) as pool:
        try:
            while starts or coming:
                while starts and len(coming) < _AHEAD:
                    start = starts.popleft()
                    coming.append(pool.submit(source.file.read, start, min(_BLOCK, source.stamp.size - start)))
                file.write(coming.popleft().result())
                update(file.tell())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _wrong(path: Path, source: Source, console: Console) -> str:
    """What is wrong with a whole file; empty where nothing is."""
    if not _whole(path, source):
        return f"it has {path.stat().st_size} bytes, not {source.stamp.size}"
    if not source.checksums:
        _say(console, f"  {source.name}: {_hub()} tells no sha256 and no md5 is published for this revision: not checked", "yellow")  # fmt: skip
    digests = {algorithm: hashlib.new(algorithm) for algorithm in source.checksums}
    with open(path, "rb") as file:
        while digests and (block := file.read(_BLOCK)):
            for digest in digests.values():
                digest.update(block)
    for algorithm, wanted in source.checksums.items():
        if (found := digests[algorithm].hexdigest()) != wanted:
            return f"its {algorithm} is {found}, not {wanted}"
    return ""


def _part(archive: Archive, out: Path, source: Source) -> Path:
    return out / WORK / archive.folder / f"{source.name}.part"


def _have(path: Path, source: Source) -> int:
    """Bytes that are there of this very file."""
    try:
        kept = Stamp(*json.loads(path.with_suffix(".stamp").read_text()))
        size = path.stat().st_size
    except (OSError, ValueError, TypeError):
        return 0
    return size if kept == source.stamp and size <= source.stamp.size else 0


def _whole(path: Path, source: Source) -> bool:
    return path.is_file() and path.stat().st_size == source.stamp.size


def _hub() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT") or constants.ENDPOINT


def _size(bytes_: float) -> str:
    return f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / _MB:.1f} MB"


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
