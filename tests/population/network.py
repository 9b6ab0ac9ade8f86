"""A network whose layers may share statistics, its batches, and what NumPy gives."""

import functools

import jax
import numpy as np

from bnjax.models import MLP, Normalization
from tests.population import oracle

EXAMPLES, DEVICES = 32, 8


@functools.cache
def make(axis_name=None):
    """The call of a training step, the variables, and three batches."""
    model = MLP((6, 5), 3, 0.5, Normalization(axis_name=axis_name))
    rng = np.random.default_rng(4)
    batches = rng.normal(1, 3, (3, EXAMPLES, 4)).astype(np.float32)
    # Devices whose parts differ, so that it matters who shares.
    batches += np.repeat(np.arange(DEVICES), EXAMPLES // DEVICES)[:, None]
    init = functools.partial(MLP((6, 5), 3, 0.5).init, train=False)
    variables = jax.jit(init)(jax.random.key(0), batches[0])

    def call(variables, batch):
        return model.apply(variables, batch, train=True, mutable=["batch_stats"])

    return call, variables, batches


def expected(variables, batches, method):
    inputs = [oracle.mlp_inputs(variables["params"], x) for x in batches]
    return oracle.populations(inputs, method)
