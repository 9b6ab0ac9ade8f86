import contextlib
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from bnjax.data.config import AugmentConfig, DataConfig, SettingError
from bnjax.data.images import shift_and_mirror
from bnjax.data.pipeline import ToInputs, make_feed, make_gather, permutation
from bnjax.data.records import Arrays
from bnjax.data.sources import open_data, open_source
from tests.data import image_folder, prepared_set

NAME = "synthetic:8x8x3:5:200"
CROP = AugmentConfig(kind="crop")
MODES = ["global", "within-shard", "fixed-batches"]
PATHS = ["resident", "streaming"]


@contextlib.contextmanager
def feeding(batch_size=50, *, seed=0, source=None, shards=1, shard=0, **data):
    data = DataConfig(**{"name": NAME, **data})
    options = {"batch_size": batch_size, "shards": shards, "shard": shard}
    source = source or open_data(data)
    feed = make_feed(data, source, key=jax.random.key(seed), **options)
    yield feed
    feed.close()


def chunk_of(step, steps, **options):
    with feeding(**options) as feed:
        return feed.chunk(step, steps)


def rows_of(step, steps, **options):
    chunk = chunk_of(step, steps, **options)
    return chunk["row"] if isinstance(chunk, dict) else chunk


def joined(step, steps, shards, **options):
    """The hosts' parts of a chunk, side by side."""
    parts = (
        chunk_of(step, steps, shards=shards, shard=shard, **options)
        for shard in range(shards)
    )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def first_batches(feed, steps=4):
    chunk = feed.chunk(0, steps)
    key = jax.random.key(9)
    items = [jax.tree.map(lambda leaf, i=i: leaf[i], chunk) for i in range(steps)]
    return [feed.batch(feed.constants, item, key) for item in items]


class TestOrder:
    """Of both paths, in every mode of shuffling."""

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("shuffle", MODES)
    @pytest.mark.parametrize("batch", [40, 30, 200, 1])
    def test_an_epoch_meets_each_example_at_most_once(self, path, shuffle, batch):
        epochs = 3 if batch > 1 else 1
        options = {"path": path, "shuffle": shuffle, "shard_size": 30}
        steps = 200 // batch
        with feeding(batch, **options) as feed:
            assert feed.steps_per_epoch == steps
        rows = rows_of(0, epochs * steps, batch_size=batch, **options)
        assert (rows.shape, rows.dtype) == ((epochs * steps, batch), np.int32)
        for epoch in rows.reshape(epochs, -1):
            assert len(set(epoch.tolist())) == steps * batch
            assert set(epoch.tolist()) <= set(range(200))

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("shuffle", MODES)
    def test_it_depends_on_seed_and_epoch_alone(self, path, shuffle):
        options = {"path": path, "shuffle": shuffle, "shard_size": 30, "batch_size": 30}
        whole = rows_of(0, 25, **options)
        assert whole[:6].tolist() != whole[6:12].tolist()
        assert whole.tolist() != rows_of(0, 25, seed=1, **options).tolist()
        with feeding(**options) as feed:
            for step in (24, 3, 11):
                chunk = jax.tree.leaves(feed.chunk(step, 1))[-1]
                np.testing.assert_array_equal(chunk[0], whole[step])
            parts = [jax.tree.leaves(feed.chunk(*p))[-1] for p in ((5, 1), (6, 6))]
            np.testing.assert_array_equal(np.concatenate(parts), whole[5:12])

    @pytest.mark.parametrize("path", PATHS)
    def test_those_left_over_are_others_in_every_epoch(self, path):
        rows = rows_of(0, 60, batch_size=60, path=path).reshape(20, 180)
        left = [frozenset(range(200)) - set(epoch) for epoch in rows.tolist()]
        assert len(set(left)) == 20
        assert len(set.union(*map(set, left))) > 150

    def test_a_streamed_order_is_uniform(self):
        rows = rows_of(0, 400, batch_size=100, path="streaming").reshape(200, 200)
        for place in (0, 1, 100, 199):
            counts = np.histogram(rows[:, place], 10, (0, 200))[0]
            # Five standard deviations of a binomial of 200 and a tenth.
            assert np.abs(counts - 20).max() < 5 * np.sqrt(200 * 0.09)
        for pair in (rows[:, :2].T, (rows[:-1, 0], rows[1:, 0])):
            assert abs(np.corrcoef(*pair)[0, 1]) < 5 / np.sqrt(200)

    def test_the_resident_one_is_the_keys_permutation(self):
        expected = jax.random.permutation(
            jax.random.fold_in(jax.random.key(0), 1), 200
        ).reshape(4, 50)
        with feeding() as feed:
            np.testing.assert_array_equal(feed.chunk(4, 4), expected)
            assert feed.state() == {}
            assert (feed.spec(4).shape, feed.spec(4).dtype) == ((4, 50), np.int32)

    @pytest.mark.parametrize("shuffle", ["within-shard", "fixed-batches"])
    def test_both_paths_agree_where_they_share_one(self, shuffle):
        """So does what the device does."""
        augment = AugmentConfig(kind="shift", padding=2)
        settings = {"shuffle": shuffle, "shard_size": 20, "augment": augment}
        batches = []
        for path in PATHS:
            with feeding(path=path, **settings) as feed:
                batches.append(first_batches(feed))
        assert_same(*batches)

    @pytest.mark.parametrize("path", PATHS)
    def test_within_shard_keeps_a_stored_run_together(self, path):
        options = {"path": path, "shuffle": "within-shard", "shard_size": 40}
        rows = rows_of(0, 25, batch_size=40, **options).reshape(5, 5, 40)
        runs = rows // 40
        assert (runs == runs[..., :1]).all()
        assert len({tuple(epoch) for epoch in runs[..., 0].tolist()}) == 5
        first = {tuple(b) for b in rows.reshape(25, 40).tolist() if min(b) == 0}
        assert len(first) == 5

    @pytest.mark.parametrize("path", PATHS)
    def test_fixed_batches_always_meet_and_global_ones_do_not(self, path):
        def batches(shuffle, epoch):
            rows = rows_of(epoch * 6, 6, batch_size=30, path=path, shuffle=shuffle)
            return [frozenset(batch) for batch in rows.tolist()]

        fixed = [batches("fixed-batches", epoch) for epoch in (0, 1, 2, 100)]
        assert len({frozenset(epoch) for epoch in fixed}) == 1
        assert len({tuple(epoch) for epoch in fixed}) == 4
        assert not set(batches("global", 0)) & set(batches("global", 1))

    @pytest.mark.parametrize("path", PATHS)
    @pytest.mark.parametrize("shuffle", MODES)
    @pytest.mark.parametrize("shards", [2, 5])
    def test_shards_make_up_the_batch(self, path, shuffle, shards):
        options = {"path": path, "shuffle": shuffle, "batch_size": 40}
        whole = chunk_of(3, 9, **options)
        assert_same(joined(3, 9, shards, **options), whole)


