"""The functions of a configuration, for training and for evaluation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from bnjax import models
from bnjax.data.pipeline import Feed, make_feed, make_gather, make_to_inputs
from bnjax.data.sources import Source
from bnjax.training.config import Config
from bnjax.training.network import check_network, make_network
from bnjax.training.optimizer import make_optimizer
from bnjax.training.sharding import Spmd
from bnjax.training.step import (
    Stream,
    TrainState,
    TrainStep,
    check_memory,
    create_state,
    make_train_step,
)


class Program:
    """The functions of a configuration.

    Only the image shape and the classes of the source matter here. `model` is the
    module for initialization and evaluation, `images` has the shape and dtype of a
    batch of one, and `gather` returns the batch of some rows of the resident arrays.
    """

    def __init__(self, config: Config, source: Source) -> None:
        self._config = config
        self.classes = source.classes
        self.images = jax.ShapeDtypeStruct((1, *source.image_shape), jnp.float32)
        self.model = self._make_model(make_normalization(config))
        check_network(config, self.model, source.image_shape, source.classes)
        self.optimizer = make_optimizer(config)
        self.gather = make_gather(make_to_inputs(config.data, source.max_value))

    def initial_state(self) -> TrainState:
        """Return the state before the first step."""
        batch = (self._config.batch_size, *self.images.shape[1:])
        check_memory("a batch of images", jax.ShapeDtypeStruct(batch, jnp.float32))
        images = jnp.zeros(self.images.shape, self.images.dtype)
        return create_state(self.model, self.optimizer, self._config.seed, images)

    def train_step(self, parallel: Spmd) -> TrainStep:
        """Return the step for a layout on devices."""
        config = self._config
        normalization = make_normalization(config, **parallel.sharing(config))
        return make_train_step(
            self._make_model(normalization),
            self.optimizer,
            axis_name=parallel.axis_name,
            accumulate=config.accumulate,
            unroll=not self.scans,
            updated_stats=(
                normalization.updated_stats if normalization.deferred else None
            ),
            skip_nonfinite=config.on_nan == "skip",
        )

    @functools.cached_property
    def scans(self) -> bool:
        """Return whether one call to the device takes many steps."""
        init = functools.partial(self.model.init, train=False)
        return not slow_in_loops(init, jax.random.key(0), self.images)

    def _make_model(self, normalization: models.Normalization) -> nn.Module:
        return make_network(
            self._config,
            classes=self.classes,
            normalization=normalization,
            # None: inputs and parameters are float32.
            dtype=jnp.bfloat16 if self._config.dtype == "bfloat16" else None,
        )


def make_normalization(config: Config, **sharing: Any) -> models.Normalization:
    """Return the normalization of a model; `sharing` is a result of `Spmd.sharing`."""
    kind = "flax" if config.bn.implementation == "flax" else "batch"
    return models.Normalization(
        kind=kind if config.batch_norm else "none",
        momentum=config.bn.momentum,
        epsilon=config.bn.epsilon,
        unbiased=config.bn.unbiased,
        frozen=config.init_stats == "freeze",
        **sharing,
    )


def make_run_feed(config: Config, source: Source, **options: Any) -> Feed:
    """Return the feed of a run; see `bnjax.data.pipeline.make_feed`."""
    key = jax.random.fold_in(jax.random.key(config.seed), Stream.ORDER)
    return make_feed(
        config.data, source, batch_size=config.batch_size, key=key, **options
    )


def slow_in_loops(function: Callable[..., Any], *args: Any) -> bool:
    """Return whether the steps of a function should be dispatched one at a time.

    On a CPU, XLA computes the gradient of a convolution many times slower inside a loop
    than outside (https://github.com/jax-ml/jax/issues/12868), and a scan over training
    steps is a loop. The function is traced.
    """
    if jax.default_backend() != "cpu":
        return False
    return "conv_general_dilated" in str(jax.make_jaxpr(function)(*args))
