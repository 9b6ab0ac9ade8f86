"""The command line: one function a command, whose signature tyro reads as its flags.

bnjax --help            every command
bnjax COMMAND --help    its flags

`python -m bnjax`, train.py and eval.py call the same functions. What only a command
needs is imported in it, so that help comes at once. docs/programs/command-line.md says
more.
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
        "pip install -r requirements.txt, or pip install 'bnjax[train]'."
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
    """Do what the command line says; return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--help"], ["-h"]):
        print("usage: bnjax COMMAND ...\n")
        for name, command in COMMANDS.items():
            summary = (command.__doc__ or "").partition("\n")[0]
            print(f"  {name:{max(map(len, COMMANDS)) + 2}}{summary}")
        print("\nIts arguments and flags: bnjax COMMAND --help.")
        return 0
    if words == ["--version"]:
        print(bnjax.__version__)
        return 0
    name, *rest = words or [""]
    return run_command(name, rest, prog=f"bnjax {name}")


def run_command(name: str, words: Sequence[str], *, prog: str) -> int:
    """Run a command by its name, called `prog` in its help; return the exit status."""

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
    """Run `main` and turn what a person can put right into one line on stderr.

    The exit status is 0, 2 for a setting, 128 and its number for a signal, else 1.
    """
    try:
        main()
    except BrokenPipeError:
        # Whoever read the output has left; Python would flush to them at exit.
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
            "it: pip install -r requirements.txt, or pip install 'bnjax[train]'.",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        # Imported here: --help needs none of it.
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
        # A compiler's message has many lines.
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

    A `--model` other than the preset's starts from its own options; one of the user's
    own also from the defaults of `--bn`, and its module may lie in the current folder.
    """
    from bnjax.training.config import Config, is_import_path, validate
    from bnjax.training.presets import DEFAULT, PRESETS

    named = bool(words) and not words[0].startswith("-")
    name, *flags = words if named else (DEFAULT, *words)
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
# What other programs call these flags.
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
    """Return the preset for the model that the flags name."""
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
    """Return the optimizer with the preset's keywords below those that are given.

    Another optimizer or schedule than the preset's has none of its keywords.
    """
    changes = {}
    for name, field in (("name", "options"), ("schedule", "schedule_options")):
        ours, theirs = getattr(preset, field), getattr(given, field)
        if theirs is ours:  # tyro gives the very default where a flag is left out.
            theirs = {}
        same = getattr(given, name) == getattr(preset, name)
        changes[field] = {**(ours if same else {}), **theirs}
    return dataclasses.replace(given, **changes)


def _check_flags(config: "Config", words: Sequence[str]) -> None:
    """Refuse a flag by another program's name, or without the group that it is in."""
    from bnjax.training.config import as_flag, flag_values

    flags = [as_flag(name) for name in flag_values(config)]
    grouped = {f"--{flag.rpartition('.')[2]}": flag for flag in flags if "." in flag}
    right = grouped | dict.fromkeys([*flags, "--model"], "") | _OTHER_NAMES
    for word in words:
        given = word.partition("=")[0]
        if meant := right.get(given):
            raise SettingError(f"there is no flag {given}. Did you mean {meant}?")


