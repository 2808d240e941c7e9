"""The two sides of the model benchmark: how each is built, encodes, and takes a training step.

Everything that knows our model is in ``our_autoencoder``, ``our_encoder``, ``our_encode`` and ``our_step``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from modelling.work import TEACHER_DIM, Batch, Case, Shape, StandInTeacher
from public_encoder import PublicEncoder
from public_formulation import RGB, PublicAutoencoder, PublicLoop
from torch import Tensor

from copernicus.datasets.sensors import SENSORS
from copernicus.models.distillation import DISTILL_WEIGHT, RGB_CHANNELS, RGB_SENSOR, imitation_loss, rgb_view
from copernicus.models.language import LanguageTable
from copernicus.models.masked_autoencoder import MaskedAutoencoder, parameter_groups
from copernicus.models.vit import CopernicusFMViT
from copernicus.models.zoo import create_model

LR = 1e-5
Mark = Callable[[str], None]


def _precision(device: str, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()


def our_autoencoder(shape: Shape) -> MaskedAutoencoder:
    return create_model(
        "copernicus_fm_base_mae", published=True, distill_dim=TEACHER_DIM, **shape.encoder, **shape.decoder
    )


def our_encoder(shape: Shape) -> CopernicusFMViT:
    return create_model("copernicus_fm_base", **shape.encoder)


def our_encode(model: CopernicusFMViT, x_BCHW: Tensor, metadata_B4: Tensor, case: Case) -> Tensor:
    """Features (B, D)."""
    return model.forward_features(x_BCHW, metadata_B4, sensor=SENSORS[case.sensor], patch_kernel=case.patch_kernel)


def our_step(
    model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, teacher: StandInTeacher, batch: Batch, mark: Mark,
    bf16: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """One step; the losses, not yet read."""
    with _precision(batch.samples["s2_toa"].device.type, bf16):
        masked = [
            model.hide(x_BCHW, SENSORS[name], batch.metadata[name], batch.noise[name], batch.channels.get(name))
            for name, x_BCHW in batch.samples.items()
        ]
        rgb = rgb_view(batch.samples["s2_toa"], batch.metadata["s2_toa"])
        per_row, (tokens_BTD,) = model.losses(masked, [rgb])
        distill = DISTILL_WEIGHT * imitation_loss(model, tokens_BTD, teacher, rgb.x_BCHW).mean()
    losses = {name: loss_B.mean() for name, loss_B in zip(batch.samples, per_row, strict=True)}
    total = torch.stack(list(losses.values())).mean() + distill
    losses = {name: loss.detach() for name, loss in losses.items()}
    mark("forward")
    total.backward()
    mark("backward")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    mark("optimiser")
    return {"total": total.detach(), "distill": distill.detach(), **losses}


class Side(Protocol):
    """A model under test. Models are built at first use, all sides' with the weights that ours starts from."""

    def prepare(self, part: str) -> None:
        """Build what encoding ("encode") or training ("step") needs."""

    def encode(self, x_BCHW: Tensor, metadata_B4: Tensor, case: Case) -> Tensor:
        """Features (B, D)."""

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One training step of the autoencoder: its losses, "total", "distill" and each sensor's."""


class Ours:
    def __init__(self, shape: Shape, device: str, mark: Mark, bf16: bool, compiled: bool) -> None:
        self.shape, self.device, self.mark, self.bf16, self.compiled = shape, device, mark, bf16, compiled

    def _ready(self, model: Any) -> Any:
        model = model.to(self.device)
        if self.compiled:
            model.compile_blocks()
        return model

    @functools.cached_property
    def encoder(self) -> CopernicusFMViT:
        return self._ready(our_encoder(self.shape).eval())

    @functools.cached_property
    def training(self) -> tuple[MaskedAutoencoder, torch.optim.Optimizer, StandInTeacher]:
        model = self._ready(our_autoencoder(self.shape).train())
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=LR, betas=(0.9, 0.95), fused=True)
        return model, optimizer, StandInTeacher(self.device)

    def prepare(self, part: str) -> None:
        _ = self.encoder if part == "encode" else self.training

    @torch.inference_mode()
    def encode(self, x_BCHW: Tensor, metadata_B4: Tensor, case: Case) -> Tensor:
        with _precision(self.device, self.bf16):
            return our_encode(self.encoder, x_BCHW, metadata_B4, case)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        return our_step(*self.training, batch, self.mark, self.bf16)


class Public:
    def __init__(self, shape: Shape, device: str, mark: Mark, bf16: bool) -> None:
        self.shape, self.device, self.mark, self.bf16 = shape, device, mark, bf16
        table = LanguageTable()
        self.language = {s.variable: table.vector(s.variable) for s in SENSORS.values() if s.variable}
        torch.backends.cudnn.benchmark = True  # as the public loop sets it

    @functools.cached_property
    def encoder(self) -> PublicEncoder:
        with torch.device("meta"):  # its own initial weights would be drawn for nothing
            model = PublicEncoder(self.language, **self.shape.encoder).eval()
        model.load_state_dict(our_encoder(self.shape).state_dict(), strict=True, assign=True)
        return model.to(self.device)

    @functools.cached_property
    def training(self) -> tuple[PublicLoop, StandInTeacher]:
        with torch.device("meta"):
            model = PublicAutoencoder(
                self.language, distill_dim=TEACHER_DIM, **self.shape.encoder, **self.shape.decoder
            )
        model.load_state_dict(our_autoencoder(self.shape).state_dict(), strict=True, assign=True)
        loop = PublicLoop(model.to(self.device).train(), LR, self.mark, self.bf16)
        return loop, StandInTeacher(self.device)

    def prepare(self, part: str) -> None:
        _ = self.encoder if part == "encode" else self.training

    @torch.no_grad()
    def encode(self, x_BCHW: Tensor, metadata_B4: Tensor, case: Case) -> Tensor:
        with _precision(self.device, self.bf16):
            return self.encoder(x_BCHW, metadata_B4, sensor=SENSORS[case.sensor], patch_kernel=case.patch_kernel)[1]

    def step(self, batch: Batch) -> dict[str, Tensor]:
        loop, teacher = self.training
        samples = {**batch.samples, RGB: batch.samples["s2_toa"][:, list(RGB_CHANNELS)]}
        metadata = {**batch.metadata, RGB: batch.metadata["s2_toa"]}
        noise = {**batch.noise, RGB: batch.noise["s2_toa"]}
        sensors = {**SENSORS, RGB: RGB_SENSOR}
        out = loop.step(samples, sensors, metadata, noise, batch.channels, teacher)
        return {"total": out.total.detach(), "distill": out.distill.detach(), **out.losses}


def make_side(variant: str, shape: Shape, device: str, mark: Mark) -> Side:
    """variant: "public" or "ours", then any of "bf16" (autocast; else float32) and, ours only, "compiled"."""
    words = variant.split()
    bf16, compiled = "bf16" in words, "compiled" in words
    return Ours(shape, device, mark, bf16, compiled) if words[0] == "ours" else Public(shape, device, mark, bf16)
