"""Every model of the project, folded, and loaded into the same one without BN."""

import functools

import jax
import jax.numpy as jnp
import pytest

from bnjax import models
from bnjax.folding import fold_batch_norm
from bnjax.models import Normalization
from bnjax.models.layers import ConvNorm
from tests.folding.networks import difference, random_input
from tests.models.helpers import jit, random_variables, shapes_of

SMALL = (2, 32, 32, 3)
CASES = [
    ("mlp", (3, 6, 6), {}),
    ("lenet", (2, 28, 28, 1), {"pool": "max"}),
    ("resnet20", (2, 16, 16, 3), {"width": 0.25}),
]
SLOW = [
    ("inception", SMALL, {"width": 0.125, "stem": "small", "printed_depths": True}),
    *(
        (f"resnet{depth}", (1, 32, 32, 3), {"width": 0.0625})
        for depth in (18, 34, 50, 101, 152)
    ),
    ("resnet56", (2, 16, 16, 3), {"width": 0.25}),
    ("resnet110", (2, 16, 16, 3), {"width": 0.25}),
    ("inception", (1, 64, 64, 3), {"width": 0.25, "separable_conv1": True}),
    ("inception", SMALL, {"width": 0.125, "local_response_norm": True}),
]


def test_cases_name_every_model():
    assert {name for name, *_ in CASES + SLOW} == set(models.MODELS)


def variables_of(model, x):
    """Random variables that keep the outputs of deep networks finite."""

    def scaled(path, leaf):
        fan_in = leaf[..., 0].size
        return leaf / fan_in**0.5 if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(scaled, random_variables(model, x))


def check(name, shape, options, kind="batch"):
    options = options | {"classes": 7}
    normalization = Normalization(kind=kind, unbiased=kind == "batch")
    model = models.create(name, normalization=normalization, **options)
    plain = models.create(name, normalization=Normalization(kind="none"), **options)
    x = random_input(shape)
    variables = variables_of(model, x)

    def apply(variables, x):
        return model.apply(variables, x, train=False)

    folded = fold_batch_norm(apply, variables, x)

    # One model at least runs with the variables; all have the names and shapes.
    loads = name in ("mlp", "lenet")

    @jit
    def run(new, old, x):
        loaded = plain.apply(new, x, train=False) if loads else None
        return folded.apply(new, x), apply(old, x), loaded

    assert jax.tree.map(jnp.shape, folded.variables) == jax.tree.map(
        jnp.shape, dict(shapes_of(plain, x))
    )
    found, expected, loaded = run(folded.variables, variables, x)
    assert all(row.folded for row in folded.report), str(folded.report)
    layers = len(jax.tree.leaves(variables["batch_stats"])) // 2
    assert len({row.path for row in folded.report}) == layers
    assert difference(found, expected) < 1e-5
    if loads:
        assert difference(loaded, expected) < 1e-5


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_models(name, shape, options):
    check(name, shape, options)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape", "options"), SLOW)
def test_larger_models(name, shape, options):
    check(name, shape, options)


def test_flax_normalization():
    check("lenet", (2, 28, 28, 1), {}, kind="flax")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_model_of_half_precision(dtype):
    # The model computes in bfloat16, with float32 parameters.
    model = models.create("lenet", dtype=jnp.bfloat16)
    x = random_input((4, 28, 28, 1))
    variables = variables_of(model, x)
    exact = jit(functools.partial(models.create("lenet").apply, train=False))(
        variables, x
    )
    folded = fold_batch_norm(
        lambda variables, x: model.apply(variables, x, train=False),
        variables,
        x,
        dtype=dtype,
    )
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(folded.variables)}
    assert dtypes == {jnp.dtype(dtype)}
    assert difference(folded(x), exact) < 2**-6


@pytest.mark.slow
def test_per_activation_is_left():
    # 5a and 5b have a scale for each position, which no filter can take.
    model = models.create(
        "inception", width=0.0625, stem="small", per_activation=True, classes=3
    )
    x = random_input(SMALL)
    variables = variables_of(model, x)

    def apply(variables, x):
        return model.apply(variables, x, train=False)

    folded = fold_batch_norm(apply, variables, x)
    left = {row.path.split("/")[0] for row in folded.report if not row.folded}
    assert left == {"module_5a", "module_5b"}
    reasons = {row.reason for row in folded.report if not row.folded}
    assert all(reason.startswith("its constants differ from") for reason in reasons)
    assert folded.params["module_5b"]["projection"]["bn"]["scale"].shape == (2, 2, 8)


def test_per_activation():
    layer = ConvNorm(4, 3, per_activation=True)
    x = random_input((2, 3, 3, 2))
    variables = random_variables(layer, x)

    def apply(variables, x):
        return layer.apply(variables, x, train=False)

    folded = fold_batch_norm(apply, variables, x)
    assert difference(folded(x), apply(variables, x)) < 1e-5
