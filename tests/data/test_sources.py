import json
import os
import shutil
import socket
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from bnjax._files import cache_dir
from bnjax.data.config import DataConfig, DataError, SettingError
from bnjax.data.sources import (
    Arrays,
    absolute_name,
    cached,
    find_data_dir,
    open_data,
    open_source,
    stratified_test_mask,
)
from tests.data import image_folder, prepared_set


def quiet(done, total):
    pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return image_folder.write(tmp_path / "flowers")


@pytest.fixture
def prepared(tmp_path):
    return prepared_set.write(tmp_path)


def open_tiny(folder):
    return open_source("tiny", folder.parents[1])


def open_small(root, **settings):
    return open_source(str(root), image_size=8, **settings)


def assert_near(image, color, atol=3):
    np.testing.assert_allclose(image, np.broadcast_to(color, image.shape), atol=atol)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_digits_hold_every_example_once():
    source = open_source("digits")
    found = []
    for split, size in source.sizes.items():
        images, labels = source.load(split, quiet)
        assert images.shape == (size, *source.image_shape)
        assert images.max() == source.max_value
        found.append(np.column_stack([images.reshape(size, 64), labels]))
    found, expected = (
        np.concatenate(found),
        np.column_stack(load_digits(return_X_y=True)),
    )
    np.testing.assert_array_equal(
        found[np.lexsort(found.T)], expected[np.lexsort(expected.T)]
    )


def test_every_class_gives_a_fifth_to_the_test_set():
    labels = load_digits().target
    mask = stratified_test_mask(labels)
    for label in range(10):
        of_class = labels == label
        assert mask[of_class].sum() == of_class.sum() // 5
        assert np.flatnonzero(mask[of_class])[:3].tolist() == [4, 9, 14]


