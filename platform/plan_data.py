"""What a pretraining run reads, for `copernicus plan`: counted from the index and the run's own draws where the shards are
here, else for grids of the published (or the miniature's) sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copernicus.datasets.expand import expand
from copernicus.datasets.index import (
    FILE_NAME,
    GridEntry,
    GridIndex,
    from_surveys,
    read_index,
    select_shards,
    stamps,
    survey_or_fault,
    to_index,
)
from copernicus.datasets.miniature.scales import SCALES
from copernicus.datasets.ranges import plan_requests
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import LEADING_AXES, STORED_DTYPE, grid_key
from copernicus.datasets.slices import DrawReader
from copernicus.datasets.storage import Stamp
from copernicus.datasets.survey import SensorAt
from copernicus.platform.measured import ASSUMED, ATMOSPHERE_DATES, COUNTED, GRIDS, STORED_DATES, STORED_PATCHES
from copernicus.platform.schema import Experiment, Miniature, Pretrain

SURVEYED = 8
"""Shards whose headers are read where there is no index; the others are taken to be like them."""
DRAWN = 64
"""Grids whose first draw is laid out: the mean of their bytes stands for all."""


@dataclass(frozen=True)
class Data:
    """What a run reads.

    Attributes:
        grids: that have the run's sensors, held-out ones included.
        sample_bytes: that a draw reads, its mean.
        requests: of an object store that a draw makes, their mean.
        row_bytes: of a batch's row.
        stored_bytes: of all shards.
        remote: they lie on an object store.
        status, source: where these figures come from.
    """

    grids: int
    sample_bytes: float
    requests: float
    row_bytes: int
    stored_bytes: float
    remote: bool
    status: str
    source: str


def describe(experiment: Experiment, settings: Pretrain, grids: int | None) -> Data:
    """See `Data`. Reads an index or the headers of a few shards on this machine, and nothing elsewhere.

    Args:
        grids: their number, where the user says it.

    Raises:
        InputError: an index that is none, or sizes that do not fit.
    """
    reader = DrawReader(
        tuple(SENSORS[name] for name in settings.sensors),
        {name: settings.image_size.get(name, SENSORS[name].image_size) for name in settings.sensors},
        experiment.seed,
        published=settings.preset == "published",
    )
    remote = any("://" in shards for shards in settings.shards)
    found = local_index(settings)
    if found is not None:
        index, share, source = found
        chosen = index.having(settings.sensors, settings.require)
        numbers = np.unique(np.linspace(0, len(chosen) - 1, min(DRAWN, len(chosen))).round().astype(int))
        entries: Sequence[GridEntry] = chosen.entries(numbers.tolist())
        counted = round(len(chosen) / share)
        stored = sum(shard.stamp.size for shard in index.shards if shard.stamp.size > 0) / share
        status = COUNTED if share == 1 else ASSUMED
    else:
        layout, counted, source = grid_layout(experiment.miniature, settings)
        entries = list(_made_up(layout, DRAWN))
        counted = grids or counted
        stored = counted * sum(math.prod(s) * STORED_DTYPE[n].itemsize for n, s in layout.items())
        status = ASSUMED
    sample_bytes, requests = _drawn(reader, entries)
    if grids is not None and grids != counted:
        stored, counted, source = stored * grids / counted, grids, f"{source}; --grids {grids:,}"
    return Data(counted, sample_bytes, requests, reader.row_bytes, stored, remote, status, source)


def _drawn(reader: DrawReader, entries: Sequence[GridEntry]) -> tuple[float, float]:
    """(bytes, requests) of a draw, their means over the grids' first draws."""
    size = requests = 0
    for entry in entries:
        choices = reader.choose(entry, 0)
        spans = [(c.where.member, c.where.size) if c.where.whole else c.span() for c in choices.values()]
        size += sum(length for _, length in spans)
        requests += len(plan_requests(spans))
    return size / len(entries), requests / len(entries)


def local_index(settings: Pretrain) -> tuple[GridIndex, float, str] | None:
    """(index, share of the shards that it covers, where it is from) of shards on this machine; None: not here."""
    if settings.geotiffs or any("://" in shards for shards in settings.shards):
        return None
    try:
        uris = expand(settings.shards)
    except InputError:
        return None  # they are elsewhere, or not made yet
    beside = Path(uris[0]).parent / FILE_NAME
    path = settings.index or (str(beside) if beside.is_file() else None)
    if path is not None and "://" not in path and Path(path).is_file():
        table = read_index(path)
        known = stamps(table)
        covered = [uri for uri in uris if uri in known]
        if covered:
            share = len(covered) / len(uris)
            return (
                to_index(select_shards(table, covered)),
                share,
                f"the index {path} ({len(covered)} of {len(uris)} shards)",
            )
    some = [uris[i] for i in np.unique(np.linspace(0, len(uris) - 1, min(SURVEYED, len(uris))).round().astype(int))]
    source = f"headers of {len(some)} of {len(uris)} shards"
    return from_surveys(survey_or_fault(uri) for uri in some), len(some) / len(uris), source


def grid_layout(miniature: Miniature | None, settings: Pretrain) -> tuple[Mapping[str, tuple[int, ...]], int, str]:
    """(shape of each sensor's array in a grid, number of grids, where they are from) of shards that are not here."""
    patches, dates, sides = STORED_PATCHES, dict(STORED_DATES), {n: s.stored_size for n, s in SENSORS.items()}
    grids, source = round(GRIDS.value), f"the shards are not here: published sizes, and {GRIDS.source}"
    if settings.geotiffs:
        source = f"raw images, taken to be like the published shards; {GRIDS.source}"
    out = None if miniature is None else Path(miniature.out).absolute()
    if out is not None and any(out in Path(shards).absolute().parents for shards in settings.shards):
        assert miniature is not None
        scale = SCALES[miniature.scale].pretrain
        patches, grids = scale.patches, miniature.grids
        dates = {"s1_grd": scale.local_dates, "s2_toa": scale.local_dates, "s3_olci": scale.s3_dates}
        dates |= {name: scale.s5p_dates for name in SENSORS if name.startswith("s5p_")}
        sides = {
            "s1_grd": scale.local_size,
            "s2_toa": scale.local_size,
            "s3_olci": scale.s3_size,
            "dem": scale.dem_size,
        }
        sides |= {name: scale.s5p_size for name in SENSORS if name.startswith("s5p_")}
        source = f"the miniature of {grids} grids is not made yet: its sizes, every sensor in every grid"

    def shape(name: str) -> tuple[int, ...]:
        sensor, side = SENSORS[name], sides[name]
        leading = tuple(
            patches if axis == "patch" else dates.get(name, ATMOSPHERE_DATES) for axis in LEADING_AXES[name]
        )
        return (*leading, *(() if name == "dem" else (sensor.channels,)), side, side)

    return {name: shape(name) for name in SENSORS}, grids, source


def _made_up(layout: Mapping[str, tuple[int, ...]], count: int) -> Iterator[GridEntry]:
    """Grids with every sensor, their arrays one after another as in a shard."""
    for number in range(count):
        sensors, offset = {}, 0
        for name, shape in layout.items():
            size = math.prod(shape) * STORED_DTYPE[name].itemsize
            sensors[name] = SensorAt(STORED_DTYPE[name].name, shape, offset, offset, size)
            offset += size
        yield GridEntry(grid_key(number), "", Stamp(0, ""), 0.0, 0.0, sensors)
