"""What a checkpoint of ours says of itself: its model, its weights, the embeddings it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from copernicus.datasets.sensors import InputError
from copernicus.models.sources import local_file
from copernicus.models.tensors import read_tensors
from copernicus.models.zoo import ZOO


def read_checkpoint(source: str | Path) -> dict[str, Any] | None:
    """The checkpoint, its tensors mapped from the file; None where ``source`` holds weights of another kind.

    Keys: ``model`` (state dict of the masked autoencoder), ``architecture`` (name in the zoo, sizes that differ),
    ``step``, ``samples_seen``, ``language`` (variable -> digest of its embedding) and more.

    Raises:
        InputError: no such source, or a file that cannot be read.
    """
    if str(source).endswith((".pth", ".safetensors")):
        return None  # not fetched in vain: runs write .pt
    with local_file(source) as path:
        if path.suffix != ".pt":
            return None
        saved = read_tensors(path, mmap=True)
    if not isinstance(saved, dict) or not isinstance(saved.get("architecture"), dict):
        return None
    sizes = dict(saved["architecture"])
    language = saved.get("language", {})
    if (
        sizes.pop("name", None) not in ZOO
        or not all(isinstance(k, str) and isinstance(v, int) for k, v in sizes.items())
        or not isinstance(saved.get("model"), dict)
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in saved["model"].items())
        or not isinstance(language, dict)
    ):
        raise InputError(
            f"checkpoint {source}: does not say which model of the zoo it is of; it is damaged, or not ours"
        )
    return saved


def architecture(source: str | Path) -> tuple[str, dict[str, int]] | None:
    """The encoder's name in the zoo and its sizes, where ``source`` is a checkpoint of ours; else None.

    Raises:
        InputError: no such source, or a file that cannot be read.
    """
    saved = read_checkpoint(source)
    if saved is None:
        return None
    sizes = dict(saved["architecture"])
    return sizes.pop("name"), sizes


def trained_language(source: str | Path) -> dict[str, str]:
    """Variable -> digest of the embedding that a checkpoint of ours was trained with; empty for other weights.

    Raises:
        InputError: no such source, or a file that cannot be read.
    """
    return dict((read_checkpoint(source) or {}).get("language", {}))
