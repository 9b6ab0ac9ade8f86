"""The presets against the paper's sections 4.1 and 4.2, written down once more."""

import re

import cv2
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bnjax.cli import parse_train
from bnjax.data.sources import open_source
from bnjax.training.config import to_json
from bnjax.training.loop import train
from bnjax.training.metrics import read_metrics
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program
from bnjax.training.step import count_parameters

FIVE = ("inception", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid")


def changed(preset, base):
    """The fields by which a preset differs from another, with its values."""
    mine, others = (
        flatten_dict(to_json(PRESETS[name].config), sep=".") for name in (preset, base)
    )
    return {name: mine[name] for name in mine if mine[name] != others[name]}


def decay_steps(config):
    return config.optim.schedule_options["transition_steps"]


# Section 4.2.1, in its order: rate, dropout, L2, decay, local response, shuffling,
# distortion.
SEVEN = {
    "learning_rate": 0.0075,
    "model.dropout": 0.0,
    "optim.weight_decay": 4e-5,
    "optim.schedule_options.transition_steps": 53_333,
    "model.local_response_norm": False,
    "data.shuffle": "within-shard",
    "data.augment.strength": 0.3,
}


class TestImageNet:
    def test_the_baseline(self):
        config = PRESETS["inception"].config
        assert not config.batch_norm
        assert (config.batch_size, config.learning_rate) == (32, 0.0015)
        assert config.model.dropout == 0.4
        assert config.model.local_response_norm
        assert config.model.activation == "relu"
        assert (config.data.name, config.data.image_size) == ("imagenet2012", 224)
        assert config.data.test_split == "validation"
        assert config.data.shuffle == "fixed-batches"
        assert (config.data.augment.kind, config.data.augment.strength) == ("crop", 1)
        optim = config.optim
        assert (optim.name, optim.options) == ("sgd", {"momentum": 0.9})
        assert optim.schedule == "exponential_decay"
        assert optim.schedule_options == {
            "decay_rate": 0.96,
            "staircase": True,
            "transition_steps": 320_000,
        }
        # 8 epochs of GoogLeNet's.
        assert 320_000 * config.batch_size // 1_281_167 == 7

    def test_bn_baseline_differs_in_nothing_else(self):
        assert changed("bn-baseline", "inception") == {"batch_norm": True}

    def test_bn_x5_has_the_seven_changes(self):
        more = {"batch_norm": True, "steps": 6_000_000}
        assert changed("bn-x5", "inception") == SEVEN | more
        base, config = PRESETS["inception"].config, PRESETS["bn-x5"].config
        assert config.learning_rate == 5 * base.learning_rate
        assert config.optim.weight_decay == base.optim.weight_decay / 5
        assert decay_steps(config) == decay_steps(base) // 6

    def test_bn_x30_and_the_sigmoids(self):
        assert changed("bn-x30", "bn-x5") == {"learning_rate": 0.045}
        assert changed("bn-x5-sigmoid", "bn-x5") == {"model.activation": "sigmoid"}


class TestCifar10:
    def test_the_rates_keep_their_proportions(self):
        rates = [PRESETS[f"cifar10-{name}"].config.learning_rate for name in FIVE]
        assert np.allclose(np.divide(rates, rates[0]), [1, 1, 5, 30, 5])

    def test_the_decay_comes_as_often_in_the_run(self):
        for name in FIVE:
            large, small = PRESETS[name].config, PRESETS[f"cifar10-{name}"].config
            assert small.steps == 8_000
            assert small.batch_size == 32
            ours, papers = (decay_steps(c) / c.steps for c in (small, large))
            assert ours == pytest.approx(papers, rel=1e-2)

    def test_the_same_fields_change(self):
        for name in FIVE[1:]:
            fields = set(changed(f"cifar10-{name}", "cifar10-inception"))
            assert fields == set(changed(name, "inception")) - {"steps"}
            assert changed(f"cifar10-{name}", name)["model.width"] == 0.125


@pytest.mark.parametrize(
    ("prefix", "varied"), [("", "bn-x30"), ("cifar10-", "cifar10-bn-x5")]
)
def test_the_ensemble(prefix, varied):
    allowed = {"model.weight_scale", "model.dropout", "model.per_activation"}
    seen = []
    for seed in range(1, 7):
        differing = changed(f"{prefix}ensemble-{seed}", varied)
        assert differing.pop("seed") == seed
        assert differing["model.dropout"] in (0.05, 0.1)
        assert differing.get("model.weight_scale", 2) >= 1
        assert set(differing) <= allowed
        seen.append(differing)
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])
    assert {name for one in seen for name in one} == allowed


