"""Sums over a batch on a CPU: by the kernels, and by XLA in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bnjax
from bnjax._cpu import build
from bnjax._cpu.blocks import BLOCK, FEW, LARGE
from tests import oracle

# Of how many examples a block is not a whole part, and where features come first.
CASES = {
    "small blocks": ((FEW // 8 + 5, 8), -1),
    "small blocks of wide rows": ((83, 1000), -1),
    "blocks of halves": ((17, 33, 31, 16), -1),
    "large blocks of rows": ((LARGE // 24 + 77, 24), -1),
    "images": ((37, 29, 31, 64), -1),
    "one example in a part": ((9, 7, LARGE // 256, 8), (1, 2, 3)),
    "channels first": ((16, 64, 28, 28), 1),
}
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(params=["kernels", "blocks"], autouse=True)
def sums_by(request, monkeypatch):
    if request.param == "blocks":
        monkeypatch.setenv(build.CHOICE, "off")
    elif not build.available():
        pytest.skip("no C compiler for the kernels")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def arrays(shape, axis, dtype, mean=0.0):
    rng = np.random.default_rng(0)
    axes = oracle.reduction_axes(np.empty(shape, np.int8), axis)
    features = [n for i, n in enumerate(shape) if i not in axes]
    x, dy = (jnp.asarray(rng.normal(size=shape) + m, dtype) for m in (mean, 0.0))
    scale, bias = (jnp.asarray(rng.normal(size=features), "float32") for _ in range(2))
    return x, scale, bias, dy


def relative(found, wanted):
    wanted = np.asarray(wanted)
    found = np.asarray(found, np.float64).reshape(wanted.shape)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", CASES)
def test_output_statistics_and_gradients(name, dtype):
    shape, axis = CASES[name]
    x, scale, bias, dy = arrays(shape, axis, dtype)

    @jax.jit
    def run(x, scale, bias, dy):
        def layer(x, scale, bias):
            stats = bnjax.BatchStats.init(scale.shape)
            return bnjax.batch_norm(x, scale, bias, stats, axis=axis, momentum=0.0)

        y, vjp, stats = jax.vjp(layer, x, scale, bias, has_aux=True)
        return y, vjp(dy), stats

    y, gradients, stats = run(x, scale, bias, dy)
    exact = oracle.backward(x, scale, dy, axis)
    mean, var, count = oracle.moments(x, axis)
    np.testing.assert_allclose(stats.mean.ravel(), mean.ravel(), atol=1e-6)
    assert relative(stats.var, var * count / (count - 1)) < 1e-5
    assert relative(y, oracle.forward(x, scale, bias, axis)) < TOLERANCES[dtype]
    for found, wanted in zip(gradients, exact, strict=True):
        assert relative(found, wanted) < TOLERANCES[dtype]


def test_a_large_mean_costs_no_digits():
    x, *_ = arrays((90, 32, 32, 24), -1, "float32", mean=1e4)
    found = jax.jit(bnjax.moments)(x)
    mean, var, _ = oracle.moments(x)
    np.testing.assert_allclose(found.mean, mean.ravel(), rtol=1e-6)
    np.testing.assert_allclose(found.var, var.ravel(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, FEW), (7, FEW)])
def test_few_examples_of_many_features(shape):
    x, *_ = arrays(shape, -1, "float32")
    found = jax.jit(bnjax.moments)(x)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.var, x.var(0), rtol=1e-5, atol=1e-6)


def test_a_fused_activation_and_residual():
    shape, axis = CASES["images"]
    x, scale, bias, dy = arrays(shape, axis, "float32")
    residual = dy[::-1]

    def layer(x, scale, bias, residual):
        stats = bnjax.BatchStats.init(scale.shape)
        options = {"activation": "relu", "residual": residual}
        return bnjax.batch_norm(x, scale, bias, stats, **options)[0]

    y, vjp = jax.jit(lambda *a: jax.vjp(layer, *a))(x, scale, bias, residual)
    *gradients, dresidual = jax.jit(vjp)(dy)
    z = oracle.forward(x, scale, bias) + np.asarray(residual, np.float64)
    passed = np.where(z > 0, dy, 0)
    assert relative(y, np.maximum(z, 0)) < 1e-5
    # Where z is within a rounding of zero, either side of the kink is right.
    clear = np.abs(z) > 1e-5
    np.testing.assert_array_equal(np.asarray(dresidual)[clear], passed[clear])
    for found, wanted in zip(gradients, oracle.backward(x, scale, passed), strict=True):
        assert relative(found, wanted) < 1e-4


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the blocks on a CPU")
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_size_of_the_input_is_written(dtype, activation):
    """Beside the output and the gradient: no copy in float32, no distance."""
    x, scale, bias, dy = arrays((64, 32, 32, 64), -1, dtype)

    def step(x, scale, bias, dy):
        def layer(x, scale, bias):
            stats = bnjax.BatchStats.init(scale.shape)
            return bnjax.batch_norm(x, scale, bias, stats, activation=activation)[0]

        y, vjp = jax.vjp(layer, x, scale, bias)
        return y, vjp(dy)

    used = jax.jit(step).lower(x, scale, bias, dy).compile().memory_analysis()
    assert used.temp_size_in_bytes < 16 * BLOCK + x.nbytes // 8


def test_a_sharded_batch_is_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    shape, axis = (64, 24, 24, 64), -1
    x, scale, bias, dy = arrays(shape, axis, "float32")
    x, dy = jax.device_put((x, dy), NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def gradients(x, scale, bias, dy):
        def layer(x, scale, bias):
            return bnjax.batch_norm(x, scale, bias, bnjax.BatchStats.init(scale.shape))[
                0
            ]

        return jax.vjp(layer, x, scale, bias)[1](dy)

    text = gradients.lower(x, scale, bias, dy).compile().as_text()
    assert "all-gather" not in text
    found = gradients(x, scale, bias, dy)
    for got, wanted in zip(found, oracle.backward(x, scale, dy), strict=True):
        assert relative(got, wanted) < 1e-5


@pytest.mark.parametrize("mask", [None, np.float32([[1], [2], [0], [1]])])
def test_the_moments_have_the_gradient_of_their_formulas(mask):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), "float32")
    weight = np.ones((4, 1)) if mask is None else mask
    count = weight.sum()

    def found(x):
        of = bnjax.moments(x, mask=mask)
        return jnp.sum(jnp.sin(of.mean) + jnp.cos(of.var))

    def wanted(x):
        mean = jnp.sum(weight * x, 0) / count
        var = jnp.sum(weight * (x - mean) ** 2, 0) / count
        return jnp.sum(jnp.sin(mean) + jnp.cos(var))

    np.testing.assert_allclose(jax.grad(found)(x), jax.grad(wanted)(x), atol=1e-6)


@pytest.mark.parametrize("outer", ["vmap of grad", "grad of vmap", "jvp of grad"])
def test_transformations(outer):
    x, scale, bias, dy = arrays((2, 9, 16, 16, 64), -1, "float32")

    def loss(x, dy):
        stats = bnjax.BatchStats.init(64)
        y, _ = bnjax.batch_norm(x, scale, bias, stats, activation="gelu")
        return jnp.sum(y * dy)

    def plain(x, dy):
        axes = (0, 1, 2)
        y = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale + bias
        return jnp.sum(jax.nn.gelu(y) * dy)

    def run(loss):
        if outer == "vmap of grad":
            return jax.vmap(jax.grad(loss))(x, dy)
        if outer == "grad of vmap":
            return jax.grad(lambda x: jax.vmap(loss)(x, dy).sum())(x)
        gradient = jax.grad(lambda x: loss(x, dy[0]))
        return jax.jvp(gradient, (x[0],), (dy[1],))[1]

    assert relative(jax.jit(lambda: run(loss))(), jax.jit(lambda: run(plain))()) < 1e-4
