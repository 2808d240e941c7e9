"""Weights into models: from files, a run's checkpoint folder or the Hugging Face hub; nothing is ever unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError
from copernicus.models.masked_autoencoder import DECODER_PREFIXES, MaskedAutoencoder
from copernicus.models.vit import CopernicusFMViT

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        source: the file that was read.
        loaded: names of the parameters that were set.
        missing: the model's names that the file lacks.
        unexpected: the file's names that the model lacks.
        other_shape: name -> (shape in the file, shape in the model).
        dropped: names left from pretraining (a masked autoencoder's decoder, ...), of no use to an encoder.
        renamed: name in the file -> name in the model.
        fresh: the model's names that its published files lack, too; they keep their initial values.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dropped: tuple[str, ...]
    renamed: dict[str, str]
    fresh: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.other_shape)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} parameters loaded"]
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("fresh", self.fresh)):
            if names:
                lines.append(f"{title} ({len(names)}): {_shorten(names)}")
        if self.other_shape:
            shapes = [f"{name} {list(theirs)} for {list(ours)}" for name, (theirs, ours) in self.other_shape.items()]
            lines.append(f"other shape ({len(shapes)}, file for model): {_shorten(shapes)}")
        return "; ".join(lines)


def _shorten(names: tuple[str, ...] | list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def load_weights(model: nn.Module, source: str | Path, strict: bool = True) -> LoadReport:
    """Load weights from a file, a run's checkpoint folder or the Hugging Face hub.

    A masked autoencoder's weights go into an encoder without their decoder; its last norm (``norm``, over all tokens)
    becomes the encoder's, which is called ``fc_norm`` where that pools patch tokens. Nothing is unpickled.

    Args:
        model: an encoder or a masked autoencoder of ``create_model``.
        source: ``.safetensors``, ``.pth`` or ``.pt`` with a state dict, bare or under ``model``; a folder that holds
            one; or ``hf://owner/repository/file``.
        strict: False loads what fits and reports the rest.

    Raises:
        InputError: no such source, a file that holds more than tensors, or (strict) names or shapes that differ.
    """
    path = _fetch(str(source)) if str(source).startswith("hf://") else _find(Path(source))
    state = read_state_dict(path)
    own = model.state_dict()

    encoder_only = isinstance(model, CopernicusFMViT) and not isinstance(model, MaskedAutoencoder)
    useless = DECODER_PREFIXES if encoder_only else getattr(model, "ignored_weights", ())
    dropped = tuple(name for name in state if name.startswith(useless) and name not in own)
    state = {name: value for name, value in state.items() if name not in dropped}
    renamed = {}
    if "fc_norm.weight" in own and "norm.weight" in state and "fc_norm.weight" not in state:
        renamed = {f"norm.{part}": f"fc_norm.{part}" for part in ("weight", "bias") if f"norm.{part}" in state}
        state = {renamed.get(name, name): value for name, value in state.items()}

    other_shape = {
        name: (tuple(state[name].shape), tuple(own[name].shape))
        for name in own
        if name in state and state[name].shape != own[name].shape
    }
    fitting = {name: state[name] for name in own if name in state and name not in other_shape}
    absent = [name for name in own if name not in state]
    fresh = tuple(name for name in absent if name.startswith(getattr(model, "optional_weights", ())))
    report = LoadReport(
        source=str(source),
        loaded=tuple(fitting),
        missing=tuple(name for name in absent if name not in fresh),
        unexpected=tuple(name for name in state if name not in own),
        other_shape=other_shape,
        dropped=dropped,
        renamed=renamed,
        fresh=fresh,
    )
    if strict and not report.complete:
        raise InputError(f"weights do not fit the model: {report}. Give the model they were made for, or strict=False")
    model.load_state_dict(fitting, strict=False)
    return report


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; never runs anything that the file may carry.

    Raises:
        InputError: not readable, holds more than tensors and plain values, or no state dict.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"weights {path}: refused, the file is not made of tensors alone; nothing in it was run"
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"weights {path}: cannot be read ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"weights {path}: no state dict found, neither at the top nor under 'model'")
    return dict(content)


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"weights: no file or folder {path}")
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    named = [file for file in files if file.stem in ("model", "checkpoint")]
    chosen = files if len(files) == 1 else named
    if len(chosen) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(f"weights: folder {path} should hold one {' / '.join(WEIGHT_SUFFIXES)} file; found {found}")
    return chosen[0]


def _fetch(url: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = url.removeprefix("hf://").split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise InputError(f"weights {url!r}: write hf://owner/repository/file")
    owner, repository, file = parts
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", file))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"weights {url}: cannot be fetched from the hub ({reason})") from error
