"""What pretraining keeps on each GPU, computed from the models' shapes: GB of parameters, gradients and AdamW's moments.

python tests/benchmarks/fsdp_memory.py

Nothing is allocated and nothing measured. All in float32, without activations, batches and communication buffers.
ddp keeps everything on each GPU. fsdp keeps 1/N of it and, while a step lasts, whole parameters and gradients of what
lies outside the transformer blocks and of two blocks (one computes, the next is fetched).
"""

from __future__ import annotations

from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from copernicus.models import create_model
from copernicus.models.blocks import Block

GPUS = (8, 16, 64)
PARAMETER, GRADIENT, MOMENTS = 4, 4, 8
"""Bytes a parameter."""


def main() -> None:
    table = Table(title="GB on each GPU, computed")
    for column in ("model", "parameters, M", "ddp", *(f"fsdp on {n}" for n in GPUS), "of it whole"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for size in ("base", "large", "huge"):
        # Models are laid out on the meta device, where they stay if nothing fills them.
        with patch("copernicus.models.vit.initialise"), patch("copernicus.models.masked_autoencoder.initialise"):
            model = create_model(f"copernicus_fm_{size}_mae")
        assert all(p.is_meta for p in model.parameters())
        every = sum(p.numel() for p in model.parameters())
        blocks = [sum(p.numel() for p in b.parameters()) for b in model.modules() if isinstance(b, Block)]
        kept = every * (PARAMETER + GRADIENT + MOMENTS)
        whole = (every - sum(blocks) + 2 * max(blocks)) * (PARAMETER + GRADIENT)
        amounts = [kept, *(kept / n + whole for n in GPUS), whole]
        table.add_row(size, f"{every / 1e6:.0f}", *(f"{amount / 1e9:.1f}" for amount in amounts))
    Console().print(table)


if __name__ == "__main__":
    main()
