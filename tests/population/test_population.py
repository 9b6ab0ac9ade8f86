"""Against a float64 NumPy pass over the same batches; what is chosen, kept, refused."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
from bnjax.models import MLP, Normalization
from bnjax.population import Total, choose_layers, recompute_batch_stats
from tests import networks
from tests.models.helpers import random_variables
from tests.population.networks import (
    METHODS,
    as_float64,
    assert_relative,
    classifier_inputs,
    mlp,
    mlp_population,
    population,
    populations,
    train_call,
)
from tests.training import numpy_network

NORMS = {"bnjax": bnjax.linen.BatchNorm, "flax": nn.BatchNorm}


@pytest.mark.parametrize("norm", NORMS)
def test_convolutions(norm):
    model = networks.Classifier(NORMS[norm])
    x, _ = networks.images(16)
    # Flax's variance would lose digits to the mean.
    batches = np.split(x + 3 if norm == "bnjax" else x, 2)
    variables = random_variables(model, batches[0])
    inputs = [classifier_inputs(variables["params"], x) for x in batches]
    for method in METHODS:
        found = recompute_batch_stats(
            train_call(model), variables, batches, method=method
        )
        assert_relative(found, populations(inputs, method))


def check_mlp(dtype, tolerance):
    """Batches of several sizes, in any order; the variables stay as they are."""
    call, variables, batches = mlp(dtype=dtype)
    batches = [batches[0], batches[1][:20]]
    before = jax.tree.map(np.array, variables)
    for method in METHODS:
        found = recompute_batch_stats(call, variables, batches, method=method)
        want = mlp_population(variables, batches, method)
        assert_relative(found, want, tolerance)
        other = recompute_batch_stats(call, variables, batches[::-1], method=method)
        assert_relative(other, want, tolerance)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}


def test_dense_layers_in_float32(strict):
    check_mlp(np.float32, 1e-6)


def test_dense_layers_in_float64(x64):
    check_mlp(np.float64, 1e-12)


def test_a_mean_of_a_million_deviations():
    model = bnjax.linen.BatchNorm(use_running_average=False)
    x = 1e6 + np.random.default_rng(0).normal(size=(4, 50, 3))
    x = x.astype(np.float32)
    variables = model.init(jax.random.key(0), x[0])
    call = functools.partial(model.apply, mutable=["batch_stats"])
    found = recompute_batch_stats(call, variables, x)
    want = population(x, "paper")
    np.testing.assert_allclose(found["mean"], want["mean"], rtol=1e-7)
    np.testing.assert_allclose(found["var"], want["var"], rtol=1e-5)


def test_neither_momentum_nor_old_statistics_matter():
    call, variables, batches = mlp()
    stale = jax.tree.map(lambda leaf: leaf * 0 + 100, variables["batch_stats"])
    variables = {**variables, "batch_stats": stale}
    found = recompute_batch_stats(call, variables, iter(batches), num_batches=2)
    assert_relative(found, mlp_population(variables, batches[:2], "paper"))


def test_the_result_normalizes_in_inference():
    call, variables, batches = mlp()
    frozen = flax.core.freeze(variables)
    new = recompute_batch_stats(call, frozen, batches)
    assert jax.tree.structure(new) == jax.tree.structure(frozen["batch_stats"])
    model = MLP((6, 5), 3)
    new_variables = {**variables, "batch_stats": new}
    logits = model.apply(new_variables, batches[0], train=False)
    stats = mlp_population(variables, batches, "paper")
    params = as_float64(variables["params"])
    want, *_ = numpy_network.forward(params, stats, batches[0], train=False)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-5)


def test_a_network_is_compiled_once():
    call, variables, batches = mlp()
    traced = []

    def counted(variables, batch):
        traced.append(jnp.shape(batch))
        return call(variables, batch)

    for _ in range(2):
        uneven = [batches[0], batches[1][:20]]
        recompute_batch_stats(counted, variables, uneven, layers="bn_1")
    assert traced == [(32, 4), (20, 4)]


class Masked(nn.Module):
    """A layer that is given a mask; scale and bias are those it starts with."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, mask):
        norm = self.norm(use_running_average=False, name="bn")
        return norm(x, mask=mask)


