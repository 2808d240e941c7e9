"""Is a folder the same one on every node? Checkpoints that are not are found missing after the first loss of a node."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT_S = 5.0
"""How long a file may take to show on another node. Network file systems remember for longer what a folder held, but not
of names that nobody asked for before; hence the token in each."""

SILENT = "did not answer"
"""Of a node that could not be asked, in its line."""

SIZE = 4096
"""Of a file that a node writes, bytes: more than what fits beside a full file system's metadata."""


@contextlib.contextmanager
def marked(folder: Path) -> Iterator[str]:
    """While this lasts the folder bears a mark; yields its token, for `sees` on other nodes.

    Raises:
        OSError: the folder cannot be written here.
    """
    token = secrets.token_hex(8)
    path = _mark(folder, token)
    try:
        path.write_text(token)
        yield token
    finally:
        with contextlib.suppress(OSError):  # the storage is gone; nothing more can be done
            path.unlink(missing_ok=True)


def sees(folder: Path, token: str) -> str | None:
    """What is wrong with ``folder`` on this node, or None: called by a worker at its start, for nodes come and go."""
    problem = _look(folder, token)
    return f"{_here()}: {folder} {problem}" if problem else None


def not_shared(folder: Path, timeout_s: float = 60.0) -> list[str]:
    """What is wrong with ``folder`` on the cluster's nodes, a line each: node, folder, what failed.

    The driver leaves a mark, which a task on every node must find and answer with a file of its own, which the driver
    must find. Nothing is left behind. With one node there is nothing to ask.

    Args:
        timeout_s: for all nodes together to answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return []

    def names(node_id: str) -> str:
        return f"{nodes[node_id]['NodeManagerAddress']} ({nodes[node_id]['NodeManagerHostname']}): {folder}"

    def on(node_id: str, act: Any, *arguments: Any) -> Any:
        where = NodeAffinitySchedulingStrategy(node_id, soft=False)
        return ray.remote(num_cpus=0, max_retries=0)(act).options(scheduling_strategy=where).remote(*arguments)

    problems: list[str] = []
    elsewhere = []
    try:
        with marked(folder) as token:
            asked = {on(node_id, _answer, folder, token, node_id): node_id for node_id in nodes}
            answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
            for task in silent:
                ray.cancel(task, force=True)
                problems.append(f"{names(asked[task])} {SILENT} within {timeout_s:g} s")
            for task in answered:
                node_id = asked[task]
                try:
                    problem = ray.get(task)
                except ray.exceptions.RayError as error:
                    problem = f"{SILENT}: {str(error).strip().splitlines()[0]}"
                if problem is None and not _appears(_mark(folder, token, node_id)):
                    problem = "takes files that do not show here"
                    elsewhere.append(node_id)
                if problem is not None:
                    problems.append(f"{names(node_id)} {problem}")
                _mark(folder, token, node_id).unlink(missing_ok=True)
            if elsewhere:
                tidying = [on(node_id, _remove, folder, token, node_id) for node_id in elsewhere]
                ray.wait(tidying, num_returns=len(tidying), timeout=timeout_s)
    except OSError as error:
        problems.append(f"{_here()}: {folder} {_reason(error)}")
    return sorted(problems)


def _answer(folder: Path, token: str, node_id: str) -> str | None:
    """On a node: what is wrong there, or None and a file is left for the driver."""
    return _look(folder, token, _mark(folder, token, node_id))


def _look(folder: Path, token: str, answer: Path | None = None) -> str | None:
    """Is the mark there, and can this process write beside it? What it writes is left only if it has a name."""
    if not folder.is_dir():
        return "does not exist there"
    if not _appears(_mark(folder, token)):
        return "is another folder there: what is written on one node does not show on the other"
    path = answer or _mark(folder, token, secrets.token_hex(4))
    try:
        try:
            with open(path, "wb") as file:
                file.write(token.encode().ljust(SIZE))
                file.flush()
                os.fsync(file.fileno())  # where storage is full or over quota, some say so only now
        except OSError:
            path.unlink(missing_ok=True)
            raise
        if answer is None:
            path.unlink()
    except OSError as error:
        return _reason(error)
    return None


def _remove(folder: Path, token: str, node_id: str) -> None:
    _mark(folder, token, node_id).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + WAIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _mark(folder: Path, token: str, node_id: str = "") -> Path:
    return folder / f".shared-{token}{node_id and '-' + node_id}"


def _here() -> str:
    return socket.gethostname()


def _reason(error: OSError) -> str:
    said = {
        errno.EROFS: "is read-only",
        errno.EACCES: "may not be written",
        errno.EPERM: "may not be written",
        errno.ENOSPC: "is full",
        errno.EDQUOT: "is over its quota",
        errno.ENOENT: "does not exist",
    }
    return said.get(error.errno or 0, f"cannot be written: {error.strerror or error}")
