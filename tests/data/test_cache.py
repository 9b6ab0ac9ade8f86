from pathlib import Path

import numpy as np
import pytest

from bnjax._files import cache_dir
from bnjax.data.sources import Arrays, cached

ARRAYS = Arrays(np.arange(24, dtype=np.uint8).reshape(4, 3, 2), np.arange(4))


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return ARRAYS


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))
    return Maker()


def check(arrays):
    for found, expected in zip(arrays, ARRAYS, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_made_once(make):
    check(cached("a", make))
    check(cached("a", make))
    assert make.calls == 1
    check(cached("b", make))
    assert make.calls == 2


def test_nothing_is_left_beside_the_entry(make):
    cached("a", make)
    assert [path.name for path in cache_dir().iterdir()] == ["a.npz"]


@pytest.mark.parametrize("place", range(0, 560, 17))
def test_a_flipped_byte_is_noticed_or_harmless(make, place):
    cached("a", make)
    path = cache_dir() / "a.npz"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    check(cached("a", make))


@pytest.mark.parametrize("keep", [0, 1, 100, 400])
def test_a_truncated_entry_is_made_again(make, keep, capsys):
    cached("a", make)
    path = cache_dir() / "a.npz"
    path.write_bytes(path.read_bytes()[:keep])
    check(cached("a", make))
    assert make.calls == 2
    assert "damaged and is made again" in capsys.readouterr().err
    check(cached("a", make))
    assert make.calls == 2


def test_a_cache_that_cannot_be_written_costs_a_note(make, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    check(cached("a", make))
    assert "could not be written" in capsys.readouterr().err


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE_DIR", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert cache_dir() == Path("/one")
    monkeypatch.delenv("BNJAX_CACHE_DIR")
    assert cache_dir() == Path("/two/bnjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/three")
    assert cache_dir() == Path("/three/.cache/bnjax")
