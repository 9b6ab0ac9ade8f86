"""bnjax.nnx.BatchNorm inside every transformation of flax.nnx, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax.nnx import BatchNorm
from tests import networks, oracle
from tests.networks import Network, assert_same

X, LABELS = networks.images()


def model_of(norm=BatchNorm, **options):
    return Network(norm, nnx.Rngs(0), **options)


def loss_of(model, x=X, labels=LABELS):
    return networks.cross_entropy(model(x), labels)


def values(tree):
    """Plain arrays of a model or of a state."""
    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    return nnx.to_pure_dict(state)


def grad(model):
    return values(nnx.grad(loss_of)(model)), values(model)


def jit(model):
    return nnx.jit(lambda model: model(X))(model), values(model)


def jit_of_value_and_grad(model):
    loss, gradient = nnx.jit(nnx.value_and_grad(loss_of))(model)
    return loss, values(gradient), values(model)


def grad_of_remat(model):
    remat = nnx.remat(lambda model, x: model(x))

    def loss(model):
        return networks.cross_entropy(remat(model, X), LABELS)

    return values(nnx.jit(nnx.grad(loss))(model)), values(model)


def grad_of_remat_that_keeps_statistics(model):
    remat = nnx.remat(lambda model, x: model(x), policy=networks.KEEP_STATISTICS)

    def loss(model):
        return networks.cross_entropy(remat(model, X), LABELS)

    return values(nnx.jit(nnx.grad(loss))(model)), values(model)


def jit_of_split_and_merge(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, rest):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return loss_of(model), nnx.state(model, nnx.BatchStat)

        (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, new, gradient

    value, new, gradient = run(params, rest)
    nnx.update(model, new)
    return value, values(gradient), values(model)


def scan_over_batches(model):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model, x):
        return model, model(x)

    _, y = nnx.jit(run)(model, jnp.stack([X, X[::-1] * 2, X + 1]))
    return y, values(model)


@pytest.mark.parametrize(
    "run",
    [
        grad,
        grad_of_remat,
        grad_of_remat_that_keeps_statistics,
        jit,
        jit_of_split_and_merge,
        jit_of_value_and_grad,
        scan_over_batches,
    ],
    ids=lambda run: run.__name__,
)
def test_transformation(run):
    ours, theirs = (model_of(norm) for norm in networks.NNX)
    assert_same(values(ours), values(theirs), 0)
    mean = ours.norm.mean
    assert_same(run(ours), run(theirs))
    assert mean is ours.norm.mean
    assert (np.asarray(mean[...]) != 0).all()


def stacked(norm, **options):
    """Three models made by vmap."""

    @nnx.vmap(in_axes=0)
    def create(rngs):
        return Network(norm, rngs, **options)

    return create(nnx.Rngs(0).split(3))


@pytest.mark.slow
def test_vmap_over_models():
    @nnx.jit
    @nnx.vmap(in_axes=(0, None))
    def run(model, x):
        loss, gradient = nnx.value_and_grad(loss_of)(model, x)
        return loss, nnx.to_pure_dict(gradient)

    ours, theirs = (stacked(norm) for norm in networks.NNX)
    got, want = ((run(model, X), values(model)) for model in (ours, theirs))
    assert_same(got, want)
    graph, state = nnx.split(ours)
    for index in range(3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], state)
        single = nnx.merge(graph, one)
        stats = bnjax.BatchStats.init(4)
        mean, var = oracle.running(stats, single.conv(X), momentum=0.9, unbiased=False)
        np.testing.assert_allclose(single.norm.mean[...], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(single.norm.var[...], var, rtol=1e-4)


def test_vmap_over_the_batch():
    """Shards that share statistics are one batch, and one model comes back."""

    def run(model):
        shards = nnx.vmap(
            lambda model, x: model(x), in_axes=(None, 0), axis_name="batch"
        )
        return shards(model, X.reshape(4, 2, *X.shape[1:])).reshape(8, 3)

    model, alone = model_of(axis_name="batch"), model_of()
    for _ in range(2):
        got, want = run(model), alone(X)
        assert_same((got, values(model)), (want, values(alone)))


@pytest.mark.slow
def test_scan_over_layers():
    class Layer(nnx.Module):
        def __init__(self, norm, rngs):
            self.dense = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
            self.norm = norm(3, rngs=rngs)

    def run(norm):
        @nnx.vmap(in_axes=0)
        def create(rngs):
            return Layer(norm, rngs)

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return nnx.relu(layer.norm(layer.dense(x)))

        def loss(layers, x):
            y = forward(layers, x)
            return jnp.sum(jnp.sin(y)), y

        layers = create(nnx.Rngs(1).split(4))
        gradient, y = nnx.jit(nnx.grad(loss, has_aux=True))(layers, X)
        return y, values(gradient), values(layers)

    got, want = (run(norm) for norm in networks.NNX)
    assert_same(got, want)


def test_eval_shape():
    shapes = nnx.eval_shape(model_of)
    assert shapes.norm.mean.shape == (4,)
    assert shapes.norm.mean.dtype == jnp.float32
    model = nnx.merge(nnx.graphdef(shapes), nnx.state(model_of()))
    assert_same(model(X), model_of()(X), 0)
    out = nnx.eval_shape(lambda model, x: model(x), model, X)
    assert out.shape == (8, 3)


def test_train_and_eval():
    model = model_of()
    model.norm.mean[...] = jnp.arange(4.0)
    model.norm.var[...] = jnp.arange(4.0) + 1
    before = values(model)
    model.eval()
    assert model.norm.use_running_average is True
    h = np.asarray(model.conv(X), np.float64)
    h = (h - np.arange(4)) / np.sqrt(np.arange(4) + 1 + 1e-5)
    np.testing.assert_allclose(
        model(X), model.dense(np.float32(np.maximum(h, 0).mean((1, 2)))), atol=1e-5
    )
    assert_same(values(model), before, 0)
    model.train()
    assert model.norm.use_running_average is False
    model(X)
    assert (np.asarray(model.norm.mean[...]) != np.arange(4)).all()


def test_the_call_wins_over_the_attribute():
    layer = BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    y = layer(X, use_running_average=False)
    np.testing.assert_allclose(y, oracle.forward(X, np.ones(3), np.zeros(3)), atol=1e-5)
    assert (np.asarray(layer.mean[...]) != 0).all()
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(
        layer(X, use_running_average=True), X / np.sqrt(1 + 1e-5), rtol=1e-5
    )


def test_view_and_clone():
    model = model_of()
    evaluation = nnx.view(model, use_running_average=True)
    assert evaluation.norm.use_running_average is True
    assert model.norm.use_running_average is False
    twin = nnx.clone(model)
    y = model(X)
    assert_same(evaluation(X), nnx.view(model, use_running_average=True)(X), 0)
    np.testing.assert_array_equal(twin.norm.mean[...], np.zeros(4))
    assert_same(twin(X), y, 0)
    assert_same(values(twin), values(model), 0)


def test_statistics_change_in_place():
    layer = BatchNorm(3, momentum=0.5, unbiased=True, rngs=nnx.Rngs(0))
    mean, var = layer.mean, layer.var
    expected = bnjax.BatchStats.init(3)
    for batch in (X, 2 * X + 1):
        layer(batch)
        expected = bnjax.BatchStats(*oracle.running(expected, batch, momentum=0.5))
        assert (layer.mean, layer.var) == (mean, var)
        np.testing.assert_allclose(mean[...], expected.mean, rtol=1e-5)
        np.testing.assert_allclose(var[...], expected.var, rtol=1e-5)


def test_use_running_average_is_needed():
    layer = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"^BatchNorm layer of 3 features: use_running_average is None"
    ):
        layer(X)
    layer.train()
    layer(X)


MISTAKES = {
    "one value": (ValueError, {}, X[:1, 0, 0], r"one value per channel.*\(1, 3\)"),
    "features": (ValueError, {}, X[..., :2], r"has shape \(3,\); expected \(2,\)"),
    "axis": (ValueError, {"axis": 4}, X, r"axis=4 is out of range"),
    "axis name": (NameError, {"axis_name": "bacth"}, X, "axis_name='bacth' is not"),
    "integers": (TypeError, {}, X.astype(int), "x has dtype int"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_errors_name_the_layer(mistake):
    kind, options, x, message = MISTAKES[mistake]
    layer = BatchNorm(3, **options, rngs=nnx.Rngs(0))
    with pytest.raises(kind, match=f"^BatchNorm layer of 3 features: .*{message}"):
        layer(x)
    np.testing.assert_array_equal(layer.mean[...], np.zeros(3))


# Flax's layer warns where it keeps float32 statistics of float64 inputs.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")
@pytest.mark.usefixtures("x64")
def test_every_step_of_an_optimizer_is_that_of_flax():
    x, labels = networks.images(16, np.float64)
    models = [model_of(norm, param_dtype=jnp.float64) for norm in networks.NNX]
    optimizers = [nnx.Optimizer(m, optax.adam(0.01), wrt=nnx.Param) for m in models]

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(loss_of)(model, x, labels)
        optimizer.update(model, gradients)
        return loss

    losses = []
    for _ in range(20):
        got, want = map(step, models, optimizers)
        np.testing.assert_allclose(got, want, rtol=1e-9)
        assert_same(values(models[0]), values(models[1]), 1e-6)
        losses.append(float(got))
    assert losses[-1] < 0.7 * losses[0]
    for model in models:
        model.eval()
    assert_same(models[0](x), models[1](x), 1e-6)
