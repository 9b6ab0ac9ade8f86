import jax
import numpy as np
import pytest

from bnjax.data.augment import shift_and_mirror


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (5, 9, 1)])
def test_each_image_is_a_part_of_its_padded_self(shape):
    height, width = shape[:2]
    images = np.random.default_rng(0).integers(1, 256, (300, *shape), np.uint8)
    found = np.asarray(shift_and_mirror(images, keys(300), padding=2))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    places, mirrored = [], 0
    for image, result in zip(images, found, strict=True):
        padded = np.pad(image, [(2, 2), (2, 2)] + [(0, 0)] * (len(shape) - 2))
        matches = [
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if (
                padded[top : top + height, left : left + width][:, :: -1 if flip else 1]
                == result
            ).all()
        ]
        assert len(matches) == 1
        places.append(matches[0][:2])
        mirrored += matches[0][2]
    assert len(set(places)) == 25
    assert abs(mirrored - 150) < 5 * np.sqrt(75)


def test_no_padding_and_no_mirror_is_the_identity():
    images = np.random.default_rng(1).integers(0, 256, (20, 6, 6, 3), np.uint8)
    found = shift_and_mirror(images, keys(20), padding=0, flip=False)
    np.testing.assert_array_equal(found, images)


def test_an_image_depends_on_its_own_key_alone():
    images = np.random.default_rng(2).integers(0, 256, (10, 6, 6, 3), np.uint8)
    whole = shift_and_mirror(images, keys(10))
    order = np.array([3, 9, 0])
    np.testing.assert_array_equal(
        shift_and_mirror(images[order], keys(10)[order]), whole[order]
    )
    assert (np.asarray(shift_and_mirror(images, keys(10, seed=1))) != whole).any()
