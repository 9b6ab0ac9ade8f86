import dataclasses
import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.training.checkpoint import (
    DIGESTS,
    METADATA_FILE,
    CheckpointMetadata,
    open_checkpoints,
)
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
        for step, score in zip((10, 20), scores[:2], strict=True):
            checkpoints.save(at_step(initial_state, step), CheckpointMetadata(score))
    # A resumed run knows what the one before it scored.
    with open_checkpoints(tmp_path, config) as checkpoints:
        for step, score in zip((30, 40), scores[2:], strict=True):
            checkpoints.save(at_step(initial_state, step), CheckpointMetadata(score))
    assert kept(tmp_path) == expected


def test_metadata_comes_back(small_config, initial_state, tmp_path):
    place = {"epoch": 3, "worker": {"next": [1, 2]}}
    metadata = CheckpointMetadata(0.1 + 0.2, place, 1.5)
    with open_checkpoints(tmp_path, small_config) as checkpoints:
        checkpoints.save(initial_state, metadata)
        checkpoints.wait()
        assert checkpoints.restore(initial_state)[1] == metadata


def test_buffers_may_be_donated_while_it_is_written(
    small_config, initial_state, tmp_path
):
    state = jax.tree.map(jnp.copy, initial_state)
    with open_checkpoints(tmp_path, small_config) as checkpoints:
        checkpoints.save(state)
        for leaf in jax.tree.leaves(state):
            leaf.delete()
    assert tree_sha256(restore(tmp_path, small_config, initial_state)) == tree_sha256(
        initial_state
    )


def test_what_was_not_finished_is_removed(saved, small_config, initial_state):
    partial = saved / "checkpoints" / "40.orbax-checkpoint-tmp"
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


@pytest.mark.parametrize("damage", ["first bit", "some bit", "truncate", "delete"])
def test_damage_to_any_file_is_harmless_or_named(
    saved, small_config, initial_state, damage, capsys
):
    folder = saved / "checkpoints" / "30"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            place = 0 if damage == "first bit" else len(content) * 2 // 3
            changed = bytes([content[place] ^ 1])
            path.write_bytes(content[:place] + changed + content[place + 1 :])
        restored = restore(saved, small_config, initial_state)
        step, message = int(restored.step), capsys.readouterr().err
        assert tree_sha256(restored) == tree_sha256(at_step(initial_state, step))
        name = path.relative_to(folder).as_posix()
        if step == 20:
            assert f"warning: checkpoint {folder} is damaged: " in message
            assert name in message or name == DIGESTS
            assert message.endswith("Going back to 20.\n")
        else:
            # orbax writes these for itself, and restores as well without them.
            assert path.name in ("commit_success.txt", "_CHECKPOINT_METADATA")
            assert (step, message) == (30, "")
        path.write_bytes(content)
    assert len(files) > 10


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"1", b"\xff", b'{"a": 1}'])
@pytest.mark.parametrize("name", [DIGESTS, METADATA_FILE])
def test_json_that_is_not_what_was_written(
    saved, small_config, initial_state, name, content, capsys
):
    (saved / "checkpoints" / "30" / name).write_bytes(content)
    assert int(restore(saved, small_config, initial_state).step) == 20
    assert "30 is damaged: " in capsys.readouterr().err


def test_a_damaged_one_is_put_aside_and_written_again(
    saved, small_config, initial_state
):
    (saved / "checkpoints" / "30" / METADATA_FILE).write_text("{}")
    with open_checkpoints(saved, small_config) as checkpoints:
        checkpoints.restore(initial_state)
        assert checkpoints.last_good().endswith("checkpoints/20.")
        checkpoints.save(at_step(initial_state, 30))
    assert kept(saved) == ["20", "30", "30.damaged"]
    assert int(restore(saved, small_config, initial_state).step) == 30


def test_all_are_damaged(saved, small_config, initial_state):
    for step in ("20", "30"):
        (saved / "checkpoints" / step / METADATA_FILE).write_text("{}")
    with (
        open_checkpoints(saved, small_config) as checkpoints,
        pytest.raises(ValueError, match=r"30 is damaged.*There is no other"),
    ):
        checkpoints.restore(initial_state)
    assert kept(saved) == ["20", "30"]


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
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
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


def test_a_disk_that_fills_while_writing(
    saved, small_config, initial_state, monkeypatch
):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refuse)
    with (
        pytest.raises(RunError) as caught,
        open_checkpoints(saved, small_config) as checkpoints,
    ):
        checkpoints.save(at_step(initial_state, 40))
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


def test_a_run_of_an_earlier_format(saved, small_config, initial_state):
    (saved / "checkpoints" / "30" / "manifest.json").write_text("{}")
    for versions, written_by in [
        ({"bnjax": "0.1.0"}, "bnjax 0.1.0"),
        (1, "an earlier"),
    ]:
        record = {"config": {}, "versions": versions}
        (saved / "config.json").write_text(json.dumps(record))
        with pytest.raises(RunError, match=rf"30 was written by {written_by}.*again"):
            restore(saved, small_config, initial_state)
    assert kept(saved) == ["20", "30"]
