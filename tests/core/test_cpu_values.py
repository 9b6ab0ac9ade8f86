"""What the kernels compute, beside the paper's formulas in float64."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import _cpu
from tests import oracle
from tests.core import needs_kernels

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


class Case:
    """Arrays of one call, and what the layer computes of them in float64."""

    def __init__(self, name, x_dtype, y_dtype, activation=None, residual=False):
        shape, count = SHAPES[name]
        rng = np.random.default_rng(0)
        features = shape[count:]

        def values(shape, dtype="float32", shift=0.0):
            return jnp.asarray(rng.normal(size=shape) + shift, dtype)

        self.axes, self.activation = tuple(range(count)), activation
        self.x = values(shape, x_dtype, shift=3.0)
        self.epsilon = jnp.float32(1e-3)
        self.scale, self.bias = values(features), values(features)
        self.residual = values(shape, x_dtype) if residual else None
        with jax.enable_x64(True):
            exact = self.preactivation(*self.float64())
            self.z, mean, var = (np.asarray(a) for a in exact)
            y = exact[0] if activation is None else activation(exact[0])
            self.y = np.asarray(y)
        origin = self.x[(0,) * count].astype("float32")
        mean = jnp.asarray(mean - np.asarray(origin, np.float64), "float32")
        var = jnp.asarray(var, "float32")
        self.channels = (origin, mean, var, self.epsilon, self.scale, self.bias)
        # Where z is within a rounding of zero, either side of the kink is right.
        dy = np.where(np.abs(self.z) > 1e-4, values(shape), 0)
        self.dy, self.dmean = jnp.asarray(dy, y_dtype), values(features)
        self.dvar = values(features)

    def float64(self):
        arrays = self.x, self.epsilon, self.scale, self.bias, self.residual
        return [None if a is None else np.asarray(a, np.float64) for a in arrays]

    def preactivation(self, x, epsilon, scale, bias, residual):
        mean, var = jnp.mean(x, self.axes), jnp.var(x, self.axes)
        z = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
        return (z if residual is None else z + residual), mean, var

    def gradients(self):
        """Of x, epsilon, scale, bias, and of the residual if there is one."""

        def layer(*arrays):
            z, mean, var = self.preactivation(*arrays)
            return z if self.activation is None else self.activation(z), mean, var

        with jax.enable_x64(True):
            cotangents = (self.dy, self.dmean, self.dvar)
            cotangents = tuple(jnp.asarray(a, "float64") for a in cotangents)
            found = jax.vjp(layer, *self.float64())[1](cotangents)
            return [np.asarray(a) for a in found if a is not None]


def assert_near(found, wanted, rounding, name=""):
    assert found.shape == wanted.shape, name
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rounding * largest)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
def test_moments_are_those_of_the_paper(name, x_dtype):
    shape, count = SHAPES[name]
    x = Case(name, x_dtype, x_dtype).x
    origin, mean, var = jax.jit(lambda x: _cpu.moments(x, range(count)))(x)
    features = tuple(range(count, len(shape)))
    exact_mean, exact_var, _ = oracle.moments(x, features)
    np.testing.assert_array_equal(origin, x[(0,) * count].astype("float32"))
    np.testing.assert_allclose(origin + mean, exact_mean[(0,) * count], rtol=1e-6)
    np.testing.assert_allclose(var, exact_var[(0,) * count], rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@shapes_and_dtypes
def test_gradients_are_those_of_the_paper(name, dtypes, variant):
    case = Case(name, *DTYPES[dtypes], *VARIANTS[variant])
    y = None if case.residual is None else jnp.asarray(case.y, case.dy.dtype)
    channels = (*case.channels, case.dmean, case.dvar)
    found = _cpu.gradient(case.dy, case.x, channels, y, case.activation)
    names = ("dx", "depsilon", "dscale", "dbias", "dresidual")
    for value, exact, of in zip(found, case.gradients(), names, strict=False):
        like_x = of in ("dx", "dresidual")
        x_dtype = str(case.x.dtype)
        by_kernel = x_dtype if like_x and x_dtype != "float16" else "float32"
        assert value.dtype == by_kernel, of
        assert_near(value, exact, ROUNDING[x_dtype] if like_x else 1e-5, of)


@pytest.mark.parametrize("variant", VARIANTS)
@shapes_and_dtypes
def test_the_output_is_the_one_of_the_paper(name, dtypes, variant):
    case = Case(name, *DTYPES[dtypes], *VARIANTS[variant])
    dtype = case.dy.dtype
    found = _cpu.output(case.x, case.channels, case.residual, case.activation, dtype)
    assert found.dtype == dtype
    rounding = ROUNDING[str(dtype)] * np.abs(case.z).max()
    np.testing.assert_allclose(
        np.asarray(found, np.float64), case.y, rtol=0, atol=rounding
    )


def test_after_a_residual_the_output_says_where_the_relu_passed():
    rng = np.random.default_rng(0)
    case = Case("a last row that is not full", "float32", "float32", jax.nn.relu, True)
    y = jnp.asarray(rng.integers(0, 2, case.x.shape), "float32")
    channels = (*case.channels, case.dmean, case.dvar)
    *_, dresidual = _cpu.gradient(case.dy, case.x, channels, y, jax.nn.relu)
    np.testing.assert_array_equal(dresidual, np.where(y > 0, case.dy, 0))


def test_an_activation_that_the_kernels_do_not_know_is_refused():
    case = Case("two examples", "float32", "float32")
    channels = (*case.channels, case.dmean, case.dvar)
    with pytest.raises(KeyError, match="gelu"):
        _cpu.output(case.x, case.channels, None, jax.nn.gelu, "float32")
    with pytest.raises(KeyError, match="gelu"):
        _cpu.gradient(case.dy, case.x, channels, None, jax.nn.gelu)


@pytest.mark.parametrize(
    "changed",
    [
        {"axes": (1,)},
        {"compute_dtype": "float64"},
        {"dtype": "float64"},
        {"activation": jax.nn.gelu},
        {"activation": lambda z: jnp.maximum(z, 0)},
        {"mask": jnp.ones((4, 1))},
        {"residual": jnp.ones((4, 3)), "activation": None},
        {"residual": jnp.ones((4, 3), "bfloat16")},
        {"x": jnp.ones((0, 3))},
        {"x": jnp.ones((4, 3), int)},
    ],
    ids=" ".join,
)
def test_what_the_kernels_do_not_support(changed):
    call = {"x": jnp.ones((4, 3)), "axes": (0,), "compute_dtype": "float32"}
    call |= {"activation": jax.nn.relu}
    assert _cpu.kernel_supports(**call)
    assert not _cpu.kernel_supports(**call | changed)


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
    dx, *_ = _cpu.gradient(dy, x, channels, None, None)
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


@pytest.mark.parametrize("residual", [False, True])
def test_a_relu_leaves_a_nan_what_it_is(residual):
    case = Case("two examples", "float32", "float32", jax.nn.relu, residual)
    x = case.x.at[1, 2].set(jnp.nan)
    y = _cpu.output(x, case.channels, case.residual, jax.nn.relu, "float32")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_no_digit_depends_on_the_number_of_threads():
    alone = f"import os; os.sched_setaffinity(0, {{0}})\n{PROGRAM}"
    found = digests(PROGRAM) | digests(alone)
    assert len(found) == 1
