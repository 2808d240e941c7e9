"""Reading real images: on files written here with known contents, and on the real ones where they are."""

import datetime
import math
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin

from copernicus.datasets.geotiff import parse_date, read_image, resample, solar_irradiance
from copernicus.datasets.sensors import InputError, Sensor, get_sensor

S2, S1, S3, DEM, NO2 = (get_sensor(name) for name in ("s2_toa", "s1_grd", "s3_olci", "dem", "s5p_no2"))
DATA = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images in {DATA} (set COPERNICUS_REAL_DATA)")


def write(path, array_CHW, names=None, crs="EPSG:32633", transform=None, tags=None, nodata=None, scales=None):
    array_CHW = np.asarray(array_CHW)
    count, height, width = array_CHW.shape
    transform = transform or from_origin(500000, 5000000, 10, 10)  # 15 E in zone 33 is x = 500000
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=array_CHW.dtype,
        crs=crs,
        transform=transform,
        nodata=nodata,
    ) as file:
        file.write(array_CHW)
        if names:
            file.descriptions = names
        if tags:
            file.update_tags(**tags)
        if scales:
            file.scales = scales
    return path


def bands(levels, size=8, dtype="uint16"):
    """Constant bands of the given levels."""
    return np.stack([np.full((size, size), level) for level in levels]).astype(dtype)


S2_LEVELS = [1200, 1100, 1000, 900, 1300, 2000, 2300, 2400, 2500, 800, 15, 1800, 1200]  # B01 .. B08 B8A B09 B10 B11 B12


def test_place_pixel_and_date(tmp_path):
    # On the central meridian of UTM zone 33 a centre at x = 500000 lies at 15 E whatever the latitude.
    path = write(
        tmp_path / "S2A_MSIL1C_20180510T094033_x.tif", bands(S2_LEVELS, 20), transform=from_origin(499900, 5e6, 10, 10)
    )
    image = read_image(path, S2)
    assert image.lon == pytest.approx(15, abs=1e-6)
    # Meridian arc: northing 5e6 - 100 m, scale 0.9996, about 111.14 km a degree near 45 N.
    assert image.lat == pytest.approx(45.15, abs=0.01)
    assert image.gsd_m == pytest.approx(10)
    assert image.acquired == datetime.datetime(2018, 5, 10, 9, 40, 33)
    assert image.days == (datetime.date(2018, 5, 10) - datetime.date(1970, 1, 1)).days
    west, _ = image.locate(10, 0)
    assert (image.lon - west) * 111.32 * math.cos(math.radians(image.lat)) == pytest.approx(0.1, rel=0.01)


def test_geographic_pixels_shrink_towards_the_poles(tmp_path):
    path = write(
        tmp_path / "dem.tif",
        np.zeros((1, 10, 10), "int16"),
        crs="EPSG:4326",
        transform=from_origin(5, 60.05, 0.01, 0.01),
    )
    image = read_image(path, DEM)
    assert (image.lon, image.lat) == pytest.approx((5.05, 60.0))
    assert image.pixel_area_km2 == pytest.approx(1.1132**2 / 2, rel=1e-3)  # cos 60 = 1/2
    assert image.acquired is None
    assert math.isnan(image.days)
    assert any("date unknown" in note for note in image.notes)


def test_bands_by_name_in_any_order_with_extras(tmp_path):
    names = ("QA60", *reversed(S2.bands))
    path = write(tmp_path / "a.tif", bands([7, *reversed(S2_LEVELS)]), names=names)
    image = read_image(path, S2)
    assert image.array_CHW[:, 0, 0].tolist() == S2_LEVELS
    assert image.sensor.bands == S2.bands
    assert any("QA60" in note for note in image.notes)


@pytest.mark.parametrize(
    ("sensor", "names", "expected"),
    [
        (S1, ("Sigma0_VH_db", "Sigma0_VV_db"), ("VV", "VH")),
        (S2, ("B4", "B3", "B2"), ("B02", "B03", "B04")),
        (S3, ("Oa08_radiance", "Oa06_radiance"), ("Oa06", "Oa08")),
    ],
)
def test_other_spellings_and_missing_bands(tmp_path, sensor, names, expected):
    levels = -10.0 - np.arange(len(names)) if sensor is S1 else 1000.0 + np.arange(len(names))
    image = read_image(write(tmp_path / "a.tif", bands(levels, dtype="float32"), names=names), sensor)
    assert image.sensor.bands == expected
    assert image.array_CHW[:, 0, 0].tolist() == levels[::-1].tolist()
    if sensor.spectral:
        picked = [sensor.bands.index(band) for band in expected]
        assert image.sensor.wavelengths_nm == tuple(sensor.wavelengths_nm[c] for c in picked)
    assert any("missing" in note for note in image.notes) == (len(expected) < sensor.channels)


