"""What a checkpoint of ours says of itself: its model, its weights, the embeddings it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from copernicus.models.sources import local_file
from copernicus.models.tensors import read_tensors


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
    ours = isinstance(saved, dict) and isinstance(saved.get("architecture"), dict)
    return saved if ours else None


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
