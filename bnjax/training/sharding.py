"""The layout of a run on devices, and which examples are normalized together."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.data.config import SettingError
from bnjax.training.config import Config
from bnjax.training.network import takes_normalization
from bnjax.training.step import (
    Batch,
    EvalStep,
    Metrics,
    Stream,
    TrainState,
    TrainStep,
    stream_key,
)

MakeBatch = Callable[[Any, Any, jax.Array], Batch]
Devices = Sequence[Any]
AXIS = "data"


class Spmd:
    """One program for all devices: jit over a mesh, with a sharded batch.

    The statistics are then those of the global batch. The devices are those of all
    hosts; `accumulate` is the number of micro-batches in a batch.
    """

    axis_name: str | None = None

    def __init__(self, devices: Devices, accumulate: int = 1) -> None:
        self.devices = tuple(devices)
        self._accumulate = accumulate
        self._mesh = Mesh(np.array(self.devices), (AXIS,))
        self._replicated = NamedSharding(self._mesh, P())
        self._chunks = NamedSharding(self._mesh, P(None, AXIS))

    def sharing(self, config: Config) -> dict[str, Any]:
        """Return the options of the model's BN layers in training.

        These options of `bnjax.models.Normalization` implement `--bn.sync` and
        `--bn.virtual-batch-size` on these devices. With every strategy, a layer
        normalizes consecutive groups of the (micro-)batch, and the running statistics
        are updated once a step with the moments of all groups.
        """
        if not config.batch_norm:
            return {}
        devices = len(self.devices)
        examples = config.batch_size // config.accumulate
        size = _group_size(config, examples, devices)
        # The step merges moments of micro-batches or devices.
        deferred = {"deferred": True} if config.accumulate > 1 else {}
        if size == examples:
            axis = {"axis_name": self.axis_name} if self.axis_name else {}
            return axis | deferred
        if self.axis_name is None:
            return {"virtual_batch_size": size} | deferred
        deferred = {"deferred": True}
        local = examples // devices
        if size <= local:
            return ({"virtual_batch_size": size} if size < local else {}) | deferred
        together = size // local
        groups = tuple(
            tuple(range(first, first + together))
            for first in range(0, devices, together)
        )
        return {"axis_name": self.axis_name, "axis_index_groups": groups} | deferred

    def for_evaluation(self) -> "Spmd":
        """Return the layout for evaluation."""
        return self

    def round_up(self, size: int) -> int:
        """Return the next multiple of the devices."""
        return -(-size // len(self.devices)) * len(self.devices)

    def place_state(self, state: TrainState) -> TrainState:
        """Put a host's state on the devices."""
        return self.place(state)

    def host_state(self, state: TrainState) -> TrainState:
        """Return one copy of the state, for checkpoints and evaluations."""
        if jax.process_count() == 1:
            return state
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), state)

    def place(self, constants: Any) -> Any:
        """Put arrays that are equal on every host on every device."""
        if jax.process_count() == 1:
            return jax.device_put(constants, self._replicated)
        return _replicate(constants, self._replicated)

    def place_chunk(self, chunk: Any) -> Any:
        """Give each device its part of a chunk, of shape (steps, local batch, ...).

        Each host has the part of its own devices.
        """
        if jax.process_count() == 1:
            return jax.device_put(chunk, self._chunks)
        join = functools.partial(jax.make_array_from_process_local_data, self._chunks)
        return jax.tree.map(join, chunk)

    def chunk_spec(self, spec: Any) -> Any:
        """Return the shapes of `place_chunk` for a chunk of these shapes."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                self._chunk_shape(*leaf.shape), leaf.dtype, sharding=self._chunks
            ),
            spec,
        )

    def _chunk_shape(self, steps: int, batch: int, *rest: int) -> tuple[int, ...]:
        return (steps, batch * jax.process_count(), *rest)

    def place_rows(self, rows: np.ndarray) -> jax.Array:
        """Shard the rows for `eval_steps`, shape (steps, batch) on every host."""
        sharding = NamedSharding(self._mesh, P(None, AXIS))
        return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)

    def compile(self, steps: Any, state: TrainState, constants: Any, chunk: Any) -> Any:
        """Compile a result of `train_steps` for placed arguments or their shapes."""
        return steps.lower(state, constants, chunk).compile()

    def train_steps(self, train_step: TrainStep, batch: MakeBatch) -> Any:
        """Return a jitted function that takes one step for each item of a chunk.

        The function is `train_steps(state, constants, chunk) -> (state, metrics)`, with
        arguments that the methods above placed. It donates the state: the new state
        reuses its buffers. Each metric has shape (steps,).

        Args:
            train_step: a step with this object's `axis_name`.
            batch: a function that makes a batch of the feed's constants, an item of a
                chunk and the key of the step.

        Returns:
            The jitted function.
        """
        sharded = NamedSharding(self._mesh, P(AXIS))

        def sharded_batch(*args: Any) -> Batch:
            return jax.lax.with_sharding_constraint(batch(*args), sharded)

        return jax.jit(
            _scan(train_step, sharded_batch),
            donate_argnums=0,
            out_shardings=self._replicated,
        )

    def eval_steps(self, eval_step: EvalStep, batch: MakeBatch) -> Any:
        """Return a jitted function that evaluates each item of a chunk.

        The function is `eval_steps(params, batch_stats, constants, chunk) -> metrics`.
        Each metric has shape (steps, batch), on every device. The key for `batch` is a
        constant.
        """

        def eval_steps(
            params: Any, batch_stats: Any, constants: Any, chunk: Any
        ) -> Metrics:
            step = functools.partial(eval_step, params, batch_stats)
            key = jax.random.key(0)
            return jax.lax.map(lambda item: step(batch(constants, item, key)), chunk)

        return jax.jit(eval_steps, out_shardings=self._replicated)


class Pmap(Spmd):
    """The step runs on every device with its part of the batch; evaluation is `Spmd`'s.

    The state is stacked, with one copy for each device, and all copies are equal. Each
    host holds the stack of its own devices.
    """

    axis_name = AXIS

    def __init__(self, devices: Devices, accumulate: int = 1) -> None:
        super().__init__(devices, accumulate)
        host = jax.process_index()
        local = [d for d in self.devices if d.process_index == host]
        self._count = len(local)
        mesh = Mesh(np.array(local), (AXIS,))
        self._chunks = NamedSharding(mesh, P(AXIS))
        self._on_each = NamedSharding(mesh, P())

    def for_evaluation(self) -> Spmd:
        """Return the layout for evaluation on the same devices."""
        return Spmd(self.devices)

    def place_state(self, state: TrainState) -> TrainState:
        """Stack one copy for each device."""

        def stacked(leaf: jax.Array) -> jax.Array:
            copies = jnp.broadcast_to(leaf, (self._count, *leaf.shape))
            return jax.device_put(copies, self._chunks)

        return jax.tree.map(stacked, state)

    def host_state(self, state: TrainState) -> TrainState:
        """Return the first device's copy."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0)[0], state)

    def place(self, constants: Any) -> Any:
        """Put arrays on every device of this host."""
        return jax.device_put(constants, self._on_each)

    def place_chunk(self, chunk: Any) -> Any:
        """Give each device its part of every micro-batch, stacked by device.

        The batch is split into micro-batches first, so that each micro-batch has the
        same examples on any number of devices.
        """

        def by_device(leaf: np.ndarray) -> np.ndarray:
            steps, _, *rest = leaf.shape
            parts = leaf.reshape(steps, self._accumulate, self._count, -1, *rest)
            return np.moveaxis(parts, 2, 0).reshape(self._chunk_shape(*leaf.shape))

        return jax.device_put(jax.tree.map(by_device, chunk), self._chunks)

    def _chunk_shape(self, steps: int, batch: int, *rest: int) -> tuple[int, ...]:
        return (self._count, steps, batch // self._count, *rest)

    def compile(self, steps: Any, state: TrainState, constants: Any, chunk: Any) -> Any:
        """Compile as `Spmd` does on one host; on several hosts, at the first call."""
        # A pmap compiled ahead of time takes arrays of all hosts, not of one host.
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


def _group_size(config: Config, examples: int, devices: int) -> int:
    """Return the number of examples that are normalized together."""
    sync, virtual = config.bn.sync, config.bn.virtual_batch_size
    together = devices
    if sync == "per-device":
        together = 1
    elif sync.startswith("group:"):
        together = int(sync.removeprefix("group:"))
        if devices % together:
            raise SettingError(
                f"--bn.sync {sync}: expected a divisor of the {devices} device(s).",
            )
    local = examples // devices
    size = local * together
    if virtual is not None:
        if size % virtual or (virtual % local and local % virtual):
            raise SettingError(
                f"--bn.virtual-batch-size {virtual}: expected a divisor of the {size} "
                "examples that share statistics, which also divides or is a multiple "
                f"of the {local} examples on each device.",
            )
        size = virtual
    if size < 2:
        raise SettingError(
            f"--batch-size {config.batch_size}: {size} example is normalized by "
            "itself; the statistics of batch normalization need at least 2 examples "
            "in training. Give a larger batch, or another --bn.sync or "
            "--bn.virtual-batch-size.",
        )
    return size


def _scan(train_step: TrainStep, batch: MakeBatch) -> Callable[..., Any]:
    """Return a function that takes one step for each item of a chunk."""

    def train_steps(
        state: TrainState, constants: Any, chunk: Any
    ) -> tuple[TrainState, Metrics]:
        def body(state: TrainState, item: Any) -> tuple[TrainState, Metrics]:
            key = stream_key(state.rng, Stream.AUGMENT, state.step)
            return train_step(state, batch(constants, item, key))

        # Avoid a loop of one step; see `slow_in_loops`.
        if jax.tree.leaves(chunk)[0].shape[0] == 1:
            state, metrics = body(state, jax.tree.map(lambda leaf: leaf[0], chunk))
            return state, jax.tree.map(lambda leaf: leaf[None], metrics)
        return jax.lax.scan(body, state, chunk)

    return train_steps


def _replicate(tree: Any, sharding: NamedSharding) -> Any:
    """Put arrays that are equal on every host on the devices of all hosts."""

    def is_key(leaf: Any) -> bool:
        return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)

    def unpack(leaf: Any, like: Any) -> Any:
        if not is_key(like):
            return leaf
        return jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(like))

    # Only NumPy arrays can be put on devices of other hosts.
    raw = jax.tree.map(
        lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf),
        tree,
    )
    unpack_all = jax.jit(
        lambda raw: jax.tree.map(unpack, raw, tree), out_shardings=sharding
    )
    return unpack_all(raw)


