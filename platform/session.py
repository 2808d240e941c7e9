"""The Ray session of a command: the cluster that RAY_ADDRESS names, or a quiet local one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

LOUD_LOGGERS = ("ray", "ray.train", "ray.tune", "ray.data", "ray._private")
LONGEST = 240
"""Characters of a message of Ray's."""
KEPT = 4
"""Idle processes that a local Ray keeps beyond one a CPU. Ray would end them after a second, and importing torch anew costs
more than the next task."""


def autoscales() -> bool:
    """The cluster brings nodes by itself: what is missing now is waited for. Its files say so on the head."""
    return os.environ.get("COPERNICUS_AUTOSCALING") == "1"


@contextlib.contextmanager
def ray_session(verbose: bool = False) -> Iterator[dict[str, float]]:
    """Connect to Ray (or start it), yield the cluster's resources, and disconnect. An open session is used as it is."""
    # Read when Ray is imported, here and on the workers it starts.
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ctrl-C ends the command, resumably; Tune's own handler would take a cut-off search for a finished one.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
        warnings.filterwarnings("ignore", module="ray")
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    level = logging.INFO if verbose else logging.ERROR
    address = os.environ.get("RAY_ADDRESS")
    # Two logical CPUs at least: one worker and the reading of its data must fit even on a one-core machine.
    cpus = max(os.cpu_count() or 1, 2)
    local: dict[str, Any] = {}
    if not address:
        local = {"num_cpus": cpus, "include_dashboard": False}
        os.environ.setdefault("RAY_num_workers_soft_limit", str(cpus + KEPT))  # read by the processes that it starts
    # Without RAY_ADDRESS Ray would join any cluster that somebody has started on this machine.
    with keeping_sigterm():
        ray.init(
            address=address or "local", logging_level=level, log_to_driver=verbose, configure_logging=True, **local
        )
    from ray._private import worker

    whole = worker.print_to_stdstream
    if not verbose:
        silence()
        worker.print_to_stdstream = brief(whole)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        worker.print_to_stdstream = whole


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the process in good order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise KeyboardInterrupt  # of SystemExit a call that waits for Ray would make another, with code 1

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Ray takes the signal for itself, and would end the process with another code."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


def silence() -> None:
    """Ray's own chatter off; errors stay."""
    import optuna
    import ray.data  # first: it sets its loggers up on import

    for name in LOUD_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False


def brief(show: Callable[..., None]) -> Callable[..., None]:
    """Ray's way to print what its nodes tell of themselves, for a terminal: the beginning of each message (with the death of
    a node come twenty lines of its log), and the same one once."""
    told: set[str] = set()

    def shown(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        lines = []
        for message in data["lines"]:
            first = message.strip().split(" Last 20 lines of", 1)[0].split("\n", 1)[0]
            line = first if len(first) <= LONGEST else f"{first[:LONGEST].rsplit(' ', 1)[0]} ..."
            if line not in told:
                told.add(line)
                lines.append(line)
        if lines:
            show(data | {"lines": lines}, *arguments, **options)

    return shown
