"""Models of flax.linen: their transforms, methods and modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.convert import ToBatchNorm, ToFrozen, convert
from bnjax.population import recompute_batch_stats
from tests import oracle
from tests.convert.models import SAME, assert_close, assert_equal, images, made, update
from tests.networks import Classifier


class Fixed(nn.Module):
    """Written for inference."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, momentum=0.9)(x)


class Stack(nn.Module):
    """Layers under transforms, one that is made in setup, and a second method."""

    def setup(self):
        self.jitted = JITTED()
        self.rest = nn.remat(Normed, static_argnums=2)()
        self.scanned = nn.scan(
            Normed,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=3,
        )()

    def features(self, x, train):
        x = self.rest(self.jitted(x, train)[0], train)[0]
        return self.scanned(x, train)[0]

    def __call__(self, x, train):
        return self.features(x, train).sum(-1)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(momentum=0.9)(x, use_running_average=not train)
        return nn.Dense(x.shape[-1])(jnp.tanh(norm)), None


class Outer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2)(self.inner(x, train=train))


JITTED = nn.jit(Normed, static_argnums=2)


def test_a_model_of_linen_for_inference_trains_after_one_call():
    model, x = Fixed(), images((6, 4))
    variables = made(model, x)
    new, _ = convert(
        model, ToBatchNorm(use_running_average=False), x, variables=variables
    )
    old = bnjax.BatchStats(**variables["batch_stats"]["BatchNorm_0"])
    for count in range(1, 101):
        y, stats = update(new, variables, x)
        mean, var = oracle.running(old, x, momentum=0.9, unbiased=False)
        old = bnjax.BatchStats(mean, var)
        variables = {**variables, "batch_stats": stats}
        if count in (1, 2, 100):
            assert_close(stats["BatchNorm_0"], {"mean": mean, "var": var})
    scale, bias = (variables["params"]["BatchNorm_0"][n] for n in ("scale", "bias"))
    assert_close(y, oracle.forward(x, scale, bias), atol=1e-5)
    # The mode can be set again: that of evaluation.
    back, _ = convert(
        new, ToBatchNorm(use_running_average=True), x, variables=variables
    )
    assert_equal(back.apply(variables, x), Fixed().apply(variables, x))


@pytest.mark.slow
def test_layers_under_transforms_and_in_other_methods_are_exchanged():
    model, x = Stack(), images((6, 4))
    variables = made(model, x, train=False)
    # Compiled before it is converted: nn.jit keeps that program.
    before = update(model, variables, x, True)
    for method in (None, "features"):
        new, _ = convert(
            model, ToFrozen(), x, False, variables=variables, method=method
        )
        y, stats = update(new, variables, x, True, method=method)
        assert_equal(stats, variables["batch_stats"])
        want = model.apply(variables, x, False, method=method)
        assert_close(y, want)
    assert_equal(update(model, variables, x, True), before)
    # A module of another one, and under jit.
    outer = Outer(new)
    given = made(outer, x)
    _, stats = jax.jit(functools.partial(update, outer, train=True))(given, x)
    assert_equal(stats, given["batch_stats"])


@pytest.mark.slow
def test_a_converted_model_initializes_the_same_variables():
    model, x = Classifier(nn.BatchNorm), images()
    variables = model.init(jax.random.key(0), x)
    for to in SAME.values():
        new, _ = convert(model, to, x, variables=variables, train=False)
        assert_equal(new.init(jax.random.key(0), x, train=False), variables)
        wide = {"console_kwargs": {"width": 200}}
        assert "BatchNorm_1" in new.tabulate(jax.random.key(0), x, train=False, **wide)
    assert hash(new) == hash(new.clone())
    assert new.clone() == new != model


@pytest.mark.slow
def test_conversions_add_up_from_the_inside_out():
    model, x = Classifier(nn.BatchNorm), images()
    variables = made(model, x)
    call = {"variables": variables, "train": False}
    first, _ = convert(model, ToFrozen(), x, layers="BatchNorm_0", **call)
    both, _ = convert(first, ToBatchNorm(unbiased=True, momentum=0.5), x, **call)
    _, stats = update(both, variables, x)
    assert_equal(stats["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"])
    ours = Classifier(functools.partial(bnjax.linen.BatchNorm, unbiased=True))
    want, _ = convert(ours, ToFrozen(), x, layers="BatchNorm_0", **call)
    _, other = update(want, variables, x)
    old = variables["batch_stats"]["BatchNorm_1"]
    # Momentum 0.5 goes five times as far as 0.9.
    moved = jax.tree.map(lambda new, old: 5 * (new - old), other["BatchNorm_1"], old)
    found = jax.tree.map(lambda new, old: new - old, stats["BatchNorm_1"], old)
    assert_close(found, moved, rtol=1e-4, atol=1e-5)

    # A converted model in one that is converted, the inner first.
    outer = Outer(first)
    given = made(outer, x)
    new, _ = convert(outer, ToBatchNorm(momentum=0.5), x, variables=given)
    _, stats = update(new, given, x, train=True)
    found, inner = stats["inner"], given["batch_stats"]["inner"]
    assert_equal(found["BatchNorm_0"], inner["BatchNorm_0"])
    assert np.any(found["BatchNorm_1"]["mean"] != inner["BatchNorm_1"]["mean"])
    # The mode of a frozen layer can be set again.
    thawed, _ = convert(first, ToBatchNorm(use_running_average=False), x, **call)
    _, stats = update(thawed, variables, x, train=False)
    assert np.any(
        stats["BatchNorm_0"]["mean"] != variables["batch_stats"]["BatchNorm_0"]["mean"]
    )


@pytest.mark.slow
def test_population_statistics_of_converted_layers():
    model, x = Classifier(nn.BatchNorm), images((3, 8, 5, 5, 3))
    variables = made(model, x[0])
    call = {"variables": variables, "train": False}

    def estimated(model):
        def train_call(variables, x):
            return model.apply(variables, x, mutable=["batch_stats"])

        return recompute_batch_stats(train_call, variables, x)

    ours, _ = convert(model, ToBatchNorm(), x[0], **call)
    assert_close(estimated(ours), estimated(model), rtol=1e-4)
    frozen, _ = convert(model, ToFrozen(), x[0], layers="BatchNorm_1", **call)
    found = estimated(frozen)
    assert_equal(found["BatchNorm_1"], variables["batch_stats"]["BatchNorm_1"])
    assert_close(found["BatchNorm_0"], estimated(model)["BatchNorm_0"], rtol=1e-4)
