import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.models import MLP, Normalization
from bnjax.training.step import (
    create_state,
    make_eval_step,
    make_train_step,
    topk_correct,
)
from tests.training import numpy_network

RATE = 0.3


def batch(seed, examples=12):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(0.5, 1, (examples, 4, 5))),
        "label": jnp.asarray(rng.integers(0, 3, examples)),
    }


def network(kind, dtype):
    return MLP(
        (7, 6),
        3,
        weight_std=0.5,
        normalization=Normalization(kind),
        param_dtype=dtype,
    )


def to_numpy(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def close(tree, expected, rtol):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol),
        tree,
        expected,
    )


@pytest.mark.parametrize("kind", ["batch", "none"])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float64, 1e-11), (jnp.float32, 1e-5)])
def test_steps_equal_numpys(kind, dtype, rtol, x64):
    model, optimizer = network(kind, dtype), optax.sgd(RATE)
    state = create_state(model, optimizer, 0, batch(0)["image"].astype(dtype))
    params, stats = to_numpy(state.params), to_numpy(state.batch_stats)
    train_step = jax.jit(make_train_step(model, optimizer))
    for step in range(3):
        given = batch(step)
        given["image"] = given["image"].astype(dtype)
        state, metrics = train_step(state, given)
        loss, accuracy, gradients, stats = numpy_network.loss_and_gradients(
            params, stats, to_numpy(given["image"]), np.asarray(given["label"])
        )
        params = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=rtol)
        np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=rtol)
    assert int(state.step) == 3
    assert state.params["logits"]["kernel"].dtype == dtype
    close(state.params, params, rtol)
    close(state.batch_stats, stats, rtol)


def test_the_step_is_pure():
    model, optimizer = network("batch", jnp.float32), optax.adam(0.1)
    given = batch(0)
    state = create_state(model, optimizer, 0, given["image"])
    before = to_numpy((state.params, state.batch_stats))
    train_step = jax.jit(make_train_step(model, optimizer))
    first, second = train_step(state, given), train_step(state, given)
    jax.tree.map(
        np.testing.assert_array_equal,
        (first[0].params, first[0].opt_state, first[1]),
        (second[0].params, second[0].opt_state, second[1]),
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        before,
        to_numpy((state.params, state.batch_stats)),
    )


@pytest.mark.parametrize("kind", ["batch", "none"])
def test_evaluation_equals_numpys(kind, x64):
    model = network(kind, jnp.float64)
    state = create_state(model, optax.sgd(0.1), 2, batch(0)["image"])
    given = batch(5, examples=9)
    metrics = jax.jit(make_eval_step(model))(state.params, state.batch_stats, given)
    logits, _, _ = numpy_network.forward(
        to_numpy(state.params),
        to_numpy(state.batch_stats),
        given["image"],
        train=False,
    )
    labels = np.asarray(given["label"])
    losses = -numpy_network.log_softmax(logits)[np.arange(9), labels]
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-12)
    np.testing.assert_array_equal(metrics["correct"], logits.argmax(-1) == labels)


def test_without_statistics_the_collection_is_empty():
    model, optimizer = network("none", jnp.float32), optax.sgd(0.1)
    state = create_state(model, optimizer, 0, batch(0)["image"])
    assert state.batch_stats == {}
    state, _ = jax.jit(make_train_step(model, optimizer))(state, batch(0))
    assert state.batch_stats == {}


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("classes", [3, 5, 6, 30])
def test_hits_are_those_of_a_stable_sort(array, classes):
    rng = np.random.default_rng(classes)
    # Whole numbers, so that there are many ties.
    scores = rng.integers(0, 6, (200, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 200)
    found = topk_correct(array(scores), array(labels))
    order = np.argsort(-scores, axis=-1, kind="stable")
    np.testing.assert_array_equal(found["correct"], scores.argmax(-1) == labels)
    assert ("top5" in found) == (classes > 5)
    if classes > 5:
        among = (order[:, :5] == labels[:, None]).any(-1)
        np.testing.assert_array_equal(found["top5"], among)


def test_nan_is_never_right():
    scores = np.array([[np.nan, 1.0], [np.nan, 1.0], [np.nan, np.nan]])
    labels = np.array([0, 1, 0])
    for found in (
        topk_correct(scores, labels),
        topk_correct(jnp.asarray(scores), jnp.asarray(labels)),
    ):
        assert found["correct"].tolist() == [False, False, False]
