"""Every preset by its name."""

from collections.abc import Callable

from bnjax.training.config import Config
from bnjax.training.presets import cifar10, ensemble, imagenet, small

DEFAULT = "digits"

PRESETS: dict[str, Callable[[], Config]] = {
    "digits": small.digits,
    "mnist": small.mnist,
    "lenet": small.lenet,
    "lenet-mnist": small.lenet_mnist,
    "inception": imagenet.inception,
    "bn-baseline": imagenet.bn_baseline,
    "bn-x5": imagenet.bn_x5,
    "bn-x30": imagenet.bn_x30,
    "bn-x5-sigmoid": imagenet.bn_x5_sigmoid,
    **ensemble.members(
        "ensemble", "The paper: 20.1 % top-1 error of six, 144 crops.", small=False
    ),
    "resnet50": imagenet.resnet50,
    "cifar10-inception": cifar10.inception,
    "cifar10-bn-baseline": cifar10.bn_baseline,
    "cifar10-bn-x5": cifar10.bn_x5,
    "cifar10-bn-x30": cifar10.bn_x30,
    "cifar10-bn-x5-sigmoid": cifar10.bn_x5_sigmoid,
    **ensemble.members(
        "cifar10-ensemble",
        "Here 50 to 55 % of the test set, in about 8 minutes on one CPU core.",
        small=True,
    ),
    "cifar10-resnet20": cifar10.resnet20,
    "cifar10-resnet56": cifar10.resnet56,
    "cifar10-resnet110": cifar10.resnet110,
}
