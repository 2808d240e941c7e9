"""The `published` preset: each quirk of the public pretraining code, against its recorded values or a plain computation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZES
from safetensors.torch import load_file
from test_pretrain import TINY, plan

from copernicus.datasets.augment import Crop, crop_metadata
from copernicus.datasets.index import index_shards
from copernicus.datasets.published import published_apply_crop, published_crop_metadata, published_sensor
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.slices import DrawReader
from copernicus.models.published import blank_batch
from copernicus.platform.experiment import load_experiment
from copernicus.platform.objective import build_autoencoder
from copernicus.platform.schema import Pretrain

GOLDENS = load_file(Path(__file__).parent / "goldens" / "misc.safetensors")
ALL = tuple(SENSORS.values())
S5P = [i for i, s in enumerate(ALL) if s.name.startswith("s5p_")]
NAN = math.nan


def published(**changes) -> Pretrain:
    given = {"shards": ["x"], "preset": "published", "require": "all", "metadata_drop": 0.0, "model": TINY}
    return Pretrain(**{**given, "image_size": SIZES, **changes})


def crop_of(corners_42: torch.Tensor, flip: bool = False) -> Crop:
    """kornia's corners, pixels that belong to the crop, clockwise from the top left."""
    left, top = corners_42[0].int().tolist()
    right, bottom = corners_42[2].int().tolist()
    return Crop(top, left, bottom - top + 1, right - left + 1, flip)


# --- Crops -----------------------------------------------------------------------------------------------------------


def test_crops_are_resampled_as_recorded():
    """Four images cropped by kornia, mirrored and normalised as Sentinel-1's are."""
    for row in range(4):
        crop = crop_of(GOLDENS["aug/crop_src"][row], bool(GOLDENS["aug/flip"][row]))
        out = published_apply_crop(GOLDENS["aug/x"][row].numpy(), crop, 32)
        expected = GOLDENS["aug/y"][row].numpy()
        np.testing.assert_allclose(SENSORS["s1_grd"].normalize(out), expected, rtol=0, atol=2e-6)


def test_resampling_keeps_the_corners_and_is_not_antialiased():
    x_CHW = (np.arange(33)[:, None] + np.arange(33)).astype(np.int16)[None] % 2
    out = published_apply_crop(x_CHW, Crop(0, 0, 33, 33), 17)
    np.testing.assert_array_equal(out, x_CHW[:, ::2, ::2])
    assert out.dtype == np.float32
    same = published_apply_crop(x_CHW, Crop(1, 2, 17, 17, flip=True), 17)
    np.testing.assert_array_equal(same, x_CHW[:, 1:18, 2:19][:, :, ::-1])


@pytest.mark.parametrize("row", range(3))
def test_area_and_centre_follow_the_crop_as_recorded(row):
    crop = crop_of(GOLDENS["crop/src"][row])
    lon, lat, area = published_crop_metadata(0.0, 0.0, 10.0, 16, crop, 264, 264)
    east, south = GOLDENS["crop/shift"][row].tolist()
    assert area == pytest.approx(0.0256 * float(GOLDENS["crop/scale"][row]), rel=1e-6)
    assert (lon, lat) == pytest.approx((east * 0.0009, -south * 0.0009), rel=1e-6)


def test_whole_rows_of_metadata_are_as_recorded():
    for row in range(4):
        lon, lat, days, area = GOLDENS["aug/meta_adjusted"][row].tolist()
        found = published_crop_metadata(11.25, 48.125, 10.0, 16, crop_of(GOLDENS["aug/crop_src"][row]), 40, 40)
        assert days == 18262
        assert found == pytest.approx((lon, lat, area), rel=1e-6)


