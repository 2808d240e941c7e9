"""Weights into models: every name and shape of a file against the model's; nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError
from copernicus.models.masked_autoencoder import DECODER_PREFIXES, MaskedAutoencoder
from copernicus.models.sources import local_file
from copernicus.models.tensors import read_tensors
from copernicus.models.vit import CopernicusFMViT

NESTS = ("model", "state_dict")
"""Keys under which training codes put the state dict, beside their optimiser's."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""


@dataclass(frozen=True)
class LoadReport:
    """What ``load_weights`` did.

    Attributes:
        source: what was read.
        loaded: names of the parameters that were set from it.
        missing: the model's names that the file lacks.
        unexpected: the file's names that the model lacks.
        other_shape: name -> (shape in the file, shape in the model).
        dropped: names left from pretraining (a masked autoencoder's decoder, ...), of no use to an encoder.
        renamed: name in the file -> name in the model.
        fresh: the model's names that its published files lack, too; they keep their initial values.
        under: the key under which the file has its state dict; empty: at the top.
        prefix: what stood before every name in the file and was taken off.
        identity: names of the last norm, which the file has under no name, set to 1 and 0.
        other_language: variables whose embeddings are not the ones that the weights (a checkpoint of ours) were
            trained with: features of their sensors mean nothing.
    """

    source: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    other_shape: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    dropped: tuple[str, ...]
    renamed: dict[str, str]
    fresh: tuple[str, ...] = ()
    under: str = ""
    prefix: str = ""
    identity: tuple[str, ...] = ()
    other_language: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Nothing missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.other_shape)

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} parameters loaded"]
        if self.under:
            lines[0] += f" from {self.under!r}"
        if self.prefix:
            lines.append(f"{self.prefix!r} taken off every name")
        elif self.renamed:
            lines.append(f"renamed: {_shorten([f'{old} -> {new}' for old, new in self.renamed.items()])}")
        if self.identity:
            lines.append(f"without a last norm: {', '.join(self.identity)} set to identity")
        if self.dropped:
            lines.append(f"{len(self.dropped)} of no use to the model left out")
        for title, names in (("missing", self.missing), ("unexpected", self.unexpected), ("fresh", self.fresh)):
            if names:
                lines.append(f"{title} ({len(names)}): {_shorten(names)}")
        if self.other_shape:
            shapes = [f"{name} {list(theirs)} for {list(ours)}" for name, (theirs, ours) in self.other_shape.items()]
            lines.append(f"other shape ({len(shapes)}, file for model): {_shorten(shapes)}")
        if self.other_language:
            lines.append(f"trained with other language embeddings of {', '.join(self.other_language)}")
        return "; ".join(lines)


def _shorten(names: tuple[str, ...] | list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def load_weights(model: nn.Module, source: str | Path, strict: bool = True) -> LoadReport:
    """Load weights from a file, a run's checkpoint, MLflow's artifacts or the Hugging Face hub.

    A masked autoencoder's weights go into an encoder without their decoder; its last norm (``norm``, over all tokens)
    becomes the encoder's, which is called ``fc_norm`` where that pools patch tokens. The published encoder has no last
    norm at all, and public code (the benchmark's classification, TorchGeo) starts ``fc_norm`` as identity: so does
    this. Position tables of another side are of another shape, not resized: the model does that at each image.

    Args:
        model: an encoder or a masked autoencoder of ``create_model``.
        source: see ``sources.local_file``; ``.safetensors``, ``.pth`` or ``.pt`` with a state dict, bare or under
            ``model`` or ``state_dict``, with or without ``module.`` before its names. Nothing is unpickled.
        strict: False loads what fits and reports the rest.

    Raises:
        InputError: no such source, a file that holds more than tensors, or (strict) names or shapes that differ.
    """
    with local_file(source) as path:
        state, under, trained = _read(path)
    own = model.state_dict()
    names = {name: name for name in state}  # in the file -> in the model
    prefix = ""
    while found := next((p for p in PREFIXES if names and all(n.startswith(p) for n in names.values())), ""):
        names = {old: new.removeprefix(found) for old, new in names.items()}
        prefix += found

    encoder_only = isinstance(model, CopernicusFMViT) and not isinstance(model, MaskedAutoencoder)
    useless = DECODER_PREFIXES if encoder_only else getattr(model, "ignored_weights", ())
    dropped = tuple(name for name in names.values() if name.startswith(useless) and name not in own)
    optional = getattr(model, "optional_weights", ())
    present = set(names.values()) - set(dropped)
    identity: tuple[str, ...] = ()
    if "fc_norm.weight" in own and "fc_norm.weight" not in present:
        if "norm.weight" in present:
            names = {old: f"fc_{new}" if new in ("norm.weight", "norm.bias") else new for old, new in names.items()}
        elif "blocks.0.norm1.weight" in present and "fc_norm.bias" not in present and "fc_norm." not in optional:
            identity = ("fc_norm.weight", "fc_norm.bias")
    renamed = {old: new for old, new in names.items() if new not in dropped and old != new}
    values = {new: state[old] for old, new in names.items() if new not in dropped}

    other_shape = {
        name: (tuple(values[name].shape), tuple(own[name].shape))
        for name in own
        if name in values and values[name].shape != own[name].shape
    }
    fitting = {name: values[name] for name in own if name in values and name not in other_shape}
    absent = [name for name in own if name not in values and name not in identity]
    fresh = tuple(name for name in absent if name.startswith(optional))
    report = LoadReport(
        source=str(source),
        loaded=tuple(fitting),
        missing=tuple(name for name in absent if name not in fresh),
        unexpected=tuple(name for name in values if name not in own),
        other_shape=other_shape,
        dropped=dropped,
        renamed=renamed,
        fresh=fresh,
        under=under,
        prefix=prefix,
        identity=identity,
        other_language=tuple(model.language.differing(trained)) if isinstance(model, CopernicusFMViT) else (),
    )
    if strict and not report.complete:
        raise InputError(f"weights do not fit the model: {report}. Give the model they were made for, or strict=False")
    for name in identity:
        fitting[name] = torch.full_like(own[name], float(name.endswith("weight")))
    model.load_state_dict(fitting, strict=False)
    return report


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name; never runs anything that the file may carry.

    Raises:
        InputError: not readable, holds more than tensors and plain values, or no state dict.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """The state dict; the key under which it lay; the digests of the language embeddings that it was trained with."""
    content = read_tensors(path)
    under, trained = "", {}
    if isinstance(content, Mapping):
        under = next((key for key in NESTS if isinstance(content.get(key), Mapping)), "")
        if under and "architecture" in content and isinstance(content.get("language"), Mapping):
            trained = dict(content["language"])
        content = content[under] if under else content
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise InputError(f"weights {path}: no state dict found, neither at the top nor under {' or '.join(NESTS)}")
    for name, value in content.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or not value.is_floating_point():
            kind = "quantised" if value.is_quantized else "without values" if value.is_meta else value.layout
            raise InputError(
                f"weights {path}: {name} is {kind} of {value.dtype}; parameters are plain floating-point numbers"
            )
        if not bool(value.isfinite().all()):
            raise InputError(f"weights {path}: {name} holds NaN or infinite values; the run that wrote it has diverged")
    return dict(content), under, trained
