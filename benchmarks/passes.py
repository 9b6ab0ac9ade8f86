"""The passes of a layer as compiled programs, and the memory floor beside them.

A pass is compiled twice. "fresh" is the pass by itself, with its outputs in new
buffers. "reused" iterates the pass in one program: each iteration overwrites the
outputs of the previous one, and the donated carry returns as the result and goes in
again, so that no buffer is new. A barrier ties the inputs to the index of the
iteration, so that no work can leave the loop. Each iteration passes its running
statistics to the next.

In "train" a barrier makes the gradient wait for the output, as in a network: the two
halves cannot share a pass over memory.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.peers import Case, Layer

PASSES = ("train", "forward", "inference")
ACCESSES = {
    ("train", False): (8, 2),
    ("train", True): (11, 3),
    ("forward", False): (3, 1),
    ("forward", True): (4, 1),
    ("inference", False): (2, 1),
    ("inference", True): (3, 1),
}
"""How often an array of the input's size is read or written, and how many are outputs.

By pass and whether there is a residual, at the least. The statistics need all of x
before the first output, the two sums of the gradient all of x and dy before the first
gradient: forward reads x twice and writes y, backward reads x and dy twice and writes
dx. The residual is read once more; backward reads the output (or the residual) for the
ReLU, and writes the residual's gradient, which the second pass reads in place of dy.
"""

Pass = Callable[[dict[str, Any]], dict[str, Any]]


def as_numpy(value: Any) -> np.ndarray:
    """Return an array as float32."""
    return np.asarray(value, np.float32)


def channels_last(value: Any) -> np.ndarray:
    """Return an array of shape (batch, channels, ...) as float32, channels last."""
    value = as_numpy(value)
    return np.moveaxis(value, 1, -1) if value.ndim > 1 else value


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program and what it needs besides its arguments.

    Args:
        run: does the work and returns its outputs when they are there.
        temporary_bytes: that XLA allots beside arguments and outputs; None: unknown.
        count: iterations in one run.
        read: makes a float32 array, channels last, of an output.
    """

    run: Callable[[], dict[str, Any]]
    temporary_bytes: int | None
    count: int = 1
    read: Callable[[Any], np.ndarray] = as_numpy


def operands(case: Case, layer: Layer, values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return a layer's arguments, in the layout and dtype that it takes."""

    def array(name: str) -> jax.Array | None:
        if name not in values:
            return None
        value = values[name]
        if layer.channels_first:
            value = np.moveaxis(value, -1, 1)
        return jnp.asarray(value, case.dtype)

    return {
        "params": layer.params,
        "state": layer.state,
        "x": array("x"),
        "dy": array("dy"),
        "residual": array("residual"),
    }


def one_pass(layer: Layer, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return what one pass of a layer computes.

    Args:
        layer: of a peer.
        kind: of `PASSES`.
        given: as from `operands`.

    Returns:
        y, in training the new statistics, and for "train" the gradients.
    """
    params, state, x, residual = (
        given[name] for name in ("params", "state", "x", "residual")
    )
    if kind != "train":
        training = kind == "forward"
        y, state = layer.apply(params, state, x, residual, training)
        return {"y": y} | ({"state": state} if training else {})

    def forward(params, x, residual):
        return layer.apply(params, state, x, residual, True)

    y, pull, new = jax.vjp(forward, params, x, residual, has_aux=True)
    y, dy = lax.optimization_barrier((y, given["dy"]))
    dparams, dx, dresidual = pull(dy)
    dscale, dbias = layer.scale_and_bias(dparams)
    found = {"y": y, "dx": dx, "dscale": dscale, "dbias": dbias, "state": new}
    return found | ({} if residual is None else {"dresidual": dresidual})


def fresh(one: Pass, given: Any) -> Program:
    """Compile one pass, each run in new buffers."""
    leaves, tree = jax.tree.flatten(given)

    # Plain arrays in: no library's own pytree is flattened in each call.
    def flat(*leaves):
        return one(jax.tree.unflatten(tree, leaves))

    program = jax.jit(flat).lower(*leaves).compile()
    return Program(
        lambda: jax.block_until_ready(program(*leaves)), temporary_bytes(program)
    )


def iterated(one: Pass) -> Callable[[Any, Any, Any], Any]:
    """Return a pass iterated, as a function of count, carry and constants.

    Args:
        one: a pass, from its arguments to what it returns.

    Returns:
        The function. The carry is what the last iteration returned, which the next
        writes over, and the statistics it goes on from.
    """

    def many(count, carry, constants):
        def body(step, carry):
            held, _ = lax.optimization_barrier((constants, step))
            state = {name: carry[name] for name in ("state",) if name in carry}
            return one(held | state)

        return lax.fori_loop(0, count, body, carry)

    return many


def first_carry(
    one: Pass, given: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the carry of the first iteration, in buffers of its own, and the rest."""
    shapes = jax.eval_shape(one, given)
    carry = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)
    constants = dict(given)
    if "state" in carry:
        carry["state"] = jax.tree.map(jnp.copy, constants.pop("state"))
    if "dx" not in carry:
        constants.pop("dy", None)
    return carry, constants


def reused(one: Pass, given: dict[str, Any], count: int) -> Program:
    """Compile a pass iterated `count` times, every buffer used again."""
    carry, constants = first_carry(one, given)
    leaves, tree = jax.tree.flatten(carry)
    held, held_tree = jax.tree.flatten(constants)
    many = iterated(one)

    def flat(count, leaves, held):
        found = many(
            count, jax.tree.unflatten(tree, leaves), jax.tree.unflatten(held_tree, held)
        )
        return jax.tree.leaves(found)

    times = jnp.int32(count)
    program = jax.jit(flat, donate_argnums=1).lower(times, leaves, held).compile()

    def run() -> dict[str, Any]:
        leaves[:] = jax.block_until_ready(program(times, leaves, held))
        return jax.tree.unflatten(tree, leaves)

    return Program(run, temporary_bytes(program), count)


def copy(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Read and write an array, each once.

    An exclusive or with a zero that is an argument: XLA cannot know that nothing
    changes, and no dtype needs converting.
    """
    return {"y": given["x"] ^ given["zero"]}


def elementwise(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Map each channel by an affine function in float32: inference, at the least."""
    x = given["x"]
    y = x.astype(jnp.float32) * given["gain"] + given["shift"]
    return {"y": y.astype(x.dtype)}


def bounds(
    case: Case, values: dict[str, np.ndarray]
) -> dict[str, tuple[Pass, dict[str, jax.Array]]]:
    """Return what bounds every layer, as passes with their arguments."""
    x = jnp.asarray(values["x"], case.dtype)
    kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, kind)
    gain, shift = jnp.asarray(values["scale"]), jnp.asarray(values["bias"])
    return {
        "copy": (copy, {"x": bits, "zero": jnp.zeros((), kind)}),
        "elementwise": (elementwise, {"x": x, "gain": gain, "shift": shift}),
    }


def temporary_bytes(program: Any) -> int | None:
    """Return the bytes that XLA allots for what is neither argument nor output."""
    analysis = program.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
