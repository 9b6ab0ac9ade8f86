"""The sums over batches, against numbers worked out by hand."""

import numpy as np
import pytest

from bnjax.functional import Moments
from bnjax.population.records import Record
from bnjax.population.selection import chosen
from bnjax.population.totals import Totals


def record(mean, var, count, weight=None):
    mean, var, count = (np.float32([value]) for value in (mean, var, count))
    weight = count if weight is None else np.float32([weight])
    return Record(Moments(mean, var, count), weight)


def total(*records, method="pooled"):
    found = Totals()
    for each in records:
        found = found.add(each, method, "layer")
    return found.mean_and_var(method, "layer")


# The values 0, 2 and 5, 5, 8, 8, 8, 8.
PARTS = record(1, 1, 2), record(7, 2, 6)


@pytest.mark.parametrize("parts", [PARTS, PARTS[::-1]])
def test_both_methods(parts):
    mean, var = total(*parts, method="paper")
    np.testing.assert_allclose(mean, [5.5], rtol=1e-15)
    unbiased = 2, 12 / 5
    want = (2 * unbiased[0] + 6 * unbiased[1]) / 8
    np.testing.assert_allclose(var, [want], rtol=1e-15)
    mean, var = total(*parts)
    np.testing.assert_allclose(mean, [5.5], rtol=1e-15)
    squares = 2 + 12 + 2 * 4.5**2 + 6 * 1.5**2
    np.testing.assert_allclose(var, [squares / 7], rtol=1e-15)


def test_devices_that_share_stand_for_their_part():
    """Four devices report the same 8 values; each stands for 2."""
    mean, var = total(*[record(3, 7, 8, weight=2)] * 4)
    np.testing.assert_allclose([mean, var], [[3], [8]])
    mean, var = total(*[record(3, 7, 8, weight=2)] * 4, method="paper")
    np.testing.assert_allclose([mean, var], [[3], [8]])


def test_a_batch_that_is_hidden_changes_nothing():
    hidden = record(np.nan, np.nan, 0)
    for method in ("paper", "pooled"):
        found = total(hidden, *PARTS, hidden, method=method)
        np.testing.assert_array_equal(found, total(*PARTS, method=method))


def test_sums_do_not_cancel():
    """A mean of a million deviations, a thousand batches."""
    parts = [record(1e6 + i % 3 - 1, 1, 100) for i in range(999)]
    mean, var = total(*parts)
    np.testing.assert_allclose(mean, [1e6], rtol=1e-15)
    np.testing.assert_allclose(var, [(1 + 2 / 3) * 99900 / 99899], rtol=1e-12)


def test_patterns():
    paths = [("bn",), ("block", "bn"), ("blocks", 0, "bn"), ()]
    assert chosen(None, paths) == tuple(paths)
    assert chosen("bl*", paths) == (("block", "bn"), ("blocks", 0, "bn"))
    assert chosen(["blocks/0/bn", "bn"], paths) == (("bn",), ("blocks", 0, "bn"))
    assert chosen("(top level)", paths) == ((),)
