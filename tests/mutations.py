"""Break the code on purpose, one line at a time, and see the tests notice.

    python -m tests.mutations

Each mutation is made in a copy of the repository and must make the named tests fail.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One line of one file, what it becomes, and the tests that should fail."""

    name: str
    file: str
    line: str
    becomes: str
    tests: str


TRANSFORM = "tests/test_transform.py"
DERIVATIVES = "tests/test_derivatives.py"
SHARED = "tests/integration/test_shared_statistics.py"
SUMS = "tests/test_sums.py"
CPU_VALUES = "tests/core/test_cpu_values.py"
CPU_CALLS = "tests/core/test_cpu_calls.py"
CPU_BUILD = "tests/core/test_cpu_build.py"
CPU_PROGRAMS = "tests/core/test_cpu_programs.py"
LAYERS = "tests/test_layers.py"
FOLDING = "tests/folding/test_fold.py"
PAIRS = "tests/folding/test_pairs.py"
TOTALS = "tests/population/test_totals.py"

MUTATIONS = [
    Mutation(
        "swapped momentum",
        "bnjax/functional.py",
        "return keep * old + take * lax.select(enough, new, zero)",
        "return take * old + keep * lax.select(enough, new, zero)",
        TRANSFORM,
    ),
    Mutation(
        "m / (m - 1) upside down",
        "bnjax/functional.py",
        "var = var * (batch.count / jnp.maximum(batch.count - 1, 1))",
        "var = var * (jnp.maximum(batch.count - 1, 1) / batch.count)",
        TRANSFORM,
    ),
    Mutation(
        "no guard for one value",
        "bnjax/functional.py",
        "enough = batch.count > 1",
        "enough = batch.count > 0",
        TRANSFORM,
    ),
    Mutation(
        "batch mean without its origin",
        "bnjax/functional.py",
        "batch = Moments(origin + centred.mean, centred.var, centred.count)",
        "batch = Moments(centred.mean, centred.var, centred.count)",
        TRANSFORM,
    ),
    Mutation(
        "origin of zero",
        "bnjax/_statistics.py",
        "lax.stop_gradient(_first(x, reduction.axes).astype(dtype))",
        "lax.stop_gradient(0 * _first(x, reduction.axes).astype(dtype))",
        TRANSFORM,
    ),
    Mutation(
        "hidden values in the sums",
        "bnjax/_statistics.py",
        "distance = jnp.where(seen, x - reduction.expand(origin), 0)",
        "distance = x - reduction.expand(origin)",
        TRANSFORM,
    ),
    Mutation(
        "count of the mask, not of what it covers",
        "bnjax/_statistics.py",
        "repeats = count / reduction.local_count(mask.shape)",
        "repeats = 1.0",
        TRANSFORM,
    ),
    Mutation(
        "mean of means in joining",
        "bnjax/_statistics.py",
        "return _from_sums(*total(jnp.stack([parts.count, first, second])))",
        "return _from_sums(*total(jnp.stack([0 * first + 1, parts.mean, second])))",
        SHARED,
    ),
    Mutation(
        "spread between the parts forgotten",
        "bnjax/_statistics.py",
        "second = parts.count * (parts.var + jnp.square(parts.mean))",
        "second = parts.count * parts.var",
        SHARED,
    ),
    Mutation(
        "no sum over devices forward",
        "bnjax/_statistics.py",
        "return shared, merge_about_zero(about_shared, reduction.total)",
        "return shared, merge_about_zero(about_shared, lambda sums: sums)",
        SHARED,
    ),
    Mutation(
        "no sum over devices backward",
        "bnjax/_gradient.py",
        "sums = reduction.total(jnp.stack(sums))",
        "sums = jnp.stack(sums)",
        SHARED,
    ),
    Mutation(
        "gradient of scale summed twice",
        "bnjax/_gradient.py",
        "dscale = dscale - gain * mean_xhat_dx",
        "dscale = reduction.total(dscale) - gain * mean_xhat_dx",
        SHARED,
    ),
    Mutation(
        "no gradient through the variance",
        "bnjax/_gradient.py",
        "dscale = dscale - gain * mean_xhat_dx",
        "dscale = dscale - 0 * gain * mean_xhat_dx",
        TRANSFORM,
    ),
    Mutation(
        "no gradient through the mean",
        "bnjax/_gradient.py",
        "dbias = dbias - gain * mean_dx",
        "dbias = dbias - 0 * gain * mean_dx",
        TRANSFORM,
    ),
    Mutation(
        "gradient of epsilon of the wrong sign",
        "bnjax/_gradient.py",
        "dgain = dgain - 0.5 * gain * inverse * doperands.epsilon",
        "dgain = dgain + 0.5 * gain * inverse * doperands.epsilon",
        DERIVATIVES,
    ),
    Mutation(
        "everything kept for the backward pass",
        "bnjax/_gradient.py",
        "dy, dmean, dvar = _remat(functools.partial(_tangents, transform))(",
        "dy, dmean, dvar = functools.partial(_tangents, transform)(",
        DERIVATIVES,
    ),
    Mutation(
        "linen: statistics move at init",
        "bnjax/linen.py",
        "updating = not (use_running_average or initializing)",
        "updating = not use_running_average",
        "tests/test_linen.py",
    ),
    Mutation(
        "linen: axis_name lost",
        "bnjax/linen.py",
        "axis_name=None if initializing else self.axis_name,",
        "axis_name=None,",
        "tests/test_linen.py",
    ),
    Mutation(
        "linen: mean and variance exchanged",
        "bnjax/linen.py",
        "functional.BatchStats(mean.value, var.value),",
        "functional.BatchStats(var.value, mean.value),",
        LAYERS,
    ),
    Mutation(
        "nnx: statistics of the promoted dtype",
        "bnjax/nnx.py",
        "mean, var = self.mean[...], self.var[...]",
        "pass",
        LAYERS,
    ),
    Mutation(
        "folding: BN before a kernel without its factor",
        "bnjax/folding/linear.py",
        "return kernel * by, added.sum(summed).transpose(order)",
        "return kernel, added.sum(summed).transpose(order)",
        PAIRS,
    ),
    Mutation(
        "folding: shift through padding",
        "bnjax/folding/linear.py",
        "if np.any(shift) and not self._sees_all:",
        "if np.any(shift) and not shift.size:",
        PAIRS,
    ),
    Mutation(
        "folding: channels of groups mixed",
        "bnjax/folding/linear.py",
        "each = np.repeat(each, shape[axes[0]] // groups, axis=0)",
        "each = np.tile(each, (shape[axes[0]] // groups, 1))",
        PAIRS,
    ),
    Mutation(
        "folding: axes of a bias in the kernel's order",
        "bnjax/folding/linear.py",
        "order = np.argsort(np.argsort(kept))",
        "order = np.argsort(kept)",
        FOLDING,
    ),
    Mutation(
        "folding: a quotient divides the factor alone",
        "bnjax/folding/steps.py",
        "return factor / value, shift / value",
        "return factor / value, shift",
        FOLDING,
    ),
    Mutation(
        "folding: a constant less a value keeps the sign",
        "bnjax/folding/steps.py",
        "return -factor, value - shift",
        "return factor, value - shift",
        FOLDING,
    ),
    Mutation(
        "folding: absorbed bias without the later factor",
        "bnjax/folding/emit.py",
        "bias = bias * linear.as_bias(factor) + linear.as_bias(shift)",
        "bias = bias + linear.as_bias(shift)",
        FOLDING,
    ),
    Mutation(
        "folding: what is left without its mean",
        "bnjax/folding/emit.py",
        "mean = np.where(np.isfinite(mean), mean, 0)",
        "mean = np.zeros_like(mean)",
        FOLDING,
    ),
    Mutation(
        "folding: kernel not in the variable's form",
        "bnjax/folding/emit.py",
        "value = constants.backward(move, value)",
        "pass",
        FOLDING,
    ),
    Mutation(
        "folding: an output with other uses scaled",
        "bnjax/folding/rewrite.py",
        "if uses < 2 or isinstance(value, Constant) or value.is_computed:",
        "if isinstance(value, Constant) or value.is_computed:",
        FOLDING,
    ),
    Mutation(
        "folding: two kernels at one path",
        "bnjax/folding/stores.py",
        "while path in found and not _same(found[path], value):",
        "while path in found and not path:",
        FOLDING,
    ),
    Mutation(
        "folding: arithmetic in float32",
        "bnjax/folding/constants.py",
        '"rsqrt": lambda x: 1 / np.sqrt(x),',
        '"rsqrt": lambda x: 1 / np.sqrt(np.float32(x)),',
        FOLDING,
    ),
    Mutation(
        "folding: a transposition not undone",
        "bnjax/folding/constants.py",
        'return value.transpose(np.argsort(equation.params["permutation"]))',
        'return value.transpose(equation.params["permutation"])',
        "tests/folding/test_constants.py",
    ),
    Mutation(
        "population: the means' differences lost",
        "bnjax/population/totals.py",
        "(self.within + self.between) / np.maximum",
        "self.within / np.maximum",
        TOTALS,
    ),
    Mutation(
        "population: the paper's m / (m - 1) lost",
        "bnjax/population/totals.py",
        "self.unbiased + weight * var * (count / np.maximum(count - 1, 1))",
        "self.unbiased + weight * var",
        TOTALS,
    ),
    Mutation(
        "population: a value counted by every device",
        "bnjax/population/records.py",
        "old.weight + found.count / devices",
        "old.weight + found.count",
        "tests/population/test_devices.py",
    ),
    Mutation(
        "population: an input noted twice",
        "bnjax/population/linen_layers.py",
        "if is_training(layer, args, kwargs) and not noted:",
        "if is_training(layer, args, kwargs):",
        "tests/population/test_transforms.py",
    ),
    Mutation(
        "sums: what is left after the blocks",
        "bnjax/_sums.py",
        "blocks, rest = divmod(count, PARTS * length)",
        "blocks, rest = count // (PARTS * length), 0",
        SUMS,
    ),
    Mutation(
        "sums: channels of joined examples in another order",
        "bnjax/_sums.py",
        "jnp.tile(c.reshape(1, -1), joined)",
        "jnp.repeat(c.reshape(1, -1), joined, 1)",
        SUMS,
    ),
    Mutation(
        "sums: blocks of a batch that is divided among devices",
        "bnjax/_operation.py",
        "return devices > 1",
        "return False",
        SUMS,
    ),
    Mutation(
        "the activation's derivative left out of the residual's gradient",
        "bnjax/_gradient.py",
        "return _Tangents(channels.gain * dz, dbias, dgain, dresidual)",
        "return _Tangents(channels.gain * dz, dbias, dgain, cotangents[0])",
        SUMS,
    ),
    Mutation(
        "kernels: the last row taken for a full one",
        "bnjax/_cpu/loops.h",
        "int64_t full_end = row_length(&layout, end - 1) == width ? end : end - 1;",
        "int64_t full_end = end;",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: every value passes the ReLU backward",
        "bnjax/_cpu/loops.h",
        "return passed > 0 ? dy : 0;",
        "return passed > 0 ? dy : dy;",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: centered by the origin alone",
        "bnjax/_cpu/loops.h",
        "job->column[ORIGIN][c] -\n         job->column[MEAN][c];",
        "job->column[ORIGIN][c];",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: bfloat16 rounded half up",
        "bnjax/_cpu/loops.h",
        "uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;",
        "uint32_t rounded = (bits + 0x8000) >> 16;",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: columns beyond the first tile forgotten",
        "bnjax/_cpu/loops.h",
        "for (int64_t left = 0; left < width; left += REDUCTION_WIDTH) {",
        "for (int64_t left = 0; left < 1; left += REDUCTION_WIDTH) {",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: the sums of one part forgotten",
        "bnjax/_cpu/kernels.c",
        "for (int64_t part = 1; part < job->layout.parts; part++)",
        "for (int64_t part = 2; part < job->layout.parts; part++)",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: no gradient through the mean that is returned",
        "bnjax/_cpu/kernels.c",
        "(dmean[c] - multiplier * sum_dz[c]) / count",
        "(0 - multiplier * sum_dz[c]) / count",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: half the gradient through the variance",
        "bnjax/_cpu/kernels.c",
        "(2 * dvar[c] - through_var) / count",
        "(dvar[c] - through_var) / count",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: gradient of epsilon twice",
        "bnjax/_cpu/kernels.c",
        "depsilon -= 0.5 * through_var;",
        "depsilon -= through_var;",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: an overflow taken for a variance",
        "bnjax/_cpu/kernels.c",
        "isfinite(variance) ? fmaxf(variance, 0) : NAN",
        "fmaxf(variance, 0)",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: in a program that is exported",
        "bnjax/_operation.py",
        "return context.module_context.lowering_parameters.for_export",
        "return False",
        CPU_PROGRAMS,
    ),
    Mutation(
        "kernels: the gradient of a shared scale not summed over devices",
        "bnjax/_gradient.py",
        "if reduction.axis_name is None and operands.mask is None and alike:",
        "if reduction.axis_name is None and operands.mask is None:",
        CPU_PROGRAMS,
    ),
    Mutation(
        "kernels: after a residual the mask is that of x",
        "bnjax/_cpu/loops.h",
        "float passed = variant / DTYPES == RELU ?",
        "float passed = variant / DTYPES >= RELU ?",
        CPU_VALUES,
    ),
    Mutation(
        "kernels: a shape is not compared",
        "bnjax/_cpu/kernels.c",
        "same = array->dims[axis] == dims[axis];",
        "same = 1;",
        CPU_CALLS,
    ),
    Mutation(
        "kernels: a dtype is not compared",
        "bnjax/_cpu/kernels.c",
        "dtype != XLA_FFI_DataType_INVALID && array->dtype == dtype &&",
        "dtype != XLA_FFI_DataType_INVALID &&",
        CPU_CALLS,
    ),
    Mutation(
        "kernels: an unknown activation is taken",
        "bnjax/_cpu/kernels.c",
        "if (*activation == NO_ACTIVATION || *activation == RELU) return NULL;",
        "if (*activation >= NO_ACTIVATION) return NULL;",
        CPU_CALLS,
    ),
    Mutation(
        "kernels: an array too many is taken",
        "bnjax/_cpu/kernels.c",
        "frame->args.size != argument_count ||",
        "frame->args.size < argument_count ||",
        CPU_CALLS,
    ),
    Mutation(
        "kernels: an empty array is taken",
        "bnjax/_cpu/kernels.c",
        "if (rows < 1 ||",
        "if (rows < 0 ||",
        CPU_CALLS,
    ),
    Mutation(
        "kernels: a damaged library is loaded",
        "bnjax/_cpu/build.py",
        'if not path.stem.endswith(f"-{_digest([content.read()])}"):',
        "if not path.stem:",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: a library of another user is loaded",
        "bnjax/_cpu/build.py",
        "_check_owner(file, path)",
        "pass",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: a folder of another user is trusted",
        "bnjax/_cpu/build.py",
        "_check_owner(file, folder)",
        "pass",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: what others can write is trusted",
        "bnjax/_cpu/build.py",
        "if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):",
        "if found.st_mode & stat.S_IWOTH:",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: a folder is looked up again after its check",
        "bnjax/_cpu/build.py",
        "yield pinned if pinned.exists() else folder",
        "yield folder",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: the umask decides who can write a library",
        "bnjax/_cpu/build.py",
        "fresh.chmod(0o700)",
        "fresh.chmod(0o770)",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: handlers are registered twice",
        "bnjax/_cpu/build.py",
        "if name not in _registered:",
        "if name:",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: what killed builds left stays",
        "bnjax/_cpu/build.py",
        "shutil.rmtree(left, ignore_errors=True)",
        "pass",
        CPU_BUILD,
    ),
    Mutation(
        "kernels: builds clear away each other",
        "bnjax/_cpu/build.py",
        "        if locked:\n            for left",
        "        if True:\n            for left",
        CPU_BUILD,
    ),
]


def survives(mutation: Mutation, folder: pathlib.Path) -> bool:
    """Whether the tests pass although the line is broken."""
    path = folder / mutation.file
    source = path.read_text()
    if source.count(mutation.line) != 1:
        raise SystemExit(
            f"{mutation.name}: {mutation.file} holds the line {mutation.line!r} "
            f"{source.count(mutation.line)} times; expected once. Update MUTATIONS."
        )
    path.write_text(source.replace(mutation.line, mutation.becomes))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qx",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, mutation.tests], cwd=folder, capture_output=True, check=False
    )
    path.write_text(source)
    if done.returncode > 1:  # a signal, which is below 0, is a failure too
        raise SystemExit(done.stdout.decode() + done.stderr.decode())
    return done.returncode == 0


def main() -> int:
    """Try every mutation; the exit status is the number that no test noticed."""
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "bnjax"
        ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=ignored)
        for mutation in MUTATIONS:
            survived = survives(mutation, folder)
            survivors += survived
            verdict = "SURVIVED" if survived else "caught"
            print(f"{verdict:9}{mutation.file}: {mutation.name}", flush=True)
    return survivors


if __name__ == "__main__":
    raise SystemExit(main())
