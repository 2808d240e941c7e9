"""What becomes of a training run's failed attempts: each is told, and those in a row without progress are counted.

Ray Train (2.60) counts all failures of a run together. A run of weeks on spot machines loses nodes every day, so any
such number is too small; one that cannot work at all must not be repeated for ever, so none is too large. Here Ray is
told to repeat always, and `Attempts` stops the run. It lives in Ray Train's controller, a process on the driver's node,
where it hears of every change of state; what it raises there ends the run (`after_controller_state_update` is the one
hook that hears of workers' failures, of failed starts and of preemptions alike).
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

PAUSE_S, LONGEST_PAUSE_S = 5.0, 60.0
"""Before the second failure in a row is repeated, and at most; it doubles in between. A cause outside of the run (a node
that is just booting, a storage that is away) is given time to pass."""

VERDICT_S = 200.0
"""How long a node may take to be known as dead: until then Ray puts workers on it again, and they fail again. The cluster
files give a silent node up to three minutes (RAY_health_check_*), so that a cable that is out for one does not count."""

TICK_S, ANSWER_S = 1.0, 2.0


class TooManyFailures(RuntimeError):
    """The run was stopped; the message says after what."""


class Attempts(ControllerCallback, WorkerGroupCallback):
    """For ``RunConfig(callbacks=[...])``, beside ``FailureConfig(max_failures=-1)``.

    A step further than any before is progress; a checkpoint is not asked for, since Ray's controller hears of it up to two
    seconds later, and never if the worker dies before. A preemption is told and not counted. A run that ends through this
    raises ``ray.train.ControllerError`` from ``fit()``, whose ``controller_failure`` is a `TooManyFailures`.

    Args:
        tell: takes one line for each failure and each wait; is called in the controller's process, must be picklable,
            and must not block.
        max_failures: so many failures in a row without a further step are repeated; one more ends the run.
        reached: the furthest step of any attempt so far; asked at each failure.
        room_s: how long the workers' resources may be missing before the run is ended; None: for ever, where a cluster
            brings nodes by itself.
        explain: asked at each failure of workers for more about it (`hang_watch.HangReports`); None or text.
    """

    def __init__(
        self,
        tell: Callable[[str], Any],
        max_failures: int,
        reached: Callable[[], int],
        room_s: float | None = 600.0,
        explain: Callable[[], str | None] = lambda: None,
    ):
        self.tell, self.max_failures, self.reached = tell, max_failures, reached
        self.room_s, self.explain = room_s, explain
        self.in_a_row = self.furthest = 0
        self._workers: dict[int, tuple[str, str, Any]] = {}  # rank -> (node's id, host and address, actor)
        self._waiting_since: float | None = None
        self._told_waiting = False

    def after_worker_group_start(self, worker_group: Any) -> None:
        self._waiting_since, self._told_waiting = None, False
        self._workers = {
            worker.distributed_context.world_rank: (
                worker.metadata.node_id,
                f"{worker.metadata.hostname} ({worker.metadata.node_ip})",
                worker.actor,
            )
            for worker in worker_group.get_workers()
        }

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Every step of the controller. What this raises is not repeated: it ends the run.

        Raises:
            TooManyFailures: and the workers are stopped.
        """
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
        from ray.train.v2._internal.execution.controller.state import (
            ErroredState,
            InitializingState,
            ReschedulingState,
            RestartingState,
            SchedulingState,
            ShuttingDownState,
        )
        from ray.train.v2.api.exceptions import PreemptionError

        waiting = isinstance(current_state, InitializingState | ReschedulingState | RestartingState)
        if current_state is previous_state:
            if waiting:  # an elastic run goes round here until its fewest workers fit, without a pause of its own
                self._wait_for_room()
                time.sleep(TICK_S)
        elif isinstance(current_state, SchedulingState):
            self._waiting_since = self._waiting_since or time.monotonic()
        elif isinstance(current_state, ShuttingDownState) and isinstance(current_state.next_state, ErroredState):
            error = current_state.next_state.training_failed_error
            if not isinstance(_inner(error), TooManyFailures):
                self.tell(f"the run ends: {self._says(error)}")
        elif isinstance(current_state, ReschedulingState | RestartingState):
            error = current_state.training_failed_error
            if isinstance(_inner(error), WorkerGroupStartupTimeoutError):
                self._wait_for_room()
            elif isinstance(error, PreemptionError) or _preempted(error):
                self.tell(f"{self._says(error)}; this goes on from the last checkpoint with the nodes that are left")
                _recount()
            else:
                self._failed(error)

    def _failed(self, error: Any) -> None:
        if (step := self.reached()) > self.furthest:
            self.in_a_row, self.furthest = 0, step
        self.in_a_row += 1
        what = self._says(error)
        if (more := self.explain()) is not None:
            what = f"{what}\n{more}\n"
        if self.in_a_row > self.max_failures:
            raise TooManyFailures(f"{self.in_a_row} failures in a row without a further step; the last one: {what}")
        count = f"failure {self.in_a_row} without a further step, of at most {self.max_failures}"
        self.tell(f"{what}; repeated from the last checkpoint ({count})")
        self._await_verdict(error)
        if self.in_a_row > 1:
            # This holds the controller up, which has nothing else to do; Ctrl-C ends it all the same (`trainer.py`).
            time.sleep(min(PAUSE_S * 2 ** (self.in_a_row - 2), LONGEST_PAUSE_S))
        _recount()

    def _wait_for_room(self) -> None:
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        waited = now - self._waiting_since
        if self.room_s is not None and waited > self.room_s:
            raise TooManyFailures(f"for {waited:.0f} s the cluster had too little room for the workers; {_room()}")
        if waited > 5 and not self._told_waiting:
            self._told_waiting = True
            self.tell(f"waiting for room for the workers; {_room()}")

    def _await_verdict(self, error: Any) -> None:
        """Workers that are just unreachable were most likely on a node that died. Wait until Ray knows, or one answers."""
        from ray.exceptions import ActorUnavailableError

        failures = getattr(error, "worker_failures", None) or dict.fromkeys(self._workers, error)
        doubtful = {
            rank
            for rank, failure in failures.items()
            if rank in self._workers and isinstance(_inner(failure), ActorUnavailableError)
        }
        deadline = time.monotonic() + VERDICT_S
        while time.monotonic() < deadline and any(self._undecided(rank) for rank in doubtful):
            time.sleep(TICK_S)

    def _undecided(self, rank: int) -> bool:
        """Whether a worker is neither known to be gone, itself or with its node, nor answers."""
        import ray

        node, _, actor = self._workers[rank]
        if not any(known["NodeID"] == node and known["Alive"] for known in ray.nodes()):
            return False
        try:
            ray.get(actor.get_metadata.remote(), timeout=ANSWER_S)
        except (ray.exceptions.ActorUnavailableError, ray.exceptions.GetTimeoutError):
            return True
        except ray.exceptions.RayError:
            return False
        return False

    def _says(self, error: Any) -> str:
        """One line: who failed, where, and why."""
        failures = getattr(error, "worker_failures", None)
        if not failures:
            return cause(error)
        rank = min(failures, key=lambda rank: (_collateral(failures[rank]), rank))
        where = f" on {self._workers[rank][1]}" if rank in self._workers else ""
        others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        return f"rank {rank}{where} failed{others}: {cause(failures[rank])}"


