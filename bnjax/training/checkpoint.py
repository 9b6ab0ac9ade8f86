"""Checkpoints of a run: each whole or not there, written while training goes on."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bnjax._validate import first_line
from bnjax.training.config import Config, RunError, result_config
from bnjax.training.faults import DivergedError
from bnjax.training.step import TrainState
from bnjax.training.workdir import CHECKPOINTS, read_json, sync_folder, write_json


def digests(folder: Path, *, leave_out: str = "") -> dict[str, str]:
    """Return the SHA-256 of every file, by its path within the folder.

    Args:
        folder: looked through with all folders below.
        leave_out: the name of a file that is not digested.
    """
    return {
        path.relative_to(folder).as_posix(): _sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != leave_out
    }


def first_change(folder: Path, expected: dict[str, str]) -> str | None:
    """Say which file is no longer as its digest says, or nothing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a").write_text("one")
        >>> before = digests(folder)
        >>> first_change(folder, before)
        >>> _ = (folder / "a").write_text("two")
        >>> first_change(folder, before)
        'a is not what was written'
    """
    found = digests(folder)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is not what was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


ROOM = 2**18
MANIFEST = "manifest.json"
STATE = "state"
PARTIAL = ".partial"
DAMAGED = ".damaged"


@dataclasses.dataclass(frozen=True)
class Notes:
    """What a checkpoint holds beside the state.

    Args:
        test_accuracy: of this very step, None if it was not evaluated.
        feed: where the input stands, as `Feed.state()` gave it.
        seconds: time spent in steps so far.
        dropped: steps dropped so far.
    """

    test_accuracy: float | None = None
    feed: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    dropped: int = 0


class Checkpoints:
    """The checkpoints of one run: the newest `config.keep` and the best are kept.

    A checkpoint is a folder named by its step. orbax writes the state into a folder
    with another name; the manifest follows, with the configuration and the digest of
    every file; then the folder gets its name. Whenever the process is killed, a folder
    named by a step is whole, and no damaged file is opened.

    Args:
        workdir: the folder of the run.
        config: of the run.
        read_only: create and delete nothing.
    """

    def __init__(
        self, workdir: Path, config: Config, *, read_only: bool = False
    ) -> None:
        self.workdir = workdir
        self.folder = workdir / CHECKPOINTS
        self._config = result_config(config)
        self._keep = config.keep
        self._read_only = read_only
        # One host writes, and each reads for itself: nobody waits for another.
        host = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=host, active_processes={host}
        )
        self._checkpointer = ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=options),
            multiprocessing_options=options,
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        if not read_only:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.glob(f"*{PARTIAL}*"):
                shutil.rmtree(path)

    def close(self) -> None:
        """Wait for the checkpoint being written, and let go of what is open."""
        self._thread.shutdown()
        self._checkpointer.close()

    def save(self, state: TrainState, notes: Notes | None = None) -> None:
        """Start to write a checkpoint, and return as soon as the state is copied.

        Args:
            state: what to write; its buffers may be donated afterwards.
            notes: what to write beside it.

        Raises:
            DivergedError: the state is not finite.
            RunError: the disk does not take it, or did not take the one before.
                Whichever it is, the last good checkpoint is kept.
        """
        self.wait()
        step = int(np.asarray(state.step).ravel()[0])
        where = self.folder / str(step)
        state = jax.tree.map(_copy, state)
        if not _is_finite(state):
            raise DivergedError(
                f"the state after step {step} is not finite. {self.last_good()} "
                "Try a lower --learning-rate."
            )
        self._check_room(where, state)
        self._saving = self._thread.submit(self._write, where, state, notes or Notes())

    def check(self) -> None:
        """Raise what went wrong with the checkpoint being written, if it is over."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Return once the checkpoint being written is there.

        Raises:
            RunError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, target: TrainState) -> tuple[TrainState, Notes]:
        """Read the newest checkpoint that is whole, into a state.

        A damaged one is named on standard error, put aside unless the run is only
        read, and the one before it is read.

        Args:
            target: a state of the shapes and the devices to restore to.

        Raises:
            RunError: there is none, all are damaged, or it was made with another
                configuration.
        """
        tree, notes = self._newest(jax.tree.map(_copy, target))
        return jax.tree.map(_like, tree, target), notes

    def restore_tree(self) -> dict[str, Any]:
        """Read the newest checkpoint that is whole, knowing nothing of the network.

        Returns:
            The fields of a `TrainState`: nested dicts of NumPy arrays.

        Raises:
            RunError: as `restore`.
        """
        return self._newest(None)[0]

    def _newest(self, target: Any) -> tuple[Any, Notes]:
        damaged: list[DamageError] = []
        for step in reversed(self.steps()):
            try:
                found = self._read(self.folder / str(step), target)
            except DamageError as error:
                damaged.append(error)
                continue
            for error in damaged:
                print(f"warning: {error} Going back to {step}.", file=sys.stderr)
                if not self._read_only:
                    _put_aside(error.where)
            return found
        if damaged:
            raise RunError(f"{damaged[0]} There is no other. Train again.")
        raise RunError(
            f"{self.folder} holds no whole checkpoint: the run ended before its "
            "first, or its files are damaged. Train again in a new --workdir."
        )

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, in order."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        steps = [int(name) for name in names if name.isdecimal()]
        return sorted(s for s in steps if (self.folder / str(s) / MANIFEST).exists())

    def last_good(self) -> str:
        """Say where the newest whole checkpoint is."""
        steps = self.steps()
        if not steps:
            return "No checkpoint had been written yet."
        return f"The last good checkpoint is {self.folder / str(steps[-1])}."

    def _write(self, where: Path, state: TrainState, notes: Notes) -> None:
        partial = where.with_name(where.name + PARTIAL)
        try:
            path = (partial / STATE).absolute()
            self._checkpointer.save(path, args=ocp.args.StandardSave(state))
            manifest = {
                "config": self._config,
                **dataclasses.asdict(notes),
                "files": digests(partial, leave_out=MANIFEST),
            }
            write_json(partial / MANIFEST, manifest)
            if where.exists():
                shutil.rmtree(where)
            partial.rename(where)
            sync_folder(self.folder)
            self._prune()
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise RunError(
                f"checkpoint {where} could not be written: {first_line(error)}. "
                f"{self.last_good()} Is the disk full?"
            ) from error

    def _prune(self) -> None:
        """Delete all but the newest and the best."""
        steps = self.steps()
        scores = {step: self._score(step) for step in steps}
        scored = [step for step in steps if scores[step] is not None]
        best = max(scored, key=lambda step: (scores[step], step), default=None)
        for step in steps[: -self._keep]:
            if step != best:
                # Renamed first: a process killed half-way leaves what resuming removes.
                partial = self.folder / f"{step}{PARTIAL}"
                (self.folder / str(step)).rename(partial)
                shutil.rmtree(partial)

    def _score(self, step: int) -> float | None:
        return read_json(self.folder / str(step) / MANIFEST)["test_accuracy"]

    def _read(self, where: Path, target: Any) -> tuple[Any, Notes]:
        try:
            manifest = read_json(where / MANIFEST)
            config, files = manifest["config"], manifest["files"]
            names = [field.name for field in dataclasses.fields(Notes)]
            notes = Notes(**{name: manifest[name] for name in names})
            change = first_change(where, files)
            if change is not None:
                raise DamageError(where, change)
            if config == self._config:
                path = (where / STATE).absolute()
                args = ocp.args.StandardRestore(target)
                return self._checkpointer.restore(path, args=args), notes
        except DamageError:
            raise
        except Exception as error:
            raise DamageError(where, first_line(error)) from error
        raise RunError(
            f"config.json is not the configuration that checkpoint {where} was "
            "made with: one of the two was edited or damaged since. Restore the "
            "file, or train again."
        )

    def _check_room(self, where: Path, state: TrainState) -> None:
        # orbax finds out half-way, and says so in many tracebacks.
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + ROOM
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise RunError(
                f"checkpoint {where} could not be written: the disk has {free:,} "
                f"bytes left and {needed:,} are wanted. {self.last_good()} Make room, "
                "or give a --workdir on another disk."
            )


class DamageError(RunError):
    """A checkpoint that is not what was written."""

    def __init__(self, where: Path, reason: str) -> None:
        super().__init__(f"checkpoint {where} is damaged: {reason}.")
        self.where = where


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


def _put_aside(where: Path) -> None:
    aside = where.with_name(where.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    where.rename(aside)


def _copy(leaf: jax.Array) -> Any:
    """Return a leaf that no donation can overwrite, and that each host can write."""
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _like(leaf: Any, target: jax.Array) -> jax.Array:
    """Return what `_copy` made of a leaf of the kind of `target`, as it was."""
    if _is_key(target):
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(target))
    return jnp.asarray(leaf, target.dtype)


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _is_finite(state: TrainState) -> bool:
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    return all(np.isfinite(leaf).all() for leaf in leaves)
