"""What layers become, against the formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.convert import ToBatchNorm, ToFrozen, ToGroupNorm, convert
from bnjax.variants.ghost import GhostBatchNorm, NnxGhostBatchNorm
from tests import oracle
from tests.convert.models import (
    SAME,
    LinenTwo,
    Two,
    assert_close,
    assert_equal,
    images,
    leaves,
    made,
    two,
    update,
)
from tests.networks import Classifier

CHOICES = {
    "name": "{1}",
    "pattern": "*{1}",
    "several": ["{1}", "{1}"],
    "function of the name": lambda name, layer: name.endswith("1"),
    "function of the layer": lambda name, layer: layer.momentum == 0.8,
}
"""Ways to choose the second of two layers."""


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_layers_are_chosen(api, how):
    layers = CHOICES[how]
    if not callable(layers):
        one = isinstance(layers, str)
        layers = [each.format("", "bn1") for each in ([layers] if one else layers)]
        layers = layers[0] if one else layers
    _, converted, x, given = two(api)
    new = converted(ToFrozen(), x, layers=layers, **given)
    if api == "nnx":
        before = leaves(new)
        new(x)
        after = leaves(new)
    else:
        before = given["variables"]["batch_stats"]
        _, after = update(new[0], given["variables"], x, train=True)
    assert_equal(after["bn1"], before["bn1"])
    assert np.any(after["bn0"]["mean"] != before["bn0"]["mean"])


def group_norm(x, groups, scale, bias, epsilon):
    """In float64, from the formula: each example and group by itself."""
    x = np.asarray(x, np.float64)
    split = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean = split.mean((1, 3), keepdims=True)
    var = split.var((1, 3), keepdims=True)
    return ((split - mean) / np.sqrt(var + epsilon)).reshape(x.shape) * scale + bias


class LinenResidual(nn.Module):
    """With what bnjax's layer adds, and a scale that starts elsewhere."""

    @nn.compact
    def __call__(self, x, train):
        norm = bnjax.linen.BatchNorm(
            epsilon=1e-3,
            activation="relu",
            scale_init=nn.initializers.constant(0.5),
            name="bn",
        )
        return norm(x, not train, residual=x)


class NnxResidual(nnx.Module):
    def __init__(self):
        self.bn = bnjax.nnx.BatchNorm(
            6, epsilon=1e-3, activation="relu", rngs=nnx.Rngs(0)
        )

    def __call__(self, x):
        return self.bn(x, False, residual=x)


@pytest.mark.parametrize(
    ("to", "groups"),
    [(ToGroupNorm(2), 2), (ToGroupNorm(None, group_size=1), 6), (ToGroupNorm(1), 1)],
)
def test_group_norm_starts_anew_and_keeps_activation_and_residual(to, groups):
    x = images((4, 3, 3, 6))
    model, given = LinenResidual(), made(LinenResidual(), x, train=False)
    new, variables = convert(
        model, to, x, variables=given, train=False, may_change=True
    )
    assert set(variables) == {"params"}
    start = {"scale": jnp.full(6, 0.5), "bias": jnp.zeros(6)}
    assert_equal(variables["params"], {"bn": start})
    for train in (False, True):
        y = new.apply(variables, x, train)
        want = np.maximum(group_norm(x, groups, 0.5, 0, 1e-3) + np.asarray(x), 0)
        assert_close(y, want, atol=1e-5)

    model = NnxResidual()
    model.bn.scale[...] = jnp.full(6, 7.0)
    new = convert(model, to, x, may_change=True)
    assert_equal(leaves(new), {"bn": {"scale": jnp.ones(6), "bias": jnp.zeros(6)}})
    want = np.maximum(group_norm(x, groups, 1, 0, 1e-3) + np.asarray(x), 0)
    assert_close(new(x), want, atol=1e-5)
    assert isinstance(model.bn, nnx.BatchNorm)


