"""Services that `copernicus doctor` tries out: Ray's, which must refuse strangers, and MLflow, which must take runs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor_checks as checks
from copernicus.platform.cluster_files import LOOPBACK
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN, Finding, over_nodes
from copernicus.platform.doctor_nodes import disk, existing, unauthenticated
from copernicus.platform.tracking import mask

CONNECT_S = 5.0
DASHBOARD_PORT, MLFLOW_PORT, CLIENT_PORT = 8265, 5000, 10001
GCS_METHOD = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"
"""Methods that only read, of Ray's head service and of its client server."""


def authentication(alive: Sequence[dict[str, Any]], facts: dict[str, dict[str, Any]], uri: str) -> list[Finding]:
    """Who may do what without the cluster's token, tried; and which pages are open beyond their machine."""
    import ray
    from ray._private.worker import get_dashboard_url

    sockets = [told["listening"] for told in facts.values()]

    def beyond(port: int) -> bool:
        return any(checks.beyond_loopback(heard, port) for heard in sockets)

    gcs = ray.get_runtime_context().gcs_address
    host, _, port = gcs.rpartition(":")
    findings = [check_grpc("Ray's head service", gcs, GCS_METHOD, beyond(int(port)))]
    if any(p == CLIENT_PORT for heard in sockets for _, p in heard or ()):
        findings.append(check_grpc("Ray client server", f"{host}:{CLIENT_PORT}", CLIENT_METHOD, beyond(CLIENT_PORT)))
    pages, refusing = {MLFLOW_PORT: "MLflow", DASHBOARD_PORT: "dashboard"}, set()
    if dashboard := get_dashboard_url():
        url = dashboard if dashboard.startswith("http") else f"http://{dashboard}"
        at = urlsplit(url).port or DASHBOARD_PORT
        pages[at] = "dashboard"
        findings.append(finding := check_job_api("job API", url, "/api/jobs/", beyond(at)))
        if finding.status == OK:
            refusing.add(at)
    else:
        findings.append(Finding("job API", OK, "this Ray has no dashboard"))
    findings += job_agents(alive, beyond)
    by_variable = bool(os.environ.get("RAY_AUTH_TOKEN"))
    findings += over_nodes("token file", facts, lambda node: checks.judge_token_file(node["token file"], by_variable))
    if uri.startswith("http") and urlsplit(uri).hostname in {*LOOPBACK, *(n["NodeManagerAddress"] for n in alive)}:
        pages[urlsplit(uri).port or 80] = "MLflow"
    return findings + over_nodes("open pages", facts, lambda node: checks.judge_ports(node, pages, refusing))


def job_agents(alive: Sequence[dict[str, Any]], beyond: Callable[[int], bool]) -> list[Finding]:
    """Every node has a server that starts the head's jobs there, on the node's own address."""
    name = "nodes' job agents"
    ports = [(node["NodeManagerAddress"], node["DashboardAgentListenPort"]) for node in alive]

    def ask(place: tuple[str, int]) -> Finding:
        address, port = place
        return check_job_api(name, f"http://{address}:{port}", "/api/job_agent/jobs/none/logs", beyond(port))

    with ThreadPoolExecutor(16) as pool:  # those behind a firewall take seconds each
        told = list(pool.map(ask, [place for place in ports if place[1] > 0]))
    if off := [address for address, port in ports if port <= 0]:  # Ray's way to say that it could not listen
        todo = "no job can start there; is its port taken, by another Ray? See dashboard_agent.log"
        told.append(Finding(name, WARN, f"none on {checks.some(off)}", todo))
    bad = [finding for finding in told if finding.status != OK]
    if len(bad) > 1:
        worst = max(bad, key=lambda finding: checks.SEVERITY.index(finding.status))
        return [dataclasses.replace(worst, found=f"{worst.found}; {len(bad)} of {len(ports)} nodes")]
    return bad or [Finding(name, OK, f"{len(told)} of {len(ports)} refuse who has no token")]


