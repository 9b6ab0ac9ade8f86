"""The parts of train.py and eval.py.

This package serves the two programs and promises no stable interface. The layers in
`bnjax.linen` and `bnjax.nnx` and the functions in `bnjax` are stable.
"""
