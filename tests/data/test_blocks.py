import dataclasses

import numpy as np
import pytest

from bnjax.data.config import DataConfig
from bnjax.data.pipeline import SplitBlocks, load_test
from bnjax.data.sources import Arrays, Example, open_source
from bnjax.training.evaluation import Evaluator
from bnjax.training.presets import PRESETS
from bnjax.training.program import build


@pytest.fixture(scope="module")
def program():
    return build(PRESETS["digits"].config, open_source("digits"))


@pytest.fixture(scope="module")
def initial_state(program):
    return program.initial_state()


@dataclasses.dataclass(frozen=True)
class Damaged:
    inner: object
    rows: tuple[int, ...]

    def __len__(self):
        return len(self.inner)

    def read(self, rows):
        found = self.inner.read(rows)
        return [
            Example(None, 0) if row in self.rows else example
            for row, example in zip(rows, found, strict=True)
        ]

    def where(self, row):
        return f"file-{row}.jpg"


def damage(source, rows):
    splits = {**source.splits, "test": Damaged(source.splits["test"], rows)}
    return dataclasses.replace(source, splits=splits)


@pytest.mark.parametrize("size", [1, 7, 100, 355, 400])
def test_blocks_hold_every_example_once(size):
    source = open_source("digits")
    images, labels = source.load("test", print)
    blocks = list(SplitBlocks(source, size))
    assert {block.kept.shape for block in blocks} == {(size,)}
    for name, expected in (("images", images), ("labels", labels)):
        found = [getattr(block.arrays, name)[block.kept] for block in blocks]
        np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("size", [64, 355])
def test_scores_are_those_of_the_whole(program, initial_state, size):
    source = open_source("digits")
    whole = Evaluator(program, source.load("test", print), 50)(initial_state)
    found = Evaluator(program, SplitBlocks(source, size), 50)
    for _ in range(2):
        again = found(initial_state)
        assert (again.correct, again.examples) == (whole.correct, 355)
        assert again.loss == pytest.approx(whole.loss, rel=1e-6)


def test_damaged_images_are_left_out(program, initial_state, capsys):
    source = open_source("synthetic:8x8:10:2000")
    images, labels = source.load("test", print)
    others = np.delete(np.arange(2000), [70])
    expected = Evaluator(program, Arrays(images[others], labels[others]), 50)
    found = Evaluator(program, SplitBlocks(damage(source, (70,)), 64), 50)
    assert found(initial_state).examples == 1999
    assert found(initial_state).correct == expected(initial_state).correct
    loaded = damage(source, (70,)).load("test", lambda done, total: None)
    np.testing.assert_array_equal(loaded.images, images[others])
    np.testing.assert_array_equal(loaded.labels, labels[others])
    assert capsys.readouterr().err == (
        "note: file-70.jpg cannot be decoded and is left out\n"
    )
    with pytest.raises(ValueError, match=r"2 of 355 images.*file-3\.jpg; file-90\.jpg"):
        list(SplitBlocks(damage(open_source("digits"), (3, 90)), 355))


def test_the_size_decides():
    source = open_source("digits")
    assert isinstance(load_test(DataConfig(), source, print), Arrays)
    blocks = load_test(DataConfig(resident_bytes=6400), source, print)
    assert isinstance(blocks, SplitBlocks)
    assert (blocks.size, len(blocks)) == (100, 4)
