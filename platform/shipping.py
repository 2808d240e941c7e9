"""What a job carries to a cluster: the experiment's YAML as it was written, and the client's own ``copernicus`` package,
so that the cluster runs the client's version. Data and weights never travel: they are read where the job runs."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from copernicus.datasets.sensors import InputError

LIMIT_BYTES = 100 * 2**20
"""What Ray's job server takes."""
FOLDERS = ("platform", "platform/clusters", "models", "datasets", "datasets/bench", "datasets/miniature")
"""Folders of the package, as a wheel has them (`tests/test_shipping.py` compares)."""
SUFFIXES = (".py", ".pyi", ".typed", ".yaml", ".yml", ".sh", ".template")
EXPERIMENT = "experiment.yaml"
COMMIT = "copernicus/platform/commit.txt"
"""Says which commit the shipped code is of: on the cluster it is outside a checkout (`tracking.git_commit`)."""
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's earliest time


@dataclass(frozen=True)
class Parcel:
    """A zip with what a job carries. The same contents give the same bytes, and so the same ``uri``: Ray's job server
    keeps packages by it, and one that it has is not uploaded again."""

    content: bytes
    files: int

    @property
    def uri(self) -> str:
        return f"gcs://_ray_pkg_{hashlib.sha1(self.content).hexdigest()}.zip"


def pack(experiment: Path | None, commit: str) -> Parcel:
    """The parcel of an experiment's YAML, if any, and the package that is imported, from an editable install or a wheel
    alike.

    Raises:
        InputError: it is larger than a job server takes; the message names what is large.
    """
    entries = {COMMIT: f"{commit}\n".encode()} | ({EXPERIMENT: experiment.read_bytes()} if experiment else {})
    entries |= {name: file.read_bytes() for name, file in package_files()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(entries):
            member = zipfile.ZipInfo(name, EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.external_attr = 0o644 << 16
            archive.writestr(member, entries[name])
    content = buffer.getvalue()
    if len(content) > LIMIT_BYTES:
        sizes = sorted(((len(data), name) for name, data in entries.items()), reverse=True)[:3]
        largest = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for size, name in sizes)
        raise InputError(
            f"what the job would carry is {len(content) / 2**20:.1f} MiB, and Ray takes {LIMIT_BYTES / 2**20:.0f}; "
            f"the largest files: {largest}; data and weights belong on the cluster's shared storage"
        )
    return Parcel(content, len(entries))


def package_files() -> Iterator[tuple[str, Path]]:
    """(path below the working folder, file here) of the imported package."""
    import copernicus

    for file in _files(Path(copernicus.__file__).parent):
        yield f"copernicus/{file.name}", file
    for folder in FOLDERS:
        package, _, below = folder.partition("/")
        for file in _files(Path(getattr(copernicus, package).__path__[0]) / below):
            yield f"copernicus/{folder}/{file.name}", file


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [
        f
        for f in folder.iterdir()
        if (f.suffix in SUFFIXES or f.name == "Dockerfile") and not f.name.startswith(".") and f.is_file()
    ]
