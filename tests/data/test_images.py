import functools
import io
import math
import os
import struct
import zlib

import cv2
import jax
import numpy as np
import pytest
from numpy.random import default_rng
from PIL import Image

from bnjax.data.config import AugmentConfig
from bnjax.data.images import (
    CentralCrop,
    ImageError,
    color_transform,
    decode_image,
    distort_colors,
    printable,
    random_area_box,
    random_resized_crop,
    read_file,
    shift_and_mirror,
)

LUMA = np.array([0.299, 0.587, 0.114])


def photo(height=40, width=60, channels=3):
    rng = default_rng(5)
    return rng.integers(0, 256, (height, width, channels), np.uint8)


def encode(kind, image=None, **options):
    file = io.BytesIO()
    image = photo() if image is None else image
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


class TestDecoding:
    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("JPEG", {"restart_marker_rows": 1}),
            ("JPEG", {"exif": b"Exif\0\0" + encode("JPEG")}),
            ("PNG", {}),
            ("BMP", {}),
            ("GIF", {}),
            ("WEBP", {}),
            ("TIFF", {"compression": "tiff_lzw"}),
        ],
    )
    # What Pillow says to a truncated TIFF, beside refusing it.
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
    @pytest.mark.filterwarnings("ignore:Truncated File Read")
    def test_truncation_is_noticed_and_what_follows_an_image_is_not(
        self, kind, options
    ):
        encoded = encode(kind, **options)
        whole = decode_image(encoded, 3)
        assert whole.shape == (40, 60, 3)
        for after in (b"\0" * 1000, encode("PNG"), b"\xff\xd8 a film"):
            np.testing.assert_array_equal(decode_image(encoded + after, 3), whole)
        # The checksum of a PNG's empty last piece is not waited for.
        end = len(encoded) - (4 if kind == "PNG" else 0)
        for length in [*range(0, end, 7 if kind != "TIFF" else 401), end - 1]:
            with pytest.raises(ImageError, match=r"^(is truncated|cannot be decoded)$"):
                decode_image(encoded[:length], 3)

    @pytest.mark.parametrize("channels", [1, 3])
    def test_pixels_are_opencvs(self, channels):
        encoded = encode("JPEG", photo(), quality=80)
        kind = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
        expected = cv2.imdecode(np.frombuffer(encoded, np.uint8), kind)
        found = decode_image(encoded, channels)
        np.testing.assert_array_equal(found, expected.reshape(40, 60, channels))
        red = np.full((4, 4, 3), (250, 0, 0), np.uint8)
        assert decode_image(encode("PNG", red), 3)[0, 0].tolist() == [250, 0, 0]

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
    def test_orientation_is_applied_where_asked_for(self, kind):
        exif = Image.Exif()
        exif[0x112] = 6
        image = np.zeros((4, 6, 3), np.uint8)
        image[:, :3] = 250
        encoded = encode(kind, image, exif=exif)
        assert decode_image(encoded, 3).shape == (4, 6, 3)
        upright = decode_image(encoded, 3, apply_exif=True)
        assert upright.shape == (6, 4, 3)
        assert upright[0].min() > 200
        assert upright[-1].max() < 50

    def test_a_large_image_is_refused_before_it_is_decoded(self):
        def chunk(name, body):
            checksum = struct.pack(">I", zlib.crc32(name + body))
            return struct.pack(">I", len(body)) + name + body + checksum

        header = struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
        with pytest.raises(
            ImageError,
            match=r"20,000 x 30,000 pixels, more than --data.max-pixels 134217728",
        ):
            decode_image(bomb, 3)
        for kind in ("JPEG", "PNG", "GIF"):
            encoded = encode(kind)
            assert decode_image(encoded, 3, max_pixels=2400).shape == (40, 60, 3)
            with pytest.raises(ImageError, match=r"40 x 60 pixels, more than"):
                decode_image(encoded, 3, max_pixels=2399)


