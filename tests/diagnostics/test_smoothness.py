import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax.linen
import bnjax.nnx
from bnjax.diagnostics import NnxBatchNoise, covariate_shift, loss_smoothness

SIZES = (0.05, 0.1, 0.3)


def quadratic(variables, batch):
    """0.5 w'Aw, w in two parts."""
    w = jnp.concatenate([variables["params"]["a"], variables["params"]["b"]])
    return 0.5 * w @ batch @ w


def split(w):
    return {"params": {"a": jnp.asarray(w[:3]), "b": jnp.asarray(w[3:])}}


def curvature():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(7, 7))
    return root @ root.T, rng.normal(size=7)


def test_beta_of_a_quadratic_is_its_curvature_along_the_gradient(x64):
    matrix, w = curvature()
    found = loss_smoothness(quadratic, split(w), matrix, SIZES)
    g = matrix @ w
    moved = [w - size * g for size in SIZES]
    changes = [np.linalg.norm(size * matrix @ g) for size in SIZES]
    beta = np.linalg.norm(matrix @ g) / np.linalg.norm(g)
    assert found.loss.dtype == found.betas.dtype == np.float64
    np.testing.assert_allclose(found.loss, w @ matrix @ w / 2, rtol=1e-12)
    np.testing.assert_allclose(found.gradient_norm, np.linalg.norm(g), rtol=1e-12)
    losses = [v @ matrix @ v / 2 for v in moved]
    np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(found.changes, changes, rtol=1e-12)
    np.testing.assert_allclose(found.betas, [beta] * 3, rtol=1e-12)
    np.testing.assert_allclose(found.beta, beta, rtol=1e-12)
    np.testing.assert_allclose(found.loss_range, [min(losses), max(losses)])
    ends = [changes[0], changes[-1]]
    np.testing.assert_allclose(found.gradient_predictiveness, ends)


@pytest.mark.parametrize("which", [0, 3, 6])
def test_beta_along_an_eigenvector_is_its_eigenvalue(which, x64):
    matrix, _ = curvature()
    values, vectors = np.linalg.eigh(matrix)
    found = loss_smoothness(quadratic, split(vectors[:, which]), matrix, SIZES)
    np.testing.assert_allclose(found.betas, [values[which]] * 3, rtol=1e-9)


def test_beta_is_the_largest_on_a_line_of_changing_curvature(x64):
    """Of w**4 / 4, whose gradient is w**3, by hand."""

    def quartic(variables, batch):
        return jnp.sum(variables["params"] ** 4) / 4

    w = np.array([1.5, -0.5])
    found = loss_smoothness(quartic, {"params": jnp.asarray(w)}, None, SIZES)
    g = w**3
    changes = [np.linalg.norm((w - size * g) ** 3 - g) for size in SIZES]
    distances = np.array(SIZES) * np.linalg.norm(g)
    np.testing.assert_allclose(found.betas, changes / distances, rtol=1e-12)
    assert found.beta == found.betas[0] > found.betas[2]


# Networks of linen and of nnx that are one function: Dense, BN, tanh, Dense.


class Linen(nn.Module):
    dtype: type = jnp.float64

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, param_dtype=self.dtype, use_bias=False)
        x = dense(4, name="first")(x)
        norm = bnjax.linen.BatchNorm(
            use_running_average=False, param_dtype=self.dtype, name="bn"
        )
        return dense(2, name="last")(jnp.tanh(norm(x)))


class Nnx(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        dense = functools.partial(
            nnx.Linear, use_bias=False, param_dtype=jnp.float64, rngs=rngs
        )
        self.first, self.last = dense(3, 4), dense(4, 2)
        self.bn = bnjax.nnx.BatchNorm(4, param_dtype=jnp.float64, rngs=rngs)
        self.noise = NnxBatchNoise(rngs=rngs, deterministic=True)
        pure = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        nnx.update(self, jax.tree.map(lambda _, p: p, pure, params))

    def __call__(self, x):
        return self.last(jnp.tanh(self.noise(self.bn(self.first(x)))))


def linen_loss(variables, batch):
    logits, _ = Linen().apply(variables, batch["x"], mutable=["batch_stats"])
    return jnp.mean((logits - batch["y"]) ** 2)


def nnx_loss(model, batch):
    return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)


@pytest.fixture
def network(x64):
    rng = np.random.default_rng(1)
    shapes = {
        "bn": {"scale": (4,), "bias": (4,)},
        "first": {"kernel": (3, 4)},
        "last": {"kernel": (4, 2)},
    }
    params, stepped = (
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape)),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(2)
    )
    stats = {"bn": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}
    return types.SimpleNamespace(
        variables={"params": params, "batch_stats": stats},
        params=params,
        stepped=stepped,
        batch={
            "x": jnp.asarray(rng.normal(size=(16, 3))),
            "y": jnp.asarray(rng.normal(size=(16, 2))),
        },
    )


