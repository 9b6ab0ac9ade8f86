"""The variables of a model by their paths."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from bnjax.folding.constants import Constant

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Variables:
    """The variables of the model before folding.

    Attributes:
        paths: of each leaf, the collection first.
        values: of each leaf.
    """

    paths: tuple[Path, ...]
    values: tuple[Any, ...]

    def layers(self, leaves: frozenset[int]) -> list[Path]:
        """Return the layers that statistics among these leaves belong to."""
        found = (self.paths[leaf] for leaf in sorted(leaves))
        return list(dict.fromkeys(p[1:-1] for p in found if p[0] == "batch_stats"))

    def parents(self, constant: Constant) -> list[Path]:
        """Return the layers whose variables a constant depends on."""
        return [self.paths[leaf][1:-1] for leaf in sorted(constant.leaves)]

    def first(self, constant: Constant) -> int:
        """Return the first parameter that a constant depends on, else any variable."""
        leaves = sorted(constant.leaves)
        params = [leaf for leaf in leaves if self.paths[leaf][0] == "params"]
        return (params or leaves)[0]

    def belongs(self, constant: Constant, layers: Sequence[Path]) -> bool:
        """Whether a constant depends on variables, and on those of `layers` alone."""
        found = self.parents(constant)
        return bool(found) and all(path in layers for path in found)


def flat(variables: Any) -> tuple[dict[Path, Any], Variables]:
    """Return the leaves by path, and in order."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    paths = tuple(tuple(_name(key) for key in keys) for keys, _ in leaves)
    values = tuple(value for _, value in leaves)
    return dict(zip(paths, values, strict=True)), Variables(paths, values)


def _name(key: Any) -> str:
    return str(jax.tree_util.keystr((key,), simple=True))


def nested(found: dict[Path, jax.Array]) -> dict[str, Any]:
    """Return leaves by path as nested dicts."""
    tree: dict[str, Any] = {}
    for path, value in found.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return tree
