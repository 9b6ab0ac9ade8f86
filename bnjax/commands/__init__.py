"""The commands of `python -m bnjax`."""

COMMANDS = {
    "inspect": "Show the parameters and statistics of every BN layer.",
    "predict": "Classify images.",
    "export": "Write the network as StableHLO, which JAX alone runs.",
    "fold": "Write its weights with batch normalization folded into them.",
    "recompute-stats": "Estimate the population statistics again, as a new run.",
    "import-torch": "Make a run of weights from PyTorch.",
}
