"""Patches of an image, cut out without copying it.

Shapes: B batch, C channels, H W image, h w token grid, k side of a patch, Q = k*k its pixels, X patches chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.datasets.sensors import InputError


def token_grid(height: int, width: int, patch_kernel: int) -> tuple[int, int]:
    """Token grid (h, w) of a convolution of that kernel and stride, with padding 1.

    Raises:
        InputError: the image is smaller than one patch.
    """
    h, w = ((side + 2 - patch_kernel) // patch_kernel + 1 for side in (height, width))
    if h < 1 or w < 1:
        raise InputError(f"an image of {height} x {width} pixels holds no patch of {patch_kernel} x {patch_kernel}")
    return h, w


def check_whole(height: int, width: int, patch_kernel: int) -> None:
    """Raises InputError for sides that are no multiples of the patch, whose rest no token would see."""
    if height % patch_kernel or width % patch_kernel:
        raise InputError(
            f"an image of {height} x {width} pixels is no whole number of patches of {patch_kernel} x {patch_kernel}; crop "
            "or pad it"
        )


def cut_patches(x_BCHW: Tensor, patch_kernel: int, shift: int) -> Tensor:
    """Patches of an image as a view (B, h, w, C, k, k).

    Args:
        shift: 1 for what the encoder sees (the convolution's padding moves its grid up and left by one pixel, and zeros
            come in there); 0 for the pixels that a decoder predicts.
    """
    height, width = x_BCHW.shape[2:]
    h, w = token_grid(height, width, patch_kernel) if shift else (height // patch_kernel, width // patch_kernel)
    bottom, right = h * patch_kernel - height - shift, w * patch_kernel - width - shift
    if shift or bottom or right:
        x_BCHW = F.pad(x_BCHW, (shift, right, shift, bottom))
    x_BChkwk = x_BCHW.unflatten(3, (w, patch_kernel)).unflatten(2, (h, patch_kernel))
    return x_BChkwk.permute(0, 2, 4, 1, 3, 5)


def take_patches(patches_BhwCkk: Tensor, chosen_BX: Tensor | None) -> Tensor:
    """Those patches (row-major numbers), or all: (B, X, C, Q). Only what is chosen is copied."""
    if chosen_BX is None:
        return patches_BhwCkk.flatten(4).flatten(1, 2)
    row_B1 = torch.arange(chosen_BX.shape[0], device=chosen_BX.device)[:, None]
    width = patches_BhwCkk.shape[2]
    return patches_BhwCkk[row_B1, chosen_BX // width, chosen_BX % width].flatten(3)
