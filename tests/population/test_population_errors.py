"""What a person can get wrong, and that they are told."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
from bnjax.population import recompute_batch_stats

X = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)


class Net(nn.Module):
    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        for i in range(2):
            x = self.norm(use_running_average=not train, name=f"bn_{i}")(x)
        return x


def make(model=None):
    model = model or Net()
    return model, model.init(jax.random.key(0), X[0])


def call(variables, x):
    return Net().apply(variables, x, mutable=["batch_stats"])


def refused(error, match, *args, **options):
    with pytest.raises(error, match=match) as found:
        recompute_batch_stats(*args, **options)
    return str(found.value)


@pytest.mark.parametrize("train", [True, False])
def test_apply_fn_that_returns_no_statistics(train):
    def outputs(variables, x):
        return Net().apply(variables, x, train, mutable=["batch_stats"])[0]

    _, variables = make()
    message = refused(
        ValueError, "returns no updated 'batch_stats'", outputs, variables, X
    )
    assert "mutable=['batch_stats']" in message
    assert "use_running_average=False" in message


def test_inference_mode():
    def inference(variables, x):
        return Net().apply(variables, x, False, mutable=["batch_stats"])

    _, variables = make()
    message = refused(ValueError, "no layer normalized by its", inference, variables, X)
    assert "of bn_0, bn_1;" in message
    assert "train=True" in message


def test_no_batch_norm():
    variables = {"params": nn.Dense(3).init(jax.random.key(0), X[0])["params"]}
    refused(ValueError, "no batch norm layer", call, variables, X)
    refused(
        ValueError, "no batch norm layer", call, {**variables, "batch_stats": {}}, X
    )
    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    refused(ValueError, "no batch norm layer", lambda m, x: m(x), dense, X)
    refused(TypeError, "of type list; expected a dict", call, [variables], X)


def test_batches_that_run_out():
    _, variables = make()
    refused(ValueError, "0 batches came; expected one or more", call, variables, [])
    refused(ValueError, "3 batches came; expected 5", call, variables, X, num_batches=5)
    used = iter(X)
    recompute_batch_stats(call, variables, used)
    refused(ValueError, "gone through before", call, variables, used)
    refused(ValueError, "num_batches=0", call, variables, X, num_batches=0)


def test_values_that_are_not_finite():
    _, variables = make()
    bad = X.copy()
    bad[1, 0, 2] = np.nan
    refused(ValueError, "layer bn_0, batch 1: .* not finite", call, variables, bad)


def test_one_value_per_channel():
    _, variables = make()
    message = refused(ValueError, "one value per channel", call, variables, X[:, :1])
    assert "layer bn_0, batch 0" in message
    assert "method='pooled'" in message
    found = recompute_batch_stats(call, variables, X[:, :1], method="pooled")
    np.testing.assert_allclose(found["bn_0"]["var"], X[:, 0].var(0, ddof=1), rtol=1e-6)
    refused(
        ValueError,
        "layer bn_0 was given one value per channel in all",
        call,
        variables,
        X[:1, :1],
        method="pooled",
    )


def test_shapes_that_do_not_fit():
    _, variables = make(bnjax.linen.BatchNorm(use_running_average=False))
    layer = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False)

    def one(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    refused(
        ValueError,
        "(?s)statistics in `variables` have shape",
        one,
        variables,
        X[..., :1],
    )


def test_names():
    _, variables = make()
    message = refused(
        ValueError, "'bn_7' fits no layer", call, variables, X, layers="bn_7"
    )
    assert "Did you mean 'bn_" in message
    assert "are: bn_0, bn_1." in message
    refused(
        ValueError, "true of no layer", call, variables, X, layers=lambda name: False
    )
    refused(TypeError, "layers=\\[3\\]", call, variables, X, layers=[3])
    refused(TypeError, r"layers=\[\]", call, variables, X, layers=[])
    refused(ValueError, "Did you mean 'pooled'", call, variables, X, method="pool")


def test_a_layer_of_another_kind():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", np.zeros, 4)
            self.variable("batch_stats", "var", np.ones, 4)
            if not self.is_initializing():
                mean.value = x.mean(0)
            return nn.BatchNorm(use_running_average=False, name="bn")(x - mean.value)

    model, variables = make(Own())

    def own(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    refused(
        TypeError, r"layer \(top level\) .* no flax.linen.BatchNorm", own, variables, X
    )
    recompute_batch_stats(own, variables, X, layers="bn")


def test_devices():
    _, variables = make()
    message = refused(
        ValueError,
        "first axis of one",
        call,
        variables,
        X.reshape(1, 24, 4),
        axis_name="d",
    )
    assert "(24, 4)" in message
    shared = nn.BatchNorm(use_running_average=False, axis_name="devices")
    _, variables = make(nn.BatchNorm(use_running_average=False))

    def unbound(variables, x):
        return shared.apply(variables, x, mutable=["batch_stats"])

    with pytest.raises(NameError, match="devices") as found:
        recompute_batch_stats(unbound, variables, X)
    assert "axis_name" in found.value.__notes__[0]
