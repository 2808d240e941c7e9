"""Training straight from GeoTIFFs: the same draws as from the shards that are made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_slices import ALL

from copernicus.datasets.index import from_surveys, index_shards
from copernicus.datasets.miniature.raw import write_raw
from copernicus.datasets.miniature.write import SCALES
from copernicus.datasets.raw import load_grid, read_layout
from copernicus.datasets.raw_index import survey_layout
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import write_shards
from copernicus.datasets.slices import DrawReader

SMALL = SCALES["small"].pretrain
STORED = {"s1_grd": SMALL.local_size, "s2_toa": SMALL.local_size, "s3_olci": SMALL.s3_size, "dem": SMALL.dem_size}
SIZES = {"s1_grd": 48, "s2_toa": 48, "s3_olci": 24, "dem": 128} | {n: 20 for n in SENSORS if n.startswith("s5p")}


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, 8)
    return folder


def test_draws_are_those_of_the_converted_shards(raw, tmp_path):
    layout = read_layout(raw)
    write_shards((load_grid(layout, key, STORED)[0] for key in layout.keys), tmp_path)
    shards, files = index_shards(str(tmp_path)), from_surveys([survey_layout(layout, STORED)])
    assert [g.key for g in files] == [g.key for g in shards]
    reader = DrawReader(ALL, SIZES, seed=3, metadata_drop=0.2)
    for a, b in zip(shards, files, strict=True):
        assert a.sensors.keys() == b.sensors.keys()
        for name in a.sensors:
            assert (a.sensors[name].shape, a.sensors[name].days) == (b.sensors[name].shape, b.sensors[name].days)
        for epoch in range(3):
            x, y = reader.read(a, epoch), reader.read(b, epoch)
            assert x.problems == y.problems == []
            np.testing.assert_array_equal(x.present, y.present)
            np.testing.assert_array_equal(x.metadata, y.metadata)
            for name in SENSORS:
                np.testing.assert_array_equal(x.images[name], y.images[name])
                np.testing.assert_array_equal(x.noise[name], y.noise[name])


def test_an_image_that_cannot_be_read_is_named_when_it_is_drawn(tmp_path):
    write_raw(tmp_path, 3)
    layout = read_layout(tmp_path)
    index = from_surveys([survey_layout(layout, STORED)])
    victim = next(g for g in index if len(g.sensors) == 8)
    for name in set(victim.sensors["s5p_no2"].files):
        (tmp_path / name).write_bytes(b"no GeoTIFF")
    (tmp_path / victim.sensors["dem"].files[0]).unlink()
    sample = DrawReader(ALL, SIZES).read(victim, 0)
    assert sample.present.sum() == 6
    assert {p.reason for p in sample.problems} == {"unreadable"}
    assert [p.where.split(":")[1] for p in sample.problems] == [f"{victim.key}.s5p_no2", f"{victim.key}.dem"]
