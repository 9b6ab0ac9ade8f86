"""Diagnostics of a network in training: one question for each module.

Every function is a pure function of a model, its variables and some examples.
"""

from bnjax.diagnostics.consistency import LayerStatistics as LayerStatistics
from bnjax.diagnostics.consistency import NormalizationError as NormalizationError
from bnjax.diagnostics.consistency import Scores as Scores
from bnjax.diagnostics.consistency import compare_scores as compare_scores
from bnjax.diagnostics.consistency import compare_statistics as compare_statistics
from bnjax.diagnostics.consistency import normalization_error as normalization_error
from bnjax.diagnostics.distributions import Movement as Movement
from bnjax.diagnostics.distributions import input_percentiles as input_percentiles
from bnjax.diagnostics.distributions import movement as movement
from bnjax.diagnostics.distributions import nonlinearity_inputs as nonlinearity_inputs
from bnjax.diagnostics.jacobian import layer_block as layer_block
from bnjax.diagnostics.jacobian import layer_input as layer_input
from bnjax.diagnostics.jacobian import singular_values as singular_values
from bnjax.diagnostics.noise import BatchNoise as BatchNoise
from bnjax.diagnostics.noise import NnxBatchNoise as NnxBatchNoise
from bnjax.diagnostics.noise import batch_noise as batch_noise
from bnjax.diagnostics.smoothness import CovariateShift as CovariateShift
from bnjax.diagnostics.smoothness import Smoothness as Smoothness
from bnjax.diagnostics.smoothness import covariate_shift as covariate_shift
from bnjax.diagnostics.smoothness import loss_smoothness as loss_smoothness
