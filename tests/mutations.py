"""Break the code on purpose, one line at a time, and see the tests notice.

    python -m tests.mutations
    python -m tests.mutations kernels: "running mean"    # those of these names

Each mutation is made in a copy of the repository and must make the named tests fail.
"""

import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A line of a file, what it becomes, and the tests that should fail.

    Attributes:
        name: what goes wrong.
        file: relative to the root of the repository.
        line: text that is in the file once.
        becomes: what is there in its place.
        tests: a file of tests, or the id of one test.
    """

    name: str
    file: str
    line: str
    becomes: str
    tests: str


TRANSFORM = "tests/core/test_transform.py"
MOMENTS = "tests/core/test_moments.py"
ORIGIN = "tests/core/test_origin.py"
FORMS = "tests/core/test_derivative_forms.py"
DERIVATIVES = "tests/core/test_derivatives.py"
SHARED = "tests/integration/test_shared_statistics.py"
BLOCKS = "tests/core/test_cpu_blocks.py"
ERRORS = "tests/core/test_errors.py"
CPU_VALUES = "tests/core/test_cpu_values.py"
CPU_CALLS = "tests/core/test_cpu_calls.py"
CPU_BUILD = "tests/core/test_cpu_build.py"
CPU_PROGRAMS = "tests/core/test_cpu_programs.py"
LINEN = "tests/test_linen.py"
LAYERS = "tests/test_layers.py"
GHOST = "tests/variants/test_ghost.py"
FOLDING = "tests/folding/test_fold.py"
PAIRS = "tests/folding/test_pairs.py"
POPULATION = "tests/population/test_population.py"

# Features first, which the kernels of a CPU do not support.
XLA_GRADIENTS = f"{TRANSFORM}::test_output_and_gradients[channels first]"
BOTH_MODES = f"{DERIVATIVES}::test_both_modes_and_second_order"
CPU_GRADIENTS = f"{CPU_VALUES}::test_gradients_are_those_of_the_paper"
HIDDEN = f"{TRANSFORM}::test_what_a_mask_hides_changes_nothing"

MUTATIONS = [
    Mutation(
        "swapped momentum",
        "bnjax/functional.py",
        "return keep * old + take * jnp.where(enough, new, zero)",
        "return take * old + keep * jnp.where(enough, new, zero)",
        f"{TRANSFORM}::test_running_statistics",
    ),
    Mutation(
        "m / (m - 1) upside down",
        "bnjax/functional.py",
        "var = var * (batch.count / jnp.maximum(batch.count - 1, 1))",
        "var = var * (jnp.maximum(batch.count - 1, 1) / batch.count)",
        f"{TRANSFORM}::test_running_statistics",
    ),
    Mutation(
        "no guard for one value",
        "bnjax/functional.py",
        "enough = batch.count > 1",
        "enough = batch.count > 0",
        f"{TRANSFORM}::test_weights_of_at_most_one_leave_the_statistics",
    ),
    Mutation(
        "batch mean without its origin",
        "bnjax/functional.py",
        "return y, Moments(origin + centered.mean,",
        "return y, Moments(centered.mean,",
        f"{TRANSFORM}::test_running_statistics",
    ),
    Mutation(
        "moments without their origin",
        "bnjax/functional.py",
        "return Moments(origin + centered.mean,",
        "return Moments(centered.mean,",
        f"{MOMENTS}::test_merge",
    ),
    Mutation(
        "moments without a name for a policy",
        "bnjax/functional.py",
        "origin, centered = checkpoint_named(",
        "origin, centered = (",
        f"{DERIVATIVES}::test_moments_are_named",
    ),
    Mutation(
        "statistics moved although update_stats is False",
        "bnjax/functional.py",
        "if not update_stats:",
        "if not unbiased:",
        f"{TRANSFORM}::test_update_stats_false_changes_the_output_alone",
    ),
    Mutation(
        "a lost running mean is an origin",
        "bnjax/functional.py",
        "origin = jnp.where(jnp.isfinite(origin), origin, 0)",
        "origin = jnp.where(origin == origin, origin, 0)",
        f"{ORIGIN}::test_a_running_mean_that_is_lost_does_not_spoil_the_output",
    ),
    Mutation(
        "the running mean is never an origin",
        "bnjax/functional.py",
        "origin = jnp.asarray(batch_stats.mean) if use_fast_variance else None",
        "origin = None",
        f"{SHARED}::test_bytes_do_not_grow_with_devices",
    ),
    Mutation(
        "use_fast_variance=False is not looked at",
        "bnjax/functional.py",
        "origin = jnp.asarray(batch_stats.mean) if use_fast_variance else None",
        "origin = jnp.asarray(batch_stats.mean)",
        f"{ORIGIN}::test_exact_by_name",
    ),
    Mutation(
        "the origin of normalize_batch is not looked at",
        "bnjax/functional.py",
        "origin = None if origin is None else jnp.asarray(origin)",
        "origin = None",
        f"{ORIGIN}::test_the_origin_of_normalize_batch",
    ),
    Mutation(
        "values of one device decide what is too few",
        "bnjax/functional.py",
        "if reduction.local_count(shape) * reduction.devices() < 2:",
        "if reduction.local_count(shape) < 2:",
        f"{SHARED}::test_one_example_on_each_device",
    ),
    Mutation(
        "one value per channel is a batch",
        "bnjax/functional.py",
        "if reduction.local_count(shape) * reduction.devices() < 2:",
        "if reduction.local_count(shape) * reduction.devices() < 1:",
        f"{ERRORS}::test_message[one value]",
    ),
    Mutation(
        "sums in half precision",
        "bnjax/functional.py",
        "compute_dtype = _validate.promoted(x.dtype, jnp.float32, dtype)",
        "compute_dtype = _validate.promoted(x.dtype, dtype)",
        f"{MOMENTS}::test_sums_of_half_precision_do_not_overflow",
    ),
    Mutation(
        "the policy does not keep the input",
        "bnjax/functional.py",
        "x = checkpoint_name(operands.x, _INPUT_NAME)",
        "x = operands.x",
        f"{DERIVATIVES}::test_the_policy_keeps_what_batch_norm_is_given",
    ),
    Mutation(
        "the policy does not keep the statistics",
        "bnjax/functional.py",
        "_INPUT_NAME, CHECKPOINT_NAME\n",
        "_INPUT_NAME,\n",
        f"{DERIVATIVES}::test_the_policy_keeps_what_batch_norm_is_given",
    ),
    Mutation(
        "mean of means in joining",
        "bnjax/_moments.py",
        "count, first, second = total(jnp.stack([parts.count, first, second]))",
        "count, first, second = total(\n        jnp.stack([0 * first + 1, parts."
        "mean, second])\n    )",
        f"{MOMENTS}::test_merge",
    ),
    Mutation(
        "spread between the parts forgotten",
        "bnjax/_moments.py",
        "second = moments.var + jnp.square(moments.mean)",
        "second = moments.var",
        f"{MOMENTS}::test_merge",
    ),
    Mutation(
        "joined about the mean of nothing",
        "bnjax/_moments.py",
        "origin = jnp.where(part.count > 0, part.mean, origin)",
        "origin = part.mean",
        f"{MOMENTS}::test_merge_with_nothing",
    ),
    Mutation(
        "nothing counted is divided by",
        "bnjax/_moments.py",
        "return lax.select(count > 0, count, jnp.ones_like(count))",
        "return count",
        f"{MOMENTS}::test_moments_of_nothing",
    ),
    Mutation(
        "hidden values in the sums",
        "bnjax/_moments.py",
        "distance = jnp.where(counted, powers(x, origin)[0], 0)",
        "distance = powers(x, origin)[0]",
        f"{MOMENTS}::test_moments_of_nothing",
    ),
    Mutation(
        "count of the mask, not of what it covers",
        "bnjax/_moments.py",
        "repeats = count // math.prod(mask.shape[axis] for axis in axes)",
        "repeats = 1",
        f"{TRANSFORM}::test_running_statistics[True-masked examples]",
    ),
    Mutation(
        "weights taken for booleans",
        "bnjax/_moments.py",
        "weights = jnp.where(counted, mask, jnp.zeros_like(mask)).astype(dtype)",
        "weights = counted.astype(dtype)",
        f"{TRANSFORM}::test_weights_count_as_repeats",
    ),
    Mutation(
        "a mask is not looked at on one device",
        "bnjax/_moments.py",
        "    if mask is not None:\n        return _moments_reference(x, mask, None",
        "    if x is None:\n        return _moments_reference(x, mask, None",
        f"{TRANSFORM}::test_running_statistics[True-masked examples]",
    ),
    Mutation(
        "masked sums about zero on one device",
        "bnjax/_moments.py",
        "return _moments_reference(x, mask, None, axes=axes, dtype=dtype)",
        "return _moments_about(x, mask, jnp.zeros((), dtype), axes, dtype)",
        f"{ORIGIN}::test_exact_on_one_device[10000.0-97-weights]",
    ),
    Mutation(
        "masked sums about the running mean on one device",
        "bnjax/_moments.py",
        "def _moments_on_cpu(x, mask, _, *, axes, dtype):\n",
        "def _moments_on_cpu(x, mask, known, *, axes, dtype):\n"
        "    if mask is not None:\n"
        "        return _moments_reference(x, mask, known, axes=axes, dtype=dtype)\n",
        f"{TRANSFORM}::test_mean_far_from_zero",
    ),
    Mutation(
        "an origin of zero on one device",
        "bnjax/_moments.py",
        "return _moments_about(x, None, first_row, axes, dtype, sums=sums)",
        "return _moments_about(x, None, 0 * first_row, axes, dtype, sums=sums)",
        f"{BLOCKS}::test_a_large_mean_costs_no_digits[blocks]",
    ),
    Mutation(
        "exported programs take the running mean",
        "bnjax/_moments.py",
        "cpu=OneDevice(_moments_on_cpu, exported=_moments_on_one_device),",
        "cpu=OneDevice(_moments_on_cpu),",
        f"{ORIGIN}::test_exact_in_a_program_that_is_exported",
    ),
    Mutation(
        "a GPU takes the running mean",
        "bnjax/_moments.py",
        "gpu=OneDevice(_moments_on_one_device, exported=_moments_on_one_device),",
        "",
        f"{ORIGIN}::test_the_first_row_is_the_origin_where_it_costs_nothing",
    ),
    Mutation(
        "a TPU takes the first row",
        "bnjax/_moments.py",
        "gpu=OneDevice(_moments_on_one_device, exported=_moments_on_one_device),",
        "gpu=OneDevice(_moments_on_one_device, exported=_moments_on_one_device),\n "
        "   tpu=OneDevice(_moments_on_one_device, exported=_moments_on_one_device),",
        f"{ORIGIN}::test_the_first_row_is_the_origin_where_it_costs_nothing",
    ),
    Mutation(
        "two passes where the running mean is known",
        "bnjax/_moments.py",
        "if known_origin is not None:",
        "if known_origin is x:",
        f"{ORIGIN}::test_the_documented_bound[1000.0-partitioned]",
    ),
    Mutation(
        "the mean that is an origin is rounded anew by each fusion",
        "bnjax/_moments.py",
        "mean = round_once(total / safe_count(count))",
        "mean = total / safe_count(count)",
        f"{ORIGIN}::test_exact_on_one_device[10000.0-97-first hidden]",
    ),
    Mutation(
        "the devices' common origin is rounded anew by each fusion",
        "bnjax/_moments.py",
        "common = round_once(total / jnp.maximum(number, 1))",
        "common = total / jnp.maximum(number, 1)",
        f"{ORIGIN}::test_the_common_origin_is_rounded_once",
    ),
    Mutation(
        "hidden devices have a say in the common origin",
        "bnjax/_moments.py",
        "offers = (count > 0).astype(dtype)",
        "offers = jnp.ones_like(count)",
        f"{SHARED}::test_large_means_and_hidden_shards[one shard]",
    ),
    Mutation(
        "each device's sums about an origin of its own",
        "bnjax/_moments.py",
        "about = Moments(mean + (origin - common), var, count)",
        "about = Moments(mean, var, count)",
        f"{SHARED}::test_large_means_and_hidden_shards[None]",
    ),
    Mutation(
        "each device's sums about its own origin, not the known one",
        "bnjax/_moments.py",
        "about = Moments(mean + (origin - known_origin), var, count)",
        "about = Moments(mean, var, count)",
        f"{SHARED}::test_unbiased_counts_the_values_of_all_devices",
    ),
    Mutation(
        "no sum over devices about the common origin",
        "bnjax/_moments.py",
        "return common, _merge_about_zero(about, reduction.total)",
        "return common, _merge_about_zero(about, lambda sums: sums)",
        f"{SHARED}::test_large_means_and_hidden_shards[None]",
    ),
    Mutation(
        "no sum over devices about the known origin",
        "bnjax/_moments.py",
        "first, second, *rest = reduction.total(jnp.stack(rows))",
        "first, second, *rest = jnp.stack(rows)",
        f"{SHARED}::test_unbiased_counts_the_values_of_all_devices",
    ),
    Mutation(
        "the count of one device",
        "bnjax/_moments.py",
        "count = jnp.full_like(first, devices * fixed_count)",
        "count = jnp.full_like(first, fixed_count)",
        f"{SHARED}::test_unbiased_counts_the_values_of_all_devices",
    ),
    Mutation(
        "a fixed count under a mask",
        "bnjax/_moments.py",
        "fixed_count = None if mask is not None else reduction.local_count(x.shape)",
        "fixed_count = reduction.local_count(x.shape)",
        f"{SHARED}::test_replicas[vmap-True]",
    ),
    Mutation(
        "a collective for each of the sums",
        "bnjax/_moments.py",
        "first, second, *rest = reduction.total(jnp.stack(rows))",
        "first, second, *rest = map(reduction.total, rows)",
        f"{DERIVATIVES}::test_named_statistics_are_not_computed_again",
    ),
    Mutation(
        "running means that are known to differ are one origin",
        "bnjax/_moments.py",
        "if known_origin is None or varying_axes(known_origin) & tracked:",
        "if known_origin is None:",
        f"{ORIGIN}::test_devices_that_are_known_to_differ_take_two_collectives",
    ),
    Mutation(
        "running means are not compared",
        "bnjax/_moments.py",
        "about, reduction, fixed_count, None if tracked else known_origin",
        "about, reduction, fixed_count, None",
        f"{ORIGIN}::test_devices_with_different_running_means_are_told",
    ),
    Mutation(
        "running means that are known to be equal are compared",
        "bnjax/_moments.py",
        "about, reduction, fixed_count, None if tracked else known_origin",
        "about, reduction, fixed_count, known_origin",
        f"{SHARED}::test_bytes_do_not_grow_with_devices",
    ),
    Mutation(
        "running means are compared to the last digit",
        "bnjax/_moments.py",
        "tolerance = devices * jnp.finfo(origin.dtype).eps * jnp.abs(wanted)",
        "tolerance = 0 * wanted",
        f"{ORIGIN}::test_devices_with_different_running_means_are_told",
    ),
    Mutation(
        "a lost variance is zero",
        "bnjax/_moments.py",
        "var = jnp.maximum(second / divisor - square, least_digit * square)",
        "var = jnp.maximum(second / divisor - square, 0)",
        f"{ORIGIN}::test_a_variance_that_is_lost_leaves_outputs_small",
    ),
    Mutation(
        "a lost variance of several devices is zero",
        "bnjax/_moments.py",
        "joined = _from_sums(count, first, second, _least_digit(first.dtype))",
        "joined = _from_sums(count, first, second)",
        f"{ORIGIN}::test_a_variance_that_is_lost_leaves_outputs_small",
    ),
    Mutation(
        "a variance less than nothing",
        "bnjax/_moments.py",
        "var = jnp.maximum(second / divisor - square, least_digit * square)",
        "var = second / divisor - square",
        f"{ORIGIN}::test_a_variance_that_is_lost_leaves_outputs_small",
    ),
    Mutation(
        "statistics without a name for a policy",
        "bnjax/_moments.py",
        "return jax.tree.map(lambda a: checkpoint_name(a, CHECKPOINT_NAME), "
        "statistics)",
        "return statistics",
        f"{DERIVATIVES}::test_named_statistics_are_not_computed_again",
    ),
    Mutation(
        "complex: the square of the distance for its modulus",
        "bnjax/_moments.py",
        "jnp.square(distance), mask, None,",
        "distance, mask, None,",
        f"{TRANSFORM}::test_complex_inputs",
    ),
    Mutation(
        "complex: no sum over devices",
        "bnjax/_moments.py",
        "return Moments(mean, reduction.total(var) / safe_count(count), count)",
        "return Moments(mean, var / safe_count(count), count)",
        f"{TRANSFORM}::test_complex_inputs[True]",
    ),
    Mutation(
        "no sum over devices backward",
        "bnjax/_derivative.py",
        "sums = reduction.total(jnp.stack(sums))",
        "sums = jnp.stack(sums)",
        f"{SHARED}::test_replicas[vmap-False]",
    ),
    Mutation(
        "gradient of scale summed over devices",
        "bnjax/_derivative.py",
        "slope = inv_std * dscale -",
        "slope = inv_std * reduction.total(dscale) -",
        f"{SHARED}::test_replicas[vmap-False]",
    ),
    Mutation(
        "no gradient through the variance",
        "bnjax/_derivative.py",
        "slope = inv_std * dscale - multiplier * jnp.square(inv_std) * covariance",
        "slope = inv_std * dscale",
        XLA_GRADIENTS,
    ),
    Mutation(
        "no gradient through the mean",
        "bnjax/_derivative.py",
        "offset = dbias - multiplier * first",
        "offset = dbias",
        XLA_GRADIENTS,
    ),
    Mutation(
        "the second moment taken for the covariance",
        "bnjax/_derivative.py",
        "covariance = second - moments.mean * first",
        "covariance = second",
        XLA_GRADIENTS,
    ),
    Mutation(
        "the slope is about the origin",
        "bnjax/_derivative.py",
        "centered = distance - params.mean",
        "centered = distance",
        f"{FORMS}::test_forward_mode_through_an_activation",
    ),
    Mutation(
        "the sums of the gradient are about the origin",
        "bnjax/_derivative.py",
        "return _distance(transform, operands, params) - params.mean",
        "return _distance(transform, operands, params)",
        XLA_GRADIENTS,
    ),
    Mutation(
        "gradients of 16 bits without the origin",
        "bnjax/_derivative.py",
        "(dfirst - params.origin * dsecond)",
        "dfirst",
        f"{FORMS}::test_gradient_of_inputs_of_few_bits",
    ),
    Mutation(
        "gradient of epsilon of the wrong sign",
        "bnjax/_derivative.py",
        "slope = slope - 0.5 * multiplier",
        "slope = slope + 0.5 * multiplier",
        f"{BOTH_MODES}[rows-None-training]",
    ),
    Mutation(
        "half the tangent of the variance",
        "bnjax/_derivative.py",
        "return [dy, first, 2 * covariance]",
        "return [dy, first, covariance]",
        f"{BOTH_MODES}[rows-None-training]",
    ),
    Mutation(
        "no tangent of the mean",
        "bnjax/_derivative.py",
        "return [dy, first, 2 * covariance]",
        "return [dy, 0 * first, 2 * covariance]",
        f"{BOTH_MODES}[rows-None-training]",
    ),
    Mutation(
        "sums of the tangent without weights",
        "bnjax/_derivative.py",
        'weighted where there is a mask."""\n    distance = _distance(transform, '
        "operands, params)\n    if operands.mask is not None:",
        'weighted where there is a mask."""\n    distance = _distance(transform, '
        "operands, params)\n    if operands.mask is dx:",
        f"{BOTH_MODES}[weights-None-training]",
    ),
    Mutation(
        "their transpose without weights",
        "bnjax/_derivative.py",
        "dx = _distance(transform, operands, params) * dsecond + dfirst\n    if "
        "operands.mask is not None:",
        "dx = _distance(transform, operands, params) * dsecond + dfirst\n    if "
        "operands.mask is dx:",
        f"{TRANSFORM}::test_output_and_gradients[weighted examples]",
    ),
    Mutation(
        "their transpose without the first sum",
        "bnjax/_derivative.py",
        "dx = _distance(transform, operands, params) * dsecond + dfirst",
        "dx = _distance(transform, operands, params) * dsecond + 0 * dfirst",
        XLA_GRADIENTS,
    ),
    Mutation(
        "the gradient of x without its multiplier",
        "bnjax/_derivative.py",
        "dx = params.multiplier * transform.cast(dz)",
        "dx = transform.cast(dz)",
        XLA_GRADIENTS,
    ),
    Mutation(
        "the tangent of a residual forgotten",
        "bnjax/_derivative.py",
        "dz = dz + transform.cast(tangents.residual)",
        "pass",
        f"{FORMS}::test_forward_mode_through_an_activation",
    ),
    Mutation(
        "forward mode through a ReLU at zero",
        "bnjax/_derivative.py",
        "dz = jnp.where(operands.output > 0, dz, 0)",
        "dz = jnp.where(operands.output >= 0, dz, 0)",
        f"{FORMS}::test_forward_mode_through_an_activation",
    ),
    Mutation(
        "a ReLU after a residual lets all pass",
        "bnjax/_derivative.py",
        "return [jnp.where(output > 0, dy, 0)]",
        "return [jnp.where(output >= 0, dy, 0)]",
        f"{FORMS}::test_the_forms_of_all_platforms_have_the_same_values",
    ),
    Mutation(
        "a ReLU lets pass what is at zero",
        "bnjax/_derivative.py",
        "return [jnp.where(z > 0, dy, 0)]",
        "return [jnp.where(z >= 0, dy, 0)]",
        f"{FORMS}::test_a_relu_lets_nothing_pass_at_zero",
    ),
    Mutation(
        "on a GPU, a ReLU turns what is below zero around",
        "bnjax/_derivative.py",
        "return [transform.cast(dy) * jnp.maximum(jnp.sign(z), 0)]",
        "return [transform.cast(dy) * jnp.sign(z)]",
        f"{FORMS}::test_the_forms_of_all_platforms_have_the_same_values[relu]",
    ),
    Mutation(
        "a residual is not replaced by the output",
        "bnjax/_derivative.py",
        "operands = operands._replace(bias=None, residual=None, output=y)",
        "pass",
        f"{BLOCKS}::test_a_fused_activation_and_residual[kernels]",
    ),
    Mutation(
        "a residual is kept that nothing needs",
        "bnjax/_derivative.py",
        "operands = operands._replace(bias=None, residual=None)\n",
        "pass\n",
        f"{DERIVATIVES}::test_kept_for_the_backward_pass[f32-None-residual-trainin"
        "g-eager]",
    ),
    Mutation(
        "the activation's derivative left out of the residual's gradient",
        "bnjax/_derivative.py",
        "(dresidual,) = dresidual or [dy]",
        "dresidual = dy",
        f"{BLOCKS}::test_a_fused_activation_and_residual[kernels]",
    ),
    Mutation(
        "an output from statistics without a name",
        "bnjax/_derivative.py",
        "origin, moments = checkpoint_named(statistics)\n",
        "origin, moments = statistics\n",
        f"{DERIVATIVES}::test_named_statistics_are_not_computed_again",
    ),
    Mutation(
        "everything of an activation kept for the backward pass",
        "bnjax/_derivative.py",
        "    @_remat\n    def affine(",
        "    def affine(",
        f"{DERIVATIVES}::test_kept_for_the_backward_pass",
    ),
    Mutation(
        "what an activation closes over is no operand",
        "bnjax/_derivative.py",
        "if not consts:",
        "if transform:",
        f"{DERIVATIVES}::test_an_activation_may_close_over_what_is_differentiated",
    ),
    Mutation(
        "no gradient of what an activation closes over",
        "bnjax/_derivative.py",
        "return [dx, *map(transform.reduction.expand, sums), *dresidual, *dconsts]",
        "return [\n        dx,\n        *map(transform.reduction.expand, sums),\n  "
        "      *dresidual,\n        *(0 * dconst for dconst in dconsts),\n    ]",
        f"{FORMS}::test_large_arrays_with_other_operands[True]",
    ),
    Mutation(
        "an activation that is not elementwise",
        "bnjax/_derivative.py",
        "if (result.shape, result.dtype) != (example.shape, example.dtype):",
        "if result.dtype != example.dtype:",
        f"{ERRORS}::test_message[activation shape]",
    ),
    Mutation(
        "no shift by the mean where there is no bias",
        "bnjax/_derivative.py",
        "shift = -mean * multiplier if shift is None else",
        "shift = None if shift is None else",
        f"{TRANSFORM}::test_without_scale_or_bias[bias]",
    ),
    Mutation(
        "hidden values that are not finite in the output",
        "bnjax/_derivative.py",
        "return jnp.where(_hidden(distance, operands.mask), mean, distance)",
        "return distance",
        HIDDEN,
    ),
    Mutation(
        "what overflows only when it is squared",
        "bnjax/_derivative.py",
        "return ~mask_to_bool(mask) & ~jnp.isfinite(jnp.square(value))",
        "return ~mask_to_bool(mask) & ~jnp.isfinite(value)",
        f"{FORMS}::test_what_is_hidden_and_not_finite_has_no_gradient",
    ),
    Mutation(
        "a hidden residual that is not finite",
        "bnjax/_derivative.py",
        "residual = jnp.where(_hidden(residual, operands.mask), 0, residual)",
        "pass",
        HIDDEN,
    ),
    Mutation(
        "a gradient of what is hidden and not finite",
        "bnjax/_derivative.py",
        "return jnp.where(_hidden(distance, operands.mask), 0, value)",
        "return value",
        f"{FORMS}::test_what_is_hidden_and_not_finite_has_no_gradient",
    ),
    Mutation(
        "blocks of a mask",
        "bnjax/_derivative.py",
        "if operands.mask is not None or operands.consts or operands.residual is n"
        "ot None:",
        "if operands.consts or operands.residual is not None:",
        f"{FORMS}::test_large_arrays_with_a_mask",
    ),
    Mutation(
        "blocks of what an activation depends on",
        "bnjax/_derivative.py",
        "if operands.mask is not None or operands.consts or operands.residual is n"
        "ot None:",
        "if operands.mask is not None or operands.residual is not None:",
        f"{FORMS}::test_large_arrays_with_other_operands",
    ),
    Mutation(
        "blocks of a residual",
        "bnjax/_derivative.py",
        "if operands.mask is not None or operands.consts or operands.residual is n"
        "ot None:",
        "if operands.mask is not None or operands.consts:",
        f"{FORMS}::test_large_arrays_with_other_operands",
    ),
    Mutation(
        "kernels: the gradient of a shared scale not summed over devices",
        "bnjax/_derivative.py",
        "if transform.reduction.axis_name is None and operands.mask is None and alike:",
        "if transform.reduction.axis_name is None and operands.mask is None:",
        f"{CPU_PROGRAMS}::test_devices_with_own_statistics_and_a_shared_scale",
    ),
    Mutation(
        "kernels: they write what XLA could fuse",
        "bnjax/_derivative.py",
        "small = transform.activation is None and size < MAPPED",
        "small = size < 0",
        f"{CPU_PROGRAMS}::test_which_programs_call_them",
    ),
    Mutation(
        "kernels: every activation is none to them",
        "bnjax/_derivative.py",
        "activation=transform.activation,\n        mask",
        "activation=None,\n        mask",
        f"{CPU_PROGRAMS}::test_which_programs_call_them",
    ),
    Mutation(
        "kernels: in a program that is exported",
        "bnjax/_primitive.py",
        "return context.module_context.lowering_parameters.for_export",
        "return False",
        f"{CPU_PROGRAMS}::test_a_program_that_is_exported_calls_none",
    ),
    Mutation(
        "kernels: in a program that XLA divides",
        "bnjax/_primitive.py",
        "return devices > 1",
        "return False",
        f"{CPU_PROGRAMS}::test_a_program_that_xla_divides_calls_none",
    ),
    Mutation(
        "kernels: in no shard_map",
        "bnjax/_primitive.py",
        "return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.man"
        "ual_axes)",
        "return axes.mesh.size > 1",
        f"{CPU_PROGRAMS}::test_each_device_of_a_shard_map_calls_them",
    ),
    Mutation(
        "kernels: in a shard_map over some of the axes",
        "bnjax/_primitive.py",
        "return axes.mesh.size > 1 and set(axes.mesh.axis_names) != set(axes.man"
        "ual_axes)",
        "return False",
        f"{CPU_PROGRAMS}::test_a_shard_map_over_some_of_the_axes_calls_none",
    ),
    Mutation(
        "kernels: for an activation they do not know",
        "bnjax/_cpu/__init__.py",
        "and activation in ACTIVATION_CODES",
        "",
        f"{CPU_VALUES}::test_what_the_kernels_do_not_support",
    ),
    Mutation(
        "kernels: for a mask",
        "bnjax/_cpu/__init__.py",
        "and mask is None",
        "",
        f"{CPU_VALUES}::test_what_the_kernels_do_not_support",
    ),
    Mutation(
        "kernels: for features that are not last",
        "bnjax/_cpu/__init__.py",
        "tuple(axes) == tuple(range(len(axes)))",
        "len(axes) > 0",
        f"{CPU_VALUES}::test_what_the_kernels_do_not_support",
    ),
    Mutation(
        "kernels: for parameters of float64",
        "bnjax/_cpu/__init__.py",
        "and jnp.dtype(compute_dtype) == jnp.float32",
        "",
        f"{CPU_VALUES}::test_what_the_kernels_do_not_support",
    ),
    Mutation(
        "kernels: for a residual of another dtype",
        "bnjax/_cpu/__init__.py",
        "(activation is not None and residual.dtype == x.dtype)",
        "activation is not None",
        f"{CPU_VALUES}::test_what_the_kernels_do_not_support",
    ),
    Mutation(
        "errors: None taken for a number",
        "bnjax/_validate.py",
        'casting="same_kind"',
        'casting="unsafe"',
        f"{ERRORS}::test_message[epsilon None]",
    ),
    Mutation(
        "errors: any epsilon",
        "bnjax/functional.py",
        "_validate.check_epsilon(epsilon)",
        "pass",
        f"{ERRORS}::test_message[epsilon zero]",
    ),
    Mutation(
        "errors: an epsilon of zero",
        "bnjax/_validate.py",
        "lambda e: (e > 0) &",
        "lambda e: (e >= 0) &",
        f"{ERRORS}::test_message[epsilon zero]",
    ),
    Mutation(
        "errors: a momentum above 1",
        "bnjax/_validate.py",
        "lambda m: (m >= 0) & (m <= 1),",
        "lambda m: m >= 0,",
        f"{ERRORS}::test_message[momentum]",
    ),
    Mutation(
        "errors: a traced flag",
        "bnjax/functional.py",
        '(use_fast_variance, "use_fast_variance"),',
        "",
        f"{ERRORS}::test_traced_flag[use_fast_variance]",
    ),
    Mutation(
        "errors: a mask that fits two ways is guessed",
        "bnjax/_validate.py",
        "if missing <= 0 or per_example:",
        "if missing <= 0:",
        f"{LINEN}::test_a_mask_broadcasts_as_in_flax",
    ),
    Mutation(
        "errors: a residual that broadcasts",
        "bnjax/_validate.py",
        "if residual.shape != shape:",
        "if residual.ndim != len(shape):",
        f"{ERRORS}::test_message[residual]",
    ),
    Mutation(
        "linen: statistics move at init",
        "bnjax/linen.py",
        "updating = not (use_running_average or initializing)",
        "updating = not use_running_average",
        f"{LINEN}::test_init_needs_neither_the_axis_nor_a_batch",
    ),
    Mutation(
        "linen: axis_name lost",
        "bnjax/linen.py",
        "axis_name=None if initializing else self.axis_name,",
        "axis_name=None,",
        f"{LINEN}::test_axis_name_typo",
    ),
    Mutation(
        "linen: mean and variance exchanged",
        "bnjax/linen.py",
        "functional.BatchStats(mean.value, var.value),",
        "functional.BatchStats(var.value, mean.value),",
        f"{LAYERS}::test_equal_one_another_exactly",
    ),
    Mutation(
        "nnx: statistics of the promoted dtype",
        "bnjax/nnx.py",
        "mean, var = self.mean[...], self.var[...]",
        "pass",
        f"{LAYERS}::test_old_statistics_are_not_rounded_to_a_half_precision_dtype[nnx]",
    ),
    Mutation(
        "linen: use_fast_variance lost",
        "bnjax/linen.py",
        "use_fast_variance=self.use_fast_variance,",
        "",
        f"{LAYERS}::test_the_exact_variance_by_its_name[linen]",
    ),
    Mutation(
        "nnx: use_fast_variance lost",
        "bnjax/nnx.py",
        "use_fast_variance=self.use_fast_variance,",
        "",
        f"{LAYERS}::test_the_exact_variance_by_its_name[nnx]",
    ),
    Mutation(
        "ghost: examples dealt to the groups in turn",
        "bnjax/variants/ghost.py",
        "lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), (x, residual)",
        "lambda leaf: leaf.reshape(size, groups, *leaf.shape[1:]).swapaxes(0, 1),\n"
        "        (x, residual),",
        f"{GHOST}::test_each_group_is_a_batch_of_its_own",
    ),
    Mutation(
        "ghost: values counted by every device",
        "bnjax/variants/ghost.py",
        "count = jnp.full_like(found.count, values)",
        "count = found.count",
        f"{GHOST}::test_the_count_is_that_of_one_device",
    ),
    Mutation(
        "ghost: a size that does not divide the batch",
        "bnjax/variants/ghost.py",
        "if size < 1 or x.shape[0] % size:",
        "if size < 1:",
        f"{GHOST}::test_what_cannot_be_grouped_is_refused",
    ),
    Mutation(
        "ghost: moments handed over and statistics moved",
        "bnjax/variants/ghost.py",
        "return y, batch_stats\n        return",
        "pass\n        return",
        f"{GHOST}::test_the_layer_updates_its_statistics_or_hands_over_the_moments",
    ),
    Mutation(
        "folding: BN before a kernel without its factor",
        "bnjax/folding/linear.py",
        "kernel = kernel * self._in_kernel(multiplier, kernel.shape)",
        "kernel = kernel * 1",
        f"{PAIRS}::test_pairs",
    ),
    Mutation(
        "folding: shift through padding",
        "bnjax/folding/linear.py",
        "if np.any(shift) and not self._sees_all:",
        "if np.any(shift) and not shift.size:",
        f"{PAIRS}::test_pairs",
    ),
    Mutation(
        "folding: channels of groups mixed",
        "bnjax/folding/linear.py",
        "each = np.repeat(each, shape[outputs] // groups, axis=0)",
        "each = np.tile(each, (shape[outputs] // groups, 1))",
        f"{PAIRS}::test_pairs",
    ),
    Mutation(
        "folding: axes of a bias in the kernel's order",
        "bnjax/folding/linear.py",
        "order = np.argsort(np.argsort(kept))",
        "order = np.argsort(kept)",
        f"{FOLDING}::test_products_of_many_axes",
    ),
    Mutation(
        "folding: a quotient divides the factor alone",
        "bnjax/folding/linear.py",
        "return multiplier / value, shift / value",
        "return multiplier / value, shift",
        f"{FOLDING}::test_written_by_hand",
    ),
    Mutation(
        "folding: a constant less a value keeps the sign",
        "bnjax/folding/linear.py",
        "return -multiplier, value - shift",
        "return multiplier, value - shift",
        f"{FOLDING}::test_written_by_hand",
    ),
    Mutation(
        "folding: absorbed bias without the later factor",
        "bnjax/folding/linear.py",
        "return kernel, bias * multiplier + shift",
        "return kernel, bias + shift",
        f"{FOLDING}::test_through_rearrangements",
    ),
    Mutation(
        "folding: what is left without its mean",
        "bnjax/folding/fold.py",
        "mean = np.where(np.isfinite(mean), mean, 0)",
        "mean = np.zeros_like(mean)",
        f"{FOLDING}::test_what_is_left_is_exact_where_the_mean_is_large",
    ),
    Mutation(
        "folding: kernel not in the variable's form",
        "bnjax/folding/fold.py",
        "value = rearrange(move, value, undo=True)",
        "pass",
        f"{FOLDING}::test_a_transposed_kernel_is_kept_as_it_was",
    ),
    Mutation(
        "folding: an output with other uses scaled",
        "bnjax/folding/fold.py",
        "if uses < 2 or isinstance(value, Constant):",
        "if isinstance(value, Constant):",
        f"{FOLDING}::test_numbers_by_hand",
    ),
    Mutation(
        "folding: two kernels at one path",
        "bnjax/folding/program.py",
        "while path in found and not _same(found[path], value):",
        "while path in found and not path:",
        f"{FOLDING}::test_a_kernel_used_twice",
    ),
    Mutation(
        "folding: arithmetic in float32",
        "bnjax/folding/program.py",
        '"rsqrt": lambda x: 1 / np.sqrt(x),',
        '"rsqrt": lambda x: 1 / np.sqrt(np.float32(x)),',
        f"{FOLDING}::test_arithmetic_is_float64",
    ),
    Mutation(
        "folding: a transposition not undone",
        "bnjax/folding/program.py",
        "return value.transpose(np.argsort(order) if undo else order)",
        "return value.transpose(order)",
        "tests/folding/test_program.py::test_rearrangements",
    ),
    Mutation(
        "population: the means' differences lost",
        "bnjax/population.py",
        "squares = weight * var + np.square(delta) * self.weight * share",
        "squares = weight * var",
        f"{POPULATION}::test_both_methods",
    ),
    Mutation(
        "population: the paper's m / (m - 1) lost",
        "bnjax/population.py",
        "squares = weight * var * (count / np.maximum(count - 1, 1))",
        "squares = weight * var",
        f"{POPULATION}::test_both_methods",
    ),
    Mutation(
        "population: a value counted by every device",
        "bnjax/population.py",
        "old.weight + found.count / devices",
        "old.weight + found.count",
        "tests/population/test_devices.py::test_pmap",
    ),
    Mutation(
        "population: an input noted twice",
        "bnjax/population.py",
        "if not frozen and read().weight is before.weight:",
        "if not frozen:",
        "tests/population/test_transforms.py::"
        "test_a_layer_that_is_itself_transformed_counts_once",
    ),
    Mutation(
        "sums: what is left after the blocks",
        "bnjax/_cpu/blocks.py",
        "blocks, rest = divmod(count, PARTS * length)",
        "blocks, rest = count // (PARTS * length), 0",
        f"{BLOCKS}::test_output_statistics_and_gradients",
    ),
    Mutation(
        "sums: channels of joined examples in another order",
        "bnjax/_cpu/blocks.py",
        "jnp.tile(c.reshape(1, -1), joined)",
        "jnp.repeat(c.reshape(1, -1), joined, 1)",
        f"{BLOCKS}::test_output_statistics_and_gradients",
    ),
    Mutation(
        "sums: a float32 copy of all that is to be summed",
        "bnjax/_cpu/blocks.py",
        "held, here = lax.optimization_barrier((rows, start))",
        "held, here = rows, start",
        f"{BLOCKS}::test_nothing_of_the_size_of_the_input_is_written",
    ),
    Mutation(
        "sums: blocks of a batch that is divided among devices",
        "bnjax/_primitive.py",
        "return devices > 1",
        "return False",
        f"{BLOCKS}::test_a_sharded_batch_is_not_gathered[blocks]",
    ),
    Mutation(
        "kernels: the last row taken for a full one",
        "bnjax/_cpu/loops.h",
        "int64_t full_end = row_length(&layout, end - 1) == width ? end : end - 1;",
        "int64_t full_end = end;",
        f"{CPU_VALUES}::"
        "test_moments_are_those_of_the_paper[a last row that is not full-float32]",
    ),
    Mutation(
        "kernels: every value passes the ReLU backward",
        "bnjax/_cpu/loops.h",
        "return passed > 0 ? dy : 0;",
        "return passed > 0 ? dy : dy;",
        f"{CPU_GRADIENTS}[one feature-float32-relu]",
    ),
    Mutation(
        "kernels: centered by the origin alone",
        "bnjax/_cpu/loops.h",
        "job->column[ORIGIN][c] -\n         job->column[MEAN][c];",
        "job->column[ORIGIN][c];",
        f"{CPU_GRADIENTS}[one feature-float32-plain]",
    ),
    Mutation(
        "kernels: bfloat16 rounded half up",
        "bnjax/_cpu/loops.h",
        "uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "uint32_t rounded = (bits + 0x8000) >> 16;",
        f"{CPU_VALUES}::"
        "test_bfloat16_is_rounded_to_the_nearest_and_of_two_to_the_even_one",
    ),
    Mutation(
        "kernels: columns beyond the first tile forgotten",
        "bnjax/_cpu/loops.h",
        "for (int64_t left = 0; left < width; left += REDUCTION_WIDTH) {",
        "for (int64_t left = 0; left < 1; left += REDUCTION_WIDTH) {",
        f"{CPU_VALUES}::test_moments_are_those_of_the_paper[many features-float32]",
    ),
    Mutation(
        "kernels: the sums of one part forgotten",
        "bnjax/_cpu/kernels.c",
        "for (int64_t part = 1; part < job->layout.parts; part++)",
        "for (int64_t part = 2; part < job->layout.parts; part++)",
        f"{CPU_VALUES}::test_moments_are_those_of_the_paper[parts-float32]",
    ),
    Mutation(
        "kernels: no gradient through the mean that is returned",
        "bnjax/_cpu/kernels.c",
        "(dmean[c] - multiplier * sum_dz[c]) / count",
        "(0 - multiplier * sum_dz[c]) / count",
        f"{CPU_GRADIENTS}[one feature-float32-plain]",
    ),
    Mutation(
        "kernels: half the gradient through the variance",
        "bnjax/_cpu/kernels.c",
        "(2 * dvar[c] - through_var) / count",
        "(dvar[c] - through_var) / count",
        f"{CPU_GRADIENTS}[one feature-float32-plain]",
    ),
    Mutation(
        "kernels: gradient of epsilon twice",
        "bnjax/_cpu/kernels.c",
        "depsilon -= 0.5 * through_var;",
        "depsilon -= through_var;",
        f"{CPU_GRADIENTS}[one feature-float32-plain]",
    ),
    Mutation(
        "kernels: an overflow taken for a variance",
        "bnjax/_cpu/kernels.c",
        "isfinite(variance) ? fmaxf(variance, 0) : NAN",
        "fmaxf(variance, 0)",
        f"{CPU_VALUES}::test_what_overflows_has_no_variance",
    ),
    Mutation(
        "kernels: after a residual the mask is that of x",
        "bnjax/_cpu/loops.h",
        "float passed = variant / DTYPES == RELU ?",
        "float passed = variant / DTYPES >= RELU ?",
        f"{CPU_VALUES}::test_after_a_residual_the_output_says_where_the_relu_passed",
    ),
    Mutation(
        "kernels: a shape is not compared",
        "bnjax/_cpu/kernels.c",
        "same = array->dims[axis] == dims[axis];",
        "same = 1;",
        f"{CPU_CALLS}::test_arrays_of_another_dtype_or_shape",
    ),
    Mutation(
        "kernels: a dtype is not compared",
        "bnjax/_cpu/kernels.c",
        "dtype != XLA_FFI_DataType_INVALID && array->dtype == dtype &&",
        "dtype != XLA_FFI_DataType_INVALID &&",
        f"{CPU_CALLS}::test_arrays_of_another_dtype_or_shape",
    ),
    Mutation(
        "kernels: an unknown activation is taken",
        "bnjax/_cpu/kernels.c",
        "if (*activation == NO_ACTIVATION || *activation == RELU) return NULL;",
        "if (*activation >= NO_ACTIVATION) return NULL;",
        f"{CPU_CALLS}::test_another_attribute",
    ),
    Mutation(
        "kernels: an array too many is taken",
        "bnjax/_cpu/kernels.c",
        "frame->args.size != argument_count ||",
        "frame->args.size < argument_count ||",
        f"{CPU_CALLS}::test_arrays_that_are_missing_or_too_many",
    ),
    Mutation(
        "kernels: an empty array is taken",
        "bnjax/_cpu/kernels.c",
        "if (rows < 1 ||",
        "if (rows < 0 ||",
        f"{CPU_CALLS}::test_no_rows",
    ),
    Mutation(
        "kernels: a damaged library is loaded",
        "bnjax/_cpu/build.py",
        'if not path.stem.endswith(f"-{_digest([content.read()])}"):',
        "if not path.stem:",
        f"{CPU_BUILD}::test_a_damaged_library_is_built_again",
    ),
    Mutation(
        "kernels: a library of another user is loaded",
        "bnjax/_cpu/build.py",
        "_check_owner(file, path)",
        "pass",
        f"{CPU_BUILD}::"
        "test_a_library_that_another_user_could_have_written_is_not_loaded",
    ),
    Mutation(
        "kernels: a folder of another user is trusted",
        "bnjax/_cpu/build.py",
        "_check_owner(file, folder)",
        "pass",
        f"{CPU_BUILD}::test_a_folder_of_another_user_is_not_trusted",
    ),
    Mutation(
        "kernels: what others can write is trusted",
        "bnjax/_cpu/build.py",
        "if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):",
        "if found.st_mode & stat.S_IWOTH:",
        f"{CPU_BUILD}::test_a_folder_that_others_can_write_is_not_trusted",
    ),
    Mutation(
        "kernels: a folder is looked up again after its check",
        "bnjax/_cpu/build.py",
        "yield pinned if pinned.exists() else folder",
        "yield folder",
        f"{CPU_BUILD}::test_what_is_loaded_is_the_file_that_was_checked",
    ),
    Mutation(
        "kernels: the umask decides who can write a library",
        "bnjax/_cpu/build.py",
        "fresh.chmod(0o700)",
        "fresh.chmod(0o770)",
        f"{CPU_BUILD}::test_a_library_is_made_for_its_user_alone",
    ),
    Mutation(
        "kernels: handlers are registered twice",
        "bnjax/_cpu/build.py",
        "if name not in _registered:",
        "if name:",
        f"{CPU_BUILD}::test_threads_and_reloads_register_once",
    ),
    Mutation(
        "kernels: what killed builds left stays",
        "bnjax/_cpu/build.py",
        "shutil.rmtree(left, ignore_errors=True)",
        "pass",
        f"{CPU_BUILD}::test_what_killed_builds_left_is_cleared_away",
    ),
    Mutation(
        "kernels: builds clear away each other",
        "bnjax/_cpu/build.py",
        "        if locked:\n            for left",
        "        if True:\n            for left",
        f"{CPU_BUILD}::test_a_lock_that_is_never_released_does_not_stop_a_build",
    ),
    Mutation(
        "kernels: an origin of zero",
        "bnjax/_cpu/kernels.c",
        "job.column[ORIGIN][c] = origin[c] = load(job.x, c, call.variant & BF16_X);",
        "job.column[ORIGIN][c] = origin[c] = 0;",
        f"{CPU_VALUES}::test_moments_are_those_of_the_paper",
    ),
    Mutation(
        "kernels: a ReLU makes zero of a NaN",
        "bnjax/_cpu/loops.h",
        "return z < 0 ? 0 : z;",
        "return z > 0 ? z : 0;",
        f"{CPU_VALUES}::test_a_relu_leaves_a_nan_what_it_is",
    ),
    Mutation(
        "kernels: a ReLU lets pass what is at zero",
        "bnjax/_cpu/loops.h",
        "return passed > 0 ? dy : 0;",
        "return passed >= 0 ? dy : 0;",
        f"{FORMS}::test_a_relu_lets_nothing_pass_at_zero[kernels-False]",
    ),
    Mutation(
        "kernels: a residual without an activation is taken",
        "bnjax/_cpu/kernels.c",
        "if (residual && activation == NO_ACTIVATION)",
        "if (residual > 1)",
        f"{CPU_CALLS}::test_a_residual_needs_an_activation",
    ),
    Mutation(
        "kernels: attributes that are none of theirs are taken",
        "bnjax/_cpu/kernels.c",
        "else if (frame->attrs.size)",
        "else if (frame->attrs.size > 9)",
        f"{CPU_CALLS}::test_moments_have_no_attribute",
    ),
    Mutation(
        "kernels: others can write a folder that is made",
        "bnjax/_cpu/build.py",
        "folder.mkdir(mode=0o700,",
        "folder.mkdir(mode=0o777,",
        f"{CPU_BUILD}::test_a_library_is_made_for_its_user_alone",
    ),
    Mutation(
        "kernels: a link to a folder is followed",
        "bnjax/_cpu/build.py",
        "os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW",
        "os.O_RDONLY | os.O_DIRECTORY",
        f"{CPU_BUILD}::test_a_link_to_a_folder_is_not_followed",
    ),
    Mutation(
        "kernels: a link to a library is followed",
        "bnjax/_cpu/build.py",
        "os.open(path, os.O_RDONLY | os.O_NOFOLLOW)",
        "os.open(path, os.O_RDONLY)",
        f"{CPU_BUILD}::"
        "test_a_library_that_another_user_could_have_written_is_not_loaded[a link]",
    ),
    Mutation(
        "kernels: several processes build at once",
        "bnjax/_cpu/build.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        f"{CPU_BUILD}::test_one_process_builds_and_the_others_wait",
    ),
    Mutation(
        "kernels: who has waited builds again",
        "bnjax/_cpu/build.py",
        "library = _kept(pinned, name)",
        "library = None",
        f"{CPU_BUILD}::test_one_process_builds_and_the_others_wait",
    ),
]


