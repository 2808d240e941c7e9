"""How workers tell the driver what happens: figures, progress, what the user should know, and a reason to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

LAST_FIGURES_S = 330
"""How long the last figures may take: longer than writes to the tracking store wait out an outage."""

Figures = tuple[int, dict[str, float]]
"""A step and its metrics."""


def new_mailbox() -> Any:
    """A small actor through which workers send figures to the driver; it costs no CPU and blocks nobody."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Mailbox:
        """Messages are numbered, and stay here until the driver has recorded them."""

        def __init__(self) -> None:
            self.messages: list[Figures] = []
            self.first = 0  # number of the first of them
            self.furthest = 0
            self.notes: list[str] = []
            self.stopped: str | None = None

        def put(self, step: int, metrics: dict[str, float]) -> None:
            self.messages.append((step, metrics))
            self.furthest = max(self.furthest, step)

        def note(self, text: str) -> None:
            self.notes.append(text)

        def stop(self, reason: str) -> None:
            self.stopped = reason

        def reason(self) -> str | None:
            return self.stopped

        def read(self, number: int) -> tuple[list[Figures], list[str]]:
            """Messages from that number on, and new notes."""
            notes, self.notes = self.notes, []
            return self.messages[number - self.first :], notes

        def recorded(self, number: int) -> None:
            """Those before that number are."""
            del self.messages[: max(0, number - self.first)]
            self.first = max(self.first, number)

        def unrecorded(self) -> list[Figures]:
            return self.messages

        def reached(self) -> int:
            return self.furthest

    # On the driver's own node: any other may be lost, and with it what nobody has read yet.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind: Any = ray.remote(Mailbox)
    # A call that a broken connection lost is made again: a message that comes twice is recorded once, by its step.
    return kind.options(num_cpus=0, scheduling_strategy=here, max_task_retries=-1).remote()


class Listener:
    """Hands the mailbox's messages to the driver's callbacks while the trainer runs. ``on_metrics`` returns False where it
    only keeps what it was given, and has yet to record it."""

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

        number = recorded = 0  # of messages
        try:
            while True:
                stopping = self.stopping.is_set()  # before the reading: what was sent until now is still handed on
                try:
                    messages, notes = ray.get(self.mailbox.read.remote(number), timeout=20)
                except ray.exceptions.GetTimeoutError:
                    if stopping:
                        raise
                    continue  # a busy machine: the same messages are asked for again
                for text in notes:
                    self.on_note(text)
                for step, metrics in messages:
                    number += 1
                    if self.on_metrics(step, metrics) is not False:
                        recorded = number
                if messages:
                    self.mailbox.recorded.remote(recorded)
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


def unrecorded(mailbox: Any) -> list[Figures]:
    """What the driver has not recorded of what was sent until now: it would be lost with the driver."""
    import ray

    return ray.get(mailbox.unrecorded.remote())


def reached(mailbox: Any) -> int:
    """The furthest step that any attempt has sent figures of."""
    import ray

    return ray.get(mailbox.reached.remote())


def note(mailbox: Any, text: str) -> None:
    """Something that the user should know; waits for nobody."""
    mailbox.note.remote(text)


def stop_run(mailbox: Any, rank: int, reason: str) -> None:
    """Ends the run for a reason that another attempt would meet again: raising would only be retried. Every rank finds
    the same reason in the same step and returns."""
    import ray

    if rank == 0:
        ray.get(mailbox.stop.remote(reason))
