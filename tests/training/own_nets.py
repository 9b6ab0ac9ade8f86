"""Networks of a user's own, right and wrong, as train.py is given them."""

import jax.numpy as jnp
from flax import linen as nn

from bnjax import models

A_NUMBER = 3


class Net(nn.Module):
    """Takes classes alone; Flax's layer."""

    classes: int
    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, images, train):
        average = self.use_running_average
        z = images.reshape(len(images), -1)
        z = nn.Dense(16, use_bias=False)(z)
        z = nn.BatchNorm(not train if average is None else average, momentum=0.9)(z)
        z = nn.Dropout(0.1, deterministic=not train)(nn.relu(z))
        return nn.Dense(self.classes)(z)


class GroupNormNet(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        z = images.reshape(len(images), -1)
        z = nn.relu(nn.GroupNorm(4)(nn.Dense(16)(z)))
        return nn.Dense(self.classes)(z)


class HalfFrozen(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, images, train):
        z = images.reshape(len(images), -1)
        z = nn.BatchNorm(use_running_average=True, name="frozen")(z)
        z = nn.BatchNorm(use_running_average=not train, name="moving")(z)
        return nn.Dense(self.classes)(z)


class Collects(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(10)(images.reshape(len(images), -1))


class NoParameters(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return images.reshape(len(images), -1)[:, :10]


class NoTrain(nn.Module):
    def __call__(self, images):
        return images


class Fails(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        return images @ jnp.zeros((7, 8))


def make_mlp(classes, normalization, dtype, hidden=(100,)):
    return models.MLP(
        hidden=hidden, classes=classes, normalization=normalization, dtype=dtype
    )


def make_anything(**options):
    return models.MLP(**options)


def frozen(classes):
    return Net(classes, use_running_average=True)


def never_average(classes):
    return Net(classes, use_running_average=False)


def three_classes():
    return Net(3)


def a_string():
    return "a network"


def raises():
    raise RuntimeError("no weights here\nand more")


def needs_more(classes, depth):
    return Net(classes)


NET = Net(10)
