"""How the library of the kernels is built, kept, checked and mended."""

import contextlib
import functools
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from bnjax._cpu import build
from tests.core import needs_kernels

ROOT = Path(__file__).parents[2]
pytestmark = needs_kernels


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """This machine's library, as a file to copy."""
    folder = tmp_path_factory.mktemp("built")
    command = [*build._compiler(), *build.FLAGS, *build._machine_flags()]
    return build._built(command, folder, "kernels")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A folder for the library, which is neither built nor registered."""
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(build.CHOICE, raising=False)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    monkeypatch.setattr(build, "_registered", set())
    start_anew(monkeypatch)
    return tmp_path


def start_anew(monkeypatch):
    """As a new process: nothing is registered."""
    for name in ("_problem", "_tell"):
        plain = getattr(build, name).__wrapped__
        monkeypatch.setattr(build, name, functools.cache(plain))


def use_compiler(monkeypatch, folder, *lines):
    """Compile with a program that runs `lines`; $out is the library to make."""
    path = folder / "compiler"
    script = ["#!/bin/sh", f'echo "run $*" >> {folder}/runs']
    script += ['while [ "$1" != -o ]; do shift; done; out="$2"']
    path.write_text("\n".join([*script, *lines, ""]))
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


def runs(folder):
    return (folder / "runs").read_text().count("run")


def kept_in(folder):
    (kept,) = (folder / "cache" / build.FOLDER).glob("kernels-*")
    return kept


def run_program(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_it_is_built_once_and_kept(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    start_anew(monkeypatch)
    assert build.available()
    assert runs(fresh) == 1
    assert kept_in(fresh).suffix == ".so"


def test_a_damaged_library_is_built_again(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    kept = kept_in(fresh)
    damaged = fresh / "damaged" / build.FOLDER / kept.name
    damaged.parent.mkdir(0o700, parents=True)
    damaged.write_bytes(kept.read_bytes()[:-5000])
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(fresh / "damaged"))
    start_anew(monkeypatch)
    assert build.available()
    assert runs(fresh) == 2
    assert damaged.read_bytes() == kept.read_bytes()


def test_a_folder_that_cannot_be_written_costs_a_build_in_each_process(
    built, fresh, monkeypatch
):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    (fresh / "file").touch()
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(fresh / "file" / "cache"))
    assert build.available()
    start_anew(monkeypatch)
    assert build.available()
    assert runs(fresh) == 2


def test_a_library_is_made_for_its_user_alone(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    before = os.umask(0)
    try:
        assert build.available()
    finally:
        os.umask(before)
    kept = kept_in(fresh)
    for path in (kept, kept.parent):
        assert not path.stat().st_mode & 0o077
    start_anew(monkeypatch)
    assert build.available()
    assert runs(fresh) == 1


def owned_by_another(monkeypatch, is_another):
    """Make the open files for which `is_another` holds another user's."""
    fstat = os.fstat

    def changed(file):
        found = fstat(file)
        if not is_another(found):
            return found
        fields = list(found)
        fields[4] += 1
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", changed)


def assert_built_alone(folder, caplog, reason):
    """What is kept is not loaded: this process has built a library of its own."""
    with caplog.at_level(logging.WARNING):
        assert build.available()
    assert runs(folder) == 2
    assert "built for this process only" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_is_not_trusted(
    mode, built, fresh, monkeypatch, caplog
):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    kept_in(fresh).parent.chmod(mode)
    start_anew(monkeypatch)
    assert_built_alone(fresh, caplog, "can be written by others: drwx")


def test_a_folder_of_another_user_is_not_trusted(built, fresh, monkeypatch, caplog):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    inode = kept_in(fresh).parent.stat().st_ino
    owned_by_another(monkeypatch, lambda found: found.st_ino == inode)
    start_anew(monkeypatch)
    assert_built_alone(fresh, caplog, f"{build.FOLDER} belongs to user")


def test_a_link_to_a_folder_is_not_followed(built, fresh, monkeypatch, caplog):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    folder = kept_in(fresh).parent
    folder.rename(fresh / "elsewhere")
    folder.symlink_to(fresh / "elsewhere")
    start_anew(monkeypatch)
    assert_built_alone(fresh, caplog, build.FOLDER)


