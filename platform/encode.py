"""``copernicus encode``: real images through the encoder, to embeddings (parquet) and quick-look pictures (PNG).

Legend: C bands, H W pixels, h w tokens of a window, D width, B windows of a batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress, TaskID
from rich.table import Table

from copernicus.datasets.geotiff import Image, read_image, resample
from copernicus.datasets.sensors import InputError, Sensor, get_sensor
from copernicus.datasets.slices import DEM_DAYS
from copernicus.models import create_encoder, load_weights
from copernicus.platform.checkpoint import trained_language
from copernicus.platform.language import language_warning, open_language, variables
from copernicus.platform.quicklook import Window, draw_quicklook, place_text

_BATCH = 8


@dataclass(frozen=True)
class EncodeSummary:
    """What `encode_command` did."""

    images: int
    windows: int
    skipped_windows: int  # without a single valid value
    embed_dim: int
    weights: str  # "random" for none
    embeddings: Path
    quicklooks: tuple[Path, ...]
    seconds: float


def cut_windows(height: int, width: int, size: int) -> list[Window]:
    """Windows of size x size that cover an image, row by row; the last of a row or column is moved back to end at the
    border. Along a side shorter than ``size``, a window is as long as the image."""

    def starts(side: int) -> list[int]:
        if side <= size:
            return [0]
        return [*range(0, side - size, size), side - size]

    return [Window(row, col, min(height, size), min(width, size)) for row in starts(height) for col in starts(width)]


def fit_to_patches(x_BCHW: torch.Tensor, patch_kernel: int) -> torch.Tensor:
    """Resamples (bilinear, antialiased) so that both sides are the multiple of the patch kernel nearest to what they
    are, at least one patch."""
    height, width = (max(1, round(side / patch_kernel)) * patch_kernel for side in x_BCHW.shape[-2:])
    return resample(x_BCHW, (height, width))


@dataclass(frozen=True)
class EncodedImage:
    """Embeddings of one image's windows, those without a valid value left out."""

    windows: list[Window]
    metadata: np.ndarray  # (windows, 4): lon, lat, days, token area km^2
    embeddings: np.ndarray  # (windows, D) float32
    tokens: list[np.ndarray]  # of each window (D, h, w), less those of a window without any value
    image_share: float  # variance of these over that of the tokens as they are
    skipped: int


