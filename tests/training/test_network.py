import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from bnjax.cli import parse_train
from bnjax.data.config import SettingError
from bnjax.data.sources import open_source
from bnjax.training.loop import train
from bnjax.training.program import Program
from bnjax.training.sharding import Pmap, Spmd, make_parallel

NETS = "tests.training.own_nets"
ROOT = Path(__file__).parents[2]
SHORT = ("--steps", "30", "--batch-size", "64", "--log-every", "30")


def configured(name, *flags):
    return parse_train([*SHORT, "--model", name, *map(str, flags)])[1]


def summary(tmp_path, name, *flags):
    workdir = tmp_path / "-".join(map(str, (name.rpartition(":")[2], *flags)))
    return train("digits", configured(name, *flags, "--workdir", workdir))


class TestItTrains:
    def test_one_that_takes_all_is_the_same_network(self, tmp_path):
        flags = ("--model.hidden", 12, "--bn.momentum", 0.8, "--devices", 1)
        own = summary(tmp_path, f"{NETS}:make_mlp", *flags)
        anything = summary(tmp_path, f"{NETS}:make_anything", *flags)
        listed = summary(tmp_path, "mlp", *flags)
        assert own["state_sha256"] == listed["state_sha256"]
        assert anything["state_sha256"] == listed["state_sha256"]

    @pytest.mark.slow
    def test_statistics_are_those_of_all_devices(self, tmp_path):
        # Dropout draws one mask for the batch in both.
        one, four = (summary(tmp_path, f"{NETS}:Net", "--devices", n) for n in (1, 4))
        assert four["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
        assert one["test_accuracy"] > 0.3

    def test_the_layout_that_auto_chooses(self):
        assert type(make_parallel(configured(f"{NETS}:make_mlp"))) is Pmap
        parallel = make_parallel(configured(f"{NETS}:Net"))
        assert type(parallel) is Spmd
        assert len(parallel.devices) == jax.device_count()

    @pytest.mark.slow
    def test_another_normalization_on_parts_of_the_batch(self, tmp_path):
        # It keeps no statistics, so that cutting the batch changes nothing.
        whole, parts = (
            summary(tmp_path, f"{NETS}:GroupNormNet", *flags)
            for flags in (
                ("--devices", 1),
                ("--devices", 2, "--parallel", "pmap", "--accumulate", 4),
            )
        )
        assert parts["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-4)

    @pytest.mark.slow
    def test_train_finds_it_in_the_current_folder(self, tmp_path):
        shutil.copy(ROOT / "tests/training/own_nets.py", tmp_path / "my_nets.py")

        def program(name, *args, path=()):
            done = subprocess.run(
                [sys.executable, str(ROOT / name), *args],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
                    "XLA_FLAGS": "",
                },
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            return done.returncode, done.stderr

        flags = (*SHORT, "--workdir", "run", "--model", "my_nets:Net")
        status, errors = program("train.py", *flags)
        assert status == 0, errors
        assert program("eval.py", "run")[0] == 1
        status, errors = program("eval.py", "run", "--trust", path=[tmp_path])
        assert status == 0, errors
        written = json.loads((tmp_path / "run" / "summary.json").read_text())
        evaluated = json.loads((tmp_path / "run" / "eval.json").read_text())
        assert evaluated["test_loss"] == written["test_loss"]

    def test_a_layer_that_stays_is_named(self, capsys):
        Program(configured(f"{NETS}:HalfFrozen"), open_source("digits"))
        assert (
            "note: of tests.training.own_nets:HalfFrozen, batch_stats frozen.mean, "
            "frozen.var never change in training" in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.nets:make", "there is no module 'nowhere'.*PYTHONPATH"),
        (f"{NETS}x:make", "there is no module 'tests.training.own_netsx'"),
        (f"{NETS}:Nat", "has no 'Nat'. Did you mean 'Net'"),
        ("tests/own_nets.py:Net", "expected a module and a function in the module"),
        ("own_nets.py:Net", "expected a module and a function in the module"),
        (f"{NETS}:", "expected a module and a function in the module"),
        (f"{NETS}:NET", "NET is a .*Net; expected a function or a class"),
        (f"{NETS}:A_NUMBER", "A_NUMBER is a int; expected a function"),
        (f"{NETS}:needs_more", "it needs 'depth'; .*Give 'depth' a default"),
        (f"{NETS}:raises", r"RuntimeError: no weights here \(.*own_nets.py, line"),
        (f"{NETS}:a_string", "it returned a str; expected a flax.linen.Module"),
        (f"{NETS}:NoTrain", "__call__ takes images; expected images and train"),
        (f"{NETS}:Fails", r"initializing it .*\(2, 8, 8\).*own_nets.py, line"),
        (f"{NETS}:three_classes", r"give shape \(2, 3\).*of the 10 classes"),
        (f"{NETS}:frozen", "never change in training.*use_running_average=not train"),
        (f"{NETS}:never_average", "with train=False.*use_running_average=not train"),
        (f"{NETS}:Collects", "it keeps the collections cache; expected only params"),
        (f"{NETS}:NoParameters", "it has no parameters to train"),
    ],
)
def test_what_cannot_be_trained_is_refused(name, message):
    with pytest.raises(SettingError, match=message) as error:
        Program(configured(name), open_source("digits"))
    assert str(error.value).startswith(f"--model {name}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_there_at_all", "imports 'not_there_at_all', which is not"),
        ("x = [1, 2", r"failed: SyntaxError: '\[' was never closed \(.*line 1\)"),
        ("x = 1\nx.y = 2", r"failed: AttributeError: .*broken.py, line 2\)"),
    ],
)
def test_a_module_that_cannot_be_imported(text, message, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SettingError, match=message):
        Program(configured("broken:make"), open_source("digits"))


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("Net", ("--no-batch-norm",), "^--no-batch-norm: the layers of .*Net cannot"),
        ("Net", ("--bn.epsilon", 0.1), "^--bn.epsilon: the layers"),
        ("Net", ("--bn.sync", "per-device"), "^--bn.sync: the layers"),
        ("Net", ("--parallel", "pmap"), "^--parallel pmap: the layers"),
        ("Net", ("--accumulate", 2), "^--accumulate: the layers"),
        ("GroupNormNet", ("--no-batch-norm",), "^--no-batch-norm: the layers"),
        ("Net", ("--dtype", "bfloat16"), "^--dtype bfloat16: .*takes no dtype"),
        (
            "Net",
            ("--model.width", 2),
            "^--model.width 2.0: .*no such option; it has no",
        ),
        ("make_mlp", ("--model.pool", "max"), "pool max: .*it has --model.hidden"),
    ],
)
def test_flags_that_it_cannot_follow(name, flags, message):
    with pytest.raises(ValueError, match=message):
        Program(configured(f"{NETS}:{name}", *flags), open_source("digits"))
