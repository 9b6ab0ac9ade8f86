"""What the times of a layer say: ratios of rounds, distance from the floor, means."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.passes import ACCESSES
from benchmarks.peers import Case
from benchmarks.timing import medians, ratio

BOUNDS = ("copy", "copy, fresh", "elementwise")
GROUP = ("setting", "pass", "dtype", "variation")


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
        "seconds_median": medians(times),
        "floor_seconds": statistics.median(least),
        "ratios": {name: ratio(times[name], ours) for name in libraries},
        "over_floor": {name: ratio(times[name], least) for name in libraries},
        "over_elementwise": ratio(ours, times["elementwise"]),
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