def _list_presets(prog: str) -> str:
    """Return the text that --help opens with: each preset in a line."""
    from bnjax.training.presets import DEFAULT, PRESETS

    text = "Train a network. PRESET is one of:\n"
    for summary, group in itertools.groupby(PRESETS.values(), lambda p: p.summary):
        first, *rest = (preset.name for preset in group)
        names = f"{first} to {rest[-1].rpartition('-')[2]}" if rest else first
        text += f"  {names}: {summary}\n"
    return (
        f"{text}\nWhat to expect of one, and its settings: {prog} PRESET --help.\n"
        f"Without a preset it is {DEFAULT}, whose settings follow:"
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
    """Score the newest checkpoint of a run on its test set.

    With several runs, each and their ensemble: class probabilities averaged.

    Args:
        run: A folder that train.py wrote.
        others: More of them, for an ensemble.
        crops: Of each image: 1 as the run itself evaluated, 10, or 144.
        batch_stats_from: Score by the moving averages of training, and by
            population statistics over this many training batches.
        output: JSON goes here. None: to RUN/eval.json; an ensemble's nowhere.
        trust: Import the code that a run names as its network.
        data_dir: Where tfds sets are. None: where the run had them.
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
    """Classify images.

    The newest checkpoint is given them prepared as the run's test images.

    Args:
        run: A folder that train.py wrote.
        images: Files, or folders that are searched for them.
        top: How many classes to give for each, the most probable ones.
        json: Print JSON in place of the table.
        output: JSON goes to this file too.
        force: Replace --output if it is there.
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
    """Write the network as StableHLO, which JAX alone runs.

    The file holds the weights, takes any number of images, and needs JAX alone:
    jax.export.deserialize(bytearray(open(OUT, "rb").read())).call(images).

    Args:
        run: A folder that train.py wrote.
        out: The file to write, which ends in .stablehlo.
        fold: Fold BN into the layer before it, where there is one.
        platforms: What it is to run on; none of them is needed here.
        inputs: pixels: uint8, as the data set stores them, scaled inside.
            floats: float32, scaled as in training by the caller.
        softmax: Give class probabilities in place of logits.
        batch_size: The only number of images it takes. None: any.
        force: Replace OUT if it is there.
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
            raise RunError(f"{error} Or export it as it is: --no-fold.") from error
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

    What was folded into what, or why not, is printed, and written as JSON beside OUT.

    Args:
        run: A folder that train.py wrote.
        out: The file to write, .npz or .safetensors.
        dtype: Of the weights. None: as the network has them.
        force: Replace files that are there.
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
            f"{out}: NumPy's files have no bfloat16. Give a name that ends in "
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

    A unit is dead where its scale or its variance is next to nothing: what goes in
    hardly changes what comes out.

    Args:
        run: A folder that train.py wrote.
        json: Print JSON in place of the table.
        scale_below: A unit is dead where |scale| is below this.
        var_below: And where var is below this. None: the run's epsilon.
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
    """Find the mistakes with batch normalization in a run.

    The newest checkpoint is given the run's first training batch. The exit status is 1
    where there is an error among the findings; docs/library/doctor.md says what
    each means.

    Args:
        run: A folder that train.py wrote.
        json: Print JSON in place of the table.
        ignore: Names of findings to leave out, such as few-values.
        trust: Import the code that the run names as its network.
        data_dir: Where tfds sets are. None: where the run had them.
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
                f" Expected some of: {', '.join(names)}."
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
    """Write one HTML file that shows runs side by side.

    It has how they ended and how their settings differ, curves of accuracy and loss,
    the steps to an accuracy, the numbers of BN layers through training, and what the
    doctor finds in each.

    Args:
        runs: Folders that train.py wrote; a run may still go on.
        output: The file to write.
        accuracy: Show how many steps each run took to these, from 0 to 1. Without:
            to the best that every run of the same settings reached.
        layers: Names or patterns of the layers to draw, such as bn_0 "block1/*".
            Without: the first, a middle and the last.
        doctor: Examine the newest checkpoint of each run.
        force: Replace --output if it is there.
        trust: Import the code that a run names as its network.
        data_dir: Where tfds sets are. None: where the run had them.
    """
    from bnjax.report import check_layers, make_report, read_runs
    from bnjax.training.runs import try_to_examine

    if not runs:
        raise SettingError("no run is given: name folders that train.py wrote.")
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
    """Estimate the population statistics again, as a new run.

    They are those over batches of the training set, augmented as in the training's
    first steps. The parameters are those of the newest checkpoint. eval.py and the
    other commands read the result.

    Args:
        run: A folder that train.py wrote.
        output: The folder to write.
        batches: How many, of the run's batch size, from its first step on.
        method: paper: Algorithm 2, means of the batches' statistics.
            pooled: statistics of all their values, more exact for small batches.
        layers: Names or patterns of the layers, such as bn_0 "block1/*". Without: all.
        force: Replace a run that is in --output.
        trust: Import the code that the run names as its network.
        data_dir: Where tfds sets are. None: where the run had them.
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
            f"{run} was trained with --ema: eval.py takes its statistics again "
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
    """Make a run of weights from PyTorch.

    Residual networks of torchvision and timm are known by their names; of a network of
    your own a mapping is proposed, which --confirm takes. Where the data set is not
    there, the number of classes is that of the weights. After -- may follow flags of
    train.py that the preset needs, such as --data.name.

    Args:
        file: Of PyTorch: .safetensors, or a state_dict() in .pt, .pth or .bin.
        output: The folder to write.
        preset: Of train.py: says which network, and on which data.
        model: Another network than the preset's.
        mapping: Which layer is which, a JSON file. None: as the network has it.
        names: More of the mapping, such as linear=logits.
        ignore: Layers or tensors of PyTorch that go nowhere.
        keep: Layers or arrays of ours that keep their first values.
        confirm: Take the mapping that was proposed.
        image_shape: Height, width, channels, where the data set is not there.
        force: Replace a run that is in --output.
        data_dir: Where the data set is. None: $TFDS_DATA_DIR, else
            ~/tensorflow_datasets.
        flags: What follows --.
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
                f"--names {pair}: expected THEIRS=OURS, a layer of PyTorch and the "
                "path of ours, such as linear=logits."
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
                f" By the shapes of its arrays it could be:\n{format_mapping(layers)}\n"
                f"By order alone, since others have the same shapes: {by_order}. If "
                "all of it is right, add --confirm; else write it to a file, put it "
                "right, and give --mapping FILE."
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
