"""Generated kernels at work: patches to tokens, and decoder tokens to the pixels of patches.

A kernel W of 16 x 16 serves any patch size through a fixed matrix M (Q, P), FlexiViT's resize: the kernel for k x k
pixels is M W. For small patches that is what is computed. For patches above 16 x 16 the same product is cheaper the
other way round, (patch M) W: no kernel of k x k is ever made.

Shapes: B batch, C channels, D width of the tokens, E of the decoder's, k side of a patch, Q = k*k its pixels, X patches,
P = 16*16 pixels of a generated kernel, N = B*X, V = C*Q or C*P values of a patch, p q kernel sides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.models.hypernetwork import Kernel
from copernicus.models.resize import GENERATED_KERNEL, kernel_resize_matrix, resize_kernel

KERNEL_SCALE = 0.01
"""Factor on generated weights and biases, which keeps them small against what the generator puts out."""


def embed_patches(patches_BXCQ: Tensor, kernel: Kernel, patch_kernel: int) -> Tensor:
    """Patches of k x k pixels and a kernel fitted to them -> tokens (B, X, D); ``KERNEL_SCALE`` comes in here."""
    batch, count = patches_BXCQ.shape[:2]
    if patch_kernel > GENERATED_KERNEL:
        generated, size = (GENERATED_KERNEL, GENERATED_KERNEL), (patch_kernel, patch_kernel)
        patches_BXCQ = patches_BXCQ @ kernel_resize_matrix(generated, size, str(patches_BXCQ.device))
    flat_NV, weight_VD = patches_BXCQ.flatten(2).flatten(0, 1), kernel.weight_CPD.flatten(0, 1)
    tokens_ND = torch.addmm(kernel.bias_D, flat_NV, weight_VD, beta=KERNEL_SCALE, alpha=KERNEL_SCALE)
    return tokens_ND.unflatten(0, (batch, count))


def predict_patches(z_BXE: Tensor, kernel_CPE: Tensor, patch_kernel: int) -> Tensor:
    """Decoder tokens -> values (B, X, C, Q) of one patch each."""
    generated, size = (GENERATED_KERNEL, GENERATED_KERNEL), (patch_kernel, patch_kernel)
    z_BXE = z_BXE * KERNEL_SCALE
    channels, dim = kernel_CPE.shape[0], kernel_CPE.shape[2]
    if patch_kernel > GENERATED_KERNEL:
        values_BXCP = F.linear(z_BXE, kernel_CPE.reshape(-1, dim)).unflatten(2, (channels, -1))
        return F.linear(values_BXCP, kernel_resize_matrix(generated, size, str(z_BXE.device)))
    kernel_CQE = resize_kernel(kernel_CPE, generated, size)
    return F.linear(z_BXE, kernel_CQE.reshape(-1, dim)).unflatten(2, (channels, -1))
