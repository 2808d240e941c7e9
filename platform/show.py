"""One grid as a picture: every sensor, place and date that a shard holds of it.

Blocks of images stand side by side: radar and optical (a row a patch, so that one place is one row of the page) and
ocean colour, below them the gases and the elevation model. Everything is laid out in inches from the top left corner, so
that nothing depends on how wide a text turns out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LightSource, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from copernicus.datasets.pth import PthError, read_tensor
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.storage import open_file
from copernicus.datasets.survey import GridSurvey
from copernicus.platform.composites import GASES, NO_VALUE, Block, to_block

# Inches.
_MARGIN, _GAP, _BETWEEN, _HEADER = 0.4, 0.07, 0.5, 0.8
_CAPTION, _DATE, _PLACE = 0.56, 0.19, 0.42  # above a block, above an image, left of a patch's row
_GAS_GAP, _BAR, _TICKS = 0.08, 0.12, 0.42
_GAS, _USUAL, _LARGEST = 0.95, 1.3, 2.3  # sides of an image: of a gas and of another at least, and at most
_MOST_COLUMNS = 12  # in one line, before ocean colour gets a line of its own
_DPI = 110
_SEA = (0.68, 0.8, 0.9)  # where the elevation is 0 to the bit
_LAND = ListedColormap(colormaps["terrain"](np.linspace(0.25, 1, 256)))


def draw_grid(uri: str, grid: GridSurvey, path: Path) -> list[str]:
    """Write a PNG of all that ``grid`` has in the shard.

    Returns:
        what could not be drawn, and why.

    Raises:
        OSError: the shard cannot be read, or the picture not be written.
    """
    figure, problems = grid_figure(uri, grid)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, format="png", dpi=_DPI)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return problems


def grid_figure(uri: str, grid: GridSurvey) -> tuple[Figure, list[str]]:
    """The picture, and what could not be drawn; one sensor's arrays are in memory at a time.

    Raises:
        OSError: the shard cannot be read.
    """
    blocks: dict[str, Block] = {}
    problems = [str(p) for p in grid.problems]
    file = open_file(uri)
    for name, sensor in SENSORS.items():
        at = grid.sensors.get(name)
        if at is None:
            continue
        try:
            blocks[name] = to_block(read_tensor(file.read, at.member, at.size), sensor, at)
        except PthError as error:
            problems.append(f"{uri}:{grid.key}.{name}.pth: {error.reason} ({error})")
            dates = at.shape[-4] if len(at.shape) > 3 else 1
            blocks[name] = Block(name, dates, at.shape[0] if len(at.shape) > 4 else 1, note="cannot be read")
    page = _Page()
    width, height = _compose(page, blocks)
    _head(page, width, uri, grid, blocks, problems)
    return page.figure(width, height), problems


class _Page:
    """Collects what is to be drawn, in inches from the top left corner, and draws it when the page's size is known."""

    def __init__(self) -> None:
        self._boxes: list[tuple[float, float, float, float, Callable[[Any], None]]] = []
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def box(self, x: float, y: float, width: float, height: float, draw: Callable[[Any], None]) -> None:
        self._boxes.append((x, y, width, height, draw))

    def text(self, x: float, y: float, said: str, **style: Any) -> None:
        self._texts.append((x, y, said, style))

    def figure(self, width: float, height: float) -> Figure:
        figure = Figure(figsize=(width, height), facecolor="white")
        FigureCanvasAgg(figure)
        for x, y, wide, high, draw in self._boxes:
            axes = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
            axes.set_xticks([])
            axes.set_yticks([])
            draw(axes)
        for x, y, said, style in self._texts:
            figure.text(x / width, 1 - y / height, said, **{"va": "top", "parse_math": False, **style})
        return figure


