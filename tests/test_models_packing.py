"""One pass over all sensors of a step gives what a pass for each gives; what is kept from one call to the next is right."""

import copy

import pytest
import torch
from test_models_mae import METADATA, NOISE, SAMPLES, published_model, small_model

from copernicus.datasets.sensors import SENSORS
from copernicus.models import create_model
from copernicus.models.attention import attend, group, pack, unpack
from copernicus.models.derived import Derived
from copernicus.models.masked_autoencoder import patchify

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "image_size": 64}


def test_attention_of_packed_sequences_is_that_of_each_alone():
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(b, t, 3 * 24, generator=rng) for b, t in ((2, 5), (3, 5), (1, 7), (4, 1))]
    assert group(batches) == ((5, 5), (1, 7), (4, 1))
    seen = unpack(attend(pack(batches), 3, group(batches)), [b[..., :24] for b in batches])
    for qkv_BTX, out_BTD in zip(batches, seen, strict=True):
        for qkv_TX, out_TD in zip(qkv_BTX, out_BTD, strict=True):
            q, k, v = (x.unflatten(1, (3, 8)).transpose(0, 1) for x in qkv_TX.split(24, dim=1))
            weights = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1)
            torch.testing.assert_close(out_TD, (weights @ v).transpose(0, 1).flatten(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_step_s_losses_are_those_of_its_sensors_alone():
    """Against the predictions of all patches, each sensor on its own, and patches compared one by one."""
    model = small_model()
    masked = [model.hide(SAMPLES[n], s, METADATA[n], NOISE[n]) for n, s in SENSORS.items()]
    losses, _ = model.losses(masked)
    for (name, sensor), loss_B in zip(SENSORS.items(), losses, strict=True):
        alone = model.forward_sensor(SAMPLES[name], sensor, METADATA[name], NOISE[name])
        target = patchify(SAMPLES[name], sensor.patch_kernel)
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
        for row in range(len(loss_B)):
            hidden = alone.mask_BL[row].bool()
            expected = (alone.pred_BLV[row][hidden] - target[row][hidden]).square().mean()
            torch.testing.assert_close(loss_B[row], expected, atol=0, rtol=1e-5)


def test_recomputed_blocks_give_the_same_gradients():
    kept, recomputed = small_model(), small_model()
    recomputed.recompute = True
    for model in (kept, recomputed):
        model(SAMPLES, SENSORS, METADATA, NOISE)["loss"].backward()
    for (name, a), b in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=0, rtol=0, msg=name)


def predictions_and_gradients(model):
    """What the golden weights predict, sensor by sensor, and the loss's gradients: fresh weights predict nearly nothing."""
    predicted = [
        model.forward_sensor(SAMPLES[n], s, METADATA[n], NOISE[n]).pred_BLV.float() for n, s in SENSORS.items()
    ]
    model(SAMPLES, SENSORS, METADATA, NOISE)["loss"].backward()
    return predicted, {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 1e-6}


def far_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||a||."""
    return ((a - b).norm() / a.norm()).item()


def test_bf16_stays_near_float32():
    predicted, gradients = predictions_and_gradients(published_model())
    with torch.autocast("cpu", torch.bfloat16):
        half_predicted, half_gradients = predictions_and_gradients(published_model())
    assert all(1e-5 < far_apart(a, b) < 0.03 for a, b in zip(predicted, half_predicted, strict=True))
    whole, half = (torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, half_gradients))
    assert 1e-5 < far_apart(whole, half) < 0.05


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses():
    predicted, gradients = predictions_and_gradients(published_model())
    model = published_model()
    model.compile_blocks()
    compiled_predicted, compiled_gradients = predictions_and_gradients(model)
    assert all(far_apart(a, b) < 1e-5 for a, b in zip(predicted, compiled_predicted, strict=True))
    assert all(far_apart(gradient, compiled_gradients[name]) < 1e-3 for name, gradient in gradients.items())
    assert list(model.state_dict()) == list(published_model().state_dict())


@pytest.mark.slow
def test_steps_with_other_channels_compile_nothing_anew():
    model = small_model()
    model.compile_blocks()
    model(SAMPLES, SENSORS, METADATA, NOISE)["loss"].backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for channels in ({"s2_toa": [0, 3, 5]}, {"s2_toa": [12, 1], "s3_olci": list(range(17))}):
            model(SAMPLES, SENSORS, METADATA, NOISE, channels)["loss"].backward()


def _generations(model, monkeypatch):
    made = []
    generator = model.patch_embed_spectral.weight_generator
    monkeypatch.setattr(
        generator, "_transform", lambda *a, original=generator._transform: made.append(1) or original(*a)
    )
    return made


def test_kernels_are_made_once_until_a_weight_changes(monkeypatch):
    model, sensor = create_model("copernicus_fm_small", **TINY).eval(), SENSORS["s1_grd"]
    made, image = _generations(model, monkeypatch), torch.ones(1, 2, 64, 64)
    weight = model.patch_embed_spectral.weight_generator.fc_weight.weight

    def features():
        with torch.no_grad():
            return model.forward_features(image, sensor=sensor)

    first = features()
    assert torch.equal(features(), first)
    assert len(made) == 1
    with torch.no_grad():
        model.forward_features(image, sensor=sensor, patch_kernel=8)
        weight.mul_(2.0)
    assert not torch.equal(features(), first)
    assert len(made) == 3
    # Fused optimisers write without counting, so it is the pass before them that ends the keeping.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
    model.forward_features(image, sensor=sensor)[:, 0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    changed = features()
    assert len(made) == 5
    model.load_state_dict(create_model("copernicus_fm_small", **TINY).state_dict())
    assert torch.equal(features(), first)
    assert not torch.equal(changed, first)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.patch_embed_spectral.weight_generator.fc_weight.weight.zero_()
        assert not torch.equal(other.forward_features(image, sensor=sensor), first)


def test_kernels_are_not_kept_where_they_are_trained(monkeypatch):
    model, sensor = create_model("copernicus_fm_small", **TINY), SENSORS["s1_grd"]
    made, image = _generations(model, monkeypatch), torch.ones(1, 2, 64, 64)
    with torch.inference_mode():
        model.eval().forward_features(image, sensor=sensor)
    for mode in (True, False):  # in evaluation mode too, gradients reach the hypernetwork
        model.train(mode).forward_features(image, sensor=sensor)[:, 0].sum().backward()
    assert len(made) == 3
    assert model.patch_embed_spectral.weight_generator.fc_weight.weight.grad.abs().sum() > 0


def test_what_was_derived_under_autocast_is_not_served_without():
    model, sensor = create_model("copernicus_fm_small", **TINY).eval(), SENSORS["s1_grd"]
    image = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.forward_features(image, sensor=sensor)
        with torch.autocast("cpu", torch.bfloat16):
            model.forward_features(image, sensor=sensor)
        assert torch.equal(model.forward_features(image, sensor=sensor), expected)


def test_derived_values_do_not_pile_up():
    derived, parameter = Derived(), torch.zeros(1)
    for key in range(3 * Derived.LIMIT):
        derived.get(key, [parameter], lambda key=key: key)
    assert len(derived._kept) == Derived.LIMIT
    assert derived.get(3 * Derived.LIMIT - 1, [parameter], lambda: None) == 3 * Derived.LIMIT - 1


@pytest.mark.parametrize("name", ["copernicus_fm_small", "dofa_small"])
def test_kernels_follow_weights_that_are_written_without_counting(name):
    """An average of weights, kept through ``.data``; and a fused step between two encodings without a pass of its own."""
    sensor, image = SENSORS["s1_grd"], torch.ones(1, 2, 64, 64)
    for write in ("data", "fused"):
        model = create_model(name, **TINY).eval()
        if write == "fused":
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            model.encode(image, sensor)[:, 0].sum().backward()
        with torch.no_grad():
            model.encode(image, sensor)
            if write == "fused":
                optimizer.step()
            else:
                for parameter in model.parameters():
                    parameter.data.mul_(0.5)
            fresh = create_model(name, **TINY).eval()
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(model.encode(image, sensor), fresh.encode(image, sensor))
