"""How workers tell the driver what happens: figures, progress, what the user should know, and a reason to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

LAST_FIGURES_S = 330
"""How long the last figures may take: longer than writes to the tracking store wait out an outage."""


def new_mailbox() -> Any:
    """A small actor through which workers send figures to the driver; it costs no CPU and blocks nobody."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Mailbox:
        def __init__(self) -> None:
            self.messages: list[tuple[int, dict[str, float]]] = []
            self.notes: list[str] = []
            self.stopped: str | None = None

        def put(self, step: int, metrics: dict[str, float]) -> None:
            self.messages.append((step, metrics))

        def note(self, text: str) -> None:
            self.notes.append(text)

        def stop(self, reason: str) -> None:
            self.stopped = reason

        def reason(self) -> str | None:
            return self.stopped

        def drain(self) -> tuple[list[tuple[int, dict[str, float]]], list[str]]:
            drained = self.messages, self.notes
            self.messages, self.notes = [], []
            return drained

    # On the driver's own node: any other may be lost, and with it what nobody has read yet.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(Mailbox)
    return kind.options(num_cpus=0, scheduling_strategy=here).remote()


class Listener:
    """Hands the mailbox's messages to the driver's callbacks while the trainer runs."""

    def __init__(self, mailbox: Any, steps: int, on_metrics: Callable, on_progress: Callable, on_note: Callable):
        self.mailbox, self.steps = mailbox, steps
        self.on_metrics, self.on_progress, self.on_note = on_metrics, on_progress, on_note
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Listener:
        self.thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stopping.set()
        self.thread.join(timeout=LAST_FIGURES_S)
        if error is None and self.thread.is_alive():
            raise RuntimeError(
                f"the tracking store did not take the last figures within {LAST_FIGURES_S} s; the same command resumes"
            )
        if self.error is not None and error is None:
            raise self.error

    def _listen(self) -> None:
        import ray

        try:
            while True:
                stopping = self.stopping.is_set()  # before the drain: what was sent until now is still handed on
                messages, notes = ray.get(self.mailbox.drain.remote(), timeout=20)
                for text in notes:
                    self.on_note(text)
                for step, metrics in messages:
                    self.on_metrics(step, metrics)
                if messages:
                    self.on_progress(messages[-1][0], self.steps, messages[-1][1])
                if stopping:
                    return
                self.stopping.wait(0.3)
        except BaseException as error:  # raised again by __exit__ on the main thread
            self.error = error


def post(mailbox: Any, rank: int, step: int, metrics: dict[str, float], wait: bool = False) -> None:
    """Rank 0 sends a step's figures; ``wait`` until they have arrived (the last ones, or the driver may be gone)."""
    if rank == 0 and metrics:
        sent = mailbox.put.remote(step, metrics)
        if wait:
            import ray

            ray.get(sent)


def note(mailbox: Any, text: str) -> None:
    """Something that the user should know; waits for nobody."""
    mailbox.note.remote(text)


def stop_run(mailbox: Any, rank: int, reason: str) -> None:
    """Ends the run for a reason that another attempt would meet again: raising would only be retried. Every rank finds
    the same reason in the same step and returns."""
    import ray

    if rank == 0:
        ray.get(mailbox.stop.remote(reason))
