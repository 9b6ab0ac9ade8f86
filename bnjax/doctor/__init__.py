"""Find mistakes with batch normalization in a model, and say how to fix them.

The doctor traces and compiles one training call of the network, and traces one call of
evaluation. Print its findings with::

    from bnjax.doctor import doctor

    for finding in doctor(model, variables, batch):
        print(finding)

docs/library/doctor.md says what each finding means.
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
    """A mistake in one layer or one array.

    Attributes:
        rule: the name of the rule that found it, one of `RULES`.
        severity: "error" if outputs or statistics are wrong, "warning" if training
            suffers, "info" if something could not be examined.
        path: the path of the layer or of the parameter, such as "block_1/bn".
        evidence: the numbers that show the mistake.
        message: what is wrong, in one sentence.
        fix: what to do, in one sentence.
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
    ignore: str | Collection[str] = (),
) -> tuple[Finding, ...]:
    """Find the mistakes with batch normalization in a model.

    Args:
        model: a linen module whose call has an argument `train`, `training` or
            `is_training`, or one of the opposite sense, `deterministic` or
            `use_running_average`, or none of these; or an nnx model in training mode.
            For a model that is called in another way, the call of a training step,
            `call(variables, batch)`, as for `bnjax.population.recompute_batch_stats`.
        variables: the variables of a linen model, with "params" and "batch_stats". If
            `model` is an nnx model, None; if `model` is a call of an nnx model, that
            nnx model. The doctor does not change them.
        batch: the input of the model: the examples that training normalizes together,
            prepared as in training. If `model` is a call, the second argument of the
            call.
        evaluate: the call of evaluation, if `model` is the call of a linen training
            step. If None, the doctor does not check the modes of layers in evaluation.
            The doctor calls an nnx model in the same way after `model.eval()`; give
            `evaluate` if the call itself passes the mode, such as `train=True`.
        optimizer: an Optax optimizer, to check whether it decays scales or biases.
        penalty: the term of the loss for the parameters, as a function of "params" (for
            nnx, of the State of nnx.Param), to check whether it decays scales or
            biases.
        params_before_average: if the parameters of the model are an average (EMA, SWA),
            the parameters that training updates, to check whether the statistics
            still belong to those.
        axis_name: the axis along which the layers share statistics. `batch` then holds
            the examples of all devices that share.
        replicated: whether each array of `variables` has a first axis of devices, as
            under pmap. The doctor compares the entries and then examines the first.
        ignore: names of rules to skip, or one name.

    Returns:
        The findings, in the order of `RULES`; empty if the doctor finds no mistake.

    Raises:
        TypeError: if `model` or `variables` is of another kind.
        ValueError: if the model has no batch norm layer, or if a rule is unknown.

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
        error BatchNorm_0 The running mean is 0 and the variance is 1.
        warning Dense_0/bias BatchNorm_0 subtracts its mean, which cancels this bias.
    """
    names = [rule.name for rule in RULES]
    ignore = (ignore,) if isinstance(ignore, str) else ignore
    for name in ignore:
        if name not in names:
            raise ValueError(
                f"doctor: ignore={name!r} is not a rule."
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
    """Return the evidence for JSON, which has no infinity."""
    return {
        name: str(value)
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in evidence.items()
    }


def _calls(
    model: Any, variables: Any, evaluate: Call | None
) -> tuple[LinenNetwork | NnxNetwork, Call, Call | None]:
    """Return the network, its call in training and its call in evaluation."""
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
