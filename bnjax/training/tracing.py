"""What JAX itself writes on request: a trace of some steps, compiled programs."""

import contextlib
from pathlib import Path

import jax

from bnjax.training.workdir import PROFILE, writing


class SecondCall:
    """Traces what happens in the second context it gives: the first meets things cold.

    Args:
        workdir: the folder of the run. None: trace nothing.
    """

    def __init__(self, workdir: Path | None) -> None:
        self._workdir = workdir
        self._calls = 0

    def __call__(self) -> contextlib.AbstractContextManager[object]:
        """Return a context, which traces if it is the second."""
        self._calls += 1
        if self._workdir is None or self._calls != 2:
            return contextlib.nullcontext()
        return jax.profiler.trace(self._workdir / PROFILE)


def keep_compiled(folder: Path) -> None:
    """Have JAX keep every compiled program in a folder, and look for it there."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
