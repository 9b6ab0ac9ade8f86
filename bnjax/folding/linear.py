"""Linear layers, and how their kernels absorb an adjacent multiplier and shift."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bnjax.folding.program import (
    Constant,
    Equation,
    NotNumericError,
    Path,
    at_axes,
    is_move,
    rearrange,
)


@dataclasses.dataclass(frozen=True, eq=False)
class PendingOp:
    """An equation that rearranges or negates a value, or scales or shifts it.

    `constant` is the factor or the shift; `side` is the index of the operand that is
    the value.
    """

    equation: Equation
    constant: Constant | None = None
    side: int = 0

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The compact value of the constant, with the rank of the output."""
        if self.constant is None:
            raise NotNumericError("no constant")
        value = self.constant.value
        rank = len(self.equation.outputs[0].aval.shape)
        return value.reshape((1,) * (rank - value.ndim) + value.shape)

    @property
    def is_affine(self) -> bool:
        """Whether it scales or shifts by a constant that the host can compute."""
        name, side = self.equation.name, self.side
        if name not in ("add", "add_any", "sub", "mul") and (name, side) != ("div", 0):
            return False
        before = self.equation.inputs[side].aval.shape
        if before != self.equation.outputs[0].aval.shape:
            return False
        try:
            return self.value.dtype == np.float64
        except NotNumericError:
            return False

    def apply(
        self, multiplier: np.ndarray, shift: np.ndarray, value: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the multiplier and shift after this operation by `value`."""
        name = self.equation.name
        if name == "mul":
            return multiplier * value, shift * value
        if name == "div":
            return multiplier / value, shift / value
        if name == "sub" and self.side == 1:
            return -multiplier, value - shift
        return multiplier, shift - value if name == "sub" else shift + value


def compose(
    ops: Sequence[PendingOp], rank: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the compact multiplier and shift of operations, in the output's shape.

    If the rank of the input is given, both have the shape of the input instead.
    """
    at_input = rank is not None
    if rank is None:
        rank = len(ops[0].equation.inputs[ops[0].side].aval.shape)
    multiplier, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    for i, op in enumerate(ops):
        if is_move(op.equation):
            if not at_input:
                multiplier = rearrange(op.equation, multiplier)
                shift = rearrange(op.equation, shift)
        elif op.constant is None:
            multiplier, shift = -multiplier, -shift
        else:
            value = undo_moves(ops[:i], op.value) if at_input else op.value
            multiplier, shift = op.apply(multiplier, shift, value)
    return multiplier, shift


def undo_moves(ops: Sequence[PendingOp], value: np.ndarray) -> np.ndarray:
    """Return the compact value that the rearrangements in `ops` turn into `value`."""
    for op in reversed(ops):
        if is_move(op.equation):
            value = rearrange(op.equation, value, undo=True)
    return value


class NotFoldableError(Exception):
    """The layer cannot absorb the multiplier or shift; the message says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class LinearOp:
    """A convolution or matrix product of data and a kernel, not yet computed.

    Attributes:
        side: the index of the operand that is the kernel.
        channels: for each axis of the output that the kernel shares, the axis of the
            kernel.
        absorbed: the kernel and bias after absorbing the layers before it, `layers`.
    """

    equation: Equation
    side: int
    kernel: Constant
    channels: dict[int, int]
    data: Any = None
    absorbed: tuple[np.ndarray, np.ndarray] | None = None
    layers: tuple[Path, ...] = ()

    @classmethod
    def of(cls, equation: Equation, side: int, kernel: Constant) -> "LinearOp | None":
        """Describe an equation that is linear in the operand beside the kernel."""
        if equation.name == "conv_general_dilated" and side == 1:
            numbers = equation.params["dimension_numbers"]
            return cls(equation, 1, kernel, {numbers.out_spec[1]: numbers.rhs_spec[0]})
        if equation.name != "dot_general":
            return None
        contracting, batch = equation.params["dimension_numbers"]
        free = [
            [i for i in range(len(atom.aval.shape)) if i not in (*summed, *own)]
            for atom, summed, own in zip(
                equation.inputs, contracting, batch, strict=True
            )
        ]
        first = len(batch[0]) + (len(free[0]) if side == 1 else 0)
        channels = dict(enumerate(batch[side]))
        channels |= {first + i: axis for i, axis in enumerate(free[side])}
        return cls(equation, side, kernel, channels)

    @property
    def operation(self) -> str:
        """The name of the operation, for the report."""
        return "convolution" if self._is_conv else "matrix product"

    @property
    def _is_conv(self) -> bool:
        return self.equation.name == "conv_general_dilated"

    def accepts(self, ops: Sequence[PendingOp], op: PendingOp) -> bool:
        """Whether `op`, after the operations `ops`, acts on the layer's channels."""
        try:
            sizes = undo_moves(ops, op.value).shape
        except NotNumericError:
            return False
        return all(n == 1 or axis in self.channels for axis, n in enumerate(sizes))

    def bind(self, kernel: jax.Array, dtype: Any) -> jax.Array:
        """Compute the layer with a kernel; None as `dtype` keeps its own dtype."""
        equation = self.equation
        operands = [self.data, kernel] if self.side else [kernel, self.data]
        if dtype is None:
            avals = (atom.aval for atom in equation.inputs)
            cast = [a.astype(v.dtype) for a, v in zip(operands, avals, strict=True)]
            return equation.bind(*cast)[0]
        # Not every platform has convolutions whose output has another dtype.
        own = equation.outputs[0].aval.dtype
        preferred = None if self._is_conv else own
        cast = [operand.astype(dtype) for operand in operands]
        return equation.bind(*cast, preferred_element_type=preferred)[0].astype(own)

    def folded(self, ops: Sequence[PendingOp]) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and bias of the layer and accepted operations after it."""
        shape = self.equation.outputs[0].aval.shape
        positions = tuple(set(range(len(shape))) - set(self.channels))
        sizes = [shape[axis] for axis in self.channels]
        multiplier, shift = (
            np.broadcast_to(value.squeeze(positions), sizes)
            for value in compose(ops, len(shape))
        )
        kernel, bias = self.absorbed or (self.kernel.value, np.zeros(()))
        axes = list(self.channels.values())
        kernel = kernel * at_axes(multiplier, axes, kernel.ndim)
        return kernel, bias * multiplier + shift

    def add_bias(self, array: jax.Array, bias: jax.Array) -> jax.Array:
        """Add a bias to the output; it has the axes that kernel and output share."""
        sizes = dict(zip(self.channels, bias.shape, strict=True))
        shape = [sizes.get(axis, 1) for axis in range(array.ndim)]
        return array + bias.reshape(shape).astype(array.dtype)

    def absorb(
        self, multiplier: np.ndarray, shift: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the kernel and bias that map x as these map multiplier * x + shift."""
        if np.any(shift) and not self._sees_all:
            raise NotFoldableError(
                "the convolution after it pads its input with zeros, to which BN would "
                "not add its shift, which is not 0"
            )
        kernel = self.kernel.value
        added = kernel * self._in_kernel(shift, kernel.shape)
        kept = list(self.channels.values())
        summed = tuple(axis for axis in range(kernel.ndim) if axis not in kept)
        order = np.argsort(np.argsort(kept))
        kernel = kernel * self._in_kernel(multiplier, kernel.shape)
        return kernel, added.sum(summed).transpose(order)

    @property
    def _sees_all(self) -> bool:
        """Whether each output is a sum over the whole kernel, without padding."""
        if not self._is_conv:
            return True
        params = self.equation.params
        padded = any(low > 0 or high > 0 for low, high in params["padding"])
        return not padded and all(step == 1 for step in params["lhs_dilation"])

    def _in_kernel(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return a compact value of the data with the kernel's rank."""
        params = self.equation.params
        numbers = params["dimension_numbers"]
        if self._is_conv:
            pairs = [(numbers.lhs_spec[1], numbers.rhs_spec[1])]
        else:
            both = ((group[1 - self.side], group[self.side]) for group in numbers)
            pairs = sorted(pair for axes in both for pair in zip(*axes, strict=True))
        axes = [axis for axis, _ in pairs]
        if any(n > 1 for axis, n in enumerate(value.shape) if axis not in axes):
            raise NotFoldableError("its constants differ from one position to another")
        value = value.reshape([value.shape[axis] for axis in axes])
        if not self._is_conv:
            return at_axes(value, [axis for _, axis in pairs], len(shape))
        if params["batch_group_count"] != 1:
            raise NotFoldableError("the convolution after it has groups of the batch")
        # Each group of filters reads its own channels.
        groups, outputs = params["feature_group_count"], numbers.rhs_spec[0]
        channels = self.equation.inputs[0].aval.shape[axes[0]]
        each = np.broadcast_to(value, (channels,)).reshape(groups, -1)
        each = np.repeat(each, shape[outputs] // groups, axis=0)
        return at_axes(each, (outputs, numbers.rhs_spec[1]), len(shape))
