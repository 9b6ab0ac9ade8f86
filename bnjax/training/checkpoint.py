"""Checkpoints of a run: orbax writes each whole or not at all, and reads it back."""

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bnjax.training.config import Config
from bnjax.training.errors import UserError, first_line
from bnjax.training.record import to_json
from bnjax.training.state import TrainState
from bnjax.training.workdir import CHECKPOINTS, read_json, write_json

KEEP = 2
ROOM = 2**18
MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of one run, the newest `KEEP` kept.

    Beside what orbax writes, a checkpoint has a manifest: the configuration it was
    made with and the digest of every file. It is written last, so that a checkpoint
    without one is not whole, and it is read first, so that no damaged file is opened.

    Args:
        workdir: the folder of the run.
        config: of the run.
        read_only: create and delete nothing.
    """

    def __init__(
        self, workdir: Path, config: Config, *, read_only: bool = False
    ) -> None:
        self.folder = workdir / CHECKPOINTS
        self._config = _result_config(config)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else KEEP,
            create=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def close(self) -> None:
        """Let go of what orbax holds open."""
        self._manager.close()

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, returning once it is there.

        Raises:
            UserError: the state is not finite, or the disk does not take it. The
                checkpoint before is kept.
        """
        step = int(state.step)
        if not _is_finite(state):
            raise UserError(
                f"the state after step {step} is not finite. {self.last_good()} "
                "Try a lower --learning-rate."
            )
        where = self.folder / str(step)
        self._check_room(where, state)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
            self._manager.wait_until_finished()
            manifest = {"config": self._config, "files": _digests(where)}
            write_json(where / MANIFEST, manifest)
        except Exception as error:
            raise UserError(
                f"checkpoint {where} could not be written: {first_line(error)}. "
                f"{self.last_good()} Is the disk full?"
            ) from error

    def restore(self, target: TrainState) -> TrainState:
        """Read the newest whole checkpoint.

        Args:
            target: a state of the shapes and the devices to restore to.

        Raises:
            UserError: there is none, it is damaged, or it was made with another
                configuration.
        """
        step = self._newest()
        if step is None:
            raise UserError(
                f"{self.folder} holds no whole checkpoint: the run ended before its "
                "first, or its files are damaged. Train again in a new --workdir."
            )
        where = self.folder / str(step)
        try:
            manifest = read_json(where / MANIFEST)
            self._check(where, manifest)
            state: Any = self._manager.restore(
                step, args=ocp.args.StandardRestore(target)
            )
        except UserError:
            raise
        except Exception as error:
            raise _damaged(where, first_line(error)) from error
        return state

    def last_good(self) -> str:
        """Say where the newest whole checkpoint is."""
        step = self._newest()
        if step is None:
            return "No checkpoint had been written yet."
        return f"The last good checkpoint is {self.folder / str(step)}."

    def _check_room(self, where: Path, state: TrainState) -> None:
        # orbax finds out half-way, and says so in many tracebacks.
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + ROOM
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"checkpoint {where} could not be written: the disk has {free:,} "
                f"bytes left and {needed:,} are wanted. {self.last_good()} Make room, "
                "or give a --workdir on another disk."
            )

    def _newest(self) -> int | None:
        steps = self._manager.all_steps()
        whole = [s for s in steps if (self.folder / str(s) / MANIFEST).exists()]
        return max(whole, default=None)

    def _check(self, where: Path, manifest: Any) -> None:
        """Refuse a checkpoint whose files or configuration are not as written."""
        if manifest["config"] != self._config:
            raise UserError(
                f"config.json is not the configuration that checkpoint {where} was "
                "made with: one of the two was edited or damaged since. Restore the "
                "file, or train again."
            )
        found = _digests(where)
        for name, digest in manifest["files"].items():
            if found.get(name) != digest:
                reason = "is not what was written" if name in found else "is missing"
                raise _damaged(where, f"{name} {reason}")


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path, config: Config, *, read_only: bool = False
) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run and close them in the end."""
    # What orbax logs about a failure is raised as well.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        checkpoints = Checkpoints(workdir, config, read_only=read_only)
        with contextlib.closing(checkpoints):
            yield checkpoints
    finally:
        logger.setLevel(level)


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the manifest, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _damaged(where: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {where} is damaged: {reason}. Delete that folder to go back to "
        "the one before, or train again."
    )


def _result_config(config: Config) -> dict[str, Any]:
    """Return the part of the configuration that results depend on."""
    value = to_json(config)
    for name in ("workdir", "data_dir"):
        del value[name]
    return value


def _is_finite(state: TrainState) -> bool:
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)
