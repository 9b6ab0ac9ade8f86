"""A small folder of images, each of one color that says which it is."""

from pathlib import Path

import cv2
import numpy as np

CLASSES = ("ant", "bee", "cat")


def color(split: str, label: int, number: int) -> tuple[int, int, int]:
    """The RGB of an image."""
    return (60 * label + 40, 9 * number + 10, 200 if split == "train" else 90)


def write(root: Path, count: int = 8, test: str = "val") -> Path:
    """Write train and test images of many sizes."""
    for split, images in (("train", count), (test, 3)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = np.empty((20 + number, 30 - number, 3), np.uint8)
                pixels[:] = color(split, label, number)[::-1]
                cv2.imwrite(str(folder / f"{number:02}.jpg"), pixels)
    return root
