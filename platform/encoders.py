"""Encoders as experiments name them: a model, its sizes and its weights."""

from __future__ import annotations

from typing import Any

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.platform.checkpoint import architecture
from copernicus.platform.language import open_language
from copernicus.platform.schema import Model


def resolved(name: str, sizes: dict[str, int]) -> tuple[str, dict[str, Any]]:
    """A model with all its sizes, those that its name gives among them."""
    from copernicus.models.zoo import ZOO

    return name, {**(ZOO[name][1] if name in ZOO else {}), **sizes}


def open_encoder(
    name: str, model: Model, weights: str, sensor: Sensor, seed: int = 0, language: str | None = None
) -> Any:
    """An encoder in evaluation mode; those of the zoo pool their patch tokens.

    Args:
        name: of the encoder, for messages.
        weights: a file, hf://..., or none: random ones of ``seed``.
        sensor: what it is to encode, first of all.
        language: file of language embeddings.

    Raises:
        InputError: weights that cannot be read, or that are not of this model.
    """
    from copernicus.models.weights import load_weights
    from copernicus.models.zoo import create_encoder

    sizes = model.encoder_overrides()
    # Shapes do not tell the number of heads: a checkpoint of ours says what it is.
    known = None if weights == "none" else architecture(weights)
    if known is not None and resolved(*known) != resolved(model.name, sizes):
        raise InputError(f"encoder {name}: {weights} is of {known[0]} {known[1]}, not {model.name} {sizes}")
    # An encoder that knows no language has no such argument.
    spoken = {"language": open_language(language)} if language else {}
    encoder = create_encoder(model.name, sensor, seed, **sizes, **spoken)
    if weights != "none":
        load_weights(encoder, weights)
    encoder.eval()
    return encoder
