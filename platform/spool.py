"""Finished trials on their way to MLflow: first a line of a file, then, by a thread, a run of the store.

`Spool.add_run` returns when the record is on disk, whatever the store does. The thread replays records in order, each
exactly once: a record's times are fixed when it is added, so that MLflow knows again what it was told before, and a run
that may have been made without our hearing of it is looked for before it is made (`tracking.Creation`). That holds when
the process is killed at any moment: the next one goes on with the first record whose receipt is not on disk.

Two files in the experiment's folder, only ever appended to, a JSON object a line:
    spool.jsonl      what is to be recorded
    recorded.jsonl   receipts: key, id of its MLflow run, and why it was refused, where it was
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copernicus.datasets.sensors import InputError
from copernicus.platform.tracking import (
    FAILED,
    FINISHED,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    MAX_PARAMETER,
    MAX_TAG,
    Creation,
    Tracker,
    as_metrics,
    clean_name,
    clean_text,
    logger,
    may_pass,
    one_line,
    store_errors,
)

PATIENCE_S = 600.0
LAST_MOMENTS_S = 5.0
"""How long a run that failed or was interrupted waits for the rest to be recorded."""
MOST_TRIES = 6
"""Of a record that a store, which answers otherwise, breaks on."""


class NotRecorded(RuntimeError):
    """Records that MLflow does not have yet; the message says where they are kept and what replays them."""


@dataclass(frozen=True)
class Record:
    """One finished run, as it is to appear in MLflow."""

    key: str
    name: str
    tags: dict[str, str]
    parent: str | None  # id of the parent run
    parameters: dict[str, str]
    rows: list[tuple[int, dict[str, float]]]  # (step, values)
    status: str
    start_ms: int
    end_ms: int


class Lines:
    """A file of JSON lines that are whole: a line that a kill cut off is taken off when it is opened, one that cannot be
    written is taken off at once."""

    def __init__(self, path: Path):
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data.rfind(b"\n") + 1
        self.values: list[dict[str, Any]] = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self.values.append(json.loads(line))
            except ValueError:
                raise InputError(f"{path}: line {number} is damaged; restore the file, or give --fresh") from None
        self.descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if whole < len(data):
            os.ftruncate(self.descriptor, whole)

    def add(self, value: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns."""
        before = os.fstat(self.descriptor).st_size
        data = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self.descriptor, data) :]
            os.fsync(self.descriptor)
        except OSError:
            os.ftruncate(self.descriptor, before)
            raise

    def close(self) -> None:
        os.close(self.descriptor)


