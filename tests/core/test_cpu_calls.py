"""Calls of a handler that are not as they should be: an error, not a crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import _cpu
from tests.core import needs_kernels

pytestmark = needs_kernels

ROWS, FEATURES = 6, 4
X, CHANNEL, SCALAR = (ROWS, FEATURES), (FEATURES,), (1,)
ARGUMENTS = {
    "moments": [X],
    "output": [X, CHANNEL, CHANNEL, CHANNEL, SCALAR, CHANNEL, CHANNEL],
    "gradient": [X, X, *[CHANNEL] * 3, SCALAR, *[CHANNEL] * 4],
}
RESULTS = {
    "moments": [CHANNEL] * 3,
    "output": [X],
    "gradient": [X, SCALAR, CHANNEL, CHANNEL],
}
RESIDUAL = {"output": ([X], []), "gradient": ([X], [X])}


def call_of(handler, residual=False):
    """Shapes and dtypes of a call as it should be."""
    more = RESIDUAL[handler] if residual else ([], [])
    arguments, results = (
        [(shape, "float32") for shape in [*shapes, *extra]]
        for shapes, extra in zip(
            (ARGUMENTS[handler], RESULTS[handler]), more, strict=True
        )
    )
    return arguments, results


def run(handler, arguments, results, **attributes):
    if handler != "moments":
        attributes = {"activation": np.int64(1)} | attributes
    attributes = {name: a for name, a in attributes.items() if a is not None}
    target = _cpu.build.target(handler)
    call = jax.ffi.ffi_call(target, [jax.ShapeDtypeStruct(*of) for of in results])
    found = call(*(jnp.ones(*of) for of in arguments), **attributes)
    return jax.block_until_ready(found)


def refuses(handler, arguments, results, message, **attributes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as caught:
        run(handler, arguments, results, **attributes)
    assert f"INVALID_ARGUMENT: bnjax_{handler}: " in str(caught.value)


@pytest.mark.parametrize("handler", ARGUMENTS)
def test_a_call_as_it_should_be(handler):
    for residual in (False, True) if handler in RESIDUAL else (False,):
        arguments, results = call_of(handler, residual)
        assert len(run(handler, arguments, results)) == len(results)


CHANGES = {
    "dtype": lambda shape, dtype: (shape, "int32"),
    "wider": lambda shape, dtype: (shape, "float16"),
    "one more": lambda shape, dtype: ((*shape[:-1], shape[-1] + 1), dtype),
    "one fewer": lambda shape, dtype: ((*shape[:-1], shape[-1] - 1), dtype),
    "fewer rows": lambda shape, dtype: ((shape[0] - 1, *shape[1:]), dtype),
    "rank above": lambda shape, dtype: ((1, *shape), dtype),
    "rank below": lambda shape, dtype: (shape[1:], dtype),
    "empty": lambda shape, dtype: ((0, *shape[1:]), dtype),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("side", ["argument", "result"])
@pytest.mark.parametrize("handler", ARGUMENTS)
def test_arrays_of_another_dtype_or_shape(handler, side, change):
    if (handler, side, change) == ("moments", "argument", "fewer rows"):
        return  # x itself may have any number of rows
    if (handler, side, change) == ("output", "result", "empty"):
        return  # XLA makes no call that returns nothing
    count = len(call_of(handler, handler in RESIDUAL)[side == "result"])
    for at in range(count):
        call = call_of(handler, handler in RESIDUAL)
        arrays = call[side == "result"]
        arrays[at] = CHANGES[change](*arrays[at])
        refuses(handler, *call, " is ")


@pytest.mark.parametrize("handler", ARGUMENTS)
def test_a_residual_has_the_dtype_of_x(handler):
    if handler not in RESIDUAL:
        return
    arguments, results = call_of(handler, residual=True)
    arguments[-1] = X, "bfloat16"
    message = r"is bf16\[6,4\]; expected f32\[6,4\]"
    refuses(handler, arguments, results, message)


def test_no_rows():
    _, results = call_of("moments")
    message = r"x is f32\[0,4\]; expected 1 to 2.48 values"
    refuses("moments", [((0, FEATURES), "float32")], results, message)


@pytest.mark.parametrize("handler", ARGUMENTS)
def test_arrays_that_are_missing_or_too_many(handler):
    arguments, results = call_of(handler)
    message = rf"expected {len(arguments)} and {len(results)}"
    refuses(handler, arguments[1:], results, message)
    refuses(handler, [], results, message)
    if len(results) > 1:
        refuses(handler, arguments, results[1:], message)
    refuses(handler, arguments, [*results, *results], "expected ")
    refuses(handler, arguments * 3, results, message)


@pytest.mark.parametrize("handler", RESIDUAL)
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activation": np.int64(2)}, "activation is 2; expected 0 for none or 1"),
        ({"activation": np.int64(-1)}, "activation is -1"),
        ({"activation": np.int32(3)}, "expected one attribute, the int64"),
        ({"activation": np.float64(0.5)}, "expected one attribute, the int64"),
        ({"activation": "relu"}, "expected one attribute, the int64"),
        ({"activation": np.ones(2, np.int64)}, "expected one attribute, the int64"),
        ({"activation": None}, "expected one attribute, the int64"),
        ({"activation": None, "activatiom": np.int64(1)}, "expected one attribute"),
        ({"also": np.int64(1)}, "expected one attribute"),
    ],
    ids=str,
)
def test_another_attribute(handler, attributes, message):
    refuses(handler, *call_of(handler), message, **attributes)


def test_moments_have_no_attribute():
    refuses("moments", *call_of("moments"), "no attributes", activation=np.int64(0))


@pytest.mark.parametrize("handler", RESIDUAL)
def test_a_residual_needs_an_activation(handler):
    call = call_of(handler, residual=True)
    message = "a residual without an activation"
    refuses(handler, *call, message, activation=np.int64(0))
