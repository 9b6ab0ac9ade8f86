import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest

from bnjax.cli import parse_train
from bnjax.data import config as data_config
from bnjax.data.config import SettingError
from bnjax.training import config
from bnjax.training.config import (
    BatchNormConfig,
    Config,
    ModelConfig,
    from_json,
    to_json,
    validate,
)
from bnjax.training.presets import PRESETS


def flags_of(cls, prefix=""):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from flags_of(field.type, f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}".replace("_", "-")


class TestParse:
    def test_digits_is_the_default(self):
        assert parse_train([]) == ("digits", PRESETS["digits"].config)
        name, config = parse_train(["--steps", "7"])
        assert name == "digits"
        assert config == dataclasses.replace(PRESETS["digits"].config, steps=7)

    def test_mnist_is_section_4_1(self):
        _, config = parse_train(["mnist"])
        assert (config.steps, config.batch_size) == (50_000, 60)
        assert (config.optim.name, config.learning_rate) == ("sgd", 0.5)
        assert config.optim.schedule == "constant"
        assert config.model.hidden == (100, 100, 100)
        assert config.model.weight_std == 0.01
        assert config.data.name == "mnist"
        assert config.data.binarize
        assert config.batch_norm
        assert config.bn.unbiased
        assert 10_000 % config.eval_every == 0
        validate(config)

    def test_flags_override_the_preset(self):
        _, config = parse_train(
            [
                "mnist",
                "--steps",
                "5",
                "--seed",
                "3",
                "--batch-size",
                "8",
                "--learning-rate",
                "0.25",
                "--workdir",
                "there",
                "--no-batch-norm",
                "--bn.momentum",
                "0.9",
                "--bn.epsilon",
                "1e-3",
                "--bn.no-unbiased",
                "--model.hidden",
                "4",
                "5",
                "--data-dir",
                "data",
            ]
        )
        assert (config.steps, config.seed, config.batch_size) == (5, 3, 8)
        assert config.learning_rate == 0.25
        assert config.workdir == Path("there")
        assert config.data_dir == Path("data")
        assert not config.batch_norm
        assert (config.bn.momentum, config.bn.epsilon) == (0.9, 1e-3)
        assert not config.bn.unbiased
        assert config.model.hidden == (4, 5)

    @pytest.mark.parametrize("argv", [["--help"], ["mnist", "--help"]])
    def test_help_describes_every_flag(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_train(argv)
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert not [flag for flag in flags_of(Config) if flag not in text]
        assert ("python train.py mnist" in text) == (argv[0] == "mnist")
        assert ("Test accuracy about" in text) == (argv[0] == "mnist")
        assert ("scikit-learn" in text) == (argv[0] != "mnist")

    @pytest.mark.parametrize("flags", [["--model", "lenet"], ["--model.name=lenet"]])
    def test_another_model_starts_from_its_own_options(self, flags):
        _, config = parse_train(["mnist", *flags])
        assert config.model == ModelConfig(name="lenet")
        assert config.data == PRESETS["mnist"].config.data
        _, config = parse_train(["mnist", *flags, "--model.pool", "max"])
        assert config.model == ModelConfig(name="lenet", pool="max")
        _, config = parse_train(["mnist", "--model", "mlp"])
        assert config == PRESETS["mnist"].config

    def test_a_model_of_ones_own_starts_from_the_defaults_of_bn(self):
        assert PRESETS["digits"].config.bn != BatchNormConfig()
        _, config = parse_train(["--model=my_nets:make", "--bn.epsilon", "0.5"])
        assert config.model == ModelConfig(name="my_nets:make")
        assert config.bn == BatchNormConfig(epsilon=0.5)

    def test_an_unknown_preset_suggests_the_right_one(self):
        with pytest.raises(SettingError, match=r"'mnits'.*Did you mean 'mnist'"):
            parse_train(["mnits"])

    def test_a_preset_after_a_flag(self):
        with pytest.raises(SettingError, match="the preset goes first"):
            parse_train(["--steps", "5", "mnist"])

    @pytest.mark.parametrize(
        ("typo", "right"),
        [
            ("--stpes", "--steps"),
            ("--lerning-rate", "--learning-rate"),
            ("--bn.momentun", "--bn.momentum"),
            ("--no-batchnorm", "--no-batch-norm"),
            ("--optim.nmae", "--optim.name"),
            ("--bn.epsilom", "--bn.epsilon"),
            ("--hosts.cordinator", "--hosts.coordinator"),
        ],
    )
    def test_a_typo_in_a_flag_suggests_the_right_one(self, typo, right, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_train([typo, "1"])
        assert caught.value.code == 2
        assert right in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "right"),
        [("--optim.name moment", "'momentum'"), ("--on-nan skp", "'skip'")],
    )
    def test_a_wrong_choice_names_the_right_ones(self, argv, right, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_train(argv.split())
        assert caught.value.code == 2
        assert right in capsys.readouterr().err

    @pytest.mark.parametrize("module", [config, data_config])
    def test_no_line_of_help_breaks_off(self, module):
        # tyro keeps these breaks, and breaks what is too long for a terminal of 80.
        tree = ast.parse(inspect.getsource(module))
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            texts = [
                node.value.value
                for node in cls.body[1:]
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            ]
            assert texts
            lines = [line for text in texts for line in str(text).splitlines()]
            assert [line for line in lines if line.rstrip()[-1] not in ".;:"] == []


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--steps 0", "--steps 0: expected a whole number of 1 or more"),
        ("--steps -5", "--steps -5"),
        ("--batch-size 0", "--batch-size 0"),
        ("--eval-every 0", "--eval-every 0"),
        ("--log-every -1", "--log-every -1"),
        ("--checkpoint-every 0", "--checkpoint-every 0"),
        ("--eval-batch-size 0", "--eval-batch-size 0"),
        ("--seed -1", "--seed -1: expected a whole number from 0"),
        ("--seed 4294967296", "--seed 4294967296"),
        ("--learning-rate -0.5", "--learning-rate -0.5: expected a positive number"),
        ("--learning-rate nan", "--learning-rate nan"),
        ("--learning-rate inf", "--learning-rate inf"),
        ("--bn.momentum 1.01", r"--bn.momentum 1.01: expected a number in \[0, 1\]"),
        ("--bn.momentum -0.1", "--bn.momentum -0.1"),
        ("--bn.momentum nan", "--bn.momentum nan"),
        ("--bn.epsilon 0", "--bn.epsilon 0.0: expected a positive number"),
        ("--bn.epsilon -1e-5", "--bn.epsilon -1e-05"),
        ("--model.weight-std -1", "--model.weight-std -1.0"),
        ("--model.hidden 5 0", "--model.hidden"),
        ("--model.hidden", "--model.hidden"),
        ("--model.name mpl", "--model.name mpl: .* Did you mean 'mlp'"),
        ("--model mpl", "or a function of your own, such as my_package.nets:make_net"),
        ("--model.width 0.5", "width 0.5: mlp has no such option; it has --model.hid"),
        ("--model lenet --model.hidden 5", "lenet has no such option; it has .*pool"),
        ("--model inception --model.width 0", "--model.width 0.0: expected a positive"),
        ("--model inception --model.width nan", "--model.width nan"),
        ("--model lenet --model.weight-scale -1", "--model.weight-scale -1.0"),
        ("--model inception --model.dropout 1", r"1.0: expected a rate in \[0, 1\)"),
        ("--model.activation sigmod", "sigmod: .* Did you mean 'sigmoid'"),
        ("--optim.momentum 1", r"--optim.momentum 1.0: expected a number in \[0, 1\)"),
        ("--optim.decay-rate 0", "--optim.decay-rate 0.0"),
        ("--optim.decay-steps 0", "--optim.decay-steps 0"),
        ("--optim.beta2 1", r"--optim.beta2 1.0: expected a number in \[0, 1\)"),
        ("--optim.clip-norm 0", "--optim.clip-norm 0.0: expected a positive number"),
        ("--optim.weight-decay -1", "--optim.weight-decay -1.0"),
        ("--optim.warmup-steps 2000", "fewer than the 2000 --steps"),
        ("--optim.schedule step", "--optim.boundaries"),
        ("--optim.boundaries 5", "with --optim.schedule step, none with another"),
        ("--optim.schedule step --optim.boundaries 9 5", "expected rising steps"),
        ("--keep 0", "--keep 0: expected a whole number of 1 or more"),
        ("--resume", "--resume needs the folder of the run to continue"),
        ("--batch-size 1", "needs at least 2 examples"),
        ("--bn.implementation flax", "add --bn.no-unbiased"),
    ],
)
def test_values_no_run_can_use(flags, expected):
    with pytest.raises(SettingError, match=expected):
        parse_train(flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--bn.momentum 0 --bn.epsilon 1e-12",
        "--bn.momentum 1",
        "--batch-size 1 --no-batch-norm",
        "--bn.implementation flax --bn.no-unbiased",
        "--seed 4294967295",
        "--optim.schedule step --optim.boundaries 500 1500 --optim.warmup-steps 100",
        "--optim.weight-decay 0 --optim.clip-norm 1e-9 --keep 1",
        "--model inception --model.dropout 0 --model.separable-conv1 True",
        "--model.weight-std 0 --model.activation tanh",
    ],
)
def test_values_at_the_edge(flags):
    parse_train(flags.split())


class TestRecord:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_it_comes_back_as_it_was(self, preset):
        _, config = parse_train([preset, "--workdir", "a/b", "--learning-rate", "2"])
        text = json.dumps(to_json(config))
        assert from_json(json.loads(text), "here") == config

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("steps", "many"),
            ("steps", 1.5),
            ("steps", True),
            ("steps", -1),
            ("batch_norm", 1),
            ("workdir", 3),
            ("model.hidden", 100),
            ("model.hidden", ["a"]),
            ("model.pool", "min"),
            ("model.width", 1.0),
            ("bn.momentum", "0.9"),
            ("bn.momentum", 7),
            ("bn.implementation", "other"),
            ("bn", None),
            ("unheard", 1),
        ],
    )
    def test_damage_is_named(self, path, value):
        record = to_json(PRESETS["digits"].config)
        *parents, name = path.split(".")
        place = record
        for parent in parents:
            place = place[parent]
        place[name] = value
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            from_json(record, "config.json")

    def test_a_missing_field(self):
        record = to_json(PRESETS["digits"].config)
        del record["bn"]["epsilon"]
        with pytest.raises(ValueError, match=r"damaged.*bn has"):
            from_json(record, "config.json")
