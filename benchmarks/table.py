"""The tables of docs/performance.md and of the README, from the result files.

    python -m benchmarks.table
    python -m benchmarks.table --write

Without --write those of the page are printed; with it they take the place of what page
and README have between their two markers.
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import RESULTS, ROOT
from bnjax.training.errors import UserError, run_reporting

_LONGEST = 7
BEGIN, END = "<!-- tables: python -m benchmarks.table --write -->", "<!-- end -->"


def main(write: bool = False) -> None:
    """Print the tables, or write them to the pages.

    Args:
        write: To docs/performance.md, and the shortest to the README.
    """
    if not write:
        print(tables(RESULTS))
        return
    for page, make in PAGES.items():
        page.write_text(replaced(page, make(RESULTS)), "utf-8")
        print(page)


def replaced(page: Path, text: str) -> str:
    """Return what is in the page, with `text` between its markers."""
    now = page.read_text("utf-8")
    if BEGIN not in now or END not in now:
        raise UserError(f"{page.name} lacks a marker; expected {BEGIN} and {END}.")
    before, _, rest = now.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def shortest(folder: Path) -> str:
    """Return the means over the shapes of training and inference, as Markdown."""
    record = json.loads((folder / "layer-cpu.json").read_text("utf-8"))
    plain = [g for g in record["result"]["summary"] if "plain" in g.values()]
    others = list(plain[0]["ratios"])
    names = {"train": "forward and backward", "inference": "inference"}
    return _table(
        ["", "buffers", *others],
        (
            [
                f"{names[group['pass']]}, {group['dtype']}",
                "new" if group["setting"] == "fresh" else "used again",
                *(f"{group['ratios'][name]['mean']:.2f}" for name in others),
            ]
            for group in sorted(plain, key=lambda g: names[g["pass"]])
        ),
    )


def tables(folder: Path) -> str:
    """Return the tables of the result files in a folder, as Markdown."""
    found = []
    for name, make in TABLES.items():
        for path in sorted(folder.glob(f"{name}-*.json")):
            record = json.loads(path.read_text("utf-8"))
            found += [_heading(path, record), *make(record["result"])]
    return "\n\n".join(found)


def _heading(path: Path, record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    load = record["result"].get("load_average_at_start")
    busy = f" Load average at the start: {load:.1f}." if load is not None else ""
    named = ("jax", "flax", "dm-haiku", "equinox", "torch")
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in named if versions.get(name)
    )
    return (
        f"### {path.name}\n\n"
        f"`{record['command']}`\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}"
        f"{', C kernels' if machine.get('kernels') else ''}; "
        f"{libraries}; {record['date'][:10]}, "
        f"commit {(record['commit'] or 'unknown')[:10]}.{busy}"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _mean_and(ratio: dict[str, Any], other: str) -> str:
    return f"{ratio['mean']:.2f} ({ratio[other]:.2f})"


def _layer(result: dict[str, Any]) -> list[str]:
    groups, rows = result["summary"], result["rows"]
    ours, *others = rows[0]["ratios"]
    names = ("setting", "pass", "dtype", "variation")
    means = _table(
        [*names, "shapes", *others, "over the floor", "over an affine map"],
        (
            [
                *(group[name] for name in names),
                str(group["shapes"]),
                *(_mean_and(ratio, "lowest") for ratio in group["ratios"].values()),
                _mean_and(group["over_floor"], "highest"),
                _mean_and(group["over_elementwise"], "highest")
                if "inference" in group.values()
                else "",
            ]
            for group in groups
        ),
    )
    each = _table(
        ["shape", "dtype", "setting", ours, *others, "floor"],
        (
            [
                row["shape"],
                row["dtype"],
                row["setting"],
                *(_ms(row["seconds_median"][name]) for name in (ours, *others)),
                _ms(row["floor_seconds"]),
            ]
            for row in rows
            if (row["pass"], row["variation"]) == ("train", "plain")
        ),
    )
    absent = ", ".join(result["absent"]) or "none"
    reading = (
        f"Times as long as {ours}: geometric mean over the shapes, in brackets the "
        f"lowest; {ours} over the memory floor, and in inference over a bare affine "
        "map of the channels, in brackets the highest. "
        f"Libraries absent: {absent}."
    )
    return [
        reading,
        means,
        "Milliseconds of a training forward and backward:",
        each,
    ]


def _step(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["rows"]:
        for kind, seconds in row["seconds_median"].items():
            added = row["added_seconds_median"].get(kind)
            rows.append(
                [
                    row["network"],
                    "x".join(map(str, row["shape"])),
                    kind,
                    _ms(seconds),
                    "" if added is None else _ms(added),
                    f"{row['bytes'][kind]['temporary'] / 2**20:.1f}",
                    f"{row['bytes'][kind]['peak'] / 2**20:.1f}",
                ]
            )
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
        f"{'x'.join(map(str, kept['shape']))} in bfloat16, in MB:"
    )
    return [
        "A training step: milliseconds, what BN adds, and XLA's MiB:",
        _table(
            ["network", "batch", "kind", "ms", "BN adds", "temporary", "peak"], rows
        ),
        "bnjax over Flax: what BN adds, that beyond the kind `arrays`, and the step:",
        _table(["network", "added", "beyond its arrays", "step"], shares),
        stack,
        _table(
            ["kind", "kept for backward", "temporary of the step"],
            (
                [kind, *(f"{kept[kind][of] / 1e6:.0f}" for of in ("kept", "temporary"))]
                for kind in ("bnjax", "flax")
            ),
        ),
    ]


def _compile_time(result: dict[str, Any]) -> list[str]:
    stages = list(result["rows"][0]["over_flax"])
    rows = []
    for row in result["rows"]:
        rows += [
            [row["network"], kind, *(f"{taken[stage]:.2f}" for stage in stages)]
            for kind, taken in row["seconds_median"].items()
        ]
        over = row["over_flax"]
        rows.append(
            [
                row["network"],
                "bnjax / flax",
                *(f"{over[stage]:.2f}" for stage in stages),
            ]
        )
    return [
        f"{result['layers']} layers, seconds:",
        _table(["network", "kind", *stages], rows),
    ]


def _scaling(result: dict[str, Any]) -> list[str]:
    found = []
    for name in ("batch", "channels"):
        rows = result["rows"][name]
        if not rows:
            continue
        libraries = list(rows[0]["ratios"])
        found += [
            f"Milliseconds against {name}, one device:",
            _table(
                ["shape", *libraries],
                (
                    [
                        row["shape"],
                        *(_ms(row["seconds_median"][name]) for name in libraries),
                    ]
                    for row in rows
                ),
            ),
        ]
    rows = [
        [
            str(row["devices"]),
            library,
            _ms(row["seconds_median"][f"{library}, shared"]),
            _ms(row["added_by_sharing"][library]),
            _ms(row["predicted"][library]),
            str(collectives["count"]),
            str(collectives["bytes"]),
        ]
        for row in result["rows"]["devices"]
        for library, collectives in row["collectives"].items()
    ]
    header = ["devices", "library", "ms", "added by sharing", "predicted"]
    return [
        *found,
        "Milliseconds over devices, the same input on each, and the all-reduces:",
        _table([*header, "count", "bytes"], rows),
    ]


def _kernels(result: dict[str, Any]) -> list[str]:
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
    header = ["shape", "dtype", "library", "kernels", "the longest"]
    return [
        "Microseconds of a training pass, and of a step, by kernel:",
        _table(header, rows),
    ]


PAGES = {ROOT / "docs" / "performance.md": tables, ROOT / "README.md": shortest}
TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "layer": _layer,
    "step": _step,
    "compile_time": _compile_time,
    "scaling": _scaling,
    "kernels": _kernels,
}


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(main)))
