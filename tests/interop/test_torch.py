"""Networks carried from PyTorch and back: values, by golden files and live."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from bnjax import models
from bnjax.interop.torch import (
    RESNET,
    Layer,
    TorchError,
    batch_norm_options,
    from_torch,
    known_mapping,
    pair_arrays,
    to_torch,
    torch_batch_norm_options,
)
from bnjax.interop.torch_files import read_state_dict, write_state_dict
from bnjax.interop.torch_proposal import alike, propose_mapping, trace
from bnjax.linen import BatchNorm
from tests.golden import make_torch_convnet

CONVNET = {
    "0": "Conv_0",
    "1": "BatchNorm_0",
    "4": "Conv_1",
    "5": "BatchNorm_1",
    "7": Layer("ConvTranspose_0", transposed=True),
    "8": "BatchNorm_2",
    "12": Layer("Dense_0", channels=4),
    "13": "BatchNorm_3",
    "15": "Dense_1",
}


class Net(nn.Module):
    """The network of golden/make_torch_convnet.py."""

    layer: type[nn.BatchNorm] = BatchNorm

    @nn.compact
    def __call__(self, x, *, train):
        def normalize(x, *args, **options):
            options = batch_norm_options(*args, **options)
            if self.layer is nn.BatchNorm:
                del options["unbiased"]
            return nn.relu(self.layer(not train, **options)(x))

        x = normalize(nn.Conv(6, (3, 3), padding=1, use_bias=False)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(6, (3, 3), padding=1, use_bias=False, feature_group_count=3)(x)
        x = normalize(x, 0.3, 1e-3)
        x = nn.ConvTranspose(4, (3, 3), (2, 2), padding=[(1, 2), (1, 2)])(x)
        x = nn.max_pool(normalize(x), (4, 4), (4, 4))
        x = nn.Dense(8, use_bias=False)(x.reshape(len(x), -1))
        return nn.Dense(3)(normalize(x, affine=False))


@functools.cache
def golden():
    path = pathlib.Path(make_torch_convnet.__file__).with_name("torch_convnet.npz")
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def state(name):
    """A state dict of the golden values."""
    values = golden().items()
    return {
        k.removeprefix(f"{name}/"): v for k, v in values if k.startswith(f"{name}/")
    }


def images(step):
    return jnp.asarray(golden()["x"][step].transpose(0, 2, 3, 1))


def shapes_of(net, x, **options):
    return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, **options), x)


def carried(net=None):
    """The network's variables with the golden values."""
    shapes = shapes_of(net or Net(), images(0), train=False)
    return from_torch(state("trained"), shapes, CONVNET)


def assert_states_equal(actual, expected, atol):
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("layer", [BatchNorm, nn.BatchNorm])
def test_outputs_are_those_of_torch(layer):
    net = Net(layer)
    logits = net.apply(carried(net), images(0), train=False)
    np.testing.assert_allclose(logits, golden()["logits"], rtol=0, atol=1e-6)


def test_the_next_training_steps_are_those_of_torch():
    net, variables = Net(), carried()
    tracked = make_torch_convnet.STEPS - make_torch_convnet.COMPARED

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
        after = to_torch(variables, CONVNET, num_batches_tracked=tracked + i + 1)
        assert_states_equal(after, state(f"after_{i + 1}"), 1e-5)