class TestReading:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (os.mkfifo, "is not a regular file"),
            (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
            (lambda path: path.mkdir(), "is not a regular file"),
            (lambda path: path.symlink_to("gone"), r"cannot be read \(No such file"),
            (lambda path: path.symlink_to(path.name), r"read \(Too many levels of"),
            (lambda path: path.write_bytes(b"12345"), "has 5 bytes, more than 4"),
        ],
    )
    def test_regular_files_alone_are_read(self, tmp_path, make, message):
        make(tmp_path / "a.jpg")
        with pytest.raises(ImageError, match=message):
            read_file(tmp_path / "a.jpg", max_bytes=4)

    def test_links_to_files_and_names_of_any_bytes(self, tmp_path):
        name = os.fsdecode(b"caf\xe9.jpg")
        (tmp_path / name).write_bytes(b"1234")
        (tmp_path / "link").symlink_to(name)
        assert read_file(tmp_path / "link", max_bytes=4) == b"1234"
        assert printable(tmp_path / name) == f"{tmp_path}/caf\\xe9.jpg"


class TestBoxes:
    @pytest.mark.parametrize(
        ("height", "width"), [(100, 80), (32, 32), (7, 300), (1, 1)]
    )
    def test_they_lie_within_the_image(self, height, width):
        rng = default_rng(0)
        for _ in range(500):
            box = random_area_box(rng, height, width)
            assert 0 <= box.top < box.top + box.height <= height
            assert 0 <= box.left < box.left + box.width <= width

    def test_area_aspect_and_place_are_distributed_as_said(self):
        """On a square, with areas that always fit: uniform, log-uniform, uniform."""
        rng = default_rng(1)
        side, count = 2000, 4000
        boxes = [
            random_area_box(rng, side, side, area=(0.1, 0.5)) for _ in range(count)
        ]
        area = np.array([b.height * b.width for b in boxes]) / side**2
        ratio = np.log([b.width / b.height for b in boxes]) / math.log(4 / 3)
        top = np.array([b.top / (side - b.height) for b in boxes])
        left = np.array([b.left / (side - b.width) for b in boxes])
        uniform = (area, 0.1, 0.5), (ratio, -1, 1), (top, 0, 1), (left, 0, 1)
        for values, low, high in uniform:
            sample = np.sort((values - low) / (high - low))
            distance = np.abs(sample - (np.arange(count) + 0.5) / count).max()
            # Kolmogorov and Smirnov: beyond this once in a thousand.
            assert distance < 1.95 / math.sqrt(count)
        assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.08

    @pytest.mark.parametrize(
        ("height", "width", "aspect", "expected"),
        [
            (50, 50, (1, 1), (0, 0, 50, 50)),
            # No draw fits: the central part.
            (10, 100, (3 / 4, 4 / 3), (0, 43, 10, 13)),
        ],
    )
    def test_of_the_whole_area(self, height, width, aspect, expected):
        area = (1, 1)
        assert random_area_box(default_rng(2), height, width, area, aspect) == expected


class TestColors:
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
    def test_the_map_equals_one_distortion_after_the_other(self, order):
        image = default_rng(4).uniform(0, 255, (50, 3))
        values = {"brightness": 12.0, "contrast": 0.7, "saturation": 1.3, "hue": 0.15}
        matrix = color_transform(image.mean(0), order=order, **values)
        found = image @ matrix[:, :3].T + matrix[:, 3]

        to_yiq = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])

        def hue(x):
            y, i, q = to_yiq @ x.T
            turned = (i + 1j * q) * np.exp(2j * np.pi * 0.15)
            return np.linalg.solve(to_yiq, np.stack([y, turned.real, turned.imag])).T

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
        assert distort_colors(image, default_rng(0), 0) is image

    def test_strength_narrows_the_change(self):
        image = photo()
        low, middle, high = (
            np.mean(
                [
                    abs(distort_colors(image, default_rng(s), x) - np.float64(image))
                    for s in range(50)
                ]
            )
            for x in (0.1, 0.5, 1.0)
        )
        assert 0 < low < middle / 3 < high / 3

    def test_values_are_cut_off_at_black_and_white(self):
        white = np.full((4, 4, 3), 255, np.uint8)
        seen = [distort_colors(white, default_rng(s), 1.0) for s in range(20)]
        assert all(image.dtype == np.uint8 for image in seen)
        # A wrap-around would be black.
        assert min(image.min() for image in seen) > 200


