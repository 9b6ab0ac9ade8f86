"""What each command of `python -m bnjax` is told."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bnjax._checks import did_you_mean
from bnjax.commands import COMMANDS
from bnjax.training.errors import USAGE, UserError

Command = Callable[[], None]
Flag = tyro.conf.FlagCreatePairsOff[bool]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Images = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")
]
Platforms = tuple[Literal["cpu", "cuda", "tpu", "rocm"], ...]


def parse(words: Sequence[str]) -> Command:
    """Read a command and its flags.

    Args:
        words: the arguments, without the program's name.

    Returns:
        What does it when called.

    Raises:
        UserError: there is no such command.
        SystemExit: status 0 after --help, 2 after a flag tyro refuses.

    Example:
        >>> parse(["inspct", "runs/a"])
        Traceback (most recent call last):
        bnjax.training.errors.UserError: there is no command 'inspct'. Did you mean
        'inspect'? Expected one of: inspect, ...
    """
    name = words[0] if words else ""
    if name not in COMMANDS:
        given = f"there is no command {name!r}." if name else "no command is given."
        raise UserError(
            f"{given}{did_you_mean(name, COMMANDS)} Expected one of: "
            f"{', '.join(COMMANDS)}. python -m bnjax --help says what they do.",
            USAGE,
        )
    prog = f"python -m bnjax {name}"
    return tyro.cli(_ARGUMENTS[name], prog=prog, args=list(words[1:]))


def _inspect(
    run: Run,
    json: Flag = False,
    scale_below: float = 1e-3,
    var_below: float | None = None,
    data_dir: Path | None = None,
) -> Command:
    """Show the parameters and statistics of every BN layer of the newest checkpoint.

    A unit is dead where its scale or its variance is next to nothing: what goes in
    hardly changes what comes out.

    Args:
        run: A folder that train.py wrote.
        json: Print JSON in place of the table.
        scale_below: A unit is dead where |scale| is below this.
        var_below: And where var is below this. None: the run's epsilon.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.commands.inspect import inspect_run

    return functools.partial(
        inspect_run,
        run,
        as_json=json,
        scale_below=scale_below,
        var_below=var_below,
        data_dir=data_dir,
    )


def _predict(
    run: Run,
    images: Images,
    top: int = 5,
    json: Flag = False,
    output: Path | None = None,
    force: Flag = False,
    data_dir: Path | None = None,
) -> Command:
    """Classify images with the newest checkpoint, prepared as the run's test images.

    Args:
        run: A folder that train.py wrote.
        images: Files, or folders that are searched for them.
        top: How many classes to give for each, the most probable ones.
        json: Print JSON in place of the table.
        output: JSON goes to this file too.
        force: Replace --output if it is there.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.commands.predict import predict_images

    return functools.partial(
        predict_images,
        run,
        images,
        top=top,
        as_json=json,
        output=output,
        force=force,
        data_dir=data_dir,
    )


def _export(
    run: Run,
    out: Out,
    fold: bool = True,
    platforms: Platforms = ("cpu", "cuda", "tpu"),
    inputs: Literal["pixels", "floats"] = "pixels",
    softmax: Flag = False,
    batch_size: int | None = None,
    force: Flag = False,
    data_dir: Path | None = None,
) -> Command:
    """Write the network of the newest checkpoint as StableHLO.

    The file holds the weights, takes any number of images, and needs JAX alone:
    jax.export.deserialize(bytearray(open(OUT, "rb").read())).call(images).

    Args:
        run: A folder that train.py wrote.
        out: The file to write.
        fold: Fold BN into the layer before it, where there is one.
        platforms: What it is to run on; none of them is needed here.
        inputs: pixels: uint8, as the data set stores them, scaled inside.
            floats: float32, scaled as in training by the caller.
        softmax: Give class probabilities in place of logits.
        batch_size: The only number of images it takes. None: any.
        force: Replace OUT if it is there.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.commands.export import export_run

    return functools.partial(
        export_run,
        run,
        out,
        fold=fold,
        platforms=platforms,
        inputs=inputs,
        softmax=softmax,
        batch_size=batch_size,
        force=force,
        data_dir=data_dir,
    )


_ARGUMENTS: dict[str, Callable[..., Command]] = {
    "inspect": _inspect,
    "predict": _predict,
    "export": _export,
}
