"""Models of flax.nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax.nnx
from bnjax.folding import fold_nnx
from tests.folding.networks import difference, random_input


class Network(nnx.Module):
    def __init__(self, norm, rngs):
        self.convs = nnx.List(
            [nnx.Conv(2, 4, (3, 3), feature_group_count=2, rngs=rngs)]
        )
        self.norms = nnx.List([norm(4, rngs=rngs)] if norm else [])
        self.linear = nnx.LinearGeneral((3, 3, 4), 5, axis=(1, 2, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.convs[0](x)
        for norm in self.norms:
            x = norm(x)
        return self.linear(self.dropout(nnx.relu(x)))


def randomize(model):
    rng = np.random.default_rng(0)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    values = jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 2, v.shape)), state)
    nnx.update(model, jax.tree.map(lambda v: v.astype(jnp.float32), values))


@pytest.mark.parametrize("norm", [bnjax.nnx.BatchNorm, nnx.BatchNorm])
def test_network(norm):
    model = Network(norm, nnx.Rngs(0))
    randomize(model)
    x = random_input((2, 3, 3, 2))
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    folded = fold_nnx(model, x)
    assert [row.folded for row in folded.report] == [True]
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model.eval()
    assert difference(folded(x), model(x)) < 1e-5
    assert folded(random_input((5, 3, 3, 2))).shape == (5, 5)

    plain = Network(None, nnx.Rngs(1))
    nnx.update(plain, nnx.restore_int_paths(folded.params))
    plain.eval()
    assert difference(plain(x), model(x)) < 1e-5
