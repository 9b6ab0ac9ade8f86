"""Compact values against those written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.folding.program import (
    Constant,
    NotNumericError,
    is_rearrangement,
    rearrange,
    trace,
)


def compact_values(shape):
    rng = np.random.default_rng(0)
    for ones in itertools.product([False, True], repeat=len(shape)):
        sizes = [1 if one else size for one, size in zip(ones, shape, strict=True)]
        yield rng.normal(size=sizes).astype(np.float32)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.reshape(2, 12), (2, 3, 4)),
        (lambda x: x.reshape(6, 4), (2, 3, 4)),
        (lambda x: x.reshape(2, 3, 2, 2), (2, 3, 4)),
        (lambda x: x.reshape(3, 4), (4, 3)),
        (lambda x: x.reshape(1, 6, 1), (2, 1, 3)),
        (lambda x: x.transpose(2, 0, 1), (2, 3, 4)),
        (lambda x: jnp.squeeze(x, 1), (2, 1, 3)),
        (lambda x: x[:, None], (2, 3)),
        (lambda x: x[::-1], (2, 3)),
    ],
)
def test_rearrangements(function, shape):
    (equation,) = trace(function, jnp.zeros(shape)).equations
    assert is_rearrangement(equation)
    for value in compact_values(shape):
        wide = np.broadcast_to(value, shape)
        expected = np.asarray(function(jnp.asarray(wide)))
        found = rearrange(equation, value)
        np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
        back = rearrange(equation, found, undo=True)
        np.testing.assert_array_equal(np.broadcast_to(back, shape), wide)


def test_a_batch_of_unknown_size():
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, 2, 3), jnp.float32)
    (equation,) = trace(lambda x: x.reshape(batch, 6), x).equations
    value = np.arange(3.0).reshape(1, 1, 3)
    found = rearrange(equation, value)
    np.testing.assert_array_equal(found, [[0, 1, 2, 0, 1, 2]])
    (equation,) = trace(lambda x: x.reshape(2 * batch, 3), x).equations
    with pytest.raises(NotNumericError):
        rearrange(equation, np.arange(2.0).reshape(1, 2, 1))


def constant_of(function, *values):
    program = trace(function, *values)
    known = {
        atom: Constant(atom.aval, frozenset({i}), value)
        for i, (atom, value) in enumerate(zip(program.inputs, values, strict=True))
    }
    known |= {
        atom: Constant(atom.aval, known=v) for atom, v in program.literals.items()
    }
    for equation in program.equations:
        operands = tuple(known[atom] for atom in equation.inputs)
        for i, atom in enumerate(equation.outputs):
            leaves = frozenset().union(*(operand.leaves for operand in operands))
            known[atom] = Constant(atom.aval, leaves, None, equation, operands, i)
    return known[program.outputs[0]]


def test_values_are_float64():
    third = jnp.float32(1 / 3)
    found = constant_of(lambda x: jax.lax.rsqrt(x) * 3 - x**3 / 7, third)
    x = float(third)
    np.testing.assert_allclose(found.value, 3 / np.sqrt(x) - x**3 / 7, rtol=1e-15)
    assert found.leaves == {0}
    assert constant_of(lambda x: x.astype(jnp.bfloat16), third).value == x


def test_other_functions_are_those_of_jax():
    x = jnp.arange(6.0).reshape(2, 3)
    found = constant_of(lambda x: jnp.cumsum(jnp.where(x > 1, x, 0), 1), x)
    np.testing.assert_array_equal(found.value, [[0, 0, 2], [3, 7, 12]])


def test_what_has_no_value():
    with pytest.raises(NotNumericError):
        _ = constant_of(lambda key: key.reshape(1), jax.random.key(0)).value


def test_origin_of_a_kernel():
    kernel = jnp.zeros((2, 3))
    found = constant_of(lambda x: x[::-1].T.astype(jnp.bfloat16), kernel)
    leaf, moves = found.origin
    names = [move.name for move in moves]
    assert (leaf, names) == (0, ["rev", "transpose", "convert_element_type"])
    assert constant_of(lambda x: 2 * x, kernel).origin is None
