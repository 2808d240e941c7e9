"""Models by name."""

from __future__ import annotations

import inspect
from typing import Any

from copernicus.datasets.sensors import InputError
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.vit import CopernicusFMViT

_SHAPES: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

ZOO: dict[str, tuple[type[CopernicusFMViT], dict[str, Any]]] = {
    **{f"copernicus_fm_{size}": (CopernicusFMViT, shape) for size, shape in _SHAPES.items()},
    **{f"copernicus_fm_{size}_mae": (MaskedAutoencoder, shape) for size, shape in _SHAPES.items()},
}
"""Name -> class and its arguments. ``..._mae`` are the masked autoencoders that pretrain the encoder of that size."""


def create_model(name: str, **overrides: Any) -> Any:
    """A new model with initial weights, decided by ``seed=`` (0).

    Args:
        name: one of ``ZOO``.
        overrides: arguments of its class (``CopernicusFMViT``, ``MaskedAutoencoder``) that differ from the name's.

    Raises:
        InputError: no such name, or an argument the class does not have.
    """
    if name not in ZOO:
        raise InputError(f"no model {name!r}; the models are {', '.join(ZOO)}")
    kind, shape = ZOO[name]
    known = _arguments(kind)
    if unknown := sorted(set(overrides) - set(known)):
        raise InputError(f"model {name!r} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(**{**shape, **overrides})


def _arguments(kind: type[CopernicusFMViT]) -> list[str]:
    names = list(inspect.signature(kind).parameters)
    if issubclass(kind, MaskedAutoencoder):  # passes the encoder's arguments on, but for those that it fixes itself
        names = names[:-1] + [n for n in inspect.signature(CopernicusFMViT).parameters if n not in names]
        names = [n for n in names if n not in ("num_classes", "global_pool")]
    return names
