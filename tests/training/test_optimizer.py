import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.training.config import Config, OptimizerConfig
from bnjax.training.optimizer import decayed, make_optimizer, make_schedule

RATE = 0.2
START = {
    "dense": {
        "kernel": np.array([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]]),
        "bias": np.array([0.5, -1.0, 2.0]),
    },
    # Two rows of scale, as of a stack of layers: its rank says nothing.
    "bn": {"scale": np.array([[1.0, 2.0], [0.5, 3.0]])},
}
LEAVES = ("dense/kernel", "dense/bias", "bn/scale")


def flat(tree):
    return {
        name: np.asarray(tree[name.split("/")[0]][name.split("/")[1]])
        for name in LEAVES
    }


def gradients(seed):
    source = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: source.normal(size=leaf.shape), START)


def config(**options):
    optim = OptimizerConfig(**options)
    return Config(steps=40, batch_size=2, learning_rate=RATE, optim=optim)


def trajectory(optimizer, steps=4):
    """Return the parameters after each step, by name."""
    params = jax.tree.map(jnp.asarray, START)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    path = []
    for seed in range(steps):
        gradient = jax.tree.map(jnp.asarray, gradients(seed))
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(flat(params))
    return path


def numpy_trajectory(make_rule, l2=0.0, steps=4):
    """Follow `make_rule(name)(step, gradient, params) -> decrease` of each leaf."""
    rules = {name: make_rule(name) for name in LEAVES}
    params, path = flat(START), []
    for seed in range(steps):
        gradient = flat(gradients(seed))
        if l2:
            gradient["dense/kernel"] = (
                gradient["dense/kernel"] + l2 * params["dense/kernel"]
            )
        params = {
            name: value - rules[name](seed + 1, gradient[name], value)
            for name, value in params.items()
        }
        path.append(params)
    return path


def compare(found, expected, rtol=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        for name in LEAVES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6)


def sgd(name):
    return lambda step, g, w: RATE * g


def momentum(name, weight=0.8, nesterov=False):
    velocity = 0.0

    def rule(step, g, w):
        nonlocal velocity
        velocity = weight * velocity + g
        return RATE * (g + weight * velocity if nesterov else velocity)

    return rule


def adagrad(name):
    total = 0.1

    def rule(step, g, w):
        nonlocal total
        total = total + g**2
        return RATE * g / np.sqrt(total + 1e-3)

    return rule


def rmsprop(name):
    mean = 0.0

    def rule(step, g, w):
        nonlocal mean
        mean = 0.7 * mean + 0.3 * g**2
        return RATE * g / np.sqrt(mean + 1e-3)

    return rule


def adam_direction():
    m, v = 0.0, 0.0

    def direction(step, g):
        nonlocal m, v
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        return m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)

    return direction


def adam(name):
    direction = adam_direction()
    return lambda step, g, w: RATE * direction(step, g)


def adamw(name):
    direction, decay = adam_direction(), 0.3 * (name == "dense/kernel")
    return lambda step, g, w: RATE * (direction(step, g) + decay * w)


def lamb(name):
    direction, decay = adam_direction(), 0.3 * (name == "dense/kernel")

    def rule(step, g, w):
        d = direction(step, g) + decay * w
        return RATE * d * np.linalg.norm(w) / np.linalg.norm(d)

    return rule


def lars(name):
    is_kernel = name == "dense/kernel"
    velocity = 0.0

    def rule(step, g, w):
        nonlocal velocity
        if is_kernel:
            g = g + 0.3 * w
            g = g * 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
        velocity = 0.8 * velocity + RATE * g
        return velocity

    return rule


MOMENTS = {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}
COUPLED = {
    "sgd": ({}, sgd),
    "momentum": ({"momentum": 0.8}, momentum),
    "nesterov": ({"momentum": 0.8}, lambda name: momentum(name, nesterov=True)),
    "adagrad": ({"epsilon": 1e-3}, adagrad),
    "rmsprop": ({"epsilon": 1e-3, "rms_decay": 0.7}, rmsprop),
    "adam": (MOMENTS, adam),
}
OWN_DECAY = {
    "adamw": (MOMENTS, adamw),
    "lamb": (MOMENTS, lamb),
    "lars": ({"momentum": 0.8}, lars),
}


