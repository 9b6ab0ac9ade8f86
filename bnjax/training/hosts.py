"""Several hosts become one run: they meet, are told the same, and end together."""

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
"""Fields of `Config` that hosts must share, though no result depends on them."""


def join_hosts(hosts: HostsConfig) -> None:
    """Connect this process with those of the other hosts, before any computation."""
    if hosts.coordinator is None:
        return
    automatic = hosts.coordinator == "auto"
    place = () if automatic else (hosts.coordinator, hosts.count, hosts.index)
    if not automatic and hosts.index == 0:
        # JAX 0.10 would end in a segmentation fault where the port is taken.
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
    # JAX ends the process, with a stack of C++ frames, where its own time is up. So it
    # is given more, and waits in a thread that is left behind.
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
        who = "host 0 was not reached, or another host did not come,"
        if hosts.index == 0:
            who = f"the --hosts.count {hosts.count} hosts did not all come"
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
    """Return what must be the same on every host, by the names of `train.py`."""
    values = flatten_dict(result_config(config), sep=".")
    values |= {name: getattr(config, name) for name in SHARED}
    flags = {as_flag(name): value for name, value in values.items()}
    versions = {"bnjax": bnjax.__version__, "jax": jax.__version__}
    return {"the preset": preset, **versions, **flags}


def check_hosts_agree(values: Mapping[str, Any]) -> None:
    """Refuse to go on where hosts have different values; every host has to call this.

    They are JSON values by the names that the message gives them.
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
    """Raise what each of several hosts has to say before JAX ends it."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise
        if jax.process_index() == 0:
            # JAX ends the others as soon as host 0 is gone.
            time.sleep(LAST_WORDS_SECONDS)
        if isinstance(error, ValueError):
            raise
        raise RunError(
            "a computation with the other hosts failed, most likely since one of "
            f"them died: {first_line(error)}. Start the same command on every host "
            "again, with --workdir and --resume: the run goes on from its newest "
            "checkpoint."
        ) from error


def leave_hosts(status: int) -> None:
    """End this process at once if it is one of several hosts.

    Left to itself, Python would wait at exit for the others, and they for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


@contextlib.contextmanager
def host_folder(config: Config) -> Iterator[Config]:
    """Give every host but the first a folder of its own, gone in the end.

    So one host writes the run and prints, and all run the same program. A run to resume
    is read from its `workdir`, on every host.
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
