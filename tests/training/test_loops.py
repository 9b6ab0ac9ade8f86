"""Where many steps are one program."""

import dataclasses

import jax
import pytest

from bnjax.data.config import DataConfig
from bnjax.data.sources import open_data
from bnjax.training.config import ModelConfig
from bnjax.training.loop import Run
from bnjax.training.presets import PRESETS
from bnjax.training.program import Program

needs_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="loops are slow on a CPU alone"
)


def lenet():
    return dataclasses.replace(
        PRESETS["digits"].config,
        batch_size=8,
        parallel="single",
        model=ModelConfig(name="lenet"),
        data=DataConfig(name="synthetic:28x28x1:10:64"),
    )


@pytest.mark.slow
@needs_cpu
def test_the_steps_of_a_convolutional_network_are_single_calls():
    run = Run(lenet(), open_data(lenet().data))
    run.dispatch(3)
    run.dispatch(2)
    assert list(run._compiled) == [1]
    assert int(run.state.step) == run.step == 5
    run.close()


def test_the_steps_of_a_fully_connected_one_are_scanned():
    assert Program(
        PRESETS["digits"].config, open_data(PRESETS["digits"].config.data)
    ).scans
