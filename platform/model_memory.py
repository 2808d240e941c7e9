"""What a pretrained model keeps in memory and in checkpoints, from its shapes: nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from copernicus.models.blocks import Block
from copernicus.models.initialise import shapes_only
from copernicus.models.zoo import create_model

PARAMETER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a number, float32; the two moments are AdamW's, in memory and in checkpoints."""
RECORD = 400
"""Bytes of a checkpoint beside a tensor's numbers: its name, its place, padding to 64 bytes, the zip's two headers."""


@dataclass(frozen=True)
class ModelSize:
    """Numbers and tensors of a masked autoencoder, all and those that are trained; numbers of each transformer block."""

    parameters: int
    trained: int
    tensors: int
    trained_tensors: int
    blocks: tuple[int, ...]

    def state_bytes(self, parallel: str, workers: int) -> tuple[float, float]:
        """Parameters, gradients and moments on each worker: (all along, whole while a step lasts besides).

        ddp keeps everything on each. fsdp keeps a share and, while a step lasts, whole parameters and gradients of what
        lies outside the transformer blocks and of two blocks (one computes, the next is fetched).
        """
        kept = self.parameters * PARAMETER + self.trained * (GRADIENT + MOMENTS)
        if parallel == "ddp" or workers == 1:
            return kept, 0.0
        whole = self.parameters - sum(self.blocks) + 2 * max(self.blocks)
        return kept / workers, whole * (PARAMETER + GRADIENT)

    @property
    def checkpoint_bytes(self) -> int:
        """Of the file: parameters, and of those that are trained the moments and a step count."""
        numbers = self.parameters * PARAMETER + self.trained * MOMENTS + self.trained_tensors * 4
        return numbers + RECORD * (self.tensors + 3 * self.trained_tensors)


def model_size(
    name: str, sizes: Mapping[str, int], distill_dim: int = 0, spectral: bool = True, variable: bool = True
) -> ModelSize:
    """Of a model of the zoo with a decoder.

    Args:
        name: of its encoder. sizes: those that differ from the name's.
        spectral, variable: whether sensors of either kind are trained; the hypernetworks of a kind without are frozen.

    Raises:
        InputError: sizes that cannot be.
    """
    with shapes_only():
        model = create_model(f"{name}_mae", distill_dim=distill_dim, **sizes)
    unreached = [kind for kind, used in (("_spectral.", spectral), ("_variable.", variable)) if not used]
    named = dict(model.named_parameters())
    trained = [p for n, p in named.items() if p.requires_grad and not any(kind in n for kind in unreached)]
    return ModelSize(
        parameters=sum(p.numel() for p in named.values()),
        trained=sum(p.numel() for p in trained),
        tensors=len(named),
        trained_tensors=len(trained),
        blocks=tuple(sum(p.numel() for p in b.parameters()) for b in model.modules() if isinstance(b, Block)),
    )
