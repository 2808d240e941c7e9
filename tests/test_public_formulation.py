"""The benchmark's rebuilt public formulation against the public implementation's outputs (tests/goldens)."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copernicus.datasets.sensors import SENSORS
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.vit import CopernicusFMViT

HERE = Path(__file__).parent
GOLDENS = HERE / "goldens"
sys.path[:0] = [str(GOLDENS), str(HERE / "benchmarks")]
from hashrand import hash_uniform, small_weight  # noqa: E402
from public_encoder import Expansion, PublicEncoder, resized_kernel, resized_positions  # noqa: E402
from public_formulation import RGB, PublicAutoencoder, PublicLoop, optimizer_groups  # noqa: E402

INDEX = json.loads((GOLDENS / "index.json").read_text())
INPUTS = load_file(GOLDENS / "encoder_inputs.safetensors")
OUTPUTS = load_file(GOLDENS / "encoder_outputs.safetensors")
MISC = load_file(GOLDENS / "misc.safetensors")
MAE_INPUTS = load_file(GOLDENS / "mae_inputs.safetensors")
MAE = load_file(GOLDENS / "mae_normpix.safetensors")
CONFIG = INDEX["mae"]["configs"]["normpix"]
LANGUAGE = {SENSORS[k.split("/")[1]].variable: v.float() for k, v in MAE_INPUTS.items() if k.startswith("language/")}
SMALL = {"image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 20, "decoder_depth": 1, "decoder_num_heads": 4}
ALL_SENSORS = {**SENSORS, RGB: SENSORS["s2_toa"].select((3, 2, 1))}
SAMPLES = {name: MAE_INPUTS[name].float() for name in SENSORS}
SAMPLES[RGB] = SAMPLES["s2_toa"][:, [3, 2, 1]]
METADATA = {name: torch.tensor(CONFIG["metas_after_forward"][name]) for name in ALL_SENSORS}
NOISE = {name: MAE[f"{name}/noise"] for name in ALL_SENSORS}
CHANNELS = {name: MAE[f"{name}/selected_channels"].tolist() for name in ("s2_toa", "s3_olci")}


def assert_close(actual, expected, atol=0.0, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def with_golden_weights(model):
    model.load_state_dict({k: torch.from_numpy(small_weight(k, v.shape)) for k, v in model.state_dict().items()})
    return model


def teacher(rgb):
    weight, bias = (
        torch.from_numpy(small_weight(f"teacher.proj.{k}", s)) for k, s in (("weight", (768, 3)), ("bias", (768,)))
    )
    return torch.tanh(torch.nn.functional.avg_pool2d(rgb, 14, 14).flatten(2).transpose(1, 2) @ weight.T + bias)


@functools.cache
def step():
    """The model, its gradients, and what one step of its loop at the goldens' settings gives."""
    model = with_golden_weights(PublicAutoencoder(LANGUAGE, **SMALL, **DECODER))
    gradients, marks = {}, []

    def mark(part):
        marks.append(part)
        if part == "backward":
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    loop = PublicLoop(model, CONFIG["after_one_adamw_step"]["lr"], mark, autocast=False)
    out = loop.step(SAMPLES, ALL_SENSORS, METADATA, NOISE, CHANNELS, teacher)
    assert marks == ["forward", "backward", "optimiser"]
    return model, gradients, out


@pytest.mark.parametrize("name", INDEX["encoder"]["cases"])
@torch.no_grad()
def test_encoder_equals_the_public_implementation(name):
    case, variant, options = name.split("/")
    pool, _, option = options.partition("_")
    model = PublicEncoder(
        {SENSORS["s5p_no2"].variable: INPUTS["language/s5p_no2"].float()},
        **SMALL,
        num_classes=10,
        global_pool=pool == "gp1",
        cartesian=option == "cartesian",
        norm_eps=1e-5 if option == "eps1e-5" else 1e-6,
    )
    definition = INDEX["encoder"]["definitions"][case]
    rows = INDEX["encoder"]["meta"][variant]
    metadata = torch.tensor([[math.nan if v in ("nan", None) else v for v in row] for row in rows])
    if variant == "full":
        metadata[:, 3] = definition["area_km2"]
    image, sensor = INPUTS[definition["input"]].float(), SENSORS[definition["table_or_language"]]
    model = with_golden_weights(model).eval()
    logits, features = model(image, metadata, sensor=sensor, patch_kernel=definition["kernel_size"])
    assert_close(features, OUTPUTS[f"{name}/features"], 1e-5)
    assert_close(logits, OUTPUTS[f"{name}/logits"], 1e-5)


@pytest.mark.parametrize("name", SENSORS)
def test_a_sensor_s_part_of_the_step_equals_the_public_implementation(name):
    out = step()[2]
    assert_close(out.masks[name], MAE[f"{name}/mask"])
    assert_close(out.preds[name].detach(), MAE[f"{name}/pred"], 2e-6)
    assert_close(out.losses[name].detach().reshape(1), MAE[f"{name}/loss"], rtol=1e-5)


