"""Training and evaluation as in PyTorch, by golden values and live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.golden.load import Case, metadata, torch_cases, torch_network

CASES = {case.name: case for case in torch_cases()}
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}

parametrize_cases = pytest.mark.parametrize(
    "case", CASES.values(), ids=list(CASES), indirect=True
)


@pytest.fixture
def case(request):
    """The case asked for, with 64-bit types on if it needs them."""
    with jax.enable_x64(request.param.dtype == "float64"):
        yield request.param


def batch_norm(case, x, scale, bias, batch_stats, **arguments):
    return bnjax.batch_norm(
        x,
        scale,
        bias,
        batch_stats,
        axis=1,
        momentum=1 - case.momentum,
        epsilon=case.eps,
        unbiased=True,
        **arguments,
    )


def inputs_of(case):
    """Returns the batches, scale, bias and statistics that go in."""
    arrays = {name: jnp.asarray(value) for name, value in case.arrays.items()}
    batch_stats = bnjax.BatchStats(arrays["running_mean"], arrays["running_var"])
    return arrays["x"], arrays.get("weight"), arrays.get("bias"), batch_stats


def assert_close(case, actual, name):
    """Compares with a tolerance relative to the largest entry, if above one."""
    expected = case.arrays[name]
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    tolerance = TOLERANCES[case.dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance, err_msg=name)


def check_outputs_and_gradients(case, batch_stats, mode):
    """Compares the first batch's output and gradients with PyTorch's."""
    x, scale, bias, _ = inputs_of(case)

    def apply(x, scale, bias):
        return batch_norm(
            case, x, scale, bias, batch_stats, use_running_average=mode == "eval"
        )

    y, vjp, new_stats = jax.vjp(apply, x[0], scale, bias, has_aux=True)
    dx, dscale, dbias = vjp(jnp.asarray(case.arrays["dy"]))
    assert_close(case, y, f"y_{mode}")
    assert_close(case, dx, f"dx_{mode}")
    if case.affine:
        assert_close(case, dscale, f"dweight_{mode}")
        assert_close(case, dbias, f"dbias_{mode}")
    return new_stats


def check_case(case):
    """Compares everything PyTorch gave in one case."""
    x, scale, bias, batch_stats = inputs_of(case)
    batch_stats = check_outputs_and_gradients(case, batch_stats, "train")
    assert_close(case, batch_stats.mean, "running_mean_after_1")
    assert_close(case, batch_stats.var, "running_var_after_1")

    for batch in x[1:]:
        _, batch_stats = batch_norm(case, batch, scale, bias, batch_stats)
    assert_close(case, batch_stats.mean, "running_mean_after_3")
    assert_close(case, batch_stats.var, "running_var_after_3")

    frozen = check_outputs_and_gradients(case, batch_stats, "eval")
    np.testing.assert_array_equal(frozen.mean, batch_stats.mean)
    np.testing.assert_array_equal(frozen.var, batch_stats.var)


@parametrize_cases
def test_golden(case):
    check_case(case)


@parametrize_cases
def test_live(case):
    pytest.importorskip("torch")
    from tests.golden import make_torch_golden

    spec = make_torch_golden.Spec(**metadata()["cases"][case.name])
    arrays = make_torch_golden.batch_norm_arrays(spec)
    check_case(Case(**{**vars(case), "arrays": arrays}))


def test_network_trained_by_sgd(x64):
    network = torch_network()
    arrays = {name: jnp.asarray(value) for name, value in network.arrays.items()}
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    params = {name: arrays[name][0] for name in names}
    batch_stats = bnjax.BatchStats(
        arrays["1.running_mean"][0], arrays["1.running_var"][0]
    )

    def loss_fn(params, batch_stats, x, target):
        x = x @ params["0.weight"].T + params["0.bias"]
        x, batch_stats = bnjax.batch_norm(
            x,
            params["1.weight"],
            params["1.bias"],
            batch_stats,
            momentum=1 - network.momentum,
            epsilon=network.eps,
            unbiased=True,
        )
        x = jax.nn.relu(x) @ params["3.weight"].T + params["3.bias"]
        return jnp.mean((x - target) ** 2), batch_stats

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for i, (x, target) in enumerate(zip(arrays["x"], arrays["target"], strict=True)):
        (loss, batch_stats), grads = step(params, batch_stats, x, target)
        params = jax.tree.map(lambda p, g: p - network.learning_rate * g, params, grads)
        actual = {
            **params,
            "1.running_mean": batch_stats.mean,
            "1.running_var": batch_stats.var,
        }
        np.testing.assert_allclose(loss, network.arrays["loss"][i], rtol=1e-10)
        for name, value in actual.items():
            np.testing.assert_allclose(
                value, network.arrays[name][i + 1], rtol=1e-10, atol=1e-10
            )
