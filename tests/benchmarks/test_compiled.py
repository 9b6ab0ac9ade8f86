"""What is compiled for devices that are not here, and how the command goes about it.

The tests of what a compiler makes of the layer run where that compiler is installed.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import aot, compiled, hlo, report, table
from benchmarks.aot import Program

FIGURES = {
    "digest": "d",
    "normalizations": 2,
    "array_bytes": 500_000,
    "cycles": 2_000_000,
    "traffic_bytes": 10**9,
    "fusions": 6,
    "readers": 4,
    "fused_sums": 2,
    "convolutions": 3,
    "library_calls": {},
    "control_flow": 0,
    "collectives": {"count": 0, "bytes": 0},
    "temporary_bytes": 4 * 10**6,
    "trace_seconds": 0.5,
    "compile_seconds": 1.5,
    "commit": "abc",
}


def program(kind="flax", network="chain", **changes):
    sizes = {"layers": 2, "batch": 2} | changes
    return Program("v5e", network, "float32", kind, **sizes)


def filled(shapes, seed=0):
    """Arrays are random, vectors of 1, whichever library they are of."""
    random = np.random.default_rng(seed)

    def fill(leaf):
        vector = np.prod(leaf.shape[:-1]) == 1
        value = np.ones(leaf.shape) if vector else random.standard_normal(leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree.map(fill, shapes)


def kernels(tree):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if "kernel" in jax.tree_util.keystr(path)
    }


@pytest.fixture(scope="module")
def layer_of_flax():
    function = aot.function_of(program(network="layer"))
    return jax.jit(function.apply)(*filled(function.arguments))


SAME = [kind for kind in aot.KINDS if "policy" not in kind and kind != "ghost"]


@pytest.mark.parametrize("kind", SAME)
def test_every_kind_of_layer_does_the_same_work(kind, layer_of_flax):
    if compiled.why_absent(kind):
        pytest.skip(compiled.why_absent(kind))
    function = aot.function_of(program(kind, "layer"))
    y, dx, *_ = jax.jit(function.apply)(*filled(function.arguments))
    if kind == "none":
        x, dy = filled(function.arguments)[2:]
        np.testing.assert_array_equal(y, jnp.maximum(x, 0))
        np.testing.assert_array_equal(dx, jnp.where(x > 0, dy, 0))
        return
    for found, expected in zip((y, dx), layer_of_flax[:2], strict=True):
        apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert apart < 1e-3


@pytest.mark.slow
def test_kinds_of_a_network_have_the_same_gradients():
    found = {}
    kinds = ("flax", "bnjax", "bnjax_inside", *aot.POLICIES)
    for kind in (kind for kind in kinds if not compiled.why_absent(kind)):
        function = aot.function_of(program(kind, "block", layers=1))
        gradients, stats = jax.jit(function.apply)(*filled(function.arguments))
        found[kind] = kernels(gradients) | {"stats": jax.tree.leaves(stats)[0]}
    assert len(found["flax"]) == 4
    for kind, values in found.items():
        for name, expected in found["flax"].items():
            apart = np.linalg.norm(values[name] - expected)
            assert apart < 1e-2 * np.linalg.norm(expected), (kind, name)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet50", "inception", "mlp"])
def test_networks_differ_in_their_normalization_alone(network):
    shapes = {
        kind: aot.function_of(program(kind, network)).arguments
        for kind in ("none", "flax", "bnjax_inside")
    }
    (params, stats, *_), (ours, our_stats, *_) = shapes["flax"], shapes["bnjax_inside"]
    assert jax.tree.map(jnp.shape, (params, stats)) == jax.tree.map(
        jnp.shape, (ours, our_stats)
    )
    assert kernels(shapes["none"][0]).keys() == kernels(params).keys()
    # No bias in place of BN's; that of the classifier is in all.
    without = len(jax.tree.leaves(shapes["none"][0]))
    assert len(jax.tree.leaves(params)) == without + len(jax.tree.leaves(stats))


@pytest.mark.parametrize("sharing", aot.SHARING)
@pytest.mark.parametrize("kind", ["flax", "bnjax"])
def test_chips_that_share_statistics_compute_what_one_does(sharing, kind, monkeypatch):
    # The mesh is of CPUs here, so that the program runs.
    mesh = jax.sharding.Mesh(jax.devices()[:4], (aot.AXIS,))
    monkeypatch.setattr(aot, "mesh_of", lambda _: mesh)
    shared = program(kind, "layer", batch=1, chips=4, sharing=sharing)
    whole = dataclasses.replace(shared, batch=4, chips=1, sharing=None)
    function = aot.function_of(whole)
    given = filled(function.arguments)
    expected = jax.jit(function.apply)(*given)
    run = aot.lowered(shared).compile()
    placed = jax.tree.map(jax.device_put, given, run.input_shardings[0])
    jax.tree.map(
        lambda found, value: np.testing.assert_allclose(found, value, 1e-4, 1e-4),
        run(*placed),
        expected,
    )


def test_the_grid_has_every_program_once():
    for target in aot.TARGETS:
        programs = compiled.grid(target)
        assert len(set(programs)) == len(programs)
        assert {one.network for one in programs} == set(aot.NETWORKS)
        assert {one.kind for one in programs} == set(aot.KINDS)
    (chain,) = {one.layers for one in programs if one.network == "chain"}
    assert chain == 12
    short = compiled.grid("v5e", layers=2, batch_size=4)
    assert {one.layers for one in short if one.network == "block"} == {2}
    assert {one.batch for one in short} == {4}


def run_commands(commands, timeout=60.0, jobs=1):
    given = {
        program(layers=number): [sys.executable, "-c", words]
        for number, words in enumerate(commands)
    }
    found = dict(compiled.outcomes(given, jobs, timeout))
    return [found[one] for one in given]


def test_what_fails_is_told_with_its_reason():
    crash = "import os, sys; print('F0000 1 x.cc:1] Check failed: no\\n    @ 0x1', "
    rows = run_commands(
        [
            "raise ValueError('no such\\nnetwork')",
            f"{crash} file=sys.stderr); sys.stderr.flush(); os.abort()",
            "print('hello')",
            "print('log'); print('{\"fusions\": 3}')",
        ],
        jobs=3,
    )
    commits = {row.pop("commit") for row in rows}
    assert commits == {report.commit()}
    assert rows == [
        {"failed": "exit status 1: ValueError: no such"},
        {"failed": "exit status -6: F0000 1 x.cc:1] Check failed: no"},
        {"failed": "printed no figures: hello"},
        {"fusions": 3},
    ]


def test_what_takes_too_long_is_stopped():
    (row,) = run_commands(["import time; time.sleep(60)"], timeout=0.5)
    assert row["failed"] == "not compiled in 0 s"


def test_commands_are_stopped_with_the_run():
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    found = compiled.outcomes({program(): words, program("none"): ["true"]}, 2, 60.0)
    next(found)
    (child,) = found.gi_frame.f_locals["running"].values()
    found.close()
    assert child.process.returncode == -9
    assert not child.folder.exists()


@pytest.fixture
def result_file(tmp_path):
    return lambda: compiled.ResultFile(tmp_path / "compiled-v5e.json", "v5e", {})


def test_rows_are_written_as_they_come_and_read_again(result_file):
    chain, layer = program(), program(network="layer")
    result_file().put(chain, FIGURES)
    result_file().put(layer, FIGURES | {"cycles": 1})
    found = result_file()
    assert list(found.rows) == [layer, chain]
    assert found.rows[chain] == FIGURES
    record = json.loads(found.path.read_text())
    assert record["machine"]["compiled_for"] == "v5e"
    assert "libtpu" in record["versions"]


def test_a_program_of_another_size_takes_the_place_of_the_last(result_file):
    result_file().put(program(batch=128), FIGURES)
    result_file().put(program(batch=16), FIGURES)
    assert list(result_file().rows) == [program(batch=16)]


def test_a_file_of_other_versions_is_begun_anew(result_file, capsys):
    result_file().put(program(), FIGURES)
    path = result_file().path
    record = json.loads(path.read_text())
    record["versions"]["flax"] = "0.1"
    path.write_text(json.dumps(record))
    assert result_file().rows == {}
    assert "is replaced: it is of flax 0.1, installed is" in capsys.readouterr().out


@pytest.fixture
def compile_at(result_file, monkeypatch):
    """Go about two programs at a commit; return the digests that were handed on."""

    def compile_at(commit, outcome=FIGURES, again=False):
        known = {}

        def outcomes(commands, jobs, timeout):
            for one, words in commands.items():
                _, found, digest = " ".join(words).partition("--known ")
                known[one.kind] = digest if found else None
                yield one, outcome | {"commit": commit}

        monkeypatch.setattr(report, "commit", lambda: commit)
        monkeypatch.setattr(compiled, "outcomes", outcomes)
        programs, files = [program("none"), program("flax")], {"v5e": result_file()}
        failed = compiled.compile_all(programs, files, 1, 1.0, again, None)
        assert failed == ("failed" in outcome) * len(known)
        return known

    return compile_at


NEW, KNOWN = {"none": None, "flax": None}, {"none": "d", "flax": "d"}


def test_a_program_of_the_same_commit_is_left_out(compile_at):
    assert compile_at("a") == NEW
    assert compile_at("a") == {}
    assert compile_at("a", again=True) == NEW


def test_a_program_that_is_the_same_at_another_commit_keeps_its_figures(
    compile_at, result_file, capsys
):
    compile_at("a")
    assert compile_at("b", {"digest": "d"}) == KNOWN
    assert "v5e chain float32 none: as it was: cycles 2 M" in capsys.readouterr().out
    assert result_file().rows[program()] == FIGURES | {"commit": "b"}
    assert compile_at("b") == {}


def test_uncommitted_changes_are_no_commit(compile_at):
    compile_at("a-dirty")
    assert compile_at("a-dirty") == KNOWN
    compile_at(None)
    assert compile_at(None) == KNOWN


def test_what_failed_is_in_the_file_and_is_tried_again(compile_at, result_file, capsys):
    compile_at("a", {"failed": "exit status 1: no memory"})
    assert "none: failed, exit status 1: no memory" in capsys.readouterr().out
    assert "no memory" in result_file().rows[program()]["failed"]
    assert compile_at("a") == NEW


def test_words_that_are_none_of_the_command_are_refused(tmp_path):
    for given in ({"targets": ("a100",)}, {"networks": ("vgg",)}, {"kinds": ("x",)}):
        with pytest.raises(ValueError, match="expected some of"):
            compiled.compare(**given)
    with pytest.raises(ValueError, match="name a folder for the results"):
        compiled.compare(batch_size=2)


def test_a_compiler_that_is_absent_is_named(monkeypatch):
    monkeypatch.setattr(report, "_version", lambda package: None)
    with pytest.raises(ValueError, match=r"v5e: libtpu not installed; write pip inst"):
        compiled.check_installed(["v5e"])
    assert compiled.why_absent("haiku") == "dm-haiku is not installed."


def test_the_table_has_ratios_failures_and_collectives(result_file, tmp_path):
    file = result_file()
    file.absent = {"haiku": "dm-haiku is not installed."}
    for kind, cycles in (("none", 10**6), ("flax", 2 * 10**6), ("bnjax", 1_750_000)):
        file.put(program(kind), FIGURES | {"cycles": cycles})
    file.put(program("equinox"), {"failed": "exit status 1: no", "commit": "abc"})
    file.put(program("flax", "mlp"), FIGURES | {"control_flow": 1, "commit": "def"})
    one = {"chips": 4, "sharing": "arrays"}
    for backward, count in ((False, 1), (True, 3)):
        row = FIGURES | {"collectives": {"count": count, "bytes": 64}}
        shared = dataclasses.replace(program(), **one, backward=backward)
        file.put(dataclasses.replace(shared, dtype="bfloat16"), row)
    text = table.compiled(tmp_path)
    for line in (
        "| network | dtype | none | flax | equinox | bnjax |",
        "| chain | float32 | 1 | 2 | failed | 1.75 (0.88, 0.75) |",
        "| chain | float32 | 1000 | 1000 | failed | 1000 |",
        "| chain | arrays | 4 | flax | 1 (64) | 3 (64) |",
        "- haiku is left out: dm-haiku is not installed.",
        "- chain float32 equinox failed: exit status 1: no.",
        "- mlp float32 flax: branches or loops not counted: 1.",
        "- Programs by commit: 6 of abc, 1 of def.",
    ):
        assert line in text


def compiled_rows(*programs):
    """Compile each in a process of its own, as the command does; return the figures."""
    target = programs[0].target
    packages = aot.TARGETS[target].packages
    missing = [name for name in packages if report.versions()[name] is None]
    if missing:
        pytest.skip(
            f"{', '.join(missing)} not installed: "
            "pip install -r requirements-compiled.txt"
        )
    commands = {one: compiled.command(one, None, None) for one in programs}
    rows = dict(compiled.outcomes(commands, 1, 300.0))
    for row in rows.values():
        assert "failed" not in row, row
    return [rows[one] for one in programs]


def test_the_command_compiles_and_writes(tmp_path, capsys):
    compiled_rows(Program("h200", "mlp", "float32", "none", 1, 2))
    options = {"networks": ("mlp",), "dtypes": ("float32",), "kinds": ("bnjax",)}
    for _ in range(2):
        compiled.compare(
            targets=("h200",),
            **options,
            batch_size=8,
            hlo_folder=tmp_path / "hlo",
            output=tmp_path,
        )
    assert "h200 mlp float32 bnjax: traffic " in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "compiled-h200.json").read_text())["result"]["rows"]
    assert row["normalizations"] == 3
    assert row["array_bytes"] == 8 * 28 * 28 * 4
    text = (tmp_path / "hlo" / "h200-mlp-float32-bnjax.txt").read_text()
    assert hlo.traffic(hlo.parse(text)) == row["traffic_bytes"]


def test_on_a_tpu_the_sums_are_fused_into_the_convolution():
    kinds = ("flax", "bnjax", "bnjax_inside")
    flax, *ours = compiled_rows(
        *(Program("v5e", "chain", "bfloat16", kind, 2, 16) for kind in kinds)
    )
    # Both forward, and backward that of the convolution whose input has a gradient.
    assert flax["fused_sums"] == 3
    for row in ours:
        assert row["fused_sums"] >= flax["fused_sums"]
        assert row["readers"] <= flax["readers"]
        assert row["convolutions"] == flax["convolutions"]


@pytest.mark.parametrize("sharing", aot.SHARING)
def test_on_a_tpu_shared_statistics_take_one_collective_forward(sharing):
    one = Program("v5e", "chain", "bfloat16", "bnjax", 2, 16, 4, sharing, False)
    (row,) = compiled_rows(one)
    assert row["collectives"]["count"] == 2


def test_on_a_gpu_traffic_is_no_more_than_flaxs():
    kinds = ("flax", "bnjax", "bnjax_inside")
    flax, plain, inside = (
        row["traffic_bytes"]
        for row in compiled_rows(
            *(Program("h200", "chain", "bfloat16", kind, 4, 128) for kind in kinds)
        )
    )
    assert plain <= flax
    assert inside <= 0.92 * flax
