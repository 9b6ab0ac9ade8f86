"""What the linen and nnx layers have in common: they are Flax's, and each other's."""

import itertools

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
import bnjax.linen
import bnjax.nnx
from tests import cases, oracle

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32]
NAMES = ["float16", "bfloat16", "float32"]


def data(case, dtype=jnp.float32):
    x, scale, bias, dy, mask = case.arrays()
    return jnp.asarray(x, dtype), {"scale": scale, "bias": bias}, dy, mask


# Parameters in half precision are rare.
DTYPE_PAIRS = [
    pytest.param(
        dtype,
        param_dtype,
        marks=[] if param_dtype == jnp.float32 else pytest.mark.slow,
        id=f"{param_dtype.__name__}-{dtype.__name__}",
    )
    for dtype, param_dtype in itertools.product(DTYPES, DTYPES)
]


def run_linen(kind, x, params, dy, mask=None, training=True, **options):
    """Output, statistics and gradients of a linen layer, jitted."""
    layer = kind(use_running_average=not training, **options)
    stats = jax.tree.map(jnp.asarray, layer.init(jax.random.key(0), x)["batch_stats"])

    @jax.jit
    def run(x, params):
        def output(x, params):
            variables = {"params": params, "batch_stats": stats}
            mutable = ["batch_stats"] if training else []
            y, new = layer.apply(variables, x, mask=mask, mutable=mutable)
            return y, new.get("batch_stats", stats)

        y, vjp, new = jax.vjp(output, x, params, has_aux=True)
        return y, new, vjp(dy.astype(y.dtype))

    return run(x, params)


def run_nnx(kind, x, params, dy, mask=None, training=True, **options):
    """Output, statistics and gradients of an nnx layer, jitted."""
    axis = options.get("axis", -1)
    layer = kind(
        x.shape[axis],
        use_running_average=not training,
        rngs=flax.nnx.Rngs(0),
        **options,
    )
    graph, _, stats = flax.nnx.split(layer, flax.nnx.Param, flax.nnx.BatchStat)
    param = flax.nnx.state(layer, flax.nnx.Param)
    flax.nnx.replace_by_pure_dict(param, params)

    @jax.jit
    def run(x, param):
        def output(x, param):
            model = flax.nnx.merge(graph, param, stats, copy=True)
            y = model(x, mask=mask)
            new = flax.nnx.state(model, flax.nnx.BatchStat)
            return y, flax.nnx.to_pure_dict(new)

        y, vjp, new = jax.vjp(output, x, param, has_aux=True)
        dx, dparam = vjp(dy.astype(y.dtype))
        return y, new, (dx, flax.nnx.to_pure_dict(dparam))

    return run(x, param)


def run_functional(x, params, dy, mask=None, training=True, **options):
    @jax.jit
    def run(x, params):
        def output(x, params):
            y, new = bnjax.batch_norm(
                x,
                params["scale"],
                params["bias"],
                bnjax.BatchStats.init(params["scale"].shape),
                mask=mask,
                unbiased=False,
                use_running_average=not training,
                **options,
            )
            return y, {"mean": new.mean, "var": new.var}

        y, vjp, new = jax.vjp(output, x, params, has_aux=True)
        return y, new, vjp(dy.astype(y.dtype))

    return run(x, params)


RUNNERS = {
    "linen": (run_linen, bnjax.linen.BatchNorm, flax.linen.BatchNorm),
    "nnx": (run_nnx, bnjax.nnx.BatchNorm, flax.nnx.BatchNorm),
}
COMMON = [
    cases.Case("rows", (16, 5)),
    cases.Case("images", (8, 6, 6, 4)),
    cases.Case("channels first", (4, 6, 3), axis=1),
    cases.Case("masked", (8, 5, 4), mask="examples"),
]


def assert_close(got, want, **tolerance):
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        name = jax.tree_util.keystr(path)
        assert a.dtype == b.dtype, name
        wide = [np.asarray(value, np.float64) for value in (a, b)]
        np.testing.assert_allclose(*wide, err_msg=name, **tolerance)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
