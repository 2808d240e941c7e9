"""Attention over sequences of different lengths that lie one after another in one matrix.

Shapes: N all tokens, D width, G a group of R sequences of T tokens each, S all sequences, H heads, d = D/H.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Groups = tuple[tuple[int, int], ...]
"""(R, T) in the order in which their tokens lie: R sequences of T tokens. The sum of R*T is N."""


def group(sequences: Sequence[Tensor]) -> Groups:
    """The groups of batches of sequences (B, T, ...). Neighbours of equal length become one group."""
    groups: list[tuple[int, int]] = []
    for count, tokens in ((s.shape[0], s.shape[1]) for s in sequences):
        if groups and groups[-1][1] == tokens:
            groups[-1] = (groups[-1][0] + count, tokens)
        else:
            groups.append((count, tokens))
    return tuple(groups)


def attend(qkv_NX: Tensor, num_heads: int, groups: Groups) -> Tensor:
    """Multi-head attention within each sequence: queries, keys and values (N, 3 D) -> (N, D).

    A kernel call for each group. One call of ``varlen_attn`` for all took longer on an H100 (LOG.md, 2026-11-26), and so
    did groups that are cut out of the matrix before queries, keys and values are: their gradients are then put back
    together by a slower kernel.
    """
    parts_3 = [part.split([r * t for r, t in groups]) for part in qkv_NX.unflatten(1, (3, num_heads, -1)).unbind(1)]
    seen = []
    for (count, tokens), *qkv in zip(groups, *parts_3, strict=True):
        q, k, v = (part_MHd.unflatten(0, (count, tokens)).transpose(1, 2) for part_MHd in qkv)
        seen.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return seen[0] if len(seen) == 1 else torch.cat(seen)


def pack(sequences: Sequence[Tensor]) -> Tensor:
    """Batches of sequences (B, T, D), each with its own B and T -> their tokens, one after another (N, D)."""
    flat = [z_BTD.flatten(0, 1) for z_BTD in sequences]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def unpack(z_ND: Tensor, sequences: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of ``pack``: tokens -> batches of the shapes that ``sequences`` have."""
    parts = z_ND.split([s.shape[0] * s.shape[1] for s in sequences])
    return [part.unflatten(0, s.shape[:2]) for part, s in zip(parts, sequences, strict=True)]
