"""Recurrent batch normalization: each time step has statistics of its own."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _validate, functional
from bnjax.functional import BatchStats

__all__ = [
    "LSTMCarry",
    "LSTMParams",
    "LSTMStats",
    "batch_norm_at_step",
    "batch_norm_lstm",
]


def batch_norm_at_step(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    batch_stats: BatchStats,
    step: int | jax.Array,
    *,
    use_running_average: bool = False,
    **options: Any,
) -> tuple[jax.Array, BatchStats]:
    r"""Batch normalization of one time step, with the running statistics of that step.

    This is `bnjax.batch_norm` with row $t = \min(\text{step}, \text{max steps} - 1)$ of
    the statistics. All steps from the last row on share that row: in training each of
    these steps updates it, in inference each is normalized by it. With one row all
    steps share their statistics.

    No gradient flows through the new statistics: in a scan over time, JAX would
    otherwise keep all of them for each step.

    Args:
        x: values of one time step; the first axes are the batch.
        scale: $\gamma$, shape (features,), the same for all steps; None for ones.
        bias: $\beta$, shape (features,); None for zeros.
        batch_stats: running statistics, shape (max_steps, features):
            `BatchStats.init((max_steps, features))`.
        step: index of the time step, from 0 on; may be a traced value.
        use_running_average: normalize by the statistics and leave them unchanged.
        **options: arguments of `bnjax.batch_norm`. A `mask` can exclude sequences that
            have ended.

    Returns:
        The output, of the shape of `x`, and the new BatchStats.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `bnjax.batch_norm`,
            and for statistics without an axis of steps, or a negative step.

    Examples:
        >>> import jax.numpy as jnp, bnjax
        >>> from bnjax.variants.recurrent import batch_norm_at_step
        >>> stats = bnjax.BatchStats.init((2, 1))
        >>> for step in range(3):
        ...     x = step + jnp.array([[1.0], [3.0]])
        ...     y, stats = batch_norm_at_step(x, None, None, stats, step, momentum=0.5)
        >>> print(stats.mean.ravel())  # steps 1 and 2 share the second row
        [1.   2.75]

    References:
        Cooijmans et al. (2017), "Recurrent Batch Normalization", section 3.
    """
    if jnp.ndim(batch_stats.mean) < 2:
        raise ValueError(
            f"batch_norm: batch_stats.mean has shape {jnp.shape(batch_stats.mean)}; "
            "expected (max_steps, features), as of BatchStats.init((max_steps, "
            "features))."
        )
    _validate.check_number(step, "step", lambda t: t >= 0, "a step, from 0 on")
    row = jnp.minimum(jnp.asarray(step), jnp.shape(batch_stats.mean)[0] - 1)
    y, new = functional.batch_norm(
        x,
        scale,
        bias,
        jax.tree.map(lambda rows: jnp.asarray(rows)[row], batch_stats),
        use_running_average=use_running_average,
        **options,
    )
    if use_running_average:
        return y, batch_stats
    new = lax.stop_gradient(new)
    return y, jax.tree.map(
        lambda rows, value: jnp.asarray(rows).at[row].set(value.astype(rows.dtype)),
        batch_stats,
        new,
    )


class LSTMCarry(NamedTuple):
    """State that a batch-normalized LSTM passes from one time step to the next.

    Attributes:
        c: memory, shape `(*batch, features)`.
        h: output, shape `(*batch, features)`.
        step: number of steps so far, int32, shape (1,): the RNN of Flax indexes an axis
            of every carry.
        length: number of steps in each sequence, int32, shape `(*batch)`: after it, a
            sequence counts in no statistics. None if all sequences count in every step.
    """

    c: jax.Array
    h: jax.Array
    step: jax.Array
    length: jax.Array | None = None

    @classmethod
    def init(cls, c: jax.Array, h: jax.Array) -> "LSTMCarry":
        """Return the carry before the first step.

        Args:
            c: memory, shape `(*batch, features)`.
            h: output, shape `(*batch, features)`.

        Returns:
            The LSTMCarry at step 0, without lengths.
        """
        return cls(c, h, jnp.zeros((1,), jnp.int32))

    def with_lengths(self, seq_lengths: jax.Array) -> "LSTMCarry":
        """Return the carry of sequences that end after a given number of further steps.

        Args:
            seq_lengths: integers, shape `(*batch)`.

        Returns:
            The carry with `length` set.

        Raises:
            ValueError: if the shape is not that of the batch.
        """
        seq_lengths = jnp.asarray(seq_lengths)
        if seq_lengths.shape != self.h.shape[:-1]:
            raise ValueError(
                f"batch_norm: seq_lengths has shape {seq_lengths.shape}; expected "
                f"{self.h.shape[:-1]}, a length for each sequence of the batch."
            )
        length = jnp.reshape(self.step, ()) + seq_lengths
        return self._replace(length=length.astype(jnp.int32))


class LSTMParams(NamedTuple):
    r"""Parameters of a batch-normalized LSTM; the gates are in the order i, f, g, o.

    Attributes:
        kernel_x: shape (inputs, 4 * features).
        kernel_h: shape (features, 4 * features).
        bias: of the gates, shape (4 * features,).
        scale_x: $\gamma$ of the input's part of the gates, shape (4 * features,).
        scale_h: $\gamma$ of the recurrent part of the gates, shape (4 * features,).
        scale_c: $\gamma$ of the memory before the output gate, shape (features,).
        bias_c: $\beta$ of the memory before the output gate, shape (features,).
    """

    kernel_x: jax.Array
    kernel_h: jax.Array
    bias: jax.Array
    scale_x: jax.Array
    scale_h: jax.Array
    scale_c: jax.Array
    bias_c: jax.Array


class LSTMStats(NamedTuple):
    """Running statistics of a batch-normalized LSTM, one row for each time step.

    Attributes:
        x: of the input's part of the gates, shape (max_steps, 4 * features).
        h: of the recurrent part of the gates, shape (max_steps, 4 * features).
        c: of the memory, shape (max_steps, features).
    """

    x: BatchStats
    h: BatchStats
    c: BatchStats

    @classmethod
    def init(cls, max_steps: int, features: int, dtype=jnp.float32) -> "LSTMStats":
        """Initial statistics, before the first update: mean 0, variance 1.

        Args:
            max_steps: number of time steps with statistics of their own.
            features: size of the memory.
            dtype: float32, or float64 for float64 inputs.

        Returns:
            The LSTMStats.

        Raises:
            ValueError: if max_steps is below 1.
        """
        if max_steps < 1:
            raise ValueError(
                f"batch_norm: max_steps={max_steps}; expected 1 or more, the number of "
                "time steps with statistics of their own."
            )
        gates = BatchStats.init((max_steps, 4 * features), dtype)
        return cls(gates, gates, BatchStats.init((max_steps, features), dtype))


def batch_norm_lstm(
    params: LSTMParams,
    stats: LSTMStats,
    carry: LSTMCarry,
    x: jax.Array,
    *,
    gate_fn: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid,
    activation_fn: Callable[[jax.Array], jax.Array] = jnp.tanh,
    **options: Any,
) -> tuple[LSTMCarry, jax.Array, LSTMStats]:
    r"""One time step of a batch-normalized LSTM.

    $$
    \begin{aligned}
    (i, f, g, o) &= \mathrm{BN}(x W_x; \gamma_x, 0)
    + \mathrm{BN}(h W_h; \gamma_h, 0) + b \\
    c' &= \sigma(f)\, c + \sigma(i) \tanh(g) \\
    h' &= \sigma(o) \tanh(\mathrm{BN}(c'; \gamma_c, \beta_c))
    \end{aligned}
    $$

    with the sigmoid $\sigma$, and each BN computed by `batch_norm_at_step`. The memory
    that goes to the next step is not normalized.

    Args:
        params: the parameters.
        stats: running statistics, one row for each time step.
        carry: carry of the step before; c and h keep their dtypes.
        x: input of this step, shape `(*batch, inputs)`.
        gate_fn: replaces the sigmoid.
        activation_fn: replaces tanh; an elementwise function.
        **options: `use_running_average`, `momentum` and the other arguments of
            `bnjax.batch_norm`.

    Returns:
        The new carry, the output $h'$, of shape `(*batch, features)`, and the new
        statistics.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as `batch_norm_at_step`,
            and for a carry that is not an LSTMCarry, or that is at several steps at
            once.

    References:
        Cooijmans et al. (2017), "Recurrent Batch Normalization", equations 6 to 8.
    """
    if not isinstance(carry, LSTMCarry):
        raise TypeError(
            f"batch_norm: the carry is of type {type(carry).__name__}; expected the "
            "LSTMCarry that initialize_carry of the cell returns, which knows the step."
        )
    c, h, step, length = carry
    if jnp.size(step) != 1:
        raise ValueError(
            f"batch_norm: the carry is at {jnp.size(step)} steps, one for each "
            "sequence; expected one step for all, shape (1,). All sequences share the "
            "statistics of a step: continue only sequences that ended at the same step."
        )
    index = jnp.reshape(step, ())
    if length is not None:
        options["mask"] = jnp.expand_dims(index < length, -1)
    norm = functools.partial(batch_norm_at_step, step=index, **options)
    x_gates, stats_x = norm(x @ params.kernel_x, params.scale_x, None, stats.x)
    recurrent = h.astype(params.kernel_h.dtype) @ params.kernel_h
    h_gates, stats_h = norm(recurrent, params.scale_h, None, stats.h)
    i, f, g, o = jnp.split(x_gates + h_gates + params.bias, 4, axis=-1)
    new_c = (gate_fn(f) * c + gate_fn(i) * activation_fn(g)).astype(c.dtype)
    out, stats_c = norm(
        new_c, params.scale_c, params.bias_c, stats.c, activation=activation_fn
    )
    new_h = (gate_fn(o) * out).astype(h.dtype)
    carry = LSTMCarry(new_c, new_h, step + 1, length)
    return carry, new_h, LSTMStats(stats_x, stats_h, stats_c)
