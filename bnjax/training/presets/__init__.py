"""Runs by name: `PRESETS["mnist"].config` is the paper's section 4.1."""

from bnjax.training.config import Preset
from bnjax.training.presets import cifar10, imagenet, small

DEFAULT = "digits"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (*small.PRESETS, *imagenet.PRESETS, *cifar10.PRESETS)
}
"""Every preset by its name."""