@cases.parametrize(COMMON)
def test_equal_one_another_exactly(case, dtype, training):
    x, params, dy, mask = data(case, dtype)
    options = {"axis": case.axis, "mask": mask, "training": training}
    linen = run_linen(bnjax.linen.BatchNorm, x, params, dy, **options)
    nnx = run_nnx(bnjax.nnx.BatchNorm, x, params, dy, **options)
    # The dtype that Flax's promotion gives for float32 parameters.
    functional = run_functional(x, params, dy, **options, dtype=jnp.float32)
    assert_close(linen, functional, rtol=0, atol=0)
    assert_close(nnx, functional, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
# The layer of nnx is that of linen, bit for bit: see above.
@pytest.mark.parametrize("api", ["linen", pytest.param("nnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPE_PAIRS)
@cases.parametrize(COMMON)
def test_equal_flax(case, dtype, param_dtype, api, training):
    x, params, dy, mask = data(case, dtype)
    params = jax.tree.map(lambda p: jnp.asarray(p, param_dtype), params)
    options = {"axis": case.axis, "mask": mask, "training": training}
    run, ours, theirs = RUNNERS[api]
    got = run(ours, x, params, dy, **options, param_dtype=param_dtype)
    want = run(theirs, x, params, dy, **options, param_dtype=param_dtype)
    # What leaves in half precision may round to the other neighbor.
    rounding = float(jnp.finfo(got[0].dtype).eps) if got[0].dtype.itemsize == 2 else 0
    assert_close(got[0], want[0], rtol=1e-5 + rounding, atol=1e-5)
    assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)
    ulp = float(max(jnp.finfo(d).eps for d in (dtype, param_dtype)))
    assert_close(got[2], want[2], rtol=max(ulp, 1e-4), atol=1e-4 + ulp)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("api", RUNNERS)
@pytest.mark.parametrize("asked", DTYPES, ids=NAMES)
def test_dtype_asked_for(asked, api, training):
    """As near to the exact result as Flax's layer, or nearer."""
    case = COMMON[1]
    x, params, dy, _ = data(case)
    run, ours, theirs = RUNNERS[api]
    options = {"training": training, "dtype": asked}
    got = run(ours, x, params, dy, **options)
    want = run(theirs, x, params, dy, **options)
    seen, scale, bias = x, params["scale"], params["bias"]
    if api == "nnx":
        # There the inputs themselves are cast to `dtype` first.
        seen, scale, bias = (jnp.asarray(a, asked) for a in (x, scale, bias))
        seen, scale, bias = (np.asarray(a, np.float64) for a in (seen, scale, bias))
    if training:
        exact = oracle.forward(seen, scale, bias)
    else:
        exact = np.asarray(seen, np.float64) / np.sqrt(1 + 1e-5) * scale + bias
    assert got[0].dtype == want[0].dtype
    errors = [
        np.abs(np.asarray(y, np.float64) - exact).max() for y in (got[0], want[0])
    ]
    assert errors[0] <= errors[1] * 1.01 + 1e-5
    assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("api", RUNNERS)
def test_float64(api):
    case = COMMON[1]
    x, params, dy, _ = data(case, jnp.float64)
    run, ours, theirs = RUNNERS[api]
    options = {"param_dtype": jnp.float64}
    got = run(ours, x, params, dy, **options)
    exact = oracle.forward(x, params["scale"], params["bias"])
    np.testing.assert_allclose(got[0], exact, atol=1e-12)
    if api == "linen":
        assert_close(got, run(theirs, x, params, dy, **options), rtol=1e-5, atol=1e-5)
    assert got[1]["mean"].dtype == {"linen": jnp.float64, "nnx": jnp.float32}[api]


@pytest.mark.parametrize("api", RUNNERS)
@pytest.mark.parametrize("activation", ["relu", jnp.tanh])
def test_fused_activation_and_residual(api, activation):
    case = COMMON[1]
    x, params, dy, _ = data(case)
    _, ours, _ = RUNNERS[api]
    if api == "linen":
        layer = ours(use_running_average=False, activation=activation)
        variables = layer.init(jax.random.key(0), x)
        variables = {**variables, "params": params}
        y, _ = layer.apply(variables, x, residual=dy, mutable=["batch_stats"])
    else:
        layer = ours(4, activation=activation, rngs=flax.nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = params["scale"], params["bias"]
        y = layer(x, residual=dy)
    z = oracle.forward(x, params["scale"], params["bias"]) + dy
    want = np.maximum(z, 0) if activation == "relu" else np.tanh(z)
    np.testing.assert_allclose(y, want, atol=1e-5)


@pytest.mark.parametrize("api", RUNNERS)
def test_the_exact_variance_by_its_name(api):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 5)) + 1e5, "float32")
    layer = {"linen": bnjax.linen.BatchNorm, "nnx": bnjax.nnx.BatchNorm}[api]

    def output(fast):
        options = {"use_running_average": False, "use_fast_variance": fast}
        options["axis_name"] = "data"
        if api == "linen":
            model = layer(**options)
            variables = model.init(jax.random.key(0), x[0])
        else:
            graph, state = flax.nnx.split(layer(5, rngs=flax.nnx.Rngs(0), **options))

        def run(x):
            if api == "nnx":
                return flax.nnx.merge(graph, state, copy=True)(x)
            return model.apply(variables, x, mutable=["batch_stats"])[0]

        return np.reshape(jax.vmap(run, axis_name="data")(x), (64, 5))

    wanted = oracle.forward(x.reshape(64, 5), np.ones(5), np.zeros(5))
    np.testing.assert_allclose(output(False), wanted, atol=1e-4)
    assert np.abs(output(True) - wanted).max() > 0.1


@pytest.mark.parametrize("api", RUNNERS)
@pytest.mark.parametrize("unbiased", [False, True])
def test_unbiased(api, unbiased):
    case = cases.Case("few", (4, 3))
    x, params, dy, _ = data(case)
    run, ours, _ = RUNNERS[api]
    _, stats, _ = run(ours, x, params, dy, unbiased=unbiased, momentum=0.5)
    _, var = oracle.running(bnjax.BatchStats.init(3), x, -1, 0.5, unbiased)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


@pytest.mark.parametrize("api", RUNNERS)
def test_old_statistics_are_not_rounded_to_a_half_precision_dtype(api):
    """flax.nnx casts the running statistics with the inputs; it may not keep that."""
    x = jnp.asarray(cases.Case("half", (16, 3)).arrays()[0], jnp.bfloat16)
    old = bnjax.BatchStats(jnp.full(3, 0.3337), jnp.full(3, 1.2345))
    mean, var = oracle.running(old, x, momentum=0.9, unbiased=False)
    options = {"momentum": 0.9, "dtype": jnp.bfloat16}
    if api == "linen":
        layer = bnjax.linen.BatchNorm(use_running_average=False, **options)
        params = layer.init(jax.random.key(0), x)["params"]
        stats = {"mean": old.mean, "var": old.var}
        variables = {"params": params, "batch_stats": stats}
        new = layer.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]
    else:
        layer = bnjax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0), **options)
        layer.mean[...], layer.var[...] = old.mean, old.var
        layer(x)
        new = {"mean": layer.mean[...], "var": layer.var[...]}
    np.testing.assert_allclose(new["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], var, rtol=1e-5)


def test_an_integer_input_is_refused_by_the_name_of_the_layer():
    layer = bnjax.linen.BatchNorm(use_running_average=False)
    with pytest.raises(TypeError, match=r"BatchNorm layer \(top level\): x has dtype"):
        layer.init(jax.random.key(0), jnp.ones((4, 3), jnp.int32))


@pytest.mark.parametrize("api", RUNNERS)
@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("update_stats", [None, False, True])
def test_statistics_used_and_updated_are_decided_apart(api, running, update_stats):
    x = jnp.asarray(cases.Case("apart", (12, 5)).arrays()[0])
    old = bnjax.BatchStats(jnp.full(5, 0.3, "float32"), jnp.full(5, 2.5, "float32"))
    moves = (not running) if update_stats is None else update_stats
    options = {"use_running_average": running, "update_stats": update_stats}
    if api == "linen":
        layer = bnjax.linen.BatchNorm(momentum=0.9)
        variables = layer.init(jax.random.key(0), x, use_running_average=running)
        stats = {"mean": old.mean, "var": old.var}
        variables = {**variables, "batch_stats": stats}
        mutable = ["batch_stats"] if moves else False
        y = layer.apply(variables, x, mutable=mutable, **options)
        y, new = y if moves else (y, variables)
        new = bnjax.BatchStats(**new["batch_stats"])
    else:
        layer = bnjax.nnx.BatchNorm(5, momentum=0.9, rngs=flax.nnx.Rngs(0))
        layer.mean[...], layer.var[...] = old.mean, old.var
        y = layer(x, **options)
        new = bnjax.BatchStats(layer.mean[...], layer.var[...])
    if running:
        np.testing.assert_allclose(y, (x - 0.3) / np.sqrt(2.5 + 1e-5), rtol=1e-5)
    else:
        wanted = oracle.forward(x, np.ones(5), np.zeros(5))
        np.testing.assert_allclose(y, wanted, atol=1e-5)
    if moves:
        mean, var = oracle.running(old, x, momentum=0.9, unbiased=False)
        np.testing.assert_allclose(new.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(new.var, var, rtol=1e-5)
    else:
        assert_close(new, old, rtol=0, atol=0)


@pytest.mark.parametrize("api", RUNNERS)
def test_a_traced_update_stats_is_refused(api):
    x = jnp.ones((4, 3))
    layer = {
        "linen": lambda: bnjax.linen.BatchNorm(use_running_average=False),
        "nnx": lambda: bnjax.nnx.BatchNorm(3, rngs=flax.nnx.Rngs(0)),
    }[api]()

    def call(flag):
        if api == "nnx":
            return layer(x, update_stats=flag)
        return layer.init(jax.random.key(0), x, update_stats=flag)

    with pytest.raises(TypeError, match=r"^BatchNorm layer .*update_stats is a traced"):
        jax.jit(call)(True)
