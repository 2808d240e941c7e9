"""SSH tunnels to the head of a cluster that `ray up` has started: its dashboard and MLflow listen on its loopback only."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from copernicus.datasets.sensors import InputError
from copernicus.platform.cluster_files import PLACEHOLDER, strings

DASHBOARD_PORT = 8265
MLFLOW_PORT = 5000
CONNECT_TIMEOUT_S = 20
LONGEST_PAUSE_S = 15.0


@dataclass(frozen=True)
class Head:
    """How a cluster's head is reached."""

    address: str
    user: str
    key: str | None
    proxy: str | None


def head_of(cluster: Path) -> Head:
    """The head that a `ray up` file names, or that its cloud knows by the cluster's name.

    Raises:
        InputError: the file is no cluster's, has placeholders left, or no head runs.
    """
    try:
        config = yaml.safe_load(cluster.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{cluster}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{cluster}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if unfilled := next((m[0] for _, value in strings(config) if (m := PLACEHOLDER.search(value))), None):
        raise InputError(f"{cluster}: {unfilled} is not filled in; `copernicus check {cluster}` lists what is left")
    provider, auth = (config.get(k) if isinstance(config, dict) else None for k in ("provider", "auth"))
    if not isinstance(provider, dict) or not isinstance(auth, dict) or not auth.get("ssh_user"):
        raise InputError(
            f"{cluster}: is no file for `ray up`: it needs the sections provider and auth, with auth.ssh_user"
        )
    address = provider.get("head_ip")
    if not address:
        address, auth = _ask_cloud(cluster, config)
    key = auth.get("ssh_private_key")
    if key is not None and not Path(key).expanduser().is_file():
        raise InputError(f"{cluster}: auth.ssh_private_key: no such file: {key}")
    return Head(str(address), str(auth["ssh_user"]), key, auth.get("ssh_proxy_command"))


def _ask_cloud(cluster: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The address of the head that runs, and how to log in: Ray makes a key where the file names none."""
    from ray.autoscaler._private.commands import _bootstrap_config, get_head_node_ip

    try:
        return get_head_node_ip(str(cluster)), _bootstrap_config(config)["auth"]
    except Exception as error:  # whatever the cloud's library raises
        raise InputError(f"{cluster}: its head cannot be found ({type(error).__name__}: {error}); is it up?") from None


@contextlib.contextmanager
def open_tunnel(cluster: Path, ports: Mapping[int, int]) -> Iterator[dict[int, int]]:
    """Ports of the head's loopback on this machine's, {port there: port wanted here}; yields {port there: port here}, which
    is another where the wanted one is taken. While open, a connection that breaks is made again.

    Raises:
        InputError: the head cannot be reached.
    """
    tunnel = _Tunnel(
        head_of(cluster), {there: here if _free(here) else _any_free_port() for there, here in ports.items()}
    )
    try:
        tunnel.start()
        yield tunnel.ports
    finally:
        tunnel.close()


class _Tunnel:
    def __init__(self, head: Head, ports: dict[int, int]):
        self.head = head
        self.ports = ports
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._watch = threading.Thread(target=self._keep_up, name="ssh tunnel", daemon=True)

    def start(self) -> None:
        self._launch()
        deadline = time.monotonic() + CONNECT_TIMEOUT_S + 10
        while not all(_answers(port) for port in self.ports.values()):
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise InputError(f"no SSH connection to {self.head.user}@{self.head.address}: {self._said()}")
            time.sleep(0.05)
        self._watch.start()

    def close(self) -> None:
        self._closing.set()
        self._end()
        if self._watch.is_alive():
            self._watch.join()
        self._end()  # one that the thread had just launched
        self._errors.close()

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _launch(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        known_hosts().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # In a session of its own, Ctrl-C does not reach it; when this process ends, however it does, so does the pipe to
        # `cat` on the head, and with it the connection.
        self._process = subprocess.Popen(
            ssh_command(self.head, self.ports),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )

    def _keep_up(self) -> None:
        pause = 0.5
        while not self._closing.is_set():
            assert self._process is not None
            began = time.monotonic()
            self._process.wait()
            if self._closing.wait(pause):
                return
            self._end()
            pause = 0.5 if time.monotonic() - began > 60 else min(2 * pause, LONGEST_PAUSE_S)
            self._launch()

    def _said(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"no answer in {CONNECT_TIMEOUT_S} s"


def ssh_command(head: Head, ports: dict[int, int]) -> list[str]:
    """The ssh that forwards {port on the head: port here}."""
    options = {
        "BatchMode": "yes",  # nobody is there to type
        "ConnectTimeout": str(CONNECT_TIMEOUT_S),
        "ControlMaster": "no",
        "ControlPath": "none",
        "ExitOnForwardFailure": "yes",
        "ServerAliveCountMax": "3",
        "ServerAliveInterval": "10",
        # A new machine's key is kept, a changed one is refused: the token goes this way.
        "StrictHostKeyChecking": "accept-new",
        "UserKnownHostsFile": f'"{known_hosts()}"',
    }
    command = ["ssh", "-T"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    if head.key is not None:
        command += ["-o", "IdentitiesOnly=yes", "-i", str(Path(head.key).expanduser())]
    if head.proxy is not None:
        command += ["-o", f"ProxyCommand={head.proxy}"]
    for there, here in ports.items():
        command += ["-L", f"127.0.0.1:{here}:127.0.0.1:{there}"]
    return [*command, f"{head.user}@{head.address}", "cat"]


def known_hosts() -> Path:
    return Path.home() / ".ssh" / "known_hosts"


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _any_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
