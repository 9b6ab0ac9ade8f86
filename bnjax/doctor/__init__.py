"""Mistakes with batch normalization, found in a model: what, where, how bad, the fix.

    from bnjax.doctor import doctor
    for finding in doctor(model, variables, batch):
        print(finding)

The network goes through one call of training, traced and compiled once, and one trace
of evaluation. docs/library/doctor.md says what each finding means.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from bnjax import _validate
from bnjax.doctor.arrays import decay_rates, differing_replicas, first_replica
from bnjax.doctor.calls import linen_call
from bnjax.doctor.examination import examine
from bnjax.doctor.rules import RULES, Evidence, Rule, Severity
from bnjax.population import LinenNetwork, NnxNetwork

__all__ = ["RULES", "Finding", "Rule", "doctor"]

Call = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A mistake in a place.

    Attributes:
        rule: its name, one of `RULES`.
        severity: "error" where outputs or statistics are wrong, "warning" where
            training suffers, "info" for what could not be looked at.
        path: of the layer, or of the parameter, such as "block_1/bn".
        evidence: the numbers it was found by.
        message: what is wrong, in a sentence.
        fix: what to do, in a sentence.
    """

    rule: str
    severity: Severity
    path: str
    evidence: Evidence
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.path}: {self.message} {self.fix} [{self.rule}]"


def doctor(
    model: nn.Module | nnx.Module | Call,
    variables: Any,
    batch: Any,
    *,
    evaluate: Call | None = None,
    optimizer: Any = None,
    penalty: Callable[[Any], Any] | None = None,
    params_before_average: Any = None,
    axis_name: str | None = None,
    replicated: bool = False,
    ignore: Collection[str] = (),
) -> tuple[Finding, ...]:
    """Find the mistakes with batch normalization in a model.

    Args:
        model: a linen module, whose call may have an argument `train`, `training` or
            `is_training` (or `deterministic`, `use_running_average` for the opposite);
            an nnx model as it is in training; or the call of a training step,
            `call(variables, batch)`, as `bnjax.population.recompute_batch_stats` takes
            it, for models that are called in another way.
        variables: of a linen model, "params" and "batch_stats" among them; None where
            `model` is an nnx model; that model where `model` is a call. They stay as
            they are.
        batch: what the model is called with: the examples that are normalized together
            in training, prepared as there. Of a call, whatever it takes.
        evaluate: the call of evaluation, where `model` is the call of a training step
            of linen. None: the layers' modes in evaluation are not looked at. An nnx
            model is called the same way after `model.eval()`.
        optimizer: of Optax, to see whether it decays scales or biases.
        penalty: what the loss adds for the parameters, a function of "params" (of the
            State of nnx.Param), to see whether it decays them.
        params_before_average: where the parameters are an average (EMA, SWA), those
            that training moved, to see whether the statistics still belong to them.
        axis_name: of the axis by which the layers share statistics; `batch` then holds
            the examples of all devices that share.
        replicated: each array of `variables` has a first axis of devices, as pmap has
            it; the first entry is looked at, after it is compared with the others.
        ignore: names of rules to leave out.

    Returns:
        The findings, in the order of `RULES`. None for a model that is well.

    Raises:
        TypeError: for a model or variables of another kind.
        ValueError: for a model without batch norm layers, or an unknown rule.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from bnjax.doctor import doctor
        >>> from bnjax.linen import BatchNorm
        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train):
        ...         x = nn.Dense(4)(x)
        ...         return BatchNorm(use_running_average=not train, momentum=0.9)(x)
        >>> x = jax.random.normal(jax.random.key(0), (64, 3))
        >>> variables = Net().init(jax.random.key(1), x, train=False)
        >>> for finding in doctor(Net(), variables, x):
        ...     print(finding.severity, finding.path, finding.message)
        error BatchNorm_0 The running mean is 0 and the variance 1.
        warning Dense_0/bias The mean of BatchNorm_0 takes it away again: it trains for nothing.
    """  # noqa: E501 - the output of a doctest is one line
    names = [rule.name for rule in RULES]
    for name in ignore:
        if name not in names:
            raise ValueError(
                f"doctor: ignore={name!r} is no rule."
                f"{_validate.did_you_mean(name, names)} Expected some of: "
                f"{', '.join(names)}."
            )
    network, train, evaluate = _calls(model, variables, evaluate)
    replicas = differing_replicas(network, replicated=replicated)
    if replicated:
        network = first_replica(network)
    seen = examine(network, train, evaluate, batch, params_before_average, axis_name)
    layers = [layer.path for layer in seen.layers]
    decay = decay_rates(network, layers, optimizer, penalty)
    seen = dataclasses.replace(seen, replicas=replicas, decay=decay)
    return tuple(
        Finding(rule.name, rule.severity, path, _plain(evidence), message, rule.fix)
        for rule in RULES
        if rule.name not in ignore
        for path, evidence, message in rule.check(seen)
    )


def _plain(evidence: Evidence) -> Evidence:
    """The same as JSON has it, which knows no infinity."""
    return {
        name: str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in evidence.items()
    }


def _calls(
    model: Any, variables: Any, evaluate: Call | None
) -> tuple[LinenNetwork | NnxNetwork, Call, Call | None]:
    """The network, its call in training and its call in evaluation."""
    if isinstance(model, nnx.Module) and variables is None:
        network, train = NnxNetwork(model), lambda model, batch: model(batch)
        evaluate = evaluate or train
    elif isinstance(variables, nnx.Module) and callable(model):
        network, train = NnxNetwork(variables), model
        evaluate = evaluate or train
    elif isinstance(variables, Mapping) and isinstance(model, nn.Module):
        network, train = LinenNetwork(variables), linen_call(model, training=True)
        evaluate = evaluate or linen_call(model, training=False)
    elif isinstance(variables, Mapping) and callable(model):
        network, train = LinenNetwork(variables), model
    else:
        raise TypeError(
            f"doctor: model is of type {type(model).__name__} and variables of type "
            f"{type(variables).__name__}; expected a linen module and its variables, "
            "an nnx model and None, or the call of a training step and either the "
            "variables of linen or the nnx model."
        )
    if not network.stats():
        raise ValueError(
            "doctor: the network has no batch norm layer: there is no mean and "
            "variance in its 'batch_stats'. Expected the variables of a network with "
            "flax's or bnjax's BatchNorm."
        )
    return network, train, evaluate
