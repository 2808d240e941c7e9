"""The other side: a loop as one writes it with torch alone. One process a worker under DDP (none for one worker), and a
`DataLoader` with one process that reads this worker's rows of each batch and sends them through shared memory.

Same data, order, model, losses and optimiser as `pretrain`; nothing of what a platform adds: no figures but the loss, no
coverage, no problems, no checkpoints, nobody watching.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reading.measure import usage
from training.work import SEED, Result, Work

from copernicus.datasets.index import index_shards
from copernicus.datasets.order import Order
from copernicus.datasets.sensors import SENSORS
from copernicus.models.masked_autoencoder import parameter_groups
from copernicus.platform.objective import PerRowLoss, Plan, build_autoencoder, freeze_unreached


class Batches(torch.utils.data.Dataset):
    """Step -> this rank's rows of the global batch."""

    def __init__(self, plan: Plan, index: Any, rank: int, world_size: int):
        self.plan, self.index, self.rank, self.world_size = plan, index, rank, world_size
        self.reader = plan.reader(augment=True)

    def __getitem__(self, step: int) -> dict[str, Any]:
        order, size = self.plan.order, self.plan.settings.batch_size
        share = order.share(size, self.world_size)
        positions = order.positions(np.arange(step * share, (step + 1) * share), self.rank, self.world_size, size)
        places = [order.locate(int(position)) if position >= 0 else None for position in positions]
        entries = iter(self.index.entries(place[2] for place in places if place is not None))
        return self.reader.batch([None if place is None else (next(entries), *place[:2]) for place in places])


def run(work: Work) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        if work.workers == 1:
            worker(0, work, "", folder)
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
            torch.multiprocessing.spawn(worker, (work, address, folder), nprocs=work.workers)
        return Result(**json.loads((Path(folder) / "result.json").read_text()))


def worker(rank: int, work: Work, address: str, folder: str) -> None:
    torch.set_num_threads(work.threads)
    settings, world_size = work.settings, work.workers
    index = index_shards(work.shards).having(settings.sensors)
    index, _ = index.split(0.0, SEED)
    sensors = tuple(SENSORS[name] for name in settings.sensors)
    sizes = {s.name: settings.image_size.get(s.name, s.image_size) for s in sensors}
    order = Order(len(index), SEED, settings.epochs, settings.draws_per_grid)
    plan = Plan(settings, SEED, order, sensors, sizes, (), len(index))
    module = PerRowLoss(build_autoencoder(plan), sensors)
    freeze_unreached(module, plan)
    model: torch.nn.Module = module
    if world_size > 1:
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
        model = torch.nn.parallel.DistributedDataParallel(module)
    groups = parameter_groups(module, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=0.0, fused=True)
    steps = range(order.steps(settings.batch_size))
    loader = torch.utils.data.DataLoader(
        Batches(plan, index, rank, world_size), batch_size=None, sampler=steps, num_workers=1, prefetch_factor=2
    )
    ended, losses, windows = [], [], []
    root = os.getppid() if world_size > 1 else os.getpid()
    for step, columns in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        batch = {name: v for name, v in columns.items() if name not in ("key", "problems", "epoch")}
        loss_BN = model(batch, {s.name: plan.channels(step, s) for s in sensors})
        total, rows = plan.weigh(loss_BN, batch["present"])
        facts = torch.stack([total.detach(), rows.to(total.dtype)])
        if world_size > 1:
            dist.all_reduce(facts)
        optimizer.zero_grad(set_to_none=True)
        (total * (world_size / facts[1])).backward()
        optimizer.step()
        losses.append((facts[0] / facts[1]).item())
        ended.append(time.perf_counter())
        if step + 1 in (work.skip, len(steps)):
            windows.append(usage(root))
    if rank == 0:
        seconds = np.diff(ended[work.skip - 1 :]).tolist()
        core_s = windows[1].since(windows[0]).cpu_s / len(seconds)
        (Path(folder) / "result.json").write_text(json.dumps({"seconds": seconds, "core_s": core_s, "losses": losses}))
    if world_size > 1:
        dist.destroy_process_group()
