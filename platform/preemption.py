"""Notices that a node is about to be taken away, in time for a checkpoint.

A cloud tells its spot machines at an address of their own, half a minute (GCP) or two (AWS) ahead. Who reads that there
drains the node in Ray: nothing new is put on it, the workers of other nodes hear of it, and its loss counts as a
preemption, not as a failure. What drains nodes without us (an autoscaler, an administrator) is heard in the same way.
"""

from __future__ import annotations

import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import requests

logger = logging.getLogger(__name__)

CLOUDS = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
"""What COPERNICUS_PREEMPTION may name, and where the metadata of a machine are, unless COPERNICUS_METADATA_URL tells."""

TIMEOUT_S = 2.0
GCP_NOTICE_S = 30.0
"""Compute Engine ends an instance this long after it says so; it gives no time of its own."""


class PreemptionNotice:
    """Listens for notices on a thread, inside a Ray Train worker. Nothing it does raises or blocks the caller.

    Args:
        interval_s: between two questions to the cloud. Ray's own news come by themselves, within five seconds.
        environ: where COPERNICUS_PREEMPTION and COPERNICUS_METADATA_URL are looked up; without the first no cloud is
            asked.
        drain: what is done about a cloud's notice: called with the reason and the end (seconds of Unix time, or None).
    """

    def __init__(
        self,
        interval_s: float = 5.0,
        environ: Mapping[str, str] = os.environ,
        drain: Callable[[str, float | None], None] | None = None,
    ):
        self.interval_s = interval_s
        self.cloud = environ.get("COPERNICUS_PREEMPTION", "").strip().lower()
        self.base = (environ.get("COPERNICUS_METADATA_URL") or CLOUDS.get(self.cloud, "")).rstrip("/")
        self.drain = drain or drain_this_node
        self._notice: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def given(self) -> str | None:
        """Why a node of this run is about to go, or None. Costs nothing: may be asked at every step.

        Ranks hear of it at different times: they have to agree before they act together.
        """
        if self._notice is None:
            self._notice = _drained_by_ray()
        return self._notice

    def __enter__(self) -> PreemptionNotice:
        if self.cloud in CLOUDS:
            self._thread = threading.Thread(target=self._poll, name="PreemptionNotice", daemon=True)
            self._thread.start()
        elif self.cloud:
            logger.warning("COPERNICUS_PREEMPTION=%s: expected aws or gcp; no notice is listened for", self.cloud)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * TIMEOUT_S)

    def _poll(self) -> None:
        session = requests.Session()
        session.trust_env = False  # a proxy has other metadata than this machine
        ask = AWS(self.base, session) if self.cloud == "aws" else GCP(self.base, session)
        told = False
        while not self._stop.is_set():
            try:
                if (found := ask()) is not None:
                    return self._found(*found)
            except Exception as error:
                if not told:  # once: it may be so for hours
                    logger.debug("no answer from %s: %s", self.base, error)
                    told = True
            self._stop.wait(self.interval_s)
        return None

    def _found(self, reason: str, end: float | None) -> None:
        self._notice = reason
        try:
            self.drain(reason, end)
        except Exception as error:
            logger.debug("this node could not be drained: %s", error)


class AWS:
    """Asks EC2's instance metadata service, version 2, for the notice of an interruption.

    Source: "Spot Instance interruption notices" and "Use the Instance Metadata Service" of the EC2 user guide.
    """

    def __init__(self, base: str, session: requests.Session):
        self.base, self.session = base, session
        self.token: str | None = None

    def __call__(self) -> tuple[str, float | None] | None:
        """The reason and the end in Unix time, or None; raises what `requests` raises."""
        if self.token is None:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            answer = self.session.put(
                f"{self.base}/latest/api/token", headers=lifetime, timeout=TIMEOUT_S, allow_redirects=False
            )
            answer.raise_for_status()
            self.token = answer.text
        answer = self.session.get(
            f"{self.base}/latest/meta-data/spot/instance-action",
            headers={"X-aws-ec2-metadata-token": self.token}, timeout=TIMEOUT_S, allow_redirects=False,
        )  # fmt: skip
        if answer.status_code == 401:
            self.token = None  # too old; the next question brings a new one
        if answer.status_code in (401, 404):
            return None
        answer.raise_for_status()
        action = answer.json()
        end = datetime.datetime.fromisoformat(action["time"].replace("Z", "+00:00"))
        return f"AWS is about to {action['action']} this spot instance at {action['time']}", end.timestamp()


class GCP:
    """Asks Compute Engine's metadata server whether this instance is being preempted.

    Source: "Spot VMs", section "Preemption process", of the Compute Engine documentation.
    """

    def __init__(self, base: str, session: requests.Session):
        self.base, self.session = base, session

    def __call__(self) -> tuple[str, float | None] | None:
        """The reason and the end in Unix time, or None; raises what `requests` raises."""
        answer = self.session.get(
            f"{self.base}/computeMetadata/v1/instance/preempted",
            headers={"Metadata-Flavor": "Google"}, timeout=TIMEOUT_S, allow_redirects=False,
        )  # fmt: skip
        answer.raise_for_status()
        if answer.text.strip().upper() != "TRUE":
            return None
        return "GCP preempts this spot machine", time.time() + GCP_NOTICE_S


def drain_this_node(reason: str, end: float | None) -> None:
    """Tell Ray that this node goes at ``end`` (Unix time). Several workers of a node may do so."""
    import ray
    from ray.core.generated import autoscaler_pb2

    messages: Any = autoscaler_pb2  # made by protoc: not typed
    worker: Any = ray._private.worker.global_worker
    worker.gcs_client.drain_node(
        ray.get_runtime_context().get_node_id(),
        messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        reason,
        int((end or 0) * 1000),
    )


def _drained_by_ray() -> str | None:
    """What Ray Train's watcher has told this worker: a look into this process. `ray.train.get_preemption_info` would
    wait for all ranks in every step."""
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        info = get_train_context().preemption_context.preemption_info
    except (ImportError, RuntimeError):  # not in a worker of Ray Train
        return None
    if info is None:
        return None
    ranks = ", ".join(map(str, info.preempted_ranks))
    return f"Ray drains the node of rank {ranks}"
