"""The cluster's side of `copernicus doctor`, a process of its own: started here, or as a job on a cluster's head.

It prints its findings as lines of JSON, each as soon as it is there, so that whoever reads them can end a check that
hangs, and say which.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor_checks as checks
from copernicus.platform.doctor_checks import FAIL, OK, Finding, over_nodes
from copernicus.platform.doctor_nodes import Probe, existing, node_names, versions
from copernicus.platform.doctor_services import authentication, check_tracking
from copernicus.platform.experiment import load_experiment
from copernicus.platform.schema import Experiment
from copernicus.platform.tracking import mask

MARK = "copernicus-doctor: "
"""Begins a line of ours: a job's log also holds what Ray says."""
FACTS_S, DISK_S, READ_S, CLOCK_S, CONNECT_S = 120.0, 30.0, 60.0, 10.0, 5.0
STORAGE = "COPERNICUS_STORAGE"


@dataclass(frozen=True)
class Asked:
    """What the user wants looked at. ``storage``: the folder that all nodes share; ``tracking``: an MLflow URI."""

    experiment: Experiment | None = None
    storage: str | None = field(default_factory=lambda: os.environ.get(STORAGE) or None)
    tracking: str | None = None

    @property
    def uri(self) -> str:
        """Of MLflow: as asked, else the experiment's, else this process's default."""
        given = self.tracking or (self.experiment and self.experiment.tracking.uri)
        return given or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


