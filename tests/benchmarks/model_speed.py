"""The model's speed: ours beside the public formulation rebuilt (public_formulation.py), in one run, taking turns.

python tests/benchmarks/model_speed.py [--device cuda] [--quick] [--parts encode step profile] [--variants ...] [--batch ...]

By estimate ten to fifteen minutes on two idle cores with 16 GB of memory, and five on a GPU of 80 GB; the variants in
bf16 are left out where the processor has no instructions for it. Linux. --quick: a small model, one turn, to see that
all runs; its figures say nothing. Needs torch, numpy and safetensors (rich, if it is
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
import dataclasses
import statistics
import sys
from collections.abc import Sequence

from modelling.flops import FORWARD_AND_BACKWARD, forward_flops, product_shapes, step_flops
from modelling.kinds import OPTIMISER
from modelling.turns import PLANS, Plan, Variant, started
from modelling.work import CASES

PARTS = ("encode", "step", "profile")
STEP_PARTS = ("forward", "backward", OPTIMISER)
VARIANTS = {
    "cpu": {"encode": ("public", "ours"), "step": ("public", "ours", "ours bf16")},
    "cuda": {
        "encode": ("public bf16", "ours bf16"),
        "step": ("public", "public bf16", "ours bf16", "ours bf16 compiled"),
    },
}
"""Ratios are to the last public one."""
H100_BF16 = 989e12
"""Dense bf16 FLOP/s of an H100 SXM by its data sheet."""


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


def precision(variant: str) -> str:
    return "bfloat16" if "bf16" in variant else "float32"


def times(value: float) -> str:
    return f"{value:.2f} x"


def encode(plan: Plan, names: Sequence[str]) -> None:
    base = reference(names)
    head = ["images/s"] + [f"{name}" for name in names] + [f"{n} / {base}" for n in names if n != base] + ["range"]
    with started(names, plan, "encode") as variants:
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


def product_rate(variant: Variant, plan: Plan, batch: int, dtype: str, most_rows: int = 1 << 30) -> float:
    """FLOP/s over the blocks' shapes, each at its best."""
    shapes = [(min(rows, most_rows), *rest) for rows, *rest in product_shapes(plan.shape, batch)]
    seconds = variant.ask("products", shapes=shapes, dtype=dtype, calls=10 if plan.device == "cuda" else 3)["seconds"]
    return sum(2 * rows * inner * columns for rows, inner, columns in shapes) / sum(seconds)


def worth_it(variants: Sequence[Variant], plan: Plan) -> list[Variant]:
    """Without those in bf16 where the processor has no instructions for it: a step would take minutes."""
    rates = [product_rate(variants[0], plan, 1, dtype, most_rows=16) for dtype in ("bfloat16", "float32")]
    slow = rates[0] < rates[1] / 4
    for variant in variants:
        if slow and "bf16" in variant.name:
            print(f"{variant.name}: left out, bf16 products run at {rates[0] / rates[1]:.2f} of float32's rate here")
    return [variant for variant in variants if not (slow and "bf16" in variant.name)]


def step(plan: Plan, names: Sequence[str], profiled: bool) -> None:
    with started(names, plan, "step") as everyone:
        variants = worth_it(everyone, plan)
        for number, batch in enumerate(plan.step_batches):
            found = {v.name: Steps() for v in variants}
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
            rates = {p: product_rate(variants[0], plan, batch, p) for p in sorted({precision(n) for n in found})}
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
        if "bf16" not in name and "bf16" not in base and max(others) > 1e-5 * values["total"]:
            raise SystemExit(f"{name}'s losses are not {base}'s: nothing here can be compared")
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
        rate = rates[precision(name)]
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
    if "encode" in options.parts:
        encode(plan, names["encode"])
    if "step" in options.parts or "profile" in options.parts:
        step(plan, names["step"], "profile" in options.parts)


if __name__ == "__main__":
    main()
