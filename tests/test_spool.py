"""Trials on their way to MLflow: whatever dies meanwhile, each is there once, whole and in order."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from tracking_server import LossyWay, TrackingServer

from copernicus.datasets.sensors import InputError
from copernicus.platform import spool as spooling
from copernicus.platform.spool import Lines, NotRecorded, Spool
from copernicus.platform.tracking import Tracker

EPOCHS = 6


def rows(number: int) -> list[tuple[int, dict[str, float]]]:
    """What a trial recorded: a score, and curves."""
    curve = [
        (epoch, {"train_loss": number + 1 / (1 + epoch), "val_oa": 10.0 * epoch + number}) for epoch in range(EPOCHS)
    ]
    return [(EPOCHS, {"score": number / 8, "test/oa": number / 8 - 1}), *curve]


def add(spool: Spool, number: int) -> None:
    key = f"eurosat_s2-random-search-{number}"
    tags = {"kind": "trial", "task": "eurosat_s2", "role": "search", "trial_key": key, "sweep_id": "s1", "seed": number}
    spool.add_run(key, f"trial {number}", tags, "f" * 32, {"lr": number / 1000, "encoder": "random"}, rows(number))


def check(client: MlflowClient, experiment: str, numbers: range) -> None:
    """Each trial is one finished run, with all its figures once; runs began in the order in which they were added."""
    found: list[Run] = []
    token = None
    while token is not None or not found:
        page = client.search_runs([experiment], order_by=["attributes.start_time ASC"], page_token=token)
        found += page
        token = page.token
        if token is None:
            break
    assert [r.info.run_name for r in found] == [f"trial {n}" for n in numbers]
    for number, run in zip(numbers, found, strict=True):
        assert run.info.status == "FINISHED"
        assert run.data.params == {"lr": str(number / 1000), "encoder": "random"}
        assert run.data.tags.items() >= {"seed": str(number), "sweep_id": "s1", "mlflow.parentRunId": "f" * 32}.items()
        expected: dict[str, list[tuple[int, float]]] = {}
        for step, values in rows(number):
            for name, value in values.items():
                expected.setdefault(name, []).append((step, value))
        assert run.data.metrics == {name: history[-1][1] for name, history in expected.items()}
        for name, history in expected.items():
            assert sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)) == history


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    Tracker(uri, "first", folder / "artifacts")  # makes the tables
    return uri


@pytest.fixture
def tracker(store: str, request: pytest.FixtureRequest, tmp_path: Path) -> Tracker:
    """An experiment of the test's own."""
    return Tracker(store, request.node.name, tmp_path / "artifacts")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with TrackingServer(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_records_become_runs_in_order_and_once(tracker, tmp_path):
    with Spool(tracker, tmp_path) as spool:
        for number in range(8):
            add(spool, number)
        add(spool, 3)
        assert spool.wait(60)
        assert spool.pending == 0
        ids = [spool.run_id(f"eurosat_s2-random-search-{n}") for n in range(8)]
        assert spool.run_id("another") is None
    client = MlflowClient(tracker.uri)
    check(client, tracker.experiment_id, range(8))
    assert [client.get_run(i).info.run_name for i in ids] == [f"trial {n}" for n in range(8)]
    with Spool(tracker, tmp_path) as spool:
        assert "eurosat_s2-random-search-7" in spool
        assert "eurosat_s2-random-search-8" not in spool
        for number in range(10):
            add(spool, number)
        assert spool.run_id("eurosat_s2-random-search-2") == ids[2]
    check(client, tracker.experiment_id, range(10))


def test_a_run_keeps_its_end_its_length_and_figures_that_are_no_numbers(tracker, tmp_path):
    with Spool(tracker, tmp_path) as spool:
        before = time.time()
        spool.add_run(
            "a", "a", {}, rows=[(1, {"loss": math.nan}), (2, {"loss": math.inf})], status="FAILED", seconds=7.5
        )
        spool.add_run("b", "b", {"long": "x" * 9000}, parameters={"p/../q*": "y" * 7000, "nul": "a\0b"})
        after = time.time()
    client = MlflowClient(tracker.uri)
    run, other = (client.get_run(spool.run_id(key)) for key in "ab")
    assert run.info.status == "FAILED"
    assert before - 0.001 <= run.info.end_time / 1000 <= after
    assert run.info.end_time - run.info.start_time == 7500
    history = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    assert [step for step, _ in history] == [1, 2]
    assert math.isnan(history[0][1])
    assert history[1][1] > 1e308
    assert other.data.tags["long"] == "x" * 8000
    assert other.data.params == {"p/__/q_": "y" * 6000, "nul": "ab"}


@pytest.mark.parametrize("cut", [1, 2, 30, 10_000])
def test_a_line_that_a_kill_cut_off_is_taken_off(tmp_path, cut):
    path = tmp_path / "lines"
    lines = Lines(path)
    lines.add({"a": 1})
    whole = path.stat().st_size
    lines.add({"b": "x" * 100})
    lines.close()
    os.truncate(path, max(whole, path.stat().st_size - cut))
    again = Lines(path)
    assert again.values == [{"a": 1}]
    again.add({"c": "\n"})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"c": "\n"}]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "spool.jsonl").write_text('{"a": 1}\n{"b": \n{"c": 1}\n')
    with pytest.raises(InputError, match=r"spool\.jsonl: line 2 is damaged"):
        Lines(tmp_path / "spool.jsonl")