def gradient(params, batch):
    """Of the loss by plain formulas: no BatchNorm layer, no jit."""

    def loss(params):
        u = batch["x"] @ params["first"]["kernel"]
        u = (u - u.mean(0)) / jnp.sqrt(u.var(0) + 1e-5)
        z = jnp.tanh(u * params["bn"]["scale"] + params["bn"]["bias"])
        return jnp.mean((z @ params["last"]["kernel"] - batch["y"]) ** 2)

    return jax.value_and_grad(loss)(params)


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def copies(tree):
    return jax.tree.map(np.array, tree)


def test_linen_and_nnx_with_statistics_of_the_batch(network):
    before = copies(network.variables)
    found = loss_smoothness(linen_loss, network.variables, network.batch, SIZES)
    loss, g = gradient(network.params, network.batch)
    for i, size in enumerate(SIZES):
        moved = jax.tree.map(lambda p, d, size=size: p - size * d, network.params, g)
        moved_loss, moved_g = gradient(moved, network.batch)
        change = np.linalg.norm(flat(moved_g) - flat(g))
        np.testing.assert_allclose(found.losses[i], moved_loss, rtol=1e-10)
        np.testing.assert_allclose(found.changes[i], change, rtol=1e-8)
        beta = change / (size * np.linalg.norm(flat(g)))
        np.testing.assert_allclose(found.betas[i], beta, rtol=1e-8)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-10)
    jax.tree.map(np.testing.assert_array_equal, before, network.variables)

    model = Nnx(network.params)
    state = copies(nnx.state(model, nnx.Not(nnx.RngState)))
    other = loss_smoothness(nnx_loss, model, network.batch, SIZES)
    for a, b in zip(found, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)
    after = nnx.state(model, nnx.Not(nnx.RngState))
    jax.tree.map(np.testing.assert_array_equal, state, copies(after))


def test_weights_before_bn_twice_as_large_have_a_quarter_of_the_beta(x64):
    """Section 3.3 of the 2015 paper: the gradient halves, the loss stays."""

    def loss_fn(variables, x):
        y, _ = bnjax.normalize_batch(x @ variables["params"], epsilon=1e-12)
        return jnp.mean(jnp.sin(y + x[:, :2]))

    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(size=(3, 2))), jnp.asarray(rng.normal(size=(9, 3)))
    sizes = np.array(SIZES)
    one = loss_smoothness(loss_fn, {"params": w}, x, sizes)
    two = loss_smoothness(loss_fn, {"params": 2 * w}, x, 4 * sizes)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-9)
    np.testing.assert_allclose(two.gradient_norm, one.gradient_norm / 2, rtol=1e-9)
    np.testing.assert_allclose(two.betas, one.betas / 4, rtol=1e-7)


def test_random_streams_are_the_same_at_each_point(network):
    model = Nnx(network.params)
    model.train()  # With noise.
    tiny = loss_smoothness(nnx_loss, model, network.batch, [1e-9, 2e-9])
    np.testing.assert_allclose(tiny.losses, [tiny.loss] * 2, rtol=1e-6)
    again = loss_smoothness(nnx_loss, model, network.batch, [1e-9, 2e-9])
    np.testing.assert_array_equal(tiny.losses, again.losses)
    model.eval()
    assert abs(nnx_loss(model, network.batch) - tiny.loss) > 1e-3


