"""What a layout is made of; that it changes no result is in tests/integration."""

import dataclasses

import jax
import numpy as np
import pytest

from bnjax.cli import parse_train
from bnjax.data.config import SettingError
from bnjax.training.config import BatchNormConfig, validate
from bnjax.training.presets import PRESETS
from bnjax.training.sharding import Pmap, Spmd, make_parallel
from bnjax.training.step import tree_sha256


def config(batch_size=64, sync="global", virtual=None, **changes):
    bn = BatchNormConfig(sync=sync, virtual_batch_size=virtual)
    return dataclasses.replace(
        PRESETS["digits"].config, batch_size=batch_size, bn=bn, **changes
    )


@pytest.mark.parametrize(
    ("strategy", "devices", "kind", "used"),
    [
        ("auto", 1, Spmd, 1),
        ("auto", 8, Pmap, 8),
        ("single", 8, Spmd, 1),
        ("spmd", 8, Spmd, 8),
        ("pmap", 1, Pmap, 1),
    ],
)
def test_the_strategy(strategy, devices, kind, used):
    parallel = make_parallel(config(parallel=strategy), jax.devices()[:devices])
    assert type(parallel) is kind
    assert parallel.devices == tuple(jax.devices()[:used])


def test_auto_uses_as_many_devices_as_divide_the_batch(capsys):
    parallel = make_parallel(config(60), jax.devices()[:8])
    assert len(parallel.devices) == 6
    assert "note: 6 of 8 devices are used: --batch-size 60" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 60, "parallel": "pmap"}, "--batch-size 60: 8 device"),
        ({"batch_size": 60, "parallel": "spmd"}, "need a multiple of 8"),
        ({"batch_size": 60, "sync": "per-device"}, "--batch-size 60: 8 device"),
        ({"accumulate": 16, "parallel": "pmap"}, "--accumulate 16 need a multiple of"),
        ({"devices": 9}, "--devices 9: JAX finds 8"),
        ({"sync": "group:3", "parallel": "pmap"}, "--bn.sync group:3"),
        ({"virtual": 3}, "--bn.virtual-batch-size 3"),
        ({"virtual": 16, "sync": "per-device"}, "a divisor of the 8"),
        ({"batch_size": 8, "sync": "per-device"}, "1 example is normalized by itself"),
    ],
)
def test_what_does_not_divide_is_refused(changes, message):
    with pytest.raises(SettingError, match=message):
        make_parallel(config(**changes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bn.sync", "group"], "--bn.sync group: expected global, per-device, or"),
        (["--bn.sync", "group:0"], "--bn.sync group:0"),
        (["--bn.virtual-batch-size", "1"], "--bn.virtual-batch-size 1: expected 2"),
        (["--devices", "0"], "--devices 0: expected 1 or more"),
        (["--accumulate", "7"], "--accumulate 7: expected a divisor of 60"),
        (["--accumulate", "0"], "--accumulate 0"),
        (
            ["--bn.implementation", "flax", "--bn.no-unbiased", "--accumulate", "4"],
            "supports only the statistics of a whole batch",
        ),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(flags)


AXIS, DEFERRED = {"axis_name": "data"}, {"deferred": True}
PAIRS = {**AXIS, **DEFERRED, "axis_index_groups": ((0, 1), (2, 3))}


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (Spmd, {}, {}),
        (Pmap, {}, AXIS),
        (Spmd, {"sync": "per-device"}, {"virtual_batch_size": 16}),
        (Spmd, {"sync": "group:2"}, {"virtual_batch_size": 32}),
        (Pmap, {"sync": "per-device"}, DEFERRED),
        (Pmap, {"virtual": 8}, {"virtual_batch_size": 8, **DEFERRED}),
        (Pmap, {"sync": "group:2"}, PAIRS),
        (Pmap, {"virtual": 32}, PAIRS),
        (Pmap, {"sync": "group:4"}, AXIS),
        (Pmap, {"accumulate": 2}, AXIS | DEFERRED),
        (
            Spmd,
            {"accumulate": 2, "sync": "per-device"},
            {"virtual_batch_size": 8, **DEFERRED},
        ),
        (Pmap, {"batch_norm": False}, {}),
    ],
)
def test_what_the_layers_are_told(kind, changes, expected):
    validate(config(**changes))
    assert kind(jax.devices()[:4]).sharing(config(**changes)) == expected


@pytest.mark.parametrize("kind", [Spmd, Pmap])
def test_a_state_comes_back_as_it_was_placed(kind, initial_state):
    parallel = kind(jax.devices()[:4])
    found = parallel.host_state(parallel.place_state(initial_state))
    assert jax.tree.structure(found) == jax.tree.structure(initial_state)
    assert tree_sha256(found) == tree_sha256(initial_state)


@pytest.mark.parametrize("kind", [Spmd, Pmap])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_device_has_its_part_of_every_micro_batch(kind, accumulate):
    parallel = kind(jax.devices()[:4], accumulate)
    chunk = np.arange(3 * 16).reshape(3, 16)
    placed = parallel.place_chunk(chunk)
    spec = parallel.chunk_spec(jax.ShapeDtypeStruct(chunk.shape, placed.dtype))
    assert (spec.shape, spec.sharding) == (placed.shape, placed.sharding)
    if kind is Spmd:
        np.testing.assert_array_equal(placed, chunk)
        return
    share = 16 // accumulate // 4
    for device in range(4):
        firsts = (micro * 4 * share + device * share for micro in range(accumulate))
        expected = [chunk[:, first : first + share] for first in firsts]
        np.testing.assert_array_equal(placed[device], np.concatenate(expected, axis=1))
