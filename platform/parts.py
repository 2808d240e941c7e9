"""A job over shards: as Ray Data tasks, or in this process where there is little to read. What is done of a shard is kept
until all is, so that an interrupted job goes on where it stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import shutil
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.index import current_stamp
from copernicus.datasets.storage import Stamp, write_bytes
from copernicus.platform.session import ray_session

Report = Callable[[float, float, str], None]
"""Called with shards done, shards in all, and a note."""
FEW_SHARDS, FEW_BYTES = 16, 256 << 20
"""So little is read here, where a session is open, too: a worker takes longer to start."""


class Parts:
    """One parquet file a shard, in a folder next to what they will make: on the driver's disk, and for a ``path`` in a
    store in the working directory.

    Args:
        path: of what the parts will make.
        work: a shard's URI -> its rows; a function that a worker can import.
        stamp: (rows, URI) -> the stamp of the shard when it was read, None where another reading might find more.
        problems: how many a shard's rows tell of, for the progress bar.
        readers_per_cpu: of shards in an object store; whoever waits for answers leaves the processor to others.
    """

    def __init__(
        self,
        path: str,
        work: Callable[[str], pa.Table],
        stamp: Callable[[pa.Table, str], Stamp | None],
        problems: Callable[[pa.Table], int],
        readers_per_cpu: int,
    ):
        remote = "://" in path
        short = hashlib.sha256(path.encode()).hexdigest()[:12]
        self.folder = Path(f".{path.rpartition('/')[2]}-{short}.parts" if remote else f"{path}.parts")
        self._work, self._stamp, self._problems = work, stamp, problems
        self._readers_per_cpu = readers_per_cpu

    def path(self, uri: str) -> Path:
        """Of one shard's part."""
        return self.folder / f"{hashlib.sha256(uri.encode()).hexdigest()[:24]}.parquet"

    def make(self, shards: Sequence[str], report: Report, before: int = 0) -> None:
        """Make the parts of these shards, but for those that an interrupted job left and whose shard has not changed.

        Args:
            report: told of ``before`` more shards, which are done already.

        Raises:
            OSError: a part cannot be written; those that are there are kept.
        """
        left = [uri for uri in shards if self.path(uri).is_file()]
        now = dict(zip(left, current_stamps(left), strict=True))
        done, problems = before, 0
        todo = []
        for uri in shards:
            kept = _readable(self.path(uri)) if now.get(uri) is not None else None
            if kept is None or self._stamp(kept, uri) != now[uri]:
                todo.append(uri)
                continue
            done += 1
            problems += self._problems(kept)
        total = before + len(shards)
        report(done, total, _said(problems))
        if not todo:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(self._here(todo) if _little(todo) else self._on_workers(todo)) as made:
            for uri, data in made:
                write_bytes(self.path(uri), data)
                done += 1
                problems += self._problems(pq.read_table(io.BytesIO(data)))
                report(done, total, _said(problems))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _here(self, uris: Sequence[str]) -> Generator[tuple[str, bytes], None, None]:
        for uri in uris:
            yield uri, _part(uri, self._work)

    def _on_workers(self, uris: Sequence[str]) -> Generator[tuple[str, bytes], None, None]:
        """Each shard's part, in any order."""
        with ray_session():
            import ray

            from copernicus.platform.stream import quiet_context

            quiet_context()
            remote = any("://" in uri for uri in uris)
            dataset = ray.data.from_items([{"uri": uri} for uri in uris], override_num_blocks=len(uris)).map_batches(
                functools.partial(_make, work=self._work),
                batch_size=None,
                num_cpus=1 / self._readers_per_cpu if remote else 1,
            )
            for row in dataset.iter_rows():
                yield row["uri"], row["part"]


def _little(uris: Sequence[str]) -> bool:
    """Not worth the start of Ray. What lies in a store is waited for, side by side."""
    if len(uris) > FEW_SHARDS or any("://" in uri for uri in uris):
        return False
    return sum(stamp.size for stamp in current_stamps(uris) if stamp) <= FEW_BYTES


def current_stamps(uris: Sequence[str]) -> list[Stamp | None]:
    """Of the shards as they are now, asked for side by side; None where one cannot be read."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(current_stamp, uris))


def _make(batch: dict[str, Any], work: Callable[[str], pa.Table]) -> dict[str, list[Any]]:
    return {"uri": list(batch["uri"]), "part": [_part(str(uri), work) for uri in batch["uri"]]}


def _part(uri: str, work: Callable[[str], pa.Table]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(work(uri), sink, compression="zstd")
    return sink.getvalue()


def _said(problems: int) -> str:
    return f"{problems} problems" if problems else ""


def _readable(part: Path) -> pa.Table | None:
    """What an interrupted job left; a file that a power failure cut short counts as none."""
    try:
        return pq.read_table(part)
    except (OSError, pa.ArrowException):
        return None
