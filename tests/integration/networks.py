"""Networks, data and runs for the tests of layouts on devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bnjax.models import MLP, Normalization
from bnjax.training.config import BatchNormConfig, Config
from bnjax.training.sharding import make_parallel
from bnjax.training.step import create_state, make_train_step

EXAMPLES = 96
BATCH = 32


class ConvNet(nn.Module):
    """Two convolutions, normalized and rectified, and a dense layer."""

    normalization: Normalization = Normalization()
    param_dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, *, train):
        z = images[..., None]
        for i, features in enumerate((3, 4)):
            z = nn.Conv(
                features,
                (3, 3),
                (i + 1, i + 1),
                use_bias=False,
                param_dtype=self.param_dtype,
                name=f"conv_{i}",
            )(z)
            z = self.normalization(
                z,
                train=train,
                activation="relu",
                name=f"bn_{i}",
                param_dtype=self.param_dtype,
            )
        z = z.mean((1, 2))
        return nn.Dense(3, param_dtype=self.param_dtype, name="logits")(z)


def network(name, dtype, normalization):
    if name == "conv":
        return ConvNet(normalization, dtype)
    return MLP(
        (7, 6), 3, weight_std=0.5, normalization=normalization, param_dtype=dtype
    )


def configuration(batch_size=BATCH, **changes):
    bn = BatchNormConfig(
        **{
            key: changes.pop(key)
            for key in ("sync", "virtual_batch_size") & changes.keys()
        }
    )
    return Config(steps=1, batch_size=batch_size, learning_rate=0.3, bn=bn, **changes)


def run(name, config, devices, steps, dtype=jnp.float64, at_once=None):
    """Train for some steps, all or `at_once` a call; return one device's state."""
    parallel = make_parallel(config, jax.devices()[:devices])
    normalization = Normalization(momentum=0.9, **parallel.sharing(config))
    optimizer = optax.sgd(config.learning_rate, momentum=0.9)
    rng = np.random.default_rng(5)
    images = rng.normal(0.5, 2, (EXAMPLES, 4, 4)).astype(dtype)
    labels = rng.integers(0, 3, EXAMPLES)
    order = [rng.permutation(EXAMPLES)[: config.batch_size] for _ in range(steps)]

    state = create_state(network(name, dtype, Normalization()), optimizer, 0, images)
    train_step = make_train_step(
        network(name, dtype, normalization),
        optimizer,
        axis_name=parallel.axis_name,
        accumulate=config.accumulate,
        updated_stats=normalization.updated_stats if normalization.deferred else None,
    )

    def batch(constants, rows, key):
        images, labels = constants
        return {"image": images[rows], "label": labels[rows]}

    # Each host gives the part of its own devices.
    chunk = np.split(np.stack(order), jax.process_count(), 1)[jax.process_index()]
    train_steps = parallel.train_steps(train_step, batch)
    constants = parallel.place((images, labels))
    placed, parts = parallel.place_state(state), []
    for start in range(0, steps, at_once or steps):
        part = parallel.place_chunk(chunk[start : start + (at_once or steps)])
        placed, metrics = train_steps(placed, constants, part)
        parts.append(metrics)
    metrics = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return parallel.host_state(placed), metrics


def assert_close(found, expected, atol):
    """Parameters differ by `atol` at most, statistics by that times their size."""
    for tree, rtol in (("params", 0), ("batch_stats", atol)):
        pairs = zip(
            jax.tree.leaves(getattr(found, tree)),
            jax.tree.leaves(getattr(expected, tree)),
            strict=True,
        )
        for a, b in pairs:
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
