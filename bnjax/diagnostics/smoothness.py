"""The smoothness of the loss along its gradient, and internal covariate shift."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bnjax._validate import did_you_mean, promoted
from bnjax.diagnostics._network import join_params, param_names, split_params

LossFn = Callable[[Any, Any], jax.Array]


class Smoothness(NamedTuple):
    """The loss and its gradient along the direction of steepest descent.

    Attributes:
        loss: the loss at the parameters w, shape ().
        gradient_norm: the norm of the gradient g at w, over all parameters, shape ().
        losses: the losses at w - step_size * g, shape (step_sizes,).
        changes: the norms of the gradients there minus g, shape (step_sizes,).
        betas: the changes divided by the distance from w, shape (step_sizes,); NaN if g
            is zero.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    losses: jax.Array
    changes: jax.Array
    betas: jax.Array

    @property
    def loss_range(self) -> jax.Array:
        """The lowest and the highest loss, shape (2,)."""
        return _range(self.losses)

    @property
    def gradient_predictiveness(self) -> jax.Array:
        """The smallest and the largest change, shape (2,)."""
        return _range(self.changes)

    @property
    def beta(self) -> jax.Array:
        """The effective beta, the largest of `betas`, shape ()."""
        return jnp.max(self.betas, axis=-1)


class CovariateShift(NamedTuple):
    """The effect of an update of the layers below on the gradient of each layer.

    Attributes:
        gradient_norm: the norm of the layer's gradient G before the step, shape
            (layers,).
        norm: the norm of the difference between G and G', the gradient on the same
            batch after the step of the layers below, shape (layers,).
        cosine: the cosine of the angle between G and G', shape (layers,); NaN if one of
            them is zero.
    """

    gradient_norm: jax.Array
    norm: jax.Array
    cosine: jax.Array

    @property
    def relative(self) -> jax.Array:
        """The norm divided by the norm of the gradient, shape (layers,)."""
        return self.norm / self.gradient_norm


def _range(values: jax.Array) -> jax.Array:
    return jnp.stack([jnp.min(values, axis=-1), jnp.max(values, axis=-1)], axis=-1)


def loss_smoothness(
    loss_fn: LossFn, variables: Any, batch: Any, step_sizes: Any
) -> Smoothness:
    r"""Return how the loss and its gradient change along the gradient.

    $$
    L(w - \eta g), \quad \lVert \nabla L(w - \eta g) - g \rVert_2, \quad
    \frac{\lVert \nabla L(w - \eta g) - g \rVert_2}{\eta \lVert g \rVert_2}, \quad
    g = \nabla L(w)
    $$

    The largest value of the last expression over the step sizes is the effective
    $\beta$. It says how smooth the loss is near $w$, and is at most the $\beta$ of a
    $\beta$-smooth loss. Norms are float32, or float64 for float64 parameters. The
    function computes one gradient for each step size, and one at $w$.

    Args:
        loss_fn: `loss_fn(variables, batch)`, which returns a scalar, with BN as in a
            training step. New running statistics are ignored. It is compiled once for
            each function object: define it outside of a loop.
        variables: the variables of a linen network, with "params", or an nnx.Module.
            The function changes neither the variables nor the random streams: dropout
            is the same at each point.
        batch: the batch for `loss_fn`.
        step_sizes: positive learning rates of plain gradient descent, shape
            (step_sizes,). Santurkar et al. use half to four times the learning rate of
            training, `learning_rate * np.geomspace(0.5, 4, 8)`.

    Returns:
        The losses and the changes of the gradient at each step size.

    Raises:
        TypeError: if the variables are of another kind, or the loss is not a scalar.
        ValueError: if the step sizes have another shape, or are not positive.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.diagnostics import loss_smoothness
        >>> def loss_fn(variables, curvature):
        ...     return 0.5 * jnp.sum(curvature * variables["params"] ** 2)
        >>> variables = {"params": jnp.array([0.0, 2.0])}
        >>> curvature = jnp.array([1.0, 3.0])
        >>> found = loss_smoothness(loss_fn, variables, curvature, [0.25, 0.5])
        >>> print(found.loss, found.losses, found.beta)
        6.0 [0.375 1.5  ] 3.0

    References:
        Santurkar et al. (2018), "How Does Batch Normalization Help Optimization?",
        section 3 and Figure 4.
    """
    structure, params, rest = split_params(variables, "loss_smoothness")
    sizes = jnp.asarray(step_sizes, jnp.result_type(float))
    if sizes.ndim != 1 or not sizes.size:
        raise ValueError(
            f"loss_smoothness: step_sizes of shape {sizes.shape}; expected shape (n,), "
            "n at least 1, such as learning_rate * np.geomspace(0.5, 4, 8)."
        )
    if not isinstance(sizes, jax.core.Tracer) and not (np.asarray(sizes) > 0).all():
        raise ValueError(
            f"loss_smoothness: step_sizes={np.asarray(sizes).tolist()}; expected "
            "positive numbers, such as learning_rate * np.geomspace(0.5, 4, 8)."
        )
    still = jax.tree.map(jnp.zeros_like, params), jnp.zeros_like(sizes[0])
    loss, gradient = _downhill(loss_fn, structure, params, *still, rest, batch)
    everything = [True] * len(jax.tree.leaves(params))
    losses, compared = [], []
    for size in sizes:
        step = gradient, size
        moved_loss, moved = _downhill(loss_fn, structure, params, *step, rest, batch)
        losses.append(moved_loss)
        compared.append(_compare(gradient, moved, everything))
    (norm, *_), changes, _ = map(jnp.stack, zip(*compared, strict=True))
    betas = changes / (sizes.astype(norm.dtype) * norm)
    return Smoothness(loss, norm, jnp.stack(losses), changes, betas)


