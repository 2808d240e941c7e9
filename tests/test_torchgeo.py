"""Exports in TorchGeo's own model (a second implementation of the published one), where TorchGeo is installed.

It is no dependency: it needs a torchvision that fits torch. Its layer norms have eps 1e-5.
"""

from __future__ import annotations

import pytest
import torch

from copernicus.datasets.sensors import SENSORS, Sensor
from copernicus.models import create_model, load_weights
from copernicus.platform.export import export

pytestmark = pytest.mark.slow

try:
    from torchgeo.models import CopernicusFM, copernicusfm_base
except Exception as error:  # an ImportError, or what a torchvision of another torch raises
    pytest.skip(f"TorchGeo does not import here: {error}", allow_module_level=True)

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 4}


def checkpoint(path, name, **sizes):
    decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
    model = create_model(f"{name}_mae", **sizes, **decoder, seed=5)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # norms, biases and tokens that start as 0 or 1 would hide their names
            if parameter.ndim == 1 or parameter.shape[0] == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    torch.save({"model": model.state_dict(), "architecture": {"name": name, **sizes}}, path)
    return path


def inputs(sensor: Sensor, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(2, sensor.channels, sensor.patch_kernel * 6, sensor.patch_kernel * 6, generator=rng)
    known = torch.tensor([[11.5, 48.1, 19000.0, sensor.token_area_km2], [-70.0, -33.0, 18500.0, sensor.token_area_km2]])
    return x_BCHW, known


def theirs_of(model, sensor: Sensor, x_BCHW, metadata, language):
    spectral = {"wavelengths": list(sensor.wavelengths_nm), "bandwidths": list(sensor.bandwidths_nm)}
    variable = {
        "input_mode": "variable",
        "language_embed": language.vector(sensor.variable) if sensor.variable else None,
    }
    return model.forward_features(
        x_BCHW, metadata, kernel_size=sensor.patch_kernel, **(spectral if sensor.spectral else variable)
    )


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("pool", ["mean", "token"])
def test_it_loads_strictly_and_gives_the_same_features(tmp_path, pool, suffix):
    from safetensors.torch import load_file

    out = tmp_path / f"w{suffix}"
    export(checkpoint(tmp_path / "c.pt", "copernicus_fm_small", **SMALL), out, pool=pool)
    ours = create_model("copernicus_fm_small", **SMALL, global_pool=pool == "mean", norm_eps=1e-5).eval()
    load_weights(ours, out)
    theirs = CopernicusFM(**SMALL, global_pool=pool == "mean").eval()
    state = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)["model"]
    theirs.load_state_dict(state, strict=True)
    for name in ("s1_grd", "s2_toa", "s3_olci", "s5p_no2", "dem"):
        sensor = SENSORS[name]
        x_BCHW, known = inputs(sensor)
        for metadata in (known, torch.full_like(known, torch.nan)):
            with torch.inference_mode():
                expected = theirs_of(theirs, sensor, x_BCHW, metadata, ours.language)
                found = ours.forward_features(x_BCHW, metadata, sensor=sensor)
            difference = float((found - expected).abs().max())
            print(f"{name} {pool} {suffix}: {difference:.1e}")
            assert difference < 5e-5, name


def test_its_base_model_takes_a_base_export(tmp_path):
    """As its own loader does: without strictness, and asserting what may be missing."""
    path = checkpoint(tmp_path / "c.pt", "copernicus_fm_base")
    for pool in ("mean", "none"):
        export(path, tmp_path / f"{pool}.pth", pool=pool)
        theirs = copernicusfm_base().eval()
        state = torch.load(tmp_path / f"{pool}.pth", weights_only=True)["model"]
        missing, unexpected = theirs.load_state_dict(state, strict=False)
        assert not unexpected
        assert set(missing) == ({"fc_norm.weight", "fc_norm.bias"} if pool == "none" else set())
        ours = create_model("copernicus_fm_base", norm_eps=1e-5).eval()
        load_weights(ours, tmp_path / f"{pool}.pth")
        x_BCHW, known = inputs(SENSORS["s2_toa"])
        with torch.inference_mode():
            expected = theirs_of(theirs, SENSORS["s2_toa"], x_BCHW, known, ours.language)
            difference = float((ours.forward_features(x_BCHW, known, sensor=SENSORS["s2_toa"]) - expected).abs().max())
        print(f"base {pool}: {difference:.1e}")
        assert difference < 5e-5
