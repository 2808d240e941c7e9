"""The DINOv2 teacher: its tokens against a forward pass of our own, and every way in which its files can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dinov2 import patch_tokens, save_dinov2
from safetensors.torch import load_file, save_file

from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.models.distillation import distillation_loss
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.teacher import load_teacher

SMALL = {
    "image_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 4,
    "decoder_embed_dim": 20, "decoder_depth": 1, "decoder_num_heads": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("teacher"))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sides", [(56, 56), (28, 28), (42, 70), (84, 84)])
def test_tokens_equal_an_independent_forward_pass(folder, sides):
    """The position table's own grid, a smaller, an oblong and a larger one."""
    x = images(2, 3, *sides)
    expected = patch_tokens(load_file(folder / "model.safetensors"), x)
    teacher = load_teacher(str(folder))
    assert (teacher.dim, teacher.patch) == (24, 14)
    assert expected.shape == (2, sides[0] // 14 * (sides[1] // 14), 24)
    torch.testing.assert_close(teacher(x).double(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("sides", "fed"),
    [((32, 32), (28, 28)), ((64, 64), (70, 70)), ((5, 6), (14, 14)), ((35, 34), (42, 28))],
)
def test_other_sides_are_resized_to_the_nearest_multiple(folder, sides, fed):
    x = images(1, 3, *sides)
    resized = F.interpolate(x, fed, mode="bilinear", align_corners=False)
    expected = patch_tokens(load_file(folder / "model.safetensors"), resized)
    torch.testing.assert_close(load_teacher(str(folder))(x).double(), expected, atol=2e-5, rtol=0)


def test_it_is_frozen_and_leaves_no_trace(folder):
    before = torch.random.get_rng_state()
    teacher = load_teacher(str(folder))
    assert torch.equal(before, torch.random.get_rng_state())
    x = images(2, 3, 28, 28).requires_grad_()
    answer = teacher(x)
    assert not answer.requires_grad
    assert torch.equal(answer, teacher(x)), "no dropout"

    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

    holder = Holder()
    assert list(holder.parameters()) == []
    assert holder.state_dict() == {}


def test_a_step_trains_the_student_by_the_cosine_to_the_mean_token(folder):
    teacher = load_teacher(str(folder))
    model = MaskedAutoencoder(**SMALL, distill_dim=teacher.dim)
    s2 = images(3, 13, 32, 32)
    loss = distillation_loss(model, teacher, s2, None)
    z = patch_tokens(
        load_file(folder / "model.safetensors"), F.interpolate(s2[:, [3, 2, 1]], (28, 28), mode="bilinear")
    ).mean(1)
    with torch.no_grad():
        tokens, _ = model.forward_tokens(s2[:, [3, 2, 1]], None, sensor=SENSORS["s2_toa"].select((3, 2, 1)))
        s = model.student_proj(tokens.mean(dim=1)).double()
    expected = 1 - (z * s).sum(1) / (z.norm(dim=1) * s.norm(dim=1))
    torch.testing.assert_close(loss.detach().double(), expected, atol=1e-5, rtol=0)
    loss.sum().backward()
    assert float(model.student_proj.weight.grad.norm()) > 0
    assert float(model.blocks[0].attn.qkv.weight.grad.norm()) > 0


def test_autocast_holds_for_the_teacher_and_features_stay_float32(folder):
    teacher, x = load_teacher(str(folder)), images(2, 3, 28, 28)
    exact = teacher(x)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = teacher(x)
    assert coarse.dtype == torch.float32
    assert not torch.equal(coarse, exact)
    cosine = F.cosine_similarity(coarse.mean(1), exact.mean(1), dim=1)
    assert float(cosine.min()) > 0.99


def test_identity_is_of_settings_and_weights_not_of_the_place(folder, tmp_path):
    same = save_dinov2(tmp_path / "same")
    other = save_dinov2(tmp_path / "other", seed=1)
    heads = save_dinov2(tmp_path / "heads", num_attention_heads=2)
    identity = load_teacher(str(folder)).identity
    assert load_teacher(str(same)).identity == identity
    assert len({identity, load_teacher(str(other)).identity, load_teacher(str(heads)).identity}) == 3
    weights = load_file(same / "model.safetensors")
    weights["layernorm.bias"][0] = torch.nextafter(weights["layernorm.bias"][0], torch.tensor(9.0))
    save_file(weights, same / "model.safetensors")
    assert load_teacher(str(same)).identity != identity


def test_half_precision_files_become_float32(folder, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((folder / "config.json").read_text())
    weights = {k: v.half() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, half / "model.safetensors")
    x = images(1, 3, 56, 56)
    torch.testing.assert_close(load_teacher(str(half))(x).double(), patch_tokens(weights, x), atol=2e-5, rtol=0)


# --- What is wrong ---------------------------------------------------------------------------------------------------


def complaint(source: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load_teacher(str(source))
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


def copy(folder: Path, out: Path, config: dict | None = None) -> Path:
    out.mkdir()
    content = json.loads((folder / "config.json").read_text()) | (config or {})
    (out / "config.json").write_text(json.dumps(content))
    (out / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    return out


def test_absent_files_are_named(folder, tmp_path):
    assert "no config.json and no model.safetensors" in complaint(tmp_path / "nowhere")
    out = copy(folder, tmp_path / "copy")
    (out / "model.safetensors").unlink()
    assert "no model.safetensors there" in complaint(out)


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_is_neither_read_nor_run(folder, tmp_path):
    """Neither beside the weights, under the name that transformers would also take, nor in their place."""
    ran = tmp_path / "ran"
    out = copy(folder, tmp_path / "copy")
    (out / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    load_teacher(str(out))
    (out / "model.safetensors").unlink()
    complaint(out)
    (out / "model.safetensors").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(InputError, match="not those of a DINOv2"):
        load_teacher(str(out))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "vit"}, "model_type 'vit'"),
        ({"hidden_size": 48}, "another shape"),
        ({"num_hidden_layers": 3}, "18 tensors"),
        ({"hidden_size": 25}, "not those of a DINOv2|another shape"),
        ({"patch_size": 0}, "not those of a DINOv2"),
        ({"hidden_size": "many"}, "not those of a DINOv2"),
        ({"hidden_act": "none such"}, "not those of a DINOv2"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, config, said):
    message = complaint(copy(folder, tmp_path / "copy", config))
    print(message)
    assert re.search(said, message)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"model_type": null}'])
def test_a_broken_config_is_refused(folder, tmp_path, text):
    out = copy(folder, tmp_path / "copy")
    (out / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in complaint(out)


def test_truncated_weights_are_refused(folder, tmp_path):
    out = copy(folder, tmp_path / "copy")
    data = (out / "model.safetensors").read_bytes()
    for size in (0, 7, 100, len(data) - 1):
        (out / "model.safetensors").write_bytes(data[:size])
        with pytest.raises(InputError, match="not those of a DINOv2"):
            load_teacher(str(out))


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'copernicus-platform[distill]'" in complaint(folder)


LOAD = """
import sys
from copernicus.datasets.sensors import InputError
from copernicus.models.teacher import load_teacher
for source in sys.argv[1:]:
    try:
        print(load_teacher(source).identity)
    except InputError as error:
        print("InputError:", error)
"""


def elsewhere(*sources: str, **environment: str) -> list[str]:
    """`load_teacher` in a process of its own, for huggingface_hub reads its environment once."""
    process = subprocess.run(
        [sys.executable, "-c", LOAD, *sources],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.strip().splitlines()
    assert len(lines) == len(sources), process.stdout
    return lines


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download of a model's files asks for."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder = folder
        self.asked: list[str] = []

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        parts = self.path.split("/")
        known = parts[:4] == ["", "own", "dino", "resolve"] and parts[4] in ("main", COMMIT)
        file = self.server.folder / parts[-1]
        if not known or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{len(data)}-{file.name}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.mark.parametrize(
    "away", [{"HF_HUB_OFFLINE": "1"}, pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.slow)]
)
def test_a_teacher_on_the_hub(folder, tmp_path, away):
    """Fetched once, from one revision; afterwards it is there without the hub. What is not there is one message."""
    cache, identity = {"HF_HOME": str(tmp_path / "hf")}, load_teacher(str(folder)).identity
    with Hub(folder) as hub:
        found, unknown = elsewhere("hf://own/dino", "hf://own/none", **cache, HF_ENDPOINT=hub.url)
        files = [path for path in hub.asked if "/resolve/" in path and "/own/dino/" in path]
    assert found == identity
    assert {path.rsplit("/", 1)[1] for path in files} == {"config.json", "model.safetensors"}
    assert any(f"/{COMMIT}/model.safetensors" in path for path in files)
    assert "InputError: teacher hf://own/none: cannot be fetched from the hub" in unknown
    found, unknown = elsewhere("hf://own/dino", "hf://own/none", **cache, **away)
    assert found == identity
    assert unknown.startswith("InputError: teacher hf://own/none: cannot be fetched from the hub (")
    assert unknown.endswith("give a folder that holds its config.json and model.safetensors")


@pytest.mark.parametrize("source", ["hf://dino", "hf://own/dino/model.safetensors", "hf://own/", "hf:///"])
def test_a_wrong_hub_address_is_refused(source):
    assert "write hf://owner/repository" in complaint(source)
