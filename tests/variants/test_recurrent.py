import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.linen import ImmutableBatchStatsError
from bnjax.variants.lstm_cells import (
    NORMS,
    RNN,
    BatchNormLSTMCell,
    NnxBatchNormLSTMCell,
    NnxRNN,
)
from bnjax.variants.recurrent import (
    LSTMCarry,
    LSTMParams,
    LSTMStats,
    batch_norm_at_step,
    batch_norm_lstm,
)

BATCH, TIME, INPUTS, FEATURES, MAX_STEPS = 6, 5, 3, 2, 4
EPSILON, MOMENTUM = 1e-3, 0.9
OPTIONS = {"epsilon": EPSILON, "momentum": MOMENTUM}
LENGTHS = np.array([5, 2, 4, 5, 3, 4])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def oracle(params, stats, x, *, train, lengths=None, unbiased=True):
    """The equations of Cooijmans et al., step by step; returns the outputs.

    `stats` maps "x", "h" and "c" to [mean, var], each (max_steps, features), and moves.
    """
    lengths = np.full(len(x), x.shape[1]) if lengths is None else lengths
    c = h = np.zeros((len(x), FEATURES))
    outputs = []
    for t in range(x.shape[1]):
        row, here = min(t, MAX_STEPS - 1), t < lengths

        def norm(a, name, scale, bias=0.0, row=row, here=here):
            mean, var = stats[name][0][row].copy(), stats[name][1][row].copy()
            if train:
                m, counted = here.sum(), a[here]
                mean, var = counted.mean(0), counted.var(0)
                factor = m / (m - 1) if unbiased else 1.0
                for kept, new in zip(stats[name], (mean, factor * var), strict=True):
                    kept[row] = MOMENTUM * kept[row] + (1 - MOMENTUM) * new
            return scale * (a - mean) / np.sqrt(var + EPSILON) + bias

        gates = norm(x[:, t] @ params["kernel_x"], "x", params["scale_x"])
        gates += norm(h @ params["kernel_h"], "h", params["scale_h"]) + params["bias"]
        i, f, g, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        out = norm(c, "c", params["scale_c"], params["bias_c"])
        h = sigmoid(o) * np.tanh(out)
        outputs.append(h)
    return np.stack(outputs, 1)


def data(seed=0, time=TIME):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(BATCH, time, INPUTS)) + rng.normal(size=(1, time, 1))
    return x, rng.normal(size=(BATCH, time, FEATURES))


def parameters(seed=7):
    rng = np.random.default_rng(seed)
    shapes = {
        "kernel_x": (INPUTS, 4 * FEATURES),
        "kernel_h": (FEATURES, 4 * FEATURES),
        "bias": (4 * FEATURES,),
        "scale_x": (4 * FEATURES,),
        "scale_h": (4 * FEATURES,),
        "scale_c": (FEATURES,),
        "bias_c": (FEATURES,),
    }
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def start():
    """Statistics of mean 0 and variance 1, for the oracle."""
    sizes = {"x": 4 * FEATURES, "h": 4 * FEATURES, "c": FEATURES}
    return {
        name: [np.zeros((MAX_STEPS, size)), np.ones((MAX_STEPS, size))]
        for name, size in sizes.items()
    }


def sequence(params, stats, x, lengths=None, **options):
    """The outputs over a whole sequence and the new statistics, by scan."""
    # In shard_map they vary over the devices, as the carry will.
    zeros = jnp.repeat(0 * x[:, 0, :1], FEATURES, axis=1)
    carry = LSTMCarry.init(zeros, zeros)
    if lengths is not None:
        carry = carry.with_lengths(lengths)

    def step(state, x):
        carry, stats = state
        carry, y, stats = batch_norm_lstm(params, stats, carry, x, **options)
        return (carry, stats), y

    (_, stats), y = jax.lax.scan(step, (carry, stats), jnp.swapaxes(x, 0, 1))
    return jnp.swapaxes(y, 0, 1), stats


def valid(lengths, time=TIME):
    return (np.arange(time) < np.asarray(lengths)[:, None])[..., None]


def gradients(params, stats, x, dy, lengths=None, **options):
    def loss(params, x):
        y, new = sequence(params, stats, x, lengths, **options)
        return jnp.sum(y * dy), (y, new)

    return jax.grad(loss, (0, 1), has_aux=True)(params, x)


