"""Nearest neighbours on the globe: the right ones, of all images or of one sensor's, and what a user may get wrong."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import grid_index, grid_name
from copernicus.platform.cli import app
from copernicus.platform.embed_worker import image_schema, vectors
from copernicus.platform.similar import distances_km, similar_command

PLACES = [(lon, lat) for lon in range(-170, 171, 20) for lat in (-40, 0, 40)]
WIDTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Embeddings that go around with longitude, and an offset that all share; of dem, with latitude instead."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "images").mkdir()
    names = [grid_name(grid_index(*place)) for place in PLACES]
    lam = np.radians([lon for lon, _ in PLACES])
    around = np.stack([np.cos(lam), np.sin(lam), *[0 * lam] * (WIDTH - 2)], -1) + 100.0
    upward = np.stack([np.array([lat for _, lat in PLACES]) / 40, *[0 * lam] * (WIDTH - 1)], -1) - 7.0
    rng = np.random.default_rng(0)
    around = (around + 1e-3 * rng.standard_normal(around.shape)).astype(np.float32)
    pq.write_table(
        pa.table({"grid_id_coord": names, "embedding": vectors(around)}), folder / "grids.parquet", row_group_size=10
    )
    rows = [(name, kind) for name in names for kind in ("s2_toa", "dem")]
    values = np.stack([z for pair in zip(around, upward.astype(np.float32), strict=True) for z in pair])
    text = pa.array([None] * len(rows), pa.string())
    columns = [pa.array([n for n, _ in rows]), pa.array([k for _, k in rows]), text, text, vectors(values)]
    pq.write_table(pa.table(columns, schema=image_schema(WIDTH)), folder / "images" / "chunk-000000.parquet")
    return folder


def find(folder, tmp_path, lon=None, lat=None, image=None, sensor=None, count=5, apart=0.0):
    console = Console(width=160, record=True)
    found = similar_command(folder, lon, lat, image, sensor, count, apart, tmp_path / "similar.png", console)
    assert (tmp_path / "similar.png").stat().st_size > 10_000
    return found, console.export_text()


def test_the_most_similar_cells_of_a_place(folder, tmp_path):
    found, said = find(folder, tmp_path, lon=10.3, lat=-0.2)
    assert {(n.lon, n.lat) for n in found[:2]} == {(10, -40), (10, 40)}  # the cell itself is left out
    assert {n.lon for n in found[2:]} <= {-10, 30}
    assert [n.similarity for n in found] == sorted((n.similarity for n in found), reverse=True)
    assert found[0].km == pytest.approx(4448, abs=5)  # 40 degrees of latitude
    assert "warning" not in said
    assert f"{grid_index(found[0].lon, found[0].lat):07d}" in said


def test_far_ones_alone_and_a_place_without_images(folder, tmp_path):
    found, said = find(folder, tmp_path, lon=17.0, lat=3.0, apart=6000.0)
    assert all(n.km > 6000 for n in found)
    assert "no embedding near; the nearest cell" in said
    assert "stands for the place" in said


def test_images_of_one_sensor_alone(folder, tmp_path):
    found, said = find(folder, tmp_path, lon=10.0, lat=40.0, sensor="dem", count=17)
    assert {n.lat for n in found} == {40}
    assert "dem alone" in said


def test_distances_on_the_sphere():
    np.testing.assert_allclose(distances_km(179.0, 0.0, np.array([-179.0]), np.array([0.0])), 222.4, atol=0.1)
    np.testing.assert_allclose(distances_km(0.0, 90.0, np.array([123.0]), np.array([-90.0])), 20015.1, atol=0.1)


def test_an_image_is_encoded_as_the_cells_were(real_data, folder, tmp_path):
    (tile,) = (real_data / "copernicusfm_tile").glob("*.tif")
    with pytest.raises(InputError, match=r"embed.json is not there, which says what encoder made these"):
        find(folder, tmp_path, image=tile, sensor="s2_toa")
    made = {
        "model": "copernicus_fm_base", "sizes": {"embed_dim": 32, "depth": 1, "num_heads": 4}, "weights": "none", "seed": 0,
        "language": None, "image_size": {"s2_toa": 32},
    }  # fmt: skip
    (folder / "embed.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="the image has 32 numbers, the cells 6: another encoder's"):
        find(folder, tmp_path, image=tile, sensor="s2_toa")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "--lon", "1", "--lat", "2"], "nowhere holds no grids.parquet"),
        (["HERE"], "give either a place, --lon and --lat, or an image"),
        (["HERE", "--lon", "1", "--lat", "2", "--out", "s.txt"], "--out s.txt: give a file that ends in .png"),
        (["HERE", "--lon", "1", "--lat", "2", "--out", "no/s.png"], "--out no/s.png: no folder"),
        (["HERE", "--lon", "1", "--lat", "2", "--apart", "99999"], "--apart 99999: no cell is that far"),
        (["HERE", "--lon", "1"], "--lon 1.0 --lat None: give both"),
        (["HERE", "--lon", "1", "--lat", "91"], "from -90 to 90"),
        (["HERE", "image.tif"], "--sensor: say which one took the image"),
        (["HERE", "--lon", "1", "--lat", "2", "--sensor", "s3"], "--sensor: no 's3'; valid choices: s1_grd"),
        (["HERE", "--lon", "1", "--lat", "2", "--sensor", "s1_grd"], "has no embedding of s1_grd"),
    ],
)
def test_wrong_questions(folder, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["similar", *(str(folder) if a == "HERE" else a for a in arguments)])
    assert isinstance(answer.exception, InputError)
    assert said in str(answer.exception)
    assert not list(tmp_path.iterdir())


def test_a_damaged_chunk_is_named(folder, tmp_path):
    for name in ("grids.parquet", "images/chunk-000000.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((folder / name).read_bytes()[: None if name == "grids.parquet" else 900])
    with pytest.raises(
        InputError, match=r"chunk-000000.parquet cannot be read .* run the experiment that made it again"
    ):
        find(tmp_path, tmp_path, lon=10.0, lat=40.0, sensor="dem")
