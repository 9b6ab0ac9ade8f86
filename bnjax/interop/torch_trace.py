"""The layers of a linen model in the order of their calls."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

OUT_OF, INTO = "bnjax: out of ", "bnjax: into "
_LINEAR = (nn.Conv, nn.ConvTranspose, nn.Dense)


@dataclasses.dataclass(frozen=True)
class Call:
    """A layer as it was called.

    Args:
        path: of the layer in the variables, "conv1/bn".
        kind: "conv", "transposed" for ConvTranspose, "swapped" for ConvTranspose with
            transpose_kernel, "other".
        channels: of the feature map that reaches it flattened; None: none does.
        follows: the path of the convolution or dense layer whose output, as it is, it
            and nothing else was called with; None: there is none.
    """

    path: str
    kind: str = "other"
    channels: int | None = None
    follows: str | None = None


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
        [Call(path='dense1', kind='other', channels=16, follows=None)]
    """
    calls: dict[str, Call] = {}
    outputs: dict[int, Any] = {}  # by identity, and kept so that it lasts
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
            calls[path] = Call(
                path, kind, _flattened(channels, shape[1]) if flat else None
            )
        if inputs and id(inputs[0]) in outputs and not isinstance(module, _LINEAR):
            inputs = (checkpoint_name(inputs[0], INTO + path), *inputs[1:])
        output = call(*inputs, **options)
        convolved |= kind != "other"
        if isinstance(module, _LINEAR):
            output = checkpoint_name(output, OUT_OF + path)
            outputs[id(output)] = output
        if isinstance(module, nn.Dense) and flat:
            channels = None
        elif convolved and len(_shape((output,))) > 2:
            channels = output.shape[-1]
        return output

    with nn.intercept_methods(record):
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        jaxpr = jax.make_jaxpr(lambda *a: model.init_with_output(keys, *a, **kwargs))(
            *args
        )
    for path, follows in _sole_uses(jaxpr):
        calls[path] = dataclasses.replace(calls[path], follows=follows)
    return tuple(calls.values())


def _sole_uses(jaxpr: Any) -> Iterator[tuple[str, str]]:
    """Yield the layers that alone use what another gives, and that other."""
    for inner in _jaxprs(jaxpr):
        named = [eqn for eqn in inner.eqns if eqn.primitive.name == "name"]
        given = {
            eqn.outvars[0]: eqn.params["name"].removeprefix(OUT_OF)
            for eqn in named
            if eqn.params["name"].startswith(OUT_OF)
        }
        used = [*inner.outvars, *(each for eqn in inner.eqns for each in eqn.invars)]
        uses = collections.Counter(id(each) for each in used)
        for eqn in named:
            name, (value,) = eqn.params["name"], eqn.invars
            if name.startswith(INTO) and uses[id(value)] == 1 and value in given:
                yield name.removeprefix(INTO), given[value]


def _jaxprs(value: Any) -> Iterator[Any]:
    """Yield every program within a program, itself too."""
    if isinstance(value, tuple | list):
        for each in value:
            yield from _jaxprs(each)
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
        yield value
        for eqn in value.eqns:
            yield from _jaxprs(list(eqn.params.values()))


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
