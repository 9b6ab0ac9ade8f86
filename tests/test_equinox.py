"""bnjax.equinox.BatchNorm: Equinox's layer, and what its users have reported."""

import inspect
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from tests import oracle

eqx = pytest.importorskip("equinox")

from bnjax.equinox import BatchNorm  # noqa: E402

AXES = {"in_axes": (0, None), "out_axes": (0, None)}


def data(shape=(7, 5, 3, 2), dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2 + rng.normal(size=(shape[1], 1, 1)) + 1
    return jnp.asarray(x, dtype)


def make(*args, scale=None, bias=None, kind=BatchNorm, **options):
    layer, state = eqx.nn.make_with_state(kind)(*args, **options)
    if scale is not None:
        params = lambda layer: (layer.weight, layer.bias)  # noqa: E731
        layer = eqx.tree_at(params, layer, (jnp.asarray(scale), jnp.asarray(bias)))
    return layer, state


def batched(layer, state, x, name="batch", **options):
    """The layer on a batch, each example by itself."""
    return jax.vmap(lambda x, s: layer(x, s, **options), axis_name=name, **AXES)(
        x, state
    )


run = eqx.filter_jit(batched)


def stats_of(layer, state):
    return state.get(layer.state_index)


def copy(state):
    """Equinox lets every state be used once."""
    return jax.tree.map(lambda leaf: leaf, state)


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_keywords_and_defaults_are_those_of_equinox():
    ours, theirs = (
        inspect.signature(kind.__init__).parameters
        for kind in (BatchNorm, eqx.nn.BatchNorm)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    assert set(ours) - set(theirs) == {"unbiased", "use_fast_variance", "activation"}
    for name in set(theirs) - {"self", "mode"}:
        assert ours[name].default == theirs[name].default, name
    # Theirs warns without a mode, and recommends "batch".
    assert ours["mode"].default == "batch"
    calls = [
        inspect.signature(kind.__call__).parameters
        for kind in (BatchNorm, eqx.nn.BatchNorm)
    ]
    assert set(calls[0]) - set(calls[1]) == {"mask", "residual", "update_stats"}
    layer, _ = make(5, "batch", channelwise_affine=False)
    assert layer.weight is None
    assert layer.bias is None
    assert isinstance(layer, eqx.nn.StatefulLayer)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equal_to_the_functional_call_to_the_last_bit(dtype, fast, inference):
    x, dy = data(dtype=dtype), data(seed=1)
    scale, bias = jnp.arange(1.0, 6), jnp.arange(5.0)
    options = {"use_fast_variance": fast, "momentum": 0.9, "unbiased": True}
    layer, state = make(5, "batch", scale=scale, bias=bias, **options)
    old = bnjax.BatchStats(jnp.full(5, 0.3, "float32"), jnp.full(5, 2.5, "float32"))
    state = state.set(layer.state_index, old)

    def ours(x, scale, bias):
        params = lambda layer: (layer.weight, layer.bias)  # noqa: E731
        given = eqx.tree_at(params, layer, (scale, bias))
        y, new = batched(given, copy(state), x, inference=inference)
        return y, stats_of(layer, new)

    def functional(x, scale, bias):
        def one(x):
            return bnjax.batch_norm(
                x,
                scale,
                bias,
                old,
                use_running_average=inference,
                axis=0,
                axis_name="batch",
                **options,
            )

        return jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)

    def results(function):
        y, vjp, new = jax.vjp(function, x, scale, bias, has_aux=True)
        return y, new, vjp(dy.astype(dtype))

    got, want = jax.jit(lambda: (results(ours), results(functional)))()
    assert got[0].dtype == dtype
    assert got[1].mean.dtype == jnp.float32
    assert_equal(got, want)


@pytest.mark.usefixtures("x64")
def test_values_gradients_and_statistics_of_the_paper():
    x, dy = data(dtype=jnp.float64), np.asarray(data(seed=1), np.float64)
    scale, bias = np.arange(1.0, 6), np.arange(5.0)
    options = {"momentum": 0.9, "eps": 1e-3, "unbiased": True}
    layer, state = make(5, "batch", scale=scale, bias=bias, **options)

    @eqx.filter_jit
    def step(layer, state, x):
        def loss(layer_and_x):
            layer, x = layer_and_x
            y, new = batched(layer, state, x)
            return jnp.vdot(y, dy), (y, new)

        return eqx.filter_grad(loss, has_aux=True)((layer, x))

    (gradient, dx), (y, _) = step(layer, copy(state), x)
    wanted = oracle.forward(x, scale, bias, axis=1, epsilon=1e-3)
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    exact = oracle.backward(x, scale, dy, axis=1, epsilon=1e-3)
    found = dx, gradient.weight, gradient.bias
    for got, want in zip(found, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)

    expected = bnjax.BatchStats(np.zeros(5), np.ones(5))
    for count in range(1, 101):
        batch = x * (1 + count % 3) + count % 2
        _, (_, state) = step(layer, state, batch)
        mean, var = oracle.running(expected, batch, axis=1, momentum=0.9)
        expected = bnjax.BatchStats(mean, var)
        if count in (1, 2, 100):
            assert stats_of(layer, state).mean.dtype == jnp.float64
            np.testing.assert_allclose(stats_of(layer, state).mean, mean, rtol=1e-12)
            np.testing.assert_allclose(stats_of(layer, state).var, var, rtol=1e-12)

    y, kept = run(eqx.nn.inference_mode(layer), copy(state), x)
    xhat = (x - mean[:, None, None]) / np.sqrt(var + 1e-3)[:, None, None]
    wanted = xhat * scale[:, None, None] + bias[:, None, None]
    np.testing.assert_allclose(y, wanted, rtol=1e-12, atol=1e-12)
    assert_equal(kept, state)


def test_equal_to_the_layer_of_equinox_in_training():
    x = data()
    layer, state = make(5, "batch", momentum=0.9)
    theirs, their_state = make(
        5, "batch", momentum=0.9, mode="batch", kind=eqx.nn.BatchNorm
    )
    for batch in (x, 2 * x + 1):
        y, state = run(layer, state, batch)
        wanted, their_state = run(theirs, their_state, batch)
        np.testing.assert_allclose(y, wanted, atol=2e-6)
        # What Equinox keeps is what PyTorch and this layer normalize by.
        mean, var = their_state.get(theirs.batch_state_index)
        np.testing.assert_allclose(stats_of(layer, state).mean, mean, rtol=1e-5)
        np.testing.assert_allclose(stats_of(layer, state).var, var, rtol=1e-5)
    # So its statistics load.
    state = state.set(layer.state_index, bnjax.BatchStats(mean, var))
    y, _ = run(layer, state, x, inference=True)
    xhat = (x - mean[:, None, None]) / jnp.sqrt(var + 1e-5)[:, None, None]
    np.testing.assert_allclose(y, xhat, atol=1e-5)


def test_inference_at_the_start():
    """Without a step, and after one.

    https://github.com/patrick-kidger/equinox/issues/955 (1e4 times too large) and
    https://github.com/patrick-kidger/equinox/issues/1010 (divided by zero; since then,
    a variance that starts at 1 is divided as one that starts at 0).
    """
    x = data()
    layer, state = make(5, "batch")
    y, state = run(layer, state, x, inference=True)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
    _, state = run(layer, state, x)
    y, _ = run(layer, state, x, inference=True)
    mean, var = oracle.running(bnjax.BatchStats.init(5), x, axis=1, unbiased=False)
    mean, var = (value[:, None, None] for value in (mean, var))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)

    old, old_state = make(5, "batch", mode="ema", kind=eqx.nn.BatchNorm)
    wrong, _ = run(old, old_state, x, inference=True)
    assert np.abs(wrong).max() > 100 * np.abs(x).max()
    theirs, their_state = make(5, "batch", mode="batch", kind=eqx.nn.BatchNorm)
    _, their_state = run(theirs, their_state, x)
    wrong, _ = run(theirs, their_state, x, inference=True)
    assert np.abs(wrong).max() < 0.2 * np.abs(y).max()


