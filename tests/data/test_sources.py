import json
import socket
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from bnjax._files import cache_dir
from bnjax.data.config import DataError
from bnjax.data.sources import find_data_dir, open_source, stratified_test_mask
from tests.data import prepared_set


def quiet(done, total):
    pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BNJAX_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class TestDigits:
    def test_the_split_holds_every_example_once(self):
        source = open_source("digits")
        train, test = source.load("train", quiet), source.load("test", quiet)
        images, labels = load_digits(return_X_y=True)
        everything = np.concatenate([train.images, test.images]).reshape(-1, 64)
        both = np.column_stack(
            [everything, np.concatenate([train.labels, test.labels])]
        )
        expected = np.column_stack([images, labels])
        np.testing.assert_array_equal(
            both[np.lexsort(both.T)], expected[np.lexsort(expected.T)]
        )

    def test_sizes_are_those_of_the_arrays(self):
        source = open_source("digits")
        for split, size in source.sizes.items():
            arrays = source.load(split, quiet)
            assert len(arrays.images) == len(arrays.labels) == size
            assert arrays.images.max() == source.max_value
            assert arrays.images.shape[1:] == source.image_shape

    def test_every_class_gives_a_fifth_to_the_test_set(self):
        labels = load_digits().target
        mask = stratified_test_mask(labels)
        for label in range(10):
            of_class = labels == label
            assert mask[of_class].sum() == of_class.sum() // 5
            assert np.flatnonzero(mask[of_class])[:3].tolist() == [4, 9, 14]


class TestPrepared:
    def test_arrays_are_those_that_were_stored(self, tmp_path, no_network):
        prepared_set.write(tmp_path)
        source = open_source("tiny", tmp_path)
        assert source.name == "tiny/1.2.0"
        assert source.sizes == prepared_set.SIZES
        assert (source.classes, source.image_shape) == (3, (6, 5, 1))
        for split in source.sizes:
            images, labels = prepared_set.arrays(split)
            loaded = source.load(split, quiet)
            np.testing.assert_array_equal(loaded.images, images)
            np.testing.assert_array_equal(loaded.labels, labels)

    def test_the_second_reading_is_from_the_cache(self, tmp_path):
        prepared_set.write(tmp_path)
        first = open_source("tiny", tmp_path).load("test", quiet)
        source = open_source("tiny", tmp_path)
        second = source.load("test", lambda done, total: pytest.fail("decoded again"))
        np.testing.assert_array_equal(first.images, second.images)
        assert len(list(cache_dir().iterdir())) == 1

    def test_a_set_prepared_again_is_decoded_again(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        open_source("tiny", tmp_path).load("test", quiet)
        (folder / "features.json").write_text(
            (folder / "features.json").read_text() + "\n"
        )
        open_source("tiny", tmp_path).load("test", quiet)
        assert len(list(cache_dir().iterdir())) == 2

    def test_progress_ends_at_the_total(self, tmp_path):
        prepared_set.write(tmp_path)
        seen = []
        source = open_source("tiny", tmp_path)
        source.load("train", lambda *report: seen.append(report))
        assert seen[-1] == (40, 40)

    def test_the_newest_version_is_chosen_unless_one_is_named(self, tmp_path):
        prepared_set.write(tmp_path, version="1.9.0")
        prepared_set.write(tmp_path, version="1.10.0")
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


@pytest.mark.skipif(
    not (find_data_dir() / "cifar10_jpeg").is_dir(),
    reason="cifar10_jpeg is not prepared in TFDS_DATA_DIR (see docs/data.md)",
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


class TestRefusals:
    def test_not_prepared_is_found_out_at_once(self, tmp_path, no_network):
        started = time.monotonic()
        with pytest.raises(DataError) as caught:
            open_source("mnist", tmp_path)
        assert time.monotonic() - started < 1
        message = str(caught.value)
        assert "'mnist' is not prepared" in message
        assert str(tmp_path / "mnist") in message
        assert "--data-dir or TFDS_DATA_DIR" in message
        assert "bnjax[prepare]" in message
        assert "download_and_prepare" in message

    def test_a_name_with_a_typo(self, tmp_path):
        prepared_set.write(tmp_path, name="mnist")
        with pytest.raises(ValueError, match="Did you mean 'mnist'"):
            open_source("mnits", tmp_path)

    def test_a_missing_version(self, tmp_path):
        prepared_set.write(tmp_path)
        with pytest.raises(ValueError, match=r"tiny/2\.0\.0 with"):
            open_source("tiny:2.0.0", tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "tiny"}'])
    def test_a_damaged_description(self, tmp_path, content):
        folder = prepared_set.write(tmp_path)
        (folder / "dataset_info.json").write_text(content)
        with pytest.raises(ValueError, match="prepare"):
            open_source("tiny", tmp_path)

    def test_another_file_format(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        info = json.loads((folder / "dataset_info.json").read_text())
        info["fileFormat"] = "tfrecord"
        (folder / "dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match="not stored as array_record"):
            open_source("tiny", tmp_path)

    def test_a_missing_split(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        info = json.loads((folder / "dataset_info.json").read_text())
        info["splits"] = info["splits"][:1]
        (folder / "dataset_info.json").write_text(json.dumps(info))
        with pytest.raises(ValueError, match="splits train; expected train and test"):
            open_source("tiny", tmp_path)

    def test_images_of_many_sizes(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        text = (folder / "features.json").read_text()
        (folder / "features.json").write_text(text.replace('"6"', '"-1"'))
        with pytest.raises(
            ValueError, match=r"many sizes: say with --data\.image-size"
        ):
            open_source("tiny", tmp_path)

    @pytest.mark.parametrize("damage", ["truncated", "missing"])
    def test_damaged_records(self, tmp_path, damage):
        folder = prepared_set.write(tmp_path)
        source = open_source("tiny", tmp_path)
        (records,) = folder.glob("*train*")
        if damage == "missing":
            records.unlink()
        else:
            records.write_bytes(records.read_bytes()[:700])
        with pytest.raises(ValueError, match="could not be read"):
            source.load("train", quiet)
