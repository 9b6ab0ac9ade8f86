"""Section 3.3 of the paper: batch normalization undoes the scale of the weights.

    python -m experiments.scale_invariance

For scalars a from 1e-3 to 1e3, in float32, measures the error of these equations,

    BN((aW)u) = BN(Wu)
    d BN((aW)u) / du = d BN(Wu) / du
    d BN((aW)u) / d(aW) = (1/a) * d BN(Wu) / dW

as the norm of the difference divided by the norm of the right-hand side, for whole
Jacobians. The equations are exact if epsilon is 0. At an epsilon of 1e-5 they fail for
small a, according to the formula sqrt((var + epsilon) / (var + epsilon / a**2)). Writes
experiments/results/scale_invariance.json and docs/figures/scale_invariance.png. Takes a
few seconds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bnjax
from benchmarks.figures import Figure, new_figure
from benchmarks.report import run_command
from experiments.runs import finish, rounded

EPSILONS = {"1e-5": 1e-5, "1e-20": 1e-20}
IDENTITIES = {
    "output": "BN((aW)u)",
    "gradient_u": "its gradient by u",
    "gradient_w": "a times its gradient by aW",
}
SCALES = np.logspace(-3, 3, 25)
EXAMPLES, INPUTS, OUTPUTS = 64, 20, 10
SEED = 0


@functools.partial(jax.jit, static_argnames="epsilon")
def transform(
    weights: jax.Array, u: jax.Array, *, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return BN(Wu) and its whole Jacobians by u and by W."""

    def normalized(weights: jax.Array, u: jax.Array) -> jax.Array:
        return bnjax.batch_norm(
            u @ weights,
            None,
            None,
            bnjax.BatchStats.init(OUTPUTS),
            epsilon=epsilon,
            update_stats=False,
        )[0]

    by_weights, by_u = jax.jacrev(normalized, argnums=(0, 1))(weights, u)
    return normalized(weights, u), by_u, by_weights


def measure() -> dict[str, Any]:
    """Return the relative differences for each epsilon, identity and scale."""
    key_u, key_w = jax.random.split(jax.random.key(SEED))
    u = jax.random.normal(key_u, (EXAMPLES, INPUTS))
    weights = jax.random.normal(key_w, (INPUTS, OUTPUTS)) / np.sqrt(INPUTS)
    result: dict[str, Any] = {"a": [rounded(a) for a in SCALES]}
    for name, epsilon in EPSILONS.items():
        plain = transform(weights, u, epsilon=epsilon)
        errors = []
        for a in SCALES:
            y, by_u, by_weights = transform(
                jnp.float32(a) * weights, u, epsilon=epsilon
            )
            scaled = (y, by_u, jnp.float32(a) * by_weights)
            errors.append(
                [difference(*pair) for pair in zip(scaled, plain, strict=True)]
            )
        result[f"epsilon {name}"] = dict(
            zip(IDENTITIES, np.transpose(errors).tolist(), strict=True)
        )
    var = np.asarray(bnjax.moments(u @ weights).var, np.float64)
    result["output_predicted"] = [
        rounded(predicted(var, a, EPSILONS["1e-5"])) for a in SCALES
    ]
    return result


def difference(found: Any, expected: Any) -> float:
    """Return the norm of the difference over that of what is expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return rounded(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))


def predicted(var: np.ndarray, a: float, epsilon: float) -> float:
    """Return the relative difference of the outputs that epsilon makes."""
    factor = np.sqrt((var + epsilon) / (var + epsilon / a**2))
    # Each channel counts by the size of its output.
    size = var / (var + epsilon)
    return float(np.sqrt(np.sum(size * (factor - 1) ** 2) / np.sum(size)))


def draw(record: dict[str, Any]) -> Figure:
    """Draw the differences, one panel an epsilon."""
    result = record["result"]
    a = np.asarray(result["a"])
    figure, panels = new_figure(2, sharey=True)
    for axes, name in zip(panels, EPSILONS, strict=True):
        for (identity, label), marker in zip(IDENTITIES.items(), "ovs", strict=True):
            errors = np.asarray(result[f"epsilon {name}"][identity])
            seen = errors > 0
            axes.plot(a[seen], errors[seen], marker, ms=5, alpha=0.7, label=label)
        axes.set(title=f"epsilon = {name}", xlabel="scale a of the weights")
        axes.set(xscale="log", yscale="log")
    formula = [error or np.nan for error in result["output_predicted"]]
    panels[0].plot(a, formula, "k--", lw=1, label="output, by the formula")
    panels[0].set(ylabel="relative difference from a = 1", ylim=(2e-8, 2))
    panels[0].legend(loc="upper right")
    shapes = f"{EXAMPLES} examples, {INPUTS} inputs, {OUTPUTS} outputs"
    figure.suptitle(f"BN((aW)u) against BN(Wu) in float32: {shapes}, one seed")
    return figure


def main() -> None:
    """Measure, write and draw."""
    finish("scale_invariance", measure(), [SEED], draw)


if __name__ == "__main__":
    run_command(main)
