import io

import pytest

from bnjax.training import metrics as progress
from bnjax.training.metrics import Bar, Lines, Loading, make_progress
from bnjax.training.metrics import TestRecord as Scored
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
    monkeypatch.setattr(progress, "time", clock)
    return clock


def record(step):
    return Trained(step, 0.25, 0.905, 0.5, 200.0)


def test_a_bar_on_a_terminal_and_lines_elsewhere():
    assert isinstance(make_progress(5, io.StringIO()), Lines)
    bar = make_progress(5, Terminal())
    assert isinstance(bar, Bar)
    bar.close()


def test_the_bar_shows_all_there_is_to_see():
    stream = Terminal()
    bar = Bar(1000, stream)
    bar.test(Scored(300, 0.1, 0.88))
    bar.train(record(400))
    bar.train(record(1000))
    bar.close()
    shown = stream.getvalue()
    for part in (
        "1000/1000",
        "100%",
        "loss 0.2500",
        "accuracy 90.50%",
        "lr 0.5",
        "200 steps/s",
        "test 88.00%",
        "<",
    ):
        assert part in shown


def test_lines_come_now_and_then(clock):
    stream = io.StringIO()
    lines = Lines(1000, stream, seconds=5)
    for step in range(100, 1001, 100):
        clock.now += 2
        if step == 300:
            lines.test(Scored(300, 0.1, 0.88))
        lines.train(record(step))
    steps = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert steps == ["100/1,000", "400/1,000", "700/1,000", "1,000/1,000"]
    assert stream.getvalue().splitlines()[1] == (
        "step 400/1,000  loss 0.2500, accuracy 90.50%, lr 0.5, 200 steps/s, "
        "0:00:03 left, test 88.00% at step 300"
    )


def test_loading_is_shown_where_it_takes_a_while(clock):
    stream = io.StringIO()
    loading = Loading("mnist", stream, seconds=1)
    for done in range(1000, 6000, 1000):
        clock.now += 0.5
        loading(done, 5000)
    assert stream.getvalue().splitlines() == [
        "reading mnist: 2,000 of 5,000 examples, 0:00:02 left",
        "reading mnist: 4,000 of 5,000 examples, 0:00:00 left",
    ]
