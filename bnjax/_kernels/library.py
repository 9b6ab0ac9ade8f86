"""The kernels as a library of the machine they run on: built once, kept, registered."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax

from bnjax._cache import cache_dir

CHOICE = "BNJAX_KERNELS"
CHOICES = ("auto", "on", "off")
HANDLERS = ("moments", "output", "gradient")
SOURCES = ("kernels.c", "queue.h", "loops.h")
FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
BUILD_SECONDS = 120

_log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """Why there is no library."""


def available() -> bool:
    """Whether the kernels can be called, which the first question builds.

    The environment variable BNJAX_KERNELS is "auto" to take them where a C compiler is
    found, "on" to fail where they can't be had, "off" to leave all to XLA.

    Raises:
        ValueError: for another value.
        BuildError: where it is "on" and there is no library.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in CHOICES:
        raise ValueError(
            f"{CHOICE}={choice!r}: expected one of {', '.join(CHOICES)}; "
            "unset means auto."
        )
    if choice == "off":
        return False
    problem = _registered()
    if problem and choice == "on":
        raise BuildError(problem)
    return not problem


def target(handler: str) -> str:
    """The name under which XLA knows a handler: of these sources and no others."""
    return f"bnjax_{handler}_{_digest(_sources())}"


@functools.cache
def _registered() -> str:
    """Build, load and register; say what is in the way, or nothing."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform not in ("linux", "darwin"):
        problem = f"no C compiler for the kernels of a CPU on {sys.platform}"
        _log.info("%s: XLA's own are used (docs/kernels.md)", problem)
        return problem
    try:
        library = _loaded(compiler)
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        problem = f"the kernels for a CPU could not be built: {error}"
        warnings.warn(
            f"bnjax: {problem}\nXLA's own are used, which are slower. "
            f"Mend it, or set {CHOICE}=off.",
            RuntimeWarning,
            stacklevel=2,
        )
        return problem
    for handler in HANDLERS:
        function = jax.ffi.pycapsule(getattr(library, f"bnjax_{handler}"))
        jax.ffi.register_ffi_target(target(handler), function, platform="cpu")
    return ""


def _loaded(compiler: str) -> ctypes.CDLL:
    command = [compiler, *FLAGS, *_of_this_machine()]
    identity = [*map(str.encode, command), *_sources(), _headers(), _processor()]
    name = f"kernels-{_digest(identity)}"
    try:
        folder = cache_dir()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return ctypes.CDLL(str(_kept(folder, name) or _built(command, folder, name)))
    except BuildError:
        raise
    except (OSError, RuntimeError) as error:
        _log.info("%s: the kernels are built for this process alone", error)
    with tempfile.TemporaryDirectory(prefix="bnjax-") as alone:
        return ctypes.CDLL(str(_built(command, Path(alone), name)))


def _kept(folder: Path, name: str) -> Path | None:
    """The library of this name whose content is what its name says."""
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_digest([path.read_bytes()])}":
            return path
        _log.info("%s is damaged and is built again", path)
    return None


def _built(command: Sequence[str], folder: Path, name: str) -> Path:
    """Write the library as a whole or not at all: others may be building it too."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as apart:
        fresh = Path(apart) / "kernels.so"
        include = f"-I{jax.ffi.include_dir()}"
        source = str(Path(__file__).with_name(SOURCES[0]))
        done = subprocess.run(  # noqa: S603 - the compiler the user has chosen
            [*command, include, source, "-o", str(fresh), "-lm"],
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{command[0]} said:\n{done.stderr.strip()[-1000:]}")
        return fresh.replace(folder / f"{name}-{_digest([fresh.read_bytes()])}.so")


def _of_this_machine() -> tuple[str, ...]:
    arm = platform.machine() in ("arm64", "aarch64")
    return ("-mcpu=native",) if arm else ("-march=native",)


@functools.cache
def _sources() -> tuple[bytes, ...]:
    return tuple(Path(__file__).with_name(name).read_bytes() for name in SOURCES)


def _headers() -> bytes:
    return (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_bytes()


def _processor() -> bytes:
    """What the instructions of a library depend on: a home folder may be shared."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({li for li in lines if li.startswith(wanted)})).encode()


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
