"""What would change a model without having been asked for is refused."""

import functools

import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.linen
import bnjax.nnx
from bnjax.convert import ToBatchNorm, ToFrozen, ToGroupNorm, convert
from tests.convert.models import (
    SAME,
    Two,
    assert_close,
    assert_equal,
    images,
    layers_of,
    made,
    two,
    update,
)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            "bn2",
            ValueError,
            r"layers='bn2' matches no layer. Did you mean 'bn1'\?.*bn0, bn1",
        ),
        (["bn0", "x/*"], ValueError, r"layers='x/\*' matches no layer"),
        (lambda name, layer: False, ValueError, "that returns True for no layer"),
        ([], TypeError, r"layers=\(\)"),
        ([3], TypeError, r"layers=\(3,\)"),
    ],
)
def test_layers_that_are_not_there_are_refused(api, layers, error, message):
    _, converted, x, given = two(api)
    with pytest.raises(error, match=message):
        converted(ToBatchNorm(), x, layers=layers, **given)


class NnxWithRelu(nnx.BatchNorm):
    def __call__(self, x, use_running_average=None):
        return nnx.relu(super().__call__(x, use_running_average))


class NnxWithDefaults(nnx.BatchNorm):
    def __init__(self, features, rngs, momentum=0.7):
        super().__init__(features, momentum=momentum, rngs=rngs)


class LinenWithRelu(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None):
        return nn.relu(super().__call__(x, use_running_average))


class LinenWithDefaults(nn.BatchNorm):
    momentum: float = 0.7


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_another_function_is_refused_unless_it_is_asked_for(api):
    _, converted, x, given = two(api)
    with pytest.raises(ValueError, match=r"the output changes by .* check epsilon"):
        converted(ToBatchNorm(epsilon=0.1), x, **given)
    with pytest.raises(ValueError, match="the output changes by"):
        converted(ToBatchNorm(epsilon=2e-5), x, tolerance=1e-7, **given)
    converted(ToBatchNorm(epsilon=0.1), x, tolerance=0.5, **given)
    new = converted(ToBatchNorm(epsilon=0.1), x, may_change=True, **given)
    if api == "nnx":
        assert {layer.epsilon for layer in layers_of(new).values()} == {0.1}
        return
    stats, params = (given["variables"][c] for c in ("batch_stats", "params"))
    y = x
    for name in ("bn0", "bn1"):
        y = bnjax.normalize(y, **stats[name], **params[name], epsilon=0.1)
    assert_close(new[0].apply(given["variables"], x), jnp.tanh(y))


@pytest.mark.parametrize(
    ("api", "kind"), [("nnx", NnxWithRelu), ("linen", LinenWithRelu)]
)
@pytest.mark.parametrize("to", [*SAME.values(), ToGroupNorm(2)])
def test_an_activation_in_a_class_of_its_own_is_not_lost(api, kind, to):
    _, converted, x, given = two(api, kind)
    message = f"layer bn0 is a .*{kind.__name__}; the work of {kind.__name__}.__call__"
    with pytest.raises(ValueError, match=message):
        converted(to, x, may_change=True, **given)


@pytest.mark.parametrize(
    ("api", "kind"), [("nnx", NnxWithDefaults), ("linen", LinenWithDefaults)]
)
def test_a_class_with_other_defaults_is_exchanged(api, kind):
    model, converted, x, given = two(api, kind)
    new = converted(ToBatchNorm(), x, layers="bn0", **given)
    if api == "nnx":
        assert type(new.bn0) is bnjax.nnx.BatchNorm
        assert new.bn0.momentum == 0.7
        return
    variables = given["variables"]
    assert_close(
        update(new[0], variables, x, train=True),
        update(model, variables, x, train=True),
    )


class Ours(bnjax.nnx.BatchNorm):
    def __call__(self, x, *args, **kwargs):
        return 2 * super().__call__(x, *args, **kwargs)


def test_a_class_derived_from_ours_is_kept():
    model, converted, x, _ = two("nnx", Ours)
    new = converted(ToBatchNorm(axis_name="data"), x)
    assert type(new.bn0) is Ours
    assert new.bn0.axis_name == "data"
    with pytest.raises(ValueError, match=r"work of Ours.__call__, .* would be lost"):
        converted(ToFrozen(), x)
    own = converted(ToBatchNorm(use_running_average=False), x)
    assert isinstance(own.bn0, Ours)
    assert_close(own(x), nnx.clone(model)(x))


