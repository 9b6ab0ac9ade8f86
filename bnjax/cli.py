"""The command line: one function for each command, whose signature gives its flags.

bnjax --help            every command
bnjax COMMAND --help    its flags

tyro reads the signatures. `python -m bnjax`, train.py and eval.py call the same
functions. Each command imports what only it needs, so that help appears at once.
docs/programs/command-line.md says more.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json as json_format
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

import bnjax
from bnjax._files import OutputError, check_output, write_output
from bnjax._validate import did_you_mean
from bnjax.data.config import SettingError

try:
    import tyro
except ModuleNotFoundError:
    raise SystemExit(
        "error: the package tyro is not installed, and the command line needs it: "
        "pip install '.[train]' in a clone of bnjax."
    ) from None

if TYPE_CHECKING:
    from bnjax.training.config import Config, OptimizerConfig

Platform = Literal["cpu", "cuda", "tpu", "rocm"]
WEIGHT_SUFFIXES = (".npz", ".safetensors")
USAGE = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

Flag = tyro.conf.FlagCreatePairsOff[bool]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Runs = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[RUN ...]")
]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
File = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Images = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"]):
        print("usage: bnjax COMMAND ...\n")
        for name, command in COMMANDS.items():
            summary = (command.__doc__ or "").partition("\n")[0]
            print(f"  {name:{max(map(len, COMMANDS)) + 2}}{summary}")
        print("\nArguments and flags of a command: bnjax COMMAND --help.")
        return 0
    if words == ["--version"]:
        print(bnjax.__version__)
        return 0
    name, *rest = words or [""]
    return run_command(name, rest, prog=f"bnjax {name}")


def run_command(name: str, words: Sequence[str], *, prog: str) -> int:
    """Run a command by its name, and return the exit status; its help shows `prog`."""

    def run() -> None:
        if name not in COMMANDS:
            given = f"there is no command {name!r}." if name else "no command is given."
            raise SettingError(
                f"{given}{did_you_mean(name, COMMANDS)} Expected one of: "
                f"{', '.join(COMMANDS)}. bnjax --help says what they do.",
            )
        command, args = COMMANDS[name], list(words)
        if command is train:
            train(args, prog=prog)
            return
        if command is import_torch and "--" in args:
            place = args.index("--")
            command = functools.partial(command, flags=tuple(args[place + 1 :]))
            del args[place:]
        tyro.cli(command, prog=prog, args=args)

    return run_reporting(run)


def run_reporting(main: Callable[[], None]) -> int:
    """Run `main`, and report errors that a user can fix in one line on stderr.

    The exit status is 0 on success, 2 for a wrong setting, 128 plus its number for a
    signal, and 1 for other errors.
    """
    try:
        main()
    except BrokenPipeError:
        # The reader of the output has ended; Python would flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("bnjax"):
            raise
        print(
            f"error: the package {error.name} is not installed, and training needs "
            "it: pip install '.[train]' in a clone of bnjax.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        # Imported here, because --help does not need it.
        from bnjax._cpu.build import BuildError
        from bnjax.data.config import DataError
        from bnjax.interop.export import ExportError
        from bnjax.interop.torch import TorchError
        from bnjax.training.config import RunError
        from bnjax.training.faults import Stopped
        from bnjax.training.hosts import leave_hosts

        known = (DataError, ExportError, TorchError, RunError, BuildError)
        if isinstance(error, Stopped):
            status = 128 + error.signal
        elif isinstance(error, SettingError | OutputError):
            status = USAGE
        elif isinstance(error, known):
            status = 1
        else:
            raise
        label = "error: " if isinstance(error, ValueError) else ""
        # The message of a compiler has many lines.
        words = str(error).split() if isinstance(error, BuildError) else [str(error)]
        print(f"{label}{' '.join(words)}", file=sys.stderr)
        leave_hosts(status)
        return status
    return 0


def train(words: Sequence[str], *, prog: str = "bnjax train") -> None:
    """Train a network; bnjax train --help lists the presets."""
    preset, config = parse_train(words, prog=prog)

    from bnjax.training import loop

    loop.train(preset, config)


def parse_train(
    words: Sequence[str], *, prog: str = "bnjax train"
) -> tuple[str, "Config"]:
    """Read `[PRESET] [--flags]`; return the preset's name and its configuration.

    A `--model` other than the preset's starts from its own options. A user's network
    also starts from the defaults of `--bn`, and its module may be in the current
    folder.
    """
    from bnjax.training.config import Config, is_import_path, validate
    from bnjax.training.presets import DEFAULT, PRESETS

    named = bool(words) and not words[0].startswith("-")
    name, *flags = words if named else (DEFAULT, *words)
    if name not in PRESETS:
        from bnjax.models import MODELS

        like = did_you_mean(name, PRESETS)
        if name in MODELS:
            like = f" It is a model: write `PRESET --model {name}`."
        raise SettingError(
            f"preset {name!r} is unknown.{like} Expected one of: {', '.join(PRESETS)}.",
        )
    late = [
        word
        for before, word in itertools.pairwise(["", *flags])
        if word in PRESETS and before not in _MODEL_FLAGS
    ]
    if late and not named:
        raise SettingError(
            f"preset {late[0]!r} comes after a flag; the preset goes first: "
            f"{prog} {late[0]} [--flags].",
        )
    preset = PRESETS[name]
    default = _with_model(preset.config, flags)
    _check_flags(default, flags)
    said = f"{preset.expectation} {preset.time}".strip()
    about = f"{name}: `python train.py {name}`.\n\n{preset.summary}\n{said}"
    config = tyro.cli(
        Config,
        prog=f"{prog} {name if named else '[PRESET]'}",
        description=about if named else _list_presets(prog),
        default=default,
        args=flags,
    )
    optim = _with_options(config.optim, default.optim)
    config = dataclasses.replace(config, optim=optim)
    validate(config)
    if is_import_path(config.model.name) and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return name, config


_MODEL_FLAGS = ("--model", "--model.name")
# Names of flags in other programs.
_OTHER_NAMES = {
    "--epochs": "--steps, each of them a batch",
    "--bs": "--batch-size",
    "--momentum": "--optim.options momentum=..., or --bn.momentum",
    "--optim.momentum": "--optim.options momentum=...",
    "--optimizer": "--optim.name",
    "--dataset": "--data.name",
    "--gpus": "--devices",
    "--output": "--workdir",
}


def _with_model(config: "Config", flags: Sequence[str]) -> "Config":
    """Return the preset with the model that the flags name."""
    from bnjax.training.config import BatchNormConfig, ModelConfig, is_import_path

    name = config.model.name
    for word, after in itertools.pairwise([*flags, ""]):
        flag, equals, value = word.partition("=")
        if flag in _MODEL_FLAGS:
            name = value if equals else after
    if name == config.model.name:
        return config
    bn = BatchNormConfig() if is_import_path(name) else config.bn
    return dataclasses.replace(config, model=ModelConfig(name=name), bn=bn)


def _with_options(
    given: "OptimizerConfig", preset: "OptimizerConfig"
) -> "OptimizerConfig":
    """Return the optimizer with the given keywords, and the preset's for the rest.

    An optimizer or schedule other than the preset's does not get the preset's keywords.
    """
    changes = {}
    for name, field in (("name", "options"), ("schedule", "schedule_options")):
        ours, theirs = getattr(preset, field), getattr(given, field)
        if theirs is ours:  # Without the flag, tyro returns the default object itself.
            theirs = {}
        same = getattr(given, name) == getattr(preset, name)
        changes[field] = {**(ours if same else {}), **theirs}
    return dataclasses.replace(given, **changes)


def _check_flags(config: "Config", words: Sequence[str]) -> None:
    """Refuse a flag with another program's name, or without its group."""
    from bnjax.training.config import as_flag, flag_values

    flags = [as_flag(name) for name in flag_values(config)]
    grouped = {f"--{flag.rpartition('.')[2]}": flag for flag in flags if "." in flag}
    right = grouped | dict.fromkeys([*flags, "--model"], "") | _OTHER_NAMES
    for word in words:
        given = word.partition("=")[0]
        if meant := right.get(given):
            raise SettingError(f"there is no flag {given}. Did you mean {meant}?")


