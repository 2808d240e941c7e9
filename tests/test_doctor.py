"""`copernicus doctor`: each check is shown something broken, and says so."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from rich.console import Console
from tracking_server import TrackingServer

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor, doctor_nodes
from copernicus.platform import doctor_checks as checks
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN, Finding
from copernicus.platform.doctor_cluster import MARK, Asked, cluster_findings, data, data_places, ray_reachable, room
from copernicus.platform.doctor_services import (
    CLIENT_METHOD,
    GCS_METHOD,
    check_grpc,
    check_job_api,
    check_tracking,
    job_agents,
    try_tracking,
)
from copernicus.platform.experiment import load_experiment
from copernicus.platform.submit import Where

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "mlflow": "3.17.2", "copernicus": "1a2b3c4d"}
GB = 10**9


# Versions


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("python", "3.11.2", OK), ("python", "3.12.7", FAIL), ("torch", "2.13.1+cu130", OK), ("torch", "2.12.0", FAIL),
        ("ray", "2.60.1", FAIL), ("mlflow", "3.17.1", FAIL), ("copernicus", "00000000", FAIL), ("mlflow", "missing", FAIL),
    ],
)  # fmt: skip
def test_versions_must_match_between_nodes(package, version, status):
    finding = checks.check_versions("head", VERSIONS, {"a": VERSIONS, "b": VERSIONS | {package: version}})
    assert finding.status == status
    if status == FAIL:
        assert f"{package} {version} on b, {VERSIONS[package]} on head" in finding.found


def test_a_package_that_no_node_has():
    without = VERSIONS | {"mlflow": "missing"}
    assert checks.check_versions("head", without, {"a": without}).status == FAIL


def test_a_node_that_tells_less_lacks_it():
    assert checks.check_versions("head", VERSIONS, {"b": {"python": "3.11.7"}}).status == FAIL


def test_a_client_may_differ_but_for_ray():
    assert checks.check_client_versions(VERSIONS, VERSIONS | {"copernicus": "x", "torch": "2.13.0+cu130"}).status == OK
    assert checks.check_client_versions(VERSIONS, VERSIONS | {"python": "3.12.0"}).status == WARN
    assert checks.check_client_versions(VERSIONS, VERSIONS | {"ray": "2.60.1"}).status == WARN
    assert checks.check_client_versions(VERSIONS, VERSIONS | {"ray": "2.61.0"}).status == FAIL


def test_the_source_has_a_version_that_changes_with_it(tmp_path):
    """Two copies of the package under one version number, one of them changed in a comment."""
    import copernicus

    code = "from copernicus.platform.doctor_nodes import own_version; print(own_version())"
    told = []
    for name in ("same", "changed"):
        package = tmp_path / name / "copernicus"
        root = Path(copernicus.__file__).parent
        for folder in ("platform", "models", "datasets"):
            source = Path(getattr(copernicus, folder).__path__[0])
            for file in source.rglob("*.py"):
                if "_package" not in file.parts:
                    copy = package / folder / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(file.read_bytes())
        (package / "__init__.py").write_bytes((root / "__init__.py").read_bytes())
        if name == "changed":
            with (package / "models" / "vit.py").open("a") as file:
                file.write("# changed\n")
        environment = os.environ | {"PYTHONPATH": str(tmp_path / name)}
        asked = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        told.append(asked.stdout.strip())
    assert told[0] == doctor_nodes.own_version()  # a wheel's layout or a checkout's
    assert told[1] != told[0]


# Sockets and tokens


def test_listening_sockets_are_those_that_psutil_finds():
    psutil = pytest.importorskip("psutil")
    if not Path("/proc/net/tcp").exists():
        pytest.skip("needs Linux's /proc/net/tcp")
    with (
        socket.create_server(("127.0.0.1", 0)) as loopback,
        socket.create_server(("0.0.0.0", 0)) as world,
        _ipv6() as six,
    ):
        opened = {s.getsockname()[:2] for s in (loopback, world, six) if s is not None}
        found = set(doctor_nodes.listening())
        theirs = {
            (c.laddr.ip.removeprefix("::ffff:"), c.laddr.port)
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN
        }
    assert opened <= found
    # Others on this machine open and close theirs meanwhile; ours are in both.
    assert opened <= theirs
    assert (
        not {address for address, _ in found}
        - {address for address, _ in theirs | opened}
        - {"127.0.0.1", "0.0.0.0", "::"}
    )


@contextlib.contextmanager
def _ipv6():
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        yield None
        return
    with server:
        yield server


def test_addresses_of_both_families(tmp_path):
    """Lines as the kernel writes them, little-endian; values worked out by hand."""
    if sys.byteorder != "little":
        pytest.skip("the lines below are a little-endian machine's")
    line = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"
    rows = [("0100007F:2049", "0A"), ("020200C0:1388", "0A"), ("0100007F:0050", "01")]
    (tmp_path / "tcp").write_text("header\n" + "".join(line.format(*row) for row in rows))
    rows = [("00000000000000000000000000000000:1388", "0A"), ("0000000000000000FFFF00000100007F:0051", "0A")]
    (tmp_path / "tcp6").write_text("header\n" + "".join(line.format(*row) for row in rows))
    assert doctor_nodes.listening(tmp_path) == [
        ("127.0.0.1", 8265), ("192.0.2.2", 5000), ("::", 5000), ("127.0.0.1", 81),
    ]  # fmt: skip
    assert doctor_nodes.listening(tmp_path / "none") is None


def test_a_page_open_to_the_world_is_found():
    """A real one."""
    if doctor_nodes.listening() is None:
        pytest.skip("needs Linux's /proc/net/tcp")
    for address, status in (("127.0.0.1", OK), ("0.0.0.0", FAIL)):
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            facts = {"listening": doctor_nodes.listening(), "pod": False}
        finding = checks.judge_ports(facts, {port: "MLflow"})
        assert finding.status == status
        assert checks.beyond_loopback(facts["listening"], port) == (status == FAIL)
        if status == FAIL:
            assert f"MLflow on 0.0.0.0:{port}" in finding.found
            # Kubernetes needs a pod's pages on the pod's address; there it is enough that they ask for a token.
            assert checks.judge_ports(facts | {"pod": True}, {port: "dashboard"}, {port}).status == WARN
            assert checks.judge_ports(facts | {"pod": True}, {port: "dashboard"}).status == FAIL


def test_a_page_open_to_its_network_and_a_system_that_does_not_say():
    facts = {"listening": [("192.0.2.7", 5000), ("::1", 8265)], "pod": False}
    assert checks.judge_ports(facts, {5000: "MLflow", 8265: "dashboard"}).status == WARN
    assert checks.judge_ports(facts, {8265: "dashboard"}).status == OK
    assert checks.judge_ports({"listening": [("::", 8265)], "pod": False}, {8265: "dashboard"}).status == FAIL
    assert checks.judge_ports({"listening": None, "pod": False}, {5000: "MLflow"}).status == UNKNOWN


@contextlib.contextmanager
def page(status: int):
    """A server on loopback that answers every GET with that status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "beyond", "judged"),
    [(401, True, OK), (403, False, OK), (200, True, FAIL), (200, False, WARN), (404, True, FAIL)],
)
def test_a_job_api_that_takes_requests_without_a_token(status, beyond, judged):
    with page(status) as url:
        assert check_job_api("job API", url, "/api/jobs/", beyond).status == judged


