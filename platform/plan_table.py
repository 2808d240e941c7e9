"""A plan as a table: what, how much, whether that was measured or assumed, and from what."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copernicus.datasets.sensors import InputError
from copernicus.platform.measured import ASSUMED, CHECKPOINT_S, COUNTED, GIVEN, H100_PEAK_GB, MEASURED, READ_MS, START_S
from copernicus.platform.plan import BACKWARD_SHARE, PretrainPlan, cluster_of, plan_pretrain
from copernicus.platform.schema import Experiment, Pretrain


class Line(NamedTuple):
    """One row. ``status``: see `measured`; empty for what follows from the rows above."""

    what: str
    value: str
    status: str = ""
    source: str = ""


def span(seconds: float) -> str:
    """A time in the unit that people say it in."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1e3:,.1f} ms"


def size(amount: float) -> str:
    """Bytes, in powers of ten."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if amount >= one:
            return f"{amount / one:,.2f} {unit}"
    return f"{amount / 1e3:,.1f} kB"


def nodes(count: int) -> str:
    return f"{count} node{'s' if count != 1 else ''}"


def pretrain_lines(plan: PretrainPlan) -> list[list[Line]]:
    """The rows, in sections."""
    settings, cluster, data, rate = plan.settings, plan.cluster, plan.data, plan.rate
    trained_s = plan.compute_s + plan.waited_s
    longest = max(
        ("training", trained_s), ("reading (pretrain.data_cpus)", plan.reading_s), ("storage", plan.storage_s),
        key=lambda part: part[1],
    )[0]  # fmt: skip
    worker = "worker" if cluster.gpu == "cpu" else "GPU"
    run = [
        Line("model", f"{settings.model.name}, {plan.size.parameters / 1e6:,.1f} M parameters", COUNTED),
        Line("workers", f"{cluster.workers}, {cluster.per_node} a node: {nodes(cluster.nodes)}", GIVEN),
        Line("batch", f"{settings.batch_size}, {plan.batch} a {worker}", GIVEN, "pretrain.batch_size"),
        Line("grids", f"{data.grids:,}, {plan.samples_per_epoch:,} samples an epoch", data.status, data.source),
        Line("steps", f"{plan.steps:,} in {settings.epochs} epochs", GIVEN, "pretrain.epochs"),
    ]
    compute = [
        Line(
            f"operations of a step, a {worker}",
            f"{plan.step_flops / 1e12:,.3g} x 10^12",
            COUNTED,
            "forward and backward",
        ),
        Line(f"speed of a {worker}", f"{rate.flops_per_s / 1e12:,.3g} TFLOP/s", rate.status, rate.source),
        Line(
            "  and of each step",
            span(rate.idle_s),
            rate.status if cluster.rate else ASSUMED,
            "whatever the batch; measured at 64",
        )
        if rate.idle_s
        else None,
        Line(f"memory of a {worker}", f"{size(plan.state + plan.activations)}", ASSUMED, H100_PEAK_GB.source),
        Line("  parameters, gradients, moments", size(plan.state), COUNTED, f"pretrain.parallel={settings.parallel}"),
    ]
    reading = [
        Line(
            "read for a sample",
            f"{size(data.sample_bytes)} in {data.requests:.1f} requests",
            data.status,
            "the slices of a draw",
        ),
        Line("a node reads", f"{plan.node_mb_s:,.0f} MB/s, so that no {worker} waits"),
        Line(
            "a node can read",
            f"{cluster.read_mb_s.value:,.0f} MB/s",
            cluster.read_mb_s.status,
            cluster.read_mb_s.source,
        ),
        Line("CPUs that read", f"{settings.data_cpus:g}", GIVEN, "pretrain.data_cpus, of the whole cluster"),
        Line("  needed", f"{plan.data_cpus:,.1f}", READ_MS.status, READ_MS.source),
    ]
    network = [
        Line("a node sends in a step", size(plan.traffic), COUNTED, "gradients, float32" if settings.parallel == "ddp" else "parameters and gradients, float32"),
        Line("  takes", span(plan.network_s), cluster.network_gbit_s.status, f"{cluster.network_gbit_s.value:g} Gbit/s: {cluster.network_gbit_s.source}"),
        Line("  of it waited for", span(plan.waited_s), ASSUMED, f"{BACKWARD_SHARE:.0%} of a step can hide it"),
    ]  # fmt: skip
    if cluster.nodes < 2:
        network = []
    stored = [
        Line("shards", size(data.stored_bytes), data.status),
        Line("a checkpoint", size(plan.size.checkpoint_bytes), COUNTED, "parameters and AdamW's moments, float32"),
        Line("checkpoints on the disk", size(plan.kept_bytes), GIVEN, f"pretrain.keep_checkpoints={settings.keep_checkpoints}, and one being written"),
    ]  # fmt: skip
    if data.remote:
        requests = plan.steps * settings.batch_size * data.requests
        stored.append(
            Line("requests to the store", f"{requests / 1e6:,.0f} million", data.status, "some stores charge for each")
        )
    time = [
        Line("a step", f"{span(plan.step_s)}, {settings.batch_size / plan.step_s:,.0f} samples/s", "", f"decided by {longest}"),
        Line("  if data kept up", f"{span(trained_s)}, {settings.batch_size / trained_s:,.0f} samples/s"),
        Line("an epoch", span(plan.epoch_s)),
        Line("evaluations", f"{plan.evaluations} of {span(plan.evaluation_s)}", rate.status),
        Line("checkpoints", f"{plan.checkpoints} of {span(plan.checkpoint_s)}", CHECKPOINT_S.status, f"{CHECKPOINT_S.source}; written as fast as read"),
        Line("start", span(START_S.value), START_S.status, START_S.source),
        Line("the whole run", f"{span(plan.run_s)}, {plan.node_hours:,.0f} node hours"),
    ]  # fmt: skip
    for name, price in (("cost", cluster.price), ("cost, spot", cluster.spot_price)):
        if price is not None:
            time.append(
                Line(name, f"{price * plan.node_hours:,.0f}", GIVEN, f"{price:g} a node hour, {nodes(cluster.nodes)}")
            )
    if cluster.spot_price is not None:
        again = cluster.spot_price * cluster.nodes * settings.checkpoint_minutes / 60
        time.append(Line("  a node lost without notice", f"{again:,.2f} at most", GIVEN, "pretrain.checkpoint_minutes of all nodes, again"))  # fmt: skip
    return [run, [line for line in compute if line], reading, network, stored, time]


def show(console: Console, title: str, sections: Sequence[Sequence[Line]], warned: Sequence[str]) -> None:
    table = Table(title=title, title_justify="left", show_lines=False)
    for name in ("what", "estimate", "", "from"):
        table.add_column(name, overflow="fold")
    colours = {MEASURED: "green", COUNTED: "green", ASSUMED: "yellow"}
    for section in filter(None, sections):
        for line in section:
            colour = colours.get(line.status)
            status = f"[{colour}]{line.status}[/]" if colour else line.status
            table.add_row(escape(line.what), escape(line.value), status, escape(line.source))
        table.add_section()
    console.print(table)
    for warning in warned:
        console.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True, highlight=False)


def plan_command(
    experiment: Experiment, console: Console, gpu: str, workers: int | None, per_node: int, *, grids: int | None = None,
    read_rate: float | None = None, network: float | None = None, price: float | None = None, spot_price: float | None = None,
) -> None:  # fmt: skip
    """Print the plan of an experiment's pretraining, sweep and embedding, where it has them.

    Raises:
        InputError: an option that cannot be, or an experiment with nothing to plan.
    """
    from copernicus.platform.plan_embed import embed_lines, plan_embed
    from copernicus.platform.plan_here import measure_here
    from copernicus.platform.plan_sweep import plan_sweep, sweep_lines

    pretrain, sweep, embed = (
        getattr(experiment, stage) if experiment.kind in (stage, "pipeline") else None
        for stage in ("pretrain", "sweep", "embed")
    )
    if grids is not None and grids < 1:
        raise InputError(f"--grids: must be at least 1, it is {grids}")
    # An elastic run names two numbers of workers.
    given = int(np.max(pretrain.workers)) if pretrain else (embed.workers if embed else None) or 1
    cluster = cluster_of(given, gpu, workers, per_node, read_rate, network, price, spot_price, None)
    if gpu == "here":
        with console.status("measuring this machine"):
            batch = -(-pretrain.batch_size // cluster.workers) if pretrain else 1
            rate = measure_here(pretrain or Pretrain(), batch)
        cluster = dataclasses.replace(cluster, gpu="cpu" if "CPU" in rate.source else gpu, rate=rate)
    where = f"{cluster.workers} x {gpu}"
    if pretrain is not None:
        plan = plan_pretrain(experiment, pretrain, cluster, grids)
        show(console, f"{experiment.name}: pretraining on {where}", pretrain_lines(plan), plan.warnings)
    if sweep is not None:
        swept = plan_sweep(experiment, sweep, cluster)
        show(console, f"{experiment.name}: sweep on {where}", sweep_lines(swept), swept.warnings)
    if embed is not None:
        product = plan_embed(experiment, embed, cluster, grids)
        show(console, f"{experiment.name}: embedding on {where}", embed_lines(product), product.warnings)
    console.print(
        "Nothing was run. What is [yellow]assumed[/] was not measured by us: check it where it matters.", soft_wrap=True
    )
