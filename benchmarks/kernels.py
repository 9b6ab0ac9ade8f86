"""The time of each kernel in a layer's pass and in a training step.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --shapes 32x56x56x256 --dtypes bfloat16 --networks mlp

Runs the training pass of a layer under JAX's profiler, iterated in reused buffers as in
benchmarks.layer, and adds up the times of the kernels of the compiled program. Does the
same for the steps of benchmarks.step, and joins kernels whose names differ only by a
number. The profiler takes up to half a microsecond for each kernel: the results show
which kernels there are and how they compare, but not their sum. Writes
benchmarks/results/kernels-<platform>.json.
"""

import collections
import gzip
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks import peers, timing
from benchmarks.layer import compile_one, installed, parse
from benchmarks.networks import KINDS
from benchmarks.passes import Program
from benchmarks.peers import Case
from benchmarks.report import markdown, run_command, write_run
from benchmarks.step import sized, step_program
from bnjax.data.config import SettingError

SHAPES = ("256x28x28x64", "32x28x28x192", "32x8x8x48")
LIBRARIES = ("bnjax", "flax.linen")
# The runtime's own events have capitals or spaces.
_INSTRUCTION = re.compile(r"[a-z][a-z0-9_.-]*$")
_COUNT, _RUNS = 10, 3
_LONGEST = 7


def compare(
    shapes: tuple[str, ...] = SHAPES,
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    variation: Literal["plain", "relu", "residual"] = "plain",
    libraries: tuple[str, ...] = LIBRARIES,
    networks: tuple[str, ...] = ("inception",),
    output: Path | None = None,
) -> None:
    """Profile, print and write.

    Args:
        shapes: Of the input, channels last.
        dtypes: Of input and output, float32 or bfloat16.
        variation: Of plain, relu and residual.
        libraries: Of bnjax, flax.linen, flax.nnx, haiku and equinox.
        networks: Of mlp, inception and resnet50, whose steps are profiled too.
        output: Where to write the result instead.
    """
    _, absent = installed(libraries)
    for name in libraries:
        if name in absent or name not in peers.PEERS:
            raise SettingError(
                f"--libraries {name}: not installed here, or without a profile by JAX; "
                f"expected some of {', '.join(peers.PEERS)}."
            )
    timing.keep_memory()
    rows = []
    for shape in shapes:
        for dtype in dtypes:
            case = Case(parse(shape), dtype, variation)
            for library in libraries:
                given = peers.arrays(case)
                program = compile_one(library, case, "train", given, _COUNT)
                row = {"shape": shape, "dtype": dtype, "variation": variation}
                rows.append(row | {"library": library, "kernels": profiled(program)})
    for name in networks:
        for kind in KINDS:
            program, _ = step_program(sized(name, None), kind)
            row = {"shape": f"step of {name}", "dtype": "float32", "library": kind}
            rows.append(row | {"kernels": alike(profiled(program))})
    result = {"rows": rows}
    write_run("kernels", result, tables(result), output, quick=False)


def profiled(program: Program) -> list[dict[str, Any]]:
    """Return the kernels of a pass or a step, the longest first."""
    program.run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(_RUNS):
                program.run()
        (path,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    return totals(events, _RUNS * program.count)


def totals(events: Iterable[dict[str, Any]], passes: int) -> list[dict[str, Any]]:
    """Add up the kernels among a trace's events.

    Args:
        events: of the trace, with name, phase and microseconds.
        passes: that the trace is of.

    Returns:
        Name, calls and microseconds of a pass, the longest first. A loop is left out:
        its kernels are there.
    """
    found = collections.defaultdict(list)
    for event in events:
        name = event.get("name", "")
        kernel = _INSTRUCTION.match(name) and not name.startswith("while")
        if event.get("ph") == "X" and kernel:
            found[name].append(event["dur"])
    rows = [
        {"name": name, "calls": len(taken) / passes, "us": sum(taken) / passes}
        for name, taken in found.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def alike(kernels: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Take together the kernels whose names differ by a number alone."""
    found: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        name = re.sub(r"[.\d]+$", "", kernel["name"])
        group = found.setdefault(name, {"name": name, "calls": 0.0, "us": 0.0})
        group["calls"] += kernel["calls"]
        group["us"] += kernel["us"]
    return sorted(found.values(), key=lambda group: -group["us"])


def tables(result: dict[str, Any]) -> list[str]:
    """Return the longest kernels of each program as Markdown."""
    rows = [
        [
            *(row[name] for name in ("shape", "dtype", "library")),
            str(len(row["kernels"])),
            ", ".join(
                f"{kernel['name']} {kernel['us']:.0f}"
                + (f" ({kernel['calls']:.0f} calls)" if kernel["calls"] > 1 else "")
                for kernel in row["kernels"][:_LONGEST]
            ),
        ]
        for row in result["rows"]
    ]
    header = [
        "shape",
        "dtype",
        "library",
        "number of kernels",
        "those that take longest",
    ]
    return [
        "Microseconds by kernel, in a training pass and in a step:",
        markdown(header, rows),
    ]


if __name__ == "__main__":
    run_command(compare)
