"""What the public pretraining code does to a batch's metadata: `pretrain.preset: published`.

Source: github.com/zhu-xlab/Copernicus-FM, Copernicus-FM/src/models_mae_cfm.py. Shapes: B rows, S sensors, 4 metadata fields
(lon, lat, days since 1970-01-01, token area km^2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def blank_batch(metadata_BS4: Tensor, present_BS: Tensor) -> Tensor:
    """One row's unknown longitude, day or area makes it unknown in all rows of that sensor; longitude decides for the place.

    There a batch is what one GPU gets. Rows without the sensor, which that code never has, decide nothing. A latitude
    that alone is unknown, which makes the loss NaN there, stays a matter of its row. By default each row decides for
    itself, in ``embed_metadata``.
    """
    unknown_S4 = (metadata_BS4.isnan() & present_BS[..., None]).any(dim=0)
    place_S1 = unknown_S4[:, :1]
    return metadata_BS4.masked_fill(torch.cat([place_S1, place_S1, unknown_S4[:, 2:]], dim=1), torch.nan)
