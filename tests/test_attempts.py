"""Failures told and counted: with Ray Train's own states and errors, and in runs whose workers fail for real."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.controller.state import (
    ErroredState,
    InitializingState,
    ReschedulingState,
    RestartingState,
    RunningState,
    SchedulingState,
    ShuttingDownState,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from copernicus.platform import attempts
from copernicus.platform.attempts import Attempts, TooManyFailures, cause


@pytest.fixture
def hurried(monkeypatch):
    """No pauses; what is known of the cluster."""
    monkeypatch.setattr(attempts, "PAUSE_S", 0.0)
    monkeypatch.setattr(attempts, "TICK_S", 0.0)
    monkeypatch.setattr(attempts, "_room", lambda: "2 nodes, 0 of 2 CPUs free")
    monkeypatch.setattr(attempts, "_recount", lambda: None)


def failed(*messages: str) -> RestartingState:
    failures = {rank: ValueError(message) for rank, message in enumerate(messages) if message}
    return RestartingState(WorkerGroupError("", failures))


def group(hosts: list[str]) -> SimpleNamespace:
    workers = [
        SimpleNamespace(
            distributed_context=SimpleNamespace(world_rank=rank),
            metadata=SimpleNamespace(node_id=host, hostname=host, node_ip=f"10.0.0.{rank}"),
            actor=SimpleNamespace(get_metadata=SimpleNamespace(remote=lambda host=host: host)),
        )
        for rank, host in enumerate(hosts)
    ]
    return SimpleNamespace(get_workers=lambda: workers)


def nowhere() -> int:
    """No step was ever reached."""
    return 0


def test_failures_with_progress_between_them_are_no_end(hurried):
    told: list[str] = []
    steps = iter(range(1, 21))
    watch = Attempts(told.append, 1, reached=lambda: next(steps))
    for _ in range(20):
        watch.after_controller_state_update(RunningState(), failed("boom"))
    assert len(told) == 20


def test_failures_in_a_row_are(hurried):
    told: list[str] = []
    steps = iter([7, 7, 7])  # where it was before, and no further
    watch = Attempts(told.append, 2, reached=lambda: next(steps))
    watch.after_worker_group_start(group(["one", "two"]))
    for _ in range(2):
        watch.after_controller_state_update(RunningState(), failed("", "boom"))
    assert len(told) == 2
    assert told[1].startswith("rank 1 on two (10.0.0.1) failed: ValueError: boom; repeated from the last checkpoint")
    assert "failure 2 without a further step, of at most 2" in told[1]
    with pytest.raises(TooManyFailures, match=r"3 failures in a row without a further step.*rank 1 on two.*boom"):
        watch.after_controller_state_update(RunningState(), failed("", "boom"))


def test_who_is_to_blame(hurried):
    told: list[str] = []
    watch = Attempts(told.append, 9, nowhere)
    collateral = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:25120"
    watch.after_controller_state_update(RunningState(), failed(collateral, "first line\nout of range", collateral))
    assert told[0].startswith("rank 1 failed (and 2 more): ValueError: out of range")


def test_what_is_known_of_a_hang_is_told(hurried):
    told: list[str] = []
    reports = iter([None, "no step for 30 min on 2 of 2 workers", "again"])
    watch = Attempts(told.append, 2, nowhere, explain=lambda: next(reports))
    for _ in range(2):
        watch.after_controller_state_update(RunningState(), failed("boom"))
    assert "no step" not in told[0]
    assert "no step for 30 min" in told[1]
    with pytest.raises(TooManyFailures, match="again"):
        watch.after_controller_state_update(RunningState(), failed("boom"))


def test_preemptions_are_told_and_not_counted(hurried):
    told: list[str] = []
    watch = Attempts(told.append, 0, nowhere)
    error = PreemptionError(PreemptionInfo(None, {"node": [1]}))
    for _ in range(5):
        watch.after_controller_state_update(RunningState(), RestartingState(error))
    assert len(told) == 5
    assert "preempt" in told[0]


def test_the_rooms_patience(hurried, monkeypatch):
    """Ray repeats starts that time out for ever, and an elastic run loops until its fewest workers fit."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timeout = ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(2)))
    told: list[str] = []
    watch = Attempts(told.append, 0, nowhere, room_s=600)
    now[0] += 1
    for _ in range(9):
        watch.after_controller_state_update(RunningState(), SchedulingState(None))
        now[0] += 60
        watch.after_controller_state_update(RunningState(), timeout)
    assert told == ["waiting for room for the workers; 2 nodes, 0 of 2 CPUs free"]
    now[0] += 100
    with pytest.raises(TooManyFailures, match=r"for 640 s .* too little room .* 0 of 2 CPUs free"):
        watch.after_controller_state_update(RunningState(), timeout)
    state, watch = InitializingState(), Attempts(told.append, 0, nowhere, room_s=600)
    watch.after_controller_state_update(state, state)
    watch.after_worker_group_start(group(["one"]))
    now[0] += 1000
    watch.after_controller_state_update(state, state)
    now[0] += 601
    with pytest.raises(TooManyFailures):
        watch.after_controller_state_update(state, state)
    patient = Attempts(told.append, 0, nowhere, room_s=None)
    for _ in range(3):
        patient.after_controller_state_update(state, state)
        now[0] += 1e6


UNREACHABLE = ActorUnavailableError("RpcError: connection reset", b"0" * 16)


def of_one_rank() -> RestartingState:
    return RestartingState(WorkerGroupError("", {1: WorkerHealthCheckFailedError("", failure=UNREACHABLE)}))


def of_a_start() -> ReschedulingState:
    error = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    error.__cause__ = UNREACHABLE
    return ReschedulingState(ControllerError(error))


