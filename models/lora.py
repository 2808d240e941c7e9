"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685) of an encoder's attention.

A weight W becomes W + B A with A (r, in) and B (out, r), of which only A and B are trained. B starts as zeros: an adapted
encoder computes what it did before, to the bit. The sum is made in every pass, so ``merge_lora`` leaves a plain encoder
that computes exactly what the adapted one did. (The usual form, W x + B (A x), would save the gradient of the sum, at
the price of another rounding.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from copernicus.datasets.sensors import InputError
from copernicus.models.initialise import generator


class LowRank(nn.Module):
    """W -> W + B A. With alpha = r, which leaves the paper's factor alpha / r at 1."""

    def __init__(self, weight: Tensor, rank: int, seed: int, name: str) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        bound = in_features**-0.5  # the paper's code starts A as torch starts a Linear
        drawn = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator(seed, f"lora.{name}"))
        self.lora_A = nn.Parameter(drawn.to(weight))
        self.lora_B = nn.Parameter(weight.new_zeros(out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def add_lora(encoder: nn.Module, rank: int, seed: int = 0) -> list[nn.Parameter]:
    """Adapt ``attn.qkv`` and ``attn.proj`` of every block, in place; all other parameters are frozen.

    Returns:
        what is to be trained.

    Raises:
        InputError: a rank below 1, or an encoder whose blocks have no such layers.
    """
    if rank < 1:
        raise InputError(f"lora_rank is {rank}; it must be at least 1")
    layers = attention_layers(encoder)
    encoder.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for name, layer in layers.items():
        adapter = LowRank(layer.weight, rank, seed, name)
        parametrize.register_parametrization(layer, "weight", adapter)
        trained += [adapter.lora_A, adapter.lora_B]
    return trained


def merge_lora(encoder: nn.Module) -> None:
    """Put the sums in the weights' places: names, shapes and class are those from before ``add_lora``."""
    for layer in attention_layers(encoder).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def attention_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """The layers of all blocks that LoRA adapts, by name.

    Raises:
        InputError: the encoder has none.
    """
    layers = {
        f"blocks.{number}.attn.{part}": getattr(getattr(block, "attn", None), part, None)
        for number, block in enumerate(getattr(encoder, "blocks", ()))
        for part in ("qkv", "proj")
    }
    if not layers or not all(isinstance(layer, nn.Linear) for layer in layers.values()):
        raise InputError(
            f"LoRA adapts the attention of a transformer's blocks (blocks[i].attn.qkv and .proj, Linear layers); "
            f"{type(encoder).__name__} has none; fine-tune all of it instead"
        )
    return layers  # type: ignore[return-value]
