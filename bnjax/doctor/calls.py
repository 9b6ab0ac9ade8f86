"""Record the calls of a network's layers while it is traced or run.

The model itself does not change: in linen an interceptor sees each call, in nnx the
layers of a copy have a derived class. Marks in the program show the order of the calls:
`checkpoint_name` of the input and of the output of each call.
"""

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

import bnjax.linen
import bnjax.nnx
from bnjax import _validate
from bnjax._validate import layer_name

MARK = "bnjax.doctor"
_PATH = "doctor_path"
# The layers whose calls are recorded, and the argument that sets their mode.
_FLAGS: dict[type, str] = {
    nn.BatchNorm: "use_running_average",
    nnx.BatchNorm: "use_running_average",
    nn.Dropout: "deterministic",
    nnx.Dropout: "deterministic",
}
# Usual names of the argument that selects training, and its value in training.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "eval": False,
    "deterministic": False,
    "use_running_average": False,
}


@dataclasses.dataclass(frozen=True)
class NormCall:
    """One call of a batch norm layer.

    Attributes:
        path: the path of the layer.
        frozen: whether the layer normalizes by its running statistics.
        values: the number of values of each channel that are normalized together.
        examples: the largest number of values in the batch that are independent.
        dtype: the dtype of the input.
        epsilon: the layer's epsilon; None if it is traced.
        momentum: the layer's momentum; None if it is traced.
        plain: whether the output is an affine map of the normalized input.
        sum_epsilon: the relative error of a sum about zero; 0 if the layer sums about
            a number close to the mean.
    """

    path: str
    frozen: bool
    values: int
    examples: int
    dtype: Any
    epsilon: float | None
    momentum: float | None
    plain: bool
    sum_epsilon: float

    @classmethod
    def of(cls, layer: Any, path: str, args: Any, kwargs: Any) -> "NormCall":
        """Return the call of `layer` with these arguments."""
        x = jnp.asarray(args[0] if args else kwargs["x"])
        features, reduced = _validate.split_axes(x.shape, layer.axis)
        values = math.prod(x.shape[axis] for axis in reduced)
        examples = values if 0 in features else min(x.shape[0], values)
        group = getattr(layer, "virtual_batch_size", None)
        if group is not None and 0 not in features:
            values = values // x.shape[0] * min(group, x.shape[0])
        ours = isinstance(layer, bnjax.linen.BatchNorm | bnjax.nnx.BatchNorm)
        about_zero = layer.use_fast_variance and not ours
        wide = x.dtype
        if getattr(layer, "force_float32_reductions", True):
            wide = _validate.promoted(x.dtype, jnp.float32)
        activation = getattr(layer, "activation", None)
        return cls(
            path,
            frozen=bool(_flag(layer, args, kwargs)),
            values=values,
            examples=examples,
            dtype=x.dtype,
            epsilon=_number(layer.epsilon),
            momentum=_number(layer.momentum),
            plain=activation in (None, "identity") and kwargs.get("residual") is None,
            sum_epsilon=4 * float(jnp.finfo(wide).eps) if about_zero else 0.0,
        )


@dataclasses.dataclass(frozen=True)
class DropoutCall:
    """One call of a Dropout layer that drops values."""

    path: str
    rate: float


def _number(value: Any) -> float | None:
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _flag(layer: Any, args: Any, kwargs: Any) -> Any:
    name = next(flag for kind, flag in _FLAGS.items() if isinstance(layer, kind))
    given = args[1] if len(args) > 1 else kwargs.get(name)
    return getattr(layer, name) if given is None else given


