"""Under jit with sharded arrays the statistics are those of the global batch."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.integration.shared import assert_same, collectives, data, step


def forward(x, scale, bias, mask):
    stats = bnjax.BatchStats.init(scale.shape)
    return bnjax.batch_norm(x, scale, bias, stats, mask=mask)


SPECS = {
    "rows": P("data"),
    "rows over both axes": P(("data", "model")),
    "rows and channels": P("data", None, None, "model"),
    "channels": P(None, None, None, "model"),
    "rows and height": P("data", "model"),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", SPECS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_jit_with_sharded_arrays(axis_type, layout, masked):
    x, scale, bias, dy, mask = data(masked)
    x, dy = (np.repeat(a, 2, axis=1)[:, :4] for a in (x, dy))
    want = jax.jit(step)(x, scale, bias, dy, mask)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    spec = SPECS[layout]
    channels = P(spec[3]) if len(spec) > 3 else P()

    def put(array, spec):
        return jax.device_put(array, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        args = (
            put(x, spec),
            put(scale, channels),
            put(bias, channels),
            put(dy, spec),
            put(mask, P(spec[0])),
        )
        assert_same(jax.jit(step)(*args), want)
        both = collectives(jax.jit(step).lower(*args).compile())
        x, scale, bias, _, mask = args
        ahead = collectives(jax.jit(forward).lower(x, scale, bias, mask).compile())
    if layout != "rows and height":
        # XLA joins sums over differently sharded dimensions one mesh axis at a time.
        assert len(ahead) <= 2
        assert len(both) <= 3
    assert sum(both) <= 16 * scale.size


def test_replicated_parameters_with_sharded_channels():
    x, scale, bias, dy, mask = data(masked=True)
    want = jax.jit(step)(x, scale, bias, dy, mask)
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        spec = P("data", None, None, "model")
        x, dy = (jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, dy))
        mask = jax.device_put(mask, NamedSharding(mesh, P("data")))
        assert_same(jax.jit(step)(x, scale, bias, dy, mask), want)
