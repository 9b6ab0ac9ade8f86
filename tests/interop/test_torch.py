"""Networks carried from PyTorch and back: values, by golden files and live."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bnjax.interop.torch import (
    batch_norm_options,
    from_torch,
    match,
    read_state_dict,
    to_torch,
    torch_batch_norm_options,
    trace,
    write_state_dict,
)
from bnjax.interop.torch_files import TorchError
from bnjax.linen import BatchNorm
from tests.golden import make_torch_convnet
from tests.interop.torch_convnet import (
    Net,
    assert_states_equal,
    golden,
    images,
    shapes_of,
    state,
    torch_convolution,
)


def carried(net=None, name="trained"):
    """The network's variables with the golden values, and the mapping."""
    net = net or Net()
    shapes = shapes_of(net, images(0), train=False)
    calls = trace(net, images(0), train=False)
    mapping = match(state(name), shapes, calls=calls)
    return from_torch(state(name), shapes, mapping=mapping), mapping


@pytest.mark.parametrize("layer", [BatchNorm, nn.BatchNorm])
def test_outputs_are_those_of_torch(layer):
    net = Net(layer)
    variables, _ = carried(net)
    logits = net.apply(variables, images(0), train=False)
    np.testing.assert_allclose(logits, golden()["logits"], rtol=0, atol=1e-6)


def test_the_next_training_steps_are_those_of_torch():
    net = Net()
    variables, mapping = carried(net)
    steps = make_torch_convnet.STEPS
    tracked = steps - make_torch_convnet.COMPARED

    @jax.jit
    def step(variables, x, labels):
        def loss_fn(params):
            logits, updates = net.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            chosen = jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels]
            return -chosen.mean(), updates["batch_stats"]

        found = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        (loss, batch_stats), grads = found
        params = jax.tree.map(
            lambda p, g: p - make_torch_convnet.LEARNING_RATE * g,
            variables["params"],
            grads,
        )
        return {"params": params, "batch_stats": batch_stats}, loss

    for i in range(make_torch_convnet.COMPARED):
        labels = jnp.asarray(golden()["labels"][tracked + i])
        variables, loss = step(variables, images(tracked + i), labels)
        np.testing.assert_allclose(loss, golden()["loss"][i], rtol=0, atol=1e-5)
        after = to_torch(variables, mapping, num_batches_tracked=tracked + i + 1)
        assert_states_equal(
            {name: after[name] for name in state(f"after_{i + 1}")},
            state(f"after_{i + 1}"),
            1e-5,
        )


def test_a_state_dict_comes_back_bit_for_bit():
    variables, mapping = carried()
    back = to_torch(variables, mapping, num_batches_tracked=6)
    expected = state("trained")
    assert set(back) == set(expected)
    assert_states_equal({name: back[name] for name in expected}, expected, 0)
    assert all(value.flags["C_CONTIGUOUS"] for value in back.values())
    assert to_torch(variables, mapping)["1.num_batches_tracked"] == np.int64(0)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_live_torch_gives_our_outputs(tmp_path, ending):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    variables, mapping = carried()
    variables = jax.tree.map(
        lambda leaf: leaf * jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype),
        variables,
    )
    path = tmp_path / f"weights{ending}"
    write_state_dict(path, to_torch(variables, mapping))
    model = make_torch_convnet.network().eval()
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in read_state_dict(path).items()}
    )
    with torch.no_grad():
        expected = model(torch.tensor(golden()["x"][1])).numpy()
    logits = Net().apply(variables, images(1), train=False)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    again = from_torch(model.state_dict(), variables, mapping=mapping)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 2, rngs=rngs) for _ in range(1)])

    def __call__(self, x):
        return self.layers[0](self.bn(self.conv(x)).mean((1, 2)))


