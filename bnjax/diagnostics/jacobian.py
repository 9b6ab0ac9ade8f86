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
    """Return a layer's first argument, with the running statistics.

    The model is called as `model(images, train=False)`; the layer is the path of a
    module, such as "dense_1". `layer_block` has an example.
    """
    return _inputs(model, variables, images, {})(layer)


def layer_block(
    model: nn.Module, variables: Any, images: jax.Array, start: str, end: str
) -> Callable[[jax.Array], jax.Array]:
    """Return the part of a network from the input of one layer to that of another.

    The statistics are the running ones, so that each example goes its own way.

    Args:
        model: called as `model(images, train=False)`.
        variables: of the model.
        images: one example or more, of the shape the model takes; only the first is
            used, and of it nothing that reaches `end` by way of `start` alone.
        start: path of a module, such as "dense_1".
        end: path of one that is called later.

    Returns:
        A function of one example's input of `start`, without the axis of the batch,
        that gives the input of `end`, likewise.

    Example:
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
        function: of one input, of any shape, such as `layer_block` gives.
        inputs: shape (examples, ...).

    Returns:
        Shape (examples, min(outputs, inputs)), falling.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnjax.diagnostics import singular_values
        >>> scale = jnp.array([3.0, 0.5])
        >>> print(singular_values(lambda z: scale * z**2, jnp.array([[1.0, 2.0]])))
        [[6. 2.]]

    References:
        Ioffe and Szegedy 2015, section 3.3.
    """

    def jacobian(z: jax.Array) -> jax.Array:
        flat = jax.jacrev(lambda v: function(v.reshape(z.shape)).reshape(-1))
        return flat(z.reshape(-1))

    return jnp.linalg.svdvals(jax.vmap(jacobian)(inputs))


def _inputs(
    model: nn.Module, variables: Any, images: jax.Array, replaced: dict[str, jax.Array]
) -> Callable[[str], jax.Array]:
    """Run the model, with some layers' inputs replaced; return who reads the inputs."""
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
                f"no module of {type(model).__name__} is called {layer!r}."
                f"{did_you_mean(layer, inputs)} Expected one of: {', '.join(inputs)}."
            )
        return inputs[layer]

    return read