def masked(norm, *batches):
    """The call of a masked layer, and its variables."""
    model = Masked(NORMS[norm])
    variables = jax.jit(model.init)(jax.random.key(0), *batches)

    def call(variables, batch):
        return model.apply(variables, *batch, mutable=["batch_stats"])

    return call, variables


@pytest.mark.parametrize("norm", NORMS)
def test_masks(norm):
    rng = np.random.default_rng(2)
    xs = rng.normal(5, 2, (4, 12, 3, 2)).astype(np.float32)
    shown = np.array([0.9, 0.5, 0.3, 0.2])[:, None, None, None]
    masks = rng.random((4, 12, 1, 1)) < shown
    masks[:, :2] = True
    call, variables = masked(norm, xs[0], masks[0])
    batches = list(zip(xs, masks, strict=True))
    for method in METHODS:
        found = recompute_batch_stats(call, variables, batches, method=method)
        assert_relative(found, {"bn": population(xs, method, masks)})


def test_weights_count_as_repeats_and_hidden_values_may_be_nan():
    x = np.float32([[1.0], [2.0], [6.0], [np.nan]])
    mask = np.float32([[2], [1], [1], [0]])
    call, variables = masked("bnjax", x, mask)
    new = recompute_batch_stats(call, variables, [(x, mask)])["bn"]
    np.testing.assert_allclose(new["mean"], [2.5])
    np.testing.assert_allclose(new["var"], [17 / 3], rtol=1e-6)
    nothing = (x, mask * 0)
    again = recompute_batch_stats(call, variables, [nothing, (x, mask), nothing])
    np.testing.assert_array_equal(again["bn"]["var"], new["var"])
    # A channel that is hidden everywhere keeps what it had.
    x, mask = np.repeat(x, 2, 1), np.float32(np.repeat(mask, 2, 1) * [1, 0])
    call, two = masked("bnjax", x, mask)
    new = recompute_batch_stats(call, two, [(x, mask)], method="pooled")
    np.testing.assert_allclose(new["bn"]["mean"], [2.5, 0])
    np.testing.assert_allclose(new["bn"]["var"], [17 / 3, 1], rtol=1e-6)


class Blocks(nn.Module):
    """Layers in blocks; those in `frozen` normalize by their running statistics."""

    frozen: tuple = ()

    @nn.compact
    def __call__(self, x, train=True):
        for name in ("stem", "block_1", "block_2"):
            x = Block(name=name)(x, not train or name in self.frozen)
        return x


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, use_running_average):
        return bnjax.linen.BatchNorm(name="bn")(2 * x, use_running_average)


X = np.random.default_rng(0).normal(4, 2, (3, 8, 4)).astype(np.float32)


@functools.cache
def blocks(frozen=()):
    """The call, the variables and the statistics of every layer."""
    model = Blocks(frozen)
    variables = jax.jit(model.init)(jax.random.key(0), X[0])
    call = train_call(model)
    return call, variables, recompute_batch_stats(call, variables, X)


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
    call, variables, everything = blocks()
    found = recompute_batch_stats(call, variables, X, layers=layers)
    for name, stats in found.items():
        source = everything if name in names else variables["batch_stats"]
        jax.tree.map(np.testing.assert_array_equal, stats, source[name])


def test_patterns():
    paths = [("bn",), ("block", "bn"), ("blocks", 0, "bn"), ()]
    assert choose_layers(None, paths) == tuple(paths)
    assert choose_layers("bl*", paths) == (("block", "bn"), ("blocks", 0, "bn"))
    both = choose_layers(["blocks/0/bn", "bn"], paths)
    assert both == (("bn",), ("blocks", 0, "bn"))
    assert choose_layers("(top level)", paths) == ((),)


