import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from bnjax.models.layers import local_response_normalization


def oracle(x, n=5, alpha=1e-4, beta=0.75, k=1.0):
    y, channels = np.empty_like(x), x.shape[-1]
    for c in range(channels):
        near = x[..., max(0, c - n // 2) : min(channels, c + n // 2 + 1)]
        y[..., c] = x[..., c] / (k + alpha / n * (near**2).sum(-1)) ** beta
    return y


@pytest.mark.parametrize("channels", [3, 8])
def test_it_is_googlenets(channels, x64):
    x = np.random.default_rng(0).normal(0, 100, (2, 3, 3, channels))
    y = local_response_normalization(jnp.asarray(x))
    np.testing.assert_allclose(y, oracle(x), rtol=1e-12)
    others = {"alpha": 0.3, "beta": 0.5, "k": 2.0}
    y = local_response_normalization(jnp.asarray(x), size=3, **others)
    np.testing.assert_allclose(y, oracle(x, n=3, **others), rtol=1e-12)


def test_half_precision_does_not_overflow():
    y = local_response_normalization(jnp.full((1, 8), 1e4, jnp.float16))
    assert y.dtype == jnp.float16
    expected = oracle(np.full((1, 8), 1e4))
    np.testing.assert_allclose(np.asarray(y, float), expected, rtol=1e-3)


def test_an_even_size_is_refused():
    with pytest.raises(ValueError, match="size=4; expected an odd number"):
        local_response_normalization(jnp.ones((1, 8)), size=4)


def test_its_derivative(x64):
    x = jnp.asarray(np.random.default_rng(1).normal(0, 10, (2, 7)))
    check_grads(lambda x: local_response_normalization(x, alpha=0.5), (x,), 1)
