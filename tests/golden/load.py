"""Reads the golden values kept in this folder."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

PATH = pathlib.Path(__file__).with_name("torch_batch_norm.npz")


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer of PyTorch: its arguments, its inputs and what it gave.

    Arrays: `x` (steps, *shape), `dy`, `running_mean`, `running_var`, `weight` and
    `bias` (if affine) went in; `y`, `dx`, `dweight` and `dbias`, each with `_train`
    or `_eval` after it, `running_mean` and `running_var` with `_after_1` and
    `_after_3`, and `num_batches_tracked` came out.
    """

    name: str
    dtype: str
    affine: bool
    momentum: float
    eps: float
    arrays: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """A small network's states before and after each step, on the leading axis."""

    learning_rate: float
    momentum: float
    eps: float
    arrays: dict[str, np.ndarray]


@functools.cache
def _read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(PATH, allow_pickle=False) as file:
        arrays = dict(file)
    return json.loads(arrays.pop("metadata").item()), arrays


def _arrays_of(name: str) -> dict[str, np.ndarray]:
    prefix = name + "/"
    return {
        key.removeprefix(prefix): value
        for key, value in _read()[1].items()
        if key.startswith(prefix)
    }


def metadata() -> dict[str, Any]:
    """Returns the versions, seeds and arguments the values were made with."""
    return _read()[0]


def torch_cases() -> list[Case]:
    """Returns every case of a single layer."""
    return [
        Case(
            name=name,
            dtype=spec["dtype"],
            affine=spec["affine"],
            momentum=spec["momentum"],
            eps=spec["eps"],
            arrays=_arrays_of(name),
        )
        for name, spec in metadata()["cases"].items()
    ]


def torch_network() -> Network:
    """Returns the small network trained by PyTorch."""
    spec = metadata()["network"]
    return Network(
        learning_rate=spec["learning_rate"],
        momentum=spec["momentum"],
        eps=spec["eps"],
        arrays=_arrays_of("network"),
    )