def test_nnx():
    net = NnxNet(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    trained = state("trained")
    torch_state = {k: v for k, v in trained.items() if k.startswith(("0.", "1."))}
    torch_state["fc.weight"] = rng.normal(size=(2, 6)).astype(np.float32)
    torch_state["fc.bias"] = rng.normal(size=2).astype(np.float32)
    kept = nnx.state(net)
    variables = nnx.to_pure_dict(kept)
    mapping = match(torch_state, variables)
    nnx.replace_by_pure_dict(kept, from_torch(torch_state, variables, mapping=mapping))
    nnx.update(net, kept)

    s, x = torch_state, golden()["x"][0]
    y = torch_convolution(np.pad(x, [(0, 0)] * 2 + [(1, 1)] * 2), s["0.weight"])
    y = (y.mean((2, 3)) - s["1.running_mean"]) / np.sqrt(s["1.running_var"] + 1e-5)
    y = (y * s["1.weight"] + s["1.bias"]) @ s["fc.weight"].T + s["fc.bias"]
    np.testing.assert_allclose(net(images(0)), y, rtol=1e-5, atol=1e-5)
    back = to_torch(nnx.to_pure_dict(nnx.state(net)), mapping, num_batches_tracked=6)
    assert_states_equal({k: back[k] for k in torch_state}, torch_state, 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_is_that_of_the_model(dtype):
    shapes = shapes_of(nn.Dense(1), jnp.ones((1, 2)))
    torch_state = {"weight": np.array([[1.5, 2]], dtype), "bias": np.array([3], dtype)}
    params = from_torch(torch_state, shapes)["params"]
    assert params["kernel"].dtype == jnp.float32
    assert params["kernel"].tolist() == [[1.5], [2.0]]


def test_what_does_not_fit_its_mapping_is_named_and_nothing_changed():
    shapes = shapes_of(nn.Dense(3), jnp.ones((1, 2)))
    good = {"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3)}
    variables = from_torch(good, shapes)
    mapping = match(good, shapes)
    before = jax.tree.map(np.array, variables)
    with pytest.raises(TorchError) as error:
        from_torch({"fc.weight": np.ones((2, 3))}, variables, mapping=mapping)
    message = str(error.value)
    assert "fc.weight is (2, 3); params/kernel needs (3, 2)" in message
    assert "fc.bias is missing, for params/bias" in message
    bad = {**good, "fc.bias": np.ones(3, np.int8)}
    with pytest.raises(ValueError, match=r"fc\.bias is int8, not floating"):
        from_torch(bad, variables, mapping=mapping)
    jax.tree.map(np.testing.assert_array_equal, variables, before)

    other = shapes_of(nn.Dense(4), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"params/kernel \(2, 3\) is not there"):
        to_torch(other, mapping)
    with pytest.raises(ValueError, match=r"have no params/kernel \(2, 3\)"):
        from_torch(good, other, mapping=mapping)


def test_a_norm_without_running_statistics_is_not_taken_for_one_with():
    shapes = shapes_of(BatchNorm(use_running_average=True), jnp.ones((2, 3)))
    torch_state = {"bn.weight": np.full(3, 2.0), "bn.bias": np.ones(3)}
    with pytest.raises(ValueError, match="nothing for batch_stats/mean"):
        from_torch(torch_state, shapes)
    variables = {
        "params": shapes["params"],
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }
    mapping = match(torch_state, variables, keep=["batch_stats"])
    assert mapping.kept == ("batch_stats/mean", "batch_stats/var")
    found = from_torch(torch_state, variables, mapping=mapping)
    assert found["params"]["scale"].tolist() == [2, 2, 2]
    assert found["batch_stats"]["var"].tolist() == [1, 1, 1]


def test_options_both_ways():
    assert batch_norm_options(0.1, 1e-3, affine=False) == {
        "momentum": 0.9,
        "epsilon": 1e-3,
        "unbiased": True,
        "use_scale": False,
        "use_bias": False,
    }
    assert torch_batch_norm_options(0.9, 1e-3) == {"momentum": 0.1, "eps": 1e-3}
    with pytest.raises(ValueError, match=r"momentum=None.*recompute_batch_stats"):
        batch_norm_options(None)
