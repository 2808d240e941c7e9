"""Packing co-registered sites: what the published reader finds in the shards is what was in the files."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from copernicus.datasets.convert import convert_sites
from copernicus.datasets.index import index_shards
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.slices import DrawReader

DATA = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
FOLDERS = {"optical": "s2_toa", "radar": "s1_grd", "height": "dem"}


def write(path, array_CHW, lon=10.02, lat=45.01, nodata=None):
    """A GeoTIFF of 0.0001-degree pixels whose centre is at (lon, lat)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array_CHW.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=array_CHW.dtype,
        crs="EPSG:4326",
        transform=from_origin(lon - width * 5e-5, lat + height * 5e-5, 1e-4, 1e-4),
        nodata=nodata,
    ) as file:
        file.write(array_CHW)


def site(folder, name, seed=0, size=32, sensors=tuple(FOLDERS), **place):
    rng = np.random.default_rng(seed)
    optical = rng.integers(1, 5000, (13, size, size)).astype("uint16")
    optical[10] = rng.integers(1, 30, (size, size))  # cirrus: dark
    arrays = {
        "optical": optical,
        "radar": rng.normal(-15, 4, (2, size, size)).astype("float32"),
        "height": rng.uniform(0, 900, (1, size, size)).astype("float32"),
    }
    for sensor in sensors:
        write(folder / sensor / f"{name}.tif", arrays[sensor], **place)
    return arrays


def members(shard):
    """{member: array or object}, read with tarfile and torch alone."""
    found = {}
    with tarfile.open(shard) as tar:
        for info in tar:
            data = tar.extractfile(info).read()
            found[info.name] = (
                json.loads(data)
                if info.name.endswith(".json")
                else torch.load(io.BytesIO(data), weights_only=True).numpy()
            )
    return found


SIZES = {"s2_toa": 16, "s1_grd": 16, "dem": 32}


def test_pixels_names_and_types(tmp_path):
    arrays = site(tmp_path / "in", "a_20200304T101112")
    report = convert_sites(tmp_path / "in", tmp_path / "out", FOLDERS, SIZES, patches_per_side=2)
    assert (report.sites, report.grids, report.skipped) == (1, 1, {})
    (shard,) = report.shards
    found = members(shard)
    key = f"{round((45 + 90) / 0.25) * 1440 + round((10 + 180) / 0.25):07d}"  # the node nearest to 10.02 E, 45.01 N
    assert set(found) == {f"{key}.{m}" for m in ("s1_grd.pth", "s2_toa.pth", "dem.pth", "json")}
    s2, s1, dem = (found[f"{key}.{name}.pth"] for name in ("s2_toa", "s1_grd", "dem"))
    assert (s2.shape, s2.dtype) == ((4, 4, 13, 16, 16), np.int16)
    assert (s1.shape, s1.dtype) == ((4, 4, 2, 16, 16), np.float32)
    assert (dem.shape, dem.dtype) == ((32, 32), np.float32)
    for patch, (row, col) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)]):
        window = np.s_[:, row : row + 16, col : col + 16]
        for date in range(4):
            assert (s2[patch, date] == arrays["optical"][window]).all()
            assert (s1[patch, date] == arrays["radar"][window]).all()
    assert (dem == arrays["height"][0]).all()
    names = found[f"{key}.json"]
    assert names["dem"] == [[f"{key}_10.00_45.00"]]
    assert np.shape(names["s2_toa"]) == (4, 4, 1)
    assert names["s2_toa"][0][0] == [f"{key}_10.00_45.00/0_10.0192_45.0108/20200304"]
    assert names["s1_grd"][3][2] == [f"{key}_10.00_45.00/3_10.0208_45.0092/20200304"]


