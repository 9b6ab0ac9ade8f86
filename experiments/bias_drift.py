"""Section 2 of the paper: normalizing outside the gradient makes a bias grow forever.

    python -m experiments.bias_drift

Fits one unit x = w*u + b to targets t = 2u + 1 over 64 examples after subtracting its
mean. If the gradient does not include the mean, each step adds learning rate * mean(t)
to b, and subtracting the mean cancels it: b grows linearly without bound while the loss
does not change. If the gradient includes the mean, b does not change. If the standard
deviation is outside the gradient too, w also grows. Writes
experiments/results/bias_drift.json and docs/figures/bias_drift.png. Takes a few
seconds.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bnjax
from benchmarks.figures import Figure, new_figure, thousands
from benchmarks.report import run_command
from experiments.runs import finish, rounded

STEPS, RATE, EXAMPLES, SEED = 5000, 0.1, 64, 0
RECORD_EVERY = 50


def outside_mean(x: jax.Array) -> jax.Array:
    """Take the mean away, and no gradient through it."""
    return x - jax.lax.stop_gradient(x.mean())


def outside_both(x: jax.Array) -> jax.Array:
    """Normalize, with no gradient through mean and standard deviation."""
    return outside_mean(x) / jax.lax.stop_gradient(x.std())


def inside_mean(x: jax.Array) -> jax.Array:
    """Take the mean away, with the gradient through it."""
    return x - x.mean()


def inside_both(x: jax.Array) -> jax.Array:
    """Normalize by bnjax, whose derivative goes through both."""
    stats = bnjax.BatchStats.init(1)
    return bnjax.batch_norm(x[:, None], None, None, stats)[0][:, 0]


NORMALIZERS = {
    "mean outside the gradient": outside_mean,
    "mean and deviation outside": outside_both,
    "mean inside the gradient": inside_mean,
    "batch normalization (both inside)": inside_both,
}


@functools.partial(jax.jit, static_argnums=0)
def descend(
    normalize: Any, u: jax.Array, t: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return w, b and the loss before each step of gradient descent."""

    def loss_fn(params: tuple[jax.Array, jax.Array]) -> jax.Array:
        w, b = params
        return 0.5 * jnp.mean((normalize(w * u + b) - t) ** 2)

    def step(params: Any, _: None) -> tuple[Any, Any]:
        loss, gradients = jax.value_and_grad(loss_fn)(params)
        moved = jax.tree.map(lambda p, g: p - RATE * g, params, gradients)
        return moved, (*params, loss)

    start = (jnp.float32(1.0), jnp.float32(0.0))
    return jax.lax.scan(step, start, length=STEPS + 1)[1]


def measure() -> dict[str, Any]:
    """Return the curves of each way to normalize, and how far they drift."""
    u = jax.random.normal(jax.random.key(SEED), (EXAMPLES,))
    t = 2 * u + 1
    slope = RATE * float(t.mean())
    result: dict[str, Any] = {
        "steps": list(range(0, STEPS + 1, RECORD_EVERY)),
        "bias_per_step_predicted": rounded(slope),
    }
    for name, normalize in NORMALIZERS.items():
        w, b, loss = (
            np.asarray(curve, np.float64) for curve in descend(normalize, u, t)
        )
        half = STEPS // 2
        result[name] = {
            "bias": [rounded(value) for value in b[::RECORD_EVERY]],
            "weight": [rounded(value) for value in w[::RECORD_EVERY]],
            "loss": [rounded(value) for value in loss[::RECORD_EVERY]],
            "final_bias": rounded(b[-1]),
            "bias_per_step_in_second_half": rounded((b[-1] - b[half]) / (STEPS - half)),
            "range_of_loss_in_second_half": rounded(float(np.ptp(loss[half:]))),
        }
    return result


def draw(record: dict[str, Any]) -> Figure:
    """Draw bias, weight and loss against the steps."""
    result = record["result"]
    figure, panels = new_figure(3)
    # Where two curves are one, the wide one is seen beside the thin.
    thin, wide = {"lw": 1.5, "ls": "--"}, {"lw": 5, "alpha": 0.35}
    styles = ({"color": "C3"} | thin, {"color": "C1"} | thin)
    styles += ({"color": "C2"} | wide, {"color": "C0"} | wide)
    for axes, quantity in zip(panels, ("bias b", "weight w", "loss"), strict=True):
        for name, style in zip(NORMALIZERS, styles, strict=True):
            curve = result[name][quantity.split()[0]]
            axes.plot(result["steps"], curve, label=name, **style)
        axes.set(title=quantity, xlabel="steps of gradient descent")
        thousands(axes)
    panels[2].set_ylim(0, None)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    figure.suptitle(f"One unit w*u + b fitted to {EXAMPLES} examples, one seed")
    return figure


def main() -> None:
    """Measure, write and draw."""
    finish("bias_drift", measure(), [SEED], draw)


if __name__ == "__main__":
    run_command(main)