def test_lenet_is_the_example_of_the_book():
    config = PRESETS["lenet"].config
    assert (config.data.name, config.batch_size) == ("fashion_mnist", 256)
    assert config.steps == 10 * (60_000 // 256)
    assert (config.optim.name, config.learning_rate) == ("sgd", 1.0)
    assert (config.bn.momentum, config.bn.epsilon) == (0.9, 1e-5)
    assert changed("lenet-mnist", "lenet") == {"data.name": "mnist"}


class TestHelp:
    @pytest.mark.parametrize("name", PRESETS)
    def test_it_opens_with_its_command_and_says_what_to_expect(self, name, capsys):
        preset = PRESETS[name]
        with pytest.raises(SystemExit):
            parse_train([name, "--help"])
        shown = " ".join(capsys.readouterr().out.partition("╭")[0].split())
        opening = f"{name}: `python train.py {name}`. {preset.summary}"
        assert f"{opening} {preset.expectation} {preset.time}".strip() in shown
        assert preset.name == name
        assert len(f"  {name}: {preset.summary}") <= 80
        assert re.search(r"\d %|docs/programs/experiments.md", preset.expectation)

    def test_the_list_has_a_line_for_each(self, capsys):
        with pytest.raises(SystemExit):
            parse_train(["--help"])
        shown = capsys.readouterr().out.partition("╭")[0]
        listed = re.findall(r"^  (\S+)(?: to 6)?: ", shown, re.MULTILINE)
        folded = {name for name in PRESETS if re.search("ensemble-[2-6]", name)}
        assert set(listed) == set(PRESETS) - folded
        assert "  ensemble-1 to 6: A member of the ensemble" in shown


# A convolution's channels have a scale and a shift with BN, a shift without.
CHANNELS = 10_016
# Modules 5a and 5b have 3,232 of them, on 2x2 positions with the small stem, on 7x7
# with the other.
PER_POSITION = 2 * 3232
PARAMETERS = {
    "digits": 6400 + 20_000 + 600 + 1010,
    "mnist": 78_400 + 20_000 + 600 + 1010,
    "lenet": 162 + 2432 + 30_960 + 10_248 + 850,
    "cifar10-inception": 163_866 - CHANNELS // 8,
    "cifar10-bn-x5": 163_866,
    "cifar10-ensemble-6": 163_866 + (4 - 1) * PER_POSITION // 8,
    "cifar10-resnet20": 269_722,
}
LARGE = {
    "inception": 11_285_224 - CHANNELS,
    "bn-x5": 11_285_224,
    "ensemble-6": 11_285_224 + (49 - 1) * PER_POSITION,
    "resnet50": 25_557_032,
    "cifar10-resnet56": 853_018,
    "cifar10-resnet110": 1_727_962,
}
SOURCES = {
    "digits": "digits",
    "mnist": "synthetic:28x28x1:10:2",
    "fashion_mnist": "synthetic:28x28x1:10:2",
    "cifar10": "synthetic:32x32x3:10:2",
    "imagenet2012": "synthetic:224x224x3:1000:2",
}


def check_parameters(name, expected):
    config = PRESETS[name].config
    program = Program(config, open_source(SOURCES[config.data.name]))
    state = jax.eval_shape(program.initial_state)
    assert count_parameters(state.params) == expected
    assert bool(state.batch_stats) == config.batch_norm


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_it_builds(name, expected):
    check_parameters(name, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), LARGE.items())
def test_a_large_one_builds(name, expected):
    check_parameters(name, expected)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of noise, as ImageNet's is laid out."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label in ("ant", "bee", "cat"):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (80, 70 + number, 3), np.uint8)
                cv2.imwrite(str(root / split / label / f"{number}.jpg"), pixels)
    return root


@pytest.fixture
def quickly_compiled():
    """Most of the time of three steps is XLA's, for optimizations not needed here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def train_three_steps(name, folder, workdir):
    _, config = parse_train(
        [
            *(name, "--workdir", str(workdir), "--steps", "3", "--batch-size", "4"),
            *("--data.name", str(folder), "--data.image-size", "64"),
            *("--model.width", "0.125", "--devices", "1", "--log-every", "3"),
        ]
    )
    summary = train(name, config)
    assert summary["steps"] == 3
    assert summary["test_examples"] == 6
    assert np.isfinite(summary["test_loss"])
    # Three classes; the running statistics have not come far from 0 and 1.
    assert 0.3 < read_metrics(workdir)[0]["loss"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FIVE, "ensemble-6"])
def test_it_trains_on_a_folder(name, photographs, tmp_path, quickly_compiled):
    train_three_steps(name, photographs, tmp_path / "run")
