"""Where a step's time goes: the profiler's operators (CPU) or kernels (GPU), summed by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

OPTIMISER = "optimiser"
KINDS = (
    ("fused by the compiler", r"^triton_"),
    ("attention", r"scaled_dot_product|flash|fmha|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma|(^|::)(mm|addmm|bmm|baddbmm|mv|dot|linear)$|conv"),
    ("SVD, interpolation", r"svd|pinv|eigh|upsample|interpolate|cusolver|gesvd"),
    (OPTIMISER, r"multi_tensor|adam|foreach"),
    ("copies, gathers", r"copy|memcpy|memset|cat|gather|scatter|index|fill|zero|clone|contiguous|elementwise_kernel_with_index"),
    ("normalisation, softmax, sums", r"norm|softmax|reduce|sum|mean|var|welford|sort"),
    ("elementwise", r"elementwise|gelu|add|mul|sub|div|pow|sin|cos|vectorized|relu|sqrt|lerp|where"),
)  # fmt: skip
"""Kind and what its names look like; the first that fits counts."""


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lowered)), "other")


def seconds_by_kind(step: Callable[[], object], cuda: bool) -> Counter[str]:
    """Seconds of one call by kind: on a GPU the kernels' own, on the CPU each operator's without those it calls.

    A plain optimiser is made of the same operators as everything else: on the CPU what it calls counts as its own.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with profile(activities=activities) as prof:
        step()
        if cuda:
            torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    if cuda:
        for event in prof.key_averages():
            on_device = event.device_type == torch.autograd.DeviceType.CUDA
            # Ranges that the profiler draws on the device's line would count their kernels twice.
            if on_device and not getattr(event, "is_user_annotation", False) and "#" not in event.key:
                seconds[kind_of(event.key)] += event.self_device_time_total / 1e6
        return seconds
    for event in prof.events():
        parent, optimiser = event, False
        while parent is not None and not optimiser:
            optimiser = parent.name.startswith("Optimizer.")
            parent = parent.cpu_parent
        kind = kind_of(event.name) if event.name.startswith("aten::") else "other"  # else autograd's own nodes
        seconds[OPTIMISER if optimiser else kind] += event.self_cpu_time_total / 1e6
    return seconds
