"""How the library of the kernels is built, kept and mended."""

import functools
import os
import shutil

import jax
import pytest

from bnjax._kernels import library
from tests.kernels import needs_kernels

pytestmark = needs_kernels


@pytest.fixture(scope="module")
def built():
    """This machine's library."""
    return library._loaded(shutil.which(os.environ.get("CC", "cc")))._name


@pytest.fixture
def fresh(built, monkeypatch, tmp_path):
    """A folder for the library, which is neither built nor registered."""
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(library.CHOICE, raising=False)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)
    start_anew(monkeypatch)
    return tmp_path


def start_anew(monkeypatch):
    """As a new process: nothing is registered."""
    plain = library._registered.__wrapped__
    monkeypatch.setattr(library, "_registered", functools.cache(plain))


def use_compiler(monkeypatch, folder, *lines):
    """Compile with a program that runs `lines`; $out is the library to make."""
    path = folder / "compiler"
    script = ["#!/bin/sh", f"echo run >> {folder}/runs"]
    script += ['while [ "$1" != -o ]; do shift; done; out="$2"']
    path.write_text("\n".join([*script, *lines, ""]))
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))


def runs(folder):
    return (folder / "runs").read_text().count("run")


def test_it_is_built_once_and_kept(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert library.available()
    start_anew(monkeypatch)
    assert library.available()
    assert runs(fresh) == 1
    (kept,) = (fresh / "cache").glob("kernels-*")
    assert kept.suffix == ".so"


def test_a_damaged_library_is_built_again(built, fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    assert library.available()
    (kept,) = (fresh / "cache").glob("kernels-*")
    damaged = fresh / "damaged" / kept.name
    damaged.parent.mkdir()
    damaged.write_bytes(kept.read_bytes()[:-5000])
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(damaged.parent))
    start_anew(monkeypatch)
    assert library.available()
    assert runs(fresh) == 2
    assert damaged.read_bytes() == kept.read_bytes()


def test_a_folder_that_cannot_be_written_costs_a_build_in_each_process(
    built, fresh, monkeypatch
):
    use_compiler(monkeypatch, fresh, f"cp {built} $out")
    (fresh / "file").touch()
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(fresh / "file" / "cache"))
    assert library.available()
    start_anew(monkeypatch)
    assert library.available()
    assert runs(fresh) == 2


def test_a_choice_that_is_none(monkeypatch):
    monkeypatch.setenv(library.CHOICE, "maybe")
    with pytest.raises(ValueError, match="BNJAX_KERNELS='maybe': expected one of auto"):
        library.available()


def test_without_a_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert not library.available()
    monkeypatch.setenv(library.CHOICE, "on")
    with pytest.raises(library.BuildError, match="no C compiler"):
        library.available()


def test_a_compiler_that_fails_is_told_of_once(fresh, monkeypatch):
    use_compiler(monkeypatch, fresh, "echo 'unknown type name' >&2; exit 1")
    with pytest.warns(RuntimeWarning, match=r"unknown type name\n.*BNJAX_KERNELS=off"):
        assert not library.available()
    assert not library.available()
    assert runs(fresh) == 1
    assert not list((fresh / "cache").glob("*"))
