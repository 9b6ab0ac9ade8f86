import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import BatchStats
from bnjax.diagnostics import (
    compare_scores,
    compare_statistics,
    normalization_error,
)
from bnjax.population import recompute_batch_stats

SIZES = (7, 5, 9)
F64 = {"param_dtype": jnp.float64}


class Linen(nn.Module):
    """Dense, BN, tanh, Dense, BN."""

    @nn.compact
    def __call__(self, x, train):
        for i, width in enumerate((4, 3)):
            x = nn.Dense(width, use_bias=False, **F64, name=f"dense_{i}")(x)
            norm = bnjax.linen.BatchNorm(unbiased=True, **F64, name=f"bn_{i}")
            x = norm(x, use_running_average=not train)
            x = jnp.tanh(x) if i == 0 else x
        return x


class Nnx(nnx.Module):
    def __init__(self, variables):
        rngs = nnx.Rngs(0)
        for i, (features, width) in enumerate(((2, 4), (4, 3))):
            dense = nnx.Linear(features, width, use_bias=False, **F64, rngs=rngs)
            norm = bnjax.nnx.BatchNorm(width, unbiased=True, **F64, rngs=rngs)
            setattr(self, f"dense_{i}", dense)
            setattr(self, f"bn_{i}", norm)
            dense.kernel[...] = variables["params"][f"dense_{i}"]["kernel"]
            stats = variables["batch_stats"][f"bn_{i}"]
            norm.mean.set_value(stats["mean"])
            norm.var.set_value(stats["var"])

    def __call__(self, x):
        return self.bn_1(self.dense_1(jnp.tanh(self.bn_0(self.dense_0(x)))))


def linen_call(variables, batch):
    return Linen().apply(variables, batch, True, mutable=["batch_stats"])


def nnx_call(model, batch):
    model.train()
    return model(batch)


def linen_train_scores(variables, batch):
    return scores(linen_call(variables, batch)[0])


def linen_eval_scores(variables, batch):
    return scores(Linen().apply(variables, batch, False))


LINEN = (linen_train_scores, linen_eval_scores)


def nnx_train_scores(model, batch):
    model.train()
    return scores(model(batch))


def nnx_eval_scores(model, batch):
    model.eval()
    return scores(model(batch))


def scores(y):
    return {"square": jnp.square(y).sum(-1), "first": y.argmax(-1) == 0}


@pytest.fixture
def network(x64):
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(1, 2, (size, 2))) for size in SIZES]
    variables = dict(Linen().init(jax.random.key(0), batches[0], False))
    variables["batch_stats"] = {
        f"bn_{i}": {
            "mean": jnp.asarray(rng.normal(size=width)),
            "var": jnp.asarray(rng.uniform(0.5, 2, width)),
        }
        for i, width in enumerate((4, 3))
    }
    return variables, batches


def layer_inputs(variables, x):
    """What the two layers are given in training, by plain formulas."""
    params = jax.tree.map(np.asarray, variables["params"])
    first = np.asarray(x) @ params["dense_0"]["kernel"]
    z = np.tanh((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5))
    return first, z @ params["dense_1"]["kernel"]


def expected_population(inputs, method):
    if method == "pooled":
        values = np.concatenate(inputs)
        return values.mean(0), values.var(0, ddof=1)
    weights = [len(u) for u in inputs]
    mean = np.average([u.mean(0) for u in inputs], 0, weights)
    return mean, np.average([u.var(0, ddof=1) for u in inputs], 0, weights)


@pytest.mark.parametrize("method", ["paper", "pooled"])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_three_kinds_of_statistics_layer_by_layer(kind, method, network):
    variables, batches = network
    apply_fn, given = linen_call, variables
    if kind == "nnx":
        apply_fn, given = nnx_call, Nnx(variables)
    found = compare_statistics(apply_fn, given, batches, method=method)
    assert sorted(found) == ["bn_0", "bn_1"]
    inputs = list(zip(*(layer_inputs(variables, x) for x in batches), strict=True))
    for (name, layer), each in zip(sorted(found.items()), inputs, strict=True):
        means, variances = layer.batch.mean, layer.batch.var
        np.testing.assert_allclose(means, [u.mean(0) for u in each], rtol=1e-9)
        biased = [u.var(0, ddof=1) for u in each]
        np.testing.assert_allclose(variances, biased, rtol=1e-9)
        mean, var = expected_population(each, method)
        np.testing.assert_allclose(layer.population.mean, mean, rtol=1e-9)
        np.testing.assert_allclose(layer.population.var, var, rtol=1e-9)
        old = variables["batch_stats"][name]
        np.testing.assert_array_equal(layer.moving.mean, old["mean"])
        np.testing.assert_array_equal(layer.moving.var, old["var"])
        assert means.dtype == layer.moving.var.dtype == np.float64


