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

from bnjax.data.augment import RandomResizedCrop
from bnjax.data.config import AugmentConfig, DataConfig
from bnjax.data.pipeline import HostBatches, HostOrder, StreamingFeed, make_feed
from bnjax.data.sources import ArrayRecords, Arrays, Example, open_source
from tests.data import image_folder, prepared_set

SHAPE = (6, 5, 3)


@dataclasses.dataclass(frozen=True)
class SomeDamaged:
    """Rows of arrays, some of them damaged."""

    inner: ArrayRecords
    damaged: frozenset[int]

    def __len__(self):
        return len(self.inner)

    def read(self, rows):
        return [
            Example(None, 0) if row in self.damaged else self.inner.read([row])[0]
            for row in rows
        ]

    def where(self, row):
        return f"file-{row}.jpg"


def records(examples=24):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, *SHAPE), np.uint8)
    return ArrayRecords("some", Arrays(images, np.arange(examples) % 4))


def make(examples=24, batch_size=6, *, damaged=(), **options):
    inner = records(examples)
    kept = SomeDamaged(inner, frozenset(damaged)) if damaged else inner
    names = {"transform", "shards", "shard", "classes", "image_shape"}
    given = {name: options.pop(name) for name in names & set(options)}
    settings = {"transform": None, "classes": 4, "image_shape": SHAPE, **given}
    order = HostOrder((3, 4), examples, batch_size)
    batches = HostBatches(kept, order, **settings)
    return StreamingFeed(batches, lambda item, key: item, **options)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_chunk_holds_the_examples_of_the_order():
    feed = make()
    chunk = feed.chunk(0, 9)
    rows = HostOrder((3, 4), 24, 6).rows(0, 9)
    images, labels = records().arrays
    np.testing.assert_array_equal(chunk["row"], rows)
    np.testing.assert_array_equal(chunk["image"], images[rows])
    np.testing.assert_array_equal(chunk["label"], labels[rows])
    for name, spec in feed.spec(9).items():
        assert (chunk[name].shape, chunk[name].dtype) == (spec.shape, spec.dtype)
    feed.close()


def test_every_example_exactly_once_an_epoch():
    feed = make()
    for epoch in range(3):
        rows = feed.chunk(4 * epoch, 4)["row"].ravel()
        assert sorted(rows) == list(range(24))
    feed.close()


def test_workers_change_nothing():
    transform = RandomResizedCrop(8)
    options = {"transform": transform, "image_shape": (8, 8, 3)}
    alone = make(**options)
    expected = [alone.chunk(0, 5), alone.chunk(5, 8)]
    with_workers = make(workers=2, **options)
    found = [with_workers.chunk(0, 5), with_workers.chunk(5, 8)]
    assert_same(found, expected)
    assert len(multiprocessing.active_children()) == 2
    with_workers.close()
    assert not multiprocessing.active_children()
    alone.close()


def test_a_restored_feed_goes_on_exactly():
    transform = RandomResizedCrop(8)
    options = {"transform": transform, "image_shape": (8, 8, 3)}
    feed = make(**options)
    feed.chunk(0, 7)
    state = feed.state()
    expected = feed.chunk(7, 6)
    feed.close()
    other = make(prefetch=5, **options)
    other.restore(state)
    assert_same(other.chunk(7, 6), expected)
    assert_same(other.chunk(7, 2), jax.tree.map(lambda a: a[:2], expected))
    other.close()


