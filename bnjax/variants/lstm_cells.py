"""Batch-normalized LSTM cells for the RNNs of flax.linen and flax.nnx."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.linen import dtypes
from flax.linen.recurrent import DenseParams
from flax.nnx.nn import initializers
from flax.typing import Initializer

from bnjax import _validate
from bnjax.functional import AxisIndexGroups, BatchStats
from bnjax.linen import ImmutableBatchStatsError
from bnjax.variants.recurrent import LSTMCarry, LSTMParams, LSTMStats, batch_norm_lstm

__all__ = ["RNN", "BatchNormLSTMCell", "NnxBatchNormLSTMCell", "NnxRNN"]

NORMS = ("norm_x", "norm_h", "norm_c")
_STATS = "batch_stats"
_SCALE_INIT = initializers.constant(0.1)
_OPTIONS = (
    "gate_fn",
    "activation_fn",
    "momentum",
    "epsilon",
    "unbiased",
    "use_fast_variance",
    "axis_name",
    "axis_index_groups",
)


class BatchNormLSTMCell(nn.OptimizedLSTMCell, kw_only=True):
    r"""A batch-normalized LSTM cell for flax.linen.

    The equations are those of `bnjax.variants.recurrent.batch_norm_lstm`. The keywords,
    and the names and shapes of the parameters, are those of flax.linen.LSTMCell.
    "params" and "batch_stats" also have "norm_x", "norm_h" and "norm_c".

    Run the cell with `RNN` of this module. flax.linen.RNN needs
    variable_carry="batch_stats" in training and variable_broadcast=("params",
    "batch_stats") in inference. For sequences of unequal length it also needs a carry
    with the lengths: `LSTMCarry.with_lengths`.

    Attributes:
        max_steps: number of time steps with statistics of their own. All later steps
            use and update the statistics of the last of these steps.
        use_running_average: False in training, True in inference. Pass it here or in
            the call.
        momentum: weight of the old statistics.
        epsilon: added to the variances.
        unbiased: True keeps the running variance with the factor $m / (m - 1)$; Flax
            keeps the biased variance.
        scale_init: initializer of the three $\gamma$; the paper's 0.1 keeps tanh from
            saturating.
        use_fast_variance: as in `bnjax.batch_norm`.
        axis_name: axis whose devices share statistics, as in `bnjax.batch_norm`.
        axis_index_groups: groups of that axis.

    The other attributes are those of flax.linen.LSTMCell. For inputs that hardly vary
    at first, the paper starts training from noise: use `carry_init` and a new
    `init_key`.

    Raises:
        ImmutableBatchStatsError: in training without mutable=["batch_stats"].
        TypeError, ValueError, NameError, NotImplementedError: as
            `bnjax.variants.recurrent.batch_norm_lstm`, with the name of the layer.

    Examples:
        >>> import jax
        >>> from bnjax.variants.lstm_cells import BatchNormLSTMCell, RNN
        >>> def network(train):
        ...     cell = BatchNormLSTMCell(4, max_steps=5, use_running_average=not train)
        ...     return RNN(cell)
        >>> x = jax.random.normal(jax.random.key(0), (8, 6, 3))
        >>> variables = network(True).init(jax.random.key(1), x)
        >>> y, updates = network(True).apply(variables, x, mutable=["batch_stats"])
        >>> updates["batch_stats"]["cell"]["norm_x"]["mean"].shape
        (5, 16)
        >>> network(False).apply(variables | updates, x).shape
        (8, 6, 4)

    References:
        Cooijmans et al. (2017), "Recurrent Batch Normalization".
    """

    max_steps: int
    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased: bool = False
    scale_init: Initializer = _SCALE_INIT
    use_fast_variance: bool = True
    axis_name: str | None = None
    axis_index_groups: AxisIndexGroups | None = None

    @nn.compact
    def __call__(
        self,
        carry: Any,
        inputs: jax.Array,
        use_running_average: bool | None = None,
    ) -> tuple[Any, jax.Array]:
        """Compute one time step.

        Args:
            carry: LSTMCarry of `initialize_carry`, or of the step before.
            inputs: inputs of this step, shape `(*batch, inputs)`.
            use_running_average: pass it here or to the constructor.

        Returns:
            The new carry and the output, of shape `(*batch, features)`.
        """
        layer = f"BatchNormLSTMCell {_validate.layer_name(self.path)}"
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        mutable = self.is_mutable_collection(_STATS)
        if not (mutable or self.has_variable(_STATS, NORMS[0])):
            raise ValueError(
                f"{layer}: there are no statistics in 'batch_stats'. Pass them with "
                "the variables of this call, and run the cell by bnjax's RNN, which "
                "carries them, or by flax.linen.RNN(cell, "
                "variable_carry='batch_stats')."
            )
        initializing = self.is_initializing()
        # One example is not enough to train on, but enough to create the variables.
        single = initializing and math.prod(inputs.shape[:-1]) == 1
        updating = not (use_running_average or initializing)
        if updating and not mutable:
            raise ImmutableBatchStatsError(layer)
        dense = functools.partial(
            DenseParams,
            features=self.features,
            param_dtype=self.param_dtype,
            bias_init=self.bias_init,
        )
        dense_x = functools.partial(dense, use_bias=False, kernel_init=self.kernel_init)
        dense_h = functools.partial(dense, kernel_init=self.recurrent_kernel_init)
        kernels_x = [dense_x(name=f"i{gate}")(inputs)[0] for gate in "ifgo"]
        recurrent = [dense_h(name=f"h{gate}")(carry[1]) for gate in "ifgo"]
        kernels_h, biases = zip(*recurrent, strict=True)
        norms = [self.param(name, self._init_scales, name) for name in NORMS]
        kept = [self.variable(_STATS, name, self._init_stats, name) for name in NORMS]
        inputs, *dense_params = dtypes.promote_dtype(
            inputs,
            *(jnp.concatenate(parts, -1) for parts in (kernels_x, kernels_h, biases)),
            dtype=self.dtype,
        )
        options = {name: getattr(self, name) for name in _OPTIONS}
        if initializing:
            options |= {"axis_name": None, "axis_index_groups": None}
        scales = [norm["scale"] for norm in norms]
        with _validate.naming(layer):
            carry, y, stats = batch_norm_lstm(
                LSTMParams._make((*dense_params, *scales, norms[-1]["bias"])),
                LSTMStats(*(BatchStats(**variable.value) for variable in kept)),
                carry,
                inputs,
                use_running_average=use_running_average or single,
                update_stats=updating,
                **options,
            )
        if updating:
            for variable, new in zip(kept, stats, strict=True):
                variable.value = {"mean": new.mean, "var": new.var}
        return carry, y

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> Any:
        """Return the initial LSTMCarry.

        Args:
            rng: key for `carry_init`.
            input_shape: `(*batch, inputs)`.

        Returns:
            The LSTMCarry before the first step.
        """
        # A scan carries only variables that exist before it.
        if self.scope is not None and self.is_initializing():
            for name in NORMS:
                if not self.has_variable(_STATS, name):
                    self.put_variable(_STATS, name, self._init_stats(name))
        return LSTMCarry.init(*super().initialize_carry(rng, input_shape))

    @nn.nowrap
    def _init_scales(self, key: jax.Array, name: str) -> dict[str, jax.Array]:
        size = self.features if name == "norm_c" else 4 * self.features
        scale = self.scale_init(key, (size,), self.param_dtype)
        if name != "norm_c":
            return {"scale": scale}
        return {"scale": scale, "bias": jnp.zeros((size,), self.param_dtype)}

    @nn.nowrap
    def _init_stats(self, name: str) -> dict[str, jax.Array]:
        dtype = _validate.promoted(self.param_dtype, jnp.float32)
        stats = LSTMStats.init(self.max_steps, self.features, dtype)
        return dict(vars(stats[NORMS.index(name)]))


class RNN(nn.RNN):
    """`flax.linen.RNN` for a cell with running statistics.

    It carries "batch_stats" through time if the collection is mutable, broadcasts it to
    all steps if not, and passes `seq_lengths` to the cell's statistics. Keywords and
    results are those of flax.linen.RNN.
    """

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: LSTMCarry | None = None,
        init_key: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        time_major: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the cell to each step of the sequences, as flax.linen.RNN does."""
        time_major = self.time_major if time_major is None else time_major
        init_key = jax.random.key(0) if init_key is None else init_key
        # In any case, because it creates the variables.
        start = self.cell.initialize_carry(init_key, _step_shape(inputs, time_major))
        carry = start if initial_carry is None else initial_carry
        if seq_lengths is not None:
            carry = carry.with_lengths(seq_lengths)
        fields = {field.name for field in dataclasses.fields(nn.RNN)}
        given = {name: getattr(self, name) for name in fields - {"parent", "name"}}
        if self.is_mutable_collection(_STATS):
            given["variable_carry"] = _STATS
        else:
            given["variable_broadcast"] = ("params", _STATS)
        return nn.RNN(**given)(
            inputs,
            initial_carry=carry,
            seq_lengths=seq_lengths,
            time_major=time_major,
            **kwargs,
        )