@pytest.mark.parametrize("name", COUPLED)
def test_the_rule(name):
    options, rule = COUPLED[name]
    found = trajectory(make_optimizer(config(name=name, **options)))
    compare(found, numpy_trajectory(rule))


@pytest.mark.parametrize("name", COUPLED)
def test_the_rule_with_l2_on_the_weights_alone(name):
    options, rule = COUPLED[name]
    optimizer = make_optimizer(config(name=name, weight_decay=0.3, **options))
    compare(trajectory(optimizer), numpy_trajectory(rule, l2=0.3))


@pytest.mark.parametrize("name", OWN_DECAY)
def test_the_rule_with_a_decay_of_its_own(name):
    options, rule = OWN_DECAY[name]
    optimizer = make_optimizer(config(name=name, weight_decay=0.3, **options))
    compare(trajectory(optimizer), numpy_trajectory(rule))


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_clipping_by_the_norm_of_all_gradients_together(limit):
    found = trajectory(make_optimizer(config(clip_norm=limit, weight_decay=0.3)))
    params, expected = flat(START), []
    for seed in range(4):
        gradient = flat(gradients(seed))
        norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
        gradient = {name: g * min(1, limit / norm) for name, g in gradient.items()}
        # The penalty's gradient is not clipped.
        gradient["dense/kernel"] += 0.3 * params["dense/kernel"]
        params = {name: params[name] - RATE * gradient[name] for name in LEAVES}
        expected.append(params)
    compare(found, expected)


@pytest.mark.parametrize("layers", [(), (3,), (2, 3)], ids=str)
def test_decay_goes_by_name_whatever_the_rank(layers):
    layer = {
        "Dense_0": {
            "kernel": jnp.ones((*layers, 4, 5)),
            "bias": jnp.ones((*layers, 5)),
        },
        "BatchNorm_0": {
            "scale": jnp.ones((*layers, 5)),
            "bias": jnp.ones((*layers, 5)),
        },
        "embedding": jnp.ones((*layers, 5)),
    }
    assert decayed({"block": layer}) == {
        "block": {
            "Dense_0": {"kernel": True, "bias": False},
            "BatchNorm_0": {"scale": False, "bias": False},
            "embedding": True,
        }
    }


def cosine(step, left):
    return 0.1 * (1 + math.cos(math.pi * min(step, left) / left))


SCHEDULES = {
    "constant": ({}, lambda step, left: 0.2),
    "exponential": (
        {"decay_rate": 0.5, "decay_steps": 10},
        lambda step, left: 0.2 * 0.5 ** (step // 10),
    ),
    "smooth": (
        {"schedule": "exponential", "decay_rate": 0.5, "decay_steps": 10}
        | {"staircase": False},
        lambda step, left: 0.2 * 0.5 ** (step / 10),
    ),
    "cosine": ({}, cosine),
    "linear": ({}, lambda step, left: 0.2 * (1 - min(step, left) / left)),
}


@pytest.mark.parametrize("warmup", [0, 1, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, warmup):
    options, expected = SCHEDULES[name]
    options = {"schedule": name, "warmup_steps": warmup, **options}
    schedule = make_schedule(config(**options))
    for step in range(40):
        if step < warmup:
            value = 0.2 * (step + 1) / warmup
        else:
            value = expected(step - warmup, 40 - warmup)
        found = np.asarray(schedule(step))
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warmup", [0, 8])
def test_steps_drop_at_their_boundaries_counted_from_the_start(warmup):
    options = {"boundaries": (10, 25), "decay_rate": 0.1, "warmup_steps": warmup}
    schedule = make_schedule(config(schedule="step", **options))
    found = [float(schedule(step)) for step in (9, 10, 24, 25, 39)]
    np.testing.assert_allclose(found, [0.2, 0.02, 0.02, 0.002, 0.002], rtol=1e-5)
