"""TorchGeo's networks as encoders. TorchGeo itself cannot be asked for, so a stand-in with the parts of its interface
that the adapter uses (get_weight, get_model, Weights.meta / transforms / get_state_dict, timm's forward_...) serves
here; the last test uses TorchGeo where it imports, but for the download."""

import sys
import types

import pytest
import torch
from torch import nn

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import create_encoder
from copernicus.models.zoo import check_encoder

S1, S2 = SENSORS["s1_grd"], SENSORS["s2_toa"]
ALL = ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8a", "B9", "B10", "B11", "B12"]
S1_STATISTICS = ([-12.59, -20.26], [5.26, 5.91])


class Resize(nn.Module):
    pass


class Normalize(nn.Module):
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std


class Network(nn.Module):
    """Answers with its input, so that a test sees what the adapter fed."""

    def __init__(self, in_chans, **options):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.options = options

    def forward_features(self, x):
        return self.scale * x

    def forward_head(self, x, pre_logits=False):
        assert pre_logits
        return x.mean((-2, -1))

    def forward_intermediates(self, x, indices, intermediates_only, norm):
        assert (intermediates_only, norm) == (True, False)
        return [self.scale * x + index for index in indices]


class Entry:
    def __init__(self, bands, steps, dataset="SSL4EO-S12", model="resnet50", state=None, **meta):
        self.meta = {"dataset": dataset, "model": model, "bands": bands, "in_chans": len(bands or ()), **meta}
        self.transforms = nn.Sequential(*steps)
        self.state = state or {"scale": torch.ones(())}

    def get_state_dict(self, progress, map_location, weights_only):
        assert weights_only
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


TENTH = [Resize(), Normalize([0], [10000])]
ENTRIES = {
    "ResNet50_Weights.SENTINEL2_ALL_MOCO": Entry(ALL, TENTH),
    "ResNet50_Weights.SENTINEL2_RGB_MOCO": Entry(["B4", "B3", "B2"], TENTH),
    "ResNet50_Weights.SENTINEL1_ALL_MOCO": Entry(["VV", "VH"], [Normalize(*S1_STATISTICS)]),
    "ViTSmall16_Weights.SENTINEL2_ALL_MOCO": Entry(ALL, TENTH, model="vit_small_patch16_224"),
    "ViTSmall14_Weights.SENTINEL2_ALL_SOFTCON": Entry(ALL, TENTH, model="vit_small_patch14_dinov2", img_size=224),
    "ResNet50_Weights.SENTINEL2_SI_RGB_SATLAS": Entry(["B04", "B03", "B02"], TENTH, dataset="SatlasPretrain"),
    "DOFABase16_Weights.DOFA_MAE": Entry(None, [], dataset="SatlasPretrain, Five-Billion-Pixels, HySpecNet-11k"),
    "Odd.TRANSFORM": Entry(ALL, [nn.ReLU(), *TENTH]),
    "Odd.NONE": Entry(ALL, [Resize()]),
    "Odd.OFFLINE": Entry(ALL, TENTH, state=OSError("no route to host\nat all")),
    "Odd.MISFIT": Entry(ALL, TENTH, state={"scales": torch.ones(())}),
}


@pytest.fixture
def torchgeo(monkeypatch):
    def get_weight(name):
        if name not in ENTRIES:
            raise ValueError(f"{name} is not a valid WeightsEnum")
        return ENTRIES[name]

    package, models = types.ModuleType("torchgeo"), types.ModuleType("torchgeo.models")
    package.models = models
    models.get_weight = get_weight
    models.get_model = lambda name, in_chans, **options: Network(in_chans, **options)
    monkeypatch.setitem(sys.modules, "torchgeo", package)
    monkeypatch.setitem(sys.modules, "torchgeo.models", models)


