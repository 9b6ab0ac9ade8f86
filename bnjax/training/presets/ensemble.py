"""The six members of the paper's ensemble, on ImageNet and at the size of CIFAR-10.

Each is BN-x30 with some of: larger initial weights in the convolutions; dropout of 5 or
10 %; per-activation BN in the last hidden layers. Which has what, and how much larger,
is not in the paper. At the size of CIFAR-10 each is BN-x5: 30 times the rate is too
much there.
"""

import dataclasses
from collections.abc import Callable

from bnjax.training.config import Config
from bnjax.training.presets import imagenet
from bnjax.training.presets.cifar10 import reduced

Preset = Callable[[], Config]


@dataclasses.dataclass(frozen=True)
class Member:
    """What a member has that the network it varies has not.

    Args:
        dropout: rate before the classifier.
        weight_scale: factor on the standard deviation of the first weights.
        per_activation: BN of modules 5a and 5b with parameters for each position.
    """

    dropout: float
    weight_scale: float = 1.0
    per_activation: bool = False


MEMBERS = (
    Member(dropout=0.05),
    Member(dropout=0.1),
    Member(dropout=0.05, weight_scale=1.5),
    Member(dropout=0.1, weight_scale=1.5),
    Member(dropout=0.05, per_activation=True),
    Member(dropout=0.1, weight_scale=1.5, per_activation=True),
)
"""In the order of their seeds, 1 to 6."""


def members(prefix: str, accuracy: str, *, small: bool) -> dict[str, Preset]:
    """Return the presets of the six members.

    Args:
        prefix: their names are this and a number from 1.
        accuracy: what to expect, a sentence.
        small: at the size of CIFAR-10.
    """
    return {
        f"{prefix}-{seed}": _preset(f"{prefix}-{seed}", seed, member, accuracy, small)
        for seed, member in enumerate(MEMBERS, start=1)
    }


def _preset(name: str, seed: int, member: Member, accuracy: str, small: bool) -> Preset:
    def preset() -> Config:
        base = reduced(imagenet.bn_x5()) if small else imagenet.bn_x30()
        model = dataclasses.replace(base.model, **dataclasses.asdict(member))
        return dataclasses.replace(base, seed=seed, model=model)

    changes = [f"dropout of {member.dropout:.0%}"]
    if member.weight_scale != 1:
        changes.append(f"initial weights {member.weight_scale} times as large")
    if member.per_activation:
        changes.append("per-activation BN in modules 5a and 5b")
    preset.__doc__ = f"""{name}: `python train.py {name}`.

    A member of the ensemble: {"cifar10-bn-x5" if small else "bn-x30"} varied.
    It has seed {seed} and {", ".join(changes)}. {accuracy}
    """
    return preset
