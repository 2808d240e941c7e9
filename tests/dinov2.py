"""A tiny DINOv2 for tests: its files as ``transformers`` writes them, and its answer by a forward pass of our own."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56, "patch_size": 14,
    "mlp_ratio": 2,
}  # fmt: skip


def save_dinov2(folder: Path, seed: int = 0, **sizes: int) -> Path:
    """Random weights large enough that every one of them matters; the global random state stays as it is."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        model = Dinov2Model(Dinov2Config(**{**SIZES, **sizes}))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * 0.3)
    model.save_pretrained(folder)
    return folder


def patch_tokens(state: dict[str, Tensor], x_B3HW: Tensor, heads: int = 3, patch: int = 14) -> Tensor:
    """Normed patch tokens (B, L, F) in float64, from the architecture's description (arXiv 2304.07193)."""
    w = {name: value.double() for name, value in state.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    patches = F.unfold(x_B3HW.double(), patch, stride=patch).transpose(1, 2)
    kernel = w["embeddings.patch_embeddings.projection.weight"].flatten(1)
    z = patches @ kernel.T + w["embeddings.patch_embeddings.projection.bias"]
    h, width = x_B3HW.shape[2] // patch, x_B3HW.shape[3] // patch
    table = w["embeddings.position_embeddings"]
    side = round((table.shape[1] - 1) ** 0.5)
    if (h, width) != (side, side):
        square = table[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(square, (h, width), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        table = torch.cat([table[:, :1], resized], dim=1)
    z = torch.cat([w["embeddings.cls_token"].expand(len(z), -1, -1), z], dim=1) + table
    for i in range(sum(name.endswith("norm1.weight") for name in w)):
        block = f"encoder.layer.{i}"
        y = norm(z, f"{block}.norm1")
        q, k, v = (
            linear(y, f"{block}.attention.attention.{part}").unflatten(2, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        share = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        y = linear((share @ v).transpose(1, 2).flatten(2), f"{block}.attention.output.dense")
        z = z + y * w[f"{block}.layer_scale1.lambda1"]
        y = linear(F.gelu(linear(norm(z, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
        z = z + y * w[f"{block}.layer_scale2.lambda1"]
    return norm(z, "layernorm")[:, 1:]
