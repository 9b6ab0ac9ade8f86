import cv2
import numpy as np
import pytest

from bnjax.data.blocks import (
    CropBlocks,
    SplitBlocks,
    boxes,
    crop_blocks,
    cut,
    load_test,
    padded_rows,
    scaled_sizes,
)
from bnjax.data.config import DataConfig
from bnjax.data.records import Arrays
from bnjax.data.sources import open_source
from bnjax.training.evaluation import Evaluator
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program
from tests.data import image_folder


@pytest.fixture(scope="module")
def program():
    return Program(PRESETS["digits"].config, open_source("digits"))


@pytest.fixture(scope="module")
def initial_state(program):
    return program.initial_state()


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


def test_damaged_images_are_left_out(program, initial_state, damage, capsys):
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
    # Once for each that went through the images.
    notes = capsys.readouterr().err.splitlines()
    assert set(notes) == {"note: file-70.jpg cannot be decoded and is left out"}
    assert len(notes) == 3
    with pytest.raises(ValueError, match=r"2 of 355 images.*file-3\.jpg; file-90\.jpg"):
        list(SplitBlocks(damage(open_source("digits"), (3, 90)), 355))


def test_the_size_decides():
    source = open_source("digits")
    assert isinstance(load_test(DataConfig(), source, print), Arrays)
    blocks = load_test(DataConfig(resident_bytes=6400), source, print)
    assert isinstance(blocks, SplitBlocks)
    assert (blocks.size, len(blocks)) == (100, 4)


@pytest.mark.parametrize(
    ("examples", "batch"), [(10, 3), (10, 5), (10, 10), (10, 64), (1, 1)]
)
def test_padded_rows_meet_every_example_once(examples, batch):
    rows, mask = padded_rows(examples, batch)
    assert rows.shape == mask.shape == (-(-examples // batch), batch)
    assert rows[mask].tolist() == list(range(examples))
    assert ((rows >= 0) & (rows < examples)).all()


# Of a network of 224 and an image of 256x320: shorter side, longer side, the middle
# and the last place of the square, and of a corner or the center of 224 in the square.
SCALES = [
    (256, 320, 32, 64, 16, 32),
    (288, 360, 36, 72, 32, 64),
    (320, 400, 40, 80, 48, 96),
    (352, 440, 44, 88, 64, 128),
]


def by_hand(*, portrait):
    expected = []
    for scale, (side, _, middle, last, center, corner) in enumerate(SCALES):
        places = [(y, x, 224) for y in (0, corner) for x in (0, corner)]
        for along in (0, middle, last):
            for y, x, size in (*places, (center, center, 224), (0, 0, side)):
                top, left = (along + y, x) if portrait else (y, along + x)
                expected += [(scale, top, left, size, size, f) for f in (0, 1)]
    return expected


@pytest.mark.parametrize("portrait", [False, True])
def test_144_crops_are_those_of_the_protocol(portrait):
    # The stored image is twice as large.
    shape = (640, 512) if portrait else (512, 640)
    found = boxes(*shape, 224, 144)
    assert found.shape == (144, 6)
    assert list(map(tuple, found.tolist())) == by_hand(portrait=portrait)
    step = -1 if portrait else 1
    assert scaled_sizes(*shape, 224, 144) == [sides[:2][::step] for sides in SCALES]


@pytest.mark.parametrize(
    ("shape", "corners"),
    [
        # 256x385: the central square begins at 64.
        ((200, 301), [(0, 64), (0, 96), (32, 64), (32, 96), (16, 80)]),
        # 385x256.
        ((301, 200), [(64, 0), (64, 32), (96, 0), (96, 32), (80, 16)]),
    ],
)
def test_10_crops_are_of_the_central_square(shape, corners):
    expected = [(0, *c, 224, 224, flip) for c in corners for flip in (0, 1)]
    assert list(map(tuple, boxes(*shape, 224, 10).tolist())) == expected


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        (224, [256, 288, 320, 352]),
        (32, [37, 41, 46, 50]),
        (28, [32, 36, 40, 44]),
        (8, [9, 10, 11, 13]),
        (1, [1, 1, 1, 2]),
    ],
)
def test_sides_are_in_proportion_to_the_network(size, sides):
    assert scaled_sizes(9, 9, size, 144) == [(side, side) for side in sides]


def test_crops_lie_within_the_image():
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width, size = (int(n) for n in rng.integers(1, 400, 3))
        for crops in (10, 144):
            found = boxes(height, width, size, crops)
            shapes = np.array(scaled_sizes(height, width, size, crops))[found[:, 0]]
            assert (found[:, 1:3] >= 0).all()
            assert (found[:, 1:3] + found[:, 3:5] <= shapes).all()
            assert (found[:, 3:5] >= size).all()


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_pixels_of_10_crops(channels):
    # An image whose shorter side is that of the scale already is not resized.
    image = np.random.default_rng(1).integers(0, 256, (37, 45, *channels), np.uint8)
    images, counts = cut(image, 32, 10)
    assert counts.tolist() == [1] * 10
    expected = []
    for y, x in ((0, 4), (0, 9), (2, 6), (5, 4), (5, 9)):
        part = image[y : y + 32, x : x + 32]
        expected += [part, part[:, ::-1]]
    np.testing.assert_array_equal(images, expected)


