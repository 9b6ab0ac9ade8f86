"""A benchmark's result as a file: the numbers and all that is needed to repeat them."""

import datetime as dt
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from bnjax import _cpu

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
) -> None:
    """Write what was measured, with the command, commit and machine, as JSON.

    Args:
        path: of the file.
        command: that measured it.
        seeds: of its random numbers.
        result: what was measured.
        compiled_for: the device, where programs were compiled for one that is not here.
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


def write_run(name: str, result: Any, output: Path | None, *, quick: bool) -> None:
    """Write what this run of benchmarks.<name> measured, and print where.

    To `output` where given, else to `result_path`; a quick run is then not kept.
    """
    path = output or (None if quick else result_path(name))
    if path is not None:
        command = " ".join([f"python -m benchmarks.{name}", *sys.argv[1:]])
        write_result(path, command, [0], result)
        print(path)


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
