"""The encoder against the public implementation's outputs (tests/goldens) and against properties it must have."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models.fourier import fourier_expansion
from copernicus.models.language import LanguageTable
from copernicus.models.patch_embed import KERNEL_SCALE, resize_kernel
from copernicus.models.position import resize_table, sincos_table
from copernicus.models.vit import CopernicusFMViT, default_levels

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from hashrand import small_weight  # noqa: E402

INDEX = json.loads((GOLDENS / "index.json").read_text())
KEYS = json.loads((GOLDENS / "keys_vit_base.json").read_text())
INPUTS = load_file(GOLDENS / "encoder_inputs.safetensors")
OUTPUTS = load_file(GOLDENS / "encoder_outputs.safetensors")
SEGMENTATION = load_file(GOLDENS / "seg_outputs.safetensors")
MISC = load_file(GOLDENS / "misc.safetensors")
MAE_INPUTS = load_file(GOLDENS / "mae_inputs.safetensors")
LANGUAGE = LanguageTable(
    {SENSORS[key.split("/")[1]].variable: v for key, v in MAE_INPUTS.items() if key.startswith("language/")}
)
LANGUAGE_NO2 = LanguageTable({SENSORS["s5p_no2"].variable: INPUTS["language/s5p_no2"]})
CASES = INDEX["encoder"]["definitions"]


@functools.cache
def golden_encoder(global_pool: bool = True, cartesian: bool = False, norm_eps: float = 1e-6) -> CopernicusFMViT:
    model = CopernicusFMViT(
        image_size=64,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=10,
        global_pool=global_pool,
        cartesian=cartesian,
        norm_eps=norm_eps,
        language=LANGUAGE_NO2,
    )
    state = {k: torch.from_numpy(small_weight(k, v.shape)) for k, v in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def golden_case(case: str, variant: str) -> tuple[torch.Tensor, torch.Tensor, Sensor, int]:
    definition = CASES[case]
    rows = [[math.nan if v == "nan" else v for v in row] for row in INDEX["encoder"]["meta"][variant]]
    metadata = torch.tensor([[math.nan if v is None else v for v in row] for row in rows])
    if variant == "full":
        metadata[:, 3] = definition["area_km2"]
    image = INPUTS[definition["input"]].float()
    return image, metadata, SENSORS[definition["table_or_language"]], definition["kernel_size"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", INDEX["encoder"]["cases"])
@torch.inference_mode()
def test_outputs_equal_the_published_implementation(name):
    case, variant, options = name.split("/")
    pool, _, option = options.partition("_")
    model = golden_encoder(pool == "gp1", option == "cartesian", 1e-5 if option == "eps1e-5" else 1e-6)
    image, metadata, sensor, kernel = golden_case(case, variant)
    logits, features = model(image, metadata, sensor=sensor, patch_kernel=kernel)
    assert_close(features, OUTPUTS[f"{name}/features"], 1e-5)
    assert_close(logits, OUTPUTS[f"{name}/logits"], 1e-5)


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_intermediates_and_patch_tokens_equal_the_published_implementation(case):
    model = golden_encoder()
    image, metadata, sensor, kernel = golden_case(case, "full")
    _, levels = model.forward_tokens(image, metadata, sensor=sensor, patch_kernel=kernel, levels=(0, 1))
    for i, level in enumerate(levels):
        assert_close(level, OUTPUTS[f"{case}/full/gp1/intermediate{i}"], 2e-5)
    tokens, code = model.patch_tokens(image, sensor, kernel)
    assert_close(tokens.flatten(2).transpose(1, 2), OUTPUTS[f"{case}/patch_tokens"], 2e-5)
    assert_close(code, OUTPUTS[f"{case}/hyper_waves"], 1e-5)
    embed = model.patch_embed_spectral if sensor.spectral else model.patch_embed_variable
    kernels, bias = embed.weight_generator(code)
    assert_close(embed.weight_generator.fc_bias(bias), OUTPUTS[f"{case}/hyper_bias"], 1e-5)
    assert_close(kernels[0].unflatten(0, (16, 16))[:4, :4], OUTPUTS[f"{case}/hyper_weight_c0"], 1e-5)
    assert KERNEL_SCALE == 0.01
