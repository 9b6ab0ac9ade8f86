"""The tables of docs and of the README, from the result files.

    python -m benchmarks.table
    python -m benchmarks.table --write

Without --write, prints the tables of docs/library/performance.md and
docs/library/compiled.md. With it, replaces what the README and the pages of docs have
between their two markers.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compile_time, kernels, layer, scaling, step
from benchmarks.aot import KINDS, TARGETS
from benchmarks.report import RESULTS, ROOT, markdown, read_result, run_command
from bnjax.data.config import SettingError

Figure = Callable[[dict[str, Any]], float | None]
Tables = Callable[[dict[str, Any]], list[str]]

BEGIN, END = "<!-- tables: python -m benchmarks.table --write -->", "<!-- end -->"


def main(write: bool = False) -> None:
    """Print the tables, or write them to the pages.

    Args:
        write: To pages of docs, the shortest to the README.
    """
    if not write:
        print(f"{tables(RESULTS)}\n\n{compiled(RESULTS)}")
        return
    for page, make in PAGES.items():
        page.write_text(replaced(page, make(RESULTS)), "utf-8")
        print(page)


def replaced(page: Path, text: str) -> str:
    """Return what is in the page, with `text` between its markers."""
    now = page.read_text("utf-8")
    if BEGIN not in now or END not in now:
        raise SettingError(f"{page.name} lacks a marker; expected {BEGIN} and {END}.")
    before, _, rest = now.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}"


def readme(folder: Path) -> str:
    """Return the table of the README: what the others take over what bnjax takes."""
    return markdown(
        ["what", "device", *_PEERS.values()],
        [*_layer_on_a_cpu(folder), *_resnet50(folder)],
    )


_PEERS = {
    "flax.linen": "Flax linen",
    "flax.nnx": "Flax nnx",
    "haiku": "Haiku",
    "equinox": "Equinox",
    "torch": "PyTorch",
}
_FIGURES = {
    "cycles": "cycles",
    "traffic": "traffic_bytes",
    "memory": "temporary_bytes",
}


def _layer_on_a_cpu(folder: Path) -> list[list[str]]:
    """Return the times of one layer with new buffers, means over the shapes."""
    record = read_result(folder / "layer-cpu.json")
    names = {"train": "forward and backward", "inference": "inference"}
    return [
        [
            f"one layer, {names[group['pass']]}, {group['dtype']}: time",
            f"{record['machine']['cores']} CPU cores",
            *(f"{group['ratios'][peer]['mean']:.2f}" for peer in _PEERS),
        ]
        for wanted in names
        for group in record["result"]["summary"]
        if (group["pass"], group["setting"]) == (wanted, "fresh")
        and group["variation"] == "plain"
    ]


def _resnet50(folder: Path) -> list[list[str]]:
    """Return compiled training steps of ResNet-50 in bfloat16, Flax's over ours."""
    rows = []
    for path in sorted(folder.glob("compiled-*.json")):
        kinds = _kinds(path, "resnet50")
        if (flax := kinds.get("flax")) is None:
            continue
        device = _device(path.stem.removeprefix("compiled-"))
        # Traffic tells of a GPU what cycles tell of a TPU.
        first = "cycles" if flax["cycles"] is not None else "traffic"
        pairs = [("", "bnjax_inside", first), ("", "bnjax_inside", "memory")]
        policy = " under `checkpoint_policy`"
        pairs += [(policy, "bnjax_policy", first), (policy, "bnjax_policy", "memory")]
        for note, kind, word in pairs:
            if kind in kinds:
                figure = _FIGURES[word]
                share = flax[figure] / kinds[kind][figure]
                rows.append(
                    [
                        f"ResNet-50 training step{note}: {word}",
                        f"{device}, compiled",
                        f"{share:.3f}",
                        *[""] * (len(_PEERS) - 1),
                    ]
                )
    return rows


def tables(folder: Path) -> str:
    """Return the tables of the result files in a folder, as Markdown."""
    return "\n\n".join(
        part for name, make in TABLES.items() for part in _found(folder, name, make)
    )


def compiled(folder: Path) -> str:
    """Return the tables of what was compiled for devices that are not here."""
    return "\n\n".join(_found(folder, "compiled", _compiled))


