"""The climate probe as a stage of an experiment: cells, regressions, tables, pictures, MLflow."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from copernicus.datasets.order import generator
from copernicus.datasets.sensors import InputError
from copernicus.platform.climate import Cells, Probe, Score, coordinates, harmonics, probe
from copernicus.platform.climate_pictures import draw_errors, draw_scatter
from copernicus.platform.climate_targets import Targets, open_targets
from copernicus.platform.embed_map import pixels_of
from copernicus.platform.grid_means import GRIDS_FILE, grid_tables, grids_file
from copernicus.platform.progress import short_path
from copernicus.platform.schema import FEWEST, Climate, Experiment
from copernicus.platform.tracking import Run, clean_name


def run_climate(
    experiment: Experiment, settings: Climate, embedded: Path | None, run: Run, console: Console
) -> list[Probe]:
    """Probe, write tables and pictures into the experiment's folder, and record them.

    Raises:
        InputError: targets or embeddings that cannot be read, or hardly a cell that has both.
    """
    targets = open_targets(settings.targets, settings.variables)
    needs = any(name in ("embeddings", "both") for name in settings.inputs)
    source = grids_file(Path(settings.embeddings)) if settings.embeddings else embedded and embedded / GRIDS_FILE
    cells, vectors_ND, said = choose_cells(targets, source if needs else None, settings.cells, experiment.seed)
    console.print(f"  {len(cells.rows)} cells, {len(targets.names)} variables{said}", soft_wrap=True)
    inputs: dict[str, np.ndarray] = {}
    for name in settings.inputs:
        if name == "coordinates":
            inputs[name] = coordinates(cells.lon, cells.lat)
        elif name == "harmonics":
            inputs[name] = harmonics(cells.lon, cells.lat)
        else:
            assert vectors_ND is not None
            inputs[name] = vectors_ND
            if name == "both":
                inputs[name] = np.concatenate([coordinates(cells.lon, cells.lat).astype(np.float32), vectors_ND], 1)
    probes = [
        found
        for split in settings.splits
        for found in probe(cells, inputs, targets.names, split, experiment.seed, settings.block_degrees)
    ]
    scores = [score for one in probes for score in one.scores]
    folder = experiment.folder
    write_scores(scores, folder / "climate.csv")
    (folder / "climate.json").write_text(json.dumps([dataclasses.asdict(score) for score in scores], indent=1))
    pictures = folder / "pictures"
    drawn = []
    for split in settings.splits:
        of_split = [one for one in probes if one.split == split]
        # The best by validation is shown: the test part has no say in what is picked.
        best = max(of_split, key=lambda one: np.mean([s.r2.value for s in one.scores if s.part == "val"]))
        drawn.append(draw_scatter(cells, best, targets.names, pictures / f"climate_{split}_scatter.png"))
        drawn.append(draw_errors(cells, best, targets.names, pictures / f"climate_{split}_errors.png"))
    for file in (folder / "climate.csv", folder / "climate.json", *drawn):
        run.artifact(file, "climate")
    figures = {
        f"climate/{s.split}/{s.inputs}/{clean_name(s.variable)}/{what}": getattr(s, what).value
        for s in scores
        if s.part == "test"
        for what in ("rmse", "r2")
    }
    for name in settings.inputs:
        for split in settings.splits:
            test = [s.r2.value for s in scores if (s.split, s.inputs, s.part) == (split, name, "test")]
            figures[f"climate/{split}/{name}/mean_r2"] = float(np.mean(test))
    run.metrics(figures)
    for shown in tables(scores, settings):
        console.print(shown)
    console.print(
        f"  look at {short_path(drawn[0])}; all figures: {short_path(folder / 'climate.csv')}", soft_wrap=True
    )
    return probes


def check_climate(settings: Climate) -> None:
    """Find wrong targets and embeddings before anything is run.

    Raises:
        InputError: see `open_targets` and `grid_tables`.
    """
    open_targets(settings.targets, settings.variables)
    if settings.embeddings is not None:
        next(grid_tables(grids_file(Path(settings.embeddings))), None)


def choose_cells(
    targets: Targets, source: Path | None, count: int | None, seed: int
) -> tuple[Cells, np.ndarray | None, str]:
    """Cells that have all targets, and an embedding where ``source`` is given: ``count`` of them, drawn by the seed.

    Returns:
        the cells, their embeddings (N, D), and what is to be said of the choice.

    Raises:
        InputError: fewer than `FEWEST`.
    """
    complete = np.isfinite(targets.values).all(-1)
    some = np.isfinite(targets.values).any(-1)
    usable = complete.copy()
    if source is not None:
        embedded = np.zeros_like(complete)
        for grids, _ in grid_tables(source):
            embedded[pixels_of(grids)] = True
        usable &= embedded
    rows, columns = np.nonzero(usable)
    if len(rows) < FEWEST:
        joined = "" if source is None else f", {int(embedded.sum())} an embedding"
        raise InputError(
            f"climate: {len(rows)} cells are too few to probe: {int(complete.sum())} have all of {', '.join(targets.names)}"
            f"{joined}; give more, or fewer climate.variables"
        )
    said = f"; {int(some.sum() - complete.sum())} cells lack some" if some.sum() > complete.sum() else ""
    if targets.half_cell:
        said += "; targets are half a cell off and were averaged to the cells' centres"
    if count is not None and len(rows) > count:
        said = f" of {len(rows)} that have them{said}"
        chosen = np.sort(generator("climate", "cells", seed).choice(len(rows), count, replace=False))
        rows, columns = rows[chosen], columns[chosen]
    cells = Cells(rows, columns, targets.values[rows, columns])
    for name, values_N in zip(targets.names, cells.targets_NV.T, strict=True):
        if (values_N == values_N[0]).all():
            raise InputError(
                f"climate: {name} is {values_N[0]:g} in every cell, and tells nothing; leave it out of climate.variables"
            )
    if source is None:
        return cells, None, said
    place = np.full(complete.shape, -1, np.int64)
    place[rows, columns] = np.arange(len(rows))
    vectors_ND: np.ndarray | None = None
    for grids, embeddings_GD in grid_tables(source):
        if vectors_ND is None:
            vectors_ND = np.zeros((len(rows), embeddings_GD.shape[1]), np.float32)
        at = place[pixels_of(grids)]
        vectors_ND[at[at >= 0]] = embeddings_GD[at >= 0]
    return cells, vectors_ND, said


def write_scores(scores: list[Score], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        errors = [f"{name}{bound}" for name in ("rmse", "r2") for bound in ("", "_low", "_high")]
        writer.writerow(["split", "inputs", "variable", "part", "cells", "units", *errors, "strength"])
        for s in scores:
            errors = [f"{value:.6g}" for one in (s.rmse, s.r2) for value in (one.value, one.low, one.high)]
            writer.writerow([s.split, s.inputs, s.variable, s.part, s.cells, s.units, *errors, f"{s.strength:.3g}"])


def tables(scores: list[Score], settings: Climate) -> Iterator[Table]:
    """R2 of the test part, a table a split."""
    for split in settings.splits:
        of_split = [s for s in scores if s.split == split and s.part == "test"]
        blocks = f"by {of_split[0].units} blocks of {settings.block_degrees:g} degrees"
        by = blocks if split == "blocks" else "at random"
        table = Table(title=f"R2 on {of_split[0].cells} test cells, split {by}", title_justify="left")
        table.add_column("variable")
        for name in settings.inputs:
            table.add_column(name, justify="right")
        for variable in dict.fromkeys(s.variable for s in of_split):
            row = [next(s for s in of_split if (s.variable, s.inputs) == (variable, name)) for name in settings.inputs]
            best = max(s.r2.value for s in row)
            table.add_row(
                variable, *(f"[bold]{s.r2}[/]" if s.r2.value == best else str(s.r2) for s in row)
            )  # fmt: skip
        yield table
