import jax
import numpy as np
import pytest

from bnjax.data.pipeline import (
    EpochOrder,
    ToInputs,
    make_gather,
    padded_rows,
    permutation,
)
from bnjax.data.sources import Arrays


def epoch_key(epoch):
    return jax.random.fold_in(jax.random.key(3), epoch)


class TestEpochOrder:
    @pytest.mark.parametrize(("examples", "batch"), [(60, 12), (60, 7), (5, 5), (9, 1)])
    def test_an_epoch_meets_each_example_at_most_once(self, examples, batch):
        order = EpochOrder(epoch_key, examples, batch)
        steps = examples // batch
        assert order.steps_per_epoch == steps
        for epoch in range(3):
            seen = order.rows(epoch * steps, steps).ravel()
            assert len(set(seen.tolist())) == steps * batch
            assert set(seen.tolist()) <= set(range(examples))
            if examples % batch == 0:
                assert sorted(seen) == list(range(examples))

    def test_every_epoch_is_shuffled_anew(self):
        order = EpochOrder(epoch_key, 50, 10)
        epochs = [order.rows(5 * epoch, 5).ravel().tolist() for epoch in range(4)]
        epochs.append(list(range(50)))
        assert len({tuple(epoch) for epoch in epochs}) == 5

    def test_those_left_over_are_others_in_every_epoch(self):
        order = EpochOrder(epoch_key, 10, 4)
        left = [
            frozenset(range(10)) - set(order.rows(2 * epoch, 2).ravel().tolist())
            for epoch in range(20)
        ]
        assert set.union(*map(set, left)) == set(range(10))

    def test_rows_do_not_depend_on_how_they_are_asked_for(self):
        whole = EpochOrder(epoch_key, 20, 6).rows(0, 17)
        parts = EpochOrder(epoch_key, 20, 6)
        joined = np.concatenate([parts.rows(0, 1), parts.rows(1, 9), parts.rows(10, 7)])
        np.testing.assert_array_equal(whole, joined)
        np.testing.assert_array_equal(parts.rows(4, 2), whole[4:6])
        assert whole.dtype == np.int32

    def test_rows_are_the_keys_permutation(self):
        rows = EpochOrder(epoch_key, 12, 3).rows(4, 4)
        expected = jax.random.permutation(epoch_key(1), 12)
        np.testing.assert_array_equal(rows.ravel(), expected)


@pytest.mark.parametrize(
    ("examples", "batch"), [(10, 3), (10, 5), (10, 10), (10, 64), (1, 1)]
)
def test_padded_rows_meet_every_example_once(examples, batch):
    rows, mask = padded_rows(examples, batch)
    assert rows.shape == mask.shape == (-(-examples // batch), batch)
    assert rows[mask].tolist() == list(range(examples))
    assert ((rows >= 0) & (rows < examples)).all()


def test_inputs_equal_numpys():
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    scaled = ToInputs(255)(pixels)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, pixels / 255.0, rtol=1e-6)
    binary = ToInputs(255, binarize=True)(pixels)
    np.testing.assert_array_equal(binary, (pixels / 255.0 > 0.5).astype(np.float32))


def test_gather_takes_rows_of_both():
    images = np.arange(12, dtype=np.uint8).reshape(4, 3)
    arrays = Arrays(images, np.array([5, 6, 7, 8], np.int32))
    batch = make_gather(ToInputs(16))(arrays, np.array([2, 0, 2]))
    np.testing.assert_allclose(batch["image"], images[[2, 0, 2]] / 16)
    assert batch["label"].tolist() == [7, 5, 7]


@pytest.mark.parametrize("examples", [1, 2, 7, 1442, 60_000])
def test_the_permutation_is_jaxs(examples):
    for seed in range(3):
        key = jax.random.key(seed)
        expected = np.asarray(jax.random.permutation(key, examples))
        found = permutation(key, examples)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
