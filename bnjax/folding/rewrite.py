"""A program without batch normalization, computed while it is rewritten.

The equations are gone through in order. What only scales, shifts or rearranges a value
is held back until another kind of equation needs the value: what was held back then
goes into the kernel and bias of the linear layer that it follows, or that it precedes,
or becomes one multiplication and addition.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.folding import constants
from bnjax.folding.constants import Constant, NotNumeric
from bnjax.folding.linear import Linear, Refused
from bnjax.folding.program import Atom, Equation, Program
from bnjax.folding.steps import (
    Computed,
    Held,
    Path,
    Site,
    Step,
    composed,
    pulled_back,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """What became of one application of a batch normalization.

    Attributes:
        path: of the layer, as in the variables.
        folded: whether it is gone.
        into: the path of the kernel it went into; empty if it did not.
        operation: what that kernel does, such as "convolution".
        reason: why it could not be folded; empty if it was.
    """

    path: str
    folded: bool
    into: str = ""
    operation: str = ""
    reason: str = ""


class Store(Protocol):
    """Where the rewritten program has its arrays from."""

    def leaf(self, index: int) -> jax.Array:
        """Return a variable as it is."""
        ...

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Return an array that folding makes; `path` is where it belongs."""
        ...


@dataclasses.dataclass(frozen=True)
class Variables:
    """The variables of the model before folding.

    Attributes:
        paths: of each leaf, the collection first.
        values: of each leaf.
    """

    paths: tuple[Path, ...]
    values: tuple[Any, ...]

    def layers(self, leaves: frozenset[int]) -> list[Path]:
        """Return the layers that statistics among these leaves belong to."""
        found = (self.paths[leaf] for leaf in sorted(leaves))
        return list(dict.fromkeys(p[1:-1] for p in found if p[0] == "batch_stats"))

    def parents(self, constant: Constant) -> list[Path]:
        """Return the layers whose variables a constant depends on."""
        return [self.paths[leaf][1:-1] for leaf in sorted(constant.leaves)]

    def belongs(self, constant: Constant, layers: Sequence[Path]) -> bool:
        """Whether a constant depends on variables, and on those of `layers` alone."""
        found = self.parents(constant)
        return bool(found) and all(path in layers for path in found)


