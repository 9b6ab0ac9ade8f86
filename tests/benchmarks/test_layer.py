"""The layer's benchmark: what is timed is the work, and all of it."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import layer, passes, peers
from benchmarks.peers import Case
from benchmarks.report import read_result
from tests import oracle

CASE = Case((4, 3, 3, 8))


def prepared(case, kind, library="bnjax"):
    values = peers.arrays(case)
    built = peers.make(library, case, values)
    one = functools.partial(passes.one_pass, built, kind)
    return values, one, passes.operands(case, built, values)


@pytest.mark.parametrize("library", ["bnjax", "flax.linen"])
def test_a_training_pass_is_the_papers(library):
    values, one, given = prepared(CASE, "train", library)
    found = passes.fresh(one, given).run()
    x, dy, scale, bias = (
        np.float64(values[name]) for name in ("x", "dy", "scale", "bias")
    )
    y = oracle.forward(x, scale, bias)
    dx, dscale, dbias = oracle.backward(x, scale, dy)
    expected = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias}
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


def test_absent_libraries_are_named():
    names = ("bnjax", "haiku", "equinox", "torch")
    here = [name for name in names if importlib.util.find_spec(name) is not None]
    assert layer.installed(names) == (here, [n for n in names if n not in here])
    with pytest.raises(ValueError, match=r"keras: expected some of bnjax, flax\.linen"):
        layer.installed(("keras",))


@pytest.mark.slow
def test_every_library_that_is_here_agrees():
    case = dataclasses.replace(CASE, variation="residual")
    values = peers.arrays(case)
    libraries, _ = layer.installed((*peers.PEERS, "torch"))
    programs = {
        name: layer.compile_one(name, case, "train", values, 1) for name in libraries
    }
    assert len(programs) >= 3
    layer.check(case, "train", programs)


def test_a_library_that_does_other_work_is_not_timed():
    _, one, given = prepared(CASE, "train")
    right = passes.fresh(one, given)

    def without_the_mean(given):
        found = one(given)
        return found | {"dx": found["dx"] + 0.1 * jnp.mean(given["dy"])}

    wrong = passes.fresh(without_the_mean, given)
    with pytest.raises(ValueError, match="wrong and right do other work: dx of train"):
        layer.check(CASE, "train", {"right": right, "wrong": wrong})


def test_the_loop_repeats_the_pass():
    _, one, given = prepared(CASE, "train")
    state = given["state"]
    for _ in range(3):
        expected = one(given | {"state": state})
        state = expected["state"]
    found = passes.reused(one, given, 3).run()
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("kind", passes.PASSES)
@pytest.mark.parametrize("library", ["bnjax", "flax.linen"])
def test_no_work_leaves_the_loop_and_nothing_is_copied(kind, library):
    _, one, given = prepared(CASE, kind, library)
    carry, constants = passes.first_carry(one, given)
    program = jax.jit(passes.iterated(one), donate_argnums=1)
    text = program.lower(jnp.int32(3), carry, constants).compile().as_text()
    entry = text[text.index("ENTRY ") :]
    assert re.search(r"\bwhile\(", entry)
    assert not re.search(r"\b(fusion|reduce|multiply|call)\(", entry)
    assert not re.search(r"f32\[4,3,3,8\]\S* copy\(", text)


def test_the_copy_changes_nothing_and_is_not_elided():
    values = peers.arrays(CASE)
    copy, given = passes.bounds(CASE, values)["copy"]
    found = passes.fresh(copy, given).run()["y"]
    np.testing.assert_array_equal(found.view(np.float32), values["x"])
    text = jax.jit(copy).lower(given).compile().as_text()
    assert re.search(r"u32\[4,3,3,8\]\S* xor\(", text)


def test_the_program_writes_its_result(tmp_path, capsys):
    path = tmp_path / "layer.json"
    layer.compare(
        shapes=("3x4",),
        dtypes=("float32",),
        kinds=("train",),
        libraries=("bnjax", "flax.linen"),
        varied=(),
        rounds=1,
        output=path,
    )
    result = read_result(path)["result"]
    found = [(row["setting"], row["pass"]) for row in result["rows"]]
    assert found == [("fresh", "train"), ("reused", "train")]
    for row in result["rows"]:
        assert row["floor_seconds"] > 0
        assert (row["bytes"], row["rounds"], row["ratios"]["bnjax"]) == (48, 1, 1)
        assert len(row["seconds"]["flax.linen"]) == 1
        for of in ("ratios", "temporary_bytes"):
            assert set(row[of]) == {"bnjax", "flax.linen"}
    assert len(result["summary"]) == 2
    assert "over the floor" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["32", "3x", "0x4", "axb"])
def test_a_shape_that_is_none_is_refused(shape):
    with pytest.raises(ValueError, match="expected two or more sizes"):
        layer.parse(shape)
