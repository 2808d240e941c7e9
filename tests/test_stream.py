"""Ray Data's stream: every rank's rows in the planned order, whole, over epochs and segments, from any step on."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import SIZES

from copernicus.datasets.index import index_shards
from copernicus.datasets.order import Coverage, Order
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.slices import DrawReader

FEW = (SENSORS["s5p_no2"], SENSORS["dem"])


@pytest.mark.parametrize(
    ("batch_size", "world_size", "start_step", "blocks_per_segment"),
    [(10, 1, 0, 1024), (10, 1, 0, 1), (10, 2, 0, 2), (10, 2, 7, 1), (37, 1, 0, 1024), (41, 2, 1, 1)],
)
def test_batches_follow_the_order(ray, shards, monkeypatch, batch_size, world_size, start_step, blocks_per_segment):
    from copernicus.platform import stream

    monkeypatch.setattr(stream, "BLOCKS_PER_SEGMENT", blocks_per_segment)
    index = index_shards(str(shards))
    order = Order(len(index), seed=5, epochs=3, draws_per_grid=2)
    reader = DrawReader(FEW, SIZES, seed=5)
    ranks = []
    for rank in range(world_size):
        share = stream.Share(ray.put(index), order, reader, batch_size, rank, world_size, start_step)
        ranks.append([{k: np.array(v) for k, v in columns.items()} for columns in stream.batches(share)])
    steps = order.steps(batch_size) - start_step
    assert [len(r) for r in ranks] == [steps] * world_size
    coverage = Coverage()
    for step in range(steps):
        together = {k: np.concatenate([r[step][k] for r in ranks]) for k in ranks[0][step]}
        first = (start_step + step) * batch_size
        planned = [order.locate(p) for p in range(first, min(first + batch_size, order.samples))]
        drawn = together["epoch"] >= 0
        assert together["epoch"][drawn].tolist() == [epoch for epoch, _, _ in planned]
        assert together["key"][drawn].tolist() == [index[grid].key for _, _, grid in planned]
        epoch, draw, grid = planned[0]
        alone = reader.read(index[grid], epoch, draw)
        for sensor in FEW:
            np.testing.assert_array_equal(together[f"x_{sensor.name}"][0], alone.images[sensor.name])
        coverage.add(together["epoch"], together["key"])
    if start_step == 0:
        assert coverage.epochs == dict.fromkeys(range(3), Coverage.expected(index.keys, 2))


def test_rows_say_their_size(shards):
    reader = DrawReader(FEW, SIZES)
    batch = reader.batch([None] * 3)
    numbers = [v for k, v in batch.items() if k not in ("key", "problems", "epoch")]
    assert reader.row_bytes * 3 == sum(v.nbytes for v in numbers)