def _list_presets(prog: str) -> str:
    """Return the first text of --help, with one line for each preset."""
    from bnjax.training.presets import DEFAULT, PRESETS

    text = "Train a network. PRESET is one of:\n"
    for summary, group in itertools.groupby(PRESETS.values(), lambda p: p.summary):
        first, *rest = (preset.name for preset in group)
        names = f"{first} to {rest[-1].rpartition('-')[2]}" if rest else first
        text += f"  {names}: {summary}\n"
    return (
        f"{text}\nExpected results and settings of a preset: {prog} PRESET --help.\n"
        f"Without PRESET, {DEFAULT} is used, with these settings:"
    )


def evaluate(
    run: Run,
    others: Runs = (),
    crops: int = 1,
    batch_stats_from: int | None = None,
    output: Path | None = None,
    trust: Flag = False,
    data_dir: Path | None = None,
) -> None:
    """Evaluate the newest checkpoint of a run on its test set.

    With several runs, evaluate each of them and their ensemble, which averages class
    probabilities.

    Args:
        run: A folder that train.py wrote.
        others: More such folders, for an ensemble.
        crops: Crops of each image: 1 (as in the run's evaluation), 10 or 144.
        batch_stats_from: Evaluate with the moving averages of training, and with
            population statistics over this many training batches.
        output: The JSON file to write. None: RUN/eval.json; no file for an ensemble.
        trust: Import the code that a run names as its network.
        data_dir: The folder of tfds sets. None: the folder that the run used.
    """
    from bnjax.training.evaluation import evaluate_runs

    evaluate_runs(
        [run, *others],
        crops=crops,
        batch_stats_from=batch_stats_from,
        output=output,
        data_dir=data_dir,
        trust=trust,
    )


