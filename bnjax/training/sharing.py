"""Which examples a BN layer takes its statistics over, under every strategy."""

import dataclasses

from bnjax.training.config import Config
from bnjax.training.errors import USAGE, UserError


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
        UserError: the groups do not divide evenly, or hold one example.

    Example:
        >>> import dataclasses
        >>> from bnjax.training.config import BatchNormConfig
        >>> from bnjax.training.presets import digits
        >>> config = dataclasses.replace(digits(), batch_size=64)
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
            raise UserError(
                f"--bn.sync {sync}: expected a divisor of the {devices} device(s).",
                USAGE,
            )
    size = examples // devices * together
    if virtual is not None:
        local = examples // devices
        if size % virtual or (virtual % local and local % virtual):
            raise UserError(
                f"--bn.virtual-batch-size {virtual}: expected a divisor of {size}, the "
                "examples that share statistics, that also divides or is a multiple of "
                f"the {local} on each device.",
                USAGE,
            )
        size = virtual
    if size < 2:
        raise UserError(
            f"--batch-size {config.batch_size}: {size} example is normalized by "
            "itself; batch normalization in training needs at least 2 to take "
            "statistics over. Give a larger batch, or another --bn.sync or "
            "--bn.virtual-batch-size.",
            USAGE,
        )
    return size
