import os

import numpy as np
import pytest

from bnjax.data.sources import decode_image, open_folder, open_source
from tests.data import image_folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return image_folder.write(tmp_path / "flowers")


def quiet(done, total):
    pass


def test_images_and_labels_are_those_of_the_files(root):
    source = open_source(str(root), image_size=16)
    assert source.sizes == {"train": 24, "test": 9}
    assert (source.classes, source.image_shape) == (3, (16, 16, 3))
    for split, stored in (("train", "train"), ("test", "val")):
        arrays = source.load(split, quiet)
        per_class = source.sizes[split] // 3
        assert arrays.labels.tolist() == np.repeat(range(3), per_class).tolist()
        for row, image in enumerate(arrays.images):
            expected = image_folder.color(stored, row // per_class, row % per_class)
            assert np.abs(image.astype(int) - expected).max() <= 3


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_what_the_test_split_may_be_called(tmp_path, test):
    source = open_source(str(image_folder.write(tmp_path, test=test)), image_size=8)
    assert source.sizes["test"] == 9


def test_the_second_reading_is_from_the_cache(root):
    first = open_source(str(root), image_size=8).load("train", quiet)

    def fail(done, total):
        pytest.fail("decoded again")

    second = open_source(str(root), image_size=8).load("train", fail)
    np.testing.assert_array_equal(first.images, second.images)


class TestRefusals:
    def test_many_sizes_need_one(self, root):
        with pytest.raises(
            ValueError, match=r"many sizes: say with --data\.image-size"
        ):
            open_source(str(root))

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match=r"gone cannot be read: No such file"):
            open_source(str(tmp_path / "gone"), image_size=8)

    def test_no_split(self, root):
        (root / "val").rename(root / "other")
        with pytest.raises(ValueError, match=r"folders other, train\. Expected train/"):
            open_source(str(root), image_size=8)

    def test_an_empty_class_folder(self, root):
        for path in (root / "train" / "bee").iterdir():
            path.unlink()
        with pytest.raises(ValueError, match=r"train/bee holds no image"):
            open_source(str(root), image_size=8)

    def test_no_class_folder(self, root):
        (root / "empty" / "train").mkdir(parents=True)
        (root / "empty" / "val").mkdir()
        with pytest.raises(ValueError, match="holds no class folder"):
            open_source(str(root / "empty"), image_size=8)

    def test_classes_that_differ(self, root):
        (root / "val" / "bee").rename(root / "val" / "bees")
        with pytest.raises(ValueError, match="different classes: bee, bees"):
            open_source(str(root), image_size=8)

    def test_an_unreadable_folder(self, root, monkeypatch):
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("cat"):
                raise PermissionError(13, "Permission denied")
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(ValueError, match=r"train/cat cannot be read: Permission"):
            open_source(str(root), image_size=8)

    @pytest.mark.parametrize("content", [b"", b"no image", None])
    def test_a_damaged_image_is_named(self, root, content):
        path = root / "train" / "bee" / "03.jpg"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(
            ValueError, match=r"1 of 24 images.*0\.1%.*train/bee/03\.jpg"
        ):
            open_source(str(root), image_size=8).load("train", quiet)

    def test_a_file_that_goes_away(self, root):
        records, _ = open_folder(root)
        (root / "train" / "ant" / "00.jpg").unlink()
        with pytest.raises(ValueError, match=r"ant/00\.jpg cannot be read"):
            records["train"].read([0])


class TestDecoding:
    @pytest.mark.parametrize("suffix", [".jpg", ".png"])
    def test_every_truncation_is_noticed(self, suffix):
        import cv2

        image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
        encoded = cv2.imencode(suffix, image)[1].tobytes()
        assert decode_image(encoded, 3).shape == (24, 24, 3)
        for length in range(0, len(encoded) - 4, 7):
            assert decode_image(encoded[:length], 3) is None

    def test_channels_are_red_green_blue_and_one_is_grey(self):
        import cv2

        blue_green_red = np.zeros((4, 4, 3), np.uint8)
        blue_green_red[..., 2] = 250
        encoded = cv2.imencode(".png", blue_green_red)[1].tobytes()
        assert decode_image(encoded, 3)[0, 0].tolist() == [250, 0, 0]
        assert decode_image(encoded, 1).shape == (4, 4, 1)
