"""Each mistake is found in a model of nnx where it was made, and nothing else is."""

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from bnjax.doctor import doctor
from tests.doctor.networks import NnxNet, data, found, set_array, well_nnx


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
    "an overflow": (
        {},
        lambda m: setattr(m, "blocks", nnx.List([m.blocks[0], Exp()])),
        ("nonfinite", "blocks/1"),
    ),
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
