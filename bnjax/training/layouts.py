"""Layouts of a run on devices.

Under each strategy the same `train_step(state, batch)` is scanned over the steps of a
dispatch. `Spmd` jits it over a mesh, with sharded batches, and is what one device uses
too; `Pmap` gives each device a part of the batch and the step an axis name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.training.config import Config
from bnjax.training.sharing import Sharing, make_sharing
from bnjax.training.state import Stream, TrainState, stream_key
from bnjax.training.step import Batch, EvalStep, Metrics, TrainStep

MakeBatch = Callable[[Any, Any, jax.Array], Batch]
Devices = Sequence[Any]
AXIS = "data"


class Spmd:
    """One program for all devices: jit over a mesh, the batch sharded.

    Statistics are those of the global batch by themselves.

    Args:
        devices: of all hosts.
        accumulate: micro-batches in a batch.
    """

    axis_name: str | None = None

    def __init__(self, devices: Devices, accumulate: int = 1) -> None:
        self.devices = tuple(devices)
        self._accumulate = accumulate
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self._replicated = NamedSharding(self._mesh, P())
        self._batches = NamedSharding(self._mesh, P(None, AXIS))

    def sharing(self, config: Config) -> Sharing:
        """Return what the BN layers of the model in training are told."""
        return make_sharing(config, len(self.devices), self.axis_name)

    def for_evaluation(self) -> "Spmd":
        """Return the layout that evaluates: this one."""
        return self

    def place_state(self, state: TrainState) -> TrainState:
        """Put a host's state on the devices."""
        return self.place(state)

    def host_state(self, state: TrainState) -> TrainState:
        """Return what a checkpoint holds and an evaluation reads: one copy."""
        if jax.process_count() == 1:
            return state
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)

    def place(self, constants: Any) -> Any:
        """Put arrays, the same on every host, on every device."""
        if jax.process_count() == 1:
            return jax.device_put(constants, self._replicated)
        return _replicate(constants, self._replicated)

    def place_chunk(self, chunk: Any) -> Any:
        """Give each device its part of a chunk, of shape (steps, local batch, ...).

        Each host gives the part of its own devices.
        """
        if jax.process_count() == 1:
            return jax.device_put(chunk, self._batches)
        join = functools.partial(jax.make_array_from_process_local_data, self._batches)
        return jax.tree.map(join, chunk)

    def chunk_spec(self, spec: Any) -> Any:
        """Return the shapes that `place_chunk` gives to a chunk of these shapes."""
        hosts = jax.process_count()

        def joined(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            steps, batch, *rest = leaf.shape
            shape = (steps, batch * hosts, *rest)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._batches)

        return jax.tree.map(joined, spec)

    def place_rows(self, rows: np.ndarray) -> jax.Array:
        """Shard what `eval_steps` goes through, (steps, batch) on every host."""
        return jax.make_array_from_callback(
            rows.shape, self._batches, lambda index: rows[index]
        )

    def compile(self, steps: Any, state: TrainState, constants: Any, chunk: Any) -> Any:
        """Compile what `train_steps` gave for placed arguments or their shapes."""
        return steps.lower(state, constants, chunk).compile()

    def train_steps(self, train_step: TrainStep, batch: MakeBatch) -> Any:
        """Return a jitted function that takes one step for each item of a chunk.

        Args:
            train_step: one step, made with this object's `axis_name`.
            batch: makes a batch of the feed's constants, an item and the step's key.

        Returns:
            `train_steps(state, constants, chunk) -> (state, metrics)` of what the
            methods above placed. The state given is donated: its buffers are those of
            the state returned. Each metric has shape (steps,).
        """
        sharded = NamedSharding(self._mesh, P(AXIS))

        def sharded_batch(constants: Any, item: Any, key: jax.Array) -> Batch:
            made = batch(constants, item, key)
            return jax.lax.with_sharding_constraint(made, sharded)

        return jax.jit(
            _scan(train_step, sharded_batch),
            donate_argnums=0,
            out_shardings=self._replicated,
        )

    def eval_steps(self, eval_step: EvalStep, batch: MakeBatch) -> Any:
        """Return a jitted function that evaluates each item of a chunk.

        Args:
            eval_step: scores one batch.
            batch: makes a batch, as in `train_steps`; its key is a constant.

        Returns:
            `eval_steps(params, batch_stats, constants, chunk) -> metrics`, each metric
            of shape (steps, batch), on every device.
        """

        def eval_steps(
            params: Any, batch_stats: Any, constants: Any, chunk: Any
        ) -> Metrics:
            step = functools.partial(eval_step, params, batch_stats)
            key = jax.random.key(0)
            return jax.lax.map(lambda item: step(batch(constants, item, key)), chunk)

        return jax.jit(eval_steps, out_shardings=self._replicated)


