"""A worker that makes no step for too long writes its stacks down and ends, so that its attempt is repeated.

A collective waits for ever where one rank is stuck, and nothing says which. Here each rank watches its own steps. Where
one is stuck none of them steps, so all write their stacks at about the same time, and those in the collective tell
apart who waits from who is waited for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

EXIT_CODE = 86
"""Of a worker that ended because nothing moved."""

FRAMES = 4
"""Of a stack in a summary, innermost first."""

_HEADER = re.compile(r"rank (\d+) of (\d+) on (\S+), process (\d+), training thread 0x([0-9a-f]+), limit ([\d.]+) s")
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')


class HangWatch:
    """Watches the thread that enters it; `progress` says that it moves.

    After ``seconds`` without progress the stacks of all threads go to ``folder/stacks/<attempt>-rank<rank>.txt`` and to
    stderr, a summary goes to ``tell``, and ``grace_s`` later, in which the other ranks do the same, the process exits
    with `EXIT_CODE`. If it moves within the grace after all, it goes on. Code that holds the interpreter's lock stops
    Python's threads, this watch among them: then a thread of C in faulthandler writes the stacks and exits with 1.

    Args:
        folder: seen by the driver: the experiment's folder.
        attempt: one name for all ranks of an attempt, which later attempts do not have.
        tell: called on a thread of its own, for it may hang like everything else.
    """

    def __init__(
        self,
        seconds: float,
        folder: Path,
        attempt: str,
        rank: int,
        world_size: int,
        tell: Callable[[str], Any] = lambda text: None,
        grace_s: float = 20.0,
    ):
        self.seconds, self.rank, self.world_size, self.tell, self.grace_s = seconds, rank, world_size, tell, grace_s
        self.path = folder / "stacks" / f"{attempt}-rank{rank}.txt"
        self._dumped = False
        self._moved = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="HangWatch", daemon=True)

    def progress(self) -> None:
        """To be called at every step, and between the parts of whatever may take longer than ``seconds``."""
        self._moved = time.monotonic()

    def __enter__(self) -> HangWatch:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._header = (
            f"rank {self.rank} of {self.world_size} on {socket.gethostname()}, process {os.getpid()}, "
            f"training thread 0x{threading.get_ident():x}, limit {self.seconds:g} s\n"
        )
        for path in self.path.parent.glob(f"*-rank{self.rank}.txt"):  # of workers that were killed
            with contextlib.suppress(OSError):
                if not _THREAD.search(path.read_text(errors="replace")):
                    path.unlink()
        # Opened now: when it is needed, no Python may run. To append: two may write.
        self._file: BinaryIO = open(self.path, "ab", buffering=0)
        self._file.write(self._header.encode())
        self._moved = time.monotonic()
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if not self._dumped:
            self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still in it
                self.path.parent.rmdir()

    def _arm(self) -> None:
        """For as long as this thread lives, C's alarm is put off; half of the grace later than ours, so that the others
        have written theirs by then and are still there."""
        faulthandler.dump_traceback_later(self.seconds + self.grace_s / 2, file=self._file, exit=True)

    def _watch(self) -> None:
        tick = min(self.seconds / 4, 5.0)
        while not self._stop.wait(tick):
            self._arm()
            if time.monotonic() - self._moved > self.seconds:
                self._hung(tick)

    def _hung(self, tick: float) -> None:
        before, since = self._moved, time.monotonic()
        stacks = _stacks()
        sys.stderr.write(f"no step for {_spell(self.seconds)}\n{self._header}{stacks}")
        sys.stderr.flush()
        where = innermost(self._header + stacks)
        summary = f"rank {self.rank} on {socket.gethostname()}: no step for {_spell(self.seconds)}; in {where}"
        _on_a_thread(partial(self.tell, summary))
        _on_a_thread(partial(self._file.write, stacks.encode()))  # the shared storage may be what hangs
        self._dumped = True
        while not self._stop.wait(min(tick, 0.5)):
            self._arm()
            if self._moved != before:
                note = f"rank {self.rank} moves again after {_spell(self._moved - before)} and goes on"
                sys.stderr.write(note + "\n")
                _on_a_thread(partial(self.tell, note))
                self._file.truncate(len(self._header.encode()))  # no hang, so no report of one
                self._dumped = False
                return
            if time.monotonic() - since > self.grace_s:
                sys.stderr.write(f"rank {self.rank} ends, so that the attempt is repeated from the last checkpoint\n")
                sys.stderr.flush()
                os._exit(EXIT_CODE)  # the stuck thread would keep sys.exit waiting


class HangReports:
    """Reads what hung attempts left under ``folder``; every attempt is told once, by the object that is asked.

    Those that are there when it is made are of earlier runs, and are not told.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "stacks"
        self.seen = {attempt for attempt, _ in self._attempts()}

    def __call__(self) -> str | None:
        """A few lines about new ones, or None."""
        reports = []
        for attempt, texts in self._attempts():
            if attempt not in self.seen:
                self.seen.add(attempt)
                reports.append(hang_report(self.folder / f"{attempt}-rank*.txt", texts))
        return "\n".join(reports) or None

    def _attempts(self) -> Iterator[tuple[str, list[str]]]:
        """Names of attempts of which stacks are there, and those stacks by rank."""
        found: dict[str, dict[int, str]] = {}
        for path in self.folder.glob("*-rank*.txt"):
            attempt, rank = path.stem.rsplit("-rank", 1)
            text = ""
            with contextlib.suppress(OSError):  # gone meanwhile: its worker ended well
                text = path.read_text(errors="replace")
            if _THREAD.search(text):  # a header alone: that worker was killed, or runs
                found.setdefault(attempt, {})[int(rank)] = text
        for attempt in sorted(found):
            yield attempt, [found[attempt][rank] for rank in sorted(found[attempt])]


def hang_report(where: Path, texts: list[str]) -> str:
    """What the driver prints of an attempt whose workers left ``texts`` (the stack files' contents)."""
    headers = [match for text in texts if (match := _HEADER.match(text))]
    limit, world_size = (_spell(float(headers[0][6])), headers[0][2]) if headers else ("long", "?")
    lines = [
        f"no step for {limit} on {len(texts)} of {world_size} workers; their stacks are in {where}; "
        "the attempt was ended and goes on from the last checkpoint"
    ]
    lines += [f"  rank {header[1]} on {header[3]}: {innermost(header.string)}" for header in headers]
    return "\n".join(lines)


def innermost(stacks: str, frames: int = FRAMES) -> str:
    """The innermost frames of the training thread in a stack file, as ``function (file:line) < caller (file:line)``."""
    header = _HEADER.match(stacks)
    wanted = int(header[5], 16) if header else None
    found: dict[int, list[str]] = {}
    current: list[str] = []
    for line in stacks.splitlines():
        if match := _THREAD.match(line):
            current = found[int(match[1], 16)] = []
        elif match := _FRAME.match(line):
            current.append(f"{match[3]} ({Path(match[1]).name}:{match[2]})")
    chosen = found.get(wanted) if wanted is not None else None
    return " < ".join((chosen or [])[:frames]) or "no Python code"


def _stacks() -> str:
    """Of all threads. Through a local file: faulthandler writes while it holds the interpreter's lock."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _on_a_thread(act: Callable[[], Any]) -> None:
    """Waits for nothing: it may hang too, and has until this process ends."""

    def run() -> None:
        try:
            act()
        except Exception as error:
            sys.stderr.write(f"HangWatch: {type(error).__name__}: {error}\n")

    threading.Thread(target=run, daemon=True).start()


def _spell(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.3g} s"
