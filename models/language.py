"""Embeddings of variables' names: what stands for a sensor that has no wavelength (ozone, elevation, ...)."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.sensors import InputError
from copernicus.models.sources import file_digest, local_file
from copernicus.models.tensors import read_tensors

LANGUAGE_DIM = 2048
"""Width of a Llama-3.2-1B embedding, from which the published ones come."""

LANGUAGE_SUFFIXES = (".pt", ".pth", ".safetensors", ".npz", ".json")

STAND_IN = "stand-in"


class LanguageTable:
    """Name -> embedding (2048 float32). A name without one gets a stand-in drawn from the name itself.

    A stand-in tells variables apart and is the same on every machine, but bears no meaning: weights trained with
    published embeddings need those. ``stand_ins`` holds the names that have been served one. ``origin`` is the
    beginning of the file's sha256, empty without a file.

    Raises:
        InputError: an embedding of another shape, or with values that are not finite.
    """

    def __init__(self, vectors: Mapping[str, Tensor] | None = None, origin: str = "") -> None:
        self.stand_ins: set[str] = set()
        self.origin = origin
        self._vectors: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        for name, vector in (vectors or {}).items():
            if not isinstance(vector, Tensor) or vector.numel() != LANGUAGE_DIM:
                shape = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
                raise InputError(f"language embedding {name!r}: expected {LANGUAGE_DIM} numbers, got {shape}")
            self._vectors[name] = vector.detach().cpu().float().reshape(LANGUAGE_DIM)
            if not bool(self._vectors[name].isfinite().all()):
                raise InputError(f"language embedding {name!r}: holds values that are not finite")

    @classmethod
    def load(cls, source: str | Path) -> LanguageTable:
        """Read a file of name -> embedding: ``.pt`` / ``.pth`` (the published form), ``.safetensors``, ``.npz`` or
        ``.json``; a path, ``hf://owner/repository/file`` or an artifact of MLflow (see ``sources.local_file``).

        Raises:
            InputError: no such file, not readable as numbers alone, or an embedding of another shape.
        """
        with local_file(source, LANGUAGE_SUFFIXES, "language embeddings") as path:
            vectors = _read(path)
            if not isinstance(vectors, dict) or not vectors:
                raise InputError(
                    f"language embeddings: {source} holds {'nothing' if vectors == {} else type(vectors).__name__}, not "
                    "names with a vector each"
                )
            return cls(vectors, file_digest(path)[:12])

    @torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
    def vector(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The embedding of a name: (2048,) float32. It is copied to a device once."""
        device = torch.device(device)
        if name not in self._vectors:
            self.stand_ins.add(name)
            rng = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
            self._vectors[name] = torch.from_numpy(rng.standard_normal(LANGUAGE_DIM, dtype=np.float32))
        if device.type == "cpu":
            return self._vectors[name]
        if (name, device) not in self._copies:
            self._copies[name, device] = self._vectors[name].to(device)
        return self._copies[name, device]

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of the names that get a stand-in."""
        return [name for name in names if name not in self._vectors or name in self.stand_ins]

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """Name -> 12 hex digits of its embedding (whatever file that came from), or ``stand-in``: what a checkpoint
        keeps, to tell later whether it is used with the embeddings that it was trained with."""
        names = list(names)
        lacking = self.lacking(names)
        return {
            name: STAND_IN if name in lacking else hashlib.sha256(self.vector(name).numpy().tobytes()).hexdigest()[:12]
            for name in names
        }

    def differing(self, trained: Mapping[str, str]) -> list[str]:
        """Names whose embedding here is not the one of these ``digests``."""
        here = self.digests(trained)
        return [name for name, digest in trained.items() if here[name] != digest]

    def describe(self, names: Iterable[str]) -> str:
        """What these names' embeddings are, for records: the file's digest, and who has a stand-in."""
        names = list(names)
        lacking = self.lacking(names)
        parts = [f"sha256:{self.origin}" if self.origin else "given"] if len(lacking) < len(names) else []
        return "; ".join([*parts, *([f"{STAND_IN}: {', '.join(lacking)}"] if lacking else [])])


def _read(path: Path) -> Any:
    what = "language embeddings"
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(np.asarray(arrays[name], np.float32)) for name in arrays.files}
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                return content
            return {name: torch.tensor(vector, dtype=torch.float32) for name, vector in content.items()}
    except (ValueError, TypeError, RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{what} {path}: cannot be read as names with a vector of numbers each ({reason})") from error
    if path.suffix not in LANGUAGE_SUFFIXES:
        raise InputError(f"{what} {path}: give a file that ends in {', '.join(LANGUAGE_SUFFIXES)}")
    return read_tensors(path, what)
