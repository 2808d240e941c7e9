"""``copernicus similar``: the cells of the globe that are most like a place, or like an image.

Likeness is the cosine of embeddings less their mean over the globe, which all share and which tells nothing. Cells are read
from the product a part at a time, twice: for the mean, and to compare.

Shapes: G grids of a part, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import GRID_COLUMNS, GRID_ROWS, grid_center
from copernicus.platform.embed_map import pixels_of
from copernicus.platform.embed_pictures import EXTENT, new_figure, on_globe, save, spread
from copernicus.platform.embed_worker import IMAGES, grid_means, unpacked
from copernicus.platform.grid_means import grid_of, grid_tables, grids_file
from copernicus.platform.progress import progress_bar, short_path

EARTH_RADIUS_KM = 6371.0
FAR_KM = 100.0
"""A place without an embedding is stood for by the nearest cell that has one; if that is farther, a warning says so."""

Parts = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class Neighbour:
    """A cell like the one asked for. ``similarity``: -1 to 1; ``km``: from the place asked for, none for an image."""

    grid: int
    lon: float
    lat: float
    similarity: float
    km: float | None


def distances_km(lon: float, lat: float, lons: np.ndarray, lats: np.ndarray) -> np.ndarray:
    """Great-circle distances from a place, degrees."""
    a, b, c, d = np.radians(lon), np.radians(lat), np.radians(lons), np.radians(lats)
    half = np.sin((d - b) / 2) ** 2 + np.cos(b) * np.cos(d) * np.sin((c - a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.clip(half, 0, 1)))


def similar_command(
    where: Path,
    lon: float | None,
    lat: float | None,
    image: Path | None,
    sensor: str | None,
    count: int,
    apart_km: float,
    out: Path,
    console: Console,
) -> list[Neighbour]:
    """Find the most similar cells, print them and draw them.

    Args:
        where: a folder of embeddings, an experiment's, or a file of grid means.
        lon, lat: of the place, degrees; or else
        image, sensor: a file as `copernicus encode` takes it, compared with the cells' images of its sensor. With a place,
            ``sensor`` compares these alone.
        apart_km: leaves out cells nearer to the place than this.

    Raises:
        InputError: no embeddings, no such place or image, or another encoder's width.
    """
    path = grids_file(where)
    if out.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg") or out.is_dir():
        raise InputError(f"--out {out}: give a file that ends in .png (or .pdf, .svg, .jpg)")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.absolute().parent}; make it first")
    if sensor is not None and sensor not in SENSORS:
        raise InputError(f"--sensor: no {sensor!r}; valid choices: {', '.join(SENSORS)}")
    if (image is None) == (lon is None and lat is None):
        raise InputError("give either a place, --lon and --lat, or an image with its --sensor")
    if image is None and (lon is None or lat is None or not (-180 <= lon <= 180 and -90 <= lat <= 90)):
        raise InputError(f"--lon {lon} --lat {lat}: give both, degrees, from -180 to 180 and from -90 to 90")
    if image is not None and sensor is None:
        raise InputError(f"--sensor: say which one took the image; one of {', '.join(SENSORS)}")
    parts: Parts = (lambda: sensor_means(path.parent, sensor)) if sensor else (lambda: grid_tables(path))
    with progress_bar(console, "comparing"):
        grids, total = [], 0.0
        for part, z_GD in parts():
            grids.append(part)
            total = total + z_GD.sum(0, dtype=np.float64)
        if not grids:
            raise InputError(f"{path.parent} has no embedding{f' of {sensor}' if sensor else ''}")
        all_grids = np.concatenate(grids)
        mean_D = np.asarray(total) / len(all_grids)
        lons, lats = places(all_grids)
        if image is not None:
            query_D = embed_image(path.parent, image, str(sensor))
            if query_D.shape != mean_D.shape:
                raise InputError(f"the image has {len(query_D)} numbers, the cells {len(mean_D)}: another encoder's")
            title, own = f"like {image.name}", None
        else:
            assert lon is not None
            assert lat is not None
            away = distances_km(lon, lat, lons, lats)
            own = int(away.argmin())
            if away[own] > FAR_KM:
                console.print(
                    f"[yellow]warning[/] no embedding near; the nearest cell, {away[own]:.0f} km away at "
                    f"{lons[own]:.2f}, {lats[own]:.2f}, stands for the place"
                )
            query_D = next(z_GD[p == all_grids[own]][0] for p, z_GD in parts() if (p == all_grids[own]).any())
            title = f"like {lons[own]:.2f}, {lats[own]:.2f}"
        direction_D = _unit(query_D - mean_D)
        likeness = np.concatenate([_unit(z_GD - mean_D) @ direction_D for _, z_GD in parts()])
    near = distances_km(lons[own], lats[own], lons, lats) if own is not None else None
    allowed = np.ones(len(likeness), bool) if near is None else near > apart_km
    if own is not None:
        allowed[own] = False
    if not allowed.any():
        raise InputError(f"--apart {apart_km:g}: no cell is that far from the place")
    order = np.argsort(-np.where(allowed, likeness, -np.inf), kind="stable")[: min(count, int(allowed.sum()))]
    found = [
        Neighbour(int(all_grids[i]), float(lons[i]), float(lats[i]), float(likeness[i]), None if near is None else float(near[i]))
        for i in order
    ]  # fmt: skip
    if sensor:
        title += f", {sensor} alone"
    console.print(_table(found, title))
    draw(all_grids, likeness, found, None if own is None else (float(lons[own]), float(lats[own])), title, out)
    console.print(f"look at {short_path(out)}", soft_wrap=True)
    return found


def places(grids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of grids, degrees."""
    centres = np.array([grid_center(int(grid)) for grid in grids])
    return centres[:, 0], centres[:, 1]


