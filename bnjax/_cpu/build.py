"""The library of the kernels: compiled on first use, cached, loaded and registered.

A library runs with all the rights of its user. So no library is loaded that another
user could have written: its file and the folder of the cache must belong to this user,
and nobody else may have write permission. Both are checked after they are opened, and
the open file is used, not a path that somebody may replace after the check.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from bnjax._files import cache_dir

try:
    import fcntl
except ImportError:  # Windows, for which nothing is built
    fcntl = None

CHOICE = "BNJAX_KERNELS"
CHOICES = ("auto", "on", "off")
HANDLERS = ("moments", "output", "gradient")
SOURCES = ("kernels.c", "loops.h")
FLAGS = ("-std=c11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
FOLDER, BUILD = "cpu-kernels", "build-"
BUILD_SECONDS = 120

_log = logging.getLogger(__name__)
_lock = threading.Lock()
# XLA refuses a second handler of the same name. importlib.reload keeps these.
_registered: set[str] = globals().get("_registered", set())


class BuildError(ValueError):
    """The kernels cannot be built or loaded as BNJAX_KERNELS asks."""


class NoCompilerError(BuildError):
    """There is no compiler to build the kernels with."""


def available() -> bool:
    """Whether the kernels can be called; the first call builds and registers them.

    The environment variable BNJAX_KERNELS is "auto" to use them if a C compiler is
    found, "on" to fail if they are not available, "off" to leave everything to XLA.

    Raises:
        BuildError: if it is "on" and there is no library, or if it has another value.
    """
    choice = os.environ.get(CHOICE, "auto")
    if choice not in CHOICES:
        raise BuildError(
            f"{CHOICE}={choice!r}: expected one of {', '.join(CHOICES)}; "
            "unset means auto."
        )
    if choice == "off":
        return False
    with _lock:  # functools.cache alone would let several threads build
        problem = _problem()
        if problem is None:
            return True
        if choice == "on":
            raise BuildError(f"{CHOICE}=on: {problem}") from problem
        _tell(problem)
    return False


def target(handler: str) -> str:
    """Return the name of a handler in XLA, which is specific to these sources."""
    return f"bnjax_{handler}_{_digest(_sources())}"


@functools.cache
def _problem() -> BuildError | None:
    """Build, load and register the library; return the error if this fails."""
    try:
        library = _load([*_compiler(), *FLAGS, *_machine_flags()])
    except NoCompilerError as error:
        return error
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return BuildError(f"the kernels for a CPU could not be built: {error}")
    for handler in HANDLERS:
        name = target(handler)
        if name not in _registered:
            function = jax.ffi.pycapsule(getattr(library, f"bnjax_{handler}"))
            jax.ffi.register_ffi_target(name, function, platform="cpu")
            _registered.add(name)
    return None


@functools.cache
def _tell(problem: BuildError) -> None:
    """Say once why XLA's own loops are used, but not to users who chose no compiler."""
    if isinstance(problem, NoCompilerError):
        level = logging.WARNING if os.environ.get("CC") else logging.INFO
        _log.log(level, "%s XLA's own loops are used.", problem)
        return
    warnings.warn(
        f"bnjax: {problem}\nXLA's own loops are used, which are slower. "
        f"Fix this, or set {CHOICE}=off.",
        RuntimeWarning,
        stacklevel=3,
    )


def _compiler() -> list[str]:
    """The words of $CC, else cc; the first is the path of a program.

    Raises:
        NoCompilerError: if there is no such program, or no library for this system.
    """
    if sys.platform not in ("linux", "darwin"):
        raise NoCompilerError(
            f"the kernels are for Linux and macOS, and this system is {sys.platform}."
        )
    given = os.environ.get("CC", "")
    try:
        program, *arguments = shlex.split(given) or ["cc"]
    except ValueError as error:
        message = f"CC={given!r} is not a command line: {error}."
        raise NoCompilerError(message) from error
    path = shutil.which(program)
    if path is None:
        why = f"CC is {given!r}" if given else "CC is not set"
        raise NoCompilerError(
            f"no C compiler: {why}, and there is no program {program!r}. Install GCC "
            "or Clang, or set CC to a compiler."
        )
    return [path, *arguments]