@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_frozen_layers_are_an_affine_map(api, learn, x64):
    _, converted, x, given = two(api)
    x = x.astype("float64")
    new = converted(ToFrozen(train_scale_and_bias=learn), x, **given)
    dy = jnp.asarray(np.random.default_rng(5).normal(size=x.shape))
    if api == "linen":
        new, variables = new
        params, stats = (variables[c]["bn0"] for c in ("params", "batch_stats"))

        def loss(params, x):
            given = {**variables, "params": {**variables["params"], "bn0": params}}
            y, _ = update(new, given, x, train=True)
            return jnp.sum(y * dy)

    else:
        new.train()
        rest = [
            nnx.to_pure_dict(nnx.state(new.bn0, kind))
            for kind in (nnx.Param, nnx.BatchStat)
        ]
        params, stats = rest

        def loss(params, x):
            copy = nnx.clone(new)
            nnx.update(copy.bn0, params)
            return jnp.sum(copy(x) * dy)

    found, dx = jax.grad(loss, (0, 1))(params, x)
    second = {"mean": 0.0, "var": 1.0, "scale": 1.0, "bias": 0.0}
    if api == "linen":
        second = {**variables["params"]["bn1"], **variables["batch_stats"]["bn1"]}
    inv = [1 / np.sqrt(np.float64(s["var"]) + 1e-5) for s in (stats, second)]
    xhat = (np.asarray(x) - np.float64(stats["mean"])) * inv[0]
    y = np.float64(params["scale"]) * xhat + np.float64(params["bias"])
    y = (y - np.float64(second["mean"])) * inv[1] * np.float64(second["scale"])
    slope = 1 - np.tanh(y + np.float64(second["bias"])) ** 2
    dy0 = np.asarray(dy) * slope * inv[1] * np.float64(second["scale"])
    want = {"scale": (dy0 * xhat).sum(0) * learn, "bias": dy0.sum(0) * learn}
    # Parameters are float32.
    assert_close(found, want, rtol=1e-6, atol=1e-6)
    assert_close(dx, dy0 * np.float64(params["scale"]) * inv[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_shared_layers_have_the_statistics_of_all_devices(api):
    _, converted, _, given = two(api)
    x = images((16, 4)) * jnp.linspace(1, 3, 16)[:, None]
    new = converted(ToBatchNorm(axis_name="data", momentum=0.5), x, **given)

    def step(x):
        if api == "linen":
            return update(new[0], new[1], x, train=True)
        copy = nnx.clone(new)
        copy.train()
        y = copy(x)
        return y, nnx.to_pure_dict(nnx.state(copy, nnx.BatchStat))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())
    )
    y, stats = jax.jit(sharded)(x)
    want = converted(ToBatchNorm(momentum=0.5), x, **given)
    new = want
    whole, whole_stats = step(x)
    assert_close(y, whole, rtol=1e-4, atol=1e-5)
    assert_close(stats, whole_stats, rtol=1e-4, atol=1e-5)
    old = bnjax.BatchStats.init(4)
    if api == "linen":
        old = bnjax.BatchStats(**given["variables"]["batch_stats"]["bn0"])
    mean, var = oracle.running(old, x, momentum=0.5, unbiased=False)
    assert_close(stats["bn0"], {"mean": mean, "var": var})


@pytest.mark.slow
def test_an_axis_that_was_written_into_a_model_is_left_out_again():
    x = images()
    model = Classifier(nn.BatchNorm, axis_name="batch")
    variables = made(model, x)
    with pytest.raises(NameError, match="batch"):
        update(model, variables, x)
    new, _ = convert(
        model, ToBatchNorm(axis_name=()), x, variables=variables, train=False
    )
    want = update(Classifier(nn.BatchNorm), variables, x)
    assert_close(update(new, variables, x), want, rtol=1e-4, atol=1e-5)
    norm = nnx.BatchNorm(x.shape[-1], axis_name="batch", rngs=nnx.Rngs(0))
    alone = convert(nnx.Sequential(norm), ToBatchNorm(axis_name=()), x)
    assert alone.layers[0].axis_name is None


