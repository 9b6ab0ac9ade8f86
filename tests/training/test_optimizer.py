import math
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from bnjax.data.config import SettingError
from bnjax.training.config import Config, OptimizerConfig
from bnjax.training.optimizer import (
    average_of,
    decayed,
    keep_average,
    make_optimizer,
    make_schedule,
)

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
    leaves = flatten_dict(tree, sep="/")
    return {name: np.asarray(leaves[name]) for name in LEAVES}


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


def numpy_trajectory(rule, l2=0.0, steps=4):
    """Follow `rule(memory, step, gradient, params) -> decrease` of each leaf."""
    memory = {name: defaultdict(float) for name in LEAVES}
    memory["dense/kernel"]["decay"] = 0.3
    params, path = flat(START), []
    for seed in range(steps):
        gradient = flat(gradients(seed))
        gradient["dense/kernel"] += l2 * params["dense/kernel"]
        params = {
            name: value - rule(memory[name], seed + 1, gradient[name], value)
            for name, value in params.items()
        }
        path.append(params)
    return path


def compare(found, expected, rtol=2e-5):
    for ours, theirs in zip(found, expected, strict=True):
        for name in LEAVES:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=rtol, atol=1e-6)


def sgd(memory, step, g, w):
    return RATE * g


def momentum(memory, step, g, w):
    memory["v"] = 0.8 * memory["v"] + g
    return RATE * memory["v"]


def nesterov(memory, step, g, w):
    return RATE * g + 0.8 * momentum(memory, step, g, w)


def adagrad(memory, step, g, w):
    memory["total"] += g**2
    return RATE * g / np.sqrt(0.1 + memory["total"] + 1e-3)


def rmsprop(memory, step, g, w):
    memory["mean"] = 0.7 * memory["mean"] + 0.3 * g**2
    return RATE * g / np.sqrt(memory["mean"] + 1e-3)


def adam(memory, step, g, w):
    memory["m"] = m = 0.8 * memory["m"] + 0.2 * g
    memory["v"] = v = 0.95 * memory["v"] + 0.05 * g**2
    return RATE * m / (1 - 0.8**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-3)


def adamw(memory, step, g, w):
    return adam(memory, step, g, w) + RATE * memory["decay"] * w


def lamb(memory, step, g, w):
    d = adamw(memory, step, g, w) / RATE
    return RATE * d * np.linalg.norm(w) / np.linalg.norm(d)


def lars(memory, step, g, w):
    if memory["decay"]:
        g = g + 0.3 * w
        g = g * 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
    return momentum(memory, step, g, w)


MOMENTS = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}
L2 = {
    "sgd": ("sgd", {}, sgd),
    "momentum": ("sgd", {"momentum": 0.8}, momentum),
    "nesterov": ("sgd", {"momentum": 0.8, "nesterov": True}, nesterov),
    "adagrad": ("adagrad", {"eps": 1e-3}, adagrad),
    "rmsprop": ("rmsprop", {"eps": 1e-3, "decay": 0.7}, rmsprop),
    "adam": ("adam", MOMENTS, adam),
}
OWN_DECAY = {
    "adamw": ("adamw", MOMENTS, adamw),
    "lamb": ("lamb", MOMENTS, lamb),
    "lars": ("lars", {"momentum": 0.8}, lars),
}


