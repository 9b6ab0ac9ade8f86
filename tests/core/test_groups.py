"""Virtual batches: each group is what `normalize_batch` makes of it alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests import cases

CASES = [
    cases.Case("mlp", (12, 5)),
    cases.Case("images", (12, 3, 2, 4), mean=30.0),
    cases.Case("channels first", (12, 4, 3, 2), axis=1),
    cases.Case("two feature axes", (12, 3, 4), axis=(1, 2)),
    cases.Case("masked", (12, 3, 2, 4), mask="examples"),
    cases.Case("weighted", (12, 3, 4), mask="weights"),
    cases.Case("one row masked", (12, 6, 4), mask="one row"),
]
GROUPS = [(2, None, False), (12, None, True), (3, "relu", False), (6, "residual", True)]


def given(case, dtype):
    mask = None
    if case.mask == "one row":
        case, mask = cases.Case(case.name, case.shape), np.arange(6)[:, None] < 4
        mask = mask[None]
    x, scale, bias, dy, own = case.arrays(dtype)
    # Groups of unlike means.
    x = x + np.arange(12).reshape(-1, *[1] * (x.ndim - 1)).astype(dtype) // 2
    return x, scale, bias, dy, own if mask is None else mask


def parts(function, size, *arrays):
    """Apply a function to each group, and put what it returns one after another."""
    found = []
    for start in range(0, 12, size):
        rows = (
            a if a is None or len(a) == 1 else a[start : start + size] for a in arrays
        )
        found.append(function(*rows))
    return found


@pytest.mark.parametrize(("size", "inside", "known"), GROUPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_group_is_normalized_by_itself(case, size, inside, known, x64):
    x, scale, bias, dy, mask = given(case, np.float64)
    residual = 0.5 * np.sin(x) if inside == "residual" else None
    options = {"axis": case.axis, "activation": inside and "relu"}
    if known:
        options["origin"] = jnp.asarray(bias) * 0 + 20.0

    def loss(x, scale, bias, residual, mask, dy, **more):
        y, batch = bnjax.normalize_batch(
            x, scale, bias, mask=mask, residual=residual, **options, **more
        )
        # The moments have a gradient too.
        extra = jnp.sum(batch.mean**2) + jnp.sum(jnp.sin(batch.var))
        return jnp.sum(y * dy) + extra, (y, batch)

    over = (0, 1, 2, 3) if residual is not None else (0, 1, 2)
    slope = jax.value_and_grad(loss, over, has_aux=True)
    whole = jax.jit(functools.partial(slope, virtual_batch_size=size))
    (_, (y, batch)), (dx, dscale, dbias, *dres) = whole(
        x, scale, bias, residual, mask, dy
    )
    alone = parts(
        lambda x, r, m, dy: slope(x, scale, bias, r, m, dy),
        *(size, x, residual, mask, dy),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(y, np.concatenate([one[0][1][0] for one in alone]))
    for name in ("mean", "var", "count"):
        close(
            getattr(batch, name), np.stack([getattr(o[0][1][1], name) for o in alone])
        )
    close(dx, np.concatenate([one[1][0] for one in alone]))
    close(dscale, sum(one[1][1] for one in alone))
    close(dbias, sum(one[1][2] for one in alone))
    if dres:
        close(dres[0], np.concatenate([one[1][3] for one in alone]))


def test_forward_mode_and_curvature(x64):
    x, scale, bias, dy, _ = given(CASES[1], np.float64)

    def whole(x):
        y, _ = bnjax.normalize_batch(x, scale, bias, virtual_batch_size=4)
        return jnp.sum(jnp.tanh(y) * dy)

    def alone(x):
        ys = parts(lambda x: bnjax.normalize_batch(x, scale, bias)[0], 4, x)
        return jnp.sum(jnp.tanh(jnp.concatenate(ys)) * dy)

    tangent = np.cos(x)
    for function in (
        lambda f: jax.jvp(f, (x,), (tangent,))[1],
        lambda f: jax.jvp(jax.grad(f), (x,), (tangent,))[1],
        lambda f: jax.vmap(jax.grad(f))(jnp.stack([x, x + 1])),
        lambda f: jax.grad(jax.checkpoint(f, policy=bnjax.checkpoint_policy))(x),
    ):
        np.testing.assert_allclose(function(whole), function(alone), 1e-8, 1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_that_of_each_group(dtype):
    x, scale, bias, dy, _ = given(CASES[1], np.float32)
    x, dy = jnp.asarray(x, dtype), jnp.asarray(dy, dtype)

    def run(x, dy, **more):
        y, pull = jax.vjp(lambda x: bnjax.normalize_batch(x, scale, bias, **more)[0], x)
        return y, pull(dy)[0]

    y, dx = run(x, dy, virtual_batch_size=4)
    wanted = parts(run, 4, x, dy)
    for found, each in ((y, 0), (dx, 1)):
        assert found.dtype == dtype
        expected = np.concatenate([np.float32(one[each]) for one in wanted])
        np.testing.assert_allclose(np.float32(found), expected, rtol=0.02, atol=0.02)


def test_devices_share_groups():
    x, scale, bias, dy, _ = given(CASES[1], np.float32)
    cut = lambda a: jnp.asarray(a).reshape(2, 6, *a.shape[1:])  # noqa: E731

    def run(x, dy):
        def output(x):
            return bnjax.normalize_batch(
                x, scale, bias, axis_name="data", virtual_batch_size=3
            )

        (y, batch), pull = jax.vjp(output, x)
        return y, batch, pull((dy, jax.tree.map(jnp.zeros_like, batch)))[0]

    y, batch, dx = jax.vmap(run, axis_name="data")(cut(x), cut(dy))
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)

        def alone(x):
            return bnjax.normalize_batch(x, scale, bias)

        both = jnp.concatenate(list(cut(x)[:, rows]))
        (want, moments), pull = jax.vjp(alone, both)
        zeros = jax.tree.map(jnp.zeros_like, moments)
        (dwant,) = pull((jnp.concatenate(list(cut(dy)[:, rows])), zeros))
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        close(jnp.concatenate(list(y[:, rows])), want)
        close(jnp.concatenate(list(dx[:, rows])), dwant)
        for name in ("mean", "var", "count"):
            close(getattr(batch, name)[0, group], getattr(moments, name))


def test_groups_that_cannot_be():
    x = jnp.ones((12, 3))
    with pytest.raises(ValueError, match="virtual_batch_size=5 for a batch of 12"):
        bnjax.normalize_batch(x, virtual_batch_size=5)
    with pytest.raises(ValueError, match="first axis of x a feature axis"):
        bnjax.normalize_batch(x, axis=0, virtual_batch_size=3)
    with pytest.raises(ValueError, match="one value per channel in training"):
        bnjax.normalize_batch(x, virtual_batch_size=1)
