"""layers.jsonl: how the numbers of BN layers, and their outputs, are distributed."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.data.config import SettingError
from bnjax.data.sources import open_data
from bnjax.diagnostics import nonlinearity_inputs
from bnjax.training.config import BatchNormConfig, ModelConfig
from bnjax.training.loop import Run, train
from bnjax.training.metrics import layer_record, read_metrics
from bnjax.training.workdir import LAYERS


@pytest.mark.parametrize("batch_norm", [True, False])
def test_what_is_recorded(run_small, small_config, batch_norm):
    workdir, _ = run_small(record_inputs=True, batch_norm=batch_norm)
    lines = read_metrics(workdir, LAYERS)
    assert [line["step"] for line in lines] == [30, 60]
    assert list(lines[0]["inputs"]) == ["bn_0", "bn_1"]
    assert list(lines[0]["layers"]) == (["bn_0", "bn_1"] if batch_norm else [])
    config = dataclasses.replace(small_config, batch_norm=batch_norm)
    run = Run(config, open_data(config.data, None))
    run.dispatch(30), run.dispatch(30)
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    source = open_data(config.data, None)
    test = source.load("test", lambda *_: None)
    images = run.program.gather(test, jnp.arange(len(test.labels)))["image"]
    inputs = nonlinearity_inputs(run.program.model, variables, images, train=True)
    for name, u in inputs.items():
        found = lines[1]["inputs"][name]
        wanted = np.percentile(np.asarray(u), (15, 50, 85))
        np.testing.assert_allclose(found["all"], wanted, rtol=1e-4, atol=1e-5)
        wanted = np.percentile(np.asarray(u)[:, 0], (15, 50, 85))
        np.testing.assert_allclose(found["first"], wanted, rtol=1e-4, atol=1e-5)
        if batch_norm:
            for array, values in (
                ("mean", run.state.batch_stats[name]["mean"]),
                ("var", run.state.batch_stats[name]["var"]),
                ("scale", run.state.params[name]["scale"]),
                ("bias", run.state.params[name]["bias"]),
            ):
                wanted = np.percentile(np.asarray(values), (15, 50, 85))
                found = lines[1]["layers"][name][array]
                np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_recording_changes_no_training_and_is_taken_up_again(run_small, small_config):
    plain, expected = run_small()
    whole, found = run_small(record_inputs=True)
    assert found["state_sha256"] == expected["state_sha256"]
    before = (whole / LAYERS).read_text()
    lines = [{**line, "inputs": {}} for line in read_metrics(whole, LAYERS)]
    assert lines == read_metrics(plain, LAYERS)
    # Stopped after a line of step 60 that no checkpoint is of, and in the next.
    shutil.rmtree(whole / "checkpoints" / "60")
    (whole / LAYERS).write_text(f'{before}{{"step": 90, "lay')
    config = dataclasses.replace(
        small_config, workdir=whole, resume=True, record_inputs=True
    )
    train("digits", config)
    assert (whole / LAYERS).read_text() == before


def test_a_network_whose_inputs_cannot_be_recorded(small_config):
    model = ModelConfig(name="tests.training.own_nets:Net")
    changes = {"model": model, "bn": BatchNormConfig(), "record_inputs": True}
    config = dataclasses.replace(small_config, **changes)
    with pytest.raises(SettingError, match=r"--record-inputs: .* no field `normal"):
        Run(config, open_data(config.data, None))


def test_numbers_of_a_layer_at_the_top(initial_state):
    stats = {"mean": np.arange(3.0), "var": np.ones(3)}
    params = {"scale": np.ones(3)}
    state = dataclasses.replace(initial_state, params=params, batch_stats=stats)
    record = layer_record(7, state, {})
    assert record["layers"]["(top level)"]["mean"] == [0.3, 1.0, 1.7]
