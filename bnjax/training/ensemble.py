"""Class probabilities averaged over the crops of an image and over networks."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn

from bnjax.data.crops import CropBlocks
from bnjax.data.resident import Report, ToInputs
from bnjax.training.evaluation import Evaluation, evaluation_of
from bnjax.training.layouts import Spmd
from bnjax.training.state import TrainState
from bnjax.training.step import hits, make_predict_step


class Predictor:
    """One trained network on the devices.

    Args:
        model: gives logits.
        to_inputs: makes stored pixels its inputs.
        state: of the network.
        parallel: lays the work out on devices.
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
            images: uint8, shape (batch, ...), as they are stored.
        """
        chunk = self._parallel.place_rows(images[None])
        return self._steps(*self._variables, (), chunk)["logits"][0]


class _Batch(NamedTuple):
    """Crops, each with the number of its example, its label, and how many it is."""

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
        predictors: the networks.
        blocks: the crops of the test set.
        batch_size: crops that each network is given at a time; a multiple of the
            devices. The last batch is filled up, and what fills it not counted.
        report: called with examples scored and their total.

    Returns:
        The scores of each network, and those of the ensemble.

    References:
        Szegedy et al. 2015 (GoogLeNet), section 7; Ioffe and Szegedy 2015, section
        4.2.3.
    """
    # What the last example of a batch has so far: its crops may go on in the next.
    sums, labels, first = None, np.zeros(0, np.int32), 0
    scores = [[] for _ in range(len(predictors) + 1)]

    def score(sums: np.ndarray, labels: np.ndarray) -> None:
        members = sums / blocks.crops
        for part, found in zip(scores, [*members, members.mean(0)], strict=True):
            part.append(_scores(found, labels))

    for batch in _batches(blocks, batch_size):
        size = len(batch.labels)
        filled = np.zeros((batch_size, *batch.images.shape[1:]), np.uint8)
        filled[:size] = batch.images
        # All networks are given their work before the first is waited for.
        logits = [predict(filled) for predict in predictors]
        found = np.stack([softmax(np.asarray(each)[:size]) for each in logits])
        places, starts = np.unique(batch.examples - first, return_index=True)
        shape = (len(predictors), places[-1] + 1, found.shape[-1])
        total = np.zeros(shape)
        if sums is not None:
            total[:, : len(labels)] = sums
        weighted = found * batch.counts[:, None]
        total[:, places] += np.add.reduceat(weighted, starts, axis=1)
        labels = np.resize(labels, shape[1])
        labels[places] = batch.labels[starts]
        if shape[1] > 1:
            score(total[:, :-1], labels[:-1])
        sums, labels, first = total[:, -1:], labels[-1:], batch.examples[-1]
        report(int(first) + 1, blocks.split.source.sizes["test"])
    if sums is not None:
        score(sums, labels)
    *members, ensemble = map(evaluation_of, scores)
    return members, ensemble


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities in float64.

    Args:
        logits: shape (batch, classes), of any floating type.

    Example:
        >>> softmax(np.log([[1.0, 3.0]])).round(12).tolist()
        [[0.25, 0.75]]
    """
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    own = probabilities[np.arange(len(labels)), labels]
    # A probability too small for float64 is not one of zero.
    loss = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
    return {"loss": loss, **hits(probabilities, labels)}


def _batches(blocks: CropBlocks, size: int) -> Iterator[_Batch]:
    """Pack the crops, in their order, into batches of one size; the last is smaller."""
    waiting = None
    seen = 0
    for block in blocks:
        numbers = seen + np.cumsum(block.kept) - 1
        seen += int(block.kept.sum())
        places = block.places
        new = _Batch(block.images, numbers[places], block.labels[places], block.counts)
        if waiting is not None:
            new = _Batch(*map(np.concatenate, zip(waiting, new, strict=True)))
        whole = len(new.labels) - len(new.labels) % size
        for start in range(0, whole, size):
            yield _Batch(*(each[start : start + size] for each in new))
        waiting = _Batch(*(each[whole:] for each in new))
    if waiting is not None and len(waiting.labels):
        yield waiting
