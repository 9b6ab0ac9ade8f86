"""Steps that are not finite: the layer named, the run stopped or the step dropped."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from bnjax.data.pipeline import make_feed
from bnjax.linen import BatchNorm
from bnjax.models import MLP, Normalization
from bnjax.training import loop
from bnjax.training.config import RunError
from bnjax.training.evaluation import Evaluation
from bnjax.training.faults import NonFiniteGuard, forward_order, layer_names
from bnjax.training.loop import train
from bnjax.training.metrics import read_metrics
from bnjax.training.optimizer import make_schedule
from bnjax.training.step import create_state, make_train_step, tree_sha256

BAD_ROW = 7


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, name="bn")(x)


class OutOfOrder(nn.Module):
    """Names whose order is not that of the forward pass; one layer used twice."""

    @nn.compact
    def __call__(self, images, *, train):
        late = Block(name="a")
        x = Block(name="z")(images, train)
        x = Block(name="m_10")(x, train)
        x = BatchNorm(use_running_average=not train, name="m_9")(x)
        x = late(x, train)
        return late(nn.Dense(3, name="bn")(x)[..., :2], train)


def test_layers_come_in_the_order_of_the_forward_pass():
    names = forward_order(OutOfOrder(), jax.ShapeDtypeStruct((4, 2), jnp.float32))
    assert names == ("z/bn", "m_10/bn", "m_9", "a/bn")
    plain = MLP(normalization=Normalization("none"))
    assert forward_order(plain, jnp.zeros((1, 4))) == ()


def batch(seed=0, examples=12):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(0.5, 1, (examples, 4, 5)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, examples)),
    }


def small_step(optimizer=None, accumulate=1, **options):
    """Return a state and the jitted step."""
    optimizer = optimizer or optax.adam(0.1)
    normalization = Normalization(deferred=accumulate > 1)
    model = MLP((6, 6, 6), 3, weight_std=0.5)
    state = create_state(model, optimizer, 0, batch()["image"])
    step = make_train_step(
        model.clone(normalization=normalization),
        optimizer,
        accumulate=accumulate,
        updated_stats=normalization.updated_stats if accumulate > 1 else None,
        **options,
    )
    return state, jax.jit(step)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    ("layer", "value", "bad"),
    [
        ("dense_0", np.inf, ["bn_0", "bn_1", "bn_2"]),
        ("dense_1", 1e38, ["bn_1", "bn_2"]),
        ("logits", np.nan, []),
        (None, 0, []),
    ],
)
def test_the_layers_whose_statistics_went_bad(layer, value, bad, accumulate):
    state, step = small_step(accumulate=accumulate)
    if layer is not None:
        weights = state.params[layer]
        weights["kernel"] = jnp.full_like(weights["kernel"], value)
    after, metrics = step(state, batch())
    names = np.array(layer_names(after.batch_stats))
    assert names[metrics["bad_layers"]].tolist() == bad
    assert np.isfinite(metrics["loss"]) == (layer is None)


def bits(state):
    return tree_sha256((state.params, state.batch_stats, state.opt_state, state.rng))


@pytest.mark.parametrize("accumulate", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(accumulate):
    state, step = small_step(accumulate=accumulate, skip_nonfinite=True)
    _, plain = small_step(accumulate=accumulate)
    good, metrics = step(state, batch())
    assert bits(good) == bits(plain(state, batch())[0]) != bits(state)
    assert not metrics["dropped"]
    bad = batch(1)
    bad["image"] = bad["image"].at[5].set(jnp.nan)
    after, metrics = step(good, bad)
    assert metrics["dropped"]
    assert bits(after) == bits(good)
    assert int(after.step) == 2
    assert bits(plain(good, bad)[0]) != bits(good)


def test_a_step_with_a_finite_loss_is_dropped_too():
    state, step = small_step(optax.scale(-np.inf), skip_nonfinite=True)
    after, metrics = step(state, batch())
    assert np.isfinite(metrics["loss"])
    assert metrics["dropped"]
    assert not metrics["bad_layers"].any()
    assert bits(after) == bits(state)


def taken(losses, dropped=None, layers=2, bad=()):
    table = np.zeros((len(losses), layers), bool)
    for step, layer in bad:
        table[step, layer] = True
    found = {"loss": np.array(losses), "bad_layers": table}
    return found if dropped is None else found | {"dropped": np.array(dropped)}


def test_the_first_layer_is_named_in_the_order_of_the_forward_pass():
    guard = NonFiniteGuard(skip=False, layers=lambda: ("bn_2", "bn_10"))
    assert guard.check(2, taken([1.0, 2.0])) is None
    # In the order of names, bn_10 comes first.
    both = taken([1.0, np.nan, np.inf], bad=[(1, 0), (1, 1), (2, 0)])
    assert guard.check(1005, both) == (
        "the loss became nan in step 1,004. The first layer whose statistics are not "
        "finite is bn_2. --on-nan skip drops such steps."
    )
    last = taken([1.0, np.inf], bad=[(1, 0)])
    assert "finite is bn_10. " in str(guard.check(5, last))
    none = guard.check(5, taken([np.nan]))
    assert "finite: it began in the logits or the loss. " in str(none)
    plain = NonFiniteGuard(skip=False, layers=lambda: ())
    assert plain.check(5, taken([np.nan], layers=0)) == (
        "the loss became nan in step 5. --on-nan skip drops such steps."
    )


def test_drops_are_counted_and_end_the_run_where_nothing_is_kept(capsys):
    guard = NonFiniteGuard(skip=True, layers=lambda: ("bn_0", "bn_1"))
    nan = np.nan
    some = taken([1.0, nan, 1.0, nan], [False, True, False, True])
    assert guard.check(4, some) is None
    message = capsys.readouterr().err
    assert "warning: 2 steps from 2 to 4 were dropped (2 so far): the loss" in message
    assert guard.check(5, taken([2.0], [True])) is None
    message = capsys.readouterr().err
    assert "step 5 was dropped (3 so far): the loss was 2.0." in message
    assert "it began in the gradients" in message
    assert guard.check(6, taken([2.0], [False])) is None
    assert capsys.readouterr().err == ""
    most = taken([1.0] + [nan] * 12, [False] + [True] * 12)
    assert guard.check(6, most) is None
    # Short dispatches may lose all of their steps for a while.
    for step in range(7, 16):
        assert guard.check(step, taken([nan], [True])) is None
    last = guard.check(16, taken([nan], [True]))
    assert "the last 10 steps were all dropped" in str(last)
    assert guard.dropped == 25


@pytest.fixture
def poisoned(monkeypatch):
    """One training example is NaN, on whichever device it is."""

    def make(*args, **options):
        feed = make_feed(*args, **options)
        clean = feed.batch

        def batch(constants, item, key):
            made = clean(constants, item, key)
            bad = (item == BAD_ROW).reshape(-1, *(1,) * (made["image"].ndim - 1))
            return made | {"image": jnp.where(bad, jnp.nan, made["image"])}

        feed.batch = batch
        poisoned.rows = feed.chunk
        return feed

    def poisoned():
        """Return which of 60 steps, counted from 0, take that example."""
        return np.flatnonzero((poisoned.rows(0, 60) == BAD_ROW).any(1)).tolist()

    monkeypatch.setattr("bnjax.training.program.make_feed", make)
    return poisoned


def test_stop_names_the_step_the_layer_and_the_last_checkpoint(
    small_config, poisoned, tmp_path
):
    workdir = tmp_path / "run"
    config = dataclasses.replace(
        small_config, workdir=workdir, checkpoint_every=5, log_every=5, seed=2
    )
    with pytest.raises(RunError) as caught:
        train("digits", config)
    first = poisoned()[0]
    good = workdir / "checkpoints" / str(first // 5 * 5)
    assert str(caught.value) == (
        f"the loss became nan in step {first + 1}. The first layer whose statistics "
        "are not finite is bn_0. --on-nan skip drops such steps. The last good "
        f"checkpoint is {good}. Try a --learning-rate below 0.1."
    )


def reference(config, program, steps, rows):
    """One step after the other, without those to leave out."""
    source = loop.open_data(config.data, None)
    arrays = source.load("train", lambda done, total: None)
    state, bad = program.initial_state(), set(steps)
    step = jax.jit(make_train_step(program.model, program.optimizer))
    for number in range(config.steps):
        after, _ = step(state, program.gather(arrays, rows(number, 1)[0]))
        kept = state if number in bad else after
        state = dataclasses.replace(kept, step=after.step)
    return state


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"parallel": "pmap", "devices": 2}, marks=pytest.mark.slow),
        pytest.param({"parallel": "spmd", "devices": 2}, marks=pytest.mark.slow),
        pytest.param({"accumulate": 2}, marks=pytest.mark.slow),
    ],
    ids=["single", "pmap", "spmd", "accumulate"],
)
def test_skip_leaves_out_the_steps_and_no_other(
    small_config, program, poisoned, tmp_path, capsys, changes
):
    config = dataclasses.replace(
        small_config, on_nan="skip", workdir=tmp_path / "run", **changes
    )
    summary = train("digits", config)
    bad = poisoned()
    assert 1 <= len(bad) <= 3
    assert summary["dropped_steps"] == len(bad)
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["dropped_steps"] == len(bad)
    records = [r for r in read_metrics(tmp_path / "run") if r["split"] == "train"]
    assert [r["dropped"] for r in records] == [
        sum(step < r["step"] for step in bad) for r in records
    ]
    rate = make_schedule(config)(60 - len(bad) - 1)
    assert records[-1]["learning_rate"] == pytest.approx(float(rate), rel=1e-6)
    assert np.isfinite([r["loss"] for r in records]).all()
    message = capsys.readouterr().err
    assert f"step {bad[0] + 1} was dropped (1 so far): the loss was nan." in message
    if "accumulate" in changes:
        return
    expected = reference(config, program, bad, poisoned.rows)
    with loop.open_checkpoints(tmp_path / "run", config, read_only=True) as found:
        state, notes = found.restore(expected)
    assert notes.dropped == len(bad)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (state.params, state.batch_stats),
        (expected.params, expected.batch_stats),
    )


@pytest.mark.slow
def test_a_resumed_run_skips_as_the_run_never_stopped(
    small_config, poisoned, tmp_path, monkeypatch
):
    config = dataclasses.replace(
        small_config, on_nan="skip", workdir=tmp_path / "whole", checkpoint_every=20
    )
    expected = train("digits", config)
    dispatch = loop.Run.dispatch

    def crash_at_50(self, steps):
        if self.step == 50:
            raise KeyboardInterrupt
        return dispatch(self, steps)

    monkeypatch.setattr(loop.Run, "dispatch", crash_at_50)
    config = dataclasses.replace(config, workdir=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train("digits", config)
    monkeypatch.setattr(loop.Run, "dispatch", dispatch)
    found = train("digits", dataclasses.replace(config, resume=True))
    assert any(step < 40 for step in poisoned())
    for name in ("state_sha256", "dropped_steps", "test_loss"):
        assert found[name] == expected[name]


@pytest.mark.slow
def test_without_bad_steps_skipping_changes_no_bit(run_small):
    (_, stop), (_, skip) = (run_small(on_nan=choice) for choice in ("stop", "skip"))
    assert stop["state_sha256"] == skip["state_sha256"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_skip(small_config, poisoned, tmp_path):
    config = dataclasses.replace(
        small_config, workdir=tmp_path / "run", checkpoint_every=5, log_every=5, seed=2
    )
    with pytest.raises(RunError):
        train("digits", config)
    config = dataclasses.replace(config, resume=True, on_nan="skip")
    assert train("digits", config)["dropped_steps"] == len(poisoned())


def test_where_nothing_is_kept_the_run_stops(run_small):
    with pytest.raises(ValueError, match="last 10 steps were all dropped") as caught:
        run_small(learning_rate=1e30, on_nan="skip")
    assert "There is no checkpoint yet" in str(caught.value)
    assert "--on-nan" not in str(caught.value)


def test_a_test_loss_that_is_not_finite_stops(run_small, monkeypatch):
    bad = Evaluation(np.nan, 1, 355)
    monkeypatch.setattr(loop.Evaluator, "__call__", lambda self, state: bad)
    with pytest.raises(ValueError, match="the test loss is nan after step 30"):
        run_small()
