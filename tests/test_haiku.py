"""bnjax.haiku.BatchNorm: Haiku's module, and what its users have reported."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from tests import oracle

hk = pytest.importorskip("haiku")

import jmp  # noqa: E402 - Haiku needs it

from bnjax.haiku import BatchNorm  # noqa: E402

MEAN, VAR = "batch_norm/~/mean_ema", "batch_norm/~/var_ema"


def data(shape=(7, 3, 5), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2 + rng.normal(size=shape[-1]) + 1
    return jnp.asarray(x, dtype)


def pair_of(kind=BatchNorm, scale=True, offset=True, decay_rate=0.9, **options):
    """A module as Haiku's pair of functions."""

    @hk.transform_with_state
    def forward(x, is_training=True, **call):
        return kind(scale, offset, decay_rate, **options)(x, is_training, **call)

    return forward


@functools.cache
def network(kind=BatchNorm, **options):
    """Its `init` and its `apply`, which is compiled once for all tests."""
    options = {k: list(v) if k == "axis" else v for k, v in options.items()}
    pair = pair_of(kind, **options)
    flags = ("is_training", "test_local_stats", "update_stats")

    @functools.partial(jax.jit, static_argnames=flags)
    def apply(params, state, x, is_training, **call):
        return pair.apply(params, state, None, x, is_training, **call)

    def init(x, is_training=True):
        params, state = pair.init(None, x, is_training)
        return dict(params), dict(state)

    return init, apply


def averages(state, mean=MEAN, var=VAR):
    return (np.squeeze(state[name]["average"]) for name in (mean, var))


def debiased(batches, decay, unbiased=False, axis=-1):
    """What Haiku's moving averages are, in float64, from the formula."""
    weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    found = [oracle.moments(x, axis) for x in batches]
    factors = [n / (n - 1) if unbiased else 1.0 for _, _, n in found]
    mean = sum(w * m for w, (m, _, _) in zip(weights, found, strict=True))
    var = sum(
        w * v * f for w, (_, v, _), f in zip(weights, found, factors, strict=True)
    )
    return np.squeeze(mean / sum(weights)), np.squeeze(var / sum(weights))


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def assert_close(got, want, rtol=1e-5, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want
    )


