import ast
import dataclasses
import inspect
import json
from pathlib import Path

import pytest

import bnjax
from bnjax.cli import parse_train
from bnjax.data import config as data_config
from bnjax.data.config import SettingError
from bnjax.training import config
from bnjax.training.config import (
    BatchNormConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    RunError,
    differences,
    flag_values,
    from_json,
    to_json,
    validate,
)
from bnjax.training.loop import train
from bnjax.training.optimizer import make_optimizer
from bnjax.training.presets import PRESETS


class TestParse:
    def test_digits_is_the_default(self):
        digits = PRESETS["digits"].config
        assert parse_train([]) == ("digits", digits)
        changed = dataclasses.replace(digits, steps=7)
        assert parse_train(["--steps", "7"]) == ("digits", changed)

    def test_mnist_is_section_4_1(self):
        _, config = parse_train(["mnist"])
        assert (config.steps, config.batch_size) == (50_000, 60)
        assert (config.optim.name, config.learning_rate) == ("sgd", 0.5)
        assert (config.optim.options, config.optim.weight_decay) == ({}, 0)
        assert config.optim.schedule == "constant_schedule"
        assert config.model.hidden == (100, 100, 100)
        assert config.model.weight_std == 0.01
        assert config.data.name == "mnist"
        assert config.data.binarize
        assert config.batch_norm
        assert config.bn.unbiased
        assert 10_000 % config.eval_every == 0
        validate(config)

    def test_flags_override_the_preset(self):
        flags = (
            "--steps 5 --seed 3 --batch-size 8 --lr 0.25 --workdir there "
            "--no-batch-norm --bn.momentum 0.9 --bn.epsilon 1e-3 --bn.no-unbiased "
            "--model.hidden 4 5 --data-dir data"
        )
        _, config = parse_train(["mnist", *flags.split()])
        mnist = PRESETS["mnist"].config
        assert config == dataclasses.replace(
            mnist,
            steps=5,
            seed=3,
            batch_size=8,
            learning_rate=0.25,
            workdir=Path("there"),
            batch_norm=False,
            bn=BatchNormConfig(momentum=0.9, epsilon=1e-3, unbiased=False),
            model=dataclasses.replace(mnist.model, hidden=(4, 5)),
            data_dir=Path("data"),
        )

    def test_keywords_are_added_to_the_presets_of_the_same_function(self):
        def optim(*flags):
            return parse_train(["cifar10-bn-x5", *flags])[1].optim

        preset = PRESETS["cifar10-bn-x5"].config.optim
        assert optim() == preset
        given = optim("--optim.options", "nesterov=True")
        assert given.options == {"momentum": 0.9, "nesterov": True}
        given = optim("--optim.schedule-options", "transition_steps=9")
        assert given.schedule_options == {
            "decay_rate": 0.96,
            "transition_steps": 9,
            "staircase": True,
        }
        other = ("--optim.name", "adam", "--optim.schedule", "linear_schedule")
        assert (optim(*other).options, optim(*other).schedule_options) == ({}, {})
        assert optim(*other, "--optim.options", "b1=0.5").options == {"b1": 0.5}

    @pytest.mark.parametrize("argv", [["--help"], ["mnist", "--help"]])
    def test_help_describes_every_flag(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_train(argv)
        assert caught.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        flags = flag_values(PRESETS["digits"].config)
        assert not [f for f in flags if f"--{f}".replace("_", "-") not in text]
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

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ("mnits", r"'mnits'.*Did you mean 'mnist'"),
            ("--steps 5 mnist", "the preset goes first: bnjax train mnist"),
            ("--epochs 3", "no flag --epochs. Did you mean --steps, each of them a b"),
            ("--weight-decay=1", "no flag --weight-decay. .* --optim.weight-decay?"),
            ("--momentum 0.9", "mean --optim.options momentum=..., or --bn.momentum?"),
        ],
    )
    def test_near_misses(self, argv, message):
        with pytest.raises(SettingError, match=message):
            parse_train(argv.split())

    @pytest.mark.parametrize(
        ("argv", "right"),
        [
            ("--stpes 1", "--steps"),
            ("--lerning-rate 1", "--learning-rate"),
            ("--batchsize 1", "--batch-size"),
            ("--bn.momentun 1", "--bn.momentum"),
            ("--no-batchnorm", "--no-batch-norm"),
            ("--optim.nmae 1", "--optim.name"),
            ("--hosts.cordinator 1", "--hosts.coordinator"),
            ("--on-nan skp", "'skip'"),
            ("--optim.options momentum", "expected NAME=VALUE, such as b1=0.9"),
        ],
    )
    def test_a_typo_suggests_the_right_one(self, argv, right, capsys):
        with pytest.raises(SystemExit) as caught:
            parse_train(argv.split())
        assert caught.value.code == 2
        assert right in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize("module", [config, data_config])
    def test_no_line_of_help_breaks_off(self, module):
        # tyro keeps these breaks, and breaks what is too long for a terminal of 80.
        tree = ast.parse(inspect.getsource(module))
        texts = [
            node.value.value
            for cls in tree.body
            if isinstance(cls, ast.ClassDef)
            for node in cls.body[1:]
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ]
        assert texts
        lines = [line for text in texts for line in str(text).splitlines()]
        assert [line for line in lines if line.rstrip()[-1] not in ".;:,"] == []


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
        ("--ema 1", r"--ema 1.0: expected a number in \[0, 1\)"),
        ("--accumulate 7", "--accumulate 7: expected a divisor of 60"),
        ("--devices 0", "--devices 0: expected 1 or more"),
        ("--hosts.count 2", "--hosts.coordinator None: expected ADDRESS:PORT"),
        ("--hosts.index 1", "--hosts.index 1: expected from 0 to --hosts.count 1 - 1"),
        ("--hosts.coordinator here", 'expected ADDRESS:PORT, or "auto"'),
        ("--hosts.timeout 0", "--hosts.timeout 0: expected 1 or more seconds"),
        ("--init-stats freeze", "there are no statistics to start from"),
        ("--bn.sync group:0", "--bn.sync group:0: expected global, per-device, or"),
        ("--bn.virtual-batch-size 1", "--bn.virtual-batch-size 1: expected 2 or more"),
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
        ("--optim.clip-norm 0", "--optim.clip-norm 0.0: expected a positive number"),
        ("--optim.weight-decay -1", "--optim.weight-decay -1.0"),
        ("--optim.warmup-steps 2000", "fewer than the 2000 --steps"),
        ("--keep 0", "--keep 0: expected a whole number of 1 or more"),
        ("--resume", "--resume needs the folder of the run to continue"),
        ("--batch-size 1", "need at least 2 examples"),
        ("--bn.implementation flax", "add --bn.no-unbiased"),
        (
            "--bn.implementation flax --bn.no-unbiased --accumulate 2",
            "omit --bn.sync, --bn.virtual-batch-size and --accumulate",
        ),
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
        (
            "--optim.schedule piecewise_constant_schedule --optim.warmup-steps 100 "
            "--optim.schedule-options boundaries_and_scales={500:0.1,1500:0.1}"
        ),
        "--optim.weight-decay 0 --optim.clip-norm 1e-9 --keep 1",
        "--model inception --model.dropout 0 --model.separable-conv1 True",
        "--model.weight-std 0 --model.activation tanh",
    ],
)
def test_values_at_the_edge(flags):
    make_optimizer(parse_train(flags.split())[1])


