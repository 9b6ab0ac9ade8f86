"""Export an inference function as StableHLO, in a file that needs only JAX to run."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax._files import OutputError, check_output, write_output
from bnjax._validate import did_you_mean, first_line

__all__ = ["PLATFORMS", "ExportError", "Loaded", "export_inference", "load", "save"]


class ExportError(ValueError):
    """A function cannot be exported, or an exported file cannot be read."""


PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")
# The start of the last line of a file; flatbuffers does not read beyond its own data.
TRAILER = b"\nbnjax-export "


def export_inference(
    function: Callable[..., Any],
    variables: Any,
    example: Any,
    *,
    platforms: Sequence[str] = PLATFORMS,
    batch_size: int | None = None,
) -> jax.export.Exported:
    r"""Lower a function of images to StableHLO, with its variables as constants.

    The result is the function

    $$x \mapsto f(\theta, x), \quad x \in R^{b \times \dots}, \quad b = 1, 2, \dots$$

    Args:
        function: a function that JAX can trace, called as `function(variables, x)`, or
            as `function(x)` if `variables` is None.
        variables: a tree of arrays; None if the function holds its own variables.
        example: an array or a `jax.ShapeDtypeStruct` of shape (batch, ...) and the
            dtype of the inputs. Its values and its batch size do not matter.
        platforms: any of "cpu", "cuda", "tpu" and "rocm"; this machine need not have
            them.
        batch_size: the only batch size that the result accepts; None accepts all.

    Returns:
        The exported function.

    Raises:
        ExportError: if the function cannot be exported for these platforms or for every
            batch size.

    Examples:
        >>> x = jnp.ones((2, 3))
        >>> exported = export_inference(lambda w, x: x @ w, jnp.ones((3, 1)), x)
        >>> exported.in_avals[0].shape, exported.platforms
        ((b, 3), ('cpu', 'cuda', 'tpu'))
        >>> exported.call(jnp.ones((5, 3))).ravel().tolist()
        [3.0, 3.0, 3.0, 3.0, 3.0]
    """
    platforms = _check_platforms(platforms)
    example = example if hasattr(example, "shape") else np.asarray(example)
    if not example.shape:
        raise ExportError(
            "the example has no dimension; expected an array of shape (batch, ...)."
        )
    if batch_size is not None and batch_size < 1:
        raise ExportError(f"batch_size {batch_size}: expected 1 or more, or None.")
    if variables is not None:
        function = functools.partial(function, jax.tree.map(np.asarray, variables))
    dtype = jax.dtypes.canonicalize_dtype(example.dtype)

    def inference(x: jax.Array) -> Any:
        return function(x)

    def spec(batch: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *example.shape[1:]), dtype)

    def lower(batch: Any) -> jax.export.Exported:
        try:
            return jax.export.export(jax.jit(inference), platforms=platforms)(
                spec(batch)
            )
        except Exception as error:
            raise ExportError(
                f"the function cannot be exported: {first_line(error)}"
            ) from error

    # An error of the function itself is raised unchanged.
    fixed = batch_size or max(example.shape[0], 1)
    jax.eval_shape(inference, spec(fixed))
    if batch_size is not None:
        return lower(batch_size)
    (symbol,) = jax.export.symbolic_shape("b")
    try:
        return lower(symbol)
    except ExportError as refusal:
        lower(fixed)
        error = refusal.__cause__ or refusal
        raise ExportError(
            "the function cannot be exported for every batch size: "
            f"{first_line(error)} It computes with the number of examples, or "
            "branches on it. Export it for one batch size: batch_size=N, or "
            "--batch-size N on the command line."
        ) from error


def save(
    exported: jax.export.Exported, path: str | Path, *, overwrite: bool = False
) -> None:
    """Write an exported function to a file, whole or not at all.

    The file holds the bytes of `exported.serialize()`, which `jax.export.deserialize`
    reads, and one more line with the version of JAX and a digest that `load` checks.

    Args:
        exported: the result of `export_inference`.
        path: the file to write; its name ends in .stablehlo.
        overwrite: replace an existing file.
    """
    path = Path(path)
    check_export(path, overwrite=overwrite)
    if len(exported.in_avals) != 1:
        raise ExportError(
            f"{exported.fun_name} takes {len(exported.in_avals)} arrays; expected one "
            "array, the images, as in a function that export_inference returns."
        )
    try:
        content = bytes(exported.serialize())
    except ImportError as error:
        raise _needs_flatbuffers() from error
    except ValueError as error:
        raise ExportError(
            f"{exported.fun_name} cannot be written: {first_line(error)} Expected a "
            "function that returns arrays, in tuples, lists or dictionaries."
        ) from error
    write_output(path, content + trailer(content), overwrite=overwrite)


def check_export(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a path that `save` cannot write to, before any work is done."""
    check_output(path, overwrite=overwrite)
    if path.suffix != ".stablehlo":
        raise OutputError(
            f"{path} ends in {path.suffix!r}; expected .stablehlo: the file is a "
            "program in StableHLO. For ONNX, give the function itself to "
            "bnjax.interop.onnx.to_onnx."
        )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An exported function read from a file; call it as the original function.

    Attributes:
        exported: the result of `jax.export.deserialize`.
        input_shape: the shape of its input; the batch is "b" if it accepts any batch
            size.
        input_dtype: the dtype of its input.
        platforms: the platforms that it runs on.
    """

    exported: jax.export.Exported
    input_shape: tuple[Any, ...]
    input_dtype: np.dtype
    platforms: tuple[str, ...]

    def __call__(self, x: Any) -> Any:
        """Run the function on an array of `input_shape` and `input_dtype`."""
        x = jnp.asarray(x)
        expected = self.input_shape
        batch = "" if isinstance(expected[0], int) else ", b being 1 or more"
        wanted = (x.shape[:1] or (0,)) if batch else expected[:1]
        if x.shape != (*wanted, *expected[1:]) or not x.shape[0]:
            raise ExportError(
                f"x has shape {x.shape}; expected ({', '.join(map(str, expected))})"
                f"{batch}."
            )
        if x.dtype != self.input_dtype:
            raise ExportError(
                f"x has dtype {x.dtype}; expected {self.input_dtype}: convert it with "
                f"x.astype({self.input_dtype.name!r}), and scale it as in training."
            )
        return self.exported.call(x)


def load(path: str | Path) -> Loaded:
    """Read a function that `save` wrote.

    The file holds a program that runs when you call it: do not open a file that you do
    not trust.

    Args:
        path: the file.

    Returns:
        The function, to call on arrays.

    Raises:
        ExportError: if the file is damaged, or if this version of JAX or this platform
            cannot run it.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "double.stablehlo"
        >>> x = jnp.ones((1, 2))
        >>> save(export_inference(lambda x: 2 * x, None, x), path)
        >>> double = load(path)
        >>> double(jnp.array([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[2.0, 4.0], [6.0, 8.0]]
        >>> double(x[0])
        Traceback (most recent call last):
        bnjax.interop.export.ExportError: x has shape (2,); expected (b, 2), b being 1
        or more.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExportError(
            f"{path} could not be read: {error.strerror or error}. Expected a file "
            "that bnjax.interop.export.save wrote."
        ) from error
    body, _, line = content.rpartition(TRAILER)
    try:
        described = json.loads(line)
        version, digest = described["jax"], described["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise ExportError(
            f"{path} is not an exported function, or is cut short: it lacks the last "
            "line that bnjax.interop.export.save writes. Copy or export it again. "
            "If another program exported it, read it with jax.export.deserialize."
        ) from error
    if hashlib.sha256(body).hexdigest() != digest:
        raise ExportError(
            f"{path} is damaged: its bytes differ from its digest. Copy or export it "
            "again."
        )
    try:
        exported = jax.export.deserialize(bytearray(body))
        [given] = exported.in_avals
        if version != jax.__version__:
            # The program may use operations that this version does not know.
            batch, *rest = given.shape
            shape = (batch if isinstance(batch, int) else 1, *rest)
            spec = jax.ShapeDtypeStruct(shape, given.dtype)
            traced = jax.jit(exported.call).trace(spec)
            traced.lower(lowering_platforms=exported.platforms[:1])
    except ImportError as error:
        raise _needs_flatbuffers() from error
    except Exception as error:
        raise ExportError(
            f"{path} was written by JAX {version}, and JAX {jax.__version__} cannot "
            f"read it: {first_line(error)}. Export it again with this version, or run "
            f"it with JAX {version} or newer."
        ) from error
    here = jax.export.default_export_platform()
    if here not in exported.platforms:
        raise ExportError(
            f"{path} was exported for {', '.join(exported.platforms)}, and JAX runs on "
            f"{here} here. Export it again for {here} too, or set JAX_PLATFORMS to one "
            "of its platforms."
        )
    return Loaded(exported, tuple(given.shape), given.dtype, tuple(exported.platforms))


def trailer(content: bytes) -> bytes:
    """Return the last line of a file: the version of JAX, and a digest."""
    digest = hashlib.sha256(content).hexdigest()
    described = json.dumps({"jax": jax.__version__, "sha256": digest})
    return TRAILER + described.encode() + b"\n"


def _check_platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    given = (platforms,) if isinstance(platforms, str) else tuple(platforms)
    expected = f"expected any of {', '.join(KNOWN_PLATFORMS)}."
    for name in given:
        if name not in KNOWN_PLATFORMS:
            gpu = " A GPU is cuda (NVIDIA) or rocm (AMD)."
            hint = gpu if name == "gpu" else did_you_mean(name, KNOWN_PLATFORMS)
            raise ExportError(f"platform {name!r} is unknown: {expected}{hint}")
    if not given:
        raise ExportError(f"no platform is given: {expected}")
    return tuple(dict.fromkeys(given))


def _needs_flatbuffers() -> ExportError:
    return ExportError(
        "JAX writes and reads exported functions with the package flatbuffers, which "
        "is not installed: pip install flatbuffers."
    )
