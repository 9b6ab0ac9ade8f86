import jax
import numpy as np
import pytest

from bnjax.data.augment import shift_and_mirror
from bnjax.data.config import AugmentConfig, DataConfig, SettingError
from bnjax.data.pipeline import make_feed
from bnjax.data.sources import open_data, open_source
from bnjax.training.config import Config


def configure(batch_size=50, **data):
    data = DataConfig(**{"name": "synthetic:8x8x3:5:200", **data})
    return Config(steps=10, batch_size=batch_size, learning_rate=0.1, data=data)


def feed_of(config, **options):
    return make_feed(
        config.data,
        open_data(config.data),
        batch_size=config.batch_size,
        key=jax.random.key(0),
        **options,
    )


def first_batches(feed, steps=4):
    chunk = feed.chunk(0, steps)
    key = jax.random.key(9)
    items = [jax.tree.map(lambda leaf, i=i: leaf[i], chunk) for i in range(steps)]
    return [feed.batch(feed.constants, item, key) for item in items]


def test_the_resident_order_is_the_keys_permutation():
    feed = feed_of(configure())
    expected = jax.random.permutation(
        jax.random.fold_in(jax.random.key(0), 1), 200
    ).reshape(4, 50)
    np.testing.assert_array_equal(feed.chunk(4, 4), expected)
    assert feed.state() == {}
    assert (feed.spec(4).shape, feed.spec(4).dtype) == ((4, 50), np.int32)


def test_both_paths_agree_where_they_share_an_order():
    """Within-shard and fixed batches are drawn alike; so is what the device does."""
    for shuffle in ("within-shard", "fixed-batches"):
        augment = AugmentConfig(kind="shift", padding=2)
        settings = {"shuffle": shuffle, "shard_size": 20, "augment": augment}
        batches = [
            first_batches(feed_of(configure(path=path, **settings)))
            for path in ("resident", "streaming")
        ]
        jax.tree.map(np.testing.assert_array_equal, *batches)


def test_shift_is_that_of_the_steps_key_and_the_row():
    augment = AugmentConfig(kind="shift", padding=2)
    feed = feed_of(configure(augment=augment))
    rows = feed.chunk(0, 1)[0]
    batch = feed.batch(feed.constants, rows, jax.random.key(9))
    source = open_source("synthetic:8x8x3:5:200")
    images, labels = source.load("train", print)
    keys = jax.numpy.stack([jax.random.fold_in(jax.random.key(9), r) for r in rows])
    expected = np.asarray(shift_and_mirror(images[rows], keys, padding=2)) / 255
    np.testing.assert_allclose(batch["image"], expected, rtol=1e-6)
    np.testing.assert_array_equal(batch["label"], labels[rows])
    halves = [
        feed.batch(feed.constants, rows[p], jax.random.key(9))
        for p in (slice(0, 25), slice(25, 50))
    ]
    joined = jax.tree.map(lambda a, b: np.concatenate([a, b]), *halves)
    jax.tree.map(np.testing.assert_array_equal, joined, batch)


@pytest.mark.parametrize("path", ["resident", "streaming"])
def test_shards_make_up_the_batch(path):
    config = configure(path=path)
    whole = feed_of(config).chunk(3, 2)
    parts = [feed_of(config, shards=2, shard=shard).chunk(3, 2) for shard in (0, 1)]
    joined = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_pixels_are_standardized_by_channel():
    config = configure(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    feed = feed_of(config)
    rows = feed.chunk(0, 1)[0]
    batch = feed.batch(feed.constants, rows, jax.random.key(0))
    images, _ = open_data(config.data).load("train", print)
    expected = (images[rows] / 255 - [0.1, 0.2, 0.3]) / [0.5, 1.0, 2.0]
    assert batch["image"].dtype == np.float32
    np.testing.assert_allclose(batch["image"], expected, atol=1e-5)


def test_a_chunk_of_large_images_is_short():
    small = feed_of(configure(path="streaming"))
    assert small.chunk_steps * 50 * 8 * 8 * 3 <= 2**26
    large = feed_of(configure(name="synthetic:224x224x3:5:100", path="streaming"))
    assert large.chunk_steps == 2**26 // (50 * 224 * 224 * 3) == 8


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
    with pytest.raises(SettingError, match=message):
        feed_of(configure(**data))


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
