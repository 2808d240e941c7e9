"""Fixtures: small shards of smooth random images in the published format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store import s3, s3_server  # noqa: F401 (fixtures)

from copernicus.datasets.order import generator
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import Grid, grid_index, grid_key, grid_name, write_shards

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: two processes of tests share the cores

SIDES = {
    "s1_grd": 40,
    "s2_toa": 40,
    "s3_olci": 32,
    "s5p_co": 28,
    "s5p_no2": 28,
    "s5p_o3": 28,
    "s5p_so2": 28,
    "dem": 256,
}
"""Stored sides of the test shards, pixels."""

SIZES = {"s1_grd": 32, "s2_toa": 32, "s3_olci": 16, "s5p_co": 8, "s5p_no2": 8, "s5p_o3": 8, "s5p_so2": 8, "dem": 128}
"""What a small model is fed from them."""


BRIGHT = 1.5
"""Of all test images, in deviations: something that a model can learn in a few steps."""


def smooth(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Low-frequency noise of about unit deviation over the last two axes."""
    coarse = rng.standard_normal((*shape[:-2], 4, 4))
    rows = np.linspace(0, 2.999, shape[-2])
    columns = np.linspace(0, 2.999, shape[-1])
    i, j = rows.astype(int), columns.astype(int)
    u, v = (rows - i)[:, None], (columns - j)[None, :]
    corner = [coarse[..., i + a, :][..., j + b] for a in (0, 1) for b in (0, 1)]
    return (corner[0] * (1 - v) + corner[1] * v) * (1 - u) + (corner[2] * (1 - v) + corner[3] * v) * u


def make_grid(number: int, missing: tuple[str, ...] = (), seed: int = 0) -> Grid:
    """A grid with two patches, three dates and all sensors but ``missing``."""
    lon, lat = -10 + 0.25 * (number % 40), 40 + 0.25 * (number // 40)
    index = grid_index(lon, lat)
    name, key = grid_name(index), grid_key(index)
    arrays: dict[str, np.ndarray] = {}
    images: dict[str, list] = {}
    for sensor in SENSORS.values():
        if sensor.name in missing:
            continue
        rng = generator("test grid", seed, number, sensor.name)
        side, channels = SIDES[sensor.name], sensor.channels
        mean, std = (np.asarray(v * channels if len(v) == 1 else v)[:, None, None] for v in (sensor.mean, sensor.std))
        scale = np.asarray(sensor.scale * channels if len(sensor.scale) == 1 else sensor.scale)[:, None, None]
        if sensor.name in ("s1_grd", "s2_toa"):
            x = ((BRIGHT + smooth(rng, 2, 3, channels, side, side)) * std + mean) / scale
            dates = ["20200115", "20200615", "20201015"]
            images[sensor.name] = [[[f"{name}/{p}_{lon:.4f}_{lat:.4f}/{d}"] for d in dates] for p in range(2)]
        elif sensor.name == "dem":
            x = 500 + 200 * smooth(rng, side, side)
            images[sensor.name] = [[name]]
        else:
            x = ((BRIGHT + smooth(rng, 3, channels, side, side)) * std + mean) / scale
            images[sensor.name] = [[f"{name}/2020{m:02d}15"] for m in (1, 6, 10)]
        arrays[sensor.name] = x.astype(np.int16 if sensor.name == "s2_toa" else np.float32)
    return Grid(key, arrays, images)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards with 24 grids; every sixth lacks radar and an atmospheric sensor."""
    folder = tmp_path_factory.mktemp("shards")
    grids = (make_grid(i, ("s1_grd", "s5p_co") if i % 6 == 5 else ()) for i in range(24))
    write_shards(grids, folder, grids_per_shard=12)
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray session for the tests of a file."""
    from copernicus.platform.session import ray_session

    with ray_session(), pytest.MonkeyPatch.context() as patch:
        # Ray Train asks its workers how they are every two seconds: a run of a few steps mostly waits for the next time.
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process a run, for nodes that are taken away
        import ray

        yield ray


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images; tests that need it skip without."""
    folder = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real images: set COPERNICUS_REAL_DATA to their folder")
    return folder


RAW_SEED = 3
RAW_SIZES = {"s1_grd": 24, "s2_toa": 24, "s3_olci": 12, "dem": 48}
"""Stored sides of the miniature's raw layout, where they are not the published ones."""


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Grid]]:
    """A small raw layout's folder, and its grids as the miniature's own writer packs them. The second lacks sensors."""
    from copernicus.datasets.miniature.planet import Planet
    from copernicus.datasets.miniature.pretrain import PretrainScale, choose_grids, make_grid
    from copernicus.datasets.miniature.raw import write_raw

    folder = tmp_path_factory.mktemp("raw")
    scale = PretrainScale(2, 4, 8, 12, RAW_SIZES["s1_grd"], RAW_SIZES["s3_olci"], 28, RAW_SIZES["dem"], 2)
    write_raw(folder, 4, RAW_SEED, scale)
    planet = Planet(RAW_SEED)
    return folder, [make_grid(planet, index, scale) for index in choose_grids(planet, 4)]