class TestPrepared:
    def test_arrays_are_those_that_were_stored(self, prepared, no_network):
        source = open_tiny(prepared)
        assert (source.name, source.sizes) == ("tiny/1.2.0", prepared_set.SIZES)
        assert (source.classes, source.image_shape) == (3, (6, 5, 1))
        for split in source.sizes:
            seen = []
            loaded = source.load(split, lambda *report, seen=seen: seen.append(report))
            images, labels = prepared_set.arrays(split)
            check_same(loaded, Arrays(images, labels.astype(np.int32)))
            assert seen[-1] == (prepared_set.SIZES[split],) * 2

    def test_a_set_prepared_again_is_decoded_again(self, prepared):
        open_tiny(prepared).load("test", quiet)
        with (prepared / "features.json").open("a") as file:
            file.write("\n")
        open_tiny(prepared).load("test", quiet)
        assert len(list(cache_dir().iterdir())) == 2

    def test_the_newest_version_is_chosen_unless_one_is_named(self, tmp_path):
        for version in ("1.9.0", "1.10.0"):
            prepared_set.write(tmp_path, version=version)
        assert open_source("tiny", tmp_path).name == "tiny/1.10.0"
        assert open_source("tiny:1.9.0", tmp_path).name == "tiny/1.9.0"

    def test_the_folder_comes_from_flag_environment_or_home(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
        assert find_data_dir() == tmp_path / "tensorflow_datasets"
        monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
        assert str(find_data_dir()) == "/elsewhere"
        assert find_data_dir(tmp_path) == tmp_path


@pytest.mark.parametrize("kind", ["prepared", "root"])
def test_the_second_reading_is_from_the_cache(request, kind):
    folder = request.getfixturevalue(kind)
    opened = open_tiny if kind == "prepared" else open_small
    first = opened(folder).load("test", quiet)
    second = opened(folder).load("test", lambda *_: pytest.fail("decoded again"))
    check_same(second, first)
    assert len(list(cache_dir().iterdir())) == 1


@pytest.mark.skipif(
    not (find_data_dir() / "cifar10_jpeg").is_dir(),
    reason="cifar10_jpeg is not prepared in TFDS_DATA_DIR (see docs/programs/data.md)",
)
def test_colour_images_are_those_that_tfds_decodes():
    import tensorflow_datasets as tfds

    source = open_source("cifar10_jpeg")
    assert source.sizes == {"train": 50_000, "test": 10_000}
    assert (source.classes, source.image_shape) == (10, (32, 32, 3))
    builder = tfds.builder_from_directory(find_data_dir() / "cifar10_jpeg" / "1.0.0")
    theirs = builder.as_data_source(split="test")
    rows = range(0, 10_000, 997)
    for row, example in zip(rows, source.splits["test"].read(rows), strict=True):
        assert example.label == theirs[row]["label"]
        np.testing.assert_array_equal(example.image, theirs[row]["image"])


def test_images_and_labels_are_those_of_the_files(root):
    source = open_source(str(root), image_size=16)
    assert source.sizes == {"train": 24, "test": 9}
    assert (source.classes, source.image_shape) == (3, (16, 16, 3))
    for split, stored in (("train", "train"), ("test", "val")):
        arrays = source.load(split, quiet)
        per_class = source.sizes[split] // 3
        assert arrays.labels.tolist() == np.repeat(range(3), per_class).tolist()
        for row, image in enumerate(arrays.images):
            number = row % per_class
            assert_near(image, image_folder.color(stored, row // per_class, number))


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_what_the_test_split_may_be_called(tmp_path, test):
    assert open_small(image_folder.write(tmp_path, test=test)).sizes["test"] == 9


def test_files_of_every_kind_are_read(root):
    pixels = np.full((5, 7, 3), 77, np.uint8)
    suffixes = (".png", ".bmp", ".webp", ".gif", ".tif", ".TIFF", ".JPG", ".JPEG")
    for place, suffix in enumerate(suffixes):
        Image.fromarray(pixels).save(root / "train" / "ant" / f"9{place}{suffix}")
    images, labels = open_small(root).load("train", quiet)
    assert len(labels) == 24 + len(suffixes)
    assert_near(images[8:16], 77)


def test_what_is_left_out_is_counted_in_a_line(root, capsys):
    (root / "train" / "ant" / "notes.txt").write_text("of an ant")
    (root / "train" / "list.csv").write_text("a,b")
    (root / "val" / "cat" / "small.jpg").mkdir()
    (root / "val" / "cat" / ".DS_Store").write_text("hidden")
    assert open_small(root).sizes == {"train": 24, "test": 9}
    assert capsys.readouterr().err == (
        f"note: {root}: 3 files and folders are skipped, because their names do not "
        f"end like images, such as {root}/train/ant/notes.txt\n"
    )


def half_an_image(path):
    whole = (path.parent / "03.jpg").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (os.mkfifo, ": is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), ": is not a regular file"),
        (lambda path: path.symlink_to("gone"), ": cannot be read (No such file"),
        (lambda path: path.symlink_to(path.name), ": cannot be read (Too many levels"),
        (lambda path: path.write_bytes(b""), "."),
        (lambda path: path.write_bytes(b"no image"), "."),
        (lambda path: path.write_bytes(b"\xff\xd8\xff\xe0"), ": is truncated"),
        (half_an_image, ": is truncated"),
    ],
)
def test_what_is_no_image_is_named_and_counted(root, make, problem):
    name = os.fsdecode(b"caf\xe9.jpg")
    make(root / "train" / "bee" / name)
    source = open_small(root)
    with pytest.raises(DataError) as caught:
        source.load("train", quiet)
    assert "1 of 25 images cannot be decoded, more than 0.1%" in str(caught.value)
    assert f"train/bee/caf\\xe9.jpg{problem}" in str(caught.value)


def test_a_file_that_goes_away(root):
    source = open_small(root)
    (root / "train" / "ant" / "00.jpg").unlink()
    with pytest.raises(DataError, match=r"ant/00\.jpg: cannot be read \(No such file"):
        source.load("train", quiet)


def test_few_damaged_images_are_left_out(root, capsys):
    (root / "train" / "ant" / "00.jpg").unlink()
    (root / "train" / "ant" / "00.jpg").symlink_to("gone")
    bees = root / "train" / "bee"
    for number in range(1000):
        os.link(bees / "01.jpg", bees / f"{number}.jpg")
    images, labels = open_small(root).load("train", quiet)
    assert (len(images), np.bincount(labels).tolist()) == (1023, [7, 1008, 8])
    assert capsys.readouterr().err == (
        f"note: {root}/train/ant/00.jpg cannot be read (No such file or directory) "
        "and is left out\n"
    )


def test_names_of_any_bytes(root):
    strange = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        (root / split / "cat").rename(root / split / strange)
    (root / "train" / strange / "00.jpg").rename(
        root / "train" / strange / f"{strange}.jpg"
    )
    source = open_small(root)
    assert source.class_names == ("ant", "bee", "caf\\xe9")
    assert (
        source.load("train", quiet).labels.tolist() == np.repeat(range(3), 8).tolist()
    )


def test_settings_of_the_decoder(root, tmp_path):
    image = Image.fromarray(np.tile(np.uint8([[[250], [0]]]), (2, 1, 3)))
    exif = Image.Exif()
    exif[0x112] = 3
    for path in sorted((root / "train" / "ant").iterdir()):
        image.save(path, exif=exif)
    for apply_exif, expected in ((False, 250), (True, 0)):
        settings = {"central_crop": 1.0, "apply_exif": apply_exif}
        source = open_source(str(root), image_size=2, **settings)
        encoded = (root / "train" / "ant" / "00.jpg").read_bytes()
        for image in (source.load("train", quiet).images[0], source.decode(encoded)):
            assert_near(image[0, 0], expected, atol=8)
    with pytest.raises(ValueError, match=r"20 x 30 pixels.*--data\.max-pixels 500"):
        open_source(str(root), image_size=2, max_pixels=500).load("test", quiet)


class TestWithoutSplits:
    @pytest.fixture
    def flat(self, root):
        return root / "train"

    def test_a_share_of_each_class_is_the_test_set(self, flat):
        source = open_small(flat, validation_share=0.25)
        assert source.class_names == image_folder.CLASSES
        assert source.sizes == {"train": 18, "test": 6}
        train, test = (source.splits[s].files for s in ("train", "test"))
        assert test == tuple(
            f"{name}/{number}.jpg"
            for name in image_folder.CLASSES
            for number in ("03", "07")
        )
        whole = [str(path.relative_to(flat)) for path in flat.glob("*/*")]
        assert sorted(train + test) == sorted(whole)
        again = open_small(flat, validation_share=0.25)
        assert again.splits["test"].files == test
        images, labels = source.load("test", quiet)
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
        for image, label, number in zip(images, labels, [3, 7] * 3, strict=True):
            assert_near(image, image_folder.color("train", label, number))

    def test_a_class_too_small_for_both_is_named(self, flat, capsys):
        for path in sorted((flat / "bee").iterdir())[1:]:
            path.unlink()
        open_small(flat, validation_share=0.5)
        assert capsys.readouterr().err == (
            f"note: the test split of {flat} has no example of 1 of 3 classes: bee\n"
        )

    def test_the_error_names_the_flag(self, flat, root):
        with pytest.raises(ValueError, match=r"ant, bee, cat\..*validation-share 0\.2"):
            open_small(flat)
        already = r"share 0.2: .*already has the splits train, val"
        with pytest.raises(SettingError, match=already):
            open_small(root, validation_share=0.2)


class TestDataThatCannotTeach:
    def test_one_class(self, root, tmp_path):
        for path in (*root.glob("*/bee"), *root.glob("*/cat")):
            shutil.rmtree(path)
        with pytest.raises(DataError, match=r"all 8 training examples of .*one class"):
            open_small(root)
        with pytest.raises(DataError, match="of one class"):
            open_source("synthetic:8x8:1:20").load("train", quiet)

    def test_labels_that_are_all_alike(self, tmp_path, capsys, monkeypatch):
        images, labels = prepared_set.arrays("train")
        alike = images, np.full_like(labels, 1)
        monkeypatch.setattr(prepared_set, "arrays", lambda split: alike)
        source = open_tiny(prepared_set.write(tmp_path))
        with pytest.raises(DataError, match=r"all 40 training examples of tiny/1\.2\."):
            source.load("train", quiet)
        source.load("test", quiet)
        assert capsys.readouterr().err == (
            "note: the test split of tiny/1.2.0 has no example of 2 of 3 classes: "
            "0, 2\n"
        )


class TestWhereASetIs:
    def test_a_relative_name_is_made_absolute(self, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        data = absolute_name(DataConfig(name="./flowers", image_size=8))
        assert data == DataConfig(name=str(root), image_size=8)
        monkeypatch.chdir("/")
        assert open_data(data).sizes == {"train": 24, "test": 9}
        monkeypatch.setenv("HOME", str(root.parent))
        assert absolute_name(DataConfig(name="~/flowers")).name == str(root)
        assert absolute_name(DataConfig(name="mnist")).name == "mnist"

    @pytest.mark.parametrize("place", ["new", "new/flowers", "other", "new/data/.."])
    def test_a_folder_that_moved(self, root, tmp_path, place):
        name = str(root)
        root.rename(tmp_path / "moving")
        there = tmp_path / place
        if place != "other":
            there = tmp_path / "new" / "flowers"
        there.parent.mkdir(exist_ok=True)
        (tmp_path / "moving").rename(there)
        (tmp_path / "new" / "data").mkdir(parents=True, exist_ok=True)
        source = open_source(name, tmp_path / place, image_size=8)
        assert source.sizes == {"train": 24, "test": 9}
        assert Path(source.name).samefile(there)

    def test_the_named_folder_where_the_other_holds_no_such(self, root, tmp_path):
        (tmp_path / "tfds" / "mnist").mkdir(parents=True)
        assert open_source(str(root), tmp_path / "tfds", image_size=8).name == str(root)

    @pytest.mark.parametrize("below", [".", "tiny", "tiny/1.2.0"])
    def test_a_prepared_set_that_moved(self, tmp_path, below):
        prepared_set.write(tmp_path / "new")
        for name in ("tiny", "/old/tiny/1.2.0"):
            assert open_source(name, tmp_path / "new" / below).name == "tiny/1.2.0"

    def test_a_folder_named_without_its_dot(self, root, monkeypatch):
        monkeypatch.chdir(root.parent)
        hint = r"'flowers' is not prepared.*'\./flowers'"
        with pytest.raises(ValueError, match=hint):
            open_source("flowers")


def edit(name, change):
    """Return what replaces the text of a file."""
    return lambda folder: (folder / name).write_text(
        change((folder / name).read_text())
    )


def edit_info(change):
    def apply(text):
        info = json.loads(text)
        change(info)
        return json.dumps(info)

    return edit("dataset_info.json", apply)


class TestRefusals:
    def test_not_prepared_is_found_out_at_once(self, tmp_path, no_network):
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            open_source("mnist", tmp_path)
        assert time.monotonic() - started < 1
        for part in (
            "'mnist' is not prepared",
            str(tmp_path / "mnist"),
            "--data-dir or TFDS_DATA_DIR",
            "'.[prepare]'",
            "download_and_prepare",
        ):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("tinny", "Did you mean 'tiny'"), ("tiny:2.0.0", r"tiny/2\.0\.0 with")],
    )
    def test_a_typo_or_a_missing_version(self, prepared, name, message):
        with pytest.raises(ValueError, match=message):
            open_source(name, prepared.parents[1])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *(
                (edit("dataset_info.json", lambda text, new=new: new), "prepare")
                for new in ("", "{", "[]", '{"name": "tiny"}')
            ),
            (
                edit_info(lambda info: info.update(fileFormat="tfrecord")),
                "not stored as array_record",
            ),
            (
                edit_info(lambda info: info["splits"].pop()),
                "splits train; expected train and test",
            ),
            (
                edit("features.json", lambda text: text.replace('"6"', '"-1"')),
                r"many sizes: give the height",
            ),
        ],
    )
    def test_a_prepared_set_that_cannot_be_used(self, prepared, change, message):
        change(prepared)
        with pytest.raises(ValueError, match=message):
            open_tiny(prepared)

    @pytest.mark.parametrize("damage", ["truncated", "missing"])
    def test_damaged_records(self, prepared, damage):
        source = open_tiny(prepared)
        (records,) = prepared.glob("*train*")
        if damage == "missing":
            records.unlink()
        else:
            records.write_bytes(records.read_bytes()[:700])
        with pytest.raises(ValueError, match="could not be read"):
            source.load("train", quiet)

    def test_many_sizes_need_one(self, root):
        with pytest.raises(ValueError, match=r"many sizes: give the height"):
            open_source(str(root))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (shutil.rmtree, r"flowers cannot be read: No such file"),
            (
                lambda root: (root / "val").rename(root / "other"),
                r"folders other, train\. Expected train/",
            ),
            (
                lambda root: [path.unlink() for path in root.glob("train/bee/*")],
                r"train/bee holds no image",
            ),
            (
                lambda root: [shutil.rmtree(path) for path in root.glob("*/*")],
                "holds no class folder",
            ),
            (
                lambda root: (root / "val" / "bee").rename(root / "val" / "bees"),
                "different classes: bee, bees",
            ),
        ],
    )
    def test_a_folder_that_cannot_be_used(self, root, change, message):
        change(root)
        with pytest.raises(ValueError, match=message):
            open_small(root)

    def test_an_unreadable_folder(self, root, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("cat"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(ValueError, match=r"train/cat cannot be read: Permission"):
            open_small(root)


ARRAYS = Arrays(np.arange(24, dtype=np.uint8).reshape(4, 3, 2), np.arange(4))


@pytest.fixture
def make():
    return unittest.mock.Mock(return_value=ARRAYS)


def check_same(arrays, others=ARRAYS):
    for found, expected in zip(arrays, others, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_made_once_and_nothing_is_left_beside_the_entry(make):
    for _ in range(2):
        check_same(cached("a", make))
    assert [path.name for path in cache_dir().iterdir()] == ["a.npz"]
    assert make.call_count == 1
    check_same(cached("b", make))
    assert make.call_count == 2


@pytest.mark.parametrize("place", range(0, 560, 17))
def test_a_flipped_byte_is_noticed_or_harmless(make, place):
    cached("a", make)
    path = cache_dir() / "a.npz"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    check_same(cached("a", make))


@pytest.mark.parametrize("keep", [0, 1, 100, 400])
def test_a_truncated_entry_is_made_again(make, keep, capsys):
    cached("a", make)
    path = cache_dir() / "a.npz"
    path.write_bytes(path.read_bytes()[:keep])
    check_same(cached("a", make))
    assert "is damaged; the data are decoded again" in capsys.readouterr().err
    check_same(cached("a", make))
    assert make.call_count == 2


def test_a_cache_that_cannot_be_written_costs_a_note(make, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    check_same(cached("a", make))
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
