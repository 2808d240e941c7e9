"""Crops and the metadata that follows them, against geodesy and against plain indexing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rasterio.warp import transform

from copernicus.datasets.augment import Crop, apply_crop, centre_crop, crop_metadata, random_crop
from copernicus.datasets.order import generator


@pytest.mark.parametrize(("height", "width"), [(264, 264), (96, 96), (28, 28), (60, 200), (1, 1)])
def test_random_crops_stay_inside_and_within_the_published_bounds(height, width):
    rng = generator("test", height, width)
    for _ in range(400):
        crop = random_crop(rng, height, width)
        assert crop.top >= 0
        assert crop.left >= 0
        assert crop.height >= 1
        assert crop.width >= 1
        assert crop.top + crop.height <= height
        assert crop.left + crop.width <= width
        whole = (crop.height, crop.width) == (height, width)
        if not whole:
            # Sides are rounded to pixels: half a pixel each way.
            low = (crop.height - 0.5) * (crop.width - 0.5)
            high = (crop.height + 0.5) * (crop.width + 0.5)
            assert high >= 0.2 * height * width
            assert low <= height * width
            assert (crop.width + 0.5) / (crop.height - 0.5) >= 3 / 4
            assert (crop.width - 0.5) / (crop.height + 0.5) <= 4 / 3


def test_random_crops_reach_every_corner_both_mirrorings_and_the_whole_range_of_areas():
    rng = generator("test")
    crops = [random_crop(rng, 100, 100) for _ in range(2000)]
    area = np.array([c.height * c.width / 1e4 for c in crops])
    assert area.min() < 0.23
    assert area.max() > 0.93
    assert 0.45 < np.mean([c.flip for c in crops]) < 0.55
    assert any(c.top == 0 and c.height < 100 for c in crops)
    assert any(c.top + c.height == 100 and c.top > 0 for c in crops)
    assert any(c.left == 0 and c.width < 100 for c in crops)
    assert any(c.left + c.width == 100 and c.left > 0 for c in crops)
    assert not any(random_crop(rng, 100, 100, flip=0.0).flip for _ in range(50))


def test_the_whole_image_at_its_own_size_is_itself():
    x_CHW = np.arange(2 * 6 * 6, dtype=np.int16).reshape(2, 6, 6)
    out = apply_crop(x_CHW, Crop(0, 0, 6, 6), 6)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, x_CHW)


def test_a_crop_is_the_pixels_it_names_and_a_flip_mirrors_west_and_east():
    x_CHW = np.arange(60, dtype=np.float32).reshape(1, 6, 10)
    out = apply_crop(x_CHW, Crop(1, 3, 4, 4), 4)
    np.testing.assert_array_equal(out, x_CHW[:, 1:5, 3:7])
    np.testing.assert_array_equal(apply_crop(x_CHW, Crop(1, 3, 4, 4, flip=True), 4), out[:, :, [3, 2, 1, 0]])
    np.testing.assert_allclose(
        apply_crop(x_CHW, Crop(0, 2, 6, 7, flip=True), 4), apply_crop(x_CHW, Crop(0, 2, 6, 7), 4)[..., ::-1], rtol=1e-6
    )


def test_resampling_is_antialiased_and_keeps_what_is_linear():
    # A third of a checkerboard of single pixels must give its mean; point sampling would give black or white.
    board = (np.arange(33)[:, None] + np.arange(33)) % 2
    out = apply_crop(board[None], Crop(0, 0, 33, 33), 11)
    assert np.abs(out[:, 2:-2, 2:-2] - 0.5).max() < 0.05
    # Pixel centres keep their place: a ramp's value at the centre of each new pixel.
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32), (1, 16, 16))
    out = apply_crop(ramp, Crop(0, 0, 16, 16), 8)
    np.testing.assert_allclose(out[0, 0, 1:-1], (np.arange(8.0) * 2 + 0.5)[1:-1], rtol=1e-6)


def triangle(side: int, size: int) -> np.ndarray:
    """Bilinear antialiased resampling of one axis as a (size, side) matrix in float64, pixel by pixel."""
    matrix = np.zeros((size, side))
    for new in range(size):
        centre = (new + 0.5) * side / size
        for old in range(side):
            matrix[new, old] = max(0.0, 1 - abs(old + 0.5 - centre) / max(1.0, side / size))
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("dtype", ["int16", "float32", "float64"])
@pytest.mark.parametrize(("height", "width", "size"), [(20, 31, 16), (11, 9, 32), (16, 40, 16), (1, 1, 4), (50, 7, 8)])
def test_resampling_equals_the_matrix_product_and_torch(height, width, size, dtype):
    x_CHW = (generator("resample").standard_normal((3, height + 5, width + 4)) * 500).astype(dtype)
    crop = Crop(2, 3, height, width)
    cut = x_CHW[:, 2 : 2 + height, 3 : 3 + width]
    exact = triangle(height, size) @ cut.astype(np.float64) @ triangle(width, size).T
    out = apply_crop(x_CHW, crop, size)
    assert out.shape == (3, size, size)
    np.testing.assert_allclose(out, exact, rtol=2e-6, atol=2e-3)
    theirs = F.interpolate(
        torch.from_numpy(cut.astype(np.float32))[None], size=(size, size), mode="bilinear", antialias=True
    )
    np.testing.assert_allclose(out, theirs[0].numpy(), rtol=1e-4, atol=0.05)  # torch's weights are float32


def test_unknown_pixels_stay_unknown_and_spread_to_those_alone_that_they_have_a_share_in():
    x_CHW = np.ones((1, 8, 8), np.float32)
    x_CHW[0, 2, 3] = np.nan
    out = apply_crop(x_CHW, Crop(0, 0, 8, 8), 4)
    assert np.isnan(out[0, 1, 1])
    assert out[0, 3, 3] == 1
    share = np.outer(triangle(8, 4)[:, 2], triangle(8, 4)[:, 3]) > 0
    np.testing.assert_array_equal(np.isnan(out[0]), share)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(10, 10, 0, 0), (6, 10, 0, 2), (11, 6, 2, 0)])
def test_the_centre_crop_is_the_largest_square(height, width, top, left):
    side = min(height, width)
    assert centre_crop(height, width) == Crop(top, left, side, side, flip=False)


@pytest.mark.parametrize(("lon", "lat"), [(11.5, 48.0), (-70.2, -33.1), (36.8, 0.02), (15.6, 66.0)])
@pytest.mark.parametrize("crop", [Crop(0, 0, 132, 120), Crop(140, 100, 124, 160), Crop(10, 200, 60, 60)])
def test_the_centre_moves_as_on_a_map(lon, lat, crop):
    """Against the azimuthal equidistant projection about the image's centre, on WGS 84."""
    new_lon, new_lat, _ = crop_metadata(lon, lat, 10.0, 16, crop, 264, 264, 224)
    east = (crop.left + crop.width / 2 - 132) * 10.0
    north = (132 - crop.top - crop.height / 2) * 10.0
    local = f"+proj=aeqd +lat_0={lat} +lon_0={lon} +datum=WGS84"
    (true_lon,), (true_lat,) = transform(local, "EPSG:4326", [east], [north])
    # A sphere for an ellipsoid errs by less than 1 % of the shift; a kilometre shifted, ten metres.
    shift_lat = max(abs(true_lat - lat), abs(east) / 111_320)
    assert new_lat == pytest.approx(true_lat, abs=0.01 * shift_lat + 1e-9)
    shift_lon = max(abs(true_lon - lon), abs(north) / 111_320 / math.cos(math.radians(lat)))
    assert new_lon == pytest.approx(true_lon, abs=0.01 * shift_lon + 1e-9)


