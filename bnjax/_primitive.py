"""Operations: one reference that defines each, and backends that compute it faster.

JAX's public API has no way to say "this function, but computed differently on a CPU, in
programs that XLA does not partition, with this transpose". So each operation is a
primitive of its own. This is the one file that depends on JAX's internals.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# Takes trees of arrays, and keywords that are static and hashable.
Computation = Callable[..., Sequence[jax.Array]]


@dataclass(frozen=True)
class OneDevice:
    """A backend that needs the whole array, and may call code of this process.

    It is not used where XLA partitions the arrays of a program among devices, because
    it would then see a part as the whole.

    Attributes:
        compute: computes the same as the reference.
        exported: likewise, for programs that are exported to run elsewhere and can call
            XLA only; None for the reference.
    """

    compute: Computation
    exported: Computation | None = None


def operation(
    name: str,
    reference: Computation,
    *,
    transpose: Callable[..., Any] | None = None,
    **backends: Computation | OneDevice,
) -> Callable[..., list[jax.Array]]:
    """Make a function that computes what `reference` does, by a backend if one fits.

    All transformations are those of the reference, except for a given transpose.

    Args:
        name: of the operation in a jaxpr.
        reference: the definition, in plain JAX. Static keywords must not hold arrays:
            JAX keeps them.
        transpose: for a reference that is linear in its last argument. It takes the
            cotangents, the arguments (the last of them as types) and the keywords, and
            returns the cotangents of the last argument.
        **backends: by platform ("cpu", "gpu", "tpu"), other ways to compute the same.

    Returns:
        A function with the signature of the reference that returns a list of arrays.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    on_leaves = _flat(reference)

    def types(*leaves: Any, **static: Any) -> Any:
        return jax.make_jaxpr(functools.partial(on_leaves, **static))(*leaves).out_avals

    def jvp(primals: Any, tangents: Any, /, **static: Any) -> Any:
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(functools.partial(on_leaves, **static), tuple(primals), tangents)

    def batch(leaves: Any, dims: Any, /, **static: Any) -> Any:
        found = jax.vmap(functools.partial(on_leaves, **static), dims)(*leaves)
        return found, [0] * len(found)

    primitive.def_impl(on_leaves)
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    if transpose is not None:
        ad.primitive_transposes[primitive] = functools.partial(_transpose, transpose)

    default = mlir.lower_fun(on_leaves, multiple_results=True)
    mlir.register_lowering(primitive, default)
    for platform, backend in backends.items():
        rule = _lowering(backend, default)
        mlir.register_lowering(primitive, rule, platform=platform)

    def bind(*args: Any, **static: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(args)
        return primitive.bind(*leaves, tree=tree, **static)

    return bind


def _flat(compute: Computation) -> Callable[..., Any]:
    def call(*leaves: Any, tree: Any, **static: Any) -> Any:
        return compute(*tree.unflatten(leaves), **static)

    return call


def _lowering(backend: Computation | OneDevice, default: Any) -> Any:
    def rule_of(compute: Computation) -> Any:
        return mlir.lower_fun(_flat(compute), multiple_results=True)

    if not isinstance(backend, OneDevice):
        return rule_of(backend)
    here = rule_of(backend.compute)
    elsewhere = default if backend.exported is None else rule_of(backend.exported)

    def lower(context: Any, /, *leaves: Any, **static: Any) -> Any:
        if _partitioned(context):
            rule = default
        else:
            rule = elsewhere if _exported(context) else here
        return rule(context, *leaves, **static)

    return lower


def _transpose(
    transpose: Callable[..., Any],
    cotangents: Any,
    /,
    *leaves: Any,
    tree: Any,
    **static: Any,
) -> list[Any]:
    """Cotangents of all the leaves; None for the leaves that are known."""
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    *known, last = tree.unflatten(leaves)
    last = jax.tree.map(_type_of, last, is_leaf=ad.is_undefined_primal)
    found = jax.tree.leaves(transpose(cotangents, *known, last, **static))
    before = len(leaves) - len(found)
    return [None] * before + [
        cotangent if ad.is_undefined_primal(leaf) else None
        for leaf, cotangent in zip(leaves[before:], found, strict=True)
    ]


def _type_of(leaf: Any) -> Any:
    return leaf.aval if ad.is_undefined_primal(leaf) else jax.typeof(leaf)


def _partitioned(context: Any) -> bool:
    """Whether XLA divides the arrays of this program among devices."""
    axes = context.module_context.axis_context
    devices = getattr(axes, "num_devices", None)
    if devices is not None:
        return devices > 1
    return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.manual_axes)


def _exported(context: Any) -> bool:
    """Whether the program will run elsewhere, where it can call XLA only."""
    return context.module_context.lowering_parameters.for_export
