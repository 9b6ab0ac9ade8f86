"""What a layout is made of; that it changes no result is in tests/integration."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.cli import parse_train
from bnjax.data.config import SettingError
from bnjax.training.config import BatchNormConfig, validate
from bnjax.training.presets import PRESETS
from bnjax.training.sharding import Pmap, Sharing, Spmd, make_parallel


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
        ({"virtual": 16, "sync": "per-device"}, "a divisor of 8"),
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
            "statistics of a whole batch only",
        ),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_train(flags)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        (Spmd, {}, Sharing()),
        (Pmap, {}, Sharing(axis_name="data")),
        (Spmd, {"sync": "per-device"}, Sharing(virtual_batch_size=16)),
        (Pmap, {"sync": "per-device"}, Sharing(deferred=True)),
        (Pmap, {"virtual": 8}, Sharing(virtual_batch_size=8, deferred=True)),
        (
            Pmap,
            {"sync": "group:2"},
            Sharing(None, "data", ((0, 1), (2, 3)), deferred=True),
        ),
        (Pmap, {"virtual": 32}, Sharing(None, "data", ((0, 1), (2, 3)), deferred=True)),
        (Pmap, {"sync": "group:4"}, Sharing(axis_name="data")),
        (Pmap, {"accumulate": 2}, Sharing(axis_name="data", deferred=True)),
        (
            Spmd,
            {"accumulate": 2, "sync": "per-device"},
            Sharing(virtual_batch_size=8, deferred=True),
        ),
        (Pmap, {"batch_norm": False}, Sharing()),
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
    for a, b in zip(
        jax.tree.leaves(found), jax.tree.leaves(initial_state), strict=True
    ):
        assert a.dtype == b.dtype
        is_key = jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
        bits = jax.random.key_data if is_key else np.asarray
        np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("kind", [Spmd, Pmap])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_device_has_its_part_of_every_micro_batch(kind, accumulate):
    parallel = kind(jax.devices()[:4], accumulate)
    chunk = np.arange(3 * 16).reshape(3, 16)
    placed = parallel.place_chunk(chunk)
    spec = jax.ShapeDtypeStruct(chunk.shape, placed.dtype)
    spec = parallel.chunk_spec(spec)
    assert (spec.shape, spec.sharding) == (placed.shape, placed.sharding)
    if kind is Spmd:
        np.testing.assert_array_equal(placed, chunk)
        return
    for device in range(4):
        part = np.asarray(placed[device])
        micro = 16 // accumulate
        share = micro // 4
        expected = [
            chunk[:, i * micro + device * share : i * micro + (device + 1) * share]
            for i in range(accumulate)
        ]
        np.testing.assert_array_equal(part, np.concatenate(expected, axis=1))
