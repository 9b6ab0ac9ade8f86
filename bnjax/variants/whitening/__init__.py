"""Whitening batch normalization: groups of channels decorrelated, not only scaled.

The functions need JAX alone. The layers are in `bnjax.variants.whitening.linen` and
`bnjax.variants.whitening.nnx`.
"""

from bnjax.variants.whitening.covariance import WhiteningMoments as WhiteningMoments
from bnjax.variants.whitening.covariance import WhiteningStats as WhiteningStats
from bnjax.variants.whitening.covariance import (
    update_whitening_stats as update_whitening_stats,
)
from bnjax.variants.whitening.functional import whiten_batch as whiten_batch
from bnjax.variants.whitening.functional import whitening_affine as whitening_affine
from bnjax.variants.whitening.functional import (
    whitening_batch_norm as whitening_batch_norm,
)
from bnjax.variants.whitening.inverse_sqrt import whitening_matrix as whitening_matrix
