"""The judgements of `copernicus doctor`: from facts to findings, without asking anybody. `doctor_cluster.py` collects."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL, UNKNOWN = "ok", "warn", "fail", "unknown"
GB = 1e9
WARN_FREE_BYTES, FAIL_FREE_BYTES = 10 * GB, 1 * GB
RAY_FULL = 0.95
"""Share of a disk from which Ray neither spills nor falls back to it (``local_fs_capacity_threshold``)."""
WARN_SKEW_S, FAIL_SKEW_S = 1.0, 30.0
"""Signed requests to object stores allow minutes; times in logs and in MLflow are compared by people and by resuming runs."""
WARN_FILES, FAIL_FILES = 8192, 1024
"""Open files: what Ray recommends, and what a worker with its data's shards open goes beyond."""
MOST_NAMED = 3

Facts = Mapping[str, Any]
"""What `doctor_nodes.node_facts` says of a node, and its ``resources``, as Ray counts them."""


@dataclass(frozen=True)
class Finding:
    """One row of the doctor's table. ``status``: ok, warn, fail, or unknown (the check could not be made)."""

    name: str
    status: str
    found: str
    todo: str = ""


def over_nodes(name: str, nodes: Mapping[str, Facts], judge: Callable[[Facts], Finding | None]) -> list[Finding]:
    """Judge each node; those that share a finding share a row. A judgement of None leaves the node out."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for node, facts in nodes.items():
        if (finding := judge(facts)) is not None:
            groups.setdefault((finding.status, finding.todo), {}).setdefault(finding.found, []).append(node)
    return [
        Finding(name, status, _told(found, len(nodes)), todo)
        for (status, todo), found in sorted(groups.items(), key=lambda g: -SEVERITY.index(g[0][0]))
    ]


SEVERITY = (OK, UNKNOWN, WARN, FAIL)


def _told(found: Mapping[str, Sequence[str]], nodes: int) -> str:
    if nodes == 1:
        return next(iter(found))
    if len(found) == 1 and len(next(iter(found.values()))) == nodes:
        return f"all {nodes} nodes: {next(iter(found))}"
    told = [f"{some(names)}: {text}" for text, names in list(found.items())[:MOST_NAMED]]
    rest = sum(len(names) for names in list(found.values())[MOST_NAMED:])
    return "; ".join(told) + (f"; and {rest} more nodes alike" if rest else "")


def some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def check_versions(here: str, mine: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]]) -> Finding:
    """Everything must match between the driver (on ``here``) and the nodes: Python and torch in major and minor, the rest
    exactly."""
    wrong = [
        f"{package} {theirs.get(package, 'missing')} on {node}, {version} on {here}"
        for node, theirs in nodes.items()
        for package, version in mine.items()
        if _compared(package, version) != _compared(package, theirs.get(package, "missing"))
    ]
    if wrong:
        return Finding(
            "versions", FAIL, "; ".join(wrong[:MOST_NAMED]) + (f"; {len(wrong)} in all" if len(wrong) > MOST_NAMED else ""),
            "install the same on every node (the same image, or the same setup_commands), and start Ray there again",
        )  # fmt: skip
    missing = [package for package, version in mine.items() if version == "missing"]
    if missing:
        return Finding("versions", FAIL, f"{', '.join(missing)} missing", "pip install what is missing, on every node")
    return Finding("versions", OK, ", ".join(f"{package} {version}" for package, version in mine.items()))


def _compared(package: str, version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2]) if package in ("python", "torch") else version


def check_client_versions(client: Mapping[str, str], head: Mapping[str, str]) -> Finding:
    """A client ships its own package and speaks HTTP: only Ray's minor version matters, other packages should agree."""
    differ = [
        f"{package} {version} here, {head.get(package, 'missing')} there"
        for package, version in client.items()
        if package != "copernicus" and _compared(package, version) != _compared(package, head.get(package, "missing"))
    ]
    if not differ:
        return Finding("client's versions", OK, "as on the cluster")
    minor = client["ray"].split(".")[:2] != head.get("ray", "missing").split(".")[:2]
    return Finding(
        "client's versions", FAIL if minor else WARN, "; ".join(differ), "install here what the cluster has, or the reverse"
    )  # fmt: skip


def check_alive(names: Mapping[str, str], table: Sequence[Facts]) -> Finding:
    """Nodes that the cluster has lost. Those that were told to go do not count."""
    alive = [node for node in table if node["Alive"]]
    # NodeDeathInfo.Reason: 1 and 4 are planned ends (told to, or idle), 3 a spot node that was taken away.
    lost = [n for n in table if not n["Alive"] and n.get("DeathReason") not in (1, 4)]
    there = f"{len(alive)} alive"
    if not lost:
        return Finding("nodes", OK, there)
    told = [f"{names[n['NodeID']]}{': ' + m if (m := n.get('DeathReasonMessage')) else ''}" for n in lost]
    return Finding(
        "nodes", WARN, f"{there}; lost since the head started: {some(told)}",
        "look at what ended them (memory, network, spot); a node that is back has a new entry",
    )  # fmt: skip


