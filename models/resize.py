"""A generated kernel of 16 x 16 for patches of another size: FlexiViT's pseudo-inverse resize.

Shapes: C channels, D width, P = 16*16 pixels of a generated kernel, p q kernel sides.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

GENERATED_KERNEL = 16
"""Side of the kernels that hypernetworks generate."""


@functools.lru_cache(maxsize=32)
@torch.inference_mode(False)  # a tensor made in inference mode could not serve training later
def kernel_resize_matrix(size_from: tuple[int, int], size_to: tuple[int, int], device: str = "cpu") -> Tensor:
    """The matrix that turns a flattened kernel of one size into that of another: (to_p*to_q, from_p*from_q) float32.

    FlexiViT's pseudo-inverse resize (arXiv 2212.08013, section 3.4): patches resized by bicubic interpolation, times
    the resized kernel, give what the original patches gave with the original kernel, as nearly as possible.
    """
    if device != "cpu":
        return kernel_resize_matrix(size_from, size_to).to(device)
    p, q = size_from
    units = torch.eye(p * q, dtype=torch.float64).reshape(p * q, 1, p, q)
    resized = F.interpolate(units, size=size_to, mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(resized.reshape(p * q, -1)).float()


def resize_kernel(kernel_CPD: Tensor, size_from: tuple[int, int], size_to: tuple[int, int]) -> Tensor:
    """Resize flattened kernels (C, from_p*from_q, D) -> (C, to_p*to_q, D); the same tensor where sizes agree."""
    if size_from == size_to:
        return kernel_CPD
    return kernel_resize_matrix(size_from, size_to, str(kernel_CPD.device)) @ kernel_CPD