def test_keywords_and_defaults_are_those_of_haiku():
    ours, theirs = (
        inspect.signature(kind.__init__).parameters
        for kind in (BatchNorm, hk.BatchNorm)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    assert set(ours) - set(theirs) == {"unbiased", "use_fast_variance", "activation"}
    assert all(ours[name].default == theirs[name].default for name in theirs)
    ours, theirs = (
        inspect.signature(kind.__call__).parameters
        for kind in (BatchNorm, hk.BatchNorm)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    assert set(ours) - set(theirs) == {"mask", "residual", "update_stats"}
    assert all(ours[name].default == theirs[name].default for name in theirs)


@pytest.mark.parametrize(
    "options", [{}, {"data_format": "channels_first"}, {"axis": (0,)}], ids=str
)
def test_equal_to_haikus_module(options):
    """Output, parameters and state after three steps, and in inference."""
    x = data((6, 3, 5)) / 3
    (init, apply), (their_init, their_apply) = (
        network(kind, eps=1e-3, **options) for kind in (BatchNorm, hk.BatchNorm)
    )
    (params, state), (their_params, their_state) = init(x), their_init(x)
    assert_equal(params, their_params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), their_state)
    params = jax.tree.map(lambda leaf: leaf + 0.5, params)
    for batch in (x, 2 * x, x + 1):
        y, state = apply(params, state, batch, True)
        wanted, their_state = their_apply(params, their_state, batch, True)
        assert_close((y, state), (wanted, their_state))
    # The state of one is that of the other.
    y, kept = apply(params, their_state, x, False)
    assert_close(y, their_apply(params, state, x, False)[0])
    assert_equal(kept, their_state)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_to_the_functional_calls_to_the_last_bit(dtype, fast):
    x, dy = data(dtype=dtype), data(seed=1, dtype=dtype)
    options = {"use_fast_variance": fast, "unbiased": True}
    init, _ = network(**options)
    pair = pair_of(**options)
    params, state = init(x)
    for name in (MEAN, VAR):
        hidden = jnp.full_like(state[name]["hidden"], 0.3)
        state[name] = {**state[name], "hidden": hidden, "average": hidden * 3}
    hidden = bnjax.BatchStats(*(state[n]["hidden"][0, 0] for n in (MEAN, VAR)))
    average = bnjax.BatchStats(*(state[n]["average"][0, 0] for n in (MEAN, VAR)))
    scale, offset = (params["batch_norm"][n][0, 0] for n in ("scale", "offset"))

    def results(function):
        y, vjp, new = jax.vjp(function, x, has_aux=True)
        return y, vjp(dy), new

    def training(x):
        y, new = pair.apply(params, state, None, x, True)
        return y, [new[name]["hidden"][0, 0] for name in (MEAN, VAR)]

    def by_batch(x):
        origin = average.mean if fast else None
        y, batch = bnjax.normalize_batch(x, scale, offset, origin=origin)
        new = bnjax.update_batch_stats(hidden, batch, momentum=0.9)
        return y, [new.mean, new.var]

    def inference(x):
        return pair.apply(params, state, None, x, False)

    def by_average(x):
        options = {"use_running_average": True}
        return bnjax.batch_norm(x, scale, offset, average, **options)[0], state

    # Outside jit, where XLA cannot fuse the two in two ways.
    for ours, functional in ((training, by_batch), (inference, by_average)):
        got, want = results(ours), results(functional)
        assert got[0].dtype == dtype
        assert_equal(got, want)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("unbiased", [False, True])
def test_values_gradients_and_statistics_of_the_paper(unbiased):
    x, dy = data(dtype=jnp.float64), np.asarray(data(seed=1), np.float64)
    init, apply = network(eps=1e-3, unbiased=unbiased)
    params, state = init(x)
    scale, offset = np.arange(1.0, 6), np.arange(5.0)
    params["batch_norm"] = {"scale": scale[None, None], "offset": offset[None, None]}

    def loss(params, x):
        return jnp.vdot(apply(params, state, x, True)[0], dy)

    gradient, dx = jax.grad(loss, (0, 1))(params, x)
    exact = oracle.backward(x, scale, dy, epsilon=1e-3)
    found = dx, *(gradient["batch_norm"][n].squeeze() for n in ("scale", "offset"))
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)

    batches = []
    for count in range(1, 101):
        batches.append(x * (1 + count % 3) + count % 2)
        y, state = apply(params, state, batches[-1], True)
        if count in (1, 2, 100):
            wanted = debiased(batches, 0.9, unbiased)
            for got, want in zip(averages(state), wanted, strict=True):
                assert got.dtype == np.float64
                np.testing.assert_allclose(got, want, rtol=1e-12)
    wanted = oracle.forward(batches[-1], scale, offset, epsilon=1e-3)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    mean, var = averages(state)
    y, kept = apply(params, state, x, False)
    wanted = (x - mean) / np.sqrt(var + 1e-3) * scale + offset
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    assert_equal(kept, state)


