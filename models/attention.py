"""Attention over sequences of different lengths that lie one after another in one matrix.

Shapes: N all tokens, D width, G a group of R sequences of T tokens each, S all sequences, H heads, d = D/H.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


@dataclass(frozen=True)
class Packing:
    """How the tokens of many sequences lie in one matrix.

    Attributes:
        groups: (R, T) in the order in which their tokens lie: R sequences of T tokens. The sum of R*T is N.
        starts_S1: on a GPU where each sequence begins, and N: (S + 1,) int32. One kernel then serves all groups.
    """

    groups: tuple[tuple[int, int], ...]
    starts_S1: Tensor | None = None

    @property
    def longest(self) -> int:
        return max(tokens for _, tokens in self.groups)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def packing(groups: tuple[tuple[int, int], ...], device: torch.device) -> Packing:
    """The packing of such groups. Neighbours of equal length become one group."""
    merged: list[tuple[int, int]] = []
    for count, tokens in groups:
        if merged and merged[-1][1] == tokens:
            merged[-1] = (merged[-1][0] + count, tokens)
        else:
            merged.append((count, tokens))
    starts = None
    if device.type == "cuda" and varlen_attn is not None:
        lengths = torch.tensor([0] + [tokens for count, tokens in merged for _ in range(count)])
        starts = lengths.cumsum(0).to(device=device, dtype=torch.int32)
    return Packing(tuple(merged), starts)


def attend(qkv_NX: Tensor, num_heads: int, packed: Packing) -> Tensor:
    """Multi-head attention within each sequence: queries, keys and values (N, 3 D) -> (N, D)."""
    if packed.starts_S1 is not None and len(packed.groups) > 1 and qkv_NX.dtype in (torch.bfloat16, torch.float16):
        q_NHd, k_NHd, v_NHd = qkv_NX.unflatten(1, (3, num_heads, -1)).unbind(1)
        longest, starts = packed.longest, packed.starts_S1
        return varlen_attn(q_NHd, k_NHd, v_NHd, starts, starts, longest, longest).flatten(1)
    seen = []
    parts = qkv_NX.split([count * tokens for count, tokens in packed.groups])
    for part, (count, tokens) in zip(parts, packed.groups, strict=True):
        qkv_3RHTd = part.view(count, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        seen_RHTd = F.scaled_dot_product_attention(*qkv_3RHTd.unbind(0))
        seen.append(seen_RHTd.transpose(1, 2).reshape(count * tokens, -1))
    return seen[0] if len(seen) == 1 else torch.cat(seen)


def pack(sequences: Sequence[Tensor]) -> Tensor:
    """Batches of sequences (B, T, D), each with its own B and T -> their tokens, one after another (N, D)."""
    flat = [z_BTD.flatten(0, 1) for z_BTD in sequences]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(z_ND: Tensor, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``pack``: tokens -> batches of the shapes that ``sequences`` have."""
    parts = z_ND.split([s.shape[0] * s.shape[1] for s in sequences])
    return [part.unflatten(0, s.shape[:2]) for part, s in zip(parts, sequences, strict=True)]
