"""What is folded, where it goes, and what is left with which reason."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from jax import export

import bnjax.nnx
from bnjax.folding import fold_batch_norm, fold_nnx
from tests.folding.networks import (
    Case,
    Pair,
    difference,
    fold,
    norm,
    random_input,
    random_variables,
)


class Chain(nn.Module):
    """Layers and functions, one after the other; layers are called parts_<i>."""

    parts: tuple

    @nn.compact
    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


def check(parts, shape, tolerance=1e-5, **options):
    module = Chain(parts) if isinstance(parts, tuple) else parts
    folded, found, expected = fold(module, random_input(shape), **options)
    assert difference(found, expected) < tolerance
    return folded


def reason(parts, shape):
    (row,) = check(parts, shape).report
    assert not row.folded
    assert not row.into
    return row.reason


def test_numbers_by_hand():
    # 2 * ((3 u + 1) - 5) / 2 + 7 = 3 u + 3
    variables = {
        "params": {
            "parts_0": {"kernel": jnp.array([[3.0]]), "bias": jnp.array([1.0])},
            "parts_1": {"scale": jnp.array([2.0]), "bias": jnp.array([7.0])},
        },
        "batch_stats": {"parts_1": {"mean": jnp.array([5.0]), "var": jnp.array([3.0])}},
    }
    parts = (nn.Dense(1), norm(epsilon=1.0))
    folded = fold_batch_norm(Chain(parts).apply, variables, jnp.ones((1, 1)))
    params = jax.tree.map(float, jax.tree.map(jnp.squeeze, folded.params))
    assert params == {"parts_0": {"kernel": 3.0, "bias": 3.0}}


def test_arithmetic_is_float64():
    module = Chain((nn.Conv(3, (2,)), norm()))
    x = random_input((1, 5, 2))
    variables = random_variables(module, x)
    params = fold_batch_norm(module.apply, variables, x).params["parts_0"]
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    conv, bn = wide["params"]["parts_0"], wide["params"]["parts_1"]
    stats = wide["batch_stats"]["parts_1"]
    gain = bn["scale"] / np.sqrt(stats["var"] + float(np.float32(1e-5)))
    bias = (conv["bias"] - stats["mean"]) * gain + bn["bias"]
    # Rounded once, to the nearest, but for the order of the last operations.
    np.testing.assert_allclose(params["kernel"], conv["kernel"] * gain, rtol=6e-8)
    np.testing.assert_allclose(params["bias"], bias, rtol=6e-8)


def test_bfloat16_is_rounded_last():
    parts = (nn.Dense(3), norm(), nn.relu, nn.Dense(2))
    single = check(parts, (4, 5))
    half = check(parts, (4, 5), tolerance=2**-6, dtype=jnp.bfloat16)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), single.params)
    jax.tree.map(np.testing.assert_array_equal, half.params, expected)


@pytest.mark.parametrize(
    ("parts", "shape"),
    [
        ((nn.Dense(12), lambda x: x.reshape(-1, 2, 2, 3), norm()), (2, 5)),
        ((nn.Dense(6), lambda x: x.reshape(-1, 2, 1, 3)[:, None], norm()), (2, 5)),
        ((norm(), lambda x: x.reshape(len(x), -1), nn.Dense(3)), (2, 3, 3, 2)),
        ((nn.Conv(3, (2,)), lambda x: x.mT, norm(axis=1)), (2, 4, 2)),
        ((lambda x: x.mT, norm(axis=1), lambda x: x.mT, nn.Dense(3)), (2, 4, 3)),
        ((nn.Dense(6), lambda x: -x, norm(), lambda x: 1 - 2 * x), (2, 5)),
        ((nn.Dense(6), norm(), norm(use_bias=False)), (2, 5)),
        ((norm(), nn.Dense(6), norm()), (2, 5)),
        ((lambda x: x / 4 - 1, norm(), nn.Dense(6)), (2, 5)),
        ((nn.remat(nn.Dense)(6), norm()), (2, 5)),
        ((nn.jit(nn.Dense)(6), norm()), (2, 5)),
    ],
)
def test_through_rearrangements(parts, shape):
    assert all(row.folded for row in check(parts, shape).report)


def test_written_by_hand():
    class HandWritten(nn.Module):
        @nn.compact
        def __call__(self, x):
            mu = self.variable("batch_stats", "mu", jnp.zeros, 3).value
            var = self.variable("batch_stats", "var", jnp.ones, 3).value
            gamma = self.param("gamma", nn.initializers.ones, 3)
            beta = self.param("beta", nn.initializers.ones, 3)
            return gamma * ((mu - x) / -jnp.sqrt(var + 1e-3)) + beta

    folded = check((nn.Dense(3), HandWritten()), (2, 4))
    assert sorted(folded.params) == ["parts_0"]
    folded = check((HandWritten(), nn.Dense(4)), (2, 3))
    assert sorted(folded.params) == ["parts_1"]


def test_each_pixel_its_own_normalization():
    parts = (nn.Conv(3, (2, 2)), lambda x: x.reshape(len(x), -1), norm())
    assert reason(parts, (2, 3, 3, 2)).startswith("its constants differ")


def test_what_is_left():
    relu = "it follows `max`, not a linear layer; `exp` follows"
    assert reason((nn.Dense(3), nn.relu, norm(), jnp.exp), (2, 4)) == relu
    first = "it normalizes an input of the model; its output is an output of the model"
    assert reason((norm(),), (2, 4)) == first
    padded = reason((norm(), nn.Conv(3, (3,))), (2, 4, 3))
    assert "pads its input with zeros" in padded

    class Residual(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(3)(x)
            return x + norm()(x)

    assert "is used 2 times; `add` follows" in reason((Residual(),), (2, 4))

    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm()(x @ x.T)

    assert "whose kernel is not a parameter" in reason((Attention(),), (4, 4))


def test_what_is_left_has_constants():
    module = Chain((nn.relu, norm(), nn.relu))
    x = random_input((2, 3))
    folded = fold_batch_norm(module.apply, random_variables(module, x), x)
    assert jax.tree.map(jnp.shape, folded.variables) == {
        "params": {"parts_1": {"mean": (3,), "scale": (3,), "bias": (3,)}}
    }
    names = [
        e.primitive.name for e in jax.make_jaxpr(folded.apply)(folded.variables, x).eqns
    ]
    names = [name for name in names if name != "reshape"]
    assert names == ["max", "sub", "mul", "add", "max"]


def test_what_is_left_is_exact_where_the_mean_is_large():
    module = Chain((norm(use_bias=False),))
    x = 1e4 + random_input((50, 3))
    variables = random_variables(module, x)
    variables["batch_stats"]["parts_0"]["mean"] = jnp.full(3, 1e4 + 0.3)
    folded = fold_batch_norm(module.apply, variables, x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    stats = wide["batch_stats"]["parts_0"]
    scale = wide["params"]["parts_0"]["scale"] / np.sqrt(stats["var"] + 1e-5)
    expected = (np.asarray(x, np.float64) - stats["mean"]) * scale
    assert difference(folded(x), expected) < 1e-6


def test_inside_a_loop():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(norm()(nn.Dense(3)(x))), None

    scan = nn.scan(
        Layer,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        length=2,
    )
    parts = (nn.Dense(3), norm(), lambda x: scan(name="loop")(x, None)[0])
    outer, inner = check(parts, (2, 4)).report
    assert outer.folded
    assert (inner.folded, inner.path) == (False, "loop/BatchNorm_0")
    assert inner.reason == "its statistics are an operand of `scan`"


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("axis", [-1, (-2, -1)])
def test_products_of_many_axes(axis, swapped):
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = norm(axis=axis)(x)
            kernel = self.param("kernel", nn.initializers.ones, (2, 5, 3, 4))
            if not swapped:
                x = jax.lax.dot_general(x, kernel, (((2,), (3,)), ((1,), (2,))))
            else:
                x = jax.lax.dot_general(kernel, x, (((3,), (2,)), ((2,), (1,))))
            return norm(axis=(0, -1) if not swapped else (0, 1))(x)

    folded = check(Heads(), (6, 3, 4))
    assert all(row.folded for row in folded.report)


def test_a_kernel_used_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, name="dense")
            return norm(name="b")(dense(nn.relu(norm(name="a")(dense(x)))))

    folded = check(Twice(), (2, 4))
    assert all(row.folded for row in folded.report)
    names = ["bias", "bias_2", "kernel", "kernel_2"]
    assert sorted(folded.params["dense"]) == names


def test_a_kernel_used_as_it_is_too():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (3, 4))
            return nn.relu(norm(name="bn")(x @ kernel)) @ kernel.T

    folded = check(Tied(), (2, 3))
    assert sorted(folded.params) == ["bias", "kernel", "kernel_2"]


def test_the_same_layers_twice_are_stored_once():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = Chain((nn.Dense(3), norm()))
            return layer(x) * layer(jnp.sin(x))

    folded = check(Twice(), (2, 3))
    assert sorted(folded.params["Dense_0"]) == ["bias", "kernel"]


def test_a_kernel_that_is_computed():
    parts = (nn.WeightNorm(nn.Dense(4)), norm())
    folded = check(parts, (2, 3))
    assert folded.report[0].into.endswith("folded_kernel")


def test_a_transposed_kernel_is_kept_as_it_was():
    parts = (nn.ConvTranspose(5, (3,), transpose_kernel=True), norm())
    folded = check(parts, (2, 4, 3))
    assert folded.params["parts_0"]["kernel"].shape == (3, 5, 3)
    plain = Chain(parts[:1])
    x = random_input((2, 4, 3))
    loaded = plain.apply(folded.variables, x)
    np.testing.assert_allclose(loaded, folded(x), rtol=1e-6)


@pytest.mark.slow
def test_batches_of_any_size():
    def flatten(x):
        return x.reshape(x.shape[0], -1)

    module = Chain((nn.Conv(3, (2, 2)), norm(), nn.relu, flatten, norm(), nn.Dense(2)))
    x = random_input((2, 4, 4, 1))
    variables = random_variables(module, x)
    folded = fold_batch_norm(module.apply, variables, x)
    symbolic = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 4, 4, 1), jnp.float32)
    exported = export.export(jax.jit(folded))(symbolic)
    for size in (1, 7):
        x = random_input((size, 4, 4, 1))
        expected = module.apply(variables, x)
        assert difference(folded(x), expected) < 1e-5
        assert difference(exported.call(x), expected) < 1e-5


def test_variables_are_an_argument():
    module = Chain((nn.Dense(3), norm(), nn.relu))
    x = random_input((2, 4))
    folded = fold_batch_norm(module.apply, random_variables(module, x), x)
    zeros = jax.tree.map(jnp.zeros_like, folded.variables)
    assert not folded.apply(zeros, x).any()

    def plain(variables):
        dense = variables["params"]["parts_0"]
        return nn.relu(x @ dense["kernel"] + dense["bias"]).sum()

    found = jax.grad(lambda variables: folded.apply(variables, x).sum())(
        folded.variables
    )
    expected = jax.grad(plain)(folded.variables)
    jax.tree.map(np.testing.assert_allclose, found, expected)


def test_several_inputs_and_outputs():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = norm()(nn.Dense(3)(x["a"]))
            return {"sum": dense + x["b"], "shape": jnp.ones(2)}

    x = {"a": random_input((2, 4)), "b": random_input((2, 3))}
    variables = random_variables(Two(), x)
    folded = fold_batch_norm(Two().apply, variables, x)
    found, expected = folded(x), Two().apply(variables, x)
    assert difference(found["sum"], expected["sum"]) < 1e-5
    np.testing.assert_array_equal(found["shape"], expected["shape"])


def test_strict_promotion(strict):
    check((norm(), nn.Dense(3), norm(), nn.relu, norm()), (2, 4))


def test_float64(x64):
    module = Chain((nn.Dense(3, param_dtype=jnp.float64), norm(), nn.relu, norm()))
    x = jnp.asarray(random_input((2, 4)), jnp.float64)
    variables = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64), random_variables(module, x)
    )
    folded = fold_batch_norm(module.apply, variables, x)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(folded.variables)} == {
        "float64"
    }
    assert difference(folded(x), module.apply(variables, x)) < 1e-13


class NnxNetwork(nnx.Module):
    def __init__(self, norm, rngs):
        self.convs = nnx.List(
            [nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)]
        )
        self.norms = nnx.List([norm(4, rngs=rngs)] if norm else [])
        self.linear = nnx.LinearGeneral((3, 3, 4), 5, axis=(1, 2, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.convs[0](x)
        for layer in self.norms:
            x = layer(x)
        return self.linear(self.dropout(nnx.relu(x)))


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(norm):
    model = NnxNetwork(norm, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    fill = lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape), jnp.float32)  # noqa: E731
    nnx.update(model, jax.tree.map(fill, state))
    x = random_input((2, 3, 3, 2))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    folded = fold_nnx(model, x)
    assert [row.folded for row in folded.report] == [True]
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model.eval()
    assert difference(folded(x), model(x)) < 1e-5
    assert folded(random_input((5, 3, 3, 2))).shape == (5, 5)

    plain = NnxNetwork(None, nnx.Rngs(1))
    nnx.update(plain, nnx.restore_int_paths(folded.params))
    plain.eval()
    assert difference(plain(x), model(x)) < 1e-5


# What a person can do wrong.


X = random_input((2, 4))


class Trains(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))


STATE = random_variables(Trains(), X)


def train(variables, x):
    return Trains().apply(variables, x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize(
    ("error", "match", "args", "options"),
    [
        (ValueError, r'no "batch_stats", only \[\'params\'\]', ({"params": {}}, X), {}),
        (ValueError, r"hold \['BatchNorm_0', 'Dense_0'\]", (STATE["params"], X), {}),
        (ValueError, "expected a mapping of collections", (None, X), {}),
        (ValueError, "Is it in training mode", (STATE, X), {"apply_fn": train}),
        (
            TypeError,
            "dtype=float16; expected float32, bfloat16",
            (STATE, X),
            {"dtype": jnp.float16},
        ),
        (errors.ScopeParamShapeError, "kernel", (STATE, random_input((2, 5))), {}),
    ],
)
def test_refusals(error, match, args, options):
    options = {"apply_fn": Trains().apply, **options}
    with pytest.raises(error, match=match):
        fold_batch_norm(options.pop("apply_fn"), *args, **options)


def test_traced():
    with pytest.raises(TypeError, match="variables are traced"):
        jax.jit(lambda variables: fold_batch_norm(Trains().apply, variables, X)(X))(
            STATE
        )


def test_a_shape_for_which_other_layers_fold():
    # Windows of 2 with a stride of 2 cover 6 pixels, and of 5 one is missing.
    case = Case("Conv", "before", rank=1, kernel=2, stride=2)
    module, fits = Pair(case), random_input((2, 6, 4))
    folded = fold_batch_norm(module.apply, random_variables(module, fits, case), fits)
    assert folded.report[0].folded
    with pytest.raises(ValueError, match=r"shape \(2, 5, 4\) other layers would be"):
        folded(random_input((2, 5, 4)))


def test_variables_of_another_model():
    folded = fold_batch_norm(Trains().apply, STATE, X)
    with pytest.raises(ValueError, match="variables are not `folded"):
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
