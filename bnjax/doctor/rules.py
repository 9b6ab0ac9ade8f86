"""The table of rules: one rule for each mistake.

A rule is a pure function of an `Examination`. It yields a path, evidence and a sentence
for each place with its mistake. If one mistake would also trigger other rules on a
layer, only its own rule reports the layer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from bnjax.doctor.facts import Examination, Layer

Severity = Literal["error", "warning", "info"]
Evidence = dict[str, Any]
Found = Iterable[tuple[str, Evidence, str]]

SILENT = 1e-5
"""A channel is dead if its scale is below this fraction of the layer's largest."""
FEW = 8
"""Statistics of fewer values per channel are too noisy."""
FAR = 0.5
"""The largest distance of the statistics, beyond chance, that training explains."""
PYTORCH_MOMENTUM = 0.5
"""Below this value, momentum was probably meant as the weight of the new value."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One mistake: its name, its severity, the check that finds it, and the fix."""

    name: str
    severity: Severity
    check: Callable[[Examination], Found]
    fix: str


def _nonfinite(seen: Examination) -> Found:
    if seen.nonfinite is not None:
        path, where = seen.nonfinite
        message = f"The first value that is not finite is in its {where}."
        yield path, {"in": where}, message


def _never_updated(seen: Examination) -> Found:
    for layer in seen.layers:
        if layer.never_updated:
            evidence = {"mean": 0.0, "var": 1.0, "features": layer.mean.size}
            yield layer.path, evidence, "The running mean is 0 and the variance is 1."


def _far(seen: Examination) -> Found:
    for layer in seen.layers:
        batch, distance = layer.batch, layer.distance(layer.batch)
        limit = FAR + 2 * layer.chance
        other = layer.never_updated or layer.stale or layer.lost_digits
        if batch is None or distance <= limit or other or (layer.var < 0).any():
            continue
        var, batch_var = layer.var + layer.epsilon, batch.var + layer.epsilon
        off = np.abs(layer.mean - batch.mean) / np.sqrt(batch_var)
        evidence = {
            "distance": distance,
            "limit": limit,
            "mean_off_by_std": float(np.median(off)),
            "var_times": float(np.median(var / batch_var)),
        }
        message = "The running statistics are far from the statistics of the batch."
        yield layer.path, evidence, message


def _stale(seen: Examination) -> Found:
    stale = [layer for layer in seen.layers if layer.stale]
    if stale:
        worst = max(stale, key=lambda layer: layer.distance(layer.batch))
        evidence = {
            "distance": worst.distance(worst.batch),
            "distance_before_average": worst.distance(worst.before),
            "layers": len(stale),
        }
        yield (
            worst.path,
            evidence,
            "The statistics belong to the parameters before averaging.",
        )


def _batch_in_evaluation(seen: Examination) -> Found:
    for layer in seen.layers:
        calls = layer.eval_calls
        batch = sum(not call.frozen for call in calls)
        if batch:
            evidence = {"calls": len(calls), "by_the_batch": batch}
            message = "It normalizes by batch statistics in evaluation."
            yield layer.path, evidence, message


def _frozen_in_training(seen: Examination) -> Found:
    called = [layer for layer in seen.layers if layer.calls]
    frozen = [layer for layer in called if all(call.frozen for call in layer.calls)]
    for layer in frozen:
        evidence = {"layers": len(called), "frozen": len(frozen)}
        yield (
            layer.path,
            evidence,
            "It normalizes by running statistics in training.",
        )


def _dropout_in_evaluation(seen: Examination) -> Found:
    for call in seen.eval_dropouts:
        yield call.path, {"rate": call.rate}, "It drops values in evaluation."


def _bias_before(seen: Examination) -> Found:
    for bias, layer in seen.biases:
        message = f"{layer} subtracts its mean, which cancels this bias."
        yield bias, {"layer": layer}, message


def _decayed(seen: Examination) -> Found:
    for path, rate in seen.decay.items():
        yield path, {"per_step": rate}, "L2 or weight decay pulls it toward 0."


