"""How many digits of a variance are left, by the origin that sums are taken about.

    python -m experiments.cancellation

Float32 values of standard deviation 1 whose mean is 1 to 1e6. For each mean, the
relative error of the variance by

    sums about 0             mean(x^2) - mean(x)^2
    two passes               mean((x - mean)^2), the mean rounded to float32
    sums about an origin     mean((x - origin)^2) - mean(x - origin)^2, the origin 1
                             and 100 standard deviations off the mean
    `bnjax.moments`          on the device that is there

against the variance of the same values in float64, as the median over seeds. Writes
experiments/results/cancellation.json and docs/figures/cancellation.png. A few seconds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bnjax
from benchmarks.figures import Figure, new_figure
from benchmarks.report import run_command
from experiments.runs import finish, rounded

VALUES = 10_007
MEANS = np.logspace(0, 6, 25)
SEEDS = range(9)
# The relative error is below this times 1 + d^2 / var, d being the distance of the
# origin from the mean.
BOUND = 4e-7
ZERO, TWO_PASSES, MOMENTS = "sums about 0", "two passes", "bnjax.moments"
ORIGINS = {
    "sums about an origin 100 std from the mean": 100.0,
    "sums about an origin 1 std from the mean": 1.0,
}
COLORS = {ZERO: "C3", TWO_PASSES: "C1", MOMENTS: "C0"}
COLORS |= dict(zip(ORIGINS, ("C4", "C2"), strict=True))


@jax.jit
def about(x: jax.Array, origin: jax.Array) -> jax.Array:
    """Return the variance from the sums of x - origin and of its square."""
    distance = x - origin
    return jnp.mean(jnp.square(distance)) - jnp.square(jnp.mean(distance))


@jax.jit
def two_passes(x: jax.Array) -> jax.Array:
    """Return the mean square of the distance from the mean."""
    return jnp.mean(jnp.square(x - jnp.mean(x)))


def errors(mean: float, seed: int) -> dict[str, float]:
    """Return the relative error of each way for one sample."""
    x = jax.random.normal(jax.random.key(seed), (VALUES,)) + jnp.float32(mean)
    exact = float(np.var(np.asarray(x, np.float64)))
    ways = {ZERO: about(x, jnp.float32(0)), TWO_PASSES: two_passes(x)}
    for name, distance in ORIGINS.items():
        ways[name] = about(x, jnp.float32(mean - distance))
    ways[MOMENTS] = bnjax.moments(x[:, None]).var[0]
    return {name: abs(float(var) / exact - 1) for name, var in ways.items()}


def measure() -> dict[str, Any]:
    """Return the median of the errors over the seeds, for each way and mean."""
    found = [[errors(mean, seed) for seed in SEEDS] for mean in MEANS]
    return {
        "values": VALUES,
        "means": [rounded(mean) for mean in MEANS],
        "error": {
            name: [rounded(float(np.median([e[name] for e in row]))) for row in found]
            for name in COLORS
        },
    }


def draw(record: dict[str, Any]) -> Figure:
    """Draw the errors against the mean."""
    result = record["result"]
    means = np.asarray(result["means"])
    figure, axes = new_figure(height=5.5)
    for name, values in result["error"].items():
        axes.plot(means, values, ".-", lw=1.5, color=COLORS[name], label=name)
    bound = BOUND * (1 + means**2)
    label = r"bound about 0: $4 \cdot 10^{-7}\,(1 + $mean$^2/$var$)$"
    axes.plot(means, bound, "k--", lw=1, label=label)
    axes.axhspan(1, 1e3, color="gray", alpha=0.15, lw=0)
    axes.text(1.3, 2, "no digit left", color="gray")
    axes.set(xscale="log", yscale="log", ylim=(3e-9, 30))
    axes.set(xlabel="mean of the values, in standard deviations")
    axes.set(ylabel="relative error of the variance")
    values, seeds = result["values"], len(record["seeds"])
    axes.set(title=f"Variance of {values:,} float32 values, median of {seeds} seeds")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def main() -> None:
    """Measure, write and draw."""
    finish("cancellation", measure(), list(SEEDS), draw)


if __name__ == "__main__":
    run_command(main)
