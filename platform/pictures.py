"""Pictures of what a pretrained autoencoder sees and makes of it.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from copernicus.datasets.index import GridIndex
from copernicus.datasets.sensors import Sensor

if TYPE_CHECKING:
    from copernicus.platform.objective import Plan

TRUE_COLOUR = {"s2_toa": ("B04", "B03", "B02"), "s3_olci": ("Oa08", "Oa06", "Oa04")}
MAX_GRIDS = 4


def reconstructions(plan: Plan, held_out: GridIndex, checkpoint: Path, folder: Path) -> list[Path]:
    """One PNG a sensor: masked input, reconstruction and original of a few held-out grids. Returns their paths."""
    from copernicus.models.weights import load_weights
    from copernicus.platform.objective import build_autoencoder

    model: Any = build_autoencoder(plan).eval()
    load_weights(model, checkpoint)
    reader = plan.reader(augment=False)
    columns = reader.batch([(grid, -1, 0) for grid in held_out.entries(range(min(len(held_out), 4 * MAX_GRIDS)))])
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, sensor in enumerate(plan.sensors):
        having = np.flatnonzero(columns["present"][:, index])[:MAX_GRIDS]
        if not len(having):
            continue
        batch = {name: column[having] for name, column in columns.items()}
        x_BCHW = sensor.normalize(torch.from_numpy(batch[f"x_{sensor.name}"]))
        metadata = torch.from_numpy(batch["metadata"][:, index])
        noise = torch.from_numpy(batch[f"noise_{sensor.name}"])
        masked, filled = model.reconstruct(x_BCHW, sensor, metadata, noise)
        titles = [f"grid {key}" for key in batch["key"]]
        paths.append(
            _draw(sensor, (masked, filled, x_BCHW), titles, plan.settings.norm_pix_loss, folder / f"{sensor.name}.png")
        )
    return paths


def _draw(sensor: Sensor, images: tuple[torch.Tensor, ...], titles: list[str], norm_pix: bool, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = ("masked input", "reconstruction", "original")
    count = images[0].shape[0]
    figure = Figure(figsize=(7.6, 0.8 + 2.4 * count), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(count, 3, squeeze=False)
    for row in range(count):
        original = _composite(sensor, images[2][row].numpy())
        low, high = np.nanpercentile(original, (1, 99))
        for column, tensor in enumerate(images):
            view = (_composite(sensor, tensor[row].numpy()) - low) / max(high - low, 1e-6)
            hidden = np.isnan(view).any(-1)
            view = np.where(hidden[..., None], 0.82, np.clip(np.nan_to_num(view), 0, 1))
            axis = axes[row, column]
            if view.shape[-1] == 1:
                axis.imshow(
                    np.where(hidden, np.nan, view[..., 0]),
                    vmin=0,
                    vmax=1,
                    cmap="viridis" if sensor.variable else "gray",
                )
                axis.set_facecolor("0.82")
            else:
                axis.imshow(view)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(columns[column], fontsize=9)
            if column == 0:
                axis.set_ylabel(titles[row], fontsize=8)
    note = "hidden patches take the true patch's mean and deviation" if norm_pix else "values as predicted"
    figure.suptitle(f"{sensor.name}: {', '.join(_bands(sensor))} ({note})", fontsize=10)
    figure.savefig(path, dpi=110)
    return path


def _bands(sensor: Sensor) -> tuple[str, ...]:
    """The bands shown as red, green and blue; or the first band in grey."""
    return TRUE_COLOUR.get(sensor.name, sensor.bands[:1])


def _composite(sensor: Sensor, x_CHW: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 1) of the shown bands."""
    return np.stack([x_CHW[sensor.bands.index(band)] for band in _bands(sensor)], axis=-1)