def make_parallel(config: Config, devices: Devices | None = None) -> Spmd:
    """Return the layout of a run according to its configuration.

    If `devices` is None, the devices are all that JAX finds, or the first
    `config.devices` of them.
    """
    if devices is None:
        devices = jax.devices()
        if config.devices is not None and config.devices > len(devices):
            raise SettingError(
                f"--devices {config.devices}: JAX finds {len(devices)} of kind "
                f"{devices[0].device_kind!r}; expected at most that many.",
            )
        devices = devices[: config.devices]
    strategy = config.parallel
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and (strategy == "single" or config.devices is not None):
        raise SettingError(
            f"--parallel single and --devices are for one host, but there are {hosts} "
            "hosts. Omit the flags.",
        )
    if strategy == "single":
        devices = devices[:1]
    if strategy == "auto" and config.bn.sync == "global" and hosts == 1:
        # Use a number of devices that divides the batch; it does not change results.
        examples = config.batch_size // config.accumulate
        used = max(n for n in range(1, len(devices) + 1) if examples % n == 0)
        if used < len(devices):
            print(
                f"note: {used} of {len(devices)} devices are used: --batch-size "
                f"{config.batch_size} is not divisible by more.",
                file=sys.stderr,
            )
        devices = devices[:used]
    parts = len(devices) * config.accumulate
    if config.batch_size % parts:
        raise SettingError(
            f"--batch-size {config.batch_size}: {len(devices)} device(s) and "
            f"--accumulate {config.accumulate} need a multiple of {parts}. Give such a "
            "batch size, or fewer --devices, or --parallel single.",
        )
    if strategy == "auto" and len(devices) > 1:
        # Without an axis name, devices share statistics only in one program.
        strategy = "pmap" if takes_normalization(config) else "spmd"
    kind = Pmap if strategy == "pmap" else Spmd
    parallel = kind(devices, config.accumulate)
    parallel.sharing(config)
    return parallel


def evaluation_parallel(config: Config) -> Spmd:
    """Return the layout of the run, or one device if that layout is not available.

    A matrix product of other shapes may round differently. With the layout of the run,
    on the same machine, the loss is equal to the last digit.
    """
    try:
        return make_parallel(config)
    except SettingError:
        return Spmd(jax.local_devices()[:1])
