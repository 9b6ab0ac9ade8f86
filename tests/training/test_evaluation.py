"""Scores of networks, ensembles and averages; eval.py, and what people get wrong."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_program
import train as train_program
from bnjax.data.blocks import CropBlocks, SplitBlocks, cut
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.sources import open_source
from bnjax.training.evaluation import (
    Evaluation,
    Evaluator,
    average_params,
    evaluate_crops,
    evaluate_runs,
    make_predictor,
)
from bnjax.training.loop import Run, train
from bnjax.training.sharding import Pmap, Spmd
from bnjax.training.step import Stream, stream_key, tree_sha256
from tests.data import image_folder
from tests.training import numpy_network


@pytest.fixture(scope="module")
def states(initial_state):
    """Three networks that get some right and some wrong."""
    return [noisy(initial_state, seed, 0.7) for seed in range(3)]


def noisy(state, seed, std):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, std, leaf.shape).astype(leaf.dtype),
        state.params,
    )
    stats = jax.tree.map(lambda leaf: leaf * 0.8 + 0.1, state.batch_stats)
    return dataclasses.replace(state, params=params, batch_stats=stats)


@pytest.fixture
def predictors(program, small_config, states):
    def make(devices):
        to_inputs = make_to_inputs(small_config.data, 16)
        parallel = Spmd(jax.devices()[:devices])
        return [make_predictor(program.model, to_inputs, s, parallel) for s in states]

    return make


def probabilities_in_numpy(state, images):
    """Class probabilities in float64, shape (images, classes)."""
    variables = jax.tree.map(np.float64, (state.params, state.batch_stats))
    logits, _, _ = numpy_network.forward(*variables, images / 16, train=False)
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
    for scores, expected in pairs:
        loss, *counts = scores_in_numpy(expected, labels)
        assert scores.loss == loss
        assert [scores.correct, scores.top5_correct] == counts


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


@pytest.fixture
def state(initial_state):
    """Weights that get some right and some wrong."""
    return noisy(initial_state, 0, 0.5)


@pytest.mark.parametrize("devices", [1, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 7, 64, 355, 1000])
def test_it_equals_a_plain_numpy_loop(program, state, batch_size, devices):
    arrays = open_source("digits").load("test", print)
    parallel = Spmd(jax.devices()[:devices])
    found = Evaluator(program, arrays, batch_size, parallel)(state)
    expected = probabilities_in_numpy(state, arrays.images)
    loss, correct, top5 = scores_in_numpy(expected, arrays.labels)

    assert (found.correct, found.examples) == (correct, 355)
    assert found.accuracy == correct / 355
    assert (found.top5_correct, found.top5_accuracy) == (top5, top5 / 355)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert 0.05 < found.accuracy < found.top5_accuracy < 0.95


@pytest.mark.slow
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


# The moving average of the parameters.

DECAY = 0.9


def test_training_does_not_notice(small_config):
    def trained(config):
        run = Run(config, open_source("digits"))
        run.dispatch(20)
        return tree_sha256((run.state.params, run.state.batch_stats))

    with_average = dataclasses.replace(small_config, ema=DECAY)
    assert trained(with_average) == trained(small_config)


def oracle_statistics(run, params, batches):
    """Mean over batches of the moments of each layer's input, in float64."""
    state, program = run.state, run.program
    source = open_source("digits")
    arrays = source.load("train", print)
    params = jax.tree.map(np.float64, params)
    key = stream_key(state.rng, Stream.ORDER, 0)
    order = np.asarray(jax.random.permutation(key, len(arrays.labels)))
    size = run.config.batch_size
    sums = {}
    for step in range(batches):
        rows = order[step * size : (step + 1) * size]
        x = np.asarray(program.gather(arrays, rows)["image"], np.float64)
        x = x.reshape(size, -1)
        for layer in range(2):
            x = x @ params[f"dense_{layer}"]["kernel"]
            mean, var = x.mean(0), x.var(0)
            sums.setdefault(f"bn_{layer}", []).append((mean, var * size / (size - 1)))
            x = (x - mean) / np.sqrt(var + run.config.bn.epsilon)
            bn = params[f"bn_{layer}"]
            x = 1 / (1 + np.exp(-(bn["scale"] * x + bn["bias"])))
    return {
        name: dict(zip(("mean", "var"), np.mean(each, 0), strict=True))
        for name, each in sums.items()
    }


