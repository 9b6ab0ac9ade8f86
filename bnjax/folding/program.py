"""A traced function as one flat list of equations, and the variables it reads.

A value that depends only on the variables is a `Constant`, computed in float64 on the
host. Its value is compact: the size of each axis is that of the full array or 1. A bias
that is broadcast to a batch stays one vector, whatever the size of the batch.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core

Path = tuple[str, ...]

# Primitives that call a function once; the equations of the function replace them.
CALLS = {"checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit"}
CALLS |= {"remat2"}

ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "copy": np.asarray,
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
class Atom:
    """A value of the program: an input, a literal or the result of an equation."""

    aval: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation of a jaxpr, applied to atoms."""

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
    """A flat function without inner calls and without unused equations.

    Attributes:
        inputs: one atom for each leaf of the arguments.
        outputs: one atom for each leaf of the result.
        equations: the equations, in order.
        literals: the values of the known atoms.
        uses: how often equations and outputs read each atom.
        out_tree: the structure of the result.
    """

    inputs: tuple[Atom, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]
    literals: dict[Atom, Any]
    uses: collections.Counter[Atom]
    out_tree: Any


def trace(function: Callable[..., Any], *args: Any) -> Program:
    """Trace a function on arrays, or on their shapes and dtypes."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    literals: dict[Atom, Any] = {}
    equations: list[Equation] = []

    def known(aval: Any, value: Any) -> Atom:
        literals[atom := Atom(aval)] = value
        return atom

    def flatten(jaxpr: Any, consts: Any, inputs: Sequence[Atom]) -> tuple[Atom, ...]:
        atoms = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            atoms[var] = known(var.aval, value)

        def read(var: Any) -> Atom:
            is_literal = isinstance(var, core.Literal)
            return known(var.aval, var.val) if is_literal else atoms[var]

        for equation in jaxpr.eqns:
            operands = tuple(read(var) for var in equation.invars)
            if equation.primitive.name in CALLS:
                called = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
                inner = getattr(called, "jaxpr", called)
                outputs = flatten(inner, getattr(called, "consts", ()), operands)
            else:
                outputs = tuple(Atom(var.aval) for var in equation.outvars)
                equations.append(Equation(equation, operands, outputs))
            atoms.update(zip(equation.outvars, outputs, strict=True))
        return tuple(read(var) for var in jaxpr.outvars)

    inputs = tuple(Atom(var.aval) for var in closed.jaxpr.invars)
    outputs = flatten(closed.jaxpr, closed.consts, inputs)
    uses = collections.Counter(outputs)
    needed = []
    for equation in reversed(equations):
        if equation.source.effects or any(uses[atom] for atom in equation.outputs):
            uses.update(equation.inputs)
            needed.append(equation)
    out_tree = jax.tree.structure(shapes)
    return Program(inputs, outputs, tuple(reversed(needed)), literals, uses, out_tree)


class NotNumericError(Exception):
    """The host cannot compute the value, or not in compact form."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
    """A value that depends only on variables and literals, not on inputs.

    A constant is either known, or the output `index` of `equation` applied to the
    constants `operands`.

    Attributes:
        leaves: the indices of the variables that it depends on.
        known: the array or scalar of a variable or literal, or None.
    """

    aval: Any
    leaves: frozenset[int] = frozenset()
    known: Any = None
    equation: Equation | None = None
    operands: tuple["Constant", ...] = ()
    index: int = 0

    @functools.cached_property
    def value(self) -> np.ndarray:
        """The compact value: floating numbers as float64, other dtypes unchanged."""
        equation = self.equation
        if equation is None:
            return _on_host(self.known)
        values = [operand.value for operand in self.operands]
        if all(value.dtype == np.float64 for value in values):
            if equation.name in ELEMENTWISE:
                with np.errstate(all="ignore"):
                    return np.asarray(ELEMENTWISE[equation.name](*values))
            if equation.name == "integer_pow":
                return values[0] ** equation.params["y"]
        if equation.name == "broadcast_in_dim" and len(values) == 1:
            dims = equation.params["broadcast_dimensions"]
            return at_axes(values[0], dims, len(self.aval.shape))
        if is_rearrangement(equation):
            return rearrange(equation, values[0])
        # JAX computes every other primitive.
        arrays = []
        with jax.ensure_compile_time_eval():
            for operand, value in zip(self.operands, values, strict=True):
                shape, dtype = operand.aval.shape, operand.aval.dtype
                if not all(isinstance(size, int) for size in shape):
                    raise NotNumericError("it has an axis of unknown size")
                arrays.append(jnp.asarray(np.broadcast_to(value, shape), dtype))
            return _on_host(equation.bind(*arrays)[self.index])

    @functools.cached_property
    def origin(self) -> tuple[int, tuple[Equation, ...]] | None:
        """The variable that it rearranges, and the equations from there to it."""
        if self.equation is None:
            return (min(self.leaves), ()) if self.leaves else None
        before = self.operands[0].origin if is_rearrangement(self.equation) else None
        return before and (before[0], (*before[1], self.equation))


