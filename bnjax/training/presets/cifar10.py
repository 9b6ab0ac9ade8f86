"""Presets for CIFAR-10: section 4.2 of the paper at a smaller size, and ResNets.

Each preset is an ImageNet preset with an eighth of the network's width, images of
32x32, 8,000 steps, and a learning rate in the same proportion to the baseline's. The
decay occurs as often in the run as in the paper's run. Small images are shifted and
mirrored; their colors do not change, so that `data.augment.strength` has no effect. The
members of the ensemble vary bn-x5, because 30 times the rate is too high at this size.
"""

from bnjax.training.config import Config, Preset, vary
from bnjax.training.presets import imagenet

LEARNING_RATE = 0.03
"""The rate of cifar10-inception, the best of a sweep, and of cifar10-bn-baseline."""
STEPS = 8_000
IMAGES = {
    "name": "cifar10",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "augment": {"kind": "shift"},
}
MINUTES = "About 7 minutes on one CPU core."


def reduced(config: Config) -> Config:
    """Return an ImageNet preset at the size of CIFAR-10."""
    decay = config.optim.schedule_options
    steps = round(STEPS / config.steps * decay["transition_steps"])
    rate = LEARNING_RATE * config.learning_rate / imagenet.INCEPTION.learning_rate
    return vary(
        config,
        steps=STEPS,
        learning_rate=round(rate, 6),
        eval_every=500,
        checkpoint_every=1000,
        eval_batch_size=1000,
        model={"width": 0.125, "stem": "small"},
        data={**IMAGES, "test_split": "test", "image_size": None},
        optim={"schedule_options": {**decay, "transition_steps": steps}},
    )


def resnet(depth: int, *, warmup_steps: int = 0) -> Config:
    """Return the settings of He et al. (2016) for a ResNet on CIFAR-10."""
    return vary(
        Config(steps=64_000, batch_size=128, learning_rate=0.1),
        eval_every=1000,
        model={"name": f"resnet{depth}"},
        data=IMAGES,
        optim=imagenet.stepwise(32_000, 48_000) | {"warmup_steps": warmup_steps},
        bn={"momentum": 0.9},
    )


INCEPTIONS = [
    Preset(f"cifar10-{name}", summary, expectation, reduced(config), MINUTES)
    for name, config, summary, expectation in (
        (
            "inception",
            imagenet.INCEPTION,
            "Inception, an eighth of the width, no normalization.",
            "Test accuracy about 49 %.",
        ),
        (
            "bn-baseline",
            imagenet.BN_BASELINE,
            "The same with BN before each nonlinearity, nothing else.",
            "Test accuracy about 55 %.",
        ),
        (
            "bn-x5",
            imagenet.BN_X5,
            "BN, 5 times the rate, and the changes of section 4.2.1.",
            "Test accuracy about 56 %.",
        ),
        (
            "bn-x30",
            imagenet.BN_X30,
            "As cifar10-bn-x5, at 30 times the learning rate.",
            "Test accuracy about 28 %: the rate is too high for such a narrow network.",
        ),
        (
            "bn-x5-sigmoid",
            imagenet.BN_X5_SIGMOID,
            "As cifar10-bn-x5, with sigmoids in place of ReLU.",
            "Test accuracy about 63 %.",
        ),
    )
]
PRESETS = (
    *INCEPTIONS,
    *imagenet.ensemble(
        "cifar10-ensemble",
        INCEPTIONS[2],
        "Here 50 to 55 % of the test set.",
        time="About 8 minutes on one CPU core.",
    ),
    Preset(
        "cifar10-resnet20",
        "ResNet, 20 layers, 64,000 steps of 128: not in the paper.",
        "Published (He et al. 2016): 91.25 %.",
        resnet(20),
    ),
    Preset(
        "cifar10-resnet56",
        "The same with 56 layers.",
        "Published (He et al. 2016): 93.03 %.",
        resnet(56),
    ),
    Preset(
        "cifar10-resnet110",
        "The same with 110 layers and 400 steps of warm-up.",
        "Published (He et al. 2016), with a tenth of the rate in these steps: "
        "93.57 % at best, 93.39 % on average.",
        resnet(110, warmup_steps=400),
    ),
)