def _compose(page: _Page, blocks: Mapping[str, Block]) -> tuple[float, float]:
    """Lays out all sensors and returns the page's width and height."""
    radar, optical, colour, gases, dem = _complete(blocks)
    lines = [[radar, optical]]
    beside = math.ceil(colour.columns / max(radar.rows, optical.rows))
    if radar.columns + optical.columns + beside <= _MOST_COLUMNS:
        colour.columns, colour.rows = beside, math.ceil(colour.columns / beside)
        lines[0].append(colour)
    else:
        lines.append([colour])
    # The lower part fills the page's width: as many gases' images across as there are dates, and four down, which is
    # the side of the elevation model.
    dates = max(gas.columns for gas in gases)
    down = len(gases) * (_DATE + _GAS_GAP) - _GAS_GAP
    fixed = _PLACE + dates * _GAP + _BETWEEN + down - _DATE + _GAP + 2 * (_BAR + _TICKS)
    width = max(fixed + (dates + len(gases)) * _GAS, max(_natural_width(line) for line in lines))
    side = (width - fixed) / (dates + len(gases))

    y = _HEADER
    for line in lines:
        y = _line(page, line, y, width) + 0.25
    left, right = _MARGIN + _PLACE, _MARGIN + _PLACE + dates * (side + _GAP) + _BAR + _TICKS + _BETWEEN
    _caption(page, left, y, "s5p", "total columns of four gases\none range of colours for all dates")
    _caption(page, right, y, "dem", dem.about)
    y += _CAPTION + _DATE
    for number, gas in enumerate(gases):
        _gas(page, gas, left, y + number * (_DATE + side + _GAS_GAP), side, dates)
    square = down - _DATE + len(gases) * side
    if dem.images and dem.images[0] is not None:
        page.box(right, y, square, square, lambda axes: _hill_shade(axes, dem))
        _bar(page, right + square + _GAP, y, square, dem.range, _LAND)
    else:
        _empty(page, right, y, square, square, "no value" if dem.images else dem.note)
    return width + 2 * _MARGIN, y + square + _MARGIN


def _natural_width(line: Sequence[Block]) -> float:
    return _fixed_width(line) + _USUAL * sum(block.columns for block in line)


def _fixed_width(line: Sequence[Block]) -> float:
    """Of blocks side by side: all but the images."""
    return sum(_PLACE + block.columns * _GAP - _GAP for block in line) + _BETWEEN * (len(line) - 1)


def _complete(blocks: Mapping[str, Block]) -> tuple[Block, Block, Block, list[Block], Block]:
    """Radar, optical, ocean colour, gases, elevation; what is missing takes the form of its neighbour."""
    local = [blocks[name] for name in ("s1_grd", "s2_toa") if name in blocks]
    rows = max((block.rows for block in local), default=1)
    columns = max((block.columns for block in local), default=2)
    radar, optical = (blocks.get(name) or Block(name, columns, rows) for name in ("s1_grd", "s2_toa"))
    dates = max((blocks[name].columns for name in GASES if name in blocks), default=4)
    gases = [blocks.get(name) or Block(name, dates, 1) for name in GASES]
    colour = blocks.get("s3_olci") or Block("s3_olci", 2 * rows, 1)
    return radar, optical, colour, gases, blocks.get("dem") or Block("dem", 1, 1)


def _line(page: _Page, blocks: Sequence[Block], y: float, width: float) -> float:
    """Blocks side by side, their images as large as the width allows; returns where the line ends."""
    side = min((width - _fixed_width(blocks)) / sum(block.columns for block in blocks), _LARGEST)
    x, end = _MARGIN, y
    for block in blocks:
        _caption(page, x + _PLACE, y, block.sensor, block.about)
        wide = block.columns * (side + _GAP) - _GAP
        high = block.rows * (_DATE + side + _GAP) - _GAP
        if not block.images:
            _empty(page, x + _PLACE, y + _CAPTION + _DATE, wide, high - _DATE, block.note)
        for number, image in enumerate(block.images):
            row, column = divmod(number, block.columns)
            left = x + _PLACE + column * (side + _GAP)
            top = y + _CAPTION + row * (_DATE + side + _GAP) + _DATE
            _image(page, block, number, image, left, top, side, 7.5)
        for row, place in enumerate(block.places):
            middle = y + _CAPTION + row * (_DATE + side + _GAP) + _DATE + side / 2
            page.text(
                x + _PLACE - 0.06, middle, place, rotation=90, ha="right", va="center", fontsize=6.5, color="0.3",
                multialignment="center",
            )  # fmt: skip
        x += _PLACE + wide + _BETWEEN
        end = max(end, y + _CAPTION + high)
    return end


def _gas(page: _Page, gas: Block, x: float, y: float, side: float, dates: int) -> None:
    said = f"{gas.sensor.removeprefix('s5p_').upper()}\n{gas.units}".rstrip()
    page.text(x - 0.08, y + side / 2, said, rotation=90, ha="right", va="center", fontsize=7.5, multialignment="center")
    if not gas.images:
        _empty(page, x, y, dates * (side + _GAP) - _GAP, side, gas.note)
        return
    for number, image in enumerate(gas.images):
        _image(page, gas, number, image, x + number * (side + _GAP), y, side, 6.5)
    _bar(page, x + dates * (side + _GAP), y, side, gas.range, colormaps["viridis"])