def test_thirteen_unnamed_bands_in_either_order(tmp_path):
    standard = read_image(write(tmp_path / "a.tif", bands(S2_LEVELS)), S2)
    assert standard.array_CHW[:, 0, 0].tolist() == S2_LEVELS
    eurosat = [*S2_LEVELS[:8], *S2_LEVELS[9:], S2_LEVELS[8]]  # B8A last
    image = read_image(write(tmp_path / "b.tif", bands(eurosat)), S2)
    assert image.array_CHW[:, 0, 0].tolist() == S2_LEVELS
    assert any("EuroSAT" in note for note in image.notes)
    assert not any("EuroSAT" in note for note in standard.notes)


def test_order_can_be_told(tmp_path):
    order = [*S2.bands[::-1]]
    path = write(tmp_path / "a.tif", bands(S2_LEVELS[::-1]))
    assert read_image(path, S2, bands=order).array_CHW[:, 0, 0].tolist() == S2_LEVELS
    with pytest.raises(InputError, match="13 bands, but 12 names"):
        read_image(path, S2, bands=order[1:])


def test_twelve_unnamed_bands_are_level_2a(tmp_path):
    image = read_image(write(tmp_path / "a.tif", bands([level for level in S2_LEVELS if level != 15])), S2)
    assert "B10" not in image.sensor.bands
    assert image.sensor.channels == 12
    assert image.array_CHW[image.sensor.bands.index("B11"), 0, 0] == 1800
    assert any("Level-2A" in note for note in image.notes)
    assert image.sensor.mean[-2:] == S2.mean[-2:]


def test_nodata_and_infinite_values_become_nan(tmp_path):
    x = np.full((1, 4, 4), 100, "float32")
    x[0, 0, 0], x[0, 1, 1] = -32767, np.inf
    image = read_image(write(tmp_path / "a.tif", x, nodata=-32767), DEM)
    assert np.isnan(image.array_CHW[0, [0, 1], [0, 1]]).all()
    assert image.missing == pytest.approx(2 / 16)
    assert np.nanmax(image.array_CHW) == 100


def test_scale_of_the_file_is_applied(tmp_path):
    image = read_image(write(tmp_path / "a.tif", np.full((1, 4, 4), 100, "int16"), scales=(0.5,)), DEM)
    assert (image.array_CHW == 50).all()
    assert any("scale" in note for note in image.notes)


def test_linear_backscatter_becomes_decibel(tmp_path):
    image = read_image(write(tmp_path / "a.tif", bands([0.1, 0.01], dtype="float32"), names=("VV", "VH")), S1)
    assert image.array_CHW[:, 0, 0] == pytest.approx([-10, -20], abs=1e-4)
    assert any("dB" in note for note in image.notes)
    decibel = read_image(write(tmp_path / "b.tif", bands([-10, -20], dtype="float32"), names=("VV", "VH")), S1)
    assert decibel.array_CHW[:, 0, 0].tolist() == [-10, -20]
    assert not any("dB" in note for note in decibel.notes)
    with pytest.raises(InputError, match="uncalibrated"):
        read_image(write(tmp_path / "c.tif", bands([250, 90]), names=("VV", "VH")), S1)


def test_units_of_sentinel_2(tmp_path):
    fraction = read_image(write(tmp_path / "a.tif", bands(np.array(S2_LEVELS) / 1e4, dtype="float32")), S2)
    assert fraction.array_CHW[:, 0, 0] == pytest.approx(S2_LEVELS, rel=1e-5)
    offset = read_image(write(tmp_path / "b.tif", bands(np.array(S2_LEVELS) + 1000)), S2)
    assert offset.array_CHW[:, 0, 0].tolist() == S2_LEVELS
    assert any("04.00" in note for note in offset.notes)
    # Without the dark cirrus band a bright scene cannot be told from an offset: left alone.
    bright = [3000 + level for level in S2_LEVELS if level != 15]
    assert read_image(write(tmp_path / "c.tif", bands(bright)), S2).array_CHW[:, 0, 0].tolist() == bright


def test_units_of_sentinel_3(tmp_path):
    digital = read_image(write(tmp_path / "a.tif", bands([4000] * 21, dtype="float32")), S3)
    assert digital.sensor.scale == S3.scale
    radiance = read_image(write(tmp_path / "b.tif", bands([60.0] * 21, dtype="float32")), S3)
    assert radiance.sensor.scale == (1.0,)
    assert (radiance.array_CHW == 60).all()
    # No time of day: the sun is taken as 45 degrees high. 0.2 x E0 x 0.7071 / pi.
    reflectance = read_image(write(tmp_path / "2017-04-14.tif", bands([0.2] * 21, dtype="float32")), S3)
    assert reflectance.sensor.scale == (1.0,)
    expected = 0.2 * solar_irradiance(np.array(S3.wavelengths_nm)) * 0.5**0.5 / math.pi
    assert reflectance.array_CHW[:, 0, 0] == pytest.approx(expected, rel=1e-5)
    assert any("reflectance" in note for note in reflectance.notes)