def test_a_frozen_layer_keeps_its_statistics():
    _, variables, new = blocks(frozen=("block_1",))
    old = variables["batch_stats"]["block_1"]
    jax.tree.map(np.testing.assert_array_equal, new["block_1"], old)
    assert not np.array_equal(new["stem"]["bn"]["mean"], old["bn"]["mean"])
    assert not np.array_equal(new["block_2"]["bn"]["var"], old["bn"]["var"])


def test_virtual_batches_join():
    """Layers below normalize by groups; the statistics are those of the whole batch."""
    model = MLP((4,), 3, 0.5, Normalization(virtual_batch_size=4))
    variables = model.init(jax.random.key(0), X[0], train=False)
    found = recompute_batch_stats(train_call(model), variables, X, method="pooled")
    assert_relative(found, mlp_population(variables, X, "pooled"))


def test_a_layer_called_twice_joins_its_inputs():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            bn = bnjax.linen.BatchNorm(use_running_average=not train, name="bn")
            return bn(x) + bn(10 * x[:3])[:1]

    variables = Twice().init(jax.random.key(0), X[0])
    call = train_call(Twice())
    joined = [np.concatenate([each, 10 * each[:3]]) for each in X]
    for method in METHODS:
        found = recompute_batch_stats(call, variables, X, method=method)
        assert_relative(found, {"bn": population(joined, method)})


# The sums over batches, against numbers worked out by hand.


def record(mean, var, count, weight=None):
    weight = count if weight is None else weight
    return [np.float32([value]) for value in (mean, var, count, weight)]


def total(*records, method="pooled"):
    found = Total()
    for each in records:
        found = found.add(each, method, "layer")
    return found.mean_and_var(method, "layer")


# The values 0, 2 and 5, 5, 8, 8, 8, 8.
PARTS = record(1, 1, 2), record(7, 2, 6)


