"""Distillation: the encoder's view of an optical image is drawn to a frozen teacher's.

Shapes: B batch, H W image, F teacher width, L teacher tokens, D encoder width, T student tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.datasets.sensors import SENSORS
from copernicus.models.masked_autoencoder import MaskedAutoencoder
from copernicus.models.vit import View, look

DISTILL_WEIGHT = 0.1
"""Weight of the distillation loss beside the masked autoencoder's, as published."""

RGB_CHANNELS = (3, 2, 1)
RGB_SENSOR = SENSORS["s2_toa"].select(RGB_CHANNELS)
"""Red, green and blue of Sentinel-2: what teacher and student both see, without masking."""

Teacher = Callable[[Tensor], Tensor]
"""Normalised red, green, blue (B, 3, H, W) -> patch tokens (B, L, F). Kept outside the model, so that neither
optimiser, checkpoint nor gradient averaging carries it."""


def rgb_view(s2_BCHW: Tensor, metadata: Tensor | None) -> View:
    """What teacher and student see of normalised Sentinel-2 images of all 13 bands; the student sees all patches.

    Args:
        metadata: (B, 4) rows, as for Sentinel-2; checked before they went to a GPU, as in ``MaskedAutoencoder.hide``.
    """
    rgb_B3HW = torch.stack([s2_BCHW[:, channel] for channel in RGB_CHANNELS], dim=1)
    return look(rgb_B3HW, RGB_SENSOR, metadata, checked=metadata is not None and metadata.is_cuda)


def imitation_loss(model: MaskedAutoencoder, student_BTD: Tensor, teacher: Teacher, rgb_B3HW: Tensor) -> Tensor:
    """1 - cosine of the student's and the teacher's mean tokens, per row: (B,), unweighted.

    Args:
        model: made with ``distill_dim`` = F.
        student_BTD: the encoder's tokens of the images that the teacher is shown, the class token among them, un-normed.
    """
    with torch.no_grad():
        teacher_BF = teacher(rgb_B3HW).mean(dim=1)
    return 1 - F.cosine_similarity(model.student_proj(student_BTD.mean(dim=1)).float(), teacher_BF, dim=1)


def distillation_loss(model: MaskedAutoencoder, teacher: Teacher, s2_BCHW: Tensor, metadata: Tensor | None) -> Tensor:
    """`imitation_loss` of Sentinel-2 images, on their own: (B,)."""
    view = rgb_view(s2_BCHW, metadata)
    tokens_BTD, _ = model.forward_tokens(view.x_BCHW, metadata, sensor=RGB_SENSOR)
    return imitation_loss(model, tokens_BTD, teacher, view.x_BCHW)