@pytest.mark.parametrize("which", ["another user's", "others can write", "a link"])
def test_a_library_that_another_user_could_have_written_is_not_loaded(
    which, built, fresh, monkeypatch, caplog
):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    kept = kept_in(fresh)
    if which == "another user's":
        inode = kept.stat().st_ino
        owned_by_another(monkeypatch, lambda found: found.st_ino == inode)
    elif which == "others can write":
        kept.chmod(0o722)
    else:
        kept.rename(fresh / "elsewhere.so")
        kept.symlink_to(fresh / "elsewhere.so")
    before = kept.lstat().st_ino
    start_anew(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert build.available()
    assert runs(fresh) == 2
    assert f"{kept} is removed" in caplog.text
    assert kept.lstat().st_ino != before
    assert not kept.is_symlink()
    assert not kept.stat().st_mode & 0o022


def test_what_is_loaded_is_the_file_that_was_checked(built, fresh, monkeypatch):
    """A folder exchanged after the check of its owner is not looked into."""
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    kept = kept_in(fresh)
    folder, check = kept.parent, build._check_owner

    def check_and_exchange(file, path):
        check(file, path)
        if path == folder:
            folder.rename(fresh / "checked")
            folder.mkdir()
            (folder / kept.name).write_bytes(b"of a stranger")

    monkeypatch.setattr(build, "_check_owner", check_and_exchange)
    start_anew(monkeypatch)
    if not Path("/proc/self/fd").exists():
        pytest.skip("a folder is held by its name alone")
    assert build.available()
    assert runs(fresh) == 1


def test_what_killed_builds_left_is_cleared_away(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, "kill -9 $PPID")
    program = "import bnjax._cpu; bnjax._cpu.available()"
    killed = run_program(program, BNJAX_CACHE_DIR=str(fresh / "cache"))
    assert killed.returncode == -9
    folder = fresh / "cache" / build.FOLDER
    assert list(folder.glob("build-*"))
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert build.available()
    assert not list(folder.glob("build-*"))


@pytest.mark.slow
def test_one_process_builds_and_the_others_wait(built, fresh, monkeypatch):
    """None clears away what another one is building."""
    use_compiler(monkeypatch, fresh, "sleep 3", f"cp {built} $out")
    program = "import bnjax._cpu; print(bnjax._cpu.available())"
    environment = os.environ | {"BNJAX_CACHE_DIR": str(fresh / "cache")}
    command = [sys.executable, "-c", program]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE
                )
            )
            for _ in range(2)
        ]
        said = [process.communicate(timeout=120)[0] for process in processes]
    assert said == [b"True\n"] * 2
    assert runs(fresh) == 1


def test_a_lock_that_is_never_released_does_not_stop_a_build(built, fresh, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    monkeypatch.setattr(build, "BUILD_SECONDS", 1)
    folder = fresh / "cache" / build.FOLDER
    folder.mkdir(0o700, parents=True)
    (folder / "build-running").mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = time.monotonic()
        assert build.available()
    assert time.monotonic() - start < 60
    assert (folder / "build-running").exists()


THREADS = """
import threading
from importlib import reload
from bnjax._cpu import build
import jax, jax.numpy as jnp
found = []
def ask():
    try:
        found.append(build.available())
    except Exception as error:
        found.append(repr(error))
threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
reload(build)
ask()
print(found)
import bnjax._cpu as cpu
print([a.tolist() for a in jax.jit(lambda x: cpu.moments(x, (0,)))(jnp.ones((4, 1)))])
"""


@pytest.mark.slow
def test_threads_and_reloads_register_once(tmp_path):
    """Without a folder for the library, each build is another library."""
    (tmp_path / "file").touch()
    unusable = str(tmp_path / "file" / "cache")
    done = run_program(THREADS, BNJAX_CACHE_DIR=unusable)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[True, True, True, True]\n[[1.0], [0.0], [0.0]]\n"


def test_a_choice_that_is_none(monkeypatch):
    monkeypatch.setenv(build.CHOICE, "maybe")
    with pytest.raises(ValueError, match="BNJAX_KERNELS='maybe': expected one of auto"):
        build.available()


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not build.available()
    monkeypatch.setenv(build.CHOICE, "on")
    with pytest.raises(build.BuildError, match="no C compiler"):
        build.available()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nope -m64", "CC is 'nope -m64', and there is no program 'nope'"),
        ("gcc 'a", 'CC="gcc \'a" is not a command line'),
        ("", "CC is not set, and there is no program 'cc'"),
    ],
)
def test_an_error_names_what_cc_was(given, said, fresh, monkeypatch):
    monkeypatch.setenv("CC", given)
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.setenv(build.CHOICE, "on")
    with pytest.raises(build.BuildError, match="BNJAX_KERNELS=on") as caught:
        build.available()
    assert said in str(caught.value)


def test_cc_may_have_arguments(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    monkeypatch.setenv("CC", f"{os.environ['CC']} -m64 '-DA=b c'")
    assert build.available()
    assert (fresh / "runs").read_text().startswith("run -m64 -DA=b c -std=c11")


def test_a_compiler_that_fails_is_told_of_once(fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, "echo 'unknown type name' >&2; exit 1")
    with pytest.warns(RuntimeWarning, match=r"unknown type name\n.*BNJAX_KERNELS=off"):
        assert not build.available()
    assert not build.available()
    assert runs(fresh) == 1
    assert not list((fresh / "cache" / build.FOLDER).glob("[!l]*"))
