"""What happens inside a network in training: one question a module.

Everything here is a pure function of a model, its variables and some examples.
"""

from bnjax.diagnostics.distributions import Movement as Movement
from bnjax.diagnostics.distributions import input_percentiles as input_percentiles
from bnjax.diagnostics.distributions import movement as movement
from bnjax.diagnostics.distributions import nonlinearity_inputs as nonlinearity_inputs
from bnjax.diagnostics.jacobian import layer_block as layer_block
from bnjax.diagnostics.jacobian import layer_input as layer_input
from bnjax.diagnostics.jacobian import singular_values as singular_values
