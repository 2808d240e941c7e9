"""Which requests to make of a store for the byte ranges that are wanted of a file."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

GAP = 64 * 1024
OVERHEAD = 0.05
"""Ranges at most GAP bytes apart are fetched in one request, as long as all gaps together are below this share of the
bytes asked for."""


class Request(NamedTuple):
    """One request for the ranges of these numbers."""

    offset: int
    length: int
    ranges: list[int]


def plan_requests(ranges: Sequence[tuple[int, int]]) -> list[Request]:
    """Few requests for many (offset, length), in order of offset; empty ranges need none.

    Ranges that touch or overlap share one. Over gaps, the smallest first, they are joined as long as every gap is at
    most GAP and all together OVERHEAD of the bytes asked for.
    """
    plan: list[Request] = []
    for number in sorted(range(len(ranges)), key=lambda i: ranges[i]):
        offset, length = ranges[number]
        if not length:
            continue
        if plan and offset <= plan[-1].offset + plan[-1].length:
            plan[-1] = _join(plan[-1], Request(offset, length, [number]))
        else:
            plan.append(Request(offset, length, [number]))
    spare = OVERHEAD * sum(request.length for request in plan)
    gaps = sorted((b.offset - a.offset - a.length, i) for i, (a, b) in enumerate(pairwise(plan), 1))
    joined = set()
    for gap, i in gaps:
        if gap > GAP or gap > spare:
            break
        spare -= gap
        joined.add(i)
    merged: list[Request] = []
    for i, request in enumerate(plan):
        if i in joined:
            merged[-1] = _join(merged[-1], request)
        else:
            merged.append(request)
    return merged


def _join(first: Request, second: Request) -> Request:
    end = max(first.offset + first.length, second.offset + second.length)
    return Request(first.offset, end - first.offset, first.ranges + second.ranges)
