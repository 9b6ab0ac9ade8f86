import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import bnjax
from bnjax.variants.domains import domain_batch_norm, domain_moments
from tests import oracle

DOMAINS = 3
MIXED = np.array([2, 0, 0, 2, 1, 0, 2, 2, 1])
LAST = PartitionSpec()


def data(shape=(9, 3, 5), seed=0, dtype="float64", shared=False):
    """Inputs, scale, bias and the statistics of three domains."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * rng.uniform(1, 3, shape[-1]) + 2
    own = shape[-1:] if shared else (DOMAINS, shape[-1])
    scale, bias = rng.normal(size=(2, *own))
    mean = rng.normal(size=(DOMAINS, shape[-1]))
    var = rng.uniform(0.5, 2, (DOMAINS, shape[-1]))
    x, scale, bias, mean, var = (
        np.asarray(a, dtype) for a in (x, scale, bias, mean, var)
    )
    return x, scale, bias, bnjax.BatchStats(jnp.asarray(mean), jnp.asarray(var))


def of(params, d):
    return params[d] if params.ndim == 2 else params


def stats_of(stats, d):
    return bnjax.BatchStats(stats.mean[d], stats.var[d])


@functools.partial(jax.jit, static_argnames="options")
def run(x, scale, bias, stats, domain, mask=None, options=()):
    return domain_batch_norm(x, scale, bias, stats, domain, mask=mask, **dict(options))


def expected(x, scale, bias, stats, domain, mask=None, **options):
    """Each domain's examples by themselves, by the oracle of the plain layer."""
    domain = np.broadcast_to(domain, len(x))
    y, mean, var = np.zeros(x.shape), np.array(stats.mean), np.array(stats.var)
    for d in set(domain.tolist()):
        rows = domain == d
        own = None if mask is None else np.broadcast_to(mask, x.shape)[rows]
        y[rows] = oracle.forward(x[rows], of(scale, d), of(bias, d), mask=own)
        old = stats_of(stats, d)
        mean[d], var[d] = oracle.running(old, x[rows], mask=own, **options)
    return y, bnjax.BatchStats(mean, var)