def test_a_state_dict_comes_back_bit_for_bit():
    variables = carried()
    back = to_torch(variables, CONVNET, num_batches_tracked=6)
    assert_states_equal(back, state("trained"), 0)
    assert all(value.flags["C_CONTIGUOUS"] for value in back.values())
    assert to_torch(variables, CONVNET)["1.num_batches_tracked"] == np.int64(0)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_live_torch_gives_our_outputs(tmp_path, ending):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: leaf * jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype),
        carried(),
    )
    path = tmp_path / f"weights{ending}"
    write_state_dict(path, to_torch(variables, CONVNET))
    model = make_torch_convnet.network().eval()
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in read_state_dict(path).items()}
    )
    with torch.no_grad():
        expected = model(torch.tensor(golden()["x"][1])).numpy()
    logits = Net().apply(variables, images(1), train=False)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    again = from_torch(model.state_dict(), variables, CONVNET)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def torch_convolution(x, weight):
    """Of x (batch, in, *size) by weight (out, in, *kernel), in float64."""
    size = [n - k + 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = np.zeros((len(x), weight.shape[0], *size))
    for k in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(slice(i, i + n) for i, n in zip(k, size, strict=True))
        y += np.einsum("bi...,oi->bo...", x[(..., *window)], weight[(..., *k)])
    return y


def torch_transposed_convolution(x, weight):
    """Of x (batch, in, *size) by weight (in, out, *kernel), in float64."""
    size = [n + k - 1 for n, k in zip(x.shape[2:], weight.shape[2:], strict=True)]
    y = np.zeros((len(x), weight.shape[1], *size))
    for k in itertools.product(*map(range, weight.shape[2:])):
        window = tuple(slice(i, i + n) for i, n in zip(k, x.shape[2:], strict=True))
        y[(..., *window)] += np.einsum("bi...,io->bo...", x, weight[(..., *k)])
    return y


@pytest.mark.parametrize("pixels", [1, 2, 3])
@pytest.mark.parametrize("kind", ["plain", "transposed", "transpose_kernel"])
def test_kernels_of_every_rank(kind, pixels):
    rng = np.random.default_rng(pixels)
    kernel = (2, 3, 2)[:pixels]
    # As many in as out: shapes tell nothing.
    weight = rng.normal(size=(4, 4, *kernel)).astype(np.float32)
    bias = rng.normal(size=4).astype(np.float32)
    x = rng.normal(size=(2, 4, *(4, 5, 3)[:pixels])).astype(np.float32)
    if kind == "plain":
        net = nn.Conv(4, kernel, padding="VALID")
        expected = torch_convolution(x, weight)
    else:
        swapped = kind == "transpose_kernel"
        net = nn.ConvTranspose(4, kernel, padding="VALID", transpose_kernel=swapped)
        expected = torch_transposed_convolution(x, weight)
    moved = jnp.asarray(np.moveaxis(x, 1, -1))
    shapes, torch_state = shapes_of(net, moved), {"up.weight": weight, "up.bias": bias}
    mapping = {"up": Layer("", transposed=kind == "transposed")}
    proposed = propose_mapping(torch_state, shapes, trace(net, moved))
    assert proposed == ({"up": ""} if kind != "transposed" else mapping)
    variables = from_torch(torch_state, shapes, mapping)
    expected += bias.reshape(4, *[1] * pixels)
    actual = np.moveaxis(np.asarray(net.apply(variables, moved)), -1, 1)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert_states_equal(to_torch(variables, mapping), torch_state, 0)


class FlattenedNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1, 1))(x)
        x = BatchNorm(use_running_average=True)(x.reshape(len(x), -1))
        return nn.Dense(2)(x)


def test_a_norm_of_flattened_features():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 5, 3)), jnp.float32)
    net = FlattenedNorm()
    shapes = {"0.weight": (3, 3, 1, 1), "0.bias": 3, "3.weight": (2, 60), "3.bias": 2}
    shapes |= dict.fromkeys(norm("2", 60), 60)
    del shapes["2.num_batches_tracked"]
    s = {k: rng.uniform(0.5, 1.5, v).astype(np.float32) for k, v in shapes.items()}
    mapping = propose_mapping(s, shapes_of(net, x), trace(net, x))
    assert mapping == {
        "0": "Conv_0",
        "2": Layer("BatchNorm_0", channels=3),
        "3": Layer("Dense_0", channels=3),
    }
    variables = from_torch(s, shapes_of(net, x), mapping)
    y = torch_convolution(np.moveaxis(np.asarray(x), -1, 1), s["0.weight"])
    y = (y + s["0.bias"][:, None, None]).reshape(2, 60)
    y = (y - s["2.running_mean"]) / np.sqrt(s["2.running_var"] + 1e-5)
    y = (y * s["2.weight"] + s["2.bias"]) @ s["3.weight"].T + s["3.bias"]
    np.testing.assert_allclose(net.apply(variables, x), y, rtol=1e-5, atol=1e-5)
    back = to_torch(variables, mapping)
    assert_states_equal({k: back[k] for k in s}, s, 0)


