"""Read and write state dicts and mappings; reading a file runs none of its code."""

import contextlib
import dataclasses
import importlib
import io
import json
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bnjax._files import check_output, write_output
from bnjax._validate import first_line
from bnjax.interop.torch import (
    Layer,
    LayerMapping,
    TorchError,
    as_array,
    as_layer,
    natural,
)

__all__ = ["format_mapping", "read_mapping", "read_state_dict", "write_state_dict"]

SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "params")
PREFIXES = ("module.", "_orig_mod.")
PACKAGES = {
    "safetensors.numpy": "the package safetensors: pip install safetensors.",
    "torch": "PyTorch: pip install torch. Or write the weights on a machine with "
    "PyTorch, with safetensors.torch.save_file to a .safetensors file.",
}
# Before 2.6, a file could run code in spite of weights_only=True (CVE-2025-32434).
OLDEST_TORCH = (2, 6)


def read_state_dict(path: Path | str) -> dict[str, np.ndarray]:
    """Read the tensors of a PyTorch model by name, without running code of the file.

    The function finds a state dict inside a training checkpoint, under "state_dict" or
    "model". It removes the prefix that DataParallel or torch.compile puts before every
    name. A note on standard error reports both. The tensors of a .safetensors file come
    in the order of their names, because the file stores no other order. The tensors of
    other files come in the order of the modules.

    Args:
        path: a .safetensors file, which needs the package safetensors, or a .pt, .pth
            or .bin file of `torch.save`, which needs PyTorch.

    Returns:
        Arrays by name.

    Raises:
        TorchError: if the file is damaged, holds more than tensors, or would fill the
            memory.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "bn.safetensors"
        >>> write_state_dict(path, {"bn.weight": np.ones(2), "bn.bias": np.zeros(2)})
        >>> read_state_dict(path)
        {'bn.bias': array([0., 0.]), 'bn.weight': array([1., 1.])}
    """
    path = Path(path)
    pickled = _is_pickle(path)
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "is not there"
        raise TorchError(f"{path} {reason}; expected a file of PyTorch weights.")
    state = _read_pickle(path) if pickled else _read_safetensors(path)
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            print(f"note: {path}: removed {prefix!r} before names", file=sys.stderr)
            state = {name.removeprefix(prefix): state[name] for name in state}
    return state


def write_state_dict(
    path: Path | str, state: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write tensors by name for PyTorch's `load_state_dict`, whole or not at all.

    Args:
        path: a file of a kind that `read_state_dict` reads.
        state: arrays by name, as `to_torch` returns them.
        overwrite: replace an existing file.
    """
    path = Path(path)
    pickled = _is_pickle(path)
    check_output(path, overwrite=overwrite)
    # np.asarray keeps the rank of a scalar; safetensors needs C order.
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    if pickled:
        torch = _torch(path)
        file = io.BytesIO()
        tensors = {}
        for name, array in arrays.items():
            half = array.dtype == ml_dtypes.bfloat16
            tensor = torch.from_numpy((array.view(np.int16) if half else array).copy())
            tensors[name] = tensor.view(torch.bfloat16) if half else tensor
        torch.save(tensors, file)
        content = file.getvalue()
    else:
        safetensors = _package("safetensors.numpy", path)
        content = safetensors.save(arrays, metadata={"format": "pt"})
    write_output(path, content, overwrite=overwrite)


def format_mapping(mapping: LayerMapping) -> str:
    """Return a mapping as JSON for `read_mapping`, with one line for each layer."""
    lines = []
    for name, given in mapping.items():
        value: Any = given
        if isinstance(given, Layer):
            fields = dataclasses.asdict(given).items()
            value = {key: each for key, each in fields if each or key == "path"}
        lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def read_mapping(path: Path | str) -> dict[str, str | Layer | None]:
    """Read a mapping from a JSON file; values are paths, `Layer` arguments or null."""
    mapping: dict[str, str | Layer | None] = {}
    try:
        for name, value in json.loads(Path(path).read_text(encoding="utf-8")).items():
            mapping[name] = Layer(**value) if isinstance(value, dict) else value
            layer = as_layer(mapping[name])
            if not isinstance(layer.path, str) or type(layer.channels or 1) is not int:
                raise TypeError(f"{name!r} is {value!r}.")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TorchError(
            f"{path} could not be read as a mapping: {first_line(error)} Expected JSON "
            'such as {"fc1": {"path": "dense1", "channels": 16}, "fc2": "dense2"}.'
        ) from error
    return mapping


def _is_pickle(path: Path) -> bool:
    if path.suffix not in SAFETENSORS + PICKLES:
        raise TorchError(
            f"{path} ends in {path.suffix!r}; expected a file of PyTorch weights: "
            f"{', '.join(SAFETENSORS + PICKLES)}."
        )
    return path.suffix in PICKLES


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    load = _package("safetensors.numpy", path).load_file
    try:
        state = load(path)
    except Exception as error:
        raise TorchError(
            f"{path} is damaged, or not a safetensors file: {first_line(error)}. Copy "
            "or download it again."
        ) from error
    return {name: state[name] for name in sorted(state, key=natural)}


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = _torch(path)
    _check_memory(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        raise TorchError(
            f"{path} was refused: it is damaged, or holds more than tensors, and "
            f"reading it could run code from the file "
            f"({found[1] if found else first_line(error)}). If you trust it, open "
            "it in PyTorch and save only model.state_dict()."
        ) from error
    except Exception as error:
        raise TorchError(
            f"{path} is damaged, or was not written by torch.save: "
            f"{first_line(error)}. Copy or download it again."
        ) from error
    top = content if isinstance(content, Mapping) else {}
    for key in (None, *WRAPPERS):
        state = top if key is None else top.get(key)
        tensors = state if isinstance(state, Mapping) else {}
        tensors = {str(k): v for k, v in tensors.items() if hasattr(v, "detach")}
        if tensors:
            if key is not None:
                print(f"note: {path}: took the weights under {key!r}", file=sys.stderr)
            return {name: as_array(v, f"{path}: {name}") for name, v in tensors.items()}
    keys = list(content) if isinstance(content, Mapping) else type(content).__name__
    raise TorchError(
        f"{path} holds {keys}; expected tensors by name, as model.state_dict() returns "
        f"them, at the top level or under one of {', '.join(WRAPPERS)}."
    )


def _check_memory(path: Path) -> None:
    """Refuse a file that would fill far more memory than its size on disk.

    torch.save does not compress. weights_only=True lets a file call bytearray(n).
    """
    size, unpacked, what = path.stat().st_size, 0, ""
    if not size:
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole,
    ):
        if whole.find(b"bytearray\n") >= 0:
            what = "it asks for memory without a tensor"
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        unpacked = sum(each.file_size for each in archive.infolist())
    if unpacked > size:
        what = f"{size:,} bytes unpack to {unpacked:,}"
    if what:
        raise TorchError(
            f"{path} was refused: {what}, which torch.save never writes for a state "
            "dict, and reading it could fill the memory. If you trust it, open it in "
            "PyTorch and save only model.state_dict()."
        )


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TorchError(f"{path} needs {PACKAGES[name]}") from error


def _torch(path: Path) -> Any:
    torch = _package("torch", path)
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        raise TorchError(
            f"{path} was not opened: with PyTorch {torch.__version__}, a file of "
            "weights can run code (CVE-2025-32434); expected 2.6 or newer."
        )
    return torch
