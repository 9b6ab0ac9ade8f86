"""What a user gets wrong: every message says what was given and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax

X = np.ones((4, 3), np.float32)
ONES = np.ones(3, np.float32)


def call(x=X, scale=ONES, bias=ONES, stats=None, **options):
    return bnjax.batch_norm(
        x, scale, bias, stats or bnjax.BatchStats.init(3), **options
    )


MISTAKES = {
    "integers": (TypeError, {"x": np.ones((4, 3), np.int32)}, "int32.*astype"),
    "rank 1": (ValueError, {"x": ONES}, r"\(3,\).*at least 2 dimensions"),
    "empty": (ValueError, {"x": X[:0]}, r"\(0, 3\) is empty"),
    "one value": (ValueError, {"x": X[:1]}, r"one value per channel.*\(1, 3\)"),
    "axis range": (ValueError, {"axis": 2}, "axis=2 is out of range.*-2 to 1"),
    "axis type": (TypeError, {"axis": 0.5}, "axis=0.5; expected an int"),
    "axis twice": (ValueError, {"axis": (1, -1)}, "distinct"),
    "all axes": (ValueError, {"axis": (0, 1)}, "leave at least one axis"),
    "scale": (ValueError, {"scale": np.ones(4)}, r"scale has shape \(4,\).*\(3,\)"),
    "bias": (ValueError, {"bias": np.ones((1, 3))}, r"bias has shape \(1, 3\)"),
    "statistics": (
        ValueError,
        {"stats": bnjax.BatchStats.init(5)},
        r"mean has shape \(5,\); expected \(3,\)",
    ),
    "mask rank": (
        ValueError,
        {"mask": np.ones(4, bool)},
        r"mask has shape \(4,\).*mask.reshape\(\(4, 1\)\)",
    ),
    "mask that fits in no way": (
        ValueError,
        {"mask": np.ones(5, bool)},
        r"mask has shape \(5,\).*per example has shape \(4, 1\)\.",
    ),
    "mask rank, of positions": (
        ValueError,
        {"x": np.ones((4, 6, 3)), "mask": np.ones((4, 6), bool)},
        r"mask has shape \(4, 6\).*per position.*mask.reshape\(\(4, 6, 1\)\)",
    ),
    "mask shape": (ValueError, {"mask": np.ones((3, 1))}, r"\(3, 1\).*\(4, 3\)"),
    "mask dtype": (TypeError, {"mask": np.ones((4, 1), complex)}, "mask has dtype"),
    "residual": (ValueError, {"residual": X[:2]}, r"residual has shape \(2, 3\)"),
    "residual dtype": (
        TypeError,
        {"residual": X.astype(np.int32)},
        "residual has dtype int32",
    ),
    "activation name": (
        ValueError,
        {"activation": "sigmoyd"},
        "'sigmoyd' is unknown. Did you mean 'sigmoid'",
    ),
    "activation shape": (ValueError, {"activation": jnp.sum}, "elementwise"),
    "dtype": (TypeError, {"dtype": jnp.int8}, "dtype=int8"),
    "momentum": (ValueError, {"momentum": 1.5}, r"momentum=1.5.*\[0, 1\].*PyTorch"),
    "momentum NaN": (ValueError, {"momentum": float("nan")}, "momentum=nan"),
    "momentum None": (TypeError, {"momentum": None}, r"momentum=None is not a number"),
    "momentum text": (TypeError, {"momentum": "0.9"}, "momentum='0.9' is not a number"),
    "epsilon None": (TypeError, {"epsilon": None}, "epsilon=None is not a number"),
    "epsilon text": (TypeError, {"epsilon": "1e-5"}, "epsilon='1e-5' is not a number"),
    "epsilon zero": (ValueError, {"epsilon": 0.0}, "epsilon=0.0.*positive"),
    "epsilon NaN": (ValueError, {"epsilon": float("nan")}, "epsilon=nan"),
    "axis name": (NameError, {"axis_name": "dta"}, "axis_name='dta' is not bound"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_message(mistake):
    kind, options, message = MISTAKES[mistake]
    with pytest.raises(kind, match=f"(?s)batch_norm: .*{message}"):
        call(**options)
    with pytest.raises(kind, match=f"(?s){message}"):
        jax.jit(lambda: call(**options))()


@pytest.mark.parametrize(
    "flag", ["use_running_average", "update_stats", "unbiased", "use_fast_variance"]
)
def test_traced_flag(flag):
    with pytest.raises(TypeError, match=f"{flag} is a traced value.*static_argnames"):
        jax.jit(lambda value: call(**{flag: value}))(True)


def test_wrong_axis_name_under_pmap():
    with pytest.raises(NameError, match=r"axis_name='bacth' is not bound here"):
        jax.pmap(lambda x: call(x, axis_name="bacth")[0], axis_name="batch")(X[None])


def test_axis_name_is_not_looked_at_in_inference():
    y, _ = call(axis_name="data", use_running_average=True)
    np.testing.assert_allclose(y, np.full((4, 3), 1 + 1 / np.sqrt(1 + 1e-5)), rtol=1e-6)


@pytest.mark.parametrize("mapping", ["vmap", "shard_map"])
def test_groups_where_jax_has_none(mapping):
    def run(x):
        return call(x, axis_name="data", axis_index_groups=[[0, 1], [2, 3]])[0]

    if mapping == "vmap":
        run = jax.vmap(lambda x, run=run: run(x), axis_name="data")
        x = np.stack([X] * 4)
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        run = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        x = np.concatenate([X] * 4)
    with pytest.raises(NotImplementedError, match=r"axis_index_groups.*not supported"):
        run(x)


def test_update_of_other_shapes():
    with pytest.raises(ValueError, match=re.escape("[(2,), (3,)] differ")):
        bnjax.update_batch_stats(
            bnjax.BatchStats.init(2), bnjax.moments(np.ones((4, 3), np.float32))
        )
