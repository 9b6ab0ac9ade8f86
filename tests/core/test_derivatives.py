"""Derivatives: every mode, every transformation, and what is kept for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.test_util import check_grads

import bnjax
from tests import cases

CASES = [
    cases.Case("rows", (7, 3)),
    cases.Case("images", (3, 2, 2, 4)),
    cases.Case("channels first", (4, 3, 2), axis=1),
    cases.Case("weights", (5, 2, 3), mask="weights"),
    cases.Case("entries", (5, 2, 3), mask="entries"),
]


def transform(case, mask=None, activation=None, frozen=False, dtype=None):
    """A function of every argument that has a derivative, with all its outputs."""

    def run(x, scale, bias, residual, epsilon, mean, var):
        y, new = bnjax.batch_norm(
            x,
            scale,
            bias,
            bnjax.BatchStats(mean, var),
            axis=case.axis,
            momentum=0.6,
            epsilon=epsilon,
            mask=mask,
            activation=activation,
            residual=residual,
            use_running_average=frozen,
            dtype=dtype,
        )
        return y, new.mean, new.var

    return run


def arguments(case, dtype):
    x, scale, bias, dy, mask = case.arrays(dtype)
    features = case.feature_shape
    mean, var = np.full(features, 0.3, dtype), np.full(features, 1.7, dtype)
    return (x, scale, bias, dy, np.asarray(0.1, dtype), mean, var), mask


@pytest.mark.usefixtures("x64", "strict")
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize(
    "activation",
    [
        None,
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gelu", "sigmoid")),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            marks=[] if case.name in ("rows", "weights") else pytest.mark.slow,
            id=case.name,
        )
        for case in CASES
    ],
)
def test_both_modes_and_second_order(case, activation, frozen):
    args, mask = arguments(case, np.float64)
    # Eagerly, each operation of each derivative would be compiled by itself.
    run = jax.jit(transform(case, mask, activation, frozen))
    check_grads(run, args, 2, ("fwd", "rev"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64", "strict")
def test_second_order_through_an_activation():
    args, mask = arguments(CASES[0], np.float64)
    run = transform(CASES[0], mask, "gelu")
    check_grads(run, args, 2, ("fwd", "rev"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_an_activation_may_close_over_what_is_differentiated():
    case = CASES[0]
    args, _ = arguments(case, np.float64)

    def run(slope, *args):
        prelu = lambda z: jnp.where(z > 0, z, slope * z)  # noqa: E731
        return transform(case, activation=prelu)(*args)

    check_grads(run, (jnp.float64(0.3), *args), 2, ("fwd", "rev"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_hessian_is_symmetric_and_of_the_function():
    case = CASES[0]
    args, _ = arguments(case, np.float64)

    def loss(x):
        return jnp.sum(transform(case, activation="tanh")(x, *args[1:])[0] ** 3)

    forward_over_reverse = jax.jacfwd(jax.grad(loss))(args[0])
    reverse_over_reverse = jax.jacrev(jax.grad(loss))(args[0])
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, atol=1e-9)
    flat = np.asarray(forward_over_reverse).reshape(21, 21)
    np.testing.assert_allclose(flat, flat.T, atol=1e-9)


def kept_bytes(function, *args):
    vjp = jax.vjp(function, *args)[1]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", [None, "relu", "sigmoid", "gelu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_kept_for_the_backward_pass(dtype, activation, residual, frozen, jitted):
    shape, features = (16, 32, 32, 8), 8
    x = jnp.zeros(shape, dtype)
    stats = bnjax.BatchStats.init(features)

    def run(x, scale, bias, residual):
        return bnjax.batch_norm(
            x,
            scale,
            bias,
            stats,
            activation=activation,
            residual=residual,
            use_running_average=frozen,
        )

    run = jax.jit(run) if jitted else run
    vectors = 24 * features * 4
    allowed = x.nbytes * (1 + (residual and activation is not None)) + vectors
    ones = jnp.ones(features)
    assert kept_bytes(run, x, ones, ones, x + 1 if residual else None) <= allowed


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "gelu", "softplus"])
def test_derivative_of_an_activation_in_half_precision(activation):
    x = jnp.linspace(-1, 1, 65, dtype=jnp.bfloat16)[:, None]
    scale, bias = jnp.full(1, 5.0), jnp.zeros(1)

    def output(x, bias):
        y, _ = bnjax.batch_norm(
            x, scale, bias, bnjax.BatchStats.init(1), activation=activation
        )
        return y

    xhat = (x.astype(jnp.float32) - x.astype(jnp.float32).mean()) / x.astype(
        jnp.float32
    ).std()
    pick = jnp.zeros_like(x).at[-1].set(1)
    got = jax.vjp(output, x, bias)[1](pick)[1]
    want = jax.grad(getattr(jax.nn, activation))(5 * xhat[-1, 0])
    np.testing.assert_allclose(got[0], want, rtol=1e-3)


@cases.parametrize(CASES)
def test_vmap_over_models_and_batches(case):
    args, mask = arguments(case, np.float32)
    run = transform(case, mask, "sigmoid")
    batched = [np.stack([a, a * 1.25, a * 0.5]) for a in args]

    def loss(*args):
        y, mean, var = run(*args)
        return jnp.sum(y * args[3]) + mean.sum() + var.sum()

    gradients = jax.jit(jax.vmap(jax.grad(loss, tuple(range(7)))))(*batched)
    for i in range(3):
        alone = jax.jit(jax.grad(loss, tuple(range(7))))(*[a[i] for a in batched])
        for got, want in zip(gradients, alone, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_nested_vmap_and_jit_leak_nothing():
    case = CASES[1]
    args, _ = arguments(case, np.float32)
    run = transform(case, activation="relu")
    with jax.checking_leaks():
        outer = jax.vmap(jax.vmap(jax.jit(run), (0, *[None] * 6)), (0, *[None] * 6))
        y, _, _ = outer(np.stack([np.stack([args[0]] * 2)] * 3), *args[1:])
    assert y.shape == (3, 2, *case.shape)
    np.testing.assert_allclose(y[2, 1], run(*args)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_scan_carries_the_statistics():
    case = cases.Case("scan", (5, 8, 3))
    xs, scale, bias, _, _ = case.arrays()

    def step(stats, x):
        y, stats = bnjax.batch_norm(x, scale, bias, stats, momentum=0.9)
        return stats, y

    scanned, ys = jax.jit(lambda: jax.lax.scan(step, bnjax.BatchStats.init(3), xs))()
    stats = bnjax.BatchStats.init(3)
    for x, y in zip(xs, ys, strict=True):
        stats, want = step(stats, x)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned.mean, stats.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scanned.var, stats.var, rtol=1e-5)

    def loss(scale, unroll):
        stats = bnjax.BatchStats.init(3)
        if unroll:
            total = 0.0
            for x in xs:
                y, stats = bnjax.batch_norm(x, scale, bias, stats)
                total += jnp.sum(y**3)
            return total
        body = lambda stats, x: (  # noqa: E731
            bnjax.batch_norm(x, scale, bias, stats)[::-1]
        )
        return jnp.sum(jax.lax.scan(body, stats, xs)[1] ** 3)

    np.testing.assert_allclose(
        jax.grad(loss)(scale, False), jax.grad(loss)(scale, True), rtol=1e-4
    )


@pytest.mark.parametrize("policy", [None, "names", "everything"])
def test_checkpoint(policy):
    case = CASES[1]
    args, _ = arguments(case, np.float32)
    run = transform(case, activation="sigmoid")
    policies = {
        None: None,
        "names": checkpoint_policies.save_only_these_names(bnjax.CHECKPOINT_NAME),
        "everything": checkpoint_policies.everything_saveable,
    }

    def loss(function, *args):
        y, mean, _ = function(*args)
        return jnp.sum(y**2) + jnp.sum(mean)

    wanted = jax.grad(functools.partial(loss, run), (0, 1, 2, 3))(*args)
    remat = jax.checkpoint(run, policy=policies[policy])
    got = jax.jit(jax.grad(functools.partial(loss, remat), (0, 1, 2, 3)))(*args)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_named_statistics_are_not_computed_again():
    x = jnp.ones((4, 6, 3))

    def collectives(policy):
        def loss(x):
            # The cosine has to have the output again, as a next layer would.
            function = jax.checkpoint(
                lambda x: jnp.cos(
                    bnjax.batch_norm(
                        jnp.sin(x), None, None, bnjax.BatchStats.init(3), axis_name="d"
                    )[0]
                ).sum(),
                policy=policy,
            )
            return function(x)

        jaxpr = jax.make_jaxpr(
            jax.shard_map(
                jax.grad(loss),
                mesh=jax.make_mesh(
                    (4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,)
                ),
                in_specs=jax.P("d"),
                out_specs=jax.P("d"),
            )
        )(x)
        return str(jaxpr).count("psum_invariant[")

    names = checkpoint_policies.save_only_these_names(bnjax.CHECKPOINT_NAME)
    assert collectives(names) == 2
    assert collectives(None) == 3


def test_the_policy_keeps_what_batch_norm_is_given():
    # Layers of one shape would be one equation.
    x, kernels = jnp.ones((8, 4)), [jnp.ones((n, n + 1)) for n in (4, 5, 6)]

    def loss(kernels, x, policy=None, remat=True):
        def network(kernels, x):
            for kernel in kernels:
                x, _ = bnjax.normalize_batch(x @ kernel, activation="relu")
                x = jnp.sin(x)
            return x

        if remat:
            network = jax.checkpoint(network, policy=policy)
        return jnp.sum(network(kernels, x) ** 2)

    def counts(**options):
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(loss, **options)))(kernels, x)
        names = "dot_general[", "batch_norm_moments[", " sin "
        return [str(jaxpr).count(name) for name in names]

    products, sums, _ = counts(remat=False)
    assert counts(policy=bnjax.checkpoint_policy) == [products, sums, 5]
    assert counts()[:2] == [products + 3, sums + 3]


def test_moments_are_named():
    jaxpr = jax.make_jaxpr(lambda x: bnjax.moments(x).var)(jnp.ones((4, 3)))
    assert f"name={bnjax.CHECKPOINT_NAME}" in str(jaxpr)


def test_gradients_flow_through_the_statistics():
    x = jnp.array([[1.0, 2.0], [3.0, 7.0]])

    def running(x):
        _, stats = bnjax.batch_norm(
            x, None, None, bnjax.BatchStats.init(2), momentum=0.5, unbiased=False
        )
        return stats.mean.sum() + stats.var.sum()

    centered = x - x.mean(0)
    np.testing.assert_allclose(
        jax.grad(running)(x), 0.5 * (0.5 + 2 * centered / 2), rtol=1e-6
    )
