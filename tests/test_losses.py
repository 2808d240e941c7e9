"""Machines lost in the middle of a pretraining on several hosts: the run ends by itself, or when it is submitted again, with
every sample trained as often as asked, every step's figures recorded once, and no MLflow run left running."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import why_not
from launched import LaunchedCluster, launched_cluster
from losing import ELASTIC, OFF_FOR_LONG, TROUBLES, Experiment, suffer, undisturbed, write_data

pytestmark = [pytest.mark.chaos, pytest.mark.skipif(bool(why_not()), reason=why_not())]

EPOCHS = 90


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LaunchedCluster]:
    with launched_cluster(tmp_path_factory.mktemp("losses")) as launched:
        yield launched


@pytest.fixture(scope="module")
def whole(cluster: LaunchedCluster) -> Experiment:
    return undisturbed(cluster, write_data(cluster.shared / "shards"), EPOCHS)


@pytest.mark.timeout(2400)
def test_a_run_that_meets_everything_ends_as_if_nothing_had_happened(cluster, whole):
    seen = suffer(cluster, whole, TROUBLES)
    print(seen)
    assert (seen.samples_lost, seen.metrics_lost, seen.left_running) == (0, 0, 0)
    assert (seen.weights_differ, seen.losses_differ) == (0, 0), "the same bits"


@pytest.mark.timeout(900)
def test_with_fewer_workers_for_a_while(cluster, whole):
    seen = suffer(cluster, whole, OFF_FOR_LONG, ELASTIC)
    print(seen)
    assert (seen.samples_lost, seen.metrics_lost, seen.left_running) == (0, 0, 0)
    assert seen.workers == {1, 2}
    # Sums round otherwise with another number of workers.
    assert max(seen.weights_differ, seen.losses_differ) < 1e-3
    cluster.await_nodes(2)