def cause(error: BaseException) -> str:
    """Why, in a line, of what Ray Train has for an error."""
    from ray.exceptions import ActorUnavailableError, RayActorError

    inner = _inner(error)
    text = str(inner).strip()
    if isinstance(inner, ActorUnavailableError):
        return "it cannot be reached: its process, its node or the network is gone"
    if isinstance(inner, RayActorError):
        if match := re.search(r"Worker exit detail: (.*)", text):
            return f"its process ended: {_first_sentence(match[1])}"
        if "node" in text and "died" in text:
            return "its node died"
    if match := _BROKEN.search(text):
        return f"its connection to {match[1]} broke: that worker, its node or the network is gone"
    lines = text.splitlines() or [""]
    # What Ray raises says the most important first; Python's own errors end with it.
    line = lines[0] if type(inner).__module__.startswith("ray.") else lines[-1]
    return f"{type(inner).__name__}: {line.strip()}"


_BROKEN = re.compile(r"gloo/.* \[([\da-fA-F.:]+)\]:\d+")
"""What gloo says when another rank is gone, with that one's address."""
_COLLATERAL = re.compile(
    r"connection (closed|reset)|broken pipe|timed out waiting|gloo|nccl|store.*(closed|timeout)", re.I
)


def _collateral(error: BaseException) -> bool:
    """Whether this is what ranks say when another one is gone."""
    from ray.exceptions import RayActorError

    inner = _inner(error)
    return not isinstance(inner, RayActorError) and bool(_COLLATERAL.search(str(inner)))


def _inner(error: Any) -> BaseException:
    """What is wrapped by Ray Train."""
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    for name in ("controller_failure", "health_check_failure"):
        error = getattr(error, name, None) or error
    if isinstance(error, WorkerGroupStartupFailedError) and error.__cause__ is not None:
        return error.__cause__  # what its own message leaves out: which actor failed, and why
    return error


def _preempted(error: Any) -> bool:
    failures = getattr(error, "worker_failures", None) or {}
    return any(getattr(_inner(failure), "preempted", False) for failure in failures.values())


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z\d)])\. (?=[A-Z])", text.strip())[0].rstrip(".")


def _recount() -> None:
    """An elastic run asks Ray's coordinator what there is, which looks every 20 s only: with a node that is gone by now
    it would try the former number of workers and wait a minute for it."""
    import ray
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    with contextlib.suppress(ray.exceptions.RayError):  # then it takes the minute
        asked = get_or_create_autoscaling_coordinator().get_reserved_resources.remote("", recompute=True)
        ray.get(asked, timeout=10)


def _room() -> str:
    import ray

    free, there = ray.available_resources(), ray.cluster_resources()
    parts = [f"{free.get(name, 0):g} of {there[name]:g} {name}s free" for name in ("CPU", "GPU") if name in there]
    nodes = sum(node["Alive"] for node in ray.nodes())
    return f"{nodes} nodes, {', '.join(parts) or 'without CPUs'}"
