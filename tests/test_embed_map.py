"""The map of the globe: where cells lie, in all three formats, as the libraries that people use read them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import grid_name
from copernicus.platform.embed_map import (
    LATITUDE,
    LONGITUDE,
    NPZ,
    PIXELS,
    PT,
    ZARR,
    fill_map,
    pixels_of,
    write_map,
)
from copernicus.platform.embed_pictures import draw_components, draw_coverage, principal_components, spread
from copernicus.platform.embed_worker import grid_schema, vectors
from copernicus.platform.schema import MAP_FORMATS

PLACES = {  # lon, lat -> row, column: counted by hand from the north-western corner
    (-180.0, 90.0): (0, 0),
    (-180.0, -90.0): (720, 0),
    (179.75, 90.0): (0, 1439),
    (0.0, 0.0): (360, 720),
    (11.5, 48.25): (167, 766),  # Munich
    (-70.25, -55.25): (581, 439),  # the example of the published shards, 0200599
}
WIDTH = 5


def number(lon: float, lat: float) -> int:
    """The published formula."""
    return round((lat + 90) / 0.25) * 1440 + round((lon + 180) / 0.25)


def pixel_at(lon: float, lat: float) -> tuple[int, int]:
    """Row and column of the map for a place on the grid, counted from the north-western corner."""
    return round((90 - lat) / 0.25), round((lon + 180) / 0.25) % 1440


def means(numbers: list[int], embeddings: np.ndarray) -> pa.Table:
    ones = pa.array(np.arange(1, len(numbers) + 1), pa.int32())
    columns = [pa.array([grid_name(n) for n in numbers]), vectors(embeddings.astype(np.float32)), ones]
    return pa.table([*columns, *[ones] * len(SENSORS)], schema=grid_schema(embeddings.shape[1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    values = np.random.default_rng(0).standard_normal((len(PLACES), WIDTH))
    values[2, 0] = 0.0  # a zero that is a value
    numbers = [number(*place) for place in PLACES]
    table = means(numbers, values)
    globe = fill_map([table.slice(0, 4), table.slice(4)], WIDTH, folder / ".scratch")
    write_map(globe, folder, MAP_FORMATS, lambda done, total, note: None)
    return folder, values.astype(np.float32)


def test_the_example_of_the_published_shards():
    assert number(-70.25, -55.25) == 200599
    rows, columns = pixels_of(np.array([number(*place) for place in PLACES]))
    assert list(zip(rows, columns, strict=True)) == list(PLACES.values())
    assert [(LONGITUDE[j], LATITUDE[i]) for i, j in PLACES.values()] == list(PLACES)
    assert [pixel_at(*place) for place in PLACES] == list(PLACES.values())


def test_known_cells_in_every_format(made):
    import xarray

    folder, values = made
    archive = np.load(folder / NPZ)
    tensor = torch.load(folder / PT, weights_only=True)
    with xarray.open_zarr(folder / ZARR) as data:
        assert archive["arr_0"].shape == tuple(tensor.shape) == data["embedding"].shape == (721, 1440, WIDTH)
        assert archive["arr_0"].dtype == np.float32
        for row, ((lon, lat), (i, j)) in zip(values, PLACES.items(), strict=True):
            np.testing.assert_array_equal(archive["arr_0"][i, j], row)
            np.testing.assert_array_equal(tensor[i, j].numpy(), row)
            np.testing.assert_array_equal(data["embedding"].sel(latitude=lat, longitude=lon).to_numpy(), row)
            assert (archive["latitude"][i], archive["longitude"][j]) == (lat, lon)
        # Empty cells are 0, and are told from cells whose embedding has a 0.
        assert np.count_nonzero(archive["arr_0"].any(-1)) == len(PLACES)
        assert not np.isnan(data["embedding"].isel(latitude=slice(340, 380)).to_numpy()).any()
        for found in (archive["mask"], data["mask"].to_numpy()):
            assert found.dtype == bool
            assert found.sum() == len(PLACES)
        assert data["count"].sel(latitude=48.25, longitude=11.5) == archive["count"][167, 766] == 5
        assert data["latitude"].attrs["units"] == "degrees_north"


def test_the_parquet_says_which_cell_is_which_grid(made):
    table = pq.read_table(made[0] / PIXELS)
    assert table.num_rows == 721 * 1440
    for (lon, lat), (row, column) in PLACES.items():
        place = table.slice(row * 1440 + column, 1).to_pylist()[0]
        assert (place["row"], place["column"]) == (row, column)
        assert (place["longitude"], place["latitude"]) == (lon, lat)
        assert place["grid_id_coord"] == f"{number(lon, lat):07d}_{lon:.2f}_{lat:.2f}"
    assert sum(n > 0 for n in table["images"].to_pylist()) == len(PLACES)


@pytest.fixture(scope="module")
def two_lands(tmp_path_factory):
    """A western and an eastern land whose embeddings differ along one direction, and noise along the others."""
    rng = np.random.default_rng(1)
    places = [(lon, lat) for side in (-90, 60) for lon in range(side, side + 20) for lat in range(-10, 20)]
    values = 0.1 * rng.standard_normal((len(places), WIDTH))
    values[:, 3] += [5.0 if lon > 0 else -5.0 for lon, _ in places]
    scratch = tmp_path_factory.mktemp("lands") / ".scratch"
    return fill_map([means([number(*p) for p in places], values)], WIDTH, scratch), values


def test_components_are_those_of_scikit_learn(two_lands):
    from sklearn.decomposition import PCA

    globe, values = two_lands
    scores, share = principal_components(globe)
    expected = PCA(3).fit(values)
    np.testing.assert_allclose(share, expected.explained_variance_ratio_, rtol=1e-4)
    there = globe.values[globe.mask]
    np.testing.assert_allclose(np.abs(scores), np.abs(expected.transform(there)), atol=1e-4)


def test_the_map_shows_land_where_it_is_and_nothing_elsewhere(two_lands, tmp_path):
    from PIL import Image

    globe, _ = two_lands
    path = draw_components(globe, "two lands", tmp_path / "globe.png")
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    height, width = picture.shape[:2]
    # The axes are where the frame's black lines are.
    dark = (picture.sum(-1) < 30).sum(0) > 0.5 * height
    left, right = np.flatnonzero(dark)[[0, -1]]
    dark = (picture.sum(-1) < 30).sum(1) > 0.5 * width
    top, bottom = np.flatnonzero(dark)[[0, -1]]

    def at(lon: float, lat: float) -> np.ndarray:
        return picture[int(top + (90 - lat) / 180 * (bottom - top)), int(left + (lon + 180) / 360 * (right - left))]

    west, east = at(-80.4, 4.6), at(70.4, 4.6)
    assert abs(west[0] - east[0]) > 200  # red is the first component
    for empty in (at(-5.3, 4.6), at(-80.4, 55.3), at(70.4, -55.3)):
        assert np.ptp(empty) < 10
        assert empty.min() > 220
    assert draw_coverage(globe, "two lands", tmp_path / "coverage.png").stat().st_size > 10_000


def test_few_cells_are_drawn_large_across_the_date_line_and_many_as_they_are():
    few = np.zeros((721, 1440), bool)
    few[360, 1438] = True
    shown, (rows, columns), reach = spread(few)
    assert reach > 10
    assert shown[360, 3]
    assert (rows[360, 3], columns[360, 3]) == (360, 1438)
    many = np.random.default_rng(0).random((721, 1440)) < 0.5
    assert spread(many)[0] is many
