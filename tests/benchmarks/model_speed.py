"""The model's speed: ours beside the public formulation rebuilt (public_formulation.py), in one run, taking turns.

python tests/benchmarks/model_speed.py [--device cuda] [--quick] [--parts encode step profile] [--variants ...] [--batch ...]

About fifteen minutes on two idle cores and 16 GB of memory; about five on a GPU of 80 GB. Linux. --quick: a small
model, one turn, to see that all runs; its figures say nothing. Needs torch, numpy and safetensors (rich, if it is
there, draws the tables). Where the package is not installed, with the repository as working directory:

    d=$(mktemp -d) && cp -r platform/_package $d/copernicus && ln -s $PWD/models $PWD/datasets $PWD/platform \\
        $d/copernicus/ && PYTHONPATH=$d python tests/benchmarks/model_speed.py --device cuda

Inputs are seeded random numbers at published sizes; weights, masks and channels are the same for all variants. Every
variant has a process of its own, and they take turns, so that what else happens on the machine happens to all; figures
are medians over turns, with the range of all calls behind them. "public" is the published float32 with its loop (a
gradient scaler, the norm of all gradients, losses read at once, plain AdamW); "bf16" means autocast. A step has all
eight sensors and the student, and a stand-in of no cost for the teacher. Nothing is read from disk.

The floor is what the step's matrix products alone would take (modelling/flops.py) at the rate that this machine reaches
on products of the blocks' shapes, measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelling.flops import FORWARD_AND_BACKWARD, forward_flops, product_shapes, step_flops
from modelling.kinds import OPTIMISER
from modelling.work import BASE, CASES, QUICK, Shape

PARTS = ("encode", "step", "profile")
STEP_PARTS = ("forward", "backward", OPTIMISER)
VARIANTS = {
    "cpu": {"encode": ("public", "ours"), "step": ("public", "ours", "ours bf16")},
    "cuda": {
        "encode": ("public bf16", "ours bf16", "ours bf16 compiled"),
        "step": ("public", "public bf16", "ours bf16", "ours bf16 compiled"),
    },
}
"""Ratios are to the last public one."""
H100_BF16 = 989e12
"""Dense bf16 FLOP/s of an H100 SXM by its data sheet."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: batches to encode and to train on, turns of each variant and calls in a turn."""

    device: str
    shape: Shape
    encode_batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    turns: int
    calls: int


PLANS = {
    ("cpu", False): Plan("cpu", BASE, (8, 1), (2, 4), 5, 1),
    ("cpu", True): Plan("cpu", QUICK, (2, 1), (1,), 1, 1),
    ("cuda", False): Plan("cuda", BASE, (64, 1), (64,), 4, 8),
    ("cuda", True): Plan("cuda", QUICK, (2, 1), (2,), 1, 1),
}


class Variant:
    """A variant's process, which answers one command at a time (modelling/child.py)."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.name = name
        here = str(Path(__file__).parent)
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelling.child", name, plan.device, json.dumps(dataclasses.asdict(plan.shape))],
            env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Raises RuntimeError where the process has died; its own words are on stderr."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process of {self.name!r} ended at {do} {arguments}: see above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def started(names: Sequence[str], plan: Plan) -> Iterator[list[Variant]]:
    """The variants' processes, ended on leaving."""
    variants = [Variant(name, plan) for name in names]
    try:
        yield variants
    finally:
        for variant in variants:
            variant.close()


def show(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        print(f"\n{title}")
        for row in [head, *rows]:
            print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))  # fmt: skip
        sys.stdout.flush()
        return
    table = Table(title=title)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def reference(names: Sequence[str]) -> str:
    """Whom the others are compared with: the last public variant, or the first of all where there is none."""
    return ([name for name in names if name.startswith("public")] or list(names))[-1]


def times(value: float) -> str:
    return f"{value:.2f} x"


def encode(plan: Plan, names: Sequence[str]) -> None:
    base = reference(names)
    head = ["images/s"] + [f"{name}" for name in names] + [f"{n} / {base}" for n in names if n != base] + ["range"]
    with started(names, plan) as variants:
        for batch in plan.encode_batches:
            rows = []
            for title in CASES:
                seconds: dict[str, list[float]] = {name: [] for name in names}
                for _ in range(plan.turns):
                    for v in variants:
                        seconds[v.name] += v.ask("encode", case=title, batch=batch, calls=plan.calls)["seconds"]
                median = {name: statistics.median(s) for name, s in seconds.items()}
                spread = max(max(s) / min(s) for s in seconds.values())
                rows.append(
                    [title, *(f"{batch / median[n]:.1f}" for n in names)]
                    + [times(median[base] / median[n]) for n in names if n != base]
                    + [times(spread)]
                )
            show(f"Encoder, batch {batch}; range: slowest over fastest call, the worst variant's", head, rows)


@dataclasses.dataclass
class Steps:
    """A variant's steps at one batch size: seconds of each part, peak memory."""

    parts: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {part: [] for part in STEP_PARTS})
    peak_bytes: int = 0

    @property
    def totals(self) -> list[float]:
        return [sum(step) for step in zip(*self.parts.values(), strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.totals)


def product_rate(variant: Variant, plan: Plan, batch: int, dtype: str) -> float:
    """FLOP/s over the blocks' shapes, each at its best."""
    shapes = product_shapes(plan.shape, batch)
    seconds = variant.ask("products", shapes=shapes, dtype=dtype, calls=10 if plan.device == "cuda" else 3)["seconds"]
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes) / sum(seconds)