class Spool:
    """Records in ``folder``, replayed to the tracker's store while the ``with`` block runs; first of all what an earlier
    process left. One process at a time, any of its threads.

    ``patience`` (seconds): how long the end of the block waits for a store that takes nothing. ``on_state(message)`` hears,
    from the thread, of an outage and of its end, once each, and of every record that MLflow refuses.

    Raises:
        InputError: a file of the spool is damaged.
        NotRecorded: at the end of the block, records are left; they are kept, and replayed by the next Spool in the folder.
    """

    def __init__(
        self,
        tracker: Tracker,
        folder: Path,
        patience: float = PATIENCE_S,
        on_state: Callable[[str], None] = logger.warning,
    ):
        self.tracker, self.folder, self.patience, self.on_state = tracker, folder, patience, on_state
        self.refused: dict[str, str] = {}  # why, by key
        self._run_ids: dict[str, str | None] = {}
        self._keys: set[str] = set()
        self._waiting: deque[Record] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._failure: str | None = None  # what no further try mends
        self._progress = time.monotonic()
        self._last_ms = 0
        self._thread = threading.Thread(target=self._replay, name="MLflow spool", daemon=True)

    def __enter__(self) -> Spool:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._records = Lines(self.folder / "spool.jsonl")
        self._receipts = Lines(self.folder / "recorded.jsonl")
        for receipt in self._receipts.values:
            self._run_ids[receipt["key"]] = receipt["run_id"]
            if "refused" in receipt:
                self.refused[receipt["key"]] = receipt["refused"]
        for value in self._records.values:
            record = Record(**value)
            self._keys.add(record.key)
            self._last_ms = record.start_ms
            if record.key not in self._run_ids:
                self._waiting.append(record)
        self._records.values, self._receipts.values = [], []
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._progress = time.monotonic()
                while self.pending and self._failure is None and self._silent_for() < self.patience:
                    self.wait(1.0)
            else:
                self.wait(min(LAST_MOMENTS_S, self.patience))
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._thread.join(timeout=30)  # longer than a request may take; without a request to wait for, at once
            self._records.close()
            if not self._thread.is_alive():  # else it may still write its receipt
                self._receipts.close()
        if self.pending:
            message = (
                f"{self.pending} records are not in MLflow yet: {self._failure or 'the tracking server took none'}; "
                f"they are kept in {self._records.path}, and the same command records them"
            )
            if kind is None:
                raise NotRecorded(message)
            self.on_state(message)

    def __contains__(self, key: str) -> bool:
        """Whether a record of that key is kept, by this process or an earlier one."""
        return key in self._keys

    @property
    def pending(self) -> int:
        """How many records MLflow does not have yet."""
        return len(self._waiting)

    def run_id(self, key: str) -> str | None:
        """Id of the record's run, once MLflow has it."""
        return self._run_ids.get(key)

    def add_run(
        self,
        key: str,
        name: str,
        tags: Mapping[str, Any],
        parent: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        rows: Sequence[tuple[int, Mapping[str, float]]] = (),
        status: str = FINISHED,
        seconds: float = 0.0,
    ) -> None:
        """Keep a finished run that took ``seconds``. A key that is kept already (a trial whose process was killed before
        it had noted that) is not kept twice.

        Raises:
            OSError: the folder's disk takes no more.
        """
        numbers = [(int(step), {k: float(v) for k, v in values.items()}) for step, values in rows]
        with self._changed:
            if key in self._keys:
                return
            # The page lists runs by their start: no two alike, so that it keeps their order.
            end_ms = int(time.time() * 1000)
            self._last_ms = start_ms = max(self._last_ms + 1, end_ms - int(1000 * seconds))
            record = Record(
                key, name, {k: str(v) for k, v in tags.items()}, parent,
                {k: str(v) for k, v in (parameters or {}).items()}, numbers, status, start_ms, max(start_ms, end_ms),
            )  # fmt: skip
            self._records.add(asdict(record))
            self._keys.add(key)
            self._waiting.append(record)
            self._changed.notify_all()

    def wait(self, timeout: float) -> bool:
        """Wait for MLflow to have every record, or ``timeout`` seconds; whether it has."""
        end = time.monotonic() + timeout
        with self._changed:
            while self._waiting and self._failure is None and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(left, 1.0))
            return not self._waiting

    def _silent_for(self) -> float:
        return time.monotonic() - self._progress

    def _replay(self) -> None:
        begun = True  # of the first, an earlier process may have made the run
        while (record := self._next()) is not None:
            try:
                receipt = self._deliver(record, begun)
                if receipt is None:
                    return
                self._receipts.add(receipt)
            except Exception as error:  # a full disk, a fault of ours: said now, raised at the end of the block
                self._fail(f"{type(error).__name__}: {one_line(error)}")
                return
            begun = False
            with self._changed:
                self._run_ids[record.key] = receipt["run_id"]
                self._waiting.popleft()
                self._progress = time.monotonic()
                self._changed.notify_all()

    def _next(self) -> Record | None:
        with self._changed:
            while not self._waiting and not self._stopping:
                self._changed.wait()
            return None if self._stopping else self._waiting[0]

    def _deliver(self, record: Record, begun: bool) -> dict[str, Any] | None:
        """The record's receipt; None: the block ended, or nothing helps, before MLflow took it."""
        creation = Creation(self.tracker, record.name, record.tags, record.parent, record.start_ms, begun)
        run_id, failures, refusals, pause = None, 0, 0, FIRST_PAUSE_S
        while True:
            try:
                run_id = run_id or creation()
                self._fill(run_id, record)
                creation.settle(run_id)
                if failures > 1:
                    self.on_state(f"the tracking server answers again; {self.pending} records follow")
                return {"key": record.key, "run_id": run_id}
            except store_errors() as error:
                problem = self._problem()
                if problem is not None and not may_pass(problem):
                    self._fail(one_line(problem))
                    return None
                # Answers that are about this record, given while the store answers otherwise. A proxy's, while it
                # changes servers, may look like one, once.
                busy = may_pass(error) and getattr(error, "error_code", None) != "INTERNAL_ERROR"
                refusals = refusals + 1 if problem is None and not busy else 0
                if refusals == (MOST_TRIES if may_pass(error) else 2):
                    return self._set_aside(record, run_id, one_line(error))
                failures += 1
                if failures == 2:  # the first may be no more than a kept connection that the server has closed
                    self.on_state(
                        f"the tracking server does not take records ({one_line(error)[:100]}); {self.pending} are kept "
                        f"in {self._records.path}; trying again"
                    )
            with self._changed:
                if self._changed.wait_for(lambda: self._stopping, pause):
                    return None
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _fill(self, run_id: str, record: Record) -> None:
        """Everything of a run, in two calls."""
        from mlflow.entities import Param

        texts = {clean_name(k): clean_text(v, MAX_PARAMETER) for k, v in record.parameters.items()}
        metrics = as_metrics(record.rows, record.end_ms)
        self.tracker.client.log_batch(run_id, metrics=metrics, params=[Param(k, v) for k, v in texts.items()])
        self.tracker.client.set_terminated(run_id, record.status, record.end_ms)

    def _problem(self) -> Exception | None:
        """Why the experiment takes no runs: silence, or that it is gone; None: it does, so a record is what is wrong."""
        try:
            experiment = self.tracker.client.get_experiment(self.tracker.experiment_id)
        except store_errors() as error:
            return error
        if experiment.lifecycle_stage != "active":
            return InputError(f"MLflow's experiment {experiment.name!r} was deleted; restore it")
        return None

    def _set_aside(self, record: Record, run_id: str | None, reason: str) -> dict[str, Any]:
        """What MLflow refuses must not hold up the rest: it is named, and stays in the file."""
        self.refused[record.key] = reason
        self.on_state(f"MLflow refuses trial {record.key}: {reason}; it stays in {self._records.path}")
        if run_id is not None:
            try:
                self.tracker.client.set_tag(run_id, "refused", clean_text(reason, MAX_TAG))
                self.tracker.client.set_terminated(run_id, FAILED, record.end_ms)
            except store_errors() as error:
                self.on_state(f"its run {run_id} could not be ended: {one_line(error)}")
        return {"key": record.key, "run_id": run_id, "refused": reason}

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._failure = reason
            self._changed.notify_all()
        self.on_state(f"{self.pending} records cannot reach MLflow: {reason}; they are kept in {self._records.path}")
