"""Embeddings of variables' names: what stands for a sensor that has no wavelength (ozone, elevation, ...)."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from copernicus.datasets.sensors import InputError

LANGUAGE_DIM = 2048
"""Width of a Llama-3.2-1B embedding, from which the published ones come."""


class LanguageTable:
    """Name -> embedding (2048 float32). A name without one gets a stand-in drawn from the name itself.

    A stand-in tells variables apart and is the same on every machine, but bears no meaning: weights trained with
    published embeddings need those. ``stand_ins`` holds the names that have been served one.

    Raises:
        InputError: an embedding of another shape.
    """

    def __init__(self, vectors: Mapping[str, Tensor] | None = None) -> None:
        self.stand_ins: set[str] = set()
        self._vectors: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        for name, vector in (vectors or {}).items():
            if not isinstance(vector, Tensor) or vector.numel() != LANGUAGE_DIM:
                shape = tuple(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
                raise InputError(f"language embedding {name!r}: expected {LANGUAGE_DIM} numbers, got {shape}")
            self._vectors[name] = vector.detach().cpu().float().reshape(LANGUAGE_DIM)

    @classmethod
    def load(cls, path: str | Path) -> LanguageTable:
        """Read a ``.pt`` / ``.pth`` dict (the published form) or a ``.safetensors`` file of name -> embedding.

        Raises:
            InputError: no such file, not readable as tensors alone, or an embedding of another shape.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"language embeddings: no file {path}")
        try:
            if path.suffix == ".safetensors":
                vectors = load_file(path)
            else:
                vectors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"language embeddings: {path} does not hold tensors alone ({reason})") from error
        if not isinstance(vectors, dict):
            raise InputError(f"language embeddings: {path} holds a {type(vectors).__name__}, not a dict of vectors")
        return cls(vectors)

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
