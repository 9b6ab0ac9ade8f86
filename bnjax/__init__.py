"""Batch normalization for JAX as pure functions with explicit statistics.

`bnjax` holds the core and needs JAX alone. The layers are in `bnjax.linen` and
`bnjax.nnx`, which need Flax, and in `bnjax.equinox` and `bnjax.haiku`, which need the
library of that name.
"""

from bnjax.functional import CHECKPOINT_NAME as CHECKPOINT_NAME
from bnjax.functional import BatchStats as BatchStats
from bnjax.functional import Moments as Moments
from bnjax.functional import batch_norm as batch_norm
from bnjax.functional import checkpoint_policy as checkpoint_policy
from bnjax.functional import moments as moments
from bnjax.functional import normalize as normalize
from bnjax.functional import normalize_batch as normalize_batch
from bnjax.functional import update_batch_stats as update_batch_stats

__version__ = "0.2.0"