class Observer:
    """Records and marks the calls of batch norm and Dropout layers.

    A layer normalizes by its running statistics if the requested call fails, or if the
    call is one of evaluation.
    """

    kinds = tuple(_FLAGS)

    def __init__(self, *, training: bool) -> None:
        self.calls: list[NormCall | DropoutCall] = []
        self._training = training
        self._inside = False

    def call(
        self, layer: Any, path: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a layer on behalf of the caller."""
        dropout = isinstance(layer, nn.Dropout | nnx.Dropout)
        idle = dropout and (
            layer.rate == 0 or _flag(layer, args, kwargs) in (None, True)
        )
        if self._inside or idle:
            return call(*args, **kwargs)
        number = len(self.calls)
        name = None if args else "inputs" if dropout else "x"
        x = kwargs[name] if name else args[0]
        if dropout:
            self.calls.append(DropoutCall(path, _number(layer.rate) or 0.0))
            if not self._training:
                return x
            return mark(call(*args, **kwargs), number, "out")
        noted = NormCall.of(layer, path, args, kwargs)
        self.calls.append(noted)
        x = mark(jnp.asarray(x), number, "in")
        args, kwargs = (args, {**kwargs, name: x}) if name else ((x, *args[1:]), kwargs)
        if noted.frozen or (self._training and noted.values > 1):
            return mark(call(*args, **kwargs), number, "out")
        self._inside = True
        try:
            return mark(_frozen(layer, call, x, kwargs), number, "out")
        finally:
            self._inside = False


def mark(x: Any, number: int, end: str) -> Any:
    """Mark `x` in the program as the input or output of the call with this number."""
    return checkpoint_name(x, f"{MARK}/{number}/{end}")


def _frozen(layer: Any, call: Any, x: Any, kwargs: Any) -> Any:
    """Return the output of a layer that normalizes by its running statistics."""
    modes = ("x", "use_running_average", "update_stats")
    keep = {name: value for name, value in kwargs.items() if name not in modes}
    if isinstance(layer, nnx.BatchNorm):
        return call(x, use_running_average=True, **keep)
    alone = layer.clone(parent=None, name=None, use_running_average=True)
    return alone.apply(layer.variables, x, **keep)


class NonFiniteFinder:
    """Stops at the first module whose input or output is not finite."""

    kinds = (nn.Module, nnx.Module)

    def __init__(self) -> None:
        self.found: tuple[str, str] | None = None

    def call(
        self, layer: Any, path: str, call: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Call a module on behalf of the caller."""
        del layer
        if not self.found and not all_finite((args, kwargs)):
            self.found = path, "input"
        y = call(*args, **kwargs)
        if not self.found and not all_finite(y):
            self.found = path, "output"
        return y


def all_finite(tree: Any) -> bool:
    """Whether every floating number is finite; traced arrays are not checked."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
    return all(
        bool(np.isfinite(np.asarray(leaf)).all())
        for leaf in arrays
        if not isinstance(leaf, jax.core.Tracer)
        and jnp.issubdtype(leaf.dtype, jnp.inexact)
    )


_observer: contextvars.ContextVar[Any] = contextvars.ContextVar("observer")


@contextlib.contextmanager
def observing(observer: Observer | NonFiniteFinder) -> Iterator[None]:
    """Show the calls of linen modules and of `observed` nnx models to the observer."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        own = context.method_name == "__call__" and isinstance(layer, observer.kinds)
        if not own:
            return call(*args, **kwargs)
        path = layer_name(layer.path)
        return observer.call(layer, path, call, args, kwargs)

    token = _observer.set(observer)
    try:
        with nn.intercept_methods(intercept):
            yield
    finally:
        _observer.reset(token)


def observed(model: nnx.Module) -> nnx.Module:
    """Return the nnx model with modules that an observer sees."""
    for path, module in nnx.iter_modules(model):
        if callable(module) and isinstance(module, _observer.get().kinds):
            setattr(module, _PATH, layer_name(path))
            module.__class__ = _observed_class(type(module))
    return model


@functools.cache
def _observed_class(kind: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        plain, observer = functools.partial(kind.__call__, self), _observer.get(None)
        if observer is None:
            return plain(*args, **kwargs)
        return observer.call(self, getattr(self, _PATH), plain, args, kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def linen_call(module: nn.Module, *, training: bool) -> Callable[[Any, Any], Any]:
    """Return `call(variables, batch)` of a linen module, in training or evaluation.

    A module without an argument for its mode is called without one.
    """
    known = inspect.signature(module.__call__).parameters
    mode: dict[str, Any] = {n: v is training for n, v in _MODES.items() if n in known}
    # Flax refuses a flag that the constructor got as well.
    mode = {n: v for n, v in mode.items() if getattr(module, n, None) is None}

    def call(variables: Any, batch: Any) -> Any:
        mutable = sorted({"batch_stats", *variables} - {"params"})
        rngs = {"dropout": jax.random.key(0)}
        return module.apply(variables, batch, mutable=mutable, rngs=rngs, **mode)

    return call


def host(leaf: Any) -> np.ndarray:
    """Return the array on the host, floating numbers as float64."""
    value = np.asarray(leaf)
    floats = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(np.float64) if floats else value