def test_shift_is_that_of_the_steps_key_and_the_row():
    with feeding(augment=AugmentConfig(kind="shift", padding=2)) as feed:
        rows = feed.chunk(0, 1)[0]
    batch = feed.batch(feed.constants, rows, jax.random.key(9))
    images, labels = open_source(NAME).load("train", print)
    keys = jax.numpy.stack([jax.random.fold_in(jax.random.key(9), r) for r in rows])
    expected = np.asarray(shift_and_mirror(images[rows], keys, padding=2)) / 255
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)
    np.testing.assert_array_equal(batch["label"], labels[rows])
    halves = [
        feed.batch(feed.constants, half, jax.random.key(9))
        for half in (rows[:25], rows[25:])
    ]
    assert_same(jax.tree.map(lambda a, b: np.concatenate([a, b]), *halves), batch)


def test_pixels_are_standardized_by_channel():
    with feeding(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)) as feed:
        rows = feed.chunk(0, 1)[0]
    batch = feed.batch(feed.constants, rows, jax.random.key(0))
    images, _ = open_source(NAME).load("train", print)
    expected = (images[rows] / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"], expected, atol=1e-5)


def test_a_set_that_is_too_large_is_streamed():
    for size, chunk in ((200 * 192, np.ndarray), (200 * 192 - 1, dict)):
        assert isinstance(chunk_of(0, 1, resident_bytes=size), chunk)


def test_a_chunk_of_large_images_is_short():
    with feeding(path="streaming") as small:
        assert small.chunk_steps * 50 * 8 * 8 * 3 <= 2**26
    with feeding(name="synthetic:224x224x3:5:100", path="streaming") as large:
        assert large.chunk_steps == 2**26 // (50 * 224 * 224 * 3) == 8


class TestStreaming:
    def test_a_chunk_holds_the_examples(self):
        images, labels = open_source(NAME).load("train", print)
        with feeding(path="streaming") as feed:
            chunk = feed.chunk(0, 9)
            np.testing.assert_array_equal(chunk["image"], images[chunk["row"]])
            np.testing.assert_array_equal(chunk["label"], labels[chunk["row"]])
            for name, spec in feed.spec(9).items():
                assert chunk[name].shape == spec.shape
                assert chunk[name].dtype == spec.dtype

    def test_workers_change_nothing(self):
        options = {"batch_size": 40, "augment": CROP}
        expected = [chunk_of(0, 5, **options), chunk_of(5, 8, **options)]
        with feeding(workers=2, **options) as feed:
            assert_same([feed.chunk(0, 5), feed.chunk(5, 8)], expected)
            assert len(multiprocessing.active_children()) == 2
        assert not multiprocessing.active_children()

    def test_a_restored_feed_goes_on_exactly(self):
        with feeding(augment=CROP) as feed:
            feed.chunk(0, 7)
            state = feed.state()
            expected = feed.chunk(7, 6)
        with feeding(augment=CROP, prefetch=5) as other:
            other.restore(state)
            assert_same(other.chunk(7, 6), expected)
            assert_same(other.chunk(7, 2), jax.tree.map(lambda a: a[:2], expected))

    @pytest.mark.parametrize("shuffle", MODES)
    def test_augmentation_depends_on_seed_epoch_and_example_alone(self, shuffle):
        def by_example(batch_size, shards=1):
            options = {"batch_size": batch_size, "augment": CROP, "shuffle": shuffle}
            chunk = joined(0, 400 // batch_size, shards, **options)
            images = chunk["image"].reshape(2, 200, 8, 8, 3)
            rows = chunk["row"].reshape(2, 200)
            return [images[epoch][np.argsort(rows[epoch])] for epoch in range(2)]

        first, second = by_example(50)
        assert (first != second).any(axis=(1, 2, 3)).all()
        if shuffle != "fixed-batches":
            assert_same(by_example(25), [first, second])
        assert_same(by_example(50, shards=2), [first, second])

    def test_a_prepared_set(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        images, labels = prepared_set.arrays("train")
        sources = (open_source("tiny", tmp_path), open_source(str(folder)))
        for workers, source in enumerate(sources):
            options = {"path": "streaming", "workers": workers}
            chunk = chunk_of(0, 5, source=source, batch_size=8, **options)
            assert sorted(chunk["row"].ravel()) == list(range(40))
            np.testing.assert_array_equal(chunk["image"], images[chunk["row"]])
            np.testing.assert_array_equal(chunk["label"], labels[chunk["row"]])

    def test_a_folder_with_full_augmentation(self, tmp_path):
        source = open_source(str(image_folder.write(tmp_path)), image_size=16)
        augment = AugmentConfig(kind="crop", strength=0.0)
        settings = {"augment": augment, "mean": (0.5,), "std": (0.25,)}
        with feeding(6, source=source, **settings) as feed:
            chunk = feed.chunk(0, 4)
        for image, row in zip(
            chunk["image"].reshape(24, 16, 16, 3), chunk["row"].ravel(), strict=True
        ):
            expected = image_folder.color("train", row // 8, row % 8)
            assert np.abs(image.astype(int) - expected).max() <= 3
        item = {name: leaf[0] for name, leaf in chunk.items()}
        batch = feed.batch((), item, jax.random.key(0))
        np.testing.assert_allclose(
            batch["image"], (item["image"] / 255.0 - 0.5) / 0.25, atol=1e-5
        )


class TestFaults:
    def test_damage_is_replaced_by_the_next_and_counted_once(self, damage, capsys):
        source = damage(open_source("synthetic:8x8x3:5:2000"), (7, 8), "train")
        with feeding(500, source=source, path="streaming") as feed:
            chunk = feed.chunk(0, 8)
            assert feed.state() == {"damaged": [7, 8]}
        notes = capsys.readouterr().err.splitlines()
        assert sorted(notes) == [
            f"note: file-{row}.jpg cannot be decoded and is left out" for row in (7, 8)
        ]
        for epoch in chunk["row"].reshape(2, 2000):
            counts = np.bincount(epoch, minlength=2000)
            assert (counts[7], counts[8], counts[9]) == (0, 0, 3)
        images = source.splits["test"].arrays.images
        np.testing.assert_array_equal(chunk["image"], images[chunk["row"]])

    @pytest.mark.parametrize(
        ("rows", "workers", "message"),
        [
            ((5,), 0, r"1 of 200 images.*file-5\.jpg"),
            (range(200), 0, r"file-\d+\.jpg cannot be decoded, nor can the 49"),
            (range(200), 1, r"file-\d+\.jpg cannot be decoded, nor can the 49"),
        ],
    )
    def test_too_much_of_it_is_an_error(self, damage, rows, workers, message):
        source = damage(open_source(NAME), rows, "train")
        with (
            feeding(source=source, path="streaming", workers=workers) as feed,
            pytest.raises(ValueError, match=message),
        ):
            feed.chunk(0, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"classes": 3}, "has the label [34]; expected 0 to 2"),
            ({"image_shape": (8, 9, 3)}, r"shape \(8, 8, 3\); expected \(8, 9, 3\)"),
        ],
    )
    def test_labels_and_sizes_that_do_not_fit(self, change, message):
        source = dataclasses.replace(open_source(NAME), **change)
        with (
            feeding(source=source, path="streaming") as feed,
            pytest.raises(ValueError, match=message),
        ):
            feed.chunk(0, 4)

    def test_a_worker_that_dies_ends_the_run(self):
        with feeding(path="streaming", workers=1, prefetch=1) as feed:
            feed.chunk(0, 1)
            before = time.monotonic()
            (worker,) = multiprocessing.active_children()
            os.kill(worker.pid, signal.SIGKILL)
            with pytest.raises(ValueError, match=r"unexpectedly with exit code -9"):
                feed.chunk(1, 200)
            assert time.monotonic() - before < 20


PARENT = """
import multiprocessing, time
from tests.data.test_pipeline import feeding
if __name__ == "__main__":
    with feeding(path="streaming", workers=1) as feed:
        feed.chunk(0, 1)
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(tmp_path):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, program],
        stdout=subprocess.PIPE,
        # What Python's own tracker of shared memory says as it cleans up.
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    ) as parent:
        worker = Path(f"/proc/{int(parent.stdout.readline())}/stat")
        assert worker.exists() == Path("/proc").exists()
        parent.kill()
    ends = time.monotonic() + 20
    # A process that nobody waits for stays, as a zombie.
    while worker.exists() and " Z " not in worker.read_text():
        assert time.monotonic() < ends
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mean": (0.1, 0.2)}, "mean 0.1 0.2: expected one number, or 3 for the chan"),
        ({"std": (1.0, 1.0)}, "std 1.0 1.0: expected one number, or 3"),
        (
            {"path": "resident", "augment": AugmentConfig(kind="crop")},
            "path resident: expected streaming with --data.augment.kind crop",
        ),
        (
            {"name": "synthetic:8x6x3", "augment": AugmentConfig(kind="crop")},
            "image-size None: expected the side of a square",
        ),
    ],
)
def test_settings_that_do_not_fit_the_images(data, message):
    with pytest.raises(SettingError, match=message), feeding(**data):
        pass


@pytest.mark.parametrize(
    "name", ["synthetic:8", "synthetic:8x8x3:0", "synthetic:8x8x3:5:1:2", "synthetic:"]
)
def test_a_wrong_synthetic_name(name):
    with pytest.raises(ValueError, match="expected synthetic:<height>x<width>"):
        open_source(name)


def test_synthetic_images_and_labels_are_spread():
    source = open_source("synthetic:8x8x3:5:400")
    images, labels = source.load("train", print)
    assert images.shape == (400, 8, 8, 3)
    assert np.bincount(labels).min() > 50
    assert abs(images.mean() - 127.5) < 1


def test_inputs_equal_numpys():
    pixels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16)
    scaled = ToInputs(255)(pixels)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, pixels / 255.0, rtol=1e-6)
    binary = ToInputs(255, binarize=True)(pixels)
    np.testing.assert_array_equal(binary, (pixels / 255.0 > 0.5).astype(np.float32))


def test_gather_takes_rows_of_both():
    images = np.arange(12, dtype=np.uint8).reshape(4, 3)
    arrays = Arrays(images, np.array([5, 6, 7, 8], np.int32))
    batch = make_gather(ToInputs(16))(arrays, np.array([2, 0, 2]))
    np.testing.assert_allclose(batch["image"], images[[2, 0, 2]] / 16)
    assert batch["label"].tolist() == [7, 5, 7]


@pytest.mark.parametrize("examples", [1, 2, 7, 1442, 60_000])
def test_the_permutation_is_jaxs(examples):
    for seed in range(3):
        key = jax.random.key(seed)
        expected = np.asarray(jax.random.permutation(key, examples))
        found = permutation(key, examples)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
