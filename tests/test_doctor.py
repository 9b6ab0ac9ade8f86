"""The doctor: each mistake is found where it was made, and nothing else is."""

import dataclasses
import functools
import math
import time
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax import models
from bnjax.doctor import RULES, Finding, doctor
from bnjax.doctor.rules import Batch, Layer
from bnjax.population import recompute_batch_stats
from bnjax.variants.ghost import GhostBatchNorm

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
    before: Any = straight
    after: Any = straight
    frozen: Any = None

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, use_bias=False, name="dense_0")(x)
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


def drop(x, train, **options):
    return nn.Dropout(0.3, name="drop", deterministic=not train)(x)


def always_drop(x, train):
    return nn.Dropout(0.3, name="drop", deterministic=False)(x)


def by_hand(x, train):
    """A bias of one's own, behind a cast and a reshape."""
    bias = flax.linen.module._context.module_stack[-1].param(
        "shift", nn.initializers.ones, (5,)
    )
    return (x.astype(jnp.float32) - bias[None]).reshape(-1, 1, 5)[:, 0]


def overflow(x, train):
    class Exp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.exp(1000 * (1 + x**2))

    return Exp(name="exp")(x)


def again(x, train):
    x = 2 * x.reshape(-1, 5, 1)[..., 0] + 1
    norm = bnjax.linen.BatchNorm(momentum=MOMENTUM, name="bn_2")
    return norm(x, use_running_average=not train)


STATS = functools.partial(changed, collection="batch_stats", layer="bn_1")
LINEN = {
    "a running mean far away": (
        {},
        lambda v: STATS(v, name="mean", change=lambda m: m + 9 * (1 + m**2)),
        {},
        ("statistics-far", "bn_1"),
    ),
    "a running variance too large": (
        {},
        lambda v: STATS(v, name="var", change=lambda var: 100 * var),
        {},
        ("statistics-far", "bn_1"),
    ),
    "statistics as they were made": (
        {},
        lambda v: STATS(
            STATS(v, name="var", change=jnp.ones_like),
            name="mean",
            change=jnp.zeros_like,
        ),
        {},
        ("statistics-never-updated", "bn_1"),
    ),
    "a flag that is fixed to training": (
        {"frozen": False},
        None,
        {},
        ("batch-in-evaluation", "bn_1"),
    ),
    "a flag that is fixed to evaluation": (
        {"frozen": True},
        lambda v: STATS(v, name="mean", change=lambda mean: mean + 0.1),
        {},
        ("frozen-in-training", "bn_1"),
    ),
    "dropout in evaluation": (
        {"after": lambda x, train: always_drop(x, train)},
        None,
        {},
        ("dropout-in-evaluation", "drop"),
    ),
    "a bias": ({"bias": True}, None, {}, ("bias-before-norm", "dense_1/bias")),
    "a bias by hand": ({"before": by_hand}, None, {}, ("bias-before-norm", "shift")),
    "weight decay": (
        {},
        None,
        {
            "optimizer": optax.chain(
                optax.masked(
                    optax.add_decayed_weights(0.1),
                    lambda tree: jax.tree_util.tree_map_with_path(
                        lambda path, _: path[-1].key != "bias" and path[0].key != "bn_0",
                        tree,
                    ),
                ),
                optax.sgd(optax.linear_schedule(0, 1, 100), momentum=0.9),
            )
        },
        ("decayed-norm", "bn_1/scale"),
    ),
    "a penalty": (
        {},
        None,
        {"penalty": lambda p: jnp.sum(p["bn_1"]["bias"] ** 2)},
        ("decayed-norm", "bn_1/bias"),
    ),
    "a variance below zero": (
        {},
        lambda v: STATS(v, name="var", change=lambda var: var.at[2].set(-0.1)),
        {},
        ("variance-negative", "bn_1"),
    ),
    "a dead channel": (
        {},
        lambda v: STATS(v, name="var", change=lambda var: var.at[2].set(1e-12)),
        {},
        ("dead-channels", "bn_1"),
    ),
    "a silent channel": (
        {},
        lambda v: changed(v, "params", "bn_1", "scale", lambda s: s.at[3].set(1e-9)),
        {},
        ("dead-channels", "bn_1"),
    ),
    "momentum as in PyTorch": (
        {"options": {"momentum": 0.1}},
        None,
        {},
        ("momentum-of-pytorch", "bn_1"),
    ),
    "a large epsilon": (
        {"options": {"epsilon": 100.0}},
        None,
        {},
        ("epsilon-large", "bn_1"),
    ),
    "statistics of bfloat16": (
        {},
        lambda v: STATS(
            STATS(v, name="var", change=lambda var: var.astype(jnp.bfloat16)),
            name="mean",
            change=lambda mean: mean.astype(jnp.bfloat16),
        ),
        {},
        ("half-precision-statistics", "bn_1"),
    ),
    "dropout before": ({"before": drop}, None, {}, ("dropout-before-norm", "bn_1")),
    "two in a row": ({"after": again}, None, {}, ("norm-after-norm", "bn_2")),
    "an overflow": ({"after": overflow}, None, {}, ("nonfinite", "exp")),
    "a parameter that is lost": (
        {},
        lambda v: changed(
            v, "params", "dense_1", "kernel", lambda k: k.at[1, 1].set(jnp.nan)
        ),
        {},
        ("nonfinite", "dense_1/kernel"),
    ),
    "a running mean that is lost": (
        {},
        lambda v: STATS(v, name="mean", change=lambda m: m.at[1].set(jnp.inf)),
        {},
        ("nonfinite", "bn_1/mean"),
    ),
    "a mean far from zero": (
        {
            "norm": flax.linen.BatchNorm,
            "before": lambda x, train: x + 3000,
        },
        None,
        {},
        ("lost-digits", "bn_1"),
    ),
    "inputs too coarse": (
        {
            "before": lambda x, train: (x + 300).astype(jnp.bfloat16),
            "options": {"dtype": jnp.float32},
        },
        None,
        {},
        ("lost-digits", "bn_1"),
    ),
    "small groups": (
        {"norm": GhostBatchNorm, "options": {"virtual_batch_size": 3}},
        None,
        {},
        ("few-values", "bn_1"),
    ),
    "groups of one": (
        {"norm": GhostBatchNorm, "options": {"virtual_batch_size": 1}},
        lambda v: v,
        {},
        ("one-value", "bn_1"),
    ),
}


@pytest.fixture(scope="module")
def healthy():
    return well(Net())


@pytest.mark.parametrize("name", LINEN)
def test_planted_in_linen(name, healthy):
    fields, change, options, expected = LINEN[name]
    model = Net(**fields)
    if name == "momentum as in PyTorch":
        variables = healthy
    elif name == "groups of one":
        variables = healthy
    elif fields:
        variables = well(model)
    else:
        variables = healthy
    if change is not None:
        variables = change(variables)
    assert found(doctor(model, variables, data(), **options)) == [expected]
