"""Presets of the paper's section 4.2, on ImageNet, and ResNet-50.

`inception` is the network without normalization. The changes of section 4.2.1 are seven
fields: `learning_rate`, `model.dropout`, `optim.weight_decay`, the `transition_steps`
of `optim.schedule_options`, `model.local_response_norm`, `data.shuffle` and
`data.augment.strength`.

The paper does not state several values. The momentum of SGD and the decay are
GoogLeNet's. The L2 weights are those of public ports. The means and deviations of
pixels are the usual ones. The paper also does not state how much less colors are
distorted, BN's epsilon and momentum, which member of the ensemble has which variation,
or how much larger its initial weights are.
"""

from typing import Any

from bnjax.training.config import Config, Preset, vary

IMAGES = {
    "name": "imagenet2012",
    "test_split": "validation",
    "image_size": 224,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}
DECAY = {"decay_rate": 0.96, "transition_steps": 320_000, "staircase": True}


def stepwise(*drops: int) -> dict[str, Any]:
    """Return the optimizer of He et al. (2016), with a rate that drops at `drops`."""
    return {
        "options": {"momentum": 0.9},
        "weight_decay": 1e-4,
        "schedule": "piecewise_constant_schedule",
        "schedule_options": {"boundaries_and_scales": dict.fromkeys(drops, 0.1)},
    }


INCEPTION = vary(
    Config(steps=31_000_000, batch_size=32, learning_rate=0.0015),
    batch_norm=False,
    eval_every=40_000,
    checkpoint_every=10_000,
    eval_batch_size=100,
    model={
        "name": "inception",
        "activation": "relu",
        "dropout": 0.4,
        "local_response_norm": True,
    },
    data={**IMAGES, "shuffle": "fixed-batches", "augment": {"kind": "crop"}},
    optim={
        "options": {"momentum": 0.9},
        "weight_decay": 2e-4,
        "schedule": "exponential_decay",
        "schedule_options": DECAY,
    },
)
BN_BASELINE = vary(INCEPTION, batch_norm=True)
BN_X5 = vary(
    BN_BASELINE,
    steps=6_000_000,
    learning_rate=0.0075,
    model={"dropout": 0.0, "local_response_norm": False},
    data={"shuffle": "within-shard", "augment": {"strength": 0.3}},
    optim={
        "weight_decay": 4e-5,
        "schedule_options": {**DECAY, "transition_steps": 53_333},
    },
)
BN_X30 = vary(BN_X5, learning_rate=0.045)
BN_X5_SIGMOID = vary(BN_X5, model={"activation": "sigmoid"})
RESNET50 = vary(
    Config(steps=450_000, batch_size=256, learning_rate=0.1),
    eval_every=5000,
    checkpoint_every=5000,
    eval_batch_size=256,
    model={"name": "resnet50", "zero_scale": True},
    data={**IMAGES, "augment": {"kind": "crop", "strength": 0.0}},
    optim=stepwise(150_000, 300_000),
    bn={"momentum": 0.9},
)

MEMBERS: tuple[dict[str, Any], ...] = (
    {"dropout": 0.05},
    {"dropout": 0.1},
    {"dropout": 0.05, "weight_scale": 1.5},
    {"dropout": 0.1, "weight_scale": 1.5},
    {"dropout": 0.05, "per_activation": True},
    {"dropout": 0.1, "weight_scale": 1.5, "per_activation": True},
)
"""The changes of the ensemble's members to their model, for seeds 1 to 6."""


def ensemble(prefix: str, varied: Preset, expectation: str, time: str) -> list[Preset]:
    """Return the six members of the ensemble of section 4.2.3, <prefix>-<seed>."""
    return [
        Preset(
            name=f"{prefix}-{seed}",
            summary=f"A member of the ensemble: {varied.name} varied.",
            expectation=(
                f"It has seed {seed} and "
                f"{', '.join(f'{name} {value}' for name, value in changes.items())}. "
                f"{expectation}"
            ),
            time=time,
            config=vary(varied.config, seed=seed, model=changes),
        )
        for seed, changes in enumerate(MEMBERS, start=1)
    ]


_X30 = Preset(
    name="bn-x30",
    summary="As bn-x5, at 30 times the learning rate.",
    expectation="The paper: 72.2 % after 2.7 million steps, 74.8 % after 6 million.",
    config=BN_X30,
)

PRESETS = (
    Preset(
        name="inception",
        summary="The paper's baseline on ImageNet: no normalization.",
        expectation=(
            "The paper: 72.2 % after 31 million steps of 32. This project has not run "
            "it; docs/programs/experiments.md has results on CIFAR-10."
        ),
        config=INCEPTION,
    ),
    Preset(
        name="bn-baseline",
        summary="Inception with BN before each nonlinearity, and nothing else.",
        expectation="The paper: 72.2 % after 13.3 million steps, 72.7 % at most.",
        config=BN_BASELINE,
    ),
    Preset(
        name="bn-x5",
        summary="BN, 5 times the learning rate, and the changes of section 4.2.1.",
        expectation=(
            "The paper: 72.2 % after 2.1 million steps, 73.0 % at most. It trains for "
            "6 million steps, as the paper's BN-x30."
        ),
        config=BN_X5,
    ),
    _X30,
    Preset(
        name="bn-x5-sigmoid",
        summary="As bn-x5, with sigmoids in place of ReLU.",
        expectation=(
            "The paper: 69.8 %; without normalization such a network stays at chance."
        ),
        config=BN_X5_SIGMOID,
    ),
    *ensemble(
        "ensemble", _X30, "The paper: 20.1 % top-1 error of six, 144 crops.", time=""
    ),
    Preset(
        name="resnet50",
        summary="ResNet-50, 90 epochs with batches of 256: not in the paper.",
        expectation="Published runs of these settings reach about 76 %.",
        config=RESNET50,
    ),
)
