"""Layers inside scan, vmap, remat and jit, against a loop written out in NumPy."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax.population import recompute_batch_stats
from tests.population.networks import METHODS, assert_relative, population

LENGTH = 3
BATCHES = np.random.default_rng(0).normal(1, 2, (2, 8, 4)).astype(np.float32)


class Block(nn.Module):
    norm: type[nn.Module] = bnjax.linen.BatchNorm

    @nn.compact
    def __call__(self, x, _=None):
        x = self.norm(use_running_average=False, name="bn")(
            nn.Dense(4, name="dense")(x)
        )
        return nn.relu(x), None


def normalized(x):
    return np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), 0)


def block_inputs(params, x):
    """What the layers of `LENGTH` blocks are given, block by block."""
    found = []
    for i in range(LENGTH):
        kernel, bias = (np.float64(params["dense"][n]) for n in ("kernel", "bias"))
        stacked = kernel.ndim == 3
        x = x @ (kernel[i] if stacked else kernel) + (bias[i] if stacked else bias)
        found.append(x)
        x = normalized(x)
    return found


SCANNED = {"variable_axes": {"params": 0, "batch_stats": 0}, "length": LENGTH}
SCANNED["split_rngs"] = {"params": True}
LIFTED = {
    "scan": nn.scan(Block, **SCANNED),
    "scan of remat": nn.scan(nn.remat(Block), **SCANNED),
    "scan of jit": nn.scan(nn.jit(Block), **SCANNED),
}


def linen_call(model, variables, x):
    return model.apply(variables, x, mutable=["batch_stats"])


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("lifted", LIFTED)
def test_stacked_layers(lifted, nested):
    model = LIFTED[lifted](name=None)
    variables = jax.jit(model.init)(jax.random.key(0), BATCHES[0])
    call = functools.partial(linen_call, model)
    found = recompute_batch_stats(jax.jit(call) if nested else call, variables, BATCHES)
    inputs = [block_inputs(variables["params"], np.float64(x)) for x in BATCHES]
    for i in range(LENGTH):
        want = {"bn": population([each[i] for each in inputs], "paper")}
        got = {"bn": jax.tree.map(lambda leaf, i=i: leaf[i], found["bn"])}
        assert_relative(got, want, 2e-6)


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_statistics_carried_through_time(norm):
    """One layer, called `LENGTH` times with its statistics as a carry."""
    variables = jax.jit(Block(norm).init)(jax.random.key(0), BATCHES[0])
    carried = nn.scan(
        Block,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
        length=LENGTH,
    )
    call = functools.partial(linen_call, carried(norm))
    found = recompute_batch_stats(call, variables, BATCHES, method="pooled")
    params = variables["params"]
    joined = [np.concatenate(block_inputs(params, np.float64(x))) for x in BATCHES]
    assert_relative(found, {"bn": population(joined, "pooled")}, 2e-6)


def test_copies_of_a_layer_under_vmap():
    model = nn.vmap(
        Block,
        variable_axes={"params": None, "batch_stats": 0},
        split_rngs={"params": False},
    )()
    xs = np.stack([BATCHES, 3 * BATCHES + 1], 1)
    variables = jax.jit(model.init)(jax.random.key(0), xs[0])
    found = recompute_batch_stats(functools.partial(linen_call, model), variables, xs)
    for copy in range(2):
        inputs = [block_inputs(variables["params"], np.float64(x[copy]))[0] for x in xs]
        got = {"bn": jax.tree.map(lambda leaf, i=copy: leaf[i], found["bn"])}
        want = {"bn": population(inputs, "paper")}
        assert_relative(got, want, 2e-6)


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, nn.BatchNorm])
def test_a_layer_that_is_itself_transformed_counts_once(norm):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(norm)(use_running_average=False, name="bn")(x)

    class Derived(norm):
        """Calls what it extends: two calls for Flax, one input."""

        @nn.compact
        def __call__(self, x):
            return super().__call__(2 * x, use_running_average=False)

    for model, factor in ((Model(), 1), (Derived(name=None), 2)):
        variables = model.init(jax.random.key(0), BATCHES[0])
        call = functools.partial(linen_call, model)
        found = recompute_batch_stats(call, variables, BATCHES, method="pooled")
        want = population(factor * BATCHES, "pooled")
        got = found.get("bn", found)
        assert_relative({"bn": got}, {"bn": want}, 2e-6)


class Net(nnx.Module):
    """A dense layer and batch norm, or several blocks of them, scanned over."""

    def __init__(self, norm, rngs, stacked=False, **options):
        def block(rngs):
            return nnx.Dict(
                dense=nnx.Linear(4, 4, rngs=rngs), bn=norm(4, rngs=rngs, **options)
            )

        if stacked:
            block = nnx.split_rngs(splits=LENGTH)(nnx.vmap(block))
        self.block = block(rngs)
        self.stacked = stacked

    def __call__(self, x):
        def run(x, block):
            return nnx.relu(block.bn(block.dense(x)))

        if self.stacked:
            run = nnx.scan(run, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.block)


def nnx_call(model, x):
    return model(x)


def nnx_inputs(model):
    params = {"dense": {n: getattr(model.block.dense, n) for n in ("kernel", "bias")}}
    params = jax.tree.map(lambda leaf: np.asarray(leaf[...]), params["dense"])
    return [block_inputs({"dense": params}, np.float64(x)) for x in BATCHES]


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(norm):
    model = Net(norm, nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    graph = nnx.graphdef(model)
    inputs, bn = [each[0] for each in nnx_inputs(model)], model.block.bn
    for method in METHODS:
        new = recompute_batch_stats(nnx_call, model, BATCHES, method=method)
        assert nnx.graphdef(model) == graph
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
        got = {"bn": {name: new["block"]["bn"][name][...] for name in ("mean", "var")}}
        assert_relative(got, {"bn": population(inputs, method)})
    nnx.update(model, new)
    np.testing.assert_array_equal(bn.var[...], got["bn"]["var"])
    again = recompute_batch_stats(nnx.jit(nnx_call), model, BATCHES, method=method)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), again, new)


def test_nnx_layers_stacked_and_scanned():
    model = Net(bnjax.nnx.BatchNorm, nnx.Rngs(0), stacked=True)
    nnx.update(model, recompute_batch_stats(nnx_call, model, BATCHES))
    inputs, bn = nnx_inputs(model), model.block.bn
    for i in range(LENGTH):
        got = {"bn": {"mean": bn.mean[i], "var": bn.var[i]}}
        want = {"bn": population([each[i] for each in inputs], "paper")}
        assert_relative(got, want, 2e-6)


def test_nnx_masks_and_chosen_layers():
    class Two(nnx.Module):
        def __init__(self, rngs):
            self.first = bnjax.nnx.BatchNorm(4, rngs=rngs)
            self.second = nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x, mask):
            return self.second(self.first(x, mask=mask), mask=mask)

    model, mask = Two(nnx.Rngs(0)), np.arange(8)[:, None] % 4 > 0

    def call(model, x):
        return model(x, mask)

    new = recompute_batch_stats(call, model, BATCHES, layers="first")
    masks = [mask] * len(BATCHES)
    want = {"first": population(BATCHES, "paper", masks)}
    got = {name: new["first"][name][...] for name in ("mean", "var")}
    assert_relative({"first": got}, want, 1e-6)
    np.testing.assert_array_equal(new["second"]["mean"][...], np.zeros(4))
    both = recompute_batch_stats(call, model, BATCHES)
    np.testing.assert_allclose(both["second"]["var"][...], np.full(4, 6 / 5), 1e-4)
