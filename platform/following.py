"""Follows a job's log through whatever happens to the connection: every line once, in order, until the job ends."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any

from copernicus.platform.cluster import ENDED, JobServer, JobServerLost

QUIET_S = 30.0
"""So long without a line, the server is asked whether the job still runs."""
PATIENCE_S = 600.0
"""How long a server may be out of reach."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
END_TRIES = 3
"""How often the whole log of a job that has ended is asked for."""
RAY_S_OWN = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+INFO job_manager\.py:\d+ -- |Running entrypoint for job ")


class Lines:
    """Text in pieces -> whole lines, without those that Ray's job server adds."""

    def __init__(self, write: Callable[[str], None]):
        self._write = write
        self._rest = ""

    def add(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        shown = [line for line in lines if not RAY_S_OWN.match(line)]
        if shown:
            self._write("".join(f"{line}\n" for line in shown))

    def close(self) -> None:
        if self._rest:
            self.add("\n")


def follow(
    server: JobServer,
    name: str,
    write: Callable[[str], None],
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Hand the job's log to ``write`` as it grows; returns what the server knows of the job, once it has ended.

    A server sends a log from its beginning: after a break, what was shown already is passed over. ``notice`` hears of
    breaks.

    Raises:
        JobServerLost: the server was out of reach for longer than `PATIENCE_S`; the job may go on.
        JobUnknown: it does not know the job, or no longer.
    """
    return asyncio.run(_Follower(server, name, Lines(write), notice).run())


class _Follower:
    def __init__(self, server: JobServer, name: str, lines: Lines, notice: Callable[[str], None]):
        self.server, self.name, self.lines, self.notice = server, name, lines, notice
        self.shown = 0  # characters
        self.lost_since: float | None = None
        self.noticed = False
        self.pause = FIRST_PAUSE_S

    async def run(self) -> dict[str, Any]:
        failures = 0
        while True:
            ended = await self._listen()
            try:
                if ended is None:
                    job = await asyncio.to_thread(self.server.job, self.name)
                    ended = job if job["status"] in ENDED else None
                if ended is not None:
                    self._show(await asyncio.to_thread(self.server.log, self.name))  # whatever the tail had not sent
                    self.lines.close()
                    return ended
                self._found()
            except JobServerLost as error:
                failures += ended is not None
                if failures == END_TRIES and ended is not None:
                    self.notice(f"the log's end is missing ({error})")
                    self.lines.close()
                    return ended
                self._lost(error)
            await asyncio.sleep(self.pause)
            self.pause = min(2 * self.pause, LONGEST_PAUSE_S)

    async def _listen(self) -> dict[str, Any] | None:
        """Shows the log until the connection breaks or the server closes it; the job, where it has turned out to have
        ended meanwhile."""
        import aiohttp

        seen = 0
        try:
            async for text in self.server.tail(self.name, QUIET_S):
                if not text:
                    job = await asyncio.to_thread(self.server.job, self.name)
                    if job["status"] in ENDED:
                        return job
                self._show(text, seen)
                seen += len(text)
                self._found()
                self.pause = FIRST_PAUSE_S
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError, JobServerLost):
            pass  # asked again, and said if that fails too
        return None

    def _show(self, text: str, at: int = 0) -> None:
        """Shows what of the text, which begins at that character of the log, was not shown before."""
        new = text[max(0, self.shown - at) :]
        if new:
            self.shown += len(new)
            self.lines.add(new)

    def _lost(self, error: JobServerLost) -> None:
        now = time.monotonic()
        if self.lost_since is None:
            self.lost_since = now  # not worth a word yet
        elif now - self.lost_since > PATIENCE_S:
            raise JobServerLost(f"out of reach for {PATIENCE_S:.0f} s ({error})") from None
        elif not self.noticed:
            self.noticed = True
            self.notice(f"the job server is out of reach ({error}); trying again for {PATIENCE_S:.0f} s")

    def _found(self) -> None:
        if self.noticed:
            self.notice("connected again")
        self.lost_since, self.noticed = None, False
