"""A configuration made into functions: the same for training and for evaluation."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from bnjax import models
from bnjax.data.pipeline import Feed, make_feed, make_gather, make_to_inputs
from bnjax.data.sources import Report, Source
from bnjax.training.config import Config
from bnjax.training.network import check_network, make_network
from bnjax.training.optimizer import make_optimizer
from bnjax.training.sharding import Sharing, Spmd
from bnjax.training.step import (
    Gather,
    Stream,
    TrainState,
    TrainStep,
    create_state,
    make_train_step,
)


def slow_in_loops(function: Callable[..., Any], *args: Any) -> bool:
    """Return whether steps of a function are better dispatched one at a time.

    On a CPU, XLA takes the gradient of a convolution many times slower inside a loop
    than outside (jax issue 12868), and a scan over training steps is a loop.

    Args:
        function: traced, not run.
        *args: arrays or their shapes.

    Example:
        >>> from flax import linen as nn
        >>> image = jax.ShapeDtypeStruct((1, 8, 8, 3), "float32")
        >>> slow_in_loops(nn.Dense(4).init, jax.random.key(0), image)
        False
        >>> on_cpu = jax.default_backend() == "cpu"
        >>> slow_in_loops(nn.Conv(4, (3, 3)).init, jax.random.key(0), image) == on_cpu
        True
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))


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
        RunError: the network is the user's own, and cannot be trained.
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


def make_run_feed(
    config: Config,
    source: Source,
    *,
    shards: int = 1,
    shard: int = 0,
    report: Report = lambda done, total: None,  # noqa: ARG005
) -> Feed:
    """Return what feeds the steps of a run; see `bnjax.data.pipeline.make_feed`."""
    return make_feed(
        config.data,
        source,
        batch_size=config.batch_size,
        key=jax.random.fold_in(jax.random.key(config.seed), Stream.ORDER),
        shards=shards,
        shard=shard,
        report=report,
    )
