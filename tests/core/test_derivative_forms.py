"""The derivative: its forms for each platform, and what a ReLU lets pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import _derivative
from bnjax._cpu.blocks import FEW
from bnjax._derivative import Operands, Transform
from bnjax._moments import Reduction
from tests import oracle


def values(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


def plain(x, scale, bias, activation, residual=0.0):
    """The layer as the paper has it, with JAX's own derivative."""
    axes = tuple(range(x.ndim - 1))
    z = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + 1e-5) * scale + bias + residual
    return activation(z)


FORMS = {
    "none": (None, False),
    "relu": (jax.nn.relu, False),
    "relu after a residual": (jax.nn.relu, True),
    "gelu": (jax.nn.gelu, False),
    "gelu after a residual": (jax.nn.gelu, True),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_of_all_platforms_have_the_same_values(name):
    activation, with_residual = FORMS[name]
    float32 = jnp.dtype("float32")
    transform = Transform(Reduction((0,)), activation, float32, float32)
    x, residual = values(64, 4), values(64, 4, seed=1) if with_residual else None
    # The first channel is exactly where a ReLU has its kink.
    scale, bias = jnp.float32([0, 1, -2, 0.5]), jnp.float32([0, 1, 0, -1])
    operands = Operands(x, jnp.float32(1e-5), None, scale, bias, residual)
    params = _derivative._channel_params(
        transform, operands, x[0], x.mean(0) - x[0], x.var(0)
    )
    if with_residual and activation is jax.nn.relu:
        y = _derivative._output(transform, operands, params)
        operands = operands._replace(residual=None, output=y.at[:, 0].set(0))
    cotangents = [values(64, 4, seed=2)]
    options = {"transform": transform, "residual_dtype": float32}
    if not with_residual:
        options["residual_dtype"] = None
    found, gpu = (
        _derivative._elementwise_vjp_reference(
            cotangents, operands, params, **options, on_gpu=on_gpu
        )
        for on_gpu in (False, True)
    )
    tangents = _derivative._ElementwiseTangents(
        x, x[:1], x[:1], operands.x if with_residual else None, ()
    )
    transposed = jax.linear_transpose(
        lambda tangents: _derivative._elementwise_tangent_map_reference(
            operands, params, tangents, transform=transform
        ),
        tangents,
    )
    for wanted, *others in zip(
        jax.tree.leaves(transposed(cotangents)), found, gpu, strict=True
    ):
        for value in others:
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("axis", [-1, 0], ids=["kernels", "XLA"])
def test_a_relu_lets_nothing_pass_at_zero(axis, residual):
    """A layer starts there whose scale is initialized with zeros."""
    x, dy = values(64, 64), values(64, 64, seed=1)
    zeros = jnp.zeros(64)

    @jax.jit
    def gradients(x, scale, bias, dy):
        def layer(x, scale, bias, added):
            return bnjax.normalize_batch(
                x,
                scale,
                bias,
                axis=axis,
                activation="relu",
                residual=added if residual else None,
            )[0]

        return jax.vjp(layer, x, scale, bias, jnp.zeros_like(x))[1](dy)

    for gradient in gradients(x, zeros, zeros, dy):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_forward_mode_through_an_activation(activation, residual):
    x, scale, bias = values(32, 3), jnp.float32([1, -2, 0.5]), jnp.float32([0, 1, -1])
    added = values(32, 3, seed=1)

    def layer(x, scale, bias, added):
        added = added if residual else None
        return bnjax.normalize_batch(
            x, scale, bias, activation=activation, residual=added
        )[0]

    def wanted(x, scale, bias, added):
        added = added if residual else 0.0
        return plain(x, scale, bias, getattr(jax.nn, activation), added)

    primals = x, scale, bias, added
    tangents = tuple(values(*a.shape, seed=i + 2) for i, a in enumerate(primals))
    found = jax.jvp(layer, primals, tangents)
    for got, want in zip(found, jax.jvp(wanted, primals, tangents), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_large_arrays_with_a_mask():
    x, dy = values(FEW // 8 + 5, 8), values(FEW // 8 + 5, 8, seed=1)
    scale, bias = values(8, seed=2), values(8, seed=3)
    mask = np.random.default_rng(4).random((len(x), 1)) < 0.7

    @jax.jit
    def gradients(x, scale, bias, dy):
        def layer(x, scale, bias):
            return bnjax.normalize_batch(x, scale, bias, mask=mask)[0]

        return jax.vjp(layer, x, scale, bias)[1](dy)

    exact = oracle.backward(x, scale, dy, mask=mask)
    for got, want in zip(gradients(x, scale, bias, dy), exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("with_slope", [False, True])
def test_large_arrays_with_other_operands(with_slope):
    """A residual, or what an activation depends on."""
    x, residual, dy = (values(FEW // 8 + 5, 8, seed=i) for i in range(3))
    scale, bias, slope = values(8, seed=3), values(8, seed=4), values(8, seed=5)

    def run(layer):
        def of_slope(x, scale, bias, residual, slope):
            def prelu(z):
                return jnp.where(z > 0, z, slope * z)

            activation = prelu if with_slope else jnp.tanh
            added = None if with_slope else residual
            return layer(x, scale, bias, activation, added)

        arguments = x, scale, bias, residual, slope
        return jax.jit(lambda *a: jax.vjp(of_slope, *a)[1](dy))(*arguments)

    found = run(
        lambda x, scale, bias, activation, added: bnjax.normalize_batch(
            x, scale, bias, activation=activation, residual=added
        )[0]
    )
    exact = run(
        lambda x, scale, bias, activation, added: plain(
            x, scale, bias, activation, 0.0 if added is None else added
        )
    )
    for got, want in zip(found, exact, strict=True):
        limit = 2e-5 * float(jnp.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=limit)


@pytest.mark.parametrize("hidden", [np.nan, np.inf, 3e38])
def test_what_is_hidden_and_not_finite_has_no_gradient(hidden):
    """Its output is that of the mean, whatever it is."""
    x, dy = values(16, 3).at[3].set(hidden), values(16, 3, seed=1)
    mask = (np.arange(16) != 3)[:, None]

    def layer(x):
        return bnjax.normalize_batch(x, mask=mask)[0]

    y, tangent = jax.jvp(layer, (x,), (jnp.zeros_like(x).at[3].set(1),))
    np.testing.assert_allclose(y[3], np.zeros(3), atol=1e-5)
    np.testing.assert_array_equal(tangent, np.zeros(x.shape))
    (dx,) = jax.vjp(layer, x)[1](dy)
    np.testing.assert_array_equal(dx[3], np.zeros(3))
    assert np.isfinite(np.asarray(dx)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mean", [0, -20])
def test_gradient_of_inputs_of_few_bits(dtype, mean):
    """Of features before the batch, which the kernels of a CPU do not support."""
    x = (values(8, 3, 7, 5) + mean).astype(dtype)
    scale, bias, dy = values(3, seed=1), values(3, seed=2), values(*x.shape, seed=3)
    dy = dy.astype(dtype) + x / 4  # so that it depends on the input

    def loss(x, scale, bias):
        stats = bnjax.BatchStats.init(3)
        y, _ = bnjax.batch_norm(x, scale, bias, stats, axis=1)
        return jnp.sum(y.astype("float32") * dy.astype("float32"))

    found = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    wanted = oracle.backward(x, scale, dy, axis=1)
    rounding = float(jnp.finfo(dtype).eps)
    for one, other in zip(found, wanted, strict=True):
        error = np.abs(np.asarray(one, np.float64) - other)
        assert (error <= rounding * np.abs(other) + 1e-5 * np.abs(other).max()).all()
