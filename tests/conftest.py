"""Eight CPU devices, and what the tests share."""

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

# JAX reads both when it is imported. Those already set win: `JAX_PLATFORMS=cuda
# pytest` runs the tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEVICE_COUNT = "--xla_force_host_platform_device_count"
if DEVICE_COUNT not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICE_COUNT}=8"

# What one worker, or a program that a test starts, has compiled the others read.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="bnjax-compiled-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax
import pytest

# grain's worker processes read absl's flags, which pytest never parses.
with contextlib.suppress(ImportError):
    from absl import flags

    flags.FLAGS.mark_as_parsed()

# A program to run by hand: it needs PyTorch.
collect_ignore = ["golden/make_torch_golden.py"]

# Where it matters what XLA makes of the layer, it compiles in full.
IN_FULL = {"core", "benchmarks", "variants"}
OPTIMIZING = "jax_disable_most_optimizations"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Compile quickly the programs around the layer, also those a test starts."""
    folder = item.path.relative_to(item.config.rootpath).parts[:-1]
    quickly = folder not in [("tests",), *(("tests", name) for name in IN_FULL)]
    jax.config.update(OPTIMIZING, quickly)
    os.environ[OPTIMIZING.upper()] = str(int(quickly))
    return (yield)


hypothesis.settings.register_profile(
    "bnjax", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("bnjax")


@pytest.fixture
def strict() -> Iterator[None]:
    """Neither dtypes nor ranks are promoted in silence."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types are on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def _interrupts_arrive() -> Iterator[None]:
    """Programs under test get SIGINT, also where a background job ignores it."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