def test_layers_that_are_chosen(network):
    variables, batches = network
    for layers in ("bn_1", ["*_1"], lambda name: name.endswith("1")):
        found = compare_statistics(linen_call, variables, batches[:1], layers=layers)
        assert list(found) == ["bn_1"]
    with pytest.raises(ValueError, match="Did you mean 'bn_1'"):
        compare_statistics(linen_call, variables, batches, layers="bn_l")
    with pytest.raises(ValueError, match="there were 0 batches"):
        compare_statistics(linen_call, variables, [])


@pytest.mark.parametrize("updates", [0, 1, 2, 100])
def test_the_error_of_a_moving_average_after_some_updates(updates, x64):
    """It starts from 0 and 1, and comes to a batch's statistics as momentum**n."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (11, 4)))
    layer = bnjax.linen.BatchNorm(
        use_running_average=False, momentum=0.9, unbiased=True, **F64
    )

    @jax.jit
    def call(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    variables = jax.tree.map(np.float64, layer.init(jax.random.key(0), x))
    for _ in range(updates):
        variables = {**variables, **call(variables, x)[1]}
    (found,) = compare_statistics(call, variables, [x, x]).values()
    left = 0.9**updates
    mean, var = np.mean(x, 0), np.var(x, 0, ddof=1)
    moving_var = left + (1 - left) * var
    error = normalization_error(found.moving, found.population, 1e-3)
    std = np.sqrt(moving_var + 1e-3)
    np.testing.assert_allclose(error.mean, left * mean / std, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(error.std, np.sqrt(var + 1e-3) / std, rtol=1e-10)
    for error in (
        normalization_error(found.population, found.batch),
        normalization_error(found.batch, found.population),
    ):
        np.testing.assert_allclose(error.mean, np.zeros((2, 4)), atol=1e-12)
        np.testing.assert_allclose(error.std, np.ones((2, 4)), rtol=1e-12)


def test_the_error_is_mean_and_deviation_of_the_output(x64):
    x = np.random.default_rng(0).normal(2, 3, (50, 4))
    used = BatchStats(np.array([0.0, 1, 2, 3]), np.array([1.0, 4, 9, 0.5]))
    y = bnjax.normalize(jnp.asarray(x), used.mean, used.var, epsilon=1e-12)
    actual = BatchStats(x.mean(0), x.var(0))
    error = normalization_error(used, actual, epsilon=1e-12)
    np.testing.assert_allclose(error.mean, y.mean(0), rtol=1e-10)
    np.testing.assert_allclose(error.std, y.std(0), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_scores_by_each_kind_of_statistics(kind, network):
    variables, batches = network
    functions, call, given = LINEN, linen_call, variables
    if kind == "nnx":
        functions, call = (nnx_train_scores, nnx_eval_scores), nnx_call
        given = Nnx(variables)
        before = jax.tree.map(np.array, nnx.state(given))
    population = recompute_batch_stats(call, given, batches)
    found = compare_scores(*functions, given, population, batches)

    expected = recompute_batch_stats(linen_call, variables, batches)
    others = {**variables, "batch_stats": expected}
    outputs = (
        [linen_call(variables, x)[0] for x in batches],
        [Linen().apply(variables, x, False) for x in batches],
        [Linen().apply(others, x, False) for x in batches],
    )
    for scored, each in zip(found, outputs, strict=True):
        y = np.concatenate(each)
        assert scored["square"].dtype == scored["first"].dtype == np.float64
        np.testing.assert_allclose(scored["square"], (y**2).sum(-1), rtol=1e-9)
        np.testing.assert_array_equal(scored["first"], y.argmax(-1) == 0)
    assert np.abs(found.moving["square"] - found.population["square"]).max() > 0.1
    if kind == "nnx":
        after = jax.tree.map(np.array, nnx.state(given))
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_scores_of_sharded_batches(network):
    variables, _ = network
    x = jnp.asarray(np.random.default_rng(1).normal(size=(16, 2)))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))
    stats = variables["batch_stats"]
    found, expected = (
        compare_scores(*LINEN, variables, stats, [batch]) for batch in (sharded, x)
    )
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(each["square"], other["square"], rtol=1e-9)


def one_score(variables, batch):
    return {"loss": jnp.mean(batch)}


def two_lengths(variables, batch):
    return {"loss": batch[:, 0], "accuracy": batch[1:, 0]}


def other_names(variables, batch):
    return {f"loss of {len(batch)}": batch[:, 0]}


@pytest.mark.parametrize("function", [one_score, two_lengths, other_names])
def test_scores_that_are_not_one_for_each_example(function, network):
    variables, batches = network
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match=rf"{function.__name__} returned shapes \{{'"):
        compare_scores(function, function, variables, stats, batches)


def test_what_else_compare_scores_refuses(network):
    variables, batches = network
    stats = variables["batch_stats"]
    with pytest.raises(ValueError, match="there are no batches"):
        compare_scores(*LINEN, variables, stats, iter([]))
    with pytest.raises(TypeError, match="compare_scores: variables is a dict of batch"):
        compare_scores(*LINEN, {"batch_stats": stats}, stats, batches)