def _values(layer: Layer) -> int:
    """The number of values per channel normalized together, in the smallest call."""
    values = [call.values for call in layer.calls if not call.frozen]
    if layer.batch is not None and values:
        values.append(int(layer.batch.count.min(initial=np.inf)))
    return min((value for value in values if value), default=0)


def _one_value(seen: Examination) -> Found:
    for layer in seen.layers:
        if _values(layer) == 1:
            yield (
                layer.path,
                {"values": 1},
                "It normalizes one value per channel: its output is its bias.",
            )


def _few_values(seen: Examination) -> Found:
    for layer in seen.layers:
        if 1 < (values := _values(layer)) < FEW:
            evidence = {"values": values, "error_of_mean_in_std": values**-0.5}
            message = f"It normalizes only {values} values per channel."
            yield layer.path, evidence, message


def _replicas_differ(seen: Examination) -> Found:
    for path, (copies, difference) in seen.replicas.items():
        evidence = {"copies": copies, "largest_difference": difference}
        yield path, evidence, f"Its {copies} copies on the devices differ."


def _negative(seen: Examination) -> Found:
    for layer in seen.layers:
        if count := int((layer.var < 0).sum()):
            evidence = {"channels": count, "smallest": float(layer.var.min())}
            yield layer.path, evidence, "A running variance is negative."


def _dead(seen: Examination) -> Found:
    for layer in seen.layers:
        flat = layer.flat & (layer.var >= 0)
        silent = np.zeros_like(flat)
        if layer.scale is not None and (most := np.abs(layer.scale).max()) > 0.1:
            # A layer at the end of a residual block may start with scales of 0.
            scale = np.abs(layer.scale)
            # Several positions may share a mean and have a scale each.
            silent = scale.reshape(-1, flat.size).max(0) < SILENT * most
        dead = flat | silent
        if dead.any() and not layer.lost_digits:
            evidence = {
                "dead": int(dead.sum()),
                "features": dead.size,
                "var_near_zero": int(flat.sum()),
                "scale_near_zero": int(silent.sum()),
                "first_channel": int(np.argmax(dead)),
            }
            message = f"{dead.sum()} of {dead.size} channels have a constant output."
            yield layer.path, evidence, message


def _epsilon(seen: Examination) -> Found:
    for layer in seen.layers:
        live = layer.var[~layer.flat]
        middle = float(np.median(live)) if live.size else math.inf
        other = layer.never_updated or layer.lost_digits
        if not other and 0 < middle <= layer.epsilon:
            shrunk = math.sqrt(middle / (middle + layer.epsilon))
            evidence = {
                "epsilon": layer.epsilon,
                "median_var": middle,
                "std_of_output": shrunk,
            }
            yield layer.path, evidence, "Epsilon is as large as the running variance."


def _momentum(seen: Examination) -> Found:
    for layer in seen.layers:
        for momentum in {c.momentum for c in layer.calls if c.momentum is not None}:
            if momentum < PYTORCH_MOMENTUM:
                evidence = {"momentum": momentum, "likely_meant": 1 - momentum}
                yield (
                    layer.path,
                    evidence,
                    f"Its momentum of {momentum:g} keeps little of the old statistics.",
                )


def _half_precision(seen: Examination) -> Found:
    for layer in seen.layers:
        if jnp.dtype(layer.dtype).itemsize < 4:
            spacing = float(jnp.finfo(layer.dtype).eps)
            evidence = {"dtype": jnp.dtype(layer.dtype).name, "spacing": spacing}
            yield (
                layer.path,
                evidence,
                "Running statistics in half precision lose small updates.",
            )


def _dropout_before(seen: Examination) -> Found:
    for layer, dropout in seen.dropouts:
        evidence = {"dropout": dropout.path, "rate": dropout.rate}
        message = (
            f"{dropout.path} comes before it: the variance of its input differs "
            "between training and evaluation."
        )
        yield layer, evidence, message


def _norm_after_norm(seen: Examination) -> Found:
    for layer, before in seen.norms:
        yield layer, {"before": before}, f"It normalizes the output of {before} again."


