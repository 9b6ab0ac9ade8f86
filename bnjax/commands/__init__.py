"""The commands of `python -m bnjax`."""

COMMANDS = {
    "inspect": "Show the parameters and statistics of every BN layer.",
    "predict": "Classify images.",
    "export": "Write the network as StableHLO, which JAX alone runs.",
}