def test_pixels_of_144_crops():
    # Each crop by its box, from images that OpenCV resizes here, in the boxes' order.
    image = np.random.default_rng(2).integers(0, 256, (60, 47, 3), np.uint8)
    images, counts = cut(image, 32, 144)
    area, cubic = cv2.INTER_AREA, cv2.INTER_CUBIC
    sizes = (37, 47, area), (41, 52, area), (46, 59, area), (50, 64, cubic)
    scaled = [cv2.resize(image, size, interpolation=kind) for *size, kind in sizes]
    expected = []
    for scale, y, x, height, width, mirrored in boxes(60, 47, 32, 144).tolist():
        part = scaled[scale][y : y + height, x : x + width]
        if height > 32:
            part = cv2.resize(part, (32, 32), interpolation=area)
        expected.append(cv2.flip(part, 1) if mirrored else part)
    found = np.repeat(images, counts, axis=0)
    found, expected = (
        sorted(crop.tobytes() for crop in crops) for crops in (found, expected)
    )
    assert found == expected


def test_equal_crops_are_cut_once():
    image = np.random.default_rng(3).integers(0, 256, (40, 40, 3), np.uint8)
    for crops, different in ((10, 10), (144, 48)):
        images, counts = cut(image, 32, crops)
        assert counts.tolist() == [crops // different] * different
        assert len({crop.tobytes() for crop in images}) == different


def test_one_crop_is_what_the_run_evaluates(tmp_path):
    source = open_source(str(image_folder.write(tmp_path)), image_size=8)
    split = SplitBlocks(source, 4)
    for block, plain in zip(CropBlocks(split, 1), split, strict=True):
        np.testing.assert_array_equal(block.kept, plain.kept)
        np.testing.assert_array_equal(block.images, plain.arrays.images[plain.kept])
        np.testing.assert_array_equal(block.labels, plain.arrays.labels)
        assert set(block.counts.tolist()) == {1}


def test_blocks_hold_the_crops_of_every_image_once(tmp_path):
    # Images of 20x30, 21x29 and 22x28, in each of three classes.
    source = open_source(str(image_folder.write(tmp_path)), image_size=16)
    blocks = list(CropBlocks(SplitBlocks(source, 4), 144))
    assert [int(block.kept.sum()) for block in blocks] == [4, 4, 1]
    labels = [block.labels[block.kept] for block in blocks]
    assert np.concatenate(labels).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    records = source.splits["test"]
    row = 0
    for block in blocks:
        for place in np.flatnonzero(block.kept):
            own = block.places == place
            images, counts = cut(records.read([row])[0].image, 16, 144)
            np.testing.assert_array_equal(block.images[own], images)
            np.testing.assert_array_equal(block.counts[own], counts)
            assert block.counts[own].sum() == 144
            row += 1
    assert row == 9


def test_crops_of_damaged_images_are_left_out_and_named(damage, capsys):
    source = open_source("synthetic:8x8:10:1500")
    blocks = list(CropBlocks(SplitBlocks(damage(source, (5,)), 3), 10))
    assert sum(int(block.kept.sum()) for block in blocks) == 1499
    assert blocks[1].kept.tolist() == [True, True, False]
    assert np.bincount(blocks[1].places, blocks[1].counts).tolist() == [10, 10]
    assert capsys.readouterr().err == (
        "note: file-5.jpg cannot be decoded and is left out\n"
    )
    with pytest.raises(ValueError, match=r"3 of 1,500 images.*file-3\.jpg"):
        list(CropBlocks(SplitBlocks(damage(source, (3, 4, 5)), 3), 10))
    large = open_source("synthetic:8x8:10:4000")
    empty = list(CropBlocks(SplitBlocks(damage(large, (3, 4, 5)), 3), 10))[1]
    assert (empty.images.shape, empty.kept.any()) == ((0, 8, 8), False)


def test_pixels_stay_in_the_range_of_the_set():
    # A cubic makes 18 of the digits' 16.
    blocks = CropBlocks(SplitBlocks(open_source("digits"), 20), 144)
    assert next(iter(blocks)).images.max() == 16


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match=r"--crops 5: expected 1, 10 or 144\."):
        crop_blocks(open_source("digits"), 5)
    oblong = open_source("synthetic:16x24x3:5:10")
    with pytest.raises(ValueError, match=r"the network takes images of 16x24"):
        crop_blocks(oblong, 10)
    (block,) = crop_blocks(oblong, 1)
    assert block.images.shape == (10, 16, 24, 3)


def test_blocks_are_bounded():
    blocks = crop_blocks(open_source("synthetic:224x224x3:5:7"), 144)
    # 144 crops of one image are 21.7 MB, and a block at most 67.
    assert (blocks.split.size, len(blocks)) == (3, 3)
