"""Tensors out of strangers' files: nothing is ever unpickled."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from copernicus.datasets.sensors import InputError


def read_tensors(path: Path, what: str = "weights", mmap: bool = False) -> Any:
    """What a ``.safetensors`` file or one of ``torch.save`` holds, where that is tensors and plain values alone.

    Args:
        mmap: tensors are mapped from the file, not read, where its form allows that.

    Raises:
        InputError: not readable, or holds more; nothing in it was run.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Training codes put their command line beside the weights: a bag of plain values, which has no code to run.
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = mmap and zipfile.is_zipfile(path)  # torch.save before 1.6 wrote another form
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{what} {path}: refused, the file is not made of tensors alone; nothing in it was run"
        ) from error
    except Exception as error:  # of many kinds: the files are anybody's
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what} {path}: cannot be read ({reason})") from error