def judge_ports(
    facts: Facts, ports: Mapping[int, str], refusing: Collection[int] = (), name: str = "open ports"
) -> Finding:
    """Which of the pages at ``ports`` (port -> what it is) can be reached from beyond the node. ``refusing``: those that
    were seen to ask for a token."""
    if facts["listening"] is None:
        return Finding(name, UNKNOWN, "this system does not say what listens", "look with: lsof -nP -iTCP -sTCP:LISTEN")
    world: set[str] = set()
    network: set[str] = set()
    for address, port in facts["listening"]:
        parsed = ipaddress.ip_address(address)
        if port in ports and not parsed.is_loopback:
            (world if parsed.is_unspecified else network).add(f"{ports[port]} on {address}:{port}")
    closed = "start it with --host / --dashboard-host 127.0.0.1, and reach it through SSH"
    if world and facts["pod"] and all(int(w.rpartition(":")[2]) in refusing for w in world):
        return Finding(
            name, WARN, f"{', '.join(sorted(world))}, of a pod; it asks for a token",
            "keep its Service of type ClusterIP, and a NetworkPolicy around it",
        )  # fmt: skip
    if world:
        return Finding(name, FAIL, f"open to every network: {', '.join(sorted(world))}", closed)
    if network:
        return Finding(name, WARN, f"open to its network: {', '.join(sorted(network))}", closed)
    return Finding(name, OK, f"none of {', '.join(sorted(set(ports.values())))} beyond loopback")


def beyond_loopback(listening: Sequence[tuple[str, int]] | None, port: int) -> bool:
    """Whether anything takes connections at that port from elsewhere; also where the system does not say."""
    return listening is None or any(p == port and not ipaddress.ip_address(a).is_loopback for a, p in listening)


def check_refused(name: str, place: str, refused: bool, beyond: bool, said: str) -> Finding:
    """Whether a service through which anybody can run code refuses who has no token; ``beyond``: it is reachable from
    outside the machine."""
    if refused:
        return Finding(name, OK, f"{place} refuses who has no token ({said})")
    reach = "from other machines" if beyond else "by every user of this machine"
    return Finding(
        name, FAIL if beyond else WARN, f"{place} takes requests without a token ({said}), {reach}",
        "stop Ray, `ray get-auth-token --generate`, copy ~/.ray/auth_token to every node, start with RAY_AUTH_MODE=token",
    )  # fmt: skip


def judge_token_file(file: Facts | None, in_environment: bool = False) -> Finding:
    if in_environment:
        return Finding("token file", OK, "the token comes from RAY_AUTH_TOKEN")
    if file is None:
        return Finding(
            "token file",
            WARN,
            "no token here (~/.ray/auth_token)",
            "`ray get-auth-token --generate`, or copy the head's",
        )
    found = f"{file['path']} has mode {file['mode']:03o}"
    if file["mode"] & 0o077 == 0:
        return Finding("token file", OK, found)
    told = f"{found}: other users of the machine can read it" if file["exposed"] else f"{found}, in a closed folder"
    return Finding("token file", FAIL if file["exposed"] else WARN, told, f"chmod 600 {file['path']}")


def judge_disk(name: str, disk: Facts) -> Finding:
    """Whether a folder can be written and its disk has room."""
    if disk["fault"]:
        return Finding(
            name, FAIL, f"{disk['path']} cannot be written: {disk['fault']}", "mount it writable, or name another"
        )
    used = 1 - disk["free"] / max(disk["total"], 1)
    found = f"{disk['path']}: {disk['free'] / GB:.1f} of {disk['total'] / GB:.1f} GB free"
    if disk["free"] < FAIL_FREE_BYTES or used > RAY_FULL:
        return Finding(name, FAIL, found, "free some; above 95 % Ray stops spilling objects, and a full disk ends runs")
    if disk["free"] < WARN_FREE_BYTES:
        return Finding(name, WARN, found, "free some: checkpoints and spilled objects are gigabytes")
    return Finding(name, OK, found)


def judge_shared_memory(facts: Facts) -> Finding:
    """Room for the objects that Ray holds in memory on a node."""
    name, memory = "shared memory", facts["shared memory"]
    object_store = facts["resources"].get("object_store_memory", 0.0)
    if memory is None:
        return Finding(name, OK, f"no /dev/shm on this system; object store {object_store / GB:.1f} GB")
    found = f"/dev/shm has {memory['total'] / GB:.1f} GB, {memory['free'] / GB:.1f} free; object store {object_store / GB:.1f} GB"
    todo = "a larger /dev/shm (docker: --shm-size; Kubernetes: an emptyDir with medium Memory)"
    if memory["fault"]:
        return Finding(name, FAIL, f"/dev/shm cannot be written: {memory['fault']}", todo)
    if memory["total"] < object_store:
        return Finding(name, WARN, f"{found}: Ray keeps objects on the disk, which is slow", todo)
    if memory["free"] < 0.1 * object_store:
        return Finding(
            name, WARN, f"{found}: nearly full", "end what fills it, or start Ray with a smaller object store"
        )
    return Finding(name, OK, found)