def step(plan: Plan, names: Sequence[str], profiled: bool) -> None:
    with started(names, plan) as variants:
        for number, batch in enumerate(plan.step_batches):
            found = {name: Steps() for name in names}
            losses = {}
            for _ in range(plan.turns):
                for v in variants:
                    answer = v.ask("step", batch=batch, calls=plan.calls)
                    for part in STEP_PARTS:
                        found[v.name].parts[part] += answer["parts"][part]
                    found[v.name].peak_bytes = answer["peak_bytes"]
                    losses[v.name] = answer["losses"]
            if number == 0:
                show_losses(losses, batch)
            show_steps(found, batch)
            rates = {dtype: product_rate(variants[0], plan, batch, dtype) for dtype in ("float32", "bfloat16")}
            show_floor(found, plan, batch, rates)
            if profiled:
                kinds = {v.name: v.ask("profile", batch=batch)["seconds"] for v in variants}
                show_kinds(kinds, found, plan, batch)


def show_losses(losses: dict[str, dict[str, float]], batch: int) -> None:
    base = reference(list(losses))
    rows = []
    for name, values in losses.items():
        others = [abs(values[key] - losses[base][key]) for key in values]
        rows.append([name, f"{values['total']:.7f}", f"{values['total'] - losses[base]['total']:+.1e}", f"{max(others):.1e}"])  # fmt: skip
    title = f"Losses of the first step, batch {batch}: same weights, inputs, masks, channels"
    show(title, ["variant", "total", f"less {base}'s", "largest difference of any sensor's"], rows)


def show_steps(found: dict[str, Steps], batch: int) -> None:
    base = found[reference(list(found))]
    rows = []
    for name, steps in found.items():
        row = [name, f"{steps.median:.4f}", *(f"{statistics.median(steps.parts[part]):.4f}" for part in STEP_PARTS)]
        row += [f"{batch / steps.median:.2f}", times(base.median / steps.median)]
        row += [f"{steps.peak_bytes / 1e9:.2f}", times(steps.peak_bytes / base.peak_bytes)]
        rows.append([*row, times(max(steps.totals) / min(steps.totals))])
    head = ["variant", "step s", "forward", "backward", "optimiser", "grids/s", "faster", "peak GB", "of public's", "range"]  # fmt: skip
    show(f"A pretraining step, eight sensors and the student, batch {batch}; range: slowest over fastest", head, rows)


def show_floor(found: dict[str, Steps], plan: Plan, batch: int, rates: dict[str, float]) -> None:
    parts = forward_flops(plan.shape, batch)
    total, forward = step_flops(plan.shape, batch), sum(parts.values())
    show(
        f"Operations of a step, batch {batch}, forward x {FORWARD_AND_BACKWARD}",
        ["part", "GFLOP", "share"],
        [[name, f"{FORWARD_AND_BACKWARD * n / 1e9:.1f}", f"{n / forward:.1%}"] for name, n in parts.most_common()]
        + [["all", f"{total / 1e9:.1f}", ""]],
    )
    rows = []
    for name, steps in found.items():
        rate = rates["bfloat16" if "bf16" in name else "float32"]
        floor = total / rate
        row = [name, f"{rate / 1e12:.3f}", f"{floor:.4f}", f"{steps.median:.4f}", f"{floor / steps.median:.1%}"]
        if plan.device == "cuda":
            row += [f"{total / steps.median / 1e12:.1f}", f"{total / steps.median / H100_BF16:.1%}"]
        rows.append(row)
    head = ["variant", "products TFLOP/s", "floor s", "step s", "model FLOP utilisation of the measured rate"]
    if plan.device == "cuda":
        head += ["TFLOP/s reached", "of 989 (H100 bf16)"]
    show(f"How far from the floor, batch {batch}", head, rows)


def show_kinds(kinds: dict[str, dict[str, float]], found: dict[str, Steps], plan: Plan, batch: int) -> None:
    """On a GPU the rest of the step is what its kernels leave of the median step: it waits for the processor."""
    columns = {}
    for name, seconds in kinds.items():
        columns[name] = dict(seconds)
        if plan.device == "cuda":
            columns[name]["no kernel runs"] = max(0.0, found[name].median - sum(seconds.values()))
    order = sorted({kind for c in columns.values() for kind in c}, key=lambda k: -max(c.get(k, 0.0) for c in columns.values()))  # fmt: skip
    rows = []
    for kind in order:
        cells = [(c.get(kind, 0.0), sum(c.values())) for c in columns.values()]
        rows.append([kind, *(f"{s * 1000:.1f} ms {s / whole:6.1%}" for s, whole in cells)])
    useful = [c.get("matrix products", 0.0) + c.get("attention", 0.0) for c in columns.values()]
    rows.append(
        ["outside products and attention"]
        + [f"{1 - u / sum(c.values()):.1%}" for u, c in zip(useful, columns.values(), strict=True)]
    )
    what = "kernels" if plan.device == "cuda" else "operators, under the profiler"
    show(f"Where a step's time goes, batch {batch}: {what}", ["kind", *columns], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--variants", nargs="+", help='of encode and step, such as "ours bf16"')
    parser.add_argument("--batch", nargs="+", type=int, help="rows of a pretraining step")
    options = parser.parse_args()
    plan = PLANS[options.device, options.quick]
    if options.batch:
        plan = dataclasses.replace(plan, step_batches=tuple(options.batch))
    names = {part: options.variants or own for part, own in VARIANTS[options.device].items()}
    with started(names["step"][:1], plan) as (first,):
        print(first.ask("about")["machine"], "(--quick: no measurement)" if options.quick else "", flush=True)
    if "encode" in options.parts:
        encode(plan, names["encode"])
    if "step" in options.parts or "profile" in options.parts:
        step(plan, names["step"], "profile" in options.parts)


if __name__ == "__main__":
    main()