@pytest.mark.parametrize("name", ALL_SENSORS)
@torch.no_grad()
def test_latents_equal_the_public_implementation(name):
    model = with_golden_weights(PublicAutoencoder(LANGUAGE, **SMALL, **DECODER))
    image, sensor = SAMPLES[name], ALL_SENSORS[name]
    if name in CHANNELS:
        image, sensor = image[:, CHANNELS[name]], sensor.select(CHANNELS[name])
    ratio = 0.0 if name == RGB else CONFIG["mask_ratio"]
    latent, _, restore, _ = model.encode(image, METADATA[name], sensor, NOISE[name], ratio)
    assert_close(latent, MAE[f"{name}/latent"], 1e-5)
    assert torch.equal(restore, MAE[f"{name}/ids_restore"])


def test_losses_equal_the_public_implementation():
    out = step()[2]
    for value, name in ((out.total, "loss_total"), (out.mae, "loss_mae"), (out.distill, "loss_distill")):
        assert_close(value.detach().reshape(1), MAE[name], rtol=1e-5)


def test_gradients_equal_the_public_implementation():
    model, gradients, _ = step()
    for name, parameter in model.named_parameters():
        expected = CONFIG["grads"][name]
        if expected is None:
            assert name not in gradients, name
            continue
        assert float(gradients[name].norm()) == pytest.approx(expected["l2"], rel=1e-4), name
        probe = float((gradients[name] * torch.from_numpy(hash_uniform(f"probe/{name}", parameter.shape))).sum())
        assert probe == pytest.approx(expected["probe"], abs=1e-4 * expected["l2"]), name
    for key in (k for k in MAE if k.startswith("grad/")):
        assert_close(gradients[key.removeprefix("grad/")], MAE[key], 1e-4 * float(MAE[key].abs().max()))


def test_a_step_of_the_loop_equals_the_public_implementation():
    model, expected = step()[0], CONFIG["after_one_adamw_step"]["params"]
    for name, parameter in model.named_parameters():
        assert float(parameter.detach().norm()) == pytest.approx(expected[name]["l2"], rel=1e-4), name
        probe = float((parameter.detach() * torch.from_numpy(hash_uniform(f"probe/{name}", parameter.shape))).sum())
        assert probe == pytest.approx(expected[name]["probe"], abs=1e-4 * expected[name]["l2"]), name


def test_weight_decay_groups_are_the_public_ones():
    model = step()[0]
    names = {id(p): n for n, p in model.named_parameters()}
    plain, decayed = ({names[id(p)] for p in group["params"]} for group in optimizer_groups(model, 0.05))
    assert plain == {n for n in CONFIG["no_decay"] if not n.startswith("teacher.")}
    assert decayed == {n for n in CONFIG["decay"] if not n.startswith("teacher.")}


@pytest.mark.parametrize("size", [4, 8, 14, 32, 64])
def test_resized_kernels_equal_the_public_ones(size):
    assert_close(resized_kernel(MISC["pi_resize/in"], size), MISC[f"pi_resize/{size}"], 5e-5)


@pytest.mark.parametrize("side", [7, 12, 15, 20, 28])
def test_resized_positions_equal_the_public_ones(side):
    assert_close(resized_positions(MISC["pos_resize/in"], side * side), MISC[f"pos_resize/{side}"], 1e-5)


@pytest.mark.parametrize("index", range(9))
def test_expansions_equal_the_public_ones(index):
    settings = INDEX["misc"][f"fourier/{index}"]
    expand = Expansion(settings["lower"], settings["upper"], settings["assert_range"])
    assert_close(expand(MISC[f"fourier/{index}/x"], settings["d"]), MISC[f"fourier/{index}/y"], 1e-6)


@pytest.mark.parametrize(("value", "fits"), [(721.0, False), (5e-5, False), (0.0, True), (-12.0, True)])
def test_an_expansion_refuses_what_the_public_one_refuses(value, fits):
    if fits:
        assert torch.isfinite(Expansion(1e-4, 720)(torch.tensor([value]), 16)).all()
    else:
        with pytest.raises(ValueError, match="outside"):
            Expansion(1e-4, 720)(torch.tensor([value, 3.0]), 16)


@torch.no_grad()
def test_one_unknown_row_blanks_the_batch_as_in_the_public_encoder():
    model = with_golden_weights(PublicEncoder(LANGUAGE, **SMALL)).eval()
    metadata = METADATA["s1_grd"].clone()
    image, sensor = SAMPLES["s1_grd"], SENSORS["s1_grd"]
    known = model(image, metadata, sensor=sensor)[1]
    metadata[0, 2] = math.nan
    one = model(image, metadata, sensor=sensor)[1]
    metadata[:, 2] = math.nan
    assert torch.equal(one, model(image, metadata, sensor=sensor)[1])
    assert float((one[1] - known[1]).abs().max()) > 1e-3


def test_one_state_dict_fits_both_sides():
    language = LanguageTable(LANGUAGE)
    mae = MaskedAutoencoder(**SMALL, **DECODER, published=True, distill_dim=768, language=language)
    PublicAutoencoder(LANGUAGE, **SMALL, **DECODER).load_state_dict(mae.state_dict(), strict=True)
    for pool in (True, False):
        encoder = CopernicusFMViT(**SMALL, num_classes=3, global_pool=pool, language=language)
        public = PublicEncoder(LANGUAGE, **SMALL, num_classes=3, global_pool=pool)
        public.load_state_dict(encoder.state_dict(), strict=True)