def predict(
    run: Run,
    images: Images,
    top: int = 5,
    json: Flag = False,
    output: Path | None = None,
    force: Flag = False,
    trust: Flag = False,
) -> None:
    """Classify images with the newest checkpoint of a run.

    Images are prepared as the test images of the run.

    Args:
        run: A folder that train.py wrote.
        images: Image files, or folders to search for images.
        top: The number of most probable classes to show for each image.
        json: Print JSON instead of the table.
        output: Also write the JSON to this file.
        force: Replace --output if it exists.
        trust: Import the code that the run names as its network.
    """
    from bnjax.training.evaluation import load_run
    from bnjax.training.runs import classify, format_table, list_images

    if top < 1:
        raise SettingError(f"--top {top}: expected 1 or more.")
    if output is not None:
        check_output(output, overwrite=force)
    files = list_images(images)
    opened = load_run(run, trust=trust, examples=False)
    step, described, unreadable = classify(opened, files, top)
    result = {"workdir": str(run), "step": step, "images": described}
    text = _to_text({**result, "unreadable": unreadable})
    if output is not None:
        write_output(output, text.encode(), overwrite=force)
    if json:
        print(text, end="")
        return
    rows = [
        (
            each["file"],
            *(f"{p['class']} {p['probability']:.2%}" for p in each["predictions"]),
        )
        for each in described
    ]
    print(format_table(("image", *map(str, range(1, len(rows[0])))), rows))


