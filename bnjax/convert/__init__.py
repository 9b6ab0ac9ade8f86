"""Batch norm layers of a model exchanged: for ours, for shared or frozen ones.

The variables stay where they are and keep their names, so that checkpoints, optimizers
and sharding rules of the model go on working.
"""

from bnjax.convert.exchange import convert as convert
from bnjax.convert.targets import ToBatchNorm as ToBatchNorm
from bnjax.convert.targets import ToFrozen as ToFrozen
from bnjax.convert.targets import ToGroupNorm as ToGroupNorm