def test_solar_irradiance_is_near_the_measured():
    # Band averages of measured spectra (Thuillier 2003), mW m-2 nm-1: 490 nm 1930, 665 nm 1530, 865 nm 960, 1020 nm 700.
    measured = {490: 1930, 665: 1530, 865: 960, 1020: 700}
    for wavelength, value in measured.items():
        assert solar_irradiance(np.array(wavelength)) == pytest.approx(value, rel=0.1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20201002T221611_20201002T221610_T60HWB.tif", (2020, 10, 2, 22, 16, 11)),
        ("S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_41_allbands.tif", (2017, 6, 13, 16, 50, 43)),
        ("S2A_MSIL2A_20180510T94033_19_86_allbands.tif", (2018, 5, 10, 9, 40, 33)),
        ("S3A_OL_1_EFR____20170414T102450_SNS.tif", (2017, 4, 14, 10, 24, 50)),
        (
            "S5P_NRTI_L3__NO2____20211217T114745_20211217T115245_21651_02_020301_20211217T131229.nc",
            (2021, 12, 17, 11, 47, 45),
        ),
        ("NO2_2021-03-09.tif", (2021, 3, 9, 0, 0, 0)),
        ("2021-07-23T13:22:41.000000000", (2021, 7, 23, 13, 22, 41)),
        ("14-APR-2017 10:27:29.454657", (2017, 4, 14, 10, 27, 29)),
        ("tile_20230815.tif", (2023, 8, 15, 0, 0, 0)),
        ("O_L2_0001_SNS_2017104102450_v1.0.nc", None),
        ("Copernicus_DSM_10_N45_00_E005_00_DEM.tif", None),
        ("20201399_River_1.tif", None),
    ],
)
def test_dates(text, expected):
    assert parse_date(text) == (expected and datetime.datetime(*expected))


def test_date_from_a_tag(tmp_path):
    path = write(tmp_path / "River_1.tif", bands(S2_LEVELS), tags={"datetime": "2021-07-23T13:22:41.000000000"})
    image = read_image(path, S2)
    assert image.acquired == datetime.datetime(2021, 7, 23, 13, 22, 41)
    assert any("tag 'datetime'" in note for note in image.notes)


def test_without_georeference(tmp_path):
    path = write(tmp_path / "a.tif", bands(S2_LEVELS), crs=None, transform=rasterio.Affine.identity())
    image = read_image(path, S2)
    assert math.isnan(image.lon)
    assert math.isnan(image.lat)
    assert math.isnan(image.pixel_area_km2)
    assert any("location unknown" in note for note in image.notes)


def test_netcdf_with_two_dimensional_places_comes_north_up(tmp_path):
    path = tmp_path / "scene_20170414T102450.nc"
    lat, lon = np.meshgrid(np.linspace(50, 49.9, 11), np.linspace(3, 3.2, 21), indexing="ij")
    with h5py.File(path, "w") as file:
        for axis, length in (("y", 11), ("x", 21)):
            file.create_dataset(axis, data=np.arange(length, dtype="f4")).make_scale(axis)
        layers = {
            "lat": lat,
            "lon": lon,
            "rtoa_6": 0.1 + 0.01 * np.arange(11)[:, None] + 0 * lon,
            "rtoa_8": 0.2 + 0 * lon,
        }
        for name, values in layers.items():
            dataset = file.create_dataset(name, data=values.astype("f8"))
            dataset.dims[0].attach_scale(file["y"])
            dataset.dims[1].attach_scale(file["x"])
    image = read_image(path, S3)
    assert image.sensor.bands == ("Oa06", "Oa08")
    assert (image.lon, image.lat) == pytest.approx((3.1, 49.95))
    assert image.locate(0, 0) == pytest.approx((3.0, 50.0))
    assert image.array_CHW[0, 0, 0] < image.array_CHW[0, -1, 0]  # the northern row is the darkest
    assert image.pixel_area_km2 == pytest.approx(1.1132**2 * math.cos(math.radians(49.95)), rel=1e-3)


def _not_an_image(path):
    path.write_text("<VRTDataset></VRTDataset>")
    return path


def _truncated(path):
    write(path, np.random.default_rng(0).integers(0, 1000, (13, 64, 64)).astype("uint16"))
    path.write_bytes(path.read_bytes()[:20000])
    return path


