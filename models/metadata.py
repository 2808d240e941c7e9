"""Place, day and token area of each image, embedded into its tokens.

Shapes: B batch, D width; 4 metadata fields, of which 3 embeddings are made (place, area, day).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import copernicus.models.fourier as fourier
from copernicus.datasets.sensors import METADATA_FIELDS, InputError

_METADATA_LIMITS = ((-180.0, 360.0), (-90.0, 90.0), (-1e7, 1e7), (0.0, fourier.AREA_KM2[1]))


def check_metadata(metadata_B4: Tensor, batch: int, values: bool = True) -> Tensor:
    """The rows, a (B, 4) tensor. ``values=False`` looks at their shape alone, for which a GPU need not be waited for.

    Raises:
        InputError: another shape, or a value no place, date or area can have; the message names row and field.
    """
    if tuple(metadata_B4.shape) != (batch, len(METADATA_FIELDS)):
        raise InputError(
            f"metadata has shape {tuple(metadata_B4.shape)}; for a batch of {batch} images it is "
            f"({batch}, {len(METADATA_FIELDS)}): {', '.join(METADATA_FIELDS)}"
        )
    if not values:
        return metadata_B4
    lower, upper = torch.tensor(_METADATA_LIMITS, dtype=metadata_B4.dtype, device=metadata_B4.device).T
    wrong_B4 = (metadata_B4 < lower) | (metadata_B4 > upper)
    if bool(wrong_B4.any()):
        row, field = (int(i) for i in wrong_B4.nonzero()[0])
        low, high = _METADATA_LIMITS[field]
        raise InputError(
            f"metadata row {row}: {METADATA_FIELDS[field]} is {float(metadata_B4[row, field]):g}, outside "
            f"{low:g}..{high:g} (NaN means unknown)"
        )
    return metadata_B4


def embed_metadata(
    metadata_B4: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    layers: tuple[nn.Linear, nn.Linear, nn.Linear],
    cartesian: bool,
) -> Tensor:
    """Sum of the embeddings of place, area and day: (B, 1, D), to be added to every token.

    A row's unknown value takes the learned token instead of its expansion, before the same Linear; the public code
    does so for the whole batch as soon as one row is unknown. The expansions are made where the metadata lie (on the
    CPU: no wait for the device).

    Args:
        metadata_B4: rows of (lon, lat, days, token area), checked: what is out of range is not noticed here.
        tokens: learned (1, 1, D) stand-ins for unknown place, area and time.
        layers: Linear(D -> D) of place, area and time.
        cartesian: place as unit-sphere coordinates.
    """
    lon_B, lat_B, days_B, area_B = metadata_B4.unbind(1)
    known_B3 = ~torch.stack([lon_B.isnan() | lat_B.isnan(), area_B.isnan(), days_B.isnan()], dim=1)
    lon_B, lat_B, days_B, area_B = metadata_B4.nan_to_num().unbind(1)
    dim, device = tokens[0].shape[-1], tokens[0].device
    expanded_B3D = torch.stack(
        [
            fourier.encode_coordinates(lon_B, lat_B, dim, cartesian),
            fourier.encode_area(area_B, dim),
            fourier.encode_days(days_B, dim),
        ],
        dim=1,
    )
    unknown_13D = torch.cat(tokens, dim=1)
    chosen_B3D = torch.where(known_B3[..., None].to(device), expanded_B3D.to(device), unknown_13D)
    place_BD, area_BD, time_BD = (layer(chosen_B3D[:, i]) for i, layer in enumerate(layers))
    return (place_BD + area_BD + time_BD)[:, None]