@pytest.mark.parametrize(
    ("case", "weight_decay"),
    [
        *((c, d) for c in L2.values() for d in (0.0, 0.3)),
        *((c, 0.3) for c in OWN_DECAY.values()),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_the_rule(case, weight_decay):
    name, options, rule = case
    optim = config(name=name, options=options, weight_decay=weight_decay)
    l2 = weight_decay if case in L2.values() else 0
    compare(trajectory(make_optimizer(optim)), numpy_trajectory(rule, l2=l2))


def test_a_keyword_of_the_optimizers_own_wins():
    options = {**MOMENTS, "weight_decay": 0.3}
    found = trajectory(make_optimizer(config(name="adamw", options=options)))
    compare(found, numpy_trajectory(adamw))


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
    expected = {
        "Dense_0": {"kernel": True, "bias": False},
        "BatchNorm_0": {"scale": False, "bias": False},
        "embedding": True,
    }
    params = jax.tree.map(lambda _: jnp.ones((*layers, 5)), expected)
    assert decayed({"block": params}) == {"block": expected}


def cosine(step, left):
    return 0.1 * (1 + math.cos(math.pi * min(step, left) / left))


DECAY = {"decay_rate": 0.5, "transition_steps": 10}
SCHEDULES = {
    "constant_schedule": ({}, lambda step, left: 0.2),
    "exponential_decay": (DECAY, lambda step, left: 0.2 * 0.5 ** (step / 10)),
    "cosine_decay_schedule": ({}, cosine),
    "linear_schedule": ({}, lambda step, left: 0.2 * (1 - min(step, left) / left)),
    "polynomial_schedule": (
        {"power": 2, "end_value": 0.1},
        lambda step, left: 0.1 + 0.1 * (1 - min(step, left) / left) ** 2,
    ),
    "exponential_decay in stairs": (
        {**DECAY, "staircase": True},
        lambda step, left: 0.2 * 0.5 ** (step // 10),
    ),
}


PIECEWISE = "piecewise_constant_schedule"


def scheduled(name, **options):
    return {"schedule": name, "schedule_options": options}


@pytest.mark.parametrize("warmup", [0, 1, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, warmup):
    options, expected = SCHEDULES[name]
    optim = scheduled(name.partition(" ")[0], **options)
    schedule = make_schedule(config(warmup_steps=warmup, **optim))
    rising = [0.2 * (step + 1) / warmup for step in range(warmup)]
    after = [expected(step, 40 - warmup) for step in range(40 - warmup)]
    found = [float(schedule(step)) for step in range(40)]
    np.testing.assert_allclose(found, rising + after, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("warmup", [0, 8])
def test_steps_drop_at_their_boundaries_counted_from_the_start(warmup):
    optim = scheduled(PIECEWISE, boundaries_and_scales={10: 0.1, 25: 0.1})
    schedule = make_schedule(config(warmup_steps=warmup, **optim))
    found = [float(schedule(step)) for step in (9, 10, 24, 25, 39)]
    np.testing.assert_allclose(found, [0.2, 0.02, 0.02, 0.002, 0.002], rtol=1e-5)


def adam_with(**options):
    return {"name": "adam", "options": options}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "lasr"},
            r"--optim.name lasr: Optax .* mean 'lars'\? Expected one of",
        ),
        ({"name": "scale_by_adam"}, "Optax has no such function"),
        ({"schedule": "cosine"}, "--optim.schedule cosine: .*cosine_decay_schedule"),
        ({"options": {"b1": 0.9}}, "--optim.options b1: sgd .* It has momentum"),
        ({"options": {"momentun": 0.9}}, r"no such keyword\. Did you mean 'momentum'"),
        ({"options": {"momentum": 1.0}}, r"momentum=1.0: expected a number in \[0, 1"),
        ({"options": {"momentum": "big"}}, "--optim.options momentum=big: expected"),
        (adam_with(b2=1), r"b2=1: expected a number in \[0, 1\)"),
        (adam_with(eps=0), "eps=0: expected a positive number"),
        (adam_with(mu_dtype="x"), r"--optim.name adam\(mu_dtype=x\) fails"),
        ({"name": "lbfgs"}, r"--optim.name lbfgs\(\) fails: .*'value'"),
        ({"name": "rprop"}, r"--optim.name rprop\(\) fails"),
        (scheduled("exponential_decay"), "needs decay_rate: add --optim.schedule-op"),
        (
            scheduled("exponential_decay", decay_rate=0),
            "--optim.schedule-options decay_rate=0: expected a positive number",
        ),
        (
            scheduled("linear_schedule", transition_steps=0),
            "transition_steps=0: expected a positive number",
        ),
        (
            scheduled(PIECEWISE),
            "boundaries_and_scales=None: expected steps and their factors",
        ),
        (
            scheduled(PIECEWISE, boundaries_and_scales={-5: 0.1}),
            "boundaries_and_scales={-5: 0.1}: expected steps",
        ),
    ],
)
def test_what_optax_does_not_take(options, message):
    with pytest.raises(SettingError, match=message):
        make_optimizer(config(**options))


def test_the_average_is_the_weighted_mean_of_the_parameters():
    decay, seen = 0.9, []
    params = {"kernel": jnp.arange(6.0).reshape(2, 3)}
    optimizer = keep_average(optax.adam(0.3), decay)
    state = optimizer.init(params)
    for step in range(7):
        gradients = jax.tree.map(lambda leaf, step=step: jnp.sin(leaf + step), params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["kernel"], np.float64))
    weights = decay ** np.arange(7)[::-1]
    expected = np.tensordot(weights, seen, 1) / weights.sum()
    found = average_of(state, decay)["kernel"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
