"""The Jacobian of a part of a network, and its singular values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax._validate import did_you_mean


def layer_input(
    model: nn.Module, variables: Any, images: jax.Array, layer: str
) -> jax.Array:
    """Return the first argument of a layer in evaluation.

    `layer_block` has an example.

    Args:
        model: a model that is called as `model(images, train=False)`.
        variables: the variables of the model.
        images: the examples.
        layer: the path of a module, such as "dense_1".

    Returns:
        The input of the layer, with the running statistics below it.
    """
    return _inputs(model, variables, images, {})(layer)


def layer_block(
    model: nn.Module, variables: Any, images: jax.Array, start: str, end: str
) -> Callable[[jax.Array], jax.Array]:
    """Return the part of a network between the inputs of two layers, as a function.

    Layers normalize by their running statistics, so that examples do not affect one
    another.

    Args:
        model: a model that is called as `model(images, train=False)`.
        variables: the variables of the model.
        images: one or more examples of the model. Only the first example is used, and
            only for values that reach `end` by another way than through `start`.
        start: the path of a module, such as "dense_1".
        end: the path of a module that is called later.

    Returns:
        A function from the input of `start` to the input of `end`, both for one example
        without the batch axis.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import layer_block, layer_input
        >>> from bnjax.models import MLP
        >>> model, x = MLP((4, 3)), jnp.ones((1, 5))
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> block = layer_block(model, variables, x, "dense_1", "logits")
        >>> z = layer_input(model, variables, x, "dense_1")
        >>> jax.jacrev(block)(z[0]).shape
        (3, 4)
    """

    def block(z: jax.Array) -> jax.Array:
        read = _inputs(model, variables, images[:1], {start: z[None]})
        read(start)
        return read(end)[0]

    return block


def singular_values(
    function: Callable[[jax.Array], jax.Array], inputs: jax.Array
) -> jax.Array:
    """Return the singular values of a function's exact Jacobian at each input.

    Args:
        function: a function of one input of any shape, such as a result of
            `layer_block`.
        inputs: the inputs, shape (examples, ...).

    Returns:
        The singular values in descending order, shape
        (examples, min(outputs, inputs)).

    Examples:
        >>> import jax.numpy as jnp
        >>> from bnjax.diagnostics import singular_values
        >>> scale = jnp.array([3.0, 0.5])
        >>> print(singular_values(lambda z: scale * z**2, jnp.array([[1.0, 2.0]])))
        [[6. 2.]]

    References:
        Ioffe & Szegedy (2015), section 3.3.
    """

    def jacobian(z: jax.Array) -> jax.Array:
        flat = jax.jacrev(lambda v: function(v.reshape(z.shape)).reshape(-1))
        return flat(z.reshape(-1))

    return jnp.linalg.svdvals(jax.vmap(jacobian)(inputs))


def _inputs(
    model: nn.Module, variables: Any, images: jax.Array, replaced: dict[str, jax.Array]
) -> Callable[[str], jax.Array]:
    """Run the model with replaced layer inputs; return a function that reads inputs."""
    inputs: dict[str, Any] = {}

    def intercept(call: Any, args: Any, options: Any, context: Any) -> Any:
        path = "/".join(context.module.path)
        if context.method_name == "__call__" and args and path:
            args = (replaced.get(path, args[0]), *args[1:])
            inputs[path] = args[0]
        return call(*args, **options)

    with nn.intercept_methods(intercept):
        model.apply(variables, images, train=False)

    def read(layer: str) -> jax.Array:
        if layer not in inputs:
            raise ValueError(
                f"{type(model).__name__} has no module {layer!r}."
                f"{did_you_mean(layer, inputs)} Expected one of: {', '.join(inputs)}."
            )
        return inputs[layer]

    return read
