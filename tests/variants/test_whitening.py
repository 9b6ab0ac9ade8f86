import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import bnjax
from bnjax.variants.whitening import (
    WhiteningStats,
    whiten_batch,
    whitening_affine,
    whitening_batch_norm,
    whitening_matrix,
)
from tests.variants.whitening_oracle import (
    EPSILON,
    METHODS,
    MOMENTUM,
    SHAPE,
    SIZE,
    close,
    data,
    inverse_sqrt,
    moments,
    start,
    train,
    whitened,
)


@pytest.mark.parametrize("iterations", METHODS)
def test_training_is_the_papers(iterations, x64):
    x, scale, bias, dy = data()
    old = WhiteningStats(jnp.full(6, 0.5), 2 * start().cov)
    y, new, grads = train(x, scale, bias, old, dy, iterations=iterations)
    mean, cov, count = moments(x)
    close(y, whitened(x, mean, cov, iterations, scale, bias))
    close(new.mean, MOMENTUM * 0.5 + (1 - MOMENTUM) * mean)
    unbiased = cov * count / (count - 1)
    close(new.cov, MOMENTUM * np.asarray(old.cov) + (1 - MOMENTUM) * unbiased)

    def loss(x, scale, bias):
        return np.sum(whitened(x, *moments(x)[:2], iterations, scale, bias) * dy)

    given = [np.asarray(a) for a in (x, scale, bias)]
    rng, step = np.random.default_rng(2), 1e-5
    for i, gradient in enumerate(grads):
        direction = rng.normal(size=gradient.shape)
        ends = [
            loss(*(a + s * direction if i == j else a for j, a in enumerate(given)))
            for s in (step, -step)
        ]
        along = np.sum(np.asarray(gradient) * direction)
        np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


def test_zca_has_the_identity_as_covariance(x64):
    x, *_ = data()
    y, batch = whiten_batch(x, group_size=None, iterations=None, epsilon=1e-12)
    _, cov, _ = moments(y, size=6)
    close(cov[0], np.eye(6), atol=1e-9)
    # Of all whitened versions it is the closest to the input: W is symmetric.
    matrix = whitening_matrix(batch.cov, iterations=None)
    close(matrix, matrix.mT)


def test_gradients_of_all_else(x64):
    """Of a mask, an activation, a residual, epsilon and the moments."""
    x, scale, bias, dy = data(shape=(7, 6))
    residual = jnp.flip(x)
    mask = (jnp.arange(7.0) % 3).reshape(7, 1)

    @jax.jit
    def run(x, scale, bias, residual, epsilon):
        y, found = whiten_batch(
            x,
            scale,
            bias,
            group_size=SIZE,
            iterations=None,
            epsilon=epsilon,
            mask=mask,
            activation="tanh",
            residual=residual,
        )
        return jnp.sum(y * dy), found.mean, found.cov

    arguments = x, scale, bias, residual, jnp.asarray(0.05)
    check_grads(run, arguments, 1, ["rev"], eps=1e-6, atol=1e-6, rtol=1e-6)


def test_second_derivatives(x64):
    x, *_, dy = data(shape=(7, 3))
    direction = jnp.cos(jnp.arange(21.0)).reshape(7, 3)

    def loss(x):
        options = {"group_size": 3, "epsilon": 0.1, "iterations": None}
        return jnp.sum(whiten_batch(x, **options)[0] ** 3 * dy)

    @jax.jit
    def both(x):
        return jax.jvp(jax.grad(loss), (x,), (direction,))

    step = 1e-5
    ends = both(x + step * direction)[0], both(x - step * direction)[0]
    close(both(x)[1], (ends[0] - ends[1]) / (2 * step), rtol=1e-6, atol=1e-6)


@jax.jit
def zca_derivatives(cov, direction):
    matrix = functools.partial(whitening_matrix, iterations=None, epsilon=EPSILON)
    gradient = jax.grad(lambda cov: jnp.sum(matrix(cov) * direction))
    second = jax.jvp(gradient, (cov,), (direction,))
    return *jax.jvp(matrix, (cov,), (direction,)), *second


@pytest.mark.parametrize(
    "eigenvalues", [(1, 1, 1), (2, 2, 0.5), (1, 1e-9, 0), (0, 0, 0)]
)
def test_the_derivative_of_zca_where_eigenvalues_coincide_or_vanish(eigenvalues, x64):
    """In closed form, by Daleckii and Krein; JAX's of an eigh is NaN there."""
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    cov = jnp.asarray(basis * np.array(eigenvalues) @ basis.T)
    direction = rng.normal(size=(3, 3))
    direction = jnp.asarray(direction + direction.T)
    w, dw, gradient, second = zca_derivatives(cov, direction)
    roots = np.sqrt(np.array(eigenvalues) + EPSILON)
    a, b = roots[:, None], roots
    expected = -(basis.T @ direction @ basis) / (a * b * (a + b))
    close(dw, basis @ expected @ basis.T, rtol=1e-7, atol=1e-4)
    close(w, (basis / roots) @ basis.T, rtol=1e-7)
    close(gradient, dw, rtol=1e-9, atol=1e-6)
    assert np.isfinite(second).all()


