"""The command line of train.py: a preset's name, and flags that change it."""

import dataclasses
import inspect
import itertools
from collections.abc import Sequence

import tyro

from bnjax._validate import did_you_mean
from bnjax.data.config import SettingError
from bnjax.training.config import BatchNormConfig, Config, ModelConfig, validate
from bnjax.training.network import is_import_path
from bnjax.training.presets.registry import DEFAULT, PRESETS

_MODEL_FLAGS = ("--model", "--model.name")


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """Read `[PRESET] [--flags]`.

    A `--model` other than the preset's starts from its own options; one of the user's
    own also from the defaults of `--bn`.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The preset's name and its configuration with the flags applied.

    Raises:
        SettingError: the preset is unknown, or a value is one no run can use.
        SystemExit: status 0 after --help, 2 after a flag tyro refuses.

    Example:
        >>> name, config = parse(["mnist", "--steps", "10", "--no-batch-norm"])
        >>> name, config.steps, config.batch_norm, config.batch_size
        ('mnist', 10, False, 60)
    """
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    if name not in PRESETS:
        raise SettingError(
            f"preset {name!r} is unknown.{did_you_mean(name, PRESETS)} "
            f"Expected one of: {', '.join(PRESETS)}.",
        )
    late = [
        word
        for before, word in itertools.pairwise(["", *flags])
        if word in PRESETS and before not in _MODEL_FLAGS
    ]
    if late and not named:
        raise SettingError(
            f"preset {late[0]!r} comes after a flag; the preset goes first: "
            f"python train.py {late[0]} [--flags].",
        )
    config = tyro.cli(
        Config,
        prog=f"train.py {name}" if named else "train.py [PRESET]",
        description=_describe(name) if named else _list_presets(),
        default=_with_model(PRESETS[name](), flags),
        args=list(flags),
    )
    validate(config)
    return name, config


def _with_model(config: Config, flags: Sequence[str]) -> Config:
    """Return the preset for the model that the flags name."""
    name = config.model.name
    for flag, value in itertools.pairwise([*flags, ""]):
        if flag in _MODEL_FLAGS:
            name = value
        elif flag.startswith(tuple(f"{each}=" for each in _MODEL_FLAGS)):
            name = flag.partition("=")[2]
    if name == config.model.name:
        return config
    bn = BatchNormConfig() if is_import_path(name) else config.bn
    return dataclasses.replace(config, model=ModelConfig(name=name), bn=bn)


def _describe(name: str) -> str:
    """Return a preset's text: its command, what it is, what to expect.

    Example:
        >>> print(_describe("lenet-mnist"))
        lenet-mnist: `python train.py lenet-mnist`.
        <BLANKLINE>
        The same network and settings on MNIST.
        Test accuracy about 98.6 %, ...
    """
    return inspect.cleandoc(PRESETS[name].__doc__ or "")


def _list_presets() -> str:
    """Return the text that --help opens with: each preset in a line."""
    summaries = {name: _describe(name).splitlines()[2] for name in PRESETS}
    lines = []
    for summary, group in itertools.groupby(summaries, key=summaries.__getitem__):
        first, *rest = group
        names = f"{first} to {rest[-1].rpartition('-')[2]}" if rest else first
        lines.append(f"  {names}: {summary}")
    return "\n".join(
        (
            "Train a network. PRESET is one of:",
            *lines,
            "",
            "What to expect of one, and its settings: python train.py PRESET --help.",
            f"Without a preset it is {DEFAULT}, whose settings follow:",
        )
    )
