"""The project's models are well, and the doctor is quick."""

import functools
import time

import jax
import jax.numpy as jnp
import optax
import pytest

from bnjax import models
from bnjax.doctor import doctor
from bnjax.population import recompute_batch_stats


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