class TestRecord:
    @pytest.mark.parametrize("preset", PRESETS)
    def test_it_comes_back_as_it_was(self, preset):
        flags = ["--workdir", "a/b", "--learning-rate", "2"]
        _, config = parse_train([preset, *flags])
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
            ("optim.options", ["momentum=0.9"]),
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
        with pytest.raises(RunError, match=r"config.json is damaged"):
            from_json(record, "config.json", bnjax.__version__)

    def test_a_missing_field(self):
        record = to_json(PRESETS["digits"].config)
        del record["bn"]["epsilon"]
        with pytest.raises(RunError, match=r"damaged.*bn has"):
            from_json(record, "config.json")
        made_by = f"was made by bnjax 0.0.1; this is {bnjax.__version__}: bn has"
        with pytest.raises(RunError, match=made_by):
            from_json(record, "config.json", "0.0.1")


def test_what_a_resumed_run_may_change():
    recorded = Config(steps=9, batch_size=8, learning_rate=0.1)

    def changed(**fields):
        return differences(recorded, dataclasses.replace(recorded, **fields))

    assert changed(keep=9, steps=10, devices=1, workdir=Path("there")) == []
    assert changed(steps=8) == ["--steps: the run has 9, 8 was given"]
    assert changed(bn=BatchNormConfig(momentum=0.5)) == [
        "--bn.momentum: the run has 0.99, 0.5 was given"
    ]


@pytest.mark.slow
def test_a_resumed_run_may_have_more_steps(run_small, small_config):
    optim = OptimizerConfig(schedule="constant_schedule")
    workdir, _ = run_small(optim=optim, steps=30)
    longer = dataclasses.replace(
        small_config, optim=optim, steps=60, workdir=workdir, resume=True
    )
    _, whole = run_small(optim=optim, steps=60)
    assert train("digits", longer)["state_sha256"] == whole["state_sha256"]
    with pytest.raises(SettingError, match="--steps: the run has 60, 20 was given"):
        train("digits", dataclasses.replace(longer, steps=20))
