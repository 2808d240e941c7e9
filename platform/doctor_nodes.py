"""What `copernicus doctor` finds out on a node of the cluster: plain facts, which `doctor_checks.py` judges.

Facts are dicts of plain values, so that nodes with another version of the package can still tell theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from copernicus.platform.cluster import token_place

PACKAGES = ("ray", "torch", "mlflow", "numpy", "pyarrow")
GPU_TIMEOUT_S = 60.0
HTTP_TIMEOUT_S = 5.0
LISTENING = "0A"
"""The state in ``/proc/net/tcp`` of a socket that takes connections (Linux, ``include/net/tcp_states.h``)."""

GPU_QUESTION = """
import ctypes, json, torch
driver = ctypes.c_int(0)
try:
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
except OSError:
    pass
seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
names = [torch.cuda.get_device_name(i) for i in range(seen)]
print(json.dumps({"seen": seen, "names": names, "built": torch.version.cuda or torch.version.hip, "driver": driver.value}))
"""
"""Asked in a process of its own: a driver that hangs then hangs nobody else. ``driver``: 1000 x major + 10 x minor of the
newest CUDA that it runs (CUDA driver API, ``cuDriverGetVersion``)."""


class Probe:
    """The doctor's actor on a node. It takes no CPU, so that it also runs on a busy one."""

    def facts(self) -> dict[str, Any]:
        return node_facts()

    def disk(self, path: str) -> dict[str, Any]:
        """Apart from the other facts: a network file system whose server is gone answers never."""
        return disk(path)

    def now(self) -> float:
        """Seconds since 1970 by this node's clock."""
        return time.time()

    def unreadable(self, uris: list[str]) -> list[str]:
        """For each place what keeps this node from reading it; empty: nothing."""
        return [why_unreadable(uri) for uri in uris]


def node_facts() -> dict[str, Any]:
    """Facts about this node, as a process that Ray started sees it."""
    session, spill = _ray_folders()
    return {
        "versions": versions(),
        "listening": listening(),
        "disks": {
            name: disk(path)
            for name, path in (("Ray's session", session), ("spilled objects", spill if spill != session else None))
            if path is not None
        },
        "shared memory": disk("/dev/shm") if os.path.isdir("/dev/shm") else None,
        "open files": open_files(),
        "gpus": gpus(),
        "token file": token_file(),
        "pod": "KUBERNETES_SERVICE_HOST" in os.environ,
    }


def versions() -> dict[str, str]:
    """Name -> version of what must match; a package that is not there is ``missing``."""
    found = {"python": platform.python_version(), "copernicus": own_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def own_version() -> str:
    """Eight hex digits of this package's source: a checkout's version number stays while its code changes."""
    import copernicus.datasets
    import copernicus.models
    import copernicus.platform

    digest = hashlib.sha256()
    for package in (copernicus.platform, copernicus.models, copernicus.datasets):
        root = Path(package.__path__[0])
        files = {file.relative_to(root).as_posix(): file for file in root.rglob("*.py")}
        for name in sorted(files):
            if not name.startswith("_package/"):  # a checkout keeps the package's root there, a wheel one level up
                digest.update(f"{package.__name__}/{name}\0".encode() + files[name].read_bytes())
    return digest.hexdigest()[:8]


def listening(folder: Path = Path("/proc/net")) -> list[tuple[str, int]] | None:
    """(address, port) of every TCP socket of this host that takes connections; None where the system does not say."""
    found: list[tuple[str, int]] = []
    tables = [folder / name for name in ("tcp", "tcp6") if (folder / name).exists()]
    if not tables:
        return None
    for table in tables:
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == LISTENING:
                address, port = local.split(":")
                found.append((_address(address), int(port, 16)))
    return found


def _address(digits: str) -> str:
    """``0100007F`` -> ``127.0.0.1``: words of 32 bits, each in the machine's byte order."""
    words = (int(digits[i : i + 8], 16) for i in range(0, len(digits), 8))
    address = ipaddress.ip_address(b"".join(struct.pack("=I", word) for word in words))
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(address)


def disk(path: str) -> dict[str, Any]:
    """Bytes ``total`` and ``free`` of the disk that holds ``path``, and ``fault``: what keeps us from writing there."""
    facts: dict[str, Any] = {"path": path, "total": 0, "free": 0, "fault": ""}
    try:
        facts |= {"total": shutil.disk_usage(path).total, "free": shutil.disk_usage(path).free}
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"copernicus doctor")
            file.flush()
    except OSError as error:
        facts["fault"] = error.strerror or str(error)
    return facts