class Rewriter:
    """Computes a program without its batch normalizations.

    Args:
        program: traced; its first inputs are the variables.
        variables: the values the constants are computed from.
        store: where the new program has its arrays from.
        dtype: of the products of linear layers; None for their own.
    """

    def __init__(
        self, program: Program, variables: Variables, store: Store, dtype: Any
    ) -> None:
        self.layers: list[Layer] = []
        self.elsewhere: dict[Path, str] = {}
        self._program = program
        self._variables = variables
        self._store = store
        self._dtype = dtype
        self._computed: dict[Equation, list[Any]] = {}

    def run(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Compute the outputs of the program, noting what became of each layer."""
        program, values = self._program, self._variables.values
        env: dict[Atom, Constant | Held] = {
            atom: Constant(atom.aval, known=value)
            for atom, value in program.literals.items()
        }
        own, given = program.inputs[: len(values)], program.inputs[len(values) :]
        for i, (atom, value) in enumerate(zip(own, values, strict=True)):
            env[atom] = Constant(atom.aval, frozenset({i}), value)
        for atom, array in zip(given, inputs, strict=True):
            env[atom] = Held(Computed(array, "it normalizes an input of the model"))
        for equation in program.equations:
            results = self._apply(equation, [env[atom] for atom in equation.inputs])
            for atom, result in zip(equation.outputs, results, strict=True):
                env[atom] = self._shared(result, program.uses[atom])
        return [
            self._array(env[atom], "it gives an output of the model")
            for atom in program.outputs
        ]

    def _apply(
        self, equation: Equation, operands: list[Constant | Held]
    ) -> Sequence[Constant | Held]:
        fixed = tuple(value for value in operands if isinstance(value, Constant))
        if len(fixed) == len(operands) and not equation.source.effects:
            leaves = frozenset().union(*(value.leaves for value in fixed))
            return [
                Constant(atom.aval, leaves, None, equation, fixed, i)
                for i, atom in enumerate(equation.outputs)
            ]
        held = self._held_back(equation, operands)
        if held is not None:
            return [held]
        name = equation.name
        for value in fixed:
            self._note(value, f"its statistics are an operand of `{name}`")
        arrays = [self._array(value, f"`{name}` follows") for value in operands]
        reason = f"it follows `{name}`, not a linear layer"
        if name in ("conv_general_dilated", "dot_general"):
            reason = f"it follows `{name}`, whose kernel is not constant"
        return [Held(Computed(array, reason)) for array in equation.bind(*arrays)]

    def _held_back(
        self, equation: Equation, operands: list[Constant | Held]
    ) -> Held | None:
        """Return the result of an equation that need not be computed yet."""
        held = [i for i, value in enumerate(operands) if isinstance(value, Held)]
        if len(held) != 1 or len(operands) > 2:
            return None
        (side,) = held
        value = operands[side]
        assert isinstance(value, Held)  # noqa: S101 (for the type checker)
        if len(operands) == 1:
            simple = constants.is_move(equation) or equation.name == "neg"
            return value.then(Step(equation)) if simple else None
        other = operands[1 - side]
        if not isinstance(other, Constant):
            return None
        linear = Linear.of(equation, 1 - side) if other.leaves else None
        if linear is not None:
            return Held(self._site(linear, value, other))
        step = Step(equation, other, side)
        if not step.is_affine:
            return None
        if isinstance(value.base, Site) and not value.base.fits(value.steps, step):
            reason = "its constants differ from one position to another"
            value = Held(Computed(self._array(value, reason), reason))
        return value.then(step)

    def _shared(self, value: Constant | Held, uses: int) -> Constant | Held:
        """Compute at once what is needed more than once."""
        if uses < 2 or isinstance(value, Constant) or value.is_computed:
            return value
        after = f"what it gives is used {uses} times"
        reason = f"what it is applied to is used {uses} times"
        return Held(Computed(self._array(value, after), reason))

    def _site(self, linear: Linear, value: Held, kernel: Constant) -> Site:
        """Return a linear layer that takes what was held back of its input, if it can.

        What a linear layer before it can take is left to that one.
        """
        self._note(kernel, f"its statistics are in the kernel of a {linear.operation}")
        first, _ = self._span(value.steps)
        if isinstance(value.base, Site) or first is None:
            array = self._array(value, f"a {linear.operation} follows")
            return Site(linear, array, kernel)
        before, steps = value.steps[:first], value.steps[first:]
        try:
            factor, shift = composed(steps)
            absorbed = linear.absorb_input(kernel.value, factor, shift)
        except (Refused, NotNumeric) as refused:
            return Site(linear, self._array(value, str(refused)), kernel)
        array = self._taken(value.base.array, before)
        array = self._taken(array, [step for step in steps if step.is_move])
        return Site(linear, array, kernel, absorbed, tuple(self._layers(steps)))

    def _array(self, value: Constant | Held, after: str) -> Any:
        """Compute a value, taking the steps that were held back."""
        if isinstance(value, Constant):
            return self._constant(value)
        base, steps = value.base, value.steps
        first, end = self._span(steps)
        if isinstance(base, Site):
            if base.layers:
                end = max(end, self._bias_end(base, steps))
            return self._taken(self._linear(base, steps[:end]), steps[end:])
        if first is None:
            return self._taken(base.array, steps)
        array = self._taken(base.array, steps[:first])
        for path in self._layers(steps):
            reason = f"{base.reason}; {after}"
            self.layers.append(Layer("/".join(path), False, reason=reason))
        return self._taken(self._affine(array, steps[first:end]), steps[end:])

    def _linear(self, site: Site, steps: Sequence[Step]) -> jax.Array:
        """Compute a linear layer with the steps that go into it."""
        linear = site.linear
        layers = [*site.layers, *self._layers(steps)]
        if not layers:
            return self._taken(self._product(site, self._constant(site.kernel)), steps)
        output = linear.equation.outputs[0].aval

        @functools.cache
        def folded() -> tuple[np.ndarray, np.ndarray]:
            factor, shift = pulled_back(steps, len(output.shape))
            kernel, bias = site.absorbed or (site.kernel.value, np.zeros(()))
            bias = bias * linear.as_bias(factor) + linear.as_bias(shift)
            return linear.scale_output(kernel, factor), bias

        kernel, path, dtype = self._kernel(site.kernel, lambda: folded()[0])
        bias = self._store.new((*path[:-1], "bias"), dtype, lambda: folded()[1])
        for layer in layers:
            into = "/".join(path[1:])
            self.layers.append(Layer("/".join(layer), True, into, linear.operation))
        array = _wide(self._product(site, kernel))
        shape = linear.expand(bias.shape, array.ndim)
        array = array + bias.reshape(shape).astype(array.dtype)
        moves = [step for step in steps if step.is_move and not _is_cast(step.equation)]
        last = steps[-1].equation.outputs[0].aval if steps else output
        return self._taken(array, moves).astype(last.dtype)

    def _kernel(
        self, kernel: Constant, make: Callable[[], np.ndarray]
    ) -> tuple[jax.Array, Path, Any]:
        """Return the folded kernel, its path, and the dtype of the one it replaces.

        It is kept in the form of the variable that it replaces, if it is of one only.
        """
        leaf, moves = kernel.origin or (min(kernel.leaves), ())
        path, dtype = self._variables.paths[leaf], self._variables.values[leaf].dtype
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

    def _affine(self, array: jax.Array, steps: Sequence[Step]) -> jax.Array:
        """Compute steps of batch normalization by one multiplication and addition."""
        factor, shift = composed(steps)
        path = ("params", *self._layers(steps)[0])
        array = self._taken(array, [step for step in steps if step.is_move])
        wide = _wide(array)
        operands = []
        for name, value in (("scale", factor), ("bias", shift)):
            make = functools.partial(_without_ones, value)
            kept = self._store.new((*path, name), wide.dtype, make)
            ones = (1,) * (wide.ndim - kept.ndim)
            operands.append(kept.reshape(ones + kept.shape).astype(wide.dtype))
        return (wide * operands[0] + operands[1]).astype(array.dtype)

    def _taken(self, array: Any, steps: Sequence[Step]) -> Any:
        """Take steps as they were written."""
        for step in steps:
            operands = [array]
            if step.constant is not None:
                operands.insert(1 - step.side, self._constant(step.constant))
            (array,) = step.equation.bind(*operands)
        return array

    def _constant(self, constant: Constant) -> Any:
        """Compute a constant from the variables of the new program."""
        equation = constant.equation
        if equation is None:
            if not constant.leaves:
                return constant.known
            found = self._store.leaf(min(constant.leaves))
            same = found.dtype == constant.aval.dtype
            return found if same else found.astype(constant.aval.dtype)
        if equation not in self._computed:
            operands = [self._constant(operand) for operand in constant.operands]
            self._computed[equation] = equation.bind(*operands)
        return self._computed[equation][constant.index]

    def _layers(self, steps: Sequence[Step]) -> list[Path]:
        leaves = (step.constant.leaves for step in steps if step.constant is not None)
        return self._variables.layers(frozenset().union(*leaves))

    def _span(self, steps: Sequence[Step]) -> tuple[int | None, int]:
        """Return where the steps by statistics start and end, if some of them scale.

        The parameters of the same layers, which come after, belong to them.
        """
        ours = [i for i, step in enumerate(steps) if self._layers([step])]
        if not any(steps[i].equation.name in ("mul", "div") for i in ours):
            return None, 0
        end = ours[-1] + 1
        layers = self._layers(steps)
        for i, step in enumerate(steps[end:], end):
            if step.constant is not None:
                if not self._variables.belongs(step.constant, layers):
                    break
                end = i + 1
        return ours[0], end

    def _bias_end(self, site: Site, steps: Sequence[Step]) -> int:
        """Return where the layer's own bias has been added, if that comes first."""
        for i, step in enumerate(steps):
            if step.constant is not None:
                added = step.equation.name in ("add", "add_any")
                layer = self._variables.parents(site.kernel)
                own = self._variables.belongs(step.constant, layer)
                return i + 1 if added and own else 0
        return 0

    def _note(self, constant: Constant, where: str) -> None:
        for path in self._variables.layers(constant.leaves):
            self.elsewhere.setdefault(path, where)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _is_cast(equation: Equation) -> bool:
    return equation.name == "convert_element_type"


def _without_ones(value: np.ndarray) -> np.ndarray:
    """Drop the leading axes of 1."""
    first = next((i for i, size in enumerate(value.shape) if size > 1), value.ndim - 1)
    return value.reshape(value.shape[first:])