def test_rounding_makes_no_negative_eigenvalue():
    direction = np.linspace(1, 2, 8, dtype=np.float32)
    cov = jnp.asarray(1e6 * np.outer(direction, direction))
    assert np.linalg.eigvalsh(cov)[0] < -1e-5
    w = whitening_matrix(cov, iterations=None)
    assert np.isfinite(w).all()
    length = direction @ np.asarray(w) @ direction
    np.testing.assert_allclose(length, np.linalg.norm(direction) / 1e3, rtol=1e-2)


@pytest.mark.parametrize("iterations", METHODS)
def test_gradients_are_finite_of_alike_dead_and_too_few_values(iterations):
    """Equal channels, a constant one, and fewer values than a group has channels."""
    x, scale, bias, dy = data(dtype="float32")
    alike = x.at[..., 1].set(x[..., 0]).at[..., 3].set(7.0)
    few = jnp.broadcast_to(x[:1, :1], SHAPE).at[0].set(x[1, 0])
    stats = WhiteningStats.init(6, SIZE)
    for x in (alike, few, jnp.zeros(SHAPE)):
        found = train(x, scale, bias, stats, dy, iterations=iterations)
        for leaf in jax.tree.leaves(found):
            assert np.isfinite(leaf).all()
            assert np.abs(leaf).max() < 1e4


def test_newton_goes_on_to_zca_and_stays_there():
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(16, 16)))
    cov = basis * np.logspace(0, -3, 16) @ basis.T
    exact = inverse_sqrt(cov, None, 1e-5)
    matrix = jax.jit(whitening_matrix, static_argnames="iterations")
    found = matrix(jnp.asarray(cov, "float32"), iterations=30)
    np.testing.assert_allclose(found, exact, atol=2e-4 * exact.max())


def test_running_statistics_after_1_2_and_100_updates(x64):
    batches = jnp.stack([data(seed)[0] for seed in range(100)])

    def step(stats, x):
        _, new = whitening_batch_norm(
            x, None, None, stats, group_size=SIZE, momentum=MOMENTUM
        )
        return new, new

    _, found = jax.jit(lambda xs: jax.lax.scan(step, start(), xs))(batches)
    mean, cov = np.zeros(6), np.stack([np.eye(3)] * 2)
    for i, x in enumerate(batches):
        new_mean, new_cov, count = moments(x)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * new_mean
        cov = MOMENTUM * cov + (1 - MOMENTUM) * new_cov * count / (count - 1)
        if i + 1 in (1, 2, 100):
            close((found.mean[i], found.cov[i]), (mean, cov))


@pytest.mark.parametrize("iterations", METHODS)
def test_inference_is_a_linear_map(iterations, x64):
    x, scale, bias, _ = data()
    mean, cov, _ = moments(data(seed=1)[0])
    stats = WhiteningStats(jnp.asarray(mean), jnp.asarray(cov))
    options = {"iterations": iterations, "epsilon": EPSILON}
    run = functools.partial(
        whitening_batch_norm, group_size=SIZE, use_running_average=True, **options
    )
    y, same = run(x, scale, bias, stats)
    assert same is stats
    assert y.dtype == x.dtype
    close(y, whitened(x, mean, cov, iterations, scale, bias))
    kernel, offset = whitening_affine(stats, scale, bias, **options)
    close(x @ kernel + offset, y)
    close(run(x[:1, :1], scale, bias, stats)[0], y[:1, :1])
    kernel, offset = whitening_affine(stats, **options)
    close(x @ kernel + offset, run(x, None, None, stats)[0])


