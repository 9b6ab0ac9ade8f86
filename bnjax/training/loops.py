"""Where a loop inside a compiled program costs more than it saves."""

from collections.abc import Callable
from typing import Any

import jax


def slow_in_loops(function: Callable[..., Any], *args: Any) -> bool:
    """Return whether steps of a function are better dispatched one at a time.

    On a CPU, XLA takes the gradient of a convolution many times slower inside a loop
    than outside (jax issue 12868), and a scan over training steps is a loop.

    Args:
        function: traced, not run.
        *args: arrays or their shapes.

    Example:
        >>> from flax import linen as nn
        >>> image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
        >>> slow_in_loops(nn.Dense(4).init, jax.random.key(0), image)
        False
        >>> on_cpu = jax.default_backend() == "cpu"
        >>> slow_in_loops(nn.Conv(4, (3, 3)).init, jax.random.key(0), image) == on_cpu
        True
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))
