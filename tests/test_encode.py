"""Encoding images end to end with a tiny encoder; parts against independent computations."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from rich.console import Console
from safetensors.torch import save_file

from copernicus.datasets.geotiff import read_image
from copernicus.datasets.sensors import InputError, get_sensor
from copernicus.models import create_encoder, create_model
from copernicus.platform.encode import cut_windows, encode_command, encode_image, fit_to_patches
from copernicus.platform.quicklook import Window, component_map, principal_components, stretch

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}
DATA = Path(os.environ.get("COPERNICUS_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real images in {DATA} (set COPERNICUS_REAL_DATA)")


def write_s1(path, height=40, width=56, crs="EPSG:32633", seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(-15, 3, (2, height, width)).astype("float32")
    transform = from_origin(500000, 5000000, 10, 10)
    with rasterio.open(
        path, "w", driver="GTiff", count=2, height=height, width=width, dtype="float32", crs=crs, transform=transform
    ) as file:
        file.write(values)
        file.descriptions = ("VV", "VH")
    return values


def run(images, out, sensor="s1_grd", weights=None, model="copernicus_fm_small", sizes=TINY, **options):
    console = Console(file=io.StringIO(), width=200)
    summary = encode_command(images, sensor, weights, out, model, sizes, console, **options)
    return summary, console.file.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "size"), [(264, 264, 224), (38, 54, 28), (224, 224, 224), (10, 90, 32), (96, 97, 96)]
)
def test_windows_cover_the_image_and_stay_inside(height, width, size):
    windows = cut_windows(height, width, size)
    seen = np.zeros((height, width), int)
    for w in windows:
        assert (w.height, w.width) == (min(height, size), min(width, size))
        seen[w.slices] += 1
        assert w.row + w.height <= height
        assert w.col + w.width <= width
    assert seen.min() == 1
    assert len(windows) == -(-height // size) * -(-width // size)
    assert len(set(windows)) == len(windows)


@pytest.mark.parametrize(("side", "expected"), [(64, 64), (120, 128), (5, 16), (40, 32), (41, 48)])
def test_images_are_fitted_to_whole_patches(side, expected):
    assert fit_to_patches(torch.zeros(1, 1, side, side), 16).shape == (1, 1, expected, expected)


def test_rows_hold_what_the_model_says_of_each_window(tmp_path):
    values = write_s1(tmp_path / "S1A_20200102T030405.tif")
    out = tmp_path / "new" / "e.parquet"
    summary, text = run([tmp_path / "S1A_20200102T030405.tif"], out, image_size=32)
    table = pq.read_table(out)
    rows = table.to_pylist()
    assert summary.windows == len(rows) == 4
    assert [(r["row"], r["col"]) for r in rows] == [(0, 0), (0, 24), (8, 0), (8, 24)]
    assert str(rows[0]["date"]) == "2020-01-02"
    assert rows[0]["token_area_km2"] == pytest.approx(0.16**2)
    model = create_model("copernicus_fm_small", **TINY).eval()
    for r in rows:
        window = values[None, :, r["row"] : r["row"] + 32, r["col"] : r["col"] + 32].copy()
        metadata = torch.tensor([[r["lon"], r["lat"], 18263.0, 0.0256]], dtype=torch.float64)  # 2020-01-02
        with torch.inference_mode():
            z_BD = model.encode(torch.from_numpy(window), get_sensor("s1_grd"), metadata)
        assert r["embedding"] == pytest.approx(z_BD[0].tolist(), abs=1e-4)
    # Window centres 240 m apart, on the meridian's east: x = 500000 + 160 m is 0.002 degrees east of 15 E.
    assert rows[0]["lon"] == pytest.approx(15 + 160 / 0.9996 / (111320 * np.cos(np.radians(45.15))), abs=1e-5)
    assert rows[1]["lon"] > rows[0]["lon"]
    assert rows[2]["lat"] < rows[0]["lat"]
    assert table.schema.metadata[b"weights"] == b"random"
    assert "RANDOM WEIGHTS" in text
    assert [p.name for p in summary.quicklooks] == ["e_S1A_20200102T030405.png"]
    assert summary.quicklooks[0].read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.parent.iterdir()) == ["e.parquet", "e_S1A_20200102T030405.png"]


@pytest.mark.parametrize("name", ["vit_small", "dofa_small", "band_means:BandMeans"])
def test_other_encoders_serve_too(name, tmp_path, monkeypatch):
    (tmp_path / "band_means.py").write_text(
        "import torch\n"
        "class BandMeans(torch.nn.Module):\n"
        "    inputs, takes = 'anything', staticmethod(lambda sensor: True)\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(()))\n"
        "    def encode(self, x, sensor, metadata=None, normalize=True):\n"
        "        return self.scale * x.mean((-2, -1))\n"
        "    def encode_dense(self, x, sensor, metadata=None, normalize=True):\n"
        "        return [self.scale * torch.nn.functional.avg_pool2d(torch.nan_to_num(x), 8)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = write_s1(tmp_path / "a.tif")
    own = ":" in name
    summary, text = run(
        [tmp_path / "a.tif"], tmp_path / "e.parquet", model=name, sizes={} if own else TINY, image_size=32
    )
    rows = pq.read_table(summary.embeddings).to_pylist()
    assert summary.embed_dim == len(rows[0]["embedding"]) == (2 if own else TINY["embed_dim"])
    assert ("RANDOM WEIGHTS" in text) != own
    if own:
        assert rows[0]["embedding"] == pytest.approx(values[:, :32, :32].mean((1, 2)), rel=1e-4)
    else:
        encoder = create_encoder(name, get_sensor("s1_grd"), **TINY)
        with torch.inference_mode():
            z_BD = encoder.encode(torch.from_numpy(values[None, :, :32, :32].copy()), get_sensor("s1_grd"))
        assert rows[0]["embedding"] == pytest.approx(z_BD[0].tolist(), abs=1e-4)


def test_unknown_place_and_date_are_null_and_said(tmp_path):
    write_s1(tmp_path / "a.tif", crs=None)
    summary, text = run([tmp_path / "a.tif"], tmp_path / "e.parquet")
    (row,) = pq.read_table(summary.embeddings).to_pylist()
    assert row["lon"] is row["lat"] is row["date"] is row["token_area_km2"] is None
    assert np.isfinite(row["embedding"]).all()
    assert text.count("not found") == 3  # pixel, place, date


def test_weights_are_used(tmp_path):
    write_s1(tmp_path / "a.tif")
    other = create_model("copernicus_fm_small", **TINY, seed=1)
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    random, _ = run([tmp_path / "a.tif"], tmp_path / "r.parquet")
    loaded, text = run([tmp_path / "a.tif"], tmp_path / "l.parquet", weights=str(tmp_path / "w.safetensors"))
    assert "RANDOM" not in text
    first, second = (pq.read_table(s.embeddings)["embedding"][0].as_py() for s in (random, loaded))
    assert np.abs(np.subtract(first, second)).max() > 0.1
    assert pq.read_table(loaded.embeddings).schema.metadata[b"weights"].endswith(b"w.safetensors")


def test_windows_without_values_are_left_out_and_counted(tmp_path):
    values = write_s1(tmp_path / "a.tif", 32, 64)
    values[:, :, :32] = np.nan
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write(values)
    summary, text = run([tmp_path / "a.tif"], tmp_path / "e.parquet", image_size=32)
    assert (summary.windows, summary.skipped_windows) == (1, 1)
    assert pq.read_table(summary.embeddings)["col"].to_pylist() == [32]
    assert "1 windows without a valid value left out" in text
    assert "50.0%" in text


def test_a_wrong_image_leaves_nothing_behind(tmp_path):
    write_s1(tmp_path / "good.tif")
    (tmp_path / "bad.tif").write_bytes(b"II*\0 cut off")
    out = tmp_path / "out" / "e.parquet"
    with pytest.raises(InputError, match=r"2 of 3 images.*nothing was written") as error:
        run([tmp_path / "good.tif", tmp_path / "bad.tif", tmp_path / "none.tif"], out)
    assert "bad.tif" in str(error.value)
    assert "none.tif" in str(error.value)
    assert "good.tif" not in str(error.value)
    assert not out.parent.exists()
    for images, target, match in [([], out, "no image"), ([tmp_path / "good.tif"], tmp_path / "e.csv", "parquet")]:
        with pytest.raises(InputError, match=match):
            run(images, target)


def test_same_names_do_not_overwrite_each_other(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_s1(tmp_path / folder / "x.tif", seed=ord(folder))
    summary, _ = run([tmp_path / "a/x.tif", tmp_path / "b/x.tif"], tmp_path / "e.parquet")
    assert [p.name for p in summary.quicklooks] == ["e_x.png", "e_x-2.png"]
    assert all(p.is_file() for p in summary.quicklooks)


def test_patch_kernel_larger_than_the_window(tmp_path):
    write_s1(tmp_path / "a.tif")
    with pytest.raises(InputError, match="do not fit"):
        run([tmp_path / "a.tif"], tmp_path / "e.parquet", image_size=8)


def test_tokens_of_an_image_without_contrast_are_position_alone(tmp_path):
    """What is taken off the tokens is all there is when the image is the sensor's mean, which a blank window also is."""
    write_s1(tmp_path / "a.tif", 32, 32)
    sensor = get_sensor("s1_grd")
    with rasterio.open(tmp_path / "a.tif", "r+") as file:
        file.write(np.broadcast_to(np.array(sensor.mean, "float32")[:, None, None], (2, 32, 32)))
    model = create_model("copernicus_fm_small", **TINY).eval()
    encoded = encode_image(model, read_image(tmp_path / "a.tif", sensor))
    assert np.abs(encoded.tokens[0]).max() < 1e-4
    assert encoded.image_share < 1e-6
    write_s1(tmp_path / "b.tif", 32, 32)
    assert encode_image(model, read_image(tmp_path / "b.tif", sensor)).image_share > 1e-3