@pytest.mark.parametrize(
    ("iterations", "masked", "dtype"),
    [(None, True, "float64"), (5, False, "float32"), (5, True, "bfloat16")],
)
def test_one_channel_a_group_is_batch_norm(iterations, masked, dtype, x64):
    x, scale, bias, dy = data(dtype="float64" if dtype == "float64" else "float32")
    x = x.astype(dtype)
    mask = (jnp.arange(9) % 3 != 1).reshape(9, 1, 1) if masked else None
    options = {"momentum": 0.8, "mask": mask, "activation": "gelu", "residual": x}

    def step(norm, stats):
        def loss(x, scale, bias):
            y, new = norm(x, scale, bias, stats, **options)
            return jnp.sum(y * dy), (y, new)

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, scale, bias)

    own = functools.partial(whitening_batch_norm, group_size=1, iterations=iterations)
    stats_dtype = scale.dtype
    found, (y, new) = step(own, WhiteningStats.init(6, 1, stats_dtype))
    expected, (y2, new2) = step(bnjax.batch_norm, bnjax.BatchStats.init(6, stats_dtype))
    tight = 1e-12 if dtype == "float64" else 2e-5
    close(new, (new2.mean, new2.var.reshape(6, 1, 1)), rtol=tight, atol=tight)
    loose = 0.05 if dtype == "bfloat16" else 10 * tight
    close((found, y), (expected, y2), rtol=loose, atol=loose)
    assert y.dtype == x.dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_computed_in_float32(dtype):
    x, scale, bias, dy = data(dtype="float32")
    x = (x * 30 + 100).astype(dtype)
    stats = WhiteningStats.init(6, SIZE)
    y, new, grads = train(x, scale, bias, stats, dy, iterations=None)
    wide, new_wide, grads_wide = train(
        x.astype("float32"), scale, bias, stats, dy, iterations=None
    )
    assert (y.dtype, new.cov.dtype, grads[0].dtype) == (dtype, "float32", dtype)
    close(new, new_wide, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(y, wide.astype(dtype))
    close(grads[0], grads_wide[0], rtol=1e-2, atol=1e-3)
    y, _, _ = train(
        x, scale, bias, stats, dy, iterations=None, options=(("dtype", jnp.float32),)
    )
    np.testing.assert_array_equal(y, wide)


def test_a_large_mean_costs_no_digits():
    x = np.float32(np.asarray(data()[0]) + 1e5)
    y, batch = jax.jit(functools.partial(whiten_batch, group_size=SIZE))(x)
    mean, cov, _ = moments(x)
    np.testing.assert_allclose(batch.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(batch.cov, cov, rtol=1e-5, atol=1e-5)
    close(y, whitened(x, mean, cov, 5, epsilon=1e-5), rtol=1e-3, atol=1e-3)


def test_masks(x64):
    x, scale, bias, dy = data()
    weights = (jnp.arange(9) % 3).reshape(9, 1, 1)
    stats = start()
    y, new, grads = train(x, scale, bias, stats, dy, weights, iterations=None)
    mean, cov, count = moments(x, np.asarray(weights))
    close(y, whitened(x, mean, cov, None, scale, bias))
    close(new.cov, MOMENTUM * stats.cov + 0.1 * cov * count / (count - 1))

    # What is hidden changes nothing, even a NaN.
    lost = x.at[::3, :, 1].set(jnp.nan)
    none = dy.at[::3].set(0)
    _, same, with_nan = train(lost, scale, bias, stats, none, weights, iterations=None)
    _, _, without = train(x, scale, bias, stats, none, weights, iterations=None)
    close((same, with_nan[1:]), (new, without[1:]))
    close(with_nan[0][1::3], without[0][1::3])
    assert np.isfinite(with_nan[0]).all()
    assert not np.allclose(grads[1], without[1])

    hidden = jnp.zeros_like(weights)
    y, kept, _ = train(x, scale, bias, stats, dy, hidden, iterations=None)
    close(kept, stats)
    assert np.isfinite(y).all()


def test_vmap_is_a_loop(x64):
    batches = [data(seed) for seed in range(3)]
    x, scale, bias, dy = (jnp.stack(each) for each in zip(*batches, strict=True))
    stats = start()
    run = functools.partial(train, iterations=None)
    found = jax.vmap(run, (0, 0, 0, None, 0))(x, scale, bias, stats, dy)
    for i, (x, scale, bias, dy) in enumerate(batches):
        one = run(x, scale, bias, stats, dy)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], found), one)


def test_other_feature_axes(x64):
    x, scale, bias, dy = data()
    stats = start()
    y, new, grads = train(x, scale, bias, stats, dy, iterations=5)

    def turn(array):
        return jnp.moveaxis(array, -1, 1)

    y2, new2, grads2 = train(
        turn(x), scale, bias, stats, turn(dy), iterations=5, options=(("axis", 1),)
    )
    close((y2, new2, grads2), (turn(y), new, (turn(grads[0]), *grads[1:])))


def test_a_remat_policy_keeps_statistics_and_decomposition():
    x, *_ = data(dtype="float32")
    policy = jax.checkpoint_policies.save_only_these_names(bnjax.CHECKPOINT_NAME)

    def loss(x):
        return jnp.sum(whiten_batch(x, group_size=SIZE, iterations=None)[0] ** 3)

    def decompositions(loss):
        return str(jax.make_jaxpr(jax.grad(loss))(x)).count("eigh")

    assert decompositions(jax.checkpoint(loss, policy=policy)) == decompositions(loss)