def test_nodes_whose_job_agents_are_open_or_off():
    def node(url: str) -> dict:
        address, _, port = url.removeprefix("http://").rpartition(":")
        return {"NodeManagerAddress": address, "DashboardAgentListenPort": int(port)}

    with page(401) as closed, page(404) as open_one:
        table = [node(closed), node(closed)]
        (finding,) = job_agents(table, lambda port: True)
        assert (finding.status, finding.found[:6]) == (OK, "2 of 2")
        (finding,) = job_agents([*table, node("http://192.0.2.9:-1")], lambda port: True)
        assert (finding.status, finding.found) == (WARN, "none on 192.0.2.9")
        (finding,) = job_agents([*table, node("http://192.0.2.9:-1"), node(open_one)], lambda port: True)
        assert finding.status == FAIL
        assert open_one in finding.found
        assert finding.found.endswith("2 of 4 nodes")


def test_a_job_api_that_does_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert check_job_api("job API", f"http://127.0.0.1:{port}", "/", True).status == UNKNOWN
    assert check_job_api("job API", f"http://127.0.0.1:{port}", "/", True).status == UNKNOWN


@pytest.mark.parametrize(
    ("code", "judged"), [(None, FAIL), ("UNAUTHENTICATED", OK), ("UNIMPLEMENTED", FAIL), ("UNAVAILABLE", UNKNOWN)]
)
def test_a_head_service_that_takes_calls_without_a_token(code, judged):
    """A real gRPC server that answers everything, or refuses it as Ray does. One that looks at the request before it asks
    who sends it is open."""
    import grpc

    class Everything(grpc.GenericRpcHandler):
        def service(self, details):
            def answer(request, context):
                if code is not None:
                    context.abort(grpc.StatusCode[code], "refused")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Everything()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert check_grpc("head", f"127.0.0.1:{port}", GCS_METHOD, beyond=True).status == judged
        if judged == FAIL:
            assert check_grpc("head", f"127.0.0.1:{port}", CLIENT_METHOD, beyond=False).status == WARN
    finally:
        server.stop(None)


