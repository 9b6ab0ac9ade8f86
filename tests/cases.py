"""The registry of cases that every test of the transform is parametrized from."""

import dataclasses

import numpy as np
import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape, a feature axis, a mask and a spread of the data."""

    name: str
    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    mask: str | None = None
    mean: float = 1.5
    std: float = 2.0
    epsilon: float = 1e-5

    @property
    def feature_shape(self):
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(self.shape[a] for a in sorted(a % len(self.shape) for a in axes))

    def arrays(self, dtype=np.float32):
        """x, scale, bias, dy and the mask of the case, the same at every call."""
        rng = np.random.default_rng(len(self.name) + sum(map(ord, self.name)))
        x = rng.normal(size=self.shape) * self.std + self.mean
        scale = rng.normal(size=self.feature_shape) + 0.5
        bias = rng.normal(size=self.feature_shape)
        dy = rng.normal(size=self.shape)
        arrays = tuple(np.asarray(a, dtype) for a in (x, scale, bias, dy))
        return *arrays, self._mask(rng)

    def _mask(self, rng):
        if self.mask is None:
            return None
        shape = list(self.shape)
        if self.mask in ("examples", "weights"):
            shape[1:] = [1] * (len(shape) - 1)
        elif self.mask == "positions":
            shape[self.axis] = 1
        keep = rng.random(shape) < 0.7
        keep.flat[:3] = True, False, True
        if self.mask == "weights":
            return keep * rng.integers(1, 4, shape)
        return keep


SHAPES = [
    Case("smallest", (8, 3)),
    Case("two examples", (2, 3), epsilon=1.0),
    Case("mlp", (60, 100)),
    Case("sequence", (6, 11, 5)),
    Case("images", (8, 7, 7, 16)),
    Case("large images", (32, 28, 28, 64)),
    Case("volumes", (2, 3, 4, 5, 6)),
    Case("channels first", (8, 16, 7, 7), axis=1),
    Case("features first", (3, 40), axis=0),
    Case("negative axis", (4, 5, 6), axis=-2),
    Case("per activation", (32, 4, 4, 3), axis=(1, 2, 3)),
    Case("two feature axes", (6, 4, 5, 3), axis=(-1, 1)),
    Case("small spread", (16, 8), std=1e-3, mean=0.1),
    Case("large epsilon", (16, 8), epsilon=0.1),
]
MASKED = [
    Case("masked examples", (8, 5, 5, 4), mask="examples"),
    Case("masked rows", (16, 6), mask="examples"),
    Case("masked positions", (6, 11, 5), mask="positions"),
    Case("masked positions, channels first", (6, 5, 4, 4), axis=1, mask="positions"),
    Case("masked entries", (6, 7, 5), mask="entries"),
    Case("weighted examples", (8, 5, 5, 4), mask="weights"),
]
LARGE_MEAN = [
    Case("mean 1e4 std", (64, 16), mean=1e4, std=1.0),
    Case("mean 1e6 std", (64, 16), mean=1e6, std=1.0),
    Case("images, mean 1e4 std", (16, 14, 14, 8), mean=1e4, std=1.0),
    Case("images, mean 1e6 std", (16, 14, 14, 8), mean=-1e6, std=1.0),
    Case("masked, mean 1e6 std", (16, 9, 9, 8), mask="examples", mean=1e6, std=1.0),
]


def parametrize(cases):
    """One test for each case, under its name."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
