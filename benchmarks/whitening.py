"""The cost of whitening compared with batch normalization.

    python -m benchmarks.whitening
    python -m benchmarks.whitening --channels 64 --groups 16 --output whitening.json

Measures a training pass, forward and backward, with the gradients of x, scale and bias
and the new statistics, of `bnjax.batch_norm` and of `whitening_batch_norm` by ZCA and
by five steps of Newton's method. The programs run in turns, in rounds; a ratio is the
median of the rounds' ratios. The result also has the floating point operations that XLA
counts in each compiled program; XLA does not count an eigendecomposition, which is a
call. Writes benchmarks/results/whitening-<platform>.json.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.report import markdown, milliseconds, run_command, write_run
from bnjax import BatchStats, batch_norm
from bnjax.variants.whitening import WhiteningStats, whitening_batch_norm

BATCH_NORM = "batch norm"
METHODS: dict[str, int | None] = {"ZCA": None, "Newton, 5 steps": 5}


def compare(
    channels: tuple[int, ...] = (64, 256),
    groups: tuple[int, ...] = (16, 32, 64),
    batch: int = 32,
    image: int = 14,
    rounds: int = 15,
    seconds: float = 4.0,
    output: Path | None = None,
) -> None:
    """Measure, print and write.

    Args:
        channels: Of the input.
        groups: Channels whitened together.
        batch: Examples in the input.
        image: Height and width of the input.
        rounds: Of each program, at most.
        seconds: Of each comparison, after three rounds.
        output: Where to write the result instead.
    """
    load = timing.load()
    rows = []
    for number in channels:
        shape = (batch, image, image, number)
        found = compiled(shape, [group for group in groups if number % group == 0])
        times = timing.interleaved(
            {name: run for name, (run, _) in found.items()}, rounds, seconds=seconds
        )
        rows.append(
            {
                "shape": list(shape),
                "flops": {name: flops for name, (_, flops) in found.items()},
                "seconds_median": timing.medians(times),
                "ratios": {
                    name: timing.ratio(taken, times[BATCH_NORM])
                    for name, taken in times.items()
                },
                "rounds": len(times[BATCH_NORM]),
                "seconds": times,
            }
        )
        timing.show(f"{number} channels", rows[-1]["seconds_median"])
    result = {"load_average_at_start": load, "rows": rows}
    write_run("whitening", result, tables(result), output, quick=False)


def compiled(
    shape: tuple[int, ...], groups: list[int]
) -> dict[str, tuple[Callable[[], Any], float]]:
    """Return each program, ready to run, and the operations XLA counts in it."""
    features = shape[-1]
    rng = np.random.default_rng(0)
    x, dy = np.float32(rng.normal(size=(2, *shape)))
    mixing = np.eye(features) + 0.3 * rng.normal(size=(features, features))
    x = np.float32(x @ mixing / np.sqrt(features) + 1)
    layers: dict[str, tuple[Callable[..., Any], Any]] = {
        BATCH_NORM: (batch_norm, BatchStats.init(features))
    }
    for group in groups:
        for method, iterations in METHODS.items():
            layer = functools.partial(
                whitening_batch_norm, group_size=group, iterations=iterations
            )
            stats = WhiteningStats.init(features, group)
            layers[f"{method}, groups of {group}"] = (layer, stats)
    found = {}
    for name, (layer, stats) in layers.items():
        given = x, jnp.ones(features), jnp.zeros(features), stats, dy
        program = jax.jit(functools.partial(train, layer)).lower(*given).compile()
        arguments = jax.device_put(given)
        run = functools.partial(finished, program, arguments)
        found[name] = run, program.cost_analysis()["flops"]
    return found


def train(layer: Callable[..., Any], x, scale, bias, stats, dy) -> Any:
    def forward(x, scale, bias):
        return layer(x, scale, bias, stats)

    y, pull, new = jax.vjp(forward, x, scale, bias, has_aux=True)
    # A network's gradient comes after the output.
    y, dy = jax.lax.optimization_barrier((y, dy))
    return y, new, pull(dy)


def finished(program: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(program(*arguments))


def tables(result: dict[str, Any]) -> list[str]:
    """Return times and operations as Markdown."""
    cells = [
        [
            "x".join(map(str, row["shape"])),
            name,
            milliseconds(row["seconds_median"][name]),
            f"{row['ratios'][name]:.2f}",
            f"{row['flops'][name] / 1e6:.0f}",
        ]
        for row in result["rows"]
        for name in row["ratios"]
    ]
    header = ["shape", "layer", "ms", "times BN's", "million operations"]
    return ["A training forward and backward:", markdown(header, cells)]


if __name__ == "__main__":
    run_command(compare)