def test_the_projects_reader_takes_them(tmp_path):
    arrays = site(tmp_path / "in", "a_20200304T101112")
    convert_sites(tmp_path / "in", tmp_path / "out", FOLDERS, SIZES)
    sensors = tuple(SENSORS[s] for s in ("s1_grd", "s2_toa"))
    index = index_shards(str(tmp_path / "out")).having([s.name for s in sensors])
    assert index.problems == ()
    draw = DrawReader(sensors, {"s1_grd": 16, "s2_toa": 16}, augment=False).read(index[0], 0)
    assert draw.problems == []
    assert draw.present.all()
    assert draw.metadata[0, :3] == pytest.approx([10.02, 45.01, 18325], abs=1e-3)  # 2020-03-04
    assert draw.images["s1_grd"].shape == (2, 16, 16)
    # 32 x 32 pixels halved: the mean is kept.
    assert draw.images["s1_grd"].mean() == pytest.approx(float(arrays["radar"].mean()), abs=0.3)


def test_published_sizes_resample_the_shorter_side_and_cut_the_centre(tmp_path):
    ramp = np.broadcast_to(np.arange(40, dtype="float32"), (1, 20, 40)).copy()
    write(tmp_path / "in/height/a.tif", ramp)
    report = convert_sites(tmp_path / "in", tmp_path / "out", {"height": "dem"}, {"dem": 40})
    (dem,) = [a for name, a in members(report.shards[0]).items() if name.endswith("dem.pth")]
    # Twice as many pixels, the middle half of the columns 0..39: 9.75, 10.25, ...
    assert dem.shape == (40, 40)
    assert dem[20] == pytest.approx(9.75 + 0.5 * np.arange(40), abs=1e-4)
    report = convert_sites(tmp_path / "in", tmp_path / "published", {"height": "dem"})
    (dem,) = [a for name, a in members(report.shards[0]).items() if name.endswith("dem.pth")]
    assert dem.shape == (960, 960)


def test_gaps(tmp_path):
    arrays = site(tmp_path / "in", "a")
    arrays["optical"][:, :4] = 0
    arrays["radar"][:, :4] = np.nan
    write(tmp_path / "in/optical/a.tif", arrays["optical"], nodata=0)
    write(tmp_path / "in/radar/a.tif", arrays["radar"])
    report = convert_sites(tmp_path / "in", tmp_path / "out", FOLDERS, dict.fromkeys(SIZES, 32))
    found = {name.split(".", 1)[1]: a for name, a in members(report.shards[0]).items()}
    assert (found["s2_toa.pth"][0, 0, :, :4] == 0).all()
    assert np.isnan(found["s1_grd.pth"][0, 0, :, :4]).all()
    assert np.isfinite(found["s1_grd.pth"][0, 0, :, 4:]).all()


def test_what_is_missing_is_named_and_the_rest_is_packed(tmp_path):
    site(tmp_path / "in", "a", lon=10)
    site(tmp_path / "in", "b", lon=20, sensors=("optical", "height"))
    (tmp_path / "in/height/b.tif").write_bytes(b"II*\0 cut off")
    write(tmp_path / "in/optical/c.tif", np.full((12, 8, 8), 500, "uint16"), lon=30)
    (tmp_path / "in/index.csv").write_text(
        "tile,s2_datetime,s1_datetime\na.tif,2021-07-23T13:22:41.000000000,2021-07-21\ngone.tif,2020-01-01,2020-01-01\n"
    )
    report = convert_sites(tmp_path / "in", tmp_path / "out", FOLDERS, SIZES)
    assert (report.sites, report.grids) == (2, 2)
    assert set(report.skipped) == {"gone", "b s1_grd", "b dem", "c s2_toa", "c s1_grd", "c dem"}
    assert "cannot be read" in report.skipped["b dem"]
    assert "all 13 bands" in report.skipped["c s2_toa"]
    assert "index.csv" in report.skipped["gone"]
    found = members(report.shards[0])
    keys = sorted({name.split(".")[0] for name in found})
    assert f"{keys[0]}.s1_grd.pth" in found
    assert f"{keys[1]}.s1_grd.pth" not in found
    assert found[f"{keys[0]}.json"]["s2_toa"][0][0][0].endswith("/20210723")
    assert found[f"{keys[0]}.json"]["s1_grd"][0][0][0].endswith("/20210721")
    assert found[f"{keys[1]}.json"]["s2_toa"][0][0][0].count("/") == 1  # no date
    assert any("date unknown" in note for note in report.notes["b s2_toa"])


