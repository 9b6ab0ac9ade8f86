"""A configuration as JSON and back: what config.json and a checkpoint hold."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

from bnjax.data import config as data_config
from bnjax.training.config import INCIDENTAL, Config
from bnjax.training.errors import UserError
from bnjax.training.validation import validate


def to_json(config: Any) -> Any:
    """Return a configuration as JSON holds it.

    Example:
        >>> from bnjax.training.presets import digits
        >>> to_json(digits())["bn"]["momentum"]
        0.9
        >>> from_json(to_json(digits()), "config.json") == digits()
        True
    """
    if dataclasses.is_dataclass(config):
        fields = dataclasses.fields(config)
        return {field.name: to_json(getattr(config, field.name)) for field in fields}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def from_json(value: Any, where: str) -> Config:
    """Read a configuration back, exactly as it was.

    Args:
        value: what `to_json` gave.
        where: the file, for messages.

    Raises:
        UserError: a field is missing, unknown or of another type, or its value is one
            that no run can use.
    """
    try:
        config = _read(Config, value, "")
        validate(config)
    except (TypeError, ValueError, UserError) as error:
        raise UserError(
            f"{where} is damaged or from another version of bnjax: {error} "
            "Restore the file, or train again."
        ) from error
    return config


def result_config(config: Config) -> dict[str, Any]:
    """Return the part of the configuration that results depend on, as JSON."""
    value = to_json(config)
    data = value["data"]
    value["data"] = {n: data[n] for n in data if n not in data_config.INCIDENTAL}
    return {name: value[name] for name in value if name not in INCIDENTAL}


def differences(recorded: Config, given: Config) -> list[str]:
    """Name each flag by which two runs would have different results.

    Example:
        >>> from bnjax.training.presets import digits
        >>> import dataclasses
        >>> differences(digits(), dataclasses.replace(digits(), seed=1, keep=9))
        ['--seed: the run has 0, 1 was given']
    """
    before, now = (_flatten(result_config(config)) for config in (recorded, given))
    return [
        f"--{name.replace('_', '-')}: the run has {before[name]}, {now[name]} was given"
        for name in before
        if before[name] != now[name]
    ]


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, item in value.items():
        path = f"{prefix}{name}"
        flat |= _flatten(item, f"{path}.") if isinstance(item, dict) else {path: item}
    return flat


def _read(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind`, or raise naming the place."""
    if dataclasses.is_dataclass(kind):
        return _read_fields(kind, value, path)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal and value in choices:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(choices[0], item, path) for item in value)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _read(choices[0], value, path)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(f"{path} is {value!r}; expected {kind}.")


def _read_fields(kind: Any, value: Any, path: str) -> Any:
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(value, dict) or set(value) != names:
        given = sorted(value) if isinstance(value, dict) else value
        raise ValueError(
            f"{path or 'the configuration'} has {given}; expected {sorted(names)}."
        )
    hints = typing.get_type_hints(kind)
    return kind(
        **{
            name: _read(hints[name], value[name], f"{path}.{name}".lstrip("."))
            for name in names
        }
    )
