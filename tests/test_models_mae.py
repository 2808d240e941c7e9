"""The masked autoencoder against the public implementation's step (tests/goldens) and against independent sums."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models.distillation import DISTILL_WEIGHT, distillation_loss
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder, parameter_groups, patchify, unpatchify
from copernicus.models.vit import CopernicusFMViT

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
from hashrand import hash_uniform, small_weight  # noqa: E402

INDEX = json.loads((GOLDENS / "index.json").read_text())["mae"]
CONFIG = INDEX["configs"]["normpix"]
INPUTS = load_file(GOLDENS / "mae_inputs.safetensors")
EXPECTED = load_file(GOLDENS / "mae_normpix.safetensors")
LANGUAGE = LanguageTable({SENSORS[k.split("/")[1]].variable: v for k, v in INPUTS.items() if k.startswith("language/")})
SMALL = {
    "image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 20, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip
SAMPLES = {name: INPUTS[name].float() for name in SENSORS}
METADATA = {name: torch.tensor(CONFIG["metas_after_forward"][name]) for name in SENSORS}
NOISE = {name: EXPECTED[f"{name}/noise"] for name in SENSORS}
CHANNELS = {name: EXPECTED[f"{name}/selected_channels"].tolist() for name in ("s2_toa", "s3_olci")}


def stand_in_teacher(rgb):
    weight, bias = (
        torch.from_numpy(small_weight(f"teacher.proj.{k}", s)) for k, s in (("weight", (768, 3)), ("bias", (768,)))
    )
    pooled = torch.nn.functional.avg_pool2d(rgb, 14, 14).flatten(2).transpose(1, 2)
    return torch.tanh(pooled @ weight.T + bias)


def published_model():
    model = MaskedAutoencoder(**SMALL, published=True, distill_dim=768, language=LANGUAGE)
    model.load_state_dict({k: torch.from_numpy(small_weight(k, v.shape)) for k, v in model.state_dict().items()})
    return model


@functools.cache
def published_step():
    """The published model after a whole forward and backward pass; its losses; its sensors' results."""
    model = published_model()
    mae = model(SAMPLES, SENSORS, METADATA, NOISE, CHANNELS)
    distill = DISTILL_WEIGHT * distillation_loss(model, stand_in_teacher, SAMPLES["s2_toa"], METADATA["s2_toa"]).mean()
    total = mae["loss"] + distill
    total.backward()
    with torch.no_grad():
        results = {
            name: model.forward_sensor(SAMPLES[name], SENSORS[name], METADATA[name], NOISE[name], CHANNELS.get(name))
            for name in SENSORS
        }
    return model, {"loss_total": total, "loss_mae": mae["loss"], "loss_distill": distill}, mae, results


def test_names_and_shapes_are_the_published_ones():
    expected = {k: tuple(v) for k, v in INDEX["state_dict"].items() if not k.startswith("teacher.")}
    assert {k: tuple(v.shape) for k, v in published_model().state_dict().items()} == expected


@pytest.mark.parametrize("name", SENSORS)
def test_a_sensor_s_step_equals_the_published_implementation(name):
    _, _, losses, results = published_step()
    result = results[name]
    torch.testing.assert_close(result.mask_BL, EXPECTED[f"{name}/mask"], atol=0, rtol=0)
    torch.testing.assert_close(result.latent_BTD, EXPECTED[f"{name}/latent"], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.pred_BLV, EXPECTED[f"{name}/pred"], atol=2e-6, rtol=0)
    torch.testing.assert_close(losses[name].reshape(1), EXPECTED[f"{name}/loss"], atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", ["loss_total", "loss_mae", "loss_distill"])
def test_losses_equal_the_published_implementation(name):
    torch.testing.assert_close(published_step()[1][name].reshape(1), EXPECTED[name], atol=0, rtol=1e-5)


def test_the_student_sees_the_published_tokens():
    model = published_model()
    rgb = SENSORS["s2_toa"].select((3, 2, 1))
    tokens, _ = model.forward_tokens(SAMPLES["s2_toa"][:, [3, 2, 1]], METADATA["s2_toa"], sensor=rgb)
    order = EXPECTED["s2_toa_rgb/noise"].argsort(dim=1)[..., None].expand(-1, -1, tokens.shape[2])
    shuffled = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, order)], dim=1)
    torch.testing.assert_close(shuffled, EXPECTED["s2_toa_rgb/latent"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        stand_in_teacher(SAMPLES["s2_toa"][:, [3, 2, 1]]).mean(dim=1), EXPECTED["teacher_z_t"], atol=1e-5, rtol=0
    )


def test_gradients_equal_the_published_implementation():
    model = published_step()[0]
    for name, parameter in model.named_parameters():
        expected = CONFIG["grads"][name]
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        assert float(parameter.grad.norm()) == pytest.approx(expected["l2"], rel=1e-4), name
        probe = float((parameter.grad * torch.from_numpy(hash_uniform(f"probe/{name}", parameter.shape))).sum())
        assert probe == pytest.approx(expected["probe"], abs=1e-4 * expected["l2"]), name
    for key in (k for k in EXPECTED if k.startswith("grad/")):
        grad = model.get_parameter(key.removeprefix("grad/")).grad
        torch.testing.assert_close(grad, EXPECTED[key], atol=1e-4 * float(EXPECTED[key].abs().max()), rtol=0)


def test_one_step_of_adamw_equals_the_published_implementation():
    model = published_model()
    model.load_state_dict(published_step()[0].state_dict())
    for parameter, stepped in zip(model.parameters(), published_step()[0].parameters(), strict=True):
        parameter.grad = stepped.grad
    step = CONFIG["after_one_adamw_step"]
    groups = parameter_groups(model, step["weight_decay"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)] for p in groups[1]["params"]} <= set(CONFIG["no_decay"])
    unused = {n for n in CONFIG["decay"] if n.startswith("teacher.") or ("decoder_pred" in n and "fc_bias" in n)}
    assert {names[id(p)] for p in groups[0]["params"]} == set(CONFIG["decay"]) - unused
    torch.optim.AdamW(groups, lr=step["lr"], betas=tuple(step["betas"]), eps=step["eps"]).step()
    for name, parameter in model.named_parameters():
        expected = step["params"][name]
        assert float(parameter.detach().norm()) == pytest.approx(expected["l2"], rel=1e-4), name
        probe = float((parameter.detach() * torch.from_numpy(hash_uniform(f"probe/{name}", parameter.shape))).sum())
        assert probe == pytest.approx(expected["probe"], abs=1e-4 * expected["l2"]), name


