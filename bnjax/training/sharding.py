"""How a run is laid out on devices, and whose examples are normalized together."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Sharing:
    """What the BN layers of the model in training are told.

    Args:
        virtual_batch_size: consecutive examples of a device's part that are normalized
            together; None for all of them.
        axis_name: of the devices that share statistics; None where they do not.
        axis_index_groups: groups of those devices; None for one group.
        deferred: the step merges moments of micro-batches or devices, and updates the
            running statistics once.
    """

    virtual_batch_size: int | None = None
    axis_name: str | None = None
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None
    deferred: bool = False


def make_sharing(config: Config, devices: int, axis_name: str | None) -> Sharing:
    """Realize `--bn.sync` and `--bn.virtual-batch-size` on a number of devices.

    Whatever the strategy, a layer normalizes consecutive groups of the (micro-)batch,
    and the running statistics move once a step, towards the moments of all groups.

    Args:
        config: of the run; `devices` times `accumulate` divides its batch.
        devices: how many there are.
        axis_name: of a pmap, whose devices see their own part of the batch; None where
            the program sees the whole batch.

    Raises:
        SettingError: the groups do not divide evenly, or hold one example.

    Example:
        >>> import dataclasses
        >>> from bnjax.training.config import BatchNormConfig
        >>> from bnjax.training.presets import PRESETS
        >>> config = dataclasses.replace(PRESETS["digits"].config, batch_size=64)
        >>> make_sharing(config, 8, "data").axis_name
        'data'
        >>> pairs = BatchNormConfig(sync="group:2")
        >>> config = dataclasses.replace(config, bn=pairs)
        >>> make_sharing(config, 4, "data").axis_index_groups
        ((0, 1), (2, 3))
        >>> make_sharing(config, 4, None).virtual_batch_size
        32
    """
    if not config.batch_norm:
        return Sharing()
    examples = config.batch_size // config.accumulate
    size = _group_size(config, examples, devices)
    accumulating = config.accumulate > 1
    if size == examples:
        return Sharing(axis_name=axis_name, deferred=accumulating)
    if axis_name is None:
        return Sharing(virtual_batch_size=size, deferred=accumulating)
    local = examples // devices
    if size > local:
        together = size // local
        groups = tuple(
            tuple(range(first, first + together))
            for first in range(0, devices, together)
        )
        return Sharing(axis_name=axis_name, axis_index_groups=groups, deferred=True)
    return Sharing(virtual_batch_size=None if size == local else size, deferred=True)


def _group_size(config: Config, examples: int, devices: int) -> int:
    """Return how many examples are normalized together."""
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
    size = examples // devices * together
    if virtual is not None:
        local = examples // devices
        if size % virtual or (virtual % local and local % virtual):
            raise SettingError(
                f"--bn.virtual-batch-size {virtual}: expected a divisor of {size}, the "
                "examples that share statistics, that also divides or is a multiple of "
                f"the {local} on each device.",
            )
        size = virtual
    if size < 2:
        raise SettingError(
            f"--batch-size {config.batch_size}: {size} example is normalized by "
            "itself; batch normalization in training needs at least 2 to take "
            "statistics over. Give a larger batch, or another --bn.sync or "
            "--bn.virtual-batch-size.",
        )
    return size


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


def make_parallel(config: Config, devices: Devices | None = None) -> Spmd:
    """Lay a run out as its configuration says.

    Args:
        config: of the run.
        devices: those to use; all that JAX finds, or `config.devices` of them, if None.

    Raises:
        SettingError: the batch does not divide by the devices, there are too few, or
            statistics are asked for that they cannot have.

    Example:
        >>> from bnjax.training.presets import PRESETS
        >>> parallel = make_parallel(PRESETS["digits"].config, jax.devices()[:1])
        >>> type(parallel).__name__, len(parallel.devices)
        ('Spmd', 1)
    """
    devices = _chosen(config) if devices is None else tuple(devices)
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and (config.parallel == "single" or config.devices is not None):
        raise SettingError(
            f"--parallel single and --devices are for one host, and there are {hosts}: "
            "leave them out.",
        )
    if config.parallel == "single":
        devices = devices[:1]
    if config.parallel == "auto" and config.bn.sync == "global" and hosts == 1:
        devices = _dividing(devices, config)
    parts = len(devices) * config.accumulate
    if config.batch_size % parts:
        raise SettingError(
            f"--batch-size {config.batch_size}: {len(devices)} device(s) and "
            f"--accumulate {config.accumulate} need a multiple of {parts}. Give one, "
            "or fewer --devices, or --parallel single.",
        )
    strategy = config.parallel
    if strategy == "auto":
        # Statistics that no axis name is given to are shared in one program alone.
        several = "pmap" if takes_normalization(config) else "spmd"
        strategy = several if len(devices) > 1 else "single"
    kind = Pmap if strategy == "pmap" else Spmd
    parallel = kind(devices, config.accumulate)
    parallel.sharing(config)
    return parallel


def evaluation_parallel(config: Config) -> Spmd:
    """Return the layout of the run itself, or one device where that is not to be had.

    A matrix product of other shapes may round otherwise: on the machine that trained,
    the loss is then the same to the last digit.
    """
    try:
        return make_parallel(config)
    except SettingError:
        return Spmd(jax.local_devices()[:1])


def _chosen(config: Config) -> Devices:
    found = jax.devices()
    if config.devices is None:
        return tuple(found)
    if config.devices > len(found):
        raise SettingError(
            f"--devices {config.devices}: JAX finds {len(found)} of kind "
            f"{found[0].device_kind!r}; expected at most that many.",
        )
    return tuple(found[: config.devices])


def _dividing(devices: Devices, config: Config) -> Devices:
    """Return as many of the devices as divide the batch; the results are the same."""
    examples = config.batch_size // config.accumulate
    used = max(n for n in range(1, len(devices) + 1) if examples % n == 0)
    if used < len(devices):
        print(
            f"note: {used} of {len(devices)} devices are used: --batch-size "
            f"{config.batch_size} does not divide by more.",
            file=sys.stderr,
        )
    return devices[:used]
