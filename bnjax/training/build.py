"""A configuration made into functions: the same for training and for evaluation."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax import models
from bnjax.data.pipeline import make_to_inputs
from bnjax.data.resident import make_gather
from bnjax.data.sources import Source
from bnjax.training.config import Config
from bnjax.training.layouts import Spmd
from bnjax.training.loops import slow_in_loops
from bnjax.training.networks import check_network, make_network
from bnjax.training.optimizer import make_optimizer
from bnjax.training.sharing import Sharing
from bnjax.training.state import TrainState, create_state
from bnjax.training.step import Gather, TrainStep, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What a configuration says, ready to run.

    Args:
        model: gives logits; as it is initialized and evaluated.
        optimizer: of the parameters.
        gather: the batch of some rows of the resident arrays.
        images: the shape of a batch of one image.
        classes: how many labels there are.
        initial_state: gives the state before the first step.
        train_step: gives the step for a layout on devices.
        scans: says whether many steps are taken in one call to the device.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    gather: Gather
    images: jax.ShapeDtypeStruct
    classes: int
    initial_state: Callable[[], TrainState]
    train_step: Callable[[Spmd], TrainStep]
    scans: Callable[[], bool]


def build(config: Config, source: Source) -> Program:
    """Build the model, the optimizer and the input function of a run.

    Raises:
        UserError: the network is the user's own, and cannot be trained.
    """
    model = _make_model(config, source, Sharing())
    check_network(config, model, source.image_shape, source.classes)
    optimizer = make_optimizer(config)
    gather = make_gather(make_to_inputs(config.data, source.max_value))

    images = jnp.zeros((1, *source.image_shape), jnp.float32)
    init = functools.partial(model.init, train=False)

    @functools.cache
    def scans() -> bool:
        return not slow_in_loops(init, jax.random.key(0), images)

    def initial_state() -> TrainState:
        return create_state(model, optimizer, config.seed, images)

    def train_step(parallel: Spmd) -> TrainStep:
        sharing = parallel.sharing(config)
        normalization = make_normalization(config, sharing)
        return make_train_step(
            _make_model(config, source, sharing),
            optimizer,
            axis_name=parallel.axis_name,
            accumulate=config.accumulate,
            unroll=not scans(),
            updated_stats=normalization.updated_stats if sharing.deferred else None,
            skip_nonfinite=config.on_nan == "skip",
        )

    return Program(
        model,
        optimizer,
        gather,
        jax.ShapeDtypeStruct(images.shape, images.dtype),
        source.classes,
        initial_state,
        train_step,
        scans,
    )


def _make_model(config: Config, source: Source, sharing: Sharing) -> nn.Module:
    return make_network(
        config,
        classes=source.classes,
        normalization=make_normalization(config, sharing),
        # float32 is what inputs and parameters have.
        dtype=jnp.bfloat16 if config.dtype == "bfloat16" else None,
    )


def make_normalization(
    config: Config, sharing: Sharing | None = None
) -> models.Normalization:
    """Return what stands before each nonlinearity.

    Args:
        config: of the run.
        sharing: how its layers share statistics in training; not at all if None.
    """
    kind = "flax" if config.bn.implementation == "flax" else "batch"
    return models.Normalization(
        kind=kind if config.batch_norm else "none",
        momentum=config.bn.momentum,
        epsilon=config.bn.epsilon,
        unbiased=config.bn.unbiased,
        frozen=config.init_stats == "freeze",
        **dataclasses.asdict(sharing or Sharing()),
    )