class Pmap(Spmd):
    """The step on every device, each with its part of the batch; evaluates as `Spmd`.

    The state is stacked, one copy a device, and all copies are equal. Each host holds
    the stack of its own devices.

    Args:
        devices: of all hosts.
        accumulate: micro-batches in a batch.
    """

    axis_name = AXIS

    def __init__(self, devices: Devices, accumulate: int = 1) -> None:
        super().__init__(devices, accumulate)
        host = jax.process_index()
        self._local = [d for d in self.devices if d.process_index == host]
        mesh = Mesh(np.array(self._local), (AXIS,))
        self._stacked = NamedSharding(mesh, P(AXIS))
        self._on_each = NamedSharding(mesh, P())

    def for_evaluation(self) -> Spmd:
        """Return the layout that evaluates, on the same devices."""
        return Spmd(self.devices)

    def place_state(self, state: TrainState) -> TrainState:
        """Stack one copy for each device."""

        def stacked(leaf: jax.Array) -> jax.Array:
            copies = jnp.broadcast_to(leaf, (len(self._local), *leaf.shape))
            return jax.device_put(copies, self._stacked)

        return jax.tree.map(stacked, state)

    def host_state(self, state: TrainState) -> TrainState:
        """Return the first device's copy."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], state)

    def place(self, constants: Any) -> Any:
        """Put arrays on every device of this host."""
        return jax.device_put(constants, self._on_each)

    def place_chunk(self, chunk: Any) -> Any:
        """Give each device its part of every micro-batch, stacked by device."""
        return jax.device_put(jax.tree.map(self._by_device, chunk), self._stacked)

    def chunk_spec(self, spec: Any) -> Any:
        """Return the shapes that `place_chunk` gives to a chunk of these shapes."""
        count = len(self._local)

        def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            steps, batch, *rest = leaf.shape
            shape = (count, steps, batch // count, *rest)
            return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self._stacked)

        return jax.tree.map(stacked, spec)

    def compile(self, steps: Any, state: TrainState, constants: Any, chunk: Any) -> Any:
        """Compile as `Spmd` does, on one host; on several, at the first call."""
        # What pmap compiles ahead of time takes arrays of all hosts, not of this one.
        if jax.process_count() > 1:
            return steps
        return super().compile(steps, state, constants, chunk)

    def train_steps(self, train_step: TrainStep, batch: MakeBatch) -> Any:
        """Return the pmapped function; see `Spmd.train_steps`."""
        return jax.pmap(
            _scan(train_step, batch),
            axis_name=AXIS,
            in_axes=(0, None, 0),
            out_axes=(0, None),
            donate_argnums=0,
            devices=self.devices,
        )

    def _by_device(self, leaf: np.ndarray) -> np.ndarray:
        """Cut (steps, batch, ...) into (devices, steps, batch / devices, ...).

        Micro-batches come first in the batch, so that each holds the same examples on
        any number of devices.
        """
        steps, batch, *rest = leaf.shape
        count = len(self._local)
        parts = leaf.reshape(steps, self._accumulate, count, -1, *rest)
        return np.moveaxis(parts, 2, 0).reshape(count, steps, batch // count, *rest)


def _scan(train_step: TrainStep, batch: MakeBatch) -> Callable[..., Any]:
    """Return the function that takes one step for each item of a chunk."""

    def train_steps(
        state: TrainState, constants: Any, chunk: Any
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, item: Any) -> tuple[TrainState, Metrics]:
            key = stream_key(state.rng, Stream.AUGMENT, state.step)
            return train_step(state, batch(constants, item, key))

        # Not a loop of one: see `slow_in_loops`.
        if jax.tree.leaves(chunk)[0].shape[0] == 1:
            item = jax.tree.map(lambda leaf: leaf[0], chunk)
            state, metrics = body(state, item)
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return jax.lax.scan(body, state, chunk)

    return train_steps


def _replicate(tree: Any, sharding: NamedSharding) -> Any:
    """Put arrays that every host has onto the devices of all hosts."""

    def is_key(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def unpack(raw: Any) -> Any:
        return jax.tree.map(
            lambda leaf, like: (
                jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))
                if is_key(like)
                else leaf
            ),
            raw,
            tree,
        )

    # Only NumPy arrays may go where other hosts' devices are.
    raw = jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf),
        tree,
    )
    return jax.jit(unpack, out_shardings=sharding)(raw)