@pytest.mark.parametrize("parts", [PARTS, PARTS[::-1]])
def test_both_methods(parts):
    squares = 2 + 12 + 2 * 4.5**2 + 6 * 1.5**2
    for method, var in [("paper", (2 * 2 + 6 * 12 / 5) / 8), ("pooled", squares / 7)]:
        found = total(*parts, method=method)
        np.testing.assert_allclose(found, [[5.5], [var]], rtol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_devices_that_share_stand_for_their_part(method):
    """Four devices report the same 8 values; each stands for 2."""
    mean, var = total(*[record(3, 7, 8, weight=2)] * 4, method=method)
    np.testing.assert_allclose([mean, var], [[3], [8]])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_that_is_hidden_changes_nothing(method):
    hidden = record(np.nan, np.nan, 0)
    found = total(hidden, *PARTS, hidden, method=method)
    np.testing.assert_array_equal(found, total(*PARTS, method=method))


def test_sums_do_not_cancel():
    """A mean of a million deviations, a thousand batches."""
    parts = [record(1e6 + i % 3 - 1, 1, 100) for i in range(999)]
    mean, var = total(*parts)
    np.testing.assert_allclose(mean, [1e6], rtol=1e-15)
    np.testing.assert_allclose(var, [(1 + 2 / 3) * 99900 / 99899], rtol=1e-12)


# What a person can get wrong, and that they are told.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        for i in range(2):
            x = nn.BatchNorm(use_running_average=not train, name=f"bn_{i}")(x)
        return x


NET = train_call(Net())
STATS = {f"bn_{i}": {"mean": np.zeros(4), "var": np.ones(4)} for i in range(2)}
PARAMS = {f"bn_{i}": {"scale": np.ones(4), "bias": np.zeros(4)} for i in range(2)}
VARIABLES = jax.tree.map(np.float32, {"params": PARAMS, "batch_stats": STATS})
BAD = np.where(np.arange(96).reshape(X.shape) == 34, np.nan, X)


def refused(error, match, call=NET, variables=VARIABLES, batches=X, **options):
    with pytest.raises(error, match=match):
        recompute_batch_stats(call, variables, batches, **options)


@pytest.mark.parametrize("train", [True, False])
def test_apply_fn_that_returns_no_statistics(train):
    def outputs(variables, x):
        return Net().apply(variables, x, train, mutable=["batch_stats"])[0]

    match = (
        r"returns no updated 'batch_stats'.*mutable=\['batch_stats'\].*"
        "use_running_average=False"
    )
    refused(ValueError, match, outputs)


def test_inference_mode():
    def inference(variables, x):
        return Net().apply(variables, x, False, mutable=["batch_stats"])

    match = "none of these layers normalized by its batch: bn_0, bn_1;.*train=True"
    refused(ValueError, match, inference)


@pytest.mark.parametrize("variables", [{}, {"batch_stats": {}}, nnx.Dict()])
def test_no_batch_norm(variables):
    refused(ValueError, "no batch norm layer", variables=variables)


def test_batches_that_run_out():
    used = iter(X)
    recompute_batch_stats(NET, VARIABLES, used)
    refused(ValueError, "used before", batches=used)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (TypeError, "of type list; expected a dict", {"variables": []}),
        (ValueError, "were 0 batches; expected one or more", {"batches": []}),
        (ValueError, "were 3 batches; expected 5", {"num_batches": 5}),
        (ValueError, "num_batches=0", {"num_batches": 0}),
        (ValueError, "layer bn_0, batch 1: .* not finite", {"batches": BAD}),
        (
            ValueError,
            "bn_0, batch 0: one value per channel.*method='pooled'",
            {"batches": X[:, :1]},
        ),
        (
            ValueError,
            "layer bn_0 was given one value per channel in all",
            {"batches": X[:1, :1], "method": "pooled"},
        ),
        (
            ValueError,
            "'bn_7' matches no layer. Did you mean 'bn_.*are: bn_0, bn_1.",
            {"layers": "bn_7"},
        ),
        (ValueError, "true for no layer", {"layers": lambda name: False}),
        (TypeError, r"layers=\[3\]", {"layers": [3]}),
        (TypeError, r"layers=\[\]", {"layers": []}),
        (ValueError, "Did you mean 'pooled'", {"method": "pool"}),
        (
            ValueError,
            r"shapes \[\(24, 4\)\]; expected a first axis of one",
            {"batches": X.reshape(1, 24, 4), "axis_name": "d"},
        ),
    ],
)
def test_refusals(error, match, options):
    refused(error, match, **options)


def test_one_value_per_channel_can_be_pooled():
    found = recompute_batch_stats(NET, VARIABLES, X[:, :1], method="pooled")
    np.testing.assert_allclose(found["bn_0"]["var"], X[:, 0].var(0, ddof=1), rtol=1e-6)


def layer_call(layer):
    return functools.partial(layer.apply, mutable=["batch_stats"])


def test_shapes_that_do_not_fit():
    layer = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)
    variables = layer.init(jax.random.key(0), X[0])
    match = "(?s)statistics in `variables` have shape"
    refused(ValueError, match, layer_call(layer), variables, X[..., :1])


def test_a_layer_of_another_kind():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", np.zeros, 4)
            self.variable("batch_stats", "var", np.ones, 4)
            if not self.is_initializing():
                mean.value = x.mean(0)
            return nn.BatchNorm(use_running_average=False, name="bn")(x - mean.value)

    call, variables = layer_call(Own()), Own().init(jax.random.key(0), X[0])
    match = r"layer \(top level\) .* not a flax.linen.BatchNorm"
    refused(TypeError, match, call, variables)
    recompute_batch_stats(call, variables, X, layers="bn")


def test_an_axis_name_that_is_not_bound():
    variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), X[0])
    shared = nn.BatchNorm(use_running_average=False, axis_name="devices")
    with pytest.raises(NameError, match="devices") as found:
        recompute_batch_stats(layer_call(shared), variables, X)
    assert "axis_name" in found.value.__notes__[0]
