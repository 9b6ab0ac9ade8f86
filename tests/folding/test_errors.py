"""What a person can do wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import errors

from bnjax.folding import fold_batch_norm
from tests.folding.networks import Case, Pair, norm, random_input, random_variables

X = random_input((2, 4))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(3)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_no_batch_normalization():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r'no "batch_stats", only \[\'params\'\]'):
        fold_batch_norm(model.apply, variables, X)


def test_parameters_alone():
    params = random_variables(Network(), X)["params"]
    with pytest.raises(ValueError, match=r"hold \['BatchNorm_0', 'Dense_0'\]"):
        fold_batch_norm(Network().apply, params, X)
    with pytest.raises(ValueError, match="expected a mapping of collections"):
        fold_batch_norm(Network().apply, None, X)


def test_training_mode():
    variables = random_variables(Network(), X)

    def train(variables, x):
        return Network().apply(variables, x, train=True, mutable=["batch_stats"])

    with pytest.raises(ValueError, match="Is it in training mode"):
        fold_batch_norm(train, variables, X)


def test_dtype():
    with pytest.raises(TypeError, match="dtype=float16; expected float32, bfloat16"):
        fold_batch_norm(
            Network().apply, random_variables(Network(), X), X, dtype=jnp.float16
        )


def test_traced():
    with pytest.raises(TypeError, match="variables are traced"):
        jax.jit(lambda variables: fold_batch_norm(Network().apply, variables, X)(X))(
            random_variables(Network(), X)
        )


def test_example_that_does_not_fit():
    variables = random_variables(Network(), X)
    with pytest.raises(errors.ScopeParamShapeError):
        fold_batch_norm(Network().apply, variables, random_input((2, 5)))


def test_a_shape_for_which_other_layers_fold():
    # Windows of 2 with a stride of 2 cover 6 pixels, and of 5 one is missing.
    case = Case("Conv", "before", rank=1, kernel=2, stride=2)
    module, fits = Pair(case), random_input((2, 6, 4))
    folded = fold_batch_norm(module.apply, random_variables(module, fits, case), fits)
    assert folded.report[0].folded
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4\) other layers would be"):
        folded(random_input((2, 5, 4)))


def test_variables_of_another_model():
    folded = fold_batch_norm(Network().apply, random_variables(Network(), X), X)
    with pytest.raises(ValueError, match="variables are not those of"):
        folded.apply({"params": {}}, X)


def test_statistics_that_are_not_used():
    class Extra(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm(name="unused")(x)
            return norm(name="bn")(nn.Dense(3)(x))

    folded = fold_batch_norm(Extra().apply, random_variables(Extra(), X), X)
    used, unused = folded.report
    assert (used.path, used.folded) == ("bn", True)
    assert (unused.path, unused.folded) == ("unused", False)
    assert unused.reason == "its statistics scale nothing"
    assert str(folded.report).splitlines() == [
        "batch normalization  folded into     as              or why not",
        "bn                   Dense_0/kernel  matrix product",
        f"unused               -               -               {unused.reason}",
    ]