def small_model(**options):
    return MaskedAutoencoder(**{**SMALL, **options})


def test_patches_are_ordered_row_column_channel():
    image = torch.arange(2 * 4 * 6).float().reshape(1, 2, 4, 6)
    patches = patchify(image, 2)
    assert patches.shape == (1, 6, 8)
    expected = [image[0, c, 2 + i, 4 + j] for i in range(2) for j in range(2) for c in range(2)]
    assert patches[0, 5].tolist() == expected
    assert torch.equal(unpatchify(patches, (2, 3), 2), image)
    with pytest.raises(InputError, match="whole number of patches"):
        patchify(image, 4)


@torch.no_grad()
def test_default_and_published_decoder_agree_on_one_channel_and_differ_on_more():
    ours, theirs = small_model(published=False), small_model(published=True)
    for name in ("s5p_co", "s2_toa"):
        results = [m.forward_sensor(SAMPLES[name], SENSORS[name], METADATA[name], NOISE[name]) for m in (ours, theirs)]
        if SENSORS[name].channels == 1:
            assert torch.equal(results[0].pred_BLV, results[1].pred_BLV)
        else:
            # The published values are the same numbers, ordered (channel, row, column).
            channel_first = results[1].pred_BLV.unflatten(2, (13, 256)).transpose(2, 3).flatten(2)
            torch.testing.assert_close(results[0].pred_BLV, channel_first, atol=1e-6, rtol=0)
            assert (results[0].pred_BLV - results[1].pred_BLV).abs().max() > 1e-3


