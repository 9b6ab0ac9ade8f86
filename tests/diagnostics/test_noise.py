import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

from bnjax.diagnostics import BatchNoise, NnxBatchNoise, batch_noise

KEYS = 400


@pytest.fixture(scope="module")
def drawn():
    """The shift and the scale of 5 examples, 60 channels, in each of many calls."""
    keys = jax.random.split(jax.random.key(0), KEYS)
    found = {}
    for name, axis in (("layer", None), ("channels", -1)):

        def draw(key, axis=axis):
            zeros, ones = jnp.zeros((5, 60)), jnp.ones((5, 60))
            shift = batch_noise(key, zeros, axis=axis)
            return shift, batch_noise(key, ones, axis=axis) - shift

        shift, scale = jax.jit(jax.vmap(draw))(keys)
        found[name] = np.float64(shift), np.float64(scale)
    return found


def test_moments_of_a_layer(drawn):
    """One mean and one scale for each call; uniform and normal within it."""
    shift, scale = drawn["layer"]
    mean, sigma = shift.mean((1, 2)), scale.mean((1, 2))
    # Of U(a, b): variance (b - a)^2 / 12. The values of a call add a 300th of theirs.
    assert mean.mean() == pytest.approx(0, abs=0.05)
    assert mean.var() == pytest.approx(1 / 12, rel=0.15)
    assert np.abs(mean).max() < 0.52
    assert sigma.mean() == pytest.approx(1.125, abs=0.015)
    assert sigma.var() == pytest.approx(0.25**2 / 12 + 0.01 / 300, rel=0.15)
    within = shift - mean[:, None, None]
    assert within.var() == pytest.approx(0.2**2 / 12, rel=0.02)
    assert np.ptp(shift, axis=(1, 2)).max() <= 0.2
    assert (scale - sigma[:, None, None]).std() == pytest.approx(0.1, rel=0.02)
    assert np.abs(shift).max() <= 0.6


def test_moments_of_channels(drawn):
    """Each channel of a call has a mean and a scale of its own."""
    shift, scale = drawn["channels"]
    mean, sigma = shift.mean(1), scale.mean(1)
    assert mean.var(1).mean() == pytest.approx(1 / 12 + 0.04 / 12 / 5, rel=0.05)
    assert sigma.var(1).mean() == pytest.approx(0.25**2 / 12 + 0.01 / 5, rel=0.05)
    assert np.ptp(shift, axis=1).max() <= 0.2
    assert np.ptp(scale, axis=1).std() > 0


def test_noise_is_an_affine_map_of_each_value(x64):
    key, x = (
        jax.random.key(1),
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 3))),
    )
    zero, one = (batch_noise(key, jnp.full((4, 3), c)) for c in (0.0, 1.0))
    expected = (one - zero) * x + zero
    np.testing.assert_allclose(batch_noise(key, x), expected, rtol=1e-12)
    slope = jax.grad(lambda x: jnp.sum(batch_noise(key, x)))(x)
    np.testing.assert_allclose(slope, one - zero, rtol=1e-12)


def test_ranges_are_those_asked_for(x64):
    x, key = jnp.ones((7, 5)), jax.random.key(0)
    exact = {"max_mean": 0, "max_scale": 1, "mean_spread": 0, "scale_spread": 0}
    np.testing.assert_array_equal(batch_noise(key, x, **exact), x)
    shifted = batch_noise(key, x, **(exact | {"max_mean": 3}))
    assert np.ptp(shifted) == 0 != shifted[0, 0] - 1
    spread = batch_noise(key, 0 * x, **(exact | {"mean_spread": 2}))
    assert 1 < np.abs(spread).max() <= 2
    scaled = batch_noise(key, x, **(exact | {"max_scale": 9}))
    assert 1 < scaled[0, 0] == scaled[6, 4] <= 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype, strict):
    y = batch_noise(jax.random.key(0), jnp.ones((3, 4), dtype), axis=1)
    assert y.dtype == dtype
    wide = batch_noise(jax.random.key(0), jnp.ones((3, 4)), axis=1)
    np.testing.assert_array_equal(y, wide.astype(dtype))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_mean": -1}, ValueError, "batch_noise: max_mean=-1; expected .* 0 or"),
        ({"max_scale": 0.5}, ValueError, "max_scale=0.5; expected a number of 1 or"),
        ({"mean_spread": -0.1}, ValueError, "mean_spread"),
        ({"scale_spread": float("nan")}, ValueError, "scale_spread=nan"),
        ({"axis": 3}, ValueError, "batch_noise: axis=3 is out of range"),
        ({"x": jnp.ones(3, int)}, TypeError, "batch_noise: x has dtype int32"),
    ],
)
def test_what_is_refused(options, error, message):
    x = options.pop("x", jnp.ones((2, 3)))
    with pytest.raises(error, match=message):
        batch_noise(jax.random.key(0), x, **options)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return BatchNoise(axis=-1)(x, deterministic=not train)


def test_linen():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    variables = Block().init(jax.random.key(0), x, train=True)
    assert set(variables) == {"params", "batch_stats"}

    def train(seed):
        rngs, mutable = {"noise": jax.random.key(seed)}, ["batch_stats"]
        return Block().apply(variables, x, train=True, rngs=rngs, mutable=mutable)[0]

    normalized = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    first = train(1)
    np.testing.assert_array_equal(first, train(1))
    assert 0.1 < np.abs(first - normalized).max() < 3
    assert np.abs(first - train(2)).max() > 0.01
    evaluated = Block().apply(variables, x, train=False)
    np.testing.assert_allclose(evaluated, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    with pytest.raises(errors.InvalidRngError, match="noise"):
        Block().apply(variables, x, train=True, mutable=["batch_stats"])


def test_nnx():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    layer = NnxBatchNoise(axis=-1, rngs=nnx.Rngs(noise=3))
    run = nnx.jit(lambda layer, x: layer(x))
    first, second = run(layer, x), run(layer, x)
    assert np.abs(first - second).max() > 0.01
    again = NnxBatchNoise(axis=-1, rngs=nnx.Rngs(noise=3))
    np.testing.assert_allclose(again(x), first, rtol=1e-6)
    layer.eval()
    np.testing.assert_array_equal(layer(x), x)
    assert np.abs(layer(x, deterministic=False) - x).max() > 0.01
    layer.train()
    np.testing.assert_array_equal(layer(x, deterministic=True), x)