def assert_stats(found, expected, **tolerance):
    for name, (mean, var) in expected.items():
        own = getattr(found, name)
        np.testing.assert_allclose(own.mean, mean, err_msg=name, **tolerance)
        np.testing.assert_allclose(own.var, var, err_msg=name, **tolerance)


@functools.lru_cache
def initial():
    """Float32 inputs and the variables of a linen network."""
    x = jnp.asarray(data()[0], "float32")
    return x, network(True).init(jax.random.key(0), x)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_one_two_and_a_hundred_updates(lengths, x64):
    """Longer by one than there are rows: the last two steps share one."""
    params = parameters()
    own = LSTMParams(**params)
    stats, expected = LSTMStats.init(MAX_STEPS, FEATURES, jnp.float64), start()
    train = jax.jit(functools.partial(sequence, **OPTIONS))
    for count in range(1, 101):
        x, _ = data(seed=count)
        y, stats = train(own, stats, x, lengths)
        y_of = oracle(params, expected, x, train=True, lengths=lengths)
        if count in (1, 2, 100):
            seen = valid(np.full(BATCH, TIME) if lengths is None else lengths)
            np.testing.assert_allclose(y * seen, y_of * seen, rtol=1e-9, atol=1e-11)
            assert_stats(stats, expected, rtol=1e-9, atol=1e-11)
    # Inference, also of a longer sequence than any before.
    x, _ = data(seed=0, time=9)
    y, same = jax.jit(functools.partial(sequence, use_running_average=True, **OPTIONS))(
        own, stats, x
    )
    y_of = oracle(params, expected, x, train=False)
    np.testing.assert_allclose(y, y_of, rtol=1e-9, atol=1e-11)
    assert_stats(same, expected, rtol=1e-9, atol=1e-11)


def test_gradients_are_those_of_finite_differences(x64):
    params, (x, dy), lengths = parameters(), data(), LENGTHS
    dy = dy * valid(lengths)
    stats = LSTMStats.init(MAX_STEPS, FEATURES, jnp.float64)
    run = jax.jit(functools.partial(gradients, **OPTIONS))
    (dparams, dx), _ = run(LSTMParams(**params), stats, x, dy, lengths)

    def loss(params, x):
        y = oracle(params, start(), x, train=True, lengths=lengths)
        return np.sum(y * dy)

    rng, h = np.random.default_rng(5), 1e-5
    for name in (*params, "x"):
        value = x if name == "x" else params[name]
        direction = rng.normal(size=value.shape)

        def along(t, name=name, value=value, direction=direction):
            moved = value + t * direction
            given = params if name == "x" else params | {name: moved}
            return loss(given, moved if name == "x" else x)

        slope = (along(h) - along(-h)) / (2 * h)
        own = np.sum((dx if name == "x" else getattr(dparams, name)) * direction)
        np.testing.assert_allclose(own, slope, rtol=1e-6, atol=1e-8, err_msg=name)


def test_no_gradient_flows_through_the_statistics(x64):
    """In a scan JAX would keep all rows of them for each step."""
    x, _ = data()

    def loss(x):
        stats = bnjax.BatchStats.init((3, INPUTS), jnp.float64)
        _, new = batch_norm_at_step(x, None, None, stats, 1)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    np.testing.assert_array_equal(jax.grad(loss)(x[:, 0]), 0)


