"""Masked autoencoding of any sensor: the encoder sees a share of the tokens, a decoder predicts the pixels of the rest.

Facts: paper arXiv 2503.11849 and its public implementation. Names and shapes of the state dict are the published ones.
Shapes: B batch, C channels, H W image, D encoder width, E decoder width, h w token grid, L = h*w patch tokens,
T = 1 + tokens kept, V = k*k*C values of a patch, ordered (row, column, channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.initialise import initialise
from copernicus.models.patch_embed import PatchPredictor
from copernicus.models.position import resize_table, sincos_table
from copernicus.models.vit import Block, CopernicusFMViT, check_metadata, embed_metadata

DECODER_PREFIXES = (
    "mask_token", "decoder_", "coord_token_dec", "scale_token_dec", "time_token_dec", "coord_fc_decoder",
    "scale_fc_decoder", "time_fc_decoder", "student_proj", "teacher.",
)  # fmt: skip
"""Beginnings of the names that a masked autoencoder has beside its encoder's."""

NORM_PIX_EPS = 1e-6


@dataclass(frozen=True)
class SensorResult:
    """One sensor's part of a step.

    Attributes:
        loss_B: mean squared error over the masked patches of each row.
        pred_BLV: predicted values of every patch.
        mask_BL: 1 where a patch was hidden from the encoder.
        latent_BTD: the encoder's output for the class token and the kept patches, in the order of the noise.
    """

    loss_B: Tensor
    pred_BLV: Tensor
    mask_BL: Tensor
    latent_BTD: Tensor