@pytest.mark.parametrize("names", [("outer", "inner"), ["inner", "outer"]])
def test_nested_vmaps_are_one_batch(names):
    """https://github.com/patrick-kidger/equinox/issues/49, 592, 707 and 935."""
    x = data((6, 5, 2, 2))
    layer, state = make(5, names, momentum=0.9)

    @eqx.filter_jit
    def nested(layer, state, x):
        inner = jax.vmap(layer, axis_name="inner", **AXES)
        return jax.vmap(inner, axis_name="outer", **AXES)(x, state)

    y, state = nested(layer, state, x.reshape(2, 3, 5, 2, 2))
    flat, flat_state = make(5, "batch", momentum=0.9)
    wanted, flat_state = run(flat, flat_state, x)
    np.testing.assert_allclose(y.reshape(x.shape), wanted, atol=1e-6)
    got, want = stats_of(layer, state), stats_of(flat, flat_state)
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-6)
    np.testing.assert_allclose(got.var, want.var, rtol=1e-6)


def repeated(layer):
    """In a loop, as layers that are stacked are called."""

    def call(x, state):
        def step(carry, _):
            return layer(*carry), None

        return jax.lax.scan(step, (x, state), None, length=1)[0]

    return call


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("wrap", [jax.checkpoint, jax.jit, repeated])
def test_the_derivative_knows_the_axis_in_every_transformation(wrap, inside):
    """JAX takes the derivative of these once the vmap has returned."""
    x, dy = data(), data(seed=1)
    layer, state = make(5, "batch")

    def gradient(wrap, inside):
        def loss(x):
            one = wrap(lambda x, state: layer(x, state)) if inside else layer  # noqa: PLW0108
            batch = jax.vmap(one, axis_name="batch", **AXES)
            y, _ = (batch if inside else wrap(batch))(x, copy(state))
            return jnp.vdot(y, dy)

        return jax.jit(jax.grad(loss))(x)

    wanted = oracle.backward(x, np.ones(5), dy, axis=1)[0]
    np.testing.assert_allclose(gradient(wrap, inside), wanted, atol=1e-5)


