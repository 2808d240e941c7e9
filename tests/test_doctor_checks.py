"""The judgements of `copernicus doctor`, and the facts that they judge: each is shown something broken, and says so."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from http_page import page

from copernicus.platform import doctor_checks as checks
from copernicus.platform import doctor_nodes
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN
from copernicus.platform.doctor_services import (
    CLIENT_METHOD,
    GCS_METHOD,
    check_grpc,
    check_job_api,
    job_agents,
)

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
