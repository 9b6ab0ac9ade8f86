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
        {"after": always_drop},
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


class Exp(nnx.Module):
    def __call__(self, x):
        return jnp.exp(1000 * (1 + x**2))


NNX = {
    "a running mean far away": (
        {},
        lambda m: set_array(m, "bn_1", "mean", lambda x: x + 9 * (1 + x**2)),
        ("statistics-far", "bn_1"),
    ),
    "statistics as they were made": (
        {},
        lambda m: (
            set_array(m, "bn_1", "mean", jnp.zeros_like),
            set_array(m, "bn_1", "var", jnp.ones_like),
        ),
        ("statistics-never-updated", "bn_1"),
    ),
    "a flag that is fixed to training": (
        {"frozen": False},
        None,
        ("batch-in-evaluation", "bn_1"),
    ),
    "a flag that is fixed to evaluation": (
        {},
        lambda m: m.bn_1.set_attributes(use_running_average=True),
        ("frozen-in-training", "bn_1"),
    ),
    "a bias": ({"bias": True}, None, ("bias-before-norm", "blocks/0/bias")),
    "dropout before": (
        {"before": nnx.Dropout(0.3, rngs=nnx.Rngs(0))},
        None,
        ("dropout-before-norm", "bn_1"),
    ),
    "an overflow": ({"before": Exp()}, None, ("nonfinite", "blocks/1")),
    "a mean far from zero": (
        {"norm": flax.nnx.BatchNorm, "before": lambda x: x + 3000},
        None,
        ("lost-digits", "bn_1"),
    ),
    "a variance below zero": (
        {},
        lambda m: set_array(m, "bn_1", "var", lambda var: var.at[2].set(-0.1)),
        ("variance-negative", "bn_1"),
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_planted_in_nnx(name):
    options, change, expected = NNX[name]
    model = well_nnx(NnxNet(**options))
    if change is not None:
        change(model)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Not(nnx.RngState)))
    assert found(doctor(model, None, data())) == [expected]
    after = nnx.state(model, nnx.Not(nnx.RngState))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_a_healthy_nnx_model():
    model = well_nnx(NnxNet())
    assert doctor(model, None, data()) == ()
    assert doctor(lambda model, batch: model(batch["x"]), model, {"x": data()}) == ()
    optimizer = nnx.Optimizer(model, optax.adamw(0.1), wrt=nnx.Param)
    assert found(doctor(model, None, data(), optimizer=optimizer)) == [
        ("decayed-norm", f"bn_{i}/{name}") for i in (0, 1) for name in ("bias", "scale")
    ]
    optimizer = optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    assert doctor(model, None, data(), optimizer=optimizer) == ()


@pytest.mark.parametrize("norm", [bnjax.linen.BatchNorm, flax.linen.BatchNorm])
def test_small_batches(norm, healthy):
    # Every layer has as few values.
    findings = doctor(Net(norm), healthy, data(1))
    assert found(findings) == [("one-value", "bn_0"), ("one-value", "bn_1")]
    if norm is bnjax.linen.BatchNorm:
        few = doctor(Net(norm), well(Net(norm), data(7)), data(7))
        assert found(few) == [("few-values", "bn_0"), ("few-values", "bn_1")]
        assert few[0].evidence["values"] == 7
        assert doctor(Net(norm), well(Net(norm), data(8)), data(8)) == ()


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_statistics_of_the_parameters_before_an_average(kind, healthy):
    key = jax.random.key(7)
    if kind == "linen":
        params = healthy["params"]
        other = jax.random.normal(key, params["dense_1"]["kernel"].shape)
        mean = {**params, "dense_1": {"kernel": 0.1 * other}}
        args = Net(), {**healthy, "params": mean}
    else:
        model = well_nnx(NnxNet())
        params = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
        kernel = model.blocks[0].kernel
        kernel[...] = 0.1 * jax.random.normal(key, kernel[...].shape)
        args = model, None
    findings = doctor(*args, data(), params_before_average=params)
    assert found(findings) == [("statistics-stale", "bn_1")]
    [finding] = findings
    assert finding.evidence["layers"] == 1
    assert finding.evidence["distance_before_average"] < 0.01
    assert finding.evidence["distance"] > 1
    # Without knowing the parameters before, the statistics are only far.
    assert found(doctor(*args, data())) == [("statistics-far", "bn_1")]


