"""A contact sheet of a miniature Earth as it lies on disk: the planet, one grid in eight sensors, a sample of each task."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from copernicus.datasets.expand import expand
from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.miniature.tasks import TASKS
from copernicus.datasets.sensors import OLCI_SCALE, SENSORS, InputError
from copernicus.datasets.shards import days_since_1970, grid_center, parse_image_name
from copernicus.datasets.tar import list_members

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CLOUD_NAMES = ("invalid", "clear", "sure", "ambiguous", "shadow", "snow")
_FLOOD_NAMES = ("dry", "permanent", "flood", "outside")


def preview(out: Path | str) -> Path:
    """Draws ``out/preview.png`` from the files of a miniature and returns its path.

    Raises:
        InputError: the folder holds no complete miniature.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = Path(out)
    try:
        manifest = json.loads((out / "miniature.json").read_text())
    except (OSError, ValueError):
        manifest = {}
    if not manifest.get("complete"):
        raise InputError(f"{out} holds no complete miniature; write one with `copernicus data miniature`")
    figure = Figure(figsize=(20, 20), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(5, 1, height_ratios=[1.5, 1, 1, 1, 1])
    planet, first, second, third, fourth = (figure.add_subfigure(grid[row]) for row in range(5))
    _draw_planet(planet.subplots(1, 2), manifest["seed"], out / "pretrain")
    _draw_grid([*first.subplots(1, 5), *second.subplots(1, 5)], out / "pretrain")
    _draw_classification(third.subplots(1, 10), out / "bench" / TASKS["eurosat_s2"].directory)
    bottom = fourth.subplots(1, 8)
    _draw_cloud(bottom[:2], out / "bench" / TASKS["cloud_s3"].directory)
    _draw_flood(bottom[2:5], out / "bench" / TASKS["flood_s1"].directory)
    _draw_air(bottom[5:], out / "bench" / TASKS["aq_no2_s5p"].directory)
    for row in (first, second, third, fourth):
        for ax in row.axes:
            ax.set(xticks=[], yticks=[])
    path = out / "preview.png"
    figure.savefig(path, dpi=70)
    return path


def _stretch(image_CHW: np.ndarray) -> np.ndarray:
    """(H, W, C) in 0..1 between the 2nd and the 98th percentile of all channels together; NaN black."""
    if not np.isfinite(image_CHW).any():
        return np.zeros((*image_CHW.shape[1:], len(image_CHW)))
    low, high = np.nanpercentile(image_CHW, (2, 98))
    scaled = np.clip((image_CHW - low) / max(high - low, 1e-12), 0, 1)
    return np.moveaxis(np.nan_to_num(scaled), 0, -1)


def _s2_colour(image_CHW: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.clip(image_CHW[[3, 2, 1]] / 3000.0, 0, 1), 0, -1)


def _s3_colour(image_CHW: np.ndarray) -> np.ndarray:
    return _stretch(image_CHW[[7, 5, 3]].astype(np.float64))


def _read(path: Path) -> np.ndarray:
    import rasterio

    with rasterio.open(path) as tif:
        return tif.read()


def _draw_planet(axes: np.ndarray, seed: int, pretrain: Path) -> None:
    lon, lat = np.linspace(-179.5, 179.5, 360), np.linspace(89.5, -89.5, 180)
    wide = Planet(seed).wide(*np.meshgrid(lon, lat))
    land = wide.elevation > 0
    extent = (-180, 180, -90, 90)
    axes[0].imshow(wide.elevation, cmap="terrain", vmin=-3000, vmax=3500, extent=extent)
    places = [grid_center(int(key)) for shard in expand(pretrain) for key in list_members(shard)[0]]
    axes[0].scatter(*zip(*places, strict=True), s=3, c="red")
    axes[0].set_title(f"seed {seed}: elevation and the {len(places)} pretraining grids")
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
        axes[column].imshow(_s2_colour(s2[0, date]))
        title(axes[column], f"grid {key} ({lon}, {lat}) s2_toa", names["s2_toa"][0][date])
        axes[2 + column].imshow(s1[0, date, column], cmap="gray", vmin=-28, vmax=0)
        title(axes[2 + column], f"s1_grd {('VV', 'VH')[column]}, dB", names["s1_grd"][0][date])
        axes[5 + column].imshow(_s3_colour(s3[date]))
        title(axes[5 + column], "s3_olci", names["s3_olci"][date])
    axes[4].imshow(arrays["dem"], cmap="terrain")
    axes[4].set_title(f"dem {arrays['dem'].min():.0f}..{arrays['dem'].max():.0f} m", fontsize=9)
    no2, co = arrays["s5p_no2"][0, 0], arrays["s5p_co"][0, 0]
    for ax, name, image in ((axes[7], "s5p_no2", no2), (axes[8], "s5p_co", co)):
        ax.imshow(image)
        ax.set_title(f"{name} {np.nanmin(image):.1e}..{np.nanmax(image):.1e} mol/m2", fontsize=9)
    axes[9].imshow(np.concatenate([_stretch(arrays[gas][0])[..., 0] for gas in ("s5p_o3", "s5p_so2")], axis=1))
    axes[9].set_title("s5p_o3 | s5p_so2", fontsize=9)


def _draw_classification(axes: np.ndarray, root: Path) -> None:
    paths = {folder.name: min(folder.glob("*.tif")) for folder in sorted((root / "all_imgs").iterdir())}
    for ax, (name, path) in zip(axes, paths.items(), strict=False):  # a tiny miniature may lack a class
        ax.imshow(_s2_colour(_read(path)))
        ax.set_title(name, fontsize=9)


def _draw_cloud(axes: np.ndarray, root: Path) -> None:
    """The scene with the most kinds of cover."""
    labels = {path: _read(path)[0] for path in sorted((root / "cloud_multi").glob("*.tif"))}
    path, label = max(labels.items(), key=lambda item: len(np.unique(item[1])))
    axes[0].imshow(_s3_colour(_read(root / "s3_olci" / path.name)))
    axes[0].set_title("cloud_s3", fontsize=9)
    axes[1].imshow(label, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    axes[1].set_title(", ".join(_CLOUD_NAMES[code] for code in np.unique(label)), fontsize=9)


def _draw_flood(axes: np.ndarray, root: Path) -> None:
    """The place with the widest flood."""
    labels = {path: _read(path)[0] for path in sorted((root / "data").rglob("MK0_MLU_*.tif"))}
    path, label = max(labels.items(), key=lambda item: np.mean(item[1] == 2))
    for ax, kind in zip(axes, ("SL1_IVV", "MS1_IVV"), strict=False):
        (file,) = path.parent.glob(f"{kind}_*.tif")
        ax.imshow(np.clip(_read(file)[0], 0, 0.15), cmap="gray")
        day = int(days_since_1970(file.stem[-8:]))
        ax.set_title(f"flood_s1 {kind} {np.datetime64('1970-01-01') + day}", fontsize=9)
    axes[2].imshow(label, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    axes[2].set_title(", ".join(_FLOOD_NAMES[code] for code in np.unique(label)), fontsize=9)


def _draw_air(axes: np.ndarray, root: Path) -> None:
    """The place with the most NO2."""
    labels = {path: _read(path)[0] for path in sorted((root / "label_annual").glob("*.tif"))}
    labels = {path: np.where(np.abs(label) > 1e10, np.nan, label) for path, label in labels.items()}
    path, label = max(labels.items(), key=lambda item: float(np.nanmax(item[1])))
    annual = _read(root / "s5p_annual" / path.stem / "2021-01-01_2021-12-31.tif")[0]
    winter = _read(root / "s5p_seasonal" / path.stem / "2021-01-01_2021-04-01.tif")[0]
    for ax, name, image in (
        (axes[0], "no2 column, winter, mol/m2", winter),
        (axes[1], "no2 column, annual, mol/m2", annual),
        (axes[2], "no2 at the ground, ug/m3", label),
    ):
        ax.imshow(image)
        ax.set_title(f"{name}\n{np.nanmin(image):.2g}..{np.nanmax(image):.2g}", fontsize=9)
