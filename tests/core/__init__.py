"""The core: here what its tests of the kernels share."""

import jax
import pytest

from bnjax._cpu.build import available

needs_kernels = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not available(),
    reason="needs a CPU and a C compiler",
)
