"""Runs by name, and the command line that changes them."""

import inspect
from collections.abc import Callable, Sequence

import tyro

from bnjax._checks import did_you_mean
from bnjax.training.config import (
    BatchNormConfig,
    Config,
    DataConfig,
    OptimizerConfig,
    validate,
)
from bnjax.training.errors import USAGE, UserError

DEFAULT = "digits"


def digits() -> Config:
    """digits: `python train.py`.

    The paper's network on scikit-learn's 1,797 digits of 8x8: no network needed.
    Test accuracy about 98 %; about 10 seconds on two CPU cores.
    """
    return Config(
        steps=2000,
        batch_size=60,
        learning_rate=0.1,
        eval_every=100,
        checkpoint_every=1000,
        optim=OptimizerConfig(schedule="cosine"),
        # So that short runs have statistics of their own network by their end.
        bn=BatchNormConfig(momentum=0.9),
    )


def mnist() -> Config:
    """mnist: `python train.py mnist`.

    Section 4.1 of the paper: binary MNIST, 50,000 steps of 60 examples, plain SGD.
    Test accuracy about 97.6 % (about 96.3 % with --no-batch-norm); about half a minute
    on two CPU cores, and up to as much again to decode the images the first time.
    """
    return Config(
        steps=50_000,
        batch_size=60,
        learning_rate=0.5,
        log_every=250,
        data=DataConfig(name="mnist", binarize=True),
    )


PRESETS: dict[str, Callable[[], Config]] = {"digits": digits, "mnist": mnist}


def parse(argv: Sequence[str]) -> tuple[str, Config]:
    """Read `[PRESET] [--flags]`.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        The preset's name and its configuration with the flags applied.

    Raises:
        UserError: the preset is unknown, or a value is one no run can use.
        SystemExit: status 0 after --help, 2 after a flag tyro refuses.

    Example:
        >>> name, config = parse(["mnist", "--steps", "10", "--no-batch-norm"])
        >>> name, config.steps, config.batch_norm, config.batch_size
        ('mnist', 10, False, 60)
    """
    named = bool(argv) and not argv[0].startswith("-")
    name, flags = (argv[0], argv[1:]) if named else (DEFAULT, argv)
    if name not in PRESETS:
        raise UserError(
            f"preset {name!r} is unknown.{did_you_mean(name, PRESETS)} "
            f"Expected one of: {', '.join(PRESETS)}.",
            USAGE,
        )
    late = [word for word in flags if word in PRESETS]
    if late and not named:
        raise UserError(
            f"preset {late[0]!r} comes after a flag; the preset goes first: "
            f"python train.py {late[0]} [--flags].",
            USAGE,
        )
    config = tyro.cli(
        Config,
        prog=f"train.py {name}" if named else "train.py [PRESET]",
        description=_describe(name, named=named),
        default=PRESETS[name](),
        args=list(flags),
    )
    validate(config)
    return name, config


def _describe(name: str, *, named: bool) -> str:
    """Return the text --help opens with."""
    shown = [name] if named else list(PRESETS)
    texts = [inspect.cleandoc(PRESETS[preset].__doc__ or "") for preset in shown]
    if not named:
        texts.insert(0, "Train a network. PRESET is one of:")
        texts.append(f"Without a preset, {DEFAULT}. The flags and their defaults:")
    return "\n\n".join(texts)
