import dataclasses

import pytest

from bnjax.data.sources import open_source
from bnjax.training.config import ModelConfig
from bnjax.training.loop import train
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program


@pytest.fixture(scope="session")
def small_config():
    """A run of a few steps on digits."""
    return dataclasses.replace(
        PRESETS["digits"].config,
        steps=60,
        parallel="single",
        batch_size=50,
        log_every=10,
        eval_every=30,
        checkpoint_every=30,
        model=ModelConfig(hidden=(12, 9), weight_std=0.1),
    )


@pytest.fixture(scope="session")
def program(small_config):
    return Program(small_config, open_source("digits"))


@pytest.fixture(scope="session")
def initial_state(program):
    """The state before the first step, which no test may donate."""
    return program.initial_state()


@pytest.fixture
def run_small(small_config, tmp_path):
    """Train the small run with some fields changed; return its folder and summary."""
    count = 0

    def run(**changes):
        nonlocal count
        count += 1
        workdir = tmp_path / f"run{count}"
        config = dataclasses.replace(small_config, workdir=workdir, **changes)
        return workdir, train("digits", config)

    return run
