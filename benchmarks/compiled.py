"""Cycles, traffic and memory of programs compiled for TPUs and GPUs, without running.

    pip install -r requirements-compiled.txt
    python -m benchmarks.compiled
    python -m benchmarks.compiled --targets v5e --networks chain --kinds none flax bnjax

The programs are compiled and never run: forward and backward of one layer with a ReLU;
the gradients of a chain of convolutions, of bottleneck blocks and of whole networks;
and the layer and the chain over several chips that share statistics. Each program
exists without BN, with each library's layer, and with activations recomputed in the
backward pass. docs/library/compiled.md says what the results show and what they do not
show, `benchmarks.hlo` what each figure counts, `benchmarks.aot` what a program is.

All targets take hours. Each program is compiled in a separate process and written to
benchmarks/results/compiled-<target>.json as soon as it is done; the entry of a program
that fails or takes too long has the reason. A second start continues: it skips a
program that the file has from the same commit, and does not compile a program that is
unchanged for the compiler since another commit, except with --again. It tries failed
programs again. It replaces a file of other versions.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import tyro

import bnjax
from benchmarks import report
from benchmarks.aot import KINDS, NETWORKS, POLICIES, SHARING, TARGETS, Program
from bnjax.cli import run_reporting
from bnjax.data.config import SettingError

DTYPES = ("bfloat16", "float32")
LIBRARIES = {"nnx": "flax", "haiku": "dm-haiku", "equinox": "equinox"}
"""Packages of the kinds that are compared on small networks alone."""
SMALL_ONLY = {*LIBRARIES, "renorm", "ghost"}
SHARED_BATCH = 16
"""Of each chip that shares statistics: more takes long and changes no collective."""
DEPENDS_ON = ("jax", "jaxlib", "flax", "dm-haiku", "equinox")

Row = dict[str, Any]


def compare(
    targets: tuple[str, ...] = tuple(TARGETS),
    networks: tuple[str, ...] = tuple(NETWORKS),
    dtypes: tuple[Literal["bfloat16", "float32"], ...] = DTYPES,
    kinds: tuple[str, ...] = KINDS,
    chips: tuple[int, ...] | None = None,
    layers: int | None = None,
    batch_size: int | None = None,
    jobs: int = 1,
    timeout: float = 3600.0,
    again: bool = False,
    hlo_folder: Path | None = None,
    output: Path | None = None,
) -> None:
    """Compile, print and write.

    Args:
        targets: Of v5e, v6e, v5p and h200.
        networks: Of layer, chain, block, resnet50, inception and mlp.
        dtypes: Of images and activations.
        kinds: Of none, flax, nnx, haiku, equinox, bnjax, bnjax_inside, renorm, ghost,
            flax_policy and bnjax_policy; other libraries and the variants on layer,
            chain and mlp, the policies on chain, resnet50 and inception.
        chips: Sharing statistics; 1 for programs of one chip. All if not given.
        layers: Of chain and block, in place of their own; needs --output.
        batch_size: Of a chip, in place of each network's own; needs --output.
        jobs: Programs to compile at a time.
        timeout: Seconds after which a program is given up.
        again: Compile what the result files have, too.
        hlo_folder: Where to keep the text of what was compiled.
        output: Folder of the result files, in place of benchmarks/results.
    """
    for flag, given, known in (
        ("targets", targets, TARGETS),
        ("networks", networks, NETWORKS),
        ("kinds", kinds, KINDS),
    ):
        for name in given:
            if name not in known:
                raise SettingError(
                    f"--{flag} {name}: expected some of {', '.join(known)}."
                )
    if output is None and (layers or batch_size):
        raise SettingError(
            "--layers and --batch-size make other networks than the tables have; "
            "name a folder for the results with --output."
        )
    check_installed(targets)
    absent = {kind: why for kind in KINDS if (why := why_absent(kind))}
    for kind in set(kinds) & set(absent):
        print(f"{kind} is left out: {absent[kind]}")
    programs = [
        program
        for target in targets
        for program in grid(target, layers, batch_size)
        if program.network in networks
        and program.dtype in dtypes
        and program.kind in set(kinds) - set(absent)
        and (chips is None or program.chips in chips)
    ]
    folder = output or report.RESULTS
    files = {
        target: ResultFile(folder / f"compiled-{target}.json", target, absent)
        for target in targets
    }
    failed = compile_all(programs, files, jobs, timeout, again, hlo_folder)
    for file in files.values():
        print(file.path)
    if failed:
        raise SettingError(
            f"{failed} of {len(programs)} programs failed; the files have the reasons."
        )


def check_installed(targets: Sequence[str]) -> None:
    """Raise where the compiler of a target is not installed."""
    found = report.versions()
    for target in targets:
        missing = [name for name in TARGETS[target].packages if found[name] is None]
        if missing:
            raise SettingError(
                f"--targets {target}: {', '.join(missing)} not installed; write pip "
                "install -r requirements-compiled.txt, or other targets."
            )


def why_absent(kind: str) -> str | None:
    """Return why a kind cannot be compiled; None where it can."""
    package = LIBRARIES.get(kind)
    if package is not None and report.versions()[package] is None:
        return f"{package} is not installed."
    if kind == "bnjax_policy" and not hasattr(bnjax, "checkpoint_policy"):
        return "this bnjax has no checkpoint_policy."
    return None


def grid(
    target: str, layers: int | None = None, batch_size: int | None = None
) -> list[Program]:
    """Return every program of a target, in the order of the tables.

    Args:
        target: of `TARGETS`.
        layers: of chain and block, in place of their own.
        batch_size: of a chip, in place of each network's own.
    """
    found = []
    for name, network in NETWORKS.items():
        depth = {"chain": TARGETS[target].chain, "block": 3}.get(name, 1)
        if layers and name in ("chain", "block"):
            depth = layers
        found += [
            Program(target, name, dtype, kind, depth, batch_size or network.batch)
            for dtype in DTYPES
            for kind in KINDS
            if (kind not in SMALL_ONLY or name in ("layer", "chain", "mlp"))
            and (kind != "equinox" or name != "mlp")
            and (kind not in POLICIES or name in ("chain", "resnet50", "inception"))
        ]
        if name not in ("layer", "chain"):
            continue
        batch = batch_size or SHARED_BATCH
        found += [
            Program(
                target, name, "bfloat16", kind, depth, batch, chips, sharing, backward
            )
            for sharing in SHARING
            for chips in TARGETS[target].topologies
            if chips > 1
            for kind in ("flax", "bnjax")
            for backward in (False, True)
        ]
    return found


class ResultFile:
    """The figures of a target's programs, in a file that is written as they come.

    Args:
        path: of the file.
        target: of `TARGETS`.
        absent: kinds that cannot be compiled, and why.
    """

    def __init__(self, path: Path, target: str, absent: dict[str, str]):
        self.path, self.target, self.absent = path, target, absent
        self.rows: dict[Program, Row] = {}
        names = [field.name for field in dataclasses.fields(Program)]
        if not path.exists():
            return
        record = json.loads(path.read_text("utf-8"))
        now = report.versions()
        for package in (*DEPENDS_ON, *TARGETS[target].packages):
            was = record["versions"].get(package)
            if was != now[package]:
                print(
                    f"{path.name} is replaced: it is of {package} {was}, installed "
                    f"is {now[package]}"
                )
                return
        for row in record["result"]["rows"]:
            self.rows[Program(**{name: row.pop(name) for name in names})] = row

    def put(self, program: Program, row: Row) -> None:
        """Write the file, with a new row for a program, whatever size it had."""
        cell = _unsized(program)
        self.rows = {
            one: old for one, old in self.rows.items() if _unsized(one) != cell
        } | {program: row}
        order = {_unsized(one): place for place, one in enumerate(grid(self.target))}
        ordered = sorted(self.rows, key=lambda one: order.get(_unsized(one), 0))
        rows = [dataclasses.asdict(one) | self.rows[one] for one in ordered]
        command = " ".join(["python -m benchmarks.compiled", *sys.argv[1:]])
        result = {"absent": self.absent, "rows": rows}
        report.write_result(self.path, command, [], result, self.target)


def _unsized(program: Program) -> Program:
    """Return what names a program in the tables."""
    return dataclasses.replace(program, layers=0, batch=0)


def compile_all(
    programs: Sequence[Program],
    files: dict[str, ResultFile],
    jobs: int,
    timeout: float,
    again: bool,
    hlo_folder: Path | None,
) -> int:
    """Compile what the files lack, print and write each as it is done.

    Returns:
        How many of them failed.
    """
    commit = report.commit()
    clean = commit is not None and not commit.endswith("-dirty")
    known: dict[Program, Row] = {}
    missing = []
    for program in programs:
        row = files[program.target].rows.get(program, {})
        if again or "digest" not in row:
            missing.append(program)
        elif not clean or row["commit"] != commit:
            missing.append(program)
            known[program] = row
    if len(missing) < len(programs):
        print(f"{len(programs) - len(missing)} of {len(programs)} are there already")
    commands = {
        program: command(program, known.get(program, {}).get("digest"), hlo_folder)
        for program in missing
    }
    failed = 0
    start = time.monotonic()
    for count, (program, new) in enumerate(outcomes(commands, jobs, timeout), start=1):
        failed += "failed" in new
        same = "digest" in new and "fusions" not in new
        row = known[program] | new if same else new
        files[program.target].put(program, row)
        print(
            f"[{count}/{len(missing)}, {time.monotonic() - start:.0f} s] "
            f"{program.name}: {'as it was: ' if same else ''}{told(row)}",
            flush=True,
        )
    return failed


def command(program: Program, digest: str | None, hlo_folder: Path | None) -> list[str]:
    """Return the command that compiles a program and prints its figures."""
    words = ["-m", "benchmarks.aot", json.dumps(dataclasses.asdict(program))]
    if digest is not None:
        words += ["--known", digest]
    if hlo_folder is not None:
        words += ["--hlo-folder", str(hlo_folder.absolute())]
    return [sys.executable, *words]


def outcomes(
    commands: dict[Program, list[str]], jobs: int, timeout: float
) -> Iterator[tuple[Program, Row]]:
    """Run the commands and yield what each printed, or why it failed, as it ends.

    Args:
        commands: that print JSON in their last line, by program.
        jobs: how many run at a time.
        timeout: seconds after which one is stopped.
    """
    waiting = collections.deque(commands)
    running: dict[Program, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                program = waiting.popleft()
                environment = TARGETS[program.target].environment
                running[program] = _Child(commands[program], environment)
            for program, child in list(running.items()):
                row = child.outcome(timeout)
                if row is not None:
                    del running[program]
                    yield program, row | {"commit": child.commit}
            time.sleep(0.05)
    finally:
        for child in running.values():
            child.stop()


class _Child:
    """A command at work."""

    def __init__(self, words: list[str], environment: dict[str, str]):
        self.started = time.monotonic()
        # That of what it imports, whatever is changed while it compiles.
        self.commit = report.commit()
        # It prints to files, which unlike pipes are never full.
        self.folder = Path(tempfile.mkdtemp())
        with self._open("stdout") as stdout, self._open("stderr") as stderr:
            self.process = subprocess.Popen(  # noqa: S603 (the words of `command`)
                words,
                cwd=report.ROOT,
                env=os.environ | environment,
                stdout=stdout,
                stderr=stderr,
            )

    def outcome(self, timeout: float) -> Row | None:
        """Return what it printed, or why it failed; None while it is at work."""
        status = self.process.poll()
        if status is None:
            if time.monotonic() - self.started < timeout:
                return None
            self.stop()
            return {"failed": f"not compiled in {timeout:.0f} s"}
        stdout, stderr = (
            (self.folder / stream).read_text("utf-8", errors="replace")
            for stream in ("stdout", "stderr")
        )
        self.stop()
        if status != 0:
            return {"failed": f"exit status {status}: {reason(stderr)}"}
        try:
            return json.loads(stdout.splitlines()[-1])
        except (IndexError, ValueError):
            return {"failed": f"printed no figures: {reason(stdout)}"}

    def stop(self) -> None:
        """End it, where it has not ended, and remove what it printed."""
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder)

    def _open(self, stream: str) -> IO[bytes]:
        return (self.folder / stream).open("wb")


def reason(said: str) -> str:
    """Return the line of what a program wrote to stderr that tells why it failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        # An exception of Python's; or a failed check of XLA's, before its stack.
        if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|F\d{4} ", line)
    ]
    return (telling or lines or ["it said nothing"])[-1][:300]


def told(row: Row) -> str:
    """Return the main figures of a row in a line."""
    if "failed" in row:
        return f"failed, {row['failed']}"
    cycles = row["cycles"]
    figures = {
        "cycles": None if cycles is None else f"{cycles / 1e6:.4g} M",
        "traffic": f"{row['traffic_bytes'] / 1e9:.4g} GB",
        "temporary": f"{row['temporary_bytes'] / 1e6:.1f} MB",
        "fusions": row["fusions"],
        "collectives": row["collectives"]["count"],
    }
    listed = (f"{name} {figure}" for name, figure in figures.items() if figure)
    return f"{', '.join(listed)}; compiled in {row['compile_seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(compare)))
