"""What Ray Train (2.60) lacks for a run of weeks: a Ctrl-C that always ends it, and CPUs for reading beside workers that
come and go."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.train.torch import TorchTrainer

ABORT_S = 15.0
"""For workers to end by themselves."""
RENEW_S, EXPIRE_S = 60.0, 180.0


class Trainer(TorchTrainer):
    """A TorchTrainer that Ctrl-C ends as it ends other Python: by KeyboardInterrupt, whatever the run is waiting for.

    Ray's own handler waits for its controller without limit, which never answers while it waits for room, and then exits
    with 0.
    """

    controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller  # and Python's handler stays

    def fit(self) -> Any:
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self.controller is not None:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.get(self.controller.abort.remote(), timeout=ABORT_S)
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(self.controller)
            raise


@contextlib.contextmanager
def kept_for_reading(cpus: float) -> Iterator[None]:
    """While this lasts an elastic group of workers leaves so many CPUs free, wherever they are. It takes as many workers
    as there is room for, and Ray Data, which reads for them, would wait for a CPU without end."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        ResourceRequestPriority,
        get_or_create_autoscaling_coordinator,
    )

    coordinator, name = get_or_create_autoscaling_coordinator(), f"reading-{ray.get_runtime_context().get_job_id()}"
    bundles = [{"CPU": part} for part in (*[1.0] * int(cpus), cpus % 1) if part]

    def renew() -> None:
        request = coordinator.request_resources.remote(
            requester_id=name, resources=bundles, expire_after_s=EXPIRE_S, priority=ResourceRequestPriority.HIGH
        )
        ray.get(request, timeout=RENEW_S)

    renew()  # before the workers' own request, which is as urgent: the earlier one is served first
    over = threading.Event()

    def keep() -> None:
        while not over.wait(RENEW_S):
            with contextlib.suppress(ray.exceptions.RayError):  # it is asked again before the last request expires
                renew()

    thread = threading.Thread(target=keep, name="kept_for_reading", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(coordinator.cancel_request.remote(name), timeout=5)