class _NnxNorm(nnx.Module):
    """The variables of one normalization in `NnxBatchNormLSTMCell`."""

    def __init__(self, stats: BatchStats, scale: jax.Array, bias: jax.Array | None):
        self.scale = nnx.Param(scale)
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.mean, self.var = nnx.BatchStat(stats.mean), nnx.BatchStat(stats.var)


class NnxBatchNormLSTMCell(nnx.OptimizedLSTMCell):
    """A batch-normalized LSTM cell for flax.nnx.

    The equations are those of `bnjax.variants.recurrent.batch_norm_lstm`. The keywords
    are those of flax.nnx.OptimizedLSTMCell and of `BatchNormLSTMCell`. `norm_x`,
    `norm_h` and `norm_c` hold `scale`, `mean` and `var`; `norm_c` also holds `bias`.
    flax.nnx.RNN runs the cell and carries its statistics. For sequences of unequal
    length, use `NnxRNN`.

    Args:
        in_features: size of the inputs.
        hidden_features: size of the memory and of the output.
        max_steps: as in `BatchNormLSTMCell`.
        use_running_average: False in training, True in inference. `model.train()` and
            `model.eval()` also set it.
        momentum: as in `BatchNormLSTMCell`.
        epsilon: as in `BatchNormLSTMCell`.
        unbiased: as in `BatchNormLSTMCell`.
        scale_init: as in `BatchNormLSTMCell`.
        use_fast_variance: as in `BatchNormLSTMCell`.
        axis_name: as in `BatchNormLSTMCell`.
        axis_index_groups: as in `BatchNormLSTMCell`.
        rngs: random streams for the parameters.
        **kwargs: the arguments of flax.nnx.OptimizedLSTMCell.

    Raises:
        TypeError, ValueError, NameError, NotImplementedError: as
            `bnjax.variants.recurrent.batch_norm_lstm`.

    Examples:
        >>> import jax
        >>> from flax import nnx
        >>> from bnjax.variants.lstm_cells import NnxBatchNormLSTMCell, NnxRNN
        >>> cell = NnxBatchNormLSTMCell(3, 4, max_steps=5, rngs=nnx.Rngs(0))
        >>> rnn = NnxRNN(cell)
        >>> x = jax.random.normal(jax.random.key(0), (8, 6, 3))
        >>> rnn.train()
        >>> rnn(x).shape, cell.norm_x.mean.shape
        ((8, 6, 4), (5, 16))
        >>> rnn.eval()
        >>> rnn(x).shape
        (8, 6, 4)

    References:
        Cooijmans et al. (2017), "Recurrent Batch Normalization".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        max_steps: int,
        use_running_average: bool | None = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        unbiased: bool = False,
        scale_init: Initializer = _SCALE_INIT,
        use_fast_variance: bool = True,
        axis_name: str | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        rngs: nnx.Rngs,
        **kwargs: Any,
    ):
        super().__init__(in_features, hidden_features, rngs=rngs, **kwargs)
        self.max_steps = max_steps
        self.use_running_average = use_running_average
        self.momentum, self.epsilon, self.unbiased = momentum, epsilon, unbiased
        self.use_fast_variance = use_fast_variance
        self.axis_name, self.axis_index_groups = axis_name, axis_index_groups
        dtype = _validate.promoted(self.param_dtype, jnp.float32)
        stats = LSTMStats.init(max_steps, hidden_features, dtype)

        def norm(stats, *, use_bias=False):
            size = stats.mean.shape[1:]
            bias = jnp.zeros(size, self.param_dtype) if use_bias else None
            return _NnxNorm(
                stats, scale_init(rngs.params(), size, self.param_dtype), bias
            )

        self.norm_x, self.norm_h = norm(stats.x), norm(stats.h)
        self.norm_c = norm(stats.c, use_bias=True)

    def __call__(
        self,
        carry: Any,
        inputs: jax.Array,
        use_running_average: bool | None = None,
    ) -> tuple[Any, jax.Array]:
        """Compute one time step, with the arguments of `BatchNormLSTMCell`."""
        layer = f"BatchNormLSTMCell of {self.hidden_features} features"
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average is None:
            raise ValueError(
                f"{layer}: use_running_average is None; expected True or False, from "
                "the constructor, from the call, or from model.train() / model.eval()."
            )
        norms: Any = self.norm_x, self.norm_h, self.norm_c
        dense: Any = self.dense_i.kernel, self.dense_h.kernel, self.dense_h.bias
        inputs, *dense_params = self.promote_dtype(
            (inputs, *(param[...] for param in dense)), dtype=self.dtype
        )
        scales = [norm.scale[...] for norm in norms]
        with _validate.naming(layer):
            carry, y, stats = batch_norm_lstm(
                LSTMParams._make((*dense_params, *scales, norms[-1].bias[...])),
                LSTMStats(*(BatchStats(n.mean[...], n.var[...]) for n in norms)),
                carry,
                inputs,
                use_running_average=use_running_average,
                **{name: getattr(self, name) for name in _OPTIONS},
            )
        if not use_running_average:
            for norm, new in zip(norms, stats, strict=True):
                norm.mean[...], norm.var[...] = new.mean, new.var
        return carry, y

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Any = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """Return the initial LSTMCarry.

        Args:
            input_shape: `(*batch, inputs)`.
            rngs: random streams for `carry_init`.
            carry_init: initializer of the carry; the cell's own if None.

        Returns:
            The LSTMCarry before the first step.
        """
        return LSTMCarry.init(*super().initialize_carry(input_shape, rngs, carry_init))


class NnxRNN(nnx.RNN):
    """`flax.nnx.RNN` that passes `seq_lengths` to the cell's statistics.

    Keywords and results are those of flax.nnx.RNN.
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        seq_lengths: jax.Array | None = None,
        time_major: bool | None = None,
        rngs: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Apply the cell to each step of the sequences, as flax.nnx.RNN does."""
        time_major = self.time_major if time_major is None else time_major
        if seq_lengths is not None:
            if initial_carry is None:
                shape = _step_shape(inputs, time_major)
                initial_carry = self.cell.initialize_carry(shape, rngs or self.rngs)
            initial_carry = initial_carry.with_lengths(seq_lengths)
        return super().__call__(
            inputs,
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            time_major=time_major,
            rngs=rngs,
            **kwargs,
        )


def _step_shape(inputs: jax.Array, time_major: bool) -> tuple[int, ...]:
    return inputs.shape[1:] if time_major else (*inputs.shape[:-2], inputs.shape[-1])
