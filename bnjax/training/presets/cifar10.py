"""Presets of the paper's section 4.2 at the size of CIFAR-10, and ResNets for it.

Each is its ImageNet preset with a network of an eighth of the width on images of 32x32,
8,000 steps, a learning rate in the same proportion to the baseline's, and a decay that
comes as often in the run as the paper's does in its own. Small images are shifted and
mirrored; their colours stay as they are, so that `data.augment.strength` has no effect.
The members of the ensemble vary bn-x5: 30 times the rate is too much at this size.
"""

from bnjax.training.config import Config, Preset, vary
from bnjax.training.presets import imagenet

LEARNING_RATE = 0.03
"""Of cifar10-inception, the best of a sweep, and cifar10-bn-baseline."""
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


_X5 = Preset(
    name="cifar10-bn-x5",
    summary="BN, 5 times the rate, and the changes of section 4.2.1.",
    expectation="Test accuracy about 56 %.",
    time=MINUTES,
    config=reduced(imagenet.BN_X5),
)

PRESETS = (
    Preset(
        name="cifar10-inception",
        summary="Inception of an eighth of the width without normalization.",
        expectation="Test accuracy about 49 %.",
        time=MINUTES,
        config=reduced(imagenet.INCEPTION),
    ),
    Preset(
        name="cifar10-bn-baseline",
        summary="The same with BN before each nonlinearity, nothing else.",
        expectation="Test accuracy about 55 %.",
        time=MINUTES,
        config=reduced(imagenet.BN_BASELINE),
    ),
    _X5,
    Preset(
        name="cifar10-bn-x30",
        summary="As cifar10-bn-x5, at 30 times the learning rate.",
        expectation=(
            "Test accuracy about 28 %: too high a rate for a network this narrow."
        ),
        time=MINUTES,
        config=reduced(imagenet.BN_X30),
    ),
    Preset(
        name="cifar10-bn-x5-sigmoid",
        summary="As cifar10-bn-x5, with sigmoids in place of ReLU.",
        expectation="Test accuracy about 63 %.",
        time=MINUTES,
        config=reduced(imagenet.BN_X5_SIGMOID),
    ),
    *imagenet.ensemble(
        "cifar10-ensemble",
        _X5,
        "Here 50 to 55 % of the test set.",
        time="About 8 minutes on one CPU core.",
    ),
    Preset(
        name="cifar10-resnet20",
        summary="ResNet of 20 layers, 64,000 steps of 128: not of the paper.",
        expectation="Published (He et al. 2016): 91.25 %.",
        config=resnet(20),
    ),
    Preset(
        name="cifar10-resnet56",
        summary="The same of 56 layers.",
        expectation="Published (He et al. 2016): 93.03 %.",
        config=resnet(56),
    ),
    Preset(
        name="cifar10-resnet110",
        summary="The same of 110 layers, with 400 steps of warm-up.",
        expectation=(
            "Published (He et al. 2016), at a tenth of the rate for those steps: "
            "93.57 % at best, 93.39 % on average."
        ),
        config=resnet(110, warmup_steps=400),
    ),
)
