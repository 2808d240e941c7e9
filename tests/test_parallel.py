"""A model shared out over two real processes (gloo) trains as one on a single process does, and so do its checkpoints."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_pretrain import plan, settings

from copernicus.datasets.index import GridIndex, index_shards
from copernicus.models import create_model, load_weights
from copernicus.models.masked_autoencoder import parameter_groups
from copernicus.platform.objective import PerRowLoss, Plan, build_autoencoder, freeze_unreached, weigh
from copernicus.platform.parallel import parallelise, restore, whole_state
from copernicus.platform.pretrain_worker import Evaluation
from copernicus.platform.to_device import tensors

SENSORS = ["s1_grd", "s2_toa", "s5p_o3"]  # spectral ones and a variable; every sixth grid has no radar
WORLD, ROWS, STEPS, LR = 2, 4, 3, 1e-2
EPS = 1e-3
"""Of AdamW: with the usual 1e-8 it blows a gradient that is nearly none up to a whole step, whatever its rounding."""
HELD_OUT = 5
"""Grids, read one at a time: rank 0 has a batch more than rank 1."""
CPU = torch.device("cpu")


class Trainer:
    """What `train_worker` does with a model, without Ray; ``kind`` None: a plain module that sees the whole batch."""

    def __init__(self, shards: Path, kind: str | None, clip: float | None = None):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if kind else (0, 1)
        self.index: GridIndex = index_shards(str(shards))
        self.plan: Plan = plan(settings(shards, sensors=SENSORS, batch_size=ROWS, mask_ratio=0.5))
        self.clip = clip
        self.loss = PerRowLoss(build_autoencoder(self.plan), self.plan.sensors)
        freeze_unreached(self.loss, self.plan)
        self.model = parallelise(self.loss, kind, CPU) if kind else self.loss
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.loss, 0.05), lr=LR, betas=(0.9, 0.95), eps=EPS, fused=True
        )

    def step(self, number: int) -> tuple[float, float]:
        """The global batch's loss and gradient norm. The ranks' shares hold unequally many rows: the last is empty."""
        draws = [(grid, number, 0) for grid in self.index.entries(range(number * 3, number * 3 + ROWS - 1))] + [None]
        share = ROWS // self.world
        columns = self.plan.reader(augment=True).batch(draws[self.rank * share : (self.rank + 1) * share])
        batch = tensors(columns, CPU)
        loss_BS = self.model(batch, {s.name: self.plan.channels(number, s) for s in self.plan.sensors})
        total, rows = weigh(loss_BS, batch["present"])
        facts = torch.stack([rows.to(total.dtype), total.detach()])
        if self.world > 1:
            dist.all_reduce(facts)
        assert facts[0] == ROWS - 1
        self.optimizer.zero_grad(set_to_none=True)
        (total * (self.world / facts[0])).backward()
        norm: Any = torch.nn.utils.clip_grad_norm_(self.loss.parameters(), self.clip or 1e9)
        self.optimizer.step()
        return (facts[1] / facts[0]).item(), (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()

    def evaluate(self) -> dict[str, float]:
        held_out = dataclasses.replace(self.index, rows=self.index.rows[:HELD_OUT])
        one_row = dataclasses.replace(self.plan, settings=dataclasses.replace(self.plan.settings, batch_size=WORLD))
        return Evaluation(one_row, held_out, self.rank, self.world, CPU)(self.model, {})

    def save(self, path: Path) -> None:
        model, optimizer = whole_state(self.loss, self.optimizer)
        if self.rank == 0:
            torch.save({"model": model, "optimizer": optimizer}, path)
        else:
            assert not model, "only rank 0 holds the whole model"
            assert not optimizer
        if self.world > 1:
            dist.barrier()

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True, mmap=True)
        restore(self.loss, self.optimizer, saved["model"], saved["optimizer"])

    def held(self) -> dict[str, int]:
        """Numbers that this rank keeps: of the parameters, and of both moments of AdamW."""
        moments = [s[k] for s in self.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
        return {"parameters": sum(map(local, self.loss.parameters())), "moments": sum(map(local, moments))}


def local(tensor: Any) -> int:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def two_processes(rank: int, shards: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    seen: dict[str, Any] = {}
    for kind in ("ddp", "fsdp"):
        run = Trainer(shards, kind)
        seen[kind, "start"] = run.evaluate()
        seen[kind, "steps"] = [run.step(n) for n in range(STEPS)]
        seen[kind, "held"] = run.held()
        seen[kind, "end"] = run.evaluate()  # and then save: evaluation leaves FSDP's outermost group whole
        run.save(folder / f"{kind}.pt")
    clipped = Trainer(shards, "fsdp", clip=0.1)
    clipped.loss.autoencoder.recompute = True  # blocks are gathered once more for the backward pass, and give the same
    for n in range(STEPS):
        clipped.step(n)
    clipped.save(folder / "clipped.pt")

    kinds = ("ddp", "fsdp", "ddp")
    for n, kind in enumerate(kinds):
        run = Trainer(shards, kind)
        if n:
            run.load(folder / f"trip{n}.pt")
        run.step(n)
        run.save(folder / f"trip{n + 1}.pt")
    again = Trainer(shards, "fsdp")
    again.load(folder / "trip3.pt")
    again.save(folder / "trip4.pt")
    torch.save(seen, folder / f"seen{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    torch.multiprocessing.spawn(two_processes, (shards, folder), nprocs=WORLD)
    return folder


@pytest.fixture(scope="module")
def alone(shards: Path) -> dict[str, Any]:
    """The same on one process that sees every row."""
    run = Trainer(shards, None)
    seen: dict[str, Any] = {"start": run.evaluate(), "steps": [run.step(n) for n in range(STEPS)], "held": run.held()}
    weights = {k: v.clone() for k, v in run.loss.autoencoder.state_dict().items()}
    return {**seen, "end": run.evaluate(), "weights": weights, "optimizer": run.optimizer}


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def assert_same_weights(given: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert given.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert type(given[name]) is torch.Tensor
        torch.testing.assert_close(given[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one_does(trained, alone, kind):
    assert len(alone["steps"]) == STEPS
    for rank in range(WORLD):
        seen = read(trained / f"seen{rank}.pt")
        for step, wanted in zip(seen[kind, "steps"], alone["steps"], strict=True):
            assert step == pytest.approx(wanted, rel=1e-3)  # loss and norm of the gradient
    saved = read(trained / f"{kind}.pt")
    assert_same_weights(saved["model"], alone["weights"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_held_out_grids_count_once_when_ranks_hold_unequally_many(trained, alone, kind):
    for rank in range(WORLD):
        seen = read(trained / f"seen{rank}.pt")
        for when in ("start", "end"):
            assert seen[kind, when].keys() == {"val/loss", *(f"val/loss_{name}" for name in SENSORS)}
            assert seen[kind, when] == pytest.approx(alone[when], rel=1e-4)


def test_each_rank_keeps_half_of_parameters_and_moments(trained, alone):
    """DDP keeps all on each. Parameters whose first side is 1 are not divided: they are few."""
    seen = [read(trained / f"seen{rank}.pt") for rank in range(WORLD)]
    for what, all_of_them in alone["held"].items():
        assert [s["ddp", "held"][what] for s in seen] == [all_of_them] * WORLD
        shares = [s["fsdp", "held"][what] for s in seen]
        assert sum(shares) == all_of_them
        assert max(shares) < 0.51 * all_of_them


def test_gradients_are_clipped_by_their_norm_over_all_ranks(trained, shards, alone):
    assert min(norm for _, norm in alone["steps"]) > 0.1, "or nothing is clipped"
    run = Trainer(shards, None, clip=0.1)
    for n in range(STEPS):
        run.step(n)
    assert_same_weights(read(trained / "clipped.pt")["model"], run.loss.autoencoder.state_dict())


def test_a_run_goes_on_the_other_way_and_on_one_process(trained, shards, alone):
    """ddp, fsdp, ddp: a step each, from the other's checkpoint. Then one process goes on from the second."""
    assert_same_weights(read(trained / "trip3.pt")["model"], alone["weights"])
    run = Trainer(shards, None)
    run.load(trained / "trip2.pt")
    run.step(2)
    assert_same_weights(run.loss.autoencoder.state_dict(), alone["weights"])
    # A wrong moment would show in the weights only later.
    for mine, wanted in zip(run.optimizer.state.values(), alone["optimizer"].state.values(), strict=True):
        assert mine["step"] == wanted["step"] == STEPS
        torch.testing.assert_close(mine["exp_avg"], wanted["exp_avg"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine["exp_avg_sq"], wanted["exp_avg_sq"], rtol=1e-3, atol=1e-6)


def test_a_checkpoint_passes_through_shares_with_the_same_bits(trained, shards):
    before, after = read(trained / "trip3.pt"), read(trained / "trip4.pt")
    assert before["optimizer"]["state"].keys() == after["optimizer"]["state"].keys()
    pairs = [(before["model"][k], after["model"][k]) for k in before["model"]]
    for name, moments in before["optimizer"]["state"].items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        pairs += [(moments[k], after["optimizer"]["state"][name][k]) for k in moments]
    assert all(type(b) is torch.Tensor and torch.equal(a, b) for a, b in pairs)
    # and through one process without a process group
    run = Trainer(shards, None)
    run.load(trained / "trip4.pt")
    run.save(trained / "alone.pt")
    once_more = read(trained / "alone.pt")
    assert all(torch.equal(once_more["model"][k], before["model"][k]) for k in before["model"])
    assert once_more["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]


def test_the_encoder_loads_from_a_checkpoint_of_shares(trained, alone):
    encoder = create_model("copernicus_fm_base", embed_dim=32, depth=2, num_heads=4, global_pool=False)
    assert load_weights(encoder, trained / "fsdp.pt").complete
    assert_same_weights(encoder.state_dict(), {k: alone["weights"][k] for k in encoder.state_dict()})
