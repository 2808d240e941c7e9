"""Masked autoencoding of any sensor: the encoder sees a share of the tokens, a decoder predicts the pixels of the rest.

Facts: paper arXiv 2503.11849 and its public implementation. Names and shapes of the state dict are the published ones.
Shapes: B batch, C channels, H W image, D encoder width, E decoder width, h w token grid, L = h*w patch tokens,
X patches looked at (those kept, or those hidden), T = 1 + tokens kept, k side of a patch, Q = k*k its pixels, V = C*Q its
values.

All sensors of a step pass through the blocks together, each masked on its own, and the decoder predicts hidden patches
alone: the others would not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from copernicus.datasets.sensors import InputError, Sensor
from copernicus.models.attention import pack, unpack
from copernicus.models.blocks import Block, check_sizes, run_blocks
from copernicus.models.hypernetwork import PatchPredictor
from copernicus.models.initialise import initialise
from copernicus.models.metadata import embed_metadata
from copernicus.models.patch_embed import predict_patches
from copernicus.models.patches import check_whole, cut_patches, take_patches
from copernicus.models.position import fixed_positions, sincos_table
from copernicus.models.vit import CopernicusFMViT, View, look

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
        pred_BLV: predicted values of every patch, ordered (row, column, channel) as in ``patchify``; those of a published
            decoder (channel, row, column).
        mask_BL: 1 where a patch was hidden from the encoder.
        latent_BTD: the encoder's output for the class token and the kept patches, in the order of the noise.
    """

    loss_B: Tensor
    pred_BLV: Tensor
    mask_BL: Tensor
    latent_BTD: Tensor


@dataclass(frozen=True)
class Masked:
    """A view of which a part is hidden. ``kept_BX``, ``hidden_BX``: numbers (row-major) of the patches."""

    view: View
    kept_BX: Tensor
    hidden_BX: Tensor