@pytest.mark.parametrize(
    ("make", "sensor", "match"),
    [
        (lambda p: p, S2, "no such file"),
        (_not_an_image, S2, "neither GeoTIFF nor NetCDF"),
        (_truncated, S2, "cannot be read"),
        (lambda p: write(p, bands([1, 2, 3])), S2, r"it has 3 bands; s2_toa has 13 \(B01,"),
        (lambda p: write(p, bands([1, 2], dtype="float32")), DEM, "it has 2 bands; dem has 1"),
        (lambda p: write(p, np.full((1, 4, 4), np.nan, "float32")), DEM, "not one valid value"),
        (lambda p: write(p, np.full((1, 4, 4), -1, "int16"), nodata=-1), DEM, "not one valid value"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, make, sensor, match):
    path = make(tmp_path / "broken.tif")
    with pytest.raises(InputError, match=match) as error:
        read_image(path, sensor)
    assert str(path) in str(error.value)


def test_custom_sensor(tmp_path):
    sensor = Sensor(name="mine", bands=("red", "nir"), wavelengths_nm=(650, 850), bandwidths_nm=(30, 30))
    image = read_image(write(tmp_path / "a.tif", bands([5, 6]), names=("nir", "red")), sensor)
    assert image.array_CHW[:, 0, 0].tolist() == [6, 5]


def test_resample_keeps_constants_beside_gaps():
    x = torch.full((1, 2, 10, 12), 3.0)
    x[..., :4, :4] = torch.nan
    y = resample(x, (16, 16))
    assert y.shape == (1, 2, 16, 16)
    assert torch.allclose(y[y.isfinite()], torch.tensor(3.0))
    assert 0 < float(y.isnan().float().mean()) < 0.25
    assert resample(x, (10, 12)) is x


@real
def test_real_files():
    tile = read_image(DATA / "copernicusfm_tile/20201002T221611_20201002T221610_T60HWB.tif", S2)
    assert tile.array_CHW.shape == (13, 264, 264)
    assert (tile.lon, tile.lat) == pytest.approx((177.742, -38.946), abs=1e-3)
    # index.csv of the sites gives their centres.
    site = read_image(DATA / "terramind_examples/S1RTC/38D_378R_2_3.tif", S1)
    assert (site.lon, site.lat) == pytest.approx((34.06603, -3.40136), abs=1e-4)
    assert site.acquired == datetime.datetime(2023, 6, 10, 16, 4, 18)
    no2 = read_image(sorted(DATA.glob("s5p/nl*/*T112745*.nc"))[0], NO2)
    assert no2.array_CHW.shape == (1, 38, 54)
    assert np.nanmax(no2.array_CHW) == pytest.approx(5.0189e-4, rel=1e-3)  # the total column, not the tropospheric one
    assert (no2.lon, no2.lat) == pytest.approx((5.095, 52.175), abs=1e-3)
    assert read_image(next(DATA.glob("copdem*/*.tif")), DEM).gsd_m == pytest.approx(186, abs=1)
    with pytest.raises(InputError, match="point series"):
        read_image(DATA / "s5p/oman_no2_daily_2024/NO2_2024_Sur.nc", NO2)
    with pytest.raises(InputError, match="no variable for s5p_co"):
        read_image(sorted(DATA.glob("s5p/nl*/*.nc"))[0], get_sensor("s5p_co"))


@real
def test_real_netcdf_agrees_with_its_own_angles_and_geotiff():
    path = DATA / "s3_olci_xcube/O_L2_0001_SNS_2017104102450_v1.0.nc"
    image = read_image(path, S3)
    with h5py.File(path) as file:
        rho, sza, lat = file["rtoa_8"][:], float(np.mean(file["SZA"][:])), file["lat"][:]
    assert lat[0, 0] > lat[-1, 0]  # stored north up
    irradiance = solar_irradiance(np.array(665.0))
    expected = rho * irradiance * math.cos(math.radians(sza)) / math.pi
    assert image.array_CHW[7] == pytest.approx(expected, rel=0.03)  # the file's own sun angles
    warped = read_image(next(DATA.glob("s3_olci_xcube/derived/s3_olci/*.tif")), S3)
    assert np.nanmean(warped.array_CHW[7]) == pytest.approx(image.array_CHW[7].mean(), rel=0.05)


@real
def test_every_real_eurosat_patch_is_recognised():
    paths = sorted(DATA.glob("eurosat_s2_subset/eurosat_s2/all_imgs/*/*.tif"))
    assert len(paths) == 200
    for path in paths:
        assert any("EuroSAT" in note for note in read_image(path, S2).notes), path
