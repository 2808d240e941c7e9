"""Values computed from parameters, kept until a parameter changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


class Derived:
    """A small cache of what follows from parameters alone, such as generated kernels or a resized position table.

    An entry is valid while its parameters lie where they lay and no operation has written to them: ``load_state_dict``,
    ``copy_`` and moves between devices are noticed by torch's own counters. Fused optimisers (seen in torch 2.13) and
    writes through ``parameter.data`` do not count: ``sampled`` entries also remember some hundred numbers of each
    parameter, spread evenly, and are made anew when one of them is another. (A GPU is waited for to compare them.)
    """

    LIMIT = 16
    """Entries kept, those used last: kernels of 13 bands for a width of 768 are 10 MB."""

    def __init__(self, sampled: bool = False) -> None:
        self.sampled = sampled
        self._kept: dict[Hashable, tuple[tuple[tuple[int, int], ...], Tensor | None, Any]] = {}

    def get(self, key: Hashable, parameters: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """The entry of ``key``, computed anew if it is not there or one of ``parameters`` has changed."""
        if any(p.is_inference() for p in parameters):  # such tensors do not count what is written to them
            return compute()
        stamp = tuple((p.data_ptr(), p._version) for p in parameters)
        sample = _sample(parameters) if self.sampled else None
        found = self._kept.pop(key, None)
        if found is not None and found[0] == stamp and (sample is None or torch.equal(sample, found[1])):  # type: ignore[arg-type]
            self._kept[key] = found
            return found[2]
        value = compute()
        if len(self._kept) >= self.LIMIT:
            self._kept.pop(next(iter(self._kept)))
        self._kept[key] = (stamp, sample, value)
        return value

    def clear(self) -> None:
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Derived:
        return Derived(self.sampled)  # a copied model has other parameters

    def __reduce__(self) -> tuple[Any, ...]:
        return Derived, (self.sampled,)


def _sample(parameters: Sequence[Tensor]) -> Tensor:
    device = parameters[0].device  # embeddings of variables' names stay on the CPU
    flat = (p.detach().flatten() for p in parameters)
    return torch.cat([x[:: max(1, x.numel() // 256)].float().to(device) for x in flat])
