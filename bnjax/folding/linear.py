"""How a factor or shift of what goes in or out of a layer moves to its kernel."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from bnjax.folding.program import Equation


class Refused(Exception):  # noqa: N818 (asked and answered within the package)
    """The factor or shift cannot move; the message says why."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """A convolution or matrix product of data and a kernel.

    Attributes:
        equation: `conv_general_dilated` or `dot_general`.
        kernel: which operand the kernel is.
        channels: axis of the kernel by axis of the output, of those they share.
    """

    equation: Equation
    kernel: int
    channels: dict[int, int]

    @classmethod
    def of(cls, equation: Equation, kernel: int) -> "Linear | None":
        """Describe an equation that is linear in the operand that is not the kernel."""
        if equation.name == "conv_general_dilated" and kernel == 1:
            numbers = equation.params["dimension_numbers"]
            return cls(equation, 1, {numbers.out_spec[1]: numbers.rhs_spec[0]})
        if equation.name != "dot_general":
            return None
        contracting, batch = equation.params["dimension_numbers"]
        free = [
            [axis for axis in range(len(atom.aval.shape)) if axis not in summed + own]
            for atom, summed, own in zip(
                equation.inputs, map(list, contracting), map(list, batch), strict=True
            )
        ]
        first = len(batch[0]) + (len(free[0]) if kernel == 1 else 0)
        channels = dict(enumerate(batch[kernel]))
        channels |= {first + i: axis for i, axis in enumerate(free[kernel])}
        return cls(equation, kernel, channels)

    @property
    def data(self) -> int:
        """Which operand the data are."""
        return 1 - self.kernel

    @property
    def operation(self) -> str:
        """What to call it."""
        return "convolution" if self._is_conv else "matrix product"

    @property
    def _is_conv(self) -> bool:
        return self.equation.name == "conv_general_dilated"

    @functools.cached_property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of a bias: the axes that kernel and output share, as in the output."""
        shape = self.equation.outputs[0].aval.shape
        return tuple(shape[axis] for axis in sorted(self.channels))

    def fits(self, value: np.ndarray) -> bool:
        """Whether a compact value of the output is the same at all positions."""
        return all(
            size == 1 or axis in self.channels for axis, size in enumerate(value.shape)
        )

    def as_bias(self, value: np.ndarray) -> np.ndarray:
        """A compact value of the output that `fits`, as a bias."""
        axes = tuple(a for a in range(value.ndim) if a not in self.channels)
        return np.broadcast_to(value.squeeze(axes), self.bias_shape)

    def expand(self, shape: Sequence[int], rank: int) -> tuple[int, ...]:
        """The shape of a bias that broadcasts to the output."""
        sizes = dict(zip(sorted(self.channels), shape, strict=True))
        return tuple(sizes.get(axis, 1) for axis in range(rank))

    def scale_output(self, kernel: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """The kernel whose output is that of `kernel` times a factor that fits."""
        axes = [self.channels[axis] for axis in sorted(self.channels)]
        return kernel * _spread(self.as_bias(factor), axes, kernel.ndim)

    def absorb_input(
        self, kernel: np.ndarray, factor: np.ndarray, shift: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Kernel and bias that give for x what `kernel` gives for factor * x + shift.

        Raises:
            Refused: the factor differs between positions, or not every output sees the
                shift through all of its kernel.
        """
        if np.any(shift) and not self._sees_all:
            raise Refused(
                "the convolution after it reads zeros beside the map, to which BN's "
                "shift, not 0, is not added"
            )
        by = self._in_kernel(factor, kernel.shape)
        added = kernel * self._in_kernel(shift, kernel.shape)
        kept = [self.channels[axis] for axis in sorted(self.channels)]
        summed = tuple(axis for axis in range(kernel.ndim) if axis not in kept)
        order = np.argsort(np.argsort(kept))
        return kernel * by, added.sum(summed).transpose(order)

    @property
    def _sees_all(self) -> bool:
        """Whether each output is a sum over all of the kernel, of true inputs alone."""
        if not self._is_conv:
            return True
        params = self.equation.params
        padded = any(low > 0 or high > 0 for low, high in params["padding"])
        return not padded and all(step == 1 for step in params["lhs_dilation"])

    def _in_kernel(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """A compact value of the data as one of the kernel's rank."""
        if self._is_conv:
            return self._in_filters(value, shape)
        contracting, batch = self.equation.params["dimension_numbers"]
        pairs = list(zip(contracting[self.data], contracting[self.kernel], strict=True))
        pairs += zip(batch[self.data], batch[self.kernel], strict=True)
        _check_axes(value, [axis for axis, _ in pairs])
        pairs.sort()
        return _spread(_only(value, pairs), [axis for _, axis in pairs], len(shape))

    def _in_filters(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        params = self.equation.params
        if params["batch_group_count"] != 1:
            raise Refused("the convolution after it takes groups of the batch")
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        channel = numbers.lhs_spec[1]
        _check_axes(value, [channel])
        channels = self.equation.inputs[0].aval.shape[channel]
        axes = (numbers.rhs_spec[0], numbers.rhs_spec[1])
        each = np.broadcast_to(value.reshape(-1), (channels,)).reshape(groups, -1)
        each = np.repeat(each, shape[axes[0]] // groups, axis=0)
        return _spread(each, axes, len(shape))


def _check_axes(value: np.ndarray, allowed: Sequence[int]) -> None:
    if any(size > 1 for axis, size in enumerate(value.shape) if axis not in allowed):
        raise Refused("its constants differ from one position to another")


def _only(value: np.ndarray, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    return value.reshape([value.shape[axis] for axis, _ in pairs])


def _spread(value: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """`value` with its axes at `axes` of an array of that rank, and 1 elsewhere."""
    shape = [1] * rank
    for axis, size in zip(axes, value.shape, strict=True):
        shape[axis] = size
    return value.transpose(np.argsort(axes)).reshape(shape)