def memory(folder: Path) -> str:
    """Return what a policy saves and costs for whole networks, as Markdown."""
    lines = []
    for path in sorted(folder.glob("compiled-*.json")):
        target = path.stem.removeprefix("compiled-")
        for network in ("resnet50", "inception"):
            lines += _memory(target, network, _kinds(path, network))
    header = ["device", "network", "layer", "temporary memory", "traffic", "cycles"]
    return markdown(header, lines)


def _device(target: str) -> str:
    """Return the name by which people know a target, such as "TPU v5e"."""
    return f"TPU {target}" if target[0] == "v" else f"NVIDIA {target.upper()}"


def _kinds(path: Path, network: str) -> dict[str, dict[str, Any]]:
    """Return the programs of a network in bfloat16 on one chip, by kind."""
    return {
        row["kind"]: row
        for row in read_result(path)["result"]["rows"]
        if (row["network"], row["dtype"], row["chips"]) == (network, "bfloat16", 1)
        and "failed" not in row
    }


def _memory(target: str, network: str, wanted: dict[str, dict[str, Any]]) -> list[list]:
    flax = wanted.get("flax")
    if flax is None or "bnjax_policy" not in wanted:
        return []
    figures = ("temporary_bytes", 1e-6, "MB"), ("traffic_bytes", 1e-9, "GB")
    lines = []
    for kind in ("flax", "flax_policy", "bnjax", "bnjax_inside", "bnjax_policy"):
        if (row := wanted.get(kind)) is None:
            continue
        cells = [_device(target), network, kind]
        for name, factor, unit in (*figures, ("cycles", 1e-6, "M")):
            value = row[name]
            cells.append(
                ""
                if value is None
                else f"{value * factor:.4g} {unit} ({value / flax[name]:.2f})"
            )
        lines.append(cells)
    return lines


def _found(folder: Path, name: str, make: Tables) -> list[str]:
    found = []
    for path in sorted(folder.glob(f"{name}-*.json")):
        record = read_result(path)
        found += [_heading(path, record), *make(record["result"])]
    return found


def _heading(path: Path, record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    load = record["result"].get("load_average_at_start")
    busy = f" Load average at the start: {load:.1f}." if load is not None else ""
    named = ("jax", "flax", "dm-haiku", "equinox", "torch")
    target = machine.get("compiled_for")
    if target is not None:
        named = ("jax", *TARGETS[target].packages, *named[1:-1])
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in named if versions.get(name)
    )
    return (
        f"### {path.name}\n\n"
        f"`{record['command']}`\n\n"
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{f'compiled for {target}' if target else machine['device']}"
        f"{', C kernels' if machine.get('kernels') else ''}; "
        f"{libraries}; {record['date'][:10]}, "
        f"commit {(record['commit'] or 'unknown')[:10]}.{busy}"
    )


# How many ratios to Flax's stand beside a figure: its own, and that of what BN adds.
_COMPARED = {
    "Cycles, in millions": 2,
    "Traffic, in GB": 2,
    "Temporary memory, in MB": 1,
}


def _compiled(result: dict[str, Any]) -> list[str]:
    alone = [row for row in result["rows"] if row["sharing"] is None]
    figures: dict[str, Figure] = {
        "Cycles, in millions": lambda row: _scaled(row["cycles"], 1e-6),
        "Traffic, in GB": lambda row: row["traffic_bytes"] / 1e9,
        "Traffic for each layer of BN, in arrays of the network's input": lambda row: (
            row["traffic_bytes"] / row["array_bytes"] / row["normalizations"]
            if row["network"] in ("layer", "chain", "block")
            else None
        ),
        "Temporary memory, in MB": lambda row: row["temporary_bytes"] / 1e6,
        "Fusions of a convolution and sums": lambda row: (
            None if row["cycles"] is None else float(row["fused_sums"])
        ),
        "Fusions for each layer of BN": lambda row: (
            row["fusions"] / row["normalizations"]
        ),
        "Convolutions": lambda row: float(row["convolutions"]),
        "Seconds to compile": lambda row: row["compile_seconds"],
    }
    found = []
    for name, figure in figures.items():
        found += _by_kind(name, alone, figure, _COMPARED.get(name, 0))
    found += _collectives([row for row in result["rows"] if row["sharing"]])
    notes = [f"{kind} is left out: {why}" for kind, why in result["absent"].items()]
    for row in result["rows"]:
        words = [row["network"], row["dtype"], row["kind"]]
        if row["sharing"]:
            words += [row["sharing"], str(row["chips"])]
        if "failed" in row:
            notes.append(f"{' '.join(words)} failed: {row['failed']}.")
        elif row["control_flow"]:
            count = row["control_flow"]
            notes.append(f"{' '.join(words)}: branches or loops not counted: {count}.")
    commits = Counter((row["commit"] or "unknown")[:10] for row in result["rows"])
    if len(commits) > 1:
        each = (f"{count} of {commit}" for commit, count in commits.items())
        notes.append(f"Programs by commit: {', '.join(each)}.")
    return [*found, "\n".join(f"- {note}" for note in notes)] if notes else found


