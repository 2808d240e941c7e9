"""Pretraining whose workers are unwell: one that stops moving, a node that is about to be taken away, one that comes later."""

from __future__ import annotations

import datetime
import http.server
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_resume import FEW, Run, await_checkpoint, cluster, train_workers
from test_resume import whole_grids as whole_grids  # a fixture
from test_run import final_weights, pretraining

SETTINGS = (
    FEW,
    "pretrain.epochs=12",
    "pretrain.val_fraction=0",
    "pretrain.checkpoint_minutes=0.03",
    "pretrain.checkpoint_every=1000",
)


class Notices:
    """A cloud's metadata service that takes the first machine to ask away, once it is told to."""

    def __init__(self) -> None:
        self.end: float | None = None
        self.machines = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self, code: int, body: str = "") -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_PUT(self) -> None:
                outer.machines += 1
                self.answer(200, f"machine{outer.machines}")

            def do_GET(self) -> None:
                if outer.end is None or self.headers["X-aws-ec2-metadata-token"] != "machine1":
                    return self.answer(404)
                end = datetime.datetime.fromtimestamp(outer.end, datetime.timezone.utc)
                return self.answer(200, json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}))

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def notices(monkeypatch) -> Iterator[Notices]:
    service = Notices()
    monkeypatch.setenv("COPERNICUS_PREEMPTION", "aws")
    monkeypatch.setenv("COPERNICUS_METADATA_URL", f"http://127.0.0.1:{service.server.server_port}")
    yield service
    service.server.shutdown()
    service.server.server_close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, whole_grids) -> Path:
    """The folder of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with cluster() as nodes:
        run = Run(folder, pretraining(folder, whole_grids, "whole"), nodes.address, *SETTINGS)
        assert run.wait() == 0, (folder / "whole.log").read_text()
    return folder


def equal(undisturbed: Path, folder: Path) -> bool:
    a, b = final_weights(undisturbed, "whole"), final_weights(folder, "broken")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_worker_that_stops_is_found_and_the_run_goes_on(tmp_path, whole_grids, undisturbed):
    with cluster() as nodes:
        yaml = pretraining(tmp_path, whole_grids, "broken")
        run = Run(tmp_path, yaml, nodes.address, *SETTINGS, "pretrain.hang_minutes=0.5")
        await_checkpoint(tmp_path, run, set())
        os.kill(train_workers()[0].pid, signal.SIGSTOP)  # the other one waits for it in a collective
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    log = " ".join((tmp_path / "broken.log").read_text().split())
    assert "no step for 30 s on 1 of 2 workers; their stacks are in" in log
    (stacks,) = tmp_path.glob("runs/broken-*/stacks/*.txt")
    assert "pretrain_worker.py" in stacks.read_text()
    assert equal(undisturbed, tmp_path)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_a_node_that_is_taken_away_is_left_with_all_its_steps(tmp_path, whole_grids, undisturbed, notices):
    """A checkpoint at the notice, though none is due: without it the steps since the last would come again."""
    with cluster() as nodes:
        yaml = pretraining(tmp_path, whole_grids, "broken")
        run = Run(tmp_path, yaml, nodes.address, *SETTINGS, "pretrain.checkpoint_minutes=100")
        deadline = time.monotonic() + 180
        while not (notices.machines and train_workers()) and time.monotonic() < deadline:
            time.sleep(0.2)
        time.sleep(3)
        nodes.add_node(num_cpus=2)
        notices.end = time.time() + 20
        seen = await_checkpoint(tmp_path, run, set())
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    log = " ".join((tmp_path / "broken.log").read_text().split())
    # Who says so: the rank that was told, or Ray, which it told.
    assert re.search(
        r"(AWS is about to terminate this spot instance at \S+|Ray drains the node of rank [\d, ]+): saved step \d+",
        log,
    )
    assert "preemption" in log
    assert len(seen) == 1
    assert equal(undisturbed, tmp_path)