def test_principal_components_agree_with_svd():
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(200, 6)) @ np.diag([9, 5, 3, 1, 1, 0.5]) @ rng.normal(size=(6, 6)) + 4
    mean_D, axes_DK, shares = principal_components(x_ND)
    _, singular, vt = np.linalg.svd(x_ND - x_ND.mean(0), full_matrices=False)
    assert mean_D == pytest.approx(x_ND.mean(0))
    assert shares == pytest.approx((singular**2 / (singular**2).sum())[:3])
    assert np.abs((axes_DK * vt[:3].T).sum(0)) == pytest.approx(np.ones(3))
    assert (axes_DK.max(0) == np.abs(axes_DK).max(0)).all()


def test_components_lie_where_their_tokens_do():
    """The left half of the image has one token value, the right half another; a hole stays a hole."""
    rng = np.random.default_rng(0)
    left_D, right_D = rng.normal(size=(2, 8))
    windows = [Window(0, 0, 16, 16), Window(0, 8, 16, 16), Window(0, 16, 16, 16)]
    halves = [(left_D, left_D), (left_D, right_D), (right_D, right_D)]  # columns of 8 pixels
    tokens = [np.stack([np.stack(pair, axis=-1)] * 2, axis=1).astype(np.float32) for pair in halves]
    valid = np.ones((16, 32), bool)
    valid[:4, :4] = False
    rgb, shares = component_map((16, 32), windows, tokens, valid)
    assert rgb.shape == (16, 32, 3)
    assert np.isnan(rgb[:4, :4]).all()
    assert np.isfinite(rgb[valid]).all()
    assert shares[0] == pytest.approx(1)
    assert np.ptp(rgb[8:, :8, 0]) < 0.05
    assert np.ptp(rgb[:, -8:, 0]) < 0.05
    assert abs(rgb[10, 0, 0] - rgb[10, -1, 0]) > 0.9