def covariate_shift(
    loss_fn: LossFn,
    variables: Any,
    new_params: Any,
    batch: Any,
    layers: Sequence[str | Sequence[str]],
) -> CovariateShift:
    r"""Return the internal covariate shift of each layer in one step.

    $$
    G_i &= \nabla_{W_i} L(W_1, \dots, W_k) \\
    G'_i &= \nabla_{W_i} L(W'_1, \dots, W'_{i-1}, W_i, \dots, W_k)
    $$

    $W'$ are the parameters after the step. The shift of layer $i$ is the norm of
    $G_i - G'_i$ and the cosine of the angle between the two. There is no layer below
    the first, so its norm is 0. Norms are float32, or float64 for float64 parameters.
    The function computes one gradient for each layer.

    Args:
        loss_fn: the loss, as in `loss_smoothness`.
        variables: the variables before the step, as in `loss_smoothness`.
        new_params: the parameters after the step of any optimizer: the collection
            "params" of linen, or `nnx.state(model, nnx.Param)`.
        batch: the batch for `loss_fn`; in the definition, the batch of the step.
        layers: the layers from the input to the output. Each is the path of a module or
            of a parameter, such as "dense_0" or "block/conv", or a tuple of paths that
            form one layer, such as ("dense_0", "bn_0"). Each parameter belongs to one
            layer. For parallel branches, an earlier branch counts as below a later one.

    Returns:
        The norms and cosines for each layer.

    Raises:
        TypeError: if the variables are of another kind, or the loss is not a scalar.
        ValueError: if the new parameters have another tree or other shapes, if a layer
            does not exist, or if a parameter is in no layer or in two.

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.diagnostics import covariate_shift
        >>> def loss_fn(variables, x):
        ...     params = variables["params"]
        ...     return 0.5 * (params["second"] * params["first"] * x) ** 2
        >>> variables = {"params": {"first": jnp.array(1.0), "second": jnp.array(2.0)}}
        >>> stepped = {"first": jnp.array(0.5), "second": jnp.array(1.75)}
        >>> found = covariate_shift(
        ...     loss_fn, variables, stepped, 1.0, ["first", "second"]
        ... )
        >>> print(found.gradient_norm, found.norm, found.cosine)
        [4. 2.] [0.  1.5] [1. 1.]

    References:
        Santurkar et al. (2018), Definition 2.1 and Figure 2.
    """
    structure, params, rest = split_params(variables, "covariate_shift")
    numbers = _number_layers(param_names(params), layers)
    stepped = _like(params, new_params)

    def gradient_below(layer: int) -> Any:
        return _stepped_below(
            loss_fn, structure, numbers, params, stepped, layer, rest, batch
        )

    before, found = gradient_below(0), []
    for layer in range(len(layers)):
        after = gradient_below(layer) if layer else before
        own = [number == layer for number in numbers]
        found.append(_compare(before, after, own))
    return CovariateShift(*map(jnp.stack, zip(*found, strict=True)))


# The same program computes the gradient at w and the other gradients, so that their
# rounding is equal. lax.map is slow on a CPU: https://github.com/jax-ml/jax/issues/12868.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _downhill(
    loss_fn: LossFn,
    structure: Any,
    params: Any,
    direction: Any,
    size: jax.Array,
    rest: Any,
    batch: Any,
) -> tuple[jax.Array, Any]:
    """Return the loss and its gradient after a step of `size` against `direction`."""

    def step(p: jax.Array, d: jax.Array) -> jax.Array:
        return (_wide(p) - size.astype(_wide(p).dtype) * _wide(d)).astype(p.dtype)

    moved = jax.tree.map(step, params, direction)
    return _value_and_grad(loss_fn, structure, moved, rest, batch)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _stepped_below(
    loss_fn: LossFn,
    structure: Any,
    numbers: tuple[int, ...],
    params: Any,
    new_params: Any,
    layer: int,
    rest: Any,
    batch: Any,
) -> Any:
    """Return the gradient after the step of the layers below `layer`."""
    old, tree = jax.tree.flatten(params)
    below = [number < layer for number in numbers]
    mixed = map(jnp.where, below, jax.tree.leaves(new_params), old)
    moved = jax.tree.unflatten(tree, mixed)
    return _value_and_grad(loss_fn, structure, moved, rest, batch)[1]