class Biased(nn.Module):
    """Convolutions before BN, with biases or without."""

    biases: bool

    @nn.compact
    def __call__(self, x, *, train):
        def normalize(x):
            return BatchNorm(not train, momentum=0.9, unbiased=True)(x)

        y = nn.relu(normalize(nn.Conv(3, (3, 3), use_bias=self.biases)(x)))
        return normalize(nn.Conv(5, (3, 3), use_bias=self.biases)(y))


def test_a_bias_before_a_norm_goes_into_the_mean():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5, 5, 2)), jnp.float32)
    theirs, ours = Biased(True), Biased(False)
    biased = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype),
        dict(shapes_of(theirs, x, train=False)),
    )
    torch_state, shapes = to_torch(biased), shapes_of(ours, x, train=False)
    proposed = propose_mapping(torch_state, shapes, trace(ours, x, train=False))
    with pytest.raises(TorchError, match=r"for Conv_0\.bias.*into the running mean"):
        from_torch(torch_state, shapes, proposed)
    mapping = {"Conv_{i}.bias": Layer("BatchNorm_{i}", subtract=True), "*": "*"}
    variables = from_torch(torch_state, shapes, mapping)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(ours.apply(variables, x, train=False), theirs.apply(biased, x, train=False))

    def train(net, variables):
        y, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, {**variables, **new}

    (y, new), (expected, new_biased) = train(ours, variables), train(theirs, biased)
    close(y, expected)
    close(ours.apply(new, x, train=False), theirs.apply(new_biased, x, train=False))
    back = from_torch(to_torch(new, mapping), biased)
    close(theirs.apply(back, x, train=False), ours.apply(new, x, train=False))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 2, rngs=rngs) for _ in range(1)])

    def __call__(self, x):
        return self.layers[0](self.bn(self.conv(x)).mean((1, 2)))


def test_nnx():
    net, rng = NnxNet(nnx.Rngs(0)), np.random.default_rng(0)
    s = {k: v for k, v in state("trained").items() if k.startswith(("0.", "1."))}
    s["fc.weight"] = rng.normal(size=(2, 6)).astype(np.float32)
    s["fc.bias"] = rng.normal(size=2).astype(np.float32)
    kept = nnx.state(net)
    mapping = {"0": "conv", "1": "bn", "fc": "layers/0"}
    variables = nnx.to_pure_dict(kept)
    assert propose_mapping(s, variables) == mapping
    nnx.replace_by_pure_dict(kept, from_torch(s, variables, mapping))
    nnx.update(net, kept)

    x = np.pad(golden()["x"][0], [(0, 0)] * 2 + [(1, 1)] * 2)
    y = torch_convolution(x, s["0.weight"]).mean((2, 3))
    y = (y - s["1.running_mean"]) / np.sqrt(s["1.running_var"] + 1e-5)
    y = (y * s["1.weight"] + s["1.bias"]) @ s["fc.weight"].T + s["fc.bias"]
    np.testing.assert_allclose(net(images(0)), y, rtol=1e-5, atol=1e-5)
    variables = nnx.to_pure_dict(nnx.state(net))
    assert_states_equal(to_torch(variables, mapping, num_batches_tracked=6), s, 0)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_dtype_is_that_of_the_model(dtype):
    shapes = shapes_of(nn.Dense(1), jnp.ones((1, 2)))
    torch_state = {"weight": np.array([[1.5, 2]], dtype), "bias": np.array([3], dtype)}
    params = from_torch(torch_state, shapes)["params"]
    assert params["kernel"].dtype == jnp.float32
    assert params["kernel"].tolist() == [[1.5], [2.0]]


