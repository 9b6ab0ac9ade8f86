import contextlib
import io
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.training import metrics
from bnjax.training.metrics import (
    EvalRecord,
    MetricsWriter,
    ProgressBar,
    ProgressReporter,
    layer_values,
)
from bnjax.training.metrics import TrainRecord as Trained


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def record(step):
    return Trained(step, 0.25, 0.905, 0.5, 200.0)


def test_steps_that_were_dropped_are_not_in_the_means():
    given = {
        "loss": np.array([1.0, np.nan, 2.0]),
        "accuracy": np.array([0.5, 0.0, 0.75]),
        "dropped": np.array([False, True, False]),
    }
    found = metrics.train_record(given, 3, 1, 0.5, lambda count: 0.25 * count)
    assert found == Trained(3, 1.5, 0.625, 0.25, 6.0, dropped=1)
    bad = {name: values[1:2] for name, values in given.items()}
    assert metrics.train_record(bad, 4, 2, 0.5, float) is None


def test_the_bar_of_a_terminal():
    stream = Terminal()
    bar = ProgressBar(1000, stream)
    for each in (EvalRecord(300, 0.1, 0.88), record(400), record(1000)):
        bar.show(each)
    bar.close()
    shown = stream.getvalue()
    line = "loss 0.2500, accuracy 90.50%, lr 0.5, 200 steps/s, test 88.00%"
    for part in ("1000/1000", "100%", line, "<"):
        assert part in shown


def test_lines_come_now_and_then_elsewhere(clock):
    stream = io.StringIO()
    lines = ProgressBar(1000, stream, seconds=5)
    for step in range(100, 1001, 100):
        clock.now += 2
        if step == 300:
            lines.show(EvalRecord(300, 0.1, 0.88))
        lines.show(record(step))
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["100/1,000", "400/1,000", "700/1,000", "1,000/1,000"]
    assert stream.getvalue().splitlines()[1] == (
        "step 400/1,000  loss 0.2500, accuracy 90.50%, lr 0.5, 200 steps/s, "
        "0:00:03 left, test 88.00% at step 300"
    )


def test_loading_is_shown_where_it_takes_a_while(clock):
    stream = io.StringIO()
    loading = ProgressReporter("mnist", stream, seconds=1)
    for done in range(1000, 6000, 1000):
        clock.now += 0.5
        loading(done, 5000)
    assert stream.getvalue().splitlines() == [
        "reading mnist: 2,000 of 5,000 examples, 0:00:02 left",
        "reading mnist: 4,000 of 5,000 examples, 0:00:00 left",
    ]


def board_in(workdir, step=0):
    return contextlib.closing(MetricsWriter(workdir, step, tensorboard=True))


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
    with board_in(tmp_path) as board:
        board.write(Trained(10, 0.25, 0.5, 0.125, 200.0, dropped=3))
        board.write(EvalRecord(20, 0.75, 0.875))
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
    with board_in(tmp_path) as board:
        board.histograms(30, initial_state)
    found = values(tmp_path)
    names = ("scale", "bias", "mean", "var")
    assert found.keys() == {(f"bn_{i}/{name}", 30) for i in (0, 1) for name in names}
    scale = found["bn_0/scale", 30].histo
    assert (scale.num, scale.min, scale.max) == (12, 1.0, 1.0)


def test_a_resumed_run_hides_what_comes_after_its_step(tmp_path):
    for step in (0, 20):
        with board_in(tmp_path, step) as board:
            board.write(EvalRecord(step + 20, 0.5, 0.5))
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts[-1] == 21


def test_layers_in_layers():
    stats = {"outer": {"bn": {"mean": jnp.zeros(2), "var": jnp.full(2, 3.0)}}}
    params = {"outer": {"bn": {"bias": jnp.ones(2)}, "conv": {"bias": jnp.ones(1)}}}
    found = dict(layer_values(params, stats))
    assert list(found) == ["outer/bn/bias", "outer/bn/mean", "outer/bn/var"]
    np.testing.assert_array_equal(found["outer/bn/var"], [3.0, 3.0])
    assert dict(layer_values({"conv": {"bias": jnp.ones(1)}}, {})) == {}
