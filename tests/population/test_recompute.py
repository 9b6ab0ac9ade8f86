"""Against a float64 NumPy pass over the same batches; what is chosen and kept."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax.linen
from bnjax.models import MLP, Normalization
from bnjax.population import recompute_batch_stats
from tests import networks
from tests.population import oracle

METHODS = ["paper", "pooled"]
NORMS = {"bnjax": bnjax.linen.BatchNorm, "flax": nn.BatchNorm}


@functools.cache
def classifier(norm):
    """A network, its variables, the call of a training step, and uneven batches."""
    model = networks.Classifier(NORMS[norm])
    x, _ = networks.images(44)
    if norm == "bnjax":  # Flax's variance would lose digits to the mean.
        x = x + 3
    variables = jax.jit(model.init)(jax.random.key(0), x[:2])
    return model, variables, train_call(model), np.split(x, [16, 32])


def train_call(model):
    def call(variables, batch):
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    return call


def expected(variables, batches, method):
    inputs = [oracle.classifier_inputs(variables["params"], x) for x in batches]
    return oracle.populations(inputs, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
def test_convolutions_in_float32(norm, method):
    _, variables, call, batches = classifier(norm)
    before = jax.tree.map(np.array, variables)
    found = recompute_batch_stats(call, variables, batches, method=method)
    oracle.assert_relative(found, expected(variables, batches, method), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {"float32"}


@functools.cache
def dense(dtype):
    """A network of dense layers in one precision, its variables, call and batches."""
    model = MLP((6, 5), 3, weight_std=0.5, param_dtype=dtype)
    batches = np.random.default_rng(1).normal(1, 3, (10, 24, 4)).astype(dtype)
    init = functools.partial(model.init, train=False)
    variables = jax.jit(init)(jax.random.key(0), batches[0])
    stats = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), variables["batch_stats"])
    return {**variables, "batch_stats": stats}, train_call(model), batches


def check_dense(dtype, method, tolerance):
    variables, call, batches = dense(dtype)
    found = recompute_batch_stats(call, variables, batches, method=method)
    inputs = [oracle.mlp_inputs(variables["params"], x) for x in batches]
    oracle.assert_relative(found, oracle.populations(inputs, method), tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_dense_layers_in_float32(method, strict):
    check_dense(np.float32, method, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_dense_layers_in_float64(method, x64):
    check_dense(np.float64, method, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_batches(method):
    _, variables, call, batches = classifier("bnjax")
    one = recompute_batch_stats(call, variables, batches, method=method)
    other = recompute_batch_stats(call, variables, batches[::-1], method=method)
    oracle.assert_relative(one, oracle.as_float64(other), 1e-6)


def test_a_mean_of_a_million_deviations():
    model = bnjax.linen.BatchNorm(use_running_average=False)
    x = 1e6 + np.random.default_rng(0).normal(size=(4, 50, 3))
    x = x.astype(np.float32)
    variables = model.init(jax.random.key(0), x[0])

    def call(variables, batch):
        return model.apply(variables, batch, mutable=["batch_stats"])

    found = recompute_batch_stats(call, variables, x)
    want = oracle.population(x, "paper")
    np.testing.assert_allclose(found["mean"], want["mean"], rtol=1e-7)
    np.testing.assert_allclose(found["var"], want["var"], rtol=1e-5)


def test_neither_momentum_nor_old_statistics_matter():
    _, variables, call, batches = classifier("bnjax")
    stale = jax.tree.map(lambda leaf: leaf * 0 + 100, variables["batch_stats"])
    found = recompute_batch_stats(
        call, {**variables, "batch_stats": stale}, iter(batches), num_batches=2
    )
    oracle.assert_relative(found, expected(variables, batches[:2], "paper"), 1e-6)


def test_the_result_normalizes_in_inference():
    model, variables, call, batches = classifier("bnjax")
    frozen = flax.core.freeze(variables)
    new = recompute_batch_stats(call, frozen, batches[:1], method="paper")
    assert jax.tree.structure(new) == jax.tree.structure(frozen["batch_stats"])
    logits = model.apply({**variables, "batch_stats": new}, batches[0], train=False)
    params = oracle.as_float64(variables["params"])
    inputs = oracle.classifier_inputs(variables["params"], batches[0])
    factor = batches[0].size / 3 / (batches[0].size / 3 - 1)
    assert factor > 1
    x = np.float64(batches[0])
    for i in range(2):
        x = oracle.conv3x3(x, params[f"Conv_{i}"]["kernel"])
        at = inputs[f"BatchNorm_{i}"]
        stats = oracle.population([at], "paper")
        norm = params[f"BatchNorm_{i}"]
        x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
        x = np.maximum(x * norm["scale"] + norm["bias"], 0)
    want = x.mean((1, 2)) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


class Masked(nn.Module):
    """A layer that is given a mask; scale and bias are those it starts with."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, mask, train=True):
        norm = self.norm(use_running_average=not train, name="bn")
        return norm(x, mask=mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
def test_masks(norm, method):
    rng = np.random.default_rng(2)
    xs = rng.normal(5, 2, (4, 12, 3, 2)).astype(np.float32)
    masks = (
        rng.random((4, 12, 1, 1)) < np.array([0.9, 0.5, 0.3, 0.2])[:, None, None, None]
    )
    masks[:, :2] = True
    model = Masked(NORMS[norm])
    variables = jax.jit(model.init)(jax.random.key(0), xs[0], masks[0])

    def call(variables, batch):
        return model.apply(variables, *batch, mutable=["batch_stats"])

    batches = list(zip(xs, masks, strict=True))
    found = recompute_batch_stats(call, variables, batches, method=method)
    want = {"bn": oracle.population(xs, method, masks)}
    oracle.assert_relative(found, want, 1e-6)


def test_weights_count_as_repeats_and_hidden_values_may_be_nan():
    x = np.float32([[1.0], [2.0], [6.0], [np.nan]])
    mask = np.float32([[2], [1], [1], [0]])
    model = Masked(bnjax.linen.BatchNorm)
    variables = jax.jit(model.init)(jax.random.key(0), x, mask)

    def call(variables, batch):
        return model.apply(variables, *batch, mutable=["batch_stats"])

    new = recompute_batch_stats(call, variables, [(x, mask)])["bn"]
    np.testing.assert_allclose(new["mean"], [2.5])
    np.testing.assert_allclose(new["var"], [17 / 3], rtol=1e-6)
    nothing = (x, mask * 0)
    again = recompute_batch_stats(call, variables, [nothing, (x, mask), nothing])
    np.testing.assert_array_equal(again["bn"]["var"], new["var"])
    # A channel that is hidden everywhere keeps what it had.
    x, mask = np.repeat(x, 2, 1), np.repeat(mask, 2, 1) * [1, 0]
    two = model.init(jax.random.key(0), x, mask)
    new = recompute_batch_stats(call, two, [(x, np.float32(mask))], method="pooled")
    np.testing.assert_allclose(new["bn"]["mean"], [2.5, 0])
    np.testing.assert_allclose(new["bn"]["var"], [17 / 3, 1], rtol=1e-6)


class Blocks(nn.Module):
    """Layers in blocks, one of them frozen."""

    frozen: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        for name in ("stem", "block_1", "block_2"):
            frozen = self.frozen and name == "block_1"
            x = Block(name=name)(x, not train or frozen)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average):
        return bnjax.linen.BatchNorm(name="bn")(nn.Dense(3)(x), use_running_average)


