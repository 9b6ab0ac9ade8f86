"""Checkpoints of a run: orbax writes them during training, digests find damage.

A checkpoint is a folder. When it is complete, orbax names it by its step. `state/` has
the arrays, `metadata/` the other values, `sha256.json` a digest of each file.
"""

import contextlib
import dataclasses
import hashlib
import json
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
from orbax.checkpoint import checkpoint_managers

import bnjax
from bnjax._validate import first_line
from bnjax.training.config import Config, RunError, result_config
from bnjax.training.faults import DivergedError
from bnjax.training.step import TrainState
from bnjax.training.workdir import CHECKPOINTS, made_by, read_record

METADATA_FILE = "metadata/metadata"
DIGESTS = "sha256.json"
OLD_MANIFEST = "manifest.json"
PARTIAL = ".orbax-checkpoint-tmp"
DAMAGED = ".damaged"
ROOM = 2**18


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """The values of a checkpoint beside the state."""

    test_accuracy: float | None = None  # Of this step, if it was evaluated.
    feed: dict[str, Any] = dataclasses.field(default_factory=dict)  # `Feed.state()`.
    seconds: float = 0.0  # Time in training steps so far.
    dropped: int = 0  # Dropped steps so far.


class DamageError(RunError):
    """A checkpoint differs from what was written."""

    def __init__(self, where: Path, reason: str) -> None:
        super().__init__(f"checkpoint {where} is damaged: {reason}.")
        self.where = where


class _Manager(ocp.CheckpointManager):
    """orbax's manager, with the test accuracy from `metadata/`."""

    def metrics(self, step: int) -> Any:
        """Return the values beside the state; None if they cannot be read."""
        try:
            return json.loads((self.directory / str(step) / METADATA_FILE).read_bytes())
        except (OSError, ValueError):
            return None


