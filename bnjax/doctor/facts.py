"""What the rules are told of a network: its layers, and what comes before them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.doctor.calls import DropoutCall, NormCall

DEAD = 1e-3
"""Of epsilon: a channel of a smaller variance is dead."""
STALE = 0.3
"""A distance that averaging the parameters must have made."""
LOST = 0.01
"""Relative error of a variance that has lost its digits."""
COARSE = 0.25
"""Spacing of the numbers about the mean, in standard deviations."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Moments of what a layer was given in the batch, float64, shape (features,)."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray

    @property
    def usable(self) -> bool:
        """Whether there are finite moments, of two values a channel or more."""
        return bool(np.isfinite(self.mean + self.var).all() and (self.count > 1).all())


@dataclasses.dataclass(frozen=True)
class Layer:
    """A batch norm layer: its variables, its calls, what it was given.

    Attributes:
        mean, var: the running statistics, float64, shape (features,).
        dtype: theirs.
        scale: float64, shape (features,), or None.
        calls: in training; `eval_calls` in evaluation.
        batch: what it was given in training, None where it was not noted.
        before: the same with the parameters before they were averaged.
        moved: its running mean moved in the training call.
    """

    path: str
    mean: np.ndarray
    var: np.ndarray
    dtype: Any
    scale: np.ndarray | None
    calls: tuple[NormCall, ...]
    eval_calls: tuple[NormCall, ...]
    batch: Batch | None
    before: Batch | None
    moved: bool

    @property
    def never_updated(self) -> bool:
        """Whether the statistics are those that a layer starts with."""
        return not self.mean.any() and bool((self.var == 1).all())

    @property
    def epsilon(self) -> float:
        """Epsilon of the layer; 0 where it is not known."""
        return next((c.epsilon for c in self.calls if c.epsilon is not None), 0.0)

    @property
    def flat(self) -> np.ndarray:
        """The channels whose running variance is next to nothing beside epsilon."""
        return self.var < DEAD * self.epsilon

    def distance(self, batch: Batch | None) -> float:
        """How far the running statistics are from those of a batch; 0 if unknown.

        The root mean square over the channels of the two terms
        (mean - mean_B) / sigma and log(var / var_B) / sqrt(2), a metric on normal
        distributions: what a batch of N examples has by chance is sqrt(2 / N).
        """
        if batch is None or not batch.usable:
            return 0.0
        live = ~self.flat & (batch.var >= DEAD * self.epsilon)
        if not live.any() or not np.isfinite(self.mean + self.var).all():
            return 0.0
        var, batch_var = (v[live] + self.epsilon for v in (self.var, batch.var))
        shift = np.square(self.mean - batch.mean)[live] / np.sqrt(var * batch_var)
        return float(np.sqrt(np.mean(shift + np.log(var / batch_var) ** 2 / 2)))

    @property
    def chance(self) -> float:
        """The distance that a batch of this size has by chance."""
        return math.sqrt(2 / max(1, min((c.examples for c in self.calls), default=1)))

    @property
    def stale(self) -> bool:
        """Whether the statistics fit the parameters before the average, not after."""
        now, before = self.distance(self.batch), self.distance(self.before)
        return self.before is not None and now > max(STALE, 2 * before)

    @property
    def lost(self) -> tuple[float, float]:
        """Relative error of the variance, and the spacing of inputs in deviations."""
        if self.batch is None or not self.batch.usable:
            return 0.0, 0.0
        mean, var = self.batch.mean, self.batch.var
        live = var > DEAD * self.epsilon
        ratio = float(np.max(mean[live] ** 2 / var[live], initial=0))
        error = max((call.sum_epsilon for call in self.calls), default=0.0)
        unit = max((float(jnp.finfo(c.dtype).eps) for c in self.calls), default=0.0)
        return error * (1 + ratio) if error else 0.0, unit * math.sqrt(ratio)

    @property
    def lost_digits(self) -> bool:
        """Whether the variance of the batch has lost its digits."""
        error, spacing = self.lost
        return error > LOST or spacing > COARSE


@dataclasses.dataclass(frozen=True)
class Examination:
    """All that the rules look at.

    Attributes:
        layers: of batch normalization, as the program comes to them.
        eval_dropouts: that drop values in evaluation.
        biases: parameters added before a layer: pairs of their path and the layer's.
        norms: pairs of a layer and the one whose output it is given.
        dropouts: pairs of a layer and the Dropout before it.
        decay: by the path of a scale or bias, the part of it that decay takes away.
        replicas: by path, how many copies there are and how far they are apart.
        nonfinite: where the first value that is not finite is, and in what.
    """

    layers: tuple[Layer, ...]
    eval_dropouts: tuple[DropoutCall, ...] = ()
    biases: tuple[tuple[str, str], ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    dropouts: tuple[tuple[str, DropoutCall], ...] = ()
    decay: Mapping[str, float] = dataclasses.field(default_factory=dict)
    replicas: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    nonfinite: tuple[str, str] | None = None