def test_the_methods_that_are_tried_exist_in_ray():
    """Else an open service would answer "unimplemented" and a renamed method go unseen."""
    import ray
    from ray.core.generated import ray_client_pb2_grpc

    raylet = Path(ray.__file__).parent / "_raylet.so"
    assert GCS_METHOD.encode() in raylet.read_bytes()
    assert CLIENT_METHOD in Path(ray_client_pb2_grpc.__file__).read_text()


def test_the_tokens_file_is_its_owners_alone(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "auth_token"
        path.write_text("secret")
        for folder_mode, mode, status in (
            (0o755, 0o600, OK),
            (0o755, 0o644, FAIL),
            (0o700, 0o644, WARN),
            (0o711, 0o620, FAIL),
        ):
            os.chmod(folder, folder_mode)
            path.chmod(mode)
            finding = checks.judge_token_file(doctor_nodes.token_file(path))
            assert finding.status == status, (oct(folder_mode), oct(mode))
            assert "secret" not in finding.found + finding.todo
    assert checks.judge_token_file(doctor_nodes.token_file(tmp_path / "none")).status == WARN
    assert checks.judge_token_file(None, in_environment=True).status == OK


# Clocks


def skewed(ahead: float, there: float, back: float):
    """A clock, and a way to ask another that is ahead: the way there and the way back take their time."""
    at = [1000.0]

    def now() -> float:
        return at[0]

    def remote() -> float:
        at[0] += there
        told = at[0] + ahead
        at[0] += back
        return told

    return remote, now


@pytest.mark.parametrize("ahead", [0.0, 0.5, -3.0, 100.0])
@pytest.mark.parametrize(("there", "back"), [(0.01, 0.01), (0.4, 0.0), (0.0, 0.4)])
def test_the_skew_of_a_clock_lies_within_its_uncertainty(ahead, there, back):
    offset, uncertainty = checks.clock_offset(*skewed(ahead, there, back))
    assert offset - uncertainty <= ahead + 1e-9
    assert ahead <= offset + uncertainty + 1e-9
    assert uncertainty == pytest.approx((there + back) / 2)


@pytest.mark.parametrize(
    ("ahead", "way", "status"), [(0.2, 0.01, OK), (-1.5, 0.01, WARN), (31, 0.01, FAIL), (1.5, 2.0, OK)]
)
def test_a_skewed_clock(ahead, way, status):
    finding = checks.judge_clock("clocks", *checks.clock_offset(*skewed(ahead, way, way)))
    assert finding.status == status
    if ahead == -1.5:
        assert "1.5 s behind" in finding.found


# Disks, memory, files, GPUs, CPUs


def test_disks():
    room = {"path": "/x", "total": 100 * GB, "free": 50 * GB, "fault": ""}
    assert checks.judge_disk("x", room).status == OK
    assert checks.judge_disk("x", room | {"free": 9 * GB}).status == WARN
    assert checks.judge_disk("x", room | {"free": 0.9 * GB}).status == FAIL
    assert checks.judge_disk("x", room | {"total": 1000 * GB, "free": 40 * GB}).status == FAIL  # 96 % used
    assert checks.judge_disk("x", doctor_nodes.disk(tempfile.gettempdir())).found.startswith(tempfile.gettempdir())


@pytest.mark.parametrize("path", ["/proc", "/nowhere/at/all", __file__])
def test_folders_that_cannot_be_written(path):
    if not os.path.exists("/proc/self"):
        pytest.skip("needs Linux's /proc, which nobody can write")
    assert checks.judge_disk("storage", doctor_nodes.disk(path)).status == FAIL


def test_shared_memory():
    facts = {
        "shared memory": {"total": 10 * GB, "free": 9 * GB, "fault": ""},
        "resources": {"object_store_memory": 8 * GB},
    }
    assert checks.judge_shared_memory(facts).status == OK
    assert checks.judge_shared_memory(facts | {"resources": {"object_store_memory": 11 * GB}}).status == WARN
    full = {"shared memory": {"total": 10 * GB, "free": GB // 10, "fault": ""}}
    assert checks.judge_shared_memory(facts | full).status == WARN
    assert checks.judge_shared_memory(facts | {"shared memory": doctor_nodes.disk("/proc")}).status == FAIL
    assert checks.judge_shared_memory(facts | {"shared memory": None}).status == OK


@pytest.mark.parametrize(("limit", "status"), [(65536, OK), (4096, WARN), (256, FAIL)])
def test_open_files_of_a_real_process(limit, status):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from copernicus.platform.doctor_checks import judge_files
from copernicus.platform.doctor_nodes import open_files
print(judge_files({{"open files": open_files()}}).status)
"""
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "exceeds" in asked.stderr or "not allowed" in asked.stderr:
        pytest.skip("this system allows fewer open files")
    assert asked.stdout.strip() == status, asked.stderr


NVIDIA = {"device": True, "seen": 2, "names": ["H100", "H100"], "built": "13.0", "driver": 13000}


@pytest.mark.parametrize(
    ("gpus", "ray_gpus", "status", "says"),
    [
        (NVIDIA, 2, OK, "2 (H100), torch for CUDA 13.0"),
        (NVIDIA, 1, OK, "1 (H100)"),
        (NVIDIA, 0, WARN, "Ray counts none"),
        (NVIDIA, 4, FAIL, "torch sees 2, Ray counts 4"),
        (
            NVIDIA | {"seen": 0, "names": [], "driver": 12040},
            2,
            FAIL,
            "built for CUDA 13.0, the driver runs up to 12.4",
        ),
        (NVIDIA | {"seen": 0, "names": [], "built": None}, 2, FAIL, "its CPU build"),
        ({"device": True, "fault": "torch did not answer"}, 1, FAIL, "did not answer"),
        ({"device": False}, 1, FAIL, "the system shows none"),
        ({"device": False}, 0, OK, "none"),
    ],
)
def test_gpus(gpus, ray_gpus, status, says):
    finding = checks.judge_gpus({"gpus": gpus, "resources": {"GPU": float(ray_gpus)} if ray_gpus else {}})
    assert finding.status == status
    assert says in finding.found


def test_torch_is_asked_for_gpus_in_a_process_that_may_hang(monkeypatch):
    import torch

    monkeypatch.setattr(doctor_nodes, "_shows_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = doctor_nodes.gpus()
    assert told["built"] == (torch.version.cuda or torch.version.hip)
    if not torch.cuda.is_available():
        assert told["seen"] == 0
    assert "did not answer for 0.2 s" in doctor_nodes.gpus("import time; time.sleep(60)", 0.2)["fault"]
    assert "ImportError: no driver" in doctor_nodes.gpus("raise ImportError('no driver')")["fault"]


def test_cpus():
    two, none = {"CPU": 2.0}, {"GPU": 1.0}
    assert checks.check_cpus({"a": two, "b": two}, 4).status == OK
    assert "none on b" in checks.check_cpus({"a": two, "b": none}, 2).found
    head = {"node:__internal_head__": 1.0}
    assert checks.check_cpus({"a": two, "head": head}, 2).status == OK
    assert checks.check_cpus({"a": two}, 0).status == WARN
    assert checks.check_cpus({"a": {"CPU": 1.0}}, 1).status == FAIL


def test_nodes_that_were_lost():
    table = [
        {"NodeID": "1", "Alive": True, "NodeManagerHostname": "a", "NodeManagerAddress": "192.0.2.1"},
        {"NodeID": "2", "Alive": False, "NodeManagerHostname": "b", "NodeManagerAddress": "192.0.2.2", "DeathReason": 2, "DeathReasonMessage": "health check failed"},
        {"NodeID": "3", "Alive": False, "NodeManagerHostname": "c", "NodeManagerAddress": "192.0.2.3", "DeathReason": 1},
    ]  # fmt: skip
    finding = checks.check_alive(doctor_nodes.node_names(table), table)
    assert (finding.status, finding.found) == (WARN, "1 alive; lost since the head started: b: health check failed")
    assert checks.check_alive(doctor_nodes.node_names(table), [table[0], table[2]]).status == OK


def test_hosts_of_one_name_are_told_apart():
    table = [{"NodeID": str(i), "NodeManagerHostname": "vm", "NodeManagerAddress": f"192.0.2.{i}"} for i in (1, 2)]
    assert list(doctor_nodes.node_names(table).values()) == ["vm (192.0.2.1)", "vm (192.0.2.2)"]


def test_nodes_with_one_finding_share_a_row():
    nodes = {f"n{i}": {"open files": 65536 if i else 256} for i in range(64)}
    rows = checks.over_nodes("open files", nodes, checks.judge_files)
    assert [(row.status, row.found) for row in rows] == [(FAIL, "n0: 256"), (OK, "n1, n2, n3 and 60 more: 65536")]
    rows = checks.over_nodes(
        "open files", {k: {"open files": 65536 + i} for i, k in enumerate(nodes)}, checks.judge_files
    )
    assert rows[0].found.endswith("; and 61 more nodes alike")


def test_shared_folders():
    assert checks.check_shared([], "/s", 2).status == OK
    finding = checks.check_shared(["b: /s is read-only"], "/s", 2)
    assert (finding.status, finding.found) == (FAIL, "b: /s is read-only")


# Experiments


@pytest.fixture
def experiment(shards, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"name: mine\nkind: pretrain\noutput: {tmp_path}/runs\npretrain: {{shards: [{shards}], workers: 2}}\n"
    )
    return path


def test_room_for_an_experiment(experiment, monkeypatch):
    loaded = load_experiment(experiment)
    assert [f.status for f in room(loaded, {"a": {"CPU": 2.0}}, {"CPU": 2.0})] == [OK]
    (finding,) = room(loaded, {"a": {"CPU": 1.0}}, {})
    assert finding.status == FAIL
    assert "= 2 CPUs, but the cluster has 1" in finding.found
    monkeypatch.setenv("COPERNICUS_AUTOSCALING", "1")
    (finding,) = room(loaded, {"a": {"CPU": 1.0}}, {})
    assert finding.status == OK
    assert "brings more nodes" in finding.found
    assert [f.status for f in room(None, {"head": {}}, {})] == [OK]


def test_room_for_a_trial(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "kind: sweep\nminiature: {out: x, tasks: [eurosat_s2]}\n"
        "sweep: {data: x/bench, tasks: [eurosat_s2], encoders: {r: {weights: none, model: {name: vit_small}}}, cpus_per_trial: 3, search: {lr: {values: [0.1]}}}\n"
    )
    (finding,) = room(load_experiment(path), {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}, {})
    assert finding.status == FAIL
    assert "a trial takes 3 CPUs, the largest node has 2" in finding.found
    assert data_places(load_experiment(path)) == ({}, ["sweep.data"])


def test_places_that_a_node_cannot_read(shards, tmp_path, experiment):
    places, made = data_places(load_experiment(experiment))
    assert made == []
    (shard,) = places.values()
    assert doctor_nodes.why_unreadable(shard) == ""
    assert doctor_nodes.why_unreadable(str(shards)) == ""
    assert "does not exist" in doctor_nodes.why_unreadable(f"{tmp_path}/none.tar")
    (tmp_path / "page.tar").write_text("<html>" * 1000)
    (tmp_path / "short.tar").write_text("")
    (tmp_path / "empty").mkdir()
    assert "tar" in doctor_nodes.why_unreadable(f"{tmp_path}/page.tar")
    assert "tar" in doctor_nodes.why_unreadable(f"{tmp_path}/short.tar")
    assert "empty" in doctor_nodes.why_unreadable(f"{tmp_path}/empty")


def test_a_place_on_an_object_store(s3, shards):
    shard = sorted(Path(shards).glob("*.tar"))[0]
    assert doctor_nodes.why_unreadable(s3.bucket.put("a.tar", shard.read_bytes())) == ""
    assert "does not exist" in doctor_nodes.why_unreadable(f"s3://{s3.bucket.name}/b.tar")


# MLflow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with TrackingServer(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


def test_a_server_takes_a_run_and_nothing_of_it_stays(server):
    from mlflow import MlflowClient

    client = MlflowClient(server.uri)
    before = {e.experiment_id for e in client.search_experiments()}
    finding = check_tracking(server.uri)
    assert finding.status == OK, finding
    assert {e.experiment_id for e in client.search_experiments()} == before
    assert client.search_runs(list(before)) == []
    assert [p for p in (server.folder / "kept").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("table", ["metrics", "runs", "experiments"])
def test_a_server_that_takes_no_writes(server, table):
    from mlflow import MlflowClient

    with sqlite3.connect(server.folder / "server.db") as database:
        database.execute(
            f"CREATE TRIGGER closed BEFORE INSERT ON {table} BEGIN SELECT RAISE(FAIL, 'no writes today'); END"
        )
    try:
        finding = check_tracking(server.uri)
    finally:
        with sqlite3.connect(server.folder / "server.db") as database:
            database.execute("DROP TRIGGER closed")
    assert finding.status == FAIL
    assert [e.name for e in MlflowClient(server.uri).search_experiments()] == ["Default"]


def test_a_server_that_takes_no_files(server):
    kept = server.folder / "kept"
    with contextlib.suppress(FileNotFoundError):
        kept.rename(server.folder / "aside")
    kept.write_text("a file in the folder's place")
    try:
        finding = check_tracking(server.uri)
    finally:
        kept.unlink()
    assert finding.status == FAIL


def test_servers_that_do_not_answer():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        finding = check_tracking(f"http://user:secret@127.0.0.1:{port}", seconds=2)
        assert finding.status == FAIL
        assert "no answer within 2 s" in finding.found
        assert "secret" not in str(finding)
    finding = check_tracking(f"http://user:secret@127.0.0.1:{port}")
    assert (finding.status, finding.found) == (FAIL, f"http://user:***@127.0.0.1:{port}: no server answers")


def test_a_store_that_is_not_there_yet_is_not_made(tmp_path):
    assert try_tracking(f"sqlite:///{tmp_path}/new/mlflow.db").status == OK
    assert list(tmp_path.iterdir()) == []
    if os.path.exists("/proc/self"):
        assert try_tracking("sqlite:////proc/mlflow.db").status == FAIL


# Ray


@pytest.fixture(scope="module")
def ray_here():
    """A session as `copernicus run` starts it, with a dashboard."""
    import ray

    assert not ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init(
            address="local", num_cpus=2, include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=0,
            logging_level="error", log_to_driver=False,
        )  # fmt: skip
        yield ray
        ray.shutdown()


def by_name(findings):
    named: dict[str, list[Finding]] = {}
    for finding in findings:
        named.setdefault(finding.name, []).append(finding)
    return named


def test_a_session_in_order(ray_here, experiment, server, tmp_path):
    told: list[str] = []
    asked = Asked(load_experiment(experiment), str(tmp_path), server.uri)
    findings = by_name(cluster_findings(asked, told.append))
    # The rest (disks, memory, open files, the token's mode) is as this machine is.
    for name in ("nodes", "versions", "clocks", "Ray's head service", "job API", "room for the run"):
        assert [f.status for f in findings[name]] == [OK], findings[name]
    # Its port may be taken by another Ray on this machine.
    assert [f.status for f in findings["nodes' job agents"]] in ([OK], [WARN])
    for name in ("shared storage", "data", "MLflow"):
        assert [f.status for f in findings[name]] == [OK], findings[name]
    assert {
        "GPUs",
        "open files",
        "shared memory",
        "Ray's session",
        "token file",
        "open pages",
        "storage",
    } <= findings.keys()
    assert told == ["nodes", "clocks", "authentication", "CPUs", "storage", "data", "MLflow"]
    assert not (tmp_path / "runs").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.yaml"]


def test_a_session_where_things_are_broken(ray_here, experiment, tmp_path, monkeypatch):
    from copernicus.platform import doctor_cluster

    loaded = load_experiment(experiment)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.tar").write_text("no tar")
    loaded = replace(loaded, pretrain=replace(loaded.pretrain, shards=[str(tmp_path / "s")], workers=20))
    monkeypatch.setattr(doctor_cluster, "versions", lambda: VERSIONS | {"torch": "1.0.0"})
    with socket.create_server(("0.0.0.0", 0)) as open_page:
        uri = f"http://127.0.0.1:{open_page.getsockname()[1]}"
        monkeypatch.setattr(doctor_cluster, "check_tracking", lambda uri: check_tracking(uri, 1.0))
        findings = by_name(cluster_findings(Asked(loaded, "/proc", uri)))
    for name in ("versions", "room for the run", "storage", "data", "MLflow", "open pages"):
        assert FAIL in {f.status for f in findings[name]}, (name, findings[name])


def test_shards_that_are_nowhere(experiment):
    loaded = load_experiment(experiment)
    gone = replace(loaded, pretrain=replace(loaded.pretrain, shards=["/none.tar"]))
    (finding,) = data(gone, probes=None)
    assert finding.status == FAIL
    assert "/none.tar does not exist" in finding.found


def test_a_node_that_does_not_answer(ray_here):
    """A probe that hangs, and one that cannot be made."""
    from copernicus.platform.doctor_cluster import Probes, silence

    probes = Probes(ray_here.nodes())
    answers, silent = probes.ask("facts", seconds=0.0)
    assert not answers
    (finding,) = silence("nodes", silent, "look")
    assert finding.status == FAIL
    assert "no answer within 0 s" in finding.found
    (actor,) = probes.actors.values()
    ray_here.kill(actor)
    _, silent = probes.ask("now", seconds=30.0)
    assert len(silent) == 1


def test_a_head_that_is_not_there_is_found_before_ray_waits():
    with socket.create_server(("127.0.0.1", 0)) as there:
        port = there.getsockname()[1]
        assert ray_reachable(f"127.0.0.1:{port}") is None
    assert ray_reachable(f"127.0.0.1:{port}").status == FAIL
    assert ray_reachable("auto") is None


# The command


def test_lines_of_a_log_are_read_among_others():
    told = []
    reader = doctor.Reader(told.append)
    finding = Finding("clocks", WARN, "x")
    assert reader.read("(raylet) something") is None
    assert reader.read(f"{MARK}broken json") is None
    assert reader.read(MARK + json.dumps({"now": "clocks"})) is None
    assert (
        reader.read("prefix " + MARK + json.dumps({"finding": finding.__dict__, "versions": {"ray": "1"}})) == finding
    )
    assert (told, reader.check, reader.done, reader.versions) == (["clocks"], "clocks", False, {"ray": "1"})
    reader.read(MARK + '{"done": true}')
    assert reader.done


def test_a_check_that_hangs_is_ended_and_named(monkeypatch):
    """Something at RAY_ADDRESS takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        findings = list(doctor.run_here([], lambda check: None, deadline=8))
    assert time.monotonic() - began < 50
    assert [f.status for f in findings] == [UNKNOWN]
    assert "no answer within 8 s" in findings[0].found


def test_checks_that_end_by_themselves_are_told():
    findings = list(doctor.run_here(["--nonsense"], lambda check: None))
    assert [f.status for f in findings] == [FAIL]
    assert "unrecognized arguments: --nonsense" in findings[0].found


def test_the_table_names_what_fails(capsys):
    console = Console(width=120)
    findings = [Finding("a", OK, "fine"), Finding("b [x]", FAIL, "broken [red]", "mend it"), Finding("c", UNKNOWN, "?")]
    doctor.print_table(findings, console)
    printed = capsys.readouterr().out
    assert "b [x]" in printed
    assert "broken [red]" in printed
    assert "1 ok, 1 to look at (1 of them unknown), 1 failed" in printed
    assert (checks.exit_code(findings), checks.exit_code(findings[:1]), checks.exit_code(findings[2:])) == (1, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.yaml"], "none.yaml"),
        (["--storage", "relative"], "absolute path"),
    ],
)
def test_wrong_input_ends_with_2(arguments, says, tmp_path):
    command = [sys.executable, "-m", "copernicus.platform.cli", "doctor", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_finds_an_open_ray(tmp_path):
    """Ray without tokens listens on all addresses: anybody in the network could run code here."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "copernicus.platform.cli", "doctor"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    row = next(line for line in ended.stdout.splitlines() if line.startswith("Ray's head service"))
    assert "fail" in row
    assert "takes requests without a token" in row
    assert list(tmp_path.iterdir()) == []


# From outside, as a client


@pytest.mark.parametrize(("ahead", "status"), [(0, OK), (-5, WARN), (120, FAIL)])
def test_a_clients_clock_against_a_servers(ahead, status, monkeypatch):
    """A real server; the client's clock is what is wrong."""
    real = time.time
    with page(401) as url:
        monkeypatch.setattr(doctor.time, "time", lambda: real() + ahead)
        # The server's date comes from the same function: it keeps the right time.
        monkeypatch.setattr(
            http.server.BaseHTTPRequestHandler, "date_time_string", lambda self: formatdate(real(), usegmt=True)
        )
        findings = {finding.name: finding for finding in doctor.client_findings(url, local=True)}
    assert findings["client's clock"].status == status
    assert findings["job API from here"].status == OK
    if ahead == 120:
        assert "ahead of the head's" in findings["client's clock"].found


def test_a_way_on_which_the_token_can_be_read():
    with page(200) as url:
        findings = {finding.name: finding for finding in doctor.client_findings(url, local=False)}
    assert findings["way to the head"].status == WARN
    assert findings["job API from here"].status == FAIL


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"where": Where(address="http://127.0.0.1:1"), "tracking": "http://me:secret@host:5000"}, "holds a password"),
        ({"where": Where(Path("none.yaml"))}, "no such file"),
        ({"where": Where(Path("none.yaml"), "http://x")}, "not both"),
        ({"overrides": ["a=b"]}, "give its YAML first"),
    ],
)
def test_wrong_options(arguments, says):
    given = {"experiment": None, "overrides": [], "where": Where(), "storage": None, "tracking": None} | arguments
    with pytest.raises(InputError, match=says) as refused:
        doctor.doctor_command(console=Console(), **given)
    assert "secret" not in str(refused.value)


