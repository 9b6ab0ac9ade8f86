"""SIGTERM and SIGINT, taken as a wish to stop at the next good moment."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, remembers a signal to stop instead of ending the process.

    The first one is remembered; SIGINT after it ends the process at once, which no
    checkpoint minds. A signal that is ignored outside, as under nohup, stays ignored.

    Example:
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested() == signal.SIGTERM
        True
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._before: dict[signal.Signals, Any] = {}

    def requested(self) -> signal.Signals | None:
        """Return the signal received by this process, or by any of several."""
        received = self._received
        if jax.process_count() > 1:
            # All stop after the same step, or the others would wait for this one.
            everyones = multihost_utils.process_allgather(np.int32(received))
            received = int(np.max(everyones))
        return signal.Signals(received) if received else None

    def __enter__(self) -> Self:
        # Python lets the main thread alone handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._received:
            return
        self._received = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # A print may have been interrupted here, and cannot be entered twice.
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing the steps under way, then "
            "saving (Ctrl-C stops at once)\n".encode(),
        )