def test_the_inner_vmap_alone():
    """Each index of the outer one, such as a member of an ensemble, has its own."""
    x = data((6, 5, 2, 2)).reshape(2, 3, 5, 2, 2)
    layer, state = make(5, "inner")

    @eqx.filter_jit
    def nested(layer, state, x):
        inner = jax.vmap(layer, axis_name="inner", **AXES)
        return jax.vmap(inner, (0, None))(x, state)

    y, new = nested(layer, copy(state), x)
    assert stats_of(layer, new).mean.shape == (2, 5)
    for index in range(2):
        wanted, alone = run(layer, copy(state), x[index], name="inner")
        np.testing.assert_allclose(y[index], wanted, atol=1e-6)
        var = stats_of(layer, alone).var
        np.testing.assert_allclose(stats_of(layer, new).var[index], var, rtol=1e-6)


def test_half_precision():
    """Statistics in float32: https://github.com/patrick-kidger/equinox/pull/876."""
    x = jnp.asarray(data() * 300, jnp.float16)
    layer, state = make(5, "batch", momentum=0.999, dtype=jnp.float16)
    assert layer.weight.dtype == jnp.float16
    y, new = run(layer, copy(state), x)
    assert y.dtype == jnp.float16
    wanted = oracle.forward(x, np.ones(5), np.zeros(5), axis=1)
    np.testing.assert_allclose(y, wanted, atol=4e-3)
    for _ in range(9):
        _, new = run(layer, new, x)
    stats = stats_of(layer, new)
    mean, var, _ = oracle.moments(x, axis=1)
    weight = 0.999**10
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    np.testing.assert_allclose(stats.mean, (1 - weight) * mean.ravel(), rtol=1e-4)
    want = weight + (1 - weight) * var.ravel()
    np.testing.assert_allclose(stats.var, want, rtol=1e-4)

    theirs, their_state = make(
        5, "batch", mode="batch", dtype=jnp.float16, kind=eqx.nn.BatchNorm
    )
    wrong, their_state = run(theirs, their_state, x)
    assert np.isinf(their_state.get(theirs.batch_state_index)[1]).any()
    assert not np.allclose(wrong, wanted, atol=0.1)


def test_exact_where_the_mean_is_large():
    x = data() + 1e5
    layer, state = make(5, "batch")
    y, _ = run(layer, copy(state), x)
    wanted = oracle.forward(x, np.ones(5), np.zeros(5), axis=1)
    np.testing.assert_allclose(y, wanted, atol=1e-4)
    layer, state = make(5, "batch", use_fast_variance=True)
    y, _ = run(layer, state, x)
    assert np.abs(y - wanted).max() > 0.1


class Network(eqx.Module):
    """A layer in a layer, beside one that has an inference flag too."""

    layers: eqx.nn.Sequential
    head: eqx.nn.Linear

    def __init__(self, key):
        norm = BatchNorm(5, "batch", momentum=0.5, activation="relu")
        self.layers = eqx.nn.Sequential([norm, eqx.nn.Dropout(0.5)])
        self.head = eqx.nn.Linear(5, 3, key=key)

    def __call__(self, x, state, key):
        x, state = self.layers(x, state, key=key)
        return self.head(x.mean((1, 2))), state


