"""Notices of both clouds, from a server that answers as theirs do; and what Ray makes of one."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator

import pytest

from copernicus.platform.preemption import PreemptionNotice

END = "2030-01-02T03:04:05Z"
END_S = 1893553445.0  # `date -u -d 2030-01-02T03:04:05 +%s`


class Metadata:
    """A machine's metadata service, of both clouds. ``state``: running, going, broken, slow or garbled."""

    def __init__(self) -> None:
        self.state, self.tokens, self.asked = "running", 0, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, code: int, body: str) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_PUT(self) -> None:
                if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
                    return self.answer(400, "")
                outer.tokens += 1
                return self.answer(200, f"token{outer.tokens}")

            def do_GET(self) -> None:
                outer.asked += 1
                if outer.state == "broken":
                    return self.answer(503, "try later")
                if outer.state == "slow":
                    time.sleep(3)  # longer than anybody waits
                going = outer.state == "going"
                if self.path == "/latest/meta-data/spot/instance-action":
                    if self.headers.get("X-aws-ec2-metadata-token") != f"token{outer.tokens}":
                        return self.answer(401, "")
                    if outer.state == "garbled":
                        return self.answer(200, "<html>")
                    body = json.dumps({"action": "terminate", "time": END})
                    return self.answer(200, body) if going else self.answer(404, "")
                if self.path == "/computeMetadata/v1/instance/preempted":
                    if self.headers.get("Metadata-Flavor") != "Google":
                        return self.answer(403, "")
                    return self.answer(200, "TRUE" if going else "<html>" if outer.state == "garbled" else "FALSE")
                return self.answer(404, "")

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.server.shutdown()
    service.server.server_close()


def until(condition, seconds: float = 60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def environ(cloud: str, url: str) -> dict[str, str]:
    return {"COPERNICUS_PREEMPTION": cloud, "COPERNICUS_METADATA_URL": url + "/"}


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_notice_after_troubles_of_every_kind(metadata, cloud):
    drained: list[tuple[str, float | None]] = []
    with PreemptionNotice(0.05, environ(cloud, metadata.url), lambda *what: drained.append(what)) as notice:
        for state in ("running", "broken", "garbled", "slow", "running"):
            metadata.state, before = state, metadata.asked
            until(lambda before=before: metadata.asked >= before + 2)
            assert notice.given is None, state
        metadata.tokens += 1  # the old one is not taken any more
        metadata.state = "going"
        reason = until(lambda: notice.given)
        [(told, end)] = until(lambda: drained)
    assert told == reason
    if cloud == "aws":
        assert "terminate" in reason
        assert END in reason
        assert end == END_S
    else:
        assert "preempt" in reason
        assert 0 < end - time.time() <= 30


def test_a_notice_stands_although_the_node_cannot_be_drained(metadata):
    """Here no Ray runs, so the real drain fails."""
    metadata.state = "going"
    with PreemptionNotice(0.05, environ("gcp", metadata.url)) as notice:
        assert "GCP" in until(lambda: notice.given)
    assert "GCP" in notice.given


def test_nobody_is_asked_unless_told_so(metadata, caplog):
    metadata.state = "going"
    for cloud in ("", "azure"):
        with PreemptionNotice(
            0.01, {"COPERNICUS_PREEMPTION": cloud, "COPERNICUS_METADATA_URL": metadata.url}
        ) as notice:
            time.sleep(0.1)
            assert notice.given is None
    assert metadata.asked == 0
    assert "azure: expected aws or gcp" in caplog.text


def test_no_service_there(metadata):
    metadata.server.shutdown()
    metadata.server.server_close()
    for cloud in ("aws", "gcp"):
        with PreemptionNotice(0.01, environ(cloud, metadata.url)) as notice:
            time.sleep(0.2)
            assert notice.given is None


@pytest.mark.chaos
def test_a_notice_reaches_the_other_nodes_workers_and_counts_as_no_failure(metadata, tmp_path):
    import ray
    import ray.train
    from ray.cluster_utils import Cluster
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    def two_workers(config: dict) -> None:
        """The second is on the spot machine; both wait for a notice and then for the end."""
        rank = ray.train.get_context().get_world_rank()
        if ray.get(config["board"].count.remote()) > 1:
            return  # the second attempt
        with PreemptionNotice(0.2, config["environ"] if rank == 1 else {}) as notice:
            while notice.given is None:
                time.sleep(0.05)
            ray.get(config["board"].put.remote(rank, notice.given))
            time.sleep(600)

    metadata.state = "going"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(3):  # one to spare
            cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

        @ray.remote(num_cpus=0)
        class Board:
            def __init__(self):
                self.told, self.attempts = {}, {}

            def put(self, rank, reason):
                self.told[rank] = reason

            def get(self):
                return self.told

            def count(self):
                """Attempts so far: each has two callers."""
                self.attempts[len(self.attempts)] = True
                return (len(self.attempts) + 1) // 2

        board = Board.remote()
        # GCP's notice: half a minute, after which the node is taken for lost and the second attempt begins.
        DataParallelTrainer(
            two_workers,
            train_loop_config={"board": board, "environ": environ("gcp", metadata.url)},
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
            run_config=ray.train.RunConfig(
                name="notice", storage_path=str(tmp_path), failure_config=ray.train.FailureConfig(max_failures=0)
            ),
        ).fit()
        told = ray.get(board.get.remote())
        assert set(told) == {0, 1}
        assert "GCP" in told[1]
        assert told[0].startswith("Ray drains the node of rank 1")
    finally:
        ray.shutdown()
        cluster.shutdown()
