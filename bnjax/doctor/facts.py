"""The facts that the rules check: the layers of a network, and what precedes them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax.doctor.calls import DropoutCall, NormCall

DEAD = 1e-3
"""A channel is dead if its variance is below this fraction of epsilon."""
STALE = 0.3
"""The smallest distance that counts as a result of averaging the parameters."""
LOST = 0.01
"""The relative error above which a variance has lost its digits."""
COARSE = 0.25
"""The largest spacing of floating numbers near the mean, in standard deviations."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Moments of a layer's input in the batch, float64, shape (features,)."""

    mean: np.ndarray
    var: np.ndarray
    count: np.ndarray

    @property
    def usable(self) -> bool:
        """Whether the moments are finite, of at least two values per channel."""
        return bool(np.isfinite(self.mean + self.var).all() and (self.count > 1).all())


@dataclasses.dataclass(frozen=True)
class Layer:
    """A batch norm layer: its variables, its calls and its input.

    Attributes:
        path: the path of the layer.
        mean: the running mean, float64, shape (features,).
        var: the running variance, float64, shape (features,).
        dtype: the dtype of the running statistics.
        scale: the scale, float64, shape (features,), or None.
        calls: the calls in training.
        eval_calls: the calls in evaluation.
        batch: the moments of the input in training; None if they were not recorded.
        before: the same moments with the parameters before they were averaged.
        moved: whether the running mean changed in the training call.
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
        """Whether the statistics still have their initial values."""
        return not self.mean.any() and bool((self.var == 1).all())

    @property
    def epsilon(self) -> float:
        """Epsilon of the layer; 0 if it is not known."""
        return next((c.epsilon for c in self.calls if c.epsilon is not None), 0.0)

    @property
    def flat(self) -> np.ndarray:
        """The channels whose running variance is negligible compared with epsilon."""
        return self.var < DEAD * self.epsilon

    def distance(self, batch: Batch | None) -> float:
        r"""Return the distance of the running statistics from a batch; 0 if unknown.

        The distance is the root mean square over the channels of the two terms
        $(\mu - \mu_B) / \sigma$ and $\log(\sigma^2 / \sigma_B^2) / \sqrt 2$, a metric
        on normal distributions. A batch of $N$ examples has a distance of
        $\sqrt{2 / N}$ by chance.
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
        """The relative error of the variance, and the input spacing in deviations."""
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
    """The facts that the rules check.

    Attributes:
        layers: the batch norm layers, in the order of the program.
        eval_dropouts: the Dropout calls that drop values in evaluation.
        biases: parameters added before a layer: pairs of the parameter's path and the
            layer's path.
        norms: pairs of a layer and the layer whose output is its input.
        dropouts: pairs of a layer and the Dropout before it.
        decay: by the path of a scale or bias, the fraction that decay removes per step.
        replicas: by path, the number of copies and their largest difference.
        nonfinite: the path of the first value that is not finite, and its kind.
    """

    layers: tuple[Layer, ...]
    eval_dropouts: tuple[DropoutCall, ...] = ()
    biases: tuple[tuple[str, str], ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    dropouts: tuple[tuple[str, DropoutCall], ...] = ()
    decay: Mapping[str, float] = dataclasses.field(default_factory=dict)
    replicas: Mapping[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    nonfinite: tuple[str, str] | None = None
