"""Replace the batch norm layers of a model: by bnjax's, by frozen or shared layers.

The variables stay in place and keep their names. Checkpoints, optimizers and sharding
rules of the model therefore keep working.
"""

from bnjax.convert.exchange import convert as convert
from bnjax.convert.targets import ToBatchNorm as ToBatchNorm
from bnjax.convert.targets import ToFrozen as ToFrozen
from bnjax.convert.targets import ToGroupNorm as ToGroupNorm
