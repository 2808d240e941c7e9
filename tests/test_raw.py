"""The raw layout: its list of images, single images as a shard stores them, whole grids."""

import gzip
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import rasterio
from conftest import RAW_SIZES
from rasterio.transform import from_origin

from copernicus.datasets import json_stream
from copernicus.datasets.baseline import UNKNOWN, known_offset
from copernicus.datasets.raw import ImageError, load_grid, pair, read_image, read_layout
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import check_grid
from copernicus.datasets.stored import fill_dates, published_dates

GRID = "0200599_-70.25_-55.25"
NEAR, FAR = "0012345_-70.31_-55.10", "0012346_-70.20_-55.30"


def write_list(folder, listed, name="fnames_union.json.gz"):
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / name, "wt") as file:
        file.write(listed if isinstance(listed, str) else json.dumps(listed))
    return folder / name


def write_tif(path, array_CHW, nodata=None, tags=None, **kind):
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = array_CHW.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype=array_CHW.dtype, nodata=nodata,
        crs="EPSG:32719", transform=from_origin(500000, 3900000, 10, 10), **kind,
    ) as file:  # fmt: skip
        file.write(array_CHW)
        file.update_tags(**(tags or {}))
    return path


def optical(side=16, low=1, high=9000, seed=0):
    return np.random.default_rng(seed).integers(low, high, (13, side, side)).astype("uint16")


# ---------------------------------------------------------------- the list


def test_what_the_list_says(tmp_path):
    s2 = f"s2_toa_mix/images/{GRID}/{FAR}/20210703T142731_20210703T142730_T19FDB.tif"
    s1 = f"s1_grd_utm/images/{GRID}/{{}}/S1B_IW_GRDH_1SDV_20211104T093211_20211104T093236_029439_03836F_1A2B.tif"
    no2 = f"s5p_l3_wgs/images/tropospheric_NO2_column_number_density/{GRID}/2021-12-01_2021-12-31.tif"
    write_list(
        tmp_path,
        {
            "200599": {
                "grid_id_coord": GRID,
                "s1_grd": {NEAR: [s1.format(NEAR)], FAR: [s1.format(FAR)]},
                "s2_toa": {FAR: [s2]},
                "s3_olci": [f"s3_olci_utm/images/{GRID}/S3A_20210105T133344_20210105T133644.tif"],
                "s5p_no2": [no2],
                "s5p_co": [],
                "dem": [f"dem_grid_wgs/images/{GRID}/dem.tif"],
            },
            "7": {"grid_id_coord": "0000007_-178.25_-90.00", "s1_grd": {}, "s2_toa": {}, "dem": []},
        },
    )
    layout = read_layout(tmp_path)
    assert layout.keys == ("0200599",)
    assert layout.empty == 1
    grid = layout.grid("0200599")
    assert list(grid.images) == ["s1_grd", "s2_toa", "s3_olci", "s5p_no2", "dem"]
    assert {sensor: [len(p) for p in patches] for sensor, patches in grid.images.items()} == {
        "s1_grd": [1, 1], "s2_toa": [1], "s3_olci": [1], "s5p_no2": [1], "dem": [1],
    }  # fmt: skip
    # The patch that both have is the first of both.
    assert [patch[0].patch for patch in grid.images["s1_grd"]] == [FAR, NEAR]
    image = grid.images["s2_toa"][0][0]
    days = (np.datetime64("2021-07-03") - np.datetime64("1970-01-01")).astype(int)
    assert image == (s2, f"{GRID}/{FAR}/20210703", FAR, -70.20, -55.30, days)
    assert grid.images["s1_grd"][1][0].name == f"{GRID}/{NEAR}/20211104"
    assert grid.images["s5p_no2"][0][0].name == f"{GRID}/20211201"
    assert grid.images["dem"][0][0].name == GRID
    assert np.isnan(grid.images["dem"][0][0].days)
    # The published list names a folder in which the images are not.
    olci = grid.images["s3_olci"][0][0]
    assert layout.locate(olci) == tmp_path / olci.path
    moved = tmp_path / olci.path.replace("utm", "wgs")
    moved.parent.mkdir(parents=True)
    moved.touch()
    assert layout.locate(olci) == moved
    part = layout.part(["0200599"]).grid("0200599")
    assert [i.path for i in part.images["s1_grd"][0]] == [i.path for i in grid.images["s1_grd"][0]]


