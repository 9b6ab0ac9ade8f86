import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import bnjax
import bnjax.linen
from bnjax.variants.whitening import (
    WhiteningStats,
    update_whitening_stats,
    whiten_batch,
    whitening_affine,
    whitening_batch_norm,
    whitening_matrix,
)
from bnjax.variants.whitening.linen import WhiteningBatchNorm
from bnjax.variants.whitening.nnx import WhiteningBatchNorm as NnxWhiteningBatchNorm
from tests.integration.shared import collectives

METHODS = [None, 5]
MOMENTUM, EPSILON = 0.9, 1e-3
# Six channels in two groups of three, 45 values of each.
SHAPE, SIZE = (9, 5, 6), 3


def data(seed=0, shape=SHAPE, dtype=None):
    """Correlated values, scale, bias, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=shape) @ rng.normal(size=(shape[-1],) * 2) + 2
    arrays = mixed, rng.normal(size=shape[-1:]), rng.normal(size=shape[-1:])
    return [jnp.asarray(a, dtype) for a in (*arrays, rng.normal(size=shape))]


def start(dtype="float64"):
    return WhiteningStats.init(6, SIZE, dtype)


def inverse_sqrt(cov, iterations, epsilon=EPSILON):
    """ZCA and IterNorm as their papers write them, in float64."""
    cov = np.asarray(cov, np.float64) + epsilon * np.eye(len(cov))
    if iterations is None:
        values, vectors = np.linalg.eigh(cov)
        return vectors @ np.diag(values**-0.5) @ vectors.T
    normalized, power = cov / np.trace(cov), np.eye(len(cov))
    for _ in range(iterations):
        power = (3 * power - power @ power @ power @ normalized) / 2
    return power / np.sqrt(np.trace(cov))


def moments(x, weights=None, size=SIZE):
    """Mean, biased covariances of the groups and count, in float64."""
    x = np.asarray(x, np.float64)
    rows = x.reshape(-1, x.shape[-1])
    weights = np.ones(x.shape) if weights is None else np.broadcast_to(weights, x.shape)
    w = weights.reshape(rows.shape)[:, :1].astype(np.float64)
    rows = np.where(w > 0, rows, 0)
    mean = (w * rows).sum(0) / w.sum()
    whole = (w * (rows - mean)).T @ (rows - mean) / w.sum()
    cov = [whole[i : i + size, i : i + size] for i in range(0, len(mean), size)]
    return mean, np.stack(cov), w.sum()


def whitened(x, mean, cov, iterations, scale=1.0, bias=0.0, epsilon=EPSILON):
    matrices = [inverse_sqrt(each, iterations, epsilon) for each in cov]
    size = len(matrices[0])
    x = np.asarray(x, np.float64) - mean
    parts = [x[..., i * size : (i + 1) * size] @ m for i, m in enumerate(matrices)]
    return np.asarray(scale) * np.concatenate(parts, -1) + np.asarray(bias)


def close(found, expected, rtol=1e-10, atol=1e-10):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol, atol
        )


@functools.partial(jax.jit, static_argnames=("iterations", "options"))
def train(x, scale, bias, stats, dy, mask=None, *, iterations, options=()):
    """Output, new statistics and gradients of one step."""

    def loss(x, scale, bias):
        settings = {"group_size": SIZE, "momentum": MOMENTUM, "epsilon": EPSILON}
        y, new = whitening_batch_norm(
            x,
            scale,
            bias,
            stats,
            iterations=iterations,
            mask=mask,
            **settings | dict(options),
        )
        return jnp.sum(y * dy), (y, new)

    grads, (y, new) = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
    return y, new, grads


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


def shared(mapping, use_fast_variance=True):
    """A step whose statistics eight devices share."""
    options = (("axis_name", "data"), ("use_fast_variance", use_fast_variance))
    step = functools.partial(train, iterations=5, options=options)
    if mapping == "vmap":
        return jax.vmap(step, (0, None, None, None, 0, 0), axis_name="data")
    if mapping == "pmap":
        return jax.pmap(step, "data", in_axes=(0, None, None, None, 0, 0))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows, checked = P("data"), mapping == "checked"

    def one(x, scale, bias, stats, dy, mask):
        x, dy, mask = x[0], dy[0], mask[0]
        y, new, (dx, *dparams) = step(x, scale, bias, stats, dy, mask)
        if not checked:
            new, dparams = jax.tree.map(lambda leaf: leaf[None], (new, dparams))
        return y[None], new, (dx[None], *dparams)

    out = P() if checked else rows
    return jax.jit(
        jax.shard_map(
            one,
            mesh=mesh,
            in_specs=(rows, P(), P(), P(), rows, rows),
            out_specs=(rows, out, (rows, out, out)),
            check_vma=checked,
        )
    )


@pytest.mark.parametrize("mapping", ["pmap", "checked", "unchecked"])
def test_devices_share_in_one_collective(mapping):
    x, scale, bias, dy = data(shape=(16, 5, 6), dtype="float32")
    x = x + jnp.arange(16.0).reshape(16, 1, 1) // 2
    mask = (jnp.arange(16) % 5 != 1).reshape(16, 1, 1)
    mask = mask.at[:2].set(False)
    x = x.at[0].set(jnp.nan)
    dy = dy.at[0].set(0)
    stats = WhiteningStats(jnp.full(6, 4.0), WhiteningStats.init(6, SIZE).cov)
    want = train(x, scale, bias, stats, dy, mask, iterations=5)

    def parts(array):
        return array.reshape(8, 2, *array.shape[1:])

    run = shared(mapping)
    arguments = parts(x), scale, bias, stats, parts(dy), parts(mask)
    y, new, (dx, *dparams) = run(*arguments)
    if mapping != "checked":
        for leaf in jax.tree.leaves(new):
            np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[0], leaf.shape))
        new = jax.tree.map(lambda leaf: leaf[0], new)
        dparams = [jnp.sum(leaf, 0) for leaf in dparams]
    got = y.reshape(x.shape), new, (dx.reshape(x.shape), *dparams)
    close(got, want, rtol=2e-4, atol=1e-4)
    # Covariance, mean, count and origin; and the gradients of the first two.
    moved = collectives(run.lower(*arguments).compile())
    assert len(moved) == 2
    assert max(moved) <= 6 * (SIZE + 3)


def test_devices_that_agree_on_an_origin_lose_no_digits():
    x, scale, bias, dy = data(shape=(16, 5, 6), dtype="float32")
    x = x + 1e5
    stats = WhiteningStats.init(6, SIZE)
    parts = [leaf.reshape(8, 2, *leaf.shape[1:]) for leaf in (x, dy)]
    mask = jnp.ones((8, 1, 1, 1), bool)
    run = shared("vmap", use_fast_variance=False)
    y, new, _ = run(parts[0], scale, bias, stats, parts[1], mask)
    mean, cov, count = moments(x)
    expected = MOMENTUM * np.asarray(stats.cov) + 0.1 * cov * count / (count - 1)
    np.testing.assert_allclose(new.cov[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        y.reshape(x.shape), whitened(x, mean, cov, 5, scale, bias), 1e-3, 1e-3
    )


def test_devices_with_other_running_means_are_told_by_nan():
    x, *_ = data(shape=(8, 5, 6), dtype="float32")

    def run(x, origin):
        return whiten_batch(x, group_size=SIZE, origin=origin, axis_name="data")[1].mean

    origins = jnp.zeros((8, 6)).at[3, 2].set(0.5)
    mean = jax.vmap(run, axis_name="data")(x, origins)
    assert np.isnan(mean[:, 2]).all()
    assert np.isfinite(jnp.delete(mean, 2, 1)).all()
    lost = jax.vmap(run, axis_name="data")(x, jnp.full((8, 6), jnp.inf))
    close(lost[0], x.reshape(-1, 6).mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [(AxisType.Auto, P("data", "model")), (AxisType.Explicit, P("data"))],
)
def test_arrays_sharded_over_a_mesh(axis_type, spec):
    x, scale, bias, dy = data(shape=(8, 4, 6), dtype="float32")
    stats = WhiteningStats.init(6, SIZE)
    want = train(x, scale, bias, stats, dy, iterations=None)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)

    def put(tree, spec=None):
        return jax.device_put(tree, NamedSharding(mesh, spec or P()))

    got = train(
        put(x, spec), put(scale), put(bias), put(stats), put(dy, spec), iterations=None
    )
    close(got, want, rtol=1e-4, atol=1e-4)


def test_a_remat_policy_keeps_statistics_and_decomposition():
    x, *_ = data(dtype="float32")
    policy = jax.checkpoint_policies.save_only_these_names(bnjax.CHECKPOINT_NAME)

    def loss(x):
        return jnp.sum(whiten_batch(x, group_size=SIZE, iterations=None)[0] ** 3)

    def decompositions(loss):
        return str(jax.make_jaxpr(jax.grad(loss))(x)).count("eigh")

    assert decompositions(jax.checkpoint(loss, policy=policy)) == decompositions(loss)


def layers(**options):
    return {
        "linen": WhiteningBatchNorm(group_size=SIZE, **options),
        "nnx": NnxWhiteningBatchNorm(6, group_size=SIZE, rngs=nnx.Rngs(0), **options),
    }


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