def test_sites_of_one_cell_become_patches_of_one_grid(tmp_path):
    first = site(tmp_path / "in", "a", seed=1, lon=10.02, sensors=("optical", "height"))
    second = site(tmp_path / "in", "b", seed=2, lon=10.05)
    report = convert_sites(tmp_path / "in", tmp_path / "out", FOLDERS, dict.fromkeys(SIZES, 32))
    assert (report.sites, report.grids) == (2, 1)
    found = {name.split(".", 1)[1]: a for name, a in members(report.shards[0]).items()}
    # The site with more sensors is first, so that its s1 and s2 are patch 0 of both.
    assert (found["s2_toa.pth"][:, 0] == [second["optical"], first["optical"]]).all()
    assert (found["s1_grd.pth"][0, 0] == second["radar"]).all()
    assert (found["dem.pth"] == second["height"][0]).all()
    assert "another site" in report.skipped["a dem"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sensors": {"nowhere": "s2_toa"}}, "no such folder"),
        ({"sensors": {"optical": "s9"}}, "no sensor 's9'"),
        ({"sensors": {}}, "name the folder"),
        ({"sensors": {"optical": "s2_toa", "radar": "s2_toa"}}, "two folders"),
        ({"sizes": {"s3_olci": 9}}, "none of the folders"),
        ({"patches_per_side": 0}, "at least 1"),
        ({"folder": "missing"}, "no such folder"),
        ({"out": "in/full"}, "holds shards already"),
    ],
)
def test_wrong_arguments(tmp_path, change, match):
    site(tmp_path / "in", "a")
    (tmp_path / "in/full").mkdir()
    (tmp_path / "in/full/example-000000.tar").touch()
    arguments = {"folder": "in", "out": "out", "sensors": FOLDERS} | change
    arguments |= {name: tmp_path / arguments[name] for name in ("folder", "out")}
    with pytest.raises(InputError, match=match):
        convert_sites(**arguments)
    assert not (tmp_path / "out").exists()


def test_nothing_to_pack(tmp_path):
    write(tmp_path / "in/optical/a.tif", np.full((3, 8, 8), 500, "uint16"))
    with pytest.raises(InputError, match="no site to pack") as error:
        convert_sites(tmp_path / "in", tmp_path / "out", {"optical": "s2_toa"})
    assert "it has 3 bands" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images in {DATA} (set COPERNICUS_REAL_DATA)")
def test_real_sites(tmp_path):
    report = convert_sites(
        DATA / "terramind_examples",
        tmp_path,
        {"S2L1C": "s2_toa", "S1RTC": "s1_grd", "DEM": "dem"},
        {"s2_toa": 112, "s1_grd": 112, "dem": 224},
        patches_per_side=2,
    )
    assert (report.sites, report.grids) == (3, 3)
    assert set(report.skipped) == {"433D_629L_3_1", "637U_59R_1_3"}
    found = members(report.shards[0])
    assert sum(name.endswith(".json") for name in found) == 3
    for name, array in found.items():
        if name.endswith("s2_toa.pth"):
            assert array.shape == (4, 4, 13, 112, 112)
            assert np.median(array[:, :, 10]) < 100  # cirrus is dark once the offset of 1000 is taken off
            assert np.corrcoef(array[0, 0, 3].ravel(), array[1, 0, 3].ravel())[0, 1] < 0.99  # patches differ
        if name.endswith("s1_grd.pth"):
            assert -40 < np.median(array) < 0