def test_a_full_disk_is_said_and_leaves_whole_lines(tracker, tmp_path, monkeypatch):
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 50:
            return write(descriptor, data[:50])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Spool(tracker, tmp_path) as spool:
        add(spool, 0)
        assert spool.wait(60)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                add(spool, 1)
        assert spool.pending == 0
        add(spool, 1)
    check(MlflowClient(tracker.uri), tracker.experiment_id, range(2))


LOGGER = '''
import os, random, signal, sys, time
from pathlib import Path
import mlflow.entities, mlflow.store.tracking.sqlalchemy_store
sys.path.insert(0, sys.argv[1])
from test_spool import add
from copernicus.platform.spool import Spool
from copernicus.platform.tracking import Tracker

uri, experiment, folder, count = sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])

def die(): os.kill(os.getpid(), signal.SIGKILL)

def work(point):
    """The whole list, as a sweep that begins again does: what is kept already is not added again."""
    tracker = Tracker(uri, experiment)
    spool = Spool(tracker, folder, patience=120)
    name, _, when = point.partition(" ")
    if name in ("create_run", "log_batch", "set_terminated"):
        call, calls = getattr(tracker.client, name), [0]
        def killed(*arguments, **named):
            calls[0] += 1
            if calls[0] == 2 and when == "before": die()
            result = call(*arguments, **named)
            if calls[0] == 2 and when == "after": die()
            return result
        setattr(tracker.client, name, killed)
    with spool:
        if name == "receipt":
            kept, added = spool._receipts.add, [0]
            def torn(value):
                added[0] += 1
                if added[0] == 2:
                    os.write(spool._receipts.descriptor, b'{"key": "eurosa')
                    die()
                kept(value)
            spool._receipts.add = torn
        for number in range(count):
            add(spool, number)
            if name == "adding" and number == 4:
                os.write(spool._records.descriptor, b'{"key": "eurosa')
                die()
            time.sleep(0.01)

for point in sys.argv[6].split(","):
    child = os.fork()
    if child == 0:
        try:
            work(point)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if point.startswith("at "):
        time.sleep(float(point[3:]))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    print(point, os.waitstatus_to_exitcode(status), flush=True)
'''
"""Logs trials in children of its own, which die at points that are given; the imports are paid once."""


