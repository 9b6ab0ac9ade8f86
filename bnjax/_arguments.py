"""From the arguments of a call to what the transform works on."""

import jax
import jax.numpy as jnp

from bnjax import _checks
from bnjax._affine import Operands, Transform
from bnjax._statistics import Reduction


def prepare(
    x,
    scale=None,
    bias=None,
    mean=None,
    var=None,
    *,
    axis,
    epsilon: float | jax.Array = 1e-5,
    mask=None,
    axis_name=None,
    axis_index_groups=None,
    activation=None,
    residual=None,
    dtype=None,
) -> tuple[Transform, Operands]:
    """Check every argument and sort them into static ones and arrays."""
    x = _checks.as_input(x)
    dtype = _checks.as_dtype(dtype, x.dtype)
    features, reduction_axes = _checks.split_axes(x.shape, axis)
    feature_shape = tuple(x.shape[axis] for axis in features)
    _checks.check_epsilon(epsilon)
    arrays = {"scale": scale, "bias": bias, "mean": mean, "var": var}
    for name, value in arrays.items():
        _checks.check_features(value, name, feature_shape, x.shape)
    compute_dtype = _checks.promoted(x.dtype, jnp.float32, dtype)
    if axis_index_groups is not None:
        axis_index_groups = tuple(tuple(group) for group in axis_index_groups)
    if isinstance(axis_name, list):
        axis_name = tuple(axis_name)
    transform = Transform(
        Reduction(reduction_axes, axis_name, axis_index_groups),
        _checks.as_activation(activation),
        dtype,
        compute_dtype,
    )
    operands = Operands(
        x=x,
        epsilon=jnp.asarray(epsilon, compute_dtype),
        mask=_checks.as_mask(mask, x.shape),
        scale=None if scale is None else _checks.as_input(scale, "scale"),
        bias=None if bias is None else _checks.as_input(bias, "bias"),
        residual=_checks.check_residual(residual, x.shape),
    )
    return transform, operands


def check_count(x: jax.Array, reduction: Reduction) -> None:
    """Refuse one value per channel, which has no spread to normalize by."""
    count = reduction.local_count(x.shape) * reduction.devices()
    if count < 2:
        raise ValueError(
            f"batch_norm: one value per channel in training: x has shape {x.shape} and "
            f"the statistics are over axes {reduction.axes}. Its output would be the "
            "bias whatever the input. Use a larger batch, share statistics with "
            "axis_name, or pass use_running_average=True."
        )