def test_bands_are_chosen_by_name_and_normalised_as_the_weights_ask(torchgeo):
    raw = torch.rand(2, 13, 8, 8, generator=torch.Generator().manual_seed(0)) * 3000
    encoder = create_encoder("torchgeo:ResNet50_Weights.SENTINEL2_RGB_MOCO", S2, seed=3)
    expected = raw[:, [3, 2, 1]].mean((-2, -1)) / 10000
    torch.testing.assert_close(encoder.encode(raw, S2), expected)
    for sensor in (S2, TASKS["eurosat_s2"].sensor):  # statistics of another data set: undone all the same
        torch.testing.assert_close(encoder.encode(sensor.normalize(raw), sensor, normalize=False), expected)
    with torch.inference_mode():
        levels = encoder.encode_dense(raw, S2)
    assert [float((level - levels[0]).mean().round()) for level in levels] == [0, 1, 2, 3]  # the four stages, from 1
    radar = torch.randn(2, 2, 8, 8) * 5 - 15
    mean, std = (torch.tensor(v)[:, None, None] for v in S1_STATISTICS)
    encoder = create_encoder("torchgeo:ResNet50_Weights.SENTINEL1_ALL_MOCO", S1)
    torch.testing.assert_close(encoder.encode(radar, S1), ((radar - mean) / std).mean((-2, -1)), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(encoder.encode(torch.full_like(radar, torch.nan), S1)).all()


def test_vits_take_any_size(torchgeo):
    any_size = {"dynamic_img_size": True, "dynamic_img_pad": True}
    assert create_encoder("torchgeo:ViTSmall16_Weights.SENTINEL2_ALL_MOCO", S2).network.options == any_size
    softcon = create_encoder("torchgeo:ViTSmall14_Weights.SENTINEL2_ALL_SOFTCON", S2)
    assert softcon.network.options == {**any_size, "img_size": 224}


@pytest.mark.parametrize(
    ("name", "sensor", "message"),
    [
        ("torchgeo:ResNet50_Weights.SENTINEL2_ALL_MOCO", S1, r"takes sensors in reflectance x 10000 .*'s1_grd' \(VV, VH\)"),
        ("torchgeo:ResNet50_Weights.SENTINEL2_ALL_MOCO", S2.select([0, 1, 2]), "is not among them"),
        ("torchgeo:ResNet50_Weights.SENTINEL1_ALL_MOCO", TASKS["flood_s1"].sensor, "takes sensors in dB"),
        ("torchgeo:ResNet50_Weights.SENTINEL2_SI_RGB_SATLAS", S2, r"units .* not known.*CONTRIBUTING"),
        ("torchgeo:DOFABase16_Weights.DOFA_MAE", S2, "dofa_base"),
        ("torchgeo:Odd.TRANSFORM", S2, "transforms are ReLU, Resize, Normalize"),
        ("torchgeo:Odd.NONE", S2, "transforms are Resize"),
        ("torchgeo:resnet50", S2, "no such weights; write torchgeo:Class.ENTRY"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_before_it_is_built(torchgeo, name, sensor, message):
    with pytest.raises(InputError, match=message) as caught:
        check_encoder(name, sensor)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_come_or_do_not_fit(torchgeo):
    with pytest.raises(InputError, match=r"cannot be fetched \(no route to host\)$"):
        create_encoder("torchgeo:Odd.OFFLINE", S2)
    with pytest.raises(InputError, match=r"do not fit the network \(scale, scales"):
        create_encoder("torchgeo:Odd.MISFIT", S2)
    with pytest.raises(InputError, match="has no argument depth"):
        check_encoder("torchgeo:ResNet50_Weights.SENTINEL2_ALL_MOCO", S2, depth=3)


def test_without_torchgeo_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchgeo", None)
    with pytest.raises(InputError, match=r"pip install 'torchgeo>=0.8'"):
        check_encoder("torchgeo:ResNet50_Weights.SENTINEL2_ALL_MOCO", S2)


def test_a_torchgeo_that_does_not_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "torchgeo").mkdir()
    (tmp_path / "torchgeo/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist\\nmore')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in [name for name in sys.modules if name.split(".")[0] == "torchgeo"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(InputError, match=r"does not import \(operator torchvision::nms does not exist\); install"):
        check_encoder("torchgeo:ResNet50_Weights.SENTINEL2_ALL_MOCO", S2)


@pytest.mark.parametrize(
    ("entry", "sensor", "width", "grids"),
    [
        ("ViTSmall16_Weights.SENTINEL2_ALL_MOCO", S2, 384, [(4, 6)] * 4),
        ("ViTSmall14_DINOv2_Weights.SENTINEL1_GRD_SOFTCON", S1, 384, [(5, 7)] * 4),
        ("ResNet18_Weights.SENTINEL2_RGB_MOCO", S2, 512, [(16, 24), (8, 12), (4, 6), (2, 3)]),
    ],
)
def test_the_real_torchgeo(entry, sensor, width, grids, monkeypatch):
    try:
        import torchgeo.models as real
    except Exception as error:
        pytest.skip(f"torchgeo does not import here: {type(error).__name__}")
    weights = real.get_weight(entry)
    size = {"img_size": 224} if "vit" in weights.meta["model"] else {}
    own = real.get_model(weights.meta["model"], in_chans=weights.meta["in_chans"], **size)
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **options: own.state_dict())
    encoder = create_encoder(f"torchgeo:{entry}", sensor).eval()
    raw = torch.rand(2, sensor.channels, 224, 224) * (3000 if sensor is S2 else -20)
    fed = raw[:, [3, 2, 1]] if "RGB" in entry else raw
    with torch.inference_mode():
        normalize = weights.transforms[-1]
        expected = own.eval().forward_head(own.forward_features(normalize(fed.clone())), pre_logits=True)
        torch.testing.assert_close(encoder.encode(raw, sensor), expected, rtol=1e-3, atol=1e-4)
        dense = encoder.encode_dense(raw[:, :, :64, :96], sensor)
    assert expected.shape == (2, width)
    assert [tuple(level.shape[-2:]) for level in dense] == grids
