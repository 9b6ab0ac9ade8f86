"""A configuration made into functions: the same for training and for evaluation."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax import models
from bnjax.data.resident import make_gather
from bnjax.data.sources import Source
from bnjax.training.config import Config
from bnjax.training.optimizer import make_optimizer
from bnjax.training.parallel import Gather
from bnjax.training.state import TrainState, create_state


@dataclasses.dataclass(frozen=True)
class Program:
    """What a configuration says, ready to run.

    Args:
        model: gives logits.
        optimizer: of the parameters.
        gather: the batch of some rows of the resident arrays.
        initial_state: gives the state before the first step.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    gather: Gather
    initial_state: Callable[[], TrainState]


def build(config: Config, source: Source) -> Program:
    """Build the model, the optimizer and the input function of a run."""
    model = models.create(
        config.model.name,
        hidden=config.model.hidden,
        classes=source.classes,
        weight_std=config.model.weight_std,
        normalization=make_normalization(config),
    )
    optimizer = make_optimizer(config)
    gather = make_gather(source.max_value, binarize=config.data.binarize)

    def initial_state() -> TrainState:
        images = jnp.zeros((1, *source.image_shape), jnp.float32)
        return create_state(model, optimizer, config.seed, images)

    return Program(model, optimizer, gather, initial_state)


def make_normalization(config: Config) -> models.Normalization:
    """Return what stands before each nonlinearity."""
    kind = "flax" if config.bn.implementation == "flax" else "batch"
    return models.Normalization(
        kind=kind if config.batch_norm else "none",
        momentum=config.bn.momentum,
        epsilon=config.bn.epsilon,
        unbiased=config.bn.unbiased,
    )
