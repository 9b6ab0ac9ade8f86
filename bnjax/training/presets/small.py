"""Presets for the embedded digits, MNIST and Fashion-MNIST."""

import dataclasses

from bnjax.training.config import (
    BatchNormConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
)


def digits() -> Config:
    """digits: `python train.py`.

    The paper's network on scikit-learn's 1,797 digits of 8x8.
    No network connection is needed. Test accuracy about 98 %; about 10 seconds on two
    CPU cores.
    """
    return Config(
        steps=2000,
        batch_size=60,
        learning_rate=0.1,
        eval_every=100,
        checkpoint_every=1000,
        optim=OptimizerConfig(schedule="cosine"),
        # So that short runs have statistics of their own network by their end.
        bn=BatchNormConfig(momentum=0.9),
    )


def mnist() -> Config:
    """mnist: `python train.py mnist`.

    Section 4.1 of the paper: binary MNIST, 50,000 steps of 60.
    Plain SGD. Test accuracy about 97.6 % (about 96.3 % with --no-batch-norm); about
    half a minute on two CPU cores, and up to as much again to decode the images the
    first time.
    """
    return Config(
        steps=50_000,
        batch_size=60,
        learning_rate=0.5,
        log_every=250,
        model=ModelConfig(name="mlp", hidden=(100, 100, 100), weight_std=0.01),
        data=DataConfig(name="mnist", binarize=True),
    )


def lenet() -> Config:
    """lenet: `python train.py lenet`.

    LeNet of sigmoids on Fashion-MNIST, 10 epochs at a rate of 1.
    The example of Dive into Deep Learning, whose framework's layer gives a test
    accuracy of 86.9 % and their own of 80.1 %; here only lenet-mnist was run.
    """
    return Config(
        steps=2340,  # 10 epochs of 234 whole batches.
        batch_size=256,
        learning_rate=1.0,
        log_every=117,
        eval_every=234,
        checkpoint_every=1170,
        model=ModelConfig(name="lenet", pool="avg", activation="sigmoid"),
        data=DataConfig(name="fashion_mnist"),
        optim=OptimizerConfig(name="sgd", schedule="constant"),
        bn=BatchNormConfig(momentum=0.9, epsilon=1e-5),
    )


def lenet_mnist() -> Config:
    """lenet-mnist: `python train.py lenet-mnist`.

    The same network and settings on MNIST.
    Test accuracy about 98.6 %, 96.9 % without normalization; 2 minutes on a CPU core.
    """
    return dataclasses.replace(lenet(), data=DataConfig(name="mnist"))
