"""Time to trace, lower and compile a deep network with our layer, Flax's, and none.

    python -m benchmarks.compile_time
    python -m benchmarks.compile_time --quick

The network has 100 layers of a dense layer (or a convolution, of small or of larger
images), BN and ReLU. The program computes its gradient and the new statistics. Every
repetition starts with cleared caches, and the kinds take turns. Writes
benchmarks/results/compile_time-<platform>.json; with --quick it writes only to
--output, if that is given.
"""

import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.networks import KINDS, Stack, initial, loss_of
from benchmarks.report import markdown, run_command, write_run

STAGES = ("trace", "lower", "compile")
# On a CPU the statistics of the last are summed in blocks, in a loop.
SHAPES = {"dense": (32, 64), "convolution": (4, 8, 8, 16), "images": (8, 32, 32, 16)}


def compare(
    layers: int = 100,
    networks: tuple[str, ...] = tuple(SHAPES),
    rounds: int = 7,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Measure, print and write.

    Args:
        layers: Of the network.
        networks: Of dense, convolution and images.
        rounds: Of each kind.
        quick: Ten dense layers, three rounds.
        output: Where to write the result instead.
    """
    if quick:
        layers, networks, rounds = min(layers, 10), networks[:1], min(rounds, 3)
    load = timing.load()
    rows = []
    for name in networks:
        rows.append({"network": name} | measured(name, layers, rounds))
        timing.show(
            name,
            {kind: of["total"] for kind, of in rows[-1]["seconds_median"].items()},
        )
    result = {
        "layers": layers,
        "rounds": rounds,
        "load_average_at_start": load,
        "rows": rows,
    }
    write_run("compile_time", result, tables(result), output, quick=quick)


def measured(name: str, layers: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of each stage by kind, and the ratios to Flax's."""
    shape = SHAPES[name]
    x = jnp.zeros(shape)
    stacks = {
        kind: Stack(layers, shape[-1], normalization, dense=name == "dense")
        for kind, normalization in KINDS.items()
    }
    variables = {kind: initial(stack, x) for kind, stack in stacks.items()}
    seconds: dict[str, dict[str, list[float]]] = {
        kind: {stage: [] for stage in (*STAGES, "total")} for kind in KINDS
    }

    def repeat(kind: str) -> None:
        taken = stages(stacks[kind], variables[kind], x)
        for stage, time_of_stage in zip(STAGES, taken, strict=True):
            seconds[kind][stage].append(time_of_stage)
        seconds[kind]["total"].append(sum(taken))

    timing.interleaved({kind: lambda kind=kind: repeat(kind) for kind in KINDS}, rounds)
    # The first of each is not of a round.
    rounds_of = {
        kind: {stage: times[1:] for stage, times in by_stage.items()}
        for kind, by_stage in seconds.items()
    }
    return {
        "shape": list(shape),
        "seconds_median": {
            kind: timing.medians(times) for kind, times in rounds_of.items()
        },
        "over_flax": {
            stage: timing.ratio(rounds_of["bnjax"][stage], rounds_of["flax"][stage])
            for stage in (*STAGES, "total")
        },
        "seconds": rounds_of,
    }


def stages(stack: Stack, variables: dict[str, Any], x: jax.Array) -> list[float]:
    """Trace, lower and compile with cleared caches; return the seconds of each."""
    jax.clear_caches()
    program = jax.jit(jax.grad(loss_of(stack), has_aux=True))
    times = [time.perf_counter()]
    traced = program.trace(variables["params"], variables["stats"], x, None)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(times)]


def tables(result: dict[str, Any]) -> list[str]:
    """Return the seconds of each stage as Markdown."""
    stages = list(result["rows"][0]["over_flax"])
    rows = [
        [row["network"], kind, *(f"{taken[stage]:.2f}" for stage in stages)]
        for row in result["rows"]
        for kind, taken in (
            row["seconds_median"] | {"bnjax / flax": row["over_flax"]}
        ).items()
    ]
    return [
        f"Seconds for {result['layers']} layers:",
        markdown(["network", "kind", *stages], rows),
    ]


if __name__ == "__main__":
    run_command(compare)
