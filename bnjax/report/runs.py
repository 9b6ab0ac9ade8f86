"""Read the folders of runs for a report."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.data.images import printable
from bnjax.report.html import clean, text
from bnjax.training.config import RunError, as_flag, flag_values
from bnjax.training.metrics import read_metrics
from bnjax.training.workdir import LAYERS, METRICS, SUMMARY, config_of, read_record

MAX_BYTES = 2**28
"""The largest size of a file of records, two million lines of metrics.jsonl."""


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The contents of a run's folder.

    Attributes:
        name: the name of the folder, with as many of its parents as make it unique.
        settings: the value of every flag, as text, and the device.
        group: a number that is the same for runs that differ only in their seed.
        train: the training records of metrics.jsonl, one array for each column;
            "seconds" is the time of training so far, without compilation and
            evaluation.
        test: the test records of metrics.jsonl, with the same columns.
        layers: the lines of layers.jsonl.
        ended: whether the run took all its steps.
    """

    name: str
    settings: dict[str, str]
    group: int
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    layers: list[dict[str, Any]]
    ended: bool


def read_runs(workdirs: Sequence[Path]) -> list[RunReport]:
    """Read the folders of runs, without their checkpoints."""
    runs, groups = [], []
    for workdir, name in zip(workdirs, _names(workdirs), strict=True):
        record = read_record(workdir)
        config = config_of(workdir, record)
        flags = {n: v for n, v in flag_values(config).items() if n != "resume"}
        settings = {as_flag(n): text(v) for n, v in flags.items() if n != "workdir"}
        for key in ("versions", "device"):
            value = record.get(key)
            parts = value if isinstance(value, dict) else {"": value}
            settings |= {f"{key} {n}".strip(): text(v) for n, v in parts.items()}
        own = {n: v for n, v in settings.items() if n != "--seed"}
        if own not in groups:
            groups.append(own)
        records = _read(workdir, METRICS)
        train = _columns(records, "train", ("loss", "steps_per_second"))
        taken = np.diff(train["step"], prepend=0)
        rates = np.maximum(train["steps_per_second"], np.finfo(np.float64).tiny)
        train["seconds"] = np.cumsum(taken / rates)
        test = _columns(records, "test", ("loss", "accuracy"))
        past = np.searchsorted(train["step"], test["step"], side="right")
        test["seconds"] = np.concatenate([[0.0], train["seconds"]])[past]
        runs.append(
            RunReport(
                name=name,
                settings=settings,
                group=groups.index(own),
                train=train,
                test=test,
                layers=[_checked(workdir, line) for line in _read(workdir, LAYERS)],
                ended=(workdir / SUMMARY).exists(),
            )
        )
    return runs


def _read(workdir: Path, name: str) -> list[dict[str, Any]]:
    path = workdir / name
    if path.exists() and path.stat().st_size > MAX_BYTES:
        raise RunError(
            f"{path} has {path.stat().st_size:,} bytes; a report reads at most "
            f"{MAX_BYTES:,}. Omit this run."
        )
    return read_metrics(workdir, name)


def _checked(workdir: Path, line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of layers.jsonl; refuse a line that no run writes."""
    try:
        for kind in ("layers", "inputs"):
            for arrays in line[kind].values():
                for values in arrays.values():
                    _, _, _ = map(float, values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{workdir / LAYERS} is damaged: the line of step {line['step']} does not "
            "have three numbers for each array of each layer. Restore the file, or "
            "train again."
        ) from error
    return line


def _columns(
    records: Sequence[dict[str, Any]], split: str, names: Sequence[str]
) -> dict[str, np.ndarray]:
    chosen = [record for record in records if record.get("split") == split]
    return {
        name: np.asarray([_number(record.get(name)) for record in chosen], np.float64)
        for name in ("step", *names)
    }


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _names(workdirs: Sequence[Path]) -> list[str]:
    """Return the shortest end of each path that no other path has."""
    paths = [workdir.resolve() for workdir in workdirs]
    length, names = 0, [""] * len(paths)
    while len(set(names)) < len(set(paths)) or not length:
        length += 1
        names = [printable(str(Path(*path.parts[-length:]))) for path in paths]
    return [clean(name) for name in names]
