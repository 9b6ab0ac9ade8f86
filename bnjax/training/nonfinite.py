"""Steps that are not finite: which layer it began in, and what the run does."""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tqdm import tqdm

PATIENCE = 10
"""Steps in a row, in dispatches that keep none, after which nothing will mend it."""


def layer_names(batch_stats: Any) -> tuple[str, ...]:
    """Return the layers that keep statistics, sorted by name.

    Example:
        >>> stats = {"mean": 0, "var": 1}
        >>> layer_names({"bn_2": stats, "block": {"bn": stats}, "bn_10": stats})
        ('block/bn', 'bn_10', 'bn_2')
    """
    return tuple(sorted({_layer(path) for path in flatten_dict(batch_stats)}))


def bad_layers(batch_stats: Any) -> jax.Array:
    """Return which layers have a statistic that is not finite.

    Args:
        batch_stats: of any number of layers.

    Returns:
        Booleans of shape (layers,), in the order of `layer_names`.

    Example:
        >>> good, bad = {"var": jnp.ones(3)}, {"var": jnp.array([1.0, jnp.inf, 1.0])}
        >>> print(bad_layers({"bn_0": good, "bn_1": bad}))
        [False  True]
    """
    layers = {name: [] for name in layer_names(batch_stats)}
    for path, leaf in flatten_dict(batch_stats).items():
        layers[_layer(path)].append(leaf)
    found = [~all_finite(leaves) for leaves in layers.values()]
    return jnp.stack(found) if found else jnp.zeros(0, bool)


def all_finite(tree: Any) -> jax.Array:
    """Return whether every number of a tree is finite, a boolean of shape ().

    Example:
        >>> print(all_finite({"a": jnp.ones(3), "b": jnp.array(jnp.nan)}))
        False
    """
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(leaves).all()


def forward_order(model: nn.Module, images: Any) -> tuple[str, ...]:
    """Return the layers that keep statistics, as the forward pass comes to them.

    Args:
        model: called as `model(images, train=False)`; it is traced, not run.
        images: a batch or its shape.

    Example:
        >>> from bnjax.models import MLP
        >>> names = forward_order(MLP((4,) * 11), jnp.zeros((1, 3)))
        >>> names[1:3], sorted(names)[1:3]
        (('bn_1', 'bn_2'), ['bn_1', 'bn_10'])
    """
    met: dict[str, None] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        met.setdefault("/".join(context.module.path))
        return call(*args, **kwargs)

    def init(images: Any) -> Any:
        with nn.intercept_methods(record):
            return model.init(jax.random.key(0), images, train=False)

    batch_stats = jax.eval_shape(init, images).get("batch_stats", {})
    layers = layer_names(batch_stats)
    return tuple(name for name in met if name in layers)


class Guard:
    """Looks at the steps of each dispatch: were they finite, and may the run go on.

    Args:
        skip: steps that are not finite were dropped; else the first one ends the run.
        layers: gives `layer_names` in the order of the forward pass.
        dropped: steps dropped so far.
    """

    def __init__(
        self, *, skip: bool, layers: Callable[[], tuple[str, ...]], dropped: int = 0
    ) -> None:
        self.dropped = dropped
        self._skip = skip
        self._layers = layers
        self._in_a_row = 0

    def check(self, step: int, taken: dict[str, np.ndarray]) -> str | None:
        """Count what was dropped, and warn of it on standard error.

        Args:
            step: steps taken, with those of this dispatch.
            taken: of each step, shape (steps, ...): "loss", "bad_layers", and "dropped"
                where steps may be.

        Returns:
            Why the run cannot go on; None if it can.
        """
        losses = taken["loss"]
        bad = np.flatnonzero(taken["dropped"] if self._skip else ~np.isfinite(losses))
        if not bad.size:
            self._in_a_row = 0
            return None
        first, last = (f"{step - losses.size + int(bad[i]) + 1:,}" for i in (0, -1))
        loss = float(losses[bad[0]])
        began = self._began(loss, taken["bad_layers"][bad[0]])
        if not self._skip:
            return (
                f"the loss became {loss} in step {first}.{began} --on-nan skip drops "
                "such steps."
            )
        self.dropped += bad.size
        which = (
            f"step {first} was"
            if bad.size == 1
            else f"{bad.size} steps from {first} to {last} were"
        )
        tqdm.write(
            f"warning: {which} dropped ({self.dropped:,} so far): the loss was "
            f"{loss}.{began}",
            file=sys.stderr,
        )
        kept_none = bad.size == losses.size
        self._in_a_row = self._in_a_row + bad.size if kept_none else 0
        if self._in_a_row < PATIENCE:
            return None
        return (
            f"the last {self._in_a_row:,} steps were all dropped, since they were not "
            f"finite.{began} More steps would not mend it."
        )

    def _began(self, loss: float, bad: np.ndarray) -> str:
        """Say which layer went bad first, as the forward pass comes to them."""
        layers = self._layers()
        names = [
            name for name, is_bad in zip(sorted(layers), bad, strict=True) if is_bad
        ]
        if names:
            name = min(names, key=layers.index)
            return f" The first layer whose statistics are not finite is {name}."
        if not layers:
            return ""
        place = "gradients" if np.isfinite(loss) else "logits or the loss"
        return f" The statistics of every layer are finite: it began in the {place}."


def _layer(path: tuple[str, ...]) -> str:
    return "/".join(path[:-1])