def sensor_means(folder: Path, sensor: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Grid means of one sensor's images alone, a chunk after the other.

    Raises:
        InputError: the folder holds no images' embeddings.
    """
    from copernicus.datasets.images import ImageKey

    chunks = sorted((folder / IMAGES).glob("chunk-*.parquet"))
    if not chunks:
        raise InputError(f"{folder} holds no embeddings of images ({IMAGES}/), which one sensor's would be taken from")
    for chunk in chunks:
        try:
            table = pq.read_table(
                chunk, columns=["grid_id_coord", "modality", "embedding"], filters=[("modality", "=", sensor)]
            )
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{chunk} cannot be read ({str(error).splitlines()[0][:120]}); remove it, and run the experiment that made it again"
            ) from None
        if table.num_rows:
            keys = [ImageKey(name, sensor, None, None) for name in table["grid_id_coord"].to_pylist()]
            means = grid_means(keys, unpacked(table["embedding"]))
            names = means["grid_id_coord"].to_pylist()
            yield np.array([grid_of(name, chunk) for name in names]), unpacked(means["embedding"])


def embed_image(folder: Path, image: Path, sensor: str) -> np.ndarray:
    """The mean over an image's windows, by the encoder that the product was made with.

    Raises:
        InputError: the image cannot be read, or the product does not say how it was made.
    """
    from copernicus.datasets.geotiff import read_image
    from copernicus.platform.embed_stage import read_settings
    from copernicus.platform.encode import encode_image
    from copernicus.platform.encoders import open_encoder

    made, model = read_settings(folder)
    encoder = open_encoder("similar", model, made["weights"], SENSORS[sensor], made["seed"], made["language"])
    encoded = encode_image(encoder, read_image(image, SENSORS[sensor]), made["image_size"].get(sensor))
    return encoded.embeddings.mean(0)


def draw(
    grids: np.ndarray,
    likeness: np.ndarray,
    found: list[Neighbour],
    place: tuple[float, float] | None,
    title: str,
    path: Path,
) -> Path:
    """All cells by how similar they are, the most similar ones numbered."""
    values = np.full((GRID_ROWS, GRID_COLUMNS), np.nan)
    values[pixels_of(grids)] = likeness
    shown, (rows, columns), _ = spread(np.isfinite(values))
    figure, (axis,) = new_figure(1, 12.0)
    drawn = axis.imshow(
        np.ma.masked_where(~shown, values[rows, columns]), extent=EXTENT, interpolation="nearest", cmap="viridis",
    )  # fmt: skip
    on_globe(axis, title)
    figure.colorbar(drawn, ax=axis, shrink=0.7, label="similarity")
    for number, one in enumerate(found, start=1):
        axis.plot(one.lon, one.lat, "o", mfc="none", mec="red", ms=9)
        axis.annotate(f"{number}", (one.lon, one.lat), textcoords="offset points", xytext=(5, 5), color="red")
    if place is not None:
        axis.plot(*place, "*", mfc="red", mec="white", ms=15)
    return save(figure, path)


def _unit(z_xD: np.ndarray) -> np.ndarray:
    return z_xD / np.maximum(np.linalg.norm(z_xD, axis=-1, keepdims=True), 1e-30)


def _table(found: list[Neighbour], title: str) -> Table:
    table = Table(title=f"the {len(found)} most similar cells {title}")
    for column in ("", "grid", "longitude", "latitude", "similarity", "km away"):
        table.add_column(column, justify="right")
    for number, one in enumerate(found, start=1):
        km = "" if one.km is None else f"{one.km:.0f}"
        table.add_row(f"{number}", f"{one.grid:07d}", f"{one.lon:.2f}", f"{one.lat:.2f}", f"{one.similarity:.3f}", km)
    return table
