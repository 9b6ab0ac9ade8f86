"""The layers of a linen model in the order of their calls."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer as it was called.

    Args:
        path: of the layer in the variables, "conv1/bn".
        kind: "conv", "transposed" for ConvTranspose, "swapped" for ConvTranspose with
            transpose_kernel, "other".
        channels: of the feature map that reaches it flattened; None: none does.
    """

    path: str
    kind: str = "other"
    channels: int | None = None


def trace(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Call, ...]:
    """Call a linen model on shapes alone, and return its layers in order.

    Args:
        model: of any kind.
        *args: what it is called with: arrays or `jax.ShapeDtypeStruct`; the first are
            the images.
        **kwargs: likewise, such as train=False.

    Returns:
        A `Call` for each module, in the order of the first calls.

    Example:
        >>> import jax.numpy as jnp
        >>> from bnjax.models import LeNet
        >>> calls = trace(LeNet(), jnp.zeros((1, 28, 28, 1)), train=False)
        >>> [call for call in calls if call.path == "dense1"]
        [Call(path='dense1', kind='other', channels=16)]
    """
    calls: dict[str, Call] = {}
    shape = _shape(args)
    channels = shape[-1] if len(shape) > 3 else None
    convolved = channels is not None

    def record(call: Any, inputs: Any, options: Any, context: Any) -> Any:
        nonlocal channels, convolved
        module = context.module
        path, kind = "/".join(module.path), _kind(module)
        shape = _shape(inputs)
        flat = len(shape) == 2
        if context.method_name == "__call__" and path not in calls:
            flattened = _flattened(channels, shape[1]) if flat else None
            calls[path] = Call(path, kind, flattened)
        output = call(*inputs, **options)
        convolved |= kind != "other"
        if isinstance(module, nn.Dense) and flat:
            channels = None
        elif convolved and len(_shape((output,))) > 2:
            channels = output.shape[-1]
        return output

    with nn.intercept_methods(record):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jax.eval_shape(lambda *a: model.init(keys, *a, **kwargs), *args)
    return tuple(calls.values())


def _shape(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(getattr(values[0], "shape", ())) if values else ()


def _kind(module: Any) -> str:
    if isinstance(module, nn.ConvTranspose):
        return "swapped" if module.transpose_kernel else "transposed"
    return "conv" if isinstance(module, nn.Conv) else "other"


def _flattened(channels: int | None, features: int) -> int | None:
    """Return the channels if so many features can be a map of them, of over a pixel."""
    if channels is None or channels < 2 or features <= channels:
        return None
    return channels if features % channels == 0 else None
