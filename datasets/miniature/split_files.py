"""How a task lists the samples of a split: names by line, rows with a header, JSON, or all samples in one HDF5 file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from copernicus.datasets.bench.vocabulary import BIGEARTHNET_CLASSES
from copernicus.datasets.miniature.legends import LC100_CODES


def _write_rows(path: Path, rows: Iterable[Sequence], header: Sequence | None = None) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([header, *rows] if header else rows)


def list_names(root: Path, split: str, names: list[str], pattern: str = "{}.csv") -> None:
    (root / pattern.format(split)).write_text("".join(f"{name}\n" for name in names))


def list_eurosat(root: Path, split: str, names: list[str]) -> None:
    list_names(root, split, names, "eurosat-{}.txt")


def list_dfc2020(root: Path, split: str, names: list[str]) -> None:
    list_names(root, split, names, "dfc-{}-new.csv")


def list_bigearthnet(root: Path, split: str, rows: list[list]) -> None:
    _write_rows(root / f"multilabel-{split}.csv", rows, ("s1_path", "s2_path", *BIGEARTHNET_CLASSES))


def list_lc100(root: Path, split: str, entries: list[tuple[str, str, list[int]]]) -> None:
    labels = [(place, *present) for place, _, present in entries]
    _write_rows(root / f"multilabel-{split}.csv", labels, range(1 + len(LC100_CODES)))
    list_static(root, split, [(place, static) for place, static, _ in entries])


def list_static(root: Path, split: str, entries: list[tuple[str, str]]) -> None:
    """The image of each place that the static mode uses."""
    _write_rows(root / f"static_fnames-{split}.csv", entries)


def list_floods(root: Path, split: str, entries: list[tuple[str, dict]]) -> None:
    (root / f"grid_dict_{split}.json").write_text(json.dumps(dict(entries)))


def write_climate_zones(root: Path, split: str, patches: list[dict[str, np.ndarray]]) -> None:
    import h5py

    with h5py.File(root / f"lcz_{split}.h5", "w") as file:
        for name in patches[0] if patches else ():
            values: Any = np.stack([patch[name] for patch in patches])
            file.create_dataset(name, data=values, compression="gzip", compression_opts=1)
