"""A contact sheet of a miniature Earth as it lies on disk: the planet, a grid in eight sensors, samples of each task."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from copernicus.datasets.expand import expand
from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.miniature.preview_tasks import Panel, s2_colour, s3_colour, stretch, task_rows
from copernicus.datasets.sensors import OLCI_SCALE, SENSORS, InputError
from copernicus.datasets.shards import grid_center, parse_image_name
from copernicus.datasets.tar import list_members

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 10
_PLANET_INCHES, _GRID_INCHES, _TASK_INCHES, _LEGEND_INCHES = 5.6, 4.1, 2.5, 0.8
_LEGEND_LINES = 6


def preview(out: Path | str) -> Path:
    """Draws ``out/preview.png`` from the files of a miniature and returns its path.

    Raises:
        InputError: the folder holds no miniature's grids.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    out = Path(out)
    try:
        manifest = json.loads((out / "miniature.json").read_text())
    except (OSError, ValueError):
        manifest = {}
    if not manifest.get("pretrain"):
        raise InputError(f"{out} holds no complete miniature; write one with `copernicus data miniature`")
    planet, shards = Planet(manifest["seed"]), out / "pretrain"
    rows = task_rows(out / "bench", manifest["tasks"], _COLUMNS)
    with_legend = [any(panel.legend for _, panel in row) for row in rows]
    heights = [_PLANET_INCHES, _GRID_INCHES, _GRID_INCHES]
    heights += [_TASK_INCHES + _LEGEND_INCHES * legend for legend in with_legend]
    figure = Figure(figsize=(20, sum(heights)), layout=ConstrainedLayoutEngine(h_pad=0.08))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
    parts = [figure.add_subfigure(grid[row]) for row in range(len(heights))]
    _draw_planet(parts[0].subplots(1, 2), planet, shards)
    _draw_grid([*parts[1].subplots(1, 5), *parts[2].subplots(1, 5)], shards)
    for part, row in zip(parts[3:], rows, strict=True):
        _draw_row(part.subplots(1, _COLUMNS, squeeze=False)[0], row)
    for part in parts[1:]:
        for ax in part.axes:
            ax.set(xticks=[], yticks=[])
    path = out / "preview.png"
    figure.savefig(path, dpi=70)
    return path


def _draw_row(axes: np.ndarray, row: list[tuple[str, Panel]]) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.patches import Patch

    before = ""
    for ax, (tasks, panel) in zip(axes, row, strict=False):
        first, before = tasks != before, tasks
        if panel.legend:
            codes = [int(code) for code in np.unique(panel.image)]
            colours = [panel.legend[code][1] for code in codes]
            norm = BoundaryNorm([-0.5, *[(a + b) / 2 for a, b in pairwise(codes)], 255.5], len(codes))
            ax.imshow(panel.image, cmap=ListedColormap(colours), norm=norm, interpolation="nearest")
            # The most frequent first; the rarest are left out where there is no room.
            often = sorted(codes, key=lambda code: -np.sum(panel.image == code))[:_LEGEND_LINES]
            handles = [Patch(facecolor=c, edgecolor="gray", label=n) for n, c in (panel.legend[code] for code in often)]
            ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(-0.05, -0.01), fontsize=7, frameon=False)
        else:
            ax.imshow(panel.image)
        ax.set_title(panel.title, fontsize=8)
        if first:
            ax.set_ylabel(tasks.replace(", ", "\n"), fontsize=9, fontweight="bold")
    for ax in axes[len(row) :]:
        ax.set_axis_off()


