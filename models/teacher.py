"""DINOv2 as the frozen teacher of distillation, from files of tensors alone.

Facts: the public pretraining of Copernicus-FM (arXiv 2503.11849) takes torch.hub's DINOv2 ViT-B/14 and its
``get_intermediate_layers(x, 1)[0]``: the patch tokens after the last block and the last norm, without the class token, of
Sentinel-2's red, green and blue normalised by Sentinel-2's own statistics. The same here, through ``transformers``, which
resizes the position table to exactly the token grid where torch.hub's code adds 0.1 token to each side first.

Shapes: B batch, H W image, h w token grid, L = h*w patch tokens, F teacher width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.datasets.sensors import InputError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INSTALL = "pip install 'copernicus-platform[distill]'"


class DinoTeacher:
    """A frozen DINOv2: normalised red, green, blue (B, 3, H, W) -> patch tokens (B, L, F) after the last norm, float32.

    Not a torch module, so that a module that holds one does not take it in: neither optimiser, checkpoint nor gradient
    averaging meets it. Sides that are no multiples of its patch are resized to the nearest multiple, bilinearly (224 =
    16 x 14 is one; 32 becomes 28). Inside an autocast region it computes as that says.

    Attributes:
        dim: its width F.
        patch: the side of its patches, pixels.
        identity: 32 hex digits of its settings' and weights' files: equal identities give equal answers.
    """

    def __init__(self, model: Any, identity: str) -> None:
        self._model = model.eval().requires_grad_(False)
        self.dim: int = model.config.hidden_size
        self.patch: int = model.config.patch_size
        self.identity = identity

    def to(self, device: torch.device | str) -> DinoTeacher:
        """Move it, and return it."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, rgb_B3HW: Tensor) -> Tensor:
        """Patch tokens (B, L, F), where the images lie; computed where the teacher lies."""
        x_B3HW = rgb_B3HW.to(self._model.device, torch.float32)
        height, width = (self._fitting(side) for side in x_B3HW.shape[2:])
        if (height, width) != tuple(x_B3HW.shape[2:]):
            x_B3HW = F.interpolate(x_B3HW, (height, width), mode="bilinear", align_corners=False)
        tokens_BTF = self._model(pixel_values=x_B3HW).last_hidden_state
        return tokens_BTF[:, 1:].to(rgb_B3HW.device, torch.float32)

    def _fitting(self, side: int) -> int:
        """The nearest multiple of the patch, of two equally near the larger; at least one patch."""
        return max(1, (side + self.patch // 2) // self.patch) * self.patch


def load_teacher(source: str, device: torch.device | str = "cpu") -> DinoTeacher:
    """A DINOv2 teacher, as `imitation_loss` takes it. Nothing is ever unpickled.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors`` as ``transformers`` writes them, or
            ``hf://owner/repository`` on the Hugging Face hub, such as ``hf://facebook/dinov2-base`` (the published one).

    Raises:
        InputError: ``transformers`` is not installed; no such folder, files or repository; the hub does not answer; or
            the files are not those of a DINOv2.
    """
    try:
        from transformers import Dinov2Config, Dinov2Model
    except ImportError as error:
        raise InputError(f"teacher {source}: DINOv2 needs transformers ({error}); {INSTALL}") from None
    folder = _fetch(source) if source.startswith("hf://") else Path(source)
    if absent := [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]:
        raise InputError(
            f"teacher {source}: no {' and no '.join(absent)} there; give a folder that holds {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}, or hf://facebook/dinov2-base"
        )
    config = _read_config(folder / CONFIG_FILE, source)
    try:
        with _quiet():
            # The library knows under which names earlier versions of it have saved the tensors.
            loaded: Any = Dinov2Model.from_pretrained(
                folder, config=Dinov2Config.from_dict(config), use_safetensors=True, local_files_only=True,
                dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # of many kinds, for the files are anybody's
        raise InputError(
            f"teacher {source}: {CONFIG_FILE} and {WEIGHTS_FILE} are not those of a DINOv2 ({_line(error)})"
        ) from error
    model, report = loaded
    if wrong := sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}):
        raise InputError(
            f"teacher {source}: {len(wrong)} tensors that {CONFIG_FILE} asks for are not in {WEIGHTS_FILE} or have another "
            f"shape there ({wrong[0]} is the first); give both files of the same model"
        )
    return DinoTeacher(model, _identity(config, folder / WEIGHTS_FILE)).to(device)


def _fetch(url: str) -> Path:
    """The folder of the hub's local cache that holds both files, of one revision."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = url.removeprefix("hf://")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise InputError(f"teacher {url!r}: write hf://owner/repository, as in hf://facebook/dinov2-base")
    try:
        folder = Path(hf_hub_download(repository, CONFIG_FILE)).parent
        hf_hub_download(repository, WEIGHTS_FILE, revision=folder.name)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"teacher {url}: cannot be fetched from the hub ({_line(error)}); where there is no hub, give a folder that "
            f"holds its {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    return folder


def _read_config(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"teacher {source}: {CONFIG_FILE} cannot be read ({_line(error)})") from error
    kind = content.get("model_type") if isinstance(content, dict) else type(content).__name__
    if kind != "dinov2":
        raise InputError(f"teacher {source}: {CONFIG_FILE} is of model_type {kind!r}; the teacher is a 'dinov2'")
    return content


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bar and table of what did not fit, which is said in one line instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _identity(config: dict[str, Any], weights: Path) -> str:
    """Of what the files say, not of how this version of the library holds it: a run resumes after an update."""
    said = {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}
    digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
    with open(weights, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