def existing(folder: str) -> str:
    """The folder, or the nearest above it that exists: looking must make none."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def open_files() -> int:
    """How many files a process may have open (``ulimit -n``)."""
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def gpus(question: str = GPU_QUESTION, seconds: float = GPU_TIMEOUT_S) -> dict[str, Any]:
    """``device``: whether the system shows one. Then also what torch sees (``seen``, ``names``), the CUDA version that it
    was ``built`` for and the newest that the ``driver`` runs; or ``fault``."""
    if not _shows_gpu():
        return {"device": False}
    environment = dict(os.environ)
    if environment.get("CUDA_VISIBLE_DEVICES") == "":  # Ray hides them from whoever takes none
        del environment["CUDA_VISIBLE_DEVICES"]
    try:
        asked = subprocess.run(
            [sys.executable, "-c", question], capture_output=True, text=True, timeout=seconds, env=environment
        )
        return {"device": True} | json.loads(asked.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"device": True, "fault": f"torch did not answer for {seconds:g} s"}
    except (OSError, ValueError, IndexError):
        said = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        return {"device": True, "fault": f"torch fails: {said[:200]}"}


def _shows_gpu() -> bool:
    # NVIDIA's, AMD's and (under Windows) WSL's devices.
    return any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd", "/dev/dxg"))


def token_file(path: Path | None = None) -> dict[str, Any] | None:
    """``mode`` of the token's file, and whether another user of this host can read it (``exposed``: also the folders above
    let him pass). None: there is no file."""
    path = path or token_place()
    try:
        mode = path.stat().st_mode & 0o777
    except OSError:
        return None
    passable = all(folder.stat().st_mode & 0o011 for folder in path.absolute().parents)
    return {"path": str(path), "mode": mode, "exposed": bool(mode & 0o066) and passable}


def why_unreadable(uri: str) -> str:
    """What keeps this process from reading a file (its first block) or a folder (its listing); empty: nothing. A shard
    must begin as a tar."""
    from copernicus.datasets import stores
    from copernicus.datasets.sensors import InputError
    from copernicus.datasets.storage import StoreError, local_path, open_file

    try:
        if not stores.scheme_of(uri) and os.path.isdir(path := local_path(uri)):
            return "" if os.listdir(path) else "the folder is empty"
        size = open_file(uri).stamp().size
        head = open_file(uri).read(0, min(size, 512))
    except FileNotFoundError:
        return "it does not exist"
    except (OSError, StoreError, InputError) as error:
        return str(getattr(error, "strerror", None) or error)[:300]
    if uri.partition("?")[0].endswith(".tar") and head[257:262] != b"ustar":
        return "it does not begin as a tar"
    return ""


def unauthenticated(url: str, seconds: float = HTTP_TIMEOUT_S) -> int:
    """The status that a request without a token gets.

    Raises:
        OSError: nothing answers.
    """
    return _answer(url, seconds)[0]


def answer_date(url: str, seconds: float = HTTP_TIMEOUT_S) -> float:
    """When a server answered, by its own clock: whole seconds since 1970.

    Raises:
        OSError: nothing answers.
        ValueError: it does not say.
    """
    date = _answer(url, seconds)[1]
    if date is None:
        raise ValueError("no Date in its answer")
    return parsedate_to_datetime(date).timestamp()


def _answer(url: str, seconds: float) -> tuple[int, str | None]:
    """Status and Date of the answer to a request without a token."""
    import urllib.error
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=seconds) as answer:
            return answer.status, answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Date")


def _ray_folders() -> tuple[str | None, str | None]:
    """The session's folder on this node, and that for objects that do not fit the memory (None: not a folder)."""
    import ray._private.worker as worker

    node: Any = worker.global_worker.node
    if node is None:
        return None, None
    spill = None
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        config = json.loads(node._object_spilling_config)
        if config["type"] == "filesystem":
            paths = config["params"]["directory_path"]
            spill = paths if isinstance(paths, str) else paths[0]
    return node.get_session_dir_path(), spill


def node_names(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Node id -> what a person calls it: its host's name, with the address where hosts share one."""
    nodes = list(nodes)
    hosts = [node["NodeManagerHostname"] for node in nodes]
    return {
        node["NodeID"]: host if hosts.count(host) == 1 else f"{host} ({node['NodeManagerAddress']})"
        for node, host in zip(nodes, hosts, strict=True)
    }