def patchify(x_BCHW: Tensor, patch_kernel: int) -> Tensor:
    """Image -> patches (B, L, V), row by row, the values of each ordered (row, column, channel).

    Raises:
        InputError: sides that are no multiples of the patch.
    """
    check_whole(x_BCHW.shape[2], x_BCHW.shape[3], patch_kernel)
    return take_patches(cut_patches(x_BCHW, patch_kernel, shift=0), None).transpose(2, 3).flatten(2)


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
        published: keep the published decoder's wrong pairing of channels; see ``_compare``.
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
        check_sizes(decoder_embed_dim, decoder_num_heads, decoder_depth, "decoder_", shallowest=0)
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
        masked, present_SB = [], []
        for name, x_BCHW in samples.items():
            here_B = torch.ones(x_BCHW.shape[0], dtype=torch.bool, device=x_BCHW.device)
            if present is not None and name in present:
                here_B = present[name].to(x_BCHW.device)
                # Whatever stands in for an absent image, NaN included, must not reach the gradients.
                x_BCHW = torch.where(here_B[:, None, None, None], x_BCHW, 0.0)
            chosen = channels.get(name) if channels is not None else None
            masked.append(self.hide(x_BCHW, sensors[name], metadata[name], noise[name], chosen))
            present_SB.append(here_B)
        losses, _ = self.losses(masked)
        losses_SB = [torch.where(here, loss, 0.0) for here, loss in zip(present_SB, losses, strict=True)]
        report = {
            name: loss.detach().sum() / here.sum()
            for name, loss, here in zip(samples, losses_SB, present_SB, strict=True)
        }
        count_B = torch.stack(present_SB).sum(dim=0)
        mean_B = torch.stack(losses_SB).sum(dim=0) / count_B.clamp(min=1)
        return {"loss": mean_B.sum() / (count_B > 0).sum().clamp(min=1), **report}

    def hide(
        self,
        x_BCHW: Tensor,
        sensor: Sensor,
        metadata: Tensor | None,
        noise_BL: Tensor,
        channels: Sequence[int] | None = None,
    ) -> Masked:
        """One sensor's images with a share of their patches hidden.

        Args:
            x_BCHW: normalised images; sides are multiples of the sensor's patch kernel.
            sensor: what the channels are.
            metadata: (B, 4) rows, NaN for unknown; None: all unknown. What lies on a GPU should have been checked before
                it went there (``check_metadata``): here that would make it wait in every step.
            noise_BL: one number per token; the patches with the smallest are kept.
            channels: bands to use (indices); all by default.

        Raises:
            InputError: bands, sides, noise or metadata do not fit, or so few tokens that none would be kept or hidden.
        """
        if channels is not None:
            x_BCHW, sensor = x_BCHW.index_select(1, _on_device(channels, x_BCHW.device)), sensor.select(channels)
        view = look(x_BCHW, sensor, metadata, checked=metadata is not None and metadata.is_cuda)
        check_whole(x_BCHW.shape[2], x_BCHW.shape[3], view.patch_kernel)
        if view.patch_kernel < 3:  # the convolution's padding then adds a row and a column of tokens
            raise InputError(f"sensor {sensor.name!r}: a masked autoencoder needs patches of at least 3 x 3 pixels")
        tokens = view.grid[0] * view.grid[1]
        kept = int(tokens * (1 - self.mask_ratio))
        if not 0 < kept < tokens:
            raise InputError(
                f"sensor {sensor.name!r}: {tokens} tokens with mask_ratio={self.mask_ratio} leave {kept} to see; "
                "give larger images"
            )
        if tuple(noise_BL.shape) != (x_BCHW.shape[0], tokens):
            raise InputError(
                f"sensor {sensor.name!r}: noise has shape {tuple(noise_BL.shape)}, expected {(x_BCHW.shape[0], tokens)}"
            )
        order_BL = noise_BL.to(x_BCHW.device).argsort(dim=1)
        kept_BX, hidden_BX = order_BL[:, :kept], order_BL[:, kept:]
        return Masked(dataclasses.replace(view, kept_BX=kept_BX), kept_BX, hidden_BX)

    def losses(self, masked: Sequence[Masked], whole: Sequence[View] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """The loss of each row (B,) of each masked view: mean squared error over its hidden patches.

        Args:
            whole: views that go through the encoder beside them, unmasked (distillation).

        Returns:
            The losses of ``masked``; the tokens (B, T, D) of ``whole``, un-normed.
        """
        latents, codes, tokens = self._encode(masked, whole)
        decoded = self._decode(masked, latents)
        losses = []
        for part, y_BTE, kernel_CPE in zip(masked, decoded, self._predictors(masked, codes), strict=True):
            hidden_BXE = y_BTE[:, 1:].gather(1, part.hidden_BX[..., None].expand(-1, -1, y_BTE.shape[2]))
            pred_BXCQ = predict_patches(hidden_BXE, kernel_CPE, part.view.patch_kernel)
            losses.append(self._compare(part, pred_BXCQ))
        return losses, tokens

    def forward_sensor(
        self,
        x_BCHW: Tensor,
        sensor: Sensor,
        metadata: Tensor | None,
        noise_BL: Tensor,
        channels: Sequence[int] | None = None,
    ) -> SensorResult:
        """Mask, encode, decode and compare one sensor's images, and keep what ``losses`` does not: see ``hide``."""
        masked = self.hide(x_BCHW, sensor, metadata, noise_BL, channels)
        latents, codes, _ = self._encode([masked])
        (y_BTE,), (kernel_CPE,) = self._decode([masked], latents), self._predictors([masked], codes)
        pred_BLCQ = predict_patches(y_BTE[:, 1:], kernel_CPE, masked.view.patch_kernel)
        hidden_BXCQ = pred_BLCQ.gather(1, masked.hidden_BX[..., None, None].expand(-1, -1, *pred_BLCQ.shape[2:]))
        return SensorResult(
            loss_B=self._compare(masked, hidden_BXCQ),
            pred_BLV=pred_BLCQ.flatten(2) if self.published else pred_BLCQ.transpose(2, 3).flatten(2),
            mask_BL=torch.ones(noise_BL.shape, device=x_BCHW.device).scatter(1, masked.kept_BX, 0.0),
            latent_BTD=latents[0],
        )

    def _encode(
        self, masked: Sequence[Masked], whole: Sequence[View] = ()
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Normed tokens (B, T, D) and codes (C, 128) of each masked view; un-normed tokens of each whole one."""
        sequences, kernels = self.embed([*(part.view for part in masked), *whole])
        out = run_blocks(self.blocks, sequences, self.recompute)
        latents = unpack(self.norm(pack(out[: len(masked)])), out[: len(masked)])
        return latents, [kernel.code_CK for kernel in kernels[: len(masked)]], out[len(masked) :]

    def _decode(self, masked: Sequence[Masked], latents: Sequence[Tensor]) -> list[Tensor]:
        """Encoded tokens -> normed decoder tokens (B, 1 + L, E) in the order of the image."""
        sequences = []
        unknown = (self.coord_token_dec, self.scale_token_dec, self.time_token_dec)
        layers = (self.coord_fc_decoder, self.scale_fc_decoder, self.time_fc_decoder)
        metadata_S4 = torch.cat([part.view.metadata_B4 for part in masked])
        placed_S1E = embed_metadata(metadata_S4, unknown, layers, self.cartesian)
        for part, y_BTE, placed_B1E in zip(
            masked,
            unpack(self.decoder_embed(pack(latents)), latents),
            placed_S1E.split([latent.shape[0] for latent in latents]),
            strict=True,
        ):
            position_1TE = fixed_positions(self._positions, self.decoder_pos_embed, part.view.grid)
            tokens = part.kept_BX.shape[1] + part.hidden_BX.shape[1]
            y_BLE = self.mask_token.to(y_BTE.dtype).expand(y_BTE.shape[0], tokens, -1)
            y_BLE = y_BLE.scatter(1, part.kept_BX[..., None].expand_as(y_BTE[:, 1:]), y_BTE[:, 1:])
            sequences.append(torch.cat([y_BTE[:, :1], y_BLE], dim=1) + position_1TE + placed_B1E)
        out = run_blocks(self.decoder_blocks, sequences, self.recompute)
        return unpack(self.decoder_norm(pack(out)), out)

    def _predictors(self, masked: Sequence[Masked], codes: Sequence[Tensor]) -> list[Tensor]:
        """The kernels (C, P, E) that turn decoder tokens into each view's pixels; ``codes`` are the encoder's."""
        made: dict[int, Tensor] = {}
        for spectral, predictor in ((True, self.decoder_pred_spectral), (False, self.decoder_pred_variable)):
            mine = [i for i, part in enumerate(masked) if part.view.sensor.spectral == spectral]
            if mine:
                made |= zip(mine, predictor([codes[i] for i in mine]), strict=True)
        return [made[i] for i in range(len(masked))]

    def _compare(self, masked: Masked, pred_BXCQ: Tensor) -> Tensor:
        """Mean squared error of each row's hidden patches: (B,)."""
        pixels_BhwCkk = cut_patches(masked.view.x_BCHW, masked.view.patch_kernel, shift=0)
        target_BXCQ = take_patches(pixels_BhwCkk, masked.hidden_BX)
        if self.norm_pix_loss:
            target_BXCQ = _normalised(target_BXCQ)
        if self.published:
            # The published decoder puts out values ordered (channel, row, column) while its targets are ordered (row,
            # column, channel): with several channels it pairs them wrongly, and differently for each draw of channels.
            target_BXCQ = target_BXCQ.transpose(2, 3).reshape(target_BXCQ.shape)
        return (pred_BXCQ.float() - target_BXCQ).square().mean(dim=(1, 2, 3))

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


def _on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as a tensor there; a GPU is not waited for, as it would be for memory that is not pinned."""
    tensor = torch.tensor(list(numbers), dtype=torch.long)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _patch_statistics(patches_BXV: Tensor) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(patches_BXV, dim=2, keepdim=True)  # unbiased, as published
    return mean, (variance + NORM_PIX_EPS).sqrt()


def _normalised(patches_BXCQ: Tensor) -> Tensor:
    """Each patch with mean 0 and variance 1 over all its values."""
    mean, std = _patch_statistics(patches_BXCQ.flatten(2))
    return (patches_BXCQ - mean[..., None]) / std[..., None]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimiser: weight decay for matrices and learned tokens, none for biases and norms (1-d).

    Frozen parameters are in neither group.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