def _draw_planet(axes: np.ndarray, planet: Planet, pretrain: Path) -> None:
    lon, lat = np.linspace(-179.5, 179.5, 360), np.linspace(89.5, -89.5, 180)
    wide = planet.wide(*np.meshgrid(lon, lat))
    land = wide.elevation > 0
    extent = (-180, 180, -90, 90)
    axes[0].imshow(wide.elevation, cmap="terrain", vmin=-3000, vmax=3500, extent=extent)
    places = [grid_center(int(key)) for shard in expand(pretrain) for key in list_members(shard)[0]]
    axes[0].scatter(*zip(*places, strict=True), s=3, c="red")
    axes[0].set_title(f"seed {planet.seed}: elevation and the {len(places)} pretraining grids")
    colour = np.where(land[..., None], np.array([0.72, 0.7, 0.45]), np.array([0.15, 0.3, 0.6]))
    ground_t = wide.temperature - 0.0062 * np.maximum(wide.elevation, 0)
    for where, rgb in (
        (wide.moisture < 0.22, (0.9, 0.82, 0.6)),
        (wide.wood > 0.35, (0.1, 0.4, 0.15)),
        (wide.farm > 0.25, (0.85, 0.8, 0.2)),
        (wide.urban > 1.15, (0.8, 0.1, 0.1)),
        (ground_t < -9, (1.0, 1.0, 1.0)),
    ):
        colour[land & where] = rgb
    axes[1].imshow(colour, extent=extent)
    axes[1].set_title("forest, farmland, cities, desert, grassland, ice")


def _complete_grid(pretrain: Path) -> tuple[str, str, dict[str, tuple[int, int]]] | None:
    """Shard, key and members of the first grid that lacks no sensor, if there is one."""
    for shard in expand(pretrain):
        for key, members in list_members(shard)[0].items():
            if len(members) == len(SENSORS) + 1:
                return shard, key, members
    return None


def _draw_grid(axes: list[Axes], pretrain: Path) -> None:
    """A grid with all its sensors: two dates of the images, one of the gases."""
    import torch

    found = _complete_grid(pretrain)
    if found is None:
        axes[0].set_title("no grid here has all eight sensors")
        return
    shard, key, members = found
    with open(shard, "rb") as file:

        def payload(extension: str) -> bytes:
            offset, size = members[extension]
            file.seek(offset)
            return file.read(size)

        arrays = {s: torch.load(io.BytesIO(payload(f"{s}.pth")), weights_only=True).numpy() for s in SENSORS}
        names = json.loads(payload("json"))

    def title(ax: Axes, text: str, name: list) -> None:
        days = parse_image_name(name).days
        date = "" if np.isnan(days) else str(np.datetime64("1970-01-01") + int(days))
        ax.set_title(f"{text} {date}", fontsize=9)

    lon, lat = grid_center(int(key))
    s1, s2, s3 = arrays["s1_grd"], arrays["s2_toa"], arrays["s3_olci"] * np.array(OLCI_SCALE)[:, None, None]
    for column, date in enumerate((0, -1)):
        axes[column].imshow(s2_colour(s2[0, date]))
        title(axes[column], f"grid {key} ({lon}, {lat}) s2_toa", names["s2_toa"][0][date])
        axes[2 + column].imshow(s1[0, date, column], cmap="gray", vmin=-28, vmax=0)
        title(axes[2 + column], f"s1_grd {('VV', 'VH')[column]}, dB", names["s1_grd"][0][date])
        axes[5 + column].imshow(s3_colour(s3[date]))
        title(axes[5 + column], "s3_olci", names["s3_olci"][date])
    axes[4].imshow(arrays["dem"], cmap="terrain")
    axes[4].set_title(f"dem {arrays['dem'].min():.0f}..{arrays['dem'].max():.0f} m", fontsize=9)
    no2, co = arrays["s5p_no2"][0, 0], arrays["s5p_co"][0, 0]
    for ax, name, image in ((axes[7], "s5p_no2", no2), (axes[8], "s5p_co", co)):
        ax.imshow(image)
        ax.set_title(f"{name} {np.nanmin(image):.1e}..{np.nanmax(image):.1e} mol/m2", fontsize=9)
    axes[9].imshow(np.concatenate([stretch(arrays[gas][0])[..., 0] for gas in ("s5p_o3", "s5p_so2")], axis=1))
    axes[9].set_title("s5p_o3 | s5p_so2", fontsize=9)
