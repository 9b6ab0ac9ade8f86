"""Small networks that are well, and can go wrong in their second block."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx

EXAMPLES = 60
MOMENTUM = 0.9


def data(examples=EXAMPLES):
    x = np.random.default_rng(0).normal(size=(examples, 4))
    return jnp.asarray(x * [1, 2, 0.5, 3] + [0, 1, -2, 0.5], jnp.float32)


def straight(x, train):
    return x


class Net(nn.Module):
    """Two blocks of a linear layer, batch norm and relu; the second can go wrong."""

    norm: Any = bnjax.linen.BatchNorm
    options: Any = dataclasses.field(default_factory=dict)
    bias: bool = False
    first: Any = straight
    before: Any = straight
    after: Any = straight
    frozen: Any = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, use_bias=False, name="dense_0")(x)
        x = self.first(x, train)
        norm = bnjax.linen.BatchNorm(momentum=MOMENTUM, name="bn_0")
        x = nn.relu(norm(x, use_running_average=not train))
        x = nn.Dense(5, use_bias=self.bias, name="dense_1")(x)
        x = self.before(x, train)
        norm = self.norm(**{"momentum": MOMENTUM, **self.options}, name="bn_1")
        frozen = not train if self.frozen is None else self.frozen
        x = self.after(norm(x, use_running_average=frozen), train)
        return nn.Dense(3, name="logits")(nn.relu(x))


def well(model, x=None, **options):
    """The variables of a network, with the statistics of the batch."""
    x = data() if x is None else x
    variables = model.init(jax.random.key(0), x, train=True)
    rngs = {"dropout": jax.random.key(0)}
    _, new = model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

    def solve(old, new):
        return ((new - MOMENTUM * old) / (1 - MOMENTUM)).astype(old.dtype)

    found = jax.tree.map(solve, variables["batch_stats"], new["batch_stats"])
    return {**variables, "batch_stats": found}


def changed(variables, collection, layer, name, change):
    """The variables with one array changed."""
    tree = jax.tree.map(lambda leaf: leaf, variables)
    tree[collection][layer][name] = change(tree[collection][layer][name])
    return tree


def found(findings):
    return [(finding.rule, finding.path) for finding in findings]


STATS = functools.partial(changed, collection="batch_stats", layer="bn_1")


class NnxNet(nnx.Module):
    """The same for nnx."""

    def __init__(self, norm=bnjax.nnx.BatchNorm, bias=False, before=None, **options):
        rngs = nnx.Rngs(0)
        self.dense_0 = nnx.Linear(4, 6, use_bias=False, rngs=rngs)
        self.bn_0 = bnjax.nnx.BatchNorm(6, momentum=MOMENTUM, rngs=rngs)
        self.frozen = options.pop("frozen", None)
        inner = nnx.Linear(6, 5, use_bias=bias, rngs=rngs)
        self.blocks = nnx.List([inner, before if before is not None else nnx.relu])
        self.bn_1 = norm(5, **{"momentum": MOMENTUM, **options}, rngs=rngs)
        self.logits = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn_0(self.dense_0(x)))
        x = self.blocks[0](x)
        if self.blocks[1] is not nnx.relu:
            x = self.blocks[1](x)
        x = nnx.relu(self.bn_1(x, use_running_average=self.frozen))
        return self.logits(x)


def well_nnx(model):
    """The same model, with the statistics of the batch."""
    old = nnx.clone(model)
    model(data())
    for layer, before in ((model.bn_0, old.bn_0), (model.bn_1, old.bn_1)):
        for name in ("mean", "var"):
            kept = getattr(layer, name)
            new = kept[...] - MOMENTUM * getattr(before, name)[...]
            kept[...] = (new / (1 - MOMENTUM)).astype(kept.dtype)
    return model


def set_array(model, layer, name, change):
    variable = getattr(getattr(model, layer), name)
    variable[...] = change(variable[...])
