"""Where population statistics are better than moving averages, and where they are not.

    python -m experiments.population

Test accuracy on MNIST of the network of the `mnist` preset, normalized by the moving
averages of training and by the statistics of `bnjax.population.recompute_batch_stats`
over 6,000 training examples:

- after 10 to 500 steps, the moving averages having a momentum of 0.99;
- for an exponential moving average of the parameters (0.99 a step), with the moving
  averages of the network it is the average of, with those averaged likewise, and with
  statistics of its own;
- trained and estimated with mini-batches of 4 to 256, all runs as in
  `experiments.batch_size`.

Writes experiments/results/population.json and docs/figures/population.png. About four
minutes on one CPU core; started again, it trains only what is not in runs/experiments.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from matplotlib.axes import Axes

from benchmarks.report import ROOT, write_result
from bnjax.cli import run_reporting
from bnjax.data.sources import Arrays, open_data
from bnjax.population import recompute_batch_stats
from bnjax.training.config import Config
from bnjax.training.presets import PRESETS
from bnjax.training.program import build
from experiments import batch_size
from experiments.figures import WITH, new_figure, plot_median, save
from experiments.runs import once, rounded, visit

RESULT = ROOT / "experiments" / "results" / "population.json"
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


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Gives the statistics and the test accuracy of a network.

    Args:
        train: training examples.
        gather: gives the inputs of some rows of them.
        accuracy: test accuracy, a function of params and batch_stats.
        call: of a training step, for `recompute_batch_stats`.
    """

    train: Arrays
    gather: Callable[[Arrays, Any], Any]
    accuracy: Callable[[Any, Any], float]
    call: Callable[[Any, Any], Any]

    @classmethod
    def of(cls, config: Config) -> "Scorer":
        """Load the data of a run and build its network."""
        source = open_data(config.data, config.data_dir)
        program = build(config, source)
        train, test = (
            jax.device_put(source.load(name, lambda *_: None))
            for name in ("train", "test")
        )

        @jax.jit
        def correct(params: Any, batch_stats: Any, test: Arrays) -> jax.Array:
            batch = program.gather(test, jnp.arange(len(test.labels)))
            variables = {"params": params, "batch_stats": batch_stats}
            logits = program.model.apply(variables, batch["image"], train=False)
            return jnp.mean(jnp.argmax(logits, axis=-1) == batch["label"])

        def call(variables: Any, images: jax.Array) -> Any:
            return program.model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )

        return cls(
            train,
            jax.jit(program.gather),
            lambda params, stats: rounded(float(correct(params, stats, test))),
            call,
        )

    def images(self, size: int, seed: int) -> Iterator[jax.Array]:
        """Yield batches of training images, `EXAMPLES` in all."""
        rows = np.random.default_rng(seed).permutation(len(self.train.labels))
        for start in range(0, min(EXAMPLES, len(rows)) - size + 1, size):
            yield self.gather(self.train, rows[start : start + size])["image"]

    def population(
        self, params: Any, stats: Any, method: Any, size: int, seed: int
    ) -> Any:
        """Return the statistics over batches of a size."""
        variables = {"params": params, "batch_stats": stats}
        batches = self.images(size, seed)
        return recompute_batch_stats(self.call, variables, batches, method=method)


def reproduce(seeds: int = 3, data_dir: Path | None = None) -> None:
    """Train, measure, write and draw.

    Args:
        seeds: How many runs of each.
        data_dir: Where TensorFlow Datasets are prepared.
    """
    short = dataclasses.replace(
        PRESETS["mnist"].config, data_dir=data_dir, steps=STEPS[-1]
    )
    long = dataclasses.replace(short, steps=AVERAGED_STEPS[-1])
    chosen = range(seeds)

    def of(config: Config, seed: int) -> Config:
        return dataclasses.replace(config, seed=seed)

    result: dict[str, Any] = {
        "steps": STEPS,
        "after_steps": [once("population_steps", of(short, s), steps) for s in chosen],
        "averaged_steps": AVERAGED_STEPS,
        "averaged_parameters": [
            once("population_averaged", of(long, s), averaged) for s in chosen
        ],
        "examples_seen": batch_size.EXAMPLES,
        "batch_sizes": {
            str(size): [
                once(
                    "population_sizes",
                    batch_size.settings(WITH, size, seed, data_dir),
                    small_batches,
                )
                for seed in chosen
            ]
            for size in SIZES
        },
    }
    command = " ".join(["python -m experiments.population", *sys.argv[1:]])
    write_result(RESULT, command, list(chosen), result)
    print(f"{RESULT}\n{draw(result)}")


