"""Presets of the paper's section 4.2 at the size of CIFAR-10, and ResNets for it.

Each is its ImageNet preset with a network of an eighth of the width on images of 32x32,
8,000 steps, a learning rate in the same proportion to the baseline's, and a decay that
comes as often in the run as the paper's does in its own. Small images are shifted and
mirrored; their colours stay as they are, so that `data.augment.strength` has no effect.
"""

import dataclasses

from bnjax.data.config import AugmentConfig
from bnjax.training.config import (
    BatchNormConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
)
from bnjax.training.presets import imagenet

LEARNING_RATE = 0.03
"""Of cifar10-inception, the best of a sweep, and cifar10-bn-baseline."""
STEPS = 8_000
IMAGES = DataConfig(
    name="cifar10_jpeg",
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
)


def reduced(config: Config) -> Config:
    """Return an ImageNet preset at the size of CIFAR-10."""
    rate = config.learning_rate / imagenet.inception().learning_rate
    share = STEPS / config.steps
    return dataclasses.replace(
        config,
        steps=STEPS,
        learning_rate=round(LEARNING_RATE * rate, 6),
        eval_every=500,
        checkpoint_every=1000,
        eval_batch_size=1000,
        model=dataclasses.replace(config.model, width=0.125, stem="small"),
        data=dataclasses.replace(
            IMAGES,
            shuffle=config.data.shuffle,
            augment=dataclasses.replace(config.data.augment, kind="shift"),
        ),
        optim=dataclasses.replace(
            config.optim, decay_steps=round(share * config.optim.decay_steps)
        ),
    )


def inception() -> Config:
    """cifar10-inception: `python train.py cifar10-inception`.

    Inception of an eighth of the width without normalization.
    Test accuracy about 49 %; about 7 minutes on one CPU core.
    """
    return reduced(imagenet.inception())


def bn_baseline() -> Config:
    """cifar10-bn-baseline: `python train.py cifar10-bn-baseline`.

    The same with BN before each nonlinearity, nothing else.
    Test accuracy about 55 %; about 7 minutes on one CPU core.
    """
    return reduced(imagenet.bn_baseline())


def bn_x5() -> Config:
    """cifar10-bn-x5: `python train.py cifar10-bn-x5`.

    BN, 5 times the rate, and the changes of section 4.2.1.
    Test accuracy about 56 %; about 7 minutes on one CPU core.
    """
    return reduced(imagenet.bn_x5())


def bn_x30() -> Config:
    """cifar10-bn-x30: `python train.py cifar10-bn-x30`.

    As cifar10-bn-x5, at 30 times the learning rate.
    Test accuracy about 28 %: too high a rate for a network this narrow.
    """
    return reduced(imagenet.bn_x30())


def bn_x5_sigmoid() -> Config:
    """cifar10-bn-x5-sigmoid: `python train.py cifar10-bn-x5-sigmoid`.

    As cifar10-bn-x5, with sigmoids in place of ReLU.
    Test accuracy about 63 %; about 7 minutes on one CPU core.
    """
    return reduced(imagenet.bn_x5_sigmoid())


def _resnet(depth: int) -> Config:
    return Config(
        steps=64_000,
        batch_size=128,
        learning_rate=0.1,
        eval_every=1000,
        model=ModelConfig(name=f"resnet{depth}"),
        data=dataclasses.replace(IMAGES, augment=AugmentConfig(kind="shift")),
        optim=OptimizerConfig(
            name="momentum",
            momentum=0.9,
            weight_decay=1e-4,
            schedule="step",
            decay_rate=0.1,
            boundaries=(32_000, 48_000),
        ),
        bn=BatchNormConfig(momentum=0.9, epsilon=1e-5),
    )


def resnet20() -> Config:
    """cifar10-resnet20: `python train.py cifar10-resnet20`.

    ResNet of 20 layers, 64,000 steps of 128: not of the paper.
    Published (He et al. 2016): 91.25 %.
    """
    return _resnet(20)


def resnet56() -> Config:
    """cifar10-resnet56: `python train.py cifar10-resnet56`.

    The same of 56 layers.
    Published (He et al. 2016): 93.03 %.
    """
    return _resnet(56)


def resnet110() -> Config:
    """cifar10-resnet110: `python train.py cifar10-resnet110`.

    The same of 110 layers, with 400 steps of warm-up.
    Published (He et al. 2016), at a tenth of the rate for those steps: 93.57 % at best,
    93.39 % on average.
    """
    base = _resnet(110)
    return dataclasses.replace(
        base, optim=dataclasses.replace(base.optim, warmup_steps=400)
    )