def _on_host(known: Any) -> np.ndarray:
    if isinstance(known, jax.core.Tracer):
        raise NotNumericError("it is traced")
    if jnp.issubdtype(getattr(known, "dtype", float), jax.dtypes.extended):
        raise NotNumericError("it is a random key")
    value = np.asarray(known)
    # Not np.floating: bfloat16 is not one of NumPy's dtypes.
    floats = jnp.issubdtype(value.dtype, jnp.floating)
    return value.astype(np.float64) if floats else value


def is_move(equation: Equation) -> bool:
    """Whether the equation only reshapes, transposes or changes the floating dtype."""
    if len(equation.inputs) != 1:
        return False
    source, target = equation.inputs[0].aval, equation.outputs[0].aval
    if equation.name == "convert_element_type":
        return all(jnp.issubdtype(a.dtype, jnp.floating) for a in (source, target))
    if equation.name == "broadcast_in_dim":
        dims = equation.params["broadcast_dimensions"]
        kept = dict(zip(dims, source.shape, strict=True))
        return all(size == kept.get(dim, 1) for dim, size in enumerate(target.shape))
    return equation.name in ("reshape", "squeeze", "transpose", "copy")


def is_rearrangement(equation: Equation) -> bool:
    """Whether the output has the same numbers as the input, each of them once."""
    return equation.name == "rev" or is_move(equation)


def rearrange(
    equation: Equation, value: np.ndarray, *, undo: bool = False
) -> np.ndarray:
    """Apply a rearrangement to a compact value, or its inverse if `undo`."""
    if equation.name == "transpose":
        order = equation.params["permutation"]
        return value.transpose(np.argsort(order) if undo else order)
    if equation.name == "rev":
        return np.flip(value, equation.params["dimensions"])
    source, target = equation.inputs[0].aval.shape, equation.outputs[0].aval.shape
    return _reshape(value, *((target, source) if undo else (source, target)))


def at_axes(value: np.ndarray, axes: Sequence[int], rank: int) -> np.ndarray:
    """Return `value` with its axes at `axes` of an array of this rank, 1 elsewhere."""
    shape = [1] * rank
    for axis, size in zip(axes, value.shape, strict=True):
        shape[axis] = size
    return value.transpose(np.argsort(axes)).reshape(shape)


def _reshape(value: np.ndarray, source: Sequence, target: Sequence) -> np.ndarray:
    """Reshape a compact value; axes of size 1 that stay together keep size 1."""
    wide: list[Any] = []
    new: list[Any] = []
    for axes, targets in _groups(source, target):
        constant = all(value.shape[axis] == 1 for axis in axes)
        wide += [1 if constant else source[axis] for axis in axes]
        new += [1 if constant else target[axis] for axis in targets]
    if not all(isinstance(size, int) for size in (*wide, *new)):
        raise NotNumericError("it differs along an axis of unknown size")
    return np.broadcast_to(value, wide).reshape(new)


def _groups(source: Sequence, target: Sequence) -> list[tuple[list[int], list[int]]]:
    """Group the axes of two shapes into the smallest runs of equal size."""
    groups = []
    i = j = 0
    while i < len(source) or j < len(target):
        start, start_of_target = i, j
        i, j = min(i + 1, len(source)), min(j + 1, len(target))
        while True:
            left = math.prod(source[start:i])
            right = math.prod(target[start_of_target:j])
            if left == right:
                break
            try:
                smaller = left < right
            except jax.errors.InconclusiveDimensionOperation as error:
                raise NotNumericError("a reshape of axes of unknown size") from error
            if (i == len(source)) if smaller else (j == len(target)):
                raise NotNumericError("a reshape of nothing")
            i, j = (i + 1, j) if smaller else (i, j + 1)
        groups.append((list(range(start, i)), list(range(start_of_target, j))))
    return groups


