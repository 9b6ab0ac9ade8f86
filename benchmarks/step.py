"""The time that batch normalization adds to a training step: ours, Flax's, and none.

    python -m benchmarks.step
    python -m benchmarks.step --quick

The networks are the MNIST network, Inception at the size of CIFAR-10, and ResNet-50 on
a few small images. A step is forward, backward and SGD with momentum, with a donated
state. The kinds run in turns, in rounds. The added time of a kind is the time of its
step minus the time of the network without BN in the same round. "arrays" is the network
without BN, with the arrays of BN added to its state, each multiplied by a number: it
shows the cost of passing these arrays in and out, which no layer can change. Bytes are
XLA's count for the compiled step.

"kept" is the memory that a stack of convolution, BN and ReLU in bfloat16 keeps between
forward and backward: the distinct arrays in the function of `jax.vjp`, without the
parameters. Writes benchmarks/results/step-<platform>.json; with --quick it writes only
to --output, if that is given.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.networks import (
    KINDS,
    NETWORKS,
    Network,
    Stack,
    batch_of,
    first_state,
    initial,
    loss_of,
    make_step,
)
from benchmarks.passes import Program
from benchmarks.report import markdown, milliseconds, run_command, write_run
from bnjax.data.config import SettingError

ARRAYS = "arrays"
STACK_SHAPE = (64, 56, 56, 64)
QUICK_STACK_SHAPE = (4, 16, 16, 64)


def compare(
    networks: tuple[str, ...] = tuple(NETWORKS),
    batch_size: int | None = None,
    stack_layers: int = 8,
    stack_shape: tuple[int, int, int, int] = STACK_SHAPE,
    rounds: int = 21,
    seconds: float = 60.0,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Measure, print and write.

    Args:
        networks: Of mlp, inception and resnet50.
        batch_size: In place of each network's own.
        stack_layers: Of the stack whose kept bytes are counted.
        stack_shape: Of its input.
        rounds: Of each kind, at most.
        seconds: Of each network, after three rounds.
        quick: Few rounds, without ResNet-50.
        output: Where to write the result instead.
    """
    chosen = {name: sized(name, batch_size) for name in networks}
    if quick:
        chosen.pop("resnet50", None)
        rounds, stack_shape = min(rounds, 5), QUICK_STACK_SHAPE
    load = timing.load()
    rows = []
    for name, network in chosen.items():
        rows.append({"network": name} | measured(network, rounds, seconds))
        timing.show(name, rows[-1]["seconds_median"])
    kept = kept_bytes(stack_layers, stack_shape)
    result = {"load_average_at_start": load, "rows": rows, "kept": kept}
    write_run("step", result, tables(result), output, quick=quick)


def sized(name: str, batch_size: int | None) -> Network:
    """Return the network called `name`, with a batch of the size given."""
    if name not in NETWORKS:
        raise SettingError(
            f"--networks {name}: expected some of {', '.join(NETWORKS)}."
        )
    network = NETWORKS[name]
    if batch_size is None:
        return network
    return dataclasses.replace(network, shape=(batch_size, *network.shape[1:]))


def step_program(network: Network, kind: str) -> tuple[Program, dict[str, int]]:
    """Compile a training step; each run goes on from the state of the one before."""
    model = network.create("none" if kind == ARRAYS else kind)
    images, labels = batch_of(network)
    leaves, tree = jax.tree.flatten(first_state(model, images))
    own = len(leaves)
    if kind == ARRAYS:
        leaves += arrays_of_bn(network, images, leaves)

    def step(leaves, images, labels):
        state = jax.tree.unflatten(tree, leaves[:own])
        new = jax.tree.leaves(make_step(model)(state, images, labels))
        return new + [0.999 * leaf for leaf in leaves[own:]]

    compiled = jax.jit(step, donate_argnums=0).lower(leaves, images, labels).compile()

    def run() -> dict[str, Any]:
        leaves[:] = jax.block_until_ready(compiled(leaves, images, labels))
        return {"state": leaves}

    found = bytes_of(compiled)
    return Program(run, found["temporary"]), found


def arrays_of_bn(
    network: Network, images: jax.Array, without: Sequence[jax.Array]
) -> list[jax.Array]:
    """Return arrays like those that the state of a network has for BN alone."""
    state = jax.eval_shape(lambda: first_state(network.create("bnjax"), images))
    shapes = Counter(leaf.shape for leaf in jax.tree.leaves(state))
    shapes.subtract(leaf.shape for leaf in without)
    return [jnp.ones(shape) for shape in (+shapes).elements()]


def bytes_of(compiled: Any) -> dict[str, int]:
    """Return XLA's count for a compiled program: what it allots, and with all else."""
    found = compiled.memory_analysis()
    temporary = int(found.temp_size_in_bytes)
    held = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    return {"temporary": temporary, "peak": temporary + int(held)}


