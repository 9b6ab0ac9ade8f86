"""Named configurations: `PRESETS["mnist"].config` is section 4.1 of the paper."""

from bnjax.training.config import Preset
from bnjax.training.presets import cifar10, imagenet, small

DEFAULT = "digits"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (*small.PRESETS, *imagenet.PRESETS, *cifar10.PRESETS)
}
"""Every preset by name."""