ENTRY = {"grid_id_coord": GRID, "dem": ["dem/x.tif"]}


@pytest.mark.parametrize(
    ("listed", "says"),
    [
        ("[1, 2]", "not a JSON object"),
        ('{"200599": {"grid_id_coord": ', "is not a JSON object of grids"),
        (f'{{"200599": {json.dumps(ENTRY)} "7": {{}}}}', "comma"),
        ("", "not a JSON object"),
        ({"200599": ["dem.tif"]}, "grid '200599' is not an object with grid_id_coord"),
        ({"200599": {"dem": ["x.tif"]}}, "grid_id_coord"),
        ({"200599": ENTRY | {"grid_id_coord": "200599"}}, "seven digits"),
        ({"200598": ENTRY}, "seven digits"),
        ({"200599": ENTRY | {"s1_grd": ["x.tif"]}}, "s1_grd is not an object of patches"),
        ({"200599": ENTRY | {"s1_grd": {"here": ["x.tif"]}}}, "'here' of s1_grd"),
        ({"200599": ENTRY | {"s3_olci": {"a": 1}}}, "s3_olci is not a list"),
        ({"200599": ENTRY | {"s3_olci": [1]}}, "not a list of paths"),
        ({"200599": ENTRY | {"dem": ["/etc/passwd"]}}, "leads out of the folder"),
        ({"200599": ENTRY | {"dem": ["a/../../dem.tif"]}}, "leads out of the folder"),
        ({"200599": {"grid_id_coord": GRID, "dem": []}}, "none of its 1 grids has an image"),
        ("{}", "none of its 0 grids"),
        (json.dumps({"200599": ENTRY})[:-1] + ', "0200599": ' + json.dumps(ENTRY) + "}", "there twice"),
        ("[" * 100_000, "is not a JSON object"),
        ('{"200599": ' + "[" * 100_000, "is not a JSON object of grids"),
    ],
)
def test_a_wrong_list(tmp_path, listed, says):
    write_list(tmp_path, listed)
    with pytest.raises(InputError) as error:
        read_layout(tmp_path)
    assert says in str(error.value)
    assert "fnames_union.json.gz" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_layout(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no fnames\*\.json\.gz"):
        read_layout(tmp_path)
    with pytest.raises(InputError, match=r"gone\.json\.gz: cannot be read as gzip \(No such file"):
        read_layout(tmp_path, tmp_path / "gone.json.gz")
    whole = write_list(tmp_path, {str(i): {"grid_id_coord": f"{i:07d}_0.00_0.00"} for i in range(5000)})
    whole.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(InputError, match="is the file there, and whole"):
        read_layout(tmp_path)
    whole.write_text('{"200599": {}}')
    with pytest.raises(InputError, match="cannot be read as gzip"):
        read_layout(tmp_path)
    write_list(tmp_path, {"200599": ENTRY}, "fnames_joint.json.gz")
    with pytest.raises(InputError, match=r"several lists.*fnames_joint.*fnames_union"):
        read_layout(tmp_path)
    assert read_layout(tmp_path, tmp_path / "fnames_joint.json.gz").keys == ("0200599",)


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
def test_the_list_is_read_in_pieces(tmp_path, monkeypatch, piece):
    listed = {f'{i}\u00e9"{{': {"a": ["}", "\\", i, None, 1.5e3], "b": {"c": [[]]}} for i in range(20)}
    text = json.dumps(listed, indent=3, ensure_ascii=False)
    write_list(tmp_path, f" \n{text}\t\n", "x.json.gz")
    monkeypatch.setattr(json_stream, "_PIECE", piece)
    found = list(json_stream.read_entries(tmp_path / "x.json.gz"))
    assert {key: value for key, value, _ in found} == listed
    assert all(json.loads(text) == value for _, value, text in found)


def test_a_list_beyond_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "_PIECE", 64)
    path = write_list(tmp_path, {"1": "x" * 3000})
    monkeypatch.setattr(json_stream, "_LARGEST_VALUE", 1000)
    with pytest.raises(InputError, match="is not a JSON object of grids"):
        list(json_stream.read_entries(path))
    monkeypatch.undo()
    monkeypatch.setattr(json_stream, "_LARGEST_FILE", 1000)
    with pytest.raises(InputError, match="GiB of text"):
        list(json_stream.read_entries(path))