def test_replicas(healthy):
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), healthy)
    assert doctor(Net(), copies, data(), replicated=True) == ()
    apart = STATS(copies, name="mean", change=lambda mean: mean.at[2, 1].add(0.25))
    findings = doctor(Net(), apart, data(), replicated=True)
    assert found(findings) == [("replicas-differ", "bn_1/mean")]
    expected = {"copies": 3, "largest_difference": 0.25}
    assert findings[0].evidence == pytest.approx(expected, rel=1e-6)


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_copies_on_devices(healthy):
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def apart(mean):
        shards = [jax.device_put(mean + 0.5 * i, d) for i, d in enumerate(devices)]
        return jax.make_array_from_single_device_arrays(mean.shape, everywhere, shards)

    findings = doctor(Net(), STATS(healthy, name="mean", change=apart), data())
    assert found(findings) == [("replicas-differ", "bn_1/mean")]


class Block(nn.Module):
    """One of a stack; its second layer shares statistics with others."""

    bias: bool = False

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4, use_bias=self.bias, name="dense")(x)
        norm = bnjax.linen.BatchNorm(
            use_running_average=False, momentum=MOMENTUM, name="bn"
        )
        return jnp.tanh(norm(x)), None


class Stack(nn.Module):
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=3)
        return scanned(self.bias, name="blocks")(x, None)[0]


def stack_call(bias):
    def call(variables, x):
        return Stack(bias).apply(variables, x, mutable=["batch_stats"])

    return call


def test_through_transforms():
    """The layers of a scan over rematerialized blocks are seen too."""
    x = data()
    variables = Stack(True).init(jax.random.key(0), x)
    new = recompute_batch_stats(stack_call(True), variables, [x])
    variables = {**variables, "batch_stats": new}
    findings = doctor(stack_call(True), variables, x)
    assert found(findings) == [("bias-before-norm", "blocks/dense/bias")]
    far = jax.tree.map(lambda leaf: leaf, variables)
    far["batch_stats"]["blocks"]["bn"]["var"] *= 1000
    names = found(doctor(stack_call(True), far, x, ignore=["bias-before-norm"]))
    assert names == [("statistics-far", "blocks/bn")]


def test_shared_by_an_axis():
    model = Net(options={"axis_name": "devices"})
    plain = well(Net())
    assert doctor(model, plain, data(), axis_name="devices") == ()
    biased = Net(options={"axis_name": "devices"}, bias=True)
    variables = {**plain, "params": well(Net(bias=True))["params"]}
    findings = doctor(biased, variables, data(), axis_name="devices")
    assert found(findings) == [("bias-before-norm", "dense_1/bias")]


