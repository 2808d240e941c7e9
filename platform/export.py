"""``copernicus export``: a checkpoint's weights in the published format, for the public code, TorchGeo and others.

The published files hold ``{"model": state dict}``. Public code disagrees about an encoder's last norm: the benchmark's
classification asserts that the file has no ``fc_norm`` and starts a fresh one, TorchGeo's own loader asserts that it
has no ``norm``. So the norm is a choice (``pool``), and what each choice suits is in the command's help and table.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import Tensor

from copernicus.datasets.sensors import InputError
from copernicus.models.masked_autoencoder import DECODER_PREFIXES
from copernicus.models.sources import file_digest
from copernicus.models.zoo import ZOO, create_model
from copernicus.platform.checkpoint import read_checkpoint

SUFFIXES = (".pth", ".safetensors")
PARTS = ("encoder", "autoencoder")
POOLS = {
    "mean": "last norm as fc_norm, for the mean of patch tokens: loads strictly into this platform's encoders and "
    "TorchGeo's, with the features that sweeps measure",
    "token": "last norm as norm, for the class token (global_pool=False)",
    "none": "no last norm, as the published base weights: for the public benchmark's classification, which starts "
    "its own",
}


@dataclass(frozen=True)
class Export:
    """What was written. ``sizes``: embed_dim, depth, num_heads; ``digest``: the file's sha256."""

    out: Path
    model: str
    sizes: dict[str, int]
    part: str
    pool: str
    tensors: int
    parameters: int
    size: int
    digest: str


def published_state(state: dict[str, Tensor], part: str = "encoder", pool: str = "mean") -> dict[str, Tensor]:
    """A masked autoencoder's state dict -> the tensors to publish, float32, in memory of their own.

    Args:
        part: ``encoder``, or ``autoencoder`` for everything (less a teacher, which is nobody's to publish again).
        pool: of an encoder's last norm, see ``POOLS``.
    """
    names = {name: name for name in state if not name.startswith("teacher.")}
    if part == "encoder":
        names = {name: name for name in names if not name.startswith(DECODER_PREFIXES)}
        if pool == "mean":
            names = {old: f"fc_{new}" if new in ("norm.weight", "norm.bias") else new for old, new in names.items()}
        elif pool == "none":
            names = {name: name for name in names if name not in ("norm.weight", "norm.bias")}
    return {new: state[old].detach().cpu().to(torch.float32, copy=True).contiguous() for old, new in names.items()}


