"""Attention over sequences of different lengths that lie one after another in one matrix.

Shapes: N all tokens, D width, G a group of R sequences of T tokens each, H heads, d = D/H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = Sequence[tuple[int, int]]
"""(R, T) of each group, in the order in which their tokens lie: R sequences of T tokens. Their sum R*T is N."""


def attend(qkv_NX: Tensor, num_heads: int, groups: Groups) -> Tensor:
    """Multi-head attention within each sequence: queries, keys and values (N, 3 D) -> (N, D)."""
    seen = []
    for part, (count, tokens) in zip(qkv_NX.split([r * t for r, t in groups]), groups, strict=True):
        qkv_3RHTd = part.view(count, tokens, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        seen_RHTd = F.scaled_dot_product_attention(*qkv_3RHTd.unbind(0))
        seen.append(seen_RHTd.transpose(1, 2).reshape(count * tokens, -1))
    return seen[0] if len(seen) == 1 else torch.cat(seen)


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Batches of sequences (B, T, D), each with its own B and T -> their tokens (N, D), and their groups.

    Neighbours of equal length become one group, which needs one call of the attention kernel.
    """
    groups: list[tuple[int, int]] = []
    for z_BTD in sequences:
        count, tokens = z_BTD.shape[:2]
        if groups and groups[-1][1] == tokens:
            groups[-1] = (groups[-1][0] + count, tokens)
        else:
            groups.append((count, tokens))
    flat = [z_BTD.flatten(0, 1) for z_BTD in sequences]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)), groups


def unpack(z_ND: Tensor, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``pack``: tokens -> batches of the shapes that ``sequences`` have."""
    parts = z_ND.split([s.shape[0] * s.shape[1] for s in sequences])
    return [part.unflatten(0, s.shape[:2]) for part, s in zip(parts, sequences, strict=True)]
