"""Run the kernels in C under the sanitizers, by every compiler that is here.

    python -m tests.core.sanitize

`ffi_driver.c` calls the handlers as XLA does, over many shapes and in many malformed
ways. The exit status is the number of runs that found something; what a compiler lacks
is skipped, which is said.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax

from bnjax._cpu import build

FOLDER = Path(__file__).parent
SANITIZERS = ("address,undefined", "thread")
COMPILERS = ("gcc", "clang")
FLAGS = (
    "-std=c11",
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=all",
)
LIBRARIES = ("-lm", "-lpthread")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
PROBE = "#include <pthread.h>\nint main(void) { return 0; }\n"
# ThreadSanitizer wants its addresses, which the system may give to others at random.
PLAIN, NOT_RANDOM = (), ("setarch", "-R")


def compiles(compiler: str, sanitizer: str, source: Path, program: Path) -> str:
    """Compile a program; return what the compiler says of it, or nothing."""
    include = (f"-I{jax.ffi.include_dir()}", f"-I{Path(build.__file__).parent}")
    command = [compiler, *FLAGS, *build._machine_flags(), f"-fsanitize={sanitizer}"]
    done = subprocess.run(
        [*command, *include, str(source), "-o", str(program), *LIBRARIES],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr.strip() if done.returncode else ""


def runs(program: Path, launcher: tuple[str, ...]) -> tuple[int, str]:
    """Run a program; return its status and what it says."""
    done = subprocess.run(
        [*launcher, str(program)],
        env=os.environ | OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout.strip()


def launcher_of(program: Path) -> tuple[str, ...] | None:
    """How a program of this sanitizer can be run here; None if it cannot."""
    launchers = (PLAIN, NOT_RANDOM) if shutil.which("setarch") else (PLAIN,)
    return next((to for to in launchers if runs(program, to)[0] == 0), None)


def check(compiler: str, sanitizer: str, folder: Path) -> tuple[str, str]:
    """Return a verdict (clean, FOUND or skipped) and what is to be said of it."""
    probe, program = folder / "probe.c", folder / "program"
    probe.write_text(PROBE)
    if problem := compiles(compiler, sanitizer, probe, program):
        return "skipped", f"the compiler lacks it: {problem.splitlines()[-1]}"
    launcher = launcher_of(program)
    if launcher is None:
        return "skipped", "its programs do not run here"
    if problem := compiles(compiler, sanitizer, FOLDER / "ffi_driver.c", program):
        return "FOUND", problem
    status, said = runs(program, launcher)
    return ("FOUND" if status else "clean"), said


def main() -> int:
    """Run all; return how many found something."""
    found = 0
    for compiler in COMPILERS:
        path = shutil.which(compiler)
        for sanitizer in SANITIZERS:
            verdict, said = "skipped", "there is no such compiler"
            if path is not None:
                with tempfile.TemporaryDirectory() as folder:
                    verdict, said = check(path, sanitizer, Path(folder))
            print(f"{verdict}: {compiler} -fsanitize={sanitizer}: {said}", flush=True)
            found += verdict == "FOUND"
    return found


if __name__ == "__main__":
    sys.exit(main())
