"""Arrays of the new program: products, and what stays beside them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.folding import constants
from bnjax.folding.constants import Constant
from bnjax.folding.program import Equation
from bnjax.folding.steps import Site, Step, composed, pulled_back
from bnjax.folding.stores import Store
from bnjax.folding.variables import Path, Variables


class Emitter:
    """Computes with the variables of the new program.

    Args:
        variables: those before folding.
        store: where the new program has its arrays from.
        dtype: of the products of linear layers; None for their own.
    """

    def __init__(self, variables: Variables, store: Store, dtype: Any) -> None:
        self._variables = variables
        self._store = store
        self._dtype = dtype
        self._computed: dict[Equation, list[Any]] = {}

    def taken(self, array: Any, steps: Sequence[Step]) -> Any:
        """Take steps as they were written."""
        for step in steps:
            operands = [array]
            if step.constant is not None:
                operands.insert(1 - step.side, self.constant(step.constant))
            (array,) = step.equation.bind(*operands)
        return array

    def constant(self, constant: Constant) -> Any:
        """Compute a constant from the variables of the new program."""
        equation = constant.equation
        if equation is None:
            if not constant.leaves:
                return constant.known
            found = self._store.leaf(min(constant.leaves))
            same = found.dtype == constant.aval.dtype
            return found if same else found.astype(constant.aval.dtype)
        if equation not in self._computed:
            operands = [self.constant(operand) for operand in constant.operands]
            self._computed[equation] = equation.bind(*operands)
        return self._computed[equation][constant.index]

    def linear(self, site: Site) -> jax.Array:
        """Compute a linear layer as it was written."""
        return self._product(site, self.constant(site.kernel))

    def folded(self, site: Site, steps: Sequence[Step]) -> tuple[jax.Array, Path]:
        """Compute a linear layer that takes the steps in; return its kernel's path too.

        The bias is added in float32 or wider, before the output is rounded.
        """
        linear = site.linear
        output = linear.equation.outputs[0].aval

        @functools.cache
        def made() -> tuple[np.ndarray, np.ndarray]:
            factor, shift = pulled_back(steps, len(output.shape))
            kernel, bias = site.absorbed or (site.kernel.value, np.zeros(()))
            bias = bias * linear.as_bias(factor) + linear.as_bias(shift)
            return linear.scale_output(kernel, factor), bias

        kernel, path, dtype = self._kernel(site.kernel, lambda: made()[0])
        bias = self._store.new((*path[:-1], "bias"), dtype, lambda: made()[1])
        array = _wide(self._product(site, kernel))
        shape = linear.expand(bias.shape, array.ndim)
        array = array + bias.reshape(shape).astype(array.dtype)
        moves = [step for step in steps if step.is_move and not _is_cast(step.equation)]
        last = steps[-1].equation.outputs[0].aval if steps else output
        return self.taken(array, moves).astype(last.dtype), path

    def affine(self, array: jax.Array, steps: Sequence[Step], path: Path) -> jax.Array:
        """Compute steps as (x - mean) * scale + bias, of variables at `path`.

        The mean is there for what one multiplication and addition would lose to
        rounding where it is large beside the spread.
        """
        array = self.taken(array, [step for step in steps if step.is_move])
        wide = _wide(array)

        @functools.cache
        def made() -> dict[str, np.ndarray]:
            scale, shift = np.broadcast_arrays(*composed(steps))
            with np.errstate(all="ignore"):
                mean = (-shift / scale).astype(wide.dtype).astype(np.float64)
            mean = np.where(np.isfinite(mean), mean, 0)
            return {"mean": mean, "scale": scale, "bias": shift + scale * mean}

        def kept(name: str) -> jax.Array:
            value = self._store.new(
                (*path, name), wide.dtype, lambda: _without_ones(made()[name])
            )
            ones = (1,) * (wide.ndim - value.ndim)
            return value.reshape(ones + value.shape).astype(wide.dtype)

        wide = (wide - kept("mean")) * kept("scale") + kept("bias")
        return wide.astype(array.dtype)

    def _product(self, site: Site, kernel: jax.Array) -> jax.Array:
        equation = site.linear.equation
        operands = [site.data, kernel] if site.linear.kernel else [kernel, site.data]
        if self._dtype is None:
            avals = (atom.aval for atom in equation.inputs)
            cast = [a.astype(v.dtype) for a, v in zip(operands, avals, strict=True)]
            return equation.bind(*cast)[0]
        dtype = equation.outputs[0].aval.dtype
        # Not every platform has convolutions of one dtype that give another.
        preferred = dtype if equation.name == "dot_general" else None
        cast = [operand.astype(self._dtype) for operand in operands]
        return equation.bind(*cast, preferred_element_type=preferred)[0].astype(dtype)

    def _kernel(
        self, kernel: Constant, make: Callable[[], np.ndarray]
    ) -> tuple[jax.Array, Path, Any]:
        """Return the folded kernel, its path and its dtype.

        It is kept in the form of the variable that it replaces, if it is of one only.
        """
        leaf, moves = kernel.origin or (self._variables.first(kernel), ())
        path = self._variables.paths[leaf]
        dtype = self._dtype or self._variables.values[leaf].dtype
        if kernel.origin is None:
            path = (*path[:-1], "folded_kernel")

        def kept() -> np.ndarray:
            value = make()
            for move in reversed(moves):
                value = constants.backward(move, value)
            return value

        array = self._store.new(path, dtype, kept)
        for move in moves:
            if not _is_cast(move):
                (array,) = move.bind(array)
        return array, path, dtype


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _is_cast(equation: Equation) -> bool:
    return equation.name == "convert_element_type"


def _without_ones(value: np.ndarray) -> np.ndarray:
    """Drop the leading axes of 1."""
    first = next((i for i, size in enumerate(value.shape) if size > 1), value.ndim - 1)
    return value.reshape(value.shape[first:])
