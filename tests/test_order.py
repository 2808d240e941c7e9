"""The global order: what any number of workers, and any restart, must agree on."""

from collections import Counter

import numpy as np
import pytest

from copernicus.datasets.order import Coverage, Order, generator, uniform


def stream(order: Order, batch_size: int, rank: int = 0, world_size: int = 1, start_step: int = 0) -> np.ndarray:
    """All positions that a rank reads, one row a step."""
    share = order.share(batch_size, world_size)
    count = (order.steps(batch_size) - start_step) * share
    return order.positions(np.arange(count), rank, world_size, batch_size, start_step).reshape(-1, share)


@pytest.mark.parametrize(("grids", "epochs", "draws"), [(1, 1, 1), (7, 3, 1), (10, 2, 3), (23, 1, 4)])
def test_an_epoch_draws_every_grid_as_often_as_asked(grids, epochs, draws):
    order = Order(grids, seed=5, epochs=epochs, draws_per_grid=draws)
    seen: dict[int, Counter] = {epoch: Counter() for epoch in range(epochs)}
    places = [order.locate(p) for p in range(order.samples)]
    for epoch, draw, grid in places:
        assert 0 <= draw < draws
        seen[epoch][grid] += 1
    assert [epoch for epoch, _, _ in places] == sorted(epoch for epoch, _, _ in places)
    for epoch in range(epochs):
        assert seen[epoch] == Counter(dict.fromkeys(range(grids), draws))
    # The (epoch, draw, grid) of each sample keys its crop: none may come twice.
    assert len(set(places)) == order.samples == grids * epochs * draws


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(b, w) for b in (1, 4, 6, 13, 200) for w in (1, 2, 3, 5) if w <= b]
)
def test_global_batches_do_not_depend_on_the_number_of_ranks(batch_size, world_size):
    order = Order(17, seed=1, epochs=3, draws_per_grid=2)
    ranks = [stream(order, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({r.shape for r in ranks}) == 1, "every rank takes equally many steps of equal shape"
    for step in range(order.steps(batch_size)):
        together = np.concatenate([r[step] for r in ranks])
        expected = np.arange(step * batch_size, min((step + 1) * batch_size, order.samples))
        np.testing.assert_array_equal(together[together >= 0], expected)
    assert len(ranks[0]) == order.steps(batch_size) == -(-17 * 3 * 2 // batch_size)


def test_padding_is_minus_one_and_as_little_as_possible():
    order = Order(5, epochs=2)
    # 10 samples in batches of 4: two full ones and one of 2; three ranks take 2 each, so 6 places a batch.
    ranks = [stream(order, 4, rank, 3).tolist() for rank in range(3)]
    assert ranks[0] == [[0, 1], [4, 5], [8, 9]]
    assert ranks[1] == [[2, 3], [6, 7], [-1, -1]]
    assert ranks[2] == [[-1, -1], [-1, -1], [-1, -1]]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_goes_on_with_the_next_sample_on_any_number_of_ranks(world_size):
    order = Order(11, seed=3, epochs=4)
    whole = stream(order, 8)
    for start in range(order.steps(8) + 1):
        resumed = [stream(order, 8, rank, world_size, start) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(resumed, axis=1), whole[start:])


def test_every_pass_seed_and_epoch_has_an_order_of_its_own():
    def orders(seed: int) -> list[tuple[int, ...]]:
        order = Order(40, seed, epochs=2, draws_per_grid=2)
        return [tuple(order.locate(p)[2] for p in range(i * 40, i * 40 + 40)) for i in range(4)]

    assert len({*orders(0), *orders(1)}) == 8
    assert orders(0) == orders(0)


def test_every_grid_is_equally_likely_to_be_first():
    grids, seeds = 8, 1600
    counts = Counter(Order(grids, seed).locate(0)[2] for seed in range(seeds))
    expected = seeds / grids
    chi_squared = sum((counts[g] - expected) ** 2 / expected for g in range(grids))
    assert chi_squared < 24.3  # 99.9 % of the chi-squared distribution with 7 degrees of freedom


def test_a_shuffle_is_global():
    """A sample's neighbours in a batch come from anywhere in the data, not from its shard."""
    order = Order(1000, seed=0)
    first = np.array([order.locate(p)[2] for p in range(100)])
    assert first.min() < 100
    assert first.max() >= 900
    assert 400 < first.mean() < 600  # deviation of the mean: 27


def test_a_generator_depends_on_its_key_alone():
    np.random.seed(1)
    value = generator("crop", 0, 3, "0200599").random()
    np.random.seed(2)
    assert generator("crop", 0, 3, "0200599").random() == value
    others = [
        ("mask", 0, 3, "0200599"),
        ("crop", 1, 3, "0200599"),
        ("crop", 0, 4, "0200599"),
        ("crop", 0, 3, "0200600"),
    ]
    # Neither may parts run into each other, nor a number equal its text.
    others += [("crop", 0, "30200599"), ("crop", "0", 3, "0200599")]
    assert len({generator(*key).random() for key in others} | {value}) == 7


def test_keys_do_not_change_between_versions():
    """A resumed run may be younger than its checkpoint: the drawn numbers are part of the format."""
    import hashlib

    key = int.from_bytes(hashlib.sha256(b"('order', 0, 0, 0)").digest()[:16], "little")
    expected = np.random.Generator(np.random.Philox(key=key)).permutation(6)
    assert [Order(6).locate(p)[2] for p in range(6)] == expected.tolist()


def test_coverage_proves_an_epoch_whole_whoever_trained_its_parts():
    """Any split over ranks and attempts adds up; a sample lost, doubled or swapped, or one in the wrong epoch, shows."""
    keys = [f"{number:07d}" for number in range(13)]
    order = Order(13, seed=2, epochs=2, draws_per_grid=3)
    places = [order.locate(p) for p in range(order.samples)]
    trained = [(epoch, keys[grid]) for epoch, _, grid in places]

    def covered(samples: list[tuple[int, str]], parts: int) -> dict[int, tuple[int, int]]:
        total = Coverage()
        for part in range(parts):
            mine = Coverage()
            mine.add([e for e, _ in samples[part::parts]], [k for _, k in samples[part::parts]])
            total.merge(mine)
        return total.epochs

    expected = Coverage.expected(keys, 3)
    for parts in (1, 2, 5):
        assert covered([*trained, (-1, "")], parts) == {0: expected, 1: expected}
    assert covered(trained[1:], 2)[0] != expected
    assert covered([*trained, trained[4]], 2)[0] != expected
    assert covered([(0, keys[5] if trained[0][1] != keys[5] else keys[6]), *trained[1:]], 2)[0] != expected
    assert covered([(1, trained[0][1]), *trained[1:]], 2) != {0: expected, 1: expected}


def test_uniform_numbers_are_uniform_and_keyed():
    values = np.array([uniform("held-out", 1, f"{n:07d}") for n in range(4000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert np.histogram(values, 10, (0, 1))[0].min() > 320  # of 400, deviation 19
    assert uniform("held-out", 1, "0000007") == values[7] != uniform("held-out", 2, "0000007")
