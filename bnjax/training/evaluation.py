"""How good a trained network is: every example of the test set scored exactly once."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
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
from bnjax.population import Layers, Method, recompute_batch_stats
from bnjax.training.checkpoint import open_checkpoints
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
    read_config,
    read_json,
    read_record,
    write_json,
)

Statistics = Literal["moving_averages", "population"]
"""What a network is normalized by: the averages of training, or statistics estimated
after it."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores over a whole split.

    Attributes:
        loss: Mean cross-entropy, summed in float64.
        correct: How many examples are classified correctly.
        examples: How many there are.
        top5_correct: How many have their class among the five most probable, or None
            where there are no more than five classes.

    Example:
        >>> evaluation = Evaluation(loss=0.5, correct=3, examples=4, top5_correct=4)
        >>> evaluation.accuracy, evaluation.top5_accuracy
        (0.75, 1.0)
    """

    loss: float
    correct: int
    examples: int
    top5_correct: int | None = None

    @classmethod
    def of(cls, parts: Sequence[Mapping[str, np.ndarray]]) -> "Evaluation":
        """Sum up the scores of examples, as `make_eval_step` gives them."""
        scores = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        return cls(
            loss=float(scores["loss"].astype(np.float64).mean()),
            correct=int(scores["correct"].sum()),
            examples=len(scores["loss"]),
            top5_correct=int(scores["top5"].sum()) if "top5" in scores else None,
        )

    @property
    def accuracy(self) -> float:
        """Return the share classified correctly, between 0 and 1."""
        return self.correct / self.examples

    @property
    def top5_accuracy(self) -> float | None:
        """Return the share correct among the first five, between 0 and 1, or None."""
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
        """Return what summary.json and eval.json hold."""
        values = {
            "test_accuracy": self.accuracy,
            "test_loss": self.loss,
            "test_correct": self.correct,
            "test_examples": self.examples,
        }
        if self.top5_correct is not None:
            values["test_top5_accuracy"] = self.top5_accuracy
            values["test_top5_correct"] = self.top5_correct
        return values


class Evaluator:
    """Scores states on one split.

    Args:
        program: The model and its inputs.
        test: The split, whole or in blocks.
        batch_size: Examples at a time, rounded up to a multiple of the devices. The
            last batch is padded and masked.
        parallel: Lays the work out on devices; one device if None.
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
        devices = len(parallel.devices)
        size = -(-min(batch_size, examples) // devices) * devices
        rows, self._mask = padded_rows(examples, size)
        self._parallel = parallel
        self._rows = parallel.place_rows(rows)
        self._steps = parallel.eval_steps(
            make_eval_step(program.model),
            lambda arrays, rows, _: program.gather(arrays, rows),
        )

    def __call__(self, state: TrainState) -> Evaluation:
        """Score one state, as `Spmd.host_state` gives it."""
        params, batch_stats = self._parallel.place((state.params, state.batch_stats))
        parts = []
        for arrays, kept in self._blocks:
            # Arrays that are on the devices already stay as they are.
            placed = self._parallel.place(arrays)
            scores = self._steps(params, batch_stats, placed, self._rows)
            parts.append({n: np.asarray(scores[n])[self._mask][kept] for n in scores})
        return Evaluation.of(parts)


class Predictor:
    """One trained network on the devices.

    Args:
        model: Gives logits.
        to_inputs: Makes its inputs of stored pixels.
        state: Of the network.
        parallel: Lays the work out on devices.
    """

    def __init__(
        self, model: nn.Module, to_inputs: ToInputs, state: TrainState, parallel: Spmd
    ) -> None:
        self._parallel = parallel
        self._variables = parallel.place((state.params, state.batch_stats))
        self._steps = parallel.eval_steps(
            make_predict_step(model),
            lambda _, images, __: {"image": to_inputs(images)},
        )

    def __call__(self, images: np.ndarray) -> jax.Array:
        """Return the logits, shape (batch, classes), of a batch that the devices share.

        Args:
            images: As stored: uint8, shape (batch, ...).
        """
        chunk = self._parallel.place_rows(images[None])
        return self._steps(*self._variables, (), chunk)["logits"][0]


class _CropBatch(NamedTuple):
    """Crops: the number and label of their examples, how many each stands for."""

    images: np.ndarray
    examples: np.ndarray
    labels: np.ndarray
    counts: np.ndarray


def evaluate_crops(
    predictors: Sequence[Predictor],
    blocks: CropBlocks,
    batch_size: int,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> tuple[list[Evaluation], Evaluation]:
    r"""Score networks and their ensemble on the crops of every test image.

    The probabilities of an image, by one network and by the ensemble, are

    .. math:: p_k = \frac{1}{C} \sum_{c=1}^{C} \mathrm{softmax}(f_k(x_c)), \quad
              p = \frac{1}{K} \sum_{k=1}^{K} p_k

    in float64; the loss is the mean of :math:`-\log p_t`.

    Args:
        predictors: The networks.
        blocks: The crops of the test set.
        batch_size: Crops that each network is given at a time; a multiple of the
            devices. The last batch is padded, and the padding is not counted.
        report: Called with the number of examples scored and their total.

    Returns:
        The scores of each network, and those of the ensemble.

    References:
        Szegedy et al. 2015 (GoogLeNet), section 7; Ioffe and Szegedy 2015, section
        4.2.3.
    """
    # The sums of the last example of a batch: its crops may go on in the next batch.
    sums, labels, first = None, np.zeros(0, np.int32), 0
    scores = [[] for _ in range(len(predictors) + 1)]

    def add_scores(sums: np.ndarray, labels: np.ndarray) -> None:
        members = sums / blocks.crops
        for part, mean in zip(scores, [*members, members.mean(0)], strict=True):
            own = mean[np.arange(len(labels)), labels]
            # A probability too small for float64 is not one of zero.
            loss = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
            part.append({"loss": loss, **topk_correct(mean, labels)})

    for batch in _crop_batches(blocks, batch_size):
        size = len(batch.labels)
        padded = np.zeros((batch_size, *batch.images.shape[1:]), np.uint8)
        padded[:size] = batch.images
        # All networks are given their work before the first is waited for.
        logits = [predict(padded) for predict in predictors]
        probabilities = np.stack([softmax(np.asarray(each)[:size]) for each in logits])
        places, starts = np.unique(batch.examples - first, return_index=True)
        shape = (len(predictors), places[-1] + 1, probabilities.shape[-1])
        total = np.zeros(shape)
        if sums is not None:
            total[:, : len(labels)] = sums
        weighted = probabilities * batch.counts[:, None]
        total[:, places] += np.add.reduceat(weighted, starts, axis=1)
        labels = np.resize(labels, shape[1])
        labels[places] = batch.labels[starts]
        if shape[1] > 1:
            add_scores(total[:, :-1], labels[:-1])
        sums, labels, first = total[:, -1:], labels[-1:], batch.examples[-1]
        report(int(first) + 1, blocks.split.source.sizes["test"])
    if sums is not None:
        add_scores(sums, labels)
    *members, ensemble = map(Evaluation.of, scores)
    return members, ensemble


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities in float64.

    Args:
        logits: Shape (batch, classes), of any floating type.

    Example:
        >>> softmax(np.log([[1.0, 3.0]])).round(12).tolist()
        [[0.25, 0.75]]
    """
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _crop_batches(blocks: CropBlocks, size: int) -> Iterator[_CropBatch]:
    """Pack the crops, in their order, into batches of one size; the last is smaller."""
    waiting = None
    seen = 0
    for block in blocks:
        numbers = seen + np.cumsum(block.kept) - 1
        seen += int(block.kept.sum())
        places = block.places
        new = _CropBatch(
            block.images, numbers[places], block.labels[places], block.counts
        )
        if waiting is not None:
            new = _CropBatch(*map(np.concatenate, zip(waiting, new, strict=True)))
        whole = len(new.labels) - len(new.labels) % size
        for start in range(0, whole, size):
            yield _CropBatch(*(each[start : start + size] for each in new))
        waiting = _CropBatch(*(each[whole:] for each in new))
    if waiting is not None and len(waiting.labels):
        yield waiting


class PopulationEstimator:
    """Estimates population statistics (Algorithm 2) over a run's training batches.

    A run evaluates the moving averages of training, which cost nothing, except where
    its parameters are an average that no batch has gone through. The batches are those
    of steps 0, 1, ..., augmented as in training and each whole, so that every host, and
    whoever evaluates the run later, finds the same statistics.

    Args:
        config: Of the run.
        program: Of the run.
        feed: Of whole batches, at any step.
        parallel: Where the statistics are computed.
        constants: Those of the feed, where they are on the devices already.
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
        self._model = program.model
        self._feed = feed
        self._parallel = parallel.for_evaluation()
        if constants is None:
            constants = self._parallel.place(feed.constants)
        self._constants = constants
        self._to_batch = jax.jit(feed.batch)

    def averaged(self, state: TrainState) -> TrainState:
        """Return the state of the averaged parameters, with statistics of their own.

        Without `--ema` that is the state itself. Frozen statistics stay.
        """
        averaged = average_params(self._config, state)
        if self._config.ema is None or self._config.init_stats == "freeze":
            return averaged
        return self.estimate(averaged)

    def estimate(
        self,
        state: TrainState,
        batches: int | None = None,
        *,
        method: Method = "paper",
        layers: Layers = None,
        report: Report = lambda done, total: None,  # noqa: ARG005
    ) -> TrainState:
        """Return the state with statistics over some training batches.

        Args:
            state: One copy; its parameters stay.
            batches: How many; those of `--batch-stats-from` if None.
            method: See `bnjax.population.recompute_batch_stats`.
            layers: Likewise.
            report: Called with the number of examples done and their total.

        Raises:
            SettingError: The statistics are frozen.
            RunError: There are no such layers, or the statistics cannot be had.
        """
        if not state.batch_stats:
            return state
        if self._config.init_stats == "freeze":
            raise SettingError(
                "--batch-stats-from: the run was trained with --init-stats freeze, and "
                "its layers have no statistics but those they are given. Leave it out."
            )
        count = self._config.batch_stats_from if batches is None else batches
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        try:
            batch_stats = recompute_batch_stats(
                self._apply,
                self._parallel.place(variables),
                self._batches(self._parallel.place(state.rng), count, report),
                method=method,
                layers=layers,
            )
        except ValueError as error:
            raise RunError(str(error)) from error
        return dataclasses.replace(state, batch_stats=batch_stats)

    def close(self) -> None:
        """End what reads the data."""
        self._feed.close()

    def _apply(self, variables: Any, batch: Batch) -> Any:
        return self._model.apply(
            variables,
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": batch["noise"]},
        )

    def _batches(self, rng: jax.Array, count: int, report: Report) -> Iterator[Batch]:
        for step in range(count):
            item = jax.tree.map(lambda leaf: leaf[0], self._feed.chunk(step, 1))
            key = stream_key(rng, Stream.AUGMENT, step)
            batch = self._to_batch(self._constants, self._parallel.place(item), key)
            yield batch | {"noise": stream_key(rng, Stream.NOISE, step)}
            size = self._config.batch_size
            report((step + 1) * size, count * size)


def average_params(config: Config, state: TrainState) -> TrainState:
    """Return the state with `--ema`'s average in place of its parameters."""
    if config.ema is None or not isinstance(state.opt_state, AveragedState):
        return state
    return dataclasses.replace(state, params=average_of(state.opt_state, config.ema))


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run, opened from its folder.

    Attributes:
        workdir: Its folder.
        config: Its configuration.
        source: Its data set.
    """

    workdir: Path
    config: Config
    source: Source

    def restore(self) -> tuple[Program, TrainState]:
        """Build the network and read its newest whole checkpoint.

        Raises:
            RunError: There is none.
        """
        program = Program(self.config, self.source)
        with open_checkpoints(self.workdir, self.config, read_only=True) as checkpoints:
            state, _ = checkpoints.restore(program.initial_state())
        return program, state

    def with_statistics(
        self,
        kind: Statistics | None,
        program: Program,
        state: TrainState,
        parallel: Spmd,
        batches: int | None,
    ) -> TrainState:
        """Return the state to evaluate: with `--ema`, that of the averaged parameters.

        Args:
            kind: Of its statistics; those that the run itself evaluated with if None.
            program: Of `restore`.
            state: Likewise.
            parallel: Where to compute.
            batches: Of training, for population statistics.
        """
        if kind == "moving_averages":
            return average_params(self.config, state)
        if kind is None and self.config.ema is None:
            return state
        report = ProgressReporter(self.source.name, verb="taking statistics of")
        with contextlib.closing(make_run_feed(self.config, self.source)) as feed:
            estimator = PopulationEstimator(self.config, program, feed, parallel)
            if kind is None:
                return estimator.averaged(state)
            state = average_params(self.config, state)
            return estimator.estimate(state, batches, report=report)

    def test_set(self) -> str:
        """Return a name of the test set as decoded: its files, split and image size."""
        return self.source.cache_key("test")


def load_run(
    workdir: Path,
    data_dir: Path | None = None,
    *,
    trust: bool = False,
    examples: bool = True,
) -> LoadedRun:
    """Open a run from its folder alone, reading no example.

    A run is data: code that it names as its network is not imported unless it is
    trusted.

    Args:
        workdir: The folder that train.py wrote.
        data_dir: Where the data set is, if no longer where the run found it.
        trust: Import the code that the run names.
        examples: The data set has to be there. Otherwise the run's description of its
            images and classes is enough.

    Raises:
        RunError: The folder is no run, something in it is damaged, or it names code.
        DataError: The data set is not there.
    """
    config = read_config(workdir)
    if is_import_path(config.model.name) and not trust:
        raise RunError(
            f"the network of {workdir} is code of its own, {config.model.name}, which "
            "was not run. If you trust who made it, add --trust; the module is looked "
            "for among what is installed and in PYTHONPATH."
        )
    if not (workdir / CHECKPOINTS).is_dir():
        raise RunError(
            f"{workdir} has no {CHECKPOINTS}: the run ended before its first one. "
            "Train again in a new --workdir."
        )
    if examples:
        source = open_data(config.data, data_dir or config.data_dir)
    else:
        try:
            source = Source.from_description(config.data, read_record(workdir)["data"])
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
    """Evaluate the newest checkpoint of a run, or of several as an ensemble.

    Args:
        workdirs: One or more folders that train.py wrote.
        crops: Of each image: 1, 10 or 144; see `bnjax.data.blocks.crop_blocks`.
        batch_stats_from: Evaluate twice: with the moving averages of training, and with
            population statistics over so many training batches.
        output: Where the result is written. If None, eval.json in the only workdir, and
            nowhere for an ensemble.
        data_dir: Where the data set is, if no longer where the runs found it.
        trust: See `load_run`.

    Returns:
        The result: scores, crops and step, or in place of the step the members. With
        `batch_stats_from`, also that of each kind of statistics, by its name.

    Raises:
        RunError: A folder is no run, something in it is damaged, or the runs do not
            make an ensemble.
        SettingError: The crops cannot be had, or `output` cannot be written.
    """
    _check_arguments(workdirs, output, batch_stats_from)
    runs = [load_run(workdir, data_dir, trust=trust) for workdir in workdirs]
    _check_same_test_set(runs)
    blocks = crop_blocks(runs[0].source, crops)
    restored = [run.restore() for run in runs]
    programs = [program for program, _ in restored]
    steps = [int(state.step) for _, state in restored]
    parallel = evaluation_parallel(runs[0].config).for_evaluation()
    kinds: list[Statistics | None] = [None]
    if batch_stats_from is not None:
        kinds = ["moving_averages", "population"]
    results, lines = {}, []
    for kind in kinds:
        states = [
            run.with_statistics(kind, program, state, parallel, batch_stats_from)
            for run, (program, state) in zip(runs, restored, strict=True)
        ]
        members, ensemble = _score(runs, programs, states, crops, blocks, parallel)
        for run, evaluation in zip(runs, members, strict=True):
            if not math.isfinite(evaluation.loss):
                raise RunError(
                    f"the network of {run.workdir} has a test loss of "
                    f"{evaluation.loss}: its outputs overflow. Train again with a "
                    "lower --learning-rate."
                )
        results[kind], described = _describe(runs, steps, members, ensemble, crops)
        lines += [f"{kind.replace('_', ' ')}:"] if kind else []
        lines += described
    for run, step in zip(runs, steps, strict=True):
        _compare_with_summary(run.workdir, step)
    uses_average = any(run.config.ema is not None for run in runs)
    result = dict(results[kinds[-1 if uses_average else 0]])
    if batch_stats_from is not None:
        result |= {"batch_stats_from": batch_stats_from, **results}
    if len(runs) == 1 and output is None:
        output = runs[0].workdir / EVALUATION
    if output is not None:
        write_json(output, result)
    print("\n".join(lines))
    return result


def _score(
    runs: Sequence[LoadedRun],
    programs: Sequence[Program],
    states: Sequence[TrainState],
    crops: int,
    blocks: CropBlocks,
    parallel: Spmd,
) -> tuple[list[Evaluation], Evaluation]:
    """Return the scores of each run and of their ensemble."""
    config, source = runs[0].config, runs[0].source
    if len(runs) == 1 and crops == 1:
        test = load_test(config.data, source, ProgressReporter(source.name))
        evaluator = Evaluator(programs[0], test, config.eval_batch_size, parallel)
        evaluation = evaluator(states[0])
        return [evaluation], evaluation
    predictors = [
        Predictor(
            program.model,
            make_to_inputs(run.config.data, source.max_value),
            state,
            parallel,
        )
        for run, program, state in zip(runs, programs, states, strict=True)
    ]
    # The smallest batch size of the members, but no more than there are crops.
    size = min(run.config.eval_batch_size for run in runs)
    devices = len(parallel.devices)
    size = -(-min(size, crops * source.sizes["test"]) // devices) * devices
    report = ProgressReporter(source.name, seconds=10, verb="scoring")
    return evaluate_crops(predictors, blocks, size, report)


def _describe(
    runs: Sequence[LoadedRun],
    steps: Sequence[int],
    members: Sequence[Evaluation],
    ensemble: Evaluation,
    crops: int,
) -> tuple[dict[str, Any], list[str]]:
    """Return what eval.json holds, and what is printed."""
    result = {**ensemble.to_json(), "crops": crops}
    suffix = f", {crops} crops" if crops > 1 else ""
    if len(runs) == 1:
        line = f"step {steps[0]:,}{suffix}: {ensemble}"
        return result | {"step": steps[0]}, [line]
    together = list(zip(runs, steps, members, strict=True))
    result["members"] = [
        {"workdir": str(run.workdir), "step": step, **member.to_json()}
        for run, step, member in together
    ]
    lines = [f"{r.workdir}, step {s:,}{suffix}: {m}" for r, s, m in together]
    return result, [*lines, f"ensemble of {len(runs)}{suffix}: {ensemble}"]


def _check_arguments(
    workdirs: Sequence[Path], output: Path | None, batch_stats_from: int | None
) -> None:
    """Refuse a command line before anything is read."""
    if batch_stats_from is not None and batch_stats_from < 1:
        raise SettingError(
            f"--batch-stats-from {batch_stats_from}: expected the number of training "
            "batches to take statistics over, 1 or more."
        )
    seen = set()
    for workdir in workdirs:
        if workdir.resolve() in seen:
            raise SettingError(
                f"{workdir} is named twice, and would count twice in the ensemble. "
                "Name each run once."
            )
        seen.add(workdir.resolve())
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        problem = "is a folder" if output.is_dir() else "is in a folder not there"
        raise SettingError(
            f"--output {output} {problem}: expected a file to write, in a folder that "
            "exists."
        )


def _check_same_test_set(runs: Sequence[LoadedRun]) -> None:
    """Refuse an ensemble whose members are not given the same images."""
    first = runs[0]
    for other in runs[1:]:
        if first.test_set() != other.test_set():
            described = (
                f"{run.workdir} on {run.test_set()} ({run.source.name}, "
                f"images of {'x'.join(map(str, run.source.image_shape))}, "
                f"{run.source.classes} classes)"
                for run in (first, other)
            )
            raise RunError(
                f"these runs make no ensemble: {' and '.join(described)} are tested. "
                "Expected runs of one data set, test split and size of images. "
                "Evaluate them one by one."
            )


def _compare_with_summary(workdir: Path, step: int) -> None:
    """Say so where the newest checkpoint is not that of the summary."""
    if not (workdir / SUMMARY).exists():
        return
    summary = read_json(workdir / SUMMARY)
    steps = summary.get("steps") if isinstance(summary, dict) else None
    if steps != step:
        print(
            f"note: the newest whole checkpoint of {workdir} is of step {step}, and "
            f"{SUMMARY} of step {steps}.",
            file=sys.stderr,
        )
