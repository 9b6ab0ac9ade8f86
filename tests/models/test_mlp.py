import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.models import MLP, Normalization
from tests.models.helpers import as_numpy, count, jit, random_variables, shapes_of
from tests.training import numpy_network

KINDS = {
    "batch": Normalization(),
    "flax": Normalization("flax", unbiased=False),
    "none": Normalization("none"),
}


def images(shape=(6, 4, 5)):
    return np.random.default_rng(0).normal(1, 2, shape)


def apply(model, variables, train):
    @jit
    def run(variables, x):
        return model.apply(variables, x, train=train, mutable=["batch_stats"])

    return run(variables, jnp.asarray(images()))


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize("train", [True, False])
def test_it_is_the_papers_network(kind, train, x64):
    model = MLP((7, 3), 4, normalization=KINDS[kind], param_dtype=jnp.float64)
    variables = random_variables(model, images(), dtype=float)
    params = as_numpy(variables["params"])
    stats = as_numpy(variables.get("batch_stats", {}))
    logits, updated = apply(model, variables, train)
    expected, new_stats, _ = numpy_network.forward(params, stats, images(), train=train)
    np.testing.assert_allclose(logits, expected, rtol=1e-12)
    expected_stats = new_stats if train else stats
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        updated.get("batch_stats", {}),
        expected_stats,
    )


def test_ours_with_flaxs_variance_is_flaxs(x64):
    ours = MLP(normalization=Normalization(unbiased=False), param_dtype=jnp.float64)
    theirs = MLP(normalization=KINDS["flax"], param_dtype=jnp.float64)
    variables = random_variables(ours, images(), dtype=float)
    for train in (True, False):
        a, b = (apply(model, variables, train) for model in (ours, theirs))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), a, b)


@pytest.mark.parametrize(
    ("kind", "parameters"), [("batch", 100_010), ("flax", 100_010), ("none", 99_710)]
)
def test_how_many_parameters(kind, parameters):
    model, x = MLP(normalization=KINDS[kind]), jnp.zeros((1, 28, 28, 1))
    assert count(model, x) == parameters
    shapes = shapes_of(model, x)
    assert ("batch_stats" in shapes) == (kind != "none")
    assert ("bias" in shapes["params"]["dense_0"]) == (kind == "none")


@pytest.mark.parametrize("std", [0.01, 0.3])
def test_weights_are_gaussian_of_the_std_asked_for(std):
    model = MLP((100,), weight_std=std)
    init = jit(lambda key: model.init(key, jnp.zeros((1, 784)), train=False))
    kernel = np.asarray(init(jax.random.key(1))["params"]["dense_0"]["kernel"])
    assert kernel.std() == pytest.approx(std, rel=0.02)
    assert kernel.mean() == pytest.approx(0, abs=0.02 * std)
    within = (np.abs(kernel) < std).mean()
    assert within == pytest.approx(0.6827, abs=0.01)
