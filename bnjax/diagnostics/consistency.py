"""Compare batch statistics, moving averages and population statistics."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from bnjax._validate import layer_name
from bnjax.diagnostics._network import join_params, split_params
from bnjax.functional import BatchStats
from bnjax.population import (
    Layers,
    LinenNetwork,
    Method,
    NnxNetwork,
    choose_layers,
    recompute_batch_stats,
)

ScoreFn = Callable[[Any, Any], Mapping[str, jax.Array]]


class LayerStatistics(NamedTuple):
    """The three statistics that one layer may normalize by.

    They are float64, rounded to the dtype of the variables.

    Attributes:
        batch: the statistics of each batch in training, shape (batches, features).
        moving: the moving averages in the variables, shape (features,).
        population: the statistics over all batches, shape (features,).
    """

    batch: BatchStats
    moving: BatchStats
    population: BatchStats


class NormalizationError(NamedTuple):
    """The mean and standard deviation after normalization by other statistics.

    Attributes:
        mean: the mean of the output; 0 without an error.
        std: the standard deviation of the output; 1 without an error.
    """

    mean: np.ndarray
    std: np.ndarray


class Scores(NamedTuple):
    """The scores of each example with each kind of statistics, float64.

    Each field has arrays of shape (examples,) by the name of the score.

    Attributes:
        batch: the scores with the statistics of the example's batch.
        moving: the scores with the moving averages in the variables.
        population: the scores with the given population statistics.
    """

    batch: dict[str, np.ndarray]
    moving: dict[str, np.ndarray]
    population: dict[str, np.ndarray]


def compare_statistics(
    apply_fn: Callable[..., Any],
    variables: Any,
    batches: Iterable[Any],
    *,
    method: Method = "paper",
    axis_name: str | None = None,
    layers: Layers = None,
) -> dict[str, LayerStatistics]:
    """Return the batch, moving and population statistics of each layer.

    All are statistics of the layer's input in training, where the layers below it
    normalize by batch statistics. The variances are unbiased, with the factor
    m / (m - 1). Only the moving variance of a layer that keeps the biased variance is
    biased.

    Args:
        apply_fn: the call of a training step, as in `bnjax.population`.
        variables: the variables of a linen network, or an nnx.Module. The function does
            not change them.
        batches: the batches for `apply_fn`; the function keeps all of them in memory.
        method: the method for the population statistics, "paper" or "pooled".
        axis_name: the axis of a pmap, as in `bnjax.population`.
        layers: the layers, as in `bnjax.population`; None for all.

    Returns:
        The statistics by the path of the layer, such as "bn_0". For a layer that
        normalizes by its moving averages in training, all three are equal to these.

    Raises:
        TypeError: as `bnjax.population.recompute_batch_stats`.
        ValueError: as `bnjax.population.recompute_batch_stats`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import compare_statistics, normalization_error
        >>> from bnjax.linen import BatchNorm
        >>> model = BatchNorm(use_running_average=False)
        >>> batches = jnp.array([[[1.0], [3.0]], [[2.0], [6.0]]])
        >>> variables = model.init(jax.random.key(0), batches[0])
        >>> def train_call(variables, x):
        ...     return model.apply(variables, x, mutable=["batch_stats"])
        >>> (found,) = compare_statistics(train_call, variables, batches).values()
        >>> print(found.batch.mean.ravel(), found.moving.mean, found.population.mean)
        [2. 4.] [0.] [3.]
        >>> error = normalization_error(found.moving, found.population)
        >>> print(error.mean.round(2), error.std.round(2))
        [3.] [2.24]

    References:
        Ioffe & Szegedy (2015), Algorithm 2; Wu & Johnson (2021), "Rethinking 'Batch' in
        BatchNorm", section 3.
    """
    batches = list(batches)
    estimate = functools.partial(
        recompute_batch_stats,
        apply_fn,
        variables,
        method=method,
        axis_name=axis_name,
        layers=layers,
    )
    population = _stats(variables, estimate(batches))
    each = [_stats(variables, estimate([batch])) for batch in batches]
    moving = _stats(variables, None)
    found = {}
    for path in choose_layers(layers, moving):
        both = zip(*(stats[path] for stats in each), strict=True)
        stacked: list[Any] = [np.stack(values) for values in both]
        found[layer_name(path)] = LayerStatistics(
            batch=BatchStats(*stacked),
            moving=BatchStats(*moving[path]),
            population=BatchStats(*population[path]),
        )
    return found


def normalization_error(
    used: BatchStats, actual: BatchStats, epsilon: float = 1e-5
) -> NormalizationError:
    r"""Return the mean and standard deviation after normalization by other statistics.

    $$
    \mathrm{mean} = \frac{\mu - \mu_u}{\sqrt{\sigma_u^2 + \epsilon}}, \quad
    \mathrm{std} = \sqrt{\frac{\sigma^2 + \epsilon}{\sigma_u^2 + \epsilon}}
    $$

    They are 0 and 1 if the two statistics are equal. Their unit is that of the layer's
    output before scale and bias, so that you can compare layers and channels. They are
    the corrections $d$ and $r$ of batch renormalization.

    Args:
        used: the statistics $\mu_u$ and $\sigma_u^2$ that normalize, such as the moving
            averages.
        actual: the statistics $\mu$ and $\sigma^2$ of the values, such as the
            population statistics, of a shape that broadcasts.
        epsilon: epsilon of the layer.

    Returns:
        The mean and the standard deviation, of the broadcast shape.

    Examples:
        >>> import numpy as np
        >>> from bnjax import BatchStats
        >>> one, four = np.ones(1), np.full(1, 4.0)
        >>> error = normalization_error(BatchStats(one, four), BatchStats(four, one))
        >>> print(error.mean.round(3), error.std.round(3))
        [1.5] [0.5]

    References:
        Ioffe (2017), "Batch Renormalization", section 3.
    """
    mean, var, used_mean, used_var = (
        np.asarray(value, np.float64)
        for value in (actual.mean, actual.var, used.mean, used.var)
    )
    std = np.sqrt(used_var + epsilon)
    return NormalizationError((mean - used_mean) / std, np.sqrt(var + epsilon) / std)


def compare_scores(
    train_scores: ScoreFn,
    eval_scores: ScoreFn,
    variables: Any,
    population: Any,
    batches: Iterable[Any],
) -> Scores:
    """Return the scores of a network with each kind of statistics.

    The scores are of the same examples, so that you can compare two kinds example by
    example: the mean of the differences is the cost of one kind, and the standard error
    of this mean tells the cost from chance.

    Args:
        train_scores: `train_scores(variables, batch)`, where the layers normalize by
            batch statistics. It returns arrays of shape (examples,) by name, such as
            the loss and whether the class was right. New running statistics are
            ignored.
        eval_scores: the same function, where the layers normalize by running
            statistics. Both functions are compiled once for each function object:
            define them outside of a loop.
        variables: the variables of a linen network, or an nnx.Module, whose functions
            may call `model.train()` and `model.eval()`. The function does not change
            them.
        population: the result of `bnjax.population.recompute_batch_stats` over
            examples of the training set.
        batches: the batches for both functions. With batch statistics, the score of an
            example depends on the rest of its batch: shuffle the examples.

    Returns:
        The scores of all examples with each kind of statistics.

    Raises:
        TypeError: if the variables are of another kind.
        ValueError: if there are no batches, or not one score for each example.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from bnjax.diagnostics import compare_scores
        >>> from bnjax.linen import BatchNorm
        >>> from bnjax.population import recompute_batch_stats
        >>> model, x = BatchNorm(), jnp.array([[1.0], [3.0], [2.0], [6.0]])
        >>> def train_call(variables, x):
        ...     return model.apply(variables, x, False, mutable=["batch_stats"])
        >>> def train_scores(variables, x):
        ...     return {"square": jnp.square(train_call(variables, x)[0])[:, 0]}
        >>> def eval_scores(variables, x):
        ...     return {"square": jnp.square(model.apply(variables, x, True))[:, 0]}
        >>> variables = model.init(jax.random.key(0), x, True)
        >>> population = recompute_batch_stats(train_call, variables, [x])
        >>> found = compare_scores(
        ...     train_scores, eval_scores, variables, population, [x]
        ... )
        >>> for scores in found:
        ...     print(scores["square"].mean().round(2))
        1.0
        12.5
        0.75

    References:
        Wu & Johnson (2021), "Rethinking 'Batch' in BatchNorm", sections 3 and 4.
    """
    batches = list(batches)
    if not batches:
        raise ValueError(
            "compare_scores: there are no batches; expected one or more. A generator "
            "that was used before is empty."
        )
    of_population = _with_stats(variables, population)
    return Scores(
        _scores(train_scores, variables, batches),
        _scores(eval_scores, variables, batches),
        _scores(eval_scores, of_population, batches),
    )


def _with_stats(variables: Any, batch_stats: Any) -> Any:
    """Return the variables with statistics from `recompute_batch_stats`."""
    if isinstance(variables, nnx.Module):
        model = nnx.clone(variables)
        nnx.update(model, batch_stats)
        return model
    return {**variables, "batch_stats": batch_stats}


def _stats(variables: Any, batch_stats: Any) -> dict[Any, tuple[Any, ...]]:
    """Return mean and variance by path: the given ones, or those of the variables."""
    if batch_stats is not None:
        variables = _with_stats(variables, batch_stats)
    kind: Any = NnxNetwork if isinstance(variables, nnx.Module) else LinenNetwork
    return {
        path: tuple(np.asarray(value, np.float64) for value in stats)
        for path, stats in kind(variables).stats().items()
    }


def _scores(
    score_fn: ScoreFn, variables: Any, batches: list[Any]
) -> dict[str, np.ndarray]:
    structure, params, rest = split_params(variables, "compare_scores")
    found = [_call(score_fn, structure, params, rest, batch) for batch in batches]
    shapes = [{name: value.shape for name, value in each.items()} for each in found]
    for each in shapes:
        lengths = set(each.values())
        if (
            len(lengths) != 1
            or len(min(lengths)) != 1
            or each.keys() != shapes[0].keys()
        ):
            raise ValueError(
                f"compare_scores: {score_fn.__name__} returned shapes {each}; expected "
                "arrays of shape (examples,), by the same names for every batch, such "
                "as {'loss': losses, 'accuracy': logits.argmax(-1) == labels}."
            )
    return {
        name: np.concatenate([np.asarray(each[name], np.float64) for each in found])
        for name in shapes[0]
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(
    score_fn: ScoreFn, structure: Any, params: Any, rest: Any, batch: Any
) -> dict[str, jax.Array]:
    return dict(score_fn(join_params(structure, params, rest), batch))