def measured(network: Network, rounds: int, seconds: float) -> dict[str, Any]:
    """Time the steps of all kinds in turn."""
    programs, memory = {}, {}
    for kind in (*KINDS, ARRAYS):
        programs[kind], memory[kind] = step_program(network, kind)
    runs = {kind: program.run for kind, program in programs.items()}
    times = timing.interleaved(runs, 1)
    # A sample of a step that takes less than 20 ms is of several.
    calls = max(1, math.ceil(0.02 / times["none"][0]))
    times = timing.interleaved(runs, rounds, seconds=seconds, calls=calls)

    def beyond(kind: str, base: str) -> list[float]:
        return [a - b for a, b in zip(times[kind], times[base], strict=True)]

    added = {kind: beyond(kind, "none") for kind in ("bnjax", "flax", ARRAYS)}
    return {
        "shape": network.shape,
        "seconds_median": timing.medians(times),
        "added_seconds_median": timing.medians(added),
        "added_over_flax": over(added["bnjax"], added["flax"]),
        "beyond_arrays_over_flax": over(
            beyond("bnjax", ARRAYS), beyond("flax", ARRAYS)
        ),
        "step_over_flax": timing.ratio(times["bnjax"], times["flax"]),
        "bytes": memory,
        "rounds": len(times["none"]),
        "steps_per_sample": calls,
        "seconds": times,
    }


def over(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Return the ratio of the medians; None where noise hides what Flax's adds."""
    base = statistics.median(theirs)
    return statistics.median(ours) / base if base > 0 else None


def kept_bytes(layers: int, shape: Sequence[int]) -> dict[str, Any]:
    """Return what a stack in bfloat16 keeps for backward, ours and Flax's."""
    found: dict[str, Any] = {"layers": layers, "shape": list(shape), "dtype": "bf16"}
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.bfloat16)
    for kind in ("bnjax", "flax"):
        model = Stack(layers, shape[-1], KINDS[kind], dtype=jnp.bfloat16)
        loss = loss_of(model)
        params, stats = initial(model, x).values()

        def both(params, stats, x, loss=loss):
            return jax.grad(loss, argnums=(0, 2), has_aux=True)(params, stats, x, None)

        compiled = jax.jit(both).lower(params, stats, x).compile()
        found[kind] = {
            "kept": residual_bytes(loss, params, stats, x),
            **bytes_of(compiled),
        }
    found["kept_over_flax"] = found["bnjax"]["kept"] / found["flax"]["kept"]
    return found


def residual_bytes(loss: Any, params: Any, stats: Any, x: Any) -> int:
    """Return the bytes of the distinct arrays kept for backward, less `params`."""

    def pull(params, stats, x):
        return jax.vjp(lambda p, x: loss(p, stats, x, None), params, x, has_aux=True)[1]

    jaxpr = jax.make_jaxpr(pull)(params, stats, x).jaxpr
    own = set(jaxpr.invars[: len(jax.tree.leaves(params))])
    # A literal has a value and takes no memory.
    kept = {value for value in jaxpr.outvars if not hasattr(value, "val")}
    return sum(
        math.prod(variable.aval.shape) * variable.aval.dtype.itemsize
        for variable in kept - own
    )


def tables(result: dict[str, Any]) -> list[str]:
    """Return times and bytes of the steps, and the bytes kept, as Markdown."""
    rows = [
        [
            row["network"],
            "x".join(map(str, row["shape"])),
            kind,
            milliseconds(seconds),
            milliseconds(row["added_seconds_median"][kind]) if kind != "none" else "",
            *(f"{row['bytes'][kind][of] / 2**20:.1f}" for of in ("temporary", "peak")),
        ]
        for row in result["rows"]
        for kind, seconds in row["seconds_median"].items()
    ]
    shares = [
        [
            row["network"],
            *(
                "noise" if row[of] is None else f"{row[of]:.2f}"
                for of in ("added_over_flax", "beyond_arrays_over_flax")
            ),
            f"{row['step_over_flax']:.3f}",
        ]
        for row in result["rows"]
    ]
    kept = result["kept"]
    stack = (
        f"{kept['layers']} layers of convolution, BN and ReLU on "
        f"{'x'.join(map(str, kept['shape']))} in bfloat16, memory in MB:"
    )
    memory = [
        [kind, *(f"{kept[kind][of] / 1e6:.0f}" for of in ("kept", "temporary"))]
        for kind in ("bnjax", "flax")
    ]
    header = ["network", "batch", "kind", "ms", "BN adds", "temporary", "peak"]
    compared = (
        "bnjax over Flax: what BN adds, what it adds beyond the kind `arrays`, and the "
        "whole step:"
    )
    return [
        "A training step: milliseconds, what BN adds to them, and XLA's memory in MiB:",
        markdown(header, rows),
        compared,
        markdown(["network", "added", "beyond its arrays", "step"], shares),
        stack,
        markdown(["kind", "kept for backward", "temporary of the step"], memory),
    ]


if __name__ == "__main__":
    run_command(compare)