@functools.cache
def blocks():
    """Variables, call, batches and the statistics of every layer."""
    x = np.random.default_rng(0).normal(4, 2, (2, 8, 3)).astype(np.float32)
    variables = jax.jit(Blocks().init)(jax.random.key(0), x[0])
    call = train_call(Blocks())
    return variables, call, x, recompute_batch_stats(call, variables, x)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("block_*", {"block_1", "block_2"}),
        (["stem/bn", "block_2/*"], {"stem", "block_2"}),
        (lambda name: name.startswith("stem"), {"stem"}),
        (None, {"stem", "block_1", "block_2"}),
    ],
)
def test_chosen_layers(layers, names):
    variables, call, x, everything = blocks()
    found = recompute_batch_stats(call, variables, x, layers=layers)
    for name, stats in found.items():
        source = everything if name in names else variables["batch_stats"]
        jax.tree.map(np.testing.assert_array_equal, stats, source[name])


def test_a_frozen_layer_keeps_its_statistics():
    x = np.random.default_rng(0).normal(4, 2, (2, 8, 3)).astype(np.float32)
    model = Blocks(frozen=True)
    variables = jax.jit(model.init)(jax.random.key(0), x[0])
    old = variables["batch_stats"]
    new = recompute_batch_stats(train_call(model), variables, x)
    for name in old:
        kept = np.array_equal(new[name]["bn"]["mean"], old[name]["bn"]["mean"])
        assert kept == (name == "block_1")


def test_virtual_batches_join():
    """Layers below normalize by groups; the statistics are those of the whole batch."""
    model = MLP((4,), 3, 0.5, Normalization(virtual_batch_size=4))
    x = np.random.default_rng(1).normal(1, 3, (3, 8, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), x[0], train=False)
    found = recompute_batch_stats(train_call(model), variables, x, method="pooled")
    inputs = [oracle.mlp_inputs(variables["params"], each) for each in x]
    oracle.assert_relative(found, oracle.populations(inputs, "pooled"), 1e-6)


def test_a_layer_called_twice_joins_its_inputs():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            bn = bnjax.linen.BatchNorm(use_running_average=not train, name="bn")
            return bn(x) + bn(10 * x[:3])[:1]

    x = np.random.default_rng(1).normal(1, 3, (3, 8, 4)).astype(np.float32)
    variables = Twice().init(jax.random.key(0), x[0])
    for method in METHODS:
        found = recompute_batch_stats(train_call(Twice()), variables, x, method=method)
        joined = [np.concatenate([each, 10 * each[:3]]) for each in x]
        want = {"bn": oracle.population(joined, method)}
        oracle.assert_relative(found, want, 1e-6)


def test_a_network_is_compiled_once():
    _, variables, call, batches = classifier("bnjax")
    traced = []

    def counted(variables, batch):
        traced.append(jnp.shape(batch))
        return call(variables, batch)

    for _ in range(2):
        recompute_batch_stats(counted, variables, batches, layers="BatchNorm_1")
    assert traced == [batches[0].shape, batches[2].shape]