def test_options_both_ways():
    assert batch_norm_options(0.1, 1e-3, affine=False) == {
        "momentum": 0.9,
        "epsilon": 1e-3,
        "unbiased": True,
        "use_scale": False,
        "use_bias": False,
    }
    assert torch_batch_norm_options(0.9, 1e-3) == {"momentum": 0.1, "eps": 1e-3}
    assert torch_batch_norm_options() == {"momentum": 0.01, "eps": 1e-5}
    with pytest.raises(TorchError, match=r"momentum=None.*AveragedBatchNorm"):
        batch_norm_options(None)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def norm(name, features):
    leaves = ("weight", "bias", "running_mean", "running_var")
    state = {f"{name}.{leaf}": shape(features) for leaf in leaves}
    return state | {f"{name}.num_batches_tracked": shape()}


def torchvision(blocks, bottleneck, classes=1000):
    """Names and shapes of a residual network, in torchvision's order."""
    state = {"conv1.weight": shape(64, 3, 7, 7)} | norm("bn1", 64)
    channels = 64
    for stage, (count, width) in enumerate(
        zip(blocks, (64, 128, 256, 512), strict=True), start=1
    ):
        wide = 4 * width if bottleneck else width
        for block in range(count):
            at = f"layer{stage}.{block}"
            sizes = [(width, channels, 3), (width, width, 3)]
            if bottleneck:
                sizes = [(width, channels, 1), (width, width, 3), (wide, width, 1)]
            for i, (out, ins, k) in enumerate(sizes, start=1):
                state |= {f"{at}.conv{i}.weight": shape(out, ins, k, k)}
                state |= norm(f"{at}.bn{i}", out)
            if block == 0 and (stage > 1 or bottleneck):
                state |= {f"{at}.downsample.0.weight": shape(wide, channels, 1, 1)}
                state |= norm(f"{at}.downsample.1", wide)
            channels = wide
    return state | {"fc.weight": shape(classes, channels), "fc.bias": shape(classes)}


def ours_in_resnet(name):
    """The path of torchvision's name in our network, written by hand."""
    *layer, leaf = name.split(".")
    if layer == ["fc"]:
        return f"params/logits/{'kernel' if leaf == 'weight' else 'bias'}"
    block = ""
    if layer[0].startswith("layer"):
        block = f"stage{layer[0][-1]}_block{int(layer[1]) + 1}/"
        layer = layer[2:]
    shortcut = layer[0] == "downsample"
    is_norm = layer == ["downsample", "1"] or layer[0].startswith("bn")
    part = "projection" if shortcut else f"conv{layer[0][-1]}"
    if not is_norm:
        return f"params/{block}{part}/conv/kernel"
    collection = "batch_stats" if leaf.startswith("running") else "params"
    leaves = {"weight": "scale", "bias": "bias"}
    return f"{collection}/{block}{part}/bn/{leaves.get(leaf, leaf[8:])}"


RESNETS = {
    18: (torchvision((2, 2, 2, 2), False), 11_689_512),
    34: (torchvision((3, 4, 6, 3), False), 21_797_672),
    50: (torchvision((3, 4, 6, 3), True), 25_557_032),
    101: (torchvision((3, 4, 23, 3), True), 44_549_160),
    152: (torchvision((3, 8, 36, 3), True), 60_192_808),
}


@functools.cache
def traced(name, **options):
    net, x = models.create(name, **options), shape(1, 224, 224, 3)
    return shapes_of(net, x, train=False), trace(net, x, train=False)


def paths_of(pairs):
    return {pair.name: str(pair.leaf) for pair in pairs}


SLOW = [pytest.param(depth, marks=pytest.mark.slow) for depth in (34, 101, 152)]


