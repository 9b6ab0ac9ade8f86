"""Runs by name, and the command line that changes them."""

from bnjax.training.presets.command_line import parse as parse
from bnjax.training.presets.registry import DEFAULT as DEFAULT
from bnjax.training.presets.registry import PRESETS as PRESETS
from bnjax.training.presets.small import digits as digits
from bnjax.training.presets.small import mnist as mnist