def test_inference_at_the_start():
    """https://github.com/google-deepmind/dm-haiku/issues/361 and 579.

    Haiku's average starts at the statistics of the batch that `init` was given, whose
    variance may be 0, and does not start at all where that was not training.
    """
    x, ones = data(), jnp.ones((7, 3, 5))
    init, apply = network()
    for params, state in (init(ones), init(ones, False), init(ones[:1, :1])):
        assert state[VAR]["counter"] == 0
        y, _ = apply(params, state, x, False)
        np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    # After one step, the statistics are those of the batch.
    _, state = apply(params, state, x, True)
    y, _ = apply(params, state, x, False)
    wanted = oracle.forward(x, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(y, wanted, atol=1e-5)

    their_init, their_apply = network(hk.BatchNorm)
    wrong, _ = their_apply(*their_init(ones), x, False)
    assert np.abs(wrong).max() > 100 * np.abs(x).max()
    with pytest.raises(ValueError, match="No value for 'average'"):
        their_init(ones, False)


def test_half_precision():
    """https://github.com/google-deepmind/dm-haiku/issues/396: NaN in bfloat16.

    A decay rate of 0.999 is 1 there, and the average 0 / (1 - 1).
    """
    x = data(dtype=jnp.bfloat16)
    init, apply = network(decay_rate=0.999)
    params, state = init(x)
    assert params["batch_norm"]["scale"].dtype == jnp.bfloat16
    for _ in range(10):
        y, state = apply(params, state, x, True)
    assert y.dtype == jnp.bfloat16
    assert state[MEAN]["hidden"].dtype == state[VAR]["average"].dtype == jnp.float32
    for got, want in zip(averages(state), debiased([x], 0.999), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4)
    wanted = oracle.forward(x, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(y.astype(float), wanted, atol=0.02)

    their_init, their_apply = network(hk.BatchNorm, decay_rate=0.999)
    params, state = their_init(x)
    _, state = their_apply(params, state, x, True)
    assert np.isnan(state[MEAN]["average"]).all()
    # Squares of float16 overflow.
    large = jnp.asarray(data() * 300, jnp.float16)
    y, _ = apply(*init(large), large, True)
    wanted = oracle.forward(large, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(y, wanted, atol=4e-3)
    y, _ = their_apply(*their_init(large), large, True)
    assert not np.allclose(y, wanted, atol=0.1)


def test_a_policy_of_mixed_precision_rounds_no_statistics():
    x = data()
    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")

    class Net(hk.Module):
        def __call__(self, x):
            return BatchNorm(True, True, 0.999, name="bn")(x, True)

    def train(module):
        @hk.transform_with_state
        def pair(x):
            return Net()(x)

        step = jax.jit(lambda params, state: pair.apply(params, state, None, x))
        with hk.mixed_precision.push_policy(module, policy):
            params, state = pair.init(None, x)
            for _ in range(10):
                y, state = step(params, state)
        return params, state, y

    for module in (Net, BatchNorm):
        params, state, y = train(module)
        assert y.dtype == params["net/bn"]["scale"].dtype == jnp.float32
        seen = [x.astype(jnp.bfloat16)] * 10
        got = averages(state, "net/bn/~/mean_ema", "net/bn/~/var_ema")
        for value, want in zip(got, debiased(seen, 0.999), strict=True):
            assert value.dtype == np.float32
            np.testing.assert_allclose(value, want, rtol=1e-4)


def test_no_negative_variance_where_the_mean_is_large():
    x = data() / 2 + 1e4
    init, apply = network()
    y, state = apply(*init(x), x, True)
    wanted = oracle.forward(x, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    for got, want in zip(averages(state), debiased([x], 0.9), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    their_init, their_apply = network(hk.BatchNorm)
    wrong, _ = their_apply(*their_init(x), x, True)
    assert not np.allclose(wrong, wanted, atol=0.05)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_batch_that_vmap_maps(inside, nested):
    """https://github.com/google-deepmind/dm-haiku/issues/786, 788 and 790.

    Haiku's needs the axis at `init` too, and says that it does not support this.
    """
    x = data((6, 3, 5))
    axes = {"cross_replica_axis": ("outer", "inner") if nested else "inner"}
    init, apply = network()
    params, state = init(x)
    wanted, wanted_state = apply(params, state, x, True)

    def forward(x):
        return BatchNorm(True, True, 0.9, **axes)(x, True)

    if inside:
        # hk.vmap, in the function that Haiku transforms.
        def mapped(x):
            inner = hk.vmap(forward, axis_name="inner", split_rng=False)
            if not nested:
                return inner(x)
            return hk.vmap(inner, axis_name="outer", split_rng=False)(x)

        pair = hk.transform_with_state(mapped)
        run = lambda x: pair.apply(params, state, None, x)  # noqa: E731
    else:
        pair = hk.transform_with_state(forward)
        run = lambda x: pair.apply(params, state, None, x)  # noqa: E731
        for name in ["inner", "outer"][: 1 + nested]:
            run = jax.vmap(run, axis_name=name, out_axes=(0, None))
    batches = x.reshape((2, 3, 1, 3, 5) if nested else (3, 2, 3, 5))
    # Where no axis is bound, `init` needs none.
    assert_equal(pair.init(None, batches if inside else x), (params, state))
    y, new = jax.jit(run)(batches)
    np.testing.assert_allclose(y.reshape(x.shape), wanted, atol=1e-5)
    assert_close(new, wanted_state, atol=1e-6)


def test_devices_share_statistics():
    x = data((16, 3, 5))
    init, apply = network()
    params, state = init(x)
    wanted, wanted_state = apply(params, state, x, True)
    shared = pair_of(cross_replica_axis="data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": P("data"), "out_specs": (P("data"), P())}
    run = jax.shard_map(
        lambda x: shared.apply(params, state, None, x), mesh=mesh, **specs
    )
    assert_close(jax.jit(run)(x), (wanted, wanted_state), atol=1e-6)

    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    grouped = pair_of(cross_replica_axis="data", cross_replica_axis_index_groups=groups)
    assert_equal(grouped.init(None, x[:2]), (params, state))
    y, _ = jax.pmap(lambda x: grouped.apply(params, state, None, x), axis_name="data")(
        x.reshape(8, 2, 3, 5)
    )
    for half in (0, 8):
        part = x[half : half + 8]
        found = y.reshape(x.shape)[half : half + 8]
        np.testing.assert_allclose(
            found, oracle.forward(part, np.ones(5), np.zeros(5)), atol=1e-5
        )


@pytest.mark.parametrize("axis", [(0, -2), (1, 0)])
def test_axes_may_be_negative_and_in_any_order(axis):
    """Haiku's parameters then have the shape (1, 3, 5)."""
    x = data()
    init, apply = network(axis=axis)
    params, state = init(x)
    assert params["batch_norm"]["scale"].shape == (1, 1, 5)
    y, _ = apply(params, state, x, True)
    wanted = oracle.forward(x, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(5,), (), (1, 1, 5), (7, 1, 5), (7, 1, 1), (7, 3, 5)]
)
def test_scale_and_offset_of_the_call(shape):
    """Of a channel, or of an example, as in conditional normalization."""
    x, residual = data(), data(seed=3)
    rng = np.random.default_rng(2)
    scale, offset = rng.normal(size=(2, *shape)).astype(np.float32)
    init, apply = network(scale=False, offset=False, activation="tanh")
    params, state = init(x)
    assert params == {}
    call = {"scale": scale, "offset": offset, "residual": residual}
    xhat = oracle.forward(x, np.ones(5), np.zeros(5))
    y, state = apply(params, state, x, True, **call)
    np.testing.assert_allclose(y, np.tanh(scale * xhat + offset + residual), atol=1e-5)
    y, _ = apply(params, state, x, False, **call)
    np.testing.assert_allclose(y, np.tanh(scale * xhat + offset + residual), atol=1e-4)


@pytest.mark.parametrize("update_stats", [None, False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("is_training", [False, True])
def test_statistics_used_and_updated_are_decided_apart(
    is_training, local, update_stats
):
    first, x = data(), data(seed=1) * 2
    init, apply = network()
    params, state = init(x)
    _, state = apply(params, state, first, True)
    mean, var = averages(state)
    call = {"test_local_stats": local, "update_stats": update_stats}
    y, new = apply(params, state, x, is_training, **call)
    by_batch = oracle.forward(x, np.ones(5), np.zeros(5))
    by_average = (x - mean) / np.sqrt(var + 1e-5)
    wanted = by_batch if is_training or local else by_average
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    if is_training if update_stats is None else update_stats:
        wanted = debiased([first, x], 0.9)
        assert new[MEAN]["counter"] == 2
        for got, want in zip(averages(new), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5)
    else:
        assert_equal(new, state)


def test_what_a_mask_hides_changes_no_statistics():
    x = data().at[2].set(jnp.nan)
    mask = np.ones((7, 3, 5), bool)
    mask[2] = False
    init, apply = network()
    params, state = init(data())
    y, state = apply(params, state, x, True, mask=mask)
    real = np.asarray(x)[mask.all((1, 2))]
    wanted = oracle.forward(real, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(np.asarray(y)[mask.all((1, 2))], wanted, atol=1e-5)
    # Then a batch in which a channel has nothing, and one that has all.
    mask[..., 3] = False
    other, last = np.asarray(data(seed=1)), np.asarray(data(seed=2))
    _, state = apply(params, state, jnp.asarray(other), True, mask=mask)
    before = np.squeeze(state[MEAN]["average"])[3]
    np.testing.assert_allclose(before, real[..., 3].mean(), rtol=1e-5)
    _, state = apply(params, state, jnp.asarray(last), True)
    mean, var = averages(state)
    kept = other[mask.all((1, 2)) | (np.arange(7) != 2)]
    wanted_mean, wanted_var = debiased([real, kept, last], 0.9)
    # That channel has seen its own average in place of what was hidden.
    old, new = (oracle.moments(b) for b in (real, last))
    weights = np.array([0.9**2 + 0.9, 1]) / (0.9**2 + 0.9 + 1)
    wanted_mean[3] = weights @ [old[0].ravel()[3], new[0].ravel()[3]]
    wanted_var[3] = weights @ [old[1].ravel()[3], new[1].ravel()[3]]
    np.testing.assert_allclose(mean, wanted_mean, rtol=1e-5)
    np.testing.assert_allclose(var, wanted_var, rtol=1e-5)


@pytest.mark.parametrize("decay_rate", [0.0, 1.0])
def test_the_ends_of_the_decay_rate(decay_rate):
    x = data()
    init, apply = network(decay_rate=decay_rate)
    params, state = init(x)
    for batch in (x * 3, x):
        _, state = apply(params, state, batch, True)
    wanted = (np.zeros(5), np.ones(5)) if decay_rate else debiased([x], 0.0)
    for got, want in zip(averages(state), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_the_state_is_one_type_in_a_loop(x64):
    """A state of float32 stays so for float64 inputs."""
    init, _ = network()
    x = data()
    params, state = init(x)
    pair = pair_of()

    @jax.jit
    def loop(state, xs):
        step = lambda state, x: pair.apply(params, state, None, x)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, xs)

    xs = jnp.stack([x, 2 * x, 3 * x]).astype(jnp.float64)
    new, _ = loop(state, xs)
    assert new[MEAN]["average"].dtype == jnp.float32
    for got, want in zip(averages(new), debiased(list(xs), 0.9), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.usefixtures("strict")
def test_nothing_is_promoted_in_silence():
    x = data(dtype=jnp.bfloat16)
    init, apply = network(scale=False, offset=False)
    params, state = init(x)
    scale = jnp.ones((7, 1, 5), jnp.bfloat16)
    y, state = apply(params, state, x, True, scale=scale, residual=x)
    assert y.dtype == jnp.bfloat16
    apply(params, state, x, False, update_stats=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"create_scale": False, "scale_init": jnp.ones}, "scale_init without create"),
        (
            {"create_offset": False, "offset_init": jnp.ones},
            "offset_init without creat",
        ),
        ({"cross_replica_axis_index_groups": [[0]]}, "groups without cross_replica_ax"),
    ],
)
def test_what_the_constructor_refuses(options, message):
    options = {
        "create_scale": True,
        "create_offset": True,
        "decay_rate": 0.9,
        **options,
    }
    with pytest.raises(ValueError, match=f"^BatchNorm module batch_norm: .*{message}"):
        hk.transform_with_state(lambda: BatchNorm(**options)).init(None)


MISTAKES = {
    "scale twice": (ValueError, {}, {"scale": np.ones(5)}, "with create_scale=True"),
    "every axis": (ValueError, {"axis": (0, 1, 2)}, {}, "over every axis of x"),
    "axis": (ValueError, {"axis": (0, 3)}, {}, "out of range"),
    "scale": (
        ValueError,
        {"scale": False},
        {"scale": np.ones(4)},
        r"scale has shape \(4,\); expected a shape that broadcasts to x of shape \(7,",
    ),
    "activation": (ValueError, {"activation": "rleu"}, {}, "Did you mean 'relu'"),
    "axis name": (NameError, {"cross_replica_axis": "dta"}, {}, "axis_name='dta' is"),
    "decay rate": (ValueError, {"decay_rate": 1.5}, {}, r"momentum=1.5; expected"),
    "mask": (ValueError, {}, {"mask": np.ones(7, bool)}, r"mask has shape \(7,\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_module(mistake):
    kind, options, call, message = MISTAKES[mistake]
    x = data()
    params, state = network()[0](x)
    _, apply = network(**options)
    with pytest.raises(kind, match=f"^BatchNorm module batch_norm: .*{message}"):
        apply(params, state, x, True, **call)


def test_a_traced_flag_and_one_value():
    x = data()
    params, state = network()[0](x)
    pair = pair_of()
    with pytest.raises(TypeError, match=r"^BatchNorm module .*is_training is a traced"):
        jax.jit(lambda t: pair.apply(params, state, None, x, t))(True)
    with pytest.raises(ValueError, match=r"^BatchNorm module .*one value per channel"):
        pair.apply(params, state, None, x[:1, :1], True)