def _scaled(figure: float | None, factor: float) -> float | None:
    return None if figure is None else factor * figure


def _by_kind(
    name: str, rows: Sequence[dict[str, Any]], figure: Figure, ratios: int
) -> list[str]:
    """Return a table of one figure, a kind a column; nothing where no row has it."""
    lines: dict[tuple[str, str], dict[str, float | None]] = {}
    failed = set()
    for row in rows:
        line = row["network"], row["dtype"]
        if "failed" in row:
            failed.add((*line, row["kind"]))
        value = None if "failed" in row else figure(row)
        if value is not None or "failed" in row:
            lines.setdefault(line, {})[row["kind"]] = value
    if all(value is None for values in lines.values() for value in values.values()):
        return []
    kinds = [kind for kind in KINDS if any(kind in values for values in lines.values())]
    beside = (
        "",
        ": in brackets the ratio to flax",
        ", then the ratio of what BN adds to what it adds with flax",
    )
    return [
        f"{name}{''.join(beside[: ratios + 1])}.",
        markdown(
            ["network", "dtype", *kinds],
            (
                [
                    *line,
                    *(
                        "failed"
                        if (*line, kind) in failed
                        else _with_ratios(values, kind, ratios)
                        for kind in kinds
                    ),
                ]
                for line, values in lines.items()
            ),
        ),
    ]


def _with_ratios(values: dict[str, float | None], kind: str, count: int) -> str:
    value, flax, none = (values.get(name) for name in (kind, "flax", "none"))
    if value is None:
        return ""
    written = f"{value:.4g}" if 1e-3 <= abs(value) < 1e3 else f"{value:.0f}"
    ratios = []
    if flax and kind not in ("flax", "none"):
        ratios.append(f"{value / flax:.2f}")
        if none is not None and flax > none:
            ratios.append(f"{(value - none) / (flax - none):.2f}")
    told = ", ".join(ratios[:count])
    return f"{written} ({told})" if told else written


def _collectives(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines: dict[tuple[str, ...], dict[bool, str]] = {}
    for row in rows:
        line = row["network"], row["sharing"], str(row["chips"]), row["kind"]
        found = row.get("collectives")
        cell = "failed" if found is None else f"{found['count']} ({found['bytes']})"
        lines.setdefault(line, {})[row["backward"]] = cell
    return [
        "Collectives of chips that share statistics, and in brackets their bytes.",
        markdown(
            ["network", "shared by", "chips", "kind", "forward", "with gradients"],
            (
                [*line, *(cells.get(backward, "") for backward in (False, True))]
                for line, cells in lines.items()
            ),
        ),
    ]


PAGES = {
    ROOT / "docs" / "library" / "performance.md": tables,
    ROOT / "docs" / "library" / "compiled.md": compiled,
    ROOT / "docs" / "library" / "memory.md": memory,
    ROOT / "README.md": readme,
}
TABLES: dict[str, Tables] = {
    "layer": layer.tables,
    "step": step.tables,
    "compile_time": compile_time.tables,
    "scaling": scaling.tables,
    "kernels": kernels.tables,
}


if __name__ == "__main__":
    run_command(main)
