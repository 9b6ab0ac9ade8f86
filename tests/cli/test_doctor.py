"""`bnjax doctor`: the table, the JSON, the exit status, for runs well and unwell."""

import dataclasses
import json
import time

import jax
import pytest

from bnjax.cli import main
from bnjax.data.sources import find_data_dir
from bnjax.doctor import Finding
from bnjax.training.evaluation import load_run
from bnjax.training.runs import examine_run, format_findings
from tests.cli.conftest import FLAGS


@pytest.fixture(scope="module")
def estimated(trained, tmp_path_factory):
    """A run with statistics over batches: 60 steps are too few for moving averages."""
    new = tmp_path_factory.mktemp("runs") / "new"
    argv = ["recompute-stats", trained("digits"), "--output", new, "--batches", 20]
    assert main([str(word) for word in argv]) == 0
    return new


def test_a_run_that_is_well(estimated, run):
    printed = run("doctor", estimated)
    assert printed == f"{estimated}, step 60: 2 BN layers, no findings\n"
    described = run("doctor", estimated, "--json")
    assert described == {
        "workdir": str(estimated),
        "step": 60,
        "layers": 2,
        "findings": [],
    }


def test_moving_averages_that_have_not_arrived(tmp_path, capsys):
    workdir = tmp_path / "early"
    flags = [*FLAGS, "--steps", "8", "--workdir", str(workdir)]
    assert main(["train", *flags]) == 0
    capsys.readouterr()
    assert main(["doctor", str(workdir)]) == 1
    streams = capsys.readouterr()
    assert streams.err == f"error: {workdir} has 2 errors: see above.\n"
    head, first, second, blank, advice = streams.out.splitlines()
    assert head == f"{workdir}, step 8: 2 BN layers, 2 findings"
    for row, name in ((first, "bn_0"), (second, "bn_1")):
        words = row.split()
        assert words[:4] == ["error", name, "statistics-far", "distance"]
    assert blank == ""
    assert advice.startswith("statistics-far: The running statistics are far from")

    assert main(["doctor", str(workdir), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert [(each["rule"], each["path"]) for each in found] == [
        ("statistics-far", "bn_0"),
        ("statistics-far", "bn_1"),
    ]
    assert set(found[0]) == {f.name for f in dataclasses.fields(Finding)}
    assert found[0]["evidence"]["distance"] > found[0]["evidence"]["limit"]
    assert main(["doctor", str(workdir), "--ignore", "statistics-far"]) == 0


def test_what_is_normalized_together(trained, monkeypatch):
    """Micro-batches and virtual batches are as small as in training."""
    opened = load_run(trained("digits"))
    sizes = []

    def noted(model, variables, images, **options):
        sizes.append((len(images), options["ignore"]))
        return ()

    monkeypatch.setattr("bnjax.training.runs.doctor", noted)
    restored, config = opened.restore(), opened.config
    monkeypatch.setattr(
        "bnjax.training.evaluation.LoadedRun.restore", lambda self: restored
    )
    bn = dataclasses.replace(config.bn, virtual_batch_size=5)
    for changes in ({}, {"accumulate": 3}, {"bn": bn}, {"init_stats": "freeze"}):
        changed = dataclasses.replace(config, **changes)
        examine_run(dataclasses.replace(opened, config=changed))
    freeze = ("frozen-in-training",)
    assert sizes == [(30, ()), (10, ()), (5, ()), (30, freeze)]


def test_a_run_without_batch_norm(trained, run, monkeypatch):
    restore = type(load_run(trained("digits"))).restore

    def without(self):
        program, state = restore(self)
        return program, dataclasses.replace(state, batch_stats={})

    monkeypatch.setattr("bnjax.training.evaluation.LoadedRun.restore", without)
    assert "0 BN layers, no findings" in run("doctor", trained("digits"))


def test_findings_of_one_kind_have_one_advice():
    findings = [
        Finding("far", "error", f"bn_{i}", {"distance": 2.0 * i, "n": i}, "Far.", "Go.")
        for i in range(2)
    ]
    assert format_findings(findings).splitlines() == [
        "2 findings",
        "error  bn_0  far  distance 0, n 0",
        "error  bn_1  far  distance 2, n 1",
        "",
        "far: Far. Go.",
    ]
    assert format_findings([]) == "no findings"


def test_faults(fails, tmp_path):
    assert "is not a run" in fails("doctor", tmp_path)
    message = fails("doctor", tmp_path, "--ignore", "few-value", status=2)
    assert "Did you mean 'few-values'?" in message


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_data_dir() / "mnist").is_dir(),
    reason="MNIST is not prepared in TFDS_DATA_DIR (see docs/programs/data.md)",
)
def test_the_mnist_run_takes_five_seconds(tmp_path, run):
    """The network of the paper, with the averages of 300 steps of momentum 0.9."""
    workdir = tmp_path / "run"
    flags = ["--steps", "300", "--parallel", "single", "--bn.momentum", "0.9"]
    assert main(["train", "mnist", *flags, "--workdir", str(workdir)]) == 0
    jax.clear_caches()
    start = time.monotonic()
    assert "3 BN layers, no findings" in run("doctor", workdir)
    assert time.monotonic() - start < 5