def test_an_uncropped_image_keeps_its_place():
    assert crop_metadata(11.5, 48.0, 10.0, 16, Crop(0, 0, 264, 264), 264, 264, 264)[:2] == (11.5, 48.0)


@pytest.mark.parametrize(
    ("gsd_m", "kernel", "crop", "size"),
    [
        (10.0, 16, Crop(0, 0, 224, 224), 224),
        (10.0, 16, Crop(5, 5, 112, 112), 224),
        (30.0, 64, Crop(0, 0, 480, 960), 960),
        (1000.0, 4, Crop(0, 0, 28, 28), 28),
    ],
)
def test_the_tokens_of_a_crop_cover_its_ground(gsd_m, kernel, crop, size):
    area_km2 = crop_metadata(0.0, 0.0, gsd_m, kernel, crop, 1000, 1000, size)[2]
    tokens = (size // kernel) ** 2
    ground_km2 = crop.height * crop.width * gsd_m**2 / 1e6
    assert tokens * area_km2 == pytest.approx(ground_km2)


@pytest.mark.parametrize("lat", [90.0, -90.0, 89.99, -89.99])
def test_near_a_pole_places_stay_on_the_globe(lat):
    for crop in (Crop(0, 0, 100, 100), Crop(860, 860, 100, 100)):
        new_lon, new_lat, _ = crop_metadata(10.0, lat, 30.0, 64, crop, 960, 960, 960)
        assert -90 <= new_lat <= 90
        assert -180 <= new_lon < 180


@pytest.mark.parametrize(("lon", "left", "expected"), [(179.99, 860, -180), (-179.99, 0, 180)])
def test_across_the_date_line_longitude_wraps(lon, left, expected):
    new_lon, _, _ = crop_metadata(lon, 0.0, 30.0, 64, Crop(430, left, 100, 100), 960, 960, 960)
    assert math.copysign(1, new_lon) == math.copysign(1, expected)
    assert 179.8 < abs(new_lon) < 180


def test_an_unknown_place_stays_unknown():
    lon, lat, area = crop_metadata(math.nan, math.nan, 10.0, 16, Crop(0, 0, 112, 112), 264, 264, 224)
    assert math.isnan(lon)
    assert math.isnan(lat)
    assert area == pytest.approx(0.16**2 / 4)