@pytest.mark.parametrize("state", [of_one_rank, of_a_start])
@pytest.mark.parametrize(
    ("alive", "answers"),
    [
        ([True, True, False], [UNREACHABLE, GetTimeoutError()]),  # the node is dead in the end
        ([True, True], [UNREACHABLE, "metadata"]),  # the cable is back
        ([True], [ActorDiedError()]),  # the process alone is gone
    ],
)
def test_a_node_that_may_be_dead_is_waited_for(hurried, monkeypatch, state, alive, answers):
    answers, nodes = iter(answers), iter(alive)

    def get(host, timeout):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": "one", "Alive": True}, {"NodeID": "two", "Alive": next(nodes)}]
    )
    monkeypatch.setattr(ray, "get", get)
    told: list[str] = []
    watch = Attempts(told.append, 3, nowhere)
    watch.after_worker_group_start(group(["one", "two"]))
    watch._workers.pop(0)  # which would be asked, too, where nobody says whose start failed
    watch.after_controller_state_update(RunningState(), state())
    assert "it cannot be reached" in told[0]
    assert next(nodes, None) is next(answers, None) is None, "asked until it was decided, and no longer"


def test_an_end_that_is_not_ours_is_told(hurried):
    told: list[str] = []
    end = ShuttingDownState(ErroredState(ControllerError(RuntimeError("no such file"))))
    Attempts(told.append, 3, nowhere).after_controller_state_update(RunningState(), end)
    assert told == ["the run ends: RuntimeError: no such file"]
    told.clear()
    end = ShuttingDownState(ErroredState(ControllerError(TooManyFailures("..."))))
    Attempts(told.append, 3, nowhere).after_controller_state_update(RunningState(), end)  # who stopped it says so
    assert told == []


def test_causes():
    assert cause(ValueError("a\nb")) == "ValueError: b"
    assert cause(ValueError()) == "ValueError: "
    start = WorkerGroupStartupFailedError("At least one of the worker actors failed to initialize.")
    start.__cause__ = ActorUnavailableError("connection reset", b"0" * 16)
    assert cause(ControllerError(start)).startswith("it cannot be reached")
    for said in (
        "Connection closed by peer [10.0.0.2]:25120. This is",
        "Read error [10.0.0.2]:24249: Connection reset",
    ):
        gloo = f"[/w/gloo/gloo/transport/tcp/pair.cc:553] {said} typically caused by"
        assert (
            cause(RuntimeError(gloo))
            == "its connection to 10.0.0.2 broke: that worker, its node or the network is gone"
        )


# From here on real runs.


@pytest.fixture(scope="module")
def board() -> Iterator:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "3"
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find the tests' folder
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    class Board:
        def __init__(self):
            self.lines, self.begun, self.step = [], 0, 0

        def go(self):
            self.step += 1

        def reached(self):
            return self.step

        def tell(self, line):
            self.lines.append(line)

        def begin(self):
            self.begun += 1
            return self.begun

        def take(self):
            lines, self.lines, self.begun = self.lines, [], 0
            return lines

    yield ray.remote(num_cpus=0)(Board).remote()
    ray.shutdown()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    del os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"]


def loop(config: dict) -> None:
    """One worker; each attempt does what the plan has for it."""
    attempt = ray.get(config["board"].begin.remote())
    for act in config["plan"][attempt - 1].split():
        if act == "step":
            ray.get(config["board"].go.remote())
        elif act == "raise":
            raise ValueError(f"in attempt {attempt}")
        elif act == "die":
            os.kill(os.getpid(), signal.SIGKILL)


def fit(board, folder: Path, plan: list[str], workers: int = 1, **more) -> tuple[list[str], str | None]:
    """What was told, and why the run was stopped."""
    trainer = DataParallelTrainer(
        loop,
        train_loop_config={"board": board, "plan": plan},
        scaling_config=ray.train.ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name="attempts",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=-1),
            callbacks=[
                Attempts(lambda line: board.tell.remote(line), reached=lambda: ray.get(board.reached.remote()), **more)
            ],
        ),
    )
    try:
        trainer.fit()
    except ray.train.ControllerError as error:
        if not isinstance(error.controller_failure, TooManyFailures):
            raise
        return ray.get(board.take.remote()), str(error.controller_failure)
    return ray.get(board.take.remote()), None


@pytest.mark.slow
@pytest.mark.alone
def test_more_failures_than_allowed_in_a_row_in_all(board, tmp_path):
    told, stopped = fit(board, tmp_path, ["step raise", "step die", "step raise", "step"], max_failures=1)
    assert stopped is None
    assert [line.split(" failed: ")[1].split(":")[0] for line in told] == [
        "ValueError", "its process ended", "ValueError",
    ]  # fmt: skip
    assert all("(failure 1 without a further step, of at most 1)" in line for line in told)


@pytest.mark.slow
@pytest.mark.alone
def test_a_run_that_cannot_work_is_stopped(board, tmp_path):
    told, stopped = fit(board, tmp_path, ["step raise", "raise", "never"], max_failures=1)
    assert len(told) == 1
    assert "ValueError: in attempt 1" in told[0]
    assert "2 failures in a row" in stopped
    assert "rank 0 on " in stopped
    assert "ValueError: in attempt 2" in stopped


@pytest.mark.slow
@pytest.mark.alone
def test_a_cluster_too_small_ends_the_run(board, tmp_path):
    told, stopped = fit(board, tmp_path, ["never"], workers=3, max_failures=1, room_s=7)
    assert len(told) == 1
    assert told[0].startswith("waiting for room for the workers; 1 nodes, 2 of 2 CPUs free")
    assert "too little room" in stopped
