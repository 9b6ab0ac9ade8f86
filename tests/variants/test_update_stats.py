"""Which statistics normalize, and whether they are updated, in each variant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnjax.functional import BatchStats
from bnjax.variants import adaptation, averages, domains, ghost, renorm, whitening
from bnjax.variants.whitening.linen import WhiteningBatchNorm
from bnjax.variants.whitening.nnx import WhiteningBatchNorm as NnxWhiteningBatchNorm

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (6, 5)), jnp.float32)
RENORM = {"r_max": 1.5, "d_max": 0.5}
BOTH = jnp.array([0, 1, 1, 0, 0, 1])


def in_domains(x, scale, bias, stats, **options):
    return domains.domain_batch_norm(x, scale, bias, stats, BOTH, **options)


def in_one_domain(x, scale, bias, stats, **options):
    return domains.domain_batch_norm(x, scale, bias, stats, 1, **options)


FUNCTIONS = {
    "renorm": (renorm.batch_renorm, renorm.RenormStats.init(5), RENORM),
    "averages": (averages.averaged_batch_norm, averages.AveragedStats.init(5), {}),
    "domains": (in_domains, BatchStats.init((2, 5)), {}),
    "one domain": (in_one_domain, BatchStats.init((2, 5)), {}),
    "whitening": (
        whitening.whitening_batch_norm,
        whitening.WhiteningStats.init(5, 5),
        {"group_size": 5},
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function, stats, options = FUNCTIONS[name]

    def call(**flags):
        return function(X, None, None, stats, momentum=0.7, **options, **flags)

    trained, moved = call()
    inferred, kept = call(use_running_average=True)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    y, new = call(use_running_average=True, update_stats=True)
    np.testing.assert_array_equal(y, inferred)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), new, moved)
    y, new = call(update_stats=False)
    np.testing.assert_array_equal(y, trained)
    jax.tree.map(np.testing.assert_array_equal, new, stats)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("flag", ["use_running_average", "update_stats"])
def test_flags_that_are_traced_are_refused(name, flag):
    function, stats, options = FUNCTIONS[name]

    def call(value):
        return function(X, None, None, stats, **options, **{flag: value})

    with pytest.raises(TypeError, match=f"{flag} is a traced value; expected a"):
        jax.eval_shape(call, True)


LAYERS = {
    "renorm": (renorm.BatchRenorm, renorm.NnxBatchRenorm, RENORM),
    "averages": (averages.AveragedBatchNorm, averages.NnxAveragedBatchNorm, {}),
    "domains": (domains.DomainBatchNorm, domains.NnxDomainBatchNorm, {}),
    "whitening": (WhiteningBatchNorm, NnxWhiteningBatchNorm, {"group_size": 5}),
    "ghost": (ghost.GhostBatchNorm, ghost.NnxGhostBatchNorm, {"virtual_batch_size": 3}),
}


def run_linen(name, flags):
    layer = LAYERS[name][0](momentum=0.7, **LAYERS[name][2])
    variables = layer.init(jax.random.key(0), X, use_running_average=False)
    y, new = layer.apply(variables, X, mutable=["batch_stats"], **flags)
    return y, variables["batch_stats"], new["batch_stats"]


def run_nnx(name, flags):
    layer = LAYERS[name][1](5, momentum=0.7, rngs=nnx.Rngs(0), **LAYERS[name][2])
    before = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    y = layer(X, **flags)
    return y, before, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


@pytest.mark.parametrize("run", [run_linen, run_nnx])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, run):
    training, inference = ({"use_running_average": flag} for flag in (False, True))
    trained, before, moved = run(name, training)
    inferred, _, kept = run(name, inference)
    jax.tree.map(np.testing.assert_array_equal, kept, before)
    y, _, new = run(name, inference | {"update_stats": True})
    np.testing.assert_array_equal(y, inferred)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), new, moved)
    y, _, new = run(name, training | {"update_stats": False})
    np.testing.assert_array_equal(y, trained)
    jax.tree.map(np.testing.assert_array_equal, new, before)


def test_adaptation_keeps_the_statistics_of_the_source():
    layer = adaptation.AdaptiveBatchNorm(use_running_average=True, source_weight=4)
    variables = layer.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"update_stats=True in inference; expected"):
        layer.apply(variables, X, update_stats=True, mutable=["batch_stats"])
