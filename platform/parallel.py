"""How a model lies on the workers that train it: whole on each (DDP), or a share of every parameter on each (FSDP2).

Either way gradients are averaged over the workers, and a checkpoint holds whole tensors by name, so a run may go on the
other way, and on any number of workers. On one worker both are the plain module.

FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al. 2023, arXiv 2304.11277) fetches a block's parameters from all
workers just before the block runs, forward and backward, and drops them after. It does so when the block is *called*:
code that reaches a block's layers past ``block(...)`` finds their shares only.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from copernicus.models.blocks import Block
from copernicus.platform.objective import PerRowLoss


def parallelise(loss_module: PerRowLoss, kind: str, device: torch.device) -> nn.Module:
    """The module to call for a loss: on this worker's device and, where there are several workers, joined with theirs.

    Every worker calls it with the same initial weights. Make the optimiser afterwards, of ``loss_module``'s parameters.

    Args:
        loss_module: its ``forward`` is the only way in, from which everything else of the model is reached. What is
            frozen must be so by now; what is not must get a gradient in every step.
        kind: ``ddp``; or ``fsdp``: each transformer block is shared out on its own, everything else, frozen parameters
            included, as one more group, which is whole on each worker while a step lasts.
        device: the worker's.
    """
    assert kind in ("ddp", "fsdp"), kind
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return loss_module.to(device)
    if kind == "ddp":
        loss_module.to(device)
        return DistributedDataParallel(loss_module, device_ids=[device] if device.type == "cuda" else None)
    # Parameters move to the device as they are shared out, so it never holds more of them than its share and one group.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in loss_module.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh)
    fully_shard(loss_module, mesh=mesh)  # in place
    return loss_module


def averaging(model: nn.Module, on: bool) -> contextlib.AbstractContextManager[None]:
    """In this block the backward pass averages gradients over the workers only if ``on``; else each adds up its own.

    ``model``: what `parallelise` gave.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
    elif isinstance(model, DistributedDataParallel) and not on:
        return model.no_sync()
    return contextlib.nullcontext()


def whole_state(loss_module: PerRowLoss, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The autoencoder's and the optimiser's whole state by parameter name, on rank 0's CPU; elsewhere two empty dicts.

    Every rank calls it. Tensors are gathered one after the other: a device holds one whole tensor at a time. On the CPU
    those that were whole are the model's own, not copies: save them before the next step.
    """
    for module in loss_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward without a backward, as in evaluation, the outermost group is still whole
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model = get_model_state_dict(loss_module.autoencoder, options=options)
    return model, dict(get_optimizer_state_dict(loss_module.autoencoder, optimizer, options=options))


def restore(
    loss_module: PerRowLoss, optimizer: torch.optim.Optimizer, model: dict[str, Any], optimizer_state: dict[str, Any]
) -> None:
    """Load what ``whole_state`` gave to rank 0, before the first step. Every rank calls it with all of it, and keeps its
    share.

    Raises:
        RuntimeError: names or shapes that do not fit.
    """
    options = StateDictOptions(full_state_dict=True)
    # The optimiser first: to make room for its state, torch takes a step with a learning rate of zero.
    set_optimizer_state_dict(loss_module.autoencoder, optimizer, optimizer_state, options=options)
    set_model_state_dict(loss_module.autoencoder, model, options=options)
