"""Distillation: the encoder's view of an optical image is drawn to a frozen teacher's.

Shapes: B batch, H W image, F teacher width, L teacher tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.datasets.sensors import SENSORS
from copernicus.models.masked_autoencoder import MaskedAutoencoder

DISTILL_WEIGHT = 0.1
"""Weight of the distillation loss beside the masked autoencoder's, as published."""

RGB_CHANNELS = (3, 2, 1)
RGB_SENSOR = SENSORS["s2_toa"].select(RGB_CHANNELS)
"""Red, green and blue of Sentinel-2: what teacher and student both see, without masking."""

Teacher = Callable[[Tensor], Tensor]
"""Normalised red, green, blue (B, 3, H, W) -> patch tokens (B, L, F). Kept outside the model, so that neither
optimiser, checkpoint nor gradient averaging carries it."""


def distillation_loss(model: MaskedAutoencoder, teacher: Teacher, s2_BCHW: Tensor, metadata: Tensor | None) -> Tensor:
    """1 - cosine of the student's and the teacher's mean tokens, per row: (B,), unweighted.

    Args:
        model: made with ``distill_dim`` = F.
        s2_BCHW: normalised Sentinel-2 images, all 13 bands.
        metadata: (B, 4) rows, as for Sentinel-2.
    """
    rgb_B3HW = s2_BCHW[:, list(RGB_CHANNELS)]
    with torch.no_grad():
        teacher_BF = teacher(rgb_B3HW).mean(dim=1)
    return 1 - F.cosine_similarity(model.student(rgb_B3HW, RGB_SENSOR, metadata), teacher_BF, dim=1)