class Probes:
    """An actor on each node that is alive. A node that does not answer is told, never waited for without end."""

    def __init__(self, table: Sequence[dict[str, Any]]):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        names = node_names(table)
        probe: Any = ray.remote(Probe)
        self.actors = {
            # Several calls at once: one that hangs on a dead file server must not keep the others from answering.
            names[node["NodeID"]]: probe.options(
                num_cpus=0,
                max_concurrency=4,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote()
            for node in table
            if node["Alive"]
        }

    def ask(self, method: str, *arguments: Any, seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
        """Each node's answer; and of those without one, why."""
        import ray

        asked = {getattr(actor, method).remote(*arguments): node for node, actor in self.actors.items()}
        ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
        answers: dict[str, Any] = {}
        silent: dict[str, str] = {}
        for call, node in asked.items():
            try:
                answers[node] = ray.get(call, timeout=0)
            except ray.exceptions.GetTimeoutError:
                silent[node] = f"no answer within {seconds:g} s"
            except ray.exceptions.RayError as error:
                lines = str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__]
                silent[node] = mask(lines[-1])[:200]
        return answers, silent

    def clock(self, node: str) -> tuple[float, float]:
        import ray

        actor = self.actors[node]
        return checks.clock_offset(lambda: ray.get(actor.now.remote(), timeout=CLOCK_S), time.time)


def silence(name: str, silent: dict[str, str], todo: str) -> list[Finding]:
    """A row for each reason why nodes did not answer."""
    nodes: dict[str, list[str]] = {}
    for node, reason in silent.items():
        nodes.setdefault(reason, []).append(node)
    return [Finding(name, FAIL, f"{checks.some(named)}: {reason}", todo) for reason, named in nodes.items()]


def cluster_findings(asked: Asked, now: Callable[[str], None] = lambda check: None) -> Iterator[Finding]:
    """All that an open Ray session lets us find out. ``now`` is told the name of each check before it is made."""
    import ray

    table = ray.nodes()
    alive = [node for node in table if node["Alive"]]
    names = node_names(table)
    resources = {names[node["NodeID"]]: node["Resources"] for node in alive}
    now("nodes")
    yield checks.check_alive(names, table)
    probes = Probes(table)
    answers, silent = probes.ask("facts", seconds=FACTS_S)
    facts = {node: told | {"resources": resources[node]} for node, told in answers.items()}
    yield from silence(
        "nodes", silent, "look at Ray's log there; has the Python that started Ray copernicus and its packages?"
    )
    yield checks.check_versions("the driver", versions(), {node: told["versions"] for node, told in facts.items()})
    now("clocks")
    yield from clocks(probes, list(facts))
    now("authentication")
    yield from authentication(alive, facts, asked.uri)
    yield from over_nodes("GPUs", facts, checks.judge_gpus)
    now("CPUs")
    yield from room(asked.experiment, resources, ray.available_resources())
    yield from over_nodes("open files", facts, checks.judge_files)
    yield from over_nodes("shared memory", facts, checks.judge_shared_memory)
    for name in ("Ray's session", "spilled objects"):
        there = {node: told["disks"][name] for node, told in facts.items() if name in told["disks"]}
        yield from over_nodes(name, there, functools.partial(checks.judge_disk, name))
    now("storage")
    yield from storage(asked, probes)
    if asked.experiment is not None:
        now("data")
        yield from data(asked.experiment, probes)
    now("MLflow")
    yield check_tracking(asked.uri)


def clocks(probes: Probes, nodes: Sequence[str]) -> list[Finding]:
    """Each node's clock against that of the machine where this runs: the head, for a job."""
    import ray

    offsets: dict[str, dict[str, Any]] = {}
    silent: dict[str, str] = {}
    for node in nodes:
        try:
            offsets[node] = {"clock": probes.clock(node)}
        except ray.exceptions.RayError as error:
            silent[node] = str(error).strip().splitlines()[0][:200]
    judged = over_nodes("clocks", offsets, lambda told: checks.judge_clock("clocks", *told["clock"]))
    return [*judged, *silence("clocks", silent, "look at Ray's log there")]


def room(experiment: Experiment | None, total: dict[str, dict[str, float]], free: dict[str, float]) -> list[Finding]:
    """Whether the cluster has what the experiment takes; without one, whether it has CPUs to run and read with."""
    name, todo = "room for the run", "a larger cluster, or a smaller run"
    whole = {kind: sum(resources.get(kind, 0.0) for resources in total.values()) for kind in ("CPU", "GPU")}
    counted = (
        f"{whole['CPU']:g} CPUs, {whole['GPU']:g} GPUs; free now: {free.get('CPU', 0.0):g} and {free.get('GPU', 0.0):g}"
    )
    if os.environ.get("COPERNICUS_AUTOSCALING") == "1":
        return [Finding(name, OK, f"{counted}; this cluster brings more nodes by itself")]
    if experiment is None:
        return [checks.check_cpus(total, free.get("CPU", 0.0))]
    from copernicus.platform.pretrain import check_resources

    findings = []
    if experiment.pretrain is not None and experiment.kind != "sweep":
        try:
            check_resources(experiment.pretrain, whole)
        except InputError as error:
            findings.append(Finding(name, FAIL, str(error), todo))
    if (sweep := experiment.sweep) is not None and experiment.kind != "pretrain":
        for kind, wanted in (("CPU", sweep.cpus_per_trial), ("GPU", sweep.gpus_per_trial)):
            most = max((resources.get(kind, 0.0) for resources in total.values()), default=0.0)
            if wanted > most:
                told = (
                    f"sweep.{kind.lower()}s_per_trial: a trial takes {wanted:g} {kind}s, the largest node has {most:g}"
                )
                findings.append(Finding(name, FAIL, told, todo))
    return findings or [Finding(name, OK, counted)]


def storage(asked: Asked, probes: Probes) -> Iterator[Finding]:
    """The folder that nodes share, and the one that the experiment writes: writable everywhere, the same, with room."""
    from copernicus.platform.shared_storage import not_shared

    nodes = len(probes.actors)
    folders = [] if asked.storage is None else [os.path.abspath(asked.storage)]
    output = os.path.abspath(asked.experiment.output if asked.experiment else "runs")
    if asked.storage is None and nodes > 1 and asked.experiment is None:
        yield Finding(
            "shared storage", FAIL, f"{nodes} nodes, and no folder that they share is named",
            f"start Ray on the head with {STORAGE}=FOLDER, or give --storage FOLDER",
        )  # fmt: skip
        return
    if not any(os.path.commonpath([folder, output]) == folder for folder in folders) and (
        asked.experiment or not folders
    ):
        folders.append(existing(output))
    for folder in folders:
        disks, silent = probes.ask("disk", folder, seconds=DISK_S)
        found = over_nodes("storage", disks, functools.partial(checks.judge_disk, "storage"))
        found += silence("storage", silent, f"is the file server of {folder} up?")
        yield from found
        if not any(disk["fault"] for disk in disks.values()) and not silent:
            yield checks.check_shared(not_shared(Path(folder), DISK_S), folder, nodes)


def data(experiment: Experiment, probes: Probes) -> Iterator[Finding]:
    """Whether every node can read what the experiment reads: the first shard's beginning, the folders' listings."""
    from copernicus.datasets.storage import StoreError

    todo = "mount it on every node, or give it credentials (AWS_..., a role); see the experiment's paths"
    try:
        places, made = data_places(experiment)
    except (InputError, StoreError, OSError) as error:
        yield Finding("data", FAIL, str(error), todo)
        return
    for key in made:
        yield Finding("data", OK, f"{key}: the run makes its miniature Earth first")
    if not places:
        return
    answers, silent = probes.ask("unreadable", list(places.values()), seconds=READ_S)
    yield from silence("data", silent, todo)
    for i, (key, uri) in enumerate(places.items()):
        faults = {node: told[i] for node, told in answers.items() if told[i]}
        if faults:
            yield from silence("data", {node: f"{key}: {mask(uri)}: {fault}" for node, fault in faults.items()}, todo)
        elif answers:
            yield Finding(
                "data", OK, f"{key}: {mask(uri)} can be read" + (" on every node" if len(answers) > 1 else "")
            )


def data_places(experiment: Experiment) -> tuple[dict[str, str], list[str]]:
    """Key -> a file or folder that stands for what it names; and the keys whose data the run makes itself.

    Raises:
        InputError, StoreError: shards that do not exist, or a store that does not answer.
    """
    from copernicus.datasets.expand import expand

    wanted: dict[str, list[str]] = {}
    if (pretrain := experiment.pretrain) is not None and experiment.kind != "sweep":
        wanted["pretrain.shards"] = [] if pretrain.geotiffs else pretrain.shards
        wanted["pretrain.geotiffs"] = [pretrain.geotiffs] if pretrain.geotiffs else []
        wanted["pretrain.index"] = [pretrain.index] if pretrain.index else []
    if (sweep := experiment.sweep) is not None and experiment.kind != "pretrain":
        wanted["sweep.data"] = [sweep.data]
    places, made = {}, []
    earth = os.path.abspath(experiment.miniature.out) if experiment.miniature else None
    for key, paths in wanted.items():
        if not paths:
            continue
        if earth and os.path.abspath(paths[0]).startswith(earth + os.sep) and not os.path.exists(earth):
            made.append(key)
        elif key == "pretrain.shards":
            places[key] = expand(paths)[0]
        elif key != "pretrain.index" or os.path.exists(paths[0]):  # an index that is not there yet is made
            places[key] = paths[0]
    return places, made


def ray_reachable(address: str) -> Finding | None:
    """What keeps us from the head service that RAY_ADDRESS names, before Ray waits for it; None: nothing we can see."""
    import socket

    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        return None  # auto, or Ray client's
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        return Finding(
            "Ray", FAIL, f"{address} does not answer: {error.strerror or error}", "is the head up, its port open?"
        )
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    for option in ("--experiment", "--storage", "--tracking"):
        parser.add_argument(option)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args(arguments)

    def tell(**values: Any) -> None:
        print(MARK + json.dumps(values), flush=True)

    def now(check: str) -> None:
        tell(now=check)

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    now("Ray")
    tell(versions=versions())
    address = os.environ.get("RAY_ADDRESS", "")
    if (unreachable := ray_reachable(address)) is not None:
        tell(finding=asdict(unreachable), done=True)
        return 1
    findings: list[Finding] = []
    try:
        experiment = load_experiment(given.experiment, given.overrides) if given.experiment else None
        asked = Asked(experiment, given.storage or os.environ.get(STORAGE) or None, given.tracking)
        for finding in _session_findings(asked, address, now):
            findings.append(finding)
            tell(finding=asdict(finding))
    except InputError as error:
        findings.append(Finding("experiment", FAIL, str(error), "see `copernicus check`"))
        tell(finding=asdict(findings[-1]))
    tell(done=True)
    return checks.exit_code(findings)


def _session_findings(asked: Asked, address: str, now: Callable[[str], None]) -> Iterator[Finding]:
    import ray

    from copernicus.platform.session import ray_session

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ray_session())
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            todo = "is Ray running there, of the same version, and this token its own? `ray get-auth-token` prints it"
            yield Finding("Ray", FAIL, f"{address or 'here'}: {lines[0][:300]}", todo)
            return
        where = (
            f"the cluster at {ray.get_runtime_context().gcs_address}" if address else "started here for these checks"
        )
        yield Finding("Ray", OK, f"{ray.__version__}, {where}")
        yield from cluster_findings(asked, now)


if __name__ == "__main__":
    sys.exit(main())
