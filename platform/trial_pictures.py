"""Pictures of what a trial's head makes of the test split: its confusion matrix, and some predictions beside the truth.

Shapes: N samples shown, K classes, C channels, H W pixels.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from copernicus.datasets.bench.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from copernicus.datasets.bench.reader import TaskDataset
    from copernicus.platform.probe import ProbeResult

TRUE_COLOUR = (("B04", "B03", "B02"), ("Oa08", "Oa06", "Oa04"))
NO_VALUE = 0.82
FAINTEST = 0.15
"""Deviations that are stretched from black to white at least: noise over an even field stays dark."""
SHOWN = 8
"""Samples in a picture of predictions."""


def draw_trial(task: Task, dataset: TaskDataset, result: ProbeResult, title: str) -> dict[str, bytes]:
    """The pictures of a trial's test split as PNG files, by name.

    Args:
        dataset: the test split.
    """
    drawn = {}
    if result.confusion is not None:
        drawn["confusion.png"] = draw_confusion(task, result.confusion, title)
    if (shown := result.examples) is not None:
        numbers = [dataset.ids.index(name) for name in shown.ids]
        drawn["predictions.png"] = draw_predictions(task, [dataset[i] for i in numbers], shown.predicted, title)
    return drawn


def draw_confusion(task: Task, confusion_KK: np.ndarray, title: str) -> bytes:
    """Rows are the true classes, in per cent of each; the number in a field is a count."""
    figure, axes = _figure(2.6 + 0.42 * len(confusion_KK), 2.2 + 0.42 * len(confusion_KK))
    total_K1 = confusion_KK.sum(1, keepdims=True)
    share_KK = np.divide(confusion_KK, total_K1, out=np.zeros(confusion_KK.shape), where=total_K1 > 0)
    axes.imshow(share_KK, cmap="Blues", vmin=0, vmax=1)
    small = len(confusion_KK) > 12
    for row, column in np.argwhere(confusion_KK > 0):
        axes.text(
            column, row, _count(int(confusion_KK[row, column])), ha="center", va="center", fontsize=6 if small else 7,
            color="white" if share_KK[row, column] > 0.5 else "black",
        )  # fmt: skip
    names = [_shortened(name) for name in task.classes]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("predicted", fontsize=8)
    axes.set_ylabel("true", fontsize=8)
    axes.set_title(title, fontsize=9)
    return _png(figure)


def draw_predictions(task: Task, samples: list[dict[str, Any]], predicted: np.ndarray, title: str) -> bytes:
    """Some test samples: the image, and what is true and what the head says of it.

    Args:
        samples: as `TaskDataset` gives them.
        predicted: (N,) class ids, (N, K) scores of labels, (N, H, W) class ids, or (N, H, W) normalised values.
    """
    if task.dense:
        return _draw_maps(task, samples, predicted, title)
    columns = min(4, len(samples))
    rows = -(-len(samples) // columns)
    figure, grid = _figure(max(2.5 * columns, 5), 0.5 + 2.9 * rows, rows, columns)
    for axes, sample, found in zip(grid.flat, samples, predicted, strict=False):
        _show(axes, view(task, _dates(task, sample)[0]))
        true = sample["target"].numpy()
        if task.kind == "multilabel":
            said = [task.classes[i] for i in np.flatnonzero(found > 0.5)]
            there = [task.classes[i] for i in np.flatnonzero(true)]
            missed, wrong = [n for n in there if n not in said], [n for n in said if n not in there]
            lines = [f"{len(there) - len(missed)} of {len(there)} labels"]
            lines += [f"+ {_shortened(n)}" for n in wrong[:2]] + [f"− {_shortened(n)}" for n in missed[:2]]
            right = not missed and not wrong
        else:
            right = int(found) == int(true)
            lines = [task.classes[int(true)], *([] if right else [f"called {task.classes[int(found)]}"])]
        axes.set_title("\n".join(lines), fontsize=7, color="darkgreen" if right else "firebrick")
    for axes in grid.flat[len(samples) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=9)
    return _png(figure)


def _draw_maps(task: Task, samples: list[dict[str, Any]], predicted: np.ndarray, title: str) -> bytes:
    """Columns: the image of each date, the truth, the prediction."""
    import matplotlib

    dates = task.dates
    figure, grid = _figure(2.3 * (dates + 2) + 1.6, 0.6 + 2.35 * len(samples), len(samples), dates + 2)
    for row, (sample, found_HW) in enumerate(zip(samples, predicted, strict=True)):
        for date, image in enumerate(_dates(task, sample)[:dates]):
            _show(grid[row, date], view(task, image))
        true_HW = sample["target"].numpy()
        if task.kind == "regression":
            maps = [x * task.target_std + task.target_mean for x in (true_HW, found_HW)]
            known = maps[0][np.isfinite(maps[0])]
            low, high = np.percentile(known, (2, 98)) if len(known) else (0.0, 1.0)
            for axes, values in zip(grid[row, dates:], maps, strict=True):
                drawn = _show(axes, values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9))
            figure.colorbar(drawn, ax=grid[row, dates:], shrink=0.8).ax.tick_params(labelsize=6)
        else:
            table = matplotlib.colormaps["tab20" if task.num_classes > 10 else "tab10"]
            known_HW = true_HW != task.ignore_index
            for axes, ids in zip(grid[row, dates:], (true_HW, found_HW), strict=True):
                colours = table(np.clip(ids, 0, None) % table.N)[..., :3]
                _show(axes, np.where(known_HW[..., None], colours, NO_VALUE))
        grid[row, 0].set_ylabel(_shortened(str(sample["id"]), 28), fontsize=6)
    heads = ["image"] if dates == 1 else ["before", "after"]
    for axes, head in zip(grid[0], [*heads, "true", "predicted"], strict=True):
        axes.set_title(head, fontsize=8)
    if task.kind != "regression":
        shown = sorted({int(i) for s in samples for i in np.unique(s["target"]) if int(i) != task.ignore_index}
                       | {int(i) for i in np.unique(predicted)})  # fmt: skip
        handles = [
            matplotlib.patches.Patch(color=table(i % table.N)[:3], label=_shortened(task.classes[i])) for i in shown
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=6, frameon=False)
    figure.suptitle(title, fontsize=9)
    return _png(figure)


def _dates(task: Task, sample: dict[str, Any]) -> list[np.ndarray]:
    """The (C, H, W) of each date."""
    image = sample["image"].numpy()
    return list(image) if task.series else np.split(image, task.dates)


def view(task: Task, x_CHW: np.ndarray) -> np.ndarray:
    """A normalised image as (H, W, 3) or (H, W) in 0..1: true colour, VV VH and their difference, or its only band."""
    bands = task.sensor.bands
    chosen = next((c for c in TRUE_COLOUR if set(c) <= set(bands)), None)
    if chosen is not None:
        shown = x_CHW[[bands.index(band) for band in chosen]]
    elif len(x_CHW) == 2:
        shown = np.stack([x_CHW[0], x_CHW[1], x_CHW[0] - x_CHW[1]])
    else:
        shown = x_CHW[:1]
    low, high = np.nanpercentile(shown, (2, 98), axis=(1, 2), keepdims=True)
    scaled = np.clip((shown - low) / np.maximum(high - low, FAINTEST), 0, 1)
    return np.moveaxis(scaled, 0, -1) if len(scaled) == 3 else scaled[0]


def _figure(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else figure.subplots()


def _show(axes: Any, image: np.ndarray, **options: Any) -> Any:
    drawn = axes.imshow(image, **({"cmap": "gray"} if image.ndim == 2 else {}) | options)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor(str(NO_VALUE))
    return drawn


def _shortened(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1].rstrip(" ,") + "…"


def _count(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1000:.0f}k" if number < 1_000_000 else f"{number / 1e6:.1f}M"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return buffer.getvalue()
