"""The raw layout to published shards, by Ray tasks: one a unit of work, so what is lost is done again and no more.

The folder of the shards holds ``manifest/settings.json`` (what it was begun with), an entry a shard, and, when all is
done, ``manifest.json`` (the whole) and ``skipped.txt`` (a line for everything that could not be used).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from copernicus.datasets.baseline import UNKNOWN, check_policy
from copernicus.datasets.chunks import find_chunks
from copernicus.datasets.raw import RawLayout, read_layout
from copernicus.datasets.raw_shards import (
    Settings,
    Unit,
    chunk_units,
    clear_leftovers,
    convert_unit,
    finished,
    folder_units,
    write_json,
)
from copernicus.datasets.sensors import SENSORS, InputError, get_sensor
from copernicus.platform.progress import progress_bar
from copernicus.platform.run import locked, write_atomically
from copernicus.platform.session import ray_session

VERSION = 1
"""Of what is written. A change of the bytes that a source gives raises it."""

_RETRIES = 3  # of a unit whose worker died
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ConvertFailed(RuntimeError):
    """The conversion stopped. What is written is whole; the same command goes on."""


def is_raw(folder: Path) -> bool:
    """Whether a folder holds the raw layout: its list of images or its archives."""
    return any(folder.glob("fnames*.json.gz")) or bool(find_chunks(folder))


def convert_raw(
    source: Path | str,
    out: Path | str,
    console: Console,
    fnames: Path | None = None,
    settings: Settings | None = None,
    verify: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Converts a raw layout, or what is left of it, and prints what came of it. After an exception its workers end with its
    Ray session; in one that was open before they go on.

    Args:
        source: a folder with ``.tar.zst`` archives, or one of folders of images. With ``fnames``, the latter.
        out: the folder of the shards, the same one for all nodes of a cluster.
        fnames: the list of images, where it is not the one in ``source``.
        verify: what is there already is compared with its checksum, and written anew where it differs.

    Returns:
        What ``manifest.json`` holds.

    Raises:
        InputError: nothing to convert, settings out of range, or an ``out`` begun with another source or settings.
        ConvertFailed: the disk is full, say; the same call goes on.
    """
    source, out, settings = Path(source).absolute(), Path(out).absolute(), settings or Settings()
    check_policy(settings.s2_offset)
    if settings.grids_per_shard < 1:
        raise InputError(f"grids_per_shard is {settings.grids_per_shard}; it must be at least 1")
    for sensor, size in settings.sizes.items():
        get_sensor(sensor)
        if size < 1:
            raise InputError(f"size of {sensor} is {size}; it must be at least 1 pixel")
    if out == source:
        raise InputError(f"{out} is the source; give another folder for the shards")
    if blocking := [path for path in (out, *out.parents) if path.is_file()]:
        raise InputError(f"{out}: {blocking[0]} is a file; give a folder for the shards")
    units, begun = _plan(source, fnames, settings)
    if (out / "manifest" / "settings.json").exists():
        _check_begun(out, begun)
    elif any(out.glob("*.tar")):
        raise InputError(f"{out} holds shards already, not of this command; give a new folder")
    with _failing(out), locked(out, "conversion"):
        _check_begun(out, begun)
        if not (out / "manifest" / "settings.json").exists():
            write_json(out / "manifest" / "settings.json", begun)
        clear_leftovers(out)
        left = [unit for unit in units if verify or finished(unit, out) is None]
        console.print(
            f"{begun['title']}: {len(units)} {'chunks' if units[0].archives else 'shards'}"
            + (f", {len(units) - len(left)} done before" if len(left) < len(units) else ""),
            highlight=False,
            markup=False,
        )
        if left:
            try:
                with ray_session(verbose) as resources:
                    _convert(left, out, settings, verify, max(1, int(resources.get("CPU", 1))), console)
            except BaseException:
                _clear(out)
                raise
        manifest = _finish(units, out, begun)
    _report(manifest, out, console)
    return manifest


def _clear(out: Path) -> None:
    """Workers that the end of a session stops clear nothing up, and live a moment longer."""
    deadline = time.monotonic() + 10
    while True:
        time.sleep(0.5)
        if not clear_leftovers(out) or time.monotonic() > deadline:
            return


def _plan(source: Path, fnames: Path | None, settings: Settings) -> tuple[list[Unit], dict[str, Any]]:
    """The units, and what an ``out`` begun with them has to agree with."""
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    options = {"version": VERSION, **asdict(settings)}
    chunks = {} if fnames else find_chunks(source)
    if chunks:
        digest = hashlib.sha256()
        for number, archives in chunks.items():
            for sensor, path in sorted(archives.items()):
                digest.update(f"{number} {sensor} {path.name} {path.stat().st_size}\n".encode())
        title = f"archives of {source}"
        begun = {"title": title, "source": str(source), "digest": digest.hexdigest(), "options": options}
        return chunk_units(chunks, settings), begun
    layout = read_layout(source, fnames)
    _check_images(layout)
    title = f"{len(layout.keys)} grids of {source / layout.source}"
    if layout.empty:
        title += f" ({layout.empty} more are listed without an image)"
    begun = {"title": title, "source": str(source), "digest": layout.digest, "options": options}
    return folder_units(layout, settings), begun


