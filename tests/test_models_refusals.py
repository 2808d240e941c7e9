"""What cannot work is refused in one line, before it does harm."""

import math
import subprocess
import sys

import pytest
import torch

from copernicus.datasets.sensors import SENSORS, InputError, Sensor
from copernicus.models import create_encoder, create_model, load_weights
from copernicus.platform.checkpoint import read_checkpoint
from copernicus.platform.export import export

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "image_size": 64}
S2 = SENSORS["s2_toa"]
NAMES = ("copernicus_fm_small", "dofa_small", "vit_small")


def tiny(name="copernicus_fm_small"):
    return create_encoder(name, S2, **TINY)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"embed_dim": 0}, "embed_dim=0"), ({"num_heads": 0}, "num_heads=0"), ({"depth": 0}, "depth=0"),
        ({"depth": -1}, "depth=-1"), ({"embed_dim": 33}, "multiple of 4"), ({"embed_dim": 32.0}, "embed_dim=32.0"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name, sizes, says):
    with pytest.raises(InputError, match=says):
        create_encoder(name, S2, **{**TINY, **sizes})


@pytest.mark.parametrize("name", NAMES)
def test_images(name):
    model, image = tiny(name).eval(), torch.zeros(2, 13, 64, 64)
    for wrong, says in (
        (image[0], r"\(B, 13, H, W\), got \(13, 64, 64\)"),
        (image.numpy(), "expected a tensor"),
        (image[..., :60], "whole number of patches"),
    ):
        with pytest.raises(InputError, match=says):
            model.encode(wrong, S2)
    with pytest.raises(InputError, match="give a Sensor"):
        model.encode(image, "s2_toa")
    with pytest.raises(InputError, match=r"bfloat16.*autocast"):
        tiny(name).bfloat16().encode(image, S2)
    with torch.inference_mode():
        assert model.encode(image[:0], S2).shape == (0, 32)
        expected = model.encode(image + 1, S2, normalize=False)
        assert torch.equal(model.encode((image + 1).double(), S2, normalize=False), expected)
        assert torch.equal(model.encode((image + 1).to(torch.int16), S2, normalize=False), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": math.nan}, {"std": math.nan}, {"std": math.inf}, {"std": 0}, {"scale": 0}, {"scale": math.inf},
        {"patch_kernel": 0}, {"patch_kernel": -1}, {"patch_kernel": 16.0},
    ],
)  # fmt: skip
def test_sensors(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sensor(name="s", variable="x", **wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["cls_token"].fill_(math.nan), "cls_token holds NaN"),
        (lambda s: s.update(cls_token=s["cls_token"].to(torch.complex64)), "complex64"),
        (lambda s: s.update(cls_token=s["cls_token"].to(torch.int8)), "int8"),
        (lambda s: s.update(cls_token=s["cls_token"].to_sparse()), "sparse"),
        (lambda s: s.update({7: s.pop("cls_token")}), "no state dict"),
    ],
)  # fmt: skip
def test_weights_that_are_no_numbers(tmp_path, change, says):
    state = {name: value.clone() for name, value in tiny().state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(InputError, match=says):
            load_weights(model, tmp_path / "w.pth", strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "content", [b"", b"root:x", b"epoch,loss\n", b"r", b"M", b"G1234567", b"<html>", b"PK\x03\x04"]
)
def test_files_that_are_no_weights(tmp_path, content):
    for name in ("w.pt", "w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="weights"):
            load_weights(tiny(), tmp_path / name)
    with pytest.raises(InputError, match="weights"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": {}}, "which model"),
        ({"architecture": {"name": "zzz"}}, "which model"),
        ({"architecture": {"name": 5}}, "which model"),
        ({"architecture": {"name": "copernicus_fm_small", "embed_dim": "x"}}, "which model"),
        ({"architecture": {"name": "dofa_base"}}, "does not pretrain"),
        ({"architecture": {"name": "copernicus_fm_small"}}, "embed_dim|is \\[1, 1, 384\\]"),
        ({"model": {}}, "holds nothing"),
        ({"model": {"a": torch.zeros(2)}}, "holds nothing"),
        ({"model": {"a": [1]}}, "which model"),
        ({"language": [1]}, "which model"),
    ],
)  # fmt: skip
def test_checkpoints_that_do_not_fit_themselves(tmp_path, change, says):
    sizes = {"embed_dim": 32, "depth": 1, "num_heads": 4}
    model = create_model("copernicus_fm_small_mae", **sizes, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)
    sound = {"model": model.state_dict(), "architecture": {"name": "copernicus_fm_small", **sizes}, "language": {}}
    torch.save(sound, tmp_path / "sound.pt")
    export(tmp_path / "sound.pt", tmp_path / "sound.pth")
    torch.save(sound | change, tmp_path / "c.pt")
    with pytest.raises(InputError, match=says):
        export(tmp_path / "c.pt", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()


def test_a_mistyped_artifact_makes_no_store(tmp_path):
    command = "from copernicus.models import create_model, load_weights; load_weights(create_model('vit_small'), 'runs:/abc/w.pth')"
    command = command.replace("create_model('vit_small')", "None")
    done = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "no MLflow store" in done.stderr
    assert list(tmp_path.iterdir()) == []
