"""A program without batch normalization, computed while it is rewritten.

The equations are gone through in order. What only scales, shifts or rearranges a value
is held back until another kind of equation needs the value: what was held back then
goes into the kernel and bias of the linear layer that it follows, or that it precedes,
or becomes a subtraction, multiplication and addition of constants.
"""

from collections.abc import Sequence
from typing import Any

import jax

from bnjax.folding import constants
from bnjax.folding.constants import Constant, NotNumeric
from bnjax.folding.emit import Emitter
from bnjax.folding.linear import Linear, Refused
from bnjax.folding.program import Atom, Equation, Program
from bnjax.folding.report import Layer
from bnjax.folding.steps import Computed, Held, Site, Step, composed
from bnjax.folding.stores import Store
from bnjax.folding.variables import Path, Variables


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
        self._emit = Emitter(variables, store, dtype)

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
            reason = f"it follows `{name}`, whose kernel is no parameter"
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
        array = self._emit.taken(value.base.array, before)
        array = self._emit.taken(array, [step for step in steps if step.is_move])
        return Site(linear, array, kernel, absorbed, tuple(self._layers(steps)))

    def _array(self, value: Constant | Held, after: str) -> Any:
        """Compute a value, taking the steps that were held back."""
        if isinstance(value, Constant):
            return self._emit.constant(value)
        base, steps = value.base, value.steps
        first, end = self._span(steps)
        if isinstance(base, Site):
            if base.layers:
                end = max(end, self._bias_end(base, steps))
            return self._emit.taken(self._linear(base, steps[:end]), steps[end:])
        if first is None:
            return self._emit.taken(base.array, steps)
        array = self._emit.taken(base.array, steps[:first])
        layers = self._layers(steps)
        for path in layers:
            reason = f"{base.reason}; {after}"
            self.layers.append(Layer("/".join(path), False, reason=reason))
        array = self._emit.affine(array, steps[first:end], ("params", *layers[0]))
        return self._emit.taken(array, steps[end:])

    def _linear(self, site: Site, steps: Sequence[Step]) -> jax.Array:
        """Compute a linear layer with the steps that go into it."""
        layers = [*site.layers, *self._layers(steps)]
        if not layers:
            return self._emit.taken(self._emit.linear(site), steps)
        array, path = self._emit.folded(site, steps)
        for layer in layers:
            into, operation = "/".join(path[1:]), site.linear.operation
            self.layers.append(Layer("/".join(layer), True, into, operation))
        return array

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
