"""Models by name, and encoders for a sensor: of the zoo, of TorchGeo or of the user's own."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from torch import nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.blocks import check_sizes
from copernicus.models.dofa import DOFA
from copernicus.models.encoder import check_takes
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.plain import PlainViT
from copernicus.models.torchgeo_adapter import PREFIX as TORCHGEO
from copernicus.models.torchgeo_adapter import TorchGeoWeights
from copernicus.models.vit import CopernicusFMViT

_SHAPES: dict[str, dict[str, int]] = {
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "patch_size": 14},
}

ZOO: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    **{f"copernicus_fm_{size}": (CopernicusFMViT, shape) for size, shape in _SHAPES.items()},
    **{f"copernicus_fm_{size}_mae": (MaskedAutoencoder, shape) for size, shape in _SHAPES.items()},
    **{f"vit_{size}": (PlainViT, _SHAPES[size]) for size in ("small", "base")},
    **{f"dofa_{size}": (DOFA, _SHAPES[size]) for size in ("small", "base", "large")},
}
"""Name -> class and its arguments. ``..._mae`` are the masked autoencoders that pretrain the encoder of that size."""

ENCODERS = tuple(name for name in ZOO if not name.endswith("_mae"))
OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""An encoder from elsewhere, ``package.module:Class``."""


def create_model(name: str, **overrides: Any) -> Any:
    """A new model with initial weights, decided by ``seed=`` (0).

    Args:
        name: one of ``ZOO``.
        overrides: arguments of its class (``CopernicusFMViT``, ``MaskedAutoencoder``, ``PlainViT``, ``DOFA``) that
            differ from the name's. A plain ``vit_...`` needs ``sensor=``.

    Raises:
        InputError: no such name, or an argument the class does not have, or lacks.
    """
    if name not in ZOO:
        raise InputError(f"no model {name!r}; the models are {', '.join(ZOO)}")
    kind, shape = ZOO[name]
    known = _arguments(kind)
    if unknown := sorted(set(overrides) - set(known)):
        raise InputError(f"model {name!r} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    if "sensor" in known and not isinstance(overrides.get("sensor"), Sensor):
        raise InputError(f'model {name!r} is made for one sensor: give it, as in sensor=SENSORS["s2_toa"]')
    return kind(**{**shape, **overrides})


def encoder_kind(name: str) -> Any:
    """What makes encoders of that name: it can be called, says what it ``takes`` and describes its ``inputs``.

    Args:
        name: of the zoo's encoders; ``torchgeo:Weights.ENTRY``; or ``package.module:Class``, which is imported.

    Raises:
        InputError: no such encoder, it cannot be imported, or it lacks a part of the ``Encoder`` protocol.
    """
    if name in ENCODERS:
        return ZOO[name][0]
    if name.startswith(TORCHGEO):
        return TorchGeoWeights(name)
    if not OWN.fullmatch(name):
        raise InputError(
            f"no encoder {name!r}; name one of {', '.join(ENCODERS)}, torchgeo:Weights.ENTRY, or your own as package.module:Class"
        )
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # whatever the user's module raises when it is imported
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"encoder {name!r}: cannot be imported ({type(error).__name__}: {reason}); install its package, or put its "
            "folder on PYTHONPATH"
        ) from error
    if lacking := [part for part in ("takes", "inputs", "encode", "encode_dense") if not hasattr(kind, part)]:
        raise InputError(f"encoder {name!r} has no {', '.join(lacking)}; see `copernicus.models.Encoder`")
    return kind


def check_encoder(name: str, sensor: Sensor, **overrides: Any) -> Any:
    """What ``create_encoder`` would find wrong, found without building it. Returns ``encoder_kind(name)``.

    Raises:
        InputError: as ``create_encoder``.
    """
    kind = encoder_kind(name)
    known = inspect.signature(kind).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    if not open_ended and (unknown := sorted(set(overrides) - set(known))):
        raise InputError(f"encoder {name!r} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
    if name in ZOO:
        shape = {**ZOO[name][1], **overrides}
        check_sizes(shape["embed_dim"], shape["num_heads"], shape["depth"])
    elif inspect.isclass(kind) and not issubclass(kind, nn.Module):
        raise InputError(f"encoder {name!r} is no torch.nn.Module; see `copernicus.models.Encoder`")
    check_takes(f"encoder {name!r}", kind, sensor)
    return kind


def create_encoder(name: str, sensor: Sensor, seed: int = 0, **overrides: Any) -> Any:
    """A new encoder for images of a sensor.

    Args:
        name: see ``encoder_kind``.
        sensor: what it is to encode. Passed on to classes that have such an argument.
        seed: of initial weights. Passed on to classes that have such an argument.
        overrides: further arguments of its class.

    Raises:
        InputError: no such encoder, it does not take the sensor, or it has no such argument.
    """
    kind = check_encoder(name, sensor, **overrides)
    shape = ZOO[name][1] if name in ZOO else {}
    given = {"sensor": sensor, "seed": seed}
    known = inspect.signature(kind).parameters
    return kind(**{**shape, **{key: value for key, value in given.items() if key in known}, **overrides})


def _arguments(kind: type[nn.Module]) -> list[str]:
    names = list(inspect.signature(kind).parameters)
    if issubclass(kind, MaskedAutoencoder):  # passes the encoder's arguments on, but for those that it fixes itself
        names = names[:-1] + [n for n in inspect.signature(CopernicusFMViT).parameters if n not in names]
        names = [n for n in names if n not in ("num_classes", "global_pool")]
    return names
