"""Whole models: the same function, the same variables, another training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.convert import ToBatchNorm, ToFrozen, ToGroupNorm, convert
from tests import oracle
from tests.convert.models import (
    NNX,
    SAME,
    assert_close,
    assert_equal,
    images,
    layers_of,
    leaves,
    linen_model,
    linen_variables,
    nnx_model,
    training,
)


@pytest.mark.parametrize(
    "name", ["resnet", pytest.param("efficientnet", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("to", SAME)
def test_a_model_of_nnx_stays_the_same_function_with_the_same_variables(name, to):
    model, x = nnx_model(name), images()
    before, state = model(x), leaves(model)
    new = convert(model, SAME[to], x)
    assert_close(new(x), before)
    assert_equal(leaves(new), state)
    # All of them, and of the old model none.
    count = NNX[name][1]
    assert len(layers_of(new, bnjax.nnx.BatchNorm)) == count
    assert len(layers_of(model, bnjax.nnx.BatchNorm)) == 0
    assert len(layers_of(model)) == count
    kept = {layer.momentum for layer in layers_of(new).values()}
    assert kept == {layer.momentum for layer in layers_of(model).values()}
    # The variables are the new model's own.
    next(iter(layers_of(new).values())).mean[...] += 1
    assert_equal(leaves(model), state)


@pytest.mark.parametrize(
    "name", ["resnet", pytest.param("efficientnet", marks=pytest.mark.slow)]
)
def test_a_model_for_inference_trains_after_one_call(name):
    model, x = nnx_model(name), images()
    labels = jnp.arange(6) % 3

    @nnx.jit
    def step(model):
        def loss(model):
            losses = nnx.log_softmax(model(x))[jnp.arange(6), labels]
            return -losses.mean()

        value, grads = nnx.value_and_grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
        return value

    fixed = nnx.clone(model)
    step(fixed)
    assert_equal(
        *(nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (fixed, model))
    )

    new = convert(model, ToBatchNorm(use_running_average=False, momentum=0.9), x)
    first = layers_of(new)["bn" if name == "resnet" else "blocks/0/bn0"]
    conv = new.stem if name == "resnet" else new.blocks[0].expand
    old, given = bnjax.BatchStats(first.mean[...], first.var[...]), conv(x)
    losses = [float(step(new))]
    mean, var = oracle.running(old, given, momentum=0.9, unbiased=False)
    assert_close([first.mean[...], first.var[...]], [mean, var])
    losses += [float(step(new)) for _ in range(7)]
    assert losses[-1] < 0.7 * losses[0]

    new.eval()
    stats = nnx.to_pure_dict(nnx.state(new, nnx.BatchStat))
    assert_close(new(x)[:2], new(x[:2]))
    assert_equal(nnx.to_pure_dict(nnx.state(new, nnx.BatchStat)), stats)


VIRTUAL = {"unbiased": True, "virtual_batch_size": 2}


@pytest.mark.parametrize(
    ("name", "to", "same_as"),
    [
        pytest.param("resnet", ToBatchNorm(**VIRTUAL), VIRTUAL, marks=pytest.mark.slow),
        pytest.param("resnet", ToBatchNorm(), {}, marks=pytest.mark.slow),
        pytest.param("resnet", ToFrozen(), {"frozen": True}, marks=pytest.mark.slow),
        pytest.param(
            "inception", ToBatchNorm(**VIRTUAL), VIRTUAL, marks=pytest.mark.slow
        ),
        pytest.param("inception", ToFrozen(), {"frozen": True}, marks=pytest.mark.slow),
    ],
)
def test_a_model_of_linen_trains_as_if_it_had_been_written_so(name, to, same_as):
    variables, x = linen_variables(name)
    model = linen_model(name, kind="flax")
    new, kept = convert(model, to, x, variables=variables, train=False)
    assert kept is variables
    assert isinstance(new, type(model))
    want = training(linen_model(name, **same_as), variables, x)
    assert_close(training(new, variables, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_of_ours_keep_what_they_add():
    """An activation in the layer, a residual, the other variance."""
    variables, x = linen_variables("resnet")
    model = linen_model("resnet", kind="batch", unbiased=True)
    new, _ = convert(
        model, ToBatchNorm(momentum=0.5), x, variables=variables, train=False
    )
    want = linen_model("resnet", kind="batch", unbiased=True, momentum=0.5)
    assert_close(
        training(new, variables, x), training(want, variables, x), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
def test_some_layers_become_group_norm_and_the_others_keep_their_statistics():
    variables, x = linen_variables("resnet")
    model = linen_model("resnet", kind="batch")
    new, given = convert(
        model,
        ToGroupNorm(2, seed=1),
        x,
        variables=variables,
        layers="stage2*",
        may_change=True,
        train=False,
    )
    assert_equal(given["params"]["conv1"], variables["params"]["conv1"])
    norms = given["params"]["stage2_block1"]["conv1"]["bn"]
    assert_equal(norms, jax.tree.map(jnp.zeros_like, norms) | {"scale": jnp.ones(8)})
    kept = {name for name in variables["batch_stats"] if "stage2" not in name}
    assert set(given["batch_stats"]) == kept
    _, (y, stats) = training(new, given, x)
    assert set(stats) == kept
    assert np.isfinite(y).all()
