"""Moments: joining parts gives the moments of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnjax

pytestmark = pytest.mark.usefixtures("strict")


def parts_of(sizes, mean, seed=0):
    rng = np.random.default_rng(seed)
    return [
        np.float32(rng.normal(size=(n, 3)) + mean + 2 * i) for i, n in enumerate(sizes)
    ]


def assert_moments(found, x, rtol=1e-5):
    x = x.astype(np.float64)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(found.var, x.var(0), rtol=rtol)
    np.testing.assert_array_equal(found.count, np.full(3, len(x)))


@pytest.mark.parametrize("mean", [0.0, 1e4, -1e5])
@pytest.mark.parametrize("sizes", [(5, 5), (1, 9), (2, 3, 4), (60, 1, 1, 2)])
def test_merge(sizes, mean):
    parts = parts_of(sizes, mean)
    # Float32 means differ by the spacing of float32 numbers of their size.
    rtol = 1e-5 + 2 * float(np.spacing(np.float32(abs(mean))))
    found = functools.reduce(bnjax.Moments.merge, map(bnjax.moments, parts))
    assert_moments(found, np.concatenate(parts), rtol)
    first, *others = map(bnjax.moments, parts)
    assert_moments(first.merge(*others), np.concatenate(parts), rtol)


@pytest.mark.slow
@given(st.lists(st.integers(1, 6), min_size=2, max_size=5), st.randoms())
def test_merge_in_any_order(sizes, random):
    parts = [bnjax.moments(p) for p in parts_of(sizes, 100.0)]
    wanted = parts[0].merge(*parts[1:])
    random.shuffle(parts)
    found = parts[0].merge(*parts[1:])
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("place", [0, 1])
def test_merge_with_nothing(place):
    x = np.float32([[1e6, 2, 3], [1e6 + 1, 5, 7]])
    nothing = bnjax.moments(np.full((2, 3), np.nan, np.float32), mask=np.zeros((2, 1)))
    parts = [bnjax.moments(x)]
    parts.insert(place, nothing)
    found = parts[0].merge(parts[1])
    np.testing.assert_allclose(found.var, x.astype(np.float64).var(0), rtol=1e-5)
    np.testing.assert_array_equal(found.count, np.full(3, 2))


def test_moments_of_nothing():
    found = bnjax.moments(np.full((2, 3), np.nan, np.float32), mask=np.zeros((2, 1)))
    for leaf in jax.tree.leaves(found):
        np.testing.assert_array_equal(leaf, np.zeros(3))


def test_count_differs_between_channels():
    x = np.float32([[1, 2], [3, 4], [5, 9]])
    mask = np.array([[True, True], [True, False], [False, True]])
    found = bnjax.moments(x, mask=mask)
    np.testing.assert_allclose(found.mean, [2, 5.5])
    np.testing.assert_allclose(found.var, [1, 12.25])
    np.testing.assert_array_equal(found.count, [2, 2])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_of_half_precision_do_not_overflow(dtype):
    x = jnp.full((4096, 2), 300.0, dtype).at[::2].set(100.0)
    found = bnjax.moments(x)
    assert found.mean.dtype == jnp.float32
    np.testing.assert_allclose(found.mean, [200, 200])
    np.testing.assert_allclose(found.var, [1e4, 1e4])


def test_trees_and_initial_statistics():
    stats = bnjax.BatchStats.init((2, 3))
    doubled = jax.tree.map(lambda leaf: leaf * 2, stats)
    assert isinstance(doubled, bnjax.BatchStats)
    np.testing.assert_array_equal(doubled.var, np.full((2, 3), 2.0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(stats)]
    assert paths == [".mean", ".var"]
    with pytest.raises(AttributeError):
        stats.mean = stats.var