@pytest.mark.parametrize(
    ("first", "second", "paired"),
    [
        ("abc", "abc", ("abc", "abc")),
        ("abcd", "dxb", ("bdac", "bdx")),
        ("ab", "", ("ab", "")),
        ("", "ba", ("", "ba")),
    ],
)
def test_patches_in_pairs(first, second, paired):
    assert tuple("".join(order) for order in pair(list(first), list(second))) == paired


# ---------------------------------------------------------------- one image


def test_pixels_are_those_of_the_file(tmp_path):
    dn = optical()
    dn[3, 2:4] = 0
    dn[5, 7] = 40000  # beyond int16
    stored = read_image(write_tif(tmp_path / "a.tif", dn, nodata=0), "s2_toa", 16)
    assert stored.dtype == np.int16
    assert (stored == np.minimum(dn, 32767)).all()
    assert (stored[3, 2:4] == 0).all()
    db = np.random.default_rng(0).normal(-15, 4, (2, 16, 16)).astype("float32")
    db[0, 0], db[1, 1], db[0, 5] = np.nan, -9999, np.inf
    stored = read_image(write_tif(tmp_path / "b.tif", db, nodata=-9999), "s1_grd", 16)
    lost = np.zeros(db.shape, bool)
    lost[0, 0] = lost[1, 1] = lost[0, 5] = True
    assert stored.dtype == np.float32
    assert np.isnan(stored[lost]).all()
    assert (stored[~lost] == db[~lost]).all()


def test_radiances_are_not_taken_for_something_else(tmp_path):
    # Low digital numbers, positive backscatter: guesses about units would change these.
    dark = np.random.default_rng(0).integers(1, 300, (21, 12, 12)).astype("float32")
    assert (read_image(write_tif(tmp_path / "a.tif", dark), "s3_olci", 12) == dark).all()
    bright = np.random.default_rng(0).uniform(0.1, 3, (2, 12, 12)).astype("float32")
    assert (read_image(write_tif(tmp_path / "b.tif", bright), "s1_grd", 12) == bright).all()
    # All 13 bands above 1000 without a word of the baseline.
    dn = optical(low=1500)
    assert (read_image(write_tif(tmp_path / "c.tif", dn), "s2_toa", 16) == dn).all()


def test_a_longer_side_is_cut_at_both_ends(tmp_path):
    ramp = np.arange(20 * 31, dtype="float32").reshape(1, 20, 31)
    assert (read_image(write_tif(tmp_path / "a.tif", ramp), "dem", 20) == ramp[:, :, 5:25]).all()
    tall = ramp.transpose(0, 2, 1).copy()
    assert (read_image(write_tif(tmp_path / "b.tif", tall), "dem", 20) == tall[:, 5:25]).all()