def test_groups_of_an_axis_share_statistics():
    model, converted, x, given = two("linen")
    groups = ToBatchNorm(axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    assert hash(groups)
    new, variables = converted(groups, x, **given)
    x = images((4, 3, 4))
    step = functools.partial(update, new, variables, train=True)
    y, _ = jax.pmap(step, axis_name="data")(x)
    want = [
        update(model, variables, half, train=True)[0] for half in x.reshape(2, 6, 4)
    ]
    assert_close(y.reshape(2, 6, 4), jnp.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_other_dtypes(api, dtype, x64):
    kind = {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}[api]
    typed = functools.partial(kind, dtype=dtype, param_dtype=dtype)
    _, converted, x, given = two(api, typed)
    for to in SAME.values():
        new = converted(to, x, **given)
        if api == "nnx":
            new.eval()
            assert new(x).dtype == dtype
            assert new.bn0.scale[...].dtype == dtype
        else:
            assert new[0].apply(new[1], x).dtype == dtype


class Knot(nnx.Module):
    """A layer in two places, layers in a tuple, a cycle, and a stack of layers."""

    def __init__(self, rngs):
        self.once = nnx.BatchNorm(4, rngs=rngs)
        self.again = self.once
        self.pair = nnx.data(tuple(nnx.BatchNorm(4, rngs=rngs) for _ in range(2)))
        self.child = nnx.Linear(4, 4, rngs=rngs)
        self.child.parent = self
        make = nnx.vmap(lambda rngs: nnx.BatchNorm(4, rngs=rngs), in_axes=0)
        self.stack = make(rngs.split(3))

    def __call__(self, x):
        for layer in (self.once, *self.pair, self.again):
            x = layer(x)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer, x):
            return layer(x)

        return through(self.stack, self.child(x))


@pytest.mark.parametrize("to", [*SAME.values(), ToGroupNorm(2)])
def test_sharing_and_containers_are_as_they_were(to):
    model, x = Knot(nnx.Rngs(0)), images((6, 4))
    new = convert(model, to, x, may_change=isinstance(to, ToGroupNorm))
    assert new.once is new.again
    assert new.child.parent is new
    kinds = {type(layer) for layer in (new.once, *new.pair, new.stack)}
    assert len(kinds) == 1
    assert kinds != {nnx.BatchNorm}
    assert new.stack.scale[...].shape == (3, 4)
    if to != SAME["shared"]:
        new.train()
        assert new(x).shape == (6, 4)


def test_virtual_batches_are_those_of_the_variant():
    x = images((6, 4))
    _, converted, _, given = two("linen")
    new, variables = converted(ToBatchNorm(virtual_batch_size=3), x, **given)
    want = LinenTwo(functools.partial(GhostBatchNorm, virtual_batch_size=3))
    assert_equal(
        update(new, variables, x, train=True), update(want, variables, x, train=True)
    )
    _, converted, _, _ = two("nnx")
    new = converted(ToBatchNorm(virtual_batch_size=3), x)
    want = Two(nnx.Rngs(0), functools.partial(NnxGhostBatchNorm, virtual_batch_size=3))
    for each in (new, want):
        each.train()
    assert_equal(new(x), want(x))
    assert_equal(leaves(new), leaves(want))
    # An own mode lasts through a second conversion.
    trains = converted(ToBatchNorm(use_running_average=False), x)
    again = convert(trains, ToBatchNorm(virtual_batch_size=3), x)
    assert_close(again.bn0(x, True), new.bn0(x, False))


def test_frozen_layers_stay_frozen_until_their_mode_is_set():
    for to in (ToBatchNorm(momentum=0.5), ToBatchNorm(virtual_batch_size=3)):
        _, converted, x, given = two("linen")
        model, variables = converted(ToFrozen(), x, **given)
        new, _ = convert(model, to, x, variables=variables)
        _, stats = update(new, variables, x, train=True)
        assert_equal(stats, variables["batch_stats"])

        _, converted, x, _ = two("nnx")
        new = convert(converted(ToFrozen(), x), to, x)
        before = leaves(new)
        new.train()
        new(x)
        assert_equal(leaves(new), before)
        thawed = convert(new, ToBatchNorm(use_running_average=False), x)
        thawed(x)
        assert np.any(leaves(thawed)["bn0"]["mean"] != before["bn0"]["mean"])
