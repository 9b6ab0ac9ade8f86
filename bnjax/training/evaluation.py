"""Evaluate trained networks; every example of the test set is scored exactly once."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bnjax.data.blocks import (
    Block,
    CropBlocks,
    SplitBlocks,
    crop_blocks,
    load_test,
    padded_rows,
)
from bnjax.data.config import SettingError
from bnjax.data.pipeline import Feed, ToInputs, make_to_inputs
from bnjax.data.sources import Arrays, Report, Source, open_data
from bnjax.diagnostics import nonlinearity_inputs
from bnjax.population import Layers, Method, recompute_batch_stats
from bnjax.training.checkpoint import CheckpointMetadata, open_checkpoints
from bnjax.training.config import Config, RunError, is_import_path
from bnjax.training.metrics import ProgressReporter
from bnjax.training.optimizer import AveragedState, average_of
from bnjax.training.program import Program, make_run_feed
from bnjax.training.sharding import Spmd, evaluation_parallel
from bnjax.training.step import (
    Batch,
    Stream,
    TrainState,
    make_eval_step,
    make_predict_step,
    stream_key,
    topk_correct,
)
from bnjax.training.workdir import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    SUMMARY,
    changed_files,
    config_of,
    read_json,
    read_record,
    write_json,
)

RECORDED_VALUES = 2**17
"""The largest number of values of a layer for its percentiles."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split.

    Attributes:
        loss: the mean cross-entropy.
        correct: the number of correctly classified examples.
        examples: the number of examples.
        top5_correct: the number of examples with their class among the five most
            probable classes; None if there are no more than five classes.
    """

    loss: float
    correct: int
    examples: int
    top5_correct: int | None = None

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, np.ndarray]]) -> "Evaluation":
        """Sum up the scores of examples from `make_eval_step`."""
        scores = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return cls(
            loss=float(scores["loss"].astype(np.float64).mean()),
            correct=int(scores["correct"].sum()),
            examples=len(scores["loss"]),
            top5_correct=int(scores["top5"].sum()) if "top5" in scores else None,
        )

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct examples, between 0 and 1."""
        return self.correct / self.examples

    @property
    def top5_accuracy(self) -> float | None:
        """Return the top-5 fraction of correct examples, between 0 and 1, or None."""
        return None if self.top5_correct is None else self.top5_correct / self.examples

    def __str__(self) -> str:
        top5 = ""
        if self.top5_correct is not None:
            top5 = f"top-5 {self.top5_accuracy!r} ({self.top5_correct}), "
        return (
            f"test accuracy {self.accuracy!r} ({self.correct} of {self.examples}), "
            f"{top5}test loss {self.loss!r}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values for summary.json and eval.json."""
        names = ("accuracy", "loss", "correct", "examples")
        if self.top5_correct is not None:
            names += ("top5_accuracy", "top5_correct")
        return {f"test_{name}": getattr(self, name) for name in names}


class Evaluator:
    """Scores states on one split.

    The batch size is rounded up to a multiple of the number of devices, and the last
    batch is padded and masked. If `parallel` is None, one device does the work.
    """

    def __init__(
        self,
        program: Program,
        test: Arrays | SplitBlocks,
        batch_size: int,
        parallel: Spmd | None = None,
    ) -> None:
        parallel = (parallel or Spmd(jax.local_devices()[:1])).for_evaluation()
        if isinstance(test, SplitBlocks):
            self._blocks, examples = test, test.size
        else:
            examples = len(test.labels)
            self._blocks = [Block(parallel.place(test), np.ones(examples, bool))]
        size = parallel.round_up(min(batch_size, examples))
        rows, self._mask = padded_rows(examples, size)
        self._parallel = parallel
        self._rows = parallel.place_rows(rows)
        self._steps = parallel.eval_steps(
            make_eval_step(program.model),
            lambda arrays, rows, _: program.gather(arrays, rows),
        )

    def __call__(self, state: TrainState) -> Evaluation:
        """Score one state from `Spmd.host_state`."""
        params, batch_stats = self._parallel.place((state.params, state.batch_stats))
        parts = []
        for arrays, kept in self._blocks:
            # Arrays that are already on the devices do not move.
            placed = self._parallel.place(arrays)
            scores = self._steps(params, batch_stats, placed, self._rows)
            parts.append({n: np.asarray(scores[n])[self._mask][kept] for n in scores})
        return Evaluation.of(parts)


class InputRecorder:
    """Returns the inputs of each nonlinearity of a network for some test images.

    These are the first `count` images, or those of the first block if it has fewer.
    They are normalized by their own statistics, as in a training step.
    """

    def __init__(
        self, program: Program, test: Arrays | SplitBlocks, count: int
    ) -> None:
        if isinstance(test, SplitBlocks):
            arrays, kept = next(iter(test))
        else:
            arrays, kept = test, np.ones(len(test.labels), bool)
        rows = np.flatnonzero(kept)[:count]
        device = jax.local_devices()[0]
        arrays = jax.device_put(jax.tree.map(lambda leaf: leaf[rows], arrays), device)
        self._images = program.gather(arrays, jnp.arange(len(rows)))["image"]
        self._device = device

        def record(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
            found = nonlinearity_inputs(program.model, variables, images, train=True)
            return {layer: _some_of(u) for layer, u in found.items()}

        self._record = jax.jit(record)
        variables = jax.eval_shape(program.initial_state)
        variables = {"params": variables.params, "batch_stats": variables.batch_stats}
        try:
            jax.eval_shape(record, variables, self._images)
        except (TypeError, ValueError) as error:
            raise SettingError(f"--record-inputs: {error}") from error

    def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return values of shape (values, features) by layer, for one copy of a state.

        From large feature maps, only equally spaced values are returned.
        """
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        placed = jax.device_put(jax.tree.map(np.asarray, variables), self._device)
        return jax.tree.map(np.asarray, self._record(placed, self._images))


def _some_of(u: jax.Array) -> jax.Array:
    values = u.reshape(-1, u.shape[-1])
    every = math.ceil(values.size / RECORDED_VALUES)
    return values[::every]


Predictor = Callable[[np.ndarray], jax.Array]
"""A function from a batch of stored uint8 images to logits, sharded over devices."""


def make_predictor(
    model: nn.Module, to_inputs: ToInputs, state: TrainState, parallel: Spmd
) -> Predictor:
    """Put one trained network on the devices, and return its predictor."""
    variables = parallel.place((state.params, state.batch_stats))
    steps = parallel.eval_steps(
        make_predict_step(model), lambda _, images, __: {"image": to_inputs(images)}
    )
    return lambda images: steps(*variables, (), parallel.place_rows(images[None]))[
        "logits"
    ][0]


def evaluate_crops(
    predictors: Sequence[Predictor],
    blocks: CropBlocks,
    batch_size: int,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> tuple[list[Evaluation], Evaluation]:
    r"""Score networks and their ensemble on the crops of every test image.

    The probabilities of an image from one network and from the ensemble are

    $$
    p_k = \frac{1}{C} \sum_{c=1}^{C} \mathrm{softmax}(f_k(x_c)), \quad
    p = \frac{1}{K} \sum_{k=1}^{K} p_k
    $$

    in float64. The loss is the mean of $-\log p_t$. Each network gets `batch_size`
    crops at a time, a multiple of the number of devices. The last batch is padded, and
    the padding is not counted.

    Args:
        predictors: the networks, from `make_predictor`.
        blocks: the crops.
        batch_size: the number of crops in a batch.
        report: called with the examples done and their total.

    Returns:
        The scores of each network, and those of the ensemble.

    References:
        Szegedy et al. (2015, GoogLeNet), section 7; Ioffe & Szegedy (2015), section
        4.2.3.
    """
    source = blocks.split.source
    # The sums of the last example of a batch, whose crops may continue in the next.
    sums = np.zeros((len(predictors), 0, source.classes))
    labels, first = np.zeros(0, np.int32), 0
    scores = [[] for _ in range(len(predictors) + 1)]

    def add_scores(sums: np.ndarray, labels: np.ndarray) -> None:
        members = sums / blocks.crops
        for part, mean in zip(scores, [*members, members.mean(0)], strict=True):
            own = mean[np.arange(len(labels)), labels]
            # A probability that underflows in float64 is not zero.
            loss = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
            part.append({"loss": loss, **topk_correct(mean, labels)})

    for images, examples, batch_labels, counts in _crop_batches(blocks, batch_size):
        size = len(images)
        padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        padded[:size] = images
        # Start the work of all networks before waiting for the first.
        logits = [predict(padded) for predict in predictors]
        probabilities = np.stack([softmax(np.asarray(each)[:size]) for each in logits])
        places, starts = np.unique(examples - first, return_index=True)
        more = (0, max(0, places[-1] + 1 - len(labels)))
        sums, labels = np.pad(sums, ((0, 0), more, (0, 0))), np.pad(labels, more)
        weighted = probabilities * counts[:, None]
        sums[:, places] += np.add.reduceat(weighted, starts, axis=1)
        labels[places] = batch_labels[starts]
        add_scores(sums[:, :-1], labels[:-1])
        sums, labels, first = sums[:, -1:], labels[-1:], examples[-1]
        report(int(first) + 1, source.sizes["test"])
    add_scores(sums, labels)
    *members, ensemble = map(Evaluation.of, scores)
    return members, ensemble


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return float64 probabilities of logits of shape (batch, classes)."""
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _crop_batches(blocks: CropBlocks, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Pack the crops in order into batches of one size; the last batch is smaller.

    A batch holds the images and, for each image, the index and the label of its example
    and the number of equal crops that it represents.
    """
    waiting, seen = None, 0
    for block in blocks:
        numbers = seen + np.cumsum(block.kept) - 1
        seen += int(block.kept.sum())
        of = block.places
        new = (block.images, numbers[of], block.labels[of], block.counts)
        if waiting is not None:
            new = map(np.concatenate, zip(waiting, new, strict=True))
        waiting = tuple(new)
        while len(waiting[0]) >= size:
            yield tuple(each[:size] for each in waiting)
            waiting = tuple(each[size:] for each in waiting)
    if waiting is not None and len(waiting[0]):
        yield waiting


class PopulationEstimator:
    """Estimates population statistics (Algorithm 2) over a run's training batches.

    A run evaluates with the moving averages of training, which cost nothing. If its
    parameters are an average, there are no such statistics, and it estimates them. The
    batches are those of steps 0, 1, ..., augmented as in training. Each batch is whole,
    so that every host and every later evaluation finds the same statistics.

    The feed returns whole batches at any step; `constants` are the constants of the
    feed if they are already on the devices.
    """

    def __init__(
        self,
        config: Config,
        program: Program,
        feed: Feed,
        parallel: Spmd,
        constants: Any = None,
    ) -> None:
        self._config = config
        self._feed = feed
        self._parallel = parallel.for_evaluation()
        if constants is None:
            constants = self._parallel.place(feed.constants)
        self._constants = constants
        self._to_batch = jax.jit(feed.batch)
        # One function for all calls, so that it is compiled once.
        self._apply = lambda variables, batch: program.model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": batch["noise"]},
        )

    def estimate(
        self,
        state: TrainState,
        batches: int | None = None,
        *,
        method: Method = "paper",
        layers: Layers = None,
        report: Report = lambda done, total: None,  # noqa: ARG005
    ) -> TrainState:
        """Return one copy of a state with statistics over training batches.

        If `batches` is None, their number is `--batch-stats-from`. For `method` and
        `layers` see `bnjax.population.recompute_batch_stats`.
        """
        if not state.batch_stats:
            return state
        config, place = self._config, self._parallel.place
        if config.init_stats == "freeze":
            raise SettingError(
                "--batch-stats-from: the run was trained with --init-stats freeze, "
                "which fixes the statistics of its layers. Omit the flag."
            )
        count = config.batch_stats_from if batches is None else batches
        rng = place(state.rng)

        def make_batches() -> Iterator[Batch]:
            for step in range(count):
                item = jax.tree.map(lambda leaf: leaf[0], self._feed.chunk(step, 1))
                key = stream_key(rng, Stream.AUGMENT, step)
                batch = self._to_batch(self._constants, place(item), key)
                yield batch | {"noise": stream_key(rng, Stream.NOISE, step)}
                report((step + 1) * config.batch_size, count * config.batch_size)

        variables = place({"params": state.params, "batch_stats": state.batch_stats})
        try:
            batch_stats = recompute_batch_stats(
                self._apply, variables, make_batches(), method=method, layers=layers
            )
        except ValueError as error:
            raise RunError(str(error)) from error
        return dataclasses.replace(state, batch_stats=batch_stats)


def average_params(config: Config, state: TrainState) -> TrainState:
    """Return the state with the average of `--ema` as its parameters."""
    if config.ema is None or not isinstance(state.opt_state, AveragedState):
        return state
    return dataclasses.replace(state, params=average_of(state.opt_state, config.ema))


def average_needs_stats(config: Config) -> bool:
    """Return whether a run evaluates an average, which has no statistics yet."""
    return config.ema is not None and config.init_stats != "freeze"


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run opened from its folder, with its configuration and its data set."""

    workdir: Path
    config: Config
    source: Source

    def restore(self) -> tuple[Program, TrainState]:
        """Build the network and read its newest complete checkpoint."""
        program, state, _ = self.restore_with_metadata()
        return program, state

    def restore_with_metadata(self) -> tuple[Program, TrainState, CheckpointMetadata]:
        """Return the network, the state and the checkpoint's other values."""
        program = Program(self.config, self.source)
        with open_checkpoints(self.workdir, self.config, read_only=True) as checkpoints:
            # Compiling the first state of a large network takes longer than reading.
            shapes = jax.eval_shape(program.initial_state)
            return program, *checkpoints.restore(shapes)

    def with_statistics(
        self,
        kind: Literal["moving_averages", "population"] | None,
        program: Program,
        state: TrainState,
        parallel: Spmd,
        batches: int | None,
    ) -> TrainState:
        """Return the state to evaluate; with `--ema`, it has the averaged parameters.

        Its statistics are the moving averages of training, or are estimated over
        training batches. If `kind` is None, they are the statistics of the run's own
        evaluation.
        """
        state = average_params(self.config, state)
        estimated = kind == "population" or average_needs_stats(self.config)
        if kind == "moving_averages" or not estimated:
            return state
        report = ProgressReporter(self.source.name, verb="estimating statistics of")
        with contextlib.closing(make_run_feed(self.config, self.source)) as feed:
            estimator = PopulationEstimator(self.config, program, feed, parallel)
            return estimator.estimate(state, batches, report=report)


def load_run(
    workdir: Path,
    data_dir: Path | None = None,
    *,
    trust: bool = False,
    examples: bool = True,
) -> LoadedRun:
    """Open a run from its folder, without reading an example.

    Args:
        workdir: the folder that train.py wrote.
        data_dir: the folder of the data set, if it has moved since the run.
        trust: import the code of a network that is not in bnjax.
        examples: whether the data set must exist; otherwise its description is enough.

    Returns:
        The run.

    Raises:
        RunError: if the folder is not a run, or needs `trust`.
    """
    record = read_record(workdir)
    config = config_of(workdir, record)
    # A run is data. It names code, which is run only if the user says so.
    if is_import_path(config.model.name) and not trust:
        raise RunError(
            f"the network of {workdir} is code outside bnjax, {config.model.name}, "
            "which was not run. If you trust its author, add --trust; Python then "
            "imports the module from installed packages or PYTHONPATH."
        )
    if not (workdir / CHECKPOINTS).is_dir():
        raise RunError(
            f"{workdir} has no {CHECKPOINTS}: the run ended before its first "
            "checkpoint. Train again in a new --workdir."
        )
    if examples:
        source = open_data(config.data, data_dir or config.data_dir)
        if moved := changed_files(record, source.files):
            print(f"warning: {workdir}: {moved}.", file=sys.stderr)
    else:
        try:
            source = Source.from_description(config.data, record["data"])
        except (KeyError, TypeError) as error:
            raise RunError(
                f"{workdir / CONFIG} is damaged: its 'data' lacks {error}. Restore the "
                "file, or train again."
            ) from error
    return LoadedRun(workdir, config, source)


def evaluate_runs(
    workdirs: Sequence[Path],
    *,
    crops: int = 1,
    batch_stats_from: int | None = None,
    output: Path | None = None,
    data_dir: Path | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run, or of several runs as an ensemble.

    With `batch_stats_from`, the runs are evaluated twice: with the moving averages of
    training, and with population statistics over that many training batches. The
    result is written to `output`. If `output` is None, the result of a single run is
    written to eval.json in its folder.

    Returns:
        The scores, the crops and the step; for an ensemble, the members instead of the
        step. With `batch_stats_from`, also the scores for each kind of statistics, by
        name.
    """
    _check_arguments(workdirs, output, batch_stats_from)
    runs = [load_run(workdir, data_dir, trust=trust) for workdir in workdirs]
    _check_same_test_set(runs)
    blocks = crop_blocks(runs[0].source, crops)
    restored = [(run, *run.restore()) for run in runs]
    parallel = evaluation_parallel(runs[0].config).for_evaluation()
    estimating = (parallel, batch_stats_from)
    twice = batch_stats_from is not None
    steps = [int(state.step) for _, _, state in restored]
    suffix = f", {crops} crops" if crops > 1 else ""
    results, lines = {}, []
    for kind in ("moving_averages", "population") if twice else (None,):
        networks = [
            (run, program, run.with_statistics(kind, program, state, *estimating))
            for run, program, state in restored
        ]
        members, ensemble = _score(networks, blocks, parallel)
        for run, evaluation in zip(runs, members, strict=True):
            if not math.isfinite(evaluation.loss):
                raise RunError(
                    f"the network of {run.workdir} has a test loss of "
                    f"{evaluation.loss}: its outputs overflow. Train again with a "
                    "lower --learning-rate."
                )
        results[kind] = {**ensemble.to_json(), "crops": crops}
        lines += [f"{kind.replace('_', ' ')}:"] if kind else []
        if len(runs) == 1:
            results[kind]["step"] = steps[0]
            lines.append(f"step {steps[0]:,}{suffix}: {ensemble}")
            continue
        results[kind]["members"] = []
        for run, step, member in zip(runs, steps, members, strict=True):
            described = {"workdir": str(run.workdir), "step": step}
            results[kind]["members"].append(described | member.to_json())
            lines.append(f"{run.workdir}, step {step:,}{suffix}: {member}")
        lines.append(f"ensemble of {len(runs)}{suffix}: {ensemble}")
    for workdir, step in zip(workdirs, steps, strict=True):
        if not (workdir / SUMMARY).exists():
            continue
        summary = read_json(workdir / SUMMARY)
        written = summary.get("steps") if isinstance(summary, dict) else None
        if written != step:
            print(
                f"note: the newest complete checkpoint of {workdir} is of step {step}, "
                f"but {SUMMARY} is of step {written}.",
                file=sys.stderr,
            )
    averaged = any(run.config.ema is not None for run in runs)
    result = list(results.values())[-1 if averaged else 0]
    if twice:
        result = {**result, "batch_stats_from": batch_stats_from, **results}
    if len(runs) == 1 and output is None:
        output = runs[0].workdir / EVALUATION
    if output is not None:
        write_json(output, result)
    print("\n".join(lines))
    return result


def _score(
    networks: Sequence[tuple[LoadedRun, Program, TrainState]],
    blocks: CropBlocks,
    parallel: Spmd,
) -> tuple[list[Evaluation], Evaluation]:
    """Return the scores of each network and of their ensemble."""
    run, program, state = networks[0]
    source = run.source
    if len(networks) == 1 and blocks.crops == 1:
        test = load_test(run.config.data, source, ProgressReporter(source.name))
        size = run.config.eval_batch_size
        evaluation = Evaluator(program, test, size, parallel)(state)
        return [evaluation], evaluation
    predictors = []
    for run, program, state in networks:
        to_inputs = make_to_inputs(run.config.data, source.max_value)
        predictors.append(make_predictor(program.model, to_inputs, state, parallel))
    # The smallest batch size of the members, at most the number of crops.
    size = min(run.config.eval_batch_size for run, _, _ in networks)
    size = parallel.round_up(min(size, blocks.crops * source.sizes["test"]))
    report = ProgressReporter(source.name, seconds=10, verb="scoring")
    return evaluate_crops(predictors, blocks, size, report)


def _check_arguments(
    workdirs: Sequence[Path], output: Path | None, batch_stats_from: int | None
) -> None:
    """Check a command line before reading anything."""
    if batch_stats_from is not None and batch_stats_from < 1:
        raise SettingError(
            f"--batch-stats-from {batch_stats_from}: expected the number of training "
            "batches for the statistics, 1 or more."
        )
    places = [workdir.resolve() for workdir in workdirs]
    for workdir, place in zip(workdirs, places, strict=True):
        if places.count(place) > 1:
            raise SettingError(
                f"{workdir} is given twice, and would count twice in the ensemble. "
                "Give each run once."
            )
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        problem = "is a folder" if output.is_dir() else "is in a missing folder"
        raise SettingError(
            f"--output {output} {problem}: expected a file to write, in a folder that "
            "exists."
        )


def _check_same_test_set(runs: Sequence[LoadedRun]) -> None:
    """Refuse an ensemble whose members have different test images."""
    # The name of a decoded test set depends on its files, split and image size.
    tests = [run.source.cache_key("test") for run in runs]
    for other, test in zip(runs, tests, strict=True):
        if test != tests[0]:
            described = (
                f"{run.workdir} on {key} ({run.source.name}, "
                f"images of {'x'.join(map(str, run.source.image_shape))}, "
                f"{run.source.classes} classes)"
                for run, key in ((runs[0], tests[0]), (other, test))
            )
            raise RunError(
                "these runs cannot form an ensemble, because their test sets differ: "
                f"{' and '.join(described)}. Expected runs with the same data set, "
                "test split and image size. Evaluate them one by one."
            )
