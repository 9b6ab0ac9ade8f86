"""Fold batch normalization into adjacent linear layers.

The folder computes a program while it rewrites the program. It defers an operation that
only scales, shifts or rearranges a value until another kind of equation needs the
value. The operation then goes into the kernel and bias of the linear layer before or
after it, or it becomes a subtraction, multiplication and addition of constants.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from bnjax.folding.linear import LinearOp, NotFoldableError, PendingOp, compose
from bnjax.folding.program import (
    Atom,
    Constant,
    Equation,
    NotNumericError,
    OtherLayersError,
    ParamReader,
    ParamWriter,
    Path,
    Program,
    Variables,
    is_move,
    rearrange,
    trace,
)


@dataclasses.dataclass(frozen=True)
class Layer:
    """The result of folding one call of a batch norm layer.

    Attributes:
        path: the path of the layer in the variables.
        folded: whether the layer was folded.
        into: the path of the kernel that absorbed the layer; empty if it was not
            folded.
        operation: the operation of that kernel, such as "convolution".
        reason: why the layer could not be folded; empty if it was folded.
    """

    path: str
    folded: bool
    into: str = ""
    operation: str = ""
    reason: str = ""


class Report(tuple[Layer, ...]):
    """One `Layer` for each batch normalization, in order; it prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("batch normalization", "folded into", "as", "or why not")]
        for row in self:
            rows += [(row.path, row.into or "-", row.operation or "-", row.reason)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Folded:
    """A model without batch normalization.

    Call it on an input like the example, with any batch size. It returns the outputs of
    the original model.

    Attributes:
        variables: the variables of the new model: `{"params": ...}`, and other
            collections if the model needs them. A folded kernel has the path of the
            old kernel, and its bias is "bias" beside it.
        report: the result for each batch normalization.
    """

    variables: dict[str, Any]
    report: Report
    _apply_fn: Callable[..., Any] = dataclasses.field(repr=False)
    _before: Any = dataclasses.field(repr=False)
    _entries: tuple[tuple[Path, Path], ...] = dataclasses.field(repr=False)
    _dtype: Any = dataclasses.field(repr=False)

    @property
    def params(self) -> dict[str, Any]:
        """The collection "params" of `variables`."""
        return self.variables["params"]

    def __call__(self, x: Any) -> Any:
        """Return the outputs of the compiled model."""
        return self._compiled(self.variables, x)

    @functools.cached_property
    def _compiled(self) -> Callable[[Any, Any], Any]:
        return jax.jit(self.apply)

    def apply(self, variables: Any, x: Any) -> Any:
        """Return the outputs for other variables; you can differentiate or jit it."""
        before = Variables.of(self._before)
        program = trace(self._apply_fn, self._before, x)
        given = Variables.of(variables)
        found = dict(zip(given.paths, given.values, strict=True))
        reader = ParamReader(found, before, list(self._entries))
        try:
            folder = Folder(program, before, reader, self._dtype)
            outputs = folder.run(jax.tree.leaves(x))
            if reader.unread:
                raise OtherLayersError
        except OtherLayersError:
            raise ValueError(
                f"Folded: for an input of shape {jax.tree.map(jnp.shape, x)} other "
                "layers would be folded than for the example: the padding depends on "
                "the size of the input, or the variables are not "
                "`folded.variables`. Call fold_batch_norm with an example of this "
                "shape."
            ) from None
        return jax.tree.unflatten(program.out_tree, outputs)


def fold_batch_norm(
    apply_fn: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    example: Any,
    *,
    dtype: Any = None,
) -> Folded:
    r"""Fold batch normalization into the linear layers before or after it.

    In inference, batch normalization is an affine map of each channel. After a linear
    layer, the two layers together are one linear layer:

    $$
    \gamma \frac{(W u + b) - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = W' u + b', \quad
    W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \quad
    b' = \frac{\gamma (b - \mu)}{\sqrt{\sigma^2 + \epsilon}} + \beta.
    $$

    The function finds the pairs in the traced program, not by name. It folds into
    convolutions of any kind, including transposed convolutions, and into matrix
    products; reshapes and transpositions may lie between the linear layer and the
    normalization. A normalization before a linear layer becomes part of that layer if
    each output sees all of the kernel: for an input $a u + c$,
    $W' = W \mathrm{diag}(a)$ and $b' = b + W c$. A normalization that cannot be folded
    stays as `(x - mean) * scale + bias` with constants that are computed once, and the
    report says why. The arithmetic is float64, on the host.

    Args:
        apply_fn: `apply_fn(variables, x)` returns the outputs of the model in
            inference, such as
            `lambda variables, x: model.apply(variables, x, train=False)`.
        variables: a mapping of collections, with "params" and "batch_stats".
        example: an input or a `jax.ShapeDtypeStruct`, with any batch size.
        dtype: the dtype of the new parameters and of the products of linear layers,
            float32 or bfloat16; None keeps the dtypes of the model. Values between the
            products keep their dtype of the model.

    Returns:
        The folded model, with its variables and a report.

    Raises:
        ValueError: if the variables have no "params" or no "batch_stats", or if the
            outputs depend on no running statistics.
        TypeError: if `dtype` is another dtype, or if the variables are traced.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.folding import fold_batch_norm
        >>> from bnjax.models import MLP
        >>> model, x = MLP((4,), classes=3), jnp.ones((2, 5))
        >>> variables = model.init(jax.random.key(0), x, train=False)
        >>> def apply(variables, x):
        ...     return model.apply(variables, x, train=False)
        >>> folded = fold_batch_norm(apply, variables, x)
        >>> print(folded.report)
        batch normalization  folded into     as              or why not
        bn_0                 dense_0/kernel  matrix product
        >>> jax.tree.map(jnp.shape, folded.params["dense_0"])
        {'bias': (4,), 'kernel': (5, 4)}
        >>> folded(jnp.ones((7, 5))).shape
        (7, 3)

    References:
        Ioffe & Szegedy (2015), section 3.1 and Algorithm 2.
    """
    _check(variables, dtype)
    dtype = None if dtype is None else jnp.dtype(dtype)
    before = Variables.of(variables)
    shapes = jax.eval_shape(lambda x: x, example)
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
    program = trace(apply_fn, variables, example)
    writer = ParamWriter(before, dtype)
    folder = Folder(program, before, writer, dtype)
    jax.eval_shape(lambda x: folder.run(jax.tree.leaves(x)), example)
    if not folder.layers:
        raise ValueError(
            "fold_batch_norm: apply_fn scales no value by the running statistics, so "
            "there is nothing to fold. Is it in training mode? Expected the outputs "
            "in inference: model.apply(variables, x, train=False), or "
            "use_running_average=True."
        )
    found, entries = writer.finish()
    return Folded(
        unflatten_dict(found), folder.report(), apply_fn, variables, entries, dtype
    )


def fold_nnx(model: nnx.Module, example: Any, *, dtype: Any = None) -> Folded:
    """Fold the batch normalizations of a flax.nnx model; see `fold_batch_norm`.

    The function folds `model(x)` of a copy after `eval()`; the model itself does not
    change. `nnx.update(other, folded.params)` puts the new variables into a model
    without normalization.

    Args:
        model: the nnx model.
        example: an input or a `jax.ShapeDtypeStruct`, with any batch size.
        dtype: as in `fold_batch_norm`.

    Returns:
        The folded model, with its variables and a report.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> from bnjax.folding import fold_nnx
        >>> from bnjax.nnx import BatchNorm
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), BatchNorm(4, rngs=rngs))
        >>> folded = fold_nnx(model, jnp.ones((2, 5)))
        >>> print(folded.report)
        batch normalization  folded into      as              or why not
        layers/1             layers/0/kernel  matrix product
        >>> jax.tree.map(jnp.shape, folded.params)
        {'layers': {'0': {'bias': (4,), 'kernel': (5, 4)}}}
    """
    copy = nnx.clone(model)
    copy.eval()
    graph, params, batch_stats, rest = nnx.split(copy, nnx.Param, nnx.BatchStat, ...)
    states = {"params": params, "batch_stats": batch_stats, "rest": rest}
    variables = {name: nnx.to_pure_dict(state) for name, state in states.items()}

    def apply(variables: Any, x: Any) -> Any:
        given = jax.tree.map(lambda leaf: leaf, states)  # a copy, to write to
        for name, state in given.items():
            nnx.replace_by_pure_dict(state, variables[name])
        return nnx.merge(graph, *given.values())(x)

    return fold_batch_norm(apply, variables, example, dtype=dtype)


def _check(variables: Any, dtype: Any) -> None:
    if dtype is not None and jnp.dtype(dtype).name not in ("float32", "bfloat16"):
        raise TypeError(
            f"fold_batch_norm: dtype={jnp.dtype(dtype).name}; expected float32, "
            "bfloat16, or None for the dtypes of the model."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        given = sorted(variables) if isinstance(variables, Mapping) else variables
        raise ValueError(
            f"fold_batch_norm: variables hold {given}; expected a mapping of "
            'collections such as {"params": ..., "batch_stats": ...}, the result of '
            "`model.init`."
        )
    if not jax.tree.leaves(variables.get("batch_stats")):
        raise ValueError(
            'fold_batch_norm: variables have no "batch_stats", only '
            f"{sorted(variables)}: a model without batch normalization has nothing to "
            "fold. Pass the running statistics with the parameters."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables)):
        raise TypeError(
            "fold_batch_norm: variables are traced; expected arrays. Call "
            "fold_batch_norm once, outside jit, grad and vmap, and call its result "
            "inside."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DeferredValue:
    """An array or a linear layer not yet computed, and operations not yet applied.

    `reason` says why no layer before the array can absorb the operations.
    """

    base: Any
    reason: str = ""
    pending_ops: tuple[PendingOp, ...] = ()

    def then(self, op: PendingOp) -> "DeferredValue":
        """The value after one more operation."""
        return dataclasses.replace(self, pending_ops=(*self.pending_ops, op))


Value = Constant | DeferredValue


@dataclasses.dataclass(eq=False)
class Folder:
    """Computes a program without its batch norm layers.

    The first inputs of the program are variables. `params` provides the arrays of the
    new program. `dtype` is the dtype of the products of linear layers; None keeps
    theirs.
    """

    program: Program
    variables: Variables
    params: ParamWriter | ParamReader
    dtype: Any
    layers: list[Layer] = dataclasses.field(default_factory=list)
    _elsewhere: dict[Path, str] = dataclasses.field(default_factory=dict)
    _computed: dict[Equation, list[Any]] = dataclasses.field(default_factory=dict)

    def run(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        """Compute the outputs of the program, and record the result for each layer."""
        program, values = self.program, self.variables.values
        env: dict[Atom, Value] = {}
        for atom, value in program.literals.items():
            env[atom] = Constant(atom.aval, known=value)
        own, given = program.inputs[: len(values)], program.inputs[len(values) :]
        for i, (atom, value) in enumerate(zip(own, values, strict=True)):
            env[atom] = Constant(atom.aval, frozenset({i}), value)
        for atom, array in zip(given, inputs, strict=True):
            env[atom] = DeferredValue(array, "it normalizes an input of the model")
        for equation in program.equations:
            results = self._apply(equation, [env[atom] for atom in equation.inputs])
            for atom, result in zip(equation.outputs, results, strict=True):
                env[atom] = self._shared(result, program.uses[atom])
        after = "its output is an output of the model"
        return [self._array(env[atom], after) for atom in program.outputs]

    def report(self) -> Report:
        """Return the result for every layer that has statistics."""
        every = self.variables.layers(frozenset(range(len(self.variables.paths))))
        unused = dict.fromkeys(every, "its statistics scale nothing")
        rest = {"/".join(p): why for p, why in (unused | self._elsewhere).items()}
        seen = {row.path for row in self.layers}
        kept = [Layer(p, False, reason=rest[p]) for p in rest if p not in seen]
        return Report((*self.layers, *kept))

    def _apply(self, equation: Equation, operands: list[Value]) -> Sequence[Value]:
        constants = tuple(value for value in operands if isinstance(value, Constant))
        if len(constants) == len(operands) and not equation.source.effects:
            leaves = frozenset().union(*(value.leaves for value in constants))
            return [
                Constant(atom.aval, leaves, None, equation, constants, i)
                for i, atom in enumerate(equation.outputs)
            ]
        if (deferred := self._defer(equation, operands)) is not None:
            return [deferred]
        name = equation.name
        for value in constants:
            self._note(value, f"its statistics are an operand of `{name}`")
        arrays = [self._array(value, f"`{name}` follows") for value in operands]
        reason = f"it follows `{name}`, not a linear layer"
        if name in ("conv_general_dilated", "dot_general"):
            reason = f"it follows `{name}`, whose kernel is not a parameter"
        return [DeferredValue(array, reason) for array in equation.bind(*arrays)]

    def _defer(self, equation: Equation, operands: list[Value]) -> DeferredValue | None:
        """Return the result of an equation that need not be computed yet."""
        match operands:
            case [DeferredValue() as value]:
                simple = is_move(equation) or equation.name == "neg"
                return value.then(PendingOp(equation)) if simple else None
            case [DeferredValue() as value, Constant() as constant]:
                side = 0
            case [Constant() as constant, DeferredValue() as value]:
                side = 1
            case _:
                return None
        if constant.leaves:
            linear = LinearOp.of(equation, 1 - side, constant)
            if linear is not None:
                return DeferredValue(self._with_data(linear, value))
        op = PendingOp(equation, constant, side)
        if not op.is_affine:
            return None
        base = value.base
        if isinstance(base, LinearOp) and not base.accepts(value.pending_ops, op):
            reason = "its constants differ from one position to another"
            value = DeferredValue(self._array(value, reason), reason)
        return value.then(op)

    def _shared(self, value: Value, uses: int) -> Value:
        """Compute a value now if it is used more than once."""
        if uses < 2 or isinstance(value, Constant):
            return value
        if not value.pending_ops and not isinstance(value.base, LinearOp):
            return value
        array = self._array(value, f"its output is used {uses} times")
        return DeferredValue(array, f"its input is used {uses} times")

    def _with_data(self, linear: LinearOp, value: DeferredValue) -> LinearOp:
        """Return a linear layer that absorbs the pending operations on its input.

        If a linear layer before it can absorb them, they stay with that layer.
        """
        name, after = linear.operation, f"a {linear.operation} follows"
        self._note(linear.kernel, f"its statistics are in the kernel of a {name}")
        first, _ = self._span(value.pending_ops)
        if first is not None and not isinstance(value.base, LinearOp):
            before, ops = value.pending_ops[:first], value.pending_ops[first:]
            try:
                absorbed = linear.absorb(*compose(ops))
            except (NotFoldableError, NotNumericError) as error:
                after = str(error)
            else:
                moves = [op for op in ops if is_move(op.equation)]
                array = self._apply_ops(value.base, (*before, *moves))
                layers = tuple(self._layers(ops))
                return dataclasses.replace(
                    linear, data=array, absorbed=absorbed, layers=layers
                )
        return dataclasses.replace(linear, data=self._array(value, after))

    def _array(self, value: Value, after: str) -> Any:
        """Compute a value and apply the operations that are pending on it."""
        if isinstance(value, Constant):
            return self._constant(value)
        base, ops = value.base, value.pending_ops
        first, end = self._span(ops)
        if isinstance(base, LinearOp):
            if base.layers:
                end = max(end, self._bias_end(base, ops))
            return self._apply_ops(self._linear(base, ops[:end]), ops[end:])
        if first is None:
            return self._apply_ops(base, ops)
        layers, reason = self._layers(ops), f"{value.reason}; {after}"
        self.layers += [Layer("/".join(p), False, reason=reason) for p in layers]
        array = self._apply_ops(base, ops[:first])
        array = self._affine(array, ops[first:end], ("params", *layers[0]))
        return self._apply_ops(array, ops[end:])

    def _apply_ops(self, array: Any, ops: Sequence[PendingOp]) -> Any:
        """Apply operations as they were written."""
        for op in ops:
            operands = [array]
            if op.constant is not None:
                operands.insert(1 - op.side, self._constant(op.constant))
            (array,) = op.equation.bind(*operands)
        return array

    def _constant(self, constant: Constant) -> Any:
        """Compute a constant from the variables of the new program."""
        equation = constant.equation
        if equation is None:
            if not constant.leaves:
                return constant.known
            found, dtype = self.params.leaf(min(constant.leaves)), constant.aval.dtype
            return found if found.dtype == dtype else found.astype(dtype)
        if equation not in self._computed:
            operands = [self._constant(operand) for operand in constant.operands]
            self._computed[equation] = equation.bind(*operands)
        return self._computed[equation][constant.index]

    def _linear(self, linear: LinearOp, ops: Sequence[PendingOp]) -> jax.Array:
        """Compute a linear layer together with the operations that it absorbs.

        The bias is added in float32 or wider, before the output is rounded.
        """
        layers = [*linear.layers, *self._layers(ops)]
        if not layers:
            array = linear.bind(self._constant(linear.kernel), self.dtype)
            return self._apply_ops(array, ops)
        folded = functools.cache(lambda: linear.folded(ops))
        kernel, path, dtype = self._kernel(linear.kernel, lambda: folded()[0])
        bias = self.params.new((*path[:-1], "bias"), dtype, lambda: folded()[1])
        for name in map("/".join, layers):
            into = "/".join(path[1:])
            self.layers.append(Layer(name, True, into, linear.operation))
        array = linear.add_bias(_wide(linear.bind(kernel, self.dtype)), bias)
        moves = [op for op in ops if is_move(op.equation) and not _is_cast(op.equation)]
        last = ops[-1].equation if ops else linear.equation
        return self._apply_ops(array, moves).astype(last.outputs[0].aval.dtype)

    def _kernel(
        self, kernel: Constant, make: Callable[[], np.ndarray]
    ) -> tuple[jax.Array, Path, Any]:
        """Return the folded kernel, its path and its dtype.

        If the kernel comes from a single variable, it keeps the shape of that variable.
        """
        paths = self.variables.paths
        leaves = sorted(kernel.leaves, key=lambda i: (paths[i][0] != "params", i))
        leaf, moves = kernel.origin or (leaves[0], ())
        path = paths[leaf]
        dtype = self.dtype or self.variables.values[leaf].dtype
        if kernel.origin is None:
            path = (*path[:-1], "folded_kernel")

        def as_variable() -> np.ndarray:
            value = make()
            for move in reversed(moves):
                value = rearrange(move, value, undo=True)
            return value

        array = self.params.new(path, dtype, as_variable)
        for move in moves:
            if not _is_cast(move):
                (array,) = move.bind(array)
        return array, path, dtype

    def _affine(
        self, array: jax.Array, ops: Sequence[PendingOp], path: Path
    ) -> jax.Array:
        """Compute operations as (x - mean) * scale + bias, with variables at `path`.

        Subtracting the mean first avoids the rounding error of a single multiplication
        and addition when the mean is large compared with the standard deviation.
        """
        array = self._apply_ops(array, [op for op in ops if is_move(op.equation)])
        wide = _wide(array)

        @functools.cache
        def made() -> dict[str, np.ndarray]:
            scale, shift = np.broadcast_arrays(*compose(ops))
            with np.errstate(all="ignore"):
                mean = (-shift / scale).astype(wide.dtype).astype(np.float64)
            mean = np.where(np.isfinite(mean), mean, 0)
            return {"mean": mean, "scale": scale, "bias": shift + scale * mean}

        def variable(name: str) -> jax.Array:
            def make() -> np.ndarray:
                value = made()[name]
                while value.ndim > 1 and value.shape[0] == 1:
                    value = value[0]
                return value

            value = self.params.new((*path, name), wide.dtype, make)
            ones = (1,) * (wide.ndim - value.ndim)
            return value.reshape(ones + value.shape).astype(wide.dtype)

        wide = (wide - variable("mean")) * variable("scale") + variable("bias")
        return wide.astype(array.dtype)

    def _layers(self, ops: Sequence[PendingOp]) -> list[Path]:
        leaves = (op.constant.leaves for op in ops if op.constant is not None)
        return self.variables.layers(frozenset().union(*leaves))

    def _span(self, ops: Sequence[PendingOp]) -> tuple[int | None, int]:
        """Return the range of the operations by statistics, if one of them scales.

        The range includes the later operations by the parameters of the same layers.
        """
        ours = [i for i, op in enumerate(ops) if self._layers([op])]
        if not any(ops[i].equation.name in ("mul", "div") for i in ours):
            return None, 0
        end = ours[-1] + 1
        layers = self._layers(ops)
        for i, op in enumerate(ops[end:], end):
            if op.constant is not None:
                if not self.variables.belongs(op.constant, layers):
                    break
                end = i + 1
        return ours[0], end

    def _bias_end(self, linear: LinearOp, ops: Sequence[PendingOp]) -> int:
        """Return the index after the layer's own bias, if its addition comes first."""
        for i, op in enumerate(ops):
            if op.constant is not None:
                added = op.equation.name in ("add", "add_any")
                layer = self.variables.parents(linear.kernel)
                own = self.variables.belongs(op.constant, layer)
                return i + 1 if added and own else 0
        return 0

    def _note(self, constant: Constant, where: str) -> None:
        for path in self.variables.layers(constant.leaves):
            self._elsewhere.setdefault(path, where)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _is_cast(equation: Equation) -> bool:
    return equation.name == "convert_element_type"
