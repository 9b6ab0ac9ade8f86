"""What `import bnjax` costs and what it brings along."""

import subprocess
import sys

import pytest

HEAVY = ("flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets", "tyro")


def modules_after(statement):
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_core_needs_jax_alone():
    assert modules_after("import bnjax").isdisjoint(HEAVY)


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_the_layers_need_no_training_libraries(adapter):
    # Flax itself imports optax, orbax and their like.
    flax = modules_after(f"import jax, flax.{adapter}")
    brought = modules_after(f"import bnjax.{adapter}") - flax
    assert brought - sys.stdlib_module_names == {"bnjax"}


@pytest.mark.parametrize("adapter", ["equinox", "haiku"])
def test_an_adapter_needs_its_own_framework_alone(adapter):
    pytest.importorskip(adapter)
    own = modules_after(f"import jax, {adapter}")
    brought = modules_after(f"import bnjax.{adapter}") - own
    assert brought - sys.stdlib_module_names == {"bnjax"}


def test_import_time_beyond_jax():
    """A share of JAX's own, since machines differ and are busy."""
    code = (
        "import time\n"
        "start = time.process_time()\n"
        "import jax\n"
        "middle = time.process_time()\n"
        "import bnjax\n"
        "print((time.process_time() - middle) / (middle - start))"
    )
    shares = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(3)
    ]
    assert min(shares) < 0.12