def check(found, wanted, **tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("domain", [0, 2, MIXED], ids=["first", "last", "mixed"])
def test_training(domain, shared, x64):
    x, scale, bias, stats = data(shared=shared)
    wanted = expected(x, scale, bias, stats, domain)
    check(run(x, scale, bias, stats, jnp.asarray(domain)), wanted, rtol=1e-11)


@pytest.mark.parametrize("domain", [2, MIXED], ids=["one", "mixed"])
def test_an_index_that_is_known(domain):
    """The same program, the index being a constant of it."""
    x, scale, bias, stats = data(dtype="float32")
    found = jax.jit(lambda x: domain_batch_norm(x, scale, bias, stats, domain))(x)
    check(found, run(x, scale, bias, stats, domain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("domain", [1, MIXED], ids=["one", "mixed"])
def test_inference(domain, shared, x64):
    x, scale, bias, stats = data(shared=shared)
    options = (("use_running_average", True),)
    y, same = run(x, scale, bias, stats, jnp.asarray(domain), options=options)
    each = np.broadcast_to(domain, len(x))
    for i, d in enumerate(each):
        own = np.sqrt(stats.var[d] + 1e-5)
        wanted = of(scale, d) * (x[i] - stats.mean[d]) / own + of(bias, d)
        np.testing.assert_allclose(y[i], wanted, rtol=1e-11)
    check(same, stats, rtol=0)


def test_statistics_after_1_2_and_100_updates(x64):
    """Each step one domain, chosen by a traced index in one program."""
    rng = np.random.default_rng(3)
    xs = rng.normal(size=(100, 7, 5)) + np.arange(100).reshape(-1, 1, 1) % 4
    order = rng.integers(DOMAINS, size=100)
    start = bnjax.BatchStats.init((DOMAINS, 5), jnp.float64)

    def step(stats, inputs):
        _, stats = domain_batch_norm(inputs[0], None, None, stats, inputs[1])
        return stats, stats

    _, found = jax.jit(lambda: jax.lax.scan(step, start, (xs, order)))()
    stats, ones, zeros = start, np.ones(5), np.zeros(5)
    for i, (x, d) in enumerate(zip(xs, order, strict=True)):
        _, stats = expected(x, ones, zeros, stats, int(d))
        if i + 1 in (1, 2, 100):
            at = jax.tree.map(lambda leaf, i=i: leaf[i], found)
            check(at, stats, rtol=1e-11, atol=1e-13)
    assert set(order[:2].tolist()) < set(range(DOMAINS))  # one is as it was


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("domain", [2, MIXED], ids=["one", "mixed"])
def test_gradients(domain, shared, x64):
    x, scale, bias, stats = data(shared=shared)
    dy = data(seed=1)[0]

    def loss(x, scale, bias):
        return jnp.sum(run(x, scale, bias, stats, jnp.asarray(domain))[0] * dy)

    dx, dscale, dbias = np.zeros(x.shape), np.zeros(scale.shape), np.zeros(bias.shape)
    each = np.broadcast_to(domain, len(x))
    for d in set(each.tolist()):
        rows = each == d
        dx[rows], one, two = oracle.backward(x[rows], of(scale, d), dy[rows])
        of(dscale, d)[...] += one
        of(dbias, d)[...] += two
    found = jax.grad(loss, (0, 1, 2))(x, scale, bias)
    check(found, (dx, dscale, dbias), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mixed", [False, True])
def test_one_domain_is_the_plain_layer(mixed):
    x, scale, bias, stats = data(dtype="float32")
    one = stats_of(stats, slice(1))
    old, domain = stats_of(stats, 0), jnp.zeros(len(x) if mixed else (), int)
    options = {"activation": "relu", "residual": data(seed=2, dtype="float32")[0]}

    @functools.partial(jax.jit, static_argnames="inference")
    def both(x, inference):
        given = options | {"use_running_average": inference}
        found = domain_batch_norm(x, scale[:1], bias[:1], one, domain, **given)
        return found, bnjax.batch_norm(x, scale[0], bias[0], old, **given)

    for inference in (False, True):
        (y, new), wanted = both(x, inference)
        exact = {"rtol": 1e-5, "atol": 1e-6} if mixed else {"rtol": 0}
        check((y, stats_of(new, 0)), wanted, **exact)


@pytest.mark.parametrize("weights", [False, True])
def test_masks(weights, x64):
    x, scale, bias, stats = data()
    rng = np.random.default_rng(4)
    mask = rng.random((len(x), 3, 1)) < 0.8
    mask = mask * rng.integers(1, 4, mask.shape) if weights else mask
    counted = np.broadcast_to(mask > 0, x.shape)
    given = jnp.where(counted, x, jnp.nan)
    for domain in (1, MIXED):
        y, new = run(given, scale, bias, stats, jnp.asarray(domain), jnp.asarray(mask))
        wanted, running = expected(x, scale, bias, stats, domain, mask)
        np.testing.assert_allclose(y[counted], wanted[counted], rtol=1e-10, atol=1e-12)
        check(new, running, rtol=1e-11)


def test_options_of_a_mixed_batch(x64):
    """Feature axes, activation, residual, epsilon; a domain of one value."""
    x, scale, bias, stats = data((4, 3, 5))
    residual = data((4, 3, 5), seed=5)[0]
    domain = np.array([0, 2, 0, 0])
    options = {"epsilon": 0.1, "activation": "tanh", "momentum": 0.7, "unbiased": False}

    @jax.jit
    def both(x, residual):
        turned = {"axis": 1, "residual": residual.swapaxes(1, 2)}
        found = domain_batch_norm(
            x.swapaxes(1, 2), scale, bias, stats, domain, **turned, **options
        )
        rows = domain == 0
        wanted = bnjax.batch_norm(
            x[rows],
            scale[0],
            bias[0],
            stats_of(stats, 0),
            residual=residual[rows],
            **options,
        )
        return found, wanted

    (y, new), (wanted, running) = both(x, residual)
    np.testing.assert_allclose(
        y[domain == 0], wanted.swapaxes(1, 2), rtol=1e-11, atol=1e-13
    )
    check(stats_of(new, 0), running, rtol=1e-11)
    check(stats_of(new, 1), stats_of(stats, 1), rtol=0)
    y, new = run(x[:, 0], scale, bias, stats, domain)
    np.testing.assert_allclose(y[1], bias[2], rtol=1e-12)
    check(stats_of(new, 2), stats_of(stats, 2), rtol=0)


@pytest.mark.parametrize("domain", [1, MIXED], ids=["one", "mixed"])
def test_statistics_that_are_not_to_move(domain):
    x, scale, bias, stats = data(dtype="float32")
    options = (("update_stats", False),)
    y, same = run(x, scale, bias, stats, jnp.asarray(domain), options=options)
    check(same, stats, rtol=0)
    check(y, run(x, scale, bias, stats, jnp.asarray(domain))[0], rtol=1e-6, atol=1e-6)


def test_half_precision(strict):
    x, scale, bias, stats = data(dtype="float32")
    x = jnp.asarray(x, "bfloat16")
    wide = np.asarray(x, "float64")
    for domain in (1, MIXED):
        y, new = run(x, scale, bias, stats, jnp.asarray(domain))
        assert (y.dtype, new.mean.dtype) == (jnp.bfloat16, jnp.float32)
        wanted, running = expected(wide, scale, bias, stats, domain)
        check(new, running, rtol=1e-5, atol=1e-6)
        options = (("use_running_average", True),)
        z, _ = run(x, scale, bias, stats, jnp.asarray(domain), options=options)
        assert (z.dtype, z.shape) == (y.dtype, y.shape)
        np.testing.assert_allclose(
            np.asarray(y, "float32"), wanted, rtol=5e-3, atol=2e-2
        )


def test_eight_devices_and_vmap():
    x, scale, bias, stats = data((24, 3, 5), dtype="float32")
    domains = np.random.default_rng(5).integers(DOMAINS, size=24)
    mesh, along = jax.make_mesh((8,), ("data",)), PartitionSpec("data")
    sharding = NamedSharding(mesh, along)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}

    def call(x, domain, **options):
        return domain_batch_norm(x, scale, bias, stats, domain, **options)

    shared = functools.partial(call, axis_name="data")
    for domain in (np.int32(2), domains):
        split = along if domain.ndim else LAST
        wanted = expected(x, scale, bias, stats, domain)
        arrays = jax.device_put((x, domain), (sharding, NamedSharding(mesh, split)))
        check(jax.jit(call)(*arrays), wanted, **tolerance)
        by_shard = jax.shard_map(
            shared, mesh=mesh, in_specs=(along, split), out_specs=(along, LAST)
        )
        check(jax.jit(by_shard)(*arrays), wanted, **tolerance)
        parts = domain.reshape(8, 3) if domain.ndim else domain
        ax = 0 if domain.ndim else None
        by_vmap = jax.vmap(shared, (0, ax), (0, None), axis_name="data")
        y, new = jax.jit(by_vmap)(x.reshape(8, 3, 3, 5), parts)
        check((y.reshape(x.shape), new), wanted, **tolerance)
    # Each entry of a vmap with a domain of its own.
    each = np.arange(8) % DOMAINS
    y, new = jax.jit(jax.vmap(call))(x.reshape(8, 3, 3, 5), each)
    for i, d in enumerate(each):
        at = jax.tree.map(lambda leaf, i=i: leaf[i], (y, new))
        check(at, expected(x[3 * i : 3 * i + 3], scale, bias, stats, d), **tolerance)


@pytest.mark.parametrize("training", [True, False])
def test_a_traced_index_out_of_range_is_nan(training):
    x, _, _, stats = data(dtype="float32")
    options = (("use_running_average", not training),)
    for outside in (3, -1):
        y, new = run(x, None, None, stats, outside, options=options)
        assert np.isnan(y).all()
        check(new, stats, rtol=0)
        domain = np.where(np.arange(len(x)) == 4, outside, MIXED)
        y, new = run(x, None, None, stats, domain, options=options)
        assert np.isnan(y[4]).all()
        assert np.isfinite(np.delete(y, 4, axis=0)).all()
        assert np.isfinite(new.mean).all()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"domain": 3}, ValueError, "domain=3 is out of range; expected 0 to 2"),
        ({"domain": -1}, ValueError, "domain=-1 is out of range"),
        ({"domain": 1.0}, TypeError, "domain has dtype float64; expected integers"),
        ({"domain": np.zeros(8, int)}, ValueError, r"domain has shape \(8,\) for x"),
        ({"domain": MIXED, "axis": (0, -1)}, ValueError, "domain has shape"),
        (
            {"stats": bnjax.BatchStats.init(5)},
            ValueError,
            r"batch_stats.mean has shape",
        ),
        ({"scale": np.ones((2, 5))}, ValueError, r"scale has shape \(2, 5\); expected"),
        ({"momentum": 2.0}, ValueError, "momentum=2.0"),
    ],
)
def test_what_is_refused(changes, error, message):
    x, scale, bias, stats = data(dtype="float32")
    given = {"scale": scale, "stats": stats, "domain": 0} | changes
    scale, stats, domain = (given.pop(name) for name in ("scale", "stats", "domain"))
    if "axis" in given:
        stats, scale, bias = bnjax.BatchStats.init((3, 9, 5)), None, None
    with pytest.raises(error, match=message):
        domain_batch_norm(x, scale, bias, stats, domain, **given)


def test_a_traced_flag_and_one_value_are_refused():
    x, scale, bias, stats = data(dtype="float32")
    with pytest.raises(TypeError, match="update_stats is a traced value"):
        jax.jit(
            lambda flag: domain_batch_norm(x, scale, bias, stats, 0, update_stats=flag)
        )(True)
    with pytest.raises(ValueError, match="one value per channel"):
        domain_batch_norm(x[:1, 0], scale, bias, stats, 0)


def test_moments_of_a_domain_without_examples():
    x = data((9, 5), dtype="float32")[0]
    moments = jax.jit(functools.partial(domain_moments, domains=DOMAINS))
    found = moments(x, np.minimum(MIXED, 1))
    np.testing.assert_array_equal(found.count[:, 0], [3, 6, 0])
    found = moments(x, 1)
    np.testing.assert_array_equal(found.count[:, 0], [0, 9, 0])
    np.testing.assert_allclose(found.var[1], x.var(0), rtol=1e-5)