def _check_images(layout: RawLayout) -> None:
    """A list without its images is the likeliest mistake, and takes long to show itself."""
    images = [i for key in layout.keys[:50] for patches in layout.grid(key).images.values() for i in patches[0]]
    if not any(layout.locate(image).exists() for image in images):
        raise InputError(
            f"{layout.folder}: not one of the first {len(images)} images listed in {layout.source} is there, such as "
            f"{images[0].path}; give the folder that these paths start from"
        )


def _check_begun(out: Path, begun: Mapping[str, Any]) -> None:
    path = out / "manifest" / "settings.json"
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
        before = {"source": found["source"], "digest": found["digest"], **found["options"]}
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path} cannot be read; convert into a new folder") from None
    now = {"source": begun["source"], "digest": begun["digest"], **begun["options"]}
    differ = [f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]]
    if differ:
        raise InputError(f"{out} was begun with {'; '.join(differ)}: give the same, or a new folder")


@contextlib.contextmanager
def _failing(out: Path) -> Iterator[None]:
    """What the storage says, as a message."""
    try:
        yield
    except ConnectionError:  # Ray's
        raise
    except OSError as error:
        what = "no space is left there; free some" if error.errno in _FULL else "it cannot be read or written"
        where = error.filename if error.filename and error.errno not in _FULL else out
        raise ConvertFailed(f"{where}: {what} ({error.strerror or error}). What is written is whole") from error


def _convert(units: Sequence[Unit], out: Path, settings: Settings, verify: bool, cpus: int, console: Console) -> None:
    import ray

    task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(convert_unit)
    running: dict[Any, Unit] = {}
    waiting = iter(units)
    done = grids = 0
    with progress_bar(console, "converting") as update:
        while True:
            # Few at a time: their arguments, the units' lists of images, need not all be in Ray's store.
            while len(running) < 2 * cpus and (unit := next(waiting, None)) is not None:
                running[task.remote(unit, out, settings, verify)] = unit
            update(done, len(units), f"{grids} grids")
            if not running:
                return
            for reference in ray.wait(list(running), timeout=1)[0]:
                unit = running.pop(reference)
                grids += _result(reference, unit)
                if finished(unit, out) is None:
                    raise ConvertFailed(f"{unit.name} is not in {out}; it must be one folder for all nodes")
                done += 1


def _result(reference: Any, unit: Unit) -> int:
    """A unit's number of grids, or its own exception instead of Ray's."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, (OSError, InputError)):
            raise error.cause from None
        raise
    except RayError as error:
        raise ConvertFailed(f"{unit.name}: its worker died {_RETRIES + 1} times ({error})") from error


def _finish(units: Sequence[Unit], out: Path, begun: Mapping[str, Any]) -> dict[str, Any]:
    """Writes ``manifest.json`` and ``skipped.txt`` from the shards' entries."""
    shards = []
    sensors, images, reasons = Counter[str](), Counter[str](), Counter[str]()
    unknown = 0
    lines = []
    for unit in units:
        for entry in finished(unit, out) or []:
            if entry["shard"] is not None:
                shards.append({name: entry[name] for name in ("shard", "grids", "bytes", "sha256")})
            sensors.update(entry["sensors"])
            images.update(entry["images"])
            unknown += entry[UNKNOWN]
            for where, reason, detail in entry["problems"]:
                reasons[reason] += 1
                lines.append(f"{where}: {reason}" + (f" ({detail})" if detail else "") + "\n")
    manifest = {
        **begun,
        "shards": shards,
        "grids": sum(shard["grids"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "sensors": {s: {"grids": sensors[s], "images": images[s]} for s in SENSORS if s in sensors},
        "problems": dict(sorted(reasons.items())),
        UNKNOWN: unknown,
    }
    write_atomically(out / "skipped.txt", "".join(lines))
    write_json(out / "manifest.json", manifest)
    return manifest


def _report(manifest: Mapping[str, Any], out: Path, console: Console) -> None:
    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    for sensor, count in manifest["sensors"].items():
        line(f"  {sensor:<8} {count['grids']} grids, {count['images']} images")
    if manifest[UNKNOWN]:
        line(
            f"  warning: the processing baseline of {manifest[UNKNOWN]} Sentinel-2 images is unknown (neither in their "
            "names nor in their tags): their numbers are left as they are. If they carry the offset of baseline 04.00 "
            "and later, give --s2-offset -1000; if they do not, --s2-offset 0 says so",
            "yellow",
        )
    if manifest["problems"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest["problems"].items())
        line(f"  not used or not as expected: {reasons}; named in {out / 'skipped.txt'}", "yellow")
    if not manifest["grids"]:
        raise ConvertFailed(f"not one grid could be converted; {out / 'skipped.txt'} says why")
    size = manifest["bytes"] / 1e9
    line(f"{manifest['grids']} grids in {len(manifest['shards'])} shards ({size:.3g} GB), in {out}.")
    line(f"Next: copernicus run EXPERIMENT.yaml 'pretrain.shards=[{out}]'")
