import dataclasses
import errno
import json
import os
import shutil
import threading
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.training import checkpoint
from bnjax.training.checkpoint import MANIFEST, Checkpoints, Notes, open_checkpoints
from bnjax.training.config import RunError
from bnjax.training.step import tree_sha256


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
        return checkpoints.restore(target)[0]


def kept(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_every_bit_comes_back(saved, small_config, initial_state):
    target = jax.tree.map(jnp.copy, initial_state)
    restored = restore(saved, small_config, target)
    assert tree_sha256(restored) == tree_sha256(at_step(initial_state, 30))
    assert jax.tree.structure(restored) == jax.tree.structure(target)


def test_the_newest_two_are_kept(saved):
    assert kept(saved) == ["20", "30"]


@pytest.mark.parametrize(
    ("keep", "scores", "expected"),
    [
        (1, [0.1, 0.2, 0.3, 0.4], ["40"]),
        (1, [0.4, 0.2, 0.3, 0.1], ["10", "40"]),
        (2, [0.2, 0.4, 0.3, 0.1], ["20", "30", "40"]),
        (2, [0.4, 0.4, 0.3, 0.1], ["20", "30", "40"]),
        (1, [None, 0.1, None, None], ["20", "40"]),
        (3, [None] * 4, ["20", "30", "40"]),
    ],
)
def test_the_newest_and_the_best_are_kept(
    small_config, initial_state, tmp_path, keep, scores, expected
):
    config = dataclasses.replace(small_config, keep=keep)
    with open_checkpoints(tmp_path, config) as checkpoints:
        for step, score in zip((10, 20, 30, 40), scores, strict=True):
            checkpoints.save(at_step(initial_state, step), Notes(test_accuracy=score))
    assert kept(tmp_path) == expected


def test_notes_come_back(small_config, initial_state, tmp_path):
    notes = Notes(0.1 + 0.2, {"epoch": 3, "worker": {"next": [1, 2]}}, 1.5)
    with open_checkpoints(tmp_path, small_config) as checkpoints:
        checkpoints.save(initial_state, notes)
        checkpoints.wait()
        assert checkpoints.restore(initial_state)[1] == notes


def test_buffers_may_be_donated_while_it_is_written(
    small_config, initial_state, tmp_path, monkeypatch
):
    write = Checkpoints._write
    donated = threading.Event()

    def late(*arguments):
        assert donated.wait(timeout=30)
        write(*arguments)

    monkeypatch.setattr(Checkpoints, "_write", late)
    state = jax.tree.map(jnp.copy, initial_state)
    with open_checkpoints(tmp_path, small_config) as checkpoints:
        checkpoints.save(state)
        assert kept(tmp_path) == []
        for leaf in jax.tree.leaves(state):
            leaf.delete()
        donated.set()
    assert tree_sha256(restore(tmp_path, small_config, initial_state)) == tree_sha256(
        initial_state
    )


def test_what_was_not_finished_is_removed(saved, small_config, initial_state):
    partial = saved / "checkpoints" / "40.partial"
    shutil.copytree(saved / "checkpoints" / "30", partial)
    assert int(restore(saved, small_config, initial_state).step) == 30
    assert partial.exists()
    with open_checkpoints(saved, small_config) as checkpoints:
        assert checkpoints.steps() == [20, 30]
    assert kept(saved) == ["20", "30"]


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
def test_damage_to_any_file_is_named_and_the_one_before_is_read(
    saved, small_config, initial_state, damage, capsys
):
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
        assert int(restore(saved, small_config, initial_state).step) == 20
        message = capsys.readouterr().err
        assert f"{folder} is damaged: {path.relative_to(folder)}" in message
        assert "Going back to 20." in message
        path.write_bytes(content)
    assert int(restore(saved, small_config, initial_state).step) == 30


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"config": 1, "files": {}}'])
def test_a_damaged_manifest(saved, small_config, initial_state, content, capsys):
    (saved / "checkpoints" / "30" / MANIFEST).write_text(content)
    assert int(restore(saved, small_config, initial_state).step) == 20
    assert "30 is damaged" in capsys.readouterr().err


