"""Inference time of a folded network, with this project's BN and with Flax's.

    python -m benchmarks.folding

All programs are the same network with the same variables, compiled with the variables
as an argument; "folded, constant" has the variables in the program instead. The
programs run in turns, in rounds with a rotating order, so that other work on the
machine affects all of them. FLOPs and bytes accessed are XLA's count for the compiled
program. Writes benchmarks/results/folding.json. Inception of full width takes some
minutes on a CPU.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks.networks import random_variables
from benchmarks.report import ROOT, write_result
from benchmarks.timing import interleaved
from bnjax import models
from bnjax.cli import run_reporting
from bnjax.folding import fold_batch_norm
from bnjax.models import Normalization

RESULT = ROOT / "benchmarks" / "results" / "folding.json"
Run = Callable[[], jax.Array]
KINDS = {
    "unfolded": Normalization(),
    "flax": Normalization(kind="flax", unbiased=False),
}


def compiled(
    function: Callable[..., Any], *args: Any
) -> tuple[Run, dict[str, float], float]:
    """Compile; return how to run it, XLA's costs and the seconds it took."""
    started = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - started
    found = program.cost_analysis() or {}
    costs = {
        "flops": found.get("flops", float("nan")),
        "bytes_accessed": found.get("bytes accessed", float("nan")),
    }
    return functools.partial(program, *args), costs, seconds


def compare(
    model: str = "inception",
    batch_sizes: tuple[int, ...] = (1, 8),
    image_size: int = 224,
    width: float = 1.0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    constant: bool = True,
    rounds: int = 21,
    seed: int = 0,
) -> None:
    """Measure, print and write.

    Args:
        model: A convolutional network of bnjax.models.
        batch_sizes: Images in a batch, each measured by itself.
        image_size: Height and width of the images.
        width: Factor on the number of filters.
        dtype: Of the computation.
        constant: Measure the variables as constants of the program too.
        rounds: Of each program.
        seed: Of the variables and the images.
    """
    functions = {}
    for kind, normalization in KINDS.items():
        network = models.create(
            model, width=width, normalization=normalization, dtype=dtype
        )
        functions[kind] = functools.partial(network.apply, train=False)
    example = jnp.zeros((1, image_size, image_size, 3))
    variables = random_variables(network, example, seed)
    started = time.perf_counter()
    folded = fold_batch_norm(
        functions["unfolded"],
        variables,
        example,
        dtype=None if dtype == "float32" else dtype,
    )
    seconds = time.perf_counter() - started
    gone = sum(row.folded for row in folded.report)
    print(f"{gone} of {len(folded.report)} layers folded in {seconds:.2f} s")
    rows = []
    for size in batch_sizes:
        shape = (size, *example.shape[1:])
        images = jax.random.normal(jax.random.key(seed), shape)
        programs = {"folded": compiled(folded.apply, folded.variables, images)}
        for kind, function in functions.items():
            programs[kind] = compiled(function, variables, images)
        if constant:
            baked = functools.partial(folded.apply, folded.variables)
            programs["folded, constant"] = compiled(baked, images)
        rows.append({"batch_size": size} | measured(programs, rounds))
        report(rows[-1])
    result = {
        "model": model,
        "image_size": image_size,
        "width": width,
        "dtype": dtype,
        "rounds": rounds,
        "layers": len(folded.report),
        "layers_folded": gone,
        "seconds_to_fold": seconds,
        "rows": rows,
    }
    command = " ".join(["python -m benchmarks.folding", *sys.argv[1:]])
    write_result(RESULT, command, [seed], result)
    print(RESULT)


def measured(programs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Run the programs in turn; return times, costs, ratios and how outputs differ."""
    runs = {name: run for name, (run, *_) in programs.items()}
    outputs = {name: np.asarray(run(), np.float64) for name, run in runs.items()}
    difference = np.abs(outputs["folded"] - outputs["unfolded"]).max()
    waiting = {
        name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()
    }
    seconds = interleaved(waiting, rounds)
    found: dict[str, Any] = {
        "difference": difference / np.abs(outputs["unfolded"]).max(),
        "ratios": ratios(seconds),
    }
    for name, (_, costs, to_compile) in programs.items():
        found[name] = costs | {
            "seconds_to_compile": to_compile,
            "seconds_median": statistics.median(seconds[name]),
            "seconds": seconds[name],
        }
    return found


def ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return how many times as long as the folded network each takes, by rounds."""
    found = {}
    for name, times in seconds.items():
        if name != "folded":
            each = [t / ours for t, ours in zip(times, seconds["folded"], strict=True)]
            found[f"{name} / folded"] = {
                "median_of_rounds": statistics.median(each),
                "lowest": min(each),
                "highest": max(each),
                "of_fastest": min(times) / min(seconds["folded"]),
            }
    return found


def report(result: dict[str, Any]) -> None:
    """Print what was measured."""
    print(
        f"batch of {result['batch_size']}: outputs differ by "
        f"{result['difference']:.1e} of the greatest"
    )
    for name in ("folded", "folded, constant", *KINDS):
        if name in result:
            row = result[name]
            print(
                f"{name:16} {1e3 * row['seconds_median']:8.2f} ms, "
                f"{row['flops'] / 1e9:7.3f} GFLOP, "
                f"{row['bytes_accessed'] / 2**20:8.1f} MiB, "
                f"compiled in {row['seconds_to_compile']:.1f} s"
            )
    for name, ratio in result["ratios"].items():
        print(
            f"{name}: {ratio['median_of_rounds']:.3f} "
            f"({ratio['lowest']:.3f} to {ratio['highest']:.3f}); "
            f"of the fastest rounds {ratio['of_fastest']:.3f}"
        )


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(compare)))
