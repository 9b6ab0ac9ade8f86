"""Which layers are estimated again."""

import fnmatch
from collections.abc import Callable, Iterable

from bnjax._validate import did_you_mean
from bnjax.population.records import Path, layer_name

Layers = str | Iterable[str] | Callable[[str], bool] | None


def chosen(layers: Layers, paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the paths that `layers` asks for.

    Args:
        layers: None for all; names such as "block_1/bn" or patterns such as "block_1/*"
            (`*` also matches "/"), one or several; or a function of the name.
        paths: of all batch norm layers.

    Raises:
        TypeError: `layers` is something else.
        ValueError: a name or the function fits no layer.

    Example:
        >>> chosen("block_1/*", [("bn",), ("block_1", "bn")])
        (('block_1', 'bn'),)
    """
    names = {layer_name(path): path for path in paths}
    listed = f"Its batch norm layers are: {', '.join(names)}."
    if layers is None:
        return tuple(names.values())
    if callable(layers):
        taken = {name for name in names if layers(name)}
        if not taken:
            raise ValueError(
                "recompute_batch_stats: layers is a function that is true of no layer; "
                f"expected one that is true of some. {listed}"
            )
    else:
        patterns = (layers,) if isinstance(layers, str) else tuple(layers)
        if not patterns or not all(isinstance(each, str) for each in patterns):
            raise TypeError(
                f"recompute_batch_stats: layers={layers!r}; expected None for all, a "
                "name or a pattern such as 'block_1/*', several of them, or a function "
                f"of the name. {listed}"
            )
        taken = set()
        for pattern in patterns:
            fitting = fnmatch.filter(names, pattern)
            if not fitting:
                hint = did_you_mean(pattern, names)
                raise ValueError(
                    f"recompute_batch_stats: layers={pattern!r} fits no layer.{hint} "
                    f"{listed}"
                )
            taken |= set(fitting)
    return tuple(path for name, path in names.items() if name in taken)
