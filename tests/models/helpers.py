"""Variables without an initialization, which XLA takes long over; quick compilation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# The tests compile large programs and run them once.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def shapes_of(module, *args, **options):
    """The variables a module makes, as shapes."""
    return jax.eval_shape(
        lambda: module.init(jax.random.key(0), *args, train=False, **options)
    )


def count(module, *args):
    params = shapes_of(module, *args)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def random_variables(module, *args, dtype=None):
    """Variables whose every leaf is some random value, of its dtype or of `dtype`."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        low = 0.5 if path[-1].key in ("var", "scale") else -1.0
        return jnp.asarray(rng.uniform(low, 1.0, leaf.shape), dtype or leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, dict(shapes_of(module, *args)))


def train(module, variables, *args):
    """What a module returns in training."""

    @jit
    def run(variables, *args):
        return module.apply(variables, *args, train=True, mutable=["batch_stats"])[0]

    return run(variables, *args)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)
