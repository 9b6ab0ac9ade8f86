"""A folder that eval.py reads, made from variables and not by training."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnjax.data.config import SettingError
from bnjax.training.checkpoint import CheckpointMetadata, open_checkpoints
from bnjax.training.config import Config
from bnjax.training.step import TrainState
from bnjax.training.workdir import CONFIG, describe, write_json, writing


def check_new_run(workdir: Path, *, force: bool = False) -> None:
    """Refuse a folder that a run cannot be written to, before any work is done.

    Args:
        workdir: the folder.
        force: a run that is there may be replaced; nothing else may.

    Raises:
        RunError: it is there already, or the folder it is to be in is not.
    """
    if not workdir.parent.is_dir():
        raise SettingError(
            f"--output {workdir}: {workdir.parent} is not there. Make it first, or "
            "give another place.",
        )
    if not workdir.exists() or (workdir.is_dir() and not any(workdir.iterdir())):
        return
    if not (workdir / CONFIG).is_file():
        raise SettingError(
            f"--output {workdir} is there and holds no run: expected a folder that is "
            "new or empty, or with --force one that holds a run.",
        )
    if not force:
        raise SettingError(
            f"--output {workdir} holds a run already. Nothing was overwritten: give "
            "another folder, or --force to replace it.",
        )


def write_run(
    workdir: Path,
    preset: str,
    config: Config,
    state: TrainState,
    made_by: dict[str, Any],
    *,
    metadata: CheckpointMetadata | None = None,
    force: bool = False,
) -> None:
    """Write a run's folder with one checkpoint, whole or not at all.

    Args:
        workdir: the folder.
        preset: that config.json names.
        config: of the run.
        state: of the checkpoint.
        made_by: what else config.json says: the command, and what it was given.
        metadata: of the checkpoint.
        force: a run that is there may be replaced.

    Raises:
        RunError: as `check_new_run`, the state is not finite, or the disk is full.
    """
    check_new_run(workdir, force=force)
    with _replacing_folder(workdir) as folder:
        described = {**describe(preset, config), "made_by": made_by}
        write_json(folder / CONFIG, described)
        with open_checkpoints(folder, config) as checkpoints:
            checkpoints.save(state, metadata)
            checkpoints.wait()


@contextlib.contextmanager
def _replacing_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes the place of `folder` when that is done."""
    with writing(folder):
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        filled = scratch / "new"
        filled.mkdir()
        yield filled
        with writing(folder):
            if folder.exists():
                folder.rename(scratch / "old")
            filled.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