def export(
    run: Run,
    out: Out,
    fold: bool = True,
    platforms: tuple[Platform, ...] = ("cpu", "cuda", "tpu"),
    inputs: Literal["pixels", "floats"] = "pixels",
    softmax: Flag = False,
    batch_size: int | None = None,
    force: Flag = False,
    trust: Flag = False,
) -> None:
    """Export the network as StableHLO, which needs only JAX to run.

    The file holds the weights and accepts any number of images. To run it:
    jax.export.deserialize(bytearray(open(OUT, "rb").read())).call(images).

    Args:
        run: A folder that train.py wrote.
        out: The file to write; its name ends in .stablehlo.
        fold: Fold BN into the layer before it, if there is one.
        platforms: The platforms to run on; this machine need not have them.
        inputs: pixels: uint8, as the data set stores them; the function scales them.
            floats: float32, which the caller scales as in training.
        softmax: Return class probabilities instead of logits.
        batch_size: The only number of images that it accepts. None: any number.
        force: Replace OUT if it exists.
        trust: Import the code that the run names as its network.
    """
    import jax
    import jax.numpy as jnp

    from bnjax.data.pipeline import make_to_inputs
    from bnjax.interop.export import check_export, export_inference, save
    from bnjax.training.config import RunError
    from bnjax.training.evaluation import load_run
    from bnjax.training.runs import fold_state

    check_export(out, overwrite=force)
    if batch_size is not None and batch_size < 1:
        raise SettingError(f"--batch-size {batch_size}: expected 1 or more.")
    opened = load_run(run, trust=trust, examples=False)
    program, state = opened.restore()
    to_inputs = make_to_inputs(opened.config.data, opened.source.max_value)
    if fold and state.batch_stats:
        try:
            network, _ = fold_state(program, state, opened.source.image_shape)
        except RunError as error:
            raise RunError(f"{error} Or export without folding: --no-fold.") from error
    else:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        network = functools.partial(program.model.apply, variables, train=False)

    def inference(images: jax.Array) -> jax.Array:
        logits: Any = network(to_inputs(images) if inputs == "pixels" else images)
        if not softmax:
            return logits
        return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, "float32")))

    dtype = jnp.uint8 if inputs == "pixels" else jnp.float32
    images = jax.ShapeDtypeStruct((1, *opened.source.image_shape), dtype)
    exported = export_inference(
        inference, None, images, platforms=platforms, batch_size=batch_size
    )
    save(exported, out, overwrite=force)
    given, result = (
        f"{aval.dtype} of shape ({', '.join(map(str, aval.shape))})"
        for aval in (*exported.in_avals, *exported.out_avals)
    )
    pixels = f", pixels from 0 to {opened.source.max_value}"
    print(
        f"{out}: {out.stat().st_size:,} bytes, step {int(state.step):,} of {run}\n"
        f"takes {given}{pixels if inputs == 'pixels' else ''}\n"
        f"gives {result}, {'probabilities' if softmax else 'logits'}\n"
        f"on {', '.join(exported.platforms)}"
    )


def fold(
    run: Run,
    out: Out,
    dtype: Literal["float32", "bfloat16"] | None = None,
    force: Flag = False,
    trust: Flag = False,
) -> None:
    """Write the weights with batch normalization folded into them.

    A report says which layer was folded into which, or why not. It is printed, and
    written as JSON beside OUT.

    Args:
        run: A folder that train.py wrote.
        out: The file to write, .npz or .safetensors.
        dtype: The dtype of the weights. None: the dtype of the network.
        force: Replace existing files.
        trust: Import the code that the run names as its network.
    """
    from flax.traverse_util import flatten_dict

    from bnjax.interop.torch_files import write_state_dict
    from bnjax.training.evaluation import load_run
    from bnjax.training.runs import EXAMPLES, fold_state

    if out.suffix not in WEIGHT_SUFFIXES:
        raise SettingError(
            f"{out} ends in {out.suffix!r}; expected {' or '.join(WEIGHT_SUFFIXES)}."
            f"{did_you_mean(out.suffix, WEIGHT_SUFFIXES)}",
        )
    beside = out.with_suffix(".json")
    for path in (out, beside):
        check_output(path, overwrite=force)
    if out.suffix == ".npz" and dtype == "bfloat16":
        raise SettingError(
            f"{out}: NumPy's files do not support bfloat16. Give a name that ends in "
            ".safetensors, or --dtype float32.",
        )
    opened = load_run(run, trust=trust, examples=False)
    program, state = opened.restore()
    folded, difference = fold_state(program, state, opened.source.image_shape, dtype)
    arrays = flatten_dict(folded.variables, sep="/")
    weights = {str(path): np.asarray(leaf) for path, leaf in arrays.items()}
    described = {
        "workdir": str(run),
        "step": int(state.step),
        "largest_difference": difference,
        "weights": {
            name: {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
            for name, leaf in weights.items()
        },
        "layers": [dataclasses.asdict(layer) for layer in folded.report],
    }
    if out.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, **weights)  # pyright: ignore[reportArgumentType]
        write_output(out, file.getvalue(), overwrite=force)
    else:
        write_state_dict(out, weights, overwrite=force)
    write_output(beside, _to_text(described).encode(), overwrite=force)
    print(
        f"{folded.report}\n"
        f"{out}: {len(weights)} arrays, {out.stat().st_size:,} bytes, "
        f"step {int(state.step):,} of {run}\n"
        f"logits of {EXAMPLES} random inputs differ by at most {difference:.2g}"
    )


