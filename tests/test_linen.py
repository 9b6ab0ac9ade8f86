"""What a user of bnjax.linen.BatchNorm meets: variables, options, messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.linen import BatchNorm, ImmutableBatchStatsError
from tests import networks, oracle
from tests.networks import Classifier, assert_same

KEY = jax.random.key(0)
X, _ = networks.images()
ROWS = X[:, 0, 0]


class Head(nn.Module):
    """A layer under a name."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x, **options):
        return self.norm.copy(name="bn")(x, **options)


class Model(nn.Module):
    """A layer two levels down: head/bn."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x, **options):
        return Head(self.norm, name="head")(x, **options)


def variables_of(mean=0.0, var=1.0, **params):
    stats = {"mean": np.full(3, mean, np.float32), "var": np.full(3, var, np.float32)}
    return {"params": params, "batch_stats": stats}


def untouched(stats, features):
    np.testing.assert_array_equal(stats["mean"], np.zeros(features))
    np.testing.assert_array_equal(stats["var"], np.ones(features))


@pytest.mark.parametrize("count", [1, 8])
def test_init_needs_neither_the_axis_nor_a_batch(count):
    ours, theirs = (Classifier(norm, axis_name="data") for norm in networks.LINEN)
    variables = jax.jit(ours.init)(KEY, X[:count])
    untouched(variables["batch_stats"]["BatchNorm_0"], 4)
    untouched(variables["batch_stats"]["BatchNorm_1"], 6)
    assert_same(variables, jax.jit(theirs.init)(KEY, X[:count]), 0)
    shapes = jax.eval_shape(ours.init, KEY, X[:count])
    assert shapes == jax.eval_shape(theirs.init, KEY, X[:count])


def test_init_of_one_value_per_channel():
    layer = BatchNorm(use_running_average=False, axis_name="data")
    y, variables = layer.init_with_output(KEY, jnp.full((1, 3), 7.0))
    np.testing.assert_allclose(y, np.full((1, 3), 7 / np.sqrt(1 + 1e-5)), rtol=1e-6)
    untouched(variables["batch_stats"], 3)


def test_init_normalizes_by_the_batch_and_leaves_the_statistics():
    y, variables = BatchNorm(use_running_average=False).init_with_output(KEY, X)
    np.testing.assert_allclose(y, oracle.forward(X, np.ones(3), np.zeros(3)), atol=1e-5)
    untouched(variables["batch_stats"], 3)


def test_init_with_axis_index_groups():
    groups = [[0, 1], [2, 3]]
    layer = BatchNorm(False, axis_name="data", axis_index_groups=groups)
    untouched(layer.init(KEY, ROWS)["batch_stats"], 3)


def test_forgetting_mutable_says_what_to_write():
    model = Model(BatchNorm(use_running_average=False))
    variables = model.init(KEY, ROWS)
    with pytest.raises(ImmutableBatchStatsError) as caught:
        model.apply(variables, ROWS)
    assert str(caught.value) == (
        "BatchNorm layer head/bn: training updates the collection 'batch_stats', which "
        "is not mutable in this call. Write\n\n"
        "    y, updates = model.apply(variables, x, ..., mutable=['batch_stats'])\n"
        "    batch_stats = updates['batch_stats']\n\n"
        "and pass the new batch_stats to the next step. To evaluate, pass "
        "use_running_average=True."
    )
    # What catches Flax's error goes on to work.
    assert isinstance(caught.value, errors.ModifyScopeVariableError)
    with pytest.raises(ImmutableBatchStatsError, match="head/bn"):
        jax.jit(lambda v: model.apply(v, ROWS, mutable=["intermediates"]))(variables)


def test_what_the_message_says_to_write_works():
    model = Model(BatchNorm(use_running_average=False))
    variables = model.init(KEY, ROWS)
    x = ROWS
    y, updates = model.apply(variables, x, mutable=["batch_stats"])
    batch_stats = updates["batch_stats"]
    np.testing.assert_allclose(y, oracle.forward(x, np.ones(3), np.zeros(3)), atol=1e-5)
    mean, var = oracle.running(bnjax.BatchStats.init(3), x, unbiased=False)
    np.testing.assert_allclose(batch_stats["head"]["bn"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(batch_stats["head"]["bn"]["var"], var, rtol=1e-5)
    untouched(variables["batch_stats"]["head"]["bn"], 3)


def test_evaluation_needs_no_mutable_and_no_axis():
    model = Model(BatchNorm(use_running_average=True, axis_name="data"))
    variables = {"head": {"bn": {"mean": np.full(3, 2.0), "var": np.full(3, 4.0)}}}
    params = model.init(KEY, ROWS)["params"]
    y = model.apply({"params": params, "batch_stats": variables}, ROWS)
    np.testing.assert_allclose(y, (ROWS - 2) / np.sqrt(4 + 1e-5), rtol=1e-5)
    y, updates = model.apply(
        {"params": params, "batch_stats": variables}, ROWS[:1], mutable=["batch_stats"]
    )
    assert_same(updates["batch_stats"], variables, 0)


MISTAKES = {
    "one value": (ValueError, {}, r"one value per channel in training: x .*\(1, 3\)"),
    "unknown activation": (ValueError, {"activation": "rleu"}, ".*Did you mean 'relu'"),
    "momentum": (ValueError, {"momentum": 2.0}, r"momentum=2.0; expected .* \[0, 1\]"),
    "axis": (ValueError, {"axis": 2}, r"axis=2 is out of range .*\(1, 3\)"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_layer(mistake):
    kind, options, message = MISTAKES[mistake]
    model = Model(BatchNorm(use_running_average=False, **options))
    variables = Model(BatchNorm(use_running_average=False)).init(KEY, ROWS)
    with pytest.raises(kind, match=f"^BatchNorm layer head/bn: {message}"):
        model.apply(variables, ROWS[:1], mutable=["batch_stats"])


@pytest.mark.parametrize("mapping", ["pmap", "vmap", "shard_map", "jit"])
def test_axis_name_typo(mapping):
    model = Model(BatchNorm(use_running_average=False, axis_name="bacth"))
    variables = model.init(KEY, ROWS)

    def run(x):
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    specs = {"mesh": mesh, "in_specs": P("batch"), "out_specs": P("batch")}
    mapped, x = {
        "pmap": (lambda: jax.pmap(run, axis_name="batch"), ROWS[:, None]),
        "vmap": (lambda: jax.vmap(run, axis_name="batch"), ROWS[:, None]),
        "shard_map": (lambda: jax.shard_map(run, **specs), ROWS),
        "jit": (lambda: jax.jit(run), ROWS),
    }[mapping]
    with pytest.raises(
        NameError,
        match=r"^BatchNorm layer head/bn: axis_name='bacth' is not bound",
    ):
        mapped()(x)


def test_use_running_average_is_given_once():
    twice = BatchNorm(use_running_average=True)
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        twice.init(KEY, ROWS, use_running_average=True)
    with pytest.raises(ValueError, match="must be passed to the constructor or at"):
        BatchNorm().init(KEY, ROWS)
    with pytest.raises(TypeError, match=r"layer .*use_running_average is a traced"):
        jax.jit(lambda flag: BatchNorm().init(KEY, ROWS, flag))(True)


def test_missing_collection():
    model = Model(BatchNorm(use_running_average=True))
    params = model.init(KEY, ROWS)["params"]
    with pytest.raises(
        errors.ScopeCollectionNotFound, match=r'batch_stats.*"/head/bn"'
    ):
        model.apply({"params": params}, ROWS)


def test_statistics_of_another_size():
    variables = BatchNorm(use_running_average=True).init(KEY, ROWS[:, :2])
    with pytest.raises(ValueError, match=r"mean has shape \(2,\); expected \(3,\)"):
        BatchNorm(True, use_scale=False, use_bias=False).apply(variables, ROWS)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_without_scale_or_bias(scale, bias):
    layers = [
        norm(
            use_running_average=False,
            use_scale=scale,
            use_bias=bias,
            scale_init=nn.initializers.constant(3.0),
            bias_init=nn.initializers.normal(2.0),
        )
        for norm in networks.LINEN
    ]
    got, want = (layer.init_with_output(KEY, X) for layer in layers)
    names = ["bias"] * bias + ["scale"] * scale
    assert sorted(got[1].get("params", {})) == names
    assert_same(got, want, 1e-6)


def test_initializers_see_the_shape_and_dtype():
    seen = []

    def initializer(key, shape, dtype):
        seen.append((tuple(shape), jnp.dtype(dtype)))
        return jnp.full(shape, 2, dtype)

    layer = BatchNorm(
        True,
        axis=(1, -1),
        param_dtype=jnp.bfloat16,
        scale_init=initializer,
        bias_init=initializer,
    )
    y, variables = layer.init_with_output(KEY, X)
    assert seen == [((5, 3), jnp.bfloat16)] * 2
    np.testing.assert_allclose(y, 2 * X / np.sqrt(1 + 1e-5) + 2, rtol=1e-5, atol=1e-5)
    untouched(variables["batch_stats"], (5, 3))


def test_a_mask_broadcasts_as_in_flax():
    """By NumPy's rule, unless it could as well hold one entry per example."""
    layers = [norm(use_running_average=False) for norm in networks.LINEN]
    positions = np.array([True, False, True, True, False])[:, None]
    got, want = (
        layer.apply(
            variables_of(scale=np.ones(3), bias=np.zeros(3)),
            X,
            mask=positions,
            mutable=["batch_stats"],
        )
        for layer in layers
    )
    assert_same(got, want)
    with pytest.raises(ValueError, match=r"mask has shape \(5, 1\).*\(5, 1, 1, 1\)"):
        layers[0].init(KEY, X[:5], mask=positions)


def test_is_flax_batch_norm_to_whoever_asks():
    assert isinstance(BatchNorm(), nn.BatchNorm)
    ours, theirs = (Classifier(norm) for norm in networks.LINEN)
    tables = [
        model.tabulate(KEY, X, console_kwargs={"width": 200, "force_terminal": False})
        for model in (ours, theirs)
    ]
    assert "BatchNorm_1" in tables[0]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("shape", [(4, 4), (5,), (2, 3, 1)])
def test_the_message_has_the_shape_of_the_mask_as_it_was_given(shape):
    layer, x = BatchNorm(use_running_average=False), jnp.ones((8, 5, 4, 3))
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=re.escape(f"mask has shape {shape}; ")):
        layer.apply(variables, x, mask=jnp.ones(shape, bool), mutable=["batch_stats"])
