"""Optimisers of probes and fine-tuning, and the schedule that drives them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

MOMENTA = 0.85, 0.95
"""Lowest and highest of the one-cycle schedule (Smith 2018, arXiv 1803.09820), torch's defaults."""


class SGD:
    """Stochastic gradient descent with momentum and weight decay: bit for bit what ``torch.optim.SGD`` computes.

    That one imports torch's compiler at its first step: 3 s in every process that trains a probe, which itself takes a few.
    It also costs thrice as much a step, a fifth of a linear probe's.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        self.param_groups: list[dict[str, Any]] = [
            {"params": parameters, "lr": lr, "momentum": 0.0, "weight_decay": weight_decay}
        ]
        self._momenta: list[Tensor | None] = [None] * len(parameters)

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        for number, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            if group["weight_decay"]:
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
            momentum = self._momenta[number]
            if momentum is None:
                self._momenta[number] = momentum = gradient.clone()
            else:
                momentum.mul_(group["momentum"]).add_(gradient)
            parameter.add_(momentum, alpha=-group["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self._momenta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = self.param_groups[0]["params"]
        self._momenta = [
            None if momentum is None else momentum.to(parameter.device)
            for momentum, parameter in zip(state["momenta"], parameters, strict=True)
        ]


Optimiser = SGD | torch.optim.AdamW


def make_optimiser(parameters: list[nn.Parameter], lr: float, weight_decay: float, adam: bool) -> Optimiser:
    """The public code's: AdamW for dense tasks, else SGD, whose momentum is the schedule's."""
    if adam:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return SGD(parameters, lr, weight_decay)


def one_cycle(lr: float, steps: int, warmup: float) -> tuple[list[float], list[float]]:
    """Learning rate and momentum of each step: torch's ``OneCycleLR`` with cosines and its defaults, as a table.

    From lr / 25 up to lr in the warm-up's share of the steps, then down to lr / 250,000; momentum runs against it.
    """
    low, high = MOMENTA
    top, last = warmup * steps - 1, steps - 1
    rates, momenta = [], []
    for step in range(steps):
        if step <= top:
            share = step / top if top > 0 else 1.0
            rates.append(_anneal(lr / 25, lr, share))
            momenta.append(_anneal(high, low, share))
        else:
            share = (step - top) / (last - top)
            rates.append(_anneal(lr, lr / 25 / 1e4, share))
            momenta.append(_anneal(low, high, share))
    return rates, momenta


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def set_step(optimiser: Optimiser, lr: float, momentum: float) -> None:
    """Put a step's learning rate and momentum (Adam's first beta) in force."""
    for group in optimiser.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, *group["betas"][1:])
        else:
            group["momentum"] = momentum
