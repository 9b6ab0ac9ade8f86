"""How a run is laid out on devices: the one place that chooses."""

import sys

import jax

from bnjax.training.config import Config
from bnjax.training.errors import USAGE, UserError
from bnjax.training.layouts import Devices, Pmap, Spmd
from bnjax.training.networks import takes_normalization


def make_parallel(config: Config, devices: Devices | None = None) -> Spmd:
    """Lay a run out as its configuration says.

    Args:
        config: of the run.
        devices: those to use; all that JAX finds, or `config.devices` of them, if None.

    Raises:
        UserError: the batch does not divide by the devices, there are too few, or
            statistics are asked for that they cannot have.

    Example:
        >>> from bnjax.training.presets import digits
        >>> parallel = make_parallel(digits(), jax.devices()[:1])
        >>> type(parallel).__name__, len(parallel.devices)
        ('Spmd', 1)
    """
    devices = _chosen(config) if devices is None else tuple(devices)
    hosts = len({device.process_index for device in devices})
    if hosts > 1 and (config.parallel == "single" or config.devices is not None):
        raise UserError(
            f"--parallel single and --devices are for one host, and there are {hosts}: "
            "leave them out.",
            USAGE,
        )
    if config.parallel == "single":
        devices = devices[:1]
    if config.parallel == "auto" and config.bn.sync == "global" and hosts == 1:
        devices = _dividing(devices, config)
    parts = len(devices) * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size}: {len(devices)} device(s) and "
            f"--accumulate {config.accumulate} need a multiple of {parts}. Give one, "
            "or fewer --devices, or --parallel single.",
            USAGE,
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
    except UserError:
        return Spmd(jax.local_devices()[:1])


def _chosen(config: Config) -> Devices:
    found = jax.devices()
    if config.devices is None:
        return tuple(found)
    if config.devices > len(found):
        raise UserError(
            f"--devices {config.devices}: JAX finds {len(found)} of kind "
            f"{found[0].device_kind!r}; expected at most that many.",
            USAGE,
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
