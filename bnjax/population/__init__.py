"""Algorithm 2: the statistics for inference, estimated again with fixed parameters."""

from bnjax.population.recompute import recompute_batch_stats
from bnjax.population.selection import Layers
from bnjax.population.totals import Method

__all__ = ["Layers", "Method", "recompute_batch_stats"]
