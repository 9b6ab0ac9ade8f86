"""Training a network of flax.linen: the same steps as with Flax's layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState as FlaxTrainState
from jax import lax

from tests import networks
from tests.networks import Classifier, assert_same

STEPS = 20


class TrainState(FlaxTrainState):
    """Flax's, with the statistics that it says to add."""

    batch_stats: Any


def create(norm, x, *, optimizer=None, **options):
    model = Classifier(norm, **options)
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    return TrainState.create(
        apply_fn=model.apply, tx=optimizer or optax.adam(0.01), **variables
    )


def train_step(state, x, labels, axis_name=None):
    """As the guide of Flax writes it."""

    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return networks.cross_entropy(logits, labels), updates

    (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    if axis_name is not None:
        loss, gradients = lax.pmean((loss, gradients), axis_name)
    state = state.apply_gradients(grads=gradients)
    return state.replace(batch_stats=updates["batch_stats"]), loss


def trees(state):
    return state.params, state.batch_stats, state.opt_state


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_every_step_is_that_of_flax():
    x, labels = networks.images(16, np.float64)
    ours, theirs = (create(norm, x, param_dtype=jnp.float64) for norm in networks.LINEN)
    assert_same(trees(ours), trees(theirs), 0)
    step = jax.jit(train_step)
    losses = []
    for _ in range(STEPS):
        ours, loss = step(ours, x, labels)
        theirs, wanted = step(theirs, x, labels)
        np.testing.assert_allclose(loss, wanted, rtol=1e-9)
        assert_same(trees(ours), trees(theirs), 1e-7)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    got, want = (
        state.apply_fn(
            {"params": state.params, "batch_stats": state.batch_stats}, x, train=False
        )
        for state in (ours, theirs)
    )
    assert_same(got, want, 1e-7)


@pytest.mark.slow
def test_replicas_are_one_device():
    """Eight devices that share statistics train as one with the whole batch."""
    x, labels = networks.images(32)
    x = x + np.repeat(np.float32(np.arange(8)), 4)[:, None, None, None]
    optimizer = optax.sgd(0.05, momentum=0.9)
    norm = networks.LINEN[0]
    alone = create(norm, x, optimizer=optimizer)
    step = jax.jit(train_step)
    shared = create(norm, x, optimizer=optimizer, axis_name="data")
    replicated = jax.tree.map(lambda leaf: jnp.stack([jnp.asarray(leaf)] * 8), shared)
    replicas = jax.pmap(
        lambda state, x, labels: train_step(state, x, labels, "data"), axis_name="data"
    )
    shards = x.reshape(8, 4, *x.shape[1:]), labels.reshape(8, 4)
    for _ in range(5):
        alone, loss = step(alone, x, labels)
        replicated, losses = replicas(replicated, *shards)
        np.testing.assert_allclose(losses, np.full(8, loss), rtol=1e-5)
    for device in range(8):
        state = jax.tree.map(lambda leaf, device=device: leaf[device], replicated)
        assert_same(trees(state), trees(alone))
