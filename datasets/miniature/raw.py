"""The miniature planet's pretraining grids in the raw layout: GeoTIFFs and the file that lists them, or archives."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow

from copernicus.datasets.baseline import known_offset
from copernicus.datasets.miniature.planet import METRES_PER_DEGREE, Planet
from copernicus.datasets.miniature.pretrain import PretrainScale, choose_grids, make_grid
from copernicus.datasets.miniature.raster import write_tif
from copernicus.datasets.miniature.scales import SCALES, ScaleName
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES, Grid, grid_center, grid_name, parse_image_name

_FOLDERS = {
    "s1_grd": "s1_grd_utm/images",
    "s2_toa": "s2_toa_mix/images",
    "s3_olci": "s3_olci_wgs/images",
    "s5p_co": "s5p_l3_wgs/images/CO_column_number_density",
    "s5p_no2": "s5p_l3_wgs/images/tropospheric_NO2_column_number_density",
    "s5p_o3": "s5p_l3_wgs/images/O3_column_number_density",
    "s5p_so2": "s5p_l3_wgs/images/SO2_column_number_density",
    "dem": "dem_grid_wgs/images",
}
_ARCHIVES = {
    sensor: f"{sensor}_wgs" if sensor.startswith("s5p") else folder.partition("/")[0]
    for sensor, folder in _FOLDERS.items()
}


def write_raw(
    folder: Path | str,
    grids: int,
    seed: int = 0,
    scale: ScaleName | PretrainScale = "small",
    s2_baseline: str | None = None,
) -> Path:
    """Writes the grids that `write_miniature` packs into shards as GeoTIFFs, and returns the file that lists them.

    Args:
        s2_baseline: a processing baseline such as "04.00" for the tag PROCESSING_BASELINE of the Sentinel-2 images,
            with the offset that belongs to it in their numbers. As published, there is no such tag.
    """
    folder = Path(folder)
    sizes = scale if isinstance(scale, PretrainScale) else SCALES[scale].pretrain
    planet = Planet(seed)
    listed: dict[str, dict[str, Any]] = {}
    for index in choose_grids(planet, grids):
        grid = make_grid(planet, index, sizes)
        entry: dict[str, Any] = {"grid_id_coord": grid_name(index)}
        for sensor in SENSORS:
            if sensor not in grid.arrays:
                entry[sensor] = {} if "patch" in LEADING_AXES[sensor] else []
            elif "patch" in LEADING_AXES[sensor]:
                entry[sensor] = {}
                for patch, array in enumerate(grid.arrays[sensor]):
                    name = grid.images[sensor][patch][0].split("/")[1]
                    entry[sensor][name] = _write(folder, grid, sensor, array, grid.images[sensor][patch], s2_baseline)
            else:
                array = grid.arrays[sensor] if sensor != "dem" else grid.arrays[sensor][None, None]
                entry[sensor] = _write(folder, grid, sensor, array, grid.images[sensor], None)
        listed[str(index)] = entry
    path = folder / "fnames_union.json.gz"
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        zipped.write(json.dumps(listed).encode())
    return path


def _write(
    folder: Path, grid: Grid, sensor: str, array_DCHW: np.ndarray, names: list[str], s2_baseline: str | None
) -> list[str]:
    """Writes the images of one place; returns their paths below the folder."""
    paths = []
    for image_CHW, name in zip(array_DCHW, names, strict=True):
        place, date = parse_image_name(name), name.rpartition("/")[2]
        tags = {}
        if sensor == "s2_toa":
            image_CHW = image_CHW.astype(np.uint16)
            if s2_baseline is not None:
                tags = {"PROCESSING_BASELINE": s2_baseline}
                offset = known_offset("", tags) or 0
                image_CHW = np.where(image_CHW > 0, image_CHW.astype(np.int32) - offset, 0).astype(np.uint16)
        directory = "/".join([_FOLDERS[sensor], *name.split("/")[: 2 if "patch" in LEADING_AXES[sensor] else 1]])
        path = f"{directory}/{_file_name(sensor, date)}"
        gsd = SENSORS[sensor].gsd_m
        if "patch" in LEADING_AXES[sensor]:
            zone = int((place.lon + 180) // 6) + 1
            epsg, pixel = (32600 if place.lat >= 0 else 32700) + zone, (gsd, gsd)
        else:
            shrink = np.cos(np.radians(grid_center(int(grid.key))[1]))
            epsg, pixel = 4326, (gsd / METRES_PER_DEGREE / shrink, gsd / METRES_PER_DEGREE)
        write_tif(folder / path, image_CHW, epsg, place.lon, place.lat, pixel, tags)
        paths.append(path)
    return paths


def _file_name(sensor: str, date: str) -> str:
    """As the published files are called, each with the date at its place."""
    if sensor == "dem":
        return "dem.tif"
    if sensor.startswith("s5p"):
        first = np.datetime64(f"{date[:4]}-{date[4:6]}")
        return f"{date[:4]}-{date[4:6]}-{date[6:]}_{first + 1}-01.tif"
    return {
        "s1_grd": f"S1A_IW_GRDH_1SDV_{date}T054321_{date}T054346_036012_0437F2_9A3B.tif",
        "s2_toa": f"{date}T101031_{date}T101027_T32TQM.tif",
        "s3_olci": f"S3A_{date}T093344_{date}T093644.tif",
    }[sensor]


def pack_chunks(fnames: Path, out: Path | str, grids_per_chunk: int = 1000) -> list[Path]:
    """Packs the images that a raw layout's file lists into archives, as they are published: a ``.tar.zst`` of each
    sensor for every ``grids_per_chunk`` grids."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with gzip.open(fnames, "rt", encoding="utf-8") as file:
        entries = list(json.load(file).values())
    archives = []
    for number in range(-(-len(entries) // grids_per_chunk)):
        part = entries[number * grids_per_chunk : (number + 1) * grids_per_chunk]
        for sensor in SENSORS:
            paths = [path for entry in part for path in _paths(entry[sensor])]
            if not paths:
                continue
            archive = out / f"{_ARCHIVES[sensor]}_chunk{number + 1:03d}.tar.zst"
            with (
                pyarrow.OSFile(str(archive), "wb") as file,
                pyarrow.CompressedOutputStream(file, "zstd") as stream,
                tarfile.open(fileobj=stream, mode="w|") as tar,
            ):
                for path in paths:
                    tar.add(fnames.parent / path, path, filter=_plain)
            archives.append(archive)
    return archives


def _paths(listed: dict | list) -> Iterator[str]:
    for paths in listed.values() if isinstance(listed, dict) else [listed]:
        yield from paths


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs between machines: the same images give the same bytes."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member
