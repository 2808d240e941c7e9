"""Every size of the model family; plain ViTs and DOFA beside what timm and TorchGeo compute; who takes which sensor."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models import ZOO, create_model, load_weights
from copernicus.models.blocks import default_levels
from copernicus.models.zoo import ENCODERS, create_encoder

HERE = Path(__file__).parent / "goldens"
sys.path.insert(0, str(HERE))
from hashrand import hash_uniform, small_weight  # noqa: E402

PUBLISHED = json.loads((HERE / "keys_vit_base.json").read_text())
FAMILY = json.loads((HERE / "keys_family.json").read_text())
OUTPUTS = load_file(HERE / "family_outputs.safetensors")
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "image_size": 64}
S1, S2, NO2 = (SENSORS[name] for name in ("s1_grd", "s2_toa", "s5p_no2"))


@pytest.fixture
def meta(monkeypatch):
    """Models without memory: on the meta device, their initial weights not drawn."""
    for module in ("vit", "masked_autoencoder", "trunk"):
        monkeypatch.setattr(f"copernicus.models.{module}.initialise", lambda *args, **kwargs: None)
    with torch.device("meta"):
        yield


def shapes(model):
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def expected(entry):
    blocks = {f"blocks.{i}.{name}": shape for i in range(entry["depth"]) for name, shape in entry["block"].items()}
    return entry["state_dict"] | blocks


def with_hash_weights(model):
    state = {name: torch.from_numpy(small_weight(name, value.shape)) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize(
    ("size", "dim", "depth", "positions", "levels"),
    [
        ("small", 384, 12, 197, (3, 5, 7, 11)),
        ("base", 768, 12, 197, (3, 5, 7, 11)),
        ("large", 1024, 24, 197, (7, 11, 15, 23)),
        ("huge", 1280, 32, 257, (7, 15, 23, 31)),  # patch 14: a table of 16 x 16
    ],
)
def test_every_size_of_copernicus_fm(meta, size, dim, depth, positions, levels):
    model = create_model(f"copernicus_fm_{size}")
    base = next(v for k, v in PUBLISHED.items() if k.startswith("encoder_base num_classes=0 global_pool=True"))
    names = {name for name, _, _ in base["state_dict"]}
    others = {name for name in names if not name.startswith("blocks.")}
    block = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    got = shapes(model)
    assert set(got) == others | {f"blocks.{i}.{name}" for i in range(depth) for name in block}
    assert got["pos_embed"] == [1, positions, dim]
    assert got["blocks.0.mlp.fc1.weight"] == [4 * dim, dim]
    assert got["patch_embed_spectral.weight_generator.fc_weight.weight"] == [256 * dim, 128]
    assert default_levels(depth) == levels
    if f"encoder_{size} n_parameters" in PUBLISHED:
        assert sum(p.numel() for p in model.parameters()) == PUBLISHED[f"encoder_{size} n_parameters"]
    shared = {name: shape for name, shape in got.items() if not name.startswith("fc_norm")}
    autoencoder = shapes(create_model(f"copernicus_fm_{size}_mae"))
    assert all(autoencoder[name] == shape for name, shape in shared.items())


@pytest.mark.parametrize("key", [key for key in FAMILY if key.startswith("dofa")])
def test_dofa_has_the_published_names(meta, key):
    model = create_model(key.split()[0], num_classes=10)
    assert shapes(model) == expected(FAMILY[key])
    assert sum(p.numel() for p in model.parameters()) == FAMILY[key]["n_parameters"]
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("key", [key for key in FAMILY if key.startswith("vit")])
def test_plain_vits_have_the_names_of_timm(meta, key):
    model = create_model(key.split()[0], sensor=S2, num_classes=10, global_pool=key.endswith("avg"))
    assert shapes(model) == expected(FAMILY[key])
    assert sum(p.numel() for p in model.parameters()) == FAMILY[key]["n_parameters"]
    assert model.pos_embed.requires_grad


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("sensor", [S1, S2], ids=lambda sensor: sensor.name)
def test_dofa_computes_what_torchgeo_computes(sensor, pool):
    model = with_hash_weights(create_model("dofa_base", **TINY, num_classes=5, global_pool=pool))
    short = sensor.name[:2]
    x = torch.from_numpy(hash_uniform(f"dofa {short}", (2, sensor.channels, 64, 64)))
    with torch.inference_mode():
        logits = model(x, sensor=sensor)
        features = model.encode(x, sensor, normalize=False)
        maps = model.encode_dense(x, sensor, normalize=False, levels=[0, 1])
    torch.testing.assert_close(features, OUTPUTS[f"dofa {short} pool={pool} features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, OUTPUTS[f"dofa {short} pool={pool} logits"], rtol=1e-4, atol=1e-4)
    for level, z_BDhw in enumerate(maps):
        z_BTD = OUTPUTS[f"dofa {short} block {level}"]
        torch.testing.assert_close(z_BDhw.flatten(2).transpose(1, 2), z_BTD[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_plain_vits_compute_what_timm_computes(pool):
    model = create_model("vit_base", sensor=S2, **TINY, num_classes=5, global_pool=pool == "avg")
    with_hash_weights(model)
    x = torch.from_numpy(hash_uniform("vit s2", (2, 13, 64, 64)))
    with torch.inference_mode():
        logits = model(x, sensor=S2)
        features = model.encode(x, S2, normalize=False)
        maps = model.encode_dense(x, S2, normalize=False)
    torch.testing.assert_close(features, OUTPUTS[f"vit pool={pool} features"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, OUTPUTS[f"vit pool={pool} logits"], rtol=1e-4, atol=1e-4)
    for level, z_BDhw in enumerate(maps):
        torch.testing.assert_close(z_BDhw, OUTPUTS[f"vit level {level}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_small", "dofa_small"])
def test_raw_images_are_normalised_by_their_sensor(name):
    model = create_encoder(name, S2, **TINY).eval()
    normalised = torch.randn(2, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v)[:, None, None] for v in (S2.mean, S2.std))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.encode(normalised * std + mean, S2),
            model.encode(normalised, S2, normalize=False),
            rtol=1e-3,
            atol=1e-3,
        )
        assert model.encode_dense(normalised[..., :32], S2)[0].shape == (2, 32, 4, 2)


@pytest.mark.parametrize("name", ["vit_small", "dofa_small"])
def test_the_seed_alone_decides_initial_weights(name):
    before = torch.random.get_rng_state()
    first, again, other = (create_encoder(name, S2, seed=seed, **TINY).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


def test_fresh_tokens_of_a_plain_vit_have_unit_scale():
    """Xavier on 13 * 256 inputs and 192 outputs, white noise: variance 2 * 3328 / (3328 + 192)."""
    model = create_model("vit_small", sensor=S2, **{**TINY, "embed_dim": 192})
    image = torch.randn(4, 13, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float(model.patch_tokens(image, S2).var()) == pytest.approx(2 * 3328 / 3520, rel=0.15)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_encoder_encodes_the_tasks_whose_sensors_it_takes(task):
    sensor = task.sensor
    x = torch.randn(2, sensor.channels, 2 * sensor.patch_kernel + 16, 2 * sensor.patch_kernel + 16)
    for name in (n for n in ENCODERS if n.endswith("small")):
        if not ZOO[name][0].takes(sensor):
            assert name.startswith("dofa")
            assert not sensor.spectral
            with pytest.raises(InputError, match=rf"wavelengths.*{sensor.variable}"):
                create_encoder(name, sensor, **TINY)
            with pytest.raises(InputError, match="DOFA takes"):
                create_model(name, **TINY).encode(x, sensor)
            continue
        encoder = create_encoder(name, sensor, **TINY).eval()
        with torch.inference_mode():
            assert encoder.encode(x, sensor).shape == (2, 32)
            assert all(level.shape[:2] == (2, 32) for level in encoder.encode_dense(x, sensor))


def test_what_an_encoder_does_not_take_is_refused_in_one_line():
    x = torch.randn(1, 2, 64, 64)
    l_band = Sensor(name="palsar", bands=("HH", "HV"), wavelengths_nm=(2.36e8, 2.36e8), bandwidths_nm=(1e9, 1e9))
    with pytest.raises(InputError, match=r"radar in C band.*palsar"):
        create_model("dofa_small", **TINY).encode(x, l_band)
    plain = create_model("vit_small", sensor=S2, **TINY)
    with pytest.raises(InputError, match=r"made for sensor 's2_toa'.*cannot take sensor 's1_grd'"):
        plain.encode(x, S1)
    with pytest.raises(InputError, match=r"shape \(B, 13, H, W\)"):
        plain.encode(x, S2, normalize=False)
    with pytest.raises(InputError, match="8 x 64 pixels is no whole number of patches"):
        plain.encode(torch.randn(1, 13, 8, 64), S2)
    with pytest.raises(InputError, match="holds no patch"):
        create_model("dofa_small", **TINY).forward_features(torch.randn(1, 13, 8, 8), sensor=S2)
    with pytest.raises(InputError, match=r"levels \[7\]"):
        plain.encode_dense(torch.randn(1, 13, 64, 64), S2, levels=[7])
    with pytest.raises(InputError, match="made for one sensor"):
        create_model("vit_small")
    with pytest.raises(InputError, match="multiple"):
        create_model("dofa_small", embed_dim=30, num_heads=4)
    with pytest.raises(InputError, match="wavelengths"):
        create_encoder("dofa_base", NO2)
    for text in ("copernicus_fm_base_mae", "dofa", "a/b:c", "os.path"):
        with pytest.raises(InputError, match="no encoder"):
            create_encoder(text, S2)


def test_dofa_s_published_files_load(tmp_path):
    """They have no fc_norm and no head; those of its authors carry pretraining's left-overs."""
    source = create_model("dofa_small", **TINY, seed=1).state_dict()
    published = {name: value for name, value in source.items() if not name.startswith("fc_norm")}
    extras = {"mask_token": torch.zeros(1, 1, 32), "norm.weight": torch.full((32,), 3.0), "norm.bias": torch.ones(32)}
    extras |= {"projector.weight": torch.zeros(8, 32), "projector.bias": torch.zeros(8)}
    for number, file in enumerate((published, published | extras)):
        torch.save(file, tmp_path / f"{number}.pth")
        model = create_model("dofa_small", **TINY, num_classes=3, seed=2)
        report = load_weights(model, tmp_path / f"{number}.pth")
        assert report.complete
        assert report.fresh == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
        assert set(report.dropped) == (set(extras) if number else set())
        assert torch.equal(model.fc_norm.weight, torch.ones(32))
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in published.items())
    del published["cls_token"]
    torch.save(published, tmp_path / "short.pth")
    with pytest.raises(InputError, match="missing \\(1\\): cls_token"):
        load_weights(create_model("dofa_small", **TINY), tmp_path / "short.pth")
