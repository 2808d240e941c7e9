"""A cluster of isolated hosts, for real: `ray up`, experiments submitted to it, `ray down`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
from hosts import isolated_hosts, why_not
from launched import LaunchedCluster, launched_cluster
from losing import RAYLET, TRAINER
from test_run import EXPERIMENTS, copernicus, final_weights, runs

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

SMOKE = str(EXPERIMENTS / "pretrain_base_smoke.yaml")
SWEEP = [
    str(EXPERIMENTS / "quickstart_smoke.yaml"),
    "name=small_sweep",
    "kind=sweep",
    "sweep.tasks=[eurosat_s2]",
    "sweep.encoders={random: {weights: none}, other: {weights: none, seed: 1}}",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    with launched_cluster(tmp_path_factory.mktemp("cluster")) as launched:
        yield launched


@pytest.mark.slow
@pytest.mark.alone
def test_hosts_are_apart_and_leave_nothing_behind(tmp_path):
    def links() -> set[str]:
        return {link["ifname"] for link in json.loads(subprocess.check_output(["ip", "-json", "link"]))}

    before = links()
    with isolated_hosts(tmp_path / "a", 2, disk_mb=16) as network, isolated_hosts(tmp_path / "b", 1) as other:
        one, two = network.hosts
        assert one.run("hostname").stdout == "host1\n"
        one.run("echo mine > /tmp/file")
        assert two.run("cat /tmp/file", check=False).returncode != 0
        one.run(f"echo ours > {network.shared}/file")
        assert two.run(f"cat {network.shared}/file").stdout == "ours\n"
        assert other.hosts[0].address != one.address
        one.run("nohup sleep 1234 >/dev/null 2>&1 &")
        assert [len(host.processes("sleep 1234")) for host in (one, two, *other.hosts)] == [1, 0, 0]
        assert "sleep" not in two.run("ps -e").stdout
        assert one.kill("sleep 1234") == 1
        one.fill()
        assert "No space left" in one.run("echo 1 > /tmp/other", check=False).stderr
        one.free()
        one.run("echo 1 > /tmp/other")
        two.cut()
        assert two.run("true", check=False).returncode == 255
        two.mend()
        two.run("true")
        two.stop()
        two.start()
        assert two.run("ls /tmp/file", check=False).returncode != 0
        first = [host.processes("sshd_config")[0] for host in (one, two, *other.hosts)]
    assert links() == before
    assert not any(process.is_running() for process in first)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_a_submitted_pretraining_spans_both_nodes_and_ends_as_it_does_here(cluster, tmp_path):
    one_a_node = ["pretrain.cpus_per_worker=1.5", "pretrain.data_cpus=0.5"]  # nodes have two CPUs
    log = tmp_path / "job.log"
    job = cluster.submit(log, SMOKE, *one_a_node)
    trained_on = set()
    while job.poll() is None:
        trained_on |= {host.name for host in cluster.network.hosts if host.processes(TRAINER)}
        time.sleep(0.3)
    output = log.read_text()
    assert job.returncode == 0, output
    assert trained_on == {"host1", "host2"}
    assert "1/2 miniature Earth" in output, "the job's log is followed"
    assert "/#/experiments/" in output, "it ends with the link to MLflow"

    (submitted,) = (r for r in cluster.runs() if r.tags["experiment"] == "pretrain_base_smoke")
    assert submitted.status == "FINISHED"
    copernicus(tmp_path, "run", SMOKE)
    (here,) = runs(tmp_path).values()
    for name, bound in (
        ("train/loss", 1e-5),
        ("val/loss", 1e-5),
        ("train/samples_seen", 0),
        ("data/epochs_verified", 0),
    ):
        assert submitted.metrics[name] == pytest.approx(here["metrics"][name], rel=bound, abs=0), name
    expected, got = final_weights(tmp_path, "pretrain_base_smoke"), final_weights(cluster.shared, "pretrain_base_smoke")
    assert expected.keys() == got.keys()
    for name in expected:
        # A worker that has a node for itself computes on more threads, whose sums round otherwise.
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.chaos  # four minutes; submission itself is shown above
@pytest.mark.timeout(900)
def test_a_submitted_sweep_ends_as_it_does_here(cluster, tmp_path):
    output = cluster.copernicus("submit", *SWEEP, "--cluster", str(cluster.file))
    assert "Leaderboard" in output
    tracked = cluster.runs()
    trials = [r for r in tracked if r.tags.get("sweep") == "small_sweep" and r.tags["kind"] == "trial"]
    assert len(trials) == 2 * (2 + 2)
    assert {r.status for r in tracked} == {"FINISHED"}
    copernicus(tmp_path, "run", *SWEEP)

    def scores(folder) -> dict:
        (board,) = folder.glob("runs/small_sweep-*/leaderboard.json")
        return {(s["encoder"], s["seed"]): s["test"] for s in json.loads(board.read_text())["scores"]}

    assert scores(cluster.shared) == pytest.approx(scores(tmp_path), rel=1e-6)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_doctor_looks_at_both_nodes(cluster):
    output = cluster.copernicus("doctor", "--cluster", str(cluster.file), SMOKE)
    assert ", 0 failed" in output, output
    for row in ("nodes +ok +2 alive", "nodes' job agents +ok +2 of 2 refuse who has no token", "clocks +ok +all 2 nodes",
                "shared storage +ok ", "MLflow +ok ", "client's versions +ok "):  # fmt: skip
        assert re.search(rf"^{row}", output, re.MULTILINE), f"{row}\n{output}"


@pytest.mark.slow
@pytest.mark.alone
def test_nothing_but_ssh_is_offered_to_who_has_no_token(cluster):
    for port in (8265, 5000):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((cluster.head.address, port), timeout=5)
    asked = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8265/api/jobs/"
    assert cluster.head.run(asked).stdout == "401"
    token = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"'
    assert cluster.head.run(f"{asked} {token}").stdout == "200"


@pytest.mark.chaos  # three minutes, nearly all of them waiting
def test_down_stops_every_node(cluster):
    """The last test of this cluster. `ray down` stops the head of a `local` cluster; the other nodes end when they have
    looked for it in vain (RAY_gcs_rpc_server_reconnect_timeout_s in the file)."""
    assert all(host.processes(RAYLET) for host in cluster.network.hosts)
    cluster.down()
    assert not cluster.head.processes(RAYLET)
    end = time.monotonic() + 400
    while left := [host.name for host in cluster.workers if host.processes(RAYLET)]:
        assert time.monotonic() < end, f"Ray runs on: {left}"
        time.sleep(1)
