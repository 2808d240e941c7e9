"""What this machine computes: real training steps on noise, for some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from copernicus.models.flops import training_flops
from copernicus.models.masked_autoencoder import parameter_groups
from copernicus.models.zoo import create_model
from copernicus.platform.measured import MEASURED
from copernicus.platform.objective import autocast_dtype
from copernicus.platform.plan import Rate, images, step_parts
from copernicus.platform.schema import Pretrain

SECONDS = 4.0
LONGEST_S = 2.0
"""Of a step: with larger batches than take so long, a sample is taken to cost the same."""


def measure_here(settings: Pretrain, batch: int, threads: int = 1) -> Rate:
    """A worker's rate on this machine: its GPU, or by ``threads`` CPU threads its ``cpus_per_worker``. Blocks are not
    compiled, whatever the experiment says.

    Args:
        batch: samples of a worker in a step.

    Raises:
        InputError: a precision that this machine does not have.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = _stepper(settings, device)
        one = _seconds(step, 1, device)
        tried = min(batch, max(1, int(LONGEST_S / one)))
        seconds = one if tried == 1 else _seconds(step, tried, device)
    finally:
        torch.set_num_threads(before)
    _, parts, _ = step_parts(settings)
    rate = training_flops(parts, tried, settings.activation_checkpointing) / seconds
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{threads} CPU threads"
    if device.type == "cpu":  # a worker has a share of them
        rate *= settings.cpus_per_worker / threads
    return Rate(rate, 0.0, MEASURED, f"{name} here, steps of {tried} samples, blocks not compiled")


def _stepper(settings: Pretrain, device: torch.device) -> Callable[[int], None]:
    """A training step on so many samples of noise; the teacher is left out."""
    with torch.device("cpu"):
        model = create_model(f"{settings.model.name}_mae", mask_ratio=settings.mask_ratio, **settings.model.overrides())
    model.recompute = settings.activation_checkpointing
    model.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=1e-6, fused=True)
    dtype = autocast_dtype(settings.precision, device)
    shown = images(settings)
    noise = torch.Generator().manual_seed(0)

    def step(batch: int) -> None:
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            masked = []
            for image in shown:
                x_BCHW = torch.randn(batch, image.sensor.channels, image.side, image.side, generator=noise).to(device)
                noise_BL = torch.rand(batch, image.tokens, generator=noise).to(device)
                masked.append(model.hide(x_BCHW, image.sensor, None, noise_BL, list(range(round(image.channels)))))
            losses, _ = model.losses(masked)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).mean().backward()
        optimizer.step()

    return step


def _seconds(step: Callable[[int], None], batch: int, device: torch.device) -> float:
    """Median seconds of a step, after one that is not counted."""
    step(batch)
    taken: list[float] = []
    while not taken or (sum(taken) < SECONDS / 2 and len(taken) < 100):
        if device.type == "cuda":
            torch.cuda.synchronize()
        # Other processes do not count on a CPU.
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        started = clock()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(clock() - started)
    return sorted(taken)[len(taken) // 2]
