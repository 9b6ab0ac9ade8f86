"""Equations held back while a program is rewritten, and what they come to together."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bnjax.folding import constants
from bnjax.folding.constants import Constant, NotNumeric
from bnjax.folding.linear import Linear
from bnjax.folding.program import Equation
from bnjax.folding.variables import Path


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """An equation that rearranges one value, negates it, scales or shifts it.

    Attributes:
        equation: such as `reshape` or `mul`.
        constant: what it scales or shifts by, if it does.
        side: which operand the value is.
    """

    equation: Equation
    constant: Constant | None = None
    side: int = 0

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The compact value of the constant, of the rank of the output."""
        if self.constant is None:
            raise NotNumeric("no constant")
        rank = len(self.equation.outputs[0].aval.shape)
        return constants.of_rank(self.constant.value, rank)

    @property
    def is_move(self) -> bool:
        """Whether it rearranges."""
        return constants.is_move(self.equation)

    @property
    def is_affine(self) -> bool:
        """Whether it scales or shifts by something that can be had on the host."""
        name, side = self.equation.name, self.side
        if name not in ("add", "add_any", "sub", "mul") and (name, side) != ("div", 0):
            return False
        before = self.equation.inputs[side].aval.shape
        if before != self.equation.outputs[0].aval.shape:
            return False
        try:
            return self.value.dtype == np.float64
        except NotNumeric:
            return False

    def after(
        self, factor: np.ndarray, shift: np.ndarray, value: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Factor and shift after this one by `value`, from those before it."""
        name = self.equation.name
        if name == "mul":
            return factor * value, shift * value
        if name == "div":
            return factor / value, shift / value
        if name == "sub" and self.side == 1:
            return -factor, value - shift
        return factor, shift - value if name == "sub" else shift + value


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A linear layer that is not yet computed.

    Attributes:
        linear: the layer.
        data: what it is applied to.
        kernel: its kernel.
        absorbed: kernel and bias where a layer before it went into them.
        layers: the paths of those that did.
    """

    linear: Linear
    data: jax.Array
    kernel: Constant
    absorbed: tuple[np.ndarray, np.ndarray] | None = None
    layers: tuple[Path, ...] = ()

    def fits(self, steps: Sequence[Step], step: Step) -> bool:
        """Whether the step, after others, is one of the layer's channels."""
        try:
            return self.linear.fits(_before(steps, step.value))
        except NotNumeric:
            return False


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """A computed value, and why no layer before it can take what follows."""

    array: Any
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A value that depends on the inputs, with the steps still to be taken."""

    base: Site | Computed
    steps: tuple[Step, ...] = ()

    def then(self, step: Step) -> "Held":
        """The value after one more step."""
        return Held(self.base, (*self.steps, step))

    @property
    def is_computed(self) -> bool:
        """Whether nothing is left to do."""
        return isinstance(self.base, Computed) and not self.steps


def composed(steps: Sequence[Step]) -> tuple[np.ndarray, np.ndarray]:
    """Factor and shift of the steps together, compact, as of their output.

    Raises:
        NotNumeric: a rearrangement cannot be followed.
    """
    rank = len(steps[0].equation.inputs[steps[0].side].aval.shape)
    factor, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    for step in steps:
        if step.is_move:
            factor = constants.forward(step.equation, factor)
            shift = constants.forward(step.equation, shift)
        elif step.constant is None:
            factor, shift = -factor, -shift
        else:
            factor, shift = step.after(factor, shift, step.value)
    return factor, shift


def pulled_back(steps: Sequence[Step], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factor and shift of the steps together, compact, as of their input."""
    factor, shift = np.ones((1,) * rank), np.zeros((1,) * rank)
    for i, step in enumerate(steps):
        if step.is_move:
            continue
        if step.constant is None:
            factor, shift = -factor, -shift
        else:
            value = _before(steps[:i], step.value)
            factor, shift = step.after(factor, shift, value)
    return factor, shift


def _before(steps: Sequence[Step], value: np.ndarray) -> np.ndarray:
    """The compact value that the rearrangements among the steps make `value` of."""
    for step in reversed(steps):
        if step.is_move:
            value = constants.backward(step.equation, value)
    return value