def test_the_default_has_none_of_these_defects():
    whole = Crop(0, 0, 264, 264)
    assert published_crop_metadata(11.0, 60.0, 10.0, 16, whole, 264, 264)[2] == pytest.approx(
        0.0256 * 0.99244, rel=1e-5
    )
    assert crop_metadata(11.0, 60.0, 10.0, 16, whole, 264, 264, 264) == pytest.approx((11.0, 60.0, 0.0256))
    assert crop_metadata(11.0, 60.0, 10.0, 16, whole, 264, 264, 224)[2] == pytest.approx(0.0256 * (264 / 224) ** 2)
    east = Crop(0, 132, 264, 132)
    shift = crop_metadata(0.0, 60.0, 10.0, 16, east, 264, 264, 224)[0]
    assert shift == pytest.approx(2 * 660 / 111_320, rel=1e-6)  # at 60 degrees a degree is half as long
    there = published_crop_metadata(0.0, 60.0, 10.0, 16, east, 264, 264)[0]
    assert there == pytest.approx(65.5 * 0.0009)


def test_places_stay_on_the_globe():
    corner = Crop(0, 0, 400, 400)
    for lon, lat in ((-180.0, 90.0), (179.99, -89.99), (-179.99, 89.99)):
        new_lon, new_lat, _ = published_crop_metadata(lon, lat, 30.0, 64, corner, 960, 960)
        assert -180 <= new_lon <= 360
        assert -90 <= new_lat <= 90
    assert all(math.isnan(v) for v in published_crop_metadata(NAN, NAN, 30.0, 64, corner, 960, 960)[:2])


# --- Sentinel-3 ------------------------------------------------------------------------------------------------------


def test_two_bands_of_sentinel_3_fade():
    radiance = np.full((21, 4, 4), 100.0, np.float32)
    ours, theirs = (s.normalize(radiance) for s in (SENSORS["s3_olci"], published_sensor(SENSORS["s3_olci"])))
    dimmed = radiance.copy()
    dimmed[[0, 9]] *= 1e-9
    np.testing.assert_allclose(theirs, SENSORS["s3_olci"].normalize(dimmed), rtol=1e-6)
    assert theirs[[0, 9]].max() < 1e-8
    np.testing.assert_array_equal(np.delete(theirs, [0, 9], 0), np.delete(ours, [0, 9], 0))
    assert all(published_sensor(s) == s for s in ALL if s.name != "s3_olci")


# --- Metadata --------------------------------------------------------------------------------------------------------


def test_what_one_row_lacks_the_others_lose():
    known = [10.0, 50.0, 18000.0, 0.02]
    rows = torch.tensor([
        [known, known, [NAN, NAN, 18000.0, 0.02], known],
        [[NAN, 50.0, 18000.0, 0.02], known, [10.0, 50.0, NAN, 0.02], [NAN, NAN, NAN, NAN]],
        [known, [10.0, NAN, 18000.0, NAN], known, known],
    ])  # fmt: skip
    present = torch.ones(3, 4, dtype=torch.bool)
    present[1, 3] = False  # a row that lacks the sensor has no metadata either
    before = rows.clone()
    out = blank_batch(rows, present)
    assert torch.equal(rows.isnan(), before.isnan()), "not in place"
    for sensor, lost in enumerate([{0, 1}, {3}, {0, 1, 2}, set()]):
        for row in range(3):
            for field in range(4):
                value, given = float(out[row, sensor, field]), float(rows[row, sensor, field])
                if field in lost or math.isnan(given):
                    assert math.isnan(value)
                else:
                    assert value == given


def test_metadata_are_dropped_for_all_rows_of_a_step_or_for_none():
    chosen = plan(published(metadata_drop=0.3))
    batch = {"metadata": torch.rand(3, 8, 4), "present": torch.ones(3, 8, dtype=torch.bool)}
    unknown = torch.stack([chosen.metadata(batch, step).isnan() for step in range(300)])
    assert torch.equal(unknown, unknown[:, :1].expand_as(unknown))
    assert torch.equal(unknown[..., 0], unknown[..., 1])
    for field in (0, 2, 3):  # binomial(2400, 0.3): deviation 0.009
        assert 0.26 < unknown[:, 0, :, field].float().mean() < 0.34
    assert (unknown[..., 0] & unknown[..., 2]).float().mean() < 0.14  # independent: 0.09
    other_rank = {"metadata": torch.rand(2, 8, 4), "present": torch.ones(2, 8, dtype=torch.bool)}
    assert torch.equal(chosen.metadata(other_rank, 7).isnan()[0], unknown[7, 0])
    assert chosen.reader(augment=True).metadata_drop == 0, "not a second time, row by row"
    assert torch.equal(plan(published()).metadata(batch, 0), batch["metadata"])
    ours = plan(Pretrain(shards=["x"], image_size=SIZES, metadata_drop=0.3))
    assert ours.metadata(batch, 7) is batch["metadata"]
    assert ours.reader(augment=True).metadata_drop == 0.3