def test_a_step_is_batch_norm_with_its_row():
    x = jnp.asarray(data()[0][:, 0], "float32")
    stats = bnjax.BatchStats(
        jnp.arange(9.0).reshape(3, 3), jnp.arange(1.0, 10).reshape(3, 3)
    )
    at_step = jax.jit(batch_norm_at_step, static_argnames="use_running_average")
    for step, row in ((0, 0), (1, 1), (2, 2), (3, 2), (100, 2)):
        own = bnjax.BatchStats(stats.mean[row], stats.var[row])
        expected, moved = jax.jit(bnjax.batch_norm)(x, None, None, own)
        y, new = at_step(x, None, None, stats, step)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        for kept, old, to in (
            (new.mean, stats.mean, moved.mean),
            (new.var, stats.var, moved.var),
        ):
            np.testing.assert_allclose(kept[row], to, rtol=1e-6)
            others = np.array([i for i in range(3) if i != row])
            np.testing.assert_array_equal(kept[others], old[others])
        inferred, same = at_step(x, None, None, stats, step, use_running_average=True)
        plain, _ = bnjax.batch_norm(x, None, None, own, use_running_average=True)
        np.testing.assert_allclose(inferred, plain, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_vmap_over_models(x64):
    both = [parameters(seed) for seed in (1, 2)]
    x, _ = data()
    stats = LSTMStats.init(MAX_STEPS, FEATURES, jnp.float64)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both)
    run = functools.partial(sequence, **OPTIONS)
    found = jax.jit(jax.vmap(run, (0, None, None)))(LSTMParams(**stacked), stats, x)
    for i, params in enumerate(both):
        expected = start()
        y = oracle(params, expected, x, train=True)
        np.testing.assert_allclose(found[0][i], y, rtol=1e-9, atol=1e-11)
        assert_stats(
            jax.tree.map(lambda leaf, i=i: leaf[i], found[1]), expected, rtol=1e-9
        )


@pytest.mark.slow
def test_eight_devices_are_one_batch():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(16, TIME, INPUTS)), "float32")
    dy = jnp.asarray(rng.normal(size=(16, TIME, FEATURES)), "float32")
    params = jax.tree.map(
        lambda a: jnp.asarray(a, "float32"), LSTMParams(**parameters())
    )
    stats, lengths = LSTMStats.init(MAX_STEPS, FEATURES), jnp.arange(16) % 3 + 3
    run = jax.jit(functools.partial(gradients, **OPTIONS))
    expected = run(params, stats, x, dy, lengths)
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    specs = (P(), P(), P("data"), P("data"), P("data"))
    out = (P(), P("data")), (P("data"), P())
    placed = jax.device_put(
        (params, stats, x, dy, lengths),
        tuple(NamedSharding(mesh, spec) for spec in specs),
    )
    shared = functools.partial(gradients, axis_name="data", **OPTIONS)
    mapped = jax.shard_map(shared, mesh=mesh, in_specs=specs, out_specs=out)
    by_map = jax.jit(mapped)(*placed)
    params, stats, x, _, lengths = placed
    by_jit = jax.jit(functools.partial(sequence, **OPTIONS))(params, stats, x, lengths)
    for found, of in ((by_map, expected), (by_jit, expected[1])):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5),
            found,
            of,
        )


def unpack(cell_params):
    """The parameters of a linen cell as LSTMParams."""
    kernels = (
        np.concatenate([cell_params[f"{side}{gate}"]["kernel"] for gate in "ifgo"], 1)
        for side in "ih"
    )
    bias = np.concatenate([cell_params[f"h{gate}"]["bias"] for gate in "ifgo"])
    scales = (cell_params[name]["scale"] for name in NORMS)
    return LSTMParams(*kernels, bias, *scales, cell_params["norm_c"]["bias"])


def network(train, cell=BatchNormLSTMCell, **options):
    own = {"max_steps": MAX_STEPS, "unbiased": True, **OPTIONS}
    return RNN(cell(FEATURES, use_running_average=not train, **own), **options)