def judge_files(facts: Facts) -> Finding:
    limit = facts["open files"]
    found = f"{'no limit' if limit < 0 else limit}"
    if limit < 0 or limit >= WARN_FILES:
        return Finding("open files", OK, found)
    todo = f"ulimit -n 65536 before `ray start` (recommended: {WARN_FILES} at least)"
    return Finding("open files", FAIL if limit < FAIL_FILES else WARN, found, todo)


def judge_gpus(facts: Facts) -> Finding:
    """Ray's count of a node's GPUs against what torch can use there."""
    name, gpus, ray_gpus = "GPUs", facts["gpus"], facts["resources"].get("GPU", 0.0)
    if not gpus["device"]:
        if ray_gpus:
            return Finding(
                name, FAIL, f"Ray counts {ray_gpus:g}, the system shows none", "install the driver, or --num-gpus 0"
            )
        return Finding(name, OK, "none")
    if "fault" in gpus:
        return Finding(
            name, FAIL if ray_gpus else WARN, gpus["fault"], "run `nvidia-smi` and `python -c 'import torch'` there"
        )
    if gpus["seen"] < max(ray_gpus, 1):
        why = f"torch sees {gpus['seen']}, Ray counts {ray_gpus:g}"
        newest = f"{gpus['driver'] // 1000}.{gpus['driver'] % 1000 // 10}"
        if gpus["built"] is None:
            why, todo = f"{why}: torch is its CPU build", "install torch's build for CUDA"
        elif gpus["driver"] and _numbers(gpus["built"]) > _numbers(newest):
            why = f"{why}: torch is built for CUDA {gpus['built']}, the driver runs up to {newest}"
            todo = "a newer driver, or torch's build for an older CUDA"
        else:
            todo = "run `nvidia-smi` and `python -c 'import torch; torch.cuda.init()'` there"
        return Finding(name, FAIL if ray_gpus else WARN, why, todo)
    if not ray_gpus:
        return Finding(name, WARN, f"torch sees {gpus['seen']}, Ray counts none", "start Ray there with --num-gpus")
    names = ", ".join(sorted(set(gpus["names"])))
    return Finding(name, OK, f"{ray_gpus:g} ({names}), torch for CUDA {gpus['built']}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def judge_clock(name: str, offset: float, uncertainty: float) -> Finding:
    """``offset``: seconds that a clock is ahead of the head's, known to +- ``uncertainty``."""
    found = f"{abs(offset):.2g} s {'ahead of' if offset > 0 else 'behind'} the head's (+- {uncertainty:.2g} s)"
    surely = abs(offset) - uncertainty
    if surely > WARN_SKEW_S:
        return Finding(
            name, FAIL if surely > FAIL_SKEW_S else WARN, found, "let NTP set it (chrony, systemd-timesyncd)"
        )
    return Finding(name, OK, f"within {max(abs(offset) + uncertainty, 0.001):.2g} s of the head's")


def clock_offset(remote: Callable[[], float], now: Callable[[], float], tries: int = 5) -> tuple[float, float]:
    """(seconds that the remote clock is ahead, uncertainty): its answer against the middle of the request that was
    answered fastest, as in NTP (RFC 5905, section 8)."""
    best = (0.0, float("inf"))
    for _ in range(tries):
        before = now()
        theirs = remote()
        after = now()
        if (after - before) / 2 < best[1]:
            best = (theirs - (before + after) / 2, (after - before) / 2)
    return best


def check_cpus(total: Mapping[str, Facts], free: float) -> Finding:
    """Without an experiment: Ray Data reads on nodes that have a CPU to give."""
    # A head may well keep out of the work.
    without = [
        node for node, held in total.items() if held.get("CPU", 0.0) < 1 and "node:__internal_head__" not in held
    ]
    count = sum(resources.get("CPU", 0.0) for resources in total.values())
    found = f"{free:g} of {count:g} free"
    if count < 2:
        return Finding("CPUs", FAIL, found, "a run takes two at least: one for a worker, one to read")
    if without:
        return Finding(
            "CPUs", WARN, f"{found}; none on {some(without)}", "Ray Data cannot read there: give it --num-cpus"
        )
    if free < 2:
        return Finding("CPUs", WARN, f"{found}: a run would wait", "end other jobs (`copernicus jobs`), or add nodes")
    return Finding("CPUs", OK, found)


def check_shared(faults: Sequence[str], folder: str, nodes: int) -> Finding:
    """``faults``: what `shared_storage.not_shared` says of ``nodes`` nodes."""
    if faults:
        return Finding(
            "shared storage", FAIL, "; ".join(faults[:MOST_NAMED]), f"mount the same file system at {folder} on every node"
        )  # fmt: skip
    return Finding(
        "shared storage", OK, f"{folder}, " + (f"seen and written by {nodes} nodes" if nodes > 1 else "on one node")
    )


def exit_code(findings: Sequence[Finding]) -> int:
    return int(any(finding.status == FAIL for finding in findings))