def patchify(x_BCHW: Tensor, patch_kernel: int) -> Tensor:
    """Image -> patches (B, L, V), row by row.

    Raises:
        InputError: sides that are no multiples of the patch.
    """
    if x_BCHW.shape[2] % patch_kernel or x_BCHW.shape[3] % patch_kernel:
        raise InputError(
            f"a masked autoencoder needs images whose sides are multiples of the patch kernel {patch_kernel}, "
            f"got {x_BCHW.shape[2]} x {x_BCHW.shape[3]}"
        )
    x = x_BCHW.unflatten(3, (-1, patch_kernel)).unflatten(2, (-1, patch_kernel))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_BLV: Tensor, grid: tuple[int, int], patch_kernel: int) -> Tensor:
    """The inverse of ``patchify``: (B, C, H, W)."""
    x = patches_BLV.unflatten(2, (patch_kernel, patch_kernel, -1)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class MaskedAutoencoder(CopernicusFMViT):
    """The encoder with a decoder, for pretraining.

    Args:
        decoder_embed_dim: decoder width E.
        decoder_depth: number of decoder blocks.
        decoder_num_heads: its attention heads.
        mask_ratio: share of the tokens hidden from the encoder.
        norm_pix_loss: targets are normalised per patch (mean and unbiased variance).
        published: keep the published decoder's wrong pairing of channels; see ``PatchPredictor``.
        distill_dim: width of the teacher whose features the encoder is to imitate (``distillation.py``); 0: none.
        encoder: arguments of ``CopernicusFMViT``; its last layer is ``norm``, over all tokens, and it has no head.
    """

    def __init__(
        self,
        *,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mask_ratio: float = 0.7,
        norm_pix_loss: bool = True,
        published: bool = False,
        distill_dim: int = 0,
        **encoder: Any,
    ) -> None:
        if not 0 < mask_ratio < 1:
            raise InputError(f"mask_ratio={mask_ratio} must lie between 0 and 1")
        if decoder_embed_dim % 4 or decoder_embed_dim % decoder_num_heads:
            raise InputError(
                f"decoder_embed_dim={decoder_embed_dim} must be a multiple of 4 and of "
                f"decoder_num_heads={decoder_num_heads}"
            )
        super().__init__(**encoder, num_classes=0, global_pool=False)
        self.encoder_names = tuple(self.state_dict())
        self.mask_ratio = mask_ratio
        self.norm_pix_loss = norm_pix_loss
        self.published = published
        dim, norm_eps, positions = decoder_embed_dim, self.norm.eps, self.pos_embed.shape[1]
        with torch.device("meta"):
            self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
            self.decoder_pos_embed = nn.Parameter(torch.empty(1, positions, dim), requires_grad=False)
            self.coord_token_dec = nn.Parameter(torch.empty(1, 1, dim))
            self.scale_token_dec = nn.Parameter(torch.empty(1, 1, dim))
            self.time_token_dec = nn.Parameter(torch.empty(1, 1, dim))
            self.decoder_embed = nn.Linear(self.embed_dim, dim)
            self.decoder_blocks = nn.ModuleList(Block(dim, decoder_num_heads, norm_eps) for _ in range(decoder_depth))
            self.decoder_norm = nn.LayerNorm(dim, eps=norm_eps)
            self.decoder_pred_spectral = PatchPredictor(dim)
            self.decoder_pred_variable = PatchPredictor(dim)
            self.coord_fc_decoder = nn.Linear(dim, dim)
            self.scale_fc_decoder = nn.Linear(dim, dim)
            self.time_fc_decoder = nn.Linear(dim, dim)
            if distill_dim:
                self.student_proj = nn.Linear(self.embed_dim, distill_dim)
        initialise(self, encoder.get("seed", 0), skip=self.encoder_names)
        with torch.no_grad():
            self.decoder_pos_embed.copy_(sincos_table(dim, math.isqrt(positions - 1)))
        # The published decoder has these layers and never uses them. Frozen, they stay out of optimisers, and
        # distributed training does not wait for their gradients.
        self.decoder_pred_spectral.weight_generator.fc_bias.requires_grad_(False)
        self.decoder_pred_variable.weight_generator.fc_bias.requires_grad_(False)

    def forward(  # type: ignore[override]
        self,
        samples: Mapping[str, Tensor],
        sensors: Mapping[str, Sensor],
        metadata: Mapping[str, Tensor],
        noise: Mapping[str, Tensor],
        channels: Mapping[str, Sequence[int]] | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch of places, each seen by several sensors.

        Every sensor passes through the model in every step, so that distributed training finds all its gradients;
        rows that lack the sensor count for nothing.

        Args:
            samples: sensor name -> normalised images (B, C, H, W), with anything at all where a row lacks the sensor.
            sensors: sensor name -> what its channels are.
            metadata: sensor name -> (B, 4) rows, NaN for unknown.
            noise: sensor name -> (B, L) uniform numbers; each row hides the patches of its largest.
            channels: sensor name -> bands to use in this step; all by default.
            present: sensor name -> (B,) bool, True where the row has the sensor; all by default.

        Returns:
            ``loss``: the mean over rows (that have any sensor) of the mean over the row's sensors, with all present
            the published mean over sensors; and under each sensor's name the mean loss of the rows that have it (NaN
            if none has), detached.

        Raises:
            InputError: see ``forward_sensor``.
        """
        losses_SB, present_SB, report = [], [], {}
        for name, x_BCHW in samples.items():
            here_B = torch.ones(x_BCHW.shape[0], dtype=torch.bool, device=x_BCHW.device)
            if present is not None and name in present:
                here_B = present[name].to(x_BCHW.device)
                # Whatever stands in for an absent image, NaN included, must not reach the gradients.
                x_BCHW = torch.where(here_B[:, None, None, None], x_BCHW, 0.0)
            chosen = channels.get(name) if channels is not None else None
            result = self.forward_sensor(x_BCHW, sensors[name], metadata[name], noise[name], chosen)
            losses_SB.append(torch.where(here_B, result.loss_B, 0.0))
            present_SB.append(here_B)
            report[name] = losses_SB[-1].detach().sum() / here_B.sum()
        count_B = torch.stack(present_SB).sum(dim=0)
        mean_B = torch.stack(losses_SB).sum(dim=0) / count_B.clamp(min=1)
        return {"loss": mean_B.sum() / (count_B > 0).sum().clamp(min=1), **report}

    def forward_sensor(
        self,
        x_BCHW: Tensor,
        sensor: Sensor,
        metadata: Tensor | None,
        noise_BL: Tensor,
        channels: Sequence[int] | None = None,
    ) -> SensorResult:
        """Mask, encode, decode and compare one sensor's images.

        Args:
            x_BCHW: normalised images; sides are multiples of the sensor's patch kernel.
            sensor: what the channels are.
            metadata: (B, 4) rows, NaN for unknown; None: all unknown.
            noise_BL: one number per token; the patches with the smallest are kept.
            channels: bands to use (indices); all by default.

        Raises:
            InputError: bands, sides or noise do not fit, or so few tokens that none would be kept or hidden.
        """
        metadata_B4 = check_metadata(metadata, x_BCHW.shape[0])
        if channels is not None:
            x_BCHW, sensor = x_BCHW[:, list(channels)], sensor.select(channels)
        target_BLV = patchify(x_BCHW, sensor.patch_kernel)
        tokens = target_BLV.shape[1]
        kept = int(tokens * (1 - self.mask_ratio))
        if not 0 < kept < tokens:
            raise InputError(
                f"sensor {sensor.name!r}: {tokens} tokens with mask_ratio={self.mask_ratio} leave {kept} to see; "
                "give larger images"
            )
        if tuple(noise_BL.shape) != tuple(target_BLV.shape[:2]):
            raise InputError(
                f"sensor {sensor.name!r}: noise has shape {tuple(noise_BL.shape)}, "
                f"expected {tuple(target_BLV.shape[:2])}"
            )

        z_BTD, grid, code_CK = self.embed(x_BCHW, metadata_B4, sensor, None)
        order_BL = noise_BL.to(z_BTD.device).argsort(dim=1)
        restore_BL = order_BL.argsort(dim=1)
        mask_BL = (restore_BL >= kept).to(z_BTD.dtype)
        kept_BTD = z_BTD[:, 1:].gather(1, order_BL[:, :kept, None].expand(-1, -1, z_BTD.shape[2]))
        latent_BTD = torch.cat([z_BTD[:, :1], kept_BTD], dim=1)
        for block in self.blocks:
            latent_BTD = block(latent_BTD)
        latent_BTD = self.norm(latent_BTD)

        pred_BLV = self.decode(latent_BTD, restore_BL, metadata_B4, grid, sensor, code_CK)
        if self.norm_pix_loss:
            mean_BL1, std_BL1 = _patch_statistics(target_BLV)
            target_BLV = (target_BLV - mean_BL1) / std_BL1
        error_BL = (pred_BLV - target_BLV).square().mean(dim=2)
        loss_B = (error_BL * mask_BL).sum(dim=1) / mask_BL.sum(dim=1)
        return SensorResult(loss_B, pred_BLV, mask_BL, latent_BTD)

    def decode(
        self,
        latent_BTD: Tensor,
        restore_BL: Tensor,
        metadata_B4: Tensor,
        grid: tuple[int, int],
        sensor: Sensor,
        code_CK: Tensor,
    ) -> Tensor:
        """Encoded tokens -> predicted values (B, L, V) of all patches.

        Args:
            restore_BL: for each patch, its place among [kept tokens, mask tokens].
            code_CK: the encoder's codes of the sensor's channels.
        """
        y_BTE = self.decoder_embed(latent_BTD)
        batch, tokens = restore_BL.shape
        hidden_BXE = self.mask_token.expand(batch, tokens + 1 - y_BTE.shape[1], -1)
        y_BLE = torch.cat([y_BTE[:, 1:], hidden_BXE], dim=1)
        y_BLE = y_BLE.gather(1, restore_BL[..., None].expand(-1, -1, y_BLE.shape[2]))
        unknown = (self.coord_token_dec, self.scale_token_dec, self.time_token_dec)
        layers = (self.coord_fc_decoder, self.scale_fc_decoder, self.time_fc_decoder)
        y_BTE = torch.cat([y_BTE[:, :1], y_BLE], dim=1)
        y_BTE = y_BTE + resize_table(self.decoder_pos_embed, grid)
        y_BTE = y_BTE + embed_metadata(metadata_B4, unknown, layers, self.cartesian)
        for block in self.decoder_blocks:
            y_BTE = block(y_BTE)
        predict = self.decoder_pred_spectral if sensor.spectral else self.decoder_pred_variable
        return predict(self.decoder_norm(y_BTE)[:, 1:], code_CK, sensor.patch_kernel, self.published)

    def student(self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None) -> Tensor:
        """What distillation compares with the teacher: (B, distill_dim), from all tokens, class token and un-normed."""
        z_BTD, _ = self.forward_tokens(x_BCHW, metadata, sensor=sensor)
        return self.student_proj(z_BTD.mean(dim=1))

    @torch.no_grad()
    def reconstruct(
        self, x_BCHW: Tensor, sensor: Sensor, metadata: Tensor | None, noise_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Pictures of what the model sees and makes of it, in normalised units.

        Returns:
            The image with hidden patches NaN; and the image with hidden patches as predicted, visible ones as they are
            (B, C, H, W each). With ``norm_pix_loss`` a predicted patch takes the true patch's mean and deviation, for
            the model does not predict them.

        Raises:
            InputError: see ``forward_sensor``.
        """
        result = self.forward_sensor(x_BCHW, sensor, metadata, noise_BL)
        kernel = sensor.patch_kernel
        patches_BLV = patchify(x_BCHW, kernel)
        pred_BLV = result.pred_BLV
        if self.norm_pix_loss:
            mean_BL1, std_BL1 = _patch_statistics(patches_BLV)
            pred_BLV = pred_BLV * std_BL1 + mean_BL1
        grid = (x_BCHW.shape[2] // kernel, x_BCHW.shape[3] // kernel)
        hidden_BL1 = result.mask_BL[..., None].bool()
        masked_BLV = torch.where(hidden_BL1, torch.nan, patches_BLV)
        filled_BLV = torch.where(hidden_BL1, pred_BLV, patches_BLV)
        return unpatchify(masked_BLV, grid, kernel), unpatchify(filled_BLV, grid, kernel)

    def encoder_state_dict(self, global_pool: bool = False) -> dict[str, Tensor]:
        """The encoder's weights, fit to load with ``strict=True`` into a ``CopernicusFMViT`` of the same shape.

        Args:
            global_pool: for an encoder that pools patch tokens, whose last norm is called ``fc_norm``: ``norm``, here
                trained on all tokens, goes there.
        """
        own = self.state_dict()
        return {
            f"fc_{name}" if global_pool and name.startswith("norm.") else name: own[name] for name in self.encoder_names
        }


def _patch_statistics(patches_BLV: Tensor) -> tuple[Tensor, Tensor]:
    mean_BL1 = patches_BLV.mean(dim=2, keepdim=True)
    variance_BL1 = patches_BLV.var(dim=2, keepdim=True)  # unbiased, as published
    return mean_BL1, (variance_BL1 + NORM_PIX_EPS).sqrt()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: weight decay for matrices and learned tokens, none for biases and norms (1-d).

    Frozen parameters are in neither group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