@pytest.mark.slow
def test_the_linen_cell_is_the_function():
    x, variables = initial()
    params = unpack(variables["params"]["cell"])
    np.testing.assert_array_equal(params.scale_x, np.full(4 * FEATURES, 0.1, "float32"))
    plain = nn.RNN(nn.LSTMCell(FEATURES)).init(jax.random.key(0), x)["params"]
    kept = {k: v for k, v in variables["params"]["cell"].items() if k not in NORMS}
    jax.tree.map(np.testing.assert_array_equal, kept, plain["cell"])

    stats = LSTMStats.init(MAX_STEPS, FEATURES)
    train = jax.jit(
        lambda variables, x: network(True).apply(
            variables, x, seq_lengths=LENGTHS, mutable=["batch_stats"]
        )
    )
    own = jax.jit(functools.partial(sequence, **OPTIONS))
    for _ in range(3):
        y, updates = train(variables, x)
        variables = variables | updates
        expected, stats = own(params, stats, x, LENGTHS)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for name, each in zip(NORMS, stats, strict=True):
        found = variables["batch_stats"]["cell"][name]
        np.testing.assert_allclose(found["mean"], each.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["var"], each.var, rtol=1e-5)

    # Flax's RNN with its own filters, and time first.
    y = network(False).apply(variables, x)
    expected, _ = sequence(params, stats, x, use_running_average=True, **OPTIONS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    flax_rnn = nn.RNN(network(False).cell, variable_broadcast=("params", "batch_stats"))
    np.testing.assert_array_equal(flax_rnn.apply(variables, x), y)
    turned = network(False).apply(variables, jnp.swapaxes(x, 0, 1), time_major=True)
    np.testing.assert_allclose(jnp.swapaxes(turned, 0, 1), y, rtol=1e-6)


@pytest.mark.slow
def test_the_nnx_cell_is_the_function():
    x = jnp.asarray(data()[0], "float32")
    cell = NnxBatchNormLSTMCell(
        INPUTS,
        FEATURES,
        max_steps=MAX_STEPS,
        unbiased=True,
        rngs=nnx.Rngs(0),
        **OPTIONS,
    )
    rnn = NnxRNN(cell)
    norms = [getattr(cell, name) for name in NORMS]
    params = LSTMParams(
        cell.dense_i.kernel[...],
        cell.dense_h.kernel[...],
        cell.dense_h.bias[...],
        *(norm.scale[...] for norm in norms),
        cell.norm_c.bias[...],
    )
    stats = LSTMStats.init(MAX_STEPS, FEATURES)
    train = nnx.jit(lambda rnn, x: rnn(x, seq_lengths=LENGTHS))
    own = jax.jit(functools.partial(sequence, **OPTIONS))
    for _ in range(3):
        y = train(rnn, x)
        expected, stats = own(params, stats, x, LENGTHS)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    for norm, each in zip(norms, stats, strict=True):
        np.testing.assert_allclose(norm.mean[...], each.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(norm.var[...], each.var, rtol=1e-5)
    rnn.eval()
    y = nnx.RNN(cell)(x)
    expected, _ = sequence(params, stats, x, use_running_average=True, **OPTIONS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(norms[0].mean[...], cell.norm_x.mean[...])


@pytest.mark.slow
def test_gradients_through_both_frameworks():
    x, variables = initial()

    def loss(params):
        given = variables | {"params": params}
        y, _ = network(True).apply(given, x, mutable=["batch_stats"])
        return jnp.sum(y**2)

    expected = unpack(jax.jit(jax.grad(loss))(variables["params"])["cell"])
    own = {"max_steps": MAX_STEPS, **OPTIONS}
    cell = NnxBatchNormLSTMCell(INPUTS, FEATURES, rngs=nnx.Rngs(0), **own)
    params = unpack(variables["params"]["cell"])
    cell.dense_i.kernel[...], cell.dense_h.kernel[...] = params[:2]
    grads = nnx.jit(nnx.grad(lambda rnn: jnp.sum(rnn(x) ** 2)))(nnx.RNN(cell))["cell"]
    norms = [grads[name] for name in NORMS]
    found = LSTMParams(
        grads["dense_i"]["kernel"],
        grads["dense_h"]["kernel"],
        grads["dense_h"]["bias"],
        *(norm["scale"] for norm in norms),
        norms[-1]["bias"],
    )
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(
            getattr(found, name)[...], value, rtol=1e-4, atol=1e-5, err_msg=name
        )


def test_the_carry_at_the_end_goes_on():
    """Two windows one after the other are one sequence."""
    (_, variables), x = initial(), jnp.asarray(data(time=6)[0], "float32")
    model = network(False, return_carry=True)

    @jax.jit
    def run(x, carry, lengths=None):
        options = {"initial_carry": carry, "seq_lengths": lengths}
        return model.apply(variables, x, **options)

    carry = model.cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    _, whole = run(x, carry)
    carry, first = run(x[:, :3], carry)
    assert carry.step == 3
    _, second = run(x[:, 3:], carry)
    found = jnp.concatenate([first, second], 1)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)

    # Lengths count from where the window starts.
    lengths = jnp.array([3, 1, 2, 3, 3, 1])
    ended, _ = run(x[:, 3:], carry, lengths)
    np.testing.assert_allclose(ended.h[1], whole[1, 3], rtol=1e-5)
    np.testing.assert_array_equal(ended.length[0], 6)
    with pytest.raises(ValueError, match="the carry is at 6 steps"):
        run(x[:, 3:], ended)


def test_reversed_sequences_keep_their_padding_out():
    x, variables = initial()
    padded = np.where(valid(LENGTHS), x, np.float32(1e6))
    model = network(True, reverse=True, keep_order=True)
    run = jax.jit(
        lambda x: model.apply(
            variables, x, seq_lengths=LENGTHS, mutable=["batch_stats"]
        )
    )
    y, updates = run(x)
    y_padded, updates_padded = run(padded)
    seen = valid(LENGTHS)
    np.testing.assert_array_equal(y * seen, y_padded * seen)
    jax.tree.map(np.testing.assert_array_equal, updates, updates_padded)


def test_half_precision_keeps_float32_statistics():
    x = jnp.asarray(data()[0], "bfloat16")
    cell = BatchNormLSTMCell(
        FEATURES,
        max_steps=MAX_STEPS,
        dtype=jnp.bfloat16,
        use_running_average=False,
        unbiased=True,
        **OPTIONS,
    )
    _, variables = initial()
    train = jax.jit(functools.partial(RNN(cell).apply, mutable=["batch_stats"]))
    y, updates = train(variables, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float32"}
    params = jax.tree.map(np.asarray, unpack(variables["params"]["cell"]))
    params = {k: v.astype(float) for k, v in params._asdict().items()}
    expected = oracle(params, start(), np.asarray(x, float), train=True)
    np.testing.assert_allclose(np.asarray(y, float), expected, atol=0.02)


def test_one_row_of_statistics_is_shared_by_all_steps():
    x = jnp.asarray(data()[0], "float32")
    stats = bnjax.BatchStats.init((1, INPUTS))
    expected = bnjax.BatchStats.init(INPUTS)
    for t in range(TIME):
        _, stats = batch_norm_at_step(x[:, t], None, None, stats, t)
        _, expected = bnjax.batch_norm(x[:, t], None, None, expected)
    np.testing.assert_allclose(stats.mean[0], expected.mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var[0], expected.var, rtol=1e-6)


def test_initial_noise_comes_from_the_key():
    """What the paper does where the first inputs hardly vary."""
    x = jnp.ones((BATCH, TIME, INPUTS))
    model = network(True)
    cell = model.cell.clone(carry_init=nn.initializers.normal(0.1))
    model = RNN(cell)
    _, variables = initial()
    train = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    first, second = (train(variables, x, init_key=jax.random.key(i))[0] for i in (1, 2))
    assert np.abs(first - second).max() > 1e-3


def test_what_is_refused():
    x, variables = initial()
    with pytest.raises(ImmutableBatchStatsError, match="BatchNormLSTMCell cell"):
        network(True).apply(variables, x)
    cell = BatchNormLSTMCell(FEATURES, max_steps=3, use_running_average=True)
    with pytest.raises(ValueError, match="there are no statistics in 'batch_stats'"):
        nn.RNN(cell).apply(variables, x)
    with pytest.raises(ValueError, match=r"seq_lengths has shape \(2,\); expected \(6"):
        network(False).apply(variables, x, seq_lengths=jnp.ones(2, int))
    with pytest.raises(ValueError, match="max_steps=0; expected 1 or more"):
        BatchNormLSTMCell(FEATURES, max_steps=0, use_running_average=True).init(
            jax.random.key(0), (x[:, 0, :FEATURES],) * 2, x[:, 0]
        )
    with pytest.raises(TypeError, match="of type tuple; expected the LSTMCarry"):
        cell.apply(
            {k: v["cell"] for k, v in variables.items()},
            (x[:, 0, :FEATURES],) * 2,
            x[:, 0],
        )
    with pytest.raises(TypeError, match="max_steps"):
        BatchNormLSTMCell(FEATURES)
    stats = bnjax.BatchStats.init(INPUTS)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected \(max_steps, feat"):
        batch_norm_at_step(x[:, 0], None, None, stats, 0)
    rows = bnjax.BatchStats.init((2, INPUTS))
    with pytest.raises(ValueError, match="step=-1; expected a step, from 0 on"):
        batch_norm_at_step(x[:, 0], None, None, rows, -1)
    nnx_cell = NnxBatchNormLSTMCell(
        INPUTS, FEATURES, max_steps=3, use_running_average=None, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="2 features: use_running_average is None"):
        nnx.RNN(nnx_cell)(x)