def export(
    checkpoint: str | Path, out: str | Path, part: str = "encoder", pool: str | None = None, force: bool = False
) -> Export:
    """Write a checkpoint's weights in the published format.

    ``.pth``: ``{"model": state dict}``, nothing but float32 tensors. ``.safetensors``: the same names, with metadata
    (architecture, sizes, part, pool, source, samples_seen, language). The file is there whole or not at all.

    Args:
        checkpoint: of ``copernicus run``: a source as of ``load_weights``.
        pool: see ``POOLS``; of an encoder only (mean).

    Raises:
        InputError: a wrong suffix, part or pool, a file that is there already, or not a checkpoint of ours.
        OSError: the file cannot be written; nothing is left behind.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise InputError(f"--out {out}: give a file that ends in {' or '.join(SUFFIXES)}")
    if part not in PARTS:
        raise InputError(f"--part: no {part!r}; valid choices: {', '.join(PARTS)}")
    if pool is not None and part != "encoder":
        raise InputError("--pool is of an encoder; an autoencoder keeps its last norm as norm")
    if pool is not None and pool not in POOLS:
        raise InputError(f"--pool: no {pool!r}; valid choices: {', '.join(POOLS)}")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; give a file in it")
    if out.exists() and not force:
        raise InputError(f"--out {out}: is there already; give another name, or --force to replace it")
    saved = read_checkpoint(checkpoint)
    if saved is None:
        raise InputError(
            f"{checkpoint}: is not a checkpoint of `copernicus run` (its checkpoint.pt says which model it is of); "
            "weights of other kinds need no export"
        )
    chosen = (pool or "mean") if part == "encoder" else "token"
    state = published_state(saved["model"], part, chosen)
    given = dict(saved["architecture"])
    name = given.pop("name")
    shape = ZOO[name][1] | given
    sizes = {key: int(shape[key]) for key in ("embed_dim", "depth", "num_heads")}
    _check(saved["model"], name, given, checkpoint)
    metadata = {
        "format": "pt",
        "architecture": name,
        "sizes": json.dumps(sizes),
        "part": part,
        "pool": chosen,
        "source": str(checkpoint),
        "samples_seen": str(saved.get("samples_seen", "")),
        "language": json.dumps(saved.get("language", {})),
    }
    digest = _write(out, state, metadata)
    parameters = sum(value.numel() for value in state.values())
    return Export(out, name, sizes, part, chosen, len(state), parameters, out.stat().st_size, digest)


def _check(state: dict[str, Tensor], name: str, given: dict[str, int], checkpoint: str | Path) -> None:
    """Refuse an encoder that is not the one which its checkpoint states."""
    if f"{name}_mae" not in ZOO:
        raise InputError(f"{checkpoint}: says it is of {name}, which `copernicus run` does not pretrain; it is damaged")
    expected = create_model(name, global_pool=False, **given).state_dict()
    found = published_state(state, "encoder", "token")
    for key in [*expected, *found]:
        shapes = [list(tensors[key].shape) if key in tensors else "nothing" for tensors in (expected, found)]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"{checkpoint}: says it is of {name} {given or ''}, whose {key} is {shapes[0]}, but holds {shapes[1]}"
            )


def _write(out: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> str:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    try:
        with open(partial, "wb") as file:
            if out.suffix == ".safetensors":
                file.write(save(state, metadata))
            else:
                torch.save({"model": state}, file)
        digest = file_digest(partial)
        os.replace(partial, out)
    except RuntimeError as error:
        # torch hides why a write failed (a full disk) behind an error of its own.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        partial.unlink(missing_ok=True)
    return digest


def export_command(checkpoint: str, out: Path, part: str, pool: str | None, force: bool, console: Console) -> Export:
    """`export`, then a table of what was written and what to do with it.

    Raises:
        InputError, OSError: see `export`.
    """
    try:
        done = export(checkpoint, out, part, pool, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # said with how to go on
        raise InputError(f"--out {out}: cannot be written ({error.strerror or error})") from error
    table = Table(title=f"Exported from {checkpoint}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    kept = POOLS[done.pool] if part == "encoder" else "encoder and decoder, last norm as norm"
    for key, value in (
        ("model", f"{done.model} ({done.part}: {kept})"),
        ("parameters", f"{done.parameters:,} in {done.tensors} tensors, float32"),
        ("width, depth, heads", f"{done.sizes['embed_dim']}, {done.sizes['depth']}, {done.sizes['num_heads']}"),
        ("file", f"{done.out} ({done.size / 1e6:.1f} MB)"),
        ("sha256", done.digest),
    ):
        table.add_row(key, value)
    console.print(table)
    for line in _next(done):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    return done


def _next(done: Export) -> list[str]:
    sizes = " ".join(f"{key}={value}" for key, value in done.sizes.items() if ZOO[done.model][1][key] != value)
    lines = [
        f"Next: copernicus encode IMAGE.tif {sizes + ' ' if sizes else ''}--sensor s2_toa --weights {done.out} "
        f"--model {done.model}"
    ]
    if done.part == "encoder":
        loaded = f'torch.load("{done.out}", weights_only=True)["model"]'
        if done.out.suffix == ".safetensors":
            loaded = f'safetensors.torch.load_file("{done.out}")'
        arguments = ", ".join(f"{key}={value}" for key, value in done.sizes.items())
        pooled = "" if done.pool != "token" else ", global_pool=False"
        strict = ", strict=False" if done.pool == "none" else ""
        lines.append(f"TorchGeo: CopernicusFM({arguments}{pooled}).load_state_dict({loaded}{strict})")
    return lines
