import math

import cv2
import numpy as np
import pytest

from bnjax.data.augment import (
    CentralCrop,
    RandomResizedCrop,
    color_transform,
    distort_colors,
    random_area_box,
)

LUMA = np.array([0.299, 0.587, 0.114])


def photo(height=40, width=60, channels=3):
    rng = np.random.default_rng(5)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


class TestBoxes:
    @pytest.mark.parametrize(
        ("height", "width"), [(100, 80), (32, 32), (7, 300), (1, 1)]
    )
    def test_they_lie_within_the_image(self, height, width):
        rng = np.random.default_rng(0)
        for _ in range(500):
            box = random_area_box(rng, height, width)
            assert box.height >= 1
            assert box.width >= 1
            assert 0 <= box.top <= height - box.height
            assert 0 <= box.left <= width - box.width

    def test_area_aspect_and_place_are_distributed_as_said(self):
        """On a square, with areas that always fit: uniform, log-uniform, uniform."""
        rng = np.random.default_rng(1)
        side, count = 2000, 4000
        boxes = [
            random_area_box(rng, side, side, area=(0.1, 0.5)) for _ in range(count)
        ]
        area = np.array([b.height * b.width for b in boxes]) / side**2
        ratio = np.log([b.width / b.height for b in boxes]) / math.log(4 / 3)
        top = np.array([b.top / (side - b.height) for b in boxes])
        left = np.array([b.left / (side - b.width) for b in boxes])
        for values, low, high in (
            (area, 0.1, 0.5),
            (ratio, -1, 1),
            (top, 0, 1),
            (left, 0, 1),
        ):
            sample = np.sort((values - low) / (high - low))
            distance = np.abs(sample - (np.arange(count) + 0.5) / count).max()
            # Kolmogorov and Smirnov: beyond this once in a thousand.
            assert distance < 1.95 / math.sqrt(count)
        assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.08

    def test_the_whole_image_can_be_the_box(self):
        rng = np.random.default_rng(2)
        box = random_area_box(rng, 50, 50, area=(1, 1), aspect=(1, 1))
        assert (box.top, box.left, box.height, box.width) == (0, 0, 50, 50)

    def test_what_never_fits_gives_the_central_part(self):
        rng = np.random.default_rng(3)
        box = random_area_box(rng, 10, 100, area=(1, 1))
        assert (box.top, box.left, box.height, box.width) == (0, 43, 10, 13)


class TestColors:
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
    def test_the_map_equals_one_distortion_after_the_other(self, order):
        image = np.random.default_rng(4).uniform(0, 255, (50, 3))
        values = {"brightness": 12.0, "contrast": 0.7, "saturation": 1.3, "hue": 0.15}
        matrix = color_transform(image.mean(0), order=order, **values)
        found = image @ matrix[:, :3].T + matrix[:, 3]

        def hue(x):
            y = x @ LUMA
            i = x @ (0.596, -0.274, -0.322)
            q = x @ (0.211, -0.523, 0.312)
            turned = (i + 1j * q) * np.exp(2j * np.pi * 0.15)
            to_yiq = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
            yiq = np.stack([y, turned.real, turned.imag], -1)
            return np.linalg.solve(to_yiq, yiq.T).T

        steps = (
            lambda x: x + 12.0,
            lambda x: x.mean(0) + 0.7 * (x - x.mean(0)),
            lambda x: (x @ LUMA)[:, None] * (1 - 1.3) + 1.3 * x,
            hue,
        )
        expected = image
        for which in order:
            expected = steps[which](expected)
        np.testing.assert_allclose(found, expected, atol=1e-9)

    def test_hue_keeps_greys_and_a_full_turn_keeps_all(self):
        values = {"brightness": 0, "contrast": 1, "saturation": 1}
        quarter = color_transform(np.zeros(3), hue=0.25, **values)
        np.testing.assert_allclose(quarter[:, :3] @ np.ones(3), np.ones(3), atol=1e-12)
        full = color_transform(np.zeros(3), hue=1.0, **values)
        np.testing.assert_allclose(full, np.eye(3, 4), atol=1e-12)

    def test_strength_zero_is_the_identity(self):
        image = photo()
        assert distort_colors(image, np.random.default_rng(0), 0) is image

    def test_strength_narrows_the_change(self):
        image = photo()
        change = {
            strength: np.mean(
                [
                    np.abs(
                        distort_colors(image, np.random.default_rng(s), strength)
                        - image.astype(float)
                    ).mean()
                    for s in range(50)
                ]
            )
            for strength in (0.1, 0.5, 1.0)
        }
        assert 0 < change[0.1] < change[0.5] / 3 < change[1.0] / 3

    def test_values_are_cut_off_at_black_and_white(self):
        white = np.full((4, 4, 3), 255, np.uint8)
        seen = [distort_colors(white, np.random.default_rng(s), 1.0) for s in range(20)]
        assert all(image.dtype == np.uint8 for image in seen)
        # A wrap-around would be black.
        assert min(image.min() for image in seen) > 200


class TestRandomResizedCrop:
    def test_it_is_a_function_of_the_generator(self):
        crop = RandomResizedCrop(24)
        first, again, other = (
            crop(photo(), np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        assert (first.shape, first.dtype) == ((24, 24, 3), np.uint8)

    def test_nothing_changed_is_the_identity(self):
        crop = RandomResizedCrop(32, area=(1, 1), aspect=(1, 1), flip=False, strength=0)
        image = photo(32, 32)
        for seed in range(8):
            found = crop(image, np.random.default_rng(seed))
            np.testing.assert_array_equal(found, image)

    def test_half_of_the_images_are_mirrored(self):
        crop = RandomResizedCrop(32, area=(1, 1), aspect=(1, 1), strength=0)
        image = photo(32, 32)
        mirrored = 0
        for seed in range(400):
            found = crop(image, np.random.default_rng(seed))
            is_mirrored = (found == image[:, ::-1]).all()
            assert is_mirrored or (found == image).all()
            mirrored += is_mirrored
        assert abs(mirrored - 200) < 5 * math.sqrt(100)

    def test_every_interpolation_is_used(self):
        crop = RandomResizedCrop(16, area=(1, 1), aspect=(1, 1), flip=False, strength=0)
        image = photo(40, 40)
        kinds = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
        expected = {
            cv2.resize(image, (16, 16), interpolation=kind).tobytes() for kind in kinds
        }
        found = {crop(image, np.random.default_rng(s)).tobytes() for s in range(60)}
        assert len(expected) == 4
        assert found == expected

    def test_one_channel(self):
        found = RandomResizedCrop(12)(photo(channels=1), np.random.default_rng(0))
        assert found.shape == (12, 12, 1)


def test_central_crop_takes_the_middle():
    image = np.zeros((64, 80, 3), np.uint8)
    image[4:60, 12:68] = 200
    np.testing.assert_array_equal(CentralCrop(56)(image), image[4:60, 12:68])
    assert CentralCrop(28)(image).min() == 200
    assert CentralCrop(28, 1.0)(image).min() == 0
    assert CentralCrop(9)(photo(channels=1)).shape == (9, 9, 1)