def test_other_sizes_are_resampled(tmp_path):
    ramp = np.broadcast_to(np.arange(40, dtype="float32"), (1, 20, 40)).copy()
    dem = read_image(write_tif(tmp_path / "a.tif", ramp), "dem", 40)
    # Twice as many pixels, the middle half of the columns 0..39: 9.75, 10.25, ...
    assert dem[0, 20] == pytest.approx(9.75 + 0.5 * np.arange(40), abs=1e-4)
    rows = read_image(tmp_path / "a.tif", "dem", 40, rows=(3, 17))
    assert (rows == dem[:, 3:17]).all()


def test_rows_alone(tmp_path):
    heights = np.random.default_rng(0).uniform(0, 900, (1, 60, 64)).astype("float32")
    heights[:, 40:] = np.nan
    path = write_tif(tmp_path / "dem.tif", heights, blockysize=1, compress="deflate")
    whole = read_image(path, "dem", 60)
    for rows in [(0, 60), (0, 1), (59, 60), (12, 40)]:
        assert np.array_equal(read_image(path, "dem", 60, rows=rows), whole[:, rows[0] : rows[1]], equal_nan=True)
    # What is not asked for is not read: it can be broken.
    with rasterio.open(path) as file:
        last = int(file.get_tag_item("BLOCK_OFFSET_0_30", "TIFF", bidx=1))
    damaged = bytearray(path.read_bytes())
    damaged[last : last + 8] = b"\xff" * 8
    path.write_bytes(damaged)
    assert (read_image(path, "dem", 60, rows=(5, 20)) == heights[:, 5:20, 2:62]).all()
    with pytest.raises(ImageError) as error:
        read_image(path, "dem", 60)
    assert error.value.reason == "unreadable"


@pytest.mark.parametrize(
    ("content", "reason", "says"),
    [
        (None, "unreadable", "No such file"),
        (b"", "unreadable", "neither GeoTIFF nor NetCDF"),
        (b"II*\0 and then nothing", "unreadable", ""),
        (b"\x89HDF\r\n\x1a\n", "unreadable", "not GeoTIFF"),
        (b"<VRTDataset rasterXSize='1' rasterYSize='1'/>", "unreadable", "neither GeoTIFF"),
        (optical()[:12], "wrong_shape", "12 x 16 x 16"),
        (np.zeros((13, 1, 5000), "uint16"), "wrong_shape", "13 x 1 x 5000"),
        (np.zeros((13, 16, 16), "uint16"), "all_nan", ""),
    ],
)
def test_images_that_cannot_be_used(tmp_path, content, reason, says):
    path = tmp_path / "a.tif"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_tif(path, content, nodata=0)
    with pytest.raises(ImageError) as error:
        read_image(path, "s2_toa", 16)
    assert error.value.reason == reason
    assert says in str(error.value)
    assert str(tmp_path) not in str(error.value)  # the layout's own path says where


def test_numbers_with_a_scale_of_their_own(tmp_path):
    path = write_tif(tmp_path / "a.tif", optical())
    with rasterio.open(path, "r+") as file:
        file.scales = [0.0001] * 13
    with pytest.raises(ImageError) as error:
        read_image(path, "s2_toa", 16)
    assert error.value.reason == "scaled"


def test_a_real_image(real_data):
    (path,) = (real_data / "copernicusfm_tile").glob("*.tif")
    notes = Counter()
    stored = read_image(path, "s2_toa", 264, notes=notes)
    with rasterio.open(path) as file:
        assert (stored == file.read()).all()
    assert notes == {"s2_toa": 1, UNKNOWN: 1}  # published images do not tell their baseline


# ---------------------------------------------------------------- the offset of Sentinel-2

PRODUCT = "S2A_MSIL1C_20200101T101411_{}_R022_T32TQM_20230509T120000"