@pytest.mark.parametrize("depth", [18, 50, *SLOW])
def test_residual_networks_of_torchvision_and_timm(depth):
    (state, parameters), (shapes, _) = RESNETS[depth], traced(f"resnet{depth}")
    expected = {n: ours_in_resnet(n) for n in state if "num_batches" not in n}
    pairs = pair_arrays(state, shapes, RESNET)
    assert paths_of(pairs) == expected
    sizes = [np.prod(p.torch_shape) for p in pairs if "running" not in p.name]
    assert sum(sizes) == parameters
    assert known_mapping(f"resnet{depth}") is RESNET


@pytest.mark.slow
def test_the_names_of_the_other_networks_are_ours():
    for name, x in [("mlp", (32, 32, 3)), ("lenet", (28, 28, 1))]:
        net, images = models.create(name), jnp.zeros((2, *x))
        variables = net.init(jax.random.key(0), images, train=False)
        torch_state = to_torch(variables, known_mapping(name, x))
        back = from_torch(torch_state, variables, known_mapping(name, x))
        jax.tree.map(np.testing.assert_array_equal, back, variables)
        first = {"mlp": "dense_0.weight", "lenet": "dense1.weight"}[name]
        layer = first.removesuffix(".weight")
        kernel = np.asarray(variables["params"][layer]["kernel"])
        c = x[2] if name == "mlp" else 16
        pixels = kernel.reshape(-1, c, kernel.shape[1])
        expected = pixels.transpose(2, 1, 0).reshape(kernel.shape[::-1])
        np.testing.assert_array_equal(torch_state[first], expected)
    shapes, _ = traced("inception", width=0.125)
    state = {"logits.weight": shape(1000, 128), "logits.bias": shape(1000)}
    kept = [name for name in shapes["params"] if name != "logits"]
    pairs = pair_arrays(state, shapes, known_mapping("inception"), keep=kept)
    assert paths_of(pairs)["logits.weight"] == "params/logits/kernel"
    assert known_mapping("my.nets:make") is None


@pytest.mark.parametrize("alphabetical", [False, True])
@pytest.mark.parametrize("with_calls", [False, True])
def test_resnet50_is_proposed_as_it_is(alphabetical, with_calls):
    state, (shapes, called) = RESNETS[50][0], traced("resnet50")
    if alphabetical:
        state = {name: state[name] for name in sorted(state)}
    proposed = propose_mapping(state, shapes, called if with_calls else ())
    pairs = pair_arrays(state, shapes, proposed)
    assert len(pairs) == 267
    assert all(str(pair.leaf) == ours_in_resnet(pair.name) for pair in pairs)
    by_order = alike(proposed, shapes)
    assert "fc" not in by_order
    assert "layer1.0.conv3" in by_order


def test_another_number_of_classes():
    (shapes, _), state = traced("resnet50"), torchvision((3, 4, 6, 3), True, 10)
    with pytest.raises(TorchError) as error:
        pair_arrays(state, shapes, RESNET)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "fc.weight (10, 2048) for params/logits/kernel, which needs (1000, 2048)",
        "fc.bias (10,) for params/logits/bias, which needs (1000,)",
    ]
    mapping = {"fc": None, **{k: v for k, v in RESNET.items() if k != "fc"}}
    assert len(pair_arrays(state, shapes, mapping, keep=["logits"])) == 265


@pytest.mark.slow
def test_the_order_of_calls_tells_layers_alike():
    # Module 3a has 1x1, reduce 3x3 and reduce double 3x3 of equal shapes, which in the
    # order of their names are others.
    shapes, called = traced("inception", width=0.125)
    names = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1")
    sizes = ((8, 24, 1), (8, 24, 1), (8, 8, 3), (8, 24, 1), (12, 8, 3))
    state = {
        f"inception_3a_{name}.weight": shape(out, ins, k, k)
        for name, (out, ins, k) in zip(names, sizes, strict=True)
    }
    paths = ("conv_1x1", "reduce_3x3", "conv_3x3", "reduce_double", "double_3x3_a")
    module = {p: {"conv": shapes["params"]["module_3a"][p]["conv"]} for p in paths}
    proposed = propose_mapping(state, {"params": {"module_3a": module}}, called)
    assert list(proposed.values()) == [f"module_3a/{path}/conv" for path in paths]