def steps(config: Config) -> dict[str, Any]:
    """Train; return the accuracies by each kind of statistics on the way."""
    scorer = Scorer.of(config)
    found: dict[str, Any] = {}
    for run in visit(config, [step for step in STEPS if step <= config.steps]):
        for name, value in by_method(scorer, run.state, config).items():
            found.setdefault(name, []).append(value)
    return found


def small_batches(config: Config) -> dict[str, Any]:
    """Train; return the accuracies by each kind of statistics at the end."""
    (run,) = visit(config, [config.steps])
    return by_method(Scorer.of(config), run.state, config)


def by_method(scorer: Scorer, state: Any, config: Config) -> dict[str, float]:
    """Return the test accuracy of a state by each kind of statistics."""
    params, stats = state.params, state.batch_stats
    own = {
        name: scorer.population(params, stats, method, config.batch_size, config.seed)
        for name, method in METHODS.items()
    }
    return {
        name: scorer.accuracy(params, each)
        for name, each in {MOVING: stats, **own}.items()
    }


def averaged(config: Config) -> dict[str, Any]:
    """Train; return the accuracies of the averaged parameters on the way."""
    scorer = Scorer.of(config)
    found: dict[str, Any] = {name: [] for name in (NETWORK, STALE, LIKEWISE, OWN)}
    average: Any = None

    @jax.jit
    def moved(average: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: DECAY * a + (1 - DECAY) * b, average, new)

    for run in visit(config, list(range(config.steps + 1))):
        now = run.state.params, run.state.batch_stats
        # A copy: the step takes the arrays of the state it is given.
        average = jax.tree.map(jnp.copy, now) if run.step == 0 else moved(average, now)
        if run.step not in AVERAGED_STEPS:
            continue
        params, stats = average
        seed, size = config.seed, config.batch_size
        own = scorer.population(params, stats, "pooled", size, seed)
        pairs = (now, (params, now[1]), average, (params, own))
        for name, pair in zip(found, pairs, strict=True):
            found[name].append(scorer.accuracy(*pair))
    return found


def draw(result: dict[str, Any]) -> Path:
    """Draw the accuracies of the three cases."""
    figure, panels = new_figure(3)
    names = (MOVING, PAPER, POOLED)
    curves(panels[0], result["steps"], result["after_steps"], names)
    panels[0].set(title="after few steps", xlabel="training steps")
    names = (NETWORK, STALE, LIKEWISE, OWN)
    curves(panels[1], result["averaged_steps"], result["averaged_parameters"], names)
    panels[1].set(
        title=f"averaged parameters ({DECAY:g} a step)", xlabel="training steps"
    )
    sizes = [int(size) for size in result["batch_sizes"]]
    by_size = list(result["batch_sizes"].values())
    runs = [
        {
            name: [each[i][name] for each in by_size]
            for name in COLORS
            if name in by_size[0][i]
        }
        for i in range(len(by_size[0]))
    ]
    curves(panels[2], sizes, runs, (MOVING, PAPER, POOLED))
    panels[2].set(
        title=f"after {result['examples_seen']:,} examples",
        xlabel="examples in a mini-batch",
    )
    panels[0].set_ylabel("test accuracy (%)")
    return save(figure, "population")


def curves(
    axes: Axes, places: list[int], runs: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    """Draw the median and range of some runs, a curve a name."""
    for name in names:
        values = [[100 * each for each in run[name]] for run in runs]
        median = plot_median(axes, places, values, COLORS[name], name)
        axes.plot(places, median, "o", ms=3, color=COLORS[name])
    axes.set_xscale("log")
    axes.set_xticks(places, [str(place) for place in places])
    axes.minorticks_off()
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        fontsize="small",
        title=f"median and range, seeds: {len(runs)}",
    )


if __name__ == "__main__":
    sys.exit(run_reporting(lambda: tyro.cli(reproduce)))
