"""Jobs on a remote cluster: everything that speaks to Ray's job server, over its HTTP interface.

A job runs ``copernicus run`` on the cluster's head, in the shared folder that COPERNICUS_STORAGE names there, with the
client's YAML and the client's own package (`shipping.py`). Nothing secret travels: the job's settings are plain text in
the dashboard.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from copernicus.datasets.sensors import InputError
from copernicus.platform.cluster_files import LOOPBACK, installed_ray
from copernicus.platform.secrets import scrub
from copernicus.platform.shipping import EXPERIMENT, Parcel
from copernicus.platform.tracking import mask

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0
STOP_GRACE_S = 30
"""How long a job that is stopped may take to end its MLflow run and close its files."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class JobServerLost(Exception):
    """The job server does not answer, or not sensibly; the same call may succeed later."""


class JobUnknown(InputError):
    """The job server knows no job of that name."""


class JobServer:
    """Ray's job server at ``address`` (http:// or https://), with the cluster's token where it asks for one.

    Raises:
        InputError: nothing answers there, it is no job server, its Ray is another version, or it refuses the token.
    """

    def __init__(self, address: str):
        import requests

        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"address {mask(address)!r}: give the job server's, as in {DEFAULT_ADDRESS}")
        if parts.password:
            raise InputError("address: holds a password; the cluster's token comes from RAY_AUTH_TOKEN or a file")
        self.local = parts.hostname in LOOPBACK
        self.headers: dict[str, str] = {}
        self._session = requests.Session()
        self._session.trust_env = not self.local  # a proxy leads away from this machine
        # Set here: a .netrc would replace the header.
        self._session.auth = self._sign
        self._check()

    def _sign(self, request: Any) -> Any:
        request.headers.update(self.headers)
        return request

    def _check(self) -> None:
        try:
            answer = self._ask("GET", "/api/version")
            if answer.status_code in (401, 403):
                token, source = find_token()
                if token is None:
                    raise InputError(
                        f"{self.address} asks for a token: {source}; `ray get-auth-token` on the head prints the cluster's"
                    )
                self.headers = {"Authorization": f"Bearer {token}"}
                answer = self._ask("GET", "/api/version")
                if answer.status_code in (401, 403):
                    raise InputError(
                        f"{self.address} refuses the token of {source}: it is another cluster's; `ray get-auth-token` on "
                        "the head prints this one's"
                    )
        except JobServerLost as error:
            raise InputError(
                f"no Ray job server answers at {self.address} ({error}); give --cluster CLUSTER.yaml for one that `ray up` "
                "has started, or --address"
            ) from None
        try:
            theirs = answer.json()["ray_version"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"what answers at {self.address} is no Ray job server; give --address or --cluster"
            ) from None
        ours = installed_ray()
        if theirs.split(".")[:2] != ours.split(".")[:2]:
            raise InputError(
                f"the cluster at {self.address} runs Ray {theirs}, this copernicus works with Ray {ours}; install the same "
                "on the cluster"
            )

    def _ask(self, method: str, path: str, timeout: float = TIMEOUT_S, **arguments: Any) -> Any:
        import requests

        try:
            answer = self._session.request(method, self.address + path, timeout=timeout, **arguments)
        except requests.RequestException as error:
            raise JobServerLost(_reason(error)) from None
        if answer.status_code >= 500:
            raise JobServerLost(f"it answers {answer.status_code}: {_last_line(answer.text)}")
        return answer

    def _json(self, answer: Any, what: str) -> Any:
        if answer.status_code == 404:
            raise JobUnknown(f"no job {what} on {self.address}; `copernicus jobs` lists them")
        if answer.status_code in (401, 403):
            raise InputError(f"{self.address} refuses the token; was the cluster's changed?")
        if answer.status_code != 200:
            raise InputError(f"{self.address} refuses {what}: {answer.status_code} {_last_line(answer.text)}")
        try:
            return answer.json()
        except ValueError:
            raise JobServerLost("its answer is no JSON") from None

    def jobs(self) -> list[dict[str, Any]]:
        """All submitted jobs, the latest first."""
        found = self._json(self._ask("GET", "/api/jobs/"), "to list jobs")
        submitted = [job for job in found if job.get("submission_id")]
        return sorted(submitted, key=lambda job: job.get("start_time") or 0, reverse=True)

    def job(self, name: str) -> dict[str, Any]:
        return self._json(self._ask("GET", f"/api/jobs/{quote(name, safe='')}"), name)

    def log(self, name: str) -> str:
        """The job's whole log so far."""
        return self._json(self._ask("GET", f"/api/jobs/{quote(name, safe='')}/logs"), name)["logs"] or ""

    async def tail(self, name: str, quiet: float) -> AsyncIterator[str]:
        """The job's log from its beginning, as it grows, until the job ends or the connection breaks; an empty text
        whenever nothing has come for ``quiet`` seconds.

        The server does not answer a websocket's pings while it sends: a peer that is gone is found by TCP's keepalive, a
        server that stands still by the caller, who asks it something else.
        """
        import asyncio

        import aiohttp

        url = f"{self.address}/api/jobs/{quote(name, safe='')}/logs/tail"
        async with (
            aiohttp.ClientSession(trust_env=not self.local) as session,
            session.ws_connect(url, headers=self.headers, max_msg_size=0) as socket,
        ):
            _keep_alive(socket.get_extra_info("socket"))
            while True:
                try:
                    message = await socket.receive(timeout=quiet)
                except asyncio.TimeoutError:
                    yield ""
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    break
                yield message.data

    def stop(self, name: str) -> bool:
        """Ask a job to end; whether it ran."""
        return self._json(self._ask("POST", f"/api/jobs/{quote(name, safe='')}/stop"), name)["stopped"]

    def upload(self, parcel: Parcel) -> bool:
        """Make sure that the server has the parcel; whether it had to be sent."""
        path = "/api/packages/" + parcel.uri.replace("://", "/")
        if self._ask("GET", path).status_code == 200:
            return False
        answer = self._ask("PUT", path, timeout=UPLOAD_TIMEOUT_S, data=parcel.content)
        if answer.status_code != 200:
            raise InputError(f"{self.address} refuses the upload: {answer.status_code} {_last_line(answer.text)}")
        return True

    def submit(self, name: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Start a job under that name.

        Raises:
            InputError: a job of that name is there, or the server refuses it.
            JobServerLost: no answer, and the job is not there either.
        """
        request = {
            "submission_id": name, "entrypoint": entrypoint, "runtime_env": runtime_env, "metadata": metadata,
        }  # fmt: skip
        try:
            answer = self._ask("POST", "/api/jobs/", json=request)
        except JobServerLost as error:
            # The answer may be lost and the job there. One of the same name made by others has other metadata.
            try:
                found = self.job(name)
            except JobUnknown:
                raise error from None
            if found.get("metadata") != metadata or found.get("entrypoint") != entrypoint:
                raise InputError(f"a job {name} is there already; submit again") from None
            return
        self._json(answer, f"the job {name}")


def token_place() -> Path:
    """The file in which Ray looks for the cluster's token."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(named) if named else Path.home() / ".ray" / "auth_token"


def find_token() -> tuple[str | None, str]:
    """The cluster's token from where Ray looks for it, and the name of that place; or None, and what to do.

    Raises:
        InputError: what is there cannot be read, or is no token.
    """
    source = "RAY_AUTH_TOKEN"
    token = os.environ.get(source, "").strip()
    if not token:
        path = token_place()
        source = str(path)
        try:
            token = path.read_text().strip()
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or "is not text"
            raise InputError(f"{path}: cannot read the cluster's token: {what}") from None
    if not token:
        return None, f"put it into {source} (mode 600), or set RAY_AUTH_TOKEN"
    # It goes into a header: what cannot would end in a traceback that shows the token.
    if not re.fullmatch("[!-~]+", token):
        raise InputError(
            f"{source}: is no token: one word of ASCII; `ray get-auth-token` on the head prints the cluster's"
        )
    return token, source


@contextlib.contextmanager
def connect(address: str | None, cluster: Path | None) -> Iterator[JobServer]:
    """The job server of a `ray up` file's head, through an SSH tunnel; else the one at an address.

    Raises:
        InputError: it cannot be reached, or both are given.
    """
    if cluster is None:
        yield JobServer(address or default_address())
        return
    if address is not None:
        raise InputError("give --cluster or --address, not both")
    from copernicus.platform.tunnel import DASHBOARD_PORT, MLFLOW_PORT, open_tunnel

    with open_tunnel(cluster, {port: port for port in (DASHBOARD_PORT, MLFLOW_PORT)}) as ports:
        yield JobServer(f"http://127.0.0.1:{ports[DASHBOARD_PORT]}")


def default_address() -> str:
    """As for Ray's own commands: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS where it is a URL, else loopback."""
    if named := os.environ.get("RAY_API_SERVER_ADDRESS"):
        return named
    named = os.environ.get("RAY_ADDRESS", "")
    return named if named.startswith(("http://", "https://")) else DEFAULT_ADDRESS


def entrypoint(overrides: Sequence[str], fresh: bool = False) -> str:
    """The shell command of a job. It starts in the folder that holds what was shipped, and runs in the shared one."""
    unset = (
        "error: COPERNICUS_STORAGE is not set on the cluster's head: start Ray there with it, the absolute path of a folder "
        "that all nodes share; or submit with --storage FOLDER"
    )
    missing = "error: the head has no folder $COPERNICUS_STORAGE (COPERNICUS_STORAGE, or --storage)"
    arguments = [*(["--fresh"] if fresh else []), *overrides]
    return "; ".join(
        [
            "JOB=$PWD",
            f'[ -n "$COPERNICUS_STORAGE" ] || {{ echo {shlex.quote(unset)}; exit 2; }}',
            f'cd "$COPERNICUS_STORAGE" 2>/dev/null || {{ echo "{missing}"; exit 2; }}',
            'echo "In $PWD on $(hostname)"',
            # Whatever lies in the shared folder is no module.
            "export PYTHONSAFEPATH=1",
            f'exec python -m copernicus.platform.cli run "$JOB/{EXPERIMENT}" {shlex.join(arguments)}'.rstrip(),
        ]
    )


def exit_code(job: Mapping[str, Any]) -> int:
    """Of an ended job: its driver's; 130 when it was stopped; 1 when it was killed or never began."""
    if job["status"] == "SUCCEEDED":
        return 0
    if job["status"] == "STOPPED":
        return 130
    code = job.get("driver_exit_code")
    return code if isinstance(code, int) and 0 < code < 256 else 1


def how_it_ended(job: Mapping[str, Any]) -> str:
    """One line for people, about a job that has ended."""
    name, status = job["submission_id"], job["status"]
    if status == "SUCCEEDED":
        return f"Job {name} is done."
    if status == "STOPPED":
        return f"Job {name} was stopped. Submit the same experiment again: it goes on where it stopped."
    code = job.get("driver_exit_code")
    if code is None:  # it never ran, or its supervisor died with it: Ray's message says which
        return f"Job {name} failed: {scrub(_last_line(job.get('message') or 'no message'))}"
    if code < 0:
        return f"Job {name} was killed (signal {-code}). Submit the same experiment again: it goes on where it stopped."
    return f"Job {name} ended with exit code {code}."


def _keep_alive(connection: Any) -> None:
    import socket

    if connection is None:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):  # macOS names the first differently, and has two hours for it
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _last_line(text: str) -> str:
    """The line of a message or traceback that says what is wrong, not endless."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return mask(lines[-1] if lines else "no message")[:300]


def _reason(error: Exception) -> str:
    """A connection's failure in a few words."""
    text = str(error)
    if "timed out" in text.lower():
        return "no answer in time"
    found = re.search(r"Connection refused|Name or service not known|No route to host|Network is unreachable", text)
    return found[0].lower() if found else mask(type(error).__name__)
