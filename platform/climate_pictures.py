"""Pictures of the climate probe: what was said against what is, and where it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copernicus.datasets.shards import GRID_COLUMNS, GRID_ROWS
from copernicus.platform.climate import TEST, TRAIN, Cells, Probe
from copernicus.platform.embed_pictures import EXTENT, new_figure, on_globe, save, spread

MOST_POINTS = 5000


def draw_scatter(cells: Cells, probe: Probe, names: Sequence[str], path: Path) -> Path:
    """Predicted against true values of the test cells, a panel a variable."""
    test = np.flatnonzero(probe.parts_N == TEST)
    scores = {s.variable: s for s in probe.scores if s.part == "test"}
    figure, axes = new_figure(len(names), 13.0, columns=min(3, len(names)), aspect=0.85)
    figure.suptitle(f"{len(test)} test cells, split {probe.split}: from {probe.inputs}")
    for number, (axis, name) in enumerate(zip(axes, names, strict=False)):
        true, said = cells.targets_NV[test, number], probe.predicted_NV[test, number]
        few = slice(None, None, max(1, len(test) // MOST_POINTS))
        axis.scatter(true[few], said[few], s=4, alpha=0.4, linewidths=0)
        ends = [float(min(true.min(), said.min())), float(max(true.max(), said.max()))]
        axis.plot(ends, ends, color="black", linewidth=0.8)
        axis.set_title(f"{name}: R² {scores[name].r2}, RMSE {scores[name].rmse.value:.3g}", fontsize="medium")
        axis.set_xlabel("target")
        axis.set_ylabel("predicted")
    return _end(figure, axes, len(names), path)


def draw_errors(cells: Cells, probe: Probe, names: Sequence[str], path: Path) -> Path:
    """Predicted less true on the map, of the cells that the regression was not fitted to."""
    held = probe.parts_N != TRAIN
    mask = np.zeros((GRID_ROWS, GRID_COLUMNS), bool)
    mask[cells.rows[held], cells.columns[held]] = True
    shown, (rows, columns), _ = spread(mask)
    figure, axes = new_figure(len(names), 15.0, columns=min(2, len(names)))
    figure.suptitle(f"predicted less target, validation and test cells, split {probe.split}: from {probe.inputs}")
    for number, (axis, name) in enumerate(zip(axes, names, strict=False)):
        errors = np.full(mask.shape, np.nan)
        errors[cells.rows[held], cells.columns[held]] = (
            probe.predicted_NV[held, number] - cells.targets_NV[held, number]
        )
        values = np.ma.masked_where(~shown, errors[rows, columns])
        most = float(np.nanpercentile(np.abs(errors), 98)) or 1.0
        drawn = axis.imshow(values, extent=EXTENT, interpolation="nearest", cmap="RdBu_r", vmin=-most, vmax=most)
        on_globe(axis, name)
        figure.colorbar(drawn, ax=axis, shrink=0.7)
    return _end(figure, axes, len(names), path)


def _end(figure: Any, axes: Sequence[Any], used: int, path: Path) -> Path:
    for axis in axes[used:]:
        axis.set_visible(False)
    return save(figure, path)