def test_the_average_is_evaluated_with_its_own_statistics(small_config):
    config = dataclasses.replace(small_config, ema=DECAY, batch_stats_from=5)
    source = open_source("digits")
    run = Run(config, source)
    run.dispatch(20)
    state = average_params(config, run.state)
    assert tree_sha256(state.params) != tree_sha256(run.state.params)
    batch_stats = oracle_statistics(run, state.params, 5)
    expected = jax.tree.map(jnp.float32, batch_stats)
    moving = run.state.batch_stats
    assert not np.allclose(moving["bn_1"]["var"], expected["bn_1"]["var"], rtol=1e-2)
    evaluator = Evaluator(run.program, source.load("test", print), 100)
    by_hand = evaluator(dataclasses.replace(state, batch_stats=expected))
    found = run.evaluate()
    assert found.correct == by_hand.correct
    assert found.loss == pytest.approx(by_hand.loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["pmap", "spmd"])
def test_on_several_devices_it_is_the_same(small_config, parallel):
    def evaluated(**layout):
        changes = {"ema": DECAY, "batch_stats_from": 3, **layout}
        run = Run(dataclasses.replace(small_config, **changes), open_source("digits"))
        run.dispatch(10)
        return run.evaluate()

    several = evaluated(parallel=parallel, devices=5)
    assert several.loss == pytest.approx(evaluated().loss, rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_has_the_same_average(run_small, small_config, tmp_path):
    changes = {"ema": DECAY, "batch_stats_from": 3}
    workdir, whole = run_small(**changes)
    shutil.rmtree(workdir / "checkpoints" / "60")
    config = dataclasses.replace(small_config, workdir=workdir, resume=True, **changes)
    resumed = train("digits", config)
    assert resumed["state_sha256"] == whole["state_sha256"]
    assert resumed["test_loss"] == whole["test_loss"]


@pytest.mark.parametrize("path", ["resident", "streaming"])
def test_eval_scores_it_the_same(run_small, small_config, path):
    data = dataclasses.replace(small_config.data, path=path)
    changes = {"ema": DECAY, "batch_stats_from": 4, "data": data}
    workdir, summary = run_small(**changes)
    found = evaluate_runs([workdir])
    assert found["test_loss"] == summary["test_loss"]
    assert found["test_accuracy"] == summary["test_accuracy"]


def test_both_kinds_of_statistics_are_reported(run_small, capsys):
    workdir, summary = run_small(ema=DECAY, batch_stats_from=4)
    capsys.readouterr()
    found = evaluate_runs([workdir], batch_stats_from=4)
    assert found["test_loss"] == found["population"]["test_loss"]
    assert found["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] > found["population"]["test_loss"]
    assert found["batch_stats_from"] == 4
    assert json.loads((workdir / "eval.json").read_text()) == found
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "moving averages:"
    assert printed[2] == "population:"


@pytest.mark.slow
def test_a_run_without_an_average_keeps_its_score(run_small):
    workdir, summary = run_small()
    found = evaluate_runs([workdir], batch_stats_from=28)
    assert found["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] == summary["test_loss"]
    assert found["population"]["test_loss"] != summary["test_loss"]


@pytest.mark.slow
def test_an_ensemble_of_both(run_small):
    workdirs = [run_small(seed=seed)[0] for seed in (1, 2)]
    found = evaluate_runs(workdirs, batch_stats_from=3)
    alone = evaluate_runs(workdirs[:1], batch_stats_from=3)
    member = found["population"]["members"][0]
    assert member["test_correct"] == alone["population"]["test_correct"]


def test_without_normalization_there_are_no_statistics(run_small):
    workdir, summary = run_small(ema=DECAY, batch_norm=False)
    found = evaluate_runs([workdir], batch_stats_from=3)
    assert found["population"]["test_loss"] == summary["test_loss"]
    assert found["moving_averages"]["test_loss"] == summary["test_loss"]


# eval.py, with crops and with several runs.

FLAGS = ("--parallel=single", "--steps=60", "--batch-size=50", "--model.hidden=12")
OBLONG = "synthetic:8x6:10:100"


@pytest.fixture(scope="module")
def train_cli(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def call(name, *flags):
        workdir = folder / name
        if not workdir.exists():
            argv = [*FLAGS, "--workdir", str(workdir), *map(str, flags)]
            assert train_program.main(argv) == 0
        return workdir

    return call


@pytest.fixture
def evaluate(capsys, tmp_path):
    """Call eval.py; return what it wrote and what it printed."""

    def call(*argv):
        capsys.readouterr()
        output = tmp_path / "output.json"
        words = [str(word) for word in argv]
        assert eval_program.main([*words, "--output", str(output)]) == 0
        return json.loads(output.read_text()), capsys.readouterr().out

    return call


@pytest.fixture
def fails(capsys):
    def call(*argv, status=1):
        capsys.readouterr()
        assert eval_program.main([str(word) for word in argv]) == status
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        return message

    return call


@pytest.mark.slow
def test_an_ensemble_and_its_members(train_cli, evaluate):
    # One of them is given its pixels otherwise.
    otherwise = ("--seed", 1, "--data.mean", 0.5, "--data.std", 0.25)
    runs = [train_cli("one"), train_cli("two", *otherwise)]
    alone = [evaluate(run)[0] for run in runs]
    result, printed = evaluate(*runs)

    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        f"{runs[0]}, step 60",
        f"{runs[1]}, step 60",
        "ensemble of 2",
    ]
    assert repr(result["test_accuracy"]) in lines[-1]
    for run, member, single in zip(runs, result["members"], alone, strict=True):
        assert (member["workdir"], member["step"]) == (str(run), 60)
        for name in ("accuracy", "correct", "examples", "top5_correct"):
            assert member[f"test_{name}"] == single[f"test_{name}"]
        assert member["test_loss"] == pytest.approx(single["test_loss"], rel=1e-5)
        assert not (run / "eval.json").exists()
    # The loss of the mean is below the mean of the losses.
    assert result["test_loss"] < sum(single["test_loss"] for single in alone) / 2
    assert result["test_examples"] == 355


@pytest.mark.slow
def test_crops_of_an_image_folder(train_cli, evaluate, tmp_path):
    images = image_folder.write(tmp_path / "images", count=20)
    run = train_cli("folder", "--data.name", images, "--data.image-size", 16)
    result, printed = evaluate(run, "--crops", 144)
    assert (result["crops"], result["test_examples"], result["step"]) == (144, 9, 60)
    assert printed.startswith("step 60, 144 crops: test accuracy ")
    assert "test_top5_accuracy" not in result
    assert eval_program.main([str(run), "--crops", "10"]) == 0
    written = json.loads((run / "eval.json").read_text())
    assert (written["crops"], written["test_examples"]) == (10, 9)


@pytest.mark.slow
def test_runs_that_make_no_ensemble(train_cli, fails):
    one, other = train_cli("one"), train_cli("other", "--data.name", OBLONG)
    message = fails(one, other)
    assert "these runs cannot form an ensemble" in message
    assert f"{one} on digits (digits, images of 8x8, 10 classes)" in message
    assert f"{other} on {OBLONG}" in message
    assert f"{one} is given twice" in fails(one, one, status=2)


def test_other_faults(train_cli, fails, tmp_path):
    one = train_cli("one")
    missing = tmp_path / "no" / "folder.json"
    assert "is in a missing folder" in fails(one, "--output", missing, status=2)
    assert "is a folder" in fails(one, "--output", tmp_path, status=2)
    assert "expected 1, 10 or 144" in fails(one, "--crops", 12, status=2)
    assert f"{tmp_path} is not a run" in fails(one, tmp_path)
    bare = shutil.copytree(one, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    assert "has no checkpoints" in fails(one, bare)
    other = train_cli("other", "--data.name", OBLONG)
    message = fails(other, "--crops", 10, status=2)
    assert "the network takes images of 8x6" in message
    assert not (one / "eval.json").exists()


def test_a_network_without_a_finite_loss(train_cli, fails, monkeypatch):
    nan = {"loss": np.full(355, np.nan), "correct": np.zeros(355, bool)}
    found = Evaluation.of([nan])
    monkeypatch.setattr(Evaluation, "of", lambda parts: found)
    run = train_cli("one")
    message = fails(run)
    assert f"the network of {run} has a test loss of nan" in message
    assert not (run / "eval.json").exists()


def test_files_added_to_the_folder_of_a_run(train_cli, tmp_path, capsys):
    """They move the split: eval warns, and the run is not resumed."""
    images = image_folder.write(tmp_path / "images", count=20) / "train"
    flags = "--data.name", images, "--data.image-size", 16
    flags += "--data.validation-share", 0.2, "--batch-size", 30
    run = train_cli("flat", *flags)
    config = (run / "config.json").read_bytes()
    capsys.readouterr()
    assert eval_program.main([str(run)]) == 0
    assert "added, removed or renamed" not in capsys.readouterr().err

    first = images / "ant" / "00.jpg"
    first.with_name("0.jpg").write_bytes(first.read_bytes())
    assert eval_program.main([str(run)]) == 0
    warning = capsys.readouterr().err
    assert f"warning: {run}: files were added, removed or renamed" in warning
    before, _, now = warning.partition("; now ")
    assert "'train': '48 files, " in before
    assert "'test': '12 files, " in before
    assert sum(map(int, re.findall(r"'(\d+) files, ", now))) == 61
    argv = [*map(str, flags), "--workdir", str(run), "--resume", "--steps", "90"]
    assert train_program.main([*FLAGS, *argv]) == 2
    assert "cannot be continued: files were added" in capsys.readouterr().err
    assert (run / "config.json").read_bytes() == config
