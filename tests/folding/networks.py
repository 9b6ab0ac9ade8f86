"""Networks of one linear layer and one batch normalization, and random variables."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnjax.linen
from bnjax.folding import fold_batch_norm
from tests.models.helpers import jit

NORMS = {"bnjax": bnjax.linen.BatchNorm, "flax": nn.BatchNorm}


def norm(kind: str = "bnjax", **options: Any) -> nn.Module:
    return NORMS[kind](use_running_average=True, **options)


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair of layers and their settings."""

    layer: str
    order: str = "after"
    kind: str = "bnjax"
    rank: int = 2
    kernel: int = 3
    groups: int = 1
    stride: int = 1
    dilation: int = 1
    padding: str = "SAME"
    layer_bias: bool = True
    scale: str = "mixed"
    shift: str = "random"
    activation: bool = False
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (2, *(6, 5, 4)[: self.rank], 4)

    @property
    def folds(self) -> bool:
        """Whether it can be folded, from the definitions of the layers."""
        if self.order == "after":
            return True
        if self.layer == "ConvLocal":
            return False
        return self.shift == "zero" or self.layer in DENSE or not self._reads_zeros

    @property
    def _reads_zeros(self) -> bool:
        if self.layer.startswith("ConvTranspose"):
            # With a stride, zeros come between the inputs; else around them.
            return self.kernel > 1 or self.stride > 1
        if self.padding != "SAME":
            return False
        reach = (self.kernel - 1) * self.dilation + 1
        return any(
            (-(-size // self.stride) - 1) * self.stride + reach > size
            for size in self.shape[1:-1]
        )


DENSE = ("Dense", "DenseGeneral", "Einsum")


class Pair(nn.Module):
    case: Case

    @nn.compact
    def __call__(self, x):
        case = self.case
        layer, before = self._layer(), case.order == "before"
        bn = norm(
            case.kind,
            use_scale=case.scale != "none",
            use_bias=case.shift != "zero",
            name="bn",
        )
        x = layer(bn(x)) if before else bn(layer(x))
        return nn.relu(x) if case.activation else x

    def _layer(self):
        case = self.case
        bias: dict[str, Any] = {"use_bias": case.layer_bias, "name": "layer"}
        size, stride = (case.kernel,) * case.rank, (case.stride,) * case.rank
        dilation = (case.dilation,) * case.rank
        if case.layer == "Dense":
            return nn.Dense(6, **bias)
        if case.layer == "DenseGeneral":
            return nn.DenseGeneral((2, 3), (-2, -1), **bias)
        if case.layer == "Einsum":
            return nn.Einsum((6, 4), "...a,ba->...b", **bias)
        if case.layer == "ConvLocal":
            return nn.ConvLocal(6, size, stride, case.padding, **bias)
        if case.layer == "Conv":
            options = {"kernel_dilation": dilation, "feature_group_count": case.groups}
            return nn.Conv(8, size, stride, case.padding, **options, **bias)
        return nn.ConvTranspose(
            6,
            size,
            stride,
            case.padding,
            transpose_kernel=case.layer == "ConvTranspose of transposed kernel",
            **bias,
        )


def random_variables(module: nn.Module, x: Any, case: Case = Case("")) -> Any:
    """Random values: negative scales and zeros among them, no statistics of 0 and 1."""
    rng = np.random.default_rng(case.seed)

    def fill(path, leaf):
        name = path[-1].key
        value = rng.normal(size=leaf.shape)
        if name == "var":
            value = rng.uniform(0.2, 3.0, leaf.shape)
        if name == "mean" and case.shift == "zero":
            value = np.zeros(leaf.shape)
        if name == "scale" and case.scale == "zeros":
            value = np.zeros(leaf.shape)
        if name == "scale" and case.scale == "mixed":
            value.flat[0], value.flat[-1] = 0.0, -1.5
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), x))
    return jax.tree_util.tree_map_with_path(fill, dict(shapes))


def random_input(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def fold(module: nn.Module, x: Any, case: Case = Case(""), **options: Any) -> Any:
    """The folded model, what it gives and what the model gives."""
    variables = random_variables(module, x, case)
    folded = fold_batch_norm(module.apply, variables, x, **options)

    @jit
    def both(new, old, x):
        return folded.apply(new, x), module.apply(old, x)

    return folded, *both(folded.variables, variables, x)


def difference(found: Any, expected: Any) -> float:
    """The greatest difference beside the greatest value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
