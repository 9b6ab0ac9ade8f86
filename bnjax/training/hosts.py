"""Several hosts become one run: they meet, and only then does JAX connect them.

JAX ends the process, with a stack of C++ frames, where a host does not come. So hosts
first meet over a plain connection, which can be waited for and given up.
"""

import contextlib
import dataclasses
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from bnjax._validate import first_line
from bnjax.data.config import SettingError
from bnjax.training.config import Config, HostsConfig, RunError

HEARTBEAT_SECONDS = 30
RETRY_SECONDS = 0.1
LAST_WORDS_SECONDS = 2
_READY = b"ready"


def join_hosts(hosts: HostsConfig) -> None:
    """Connect this process with those of the other hosts, before any computation.

    Args:
        hosts: where host 0 is, how many there are, and which this is.

    Raises:
        RunError: the port is taken, host 0 is not reached, or some do not come; for
            "auto", there is no cluster that JAX finds.
    """
    if hosts.coordinator is None:
        return
    if hosts.coordinator == "auto":
        try:
            _connect(hosts)
        except ValueError as error:
            raise SettingError(
                "--hosts.coordinator auto: JAX finds no cluster here; expected the "
                "environment variables of Slurm, Open MPI or Cloud TPU. Give "
                "ADDRESS:PORT of host 0, --hosts.count and --hosts.index.",
            ) from error
        except RuntimeError as error:
            raise RunError(
                f"--hosts.coordinator auto: the hosts did not meet: "
                f"{first_line(error)}. Start the command on all hosts at once; "
                "--hosts.timeout waits longer."
            ) from error
        return
    address, _, port = hosts.coordinator.rpartition(":")
    deadline = time.monotonic() + hosts.timeout
    if hosts.index == 0:
        _receive_all(hosts, int(port), deadline)
    else:
        _report_to(hosts, address, int(port), deadline)
    _connect(hosts, hosts.coordinator, hosts.count, hosts.index)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """End this process at once, with a message, where one of several hosts fails.

    Left to itself, Python would wait at exit for the others, and they for this one.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if jax.process_count() == 1:
            raise
        message, status = str(error), 1
        if isinstance(error, SettingError):
            status = 2
        elif not isinstance(error, ValueError):
            message = (
                "a computation with the other hosts failed, most likely since one of "
                f"them died: {first_line(error)}. Start the same command on every host "
                "again, with --workdir and --resume: the run goes on from its newest "
                "checkpoint."
            )
        print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            # JAX ends the others as soon as host 0 is gone: they may have a message.
            time.sleep(LAST_WORDS_SECONDS)
        os._exit(status)


@contextlib.contextmanager
def host_folder(config: Config) -> Iterator[Config]:
    """Give every host but the first a folder of its own, gone in the end.

    So one host writes the run and prints, and all run the same program.

    Args:
        config: of the run. A run to resume is read from its `workdir`, on every host.
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


def _connect(
    hosts: HostsConfig,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> None:
    """Have JAX connect this process with the others; what is None, it finds out."""
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=hosts.timeout,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )


def _receive_all(hosts: HostsConfig, port: int, deadline: float) -> None:
    """Wait on host 0 until each of the others has said its index."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise RunError(
                f"--hosts.coordinator {hosts.coordinator}: port {port} cannot be used "
                f"on this host: {error.strerror}. Give another port on every host."
            ) from error
        listener.listen(hosts.count)
        missing = set(range(1, hosts.count))
        guests = []
        while missing:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                guest = stack.enter_context(listener.accept()[0])
                guest.settimeout(max(deadline - time.monotonic(), 0.001))
                missing.discard(int(guest.recv(16) or b"-1"))
            except TimeoutError:
                raise RunError(
                    f"host(s) {', '.join(map(str, sorted(missing)))} of "
                    f"--hosts.count {hosts.count} did not come within "
                    f"{hosts.timeout} s. Start the same command there with its own "
                    "--hosts.index; --hosts.timeout waits longer."
                ) from None
            except (OSError, ValueError):
                continue
            guests.append(guest)
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.sendall(_READY)
                # Whoever closes first keeps the port busy: let it be the guest.
                guest.recv(1)


def _report_to(hosts: HostsConfig, address: str, port: int, deadline: float) -> None:
    """Say this host's index to host 0, and wait until all have."""
    while time.monotonic() < deadline:
        left = max(deadline - time.monotonic(), 0.001)
        with contextlib.suppress(OSError), socket.socket() as guest:
            guest.settimeout(left)
            guest.connect((address, port))
            guest.sendall(str(hosts.index).encode())
            if guest.recv(len(_READY)) == _READY:
                return
        time.sleep(RETRY_SECONDS)
    raise RunError(
        f"--hosts.coordinator {hosts.coordinator}: host 0 was not reached, or another "
        f"did not come, within {hosts.timeout} s. Start the same command on every "
        "host, each with its own --hosts.index; --hosts.timeout waits longer."
    )
