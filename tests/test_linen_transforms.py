"""bnjax.linen.BatchNorm inside every transformation of flax.linen, against Flax's."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests import networks
from tests.networks import Classifier, assert_same

SPLIT = {"params": 0, "batch_stats": 0}
SHARED = {"params": None, "batch_stats": None}
remat_keeping = functools.partial(nn.remat, policy=networks.KEEP_STATISTICS)


class Block(nn.Module):
    """Dense layer, batch norm, relu."""

    norm: type[nn.Module]
    train: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, use_bias=False)(x)
        norm = self.norm(not self.train, momentum=0.9, axis_name=self.axis_name)
        return nn.relu(norm(x))


class Layer(nn.Module):
    """The body of a scan over layers."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return Block(self.norm)(x), None


class Step(nn.Module):
    """The body of a scan over batches."""

    norm: type[nn.Module]
    train: bool = True

    @nn.compact
    def __call__(self, carry, x):
        return carry, Block(self.norm, self.train)(x)


def vmap_over_models(norm, x):
    options = {"in_axes": None, "out_axes": 0, "axis_size": 3}
    return nn.vmap(Block, SPLIT, {"params": True}, **options)(norm)(x)


def vmap_over_models_and_inputs(norm, x):
    models = nn.vmap(Block, SPLIT, {"params": True})
    return models(norm)(jnp.stack([x, 2 * x + 1]))


def vmap_over_the_batch(norm, x):
    shards = nn.vmap(Block, SHARED, {"params": False}, axis_name="batch")
    return shards(norm, axis_name="batch")(x.reshape(4, -1, *x.shape[1:]))


def vmap_over_models_and_the_batch(norm, x):
    shards = nn.vmap(Block, SHARED, {"params": False}, axis_name="batch")
    models = nn.vmap(shards, SPLIT, {"params": True}, in_axes=None, axis_size=2)
    return models(norm, axis_name="batch")(x.reshape(4, -1, *x.shape[1:]))


def scan_over_layers(norm, x, body=Layer):
    layers = nn.scan(body, SPLIT, split_rngs={"params": True}, length=3)
    return layers(norm)(x, None)[0]


def scan_over_rematerialized_layers(norm, x):
    return scan_over_layers(norm, x, remat_keeping(Layer, prevent_cse=False))


def jit(norm, x):
    return nn.jit(Block)(norm)(x)


def remat(norm, x):
    return nn.remat(Block)(norm)(x)


def remat_that_keeps_statistics(norm, x):
    return remat_keeping(Block)(norm)(x)


def remat_of_jit(norm, x):
    return nn.remat(nn.jit(Block))(norm)(x)


LIFTS = [
    jit,
    remat,
    remat_that_keeps_statistics,
    remat_of_jit,
    scan_over_layers,
    scan_over_rematerialized_layers,
    vmap_over_models,
    vmap_over_models_and_inputs,
    vmap_over_models_and_the_batch,
    vmap_over_the_batch,
]


class Lifted(nn.Module):
    """A network that is one transformation."""

    norm: type[nn.Module]
    lift: Callable

    @nn.compact
    def __call__(self, x):
        return self.lift(self.norm, x)


def init(model, *args):
    return jax.jit(model.init)(jax.random.key(0), *args)


def step(model, variables, x):
    """Output, new statistics and gradients of every parameter and of `x`, jitted."""

    @jax.jit
    def run(variables, x):
        def loss(params, x):
            y, new = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            return jnp.sum(y * weights), (y, new)

        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, aux), gradients = gradient(variables["params"], x)
        return aux, gradients

    return run(variables, x)


@pytest.mark.parametrize("lift", LIFTS, ids=lambda lift: lift.__name__)
def test_transformation(lift):
    x, _ = networks.images()
    ours, theirs = (Lifted(norm, lift) for norm in networks.LINEN)
    variables = init(ours, x)
    assert_same(variables, init(theirs, x), 0)
    got, want = (step(model, variables, x) for model in (ours, theirs))
    assert_same(got, want)
    before, after = variables["batch_stats"], got[0][1]["batch_stats"]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (np.asarray(old) != np.asarray(new)).all()


def test_gradients_in_a_network():
    x, labels = networks.images(16)
    ours, theirs = (Classifier(norm) for norm in networks.LINEN)
    variables = init(ours, x)
    assert_same(variables, init(theirs, x), 0)

    def gradients(model):
        def loss(params):
            y, new = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return networks.cross_entropy(y, labels), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    assert_same(gradients(ours), gradients(theirs))


def scan_over_batches(norm, train, variables, **axes):
    """Output and statistics of a network that is called on three batches in turn."""
    x, _ = networks.images()
    steps = nn.scan(Step, split_rngs={"params": False}, **axes)
    xs = jnp.stack([x, x[::-1] * 2, x + 1])

    @jax.jit
    def run(variables):
        model = steps(norm, train)
        (_, y), new = model.apply(variables, None, xs, mutable=["batch_stats"])
        return y, new

    return run(variables)


def test_scan_that_carries_the_statistics():
    x, _ = networks.images()
    axes = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
    variables = init(Step(networks.LINEN[0]), None, x)
    got, want = (
        scan_over_batches(norm, True, variables, **axes) for norm in networks.LINEN
    )
    assert_same(got, want)
    for batch in (x, x[::-1] * 2, x + 1):
        (_, y), new = Step(networks.LINEN[0]).apply(
            variables, None, batch, mutable=["batch_stats"]
        )
        variables = {**variables, **new}
    assert_same((got[0][-1], got[1]), (y, new))


def test_scan_that_broadcasts_the_statistics():
    """As in inference, where the statistics are constants of the loop."""
    x, _ = networks.images()
    axes = {"variable_broadcast": ("params", "batch_stats")}
    variables = init(Step(networks.LINEN[0]), None, x)
    variables = jax.tree.map(lambda leaf: leaf + 0.5, variables)
    got, want = (
        scan_over_batches(norm, False, variables, **axes) for norm in networks.LINEN
    )
    assert_same(got, want)
    # A loop that would change its constants is refused, by Flax, not ignored.
    for norm in networks.LINEN:
        with pytest.raises(ValueError, match="broadcasted variable has a data depend"):
            scan_over_batches(norm, True, variables, **axes)


def test_rematerialization_with_the_policy_repeats_no_sum():
    x, _ = networks.images()

    def sums(transform):
        model = Lifted(networks.LINEN[0], transform)
        variables = init(model, x)

        def loss(params):
            y, _ = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y))

        jaxpr = jax.make_jaxpr(jax.grad(loss))(variables["params"])
        return str(jaxpr).count("batch_norm_moments[")

    assert sums(remat) - sums(remat_that_keeps_statistics) == 1


def test_a_layer_called_twice():
    """It moves its statistics twice."""

    class Twice(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            norm = self.norm(use_running_average=False, momentum=0.5)
            return norm(norm(x) * 3 + 1)

    x, _ = networks.images()
    ours, theirs = (Twice(norm) for norm in networks.LINEN)
    variables = ours.init(jax.random.key(0), x)
    got, want = (step(model, variables, x) for model in (ours, theirs))
    assert_same(got, want)
