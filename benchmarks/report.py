"""Result files with all information to repeat a measurement; tables and commands.

Benchmarks and experiments share this module and `benchmarks.figures`; no benchmark
imports an experiment.
"""

import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
import tyro

from bnjax import _cpu
from bnjax.cli import run_reporting

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "grain",
    "opencv-python-headless",
    "dm-haiku",
    "equinox",
    "torch",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
)
RESULTS = ROOT / "benchmarks" / "results"


def write_result(
    path: Path,
    command: str,
    seeds: list[int],
    result: Any,
    compiled_for: str | None = None,
) -> dict[str, Any]:
    """Write what was measured, with the command, commit and machine, as JSON.

    Args:
        path: of the file.
        command: that measured it.
        seeds: of its random numbers.
        result: what was measured.
        compiled_for: the device, where programs were compiled for one that is not here.

    Returns:
        What the file holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "command": command,
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": machine(compiled_for),
        "versions": versions(),
        "seeds": seeds,
        "result": result,
    }
    text = _numbers_on_a_line(json.dumps(record, indent=2)) + "\n"
    # Whoever is stopped while writing leaves the file as it was.
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, "utf-8")
    part.replace(path)
    return record


def read_result(path: Path) -> dict[str, Any]:
    """Return what `write_result` wrote; "result" has what was measured."""
    return json.loads(path.read_text("utf-8"))


def command_of(module: str) -> str:
    """Return the command line that runs a module as this process was run."""
    return " ".join([f"python -m {module}", *sys.argv[1:]])


def run_command(function: Callable[..., None]) -> NoReturn:
    """Run a function with the arguments of the command line, and exit."""
    sys.exit(run_reporting(lambda: tyro.cli(function)))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(share: float) -> str:
    """Return a share in percent with one digit, halves rounded up.

    Examples:
        >>> percent(0.5625)
        '56.3'
    """
    return f"{100 * share + 1e-9:.1f}"


def milliseconds(seconds: float) -> str:
    """Return seconds as milliseconds of three digits, for a table."""
    return f"{1e3 * seconds:.3g}"


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of `PACKAGES`; None for one that is absent."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def result_path(name: str) -> Path:
    """Return where the result of a benchmark on this device is kept."""
    device = jax.devices()[0]
    kind = "cpu" if device.platform == "cpu" else device.device_kind
    return RESULTS / f"{name}-{re.sub('[^a-z0-9]+', '-', kind.lower())}.json"


def write_run(
    name: str, result: Any, tables: Sequence[str], output: Path | None, *, quick: bool
) -> dict[str, Any] | None:
    """Print the tables of what benchmarks.<name> measured; write it and print where.

    To `output` where given, else to `result_path`; a quick run is then not kept.

    Returns:
        What the file holds; None where there is none.
    """
    print("\n\n".join(tables))
    path = output or (None if quick else result_path(name))
    if path is None:
        return None
    record = write_result(path, command_of(f"benchmarks.{name}"), [0], result)
    print(path)
    return record


def machine(compiled_for: str | None = None) -> dict[str, Any]:
    """Describe the processor and the device, or the one that is compiled for."""
    described = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if compiled_for is not None:
        return described | {"compiled_for": compiled_for}
    device = jax.devices()[0]
    return described | {
        "device": device.device_kind,
        "platform": device.platform,
        "kernels": device.platform == "cpu" and _cpu.available(),
    }


def commit() -> str | None:
    """Return the commit, marked where the programs differ from it."""
    results = (":!benchmarks/results", ":!experiments/results", ":!docs/figures")
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("diff", "--name-only", "HEAD", "--", ".", *results)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    done = subprocess.run(  # noqa: S603 (the words are those above)
        ["git", *words],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def _numbers_on_a_line(text: str) -> str:
    """Write each list of plain numbers in one line, to keep files short to read."""
    return re.sub(
        r"\[\n([^][{}\"]*)\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
