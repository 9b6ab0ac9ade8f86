"""What of a program depends on its variables alone, computed in float64 on the host.

A value is kept compact: as wide as the array it stands for, or 1, along each axis. A
bias that is broadcast to a batch stays one vector, whatever the size of the batch.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from bnjax.folding.program import Equation


class NotNumeric(Exception):  # noqa: N818 (asked and answered within the package)
    """The value cannot be had on the host, or not in a compact form."""


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "copy": np.asarray,
    "copy_p": np.asarray,
    "div": np.divide,
    "exp": np.exp,
    "log": np.log,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that depends on no input, only on variables and literals.

    Attributes:
        aval: shape and dtype in the program.
        leaves: which variables it depends on, by their index.
        known: the array or scalar, of a variable or literal.
        equation: what computes it else.
        operands: the constants that `equation` is applied to.
        index: which of its outputs.
    """

    aval: Any
    leaves: frozenset[int] = frozenset()
    known: Any = None
    equation: Equation | None = None
    operands: tuple["Constant", ...] = ()
    index: int = 0

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The compact value; float64 for what floats, else as it is.

        Raises:
            NotNumeric: it is random, traced, or has no compact form.
        """
        if self.equation is None:
            return _on_host(self.known)
        return _evaluate(self.equation, self.operands, self.index)

    @functools.cached_property
    def origin(self) -> "tuple[int, tuple[Equation, ...]] | None":
        """The variable it is a rearrangement of, and the steps from there to it."""
        if self.equation is None:
            return (min(self.leaves), ()) if self.leaves else None
        before = self.operands[0].origin if len(self.operands) == 1 else None
        if before is None or not is_rearrangement(self.equation):
            return None
        return before[0], (*before[1], self.equation)


def is_move(equation: Equation) -> bool:
    """Whether it only reshapes, transposes or changes the floating dtype."""
    if equation.name in {"reshape", "squeeze", "transpose", "copy", "copy_p"}:
        return len(equation.inputs) == 1
    source, target = (side[0].aval for side in (equation.inputs, equation.outputs))
    if equation.name == "convert_element_type":
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (source, target))
    if equation.name == "broadcast_in_dim":
        dims = equation.params["broadcast_dimensions"]
        kept = dict(zip(dims, source.shape, strict=True))
        return len(equation.inputs) == 1 and all(
            size == kept.get(dim, 1) for dim, size in enumerate(target.shape)
        )
    return False


def is_rearrangement(equation: Equation) -> bool:
    """Whether the same numbers come out, each once."""
    return equation.name == "rev" or is_move(equation)


def forward(equation: Equation, value: np.ndarray) -> np.ndarray:
    """What a rearrangement makes of a compact value of its input."""
    source, target = equation.inputs[0].aval.shape, equation.outputs[0].aval.shape
    if equation.name == "transpose":
        return value.transpose(equation.params["permutation"])
    if equation.name == "rev":
        return np.flip(value, equation.params["dimensions"])
    return _reshape(value, source, target)


def backward(equation: Equation, value: np.ndarray) -> np.ndarray:
    """The compact value of its input that a rearrangement makes `value` of."""
    source, target = equation.inputs[0].aval.shape, equation.outputs[0].aval.shape
    if equation.name == "transpose":
        return value.transpose(np.argsort(equation.params["permutation"]))
    if equation.name == "rev":
        return np.flip(value, equation.params["dimensions"])
    return _reshape(value, target, source)


def of_rank(value: np.ndarray, rank: int) -> np.ndarray:
    """`value` with leading axes of 1, up to a rank."""
    return value.reshape((1,) * (rank - value.ndim) + value.shape)


def _reshape(value: np.ndarray, source: Sequence, target: Sequence) -> np.ndarray:
    """Reshape a compact value: axes it is 1 along stay so where they stay together."""
    wide: list[Any] = []
    new: list[Any] = []
    for axes, targets in _groups(tuple(source), tuple(target)):
        constant = all(value.shape[axis] == 1 for axis in axes)
        wide += [1 if constant else source[axis] for axis in axes]
        new += [1 if constant else target[axis] for axis in targets]
    if not all(isinstance(size, int) for size in (*wide, *new)):
        raise NotNumeric("it differs along an axis of unknown size")
    return np.broadcast_to(value, wide).reshape(new)


def _groups(source: tuple, target: tuple) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of axes of one shape that hold as much as runs of the other."""
    groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        axes = [i] if i < len(source) else []
        targets = [j] if j < len(target) else []
        i, j = i + len(axes), j + len(targets)
        while True:
            left = math.prod(source[axis] for axis in axes)
            right = math.prod(target[axis] for axis in targets)
            if left == right:
                break
            try:
                smaller = left < right
            except Exception as error:
                raise NotNumeric("a reshape of axes of unknown size") from error
            if (i if smaller else j) == len(source if smaller else target):
                raise NotNumeric("a reshape of nothing")
            if smaller:
                axes.append(i)
                i += 1
            else:
                targets.append(j)
                j += 1
        groups.append((axes, targets))
    return groups


def _on_host(known: Any) -> np.ndarray:
    if isinstance(known, jax.core.Tracer):
        raise NotNumeric("it is traced")
    if isinstance(known, jax.Array) and jnp.issubdtype(
        known.dtype, jax.dtypes.extended
    ):
        raise NotNumeric("it is a random key")
    return _widened(np.asarray(known))


def _widened(value: np.ndarray) -> np.ndarray:
    # Not np.floating: bfloat16 is none of NumPy's.
    floats = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(np.float64) if floats else value


def _evaluate(
    equation: Equation, operands: tuple[Constant, ...], index: int
) -> np.ndarray:
    values = [operand.value for operand in operands]
    aval = equation.outputs[index].aval
    floats = all(value.dtype == np.float64 for value in values)
    if floats and equation.name in ELEMENTWISE:
        with np.errstate(all="ignore"):
            return np.asarray(ELEMENTWISE[equation.name](*values))
    if floats and equation.name == "integer_pow":
        return values[0] ** equation.params["y"]
    if equation.name == "broadcast_in_dim" and len(values) == 1:
        shape = [1] * len(aval.shape)
        dims = equation.params["broadcast_dimensions"]
        for dim, size in zip(dims, values[0].shape, strict=True):
            shape[dim] = size
        return values[0].reshape(shape)
    if len(values) == 1 and is_rearrangement(equation):
        return forward(equation, values[0])
    return _in_own_dtype(equation, operands, values)[index]


def _in_own_dtype(
    equation: Equation, operands: tuple[Constant, ...], values: list[np.ndarray]
) -> list[np.ndarray]:
    """Any other primitive, as JAX computes it."""
    with jax.ensure_compile_time_eval():
        arrays = []
        for operand, value in zip(operands, values, strict=True):
            shape, dtype = operand.aval.shape, operand.aval.dtype
            if not all(isinstance(size, int) for size in shape):
                raise NotNumeric("it has an axis of unknown size")
            arrays.append(jnp.asarray(np.broadcast_to(value, shape), dtype))
        return [_on_host(found) for found in equation.bind(*arrays)]