def _load(command: Sequence[str]) -> ctypes.CDLL:
    """Load the library that this or an earlier process built with a command.

    Raises:
        BuildError: if the compiler fails.
        OSError: if there is no folder for the library, or it cannot be loaded.
        subprocess.SubprocessError: if the compiler takes too long.
    """
    identity = [*map(str.encode, command), *_sources(), _headers(), _processor()]
    name = f"kernels-{_digest(identity)}"
    try:
        folder = cache_dir() / FOLDER
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _private(folder) as pinned:
            if library := _kept(pinned, name):
                return library
            with _sole_builder(pinned):
                library = _kept(pinned, name)
                return library or _open(_built(command, pinned, name))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        _log.warning(
            "The kernels are built for this process only: %s. Fix this, or set "
            "BNJAX_CACHE_DIR to a folder of your own.",
            error,
        )
    with (
        tempfile.TemporaryDirectory(prefix="bnjax-") as alone,
        _private(Path(alone)) as pinned,
    ):
        return _open(_built(command, pinned, name))


def _kept(folder: Path, name: str) -> ctypes.CDLL | None:
    """The cached library of this name, if there is one and it is sound."""
    for path in folder.glob(f"{name}-*.so"):
        try:
            return _open(path)
        except OSError as error:
            _log.warning("%s is removed: %s", folder.resolve() / path.name, error)
            path.unlink(missing_ok=True)
    return None


def _open(path: Path) -> ctypes.CDLL:
    """Load a library whose content matches the digest in its name.

    Raises:
        OSError: if another user could have written it, if it is damaged, or if it
            cannot be loaded.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        _check_owner(file, path)
        with open(file, "rb", closefd=False) as content:
            if not path.stem.endswith(f"-{_digest([content.read()])}"):
                raise OSError(f"{path.resolve()} is damaged")
        # On Linux this is the file that was checked.
        opened = Path(f"/proc/self/fd/{file}")
        library = ctypes.CDLL(str(opened if opened.exists() else path))
    except BaseException:
        os.close(file)
        raise
    # The file stays open: the loader identifies a library by its path, and would return
    # this library for the next file that is opened under the same number.
    return library


@contextlib.contextmanager
def _private(folder: Path) -> Iterator[Path]:
    """A path of a folder that only this user can write to, even if it is renamed.

    Raises:
        OSError: if others can write to it, or if it is a link or no folder.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _check_owner(file, folder)
        # On Linux this is the folder that was checked, for the compiler too.
        pinned = Path(f"/proc/{os.getpid()}/fd/{file}")
        yield pinned if pinned.exists() else folder
    finally:
        os.close(file)


def _check_owner(file: int, path: Path) -> None:
    """Raise PermissionError if another user could have written an open file."""
    found = os.fstat(file)
    if found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path.resolve()} belongs to user {found.st_uid}, not to {os.geteuid()}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path.resolve()} can be written by others: {stat.filemode(found.st_mode)}"
        )


@contextlib.contextmanager
def _sole_builder(folder: Path) -> Iterator[None]:
    """Wait until no other process builds here; remove the files of killed processes.

    The operating system releases the lock of a process that dies. If there are no
    locks, or one is held for too long, building goes on, and nothing is removed.
    """
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    locked = _locked(lock)
    try:
        if locked:
            for left in folder.glob(f"{BUILD}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        if locked and fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked process may hold it open
        os.close(lock)


def _locked(file: int) -> bool:
    """Wait for a lock; return whether it was acquired."""
    end = time.monotonic() + BUILD_SECONDS
    while fcntl is not None and time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return False
        else:
            return True
    return False


def _built(command: Sequence[str], folder: Path, name: str) -> Path:
    """Write a library, whole or not at all, under its name and its digest."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=BUILD) as apart:
        fresh = Path(apart) / "kernels.so"
        include = f"-I{jax.ffi.include_dir()}"
        source = str(Path(__file__).with_name(SOURCES[0]))
        done = subprocess.run(  # noqa: S603 - the compiler that the user has chosen
            [*command, include, source, "-o", str(fresh), "-lm"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip()[-1000:] or f"nothing (status {done.returncode})"
            raise BuildError(f"{command[0]} said:\n{said}")
        fresh.chmod(0o700)  # the umask may let a group write
        return fresh.replace(folder / f"{name}-{_digest([fresh.read_bytes()])}.so")


def _machine_flags() -> tuple[str, ...]:
    arm = platform.machine() in ("arm64", "aarch64")
    return ("-mcpu=native",) if arm else ("-march=native",)


@functools.cache
def _sources() -> tuple[bytes, ...]:
    return tuple(Path(__file__).with_name(name).read_bytes() for name in SOURCES)


def _headers() -> bytes:
    return (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_bytes()


def _processor() -> bytes:
    """What the code of a library depends on: machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = ("model name", "flags", "CPU part", "Features")
    return "\n".join(sorted({li for li in lines if li.startswith(wanted)})).encode()


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