@pytest.mark.parametrize(
    ("name", "tags", "offset"),
    [
        ("20230101T101031_20230101T101027_T32TQM.tif", {}, None),  # the date says nothing
        ("20230101T101031_20230101T101027_T32TQM.tif", {"AREA_OR_POINT": "Area"}, None),
        (PRODUCT.format("N0400") + ".tif", {}, -1000),
        (PRODUCT.format("N0510") + ".SAFE.tif", {}, -1000),  # an old image, reprocessed
        (PRODUCT.format("N0301") + ".tif", {}, 0),
        (PRODUCT.format("N9999") + ".tif", {}, None),
        ("x.tif", {"PRODUCT_URI": PRODUCT.format("N0208")}, 0),
        ("x.tif", {"DATASTRIP_ID": "S2B_OPER_MSI_L1C_DS_2BPS_20220830T112540_S20220830T103630_N04.00"}, -1000),
        ("x.tif", {"PROCESSING_BASELINE": "03.01"}, 0),
        ("x.tif", {"PROCESSING_BASELINE": "05.09"}, -1000),
        ("x.tif", {"s2:processing_baseline": "N0400"}, -1000),
        ("x.tif", {"PROCESSING_BASELINE": "unknown"}, None),
        ("x.tif", {"RADIO_ADD_OFFSET": "-1000"}, -1000),
        ("x.tif", {"RADIO_ADD_OFFSET": "0", "PROCESSING_BASELINE": "04.00"}, 0),  # taken off by somebody else
        ("x.tif", {f"RADIO_ADD_OFFSET_{band}": "-1000" for band in range(13)}, -1000),
        ("x.tif", {"RADIO_ADD_OFFSET_0": "-1000", "RADIO_ADD_OFFSET_1": "0"}, None),
        (PRODUCT.format("N0301") + ".tif", {"PROCESSING_BASELINE": "04.00"}, None),  # which of the two?
    ],
)
def test_what_metadata_say(name, tags, offset):
    assert known_offset(name, tags) == offset


def test_the_offset_is_taken_off(tmp_path):
    dn = optical(low=1000, high=9000)
    dn[0, :3], dn[1, 1] = 0, 1
    path = write_tif(tmp_path / "a.tif", dn, tags={"PROCESSING_BASELINE": "04.00"})
    expected = dn.astype(int) - 1000
    expected[expected < 1] = 1  # as in the products before
    expected[dn == 0] = 0  # no data stays so
    notes = Counter()
    assert (read_image(path, "s2_toa", 16, notes=notes) == expected).all()
    assert (read_image(path, "s2_toa", 16, "0", notes=notes) == dn).all()
    plain = write_tif(tmp_path / "b.tif", dn)
    assert (read_image(plain, "s2_toa", 16, "-1000", notes=notes) == expected).all()
    assert UNKNOWN not in notes
    assert (read_image(plain, "s2_toa", 16, notes=notes) == dn).all()
    assert notes == {"s2_toa": 4, UNKNOWN: 1}


# ---------------------------------------------------------------- a grid