def _lost_digits(seen: Examination) -> Found:
    for layer in seen.layers:
        if layer.lost_digits:
            error, spacing = layer.lost
            evidence = {"relative_error_of_var": error, "input_spacing_in_std": spacing}
            yield layer.path, evidence, "Its variance is lost to rounding."


def _not_examined(seen: Examination) -> Found:
    for layer in seen.layers:
        if not layer.calls:
            reason = "it is not a BatchNorm" if layer.moved else "it was not called"
            message = f"It has a running mean and variance, but {reason}."
            yield layer.path, {"features": layer.mean.size}, message


RULES = (
    Rule(
        "nonfinite",
        "error",
        _nonfinite,
        "Look there for an overflow, a division by 0, or too high a learning rate.",
    ),
    Rule(
        "statistics-never-updated",
        "error",
        _never_updated,
        "Keep the new statistics of each training step: mutable=['batch_stats'] in "
        "linen, the model's state in nnx.",
    ),
    Rule(
        "statistics-stale",
        "error",
        _stale,
        "Re-estimate them with bnjax.population.recompute_batch_stats.",
    ),
    Rule(
        "statistics-far",
        "error",
        _far,
        "Train longer or with a lower momentum, or re-estimate them with "
        "bnjax.population.recompute_batch_stats; give batches prepared as in training.",
    ),
    Rule(
        "batch-in-evaluation",
        "error",
        _batch_in_evaluation,
        "Pass use_running_average=not train to it; in nnx omit the argument and call "
        "model.eval(). If the call that you gave to doctor passes the mode, also give "
        "evaluate=.",
    ),
    Rule(
        "frozen-in-training",
        "warning",
        _frozen_in_training,
        "Pass use_running_average=not train to it, or call model.train() in nnx; if it "
        "is frozen on purpose, ignore this rule.",
    ),
    Rule(
        "dropout-in-evaluation",
        "error",
        _dropout_in_evaluation,
        "Pass deterministic=not train to it, or call model.eval() in nnx.",
    ),
    Rule("bias-before-norm", "warning", _bias_before, "Set use_bias=False there."),
    Rule(
        "decayed-norm",
        "warning",
        _decayed,
        "Exclude it from the decay: give the optimizer a mask.",
    ),
    Rule(
        "one-value",
        "error",
        _one_value,
        "Use a larger batch, or share statistics between devices with axis_name.",
    ),
    Rule(
        "few-values",
        "warning",
        _few_values,
        "Use a larger batch, share statistics with axis_name, or use another norm.",
    ),
    Rule(
        "replicas-differ",
        "error",
        _replicas_differ,
        "Share statistics with axis_name, or average them over the devices before you "
        "save them.",
    ),
    Rule(
        "variance-negative",
        "error",
        _negative,
        "Re-estimate the statistics with bnjax.population.recompute_batch_stats.",
    ),
    Rule(
        "dead-channels",
        "warning",
        _dead,
        "Lower the learning rate or the decay, or remove the channels.",
    ),
    Rule(
        "epsilon-large",
        "warning",
        _epsilon,
        "Use a smaller epsilon, or larger weights before the layer.",
    ),
    Rule(
        "momentum-of-pytorch",
        "warning",
        _momentum,
        "Use 1 - momentum: in Flax, momentum is the weight of the old statistics.",
    ),
    Rule(
        "half-precision-statistics",
        "error",
        _half_precision,
        "Keep them in float32: force_float32_reductions=True, and no cast of "
        "batch_stats.",
    ),
    Rule(
        "dropout-before-norm",
        "warning",
        _dropout_before,
        "Move the dropout after the last batch norm.",
    ),
    Rule("norm-after-norm", "warning", _norm_after_norm, "Remove one of the two."),
    Rule(
        "lost-digits",
        "error",
        _lost_digits,
        "Subtract the mean of the data first, or use bnjax's layer with "
        "use_fast_variance=False on float32 inputs.",
    ),
    Rule(
        "not-examined",
        "info",
        _not_examined,
        "Derive it from flax's or bnjax's BatchNorm, or call it.",
    ),
)