def killed_at(points: list[str], tracker: Tracker, folder: Path, count: int) -> dict[str, int]:
    """How the logging process ended, by where it was to be killed; the last one is left to end."""
    arguments = [str(Path(__file__).parent), tracker.uri, tracker.client.get_experiment(tracker.experiment_id).name]
    done = subprocess.run(
        [sys.executable, "-c", LOGGER, *arguments, str(folder), str(count), ",".join([*points, "never"])],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert ends.pop("never") == "0", done.stderr
    return {point: int(end) for point, end in ends.items()}


POINTS = [f"{name} {when}" for name in ("create_run", "log_batch", "set_terminated") for when in ("before", "after")]


def test_a_logger_killed_anywhere_records_everything_once(tracker, tmp_path):
    ends = killed_at(["adding", *POINTS, "receipt"], tracker, tmp_path, 16)
    assert set(ends.values()) == {-signal.SIGKILL}, ends
    check(MlflowClient(tracker.uri), tracker.experiment_id, range(16))


@pytest.mark.slow
def test_a_logger_killed_at_any_time_records_everything_once(tracker, tmp_path):
    ends = killed_at([f"at {0.05 + 0.07 * i:.2f}" for i in range(20)], tracker, tmp_path, 60)
    assert -signal.SIGKILL in ends.values()
    check(MlflowClient(tracker.uri), tracker.experiment_id, range(60))


@pytest.mark.slow
def test_a_logger_killed_anywhere_records_everything_once_on_a_server(server, tmp_path):
    tracker = Tracker(server.uri, "killed loggers")
    ends = killed_at(["create_run after", "log_batch after", "receipt"], tracker, tmp_path, 8)
    assert set(ends.values()) == {-signal.SIGKILL}, ends
    check(MlflowClient(server.uri), tracker.experiment_id, range(8))


def outage(server: TrackingServer, folder: Path, name: str, seconds: float, count: int) -> list[str]:
    """Trials are added steadily while the server is killed, stays away and comes back. What was said about it."""
    tracker = Tracker(server.uri, name)
    said: list[str] = []
    back = threading.Thread(target=lambda: (time.sleep(seconds), server.start()))
    with Spool(tracker, folder, patience=300, on_state=said.append) as spool:
        for number in range(count):
            if number == count // 4:
                server.kill()
                back.start()
            add(spool, number)
            time.sleep(0.02)
        back.join()
        assert spool.wait(300), said
    check(MlflowClient(server.uri), tracker.experiment_id, range(count))
    return said


def test_a_server_that_dies_and_comes_back_costs_nothing(server, tmp_path):
    said = outage(server, tmp_path, "died", 1, 20)
    assert len(said) == 2
    assert "spool.jsonl; trying again" in said[0]
    assert "answers again" in said[1]


@pytest.mark.slow
def test_two_minutes_without_a_server_cost_nothing(server, tmp_path):
    said = outage(server, tmp_path, "two minutes", 120, 100)
    assert len(said) == 2, "an outage is said once, however long"


@pytest.mark.parametrize("request_path", ["runs/create", "runs/log-batch", "runs/update"])
def test_an_answer_that_is_lost_makes_nothing_twice(server, tmp_path, request_path):
    with LossyWay(server.port) as way:
        tracker = Tracker(way.uri, f"lost {request_path}")
        with Spool(tracker, tmp_path) as spool:
            add(spool, 0)
            assert spool.wait(60)
            way.lose = request_path
            add(spool, 1)
            add(spool, 2)
            assert spool.wait(60)
        assert way.lost == 1
        check(MlflowClient(server.uri), tracker.experiment_id, range(3))


def test_a_server_that_stood_still_makes_nothing_twice(server, tmp_path, monkeypatch):
    """Requests that were given up are worked off all the same when it goes on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    tracker = Tracker(server.uri, "stood still")
    create, calls = tracker.client.create_run, [0]

    def stopped(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 2:
            server.signal(signal.SIGSTOP)
            threading.Timer(2.5, server.signal, [signal.SIGCONT]).start()
        return create(*arguments)

    monkeypatch.setattr(tracker.client, "create_run", stopped)
    with Spool(tracker, tmp_path) as spool:
        for number in range(4):
            add(spool, number)
        assert spool.wait(60)
    assert calls[0] >= 4
    check(MlflowClient(server.uri), tracker.experiment_id, range(4))


def test_a_run_that_a_request_given_up_makes_late_goes_again(tracker, tmp_path, monkeypatch):
    create, calls = tracker.client.create_run, [0]

    def late(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == 1:
            raise MlflowException("API request failed with timeout exception")
        if calls[0] == 2:
            create(*arguments)  # the first request's, after we had looked for it
        return create(*arguments)

    monkeypatch.setattr(tracker.client, "create_run", late)
    with Spool(tracker, tmp_path) as spool:
        for number in range(3):
            add(spool, number)
        assert spool.wait(60)
    check(MlflowClient(tracker.uri), tracker.experiment_id, range(3))


def test_records_that_no_server_takes_are_kept_and_replayed_by_the_next(server, tmp_path):
    said: list[str] = []
    with LossyWay(server.port) as way:
        tracker = Tracker(way.uri, "kept")

        def silenced() -> None:
            with Spool(tracker, tmp_path, patience=0.3, on_state=said.append) as spool:
                add(spool, 0)
                assert spool.wait(60)
                way.close()
                add(spool, 1)
                add(spool, 2)
                assert not spool.wait(0.1)

        with pytest.raises(NotRecorded, match=r"2 records are not in MLflow yet.*spool\.jsonl, and the same command"):
            silenced()
        way.open = True
        with Spool(tracker, tmp_path) as spool:
            assert spool.wait(60)
        check(MlflowClient(server.uri), tracker.experiment_id, range(3))


def test_what_happened_inside_is_raised_though_records_are_left(server, tmp_path):
    said: list[str] = []
    with LossyWay(server.port) as way:
        tracker = Tracker(way.uri, "interrupted")

        def interrupted() -> None:
            with Spool(tracker, tmp_path, patience=0.2, on_state=said.append) as spool:
                way.close()
                add(spool, 0)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert "1 records are not in MLflow yet" in said[-1]


def test_a_deleted_experiment_is_said_at_once_and_its_records_kept(tracker, tmp_path):
    said: list[str] = []
    client = MlflowClient(tracker.uri)

    def deleted() -> None:
        with Spool(tracker, tmp_path, on_state=said.append) as spool:
            add(spool, 0)
            assert spool.wait(60)
            client.delete_experiment(tracker.experiment_id)
            add(spool, 1)
            assert not spool.wait(60)

    with pytest.raises(NotRecorded, match=r"1 records .* was deleted; restore it"):
        deleted()
    assert len(said) == 1
    assert "was deleted; restore it" in said[0]
    client.restore_experiment(tracker.experiment_id)
    with Spool(tracker, tmp_path):
        pass
    check(client, tracker.experiment_id, range(2))


def test_a_record_that_mlflow_refuses_is_named_and_holds_up_nothing(tracker, tmp_path, monkeypatch):
    monkeypatch.setattr(spooling, "FIRST_PAUSE_S", 0.001)
    said: list[str] = []
    with Spool(tracker, tmp_path, on_state=said.append) as spool:
        spool.add_run("impossible", "impossible", {}, rows=[(1 << 80, {"loss": 1.0})])  # no database has such a step
        add(spool, 0)
        assert spool.wait(60)
        assert list(spool.refused) == ["impossible"]
    client = MlflowClient(tracker.uri)
    assert any("refuses trial impossible" in message for message in said)
    put_aside = client.get_run(spool.run_id("impossible"))
    assert put_aside.info.status == "FAILED"
    assert "refused" in put_aside.data.tags
    with Spool(tracker, tmp_path) as again:
        assert list(again.refused) == ["impossible"], "and is not tried again"
        assert again.pending == 0
    client.delete_run(put_aside.info.run_id)
    check(client, tracker.experiment_id, range(1))
