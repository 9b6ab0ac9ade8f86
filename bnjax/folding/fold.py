"""Batch normalization folded into the linear layers beside it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from bnjax.folding.program import trace
from bnjax.folding.report import Layer, Report
from bnjax.folding.rewrite import Rewriter
from bnjax.folding.stores import Entry, Making, OtherLayersError, Reading
from bnjax.folding.variables import Variables, flat, nested


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """A model without batch normalization.

    Called on an input like the example, with a batch of any size, it gives what the
    model gave. `apply(variables, x)` does so with the variables as an argument, to
    differentiate or to compile by yourself.

    Attributes:
        variables: of the new model: `{"params": ...}`, and other collections where the
            model needs them. A folded kernel is where the old one was, the bias beside
            it as "bias".
        report: what became of each batch normalization.
    """

    variables: dict[str, Any]
    report: Report
    _apply_fn: Callable[..., Any] = dataclasses.field(repr=False)
    _before: Any = dataclasses.field(repr=False)
    _entries: tuple[Entry, ...] = dataclasses.field(repr=False)
    _dtype: Any = dataclasses.field(repr=False)

    @property
    def params(self) -> dict[str, Any]:
        """The collection "params" of the variables."""
        return self.variables["params"]

    def __call__(self, x: Any) -> Any:
        """Return the outputs of the model, compiled."""
        return self._compiled(self.variables, x)

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, Any], Any]:
        return jax.jit(self.apply)

    def apply(self, variables: Any, x: Any) -> Any:
        """Return the outputs of the model with given variables.

        Args:
            variables: of the structure of the attribute of that name.
            x: as the example, with a batch of any size.

        Raises:
            ValueError: for an input of this shape other layers would be folded.
        """
        found, _ = flat(variables)
        before = flat(self._before)[1]
        program = trace(self._apply_fn, self._before, x)
        store = Reading(found, before, self._entries)
        try:
            outputs = Rewriter(program, before, store, self._dtype).run(
                jax.tree.leaves(x)
            )
            store.check_all_read()
        except OtherLayersError:
            shapes = jax.tree.map(jnp.shape, x)
            raise ValueError(
                f"Folded: for an input of shape {shapes} other layers would be folded "
                "than for the example: the padding depends on the size of the input, "
                "or the variables are not those of `folded.variables`. Call "
                "fold_batch_norm with an example of this shape."
            ) from None
        return jax.tree.unflatten(program.out_tree, outputs)


def fold_batch_norm(
    apply_fn: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    example: Any,
    *,
    dtype: Any = None,
) -> Folded:
    r"""Fold batch normalization into the linear layers before or after it.

    In inference it is an affine map of each channel, and so

    .. math:: \gamma \frac{(W u + b) - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta
        = W' u + b', \quad
        W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \quad
        b' = \frac{\gamma (b - \mu)}{\sqrt{\sigma^2 + \epsilon}} + \beta.

    The pairs are found in the traced program and not by names: convolutions of any
    kind, transposed ones and matrix products, with reshapes and transpositions between
    them and the normalization. One that precedes a linear layer goes into that one,
    W' = W diag(a) and b' = b + W c for an input a * u + c, where each output sees all
    of the kernel. What cannot be folded stays as (x - mean) * scale + bias with
    constants computed once; the report says why. The arithmetic is float64, on the
    host.

    Args:
        apply_fn: `apply_fn(variables, x)` gives the outputs of the model in inference,
            such as `lambda variables, x: model.apply(variables, x, train=False)`.
        variables: a mapping of collections, "params" and "batch_stats" among them.
        example: an input, or a jax.ShapeDtypeStruct; the batch may be of any size.
        dtype: float32 or bfloat16, of the new parameters and of the products of linear
            layers; those of the model if None. What lies between the products keeps
            the dtype it has in the model.

    Returns:
        The new model, its variables and the report.

    Raises:
        ValueError: there are no statistics, or the model does not normalize by them,
            as in training.
        TypeError: another dtype, or variables that are traced.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.folding import fold_batch_norm
        >>> from bnjax.models import MLP
        >>> model, x = MLP((4,), classes=3), jnp.ones((2, 5))
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> folded = fold_batch_norm(
        ...     lambda variables, x: model.apply(variables, x, train=False),
        ...     variables,
        ...     x,
        ... )
        >>> print(folded.report)
        batch normalization  folded into     as              or why not
        bn_0                 dense_0/kernel  matrix product
        >>> jax.tree.map(jnp.shape, folded.params["dense_0"])
        {'bias': (4,), 'kernel': (5, 4)}
        >>> folded(jnp.ones((7, 5))).shape
        (7, 3)

    References:
        Ioffe & Szegedy (2015), section 3.1 and Algorithm 2.
    """
    _check(variables, dtype)
    dtype = None if dtype is None else jnp.dtype(dtype)
    before = flat(variables)[1]
    example = jax.tree.map(_shape_of, example)
    program = trace(apply_fn, variables, example)
    store = Making(before, dtype)
    rewriter = Rewriter(program, before, store, dtype)
    jax.eval_shape(lambda x: rewriter.run(jax.tree.leaves(x)), example)
    report = _report(rewriter, before)
    found, entries = store.finish()
    return Folded(nested(found), report, apply_fn, variables, entries, dtype)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    x = jnp.asarray(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _check(variables: Any, dtype: Any) -> None:
    if dtype is not None and jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise TypeError(
            f"fold_batch_norm: dtype={jnp.dtype(dtype).name}; expected float32, "
            "bfloat16, or None for the dtypes of the model."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else variables
        raise ValueError(
            f"fold_batch_norm: variables hold {given}; expected a mapping of "
            'collections such as {"params": ..., "batch_stats": ...}, as '
            "`model.init` gives."
        )
    if not jax.tree.leaves(variables.get("batch_stats")):
        raise ValueError(
            'fold_batch_norm: variables have no "batch_stats", only '
            f"{sorted(variables)}: a model without batch normalization has nothing to "
            "fold. Pass the running statistics with the parameters."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables)):
        raise TypeError(
            "fold_batch_norm: variables are traced; expected arrays. Call it outside "
            "jit, grad and vmap, once, and the result inside."
        )


def _report(rewriter: Rewriter, before: Variables) -> Report:
    """Return what became of every layer that has statistics."""
    rows = list(rewriter.layers)
    if not rows:
        raise ValueError(
            "fold_batch_norm: apply_fn scales no value by the running statistics, and "
            "so there is nothing to fold. Is it in training mode? Expected the outputs "
            "in inference: model.apply(variables, x, train=False), or "
            "use_running_average=True."
        )
    seen = {row.path for row in rows}
    for path in before.layers(frozenset(range(len(before.paths)))):
        name = "/".join(path)
        if name not in seen:
            unused = "its statistics scale nothing"
            reason = rewriter.elsewhere.get(path, unused)
            rows.append(Layer(name, False, reason=reason))
    return Report(rows)
