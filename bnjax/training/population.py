"""What a run is evaluated with: population statistics, and averaged parameters.

Algorithm 2 takes the statistics of the network for inference over training batches,
after training. A run evaluates moving averages of them, which costs nothing, except
where its parameters are an average that no batch has gone through.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from bnjax.data.pipeline import Feed
from bnjax.data.resident import Report
from bnjax.population import Layers, Method, recompute_batch_stats
from bnjax.training.average import AveragedState, average_of
from bnjax.training.build import Program
from bnjax.training.config import Config
from bnjax.training.errors import USAGE, UserError
from bnjax.training.layouts import Spmd
from bnjax.training.state import Stream, TrainState, stream_key
from bnjax.training.step import Batch


class Population:
    """Estimates the statistics of a run's states over its first training batches.

    The batches are those of steps 0, 1, ..., augmented as in training and each whole:
    every host, and whoever evaluates the run later, finds the same statistics.

    Args:
        config: of the run.
        program: the run's.
        feed: of whole batches, whichever step they are asked of.
        parallel: where the statistics are computed.
        constants: the feed's, where they are on the devices already.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        feed: Feed,
        parallel: Spmd,
        constants: Any = None,
    ) -> None:
        self._config = config
        self._feed = feed
        self._parallel = parallel.for_evaluation()
        if constants is None:
            constants = self._parallel.place(feed.constants)
        self._constants = constants
        self._to_batch = jax.jit(feed.batch)

        def apply(variables: Any, batch: Batch) -> Any:
            return program.model.apply(
                variables,
                batch["image"],
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": batch["noise"]},
            )

        self._apply = apply

    def evaluated(self, state: TrainState) -> TrainState:
        """Return the state that the run is evaluated with.

        With `--ema`, that of the averaged parameters, whose statistics have to be taken
        again unless they are frozen; else the state itself.
        """
        state = averaged(self._config, state)
        if self._config.ema is None or self._config.init_stats == "freeze":
            return state
        return self.estimated(state)

    def estimated(
        self,
        state: TrainState,
        batches: int | None = None,
        *,
        method: Method = "paper",
        layers: Layers = None,
        report: Report = lambda done, total: None,  # noqa: ARG005
    ) -> TrainState:
        """Return the state with statistics over some training batches.

        Args:
            state: one copy; its parameters stay.
            batches: how many; those of `--batch-stats-from` if None.
            method: see `bnjax.population.recompute_batch_stats`.
            layers: likewise.
            report: called with the examples done and all of them.

        Raises:
            UserError: the statistics are frozen, are none, or cannot be had.
        """
        if not state.batch_stats:
            return state
        if self._config.init_stats == "freeze":
            raise UserError(
                "--batch-stats-from: the run was trained with --init-stats freeze, and "
                "its layers have no statistics but those they are given. Leave it out.",
                USAGE,
            )
        count = self._config.batch_stats_from if batches is None else batches
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        try:
            batch_stats = recompute_batch_stats(
                self._apply,
                self._parallel.place(variables),
                self._batches(self._parallel.place(state.rng), count, report),
                method=method,
                layers=layers,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        return dataclasses.replace(state, batch_stats=batch_stats)

    def close(self) -> None:
        """End what reads the data."""
        self._feed.close()

    def _batches(self, rng: jax.Array, count: int, report: Report) -> Iterator[Batch]:
        for step in range(count):
            item = jax.tree.map(lambda leaf: leaf[0], self._feed.chunk(step, 1))
            key = stream_key(rng, Stream.AUGMENT, step)
            batch = self._to_batch(self._constants, self._parallel.place(item), key)
            yield batch | {"noise": stream_key(rng, Stream.NOISE, step)}
            size = self._config.batch_size
            report((step + 1) * size, count * size)


def averaged(config: Config, state: TrainState) -> TrainState:
    """Return the state with `--ema`'s average in place of its parameters."""
    if config.ema is None or not isinstance(state.opt_state, AveragedState):
        return state
    return dataclasses.replace(state, params=average_of(state.opt_state, config.ema))
