"""Running sums over batches, in float64 on the host."""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from bnjax._validate import did_you_mean
from bnjax.population.records import Record

Method = Literal["paper", "pooled"]


def check_method(method: str) -> None:
    """Refuse the name of a method that there is not."""
    if method not in get_args(Method):
        raise ValueError(
            f"recompute_batch_stats: method={method!r}."
            f"{did_you_mean(str(method), get_args(Method))} Expected 'paper', the mean "
            "of the batches' means and unbiased variances, or 'pooled', the moments of "
            "all values together."
        )


def _zero() -> np.ndarray:
    return np.zeros(())


@dataclass(frozen=True)
class Totals:
    """What one layer has seen so far.

    Attributes:
        weight: number of values, a channel at a time; likewise below.
        mean: of all of them.
        between: sum of weight_B * (mean_B - mean)**2 over the batches B.
        within: sum of weight_B * var_B, biased.
        unbiased: sum of weight_B * var_B * m / (m - 1), m values in the batch.
    """

    weight: np.ndarray = field(default_factory=_zero)
    mean: np.ndarray = field(default_factory=_zero)
    between: np.ndarray = field(default_factory=_zero)
    within: np.ndarray = field(default_factory=_zero)
    unbiased: np.ndarray = field(default_factory=_zero)

    def add(self, record: Record, method: Method, place: str) -> "Totals":
        """The totals with one batch more.

        Args:
            record: NumPy arrays of the shape of the layer's statistics.
            method: which variance will be asked for.
            place: names the layer and the batch in errors.

        Raises:
            ValueError: the moments are not finite, or the batch has a single value
                and the method asks for its unbiased variance.
        """
        weight, count = np.float64(record.weight), np.float64(record.moments.count)
        seen = weight > 0
        mean = np.where(seen, np.float64(record.moments.mean), 0)
        var = np.where(seen, np.float64(record.moments.var), 0)
        if not np.isfinite([weight, mean, var]).all():
            raise ValueError(
                f"{place}: the mean or the variance of the input is not finite; "
                "expected finite inputs. Look for NaN or infinity in that batch, for "
                "parameters that diverged, or for an overflow of float16."
            )
        if method == "paper" and np.any(seen & (count <= 1)):
            raise ValueError(
                f"{place}: one value per channel, which has no unbiased variance "
                "(m - 1 = 0); expected two or more. Use larger batches, or "
                "method='pooled'."
            )
        new_weight = self.weight + weight
        share = weight / np.where(new_weight > 0, new_weight, 1)
        delta = mean - self.mean
        return Totals(
            new_weight,
            self.mean + delta * share,
            self.between + np.square(delta) * self.weight * share,
            self.within + weight * var,
            self.unbiased + weight * var * (count / np.maximum(count - 1, 1)),
        )

    def mean_and_var(self, method: Method, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The statistics of the population.

        Raises:
            ValueError: there is a single value in all batches.
        """
        divisor = np.where(self.weight > 0, self.weight, 1)
        if method == "paper":
            return self.mean, self.unbiased / divisor
        if np.any((self.weight > 0) & (self.weight <= 1)):
            raise ValueError(
                f"recompute_batch_stats: layer {name} was given one value per channel "
                "in all batches; expected two or more."
            )
        var = (self.within + self.between) / np.maximum(self.weight - 1, 1)
        return self.mean, var
