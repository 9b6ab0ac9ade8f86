"""Operations that are defined plainly and computed better where that is known."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Plain = Callable[..., Sequence[jax.Array]]


def operation(
    name: str,
    plain: Plain,
    *,
    on_cpu: Plain | None = None,
    transpose: Callable[..., Any] | None = None,
) -> Callable[..., list[jax.Array]]:
    """Make a function that computes `plain`, by a better way where there is one.

    Every transformation other than those given is that of `plain`.

    Args:
        name: of the operation in a jaxpr.
        plain: takes trees of arrays, and keywords that are static and hashable; returns
            a sequence of arrays.
        on_cpu: computes the same where the program is for a CPU, is not partitioned,
            and runs in this process.
        transpose: where `plain` is linear in its last argument: takes the cotangents,
            the arguments, the last as types, and the keywords; returns the cotangents
            of the last.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def flat(compute: Plain) -> Plain:
        def call(*leaves: Any, tree: Any, **static: Any) -> Any:
            return compute(*tree.unflatten(leaves), **static)

        return call

    whole = flat(plain)

    def avals(*leaves: Any, **static: Any) -> Any:
        return jax.make_jaxpr(functools.partial(whole, **static))(*leaves).out_avals

    def jvp(primals: Any, tangents: Any, /, **static: Any) -> Any:
        tangents = tuple(ad.instantiate_zeros(tangent) for tangent in tangents)
        return jax.jvp(functools.partial(whole, **static), tuple(primals), tangents)

    def batch(leaves: Any, dims: Any, /, **static: Any) -> Any:
        mapped = jax.vmap(functools.partial(whole, **static), dims)(*leaves)
        return mapped, [0] * len(mapped)

    primitive.def_impl(whole)
    primitive.def_abstract_eval(avals)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    if transpose is not None:
        ad.primitive_transposes[primitive] = functools.partial(_transposed, transpose)
    plainly = mlir.lower_fun(whole, multiple_results=True)
    mlir.register_lowering(primitive, plainly)
    if on_cpu is not None:
        for_cpu = mlir.lower_fun(flat(on_cpu), multiple_results=True)

        def lower(context: Any, /, *leaves: Any, **static: Any) -> Any:
            rule = plainly if _partitioned(context) or _exported(context) else for_cpu
            return rule(context, *leaves, **static)

        mlir.register_lowering(primitive, lower, platform="cpu")

    def bind(*args: Any, **static: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(args)
        return primitive.bind(*leaves, tree=tree, **static)

    return bind


def _transposed(
    transpose: Callable[..., Any],
    cotangents: Any,
    /,
    *leaves: Any,
    tree: Any,
    **static: Any,
) -> list[Any]:
    """Cotangents of all the leaves; None for those that are known."""
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
    """Whether the program is to run elsewhere, where it can call XLA alone."""
    return context.module_context.lowering_parameters.for_export