@dataclasses.dataclass(frozen=True)
class Variables:
    """The leaves of a model's variables; each path starts with the collection."""

    paths: tuple[Path, ...]
    values: tuple[Any, ...]

    @classmethod
    def of(cls, variables: Any) -> "Variables":
        """Return the leaves of nested variables."""
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        names = functools.partial(jax.tree_util.keystr, simple=True)
        return cls(
            tuple(tuple(names((key,)) for key in keys) for keys, _ in leaves),
            tuple(value for _, value in leaves),
        )

    def layers(self, leaves: frozenset[int]) -> list[Path]:
        """Return the layers that statistics among these leaves belong to."""
        found = (self.paths[leaf] for leaf in sorted(leaves))
        return list(dict.fromkeys(p[1:-1] for p in found if p[0] == "batch_stats"))

    def parents(self, constant: Constant) -> list[Path]:
        """Return the layers whose variables a constant depends on."""
        return [self.paths[leaf][1:-1] for leaf in sorted(constant.leaves)]

    def belongs(self, constant: Constant, layers: Sequence[Path]) -> bool:
        """Whether a constant depends on variables, and only on those of `layers`."""
        found = self.parents(constant)
        return bool(found) and all(path in layers for path in found)


@dataclasses.dataclass(eq=False)
class ParamWriter:
    """Makes the variables of the folded model, with the given dtype if there is one."""

    before: Variables
    dtype: Any
    leaves: dict[int, jax.Array] = dataclasses.field(default_factory=dict)
    made: list[tuple[Path, jax.Array]] = dataclasses.field(default_factory=list)

    def leaf(self, index: int) -> jax.Array:
        """Return a variable, unchanged except for its dtype."""
        if index not in self.leaves:
            with jax.ensure_compile_time_eval():
                value = jnp.asarray(self.before.values[index])
                is_param = self.before.paths[index][0] == "params"
                if is_param and jnp.issubdtype(value.dtype, jnp.floating):
                    value = value.astype(self.dtype or value.dtype)
            self.leaves[index] = value
        return self.leaves[index]

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Make an array; `path` is the path of the variable that it replaces."""
        with jax.ensure_compile_time_eval():
            # jnp.asarray would compile a program for each shape.
            array = jax.device_put(make().astype(dtype))
        self.made.append((path, array))
        return array

    def finish(self) -> tuple[dict[Path, jax.Array], tuple[tuple[Path, Path], ...]]:
        """Return the variables by path, and pairs of a replaced path and the new path.

        The two paths differ if the replaced variable is still needed.
        """
        paths = self.before.paths
        found = {paths[index]: value for index, value in self.leaves.items()}
        entries = []
        for wanted, value in self.made:
            path, count = wanted, 1
            while path in found and not _same(found[path], value):
                count += 1
                path = (*wanted[:-1], f"{wanted[-1]}_{count}")
            found[path] = value
            entries.append((wanted, path))
        return found, tuple(entries)


def _same(first: jax.Array, second: jax.Array) -> bool:
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return alike and np.array_equal(np.asarray(first), np.asarray(second))


class OtherLayersError(ValueError):
    """Other layers would be folded for an input of this shape than for the example."""


@dataclasses.dataclass(eq=False)
class ParamReader:
    """Reads the variables that a `ParamWriter` made, in the order of its entries."""

    found: Mapping[Path, Any]
    before: Variables
    unread: list[tuple[Path, Path]]

    def leaf(self, index: int) -> jax.Array:
        """Return an unchanged variable."""
        return self._get(self.before.paths[index])

    def new(self, path: Path, dtype: Any, make: Callable[[], np.ndarray]) -> jax.Array:
        """Return an array that the `ParamWriter` made."""
        del dtype, make
        if not self.unread or self.unread[0][0] != path:
            raise OtherLayersError
        return self._get(self.unread.pop(0)[1])

    def _get(self, path: Path) -> jax.Array:
        if path not in self.found:
            raise OtherLayersError
        return jnp.asarray(self.found[path])
