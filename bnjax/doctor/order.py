"""The operations before a batch norm layer, read from the jaxpr of the program."""

import collections
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core

from bnjax.doctor.calls import MARK
from bnjax.folding.program import CALLS, Atom, Equation, is_move

# Primitives that call functions of their last operands, perhaps many times.
_LOOPS = {"cond", "scan", "shard_map", "while"}
_AFFINE = {"add", "add_any", "div", "mul", "sub"}


class Order:
    """The equations of a program, including the bodies of its loops.

    Args:
        closed: the jaxpr.
        paths: for each input, the path of the parameter, or None for another input.
        data: for each input, whether it belongs to the batch.
    """

    def __init__(
        self,
        closed: Any,
        paths: Sequence[str | None],
        data: Sequence[bool],
    ) -> None:
        self._producers: dict[Atom, Equation] = {}
        self._uses: collections.Counter[Atom] = collections.Counter()
        self._depends: set[Atom] = set()
        self._marks: dict[tuple[int, str], Equation] = {}
        inputs = tuple(Atom(var.aval) for var in closed.jaxpr.invars)
        self._parameters = dict(zip(inputs, paths, strict=True))
        self._depends |= {a for a, is_data in zip(inputs, data, strict=True) if is_data}
        self._uses.update(self._flatten(closed.jaxpr, inputs))

    def biases(self, call: int, features: int) -> list[str]:
        """Return the parameters that are added only to the input of a call.

        They have one value for each channel, and subtracting the mean removes them.
        """
        found = []
        for atom in self._chain(call, _AFFINE - {"div", "mul"}):
            path = self._parameters.get(self._source(atom))
            size = math.prod(self._source(atom).aval.shape)
            if path is not None and features % size == 0:
                found.append(path)
        return found

    def norm_before(self, call: int) -> int | None:
        """Return the call whose output, up to an affine map, is this call's input."""
        if (call, "in") not in self._marks:
            return None
        atom: Atom | None = self._marks[call, "in"].inputs[0]
        while atom is not None and (equation := self._producers.get(atom)):
            if (number := _mark(equation, "out")) is not None:
                return number
            atom = self._next(equation, _AFFINE)
        return None

    def calls_before(self, call: int) -> set[int]:
        """Return the calls whose output reaches this input past no recorded output."""
        found: set[int] = set()
        waiting = [self._marks[call, "in"].inputs[0]] if self._has(call) else []
        seen: set[Atom] = set()
        while waiting:
            atom = waiting.pop()
            equation = self._producers.get(atom)
            if atom in seen or equation is None:
                continue
            seen.add(atom)
            if (number := _mark(equation, "out")) is not None:
                found.add(number)
            else:
                waiting += equation.inputs
        return found

    def _has(self, call: int) -> bool:
        return (call, "in") in self._marks

    def _chain(self, call: int, names: set[str]) -> Iterator[Atom]:
        """Yield the values before the input of a call that these primitives connect.

        The chain ends at a value with more than one use.
        """
        if not self._has(call):
            return
        atom: Atom | None = self._marks[call, "in"].inputs[0]
        while atom is not None and self._uses[atom] == 1:
            equation = self._producers.get(atom)
            if equation is None:
                return
            atom = self._next(equation, names)
            if atom is not None and equation.name in names:
                yield from (each for each in equation.inputs if each is not atom)

    def _next(self, equation: Equation, names: set[str]) -> Atom | None:
        """Return the operand that depends on the batch, if it is the only one."""
        if equation.name in names:
            data = [atom for atom in equation.inputs if atom in self._depends]
            inverse = equation.name == "div" and data != [equation.inputs[0]]
            return data[0] if len(data) == 1 and not inverse else None
        own = _mark(equation, "in") is None and _mark(equation, "out") is None
        moves = is_move(equation) or (equation.name == "name" and own)
        return equation.inputs[0] if moves else None

    def _source(self, atom: Atom) -> Atom:
        """Return the value before reshapes, broadcasts and casts."""
        while equation := self._producers.get(atom):
            if not (is_move(equation) or equation.name == "broadcast_in_dim"):
                break
            atom = equation.inputs[0]
        return atom

    def _flatten(self, jaxpr: Any, inputs: Sequence[Atom]) -> tuple[Atom, ...]:
        atoms = dict(zip(jaxpr.invars, inputs, strict=True))
        atoms |= {var: Atom(var.aval) for var in jaxpr.constvars}

        def read(var: Any) -> Atom:
            return Atom(var.aval) if isinstance(var, core.Literal) else atoms[var]

        for equation in jaxpr.eqns:
            operands = tuple(read(var) for var in equation.invars)
            results = [
                self._flatten(body, operands[len(operands) - len(body.invars) :])
                for body in _bodies(equation)
            ]
            if len(results) == 1 and len(results[0]) == len(equation.outvars):
                atoms.update(zip(equation.outvars, results[0], strict=True))
                continue
            operands += tuple(atom for result in results for atom in result)
            outputs = tuple(Atom(var.aval) for var in equation.outvars)
            self._add(Equation(equation, operands, outputs))
            atoms.update(zip(equation.outvars, outputs, strict=True))
        return tuple(read(var) for var in jaxpr.outvars)

    def _add(self, equation: Equation) -> None:
        self._uses.update(equation.inputs)
        self._producers.update(dict.fromkeys(equation.outputs, equation))
        if not self._depends.isdisjoint(equation.inputs):
            self._depends.update(equation.outputs)
        for end in ("in", "out"):
            if (number := _mark(equation, end)) is not None:
                # If a program is traced several times, the last trace counts.
                self._marks[number, end] = equation


def _mark(equation: Equation, end: str) -> int | None:
    """Return the number of the call whose input or output is marked here."""
    name = equation.params.get("name") if equation.name == "name" else None
    match str(name).split("/"):
        case [start, number, which] if start == MARK and which == end:
            return int(number)
    return None


def _bodies(equation: Any) -> list[Any]:
    """Return the jaxprs of the functions that an equation calls."""
    if equation.primitive.name not in CALLS | _LOOPS:
        return []
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns") and len(jaxpr.invars) <= len(equation.invars):
                found.append(jaxpr)
    return found