def _image(
    page: _Page, block: Block, number: int, image: np.ndarray | None, x: float, y: float, side: float, size: float
) -> None:
    title, again = block.titles[number]
    page.text(
        x + side / 2, y - 0.04, title, ha="center", va="bottom", fontsize=size, color="0.6" if again else "black",
        style="italic" if again else "normal",
    )  # fmt: skip
    if image is None:
        _empty(page, x, y, side, side, "no value")
    elif image.ndim == 3:
        page.box(x, y, side, side, lambda axes: axes.imshow(image))
    else:
        low, high = block.range
        shades = colormaps["viridis"].with_extremes(bad=(NO_VALUE,) * 3)
        page.box(x, y, side, side, lambda axes: axes.imshow(image, cmap=shades, vmin=low, vmax=high))


def _empty(page: _Page, x: float, y: float, width: float, height: float, note: str) -> None:
    page.box(x, y, width, height, lambda axes: _frame(axes, note))


def _frame(axes: Any, note: str) -> None:
    axes.set_facecolor("0.97")
    for spine in axes.spines.values():
        spine.set(color="0.65", linestyle=(0, (4, 3)))
    axes.text(0.5, 0.5, note, transform=axes.transAxes, ha="center", va="center", color="0.45", fontsize=9)


def _hill_shade(axes: Any, dem: Block) -> None:
    elevation_HW = dem.images[0]
    assert elevation_HW is not None
    unknown_HW = np.isnan(elevation_HW)
    filled_HW = np.where(unknown_HW, np.nanmedian(elevation_HW), elevation_HW)
    spacing = SENSORS["dem"].gsd_m
    # Exaggerated so that flat land still shows its relief.
    steep = np.percentile(np.hypot(*np.gradient(filled_HW, spacing)), 98) if min(filled_HW.shape) > 1 else 0
    low, high = dem.range
    shaded_HW3 = LightSource(azdeg=315, altdeg=45).shade(
        filled_HW, _LAND, vmin=low, vmax=max(high, low + 1), blend_mode="soft", dx=spacing, dy=spacing,
        vert_exag=min(max(1.0, 0.5 / steep), 30) if steep > 0 else 1,
    )[..., :3]  # fmt: skip
    shaded_HW3[elevation_HW == 0] = _SEA
    shaded_HW3[unknown_HW] = NO_VALUE
    axes.imshow(shaded_HW3)


def _bar(page: _Page, x: float, y: float, height: float, limits: tuple[float, float], colours: Any) -> None:
    """A colour bar with its numbers at the right."""

    def draw(axes: Any) -> None:
        bar = axes.figure.colorbar(ScalarMappable(Normalize(*limits), colours), cax=axes)
        bar.ax.tick_params(labelsize=6.5, length=2, pad=1.5)
        bar.locator = MaxNLocator(nbins=max(3, min(8, round(height * 3))))
        bar.formatter = ScalarFormatter(useOffset=False)
        bar.update_ticks()

    page.box(x, y, _BAR, height, draw)


def _caption(page: _Page, x: float, y: float, name: str, about: str) -> None:
    page.text(x, y, name, fontsize=10.5, weight="bold")
    page.text(x, y + 0.2, about, fontsize=7.5, color="0.35")


def _head(
    page: _Page, width: float, uri: str, grid: GridSurvey, blocks: Mapping[str, Block], problems: Sequence[str]
) -> None:
    place = "" if grid.lon is None or grid.lat is None else (
        f"{abs(grid.lat):g} {'NS'[grid.lat < 0]}, {abs(grid.lon):g} {'EW'[grid.lon < 0]}"
    )  # fmt: skip
    page.text(_MARGIN, 0.22, f"grid {grid.key}", fontsize=16, weight="bold")
    absent = [name for name in SENSORS if name not in blocks]
    said = [place, uri.rpartition("/")[2][:60], f"lacks {', '.join(absent)}" if absent else "all eight sensors"]
    page.text(_MARGIN + 2.05, 0.29, "    ".join(s for s in said if s), fontsize=9.5, color="0.25")
    if problems:
        more = f"   and {len(problems) - 1} more" if len(problems) > 1 else ""
        page.text(_MARGIN, 0.56, problems[0][: round(width * 11)] + more, fontsize=7.5, color="firebrick")
    elif any(again for block in blocks.values() for _, again in block.titles):
        page.text(
            _MARGIN, 0.56, "a grey date is that of an image before it", fontsize=7.5, color="0.45", style="italic"
        )