def test_a_bias_that_others_read_is_none():
    """A sum that goes past the layer too needs its bias."""

    class PreActivation(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            h = nn.Dense(4, name="first")(x)
            norm = bnjax.linen.BatchNorm(momentum=MOMENTUM, name="bn")
            return h + nn.Dense(4)(nn.relu(norm(h, use_running_average=not train)))

    assert doctor(PreActivation(), well(PreActivation()), data()) == ()


def test_dropout_behind_the_last_layer_is_none(healthy):
    model = Net(after=drop)
    assert doctor(model, healthy, data()) == ()


def test_a_layer_of_ones_own():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
            self.variable("batch_stats", "var", jnp.ones, 4)
            mean.value = x.mean(0)
            return x - mean.value

    variables = Own().init(jax.random.key(0), data())
    variables["batch_stats"]["var"] *= 2
    [finding] = doctor(Own(), variables, data())
    assert (finding.rule, finding.severity) == ("not-examined", "info")
    assert "no BatchNorm" in finding.message


def test_distance_by_hand():
    """Two channels: one off by 3 deviations, one of e^2 times the variance."""
    layer = Layer(
        path="bn",
        mean=np.array([3.0, 0.0]),
        var=np.array([1.0, math.e**2]),
        dtype=np.float32,
        scale=None,
        calls=(),
        eval_calls=(),
        batch=None,
        before=None,
        moved=False,
    )
    batch = Batch(np.zeros(2), np.ones(2), np.full(2, 50.0))
    assert layer.distance(batch) == pytest.approx(math.sqrt((9 + 2) / 2), rel=1e-12)
    assert layer.distance(None) == 0
    assert layer.distance(dataclasses.replace(batch, mean=np.full(2, np.nan))) == 0


def test_the_network_is_traced_once_in_each_mode(healthy):
    modes = []

    def count(x, train):
        modes.append(train)
        return x

    doctor(Net(before=count), healthy, data(), params_before_average=healthy["params"])
    assert sorted(modes) == [False, True]


def test_errors(healthy):
    with pytest.raises(ValueError, match="Did you mean 'few-values'"):
        doctor(Net(), healthy, data(), ignore=["few-value"])
    with pytest.raises(TypeError, match="expected a linen module and its variables"):
        doctor(Net(), None, data())
    with pytest.raises(ValueError, match="has no batch norm layer"):
        doctor(Net(), {"params": {}}, data())
    with pytest.raises(TypeError, match=r"optimizer\.update\(gradients"):
        doctor(Net(), healthy, data(), optimizer=optax.lbfgs())
    with pytest.raises(ValueError, match="params_before_average has the structure"):
        doctor(Net(), healthy, data(), params_before_average={"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"^doctor: apply_fn returns no updated"):
        doctor(lambda v, x: Net().apply(v, x, train=False), healthy, data())


def test_findings_are_sorted_as_the_rules_are(healthy):
    names = [rule.name for rule in RULES]
    assert len(set(names)) == len(names) >= 16
    findings = doctor(
        Net(norm=flax.linen.BatchNorm, options={"momentum": 0.0}),
        STATS(healthy, name="var", change=lambda v: -v),
        data(),
    )
    assert found(findings) == [
        ("variance-negative", "bn_1"),
        ("momentum-of-pytorch", "bn_1"),
    ]
    assert all(isinstance(finding, Finding) for finding in findings)


def images(shape, examples):
    return jax.random.uniform(jax.random.key(3), (examples, *shape))


def with_population(model, x):
    """The variables of a model, with statistics over the images."""
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), x[:1])

    def call(variables, x):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)

    new = recompute_batch_stats(call, variables, [x], method="pooled")
    return {**variables, "batch_stats": new}


FLAX = models.Normalization(kind="flax", unbiased=False)
MODELS = {
    "mlp": ((28, 28), 60, {}),
    "mlp of flax": ((8, 8), 60, {"normalization": FLAX, "name": "mlp"}),
    "mlp in bfloat16": ((8, 8), 60, {"dtype": jnp.bfloat16, "name": "mlp"}),
    "lenet": ((28, 28, 1), 20, {}),
}
SLOW_MODELS = {
    "resnet20": ((32, 32, 3), 16, {"width": 0.25}),
    "resnet18": ((64, 64, 3), 12, {"width": 0.25, "zero_scale": True}),
    "resnet50": ((64, 64, 3), 12, {"width": 0.25}),
    "inception": ((64, 64, 3), 10, {"width": 0.25, "dropout": 0.2}),
}


@pytest.mark.parametrize(
    "name",
    [*MODELS, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_MODELS)],
)
def test_models_are_healthy(name):
    shape, examples, options = (MODELS | SLOW_MODELS)[name]
    model = models.create(**{"name": name, **options})
    x = images(shape, examples)
    variables = with_population(model, x)
    optimizer = optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    assert doctor(model, variables, x, optimizer=optimizer) == ()


@pytest.mark.slow
def test_inception_takes_less_than_a_minute():
    model = models.create("inception")
    x = images((96, 96, 3), 16)
    variables = with_population(model, x)
    start = time.monotonic()
    assert doctor(model, variables, x) == ()
    assert time.monotonic() - start < 60