def test_a_cluster_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    findings = list(doctor.run_there(Where(address=f"http://127.0.0.1:{port}"), None, [], lambda check: None))
    assert [f.status for f in findings if f.name == "job server"] == [FAIL]


@pytest.mark.slow
def test_a_cluster_from_outside(server, experiment, tmp_path, monkeypatch):
    """A real head with a token: in order, then with shared storage that is gone, and with a wrong token."""
    from ray_head import ray_head

    storage = tmp_path / "shared"
    storage.mkdir()
    with ray_head(storage, {"MLFLOW_TRACKING_URI": server.uri}) as head:
        for variable in [v for v in os.environ if v.startswith(("RAY_", "MLFLOW_", "COPERNICUS_"))]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)
        where = Where(address=head.address)
        told: list[str] = []
        findings = list(doctor.run_there(where, experiment, [f"output={storage}/runs"], told.append))
        named = by_name(findings)
        for name in (
            "job API from here", "client's clock", "client's versions", "Ray", "nodes", "versions", "clocks",
            "Ray's head service", "job API", "nodes' job agents", "token file", "room for the run", "shared storage", "data", "MLflow",
        ):  # fmt: skip
            assert [f.status for f in named.get(name, [])] == [OK], (name, findings)
        assert server.uri in named["MLflow"][0].found
        assert str(storage) in named["shared storage"][0].found
        assert list(storage.iterdir()) == []
        assert head.token not in str(findings)
        assert "data" in told

        storage.rmdir()
        named = by_name(doctor.run_there(where, None, [], lambda check: None))
        assert FAIL in {f.status for f in named["storage"]}
        assert "shared storage" not in named

        monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
        named = by_name(doctor.run_there(where, None, [], lambda check: None))
        assert "refuses the token" in named["job server"][0].found
