"""Exports against the published lists of names and shapes, and what other code makes of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models import create_model, load_weights
from copernicus.platform.checkpoint import architecture
from copernicus.platform.export import export

KEYS = json.loads((Path(__file__).parent / "goldens/keys_vit_base.json").read_text())
SIZES = {"embed_dim": 32, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 20, "decoder_depth": 1, "decoder_num_heads": 4}


def published(name):
    return {key: shape for key, shape, _ in KEYS[name]["state_dict"]}


def shapes(state):
    return {name: list(value.shape) for name, value in state.items()}


def save(folder, autoencoder, name="copernicus_fm_small", **sizes):
    """As a run writes it."""
    folder.mkdir()
    state = {
        "model": autoencoder.state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "samples_seen": 7,
        "architecture": {"name": name, **sizes},
    }
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = create_model("copernicus_fm_small_mae", **SIZES, **DECODER, seed=3, distill_dim=8)
    with torch.no_grad():
        model.norm.weight.normal_(1, 0.1, generator=torch.Generator().manual_seed(0))
    return save(tmp_path_factory.mktemp("run") / "checkpoint", model, **SIZES), model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model's checkpoint whose every value says which parameter it is of."""
    names = published("mae_base (without teacher.*)")
    state = {name: torch.full(shape, float(i % 97)) for i, (name, shape) in enumerate(names.items())}
    folder = tmp_path_factory.mktemp("base") / "checkpoint"
    folder.mkdir()
    torch.save({"model": state, "architecture": {"name": "copernicus_fm_base"}}, folder / "checkpoint.pt")
    return folder, state


@pytest.mark.parametrize(
    ("part", "pool", "golden"),
    [
        ("encoder", "mean", "encoder_base num_classes=0 global_pool=True"),
        ("encoder", "token", "encoder_base num_classes=0 global_pool=False"),
        ("encoder", "none", "seg_base (Bench models_dwv_seg.vit_base_patch16)"),
        ("autoencoder", None, "mae_base (without teacher.*)"),
    ],
)
def test_names_and_shapes_are_the_published_ones_and_values_survive(base, tmp_path, part, pool, golden):
    folder, state = base
    done = export(folder, tmp_path / "w.pth", part, pool)
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(content) == ["model"]
    assert shapes(content["model"]) == published(golden)
    assert all(v.dtype == torch.float32 for v in content["model"].values())
    assert done.parameters == sum(v.numel() for v in content["model"].values())
    for name, value in content["model"].items():
        assert torch.equal(value, state[name.replace("fc_norm", "norm")]), name


def test_the_benchmark_s_assertions_hold(base, tmp_path):
    """Its classification loads without strictness and asserts that fc_norm (and a head) is all that it lacks."""
    export(base[0], tmp_path / "w.pth", pool="none")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    wanted = published("bench_cls_base (Bench models_dwv.vit_base_patch16, num_classes=10)")
    assert [n for n in wanted if n not in state] == ["fc_norm.bias", "fc_norm.weight", "head.bias", "head.weight"]
    assert not set(state) - set(wanted)  # TorchGeo's assertion


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_the_round_trip_gives_the_same_features(small, tmp_path, name):
    folder, autoencoder = small
    export(folder / "checkpoint.pt", tmp_path / name)
    direct, exported = (create_model("copernicus_fm_small", **SIZES, seed=s).eval() for s in (1, 2))
    load_weights(direct, folder)
    assert not load_weights(exported, tmp_path / name).renamed
    x = torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = (m.forward_features(x, sensor=SENSORS["s1_grd"]) for m in (direct, exported))
    assert torch.equal(a, b)
    whole = create_model("copernicus_fm_small_mae", **SIZES, **DECODER, seed=4, distill_dim=8)
    export(folder, tmp_path / name, "autoencoder", force=True)
    load_weights(whole, tmp_path / name)
    assert all(torch.equal(v, autoencoder.state_dict()[n]) for n, v in whole.state_dict().items())


def test_safetensors_say_what_they_are(small, tmp_path):
    export(small[0], tmp_path / "w.safetensors", pool="token")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == "copernicus_fm_small"
    assert json.loads(metadata["sizes"]) == SIZES
    assert (metadata["part"], metadata["pool"], metadata["samples_seen"]) == ("encoder", "token", "7")
    assert metadata["source"] == str(small[0])
    assert "norm.weight" in load_file(tmp_path / "w.safetensors")


def test_mistakes_are_said_and_write_nothing(small, tmp_path):
    folder, autoencoder = small
    torch.save({"model": autoencoder.state_dict()}, tmp_path / "other.pt")
    torch.save(autoencoder.state_dict(), tmp_path / "other.pth")
    (tmp_path / "torn.pt").write_bytes((folder / "checkpoint.pt").read_bytes()[:5000])
    (tmp_path / "there.pth").write_bytes(b"mine")
    out = tmp_path / "w.pth"
    cases = [
        ((folder, tmp_path / "w.bin"), r"ends in \.pth or \.safetensors"),
        ((folder, out, "decoder"), "valid choices: encoder, autoencoder"),
        ((folder, out, "encoder", "max"), "valid choices: mean, token, none"),
        ((folder, out, "autoencoder", "mean"), "--pool is of an encoder"),
        ((folder, tmp_path / "there.pth"), "--force"),
        ((tmp_path / "other.pt", out), "is not a checkpoint of `copernicus run`"),
        ((tmp_path / "other.pth", out), "is not a checkpoint of `copernicus run`"),
        ((tmp_path / "torn.pt", out), "cannot be read"),
        ((tmp_path / "absent.pt", out), "no file or folder"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            export(*arguments)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
    export(folder, tmp_path / "there.pth", force=True)
    load_weights(create_model("copernicus_fm_small", **SIZES), tmp_path / "there.pth")


def copernicus(*arguments, code=0, cwd=None):
    done = subprocess.run(
        [sys.executable, "-m", "copernicus.platform.cli", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_command_prints_what_to_do_next(small, tmp_path):
    text = copernicus("export", small[0], "--out", tmp_path / "w.pth")
    digest = subprocess.run(["sha256sum", tmp_path / "w.pth"], capture_output=True, text=True).stdout.split()[0]
    for part in (digest, "32, 2, 4", "copernicus encode", "embed_dim=32 depth=2 num_heads=4", "TorchGeo"):
        assert part in text
    text = copernicus("export", small[0], "--out", tmp_path / "w.pth", code=2)
    assert text.count("\n") == 1
    assert "--force" in text


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_full_disk_leaves_nothing_behind(small, tmp_path, name):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("may not mount a small disk")
    try:
        text = copernicus("export", small[0], "--out", disk / name, code=1)
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "No space left on device" in text
    assert "Traceback" not in text
    assert left == []


def test_a_checkpoint_from_a_store_tells_its_model(small, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.create_run(client.create_experiment("e", artifact_location=(tmp_path / "a").as_uri())).info.run_id
    client.log_artifacts(run, str(small[0]), "checkpoint")
    assert architecture(f"runs:/{run}/checkpoint") == ("copernicus_fm_small", SIZES)
    export(f"runs:/{run}/checkpoint", tmp_path / "w.pth")
    export(small[0], tmp_path / "direct.pth")
    assert (tmp_path / "w.pth").read_bytes() == (tmp_path / "direct.pth").read_bytes()
