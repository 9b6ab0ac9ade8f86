"""When population statistics are better than moving averages, and when they are not.

    python -m experiments.population

Measures the test accuracy on MNIST of the network of the `mnist` preset, normalized by
the moving averages of training and by the statistics of
`bnjax.population.recompute_batch_stats` over 6,000 training examples:

- after 10 to 500 steps, with moving averages of momentum 0.99;
- for an exponential moving average of the parameters (0.99 a step), with the moving
  averages of the trained network, with an average of these, and with its own
  statistics;
- with mini-batches of 4 to 256 in training and estimation, all runs as in
  `experiments.batch_size`.

Writes experiments/results/population.json and docs/figures/population.png. Takes about
five minutes on one CPU core; a second start trains only runs that are not in
runs/experiments.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from benchmarks.figures import WITH, Figure, new_figure, plot_median, seeds_of
from benchmarks.report import run_command
from bnjax.population import recompute_batch_stats
from bnjax.training.config import Config
from experiments import batch_size
from experiments.runs import Task, finish, once, preset, variables_of, visit

STEPS = [10, 20, 50, 100, 200, 500]
AVERAGED_STEPS = [20, 50, 100, 200, 500, 1000]
SIZES = (4, 8, 16, 32, 64, 128, 256)
EXAMPLES = 6000
DECAY = 0.99
MOVING, PAPER, POOLED = "moving averages", "population (paper)", "population (pooled)"
METHODS = {PAPER: "paper", POOLED: "pooled"}
NETWORK = "network itself, moving averages"
STALE = "averaged, moving averages of the network"
LIKEWISE = "averaged, moving averages averaged likewise"
OWN = "averaged, population (pooled)"
COLORS = {MOVING: "C7", PAPER: "C1", POOLED: "C0"}
COLORS |= {NETWORK: "C7", STALE: "C3", LIKEWISE: "C1", OWN: "C0"}


def reproduce(seeds: int = 3) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many runs of each.
    """
    chosen = range(seeds)

    def of(steps: list[int], seed: int) -> Config:
        changes = {"steps": steps[-1], "seed": seed}
        return preset("mnist", changes)

    result: dict[str, Any] = {
        "steps": STEPS,
        "after_steps": [once("population_steps", of(STEPS, s), steps) for s in chosen],
        "averaged_steps": AVERAGED_STEPS,
        "averaged_parameters": [
            once("population_averaged", of(AVERAGED_STEPS, s), averaged) for s in chosen
        ],
        "examples_seen": batch_size.EXAMPLES,
        "batch_sizes": {
            str(size): [
                once(
                    "population_sizes",
                    batch_size.settings(WITH, size, seed),
                    small_batches,
                )
                for seed in chosen
            ]
            for size in SIZES
        },
    }
    finish("population", result, chosen, draw)


def steps(config: Config) -> dict[str, Any]:
    """Train; return the accuracies by each kind of statistics on the way."""
    task = Task(config)
    found: dict[str, Any] = {}
    for run in visit(config, [step for step in STEPS if step <= config.steps]):
        for name, value in by_method(task, run.state, config).items():
            found.setdefault(name, []).append(value)
    return found


def small_batches(config: Config) -> dict[str, Any]:
    """Train; return the accuracies by each kind of statistics at the end."""
    (run,) = visit(config, [config.steps])
    return by_method(Task(config), run.state, config)


def by_method(task: Task, state: Any, config: Config) -> dict[str, float]:
    """Return the test accuracy of a state by each kind of statistics."""
    variables = variables_of(state)
    found = {MOVING: variables}
    for name, method in METHODS.items():
        found[name] = with_population(task, variables, method, config)
    return {name: task.accuracy(each) for name, each in found.items()}


def with_population(
    task: Task, variables: dict[str, Any], method: Any, config: Config
) -> dict[str, Any]:
    """Return variables whose statistics are those over `EXAMPLES` training images."""

    def batches() -> Iterator[jax.Array]:
        random = np.random.default_rng(config.seed)
        rows = random.permutation(len(task.train.labels))
        size = config.batch_size
        for start in range(0, min(EXAMPLES, len(rows)) - size + 1, size):
            yield task.images(task.train, rows[start : start + size])

    own = recompute_batch_stats(task.call, variables, batches(), method=method)
    return variables | {"batch_stats": own}


def averaged(config: Config) -> dict[str, Any]:
    """Train; return the accuracies of the averaged parameters on the way."""
    task = Task(config)
    found: dict[str, Any] = {name: [] for name in (NETWORK, STALE, LIKEWISE, OWN)}
    average: Any = None

    @jax.jit
    def moved(average: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, average, new)

    for run in visit(config, list(range(config.steps + 1))):
        now = variables_of(run.state)
        # A copy: the step takes the arrays of the state it is given.
        average = jax.tree.map(jnp.copy, now) if run.step == 0 else moved(average, now)
        if run.step not in AVERAGED_STEPS:
            continue
        stale = average | {"batch_stats": now["batch_stats"]}
        own = with_population(task, average, "pooled", config)
        each = (now, stale, average, own)
        for name, variables in zip(found, each, strict=True):
            found[name].append(task.accuracy(variables))
    return found


def draw(record: dict[str, Any]) -> Figure:
    """Draw the accuracies of the three cases."""
    result = record["result"]
    figure, panels = new_figure(3, height=4.6)
    names = (MOVING, POOLED, PAPER)
    curves(panels[0], result["steps"], result["after_steps"], names)
    panels[0].set(title="after few steps", xlabel="training steps")
    several = (NETWORK, STALE, LIKEWISE, OWN)
    curves(panels[1], result["averaged_steps"], result["averaged_parameters"], several)
    title = f"averaged parameters ({DECAY:g} a step)"
    panels[1].set(title=title, xlabel="training steps")
    by_size = result["batch_sizes"]
    runs = [
        {name: [each[name] for each in sizes] for name in names}
        for sizes in zip(*by_size.values(), strict=True)
    ]
    curves(panels[2], [int(size) for size in by_size], runs, names)
    title = f"after {result['examples_seen']:,} examples"
    panels[2].set(title=title, xlabel="examples in a mini-batch")
    panels[0].set_ylabel("test accuracy (%)")
    figure.suptitle(f"MNIST, the paper's network: {seeds_of(record)}")
    return figure


def curves(
    axes: Axes, places: list[int], runs: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    """Draw the median and range of some runs, a curve a name."""
    for name in names:
        values = [[100 * each for each in run[name]] for run in runs]
        # Where two curves are one, both are seen.
        style = {"marker": "o", "ms": 3, "ls": "--" if name == PAPER else "-"}
        plot_median(axes, places, values, COLORS[name], name, **style)
    axes.set_xscale("log")
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize="small")


if __name__ == "__main__":
    run_command(reproduce)
