"""`copernicus doctor` on experiments, MLflow, Ray and clusters: each is shown broken, and the doctor says so."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from http_page import page
from rich.console import Console
from tracking_server import TrackingServer

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor, doctor_nodes
from copernicus.platform import doctor_checks as checks
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN, Finding
from copernicus.platform.doctor_cluster import MARK, Asked, cluster_findings, data, data_places, ray_reachable, room
from copernicus.platform.doctor_services import (
    check_tracking,
    try_tracking,
)
from copernicus.platform.experiment import load_experiment
from copernicus.platform.submit import Where

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0+cpu", "mlflow": "3.17.2", "copernicus": "1a2b3c4d"}
GB = 10**9


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


@pytest.mark.chaos
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


@pytest.mark.chaos
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
