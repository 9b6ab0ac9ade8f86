import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.training.config import Config, OptimizerConfig
from bnjax.training.optimizer import make_optimizer, make_schedule

GRADIENTS = np.random.default_rng(0).normal(size=(4, 3))


def config(**options):
    optim = OptimizerConfig(**options)
    return Config(steps=40, batch_size=2, learning_rate=0.2, optim=optim)


def trajectory(optimizer):
    params, state, path = jnp.ones(3), optimizer.init(jnp.ones(3)), []
    for gradient in GRADIENTS:
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return np.stack(path)


def numpy_trajectory(direction):
    params, path = np.ones(3), []
    for step, gradient in enumerate(GRADIENTS, 1):
        params = params - 0.2 * direction(step, gradient)
        path.append(params)
    return np.stack(path)


def test_sgd():
    found = trajectory(make_optimizer(config(name="sgd")))
    np.testing.assert_allclose(found, numpy_trajectory(lambda _, g: g), rtol=1e-5)


def test_momentum():
    velocity = np.zeros(3)

    def direction(_, gradient):
        nonlocal velocity
        velocity = 0.8 * velocity + gradient
        return velocity

    found = trajectory(make_optimizer(config(name="momentum", momentum=0.8)))
    np.testing.assert_allclose(found, numpy_trajectory(direction), rtol=1e-5)


def test_adam():
    m, v = np.zeros(3), np.zeros(3)

    def direction(step, gradient):
        nonlocal m, v
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        return m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)

    found = trajectory(make_optimizer(config(name="adam")))
    np.testing.assert_allclose(found, numpy_trajectory(direction), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, lambda step: 0.2),
        (
            {"schedule": "exponential", "decay_rate": 0.5, "decay_steps": 10},
            lambda step: 0.2 * 0.5 ** (step // 10),
        ),
        (
            {"schedule": "cosine"},
            lambda step: 0.1 * (1 + math.cos(math.pi * step / 40)),
        ),
    ],
    ids=["constant", "exponential", "cosine"],
)
def test_schedules(options, expected):
    schedule = make_schedule(config(**options))
    for step in (0, 1, 9, 10, 25, 40):
        found = np.asarray(schedule(step))
        np.testing.assert_allclose(found, expected(step), rtol=1e-5, atol=1e-8)
