"""The public Copernicus-FM pretraining rebuilt: what the speed of ours is measured against (model_speed.py).

Facts: arXiv 2503.11849 and the public repository zhu-xlab/Copernicus-FM (Copernicus-FM/src: models_mae_cfm.py,
engine_pretrain.py, util/misc.py). No line is theirs. As there, every sensor has a forward pass of its own, nine a step
with the three bands that a teacher sees; all patches are embedded before the mask takes most of them away; the decoder
predicts all of them; the loop waits for the device to read three losses, and each forward pass ends by giving the
allocator's memory back. ``public_encoder.py`` says what else costs time. Nothing here knows copernicus.models.

Shapes: B batch, C channels, H W image, D encoder width, E decoder width, L patch tokens, T = 1 + tokens, K = 128 code
width, V = k*k*C values of a patch, F teacher width.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from public_encoder import Block, Predictor, PublicEncoder, resized_positions
from torch import Tensor, nn

from copernicus.datasets.sensors import Sensor

RGB = "s2_toa_rgb"
"""Name of the sample that the student sees unmasked: Sentinel-2's red, green and blue."""


def masked(z_BLD: Tensor, noise_BL: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Kept tokens in the order of the noise; mask (B, L), 1 where hidden; the order that puts tokens back."""
    kept = int(z_BLD.shape[1] * (1 - mask_ratio))
    order_BL = torch.argsort(noise_BL, dim=1)
    restore_BL = torch.argsort(order_BL, dim=1)
    kept_BLD = torch.gather(z_BLD, 1, order_BL[:, :kept].unsqueeze(-1).repeat(1, 1, z_BLD.shape[2]))
    mask_BL = torch.ones(noise_BL.shape, device=z_BLD.device)
    mask_BL[:, :kept] = 0
    return kept_BLD, torch.gather(mask_BL, 1, restore_BL), restore_BL


@dataclass(frozen=True)
class Output:
    """Losses of a step, the parts by sensor; predictions (B, L, V) and masks (B, L) of each sensor."""

    total: Tensor
    mae: Tensor
    distill: Tensor
    losses: dict[str, Tensor]
    preds: dict[str, Tensor]
    masks: dict[str, Tensor]


class PublicAutoencoder(PublicEncoder):
    """The published pretraining model. ``encoder``: arguments of PublicEncoder."""

    place_columns = (0,)  # pretraining looks at the longitude alone

    def __init__(
        self,
        language: Mapping[str, Tensor],
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        distill_dim: int = 768,
        embed_dim: int = 768,
        **encoder: Any,
    ) -> None:
        super().__init__(language, embed_dim=embed_dim, global_pool=False, **encoder)
        dim, eps = decoder_embed_dim, self.norm.eps
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.pos_embed.shape[1], dim), requires_grad=False)
        self.coord_token_dec, self.scale_token_dec, self.time_token_dec = (
            nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(3)
        )
        self.decoder_embed = nn.Linear(embed_dim, dim)
        self.decoder_blocks = nn.ModuleList(Block(dim, decoder_num_heads, eps) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(dim, eps=eps)
        self.decoder_pred_spectral, self.decoder_pred_variable = Predictor(dim), Predictor(dim)
        self.coord_fc_decoder, self.scale_fc_decoder, self.time_fc_decoder = (nn.Linear(dim, dim) for _ in range(3))
        self.student_proj = nn.Linear(embed_dim, distill_dim)

    def encode(
        self, x_BCHW: Tensor, metadata_B4: Tensor, sensor: Sensor, noise_BL: Tensor, mask_ratio: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoded tokens (B, T, D), normed where any are hidden; mask; order back; codes."""
        z_BLD, class_B1D, code_CK = self.embed(x_BCHW, metadata_B4, sensor, sensor.patch_kernel)
        z_BLD, mask_BL, restore_BL = masked(z_BLD, noise_BL, mask_ratio)
        z_BTD = torch.cat([class_B1D.expand(len(z_BLD), -1, -1), z_BLD], dim=1)
        for block in self.blocks:
            z_BTD = block(z_BTD)
        return self.norm(z_BTD) if mask_ratio > 0 else z_BTD, mask_BL, restore_BL, code_CK

    def decode(self, z_BTD: Tensor, restore_BL: Tensor, metadata_B4: Tensor, sensor: Sensor, code_CK: Tensor) -> Tensor:
        """Encoded tokens -> predicted values (B, L, V) of all patches."""
        y_BTE = self.decoder_embed(z_BTD)
        hidden = self.mask_token.repeat(len(y_BTE), restore_BL.shape[1] + 1 - y_BTE.shape[1], 1)
        y_BLE = torch.cat([y_BTE[:, 1:], hidden], dim=1)
        y_BLE = torch.gather(y_BLE, 1, restore_BL.unsqueeze(-1).repeat(1, 1, y_BTE.shape[2]))
        y_BTE = torch.cat([y_BTE[:, :1], y_BLE], dim=1)
        y_BTE = y_BTE + self.positions(
            resized_positions(self.decoder_pos_embed, restore_BL.shape[1]), metadata_B4,
            (self.coord_token_dec, self.scale_token_dec, self.time_token_dec),
            (self.coord_fc_decoder, self.scale_fc_decoder, self.time_fc_decoder),
        )  # fmt: skip
        for block in self.decoder_blocks:
            y_BTE = block(y_BTE)
        predict = self.decoder_pred_spectral if sensor.spectral else self.decoder_pred_variable
        return predict(self.decoder_norm(y_BTE), code_CK, sensor.patch_kernel)[:, 1:]

    def forward(  # type: ignore[override]
        self,
        samples: Mapping[str, Tensor],
        sensors: Mapping[str, Sensor],
        metadata: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        channels: Mapping[str, Sequence[int]],
        teacher: Callable[[Tensor], Tensor] | None = None,
        mask_ratio: float = 0.7,
    ) -> Output:
        """Losses of a step. The public code draws noise and channels here; given, both sides can have the same.

        Args:
            samples: sensor name -> normalised images (B, C, H, W); under ``RGB`` what teacher and student see.
            sensors: what their channels are, before ``channels`` picks some.
            metadata: (B, 4) rows of lon, lat, days, token area, on the images' device.
            noise: (B, L) uniform numbers.
            channels: indices of the bands to use, of the sensors that drop some.
            teacher: red, green, blue (B, 3, H, W) -> patch tokens (B, L, F); without one ``RGB`` may not be there.
        """
        losses, preds, masks = {}, {}, {}
        distill = torch.zeros((), device=self.cls_token.device)
        for name, x_BCHW in samples.items():
            sensor, metadata_B4 = sensors[name], metadata[name]
            if name in channels:
                x_BCHW, sensor = x_BCHW[:, torch.as_tensor(channels[name])], sensor.select(channels[name])
            ratio = 0.0 if name == RGB else mask_ratio
            z_BTD, mask_BL, restore_BL, code_CK = self.encode(x_BCHW, metadata_B4, sensor, noise[name], ratio)
            if name == RGB:
                assert teacher is not None
                student_BF = self.student_proj(z_BTD.mean(dim=1))
                with torch.no_grad():
                    teacher_BF = teacher(x_BCHW).mean(dim=1)
                distill = 0.1 * (1 - F.cosine_similarity(student_BF, teacher_BF, dim=1).mean())
                continue
            preds[name] = self.decode(z_BTD, restore_BL, metadata_B4, sensor, code_CK)
            masks[name] = mask_BL
            losses[name] = masked_error(x_BCHW, preds[name], mask_BL, sensor.patch_kernel)
        if self.cls_token.is_cuda:
            torch.cuda.empty_cache()
        mae = torch.stack(list(losses.values())).mean()
        return Output(mae + distill, mae, distill, losses, preds, masks)


def masked_error(x_BCHW: Tensor, pred_BLV: Tensor, mask_BL: Tensor, side: int) -> Tensor:
    """Mean squared error of hidden patches, normalised each by its mean and unbiased variance; scalar."""
    batch, channels, height, width = x_BCHW.shape
    cut = x_BCHW.reshape(batch, channels, height // side, side, width // side, side)
    target_BLV = torch.einsum("bchpwq->bhwpqc", cut).reshape(batch, -1, side * side * channels)
    variance = target_BLV.var(dim=-1, keepdim=True)
    target_BLV = (target_BLV - target_BLV.mean(dim=-1, keepdim=True)) / (variance + 1e-6) ** 0.5
    error_BL = ((pred_BLV - target_BLV) ** 2).mean(dim=-1)
    return (error_BL * mask_BL).sum() / mask_BL.sum()


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, as timm makes them: no decay for biases and whatever has one dimension."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = {name for name, p in trained if p.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [p for name, p in trained if name in plain], "weight_decay": 0.0},
        {"params": [p for name, p in trained if name not in plain], "weight_decay": weight_decay},
    ]


class PublicLoop:
    """A training step as the public loop takes it: plain AdamW, a gradient scaler (idle on the CPU), the norm of all
    gradients, losses read at once.

    Args:
        mark: called with "forward", "backward", "optimiser" when each part ends.
        autocast: float32 as published, or bfloat16.
    """

    def __init__(self, model: PublicAutoencoder, lr: float, mark: Callable[[str], None], autocast: bool) -> None:
        self.model, self.mark, self.autocast = model, mark, autocast
        self.optimizer = torch.optim.AdamW(optimizer_groups(model, 0.05), lr=lr, betas=(0.9, 0.95))
        device = model.cls_token.device.type
        self.device, self.scaler = device, torch.amp.GradScaler(device, enabled=device == "cuda")
        self.last: Output | None = None

    def step(self, *batch: Any) -> Output:
        """One step on the arguments of ``PublicAutoencoder.forward``."""
        with torch.autocast(self.device, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            out = self.model(*batch)
        values = [float(part) for part in (out.total.detach(), out.mae.detach(), out.distill.detach())]
        assert math.isfinite(values[0]), f"the loss is {values[0]}"
        self.mark("forward")
        self.scaler.scale(out.total).backward()
        self.mark("backward")
        self.scaler.unscale_(self.optimizer)
        norms = [torch.norm(p.grad.detach()) for p in self.model.parameters() if p.grad is not None]
        torch.norm(torch.stack(norms))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.mark("optimiser")
        self.last = out  # as there, predictions live until the next step's take their place
        return out
