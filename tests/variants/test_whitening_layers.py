import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
from bnjax.variants.whitening import (
    WhiteningStats,
    update_whitening_stats,
    whiten_batch,
    whitening_batch_norm,
    whitening_matrix,
)
from bnjax.variants.whitening.linen import WhiteningBatchNorm
from bnjax.variants.whitening.nnx import WhiteningBatchNorm as NnxWhiteningBatchNorm
from tests.variants.whitening_oracle import (
    EPSILON,
    MOMENTUM,
    SHAPE,
    SIZE,
    close,
    data,
)


def layers(**options):
    return {
        "linen": WhiteningBatchNorm(group_size=SIZE, **options),
        "nnx": NnxWhiteningBatchNorm(6, group_size=SIZE, rngs=nnx.Rngs(0), **options),
    }


@pytest.mark.slow
def test_the_layers_are_the_function():
    x, *_ = data(dtype="float32")
    options = {"iterations": None, "activation": "relu", "momentum": MOMENTUM}
    mask = (jnp.arange(9) % 4 != 2).reshape(9, 1, 1)
    both = layers(unbiased=True, epsilon=EPSILON, **options)
    run = functools.partial(
        whitening_batch_norm, group_size=SIZE, epsilon=EPSILON, **options
    )
    ones, zeros = jnp.ones(6), jnp.zeros(6)
    y, new = run(x, ones, zeros, WhiteningStats.init(6, SIZE), mask=mask, residual=x)
    z, _ = run(x, ones, zeros, new, use_running_average=True)

    linen = both["linen"]
    variables = linen.init(jax.random.key(0), x, use_running_average=False)
    close(variables["batch_stats"]["cov"], WhiteningStats.init(6, SIZE).cov)
    got, updates = linen.apply(
        variables,
        x,
        use_running_average=False,
        mask=mask,
        residual=x,
        mutable=["batch_stats"],
    )
    np.testing.assert_array_equal(got, y)
    stats = updates["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], new.mean)
    np.testing.assert_array_equal(stats["cov"], new.cov)
    got = linen.apply({**variables, **updates}, x, use_running_average=True)
    np.testing.assert_array_equal(got, z)

    layer = both["nnx"]
    np.testing.assert_array_equal(layer(x, mask=mask, residual=x), y)
    np.testing.assert_array_equal(layer.cov[...], new.cov)
    layer.eval()
    np.testing.assert_array_equal(layer(x), z)
    np.testing.assert_array_equal(layer.mean[...], new.mean)


def test_the_layers_train_in_bfloat16_and_without_parameters():
    x, *_ = data(dtype="bfloat16")
    for name, layer in layers(
        use_running_average=False, dtype=jnp.bfloat16, use_scale=False, use_bias=False
    ).items():
        if name == "linen":
            variables = layer.init(jax.random.key(0), x)
            assert set(variables) == {"batch_stats"}
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
            cov = updates["batch_stats"]["cov"]
        else:
            assert not jax.tree.leaves(nnx.state(layer, nnx.Param))
            y, cov = layer(x), layer.cov[...]
        assert (y.dtype, cov.dtype) == ("bfloat16", "float32")


def test_the_linen_layer_starts_with_one_example_and_needs_its_collection():
    layer = WhiteningBatchNorm(use_running_average=False, group_size=None)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 5)))
    assert variables["batch_stats"]["cov"].shape == (1, 5, 5)
    with pytest.raises(bnjax.linen.ImmutableBatchStatsError, match="mutable="):
        layer.apply(variables, jnp.zeros((3, 5)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group_size": 4}, ValueError, "group_size=4 for 6 features.*1, 2, 3, 6"),
        ({"group_size": 0}, ValueError, "group_size=0"),
        ({"group_size": 2.0}, TypeError, "group_size=2.0"),
        ({"axis": (1, 2)}, ValueError, "one feature axis"),
        ({"iterations": 0}, ValueError, "iterations=0"),
        ({"iterations": 2.5}, TypeError, "iterations=2.5"),
        ({"epsilon": 0.0}, ValueError, "epsilon"),
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"mask": jnp.ones((9, 1, 6))}, ValueError, "1 along the feature axis"),
        ({"mask": jnp.ones(9)}, ValueError, "mask has shape"),
        ({"residual": jnp.ones((9, 5, 1))}, ValueError, "residual has shape"),
        ({"activation": "rleu"}, ValueError, "relu"),
        ({"axis_name": "data"}, NameError, "is not bound"),
        ({"dtype": jnp.complex64}, TypeError, "real"),
        ({"dtype": jnp.int32}, TypeError, "int32"),
    ],
)
def test_what_cannot_be_whitened_is_refused(options, error, message):
    stats = WhiteningStats.init(6, SIZE)
    settings = {"group_size": SIZE} | options
    with pytest.raises(error, match=message):
        whitening_batch_norm(jnp.ones(SHAPE), None, None, stats, **settings)


def test_arrays_that_do_not_fit_are_refused():
    stats = WhiteningStats.init(6, SIZE)
    run = functools.partial(whitening_batch_norm, group_size=SIZE)
    with pytest.raises(ValueError, match="one value per channel"):
        run(jnp.ones((1, 6)), None, None, stats)
    with pytest.raises(ValueError, match="scale has shape"):
        run(jnp.ones((4, 6)), jnp.ones(5), None, stats)
    with pytest.raises(TypeError, match="complex64"):
        run(jnp.ones((4, 6), "complex64"), None, None, stats)
    with pytest.raises(ValueError, match=r"cov has shape.*group_size"):
        run(jnp.ones((4, 6)), None, None, WhiteningStats.init(6, 2))
    _, batch = whiten_batch(jnp.ones((4, 6)), group_size=2)
    with pytest.raises(ValueError, match="differ"):
        update_whitening_stats(stats, batch)
    with pytest.raises(ValueError, match="size, size"):
        whitening_matrix(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="WhiteningBatchNorm layer of 6 features"):
        NnxWhiteningBatchNorm(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"WhiteningBatchNorm layer \(top level\)"):
        WhiteningBatchNorm(use_running_average=True).init(
            jax.random.key(0), jnp.ones((4, 6))
        )
