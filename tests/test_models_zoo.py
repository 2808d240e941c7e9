"""Models by name, weights from files, probe heads."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import ZOO, DenseHead, LinearHead, create_model, load_weights
from copernicus.models.vit import look

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "image_size": 64}
TINY_MAE = {**TINY, "decoder_embed_dim": 20, "decoder_depth": 1, "decoder_num_heads": 4}
KEYS = json.loads((Path(__file__).parent / "goldens/keys_vit_base.json").read_text())


def same_weights(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_names():
    copernicus = {f"copernicus_fm_{s}{m}" for s in ("small", "base", "large", "huge") for m in ("", "_mae")}
    assert set(ZOO) == copernicus | {"vit_small", "vit_base", "dofa_small", "dofa_base", "dofa_large"}
    with pytest.raises(InputError, match="copernicus_fm_base"):
        create_model("copernicus_fm_medium")
    with pytest.raises(InputError, match=r"widht.*embed_dim"):
        create_model("copernicus_fm_base", widht=3)
    with pytest.raises(InputError, match="num_classes"):
        create_model("copernicus_fm_base_mae", num_classes=3)
    with pytest.raises(InputError, match="multiple"):
        create_model("copernicus_fm_base", embed_dim=30, num_heads=4)


def test_small_has_the_published_number_of_parameters():
    assert sum(p.numel() for p in create_model("copernicus_fm_small").parameters()) == 48_823_936


def test_the_base_autoencoder_has_the_published_names():
    model = create_model("copernicus_fm_base_mae", distill_dim=768)
    expected = next(value for key, value in KEYS.items() if key.startswith("mae_base"))
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: s for k, s, _ in expected["state_dict"]}


def test_the_seed_decides_the_weights_and_nothing_else_does():
    before = torch.random.get_rng_state()
    first, again, other = (create_model("copernicus_fm_small", **TINY, seed=s).state_dict() for s in (5, 5, 6))
    autoencoder = create_model("copernicus_fm_small_mae", **TINY_MAE, seed=5)
    heads = [DenseHead([4, 4], 2, seed=s).state_dict() for s in (0, 0, 1)]
    linear = [LinearHead(4, 2, seed=s).state_dict() for s in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_weights(first, again)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert same_weights(autoencoder.encoder_state_dict(global_pool=True), first)
    for a, b, c in (heads, linear):
        assert same_weights(a, b)
        assert not same_weights(a, c)


def test_fresh_kernels_have_the_scale_meant_for_them():
    """White noise of unit variance in one channel makes tokens of about 16/256: within a factor of 2 or so."""
    model = create_model("copernicus_fm_small", **{**TINY, "embed_dim": 192})
    image = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for sensor in (SENSORS["s2_toa"].select([3]), SENSORS["s5p_o3"]):
            view = look(image, sensor, None, 16)
            (tokens,) = model.patch_tokens([view], model.kernels([view]))
            assert 0.04 < float(tokens.std()) < 0.2


@pytest.mark.parametrize("form", ["bare.pth", "nested.pth", "weights.safetensors", "folder"])
def test_weights_return_from_every_form(form, tmp_path):
    source, target = (create_model("copernicus_fm_small", **TINY, seed=s) for s in (1, 2))
    path = tmp_path / form
    if form == "bare.pth":
        torch.save(source.state_dict(), path)
    elif form == "nested.pth":
        torch.save({"model": source.state_dict(), "samples_seen": 12}, path)
    elif form == "weights.safetensors":
        save_file(source.state_dict(), path)
    else:
        path.mkdir()
        torch.save({"model": source.state_dict()}, path / "checkpoint.pt")
        torch.save({}, path / "optimizer.pt")
    report = load_weights(target, path)
    assert report.complete
    assert same_weights(source.state_dict(), target.state_dict())


def test_an_autoencoder_s_weights_serve_its_encoder(tmp_path):
    source = create_model("copernicus_fm_small_mae", **TINY_MAE, seed=1, distill_dim=8)
    with torch.no_grad():
        source.norm.weight.fill_(3.0)
    torch.save({"model": source.state_dict()}, tmp_path / "mae.pth")
    pooled = create_model("copernicus_fm_small", **TINY, seed=2)
    report = load_weights(pooled, tmp_path / "mae.pth")
    assert report.renamed == {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}
    assert set(report.dropped) == set(source.state_dict()) - set(source.encoder_names)
    assert same_weights(source.encoder_state_dict(global_pool=True), pooled.state_dict())
    by_class_token = create_model("copernicus_fm_small", **TINY, seed=2, global_pool=False)
    assert not load_weights(by_class_token, tmp_path / "mae.pth").renamed
    assert same_weights(source.encoder_state_dict(), by_class_token.state_dict())
    assert load_weights(
        create_model("copernicus_fm_small_mae", **TINY_MAE, distill_dim=8), tmp_path / "mae.pth"
    ).complete


def test_what_does_not_fit_is_named(tmp_path):
    model = create_model("copernicus_fm_small", **TINY, num_classes=3)
    state = create_model("copernicus_fm_small", **TINY, num_classes=4, seed=9).state_dict()
    del state["cls_token"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        load_weights(model, tmp_path / "other.pth")
    for part in ("cls_token", "extra", "head.weight [4, 32] for [3, 32]", "strict=False"):
        assert part in str(caught.value)
    assert same_weights(before, model.state_dict())
    report = load_weights(model, tmp_path / "other.pth", strict=False)
    assert (report.missing, report.unexpected) == (("cls_token",), ("extra",))
    assert report.other_shape == {"head.weight": ((4, 32), (3, 32)), "head.bias": ((4,), (3,))}
    assert torch.equal(model.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_payload_never_runs(tmp_path):
    marker = tmp_path / "ran"
    torch.save({"model": {"cls_token": Payload(marker)}}, tmp_path / "evil.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload(marker), protocol=2))
    model = create_model("copernicus_fm_small", **TINY)
    for name in ("evil.pth", "plain.pt"):
        with pytest.raises(InputError, match="refused"):
            load_weights(model, tmp_path / name)
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())  # the payload is a live one
    assert marker.exists()


def test_sources_that_are_not_there_or_hold_no_weights(tmp_path):
    model = create_model("copernicus_fm_small", **TINY)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of tensors")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 cut short")
    torch.save({"model": {"lr": 0.1}}, tmp_path / "numbers.pth")
    (tmp_path / "two").mkdir()
    for name in ("a.pth", "b.pth"):
        torch.save({}, tmp_path / "two" / name)
    cases = {
        "absent.pth": "no file", "empty": "should hold one", "broken.safetensors": "cannot be read",
        "broken.pth": "cannot be read|refused", "numbers.pth": "no state dict", "two": "a.pth, b.pth",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_weights(model, tmp_path / name)
    with pytest.raises(InputError, match="owner/repository/file"):
        load_weights(model, "hf://nobody")


def test_linear_head_learns_a_linear_rule_at_any_scale():
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(256, 8, generator=rng) * torch.logspace(-2, 2, 8)
    labels = (z[:, 0] * 100 + z[:, 7] / 100 > 0).long()
    head = LinearHead(8, 2)
    optimiser = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(100):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(z), labels).backward()
        optimiser.step()
    assert float((head.eval()(z).argmax(dim=1) == labels).float().mean()) > 0.95


def test_dense_head_learns_where_a_token_is_bright():
    rng = torch.Generator().manual_seed(0)
    deep = torch.randn(16, 6, 4, 4, generator=rng)
    shallow = torch.randn(16, 3, 8, 8, generator=rng) * 30
    labels = torch.nn.functional.interpolate(shallow[:, :1], size=(16, 24), mode="nearest")[:, 0] > 0
    head = DenseHead([3, 6], 2, hidden=16)
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        logits = head([shallow, deep], size=(16, 24))
        torch.nn.functional.cross_entropy(logits, labels.long()).backward()
        optimiser.step()
    assert logits.shape == (16, 2, 16, 24)
    assert float((logits.argmax(dim=1) == labels).float().mean()) > 0.85
    with pytest.raises(InputError, match="2 levels"):
        head([shallow], size=(8, 8))
