"""Convert an inference function to ONNX, by jax2onnx.

Fold batch normalization first (`bnjax.folding`). The model then has no operation of the
normalization.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxpr_as_fun

from bnjax._validate import first_line
from bnjax.interop.export import ExportError

__all__ = ["to_onnx"]

# Kernel, strides and pads of a pooling over (batch, height, width, channels).
_POOLED = 4


def to_onnx(
    function: Callable[..., Any],
    variables: Any,
    example: Any,
    *,
    batch_size: int | None = None,
    channels_first: bool = False,
    opset: int = 23,
    input_name: str = "images",
    output_name: str = "logits",
) -> Any:
    """Convert a function of images to an ONNX model, with its variables as constants.

    The function is traced by JAX, and jax2onnx converts the traced program. Some
    operations that jax2onnx writes are then replaced by equal ones that ONNX Runtime
    runs and quantizes. Compare the outputs of the model with those of the function.

    Args:
        function: a function that JAX can trace, called as `function(variables, x)`, or
            as `function(x)` if `variables` is None. It returns one array.
        variables: a tree of arrays; None if the function holds its own variables.
        example: an array or a `jax.ShapeDtypeStruct` of shape (batch, ...) and the
            dtype of the inputs. Its values and its batch size do not matter.
        batch_size: the only batch size that the model accepts; None accepts all.
        channels_first: True gives the model an input of shape (batch, channels, height,
            width), as PyTorch has it, in place of (batch, height, width, channels).
        opset: version of ONNX's operations.
        input_name: name of the input of the model.
        output_name: name of the output of the model.

    Returns:
        The model, an `onnx.ModelProto`. `onnx.save(model, path)` writes it.

    Raises:
        ExportError: if jax2onnx is not installed or cannot convert the function.

    Examples:
        >>> from bnjax.interop.onnx import to_onnx
        >>> x = jax.ShapeDtypeStruct((1, 3), "float32")
        >>> weights = np.ones((3, 2), np.float32)
        >>> model = to_onnx(lambda w, x: jax.nn.relu(x @ w), weights, x)
        >>> [node.op_type for node in model.graph.node]
        ['Gemm', 'Relu']
    """
    jax2onnx, onnx = _package("jax2onnx"), _package("onnx")
    example = example if hasattr(example, "shape") else np.asarray(example)
    rank = len(example.shape)
    if rank == 0 or (channels_first and rank != _POOLED):
        expected = "(batch, height, width, channels)" if rank else "(batch, ...)"
        raise ExportError(
            f"the example has shape {tuple(example.shape)}; expected {expected}."
        )
    if variables is not None:
        function = functools.partial(function, jax.tree.map(np.asarray, variables))
    batch = jax.export.symbolic_shape("B" if batch_size is None else str(batch_size))
    spec = jax.ShapeDtypeStruct((*batch, *example.shape[1:]), example.dtype)
    # An error of the function itself is raised unchanged.
    jax.eval_shape(function, jax.ShapeDtypeStruct(example.shape, example.dtype))
    try:
        # jax2onnx replaces functions of Flax and of jax.numpy while it traces, and
        # takes some of their arguments for others. A traced program has operations of
        # JAX only.
        traced = jaxpr_as_fun(jax.make_jaxpr(function)(spec))
        model = jax2onnx.to_onnx(
            lambda x: _single(traced(x)),
            [spec],
            input_names=[input_name],
            output_names=[output_name],
            inputs_as_nchw=[0] if channels_first else None,
            opset=opset,
        )
        return _simplified(onnx, model)
    except ExportError:
        raise
    except Exception as error:
        hint = " Pass batch_size." * (batch_size is None and "dimension" in str(error))
        raise ExportError(
            f"jax2onnx cannot convert the function with JAX {jax.__version__}: "
            f"{first_line(error)}{hint} docs/library/onnx.md names the versions that "
            "work together."
        ) from error


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{name} is not installed; expected the extra of ONNX: pip install "
            "'.[onnx]' in a clone of bnjax."
        ) from error


def _single(outputs: list[Any]) -> Any:
    if len(outputs) != 1:
        raise ExportError(
            f"the function returns {len(outputs)} arrays; expected one, such as logits."
        )
    return outputs[0]


def _simplified(onnx: Any, model: Any) -> Any:
    """Replace what ONNX Runtime 1.32 does not run or quantize by equal operations.

    jax2onnx 0.17.1 writes ReLU as a maximum, a product without a bias as one with a
    scalar bias, and a pooling of images as one over all four dimensions.
    """
    graph = model.graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    zeros = {name for name, each in arrays.items() if each.size == 1 and not each.any()}
    source = {node.output[0]: node for node in graph.node}
    user = {name: node for node in graph.node for name in node.input}
    for node in list(graph.node):
        if node.op_type == "Max" and zeros & {*node.input}:
            node.input[:] = [name for name in node.input if name not in zeros]
            node.op_type = "Relu"
        elif node.op_type == "Gemm" and node.input[2] in zeros:
            del node.input[2]
        elif node.op_type == "MaxPool" and len(node.attribute[0].ints) == _POOLED:
            # Pool over (H, W, C) of (1, B, H, W, C), so that C takes part by 1.
            second = source[node.input[0]]
            node.input[0] = second.input[0]
            user[node.output[0]].input[1] = source[second.input[0]].input[1]
            graph.node.remove(second)
            for attribute in node.attribute:
                sizes = list(attribute.ints)
                attribute.ints[:] = sizes[1:_POOLED] + sizes[_POOLED + 1 :]
    used = {name for node in graph.node for name in node.input}
    for array in list(graph.initializer):
        if array.name not in used:
            graph.initializer.remove(array)
    # Shapes that changed; ONNX Runtime infers them.
    del graph.value_info[:]
    onnx.checker.check_model(model)
    return model
