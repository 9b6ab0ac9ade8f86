"""PyTorch's batch normalization with channels last, in the passes of `passes`."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.passes import Program
from benchmarks.peers import EPSILON, MOMENTUM, Case
from benchmarks.timing import cores


def programs(
    case: Case, kind: str, values: dict[str, np.ndarray], count: int
) -> Program:
    """Return `count` calls, one after the other, of PyTorch's layer.

    On a GPU where JAX's device is one; else with as many threads as cores. A ReLU and a
    residual are added in place.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(cores())
    on_gpu = jax.devices()[0].platform == "gpu" and torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = getattr(torch, case.dtype)

    def array(name: str) -> Any:
        value = torch.tensor(values[name])
        # The memory is channels last already.
        return value.movedim(-1, 1).to(device, dtype)

    def vector(name: str) -> Any:
        return torch.tensor(values[name], device=device)

    x, dy = array("x"), array("dy")
    residual = array("residual") if "residual" in values else None
    scale, bias, mean, var = map(vector, ("scale", "bias", "mean", "var"))
    given = [x, scale, bias] + ([] if residual is None else [residual])

    def forward(training: bool) -> Any:
        y = torch.nn.functional.batch_norm(
            x, mean, var, scale, bias, training, 1 - MOMENTUM, EPSILON
        )
        if residual is not None:
            y = y.add_(residual)
        return y if case.variation == "plain" else y.relu_()

    def train() -> dict[str, Any]:
        y = forward(True)
        gradients = torch.autograd.grad(y, given, dy)
        names = ("dx", "dscale", "dbias", "dresidual")
        return {"y": y.detach()} | dict(zip(names, gradients, strict=False))

    def infer() -> dict[str, Any]:
        with torch.inference_mode():
            return {"y": forward(kind == "forward")}

    if kind == "train":
        for array_given in given:
            array_given.requires_grad_()
    one: Callable[[], dict[str, Any]] = train if kind == "train" else infer

    def run() -> dict[str, Any]:
        found = {}
        for _ in range(count):
            found = one()
        if on_gpu:
            torch.cuda.synchronize()
        return found

    return Program(run, None, count, to_numpy)


def to_numpy(value: Any) -> np.ndarray:
    """Return a tensor as a float32 array, channels last."""
    value = value.float().cpu()
    return value.movedim(1, -1).numpy() if value.ndim > 1 else value.numpy()
