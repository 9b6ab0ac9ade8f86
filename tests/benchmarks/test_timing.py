"""The order of the rounds, and the arithmetic of what is reported."""

import pytest

from benchmarks import timing
from benchmarks.layer import floor, row_of, summarize
from benchmarks.peers import Case


def test_rounds_rotate_and_turn_round():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(runs, 3)
    assert "".join(order) == "abc" + "abc" + "acb" + "cab"
    assert [len(times[name]) for name in "abc"] == [3, 3, 3]


def test_a_sample_is_the_time_of_one_call(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    assert timing.interleaved({"a": lambda: None}, 2, calls=4) == {"a": [0.25, 0.25]}


def test_rounds_end_after_the_seconds_but_not_before_three():
    runs = {"a": lambda: None}
    assert len(timing.interleaved(runs, 9, seconds=0.0)["a"]) == 3
    assert len(timing.interleaved(runs, 2, seconds=0.0)["a"]) == 2


def test_ratio_is_of_the_rounds_not_of_the_medians():
    # 2, 3 and 8; the medians' ratio would be 6 / 2.
    assert timing.ratio([2.0, 6.0, 16.0], [1.0, 2.0, 2.0]) == 3.0
    assert timing.ratio([2.0, 40.0, 6.0], [1.0, 5.0, 6.0]) == 2.0


@pytest.mark.parametrize(
    ("kind", "variation", "expected"),
    [
        ("train", "plain", 2 * 5.0 + 2 * 2.0),
        ("train", "residual", 3 * 5.0 + 2.5 * 2.0),
        ("forward", "relu", 5.0 + 0.5 * 2.0),
        ("inference", "plain", 5.0),
    ],
)
def test_floor_counts_outputs_as_new_and_the_rest_as_kept(kind, variation, expected):
    case = Case((2, 2), variation=variation)
    assert floor(case, kind, [2.0], [5.0]) == [expected]


def test_summary_is_a_geometric_mean_over_the_shapes():
    bounds = {"copy": [0.25], "elementwise": [0.5]}
    rows = [
        row_of(Case((size, 4)), "train", "reused", {"ours": [1.0], "x": [x]} | bounds)
        for size, x in ((2, 2.0), (3, 8.0))
    ]
    (group,) = summarize(rows)
    theirs = group["ratios"]["x"]
    assert theirs["mean"] == pytest.approx(4.0)
    assert (theirs["lowest"], theirs["lowest_shape"]) == (2.0, "2x4")
    assert group["over_floor"]["mean"] == pytest.approx(1.0)
    assert group["over_elementwise"]["highest"] == 2.0