def equal(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def test_grids_are_those_that_the_miniature_packs(raw):
    folder, packed = raw
    layout = read_layout(folder)
    assert layout.keys == tuple(grid.key for grid in packed)
    assert any(len(grid.arrays) < len(SENSORS) for grid in packed)  # some lack sensors
    for expected in packed:
        grid, problems = load_grid(layout, expected.key, RAW_SIZES)
        assert problems == []
        assert grid.images == expected.images
        assert all(equal(grid.arrays[s], expected.arrays[s]) for s in SENSORS if s in expected.arrays)
        # What the list says agrees with what the files give.
        listed = layout.grid(expected.key)
        assert {s: [[i.name for i in patch] for patch in patches] for s, patches in listed.images.items()} == {
            s: names if s in ("s1_grd", "s2_toa") else [names] for s, names in expected.images.items()
        }


def test_what_cannot_be_read_is_named_and_the_rest_is_used(raw, tmp_path):
    source, packed = raw
    whole = packed[0]
    assert set(whole.arrays) == set(SENSORS)
    folder = tmp_path / "raw"
    shutil.copytree(source, folder)
    layout = read_layout(folder)
    images = layout.grid(whole.key).images
    cut = layout.locate(images["s1_grd"][0][1])
    cut.write_bytes(cut.read_bytes()[:200])
    gone = images["s3_olci"][0][2]
    layout.locate(gone).unlink()
    for image in images["s2_toa"][0]:  # a patch of which nothing is left
        layout.locate(image).write_bytes(b"no image")
    shutil.copy(layout.locate(images["s1_grd"][1][0]), layout.locate(images["dem"][0][0]))  # 2 bands
    grid, problems = load_grid(layout, whole.key, RAW_SIZES)
    check_grid(grid)
    assert [(p.where, p.reason) for p in problems] == [
        (images["s1_grd"][0][1].path, "unreadable"),
        *((image.path, "unreadable") for image in images["s2_toa"][0]),
        (gone.path, "unreadable"),
        (images["dem"][0][0].path, "wrong_shape"),
    ]
    assert "No such file" in problems[5].detail
    assert set(grid.arrays) == set(SENSORS) - {"dem"}
    # The pair that is left comes first in both.
    assert (grid.arrays["s2_toa"] == whole.arrays["s2_toa"][1:]).all()
    assert grid.images["s2_toa"] == whole.images["s2_toa"][1:]
    assert equal(grid.arrays["s1_grd"][0], whole.arrays["s1_grd"][1])
    # Three dates are left of the other, one of which stands twice.
    names = [name for i, name in enumerate(whole.images["s1_grd"][0]) if i != 1]
    assert grid.images["s1_grd"][1][:3] == names
    again = names.index(grid.images["s1_grd"][1][3])
    assert equal(grid.arrays["s1_grd"][1][3], grid.arrays["s1_grd"][1][again])
    assert equal(grid.arrays["s1_grd"][1][:3], np.delete(whole.arrays["s1_grd"][0], 1, axis=0))
    assert len(grid.images["s3_olci"]) == 8
    assert set(grid.images["s3_olci"]) == set(whole.images["s3_olci"]) - {gone.name}


def test_dates_that_are_repeated():
    for sensor in SENSORS:
        wanted = published_dates(sensor)
        for count in range(1, wanted + 3):
            order = fill_dates(count, sensor, 0, "0200599", NEAR)
            assert len(order) == wanted
            assert order[:count] == list(range(min(count, wanted)))
            assert max(order) < count
            assert order == fill_dates(count, sensor, 0, "0200599", NEAR)
    # Another key, other dates: of 12, the chance that two draws agree is nil.
    one = fill_dates(3, "s5p_co", 0, "0200599", "")
    assert one != fill_dates(3, "s5p_co", 1, "0200599", "")
    assert one != fill_dates(3, "s5p_co", 0, "0200600", "")
    drawn = Counter(i for key in range(300) for i in fill_dates(3, "s5p_co", 0, str(key), "")[3:])
    assert all(abs(n / (300 * 9) - 1 / 3) < 0.05 for n in drawn.values())


def test_more_dates_than_published_and_names_without_a_date(tmp_path):
    paths = [f"s3/{GRID}/S3A_2021010{day}T000000.tif" for day in range(1, 10)]
    paths[2] = f"s3/{GRID}/undated.tif"
    paths[3] = f"s3/{GRID}/S3A_20211399T000000.tif"
    for number, path in enumerate(paths):
        write_tif(tmp_path / path, np.full((21, 6, 6), number, "float32"))
    write_list(tmp_path, {"200599": {"grid_id_coord": GRID, "s3_olci": paths}})
    grid, problems = load_grid(read_layout(tmp_path), "0200599", {"s3_olci": 6})
    assert [(p.where, p.reason) for p in problems] == [
        (paths[8], "too_many_dates"), (paths[2], "no_date"), (paths[3], "no_date"),
    ]  # fmt: skip
    assert grid.arrays["s3_olci"][:, 0, 0, 0].tolist() == list(range(8))
    assert grid.images["s3_olci"][1:4] == [f"{GRID}/20210102", GRID, GRID]
