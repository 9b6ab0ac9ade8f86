"""Which layer of a PyTorch model is which of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bnjax import models
from bnjax.interop.torch import match, torch_names, trace
from bnjax.interop.torch_files import TorchError


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def norm(name, features):
    leaves = ("weight", "bias", "running_mean", "running_var")
    state = {f"{name}.{leaf}": shape(features) for leaf in leaves}
    return state | {f"{name}.num_batches_tracked": shape()}


def torchvision_resnet50(classes=1000):
    """Names and shapes as torchvision defines them, in its order."""
    state = {"conv1.weight": shape(64, 3, 7, 7)} | norm("bn1", 64)
    channels = 64
    for stage, (blocks, width) in enumerate(
        zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), start=1
    ):
        for block in range(blocks):
            at, wide = f"layer{stage}.{block}", 4 * width
            state |= {f"{at}.conv1.weight": shape(width, channels, 1, 1)}
            state |= norm(f"{at}.bn1", width)
            state |= {f"{at}.conv2.weight": shape(width, width, 3, 3)}
            state |= norm(f"{at}.bn2", width)
            state |= {f"{at}.conv3.weight": shape(wide, width, 1, 1)}
            state |= norm(f"{at}.bn3", wide)
            if block == 0:
                state |= {f"{at}.downsample.0.weight": shape(wide, channels, 1, 1)}
                state |= norm(f"{at}.downsample.1", wide)
            channels = wide
    return state | {"fc.weight": shape(classes, 2048), "fc.bias": shape(classes)}


def ours_in_resnet50(name):
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


@pytest.fixture(scope="module")
def resnet50():
    net, x = models.create("resnet50"), shape(1, 224, 224, 3)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda x: net.init(key, x, train=False), x)
    return shapes, trace(net, x, train=False)


@pytest.mark.parametrize("alphabetical", [False, True])
@pytest.mark.parametrize("traced", [False, True])
def test_torchvisions_resnet50(resnet50, alphabetical, traced):
    shapes, calls = resnet50
    state = torchvision_resnet50()
    if alphabetical:
        state = {name: state[name] for name in sorted(state)}
    mapping = match(state, shapes, calls=calls if traced else None)
    found = {pair.name: pair.path for pair in mapping.pairs}
    expected = {n: ours_in_resnet50(n) for n in state if "num_batches" not in n}
    assert len(found) == 267
    assert found == expected
    assert len(mapping.counters) == 53
    by = {pair.name: pair.by for pair in mapping.pairs}
    assert by["fc.weight"] == "shape"
    assert by["layer1.0.conv3.weight"] == "order"


def test_another_number_of_classes(resnet50):
    shapes, calls = resnet50
    state = torchvision_resnet50(classes=10)
    with pytest.raises(TorchError) as error:
        match(state, shapes, calls=calls)
    lines = str(error.value).splitlines()[1:-1]
    assert sorted(line.strip() for line in lines) == [
        "fc.bias (10,) for params/logits/bias, which needs (1000,)",
        "fc.weight (10, 2048) for params/logits/kernel, which needs (1000, 2048)",
    ]
    mapping = match(state, shapes, calls=calls, ignore=["fc"], keep=["logits"])
    assert set(mapping.ignored) == {"fc.weight", "fc.bias"}
    assert set(mapping.kept) == {"params/logits/kernel", "params/logits/bias"}
    assert len(mapping.pairs) == 265
    assert "fc.bias" in str(mapping)


def test_the_order_of_calls_tells_layers_alike():
    # Module 3a has 1x1, reduce 3x3 and reduce double 3x3 of equal shapes, which in the
    # order of their names are others.
    net, x = models.create("inception", width=0.125), shape(1, 224, 224, 3)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda x: net.init(key, x, train=False), x)
    names = ("1x1", "3x3_reduce", "3x3", "double_3x3_reduce", "double_3x3_1")
    sizes = ((8, 24, 1), (8, 24, 1), (8, 8, 3), (8, 24, 1), (12, 8, 3))
    state = {
        f"inception_3a_{name}.weight": shape(out, ins, k, k)
        for name, (out, ins, k) in zip(names, sizes, strict=True)
    }
    paths = ("conv_1x1", "reduce_3x3", "conv_3x3", "reduce_double", "double_3x3_a")
    params = shapes["params"]["module_3a"]
    variables = {
        "params": {"module_3a": {p: {"conv": params[p]["conv"]} for p in paths}}
    }
    mapping = match(state, variables, calls=trace(net, x, train=False))
    found = [pair.path for pair in mapping.pairs]
    assert found == [f"params/module_3a/{path}/conv/kernel" for path in paths]


def variables_of(**shapes):
    """Variables whose layers have one kernel each."""
    return {"params": {name: {"kernel": shape(*s)} for name, s in shapes.items()}}


def paths(mapping):
    return {pair.name: pair.path.split("/")[1] for pair in mapping.pairs}


def test_numbers_in_names_count_as_numbers():
    state = {f"fc.{i}.weight": shape(4, 4) for i in range(12)}
    state = {name: state[name] for name in sorted(state)}
    variables = variables_of(**{f"dense_{i}": (4, 4) for i in range(12)})
    mapping = match(state, jax.tree.map(lambda leaf: leaf, variables))
    assert paths(mapping) == {f"fc.{i}.weight": f"dense_{i}" for i in range(12)}


def test_names_given():
    state = {f"{name}.weight": shape(4, 4) for name in ("head", "body.0", "body.1")}
    variables = variables_of(a=(4, 4), b=(4, 4), c=(4, 4))
    assert paths(match(state, variables))["head.weight"] == "a"
    mapping = match(state, variables, names={"head": "c"})
    assert paths(mapping) == {
        "head.weight": "c",
        "body.0.weight": "a",
        "body.1.weight": "b",
    }
    assert {pair.name: pair.by for pair in mapping.pairs}["head.weight"] == "given"
    mapping = match(state, variables, names={"head": "b", "body.0": "c"})
    assert paths(mapping)["body.1.weight"] == "a"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": {"haed": "a"}}, "names: there is no 'haed'. Did you mean 'head'"),
        ({"names": {"head": "d"}}, "names: there is no 'd'. .*one of: a, b"),
        ({"ignore": ["hea"]}, "ignore: there is no 'hea'. Did you mean 'head'"),
        ({"keep": ["params/z"]}, "keep: there is no 'params/z'"),
        ({"channels": {"z": 2}}, "channels: there is no 'z'"),
    ],
)
def test_unknown_names(options, message):
    state = {"head.weight": shape(4, 4), "body.weight": shape(4, 4)}
    with pytest.raises(ValueError, match=message):
        match(state, variables_of(a=(4, 4), b=(4, 4)), **options)


ADVICE = (
    ". Where a normalization follows it, calls=trace(model, images, train=False) takes "
    "it into the mean"
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
        match(state, variables, channels={"dense": None})
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "1.weight (9, 8) for params/dense/kernel, which needs (4, 8)",
        "nothing for params/other/kernel, which needs (6, 5, 1, 1, 1)",
        "no place for 0.bias (8,): our layer has no bias" + ADVICE,
        "no place for extra.weight (2, 2, 2)",
        "no place for token (1, 1, 7)",
    ]
    with pytest.raises(ValueError, match="state dict is empty"):
        match({}, variables)


def test_too_few_layers_alike():
    variables = variables_of(a=(4, 4), b=(4, 4))
    with pytest.raises(ValueError, match="nothing for params/b/kernel"):
        match({"fc.weight": shape(4, 4)}, variables)
    state = {f"fc{i}.weight": shape(4, 4) for i in range(3)}
    with pytest.raises(ValueError, match=r"no place for fc2\.weight"):
        match(state, variables)


def test_what_is_flattened_is_known_by_names_or_asked_for():
    state = {
        "0.weight": shape(6, 1, 3, 3),
        "1.weight": shape(4, 6, 3, 3),
        "2.weight": shape(5, 20),
        "3.weight": shape(2, 5),
    }
    variables = variables_of(
        conv1=(3, 3, 1, 6), conv2=(3, 3, 6, 4), dense1=(20, 5), dense2=(5, 2)
    )

    def layouts(**options):
        pairs = match(state, variables, **options).pairs
        return [pair.leaf.layout.channels for pair in pairs]

    assert layouts() == [None, None, 4, None]
    assert layouts(channels={"dense1": None}) == [None] * 4
    assert layouts(channels={"dense1": 2}) == [None, None, 2, None]
    with pytest.raises(
        ValueError, match="dense1 has 20 rows, which is no multiple of 3"
    ):
        layouts(channels={"dense1": 3})
    variables = variables_of(
        conv1=(3, 3, 1, 4), conv2=(3, 3, 4, 2), dense1=(20, 5), dense2=(5, 2)
    )
    with pytest.raises(ValueError, match=r"dense1 has 20 rows.*calls=trace"):
        match(state, variables)


class TwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x):
        maps = nn.Conv(4, (3, 3))(x)
        pooled = nn.Dense(8, name="pooled")(maps.mean((1, 2)))
        pooled = nn.Dense(8, name="second")(pooled)
        flat = nn.Conv(2, (3, 3))(maps)
        return pooled, nn.Dense(8, name="flat")(flat.reshape(len(x), -1))


def test_the_trace_knows_which_layer_is_flattened_to():
    calls = trace(TwoHeads(), jnp.ones((1, 6, 6, 3)))
    assert {c.path: c.channels for c in calls if c.channels} == {"flat": 2}
    calls = trace(models.MLP(), jnp.ones((1, 6, 6, 3)), train=False)
    assert {c.path: c.channels for c in calls if c.channels} == {"dense_0": 3}
    for x in (jnp.ones((1, 6, 6, 1)), jnp.ones((1, 6, 6))):
        assert not any(c.channels for c in trace(models.MLP(), x, train=False))


def test_our_own_names():
    net, x = models.LeNet(), shape(1, 28, 28, 1)
    key = jax.random.key(0)
    shapes = jax.eval_shape(lambda x: net.init(key, x, train=False), x)
    mapping = torch_names(shapes, calls=trace(net, x, train=False))
    found = {pair.name: pair.leaf.torch_shape for pair in mapping.pairs}
    assert found["conv2.conv.weight"] == (16, 6, 5, 5)
    assert found["dense1.weight"] == (120, 256)
    assert found["bn1.running_var"] == (120,)
    assert "bn1.num_batches_tracked" in mapping.counters
    row = next(line for line in str(mapping).splitlines() if "dense1.weight" in line)
    assert row.endswith("out,in -> in,out; flattened CHW -> HWC, C = 16  name")