def inspect(
    run: Run,
    json: Flag = False,
    scale_below: float = 1e-3,
    var_below: float | None = None,
    trust: Flag = False,
) -> None:
    """Show the parameters and statistics of every BN layer.

    A unit is dead if its scale or its variance is nearly 0: its input hardly affects
    its output.

    Args:
        run: A folder that train.py wrote.
        json: Print JSON instead of the table.
        scale_below: A unit is dead if its absolute scale is below this.
        var_below: A unit is dead if its variance is below this. None: the epsilon of
            the run.
        trust: Import the code that the run names as its network.
    """
    from bnjax.training.evaluation import load_run
    from bnjax.training.runs import find_layers, format_table

    for flag, value in (("scale", scale_below), ("var", var_below)):
        if value is not None and not value >= 0:
            raise SettingError(f"--{flag}-below {value}: expected 0 or more.")
    opened = load_run(run, trust=trust, examples=False)
    _, state = opened.restore()
    var_below = opened.config.bn.epsilon if var_below is None else var_below
    layers = find_layers(
        state.params, state.batch_stats, scale_below=scale_below, var_below=var_below
    )
    if json:
        described = {"workdir": str(run), "step": int(state.step)}
        described |= {"scale_below": scale_below, "var_below": var_below}
        print(_to_text({**described, "layers": layers}), end="")
        return
    title = f"{run}, step {int(state.step):,}"
    if not layers:
        print(f"{title}: no layer has a running mean and variance.")
        return
    print(f"{title}: {len(layers)} BN layer{'s' if len(layers) > 1 else ''}")
    header = ("layer", "features", "scale", "bias", "mean", "var", "dead")
    rows = []
    for layer in layers:
        ranges = [
            "-" if values is None else f"{values['min']:.3g} to {values['max']:.3g}"
            for values in map(layer.get, header[2:6])
        ]
        count, dead = f"{layer['features']:,}", f"{layer['dead']:,}"
        rows.append((layer["path"], count, *ranges, dead))
    print(format_table(header, rows))
    dead, units = (sum(layer[n] for layer in layers) for n in ("dead", "features"))
    print(
        f"{dead:,} of {units:,} units are dead: |scale| below {scale_below:g} or var "
        f"below {var_below:g}."
    )


def doctor(
    run: Run,
    json: Flag = False,
    ignore: tuple[str, ...] = (),
    trust: Flag = False,
    data_dir: Path | None = None,
) -> None:
    """Find mistakes with batch normalization in a run.

    The doctor examines the newest checkpoint on the run's first training batch. The
    exit status is 1 if a finding is an error. docs/library/doctor.md says what each
    finding means.

    Args:
        run: A folder that train.py wrote.
        json: Print JSON instead of the table.
        ignore: Names of findings to skip, such as few-values.
        trust: Import the code that the run names as its network.
        data_dir: The folder of tfds sets. None: the folder that the run used.
    """
    from bnjax.doctor import RULES
    from bnjax.training.config import RunError
    from bnjax.training.evaluation import load_run
    from bnjax.training.runs import examine_run, find_layers, format_findings

    names = [rule.name for rule in RULES]
    for name in ignore:
        if name not in names:
            raise SettingError(
                f"--ignore {name}: there is no such finding.{did_you_mean(name, names)}"
                f" Expected names among: {', '.join(names)}."
            )
    state, findings = examine_run(load_run(run, data_dir, trust=trust), ignore)
    layers = len(find_layers(state.params, state.batch_stats))
    if json:
        described = {"workdir": str(run), "step": int(state.step), "layers": layers}
        described["findings"] = [dataclasses.asdict(each) for each in findings]
        print(_to_text(described), end="")
    else:
        of = f"{layers} BN layer{'' if layers == 1 else 's'}"
        print(f"{run}, step {int(state.step):,}: {of}, {format_findings(findings)}")
    if errors := sum(each.severity == "error" for each in findings):
        raise RunError(
            f"{run} has {errors} error{'' if errors == 1 else 's'}: see above."
        )