def test_shards_make_up_the_batch():
    whole = make().chunk(0, 5)
    parts = [make(shards=3, shard=shard).chunk(0, 5) for shard in range(3)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    assert_same(joined, whole)


def test_augmentation_depends_on_seed_epoch_and_example_alone():
    options = {"transform": RandomResizedCrop(8), "image_shape": (8, 8, 3)}
    small = make(batch_size=6, **options).chunk(0, 8)
    order_of_3 = make(batch_size=3, **options).chunk(0, 16)

    def by_example(chunk):
        images = chunk["image"].reshape(2, 24, 8, 8, 3)
        rows = chunk["row"].reshape(2, 24)
        return [images[epoch][np.argsort(rows[epoch])] for epoch in range(2)]

    first, second = by_example(small)
    assert (first != second).any(axis=(1, 2, 3)).all()
    assert_same(by_example(order_of_3), [first, second])


class TestDamage:
    def test_it_is_replaced_by_the_next_and_counted_once(self, capsys):
        feed = make(examples=2000, batch_size=500, damaged=(7, 8))
        chunk = feed.chunk(0, 8)
        assert feed.state() == {"damaged": [7, 8]}
        notes = capsys.readouterr().err.splitlines()
        assert sorted(notes) == [
            f"note: file-{row}.jpg cannot be decoded and is left out" for row in (7, 8)
        ]
        rows = chunk["row"].reshape(2, 2000)
        for epoch in rows:
            counts = np.bincount(epoch, minlength=2000)
            assert (counts[7], counts[8], counts[9]) == (0, 0, 3)
        images = records(2000).arrays.images
        np.testing.assert_array_equal(chunk["image"], images[chunk["row"]])

    def test_too_much_of_it_is_an_error(self):
        feed = make(damaged=(5,))
        with pytest.raises(ValueError, match=r"1 of 24 images.*file-5\.jpg"):
            feed.chunk(0, 4)

    def test_damage_all_over_ends(self):
        feed = make(examples=200, damaged=range(200))
        with pytest.raises(ValueError, match=r"file-\d+\.jpg cannot be decoded, nor"):
            feed.chunk(0, 1)

    def test_the_error_of_a_worker_is_the_same(self):
        feed = make(damaged=range(24), workers=1)
        with pytest.raises(ValueError, match=r"file-\d+\.jpg cannot be decoded, nor"):
            feed.chunk(0, 4)
        feed.close()


def test_a_label_out_of_range():
    with pytest.raises(ValueError, match="has the label 3; expected 0 to 2"):
        make(classes=3).chunk(0, 4)


def test_an_image_of_another_size():
    with pytest.raises(ValueError, match=r"shape \(6, 5, 3\); expected \(6, 6, 3\)"):
        make(image_shape=(6, 6, 3)).chunk(0, 1)


def test_a_worker_that_dies_ends_the_run():
    feed = make(workers=1, prefetch=1)
    feed.chunk(0, 1)
    before = time.monotonic()
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(ValueError, match=r"terminated unexpectedly with exit code -9"):
        feed.chunk(1, 200)
    assert time.monotonic() - before < 20
    feed.close()


PARENT = """
import multiprocessing, time
from tests.data.test_streaming import make
if __name__ == "__main__":
    feed = make(workers=1)
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


class TestSources:
    def test_a_prepared_set(self, tmp_path):
        folder = prepared_set.write(tmp_path)
        images, labels = prepared_set.arrays("train")
        for source in (open_source("tiny", tmp_path), open_source(str(folder))):
            data = DataConfig(path="streaming", workers=1)
            feed = make_feed(data, source, batch_size=8, key=jax.random.key(0))
            chunk = feed.chunk(0, 5)
            feed.close()
            assert sorted(chunk["row"].ravel()) == list(range(40))
            np.testing.assert_array_equal(chunk["image"], images[chunk["row"]])
            np.testing.assert_array_equal(chunk["label"], labels[chunk["row"]])

    def test_a_folder_with_full_augmentation(self, tmp_path):
        root = image_folder.write(tmp_path)
        source = open_source(str(root), image_size=16)
        augment = AugmentConfig(kind="crop", strength=0.0)
        data = DataConfig(augment=augment, mean=(0.5,), std=(0.25,))
        feed = make_feed(data, source, batch_size=6, key=jax.random.key(0))
        chunk = feed.chunk(0, 4)
        feed.close()
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