def variables_of(**shapes):
    """Variables whose layers have one kernel each."""
    return {"params": {name: {"kernel": shape(*s)} for name, s in shapes.items()}}


def test_numbers_in_names_count_as_numbers():
    state = {f"fc.{i}.weight": shape(4, 4) for i in range(12)}
    state = {name: state[name] for name in sorted(state)}
    variables = variables_of(**{f"dense_{i}": (4, 4) for i in range(12)})
    proposed = propose_mapping(state, jax.tree.map(lambda leaf: leaf, variables))
    assert proposed == {f"fc.{i}": f"dense_{i}" for i in range(12)}
    mapping = {"fc.{i}": "dense_{i}"}
    assert paths_of(pair_arrays(state, variables, mapping)) == {
        f"fc.{i}.weight": f"params/dense_{i}/kernel" for i in range(12)
    }


def test_what_is_known_of_a_proposal():
    state = {f"{name}.weight": shape(4, 4) for name in ("head", "body.0", "body.1")}
    variables = variables_of(a=(4, 4), b=(4, 4), c=(4, 4))
    assert propose_mapping(state, variables)["head"] == "a"
    expected = {"head": "c", "body.0": "a", "body.1": "b"}
    assert propose_mapping(state, variables, (), {"head": "c"}) == expected
    known = {"head": "b", "body.0": "c"}
    assert propose_mapping(state, variables, (), known)["body.1"] == "a"


@pytest.mark.parametrize(
    ("mapping", "keep", "message"),
    [
        ({"hea": None, "*": "*"}, [], "no tensor or layer is 'hea'.* mean 'head'"),
        ({"head": "d"}, [], r"place for head\.weight \(4, 4\): the network has no 'd'"),
        ({"*": "a"}, [], r"head\.weight and body\.weight are both for params/a/kernel"),
        ({"head": "a{i}"}, [], r"have different fields; expected \{i\} in both"),
        ({"{i}.{i}": "a{i}"}, [], "has a field twice"),
        ({"head": "a"}, ["params/z"], "keep: there is no 'params/z'"),
        ({"*": "*"}, ["parms/a"], "keep: there is no 'parms/a'"),
        ({"head": "a", "body": "b"}, ["a"], "head.weight .*a/kernel keeps its value"),
        ({"head": Layer("a", channels=3)}, [], "4 rows, which is no multiple of 3"),
    ],
)
def test_mappings_that_do_not_fit(mapping, keep, message):
    state = {"head.weight": shape(4, 4), "body.weight": shape(4, 4)}
    with pytest.raises(TorchError, match=message):
        pair_arrays(state, variables_of(a=(4, 4), b=(4, 4)), mapping, keep=keep)


ADVICE = (
    ". If only a normalization follows it, '0.bias': Layer(<its path>, subtract=True) "
    "in the mapping moves it into the running mean"
)


def test_everything_that_does_not_fit_is_named():
    state = {
        "0.weight": shape(8, 3, 3, 3),
        "0.bias": shape(8),
        "1.weight": shape(9, 8),
        "extra.weight": shape(2, 2, 2),
        "token": shape(1, 1, 7),
    }
    variables = variables_of(conv=(3, 3, 3, 8), dense=(8, 4), other=(1, 1, 1, 5, 6))
    with pytest.raises(TorchError) as error:
        pair_arrays(state, variables, {"0": "conv", "1": "dense"})
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "no place for 0.bias (8,): the Flax layer conv has no bias" + ADVICE,
        "1.weight (9, 8) for params/dense/kernel, which needs (4, 8)",
        "no place for extra.weight (2, 2, 2): the network has no 'extra/weight'.",
        "no place for token (1, 1, 7): the network has no 'token'.",
        "nothing for params/other/kernel, which needs (6, 5, 1, 1, 1)",
    ]
    with pytest.raises(TorchError, match="state dict is empty"):
        from_torch({}, variables)
    many = {f"{i}.weight": shape(1, 1) for i in range(60)}
    with pytest.raises(TorchError, match=r"\n  and 21 more\nBuild"):
        from_torch(many, variables_of(a=(4, 4)))
    with pytest.raises(TorchError, match="params/a/kernel has no name"):
        to_torch(variables_of(a=(4, 4)), {"b": "b"})