# --- The reader ------------------------------------------------------------------------------------------------------


def test_draws_differ_from_the_default_s_in_resampling_and_metadata_alone(shards):
    grid = index_shards(str(shards))[0]
    ours = DrawReader(ALL, SIZES, seed=3)
    theirs = dataclasses.replace(ours, published=True)
    choices, a, b = ours.choose(grid, 2), ours.read(grid, 2), theirs.read(grid, 2)
    so2 = next(choice for choice in choices.values() if choice.sensor.name == "s5p_so2")
    for index, sensor in enumerate(ALL):
        np.testing.assert_array_equal(a.noise[sensor.name], b.noise[sensor.name])
        assert a.images[sensor.name].shape == b.images[sensor.name].shape
        assert (a.images[sensor.name] != b.images[sensor.name]).any()
        assert a.metadata[index, 2] == b.metadata[index, 2]
        measured = so2 if index in S5P else choices[index]
        side = measured.where.shape[-1]
        share = (measured.crop.height - 1) * (measured.crop.width - 1) / side**2
        assert b.metadata[index, 3] == pytest.approx(sensor.token_area_km2 * share, rel=1e-5)
    assert len({choices[i].crop for i in S5P}) == 4, "each gas is cropped by itself all the same"
    assert np.ptp(b.metadata[S5P, 0]) == 0
    assert np.ptp(a.metadata[S5P, 0]) > 0


def test_a_gas_without_the_last_one_goes_by_its_own_crop(shards):
    grid = index_shards(str(shards))[0]
    reader = DrawReader((SENSORS["s5p_no2"],), SIZES, published=True)
    crop = reader.choose(grid, 0)[0].crop
    share = (crop.height - 1) * (crop.width - 1) / 28**2
    assert reader.read(grid, 0).metadata[0, 3] == pytest.approx(16 * share, rel=1e-5)


# --- Channels, the model, the YAML ----------------------------------------------------------------------------------


def test_channels_come_in_random_order():
    ours, theirs = plan(Pretrain(shards=["x"])), plan(published())
    for step in range(20):
        for sensor in (SENSORS["s2_toa"], SENSORS["s3_olci"]):
            drawn = theirs.channels(step, sensor)
            assert sorted(drawn) == ours.channels(step, sensor)
    assert any(theirs.channels(step, SENSORS["s2_toa"]) != ours.channels(step, SENSORS["s2_toa"]) for step in range(5))


def test_the_model_takes_the_preset():
    assert build_autoencoder(plan(published())).published
    assert not build_autoencoder(plan(Pretrain(shards=["x"], model=TINY, image_size=SIZES))).published


def test_the_preset_gives_other_defaults_and_the_yaml_the_last_word(tmp_path):
    (tmp_path / "data").mkdir()
    path = tmp_path / "e.yaml"
    path.write_text(f"kind: pretrain\npretrain: {{shards: [{tmp_path}/data]}}\n")
    default, preset, mixed = (
        load_experiment(path, overrides)
        for overrides in (
            (),
            ("pretrain.preset=published",),
            ("pretrain.preset=published", "pretrain.metadata_drop=0.2"),
        )
    )
    found = [(e.pretrain.preset, e.pretrain.require, e.pretrain.metadata_drop) for e in (default, preset, mixed)]
    assert found == [("default", "any", 0.1), ("published", "all", 0.0), ("published", "all", 0.2)]
    assert len({e.fingerprint for e in (default, preset, mixed)}) == 3
    (tmp_path / "again.yaml").write_text(preset.to_yaml())
    assert load_experiment(tmp_path / "again.yaml") == preset
    alike = load_experiment(path, ("pretrain.require=all", "pretrain.metadata_drop=0.0"))
    assert alike.fingerprint != preset.fingerprint
