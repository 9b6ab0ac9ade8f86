"""Fold batch normalization into adjacent linear layers, for inference."""

from bnjax.folding.fold import Folded as Folded
from bnjax.folding.fold import Layer as Layer
from bnjax.folding.fold import Report as Report
from bnjax.folding.fold import fold_batch_norm as fold_batch_norm
from bnjax.folding.fold import fold_nnx as fold_nnx
