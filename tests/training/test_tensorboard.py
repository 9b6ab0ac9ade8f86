import struct

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.training.metrics import TensorBoard, layer_values
from bnjax.training.metrics import TestRecord as Scored
from bnjax.training.metrics import TrainRecord as Trained

pytest.importorskip("tensorboardX")


def events(workdir):
    """Read event files back: each record has a length, its digest, data, a digest."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted((workdir / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (size,) = struct.unpack_from("<Q", content, place)
            yield Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4


def values(workdir):
    return {
        (value.tag, event.step): value
        for event in events(workdir)
        for value in event.summary.value
    }


def test_records_become_scalars(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.write(Trained(10, 0.25, 0.5, 0.125, 200.0, dropped=3))
        board.write(Scored(20, 0.75, 0.875))
    found = {key: value.simple_value for key, value in values(tmp_path).items()}
    assert found == {
        ("train/loss", 10): 0.25,
        ("train/accuracy", 10): 0.5,
        ("train/learning_rate", 10): 0.125,
        ("train/steps_per_second", 10): 200.0,
        ("train/dropped", 10): 3.0,
        ("test/loss", 20): 0.75,
        ("test/accuracy", 20): 0.875,
    }


def test_histograms_of_every_bn_layer(tmp_path, initial_state):
    with TensorBoard(tmp_path) as board:
        board.histograms(30, initial_state)
    found = values(tmp_path)
    names = {
        f"bn_{layer}/{name}"
        for layer in (0, 1)
        for name in ("scale", "bias", "mean", "var")
    }
    assert found.keys() == {(name, 30) for name in names}
    scale = found["bn_0/scale", 30].histo
    assert (scale.num, scale.min, scale.max) == (12, 1.0, 1.0)


def test_a_resumed_run_hides_what_comes_after_its_step(tmp_path):
    for step in (0, 20):
        with TensorBoard(tmp_path, step) as board:
            board.write(Scored(step + 20, 0.5, 0.5))
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 21


def test_layers_in_layers():
    stats = {"outer": {"bn": {"mean": jnp.zeros(2), "var": jnp.full(2, 3.0)}}}
    params = {"outer": {"bn": {"bias": jnp.ones(2)}, "conv": {"bias": jnp.ones(1)}}}
    found = dict(layer_values(params, stats))
    assert list(found) == ["outer/bn/bias", "outer/bn/mean", "outer/bn/var"]
    np.testing.assert_array_equal(found["outer/bn/var"], [3.0, 3.0])
    assert dict(layer_values({"conv": {"bias": jnp.ones(1)}}, {})) == {}
