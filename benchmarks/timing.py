"""Time programs in turns, so that other work on the machine affects all of them."""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# malloc.h of glibc.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    seconds: float | None = None,
    calls: int = 1,
    settle: float = 0.0,
    warm: bool = True,
) -> dict[str, list[float]]:
    """Time each of the runs once a round, in an order that rotates and turns round.

    Args:
        runs: what to time; each returns when its work is done.
        rounds: at most; at least one.
        seconds: begin no round after so long, three excepted; None: no limit.
        calls: in a sample, whose time is divided by them.
        settle: seconds to wait before each sample, so that threads which the run
            before left spinning have gone to sleep.
        warm: call each once before the first round.

    Returns:
        The seconds of a call, by run, a number a round.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    if warm:
        for run in runs.values():
            run()
    names = list(runs)
    begun = time.perf_counter()
    for turn in range(rounds):
        late = seconds is not None and time.perf_counter() - begun > seconds
        if late and turn >= min(rounds, 3):
            break
        first = turn % len(names)
        order = names[first:] + names[:first]
        for name in order if turn % 2 == 0 else order[::-1]:
            run = runs[name]
            time.sleep(settle)
            started = time.perf_counter()
            for _ in range(calls):
                run()
            found[name].append((time.perf_counter() - started) / calls)
    return found


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median over the rounds of theirs / ours."""
    return statistics.median(t / o for t, o in zip(theirs, ours, strict=True))


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def show(name: str, seconds: Mapping[str, float]) -> None:
    """Print what was timed, as soon as it was."""
    each = ", ".join(f"{run} {1e3 * taken:.3g}" for run, taken in seconds.items())
    print(f"{name}: {each} ms", file=sys.stderr, flush=True)


def keep_memory() -> bool:
    """Tell glibc to keep what is freed, so that no page is faulted in again.

    Returns:
        Whether it was told; other C libraries have no such call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return all(mallopt(option, value) == 1 for option, value in options.items())


def cores() -> int:
    """Return how many processor cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def load() -> float | None:
    """Return the load average of a minute, with a warning where others are at work."""
    try:
        average = os.getloadavg()[0]
    except OSError:
        return None
    if average > 0.5:
        print(
            f"warning: the load average is {average:.1f}: something else runs here; "
            "ratios of interleaved rounds bear that, times do not.",
            file=sys.stderr,
        )
    return average