def report(
    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")
    ],
    output: Path = Path("report.html"),
    accuracy: tuple[float, ...] = (),
    layers: tuple[str, ...] = (),
    doctor: bool = True,
    force: Flag = False,
    trust: Flag = False,
    data_dir: Path | None = None,
) -> None:
    """Compare runs in one HTML file.

    The file shows the final results, the differences between the settings, curves of
    accuracy and loss, the steps to an accuracy, the numbers of BN layers during
    training, and the findings of the doctor.

    Args:
        runs: Folders that train.py wrote; a run may still be training.
        output: The file to write.
        accuracy: Show the steps that each run took to these accuracies, from 0 to 1.
            Default: the best that every run with the same settings reached.
        layers: Names or patterns of the layers to draw, such as `bn_0` or `block1/*`.
            Default: the first, a middle and the last.
        doctor: Examine the newest checkpoint of each run.
        force: Replace --output if it exists.
        trust: Import the code that a run names as its network.
        data_dir: The folder of tfds sets. None: the folder that the run used.
    """
    from bnjax.report import check_layers, make_report, read_runs
    from bnjax.training.runs import try_to_examine

    if not runs:
        raise SettingError("no run is given: give folders that train.py wrote.")
    check_output(output, overwrite=force)
    for value in accuracy:
        if not 0 < value <= 1:
            percent = f" Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
            raise SettingError(
                f"--accuracy {value:g}: expected more than 0 and at most 1.{percent}"
            )

    read = read_runs(runs)
    check_layers(read, layers)
    findings = []
    for workdir in runs:
        found = "the report was made with --no-doctor."
        if doctor:
            print(f"examining {workdir}", file=sys.stderr, flush=True)
            found = try_to_examine(workdir, data_dir, trust=trust)
        findings.append(found)
    page = make_report(read, findings, accuracies=accuracy, layers=layers)
    write_output(output, page.encode(), overwrite=force)
    size = output.stat().st_size
    count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
    print(f"{output}: {count}, {size:,} bytes")


def recompute_stats(
    run: Run,
    output: Path,
    batches: int = 100,
    method: Literal["paper", "pooled"] = "paper",
    layers: tuple[str, ...] = (),
    force: Flag = False,
    trust: Flag = False,
    data_dir: Path | None = None,
) -> None:
    """Re-estimate the population statistics of a run, and write them as a new run.

    The statistics are over batches of the training set, augmented as in the first
    steps of training. The parameters are those of the newest checkpoint. eval.py and
    the other commands can read the new run.

    Args:
        run: A folder that train.py wrote.
        output: The folder to write.
        batches: The number of batches, of the run's batch size, from its first step.
        method: paper: Algorithm 2, means of the batches' statistics.
            pooled: statistics of all values together, more exact for small batches.
        layers: Names or patterns of the layers, such as `bn_0` or `block1/*`.
            Default: all layers.
        force: Replace a run in --output.
        trust: Import the code that the run names as its network.
        data_dir: The folder of tfds sets. None: the folder that the run used.
    """
    from bnjax.training.config import RunError
    from bnjax.training.evaluation import PopulationEstimator, load_run
    from bnjax.training.metrics import ProgressReporter
    from bnjax.training.program import make_run_feed
    from bnjax.training.runs import check_new_run, describe_change, write_run
    from bnjax.training.sharding import evaluation_parallel
    from bnjax.training.workdir import read_record

    if batches < 1:
        raise SettingError(f"--batches {batches}: expected 1 or more.")
    check_new_run(output, force=force)
    if output.resolve() == run.resolve():
        raise SettingError(f"--output {output} is the run itself. Give another folder.")
    opened = load_run(run, data_dir, trust=trust)
    config, source = opened.config, opened.source
    if config.ema is not None:
        raise RunError(
            f"{run} was trained with --ema: eval.py re-estimates its statistics "
            "each time, over --batch-stats-from batches."
        )
    program, state, metadata = opened.restore_with_metadata()
    if not state.batch_stats:
        raise RunError(
            f"{run} was trained without batch normalization: it has no statistics."
        )
    report = ProgressReporter(source.name, seconds=5, verb="estimating from")
    with contextlib.closing(make_run_feed(config, source)) as feed:
        parallel = evaluation_parallel(config)
        new = PopulationEstimator(config, program, feed, parallel).estimate(
            state, batches, method=method, layers=layers or None, report=report
        )
    made_by = {"command": "recompute-stats", "run": str(run), "batches": batches}
    write_run(
        output,
        read_record(run).get("preset", ""),
        dataclasses.replace(config, workdir=output),
        source,
        new,
        {**made_by, "method": method, "layers": layers},
        metadata=dataclasses.replace(metadata, test_accuracy=None),
        force=force,
    )
    print(describe_change(state.batch_stats, new.batch_stats))
    print(
        f"{output} holds step {int(state.step):,} with statistics over {batches:,} "
        f"batches of {config.batch_size:,}: python eval.py {output}"
    )