def test_inference_mode_and_training_of_a_network():
    x, key = data(), jax.random.key(0)
    model, state = eqx.nn.make_with_state(Network)(key)

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            one = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
            y, new = one(x, state, jax.random.split(key, 7))
            return jnp.mean((y - x[:, :3, 0, 0]) ** 2), new

        (value, new), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        moved = jax.tree.map(lambda g: -0.1 * g, gradient)
        return value, eqx.apply_updates(model, moved), new

    losses = []
    for _ in range(4):
        value, model, state = step(model, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    norm = model.layers[0]
    np.testing.assert_allclose(
        stats_of(norm, state).mean, np.mean(x, (0, 2, 3)) * (1 - 0.5**4), rtol=1e-5
    )
    evaluation = eqx.nn.inference_mode(model)
    assert evaluation.layers[0].inference is True
    y, kept = eqx.filter_jit(evaluation)(x[0], copy(state), None)
    assert_equal(kept, state)
    alone, _ = eqx.filter_jit(norm)(x[0], copy(state), inference=True)
    np.testing.assert_allclose(y, model.head(alone.mean((1, 2))), rtol=1e-5)
    again = eqx.nn.inference_mode(evaluation, value=False)
    assert eqx.tree_equal(again, model)
    # The call wins over the attribute, both ways.
    fixed = evaluation.layers[0]
    trained = run(fixed, copy(state), x, inference=False)
    assert_equal(trained, run(norm, copy(state), x))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("update_stats", [None, False, True])
def test_statistics_used_and_updated_are_decided_apart(update_stats, inference):
    x = data()
    layer, state = make(5, "batch", momentum=0.9)
    old = bnjax.BatchStats(jnp.full(5, 0.3, "float32"), jnp.full(5, 2.5, "float32"))
    state = state.set(layer.state_index, old)
    plain, _ = run(layer, copy(state), x, inference=inference)
    y, new = run(layer, copy(state), x, inference=inference, update_stats=update_stats)
    np.testing.assert_allclose(y, plain, atol=1e-6)
    moves = (not inference) if update_stats is None else update_stats
    mean, var = oracle.running(old, x, axis=1, momentum=0.9, unbiased=False)
    wanted = bnjax.BatchStats(mean, var) if moves else old
    np.testing.assert_allclose(stats_of(layer, new).mean, wanted.mean, rtol=1e-5)
    np.testing.assert_allclose(stats_of(layer, new).var, wanted.var, rtol=1e-5)


def test_a_mask_an_activation_and_a_residual():
    x, residual = data(), data(seed=1)
    x = x.at[2].set(jnp.nan).at[5].set(1e30)
    keep = np.array([1, 1, 0, 1, 1, 0, 1], bool)
    layer, state = make(5, "batch", momentum=0.9, activation="tanh")

    @eqx.filter_jit
    def masked(layer, state, x, mask, residual):
        def one(x, mask, residual, state):
            return layer(x, state, mask=mask, residual=residual)

        return jax.vmap(one, (0, 0, 0, None), (0, None), axis_name="batch")(
            x, mask, residual, state
        )

    y, new = masked(layer, state, x, jnp.asarray(keep), residual)
    real = np.asarray(x)[keep]
    wanted = oracle.forward(real, np.ones(5), np.zeros(5), axis=1)
    wanted = np.tanh(wanted + np.asarray(residual)[keep])
    np.testing.assert_allclose(np.asarray(y)[keep], wanted, atol=1e-5)
    old = bnjax.BatchStats.init(5)
    mean, var = oracle.running(old, real, axis=1, momentum=0.9, unbiased=False)
    np.testing.assert_allclose(stats_of(layer, new).mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats_of(layer, new).var, var, rtol=1e-5)


def test_devices_and_their_examples_are_one_batch():
    x = data((24, 5, 2, 2))
    layer, state = make(5, ("data", "batch"), momentum=0.9)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def shard(x, state):
        return jax.vmap(layer, axis_name="batch", **AXES)(x, state)

    specs = {"in_specs": (P("data"), P()), "out_specs": (P("data"), P())}
    # JAX sums over the axis of a vmap in a shard_map without its checks alone.
    specs["check_vma"] = False
    y, new = jax.jit(jax.shard_map(shard, mesh=mesh, **specs))(x, copy(state))
    flat, flat_state = make(5, "batch", momentum=0.9)
    wanted, flat_state = run(flat, flat_state, x)
    np.testing.assert_allclose(y, wanted, atol=1e-6)
    np.testing.assert_allclose(
        stats_of(layer, new).var, stats_of(flat, flat_state).var, rtol=1e-6
    )
    # Under jit with sharded arrays the batch is the global one.
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, P("data")))
    flat, flat_state = make(5, "batch", momentum=0.9)
    y, _ = run(flat, flat_state, sharded)
    np.testing.assert_allclose(y, wanted, atol=1e-6)