class TestRandomResizedCrop:
    crop = staticmethod(
        functools.partial(
            random_resized_crop,
            augment=AugmentConfig(area=(1, 1), aspect=(1, 1), flip=False, strength=0),
        )
    )

    def test_it_is_a_function_of_the_generator(self):
        first, again, other = (
            random_resized_crop(photo(), default_rng(seed), 24, AugmentConfig())
            for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        assert (first.shape, first.dtype) == ((24, 24, 3), np.uint8)

    def test_nothing_changed_is_the_identity(self):
        image = photo(32, 32)
        for seed in range(8):
            found = self.crop(image, default_rng(seed), 32)
            np.testing.assert_array_equal(found, image)

    def test_half_of_the_images_are_mirrored(self):
        augment = AugmentConfig(area=(1, 1), aspect=(1, 1), strength=0)
        image = photo(32, 32)
        mirrored = 0
        for seed in range(400):
            rng = default_rng(seed)
            found = random_resized_crop(image, rng, 32, augment)
            is_mirrored = (found == image[:, ::-1]).all()
            assert is_mirrored or (found == image).all()
            mirrored += is_mirrored
        assert abs(mirrored - 200) < 5 * math.sqrt(100)

    def test_every_interpolation_is_used(self):
        image = photo(40, 40)
        kinds = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
        resized = (cv2.resize(image, (16, 16), interpolation=kind) for kind in kinds)
        expected = {each.tobytes() for each in resized}
        found = {self.crop(image, default_rng(s), 16).tobytes() for s in range(60)}
        assert len(expected) == 4
        assert found == expected

    def test_one_channel(self):
        rng = default_rng(0)
        found = random_resized_crop(photo(channels=1), rng, 12, AugmentConfig())
        assert found.shape == (12, 12, 1)


def test_central_crop_takes_the_middle():
    image = np.zeros((64, 80, 3), np.uint8)
    image[4:60, 12:68] = 200
    np.testing.assert_array_equal(CentralCrop(56)(image), image[4:60, 12:68])
    assert CentralCrop(28)(image).min() == 200
    assert CentralCrop(28, 1.0)(image).min() == 0
    assert CentralCrop(9)(photo(channels=1)).shape == (9, 9, 1)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (5, 9, 1)])
def test_each_image_is_a_part_of_its_padded_self(shape):
    height, width = shape[:2]
    images = default_rng(0).integers(1, 256, (300, *shape), np.uint8)
    found = np.asarray(shift_and_mirror(images, keys(300), padding=2))
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    around = [(0, 0), (2, 2), (2, 2)] + [(0, 0)] * (len(shape) - 2)
    padded = np.pad(images, around)
    matches = np.array(
        [
            [
                (
                    padded[:, top : top + height, left : left + width][:, :, ::step]
                    == found
                )
                .reshape(300, -1)
                .all(axis=1)
                for step in (1, -1)
            ]
            for top in range(5)
            for left in range(5)
        ]
    )
    assert (matches.sum(axis=(0, 1)) == 1).all()
    place, flip, _ = np.nonzero(matches)
    assert len(set(place)) == 25
    assert abs(flip.sum() - 150) < 5 * np.sqrt(75)


def test_no_padding_and_no_mirror_is_the_identity():
    images = default_rng(1).integers(0, 256, (20, 6, 6, 3), np.uint8)
    found = shift_and_mirror(images, keys(20), padding=0, flip=False)
    np.testing.assert_array_equal(found, images)


@pytest.mark.slow
def test_an_image_depends_on_its_own_key_alone():
    images = default_rng(2).integers(0, 256, (10, 6, 6, 3), np.uint8)
    whole = shift_and_mirror(images, keys(10))
    order = np.array([3, 9, 0])
    np.testing.assert_array_equal(
        shift_and_mirror(images[order], keys(10)[order]), whole[order]
    )
    assert (np.asarray(shift_and_mirror(images, keys(10, seed=1))) != whole).any()
