"""What pretraining keeps on each GPU, computed from the models' shapes: GB of parameters, gradients and AdamW's moments.

python tests/benchmarks/fsdp_memory.py

Nothing is allocated and nothing measured. All in float32, without activations, batches and communication buffers. What
ddp and fsdp keep is said in `copernicus.platform.model_memory`.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from copernicus.platform.model_memory import model_size

GPUS = (8, 16, 64)


def main() -> None:
    table = Table(title="GB on each GPU, computed")
    for column in ("model", "parameters, M", "ddp", *(f"fsdp on {n}" for n in GPUS), "of it whole"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("base", "large", "huge"):
        size = model_size(f"copernicus_fm_{name}", {})
        shared = [size.state_bytes("fsdp", n) for n in GPUS]
        amounts = [size.state_bytes("ddp", 1)[0], *(kept + whole for kept, whole in shared), shared[0][1]]
        table.add_row(name, f"{size.parameters / 1e6:.0f}", *(f"{amount / 1e9:.1f}" for amount in amounts))
    Console().print(table)


if __name__ == "__main__":
    main()
