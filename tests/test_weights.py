"""Weights as other training codes write them, and what of a file did not fit."""

import argparse

import pytest
import torch

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import create_model, load_weights

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "image_size": 64}


def model(seed=0, **other):
    return create_model("copernicus_fm_small", **{**TINY, **other}, seed=seed)


def same_weights(a, b):
    return set(a) == set(b) and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("under", ["model", "state_dict", ""])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrappers_are_seen_through_and_reported(tmp_path, under, prefix):
    source, target = model(1).state_dict(), model(2)
    named = {prefix + name: value for name, value in source.items()}
    torch.save({under: named, "epoch": 3} if under else named, tmp_path / "w.pth")
    report = load_weights(target, tmp_path / "w.pth")
    assert same_weights(source, target.state_dict())
    assert (report.under, report.prefix) == (under, prefix)
    assert report.renamed == ({prefix + n: n for n in source} if prefix else {})
    assert (repr(prefix) in str(report)) == bool(prefix)
    assert (f"from {under!r}" in str(report)) == bool(under)


def test_data_parallel_s_own_names_are_the_ones_taken_off(tmp_path):
    source = model(1)
    wrapped = torch.nn.DataParallel(source)  # names as DistributedDataParallel does
    torch.save(wrapped.state_dict(), tmp_path / "w.pth")
    target = model(2)
    assert load_weights(target, tmp_path / "w.pth").prefix == "module."
    assert same_weights(source.state_dict(), target.state_dict())


def test_a_prefix_that_not_every_name_has_is_not_taken_off(tmp_path):
    state = {f"module.{name}": value for name, value in model(1).state_dict().items()}
    state["cls_token"] = state.pop("module.cls_token")
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"unexpected \(82\): module\."):
        load_weights(model(), tmp_path / "w.pth")


def test_the_command_line_of_a_training_code_does_not_bar_its_weights(tmp_path):
    source, target = model(1), model(2)
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=0.1, name="x")}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same_weights(source.state_dict(), target.state_dict())
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_the_published_encoder_without_last_norm_gets_identity(tmp_path):
    """Public code starts ``fc_norm`` as a fresh layer norm then (and asserts that nothing else is missing)."""
    source, target = model(1), model(2)
    with torch.no_grad():
        target.fc_norm.weight.fill_(3.0)
    torch.save({n: v for n, v in source.state_dict().items() if not n.startswith("fc_norm")}, tmp_path / "w.pth")
    report = load_weights(target, tmp_path / "w.pth")
    assert report.complete
    assert report.identity == ("fc_norm.weight", "fc_norm.bias")
    assert "identity" in str(report)
    x = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(0))
    z_BTD, _ = source.forward_tokens(x, None, sensor=SENSORS["s1_grd"])
    expected = torch.nn.functional.layer_norm(z_BTD[:, 1:].mean(1), (32,), eps=1e-6)
    assert torch.allclose(target.forward_features(x, sensor=SENSORS["s1_grd"]), expected, atol=1e-6)
    with pytest.raises(InputError, match=r"missing \(2\): norm.weight, norm.bias"):
        load_weights(model(global_pool=False), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"missing \(2\): head.weight, head.bias"):
        load_weights(model(num_classes=3), tmp_path / "w.pth")


def test_a_position_table_of_another_side_is_of_another_shape(tmp_path):
    torch.save(model(1, image_size=128).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"other shape.*pos_embed \[1, 65, 32\] for \[1, 17, 32\]"):
        load_weights(model(), tmp_path / "w.pth")
    report = load_weights(model(), tmp_path / "w.pth", strict=False)
    assert report.other_shape == {"pos_embed": ((1, 65, 32), (1, 17, 32))}


@pytest.mark.parametrize(
    "state", [{}, {"model": {}}, {"state_dict": {"a": 1}}, [1, 2], {"model": {"a": [torch.ones(1)]}}]
)
def test_no_state_dict(tmp_path, state):
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match="no state dict found") as caught:
        load_weights(model(), tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