def test_outputs_that_prove_nothing_are_refused():
    for api in ("nnx", "linen"):
        _, converted, x, given = two(api)
        with pytest.raises(ValueError, match="the output is not finite before"):
            converted(ToBatchNorm(), x.at[0, 0].set(jnp.nan), **given)
    model = Two(nnx.Rngs(0))
    for layer in layers_of(model).values():
        layer.scale[...] = jnp.zeros(4)
    with pytest.raises(ValueError, match="the outputs are 0 everywhere"):
        convert(model, ToBatchNorm(), x)


def test_what_is_given_is_checked():
    model, converted, x, given = two("linen")
    variables = given["variables"]
    with pytest.raises(TypeError, match="variables is of type NoneType"):
        converted(ToBatchNorm(), x)
    with pytest.raises(TypeError, match="no inputs"):
        converted(ToBatchNorm(), **given)
    with pytest.raises(TypeError, match="to='frozen'; expected a ToBatchNorm"):
        converted("frozen", x, **given)
    with pytest.raises(TypeError, match="model is of type function"):
        convert(lambda x: x, ToBatchNorm(), x)
    with pytest.raises(TypeError, match=r"variables was given with an nnx.Module"):
        convert(Two(nnx.Rngs(0)), ToBatchNorm(), x, variables={})
    with pytest.raises(ValueError, match="LinenTwo is bound to variables"):
        convert(model.bind(variables), ToBatchNorm(), x, **given)
    with pytest.raises(ValueError, match="calls no batch norm layer"):
        convert(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), ToBatchNorm(), x)
    with pytest.raises(ValueError, match=r"axis_index_groups=.* without axis_name"):
        ToBatchNorm(axis_index_groups=((0, 1),))
    with pytest.raises(ValueError, match="momentum=2"):
        ToBatchNorm(momentum=2)
    with pytest.raises(ValueError, match="epsilon=0"):
        ToBatchNorm(epsilon=0)
    with pytest.raises(Exception, match="batch_stats") as caught:
        converted(ToBatchNorm(), x, train=True, **given)
    assert any("keywords of evaluation" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_what_cannot_be_group_norm_is_refused(api):
    _, converted, x, given = two(api)
    with pytest.raises(ValueError, match=r"changes the function.* may_change=True"):
        converted(ToGroupNorm(2), x, **given)
    with pytest.raises(ValueError, match=r"bn0 has 4 channels, num_groups=32.*as 4"):
        converted(ToGroupNorm(), x, may_change=True, **given)
    with pytest.raises(ValueError, match=r"group_size=3; expected a divisor.* as 1"):
        converted(ToGroupNorm(None, group_size=3), x, may_change=True, **given)
    for sizes in ((None, None), (2, 2), (0, None)):
        with pytest.raises(ValueError, match="expected one of the two"):
            ToGroupNorm(*sizes)
    kind = {"linen": nn.BatchNorm, "nnx": nnx.BatchNorm}[api]
    _, converted, x, given = two(api, functools.partial(kind, axis=(0,)))
    with pytest.raises(ValueError, match=r"layer bn0 has axis=\(0,\); expected -1"):
        converted(ToGroupNorm(2), x, may_change=True, **given)


def test_group_norm_needs_a_call_of_every_layer_and_no_mask():
    model, x = Branches(), images((6, 4))
    variables = made(model, x, both=True)
    given = {"variables": variables, "both": False, "may_change": True}
    with pytest.raises(ValueError, match="does not reach the layers bn1, whose"):
        convert(model, ToGroupNorm(2), x, **given)
    new, left = convert(model, ToGroupNorm(2), x, layers="bn0", **given)
    assert set(left["batch_stats"]) == {"bn1"}
    # What only another call reaches is exchanged in that call.
    given |= {"may_change": False}
    new, _ = convert(model, ToFrozen(), x, **given)
    _, stats = update(new, variables, x, both=True, train=True)
    assert_equal(stats, variables["batch_stats"])

    new = convert(Two(nnx.Rngs(0)), ToGroupNorm(2), x, may_change=True)
    with pytest.raises(ValueError, match=r"a mask was given.* GroupNorm"):
        new.bn0(x, mask=jnp.ones((6, 1), bool))
    # It has no statistics, whatever becomes of them.
    assert_equal(new.bn0(x, update_stats=True), new.bn0(x))


class Branches(nn.Module):
    """One of whose layers not every call reaches."""

    @nn.compact
    def __call__(self, x, both, train=False):
        y = nn.BatchNorm(use_running_average=not train, name="bn0")(x)
        if both:
            y = nn.BatchNorm(use_running_average=not train, name="bn1")(y)
        return y
