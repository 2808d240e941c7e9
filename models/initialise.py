"""Initial weights: every parameter's values depend on (seed, its name, its shape), and on nothing else.

So an encoder and a masked autoencoder of one seed start from the same encoder, adding a module does not move the values
of the others, and torch's global random state is neither read nor written.
"""

from __future__ import annotations

import contextlib
import contextvars
import zlib
from collections.abc import Container, Iterator

import numpy as np
import torch
from torch import Tensor, nn

EMBED_KERNEL_STD = 1 / 256
"""Of fresh patch kernels: a channel of white noise makes tokens of std 1/16 or more, beside positions of 0.7."""

DECODER_OUTPUT_STD = 0.01
"""Of fresh predictions: nearly none, as the mean of normalised patches is 0."""

_GENERATOR_OUTPUT = 0.01 * 16
"""Scale of generated weights (0.01) times the norm of what enters fc_weight: 128 values of the post-norm layer and 128
of the channel's code, each of unit variance, make sqrt(256)."""


_shapes_only = contextvars.ContextVar("shapes_only", default=False)


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Models made inside have shapes but no numbers: encoders' parameters stay on the meta device, heads' are not filled."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator keyed by the seed and a name (a parameter's, a purpose's)."""
    words = np.random.SeedSequence((seed, zlib.crc32(name.encode()))).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 32 | int(words[1]))


@torch.no_grad()
def fill_normal(parameter: Tensor, std: float, seed: int, name: str) -> None:
    """Normal with mean 0, in place, keyed by the seed and the name."""
    if _shapes_only.get():
        return
    parameter.normal_(0.0, std, generator=generator(seed, name))


@torch.no_grad()
def initialise(module: nn.Module, seed: int, skip: Container[str] = ()) -> None:
    """Fill a model's parameters, but those named in skip; allocate on the CPU what lies on the meta device.

    As masked autoencoders do (arXiv 2111.06377, A.1), Linear weights are Xavier-uniform (Glorot and Bengio 2010),
    biases 0, norms 1 and 0, tokens normal with std 0.02. The layers that generate kernels are scaled to what they
    generate, which is a weight, not an activation (cf. Chang et al. 2020, "Principled weight initialization for
    hypernetworks"). The published run starts from a trained generator instead. In short trials on smooth fields,
    patch kernels of std 1/512 and 1/128 and plain Xavier (1/2000) learned alike; 1/32 with predictions of std 0.1
    learned much later, for tokens then drown the positions.
    """
    if _shapes_only.get():
        return
    module._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    for name, parameter in module.named_parameters():
        if name in skip:
            continue
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("weight_generator.fc_weight.weight"):
            kernel_std = EMBED_KERNEL_STD
            if name.startswith("decoder"):
                dim = parameter.shape[0] // 256
                kernel_std = DECODER_OUTPUT_STD / dim**0.5
            fill_normal(parameter, kernel_std / _GENERATOR_OUTPUT, seed, name)
        elif name.endswith("weight"):
            bound = (6.0 / (parameter.shape[0] + parameter.shape[1])) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator(seed, name))
        else:
            fill_normal(parameter, 0.02, seed, name)
