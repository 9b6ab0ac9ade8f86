"""The variables of a folded model: made once, then read for each shape of input."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.folding.variables import Path, Variables


class Store(Protocol):
    """Where the rewritten program has its arrays from."""

    def leaf(self, index: int) -> jax.Array:
        """Return a variable as it is."""
        ...

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Return an array that folding makes; `path` is where it belongs."""
        ...


class Making:
    """Makes the variables and remembers what became of each.

    Args:
        variables: those before folding.
        dtype: of the parameters; None for that of each before.
    """

    def __init__(self, variables: Variables, dtype: Any) -> None:
        self._variables = variables
        self._dtype = dtype
        self._leaves: dict[int, jax.Array] = {}
        self._made: list[tuple[Path, jax.Array]] = []

    def leaf(self, index: int) -> jax.Array:
        """Return a variable as it is."""
        if index not in self._leaves:
            self._leaves[index] = self._cast(index)
        return self._leaves[index]

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Make an array."""
        with jax.ensure_compile_time_eval():
            # jnp.asarray would compile a program for each shape.
            array = jax.device_put(make().astype(dtype))
        self._made.append((path, array))
        return array

    def _cast(self, index: int) -> jax.Array:
        with jax.ensure_compile_time_eval():
            value = jnp.asarray(self._variables.values[index])
            in_params = self._variables.paths[index][0] == "params"
            if self._dtype is None or not in_params:
                return value
            floats = jnp.issubdtype(value.dtype, jnp.floating)
            return value.astype(self._dtype) if floats else value

    def finish(self) -> "tuple[dict[Path, jax.Array], tuple[Entry, ...]]":
        """Return the variables by path, and what was made in the order it was."""
        paths = self._variables.paths
        found = {paths[index]: value for index, value in self._leaves.items()}
        entries = []
        for wanted, value in self._made:
            path = _free(wanted, value, found)
            found[path] = value
            entries.append(Entry(wanted, path))
        return found, tuple(entries)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where an array is that folding made.

    Attributes:
        wanted: the path of the variable it replaces.
        path: its own; another where that variable is still needed.
    """

    wanted: Path
    path: Path


class OtherLayersError(ValueError):
    """An input of this shape would have other layers folded than the example had."""


class Reading:
    """Reads the variables made before.

    Args:
        found: by path.
        variables: those before folding.
        entries: what `Making` returned.
    """

    def __init__(
        self,
        found: dict[Path, jax.Array],
        variables: Variables,
        entries: tuple[Entry, ...],
    ) -> None:
        self._found = found
        self._variables = variables
        self._entries = entries
        self._read = 0

    def leaf(self, index: int) -> jax.Array:
        """Return a variable as it is."""
        return self._get(self._variables.paths[index])

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Return an array made before."""
        del dtype, make
        if self._read == len(self._entries):
            raise OtherLayersError
        entry = self._entries[self._read]
        if entry.wanted != path:
            raise OtherLayersError
        self._read += 1
        return self._get(entry.path)

    def check_all_read(self) -> None:
        """Refuse to have left an array unread."""
        if self._read != len(self._entries):
            raise OtherLayersError

    def _get(self, path: Path) -> jax.Array:
        try:
            return jnp.asarray(self._found[path])
        except KeyError:
            raise OtherLayersError from None


def _free(wanted: Path, value: jax.Array, found: dict[Path, jax.Array]) -> Path:
    """Return the first path that is free or has the same value."""
    path, count = wanted, 1
    while path in found and not _same(found[path], value):
        count += 1
        path = (*wanted[:-1], f"{wanted[-1]}_{count}")
    return path


def _same(first: jax.Array, second: jax.Array) -> bool:
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    return np.array_equal(np.asarray(first), np.asarray(second))