def test_stretch_is_robust_to_outliers():
    x = np.linspace(0, 1, 1000).reshape(10, 100)
    x[0, 0], x[9, 99], x[5, 5] = -1e6, 1e6, np.nan
    y = stretch(x)
    assert np.isnan(y[5, 5])
    assert np.nanmin(y) == 0
    assert np.nanmax(y) == 1
    assert np.nanmedian(y) == pytest.approx(0.5, abs=0.02)


@real
@pytest.mark.parametrize(
    ("sensor", "pattern", "windows"),
    [
        ("s2_toa", "copernicusfm_tile/*.tif", 4),
        ("s2_toa", "terramind_examples/S2L2A/38*.tif", 1),
        ("s1_grd", "terramind_examples/S1RTC/38*.tif", 1),
        ("s3_olci", "s3_olci_xcube/*.nc", 4),
        ("s3_olci", "s3_olci_xcube/derived/s3_olci/*.tif", 4),
        ("s5p_no2", "s5p/nl*/*T112745*.nc", 4),
        ("dem", "copdem_grenoble/*.tif", 1),
    ],
)
def test_real_images(tmp_path, sensor, pattern, windows):
    (path,) = DATA.glob(pattern)
    summary, _ = run([path], tmp_path / "e.parquet", sensor=sensor)
    assert summary.windows == windows
    rows = pq.read_table(summary.embeddings).to_pylist()
    assert all(np.isfinite(r["embedding"]).all() and r["lat"] is not None for r in rows)
    with rasterio.open(summary.quicklooks[0]) as picture:  # PNG
        pixels = picture.read()
    assert pixels.std() > 30
