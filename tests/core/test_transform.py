"""Outputs, gradients and statistics against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests import cases, oracle

pytestmark = pytest.mark.usefixtures("strict")


def apply(case, x, scale, bias, mask, **options):
    stats = bnjax.BatchStats.init(case.feature_shape)
    options = {"axis": case.axis, "epsilon": case.epsilon, "mask": mask, **options}
    return bnjax.batch_norm(x, scale, bias, stats, **options)


def jitted_vjp(case, x, scale, bias, mask, dy, **options):
    @jax.jit
    def run(x, scale, bias, mask, dy):
        def output(x, scale, bias):
            return apply(case, x, scale, bias, mask, **options)

        y, vjp, stats = jax.vjp(output, x, scale, bias, has_aux=True)
        return y, stats, vjp(dy)

    return run(x, scale, bias, mask, dy)


@cases.parametrize(cases.SHAPES + cases.MASKED)
def test_output_and_gradients(case):
    x, scale, bias, dy, mask = case.arrays()
    y, _, gradients = jitted_vjp(case, x, scale, bias, mask, dy)
    expected = oracle.forward(x, scale, bias, case.axis, case.epsilon, mask)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    wanted = oracle.backward(x, scale, dy, case.axis, case.epsilon, mask)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@cases.parametrize(cases.SHAPES + cases.MASKED)
@pytest.mark.parametrize("unbiased", [True, False])
def test_running_statistics(case, unbiased):
    x, scale, bias, _, mask = case.arrays()
    options = {"momentum": 0.9, "unbiased": unbiased}
    _, stats = apply(case, x, scale, bias, mask, **options)
    old = bnjax.BatchStats.init(case.feature_shape)
    mean, var = oracle.running(old, x, case.axis, mask=mask, **options)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)


@cases.parametrize(cases.LARGE_MEAN)
def test_mean_far_from_zero(case):
    x, scale, bias, dy, mask = case.arrays()
    y, _, gradients = jitted_vjp(case, x, scale, bias, mask, dy)
    found = bnjax.moments(x, axis=case.axis, mask=mask)
    mean, var, count = oracle.moments(x, case.axis, mask)
    axes = oracle.reduction_axes(x, case.axis)
    np.testing.assert_allclose(found.var, var.squeeze(axes), rtol=1e-5)
    np.testing.assert_allclose(found.mean, mean.squeeze(axes), rtol=1e-7)
    np.testing.assert_array_equal(
        found.count, np.broadcast_to(count.squeeze(axes), found.mean.shape)
    )
    expected = oracle.forward(x, scale, bias, case.axis, mask=mask)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    wanted = oracle.backward(x, scale, dy, case.axis, mask=mask)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("hidden", [0.0, np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("mean", [0.0, 1e6])
@pytest.mark.parametrize("activation", [None, "sigmoid"])
def test_what_a_mask_hides_changes_nothing(hidden, mean, activation):
    case = cases.Case("hidden", (16, 6, 6, 4), mean=mean, std=1.0)
    x, scale, bias, dy, _ = case.arrays()
    mask = np.ones((16, 1, 1, 1), bool)
    mask[[0, 5]] = False
    x[[0, 5]] = hidden
    dy[[0, 5]] = 0
    options = {"activation": activation, "residual": np.where(mask, dy, x)}
    y, stats, gradients = jitted_vjp(case, x, scale, bias, mask, dy, **options)
    live = mask[:, 0, 0, 0]
    options["residual"] = options["residual"][live]
    alone = jitted_vjp(case, x[live], scale, bias, None, dy[live], **options)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(y[live], alone[0], **tolerance)
    np.testing.assert_allclose(stats.var, alone[1].var, rtol=1e-5)
    np.testing.assert_allclose(gradients[0][live], alone[2][0], **tolerance)
    np.testing.assert_allclose(gradients[1], alone[2][1], **tolerance)
    np.testing.assert_allclose(gradients[2], alone[2][2], **tolerance)
    assert np.isfinite(np.asarray(gradients[0])).all()
    mean, var, _ = oracle.moments(x, mask=mask)
    found = bnjax.moments(x, mask=mask)
    np.testing.assert_allclose(found.var, var.squeeze((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 700, -1])
@pytest.mark.parametrize("masked", [False, True])
def test_an_outlier_in_any_place(place, masked):
    case = cases.Case("outlier", (1024, 4), mean=1e6, std=1.0)
    x, scale, bias, _, _ = case.arrays()
    x[place] += 1e4
    mask = np.ones((1024, 1), bool) if masked else None
    found = bnjax.moments(x, mask=mask)
    _, var, _ = oracle.moments(x)
    np.testing.assert_allclose(found.var, var[0], rtol=1e-2)
    y, _ = apply(case, x, scale, bias, mask)
    np.testing.assert_allclose(y, oracle.forward(x, scale, bias), rtol=0.02, atol=1e-3)


def test_a_long_reduction():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4, 512, 512, 2)) + 3).astype(np.float32)
    found = jax.jit(bnjax.moments)(x)
    mean, var, _ = oracle.moments(x)
    np.testing.assert_allclose(found.mean, mean.squeeze((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.var, var.squeeze((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("total", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("unbiased", [True, False])
def test_weights_of_at_most_one_leave_the_statistics(total, unbiased):
    case = cases.Case("nothing", (4, 3))
    x, scale, bias, dy, _ = case.arrays()
    mask = np.zeros((4, 1), np.float32)
    mask[2] = total
    y, stats, gradients = jitted_vjp(
        case, x, scale, bias, mask, dy, unbiased=unbiased, momentum=0.5
    )
    np.testing.assert_array_equal(stats.mean, np.zeros(3))
    np.testing.assert_array_equal(stats.var, np.ones(3))
    assert all(np.isfinite(np.asarray(a)).all() for a in (y, *gradients))


def test_weights_count_as_repeats():
    x = np.float32([[1, 5], [2, 3], [4, -1]])
    weights = np.int32([[1], [0], [3]])
    repeated = x[[0, 2, 2, 2]]
    found, wanted = bnjax.moments(x, mask=weights), bnjax.moments(repeated)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("absent", ["scale", "bias", "both"])
def test_without_scale_or_bias(absent):
    case = cases.Case("absent", (8, 5, 3))
    x, scale, bias, dy, _ = case.arrays()
    if absent != "bias":
        scale = None
    if absent != "scale":
        bias = None
    y, _, gradients = jitted_vjp(case, x, scale, bias, None, dy)
    ones = np.ones(3) if scale is None else scale
    zeros = np.zeros(3) if bias is None else bias
    np.testing.assert_allclose(y, oracle.forward(x, ones, zeros), atol=1e-5)
    wanted = oracle.backward(x, ones, dy)
    for got, want in zip(gradients, wanted, strict=True):
        if got is not None:
            np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_inference_is_one_affine_map():
    case = cases.Case("inference", (8, 5, 5, 4), mean=100.0)
    x, scale, bias, dy, _ = case.arrays()
    stats = bnjax.BatchStats(jnp.full(4, 99.0), jnp.array([0.5, 1.0, 4.0, 9.0]))
    y, kept = bnjax.batch_norm(x, scale, bias, stats, use_running_average=True)
    inverse = 1 / np.sqrt(np.asarray(stats.var, np.float64) + 1e-5)
    xhat = (x.astype(np.float64) - 99) * inverse
    np.testing.assert_allclose(y, xhat * scale + bias, rtol=1e-5, atol=1e-4)
    assert kept is stats
    gradients = jax.grad(
        lambda x, scale, bias: jnp.vdot(
            dy,
            bnjax.batch_norm(x, scale, bias, stats, use_running_average=True)[0],
        ),
        (0, 1, 2),
    )(x, scale, bias)
    wanted = dy * scale * inverse, (dy * xhat).sum((0, 1, 2)), dy.sum((0, 1, 2))
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_update_stats_false_changes_the_output_alone():
    case = cases.Case("frozen", (8, 3))
    x, scale, bias, _, _ = case.arrays()
    y, stats = apply(case, x, scale, bias, None, update_stats=False)
    moved, _ = apply(case, x, scale, bias, None)
    np.testing.assert_array_equal(y, moved)
    np.testing.assert_array_equal(stats.var, np.ones(3))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mask", [None, "examples"])
def test_inference_that_updates_its_statistics(mask, shared, x64):
    case = cases.Case("drift", (8, 3, 5), mask=mask, mean=20.0)
    x, scale, bias, _, mask = case.arrays(np.float64)
    old = bnjax.BatchStats(jnp.full(5, 19.0), jnp.full(5, 2.0))

    def run(x, mask, axis_name=None, **options):
        return bnjax.batch_norm(
            x,
            scale,
            bias,
            old,
            use_running_average=True,
            mask=mask,
            momentum=0.9,
            axis_name=axis_name,
            **options,
        )

    wanted, kept = run(x, mask)
    assert kept is old
    if shared:
        parts = [a if a is None else a.reshape(4, 2, *a.shape[1:]) for a in (x, mask)]
        options = {"axis_name": "shards", "update_stats": True}
        y, new = jax.vmap(
            lambda *part: run(*part, **options),
            axis_name="shards",
            out_axes=(0, None),
        )(*parts)
        y = y.reshape(x.shape)
    else:
        y, new = run(x, mask, update_stats=True)
    np.testing.assert_allclose(y, wanted, rtol=1e-14)
    mean, var = oracle.running(old, x, momentum=0.9, mask=mask)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(new.var, var, rtol=1e-12)
    # The statistics are still those of the batch: they have its gradient.
    slope = jax.grad(lambda x: run(x, mask, update_stats=True)[1].mean.sum())(x)
    count = x.size / 5 if mask is None else mask.sum() * 3
    weight = np.ones_like(x) if mask is None else mask * np.ones_like(x)
    np.testing.assert_allclose(slope, 0.1 * weight / count, rtol=1e-12)


def test_one_value_moves_no_statistics_in_inference():
    old = bnjax.BatchStats.init(3)
    options = {"use_running_average": True, "update_stats": True}
    y, new = bnjax.batch_norm(jnp.full((1, 3), 5.0), None, None, old, **options)
    np.testing.assert_allclose(y, np.full((1, 3), 5 / np.sqrt(1 + 1e-5)), rtol=1e-6)
    np.testing.assert_array_equal(new.var, np.ones(3))


def test_momentum_and_epsilon_may_be_traced():
    case = cases.Case("traced", (8, 3))
    x, scale, bias, _, _ = case.arrays()
    y, stats = jax.jit(
        lambda momentum, epsilon: apply(
            case, x, scale, bias, None, momentum=momentum, epsilon=epsilon
        )
    )(0.75, 0.5)
    mean, var = oracle.running(bnjax.BatchStats.init(3), x, momentum=0.75)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)
    np.testing.assert_allclose(
        y, oracle.forward(x, scale, bias, epsilon=0.5), atol=1e-5
    )


@pytest.mark.parametrize("shared", [False, True])
def test_complex_inputs(shared):
    """The mean is complex, the variance that of the distance from it."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(64, 3)) + 1j * rng.normal(size=(64, 3)) + 30 - 20j).astype(
        np.complex64
    )
    mask = rng.random((64, 1)) < 0.7
    old = bnjax.BatchStats(jnp.zeros(3, np.complex64), jnp.ones(3))

    def run(x, mask):
        options = {"momentum": 0.9, "axis_name": "data" if shared else None}
        return bnjax.batch_norm(x, None, None, old, mask=mask, **options)

    if shared:
        parts = x.reshape(4, 16, 3), mask.reshape(4, 16, 1)
        with jax.numpy_dtype_promotion("standard"):
            y, stats = jax.vmap(run, axis_name="data")(*parts)
        stats = jax.tree.map(lambda leaf: leaf[2], stats)
    else:
        with jax.numpy_dtype_promotion("standard"):
            y, stats = run(x, mask)
    seen = x[mask[:, 0]].astype(np.complex128)
    mean, var = seen.mean(0), seen.var(0)
    wanted = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(np.reshape(y, x.shape), wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats.mean, 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(
        stats.var, 0.9 + 0.1 * var * len(seen) / (len(seen) - 1), rtol=1e-5
    )