def test_what_is_not_floating_is_refused_and_nothing_changed():
    shapes = shapes_of(nn.Dense(3), jnp.ones((1, 2)))
    good = {"fc.weight": np.ones((3, 2)), "fc.bias": np.ones(3)}
    variables = from_torch(good, shapes, {"fc": ""})
    before = jax.tree.map(np.array, variables)
    bad = {**good, "fc.bias": np.ones(3, np.int8)}
    with pytest.raises(TorchError, match=r"fc\.bias is int8, not floating"):
        from_torch(bad, variables, {"fc": ""})
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_a_norm_without_running_statistics_is_not_taken_for_one_with():
    variables = {
        "params": {"scale": jnp.zeros(3), "bias": jnp.zeros(3)},
        "batch_stats": {"mean": jnp.zeros(3), "var": jnp.ones(3)},
    }
    torch_state = {"bn.weight": np.full(3, 2.0), "bn.bias": np.ones(3)}
    with pytest.raises(TorchError, match="nothing for batch_stats/mean"):
        from_torch(torch_state, variables, {"bn": ""})
    found = from_torch(torch_state, variables, {"bn": ""}, keep=["batch_stats"])
    assert found["params"]["scale"].tolist() == [2, 2, 2]
    assert found["batch_stats"]["var"].tolist() == [1, 1, 1]


def test_what_is_flattened_has_to_be_told():
    state = {
        "0.weight": shape(6, 1, 3, 3),
        "1.weight": shape(4, 6, 3, 3),
        "2.weight": shape(5, 20),
        "3.weight": shape(2, 5),
    }
    variables = variables_of(
        conv1=(3, 3, 1, 6), conv2=(3, 3, 6, 4), dense1=(20, 5), dense2=(5, 2)
    )
    mapping = propose_mapping(state, variables)
    assert mapping == {"0": "conv1", "1": "conv2", "2": "dense1", "3": "dense2"}
    with pytest.raises(TorchError, match=r"dense1/kernel has 20 rows.*'2': Layer\('de"):
        pair_arrays(state, variables, mapping)
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape), variables)
    with pytest.raises(TorchError, match=r"dense1/kernel has 20 rows"):
        to_torch(arrays, mapping)
    weight = np.arange(100).reshape(5, 20)
    for channels in (1, 2, 4):
        told = {**mapping, "2": Layer("dense1", channels=channels)}
        [pair] = [p for p in pair_arrays(state, variables, told) if p.name[0] == "2"]
        rows = np.arange(20).reshape(channels, -1).T.ravel()
        np.testing.assert_array_equal(pair.from_torch(weight), weight.T[rows])
        np.testing.assert_array_equal(pair.to_torch(weight.T[rows]), weight)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        maps = nn.Conv(4, (3, 3))(x)
        pooled = nn.Dense(8, name="pooled")(maps.mean((1, 2)))
        pooled = nn.Dense(8, name="second")(pooled)
        flat = nn.Conv(2, (3, 3))(maps)
        return pooled, nn.Dense(8, name="flat")(flat.reshape(len(x), -1))


def test_the_trace_knows_which_layer_is_flattened_to():
    def channels(net, x, **options):
        layers = trace(net, x, **options)
        return {layer.path: layer.channels for layer in layers if layer.channels}

    assert channels(TwoHeads(), jnp.ones((1, 6, 6, 3))) == {"pooled": 1, "flat": 2}
    mlp = functools.partial(channels, models.MLP(), train=False)
    assert mlp(jnp.ones((1, 6, 6, 3))) == {"dense_0": 3}
    assert mlp(jnp.ones((1, 6, 6, 1))) == {"dense_0": 1}
    assert mlp(jnp.ones((1, 6, 6))) == {}
