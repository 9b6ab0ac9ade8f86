"""What each command of `python -m bnjax` is told."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bnjax._validate import did_you_mean
from bnjax.commands import COMMANDS
from bnjax.data.config import SettingError

Command = Callable[[], None]
Flag = tyro.conf.FlagCreatePairsOff[bool]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Flags = Annotated[tuple[str, ...], tyro.conf.Suppress]
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
        SettingError: there is no such command.
        SystemExit: status 0 after --help, 2 after a flag tyro refuses.

    Example:
        >>> parse(["inspct", "runs/a"])
        Traceback (most recent call last):
        bnjax.data.config.SettingError: there is no command 'inspct'. Did you mean
        'inspect'? Expected one of: inspect, ...
    """
    name = words[0] if words else ""
    if name not in COMMANDS:
        given = f"there is no command {name!r}." if name else "no command is given."
        raise SettingError(
            f"{given}{did_you_mean(name, COMMANDS)} Expected one of: "
            f"{', '.join(COMMANDS)}. python -m bnjax --help says what they do.",
        )
    prog = f"python -m bnjax {name}"
    own, flags = list(words[1:]), ()
    arguments = _ARGUMENTS[name]
    if name == "import-torch" and "--" in own:
        place = own.index("--")
        own, flags = own[:place], tuple(own[place + 1 :])
        arguments = functools.partial(arguments, flags=flags)
    return tyro.cli(arguments, prog=prog, args=own)


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


def _fold(
    run: Run,
    out: Out,
    dtype: Literal["float32", "bfloat16"] | None = None,
    force: Flag = False,
    data_dir: Path | None = None,
) -> Command:
    """Write the weights of the newest checkpoint with BN folded into them.

    What was folded into what, or why not, is printed, and written as JSON beside OUT.

    Args:
        run: A folder that train.py wrote.
        out: The file to write, .npz or .safetensors.
        dtype: Of the weights. None: as the network has them.
        force: Replace files that are there.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.commands.fold import fold_run

    return functools.partial(
        fold_run, run, out, dtype=dtype, force=force, data_dir=data_dir
    )


def _recompute_stats(
    run: Run,
    output: Path,
    batches: int = 100,
    method: Literal["paper", "pooled"] = "paper",
    layers: tuple[str, ...] = (),
    force: Flag = False,
    data_dir: Path | None = None,
) -> Command:
    """Estimate the population statistics again, over batches of the training set.

    The result is a new run, which eval.py and the other commands read. Its parameters
    are those of the newest checkpoint.

    Args:
        run: A folder that train.py wrote.
        output: The folder to write.
        batches: How many, of the run's batch size, from its first step on.
        method: paper: Algorithm 2, means of the batches' statistics.
            pooled: statistics of all their values, more exact for small batches.
        layers: Names or patterns of the layers, such as bn_0 "block1/*". Without: all.
        force: Replace a run that is in --output.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.commands.recompute_stats import recompute_run

    return functools.partial(
        recompute_run,
        run,
        output,
        batches=batches,
        method=method,
        layers=layers,
        force=force,
        data_dir=data_dir,
    )


def _import_torch(
    file: File,
    output: Path,
    preset: str,
    model: str | None = None,
    mapping: Path | None = None,
    names: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    confirm: Flag = False,
    image_shape: tuple[int, ...] | None = None,
    force: Flag = False,
    data_dir: Path | None = None,
    flags: Flags = (),
) -> Command:
    """Make a run of weights and statistics from PyTorch, which eval.py reads.

    Residual networks of torchvision and timm are known by their names; of a network of
    your own a mapping is proposed, which --confirm takes.
    After -- may follow flags of train.py that the preset needs, such as --data.name.

    Args:
        file: Of PyTorch: .safetensors, or a state_dict() in .pt, .pth or .bin.
        output: The folder to write.
        preset: Of train.py: says which network, and on which data.
        model: Another network than the preset's.
        mapping: Which layer is which, a JSON file. None: as the network has it.
        names: More of the mapping, such as linear=logits.
        ignore: Layers or blocks of PyTorch that go nowhere.
        keep: Layers or arrays of ours that keep their first values.
        confirm: Take the mapping that was proposed.
        image_shape: Height, width, channels, where the data set is not there.
        force: Replace a run that is in --output.
        data_dir: Where tfds sets are. None: $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.
        flags: What follows --.
    """
    from bnjax.commands.import_torch import import_torch

    if model is not None:
        flags = ("--model", model, *flags)
    if data_dir is not None:
        flags = ("--data-dir", str(data_dir), *flags)
    return functools.partial(
        import_torch,
        file,
        output,
        preset=preset,
        flags=flags,
        mapping=mapping,
        names=names,
        ignore=ignore,
        keep=keep,
        confirm=confirm,
        image_shape=image_shape,
        force=force,
    )


_ARGUMENTS: dict[str, Callable[..., Command]] = {
    "inspect": _inspect,
    "predict": _predict,
    "export": _export,
    "fold": _fold,
    "recompute-stats": _recompute_stats,
    "import-torch": _import_torch,
}