def _value_and_grad(
    loss_fn: LossFn, structure: Any, params: Any, rest: Any, batch: Any
) -> tuple[jax.Array, Any]:
    def of_params(params: Any) -> jax.Array:
        loss = loss_fn(join_params(structure, params, rest), batch)
        if not jax.tree_util.all_leaves([loss]) or jnp.shape(loss):
            raise TypeError(
                f"loss_fn returned shapes {jax.tree.map(jnp.shape, loss)}; expected a "
                "scalar, of shape (). Take the mean over the examples, and return only "
                "the loss, without values such as the updated batch_stats."
            )
        return loss

    return jax.value_and_grad(of_params)(params)


@jax.jit
def _compare(
    gradient: Any, other: Any, chosen: Sequence[bool]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the norm, the norm of the difference and the cosine of chosen leaves."""
    pairs = [
        [
            jnp.where(own, _wide(leaf), 0)
            for own, leaf in zip(chosen, leaves, strict=True)
        ]
        for leaves in map(jax.tree.leaves, (gradient, other))
    ]
    norm, other_norm = (jnp.sqrt(_dot(leaves, leaves)) for leaves in pairs)
    difference = list(map(jnp.subtract, *pairs))
    cosine = _dot(*pairs) / (norm * other_norm)
    return norm, jnp.sqrt(_dot(difference, difference)), cosine


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(promoted(leaf.dtype, jnp.float32))


def _dot(leaves: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    parts = [jnp.sum(a * b) for a, b in zip(leaves, others, strict=True)]
    return functools.reduce(jnp.add, parts)


def _like(params: Any, new_params: Any) -> Any:
    """Return the new parameters in the tree and dtypes of the old, or raise."""
    old, new = (
        dict(zip(param_names(tree), jax.tree.leaves(tree), strict=True))
        for tree in (params, new_params)
    )
    shapes = [{n: jnp.shape(leaf) for n, leaf in each.items()} for each in (old, new)]
    if shapes[0] != shapes[1]:
        differ = [n for n in {**old, **new} if shapes[0].get(n) != shapes[1].get(n)]
        given, expected = ({n: s[n] for n in differ if n in s} for s in shapes[::-1])
        raise ValueError(
            f"covariate_shift: new_params has {given or 'nothing'} where variables has "
            f"{expected or 'nothing'}; expected the same paths and shapes. Pass the "
            "parameters alone: updated['params'], or nnx.state(model, nnx.Param)."
        )
    leaves = [jnp.asarray(new[name]).astype(leaf.dtype) for name, leaf in old.items()]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _number_layers(
    names: Sequence[str], layers: Sequence[str | Sequence[str]]
) -> tuple[int, ...]:
    """Return the number of the layer that each parameter belongs to."""
    if isinstance(layers, str) or not layers:
        raise ValueError(
            f"covariate_shift: layers={layers!r}; expected a list from the input to "
            f"the output, of {_listed(names)}."
        )
    found: dict[str, list[int]] = {name: [] for name in names}
    for number, layer in enumerate(layers):
        for path in (layer,) if isinstance(layer, str) else layer:
            inside = [n for n in names if n == path or n.startswith(f"{path}/")]
            if not inside:
                raise ValueError(
                    f"covariate_shift: layers has {path!r}, which has no parameter."
                    f"{did_you_mean(path, _modules(names))} Expected some of "
                    f"{_listed(names)}."
                )
            for name in inside:
                found[name].append(number)
    wrong = [name for name, numbers in found.items() if len(set(numbers)) != 1]
    if wrong:
        raise ValueError(
            f"covariate_shift: {', '.join(wrong)} belong to none of the layers, or to "
            "several; expected each parameter in one layer. Add its layer, or join it "
            "with another layer, as in layers=[('dense_0', 'bn_0'), 'logits']."
        )
    return tuple(numbers[0] for numbers in found.values())


def _modules(names: Sequence[str]) -> list[str]:
    """Return the paths of modules with parameters, and of parameters at the top."""
    return list(dict.fromkeys(name.rpartition("/")[0] or name for name in names))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(_modules(names))