def test_leaves_are_arrays_and_the_inference_flag():
    """https://github.com/patrick-kidger/equinox/issues/1074: not the axis name."""
    layer, _ = make(5, ["outer", "inner"], activation=jnp.tanh)
    assert sum(not eqx.is_array(leaf) for leaf in jax.tree.leaves(layer)) == 1
    assert layer.axis_name == ("outer", "inner")
    placed = jax.device_put(layer, jax.devices()[1])
    assert placed.weight.devices() == {jax.devices()[1]}


def test_the_state_is_one_type_in_a_loop(x64):
    """Statistics of float32 stay so for float64 inputs."""
    x = data(dtype=jnp.float64)
    layer, state = make(5, "batch", momentum=0.9, dtype=jnp.float32)

    @jax.jit
    def loop(state):
        step = lambda state, x: run(layer, state, x)[::-1]  # noqa: E731
        return jax.lax.scan(step, state, jnp.stack([x, 2 * x, 3 * x]))

    new, _ = loop(state)
    assert stats_of(layer, new).mean.dtype == jnp.float32
    expected = bnjax.BatchStats.init(5)
    for batch in (x, 2 * x, 3 * x):
        expected = bnjax.BatchStats(
            *oracle.running(expected, batch, axis=1, momentum=0.9, unbiased=False)
        )
    np.testing.assert_allclose(stats_of(layer, new).mean, expected.mean, rtol=1e-6)


def test_layer_and_state_are_saved_and_loaded():
    layer, state = make(5, "batch", scale=jnp.arange(5.0), bias=jnp.ones(5))
    _, state = run(layer, state, data())
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (layer, state))
    file.seek(0)
    loaded = eqx.tree_deserialise_leaves(file, make(5, "batch"))
    assert eqx.tree_equal(loaded[0].weight, layer.weight)
    assert_equal(stats_of(loaded[0], loaded[1]), stats_of(layer, state))


def test_complex_inputs():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(16, 3)) + 1j * rng.normal(size=(16, 3)) + 2
    layer, state = make(3, "batch", momentum=0.0, dtype=jnp.complex64)
    y, state = run(layer, state, jnp.asarray(z, jnp.complex64))
    mean, var = z.mean(0), z.var(0)
    np.testing.assert_allclose(y, (z - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(stats_of(layer, state).mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats_of(layer, state).var, var, rtol=1e-5)
    layer, state = make(3, "batch", channelwise_affine=False)
    with pytest.raises(ValueError, match="different structures/shapes/dtypes"):
        run(layer, state, jnp.asarray(z, jnp.complex64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ema"}, r"mode='ema'; expected 'batch'.*issues/659.*update_stats"),
        ({"axis_name": None}, "axis_name=None; expected the axis_name of the jax.vmap"),
    ],
)
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=f"^BatchNorm layer of 5 features: {message}"):
        BatchNorm(**{"input_size": 5, "axis_name": "batch", **options})


def test_errors_name_the_layer():
    x = data()
    layer, state = make(5, "batch")
    start = "^BatchNorm layer of 5 features: "
    with pytest.raises(NameError, match=f"{start}axis_name='batch' is not bound here"):
        layer(x[0], copy(state))
    with pytest.raises(ValueError, match=rf"{start}.* has shape \(5,\); expected \(3,"):
        run(layer, copy(state), x[:, :3])
    with pytest.raises(ValueError, match=f"{start}one value per channel in training"):
        run(layer, copy(state), x[:1, :, 0, 0])
    with pytest.raises(TypeError, match=f"{start}x has dtype int32"):
        run(layer, copy(state), x.astype(int))
    with pytest.raises(TypeError, match=f"{start}inference is a traced.*filter_jit"):
        jax.jit(lambda layer, state: layer(x[0], state))(layer, state)