@torch.no_grad()
def test_a_channel_is_predicted_by_its_own_generated_weights():
    """Swapping two bands of the image and of the sensor swaps them in the reconstruction, and leaves the loss."""
    model = small_model(norm_pix_loss=False)
    sensor = SENSORS["s2_toa"].select((1, 3, 7))
    image, noise, metadata = SAMPLES["s2_toa"][:, [1, 3, 7]], NOISE["s2_toa"], METADATA["s2_toa"]
    loss = model.forward_sensor(image, sensor, metadata, noise).loss_B
    _, made = model.reconstruct(image, sensor, metadata, noise)
    order = [2, 0, 1]
    swapped_loss = model.forward_sensor(image[:, order], sensor.select(order), metadata, noise).loss_B
    _, swapped = model.reconstruct(image[:, order], sensor.select(order), metadata, noise)
    torch.testing.assert_close(swapped, made[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, swapped_loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@torch.no_grad()
def test_loss_is_the_error_of_the_hidden_pixels(norm_pix_loss):
    """Against a sum over pixels of the reconstruction, patch by patch, without patchify."""
    model = small_model(norm_pix_loss=norm_pix_loss)
    image, sensor, noise = SAMPLES["s1_grd"] + 3, SENSORS["s1_grd"], NOISE["s1_grd"]
    result = model.forward_sensor(image, sensor, None, noise)
    masked, made = model.reconstruct(image, sensor, None, noise)
    for row in range(2):
        kept = set(noise[row].argsort()[:4].tolist())
        errors = []
        for patch in range(16):
            window = (
                row,
                slice(None),
                slice(patch // 4 * 16, patch // 4 * 16 + 16),
                slice(patch % 4 * 16, patch % 4 * 16 + 16),
            )
            if patch in kept:
                assert torch.equal(masked[window], image[window])
                assert torch.equal(made[window], image[window])
                continue
            assert masked[window].isnan().all()
            error = made[window] - image[window]
            if norm_pix_loss:
                error = error / (image[window].var() + 1e-6).sqrt()
            errors.append(float(error.square().mean()))
        assert float(result.loss_B[row]) == pytest.approx(sum(errors) / 12, rel=1e-5)


def test_rows_without_a_sensor_count_for_nothing():
    model = small_model()
    present = {"s1_grd": torch.tensor([True, False]), "s2_toa": torch.tensor([True, True])}
    names = list(present)
    samples = {name: SAMPLES[name].clone() for name in names}
    samples["s1_grd"][1] = torch.nan
    losses = model(samples, SENSORS, METADATA, NOISE, CHANNELS, present)
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        rows = {
            name: model.forward_sensor(
                SAMPLES[name], SENSORS[name], METADATA[name], NOISE[name], CHANNELS.get(name)
            ).loss_B
            for name in names
        }
    first = (rows["s1_grd"][0] + rows["s2_toa"][0]) / 2
    torch.testing.assert_close(losses["loss"].detach(), (first + rows["s2_toa"][1]) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(losses["s1_grd"], rows["s1_grd"][0], atol=1e-6, rtol=0)
    nobody = {name: torch.tensor([False, False]) for name in names}
    nothing = model(samples, SENSORS, METADATA, NOISE, CHANNELS, nobody)
    assert float(nothing["loss"].detach()) == 0
    assert nothing["s1_grd"].isnan()


def test_every_trained_parameter_gets_a_gradient_in_every_step():
    model = small_model()
    model(SAMPLES, SENSORS, METADATA, NOISE, CHANNELS)["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_tokens_for_unknown_metadata_are_trained_by_the_rows_that_lack_it():
    model = small_model()
    metadata = METADATA["s1_grd"].clone()
    metadata[1, 2] = torch.nan
    model.forward_sensor(SAMPLES["s1_grd"], SENSORS["s1_grd"], metadata, NOISE["s1_grd"]).loss_B.sum().backward()
    assert float(model.time_token.grad.norm()) > 0
    assert float(model.time_token_dec.grad.norm()) > 0
    assert float(model.coord_token.grad.norm()) == 0


def oblong(name, rows, columns, batch=4):
    """Images of rows x columns patches, metadata of which each row lacks something else, and noise."""
    sensor = SENSORS[name]
    k = sensor.patch_kernel
    image = torch.from_numpy(hash_uniform(f"oblong/{name}", (batch, sensor.channels, rows * k, columns * k)))
    noise = torch.from_numpy(hash_uniform(f"oblong noise/{name}", (batch, rows * columns)))
    metadata = torch.tensor([[11.0, 48.0, 18262.0, 0.02], [-60.0, -3.0, 18993.0, 0.5]]).repeat(batch // 2, 1)
    metadata[1, :2] = torch.nan
    metadata[2, 2] = torch.nan
    metadata[3, 3] = torch.nan
    return image.float(), sensor, metadata, noise.float()


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("s2_toa", 3, 7), ("s3_olci", 9, 2), ("dem", 2, 4), ("s5p_o3", 1, 8)]
)
@torch.no_grad()
def test_a_mixed_batch_equals_its_rows_alone_on_oblong_images(name, rows, columns, published):
    """What one row lacks is no matter of the others, in the encoder and in the decoder."""
    model = small_model(published=published)
    image, sensor, metadata, noise = oblong(name, rows, columns)
    together = model.forward_sensor(image, sensor, metadata, noise)
    assert together.pred_BLV.shape == (4, rows * columns, sensor.channels * sensor.patch_kernel**2)
    for row in range(4):
        one = slice(row, row + 1)
        alone = model.forward_sensor(image[one], sensor, metadata[one], noise[one])
        for field in ("latent_BTD", "pred_BLV", "loss_B", "mask_BL"):
            torch.testing.assert_close(getattr(alone, field), getattr(together, field)[one], atol=1e-5, rtol=0)
    # ... and it does matter to the row itself, in what the decoder makes of the same encoding.
    known = metadata.nan_to_num(0.5)
    other = model.forward_sensor(image, sensor, known, noise)
    changed = (other.pred_BLV - together.pred_BLV).abs().amax(dim=(1, 2))
    assert changed[0] < 1e-6
    assert (changed[1:] > 1e-5).all()


@pytest.mark.parametrize("along_rows", [True, False])
@torch.no_grad()
def test_the_decoder_knows_rows_from_columns_on_oblong_images(along_rows):
    """With no decoder block a hidden patch is predicted from its position alone: made to vary along one axis of the
    table, positions make the predictions of a row (or column) of patches alike, and of two of them different."""
    model = small_model(decoder_depth=0)
    table = model.decoder_pos_embed[0, 1:].unflatten(0, (4, 4))
    ramp = torch.linspace(-1, 1, 4)[:, None, None] * torch.from_numpy(hash_uniform("ramp", (20,))).float()
    table.copy_(ramp.expand(4, 4, 20) if along_rows else ramp.transpose(0, 1).expand(4, 4, 20))
    image, sensor, metadata, noise = oblong("s1_grd", 3, 6)
    result = model.forward_sensor(image, sensor, metadata, noise)
    place = {}
    for patch in result.mask_BL[0].nonzero().flatten().tolist():
        row, column = divmod(patch, 6)
        place.setdefault(row if along_rows else column, []).append(result.pred_BLV[0, patch])
    assert sum(len(same) > 1 for same in place.values()) > 1
    for same in place.values():
        for pred in same[1:]:
            torch.testing.assert_close(pred, same[0], atol=1e-6, rtol=0)
    first = [same[0] for same in place.values()]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(first) for b in first[:i])


@torch.no_grad()
def test_oblong_images_are_put_together_again():
    model = small_model(norm_pix_loss=False)
    image, sensor, metadata, noise = oblong("s1_grd", 2, 5)
    masked, made = model.reconstruct(image, sensor, metadata, noise)
    assert masked.shape == made.shape == image.shape
    pred_BLV = model.forward_sensor(image, sensor, metadata, noise).pred_BLV
    hidden = set(noise[3].argsort()[3:].tolist())  # int(10 x 0.3) are kept
    for patch in range(10):
        row, column = divmod(patch, 5)
        window = (3, slice(None), slice(row * 16, row * 16 + 16), slice(column * 16, column * 16 + 16))
        if patch in hidden:
            assert masked[window].isnan().all()
            assert torch.equal(made[window], pred_BLV[3, patch].reshape(16, 16, 2).permute(2, 0, 1))
        else:
            assert torch.equal(made[window], image[window])
            assert torch.equal(masked[window], image[window])


@pytest.mark.parametrize("global_pool", [True, False])
def test_the_encoder_comes_out_whole(global_pool):
    model = published_model()
    encoder = CopernicusFMViT(
        image_size=64, embed_dim=32, depth=2, num_heads=4, global_pool=global_pool, language=LANGUAGE
    )
    encoder.load_state_dict(model.encoder_state_dict(global_pool), strict=True)
    image, sensor, metadata = SAMPLES["s3_olci"], SENSORS["s3_olci"], METADATA["s3_olci"]
    with torch.no_grad():
        tokens = model.norm(model.forward_tokens(image, metadata, sensor=sensor)[0])
        features = encoder.encode(image, sensor, metadata, normalize=False)
    if not global_pool:
        torch.testing.assert_close(features, tokens[:, 0], atol=1e-6, rtol=0)
    assert torch.equal(encoder.get_parameter("fc_norm.weight" if global_pool else "norm.weight"), model.norm.weight)


def test_training_lowers_the_loss():
    """Stripes, whose hidden patches can be told from the visible ones: 60 steps take the loss well below 1."""
    torch_state = torch.random.get_rng_state()
    rng = torch.Generator().manual_seed(0)
    model = small_model(norm_pix_loss=False, seed=1)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.05), lr=2e-3, betas=(0.9, 0.95))
    sensor = Sensor("pair", wavelengths_nm=(500, 800), bandwidths_nm=(50, 50))
    row = torch.arange(64) / 64
    losses = []
    for _ in range(60):
        phase = torch.rand(8, 1, generator=rng) * 6.283
        wave = 1.414 * torch.sin(6.283 * 4 * row + phase)  # period: one patch
        image = wave[:, None, :, None].expand(8, 2, 64, 64)
        loss = model.forward_sensor(image, sensor, None, torch.rand(8, 16, generator=rng)).loss_B.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1.0, abs=0.1)
    assert sum(losses[-5:]) / 5 < 0.5
    assert torch.equal(torch_state, torch.random.get_rng_state())


def test_images_with_too_few_tokens_are_refused():
    with pytest.raises(InputError, match="larger images"):
        small_model().forward_sensor(torch.zeros(1, 2, 16, 16), SENSORS["s1_grd"], None, torch.zeros(1, 1))
    with pytest.raises(InputError, match="noise"):
        small_model().forward_sensor(SAMPLES["s1_grd"], SENSORS["s1_grd"], None, torch.zeros(2, 4))
