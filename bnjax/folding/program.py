"""A traced function as one flat list of equations."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

CALLS = frozenset(
    {
        "checkpoint",
        "closed_call",
        "core_call",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "jit",
        "pjit",
        "remat2",
    }
)
"""Primitives that call a function once, which takes their place."""


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
    """A value of the program: an input, a constant or the result of an equation.

    Attributes:
        aval: its shape and dtype.
    """

    aval: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One primitive applied to atoms.

    Attributes:
        source: the equation of the jaxpr, which has the primitive and its parameters.
        inputs: what it is applied to.
        outputs: what it gives.
    """

    source: core.JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.source.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the primitive."""
        return self.source.params

    def bind(self, *values: Any, **changed: Any) -> list[Any]:
        """Apply the primitive to values, with some of its parameters changed."""
        primitive = self.source.primitive
        params = primitive.get_bind_params(self.params | changed)
        with self.source.ctx.manager:
            found = primitive.bind(*values, **params)
        return list(found) if primitive.multiple_results else [found]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function without calls to others, and without what its outputs do not need.

    Attributes:
        inputs: one atom for each leaf of the arguments.
        outputs: one for each leaf of the result.
        equations: in an order in which they can be computed.
        literals: the values of the atoms that are known.
        uses: how often each atom is read, by equations and as an output.
        out_tree: structure of the result.
    """

    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]
    literals: dict[Atom, Any]
    uses: collections.Counter[Atom]
    out_tree: Any


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Trace a function of arrays, or of their shapes and dtypes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> program = trace(jax.jit(lambda x: jax.nn.relu(x) + jnp.cos(0 * x)), 1.0)
        >>> [equation.name for equation in program.equations]
        ['max', 'mul', 'cos', 'add']
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    literals: dict[Atom, Any] = {}
    equations: list[Equation] = []

    def flatten(jaxpr: core.Jaxpr, consts: Any, inputs: list[Atom]) -> tuple[Atom, ...]:
        atoms = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            atoms[var] = Atom(var.aval)
            literals[atoms[var]] = value

        def read(var: Any) -> Atom:
            if isinstance(var, core.Literal):
                atom = Atom(var.aval)
                literals[atom] = var.val
                return atom
            return atoms[var]

        for equation in jaxpr.eqns:
            operands = [read(var) for var in equation.invars]
            called = _called(equation)
            if called is not None:
                outputs = flatten(*called, operands)
            else:
                outputs = tuple(Atom(var.aval) for var in equation.outvars)
                equations.append(Equation(equation, tuple(operands), outputs))
            atoms.update(zip(equation.outvars, outputs, strict=True))
        return tuple(read(var) for var in jaxpr.outvars)

    inputs = tuple(Atom(var.aval) for var in closed.jaxpr.invars)
    outputs = flatten(closed.jaxpr, closed.consts, list(inputs))
    needed, uses = _needed(equations, outputs)
    return Program(inputs, outputs, needed, literals, uses, jax.tree.structure(shapes))


def _called(equation: core.JaxprEqn) -> tuple[core.Jaxpr, Any] | None:
    if equation.primitive.name not in CALLS:
        return None
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(key)
        if inner is not None:
            return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
    return None


def _needed(
    equations: list[Equation], outputs: tuple[Atom, ...]
) -> tuple[tuple[Equation, ...], collections.Counter[Atom]]:
    uses = collections.Counter(outputs)
    kept = []
    for equation in reversed(equations):
        if equation.source.effects or any(uses[atom] for atom in equation.outputs):
            uses.update(equation.inputs)
            kept.append(equation)
    return tuple(reversed(kept)), uses
