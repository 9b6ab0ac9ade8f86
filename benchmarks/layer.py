"""The time of one batch normalization layer, its peers, and the memory floor.

    python -m benchmarks.layer
    python -m benchmarks.layer --quick

Passes: "train" is forward and backward, with the output, the gradients of x, scale and
bias and the new statistics; "forward" is forward in training; "inference" normalizes by
the running statistics. Settings: "fresh" calls the pass by itself, with its outputs in
new buffers from the default malloc, so that its time includes allocation. "reused"
iterates the pass so that every buffer is reused, and tells glibc to keep memory, for
PyTorch; its time does not include allocation. The floor is the time of a copy, measured
in the same rounds, times the number of times that the pass must read or write an array
of the input's size (8 in train, 3 in forward, 2 in inference).

The programs run in turns, in rounds with a rotating order. A ratio is the median of the
rounds' ratios; a mean over shapes is geometric. Outputs and gradients are compared
first, so that all programs do the same work. A library that is not installed is
reported as absent. Writes benchmarks/results/layer-<platform>.json; with --quick it
writes only to --output, if that is given.
"""

import dataclasses
import functools
import gc
import importlib.util
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import passes, peers, timing, torch_peer
from benchmarks.passes import ACCESSES, PASSES, Program
from benchmarks.peers import PEERS, Case
from benchmarks.report import markdown, milliseconds, run_command, write_run
from bnjax.data.config import SettingError

SHAPES = (
    "256x28x28x64",
    "128x14x14x512",
    "64x56x56x64",
    "4096x1024",
    "32x112x112x64",
    "32x28x28x192",
    "32x7x7x1024",
    "32x56x56x256",
    "32x14x14x1024",
    "60x100",
    "32x32x32x8",
    "32x8x8x48",
    "4x4x4x8",
)
VARIED = ("32x28x28x192", "32x14x14x1024")
QUICK = ("32x28x28x192", "1024x1024", "60x100", "4x4x4x8")
MODULES = {"flax.linen": "flax", "flax.nnx": "flax", "torch": "torch"}
# How far two libraries may be apart, by the norm of an array. Where a rounding moves a
# value over the ReLU's kink, one gradient is there and the other is not.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
# What follows a PyTorch program is not slowed by OpenMP's spinning threads.
SETTLE = 0.003
BOUNDS = ("copy", "copy, fresh", "elementwise")
GROUP = ("setting", "pass", "dtype", "variation")
_MIB = 2**20
# Of a large array so many values are compared, those of the first examples.
_COMPARED = 2**20

Setting = Literal["fresh", "reused"]


def compare(
    shapes: tuple[str, ...] = SHAPES,
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    kinds: tuple[Literal["train", "forward", "inference"], ...] = PASSES,
    settings: tuple[Setting, ...] = ("fresh", "reused"),
    libraries: tuple[str, ...] = (*PEERS, "torch"),
    varied: tuple[str, ...] = VARIED,
    rounds: int = 15,
    seconds: float = 1.0,
    quick: bool = False,
    output: Path | None = None,
) -> None:
    """Measure, print and write.

    Args:
        shapes: Of the input, channels last, such as 32x28x28x192.
        dtypes: Of input and output.
        kinds: Passes.
        settings: Buffers.
        libraries: What to compare; the first is what the others are compared with.
        varied: Shapes that are measured with a ReLU and with a residual and a ReLU too.
        rounds: Of each program, at most.
        seconds: Of each comparison, after three rounds.
        quick: A few small shapes and rounds, in about a minute.
        output: Where to write the result instead.
    """
    if quick:
        shapes = QUICK if shapes == SHAPES else shapes
        varied = varied if varied != VARIED else QUICK[:1]
        rounds, seconds = min(rounds, 5), min(seconds, 0.2)
    present, absent = installed(libraries)
    for name in absent:
        print(f"{name} is absent: not installed here")
    load = timing.load()
    kept = None
    rows = []
    for setting in settings:
        # From here on glibc keeps memory: what has new buffers comes first.
        if setting == "reused":
            kept = timing.keep_memory()
        for case in cases(shapes, dtypes, varied):
            for kind in kinds:
                row = measured(case, kind, setting, present, rounds, seconds)
                rows.append(row)
                name = " ".join(row[of] for of in (*GROUP, "shape"))
                timing.show(name, row["seconds_median"])
    result = {
        "absent": absent,
        "load_average_at_start": load,
        "malloc_keeps_memory_when_reused": kept,
        "rounds_at_most": rounds,
        "summary": summarize(rows),
        "rows": rows,
    }
    write_run("layer", result, tables(result), output, quick=quick)


