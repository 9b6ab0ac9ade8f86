"""Several hosts train one run: they connect, check their settings, and end together."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

import bnjax
from bnjax._validate import first_line
from bnjax.data.config import SettingError
from bnjax.training.config import (
    Config,
    HostsConfig,
    RunError,
    as_flag,
    result_config,
)

HEARTBEAT_SECONDS = 30
LAST_WORDS_SECONDS = 2
SHARED = ("parallel", "devices", "on_nan", "resume")
"""Fields of `Config` that must be equal on all hosts but do not affect results."""


def join_hosts(hosts: HostsConfig) -> None:
    """Connect this process with the processes of the other hosts, first of all."""
    if hosts.coordinator is None:
        return
    automatic = hosts.coordinator == "auto"
    place = () if automatic else (hosts.coordinator, hosts.count, hosts.index)
    if not automatic and hosts.index == 0:
        # JAX 0.10 ends with a segmentation fault if the port is in use.
        port = int(hosts.coordinator.rpartition(":")[2])
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                raise RunError(
                    f"--hosts.coordinator {hosts.coordinator}: port {port} cannot be "
                    f"used on this host: {error.strerror}. Give another port on every "
                    "host."
                ) from error
    # After its own timeout, JAX ends the process with a stack of C++ frames. Therefore
    # its timeout is longer, and it waits in a thread that is then abandoned.
    waiting = ThreadPool(1).apply_async(
        jax.distributed.initialize,
        place,
        {
            "initialization_timeout": 10 * hosts.timeout,
            "heartbeat_timeout_seconds": HEARTBEAT_SECONDS,
            "shutdown_timeout_seconds": HEARTBEAT_SECONDS,
        },
    )
    try:
        waiting.get(hosts.timeout)
    except multiprocessing.TimeoutError:
        who = "host 0 was not reached, or another host did not connect,"
        if hosts.index == 0:
            who = f"not all of the --hosts.count {hosts.count} hosts connected"
        raise RunError(
            f"--hosts.coordinator {hosts.coordinator}: {who} within {hosts.timeout} s. "
            "Start the same command on every host, each with its own --hosts.index; "
            "--hosts.timeout waits longer."
        ) from None
    except ValueError as error:
        if not automatic:
            raise
        raise SettingError(
            "--hosts.coordinator auto: JAX finds no cluster here; expected the "
            "environment variables of Slurm, Open MPI or Cloud TPU. Give "
            "ADDRESS:PORT of host 0, --hosts.count and --hosts.index.",
        ) from error


def settings(preset: str, config: Config) -> dict[str, Any]:
    """Return the settings that must be equal on all hosts, by their flags."""
    values = flatten_dict(result_config(config), sep=".")
    values |= {name: getattr(config, name) for name in SHARED}
    flags = {as_flag(name): value for name, value in values.items()}
    versions = {"bnjax": bnjax.__version__, "jax": jax.__version__}
    return {"the preset": preset, **versions, **flags}


def check_hosts_agree(values: Mapping[str, Any]) -> None:
    """Refuse to continue if hosts have different values; every host must call this.

    `values` are JSON values by their names in the message.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values).encode()
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.frombuffer(text.ljust(size), np.uint8)
    first, *others = (
        json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)
    )
    found = [
        f"{name}: host 0 has {first.get(name)}, host {index} has {other.get(name)}"
        for index, other in enumerate(others, start=1)
        for name in first | other
        if first.get(name) != other.get(name)
    ]
    if found:
        raise SettingError(
            f"the hosts differ: {'; '.join(found)}. Start the same command of the same "
            "version on every host, each with its own --hosts.index."
        )


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Let each of several hosts report its error before JAX ends it."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise
        if jax.process_index() == 0:
            # JAX ends the other hosts as soon as host 0 has ended.
            time.sleep(LAST_WORDS_SECONDS)
        if isinstance(error, ValueError):
            raise
        raise RunError(
            "a computation with the other hosts failed, most likely because one of "
            f"them ended: {first_line(error)}. Start the same command on every host "
            "again, with --workdir and --resume: the run continues from its newest "
            "checkpoint."
        ) from error


def leave_hosts(status: int) -> None:
    """End this process at once if it is one of several hosts.

    At exit, Python would wait for the other hosts, and they would wait for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def host_folder(config: Config) -> Iterator[Config]:
    """Give every host except the first a temporary folder of its own.

    Only one host then writes the run and prints, and all hosts run the same program.
    Every host reads a run to resume from its `workdir`.
    """
    if config.hosts.coordinator is None or jax.process_index() == 0:
        yield config
        return
    with (
        tempfile.TemporaryDirectory(prefix="bnjax-") as folder,
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        copy = Path(folder) / "run"
        if config.resume and config.workdir is not None and config.workdir.exists():
            shutil.copytree(config.workdir, copy)
        yield dataclasses.replace(config, workdir=copy)
