"""How many operations a pretraining step needs, by arithmetic from the model's shape; a multiply-add counts as two.

The least that gives the losses and gradients as defined: kept patches embedded, hidden ones predicted, kernels generated
once a step, no matrix for resizing made, nothing of normalisations, activations or the optimiser. An implementation that
does more gets no credit for it. Backward takes twice the forward's: a product for the inputs' gradient and one for the
weights'.

Shapes: T tokens with the class token, D encoder width, E decoder width, C channels, k patch kernel.
"""

from __future__ import annotations

from collections import Counter

from modelling.work import MASK_RATIO, TEACHER_DIM, Shape, drawn_channels

from copernicus.datasets.sensors import SENSORS, Sensor
from copernicus.models.flops import block, codes, generated

KERNEL = 16 * 16
FORWARD_AND_BACKWARD = 3


def resized(channels: int, dim: int, patch_kernel: int) -> int:
    """A hypernetwork's kernels brought to the patch's size."""
    return 2 * channels * patch_kernel**2 * KERNEL * dim if patch_kernel != 16 else 0


def forward_flops(shape: Shape, batch: int) -> Counter[str]:
    """Of a step's forward pass over all eight sensors and the student, by part."""
    dim, decoder_dim = shape.embed_dim, shape.decoder_embed_dim
    flops: Counter[str] = Counter()
    drawn = drawn_channels()

    def encode(sensor: Sensor, channels: int, kept: int) -> None:
        flops["hypernetworks"] += codes(sensor, channels, dim) + generated(channels, dim)
        flops["hypernetworks"] += resized(channels, dim, sensor.patch_kernel)
        flops["patch embedding"] += batch * 2 * kept * channels * sensor.patch_kernel**2 * dim
        flops["metadata"] += batch * 6 * dim**2
        flops["encoder blocks"] += batch * shape.depth * block(kept + 1, dim)

    for name, sensor in SENSORS.items():
        channels = len(drawn.get(name, range(sensor.channels)))
        tokens = (sensor.image_size // sensor.patch_kernel) ** 2
        kept = int(tokens * (1 - MASK_RATIO))
        encode(sensor, channels, kept)
        flops["hypernetworks"] += generated(channels, decoder_dim) + resized(channels, decoder_dim, sensor.patch_kernel)
        flops["metadata"] += batch * 6 * decoder_dim**2
        flops["decoder blocks"] += batch * shape.decoder_depth * block(tokens + 1, decoder_dim)
        flops["decoder embedding"] += batch * 2 * (kept + 1) * dim * decoder_dim
        flops["prediction"] += batch * 2 * (tokens - kept) * channels * sensor.patch_kernel**2 * decoder_dim
    s2 = SENSORS["s2_toa"]
    encode(s2, 3, (s2.image_size // s2.patch_kernel) ** 2)
    flops["student"] += batch * 2 * dim * TEACHER_DIM
    return flops


def step_flops(shape: Shape, batch: int) -> int:
    """Of forward and backward together."""
    return FORWARD_AND_BACKWARD * sum(forward_flops(shape, batch).values())


def product_shapes(shape: Shape, batch: int) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the blocks' Linear layers, with all tokens of a step as rows: what a machine can do at
    these widths if nothing is in its way."""
    kept = decoded = 0
    for sensor in SENSORS.values():
        tokens = (sensor.image_size // sensor.patch_kernel) ** 2
        kept, decoded = kept + int(tokens * (1 - MASK_RATIO)) + 1, decoded + tokens + 1
    shapes = []
    for rows, dim in ((batch * kept, shape.embed_dim), (batch * decoded, shape.decoder_embed_dim)):
        shapes += [(rows, dim, 3 * dim), (rows, dim, dim), (rows, dim, 4 * dim), (rows, 4 * dim, dim)]
    return shapes