def installed(libraries: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which of the libraries are here, and which are not."""
    known = (*PEERS, "torch")
    for name in libraries:
        if name not in known:
            raise SettingError(
                f"--libraries {name}: expected some of {', '.join(known)}."
            )
    present = [
        name
        for name in libraries
        if importlib.util.find_spec(MODULES.get(name, name)) is not None
    ]
    return present, [name for name in libraries if name not in present]


def cases(
    shapes: Sequence[str], dtypes: Sequence[str], varied: Sequence[str]
) -> list[Case]:
    """Return the cases to measure: every shape plain, some of them varied."""
    found = []
    for dtype in dtypes:
        found += [Case(parse(shape), dtype) for shape in shapes]
        for shape in shapes:
            if shape in varied:
                found += [
                    Case(parse(shape), dtype, name) for name in peers.VARIATIONS[1:]
                ]
    return found


def parse(shape: str) -> tuple[int, ...]:
    """Read a shape as the command line has it."""
    try:
        sizes = tuple(int(size) for size in shape.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise SettingError(
            f"--shapes {shape}: expected two or more sizes, such as 32x28x28x192."
        )
    return sizes


def measured(
    case: Case,
    kind: str,
    setting: Setting,
    libraries: Sequence[str],
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Check and time one pass of one case, of every library and the floor."""
    values = peers.arrays(case)
    # The work of a sample is about the same whatever the shape.
    again = int(np.clip(128 * _MIB // case.bytes, 2, 256))
    calls = int(np.clip(32 * _MIB // case.bytes, 1, 64)) if setting == "fresh" else 1
    count = again if setting == "reused" else 1
    programs = {
        name: compile_one(name, case, kind, values, count) for name in libraries
    }
    bounds = passes.bounds(case, values)
    programs["copy"] = passes.reused(*bounds["copy"], again)
    programs["elementwise"] = passes.reused(*bounds["elementwise"], again)
    if setting == "fresh":
        programs["copy, fresh"] = passes.fresh(*bounds["copy"])
        programs["elementwise"] = passes.fresh(*bounds["elementwise"])
    check(case, kind, {name: programs[name] for name in libraries})
    for name in programs.keys() - set(libraries):
        programs[name].run()
    times = timing.interleaved(
        {name: program.run for name, program in programs.items()},
        rounds,
        seconds=seconds,
        calls=calls,
        settle=SETTLE,
        warm=False,
    )
    for name, program in programs.items():
        times[name] = [taken / program.count for taken in times[name]]
    temporary = {name: programs[name].temporary_bytes for name in libraries}
    del programs
    gc.collect()
    return row_of(case, kind, setting, times) | {"temporary_bytes": temporary}


def compile_one(
    library: str, case: Case, kind: str, values: dict[str, np.ndarray], count: int
) -> Program:
    """Return the program of one library, iterated where `count` is not 1."""
    if library == "torch":
        return torch_peer.programs(case, kind, values, count)
    layer = peers.make(library, case, values)
    given = passes.operands(case, layer, values)
    one = functools.partial(passes.one_pass, layer, kind)
    if count == 1:
        program = passes.fresh(one, given)
    else:
        program = passes.reused(one, given, count)
    if not layer.channels_first:
        return program
    return dataclasses.replace(program, read=passes.channels_last)


def check(case: Case, kind: str, programs: dict[str, Program]) -> None:
    """Raise where two libraries differ in an output or a gradient.

    Raises:
        SettingError: with the name of the library that is far from the first.
    """
    (first, program), *others = programs.items()
    examples = max(1, _COMPARED // math.prod(case.shape[1:]))

    def outputs(program: Program) -> dict[str, np.ndarray]:
        return {
            name: program.read(value[:examples] if value.ndim > 1 else value)
            for name, value in program.run().items()
            if name != "state"
        }

    expected = outputs(program)
    for other, program in others:
        found = outputs(program)
        for name, value in expected.items():
            got = found[name]
            far = np.linalg.norm(got - value) / np.linalg.norm(value)
            if not far <= TOLERANCE[case.dtype]:
                raise SettingError(
                    f"{other} and {first} do other work: {name} of {kind}, "
                    f"{case.variation}, {case.dtype}[{case.name}], is {far:.1e} of its "
                    f"norm apart; expected at most {TOLERANCE[case.dtype]:.0e}. Leave "
                    "one of them out with --libraries, or mend it."
                )


def floor(
    case: Case, kind: str, copies: Sequence[float], new_copies: Sequence[float]
) -> list[float]:
    """Return the least time of a pass by the copies of the same rounds.

    Each output costs a copy into a new buffer, the other accesses half a copy in
    buffers that are used again.

    Args:
        case: what the layer is given.
        kind: of `passes.PASSES`.
        copies: seconds of a copy in buffers used again, a number a round.
        new_copies: seconds of a copy into the kind of buffer the layer writes to.
    """
    accesses, outputs = ACCESSES[kind, case.variation == "residual"]
    rest = (accesses - 2 * outputs) / 2
    return [
        outputs * new + rest * old for new, old in zip(new_copies, copies, strict=True)
    ]


def row_of(
    case: Case, kind: str, setting: str, times: dict[str, list[float]]
) -> dict[str, Any]:
    """Return what one comparison gives; the first of the libraries is compared."""
    libraries = [name for name in times if name not in BOUNDS]
    ours = times[libraries[0]]
    least = floor(case, kind, times["copy"], times.get("copy, fresh", times["copy"]))
    return {
        "setting": setting,
        "pass": kind,
        "dtype": case.dtype,
        "variation": case.variation,
        "shape": case.name,
        "bytes": case.bytes,
        "seconds_median": timing.medians(times),
        "floor_seconds": statistics.median(least),
        "ratios": {name: timing.ratio(times[name], ours) for name in libraries},
        "over_floor": {name: timing.ratio(times[name], least) for name in libraries},
        "over_elementwise": timing.ratio(ours, times["elementwise"]),
        "rounds": len(ours),
        "seconds": {
            name: [float(f"{second:.4g}") for second in taken]
            for name, taken in times.items()
        },
    }


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return geometric means over the shapes, by setting, pass, dtype and variation."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(row[name] for name in GROUP)

    found = []
    ordered = sorted(rows, key=key)
    for names, grouped in itertools.groupby(ordered, key):
        group = list(grouped)
        libraries = list(group[0]["ratios"])
        first = libraries[0]
        found.append(
            dict(zip(GROUP, names, strict=True))
            | {
                "shapes": len(group),
                "ratios": {
                    name: _over_shapes(group, [row["ratios"][name] for row in group])
                    for name in libraries[1:]
                },
                "over_floor": _over_shapes(
                    group, [row["over_floor"][first] for row in group]
                ),
                "over_elementwise": _over_shapes(
                    group, [row["over_elementwise"] for row in group]
                ),
            }
        )
    return found


def _over_shapes(
    group: Sequence[dict[str, Any]], ratios: Sequence[float]
) -> dict[str, Any]:
    return {
        "mean": statistics.geometric_mean(ratios),
        "lowest": min(ratios),
        "lowest_shape": group[ratios.index(min(ratios))]["shape"],
        "highest": max(ratios),
        "highest_shape": group[ratios.index(max(ratios))]["shape"],
    }


def tables(result: dict[str, Any]) -> list[str]:
    """Return the means over the shapes, and each shape's times, as Markdown."""
    ours, *others = result["rows"][0]["ratios"]

    def mean_and(ratio: dict[str, Any], other: str) -> str:
        return f"{ratio['mean']:.2f} ({ratio[other]:.2f})"

    means = [
        [
            *(group[name] for name in GROUP),
            str(group["shapes"]),
            *(mean_and(ratio, "lowest") for ratio in group["ratios"].values()),
            mean_and(group["over_floor"], "highest"),
            mean_and(group["over_elementwise"], "highest")
            if "inference" in group.values()
            else "",
        ]
        for group in result["summary"]
    ]
    each = [
        [
            row["shape"],
            row["dtype"],
            row["setting"],
            *(milliseconds(row["seconds_median"][name]) for name in (ours, *others)),
            milliseconds(row["floor_seconds"]),
        ]
        for row in result["rows"]
        if (row["pass"], row["variation"]) == ("train", "plain")
    ]
    reading = (
        f"How many times as long as {ours} each library takes: the geometric mean over "
        "the shapes, and in brackets the lowest ratio. The last two columns are "
        f"{ours} over the memory floor and, in inference, over a bare affine map of "
        "the channels, and in brackets the highest ratio. "
        f"Absent libraries: {', '.join(result['absent']) or 'none'}."
    )
    header = [*GROUP, "shapes", *others, "over the floor", "over an affine map"]
    found = [reading, markdown(header, means)]
    if each:
        header = ["shape", "dtype", "setting", ours, *others, "floor"]
        title = "Forward and backward in training, in milliseconds:"
        found += [title, markdown(header, each)]
    return found


if __name__ == "__main__":
    run_command(compare)