def import_torch(
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
    flags: Annotated[tuple[str, ...], tyro.conf.Suppress] = (),
) -> None:
    """Make a run from PyTorch weights.

    The command knows the layer names of torchvision's and timm's residual networks. For
    another network it proposes a mapping, which --confirm accepts. If the data set does
    not exist, the weights give the number of classes. Flags of train.py that the preset
    needs, such as --data.name, may follow after --.

    Args:
        file: PyTorch weights: .safetensors, or a state_dict() in .pt, .pth or .bin.
        output: The folder to write.
        preset: A preset of train.py, which gives the network and the data set.
        model: Another network than the preset's.
        mapping: A JSON file that maps PyTorch layers to Flax layers. None: the mapping
            of the network.
        names: More entries of the mapping, such as linear=logits.
        ignore: PyTorch layers or tensors to drop.
        keep: Flax layers or arrays that keep their initial values.
        confirm: Accept the proposed mapping.
        image_shape: Height, width and channels, if the data set does not exist.
        force: Replace a run in --output.
        data_dir: The folder of the data set. None: $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.
        flags: The flags after --.
    """
    from bnjax.interop.torch import TorchError, from_torch, known_mapping, prefer
    from bnjax.interop.torch_files import format_mapping, read_mapping, read_state_dict
    from bnjax.interop.torch_proposal import alike, propose_mapping, trace
    from bnjax.training.program import Program
    from bnjax.training.runs import check_new_run, write_run
    from bnjax.training.transfer import source_of_weights

    if model is not None:
        flags = ("--model", model, *flags)
    if data_dir is not None:
        flags = ("--data-dir", str(data_dir), *flags)
    for pair in names:
        if not all(pair.partition("=")):
            raise SettingError(
                f"--names {pair}: expected TORCH=FLAX, a PyTorch layer and the path of "
                "a Flax layer, such as linear=logits."
            )
    told: dict[str, Any] = dict(pair.split("=", 1) for pair in names)
    told |= dict.fromkeys(ignore)
    check_new_run(output, force=force)
    preset, config = parse_train([preset, *flags])
    tensors = read_state_dict(file)
    given = None if mapping is None else read_mapping(mapping)
    source = source_of_weights(config, tensors, prefer(told, given or {}), image_shape)
    program = Program(config, source)
    initial = program.initial_state()
    variables = {"params": initial.params, "batch_stats": initial.batch_stats}
    layers = given or known_mapping(config.model.name, source.image_shape)
    if layers is None:
        called = trace(program.model, program.images, train=False)
        layers = propose_mapping(tensors, variables, called, told)
        if not confirm:
            by_order = ", ".join(alike(layers, variables)) or "none"
            raise TorchError(
                f"{file} was not imported: no mapping is known for {config.model.name}."
                f" The shapes of its arrays suggest:\n{format_mapping(layers)}\n"
                "Paired only by order, because other layers have the same shapes: "
                f"{by_order}. If the mapping is right, add --confirm; otherwise write "
                "it to a file, correct it, and give --mapping FILE."
            )
    imported = from_torch(tensors, variables, prefer(told, layers), keep=keep)
    write_run(
        output,
        preset,
        dataclasses.replace(config, workdir=output),
        source,
        dataclasses.replace(initial, **imported),
        {"command": "import-torch", "file": str(file)},
        force=force,
    )
    print(
        f"{file}: {len(tensors)} tensors of {config.model.name}\n"
        f"{output} holds the network as of step 0: python eval.py {output}"
    )


def _to_text(value: Any) -> str:
    return json_format.dumps(value, indent=2) + "\n"


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "eval": evaluate,
    "predict": predict,
    "export": export,
    "fold": fold,
    "inspect": inspect,
    "doctor": doctor,
    "report": report,
    "recompute-stats": recompute_stats,
    "import-torch": import_torch,
}
