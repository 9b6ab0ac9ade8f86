"""What the doctor looks at: batches, averages, replicas, transforms, its arguments."""

import dataclasses
import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
from bnjax.doctor import RULES, Finding, doctor
from bnjax.doctor.facts import Batch, Layer
from bnjax.population import recompute_batch_stats
from bnjax.variants.domains import DomainBatchNorm
from tests.doctor.networks import (
    MOMENTUM,
    STATS,
    Net,
    NnxNet,
    data,
    found,
    well,
    well_nnx,
)


@pytest.fixture(scope="module")
def healthy():
    return well(Net())


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


class OfDomains(nn.Module):
    """One that normalizes by the batch in evaluation."""

    @nn.compact
    def __call__(self, x, train):
        norm = DomainBatchNorm(domains=2, momentum=MOMENTUM, name="bn")
        return nn.Dense(3)(norm(x, use_running_average=False, domain=x.shape[0] % 2))


def test_layers_with_arguments_of_their_own():
    findings = doctor(OfDomains(), well(OfDomains()), data())
    assert ("batch-in-evaluation", "bn") in found(findings)


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
    names = found(doctor(stack_call(True), far, x, ignore="bias-before-norm"))
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


def dropped(x, train):
    return nn.Dropout(0.3, deterministic=not train)(x)


def test_dropout_behind_the_last_layer_is_none(healthy):
    model = Net(after=dropped)
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
    variables["batch_stats"]["mean"] += 1
    [finding] = doctor(Own(), variables, data())
    assert (finding.rule, finding.severity) == ("not-examined", "info")
    assert "not a BatchNorm" in finding.message


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
