"""The published shard format: names by worked examples, files read back with tarfile and torch alone."""

import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch

import copernicus.datasets.shards as shards
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import Grid
from copernicus.datasets.tar import list_members


def make_grid(index: int = 200599, seed: int = 0) -> Grid:
    rng = np.random.default_rng(seed)
    name = shards.grid_name(index)
    lon, lat = shards.grid_center(index)
    patch = shards.patch_name(0, lon + 0.01, lat - 0.02)
    dates = ["20210105", "20210404", "20210702", "20211001"]
    return Grid(
        shards.grid_key(index),
        {
            "s1_grd": rng.normal(size=(1, 4, 2, 6, 6)).astype(np.float32),
            "s2_toa": rng.integers(0, 9000, (1, 4, 13, 6, 6)).astype(np.int16),
            "s5p_no2": rng.normal(size=(4, 1, 5, 5)).astype(np.float32),
            "dem": rng.normal(size=(9, 9)).astype(np.float32),
        },
        {
            "s1_grd": [[f"{name}/{patch}/{date}" for date in dates]],
            "s2_toa": [[f"{name}/{patch}/{date}" for date in dates]],
            "s5p_no2": [f"{name}/{date}" for date in dates],
            "dem": [name],
        },
    )


def test_grid_number_of_the_published_example():
    assert shards.grid_index(-70.25, -55.25) == 200599
    assert shards.grid_key(200599) == "0200599"
    assert shards.grid_name(200599) == "0200599_-70.25_-55.25"


@pytest.mark.parametrize(("lon", "lat"), [(-180, -90), (179.75, 90), (0, 0), (12.5, 47.25)])
def test_grid_number_and_coordinates_are_inverse(lon, lat):
    index = shards.grid_index(lon, lat)
    assert index == round((lat + 90) / 0.25) * 1440 + round((lon + 180) / 0.25)
    assert shards.grid_center(index) == (lon, lat)


def test_the_date_line_is_one_column():
    assert shards.grid_index(180, 10) == shards.grid_index(-180, 10)


@pytest.mark.parametrize("index", [-1, 721 * 1440])
def test_grid_off_the_globe(index):
    with pytest.raises(InputError, match="no grid"):
        shards.grid_center(index)


def test_image_names():
    patch = shards.parse_image_name("0200599_-70.25_-55.25/3_-70.3012_-55.1/20210301")
    assert patch == ("0200599_-70.25_-55.25", -70.3012, -55.1, 18687.0, "3")  # 2021-03-01
    wrapped = shards.parse_image_name([["0200599_-70.25_-55.25/19700102"]])
    assert wrapped == ("0200599_-70.25_-55.25", -70.25, -55.25, 1.0, "")
    assert np.isnan(shards.parse_image_name(["0200599_-70.25_-55.25"]).days)
    assert shards.date_string(18687) == "20210301"


@pytest.mark.parametrize(
    "name", ["", "0200599", "0200599_-70.25_-55.25/20211301", ["a", "b"], 3, "a_1_2/b_1_2/c_1_2/20210101"]
)
def test_bad_image_names(name):
    with pytest.raises(InputError):
        shards.parse_image_name(name)


def test_round_trip_with_plain_tools(tmp_path):
    grid = make_grid()
    (path,) = shards.write_shards([grid], tmp_path / "new" / "folder")
    assert path.name == "example-000000.tar"
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert set(files) == {f"0200599.{m}" for m in ("s1_grd.pth", "s2_toa.pth", "s5p_no2.pth", "dem.pth", "json")}
    for sensor, array in grid.arrays.items():
        payload = files[f"0200599.{sensor}.pth"]
        tensor = torch.load(io.BytesIO(payload), weights_only=True)
        assert tensor.numpy().dtype == array.dtype
        np.testing.assert_array_equal(tensor.numpy(), array)
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert array.tobytes() in payload  # contiguous at one offset
    names = json.loads(files["0200599.json"])
    assert names["s1_grd"][0][2] == ["0200599_-70.25_-55.25/0_-70.2400_-55.2700/20210702"]
    assert names["s5p_no2"][3] == ["0200599_-70.25_-55.25/20211001"]
    assert names["dem"] == [["0200599_-70.25_-55.25"]]


def test_a_view_does_not_drag_its_base_along(tmp_path):
    grid = make_grid()
    grid.arrays = {"dem": np.zeros((500, 500), np.float32)[:10, :10]}
    grid.images = {"dem": grid.images["dem"]}
    (path,) = shards.write_shards([grid], tmp_path)
    assert path.stat().st_size < 50_000


def test_shards_are_cut_and_reported(tmp_path):
    grids = [make_grid(1000 + i, i) for i in range(7)]
    seen: list[int] = []
    paths = shards.write_shards(iter(grids), tmp_path, grids_per_shard=3, progress=seen.append)
    assert [p.name for p in paths] == [f"example-00000{i}.tar" for i in range(3)]
    assert seen == [3, 6, 7]
    assert [list(list_members(p)[0]) for p in paths] == [
        ["0001000", "0001001", "0001002"],
        ["0001003", "0001004", "0001005"],
        ["0001006"],
    ]


def test_same_grids_same_bytes_other_grids_other_bytes(tmp_path):
    first, second, other = (
        shards.write_shards([make_grid(seed=seed)], tmp_path / name)[0].read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second
    assert first != other


def test_an_interrupted_writer_leaves_no_half_shard(tmp_path):
    def grids():
        yield make_grid(1)
        yield make_grid(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(grids(), tmp_path, grids_per_shard=2)
    # The first shard was whole before the interrupt; of the second nothing is left.
    assert [p.name for p in tmp_path.iterdir()] == ["example-000000.tar"]
    with pytest.raises(KeyboardInterrupt):
        shards.write_shards(grids(), tmp_path / "other", grids_per_shard=3)
    assert list((tmp_path / "other").iterdir()) == []


def spoil(what: str) -> Grid:
    grid = make_grid()
    if what == "key":
        grid.key = "599"
    elif what == "dtype":
        grid.arrays["s2_toa"] = grid.arrays["s2_toa"].astype(np.int32)
    elif what == "bands":
        grid.arrays["s1_grd"] = grid.arrays["s1_grd"][:, :, :1]
    elif what == "sensor":
        grid.arrays["s9"], grid.images["s9"] = grid.arrays["dem"], grid.images["dem"]
    elif what == "names":
        grid.images["s2_toa"] = grid.images["s2_toa"][0]
    elif what == "nameless":
        del grid.images["dem"]
    return grid


@pytest.mark.parametrize("what", ["key", "dtype", "bands", "sensor", "names", "nameless"])
def test_a_grid_that_is_not_as_published_is_refused(what, tmp_path):
    with pytest.raises(InputError, match=r"grid '(0200599|599)'"):
        shards.write_shards([spoil(what)], tmp_path)
    assert list(tmp_path.iterdir()) == []
