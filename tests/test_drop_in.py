"""The layers stand in for Flax's: constructors and checkpoints."""

import inspect
import pickle

import chex
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import bnjax.linen
import bnjax.nnx

LAYERS = {
    "linen": (bnjax.linen.BatchNorm, flax.linen.BatchNorm),
    "nnx": (bnjax.nnx.BatchNorm, flax.nnx.BatchNorm),
}


@pytest.mark.parametrize("api", LAYERS)
def test_constructors_accept_every_keyword_of_flax(api):
    ours, theirs = LAYERS[api]
    known = inspect.signature(theirs.__init__).parameters
    known = {
        name: known[name] for name in known if name not in ("self", "parent", "name")
    }
    added = {"unbiased", "activation"}
    if api == "linen":
        mine = inspect.signature(ours.__init__).parameters
        assert list(mine)[1 : len(known) + 1] == list(known)
        assert set(mine) == set(known) | added | {"self", "parent", "name"}
        assert all(mine[name].default == known[name].default for name in known)
    layers = [
        kind(**({"num_features": 3, "rngs": flax.nnx.Rngs(0)} if api == "nnx" else {}))
        for kind in (ours, theirs)
    ]
    skipped = {"rngs", "bias_init", "scale_init", "bias_metadata", "scale_metadata"}
    for name in set(known) - skipped:
        assert getattr(layers[0], name) == getattr(layers[1], name), name
    # A keyword that Flax adds one day must be thought about here, not ignored.
    assert set(known) - {"num_features", "rngs"} == {
        "use_running_average",
        "axis",
        "momentum",
        "epsilon",
        "dtype",
        "param_dtype",
        "use_bias",
        "use_scale",
        "bias_init",
        "scale_init",
        "axis_name",
        "axis_index_groups",
        "use_fast_variance",
        *(
            {"force_float32_reductions"}
            if api == "linen"
            else {"promote_dtype", "bias_metadata", "scale_metadata"}
        ),
    }


def test_checkpoints_load_into_each_other():
    x = jnp.ones((4, 3))
    ours, theirs = (
        kind(use_running_average=False).init(jax.random.key(0), x)
        for kind in (bnjax.linen.BatchNorm, flax.linen.BatchNorm)
    )
    for source, target in ((ours, theirs), (theirs, ours)):
        blob = serialization.to_bytes(jax.tree.map(lambda leaf: leaf + 0.5, source))
        restored = serialization.from_bytes(target, blob)
        chex.assert_trees_all_equal_dtypes(restored, target)
        wanted = jax.tree.map(lambda leaf: leaf + 0.5, target)
        chex.assert_trees_all_equal(restored, wanted)
    mine, other = (
        flax.nnx.state(kind(3, rngs=flax.nnx.Rngs(0)))
        for kind in (bnjax.nnx.BatchNorm, flax.nnx.BatchNorm)
    )
    mine, other = (flax.nnx.to_pure_dict(state) for state in (mine, other))
    chex.assert_trees_all_equal_dtypes(mine, other)
    chex.assert_trees_all_equal(mine, other)
    assert pickle.loads(pickle.dumps(jax.tree.map(np.asarray, mine))).keys() == set(
        other
    )
