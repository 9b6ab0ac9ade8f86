"""What the kernels compute: beside the paper, and beside XLA's own form."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import _kernels as kernels
from bnjax._affine import Operands, Transform
from bnjax._gradient import _pull_back_plainly
from bnjax._statistics import Moments, Reduction, _about_first_row
from tests import oracle
from tests.kernels import needs_kernels

pytestmark = needs_kernels

# Rows that are not a whole group, a last row that is not full, more features than are
# summed at once, several parts, and feature axes other than the last alone.
SHAPES = {
    "one feature": ((1003, 1), 1),
    "two examples": ((2, 3), 1),
    "a last row that is not full": ((2, 53, 7), 2),
    "many features": ((37, 2500), 1),
    "parts": ((77, 33, 31, 24), 3),
    "several feature axes": ((50, 6, 5, 4), 2),
}
DTYPES = {
    "float32": ("float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "bfloat16 to float32": ("bfloat16", "float32"),
    "float32 to bfloat16": ("float32", "bfloat16"),
}
VARIANTS = {
    "plain": (None, False),
    "relu": (jax.nn.relu, False),
    "residual": (jax.nn.relu, True),
}
# Of the largest value: one rounding of the output.
ROUNDING = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


shapes_and_dtypes = pytest.mark.parametrize(
    ("name", "dtypes"),
    [(name, dtypes) for name in SHAPES for dtypes in ("float32", "bfloat16")]
    + [("a last row that is not full", dtypes) for dtypes in list(DTYPES)[2:]],
)


def case(shape, count, x_dtype, y_dtype, activation, residual):
    rng = np.random.default_rng(0)
    features = shape[count:]

    def values(shape, dtype="float32", shift=0.0):
        return jnp.asarray(rng.normal(size=shape) + shift, dtype)

    x = values(shape, x_dtype, shift=3.0)
    reduction = Reduction(tuple(range(count)))
    transform = Transform(
        reduction, activation, jnp.dtype(y_dtype), jnp.dtype("float32")
    )
    operands = Operands(
        x,
        jnp.float32(1e-3),
        scale=values(features),
        bias=values(features),
        residual=values(shape, x_dtype) if residual else None,
    )
    cotangents = [values(shape, y_dtype), values(features), values(features)]
    return transform, operands, cotangents


def statistics(x, axes):
    origin, mean, var = _about_first_row(x, axes=axes, dtype=jnp.dtype("float32"))
    return origin, Moments(mean, var, jnp.full_like(mean, x.size / mean.size))


def assert_near(found, wanted, rounding, name):
    assert found.dtype == wanted.dtype, name
    assert found.shape == wanted.shape, name
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rounding * largest)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_moments_are_those_of_the_paper(name, x_dtype):
    shape, count = SHAPES[name]
    _, operands, _ = case(shape, count, x_dtype, x_dtype, None, False)
    origin, mean, var = jax.jit(lambda x: kernels.moments(x, range(count)))(operands.x)
    features = tuple(range(count, len(shape)))
    exact_mean, exact_var, _ = oracle.moments(operands.x, features)
    np.testing.assert_array_equal(origin, operands.x[(0,) * count].astype("float32"))
    np.testing.assert_allclose(origin + mean, exact_mean[(0,) * count], rtol=1e-6)
    np.testing.assert_allclose(var, exact_var[(0,) * count], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@shapes_and_dtypes
def test_gradients_are_those_that_xla_computes(name, dtypes, variant):
    shape, count = SHAPES[name]
    transform, operands, cotangents = case(
        shape, count, *DTYPES[dtypes], *VARIANTS[variant]
    )
    origin, moments = statistics(operands.x, transform.reduction.axes)
    types = jax.eval_shape(lambda: operands)
    plainly = functools.partial(_pull_back_plainly, transform=transform, types=types)
    wanted = jax.jit(plainly)(cotangents, operands, origin, moments)
    dy, dmean, dvar = cotangents
    channels = (origin, moments.mean, moments.var, operands.epsilon)
    channels += (operands.scale, operands.bias, dmean, dvar)
    found = kernels.gradient(
        dy,
        operands.x,
        channels,
        operands.residual,
        relu=transform.activation is not None,
    )
    names = ("dx", "depsilon", "dscale", "dbias", "dresidual")
    for value, exact, of in zip(found, wanted, names, strict=False):
        rounding = ROUNDING[str(exact.dtype)] if of in ("dx", "dresidual") else 1e-5
        assert_near(value.astype(exact.dtype), exact, rounding, of)


@pytest.mark.parametrize("variant", VARIANTS)
@shapes_and_dtypes
def test_the_output_is_the_one_that_xla_computes(name, dtypes, variant):
    shape, count = SHAPES[name]
    transform, operands, _ = case(shape, count, *DTYPES[dtypes], *VARIANTS[variant])
    relu = transform.activation is not None
    origin, moments = statistics(operands.x, transform.reduction.axes)
    channels = (origin, moments.mean, moments.var, operands.epsilon)
    channels += (operands.scale, operands.bias)
    dtype = transform.dtype
    found = kernels.output(operands.x, channels, operands.residual, relu, dtype)
    mean = np.asarray(origin, np.float64) + np.asarray(moments.mean, np.float64)
    inverse = 1 / np.sqrt(np.asarray(moments.var, np.float64) + 1e-3)
    z = (np.asarray(operands.x, np.float64) - mean) * inverse * operands.scale
    z = z + np.asarray(operands.bias, np.float64)
    if operands.residual is not None:
        z = z + np.asarray(operands.residual, np.float64)
    wanted = np.maximum(z, 0) if relu else z
    assert found.dtype == dtype
    rounding = ROUNDING[str(dtype)] * np.abs(z).max()
    np.testing.assert_allclose(
        np.asarray(found, np.float64), wanted, rtol=0, atol=rounding
    )


def test_bfloat16_is_rounded_to_the_nearest_and_of_two_to_the_even_one():
    bits = np.random.default_rng(0).integers(0, 1 << 32, 40_000, dtype=np.uint32)
    ties = (np.arange(4096, dtype=np.uint32) << 20) + 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) > 1e-30)]
    # Each in a channel of its own, of variance 1, where a second example takes back
    # what it adds to the sums: the gradient is the value itself.
    dy = jnp.stack([values, -values])
    x, zero, one = (
        jnp.zeros(dy.shape, "bfloat16"),
        *(jnp.full(values.shape, value, "float32") for value in (0, 1)),
    )
    channels = (zero, zero, one, jnp.float32(0), one, zero, zero, zero)
    dx, *_ = kernels.gradient(dy, x, channels, None, relu=False)
    with np.errstate(over="ignore"):
        wanted = values.astype(jnp.bfloat16)
    np.testing.assert_array_equal(dx[0].view("uint16"), wanted.view("uint16"))


def test_what_is_not_finite_stays_in_its_channel():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(700, 6)), "float32")
    x = x.at[3, 1].set(jnp.nan).at[0, 2].set(jnp.inf).at[5, 4].set(-jnp.inf)
    found = jax.jit(bnjax.moments)(x)
    finite = np.array([True, False, False, True, False, True])
    np.testing.assert_array_equal(np.isfinite(found.mean), finite)
    np.testing.assert_array_equal(np.isnan(found.var), ~finite)


def test_what_overflows_has_no_variance():
    x = jnp.float32([[1e30], [-1e30], [1e25]])
    assert np.isnan(jax.jit(bnjax.moments)(x).var)


PROGRAM = """
import hashlib, jax, jax.numpy as jnp, numpy as np, bnjax
rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(64, 56, 56, 24)), "float32")
def loss(x, scale):
    stats = bnjax.BatchStats.init(24)
    y, new = bnjax.batch_norm(x, scale, None, stats, activation="relu")
    return jnp.sum(y * x) + jnp.sum(new.mean), new
run = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
for _ in range(5):
    leaves = jax.tree.leaves(run(x, jnp.ones(24)))
    print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in leaves)).hexdigest())
"""


def digests(program):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_no_digit_depends_on_the_number_of_threads():
    alone = f"import os; os.sched_setaffinity(0, {{0}})\n{PROGRAM}"
    found = digests(PROGRAM) | digests(alone)
    assert len(found) == 1
