"""Faults of a run during training: numbers that are not finite, and signals."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import multihost_utils
from tqdm import tqdm

from bnjax.training.config import RunError
from bnjax.training.step import layer_names


class DivergedError(RunError):
    """The values of a run are no longer finite."""


class Stopped(Exception):  # noqa: N818 (nothing went wrong)
    """A signal stopped the run after saving it."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


PATIENCE = 10
"""A run ends after this many consecutive dropped steps, in dispatches of only these."""


def forward_order(model: nn.Module, images: Any) -> tuple[str, ...]:
    """Return the layers that keep statistics, in the order of the forward pass.

    `images` is a batch or its shape: the model is traced, not run.
    """
    met: dict[str, None] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        met.setdefault("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        init = functools.partial(model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), images)
    layers = layer_names(variables.get("batch_stats", {}))
    return tuple(name for name in met if name in layers)


class NonFiniteGuard:
    """Checks whether the steps of each dispatch are finite and the run may continue.

    With `skip`, steps that are not finite were dropped. Otherwise the first such step
    ends the run. `layers` returns `layer_names` in the order of the forward pass.
    """

    def __init__(self, *, skip: bool, layers: Callable[[], tuple[str, ...]]) -> None:
        self.dropped = 0
        self._skip = skip
        self._layers = layers
        self._in_a_row = 0

    def check(self, step: int, taken: dict[str, np.ndarray]) -> str | None:
        """Return why the run cannot continue, or None; count dropped steps, and warn.

        `step` includes the steps of this dispatch. `taken` has the metrics of
        `train_step` for each of these steps, shape (steps, ...).
        """
        losses = taken["loss"]
        bad = np.flatnonzero(taken["dropped"] if self._skip else ~np.isfinite(losses))
        if not bad.size:
            self._in_a_row = 0
            return None
        first, last = (f"{step - losses.size + int(bad[i]) + 1:,}" for i in (0, -1))
        loss = float(losses[bad[0]])
        began = self._began(loss, taken["bad_layers"][bad[0]])
        if not self._skip:
            return (
                f"the loss became {loss} in step {first}.{began} --on-nan skip drops "
                "such steps."
            )
        self.dropped += bad.size
        which = f"{bad.size} steps from {first} to {last} were"
        if bad.size == 1:
            which = f"step {first} was"
        tqdm.write(
            f"warning: {which} dropped ({self.dropped:,} so far): the loss was "
            f"{loss}.{began}",
            file=sys.stderr,
        )
        self._in_a_row = self._in_a_row + bad.size if bad.size == losses.size else 0
        if self._in_a_row < PATIENCE:
            return None
        return (
            f"the last {self._in_a_row:,} steps were all dropped, because they were "
            f"not finite.{began} More steps would not help."
        )

    def _began(self, loss: float, bad: np.ndarray) -> str:
        """Return a sentence that names the first bad layer of the forward pass."""
        layers = self._layers()
        names = {n for n, is_bad in zip(sorted(layers), bad, strict=True) if is_bad}
        if names:
            name = min(names, key=layers.index)
            return f" The first layer whose statistics are not finite is {name}."
        if not layers:
            return ""
        place = "gradients" if np.isfinite(loss) else "logits or the loss"
        return f" The statistics of every layer are finite: it began in the {place}."


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """A context in which a stop signal is remembered and does not end the process.

    The first signal is remembered. A later SIGINT ends the process at once, which
    damages no checkpoint. A signal that the process ignores, as under nohup, stays
    ignored.
    """

    def __init__(self) -> None:
        self._received: int = 0
        self._before: dict[signal.Signals, Any] = {}

    def requested(self) -> signal.Signals | None:
        """Return the signal received by this process, or by any of several."""
        received = self._received
        if jax.process_count() > 1:
            # All hosts must stop after the same step; otherwise they wait for this one.
            everyones = multihost_utils.process_allgather(np.int32(received))
            received = int(np.max(everyones))
        return signal.Signals(received) if received else None

    def __enter__(self) -> Self:
        # In Python only the main thread can handle signals.
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._received:
            return
        self._received = number
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        # The signal may have interrupted a print, which is not reentrant.
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing the current steps, then "
            "saving (Ctrl-C stops at once)\n".encode(),
        )