def encode_image(
    model: Any,
    image: Image,
    image_size: int | None = None,
    patch_kernel: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EncodedImage:
    """Cuts an image into windows and encodes each with its own place, the image's date and its tokens' true area.

    The tokens, of which pictures are made, are those after the last block less what the encoder makes of a window
    without any value, of the same place and date. Otherwise position and place, which are added to every token, are
    all that is seen of an encoder that has not learned much, or of a sensor whose normalised values are small.

    Args:
        model: an encoder of `copernicus.models.create_model`.
        image_size, patch_kernel: of the windows and tokens, pixels of the image; the sensor's own by default.
        progress: called after each batch with the number of windows done and of all.

    Raises:
        InputError: the patch kernel is larger than the windows.
    """
    sensor = dataclasses.replace(image.sensor, patch_kernel=patch_kernel or image.sensor.patch_kernel)
    size = image_size or sensor.image_size
    if sensor.patch_kernel > size:
        raise InputError(f"patches of {sensor.patch_kernel} pixels do not fit windows of {size}; give a smaller kernel")
    height, width = image.array_CHW.shape[1:]
    everything = cut_windows(height, width, size)
    windows = [w for w in everything if np.isfinite(image.array_CHW[(slice(None), *w.slices)]).any()]
    # Pretraining gives every elevation model one date, and so is an undated one here.
    days = DEM_DAYS if sensor.name == "dem" and math.isnan(image.days) else image.days
    weight = next(iter(model.parameters()), None)
    device = torch.device("cpu") if weight is None else weight.device
    rows: list[list[float]] = []
    embeddings: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    moments: list[list[tuple[int, np.ndarray, float]]] = []
    for start in range(0, len(windows), _BATCH):
        batch = windows[start : start + _BATCH]
        raw_BCHW = torch.from_numpy(np.stack([image.array_CHW[(slice(None), *w.slices)] for w in batch]))
        x_BCHW = fit_to_patches(raw_BCHW, sensor.patch_kernel)
        # Pixels of the window that one of the resampled window stands for.
        share = raw_BCHW.shape[2] * raw_BCHW.shape[3] / (x_BCHW.shape[2] * x_BCHW.shape[3])
        area = image.pixel_area_km2 * share * sensor.patch_kernel**2
        metadata = [[*image.locate(w.row + w.height / 2, w.col + w.width / 2), days, area] for w in batch]
        rows += metadata
        metadata_B4 = torch.tensor(metadata, dtype=torch.float64)
        with torch.inference_mode():
            x_BCHW = x_BCHW.to(device)
            z_BD = model.encode(x_BCHW, sensor, metadata_B4).float().cpu().numpy()
            if z_BD.ndim != 2 or len(z_BD) != len(batch):
                raise InputError(f"the encoder answers {z_BD.shape} to {len(batch)} images; features are (B, D)")
            if not np.isfinite(z_BD).all():
                raise InputError(f"{image.path.name}: the encoder's features are not finite; its weights are not sound")
            embeddings.append(z_BD)
            last_BDhw = model.encode_dense(x_BCHW, sensor, metadata_B4)[-1]
            blank_BDhw = model.encode_dense(torch.full_like(x_BCHW, torch.nan), sensor, metadata_B4)[-1]
        content_BDhw = (last_BDhw - blank_BDhw).float().cpu()
        tokens += list(content_BDhw.numpy())
        moments.append([_moments(last_BDhw.float().cpu()), _moments(content_BDhw)])
        if progress:
            progress(start + len(batch), len(windows))
    raw, content = (_variance(parts) for parts in zip(*moments, strict=True))
    return EncodedImage(
        windows=windows,
        metadata=np.array(rows),
        embeddings=np.concatenate(embeddings),
        tokens=tokens,
        image_share=content / raw if raw > 0 else 0.0,
        skipped=len(everything) - len(windows),
    )


def _moments(tokens_BDhw: torch.Tensor) -> tuple[int, np.ndarray, float]:
    """Number, sum (D,) and sum of squares of some tokens, from which the variance of all follows batch by batch."""
    x_ND = tokens_BDhw.double().permute(0, 2, 3, 1).flatten(0, 2)
    return len(x_ND), x_ND.sum(0).numpy(), float(x_ND.square().sum())


def _variance(parts: Sequence[tuple[int, np.ndarray, float]]) -> float:
    """Total variance (trace of the covariance) of the tokens whose moments these are."""
    count = sum(n for n, _, _ in parts)
    mean_D = np.sum([total_D for _, total_D, _ in parts], axis=0) / count
    return max(sum(squares for _, _, squares in parts) / count - float((mean_D**2).sum()), 0.0)


def encode_command(
    images: Sequence[Path | str],
    sensor: str | Sensor,
    weights: str | None,
    out: Path,
    model: str,
    model_overrides: dict[str, Any],
    console: Console,
    *,
    image_size: int | None = None,
    patch_kernel: int | None = None,
    bands: Sequence[str] | None = None,
    language: str | Path | None = None,
) -> EncodeSummary:
    """Encodes images and writes ``out`` (parquet, a row per window) and a quick-look PNG beside it for each image.

    All images are read once before anything is encoded or written, so that a wrong one leaves nothing behind.

    Columns: path, sensor, bands, row, col, height, width (pixels), lon, lat (degrees; of the window's centre), date,
    token_area_km2, embedding. Unknown values are null. Model and weights are in the file's metadata.

    Args:
        weights: a file, a checkpoint's folder or hf://...; None: random weights, which the console says in bold.
        model, model_overrides: of `copernicus.models.create_encoder`.
        bands: names of the files' bands, where they are named wrongly or not at all (see `read_image`).
        language: embeddings of variables' names, for sensors without wavelengths.

    Raises:
        InputError: no image, an image or weights that cannot be used; the message names each.
    """
    began = time.monotonic()
    spec = get_sensor(sensor) if isinstance(sensor, str) else sensor
    out = Path(out)
    if out.suffix != ".parquet":
        raise InputError(f"--out {out}: give a file that ends in .parquet; the pictures are written beside it")
    if not images:
        raise InputError("no image to encode: give one or more GeoTIFF or NetCDF files")
    _check_all(images, spec, bands)

    given: dict[str, Any] = {"language": open_language(str(language))} if language else {}
    encoder = create_encoder(model, spec, **model_overrides, **given)
    # Not every encoder knows of language.
    table, variable_names = getattr(encoder, "language", None), variables([spec])
    warning = ""
    if table is not None:
        warning = language_warning(table, variable_names, trained_language(weights) if weights else {})
    # One from elsewhere may have brought weights: what its class did is its own matter.
    source = weights or ("its own" if ":" in model else "random")
    if source == "random":
        console.print(
            Panel(
                "No --weights given: the encoder has [bold]random[/] weights. Embeddings and pictures show that the "
                "images are read, not what a pretrained encoder sees.",
                title="RANDOM WEIGHTS",
                style="bold yellow",
            )
        )
    elif weights is not None:
        console.print(escape(str(load_weights(encoder, weights))))
    encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    name = f"{model}, {source if weights else f'{source} weights'}"

    out.parent.mkdir(parents=True, exist_ok=True)
    report = _report_table(spec)
    rows: list[dict[str, Any]] = []
    pictures: list[Path] = []
    notes: dict[str, list[str]] = {}
    skipped = 0
    with Progress(console=console, transient=True) as progress:
        for path in images:
            image = read_image(path, spec, bands)
            task = progress.add_task(escape(image.path.name), total=None)
            encoded = encode_image(encoder, image, image_size, patch_kernel, partial(_show, progress, task))
            progress.remove_task(task)
            skipped += encoded.skipped
            rows += _rows(image, encoded)
            picture = _free_name(out, image.path, pictures)
            draw_quicklook(picture, image, encoded.windows, encoded.tokens, encoded.image_share, name)
            pictures.append(picture)
            _add_to_report(report, image, encoded)
            for note in image.notes:
                notes.setdefault(note, []).append(image.path.name)
            if encoded.skipped:
                notes.setdefault(f"{encoded.skipped} windows without a valid value left out", []).append(
                    image.path.name
                )
    described = {"language": table.describe(variable_names)} if table is not None else {}
    _write_parquet(out, rows, {"model": model, "weights": source, "sensor": spec.name, **described})

    console.print(report)
    for note, names in notes.items():
        who = names[0] if len(names) == 1 else f"{len(names)} images" if len(names) < len(images) else "every image"
        console.print(f"  [dim]-[/] {escape(who)}: {escape(note)}", highlight=False)
    if warning:
        console.print(f"  [yellow]- {escape(warning)}[/]", soft_wrap=True)
    width = len(rows[0]["embedding"]) if rows else 0
    console.print(f"{len(rows)} embeddings of {width} numbers: {out}; pictures: {out.parent}/{out.stem}_*.png")
    return EncodeSummary(
        images=len(images),
        windows=len(rows),
        skipped_windows=skipped,
        embed_dim=width,
        weights=source,
        embeddings=out,
        quicklooks=tuple(pictures),
        seconds=time.monotonic() - began,
    )


def _show(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def _check_all(images: Sequence[Path | str], sensor: Sensor, bands: Sequence[str] | None) -> None:
    wrong = []
    for path in images:
        try:
            read_image(path, sensor, bands)
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        head = f"{len(wrong)} of {len(images)} images cannot be encoded; nothing was written:\n  "
        raise InputError(wrong[0] if len(images) == 1 else head + "\n  ".join(wrong))


def _free_name(out: Path, image: Path, taken: Sequence[Path]) -> Path:
    """A picture's path beside ``out``, after the image's name; numbered where two images share one."""
    name, number = out.with_name(f"{out.stem}_{image.stem}.png"), 2
    while name in taken:
        name, number = out.with_name(f"{out.stem}_{image.stem}-{number}.png"), number + 1
    return name


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _rows(image: Image, encoded: EncodedImage) -> list[dict[str, Any]]:
    return [
        {
            "path": str(image.path),
            "sensor": image.sensor.name,
            "bands": list(image.sensor.bands),
            "row": window.row,
            "col": window.col,
            "height": window.height,
            "width": window.width,
            "lon": _known(lon),
            "lat": _known(lat),
            "date": image.acquired.date() if image.acquired else None,
            "token_area_km2": _known(area),
            "embedding": embedding,
        }
        for window, (lon, lat, _, area), embedding in zip(
            encoded.windows, encoded.metadata, encoded.embeddings, strict=True
        )
    ]


_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sensor", pa.string()),
        ("bands", pa.list_(pa.string())),
        *((name, pa.int32()) for name in ("row", "col", "height", "width")),
        ("lon", pa.float64()),
        ("lat", pa.float64()),
        ("date", pa.date32()),
        ("token_area_km2", pa.float64()),
        ("embedding", pa.list_(pa.float32())),
    ]
)


def _write_parquet(out: Path, rows: list[dict[str, Any]], metadata: dict[str, str]) -> None:
    part = out.with_name(f".{out.name}.part")
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata(metadata)), part)
    part.replace(out)


def _report_table(sensor: Sensor) -> Table:
    table = Table(title=f"Read as {sensor.name} (bands: {sensor.channels}; units: {sensor.units})")
    table.add_column("image", overflow="fold")
    for column in ("size px", "pixel", "bands", "place", "date", "missing", "windows", "tokens"):
        table.add_column(column)
    return table


def _add_to_report(table: Table, image: Image, encoded: EncodedImage) -> None:
    unknown = "[yellow]not found[/]"
    table.add_row(
        escape(image.path.name),
        f"{image.array_CHW.shape[2]} x {image.array_CHW.shape[1]}",
        unknown if math.isnan(image.pixel_area_km2) else f"{image.gsd_m:.4g} m",
        str(image.sensor.channels),
        place_text(image) or unknown,
        f"{image.acquired:%Y-%m-%d}" if image.acquired else unknown,
        f"{image.missing:.1%}",
        str(len(encoded.windows)),
        str(sum(t.shape[1] * t.shape[2] for t in encoded.tokens)),
    )
