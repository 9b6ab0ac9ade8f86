"""The layers of several domains, against the function and the plain layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.population import recompute_batch_stats
from bnjax.variants.domains import DomainBatchNorm, NnxDomainBatchNorm
from tests.variants.test_domains import DOMAINS, MIXED, check, data, expected


class Network(nn.Module):
    share_affine: bool = False
    norm: type[nn.Module] = DomainBatchNorm

    @nn.compact
    def __call__(self, x, domain, train):
        for _ in range(2):
            x = nn.Dense(5, use_bias=False)(x)
            norm = self.norm(
                use_running_average=not train,
                domains=DOMAINS,
                activation="relu",
                share_affine=self.share_affine,
                unbiased=True,
                momentum=0.9,
            )
            x = norm(x, domain=domain)
        return x


class NnxNetwork(nnx.Module):
    def __init__(self, share_affine, rngs):
        options = {"domains": DOMAINS, "share_affine": share_affine}
        options |= {"activation": "relu", "unbiased": True, "momentum": 0.9}
        self.layers = nnx.List(
            part
            for _ in range(2)
            for part in (
                nnx.Linear(5, 5, use_bias=False, rngs=rngs),
                NnxDomainBatchNorm(5, rngs=rngs, **options),
            )
        )

    def __call__(self, x, domain):
        for i, layer in enumerate(self.layers):
            x = layer(x, domain=domain) if i % 2 else layer(x)
        return x


@pytest.mark.parametrize("share_affine", [False, True])
def test_the_layers(share_affine):
    """Two steps of linen and nnx, one program for all domains, against the function."""
    x = data((9, 5), dtype="float32")[0]
    network = Network(share_affine)
    variables = jax.jit(network.init, static_argnums=3)(jax.random.key(0), x, 0, True)
    own = (5,) if share_affine else (DOMAINS, 5)
    shapes = jax.tree.map(jnp.shape, variables)
    assert shapes["params"]["DomainBatchNorm_0"] == {"scale": own, "bias": own}
    assert shapes["batch_stats"]["DomainBatchNorm_1"]["mean"] == (DOMAINS, 5)
    model = NnxNetwork(share_affine, nnx.Rngs(0))
    for i in range(2):
        kernel = variables["params"][f"Dense_{i}"]["kernel"]
        model.layers[2 * i].kernel[...] = kernel
        assert model.layers[2 * i + 1].scale.shape == own

    traces = []

    @jax.jit
    def step(variables, x, domain):
        traces.append("linen")
        return network.apply(variables, x, domain, True, mutable=["batch_stats"])

    @nnx.jit
    def nnx_step(model, x, domain):
        traces.append("nnx")
        return model(x, domain)

    stats = [bnjax.BatchStats.init((DOMAINS, 5)) for _ in range(2)]
    ones, zeros = np.ones(5), np.zeros(5)
    for domain in (jnp.asarray(2), jnp.asarray(0)):
        y, updates = step(variables, x, domain)
        variables |= updates
        z = x
        for i in range(2):
            z = z @ np.asarray(variables["params"][f"Dense_{i}"]["kernel"])
            z, stats[i] = expected(z, ones, zeros, stats[i], int(domain), momentum=0.9)
            z = z.clip(0)
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
        y = nnx_step(model, x, domain)
        np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)
    assert traces == ["linen", "nnx"]
    for i in range(2):
        own = variables["batch_stats"][f"DomainBatchNorm_{i}"]
        layer = model.layers[2 * i + 1]
        check((own["mean"], own["var"]), (stats[i].mean, stats[i].var), rtol=1e-4)
        check((layer.mean[...], layer.var[...]), (own["mean"], own["var"]), rtol=1e-4)

    infer = jax.jit(lambda x, domain: network.apply(variables, x, domain, False))
    y = infer(x, MIXED)
    model.eval()
    y_nnx = nnx.jit(lambda model, x, domain: model(x, domain))(model, x, MIXED)
    np.testing.assert_allclose(y_nnx, y, rtol=1e-4, atol=1e-5)
    for d in range(DOMAINS):
        alone = infer(x, d)[d == MIXED]
        np.testing.assert_allclose(y[d == MIXED], alone, rtol=1e-4, atol=1e-5)


def test_a_domain_is_a_plain_network():
    """Its slice of the variables goes into the layer without domains, and back."""
    x = data((9, 5), dtype="float32")[0]
    network = Network()
    variables = network.init(jax.random.key(0), x, 0, True)
    variables |= network.apply(variables, x, 1, True, mutable=["batch_stats"])[1]
    stacked = {"DomainBatchNorm_0", "DomainBatchNorm_1"}
    alone = {
        kind: {
            name: jax.tree.map(lambda leaf: leaf[1], layer)
            if name in stacked
            else layer
            for name, layer in layers.items()
        }
        for kind, layers in variables.items()
    }

    def plain(domains, share_affine, **options):
        layer = bnjax.linen.BatchNorm(**options, name=f"DomainBatchNorm_{len(made)}")
        made.append(layer)
        return lambda x, domain: layer(x)

    made = []
    y = Network(norm=plain).apply(alone, x, None, False)
    np.testing.assert_array_equal(y, network.apply(variables, x, 1, False))


def test_the_domain_has_to_be_told():
    x = data((9, 5), dtype="float32")[0]
    with pytest.raises(
        ValueError, match=r"BatchNorm layer .*: domain is None for a lay"
    ):
        Network().init(jax.random.key(0), x, None, True)
    layer = NnxDomainBatchNorm(5, domains=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="domain is None for a layer of 2 domains"):
        layer(x)
    one = NnxDomainBatchNorm(5, rngs=nnx.Rngs(0))
    plain = bnjax.nnx.BatchNorm(5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(one(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(one.mean[0], plain.mean[...], rtol=1e-6)


@pytest.mark.parametrize("mixed", [False, True])
def test_population_statistics_of_each_domain(mixed):
    """Those of domains that do not come stay as they are."""
    xs = np.stack([data((9, 5), seed=i, dtype="float32")[0] for i in range(4)])
    domains = np.stack([np.minimum(np.roll(MIXED, i), 1) for i in range(4)])
    domains = domains if mixed else np.array([0, 1, 1, 0])
    layer = DomainBatchNorm(domains=DOMAINS, use_running_average=False)
    variables = layer.init(jax.random.key(0), xs[0], domain=0)
    variables = jax.tree.map(lambda leaf: leaf + 3, variables)

    def call(variables, batch):
        return layer.apply(
            variables, batch["x"], domain=batch["domain"], mutable=["batch_stats"]
        )

    batches = [{"x": x, "domain": d} for x, d in zip(xs, domains, strict=True)]
    new = recompute_batch_stats(call, variables, batches, method="pooled")
    of_nnx = NnxDomainBatchNorm(5, domains=DOMAINS, rngs=nnx.Rngs(0))
    for name in ("mean", "var"):
        getattr(of_nnx, name)[...] = variables["batch_stats"][name]
    found = recompute_batch_stats(
        lambda layer, batch: layer(batch["x"], domain=batch["domain"]),
        of_nnx,
        batches,
        method="pooled",
    )
    rows = np.broadcast_to(domains.reshape(4, -1), xs.shape[:2])
    for d in range(2):
        values = xs[rows == d]
        np.testing.assert_allclose(new["mean"][d], values.mean(0), rtol=1e-5)
        np.testing.assert_allclose(new["var"][d], values.var(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(new["mean"][2], np.full(5, 3))
    np.testing.assert_array_equal(new["var"][2], np.full(5, 4))
    for name, value in new.items():
        np.testing.assert_allclose(found[name][...], value, rtol=1e-6)