def test_a_damaged_one_is_put_aside_and_written_again(
    saved, small_config, initial_state
):
    (saved / "checkpoints" / "30" / MANIFEST).write_text("{}")
    with open_checkpoints(saved, small_config) as checkpoints:
        checkpoints.restore(initial_state)
        assert checkpoints.last_good().endswith("checkpoints/20.")
        checkpoints.save(at_step(initial_state, 30))
    assert kept(saved) == ["20", "30", "30.damaged"]
    assert int(restore(saved, small_config, initial_state).step) == 30


def test_all_are_damaged(saved, small_config, initial_state):
    for step in ("20", "30"):
        (saved / "checkpoints" / step / MANIFEST).write_text("{}")
    with (
        open_checkpoints(saved, small_config) as checkpoints,
        pytest.raises(ValueError, match=r"30 is damaged.*There is no other"),
    ):
        checkpoints.restore(initial_state)
    assert kept(saved) == ["20", "30"]


def test_one_that_was_not_finished_is_passed_over(saved, small_config, initial_state):
    (saved / "checkpoints" / "30" / MANIFEST).unlink()
    restored = restore(saved, small_config, initial_state)
    assert int(restored.step) == 20


def test_an_edited_configuration_is_noticed(saved, small_config, initial_state):
    edited = dataclasses.replace(
        small_config, bn=dataclasses.replace(small_config.bn, epsilon=1e-3)
    )
    with pytest.raises(ValueError, match=r"config\.json is not the configuration"):
        restore(saved, edited, initial_state)


def test_a_run_may_be_moved(saved, small_config, initial_state, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "run"
    shutil.move(saved, moved)
    config = dataclasses.replace(small_config, workdir=moved, data_dir=moved)
    assert int(restore(moved, config, initial_state).step) == 30


def test_there_is_none(small_config, initial_state, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        restore(tmp_path, small_config, initial_state)


def test_a_full_disk_keeps_the_last_good_one(
    saved, small_config, initial_state, monkeypatch
):
    usage = namedtuple("usage", ["total", "used", "free"])(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = initial_state
    with open_checkpoints(saved, small_config) as checkpoints:
        with pytest.raises(RunError) as caught:
            checkpoints.save(at_step(state, 40))
        message = str(caught.value)
        assert "the disk has 1,000 bytes left" in message
        assert f"The last good checkpoint is {saved / 'checkpoints' / '30'}" in message
    assert int(restore(saved, small_config, state).step) == 30


@pytest.mark.parametrize("place", ["state", "manifest"])
def test_a_disk_that_fills_while_writing(
    saved, small_config, initial_state, monkeypatch, place
):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_checkpoints(saved, small_config) as checkpoints:
        if place == "state":
            monkeypatch.setattr(checkpoints._checkpointer, "save", refuse)
        else:
            monkeypatch.setattr(checkpoint, "write_json", refuse)
        checkpoints.save(at_step(initial_state, 40))
        with pytest.raises(RunError) as caught:
            checkpoints.wait()
    message = str(caught.value)
    assert "40 could not be written" in message
    assert "No space left on device" in message
    assert f"The last good checkpoint is {saved / 'checkpoints' / '30'}." in message
    assert kept(saved) == ["20", "30"]


def test_a_state_that_is_not_finite_is_not_saved(saved, small_config, initial_state):
    state = initial_state
    params = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
    broken = dataclasses.replace(at_step(state, 40), params=params)
    with (
        open_checkpoints(saved, small_config) as checkpoints,
        pytest.raises(ValueError, match="after step 40 is not finite"),
    ):
        checkpoints.save(broken)
    assert int(restore(saved, small_config, state).step) == 30


def test_the_manifest_is_of_the_files(saved):
    folder = saved / "checkpoints" / "30"
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {MANIFEST}
