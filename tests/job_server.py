"""A job server that speaks Ray's HTTP interface on a real socket and loses connections when told to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from aiohttp import web


@dataclass
class FakeJobs:
    """What the server knows; tests change it while it runs."""

    token: str | None = None
    ray_version: str = field(default_factory=lambda: version("ray"))
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    drops: list[int] = field(default_factory=list)
    """Characters after which each of the next connections to a log's tail is cut."""
    lose_answers: int = 0
    """How many submissions are taken without an answer."""
    broken_logs: bool = False
    stands_still: bool = False
    """Tails send nothing more and stay open."""
    ends_when_stopped: bool = True

    def add(self, name: str, status: str = "RUNNING", log: str = "", code: int | None = None, **more: Any) -> None:
        self.logs[name] = log
        self.jobs[name] = {
            "submission_id": name, "type": "SUBMISSION", "status": status, "driver_exit_code": code, "message": None,
            "start_time": 1_700_000_000_000 + len(self.jobs), "end_time": None, "metadata": {}, **more,
        }  # fmt: skip

    def end(self, name: str, status: str = "SUCCEEDED", code: int | None = 0) -> None:
        self.jobs[name] |= {"status": status, "driver_exit_code": code, "end_time": 1_700_000_060_000}


class Server:
    def __init__(self, state: FakeJobs, port: int = 0):
        self.state, self.port = state, port
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _start(self) -> None:
        app = web.Application(middlewares=[self._door], client_max_size=2**28)
        app.add_routes(
            [
                web.get("/api/version", self._version),
                web.get("/api/jobs/", self._list),
                web.post("/api/jobs/", self._submit),
                web.get("/api/jobs/{name}", self._job),
                web.get("/api/jobs/{name}/logs", self._logs),
                web.get("/api/jobs/{name}/logs/tail", self._tail),
                web.post("/api/jobs/{name}/stop", self._stop),
                web.get("/api/packages/{protocol}/{package}", self._package),
                web.put("/api/packages/{protocol}/{package}", self._upload),
            ]
        )
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

    async def _end(self) -> None:
        await self.runner.cleanup()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    @web.middleware
    async def _door(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.state.requests.append((request.method, request.path))
        given = request.headers.get("Authorization")
        self.state.authorizations.append(given)
        if self.state.token is not None and given != f"Bearer {self.state.token}":
            return web.Response(status=403 if given else 401, text="Unauthorized")
        if "name" in request.match_info and request.match_info["name"] not in self.state.jobs:
            return web.Response(status=404, text="no such job")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": self.state.ray_version})

    async def _list(self, request: web.Request) -> web.Response:
        driver = {"submission_id": None, "type": "DRIVER", "status": "RUNNING"}
        return web.json_response([*self.state.jobs.values(), driver])

    async def _submit(self, request: web.Request) -> web.Response:
        asked = await request.json()
        name = asked["submission_id"]
        if name in self.state.jobs:
            return web.Response(
                status=500, text=f"Traceback\nValueError: Job with submission_id {name} already exists."
            )
        self.state.add(name, entrypoint=asked["entrypoint"], runtime_env=asked["runtime_env"])
        self.state.jobs[name]["metadata"] = asked["metadata"]
        if self.state.lose_answers:
            self.state.lose_answers -= 1
            request.transport.abort()  # type: ignore[union-attr]
        return web.json_response({"submission_id": name})

    async def _job(self, request: web.Request) -> web.Response:
        return web.json_response(self.state.jobs[request.match_info["name"]])

    async def _logs(self, request: web.Request) -> web.Response:
        if self.state.broken_logs:
            return web.Response(status=500, text="UnicodeDecodeError: invalid start byte")
        return web.json_response({"logs": self.state.logs[request.match_info["name"]]})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        name = request.match_info["name"]
        most = self.state.drops.pop(0) if self.state.drops else None
        sent = 0
        while True:
            ended = self.state.jobs[name]["status"] not in ("PENDING", "RUNNING")
            while self.state.stands_still:
                await asyncio.sleep(0.02)
            # As Ray does: whole lines, ten at a time; never an answer to a ping.
            for piece in re.findall(r"(?:[^\n]*\n){1,10}|[^\n]+$", self.state.logs[name][sent:]):
                text = piece if most is None else piece[: most - sent]
                await socket.send_str(text)
                sent += len(text)
                if most is not None and sent >= most:
                    request.transport.abort()  # type: ignore[union-attr]
                    return socket
            if ended:
                return socket
            await asyncio.sleep(0.01)

    async def _stop(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        running = self.state.jobs[name]["status"] == "RUNNING"
        if running and self.state.ends_when_stopped:
            self.state.end(name, "STOPPED", None)
        return web.json_response({"stopped": running})

    async def _package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["package"] in self.state.packages else 404)

    async def _upload(self, request: web.Request) -> web.Response:
        name, content = request.match_info["package"], await request.read()
        assert name == f"_ray_pkg_{hashlib.sha1(content).hexdigest()}.zip"
        self.state.packages[name] = content
        self.state.uploads.append(name)
        return web.Response()


@contextlib.contextmanager
def job_server(state: FakeJobs, port: int = 0) -> Iterator[Server]:
    server = Server(state, port)
    try:
        yield server
    finally:
        server.close()