def check_grpc(name: str, address: str, method: str, beyond: bool) -> Finding:
    """Calls a method of one of Ray's services without a token."""
    import grpc

    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=CONNECT_S)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return checks.check_refused(name, address, True, beyond, code.name)
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                return Finding(
                    name, UNKNOWN, f"{address} does not answer: {code.name}", "is it behind TLS, or a firewall?"
                )
    return checks.check_refused(name, address, False, beyond, "answers")


def check_job_api(name: str, url: str, path: str, beyond: bool) -> Finding:
    """Asks a server that runs jobs something without a token."""
    try:
        status = unauthenticated(url.rstrip("/") + path)
    except OSError as error:
        return Finding(
            name, UNKNOWN, f"{url} does not answer: {error}", "is Ray's dashboard up? Its log is dashboard.log"
        )
    return checks.check_refused(name, url, status in (401, 403), beyond, f"HTTP {status}")


def check_tracking(uri: str, seconds: float = 60.0) -> Finding:
    """Whether a run can be written to MLflow and read back; nothing of it stays visible."""
    import threading

    told: list[Finding] = []
    # A thread that may be left behind: MLflow's client has no limit for a whole call.
    thread = threading.Thread(target=lambda: told.append(try_tracking(uri)), daemon=True)
    thread.start()
    thread.join(seconds)
    return (
        told[0]
        if told
        else Finding("MLflow", FAIL, f"{mask(uri)}: no answer within {seconds:g} s", "is the server up?")
    )


def try_tracking(uri: str) -> Finding:
    """Writes a run with a metric and a file into an experiment of its own, reads both, and deletes all of it."""
    from sqlalchemy.exc import SQLAlchemyError

    from copernicus.platform.tracking import Tracker, one_line, store_errors

    place = mask(uri)
    errors: tuple[type[Exception], ...] = (InputError, OSError, SQLAlchemyError, *store_errors())
    if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///")).absolute()).exists():
        room = checks.judge_disk("MLflow", disk(existing(str(path.parent))))
        told = f"{place} is made by the first run" if room.status == OK else room.found
        return Finding("MLflow", room.status, told, room.todo)
    todo = "is it the right tracking.uri, may its user write, has its disk room? Its log says more"
    made = None
    try:
        # A name that nobody has: others may be checking too.
        tracker = Tracker(uri, f"copernicus-doctor-{secrets.token_hex(4)}", Path(tempfile.gettempdir()), patience=0.0)
        made = tracker.experiment_id
        run = tracker.start("doctor", {"kind": "doctor"})
        began = time.monotonic()
        run.metrics({"doctor": 0.5})
        took = time.monotonic() - began
        run.text("doctor", "doctor.txt")
        run.end()
        with tempfile.TemporaryDirectory() as folder:
            text = Path(tracker.client.download_artifacts(run.id, "doctor.txt", folder)).read_text()
        if tracker.history(run, "doctor") != [(0, 0.5)] or text != "doctor":
            return Finding("MLflow", FAIL, f"{place} gives back other values than were written", todo)
        _remove_files(tracker.client.get_run(run.id).info.artifact_uri, uri)
        return Finding("MLflow", OK, f"{place}: a run written, read and deleted; {1000 * took:.0f} ms a write")
    except errors as error:
        told = one_line(error).removeprefix(f"tracking.uri: cannot use {place}: ")
        if "Max retries exceeded" in told:  # requests' words for a connection that does not come about
            told = "no server answers"
        return Finding("MLflow", FAIL, f"{place}: {told}", todo)
    finally:
        if made is not None:
            with contextlib.suppress(*store_errors()):  # what keeps us from deleting kept us from writing, and is told
                tracker.client.delete_experiment(made)  # and its run


def _remove_files(artifacts: str, uri: str) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # Some stores of files cannot delete; a dozen bytes stay there then.
    with contextlib.suppress(NotImplementedError, MlflowException):
        get_artifact_repository(artifacts, tracking_uri=uri).delete_artifacts()
