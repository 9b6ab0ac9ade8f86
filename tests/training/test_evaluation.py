import jax
import numpy as np
import pytest

from bnjax.data.sources import open_source
from bnjax.training.evaluation import Evaluation, Evaluator
from bnjax.training.sharding import Pmap, Spmd
from tests.training import numpy_network


@pytest.fixture
def state(initial_state):
    # Weights that get some right and some wrong.
    state = initial_state
    rng = np.random.default_rng(0)
    noise = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype),
        state.params,
    )
    return type(state)(
        **{name: getattr(state, name) for name in ("step", "opt_state", "rng")},
        params=noise,
        batch_stats=jax.tree.map(lambda leaf: leaf * 0.8 + 0.1, state.batch_stats),
    )


@pytest.fixture
def plain_loop(state):
    """Right answers, right among five, and losses, an example at a time in NumPy."""
    arrays = open_source("digits").load("test", print)
    params, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        for tree in (state.params, state.batch_stats)
    )
    correct, top5, losses = 0, 0, []
    for image, label in zip(arrays.images, arrays.labels, strict=True):
        logits, _, _ = numpy_network.forward(
            params, stats, image[None] / 16, train=False
        )
        correct += int(logits[0].argmax() == label)
        top5 += int(label in np.argsort(-logits[0], kind="stable")[:5])
        losses.append(-numpy_network.log_softmax(logits)[0, label])
    return correct, top5, losses


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 355, 1000])
def test_it_equals_a_plain_numpy_loop(program, state, plain_loop, batch_size, devices):
    arrays = open_source("digits").load("test", print)
    parallel = Spmd(jax.devices()[:devices])
    found = Evaluator(program, arrays, batch_size, parallel)(state)
    correct, top5, losses = plain_loop

    assert (found.correct, found.examples) == (correct, 355)
    assert found.accuracy == correct / 355
    assert (found.top5_correct, found.top5_accuracy) == (top5, top5 / 355)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert 0.05 < found.accuracy < found.top5_accuracy < 0.95


def test_a_pmapped_state_is_evaluated_as_it_was(program, state):
    arrays = open_source("digits").load("test", print)
    parallel = Pmap(jax.devices()[:3])
    placed = parallel.place_state(state)
    found = Evaluator(program, arrays, 50, parallel)(parallel.host_state(placed))
    assert found == Evaluator(program, arrays, 50)(state)


def test_five_classes_have_no_top_5():
    parts = [
        {"loss": np.array([0.5, 1.5]), "correct": np.array([True, False])},
        {"loss": np.array([4.0]), "correct": np.array([True])},
    ]
    found = Evaluation.of(parts)
    assert found == Evaluation(loss=2.0, correct=2, examples=3)
    assert found.top5_accuracy is None
    assert str(found) == f"test accuracy {2 / 3!r} (2 of 3), test loss 2.0"
