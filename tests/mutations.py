"""Break the code on purpose, one line at a time, and see the tests notice.

    python -m tests.mutations
    python -m tests.mutations kernels: "running mean"    # those of these names

Each mutation is made in a copy of the repository and must make the named tests fail.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A line of a file, what it becomes, and the tests that should fail.

    Attributes:
        name: what goes wrong.
        file: relative to the root of the repository.
        line: text that is in the file once.
        becomes: what is there in its place.
        tests: a file of tests, or the id of one test.
    """

    name: str
    file: str
    line: str
    becomes: str
    tests: str


def read_mutations(path: pathlib.Path) -> list[Mutation]:
    """Read mutations.txt, whose first lines say what is where."""
    mutations = []
    _, *blocks = path.read_text().split("\n\n")
    file = ""
    for block in blocks:
        name, *lines = block.splitlines()
        if name.startswith("# "):
            file = name.removeprefix("# ")
            continue
        text = {
            mark: "\n".join(line[2:] for line in lines if line[:2].strip() == mark)
            for mark in "-+!"
        }
        mutations.append(Mutation(name, file, text["-"], text["+"], text["!"]))
    return mutations


MUTATIONS = read_mutations(ROOT / "tests" / "mutations.txt")


def run(tests: Sequence[str], folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Run the tests of a copy, slow ones too, up to the first that fails."""
    options = ["-qx", "-n", "0", "-m", "", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        # Kernels that are broken are no business of the user's cache.
        env=os.environ | {"BNJAX_CACHE_DIR": str(folder.parent / "cache")},
        capture_output=True,
        check=False,
    )


def output_of(done: subprocess.CompletedProcess) -> str:
    """What a run of the tests printed."""
    return done.stdout.decode() + done.stderr.decode()


def survives(mutation: Mutation, folder: pathlib.Path) -> bool:
    """Whether the tests pass although the line is broken."""
    path = folder / mutation.file
    source = path.read_text()
    path.write_text(source.replace(mutation.line, mutation.becomes))
    done = run([mutation.tests], folder)
    path.write_text(source)
    if done.returncode > 1:  # a signal, which is below 0, is a failure too
        raise SystemExit(f"{mutation.name}: no tests were run\n{output_of(done)}")
    return done.returncode == 0


def main(words: Sequence[str]) -> int:
    """Try the mutations of these names, or all; return how many no test noticed."""
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not words or any(word in mutation.name for word in words)
    ]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "bnjax"
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=ignored)
        done = run(sorted({mutation.tests for mutation in chosen}), folder)
        if done.returncode:
            raise SystemExit(f"Tests fail of the code as it is:\n{output_of(done)}")
        for mutation in chosen:
            start = time.monotonic()
            survived = survives(mutation, folder)
            survivors += survived
            verdict = "SURVIVED" if survived else "caught"
            seconds = time.monotonic() - start
            text = f"{verdict:9}{seconds:4.0f} s  {mutation.file}: {mutation.name}"
            print(text, flush=True)
    return survivors


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
