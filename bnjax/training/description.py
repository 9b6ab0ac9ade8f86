"""What config.json says of a run, and whether another command means the same run."""

import platform
import sys
from pathlib import Path
from typing import Any

import flax
import jax

import bnjax
from bnjax.training.config import Config
from bnjax.training.errors import USAGE, UserError
from bnjax.training.record import differences, from_json, to_json
from bnjax.training.workdir import CONFIG, read_json


def describe(preset: str, config: Config) -> dict[str, Any]:
    """Return what config.json holds: all that the run is a function of."""
    return {
        "preset": preset,
        "config": to_json(config),
        "versions": {
            "bnjax": bnjax.__version__,
            "flax": flax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "device": jax.devices()[0].device_kind,
    }


def read_config(workdir: Path) -> Config:
    """Return the configuration that a run was started with.

    Raises:
        UserError: the folder is no run, or its config.json is damaged.
    """
    return from_json(_read(workdir)["config"], str(workdir / CONFIG))


def check_same(workdir: Path, preset: str, config: Config) -> None:
    """Refuse to go on with a run under another configuration.

    Other versions or another device are named on standard error, since the results
    may then differ in the last digits.

    Raises:
        UserError: naming each flag that differs, or config.json is damaged.
    """
    changed = differences(read_config(workdir), config)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration: {'; '.join(changed)}. "
            "Give the flags it was started with, or another --workdir.",
            USAGE,
        )
    before, now = _read(workdir), describe(preset, config)
    for name in ("versions", "device"):
        if before.get(name) != now[name]:
            print(
                f"note: the run was started with {name} {before.get(name)} and goes on "
                f"with {now[name]}; the last digits of its results may differ.",
                file=sys.stderr,
            )


def _read(workdir: Path) -> dict[str, Any]:
    record = read_json(workdir / CONFIG)
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(
            f"{workdir / CONFIG} is damaged: it has no 'config'. Restore the file, or "
            "train again."
        )
    return record
