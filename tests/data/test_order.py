import pickle

import numpy as np
import pytest

from bnjax.data.pipeline import HostOrder

WORDS = (7, 11)
MODES = ["global", "within-shard", "fixed-batches"]


def batches(rows):
    return {frozenset(batch) for batch in rows.tolist()}


@pytest.mark.parametrize("shuffle", MODES)
@pytest.mark.parametrize(("examples", "batch"), [(60, 12), (60, 7), (5, 5), (9, 1)])
def test_an_epoch_meets_each_example_at_most_once(shuffle, examples, batch):
    order = HostOrder(WORDS, examples, batch, shuffle, shard_size=8)
    steps = order.steps_per_epoch
    assert steps == examples // batch
    for epoch in range(3):
        seen = order.rows(epoch * steps, steps).ravel().tolist()
        assert len(set(seen)) == steps * batch
        assert set(seen) <= set(range(examples))


@pytest.mark.parametrize("shuffle", MODES)
def test_rows_do_not_depend_on_how_they_are_asked_for(shuffle):
    order = HostOrder(WORDS, 40, 6, shuffle, shard_size=10)
    whole = order.rows(0, 25)
    assert (whole.shape, whole.dtype) == ((25, 6), np.int32)
    for step in (24, 3, 11):
        np.testing.assert_array_equal(order.rows(step, 1)[0], whole[step])
    copy = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(copy.rows(5, 7), whole[5:12])


@pytest.mark.parametrize("shuffle", MODES)
def test_seeds_and_epochs_differ(shuffle):
    first = HostOrder(WORDS, 40, 5, shuffle, 10)
    other = HostOrder((7, 12), 40, 5, shuffle, 10)
    assert first.rows(0, 8).tolist() != first.rows(8, 8).tolist()
    assert first.rows(0, 8).tolist() != other.rows(0, 8).tolist()


def test_global_orders_are_uniform():
    order = HostOrder(WORDS, 6, 2)
    first = np.array([order.rows(3 * epoch, 1)[0, 0] for epoch in range(3000)])
    counts = np.bincount(first, minlength=6)
    # Five standard deviations of a binomial of 3000 and 1/6.
    assert np.abs(counts - 500).max() < 5 * np.sqrt(3000 * 5 / 36)


def test_within_shard_keeps_a_stored_run_together():
    order = HostOrder(WORDS, 60, 10, "within-shard", shard_size=10)
    for epoch in range(5):
        rows = order.rows(6 * epoch, 6)
        assert all(len(set(batch // 10)) == 1 for batch in rows)
    runs = [tuple(order.rows(6 * e, 6)[:, 0] // 10) for e in range(5)]
    assert len(set(runs)) == 5
    first_runs = [
        b for e in range(5) for b in order.rows(6 * e, 6).tolist() if min(b) == 0
    ]
    assert len({tuple(b) for b in first_runs}) == 5


def test_fixed_batches_always_meet_and_global_ones_do_not():
    fixed = HostOrder(WORDS, 60, 10, "fixed-batches")
    assert batches(fixed.rows(0, 6)) == batches(fixed.rows(600, 6))
    orders = {tuple(fixed.rows(6 * e, 6)[:, 0]) for e in range(5)}
    assert len(orders) == 5
    free = HostOrder(WORDS, 60, 10)
    assert not batches(free.rows(0, 6)) & batches(free.rows(6, 6))