class Checkpoints:
    """The checkpoints of one run; it keeps the newest `config.keep` and the best.

    With `read_only`, nothing is created or deleted.
    """

    def __init__(self, workdir: Path, config: Config, *, read_only: bool) -> None:
        self.workdir = workdir
        self.folder = workdir / CHECKPOINTS
        self._config = result_config(config)
        self._read_only = read_only
        self._writing = self.folder
        if not read_only:
            self.folder.mkdir(exist_ok=True)
            self._remove_partial()
        newest = checkpoint_managers.LatestN(n=config.keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=_accuracy, n=1, keep_checkpoints_without_metrics=False
        )
        kept = checkpoint_managers.AnyPreservationPolicy([newest, best])
        # Each host has its own folder, so that no host waits for another.
        host = jax.process_index()
        self._manager = _Manager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                create=False,
                read_only=read_only,
                preservation_policy=kept,
                # orbax reports created folders by keys that the hosts share.
                async_options=ocp.AsyncOptions(
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._write_digests,
                ),
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=host, active_processes={host}
                ),
            ),
        )

    def close(self) -> None:
        """Wait for the checkpoint being written, and close open files."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def save(
        self, state: TrainState, metadata: CheckpointMetadata | None = None
    ) -> None:
        """Start to write a checkpoint, and return as soon as the state is copied.

        After that, its buffers may be donated. If writing fails, the last good
        checkpoint remains.
        """
        self.wait()
        step = int(np.asarray(state.step).ravel()[0])
        arrays = jax.tree.map(_copy, state)
        leaves = jax.tree.leaves((arrays.params, arrays.batch_stats))
        if not all(np.isfinite(leaf).all() for leaf in leaves):
            raise DivergedError(
                f"the state after step {step} is not finite. {self.last_good()} "
                "Try a lower --learning-rate."
            )
        self._writing = self.folder / str(step)
        # orbax would fail half-way, with many tracebacks.
        needed = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + ROOM
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise RunError(
                f"checkpoint {self._writing} could not be written: the disk has "
                f"{free:,} bytes left, and {needed:,} are needed. {self.last_good()} "
                "Free some space, or give a --workdir on another disk."
            )
        metadata = metadata or CheckpointMetadata()
        record = {"config": self._config, **dataclasses.asdict(metadata)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), metadata=ocp.args.JsonSave(record)
        )
        with self._explaining_failure():
            self._manager.save(step, args=items, metrics=record, force=True)

    def check(self) -> None:
        """Raise the error of the checkpoint being written, if writing has ended."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint being written; raise a RunError if writing fails."""
        with self._explaining_failure():
            self._manager.wait_until_finished()

    def restore(self, target: TrainState) -> tuple[TrainState, CheckpointMetadata]:
        """Read the newest undamaged checkpoint into a state like `target`.

        The leaves of `target` are arrays or `jax.ShapeDtypeStruct`s.

        Standard error reports a damaged checkpoint. It is put aside, unless the run is
        read-only, and the checkpoint before it is read.
        """
        arrays, record = self._newest(jax.tree.map(_copy, target))
        names = [field.name for field in dataclasses.fields(CheckpointMetadata)]
        metadata = CheckpointMetadata(**{name: record[name] for name in names})
        return jax.tree.map(_like, arrays, target), metadata

    def restore_tree(self) -> dict[str, Any]:
        """Read the newest checkpoint as nested dicts of arrays, without the network."""
        return self._newest(None)[0]

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, in order."""
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

    def last_good(self) -> str:
        """Return a sentence with the path of the newest complete checkpoint."""
        steps = self.steps()
        if not steps:
            return "There is no checkpoint yet."
        return f"The last good checkpoint is {self.folder / str(steps[-1])}."

    def _newest(self, target: Any) -> tuple[Any, dict[str, Any]]:
        damaged: list[DamageError] = []
        for step in reversed(self.steps()):
            where = self.folder / str(step)
            try:
                found = self._read(where, target)
            except DamageError as error:
                if not where.exists():
                    # The running training has written newer checkpoints meanwhile.
                    return self._newest(target)
                damaged.append(error)
                continue
            for error in damaged:
                print(f"warning: {error} Going back to {step}.", file=sys.stderr)
                if not self._read_only:
                    aside = error.where.with_name(error.where.name + DAMAGED)
                    shutil.rmtree(aside, ignore_errors=True)
                    error.where.rename(aside)
                    self._manager.reload()
            return found
        if damaged:
            raise RunError(f"{damaged[0]} There is no other checkpoint. Train again.")
        raise RunError(
            f"{self.folder} holds no complete checkpoint: the run ended before its "
            "first, or its files are damaged. Train again in a new --workdir."
        )

    def _read(self, where: Path, target: Any) -> tuple[Any, dict[str, Any]]:
        if (where / OLD_MANIFEST).exists():
            version = made_by(read_record(self.workdir))
            by = f"bnjax {version}" if version else "an earlier version of bnjax"
            raise RunError(
                f"checkpoint {where} was written by {by}, and bnjax"
                f" {bnjax.__version__} cannot read it: the format changed in "
                "0.2.0. Resume or evaluate the run with the version that wrote it, or "
                "train again in a new --workdir."
            )
        _check_files(where)
        record = json.loads((where / METADATA_FILE).read_bytes())
        if record["config"] != self._config:
            raise RunError(
                f"config.json is not the configuration of checkpoint {where}: one of "
                "the two was edited or damaged. Restore the file, or train again."
            )
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return self._manager.restore(int(where.name), args=items)["state"], record
        except Exception as error:
            raise DamageError(where, first_line(error)) from error

    def _write_digests(self) -> None:
        # orbax calls this after it has written all files, before it names the folder.
        (partial,) = self.folder.glob(f"*{PARTIAL}*")
        (partial / DIGESTS).write_text(json.dumps(_digests(partial), indent=2))

    def _remove_partial(self) -> None:
        for path in self.folder.glob(f"*{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _explaining_failure(self) -> Iterator[None]:
        """Turn an error of orbax into a message, and remove partial files."""
        try:
            yield
        except Exception as error:
            self._remove_partial()
            raise RunError(
                f"checkpoint {self._writing} could not be written: "
                f"{first_line(error)}. {self.last_good()} Is the disk full?"
            ) from error


@contextlib.contextmanager
def open_checkpoints(
    workdir: Path, config: Config, *, read_only: bool = False
) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run, and close them at the end."""
    # orbax also raises the failures that it logs.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        checkpoints = Checkpoints(workdir, config, read_only=read_only)
        with contextlib.closing(checkpoints):
            yield checkpoints
    finally:
        logger.setLevel(level)


def _check_files(where: Path) -> None:
    """Raise a DamageError that names the first missing or changed file."""
    try:
        expected = dict(json.loads((where / DIGESTS).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DamageError(where, f"{DIGESTS}: {first_line(error)}") from error
    found = _digests(where)
    for name in sorted({METADATA_FILE, *expected}):
        if name not in found:
            raise DamageError(where, f"{name} is missing")
        if found[name] != expected.get(name):
            raise DamageError(where, f"{name} differs from its digest")


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that orbax wrote for an item, by its path."""
    digests = {}
    for path in filter(Path.is_file, sorted(folder.glob("*/**/*"))):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        digests[path.relative_to(folder).as_posix()] = digest
    return digests


def _accuracy(record: Any) -> float:
    accuracy = record.get("test_accuracy") if isinstance(record, dict) else None
    return -1.0 if accuracy is None else accuracy


def _copy(leaf: Any) -> Any:
    """Return a copy of a leaf that survives donation and that each host can write."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        return np.empty(data.shape, data.dtype)
    return np.array(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _like(leaf: Any, target: jax.Array | jax.ShapeDtypeStruct) -> jax.Array:
    """Undo `_copy` for a leaf of the kind of `target`."""
    if _is_key(target):
        return jax.random.wrap_key_data(leaf)
    return jnp.asarray(leaf, target.dtype)


def _is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