def test_under_jit_over_a_mesh(network):
    """The batch over eight devices, and step sizes that are traced."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    batch = jax.device_put(network.batch, jax.sharding.NamedSharding(mesh, spec))
    run = jax.jit(functools.partial(loss_smoothness, linen_loss))
    found = run(network.variables, batch, jnp.array(SIZES))
    expected = loss_smoothness(linen_loss, network.variables, network.batch, SIZES)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_one_program_for_all_points(network):
    traced = []

    def counted(variables, batch):
        traced.append(1)
        return quadratic(variables, batch)

    matrix, w = curvature()
    for scale in (1, 2):
        loss_smoothness(counted, split(scale * w), matrix, SIZES)
    assert len(traced) == 1


def test_norms_of_half_precision_are_float32(strict):
    """Sums of squares that bfloat16 would lose; 300 times 300 overflows float16."""
    w = jnp.full(1000, 0.5, jnp.bfloat16)

    def loss_fn(variables, batch):
        return jnp.sum(variables["params"].astype(jnp.float32) ** 2) / 2

    found = loss_smoothness(loss_fn, {"params": w}, None, [0.5])
    assert found.gradient_norm.dtype == found.betas.dtype == jnp.float32
    np.testing.assert_allclose(found.gradient_norm, np.sqrt(250), rtol=1e-6)
    np.testing.assert_allclose(found.betas, [1], rtol=1e-6)

    def large(variables, batch):
        return jnp.sum(variables["params"] * jnp.float16(300))

    variables = {"params": jnp.ones(2, jnp.float16)}
    found = loss_smoothness(large, variables, None, [0.1])
    np.testing.assert_allclose(found.gradient_norm, 300 * np.sqrt(2), rtol=1e-6)


def test_a_gradient_of_zero_has_no_beta():
    found = loss_smoothness(
        lambda variables, batch: jnp.sum(variables["params"] * 0.0),
        {"params": jnp.ones(2)},
        None,
        [0.1],
    )
    assert np.isnan(found.beta)
    assert found.changes[0] == 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (0.1, r"shape \(\); expected shape \(n,\)"),
        ([], "n at least 1"),
        ([0.5, 0.0], r"step_sizes=\[0.5, 0.0\]; expected positive"),
        ([-1.0], "expected positive"),
        ([np.nan], "expected positive"),
    ],
)
def test_step_sizes_that_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        loss_smoothness(quadratic, split(np.ones(7)), np.eye(7), sizes)


@pytest.mark.parametrize(
    ("variables", "given"),
    [
        ({"batch_stats": {}}, "a dict of batch_stats; expected"),
        ({}, "a dict of nothing"),
        ([1], "of type list"),
    ],
)
def test_variables_that_are_refused(variables, given):
    with pytest.raises(TypeError, match=f"loss_smoothness: variables is {given}"):
        loss_smoothness(quadratic, variables, None, [0.1])
    with pytest.raises(TypeError, match=f"covariate_shift: variables is {given}"):
        covariate_shift(quadratic, variables, {}, None, ["a"])


def test_a_loss_that_is_no_scalar_is_refused():
    variables = {"params": jnp.ones(3)}
    for loss_fn, shapes in (
        (lambda variables, _: variables["params"], r"\(3,\)"),
        (lambda variables, _: (jnp.sum(variables["params"]), {}), r"\(\(\), \{\}\)"),
    ):
        with pytest.raises(TypeError, match=f"loss_fn returned shapes {shapes}"):
            loss_smoothness(loss_fn, variables, None, [0.1])


# Internal covariate shift.


def linear_loss(variables, batch):
    """0.5 |W3 W2 W1 x - y|^2 of one example."""
    params = variables["params"]
    z = batch["x"]
    for name in ("one", "two", "three"):
        z = params[name]["w"] @ z
    return 0.5 * jnp.sum((z - batch["y"]) ** 2)


def linear_gradients(w, x, y):
    """Of each matrix: (the layers above)' (W3 W2 W1 x - y) (the layers below x)'."""
    error = w[2] @ w[1] @ w[0] @ x - y
    return (
        np.outer(w[1].T @ w[2].T @ error, x),
        np.outer(w[2].T @ error, w[0] @ x),
        np.outer(error, w[1] @ w[0] @ x),
    )


def linear_network():
    rng = np.random.default_rng(0)
    shapes = ((4, 3), (5, 4), (2, 5))
    w, new = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    x, y = rng.normal(size=3), rng.normal(size=2)
    tree = functools.partial(zip, ("one", "two", "three"), strict=True)
    params, stepped = (
        {name: {"w": jnp.asarray(matrix)} for name, matrix in tree(each)}
        for each in (w, new)
    )
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    return w, new, x, y, {"params": params}, stepped, batch


def expected_shift(before, after):
    norm, cosine = [], []
    for g, moved in zip(before, after, strict=True):
        norm.append(np.linalg.norm(g - moved))
        product = np.linalg.norm(g) * np.linalg.norm(moved)
        cosine.append(np.sum(g * moved) / product)
    return norm, cosine


def test_shift_of_a_linear_network_by_hand(x64):
    w, new, x, y, variables, stepped, batch = linear_network()
    layers = ["one", "two", "three"]
    found = covariate_shift(linear_loss, variables, stepped, batch, layers)
    before = linear_gradients(w, x, y)
    after = [
        before[0],
        linear_gradients([new[0], w[1], w[2]], x, y)[1],
        linear_gradients([new[0], new[1], w[2]], x, y)[2],
    ]
    norm, cosine = expected_shift(before, after)
    own = [np.linalg.norm(g) for g in before]
    assert found.norm.dtype == np.float64
    np.testing.assert_allclose(found.gradient_norm, own, rtol=1e-12)
    np.testing.assert_allclose(found.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
    assert found.norm[0] == 0
    np.testing.assert_allclose(found.relative, np.divide(norm, own), rtol=1e-12)


def test_the_step_of_plain_gradient_descent_in_closed_form(x64):
    """0.5 (v u x)^2: u falls by rate v^2 u x^2, and the gradient of v as its square."""

    def loss_fn(variables, x):
        params = variables["params"]
        return 0.5 * (params["v"] * params["u"] * x) ** 2

    u, v, x, rate = 1.5, -0.7, 2.0, 0.1
    params = {"u": jnp.array(u), "v": jnp.array(v)}
    g = jax.grad(lambda p: loss_fn({"params": p}, x))(params)
    stepped = optax.apply_updates(params, jax.tree.map(lambda d: -rate * d, g))
    found = covariate_shift(loss_fn, {"params": params}, stepped, x, ["u", "v"])
    shrunk = u * (1 - rate * v**2 * x**2)
    expected = abs(v * x**2 * (u**2 - shrunk**2))
    np.testing.assert_allclose(found.norm, [0, expected], rtol=1e-12)
    np.testing.assert_allclose(found.cosine, [1, 1], rtol=1e-12)


def test_the_order_of_the_layers_says_what_is_below(x64):
    w, new, x, y, variables, stepped, batch = linear_network()
    layers = ["three", ("two", "one")]
    found = covariate_shift(linear_loss, variables, stepped, batch, layers)
    before = linear_gradients(w, x, y)
    after = linear_gradients([w[0], w[1], new[2]], x, y)
    pair = [np.concatenate([g[1].ravel(), g[0].ravel()]) for g in (before, after)]
    norm, cosine = expected_shift([before[2], pair[0]], [before[2], pair[1]])
    np.testing.assert_allclose(found.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)


def test_no_step_is_no_shift(x64):
    *_, variables, _, batch = linear_network()
    layers = ["one", "two", "three"]
    found = covariate_shift(linear_loss, variables, variables["params"], batch, layers)
    np.testing.assert_array_equal(found.norm, np.zeros(3))
    np.testing.assert_allclose(found.cosine, np.ones(3), rtol=1e-12)


LAYERS = [("first/kernel", "bn"), "last"]


def test_shift_in_linen_and_nnx(network):
    found = covariate_shift(
        linen_loss, network.variables, network.stepped, network.batch, LAYERS
    )
    _, g = gradient(network.params, network.batch)
    mixed = network.stepped | {"last": network.params["last"]}
    _, moved = gradient(mixed, network.batch)
    norm, cosine = expected_shift([flat(g["last"])], [flat(moved["last"])])
    np.testing.assert_allclose(found.norm, [0, *norm], rtol=1e-9)
    np.testing.assert_allclose(found.cosine, [1, *cosine], rtol=1e-9)
    own = flat({name: g[name] for name in ("bn", "first")})
    np.testing.assert_allclose(found.gradient_norm[0], np.linalg.norm(own), rtol=1e-9)

    model, after = Nnx(network.params), Nnx(network.stepped)
    for new in (nnx.state(after, nnx.Param), network.stepped):
        other = covariate_shift(nnx_loss, model, new, network.batch, LAYERS)
        for a, b in zip(found, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)


def test_shift_under_jit(network):
    run = jax.jit(
        lambda variables, new, batch: covariate_shift(
            linen_loss, variables, new, batch, LAYERS
        )
    )
    found = run(network.variables, network.stepped, network.batch)
    expected = covariate_shift(
        linen_loss, network.variables, network.stepped, network.batch, LAYERS
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["first", "last"], "bn/bias, bn/scale belong to none"),
        (["first", "bn", "last", "bn/scale"], "bn/scale belong to none .* or to sev"),
        (["frist", "bn", "last"], "'frist', which has no parameter. Did you mean 'fi"),
        (["fir", "bn", "last"], "Expected some of bn, first, last"),
        ([], r"layers=\[\]; expected a list"),
        ("first", "layers='first'; expected a list .* of bn, first, last"),
    ],
)
def test_layers_that_are_refused(layers, message, network):
    with pytest.raises(ValueError, match=message):
        covariate_shift(
            linen_loss, network.variables, network.stepped, network.batch, layers
        )


def test_new_parameters_that_are_refused(network):
    narrow = network.stepped | {"last": {"kernel": jnp.zeros((4, 1))}}
    message = r"new_params has \{'last/kernel': \(4, 1\)\} where variables has "
    with pytest.raises(ValueError, match=message + r"\{'last/kernel': \(4, 2\)\}"):
        covariate_shift(linen_loss, network.variables, narrow, network.batch, LAYERS)
    whole = {"params": network.stepped}
    with pytest.raises(ValueError, match="Pass the parameters alone"):
        covariate_shift(linen_loss, network.variables, whole, network.batch, LAYERS)
