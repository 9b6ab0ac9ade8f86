"""Each mistake is found in a linen network where it was made, and nothing else is."""

import flax.linen
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import bnjax.linen
from bnjax.doctor import RULES, doctor
from bnjax.variants.ghost import GhostBatchNorm
from tests.doctor.networks import MOMENTUM, STATS, Net, changed, data, found, well


def drop(x, train, **options):
    return nn.Dropout(0.3, name="drop", deterministic=not train)(x)


def always_drop(x, train):
    return nn.Dropout(0.3, name="drop", deterministic=False)(x)


def by_hand(x, train):
    """A bias of one's own, behind a cast and a reshape."""

    class Shift(nn.Module):
        @nn.compact
        def __call__(self, x):
            bias = self.param("by", nn.initializers.ones, (5,))
            return (x.astype(jnp.float32) - bias[None]).reshape(-1, 1, 5)[:, 0]

    return Shift(name="shift")(x)


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
        {"after": always_drop},
        None,
        {},
        ("dropout-in-evaluation", "drop"),
    ),
    "a bias": ({"bias": True}, None, {}, ("bias-before-norm", "dense_1/bias")),
    "a bias by hand": ({"before": by_hand}, None, {}, ("bias-before-norm", "shift/by")),
    "weight decay": (
        {},
        None,
        {
            "optimizer": optax.chain(
                optax.masked(
                    optax.add_decayed_weights(0.1),
                    lambda tree: jax.tree_util.tree_map_with_path(
                        lambda path, _: (
                            path[-1].key != "bias" and path[0].key != "bn_0"
                        ),
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
    "dropout in the block before": (
        {"first": drop},
        None,
        {},
        ("dropout-before-norm", "bn_0"),
    ),
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
    # What is called with another momentum, or in groups, learns other statistics.
    same = {"momentum", "virtual_batch_size"} & {*fields.get("options", ())}
    variables = well(model) if fields and not same else healthy
    if change is not None:
        variables = change(variables)
    findings = doctor(model, variables, data(), **options)
    assert found(findings) == [expected]
    rule = next(rule for rule in RULES if rule.name == expected[0])
    [finding] = findings
    assert (finding.severity, finding.fix) == (rule.severity, rule.fix)
    assert finding.evidence
    assert str(finding).startswith(f"{rule.severity}: {expected[1]}: ")


def test_nothing_else_is_planted(healthy):
    assert doctor(Net(), healthy, data()) == ()
    optimizer = optax.sgd(0.1, momentum=0.9)
    penalty = lambda params: jnp.sum(params["logits"]["kernel"] ** 2)  # noqa: E731
    options = {"optimizer": optimizer, "penalty": penalty}
    assert doctor(Net(), healthy, data(), **options) == ()
