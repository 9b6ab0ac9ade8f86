import dataclasses
import json
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.training.checkpoint import MANIFEST, open_checkpoints
from bnjax.training.errors import UserError
from bnjax.training.state import tree_sha256


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


@pytest.fixture(scope="module")
def original(initial_state, small_config, tmp_path_factory):
    """The folder of a run with checkpoints of steps 10, 20 and 30."""
    folder = tmp_path_factory.mktemp("original")
    with open_checkpoints(folder, small_config) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(at_step(initial_state, step))
    return folder


@pytest.fixture
def saved(original, tmp_path):
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "run")


def restore(workdir, config, target):
    with open_checkpoints(workdir, config, read_only=True) as checkpoints:
        return checkpoints.restore(target)


def test_every_bit_comes_back(saved, small_config, initial_state):
    target = jax.tree.map(jnp.copy, initial_state)
    restored = restore(saved, small_config, target)
    assert tree_sha256(restored) == tree_sha256(at_step(initial_state, 30))
    assert jax.tree.structure(restored) == jax.tree.structure(target)


def test_the_newest_two_are_kept(saved):
    kept = sorted(path.name for path in (saved / "checkpoints").iterdir())
    assert kept == ["20", "30"]


def test_adams_state_comes_back(initial_state, small_config, tmp_path):
    state = initial_state
    moments = optax.adam(0.1).init(state.params)
    moments = jax.tree.map(lambda leaf: leaf + 3, moments)
    state = dataclasses.replace(state, opt_state=moments)
    with open_checkpoints(tmp_path, small_config) as checkpoints:
        checkpoints.save(state)
    assert tree_sha256(restore(tmp_path, small_config, state)) == tree_sha256(state)


def test_reading_changes_nothing(saved, small_config, initial_state):
    before = {p: p.stat().st_mtime_ns for p in saved.rglob("*")}
    restore(saved, small_config, initial_state)
    assert {p: p.stat().st_mtime_ns for p in saved.rglob("*")} == before


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_named(saved, small_config, initial_state, damage):
    folder = saved / "checkpoints" / "30"
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert files
    for path in files:
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        with pytest.raises(UserError) as caught:
            restore(saved, small_config, initial_state)
        assert f"{folder} is damaged: {path.relative_to(folder)}" in str(caught.value)
        path.write_bytes(content)
    restore(saved, small_config, initial_state)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 1, "files": {}}'])
def test_a_damaged_manifest(saved, small_config, initial_state, content):
    (saved / "checkpoints" / "30" / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"damaged"):
        restore(saved, small_config, initial_state)


def test_one_that_was_not_finished_is_passed_over(saved, small_config, initial_state):
    (saved / "checkpoints" / "30" / MANIFEST).unlink()
    restored = restore(saved, small_config, initial_state)
    assert int(restored.step) == 20


def test_an_edited_configuration_is_noticed(saved, small_config, initial_state):
    edited = dataclasses.replace(
        small_config, bn=dataclasses.replace(small_config.bn, epsilon=1e-3)
    )
    with pytest.raises(UserError, match=r"config\.json is not the configuration"):
        restore(saved, edited, initial_state)


def test_a_run_may_be_moved(saved, small_config, initial_state, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.move(saved, moved)
    config = dataclasses.replace(small_config, workdir=moved, data_dir=moved)
    assert int(restore(moved, config, initial_state).step) == 30


def test_there_is_none(small_config, initial_state, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        restore(tmp_path, small_config, initial_state)


def test_a_full_disk_keeps_the_last_good_one(
    saved, small_config, initial_state, monkeypatch
):
    usage = namedtuple("usage", ["total", "used", "free"])(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = initial_state
    with open_checkpoints(saved, small_config) as checkpoints:
        with pytest.raises(UserError) as caught:
            checkpoints.save(at_step(state, 40))
        message = str(caught.value)
        assert "the disk has 1,000 bytes left" in message
        assert f"The last good checkpoint is {saved / 'checkpoints' / '30'}" in message
    assert int(restore(saved, small_config, state).step) == 30


def test_a_state_that_is_not_finite_is_not_saved(saved, small_config, initial_state):
    state = initial_state
    params = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
    broken = dataclasses.replace(at_step(state, 40), params=params)
    with (
        open_checkpoints(saved, small_config) as checkpoints,
        pytest.raises(UserError, match="after step 40 is not finite"),
    ):
        checkpoints.save(broken)
    assert int(restore(saved, small_config, state).step) == 30


def test_the_manifest_is_of_the_files(saved):
    folder = saved / "checkpoints" / "30"
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
