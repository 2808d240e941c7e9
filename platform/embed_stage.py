"""Embedding as a stage of an experiment: the product in the experiment's folder, its map and pictures, and MLflow."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import Problem
from copernicus.platform.checkpoint import trained_language
from copernicus.platform.embed import EmbedFailed, embed, open_images, sensors_of
from copernicus.platform.embed_map import PIXELS, fill_map, write_map
from copernicus.platform.embed_pictures import draw_components, draw_coverage
from copernicus.platform.embed_worker import DONE, GRIDS, IMAGES
from copernicus.platform.encoders import open_encoder
from copernicus.platform.grid_means import GRIDS_FILE
from copernicus.platform.language import language_warning, open_language, variables
from copernicus.platform.progress import progress_bar, short_path
from copernicus.platform.schema import Embed, Experiment, Model
from copernicus.platform.sweep import absolute
from copernicus.platform.tracking import Run

SETTINGS_FILE = "embed.json"
"""What a finished embedding was made with: whoever searches it encodes images with the same."""


def run_embed(
    experiment: Experiment,
    settings: Embed,
    checkpoint: Path | None,
    run: Run,
    console: Console,
) -> Path:
    """Embed what is left and make map and pictures; returns the product's folder.

    Args:
        checkpoint: of this experiment's pretraining.

    Raises:
        InputError: see `open_encoder` and `open_images`. EmbedFailed: too much of the data cannot be used.
    """
    folder = experiment.folder / "embed"
    model, weights, language = settings.encoder.model, settings.encoder.weights, settings.encoder.language
    if model is None:
        assert experiment.pretrain is not None, "checked when the experiment was loaded"
        model = experiment.pretrain.model
    if weights == "pretrain":
        assert experiment.pretrain is not None, "checked when the experiment was loaded"
        weights, language = str(checkpoint), language or experiment.pretrain.language
    weights, language = absolute(weights), language and absolute(language)
    sensors = sensors_of(settings)
    encoder = open_encoder("embed.encoder", model, weights, sensors[0], settings.encoder.seed, language)
    names = variables(sensors)
    table = open_language(language)
    trained = {} if weights == "none" else trained_language(weights)
    if warning := language_warning(table, names, trained):
        console.print(f"  [yellow]warning[/] {warning}", soft_wrap=True)

    with progress_bar(console, "embedding") as update:
        index = open_images(
            settings,
            experiment.folder.parent / "index",
            lambda done, total, note: update(done, total, f"shards {note}"),
        )
        run.tags({"data_fingerprint": index.fingerprint})
        try:
            result = embed(settings, encoder, index, folder, update)
        except EmbedFailed as error:
            _report(experiment.folder, error.problems, (), run, console)
            raise
    _report(experiment.folder, result.problems, result.empty, run, console)
    described = {
        "model": model.name, "sizes": model.encoder_overrides(), "weights": weights, "seed": settings.encoder.seed,
        "language": language, "sensors": list(settings.sensors), "image_size": dict(settings.image_size),
        "width": result.width, "images": result.images, "grids": result.grids, "data": index.fingerprint,
    }  # fmt: skip
    (folder / SETTINGS_FILE).write_text(json.dumps(described, indent=1))
    with progress_bar(console, "mapping") as update:
        globe = fill_map(merged_tables(result.grids_file), result.width, folder / ".map.scratch")
        files = write_map(globe, folder, settings.formats, update)
        pictures = experiment.folder / "pictures"
        what = f"{model.name}, {'random weights' if weights == 'none' else 'pretrained'}"
        drawn = [
            draw_components(globe, f"{experiment.name}: {what}", pictures / "globe.png"),
            draw_coverage(globe, f"{experiment.name}: images", pictures / "coverage.png", settings.sensors),
        ]
    del globe
    (folder / ".map.scratch").unlink()
    for picture in drawn:
        run.artifact(picture, "embed")
    run.artifact(folder / SETTINGS_FILE, "embed")
    run.metrics({
        "embed/images": result.images, "embed/grids": result.grids, "embed/width": result.width,
        "embed/skipped": result.lost, "embed/bytes": result.bytes,
        **({"embed/images_per_s": result.new / result.seconds} if result.new else {}),
    })  # fmt: skip
    console.print(
        f"  {result.images} images of {result.grids} grids, {result.width} numbers each; {len(files)} files of the map in "
        f"{short_path(folder)}",
        soft_wrap=True,
    )
    console.print(f"  look at {short_path(drawn[0])}", soft_wrap=True)
    return folder


def product_files(folder: Path, formats: Sequence[str]) -> list[Path]:
    """What a finished product consists of, its chunks by their manifests."""
    chunks = [path.stem for path in sorted((folder / DONE).glob("chunk-*.json"))]
    return [
        *(folder / name for name in (GRIDS_FILE, SETTINGS_FILE, PIXELS)), *(folder / f"map.{name}" for name in formats),
        *(folder / kind / f"{chunk}.parquet" for kind in (IMAGES, GRIDS) for chunk in chunks),
    ]  # fmt: skip


def merged_tables(path: Path) -> Iterator[pa.Table]:
    """The grid means of a product, a row group after the other."""
    with contextlib.closing(pq.ParquetFile(path)) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)


def _report(folder: Path, problems: Sequence[Problem], empty: Sequence[str], run: Run, console: Console) -> None:
    """What could not be used, counted and named. ``empty``: grids without any image."""
    if not problems and not empty:
        return
    path = folder / "skipped_embed.txt"
    path.write_text("".join(f"{p}\n" for p in problems) + "".join(f"{name}: no image\n" for name in empty))
    run.artifact(path)
    said = [f"{n} {reason}" for reason, n in Counter(p.reason for p in problems).most_common()]
    if empty:
        said.append(f"{len(empty)} grids without any image")
    console.print(f"  [yellow]skipped[/] {', '.join(said)}: named in {short_path(path)}", soft_wrap=True)


def read_settings(folder: Path) -> tuple[dict[str, Any], Model]:
    """What a finished embedding was made with, and its model.

    Raises:
        InputError: the folder holds none.
    """
    path = folder / SETTINGS_FILE
    try:
        described = json.loads(path.read_text())
        return described, Model(described["model"], **described["sizes"])
    except FileNotFoundError:
        raise InputError(
            f"{path} is not there, which says what encoder made these embeddings; run the experiment that made them again: it "
            "writes what is missing"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({type(error).__name__}); remove it, and run the experiment that made it again"
        ) from None
