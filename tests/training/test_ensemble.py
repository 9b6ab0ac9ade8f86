import dataclasses

import jax
import numpy as np
import pytest

from bnjax.data.blocks import CropBlocks, SplitBlocks, cut
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import open_source
from bnjax.training.evaluation import Evaluator, Predictor, evaluate_crops
from bnjax.training.sharding import Spmd
from tests.training import numpy_network


@pytest.fixture(scope="module")
def states(initial_state):
    """Three networks that get some right and some wrong."""

    def noisy(seed):
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf: leaf + rng.normal(0, 0.7, leaf.shape).astype(leaf.dtype),
            initial_state.params,
        )
        stats = jax.tree.map(lambda leaf: leaf * 0.8 + 0.1, initial_state.batch_stats)
        return dataclasses.replace(initial_state, params=params, batch_stats=stats)

    return [noisy(seed) for seed in range(3)]


@pytest.fixture
def predictors(program, small_config, states):
    def make(devices):
        to_inputs = make_to_inputs(small_config.data, 16)
        parallel = Spmd(jax.devices()[:devices])
        return [Predictor(program.model, to_inputs, s, parallel) for s in states]

    return make


def probabilities_in_numpy(state, images):
    """Class probabilities in float64, shape (images, classes)."""
    params, stats = (
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
        for tree in (state.params, state.batch_stats)
    )
    logits, _, _ = numpy_network.forward(params, stats, images / 16, train=False)
    return np.exp(numpy_network.log_softmax(logits))


def scores_in_numpy(probabilities, labels):
    """Loss, right answers, and those right among five, an example at a time."""
    loss, correct, top5 = [], 0, 0
    for row, label in zip(probabilities, labels, strict=True):
        loss.append(-np.log(row[label]))
        best = np.argsort(-row, kind="stable")
        correct += int(best[0] == label)
        top5 += int(label in best[:5])
    return np.mean(loss), correct, top5


@pytest.mark.parametrize(
    ("crops", "block", "batch_size", "devices"),
    [(1, 400, 60, 1), (10, 33, 200, 8), (10, 1, 12, 3), (144, 60, 1000, 1)],
)
def test_it_equals_numpy_an_image_at_a_time(
    states, predictors, crops, block, batch_size, devices
):
    source = open_source("digits")
    blocks = CropBlocks(SplitBlocks(source, block), crops)
    members, ensemble = evaluate_crops(predictors(devices), blocks, batch_size)

    images, labels = source.load("test", print)
    each = [[] for _ in states]
    for image in images:
        cropped, counts = image[None], np.ones(1)
        if crops > 1:
            cropped, counts = cut(image, 8, crops)
        cropped = np.minimum(cropped, 16)
        for found, state in zip(each, states, strict=True):
            one = probabilities_in_numpy(state, cropped)
            found.append((one * counts[:, None]).sum(0) / crops)
    each = np.array(each)
    pairs = zip([*members, ensemble], [*each, each.mean(0)], strict=True)
    for found, expected in pairs:
        loss, correct, top5 = scores_in_numpy(expected, labels)
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert (found.correct, found.top5_correct) == (correct, top5)
        assert found.examples == 355
    assert 0 < ensemble.correct < ensemble.top5_correct < 355


def test_an_ensemble_of_one_counts_as_the_plain_evaluation(program, states, predictors):
    source = open_source("digits")
    blocks = CropBlocks(SplitBlocks(source, 50), 1)
    for state, predictor in zip(states, predictors(1), strict=True):
        plain = Evaluator(program, source.load("test", print), 60)(state)
        (member,), ensemble = evaluate_crops([predictor], blocks, 60)
        assert member == ensemble
        for name in ("correct", "top5_correct", "examples"):
            assert getattr(member, name) == getattr(plain, name)
        assert member.loss == pytest.approx(plain.loss, rel=1e-6)


@pytest.fixture
def table():
    """Networks that know the images by their first pixel: logits in a table."""
    rng = np.random.default_rng(5)
    source = open_source("synthetic:4x4:7:200")
    images = source.splits["test"].arrays.images
    images[:, 0, 0] = np.arange(200)
    logits = rng.normal(0, 3, (2, 200, 7)).astype(np.float32)
    members = [lambda given, own=own: own[given[:, 0, 0] % 200] for own in logits]
    return source, logits, members


@pytest.mark.parametrize("batch_size", [1, 7, 64, 200, 1000])
def test_probabilities_are_averaged_to_the_last_bit(table, batch_size):
    source, logits, members = table
    blocks = CropBlocks(SplitBlocks(source, 30), 1)
    found, ensemble = evaluate_crops(members, blocks, batch_size)

    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    each = powers / powers.sum(-1, keepdims=True)
    labels = source.splits["test"].arrays.labels
    pairs = zip([*found, ensemble], [*each, each.mean(0)], strict=True)
    for evaluation, expected in pairs:
        loss, correct, top5 = scores_in_numpy(expected, labels)
        assert evaluation.loss == loss
        assert (evaluation.correct, evaluation.top5_correct) == (correct, top5)


def test_a_probability_too_small_for_float64_has_a_finite_loss(table):
    source, _, _ = table
    labels = source.splits["test"].arrays.labels
    certain = np.full((200, 7), 2000, np.float32)
    certain[np.arange(200), labels] = 0
    _, found = evaluate_crops(
        [lambda given: certain[given[:, 0, 0] % 200]],
        CropBlocks(SplitBlocks(source, 30), 1),
        50,
    )
    assert found.loss == pytest.approx(-np.log(np.finfo(np.float64).tiny))
    assert (found.correct, found.top5_correct) == (0, 0)


def test_progress_is_reported(table):
    source, _, members = table
    reports = []
    evaluate_crops(
        members,
        CropBlocks(SplitBlocks(source, 30), 1),
        90,
        lambda done, total: reports.append((done, total)),
    )
    assert reports == [(90, 200), (180, 200), (200, 200)]
