"""The kernels for a CPU."""

import jax
import pytest

from bnjax import _kernels as kernels

needs_kernels = pytest.mark.skipif(
    jax.default_backend() != "cpu" or not kernels.available(),
    reason="needs a CPU and a C compiler",
)
