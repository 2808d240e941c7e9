"""How many operations a forward pass and a training step need, by arithmetic from the model's sizes; a multiply-add is two.

Matrix products and attention alone, as `MaskedAutoencoder` computes them; norms, activations and the optimiser move memory
rather than compute. A product costs its forward once more for its inputs' gradient and once more for its weights': parts
whose inputs are pixels or constants need only one of the two.

Shapes: T tokens of a sequence with the class token, D encoder width, E decoder width, C channels, k patch side, Q = k*k,
P = 16*16 pixels of a generated kernel, K = 128 code width, X patches kept or hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from copernicus.datasets.sensors import Sensor
from copernicus.models.hypernetwork import CODE_DIM
from copernicus.models.language import LANGUAGE_DIM
from copernicus.models.resize import GENERATED_KERNEL

FEED_FORWARD = 2048
"""Width of the hypernetwork's one feed-forward layer."""
PIXELS = GENERATED_KERNEL**2


@dataclass(frozen=True)
class Shape:
    """Widths and depths of a masked autoencoder. ``distill_dim``: the teacher's width; 0: none."""

    embed_dim: int
    depth: int
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    mask_ratio: float = 0.7
    distill_dim: int = 0


@dataclass(frozen=True)
class Image:
    """What a step shows the model of one sensor. ``channels``: bands used, their mean where each step draws; ``side``:
    pixels."""

    sensor: Sensor
    channels: float
    side: int

    @property
    def tokens(self) -> int:
        return (self.side // self.sensor.patch_kernel) ** 2

    def kept(self, mask_ratio: float) -> int:
        return int(self.tokens * (1 - mask_ratio))


@dataclass(frozen=True)
class Part:
    """Forward operations of one sample and, where hypernetworks run, of one step.

    ``gradients``: products that the backward pass takes for each of the forward's. ``recomputed``: of the blocks, which
    activation checkpointing runs forward twice.
    """

    name: str
    sample: float = 0.0
    step: float = 0.0
    gradients: int = 2
    recomputed: bool = False

    def forward(self, batch: float) -> float:
        return batch * self.sample + self.step

    def training(self, batch: float, recompute: bool = False) -> float:
        return (1 + self.gradients + (recompute and self.recomputed)) * self.forward(batch)


def block(tokens: int, dim: int) -> int:
    """Of one image in one block: qkv, projection and MLP of ratio 4 (24 T D^2), scores and their product with the values."""
    return 24 * tokens * dim**2 + 4 * tokens**2 * dim


def generated(channels: float, dim: int) -> float:
    """A hypernetwork's kernels of 16 x 16: one layer over the weight tokens, the codes and the bias token."""
    tokens = CODE_DIM + channels + 1
    layer = 8 * tokens * CODE_DIM**2 + 4 * tokens**2 * CODE_DIM + 4 * tokens * CODE_DIM * FEED_FORWARD
    return layer + 2 * channels * CODE_DIM * PIXELS * dim


def codes(sensor: Sensor, channels: float, dim: int) -> float:
    """The codes' residual block, a variable's projection, the bias of the embedding."""
    return 4 * channels * CODE_DIM**2 + (0 if sensor.spectral else 2 * LANGUAGE_DIM * CODE_DIM) + 2 * CODE_DIM * dim


def autoencoder(shape: Shape, images: Sequence[Image], student: Image | None = None) -> list[Part]:
    """The parts of a pretraining step.

    Args:
        student: the unmasked image of which the teacher's features are imitated.
    """
    dim, decoder_dim = shape.embed_dim, shape.decoder_embed_dim
    parts: list[Part] = []
    for image in images:
        sensor, channels, kept = image.sensor, image.channels, image.kept(shape.mask_ratio)
        hidden, pixels = image.tokens - kept, min(sensor.patch_kernel**2, PIXELS)
        blocks = shape.decoder_depth * block(image.tokens + 1, decoder_dim)
        parts += [
            *encoder(shape, image, kept),
            Part("hypernetworks", step=generated(channels, decoder_dim)),
            Part("metadata", 6 * decoder_dim**2),
            Part("decoder embedding", 2 * (kept + 1) * dim * decoder_dim),
            Part("decoder blocks", blocks, recomputed=True),
            Part("prediction", 2 * hidden * channels * pixels * decoder_dim),
            _resizing(channels, sensor.patch_kernel, hidden, decoder_dim, into_pixels=True),
        ]
    if student is not None:
        parts += [*encoder(shape, student, student.tokens), Part("student", 2 * dim * shape.distill_dim)]
    return parts


def encoder(shape: Shape, image: Image, tokens: int) -> list[Part]:
    """The parts for one sensor's images, of which so many patches enter."""
    sensor, dim, channels = image.sensor, shape.embed_dim, image.channels
    pixels = min(sensor.patch_kernel**2, PIXELS)
    return [
        Part("hypernetworks", step=codes(sensor, channels, dim) + generated(channels, dim)),
        _resizing(channels, sensor.patch_kernel, tokens, dim, into_pixels=False),
        Part("patch embedding", 2 * tokens * channels * pixels * dim, gradients=1),
        Part("metadata", 6 * dim**2),
        Part("encoder blocks", shape.depth * block(tokens + 1, dim), recomputed=True),
    ]


def _resizing(channels: float, kernel: int, patches: int, dim: int, into_pixels: bool) -> Part:
    """Small patches have their kernels resized, once a step; large ones are resized themselves, from pixels (no gradient)
    or into them. The matrix is a constant."""
    if kernel < GENERATED_KERNEL:
        return Part("resizing", step=2 * channels * kernel**2 * PIXELS * dim, gradients=1)
    pixels = 0 if kernel == GENERATED_KERNEL else kernel**2 * PIXELS
    return Part("resizing", 2 * patches * channels * pixels, gradients=1 if into_pixels else 0)


def forward_flops(parts: Sequence[Part], batch: float) -> float:
    return sum(part.forward(batch) for part in parts)


def training_flops(parts: Sequence[Part], batch: float, recompute: bool = False) -> float:
    """Of forward and backward. ``recompute``: with activation checkpointing."""
    return sum(part.training(batch, recompute) for part in parts)