def run(tests: Sequence[str], folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Run the tests of a copy, up to the first that fails."""
    options = ["-qx", "-n", "0", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=folder,
        # Kernels that are broken are no business of the user's cache.
        env=os.environ | {"BNJAX_CACHE_DIR": str(folder.parent / "cache")},
        capture_output=True,
        check=False,
    )


def output_of(done: subprocess.CompletedProcess) -> str:
    """What a run of the tests printed."""
    return done.stdout.decode() + done.stderr.decode()


def survives(mutation: Mutation, folder: pathlib.Path) -> bool:
    """Whether the tests pass although the line is broken."""
    path = folder / mutation.file
    source = path.read_text()
    path.write_text(source.replace(mutation.line, mutation.becomes))
    done = run([mutation.tests], folder)
    path.write_text(source)
    if done.returncode > 1:  # a signal, which is below 0, is a failure too
        raise SystemExit(f"{mutation.name}: no tests were run\n{output_of(done)}")
    return done.returncode == 0


def main(words: Sequence[str]) -> int:
    """Try the mutations of these names, or all; return how many no test noticed."""
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not words or any(word in mutation.name for word in words)
    ]
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "bnjax"
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=ignored)
        done = run(sorted({mutation.tests for mutation in chosen}), folder)
        if done.returncode:
            raise SystemExit(f"Tests fail of the code as it is:\n{output_of(done)}")
        for mutation in chosen:
            start = time.monotonic()
            survived = survives(mutation, folder)
            survivors += survived
            verdict = "SURVIVED" if survived else "caught"
            seconds = time.monotonic() - start
            text = f"{verdict:9}{seconds:4.0f} s  {mutation.file}: {mutation.name}"
            print(text, flush=True)
    return survivors


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
