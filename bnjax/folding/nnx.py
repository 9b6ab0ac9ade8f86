"""Folding of models of flax.nnx."""

from typing import Any

import jax
from flax import nnx

from bnjax.folding.fold import Folded, fold_batch_norm


def fold_nnx(model: nnx.Module, example: Any, *, dtype: Any = None) -> Folded:
    """Fold the batch normalizations of a flax.nnx model; see `fold_batch_norm`.

    Args:
        model: called as `model(x)`. It stays as it is; a copy of it is put in the mode
            of `model.eval()` and folded.
        example: an input, or a jax.ShapeDtypeStruct.
        dtype: float32 or bfloat16; those of the model if None.

    Returns:
        The new model, whose variables have the names of the attributes of the old one:
        `nnx.update(copy, folded.params)` gives them to one without normalization.

    Raises:
        TypeError, ValueError: as `fold_batch_norm`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.folding.nnx import fold_nnx
        >>> from bnjax.nnx import BatchNorm
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), BatchNorm(4, rngs=rngs))
        >>> folded = fold_nnx(model, jnp.ones((2, 5)))
        >>> print(folded.report)
        batch normalization  folded into      as              or why not
        layers/1             layers/0/kernel  matrix product
        >>> jax.tree.map(jnp.shape, folded.params)
        {'layers': {'0': {'bias': (4,), 'kernel': (5, 4)}}}
    """
    copy = nnx.clone(model)
    copy.eval()
    graph, params, batch_stats, rest = nnx.split(copy, nnx.Param, nnx.BatchStat, ...)
    states = {"params": params, "batch_stats": batch_stats, "rest": rest}
    variables = {name: nnx.to_pure_dict(state) for name, state in states.items()}

    def apply(variables: Any, x: Any) -> Any:
        given = jax.tree.map(lambda leaf: leaf, states)  # a copy, to write to
        for name, state in given.items():
            nnx.replace_by_pure_dict(state, variables[name])
        return nnx.merge(graph, *given.values())(x)

    return fold_batch_norm(apply, variables, example, dtype=dtype)
