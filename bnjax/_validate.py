"""Checks of arguments, and the error messages for arguments that are not accepted."""

import contextlib
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Axes = int | Sequence[int]
Activation = str | Callable[[jax.Array], jax.Array]

ACTIVATIONS = (
    "celu",
    "elu",
    "gelu",
    "hard_sigmoid",
    "hard_silu",
    "hard_swish",
    "hard_tanh",
    "identity",
    "leaky_relu",
    "log_sigmoid",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_sign",
    "softplus",
    "sparse_plus",
    "sparse_sigmoid",
    "squareplus",
    "swish",
    "tanh",
)
_REAL = ("float16", "bfloat16", "float32", "float64")
_COMPLEX = ("complex64", "complex128")


def did_you_mean(given: str, choices: Iterable[str]) -> str:
    """Return a sentence with the choice closest to `given`, or an empty string.

    Examples:
        >>> did_you_mean("mnits", ["digits", "mnist"])
        " Did you mean 'mnist'?"
        >>> did_you_mean("xyz", ["digits", "mnist"])
        ''
    """
    near = difflib.get_close_matches(given, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def as_input(x, name: str = "x") -> jax.Array:
    """`x` as an array, or an error if batch norm does not support its dtype."""
    return _of_dtype(jnp.asarray(x), name, (*_REAL, *_COMPLEX))


def _of_dtype(array: jax.Array, name: str, dtypes: Sequence[str]) -> jax.Array:
    if array.dtype.name not in dtypes:
        raise TypeError(
            f"batch_norm: {name} has dtype {array.dtype.name}; expected one of "
            f"{', '.join(dtypes)}. Convert it first, e.g. {name}.astype(jnp.float32)."
        )
    return array


def as_dtype(dtype, default) -> jnp.dtype:
    """The output's dtype, or an error if batch norm does not support it."""
    dtype = jnp.dtype(default if dtype is None else dtype)
    if dtype.name not in (*_REAL, *_COMPLEX):
        raise TypeError(
            f"batch_norm: dtype={dtype.name}; expected a dtype that the output can "
            f"have: {', '.join((*_REAL, *_COMPLEX))}."
        )
    return dtype


def promoted(*dtypes) -> jnp.dtype:
    """The dtype that holds all of them, even if promotion is an error for the user."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def split_axes(shape: tuple[int, ...], axis: Axes) -> tuple[tuple[int, ...], ...]:
    """Sorted, non-negative feature axes and reduction axes of an input."""
    ndim = len(shape)
    given = axis if isinstance(axis, Iterable) else (axis,)
    try:
        indices = [operator.index(a) for a in given]
    except TypeError:
        raise TypeError(
            f"batch_norm: axis={axis!r}; expected an int or a sequence of ints."
        ) from None
    bad = [a for a in indices if not -ndim <= a < ndim]
    if bad:
        raise ValueError(
            f"batch_norm: axis={axis!r} is out of range for x of shape {shape}; "
            f"expected values from {-ndim} to {ndim - 1}."
        )
    features = tuple(sorted(a % ndim for a in indices))
    if len(set(features)) < len(features) or not features:
        raise ValueError(
            f"batch_norm: axis={axis!r} for x of shape {shape}; expected distinct "
            "feature axes, at least one."
        )
    return features, tuple(a for a in range(ndim) if a not in features)


def check_groups(virtual_batch_size: int, shape: tuple[int, ...], axis: Axes) -> None:
    """Refuse virtual batches that do not divide the first axis."""
    if 0 not in split_axes(shape, axis)[1]:
        raise ValueError(
            f"batch_norm: axis={axis!r} makes the first axis of x a feature axis; "
            "expected the examples along it, which virtual_batch_size groups."
        )
    if virtual_batch_size < 1 or shape[0] % virtual_batch_size:
        raise ValueError(
            f"batch_norm: virtual_batch_size={virtual_batch_size} for a batch of "
            f"{shape[0]} examples; expected a divisor of that number."
        )


def check_batch(
    shape: tuple[int, ...], axis: Axes, axes: tuple[int, ...], axis_name: Any
) -> None:
    """Refuse an input without values to take statistics over.

    Args:
        shape: of the input.
        axis: the feature axes as they were given.
        axes: of the reduction. There are none for one example per device, whose
            statistics are those of the devices.
        axis_name: of the devices that share statistics, or None.
    """
    if 0 in shape:
        raise ValueError(
            f"batch_norm: x of shape {shape} is empty; statistics need at least one "
            "value per channel. Drop empty batches before the call."
        )
    if axes or axis_name is not None:
        return
    if len(shape) < 2:
        raise ValueError(
            f"batch_norm: x has shape {shape}; expected at least 2 dimensions, a batch "
            "and features, such as (batch, features) or (batch, height, width, "
            "channels); or axis_name, where each device has one example."
        )
    raise ValueError(
        f"batch_norm: axis={axis!r} for x of shape {shape}; expected feature axes that "
        "leave at least one axis to take the statistics over, or axis_name."
    )


def check_features(
    value, name: str, features: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Refuse a per-channel array whose shape is not that of the feature axes."""
    if value is not None and jnp.shape(value) != features:
        raise ValueError(
            f"batch_norm: {name} has shape {jnp.shape(value)}; expected {features}, "
            f"the feature axes of x of shape {shape}. Check `axis` and the number of "
            "features."
        )


def as_mask(mask, shape: tuple[int, ...]) -> jax.Array | None:
    """The mask as a constant of the input's rank, or an error if it does not fit."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.integer):
        _of_dtype(mask, "mask", _REAL)
    pairs = list(zip(mask.shape, shape, strict=False))
    if mask.ndim != len(shape) or any(m not in (1, n) for m, n in pairs):
        # The leading dimensions of x that the mask has already: of examples, of steps.
        known = mask.shape if mask.shape == shape[: mask.ndim] else shape[:1]
        of = "example" if len(known) < 2 else "position"
        like = known + (1,) * (len(shape) - len(known))
        use = f": use mask.reshape({like})." if mask.size == math.prod(like) else "."
        raise ValueError(
            f"batch_norm: mask has shape {mask.shape}; expected the rank of x, each "
            f"dimension 1 or that of x, whose shape is {shape}. A mask of one entry "
            f"per {of} has shape {like}{use}"
        )
    return jax.lax.stop_gradient(mask)


def broadcast_mask(mask, shape: tuple[int, ...]):
    """A mask of lower rank with the rank of the input, by the rule of NumPy and Flax.

    A mask that could also hold one entry per example is returned unchanged, for
    `as_mask` to refuse.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    missing = len(shape) - mask.ndim
    leading = zip(mask.shape, shape, strict=False)
    per_example = mask.size > 1 and all(m in (1, n) for m, n in leading)
    trailing = zip(mask.shape, shape[max(missing, 0) :], strict=False)
    if missing <= 0 or per_example or any(m not in (1, n) for m, n in trailing):
        return mask
    return mask.reshape((1,) * missing + mask.shape)


def check_residual(residual, shape: tuple[int, ...]) -> jax.Array | None:
    """The residual as an array of the input's shape."""
    if residual is None:
        return None
    residual = as_input(residual, "residual")
    if residual.shape != shape:
        raise ValueError(
            f"batch_norm: residual has shape {residual.shape}; expected {shape}, the "
            "shape of x."
        )
    return residual


def check_number(
    value, name: str, accept: Callable[[np.ndarray], np.ndarray], expected: str
) -> None:
    """Check a number if its value is known; traced values are not checked."""
    if isinstance(value, jax.core.Tracer):
        return
    try:
        # Not as float(value), which reads numbers from strings.
        number = np.asarray(value).astype(np.float64, casting="same_kind")
    except (TypeError, ValueError):
        raise TypeError(
            f"batch_norm: {name}={value!r} is not a number; expected {expected}."
        ) from None
    if not np.all(accept(number)):
        raise ValueError(f"batch_norm: {name}={value}; expected {expected}.")


def check_momentum(momentum) -> None:
    """Refuse a momentum outside [0, 1]."""
    check_number(
        momentum,
        "momentum",
        lambda m: (m >= 0) & (m <= 1),
        "a number in [0, 1], the weight of the old value (PyTorch's 0.1 is 0.9 here)",
    )


def check_epsilon(epsilon) -> None:
    """Refuse an epsilon that is not positive and finite."""
    check_number(
        epsilon,
        "epsilon",
        lambda e: (e > 0) & (e < math.inf),
        "a positive number, such as 1e-5",
    )


def check_flags(**flags) -> None:
    """Refuse traced values for flags that choose a branch in Python."""
    for name, value in flags.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(
                f"batch_norm: {name} is a traced value; expected a Python bool, "
                "because it chooses which program is compiled. Pass it through "
                "static_argnames of jax.jit, or bind it with functools.partial."
            )


def as_activation(activation: Activation | None) -> Callable | None:
    """The elementwise function, given as such or by its name."""
    if activation is None or activation == "identity":
        return None
    if callable(activation):
        return activation
    if activation in ACTIVATIONS:
        return getattr(jax.nn, activation)
    hint = did_you_mean(str(activation), ACTIVATIONS)
    raise ValueError(
        f"batch_norm: activation={activation!r} is unknown.{hint} Expected an "
        f"elementwise function or one of {', '.join(ACTIVATIONS)}."
    )


def layer_name(path: Iterable) -> str:
    """Return the path of a layer in its model as a name, such as "block/bn"."""
    return "/".join(map(str, path)) or "(top level)"


@contextlib.contextmanager
def naming(layer: str):
    """Name the layer in errors of the functional core."""
    try:
        yield
    except (TypeError, ValueError, NameError, NotImplementedError) as error:
        message = str(error)
        if message.startswith("batch_norm: "):
            error.args = (message.replace("batch_norm", layer, 1),)
        raise


def first_line(error: BaseException) -> str:
    r"""Return the first line of another library's error message.

    Examples:
        >>> first_line(ValueError("no such file\n\nTraceback: ..."))
        'no such file'
        >>> first_line(EOFError())
        'EOFError'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
