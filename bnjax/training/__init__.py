"""What train.py and eval.py are made of.

This package serves the two programs and promises no stable interface; the layers in
`bnjax.linen` and `bnjax.nnx` and the functions in `bnjax` do.
"""
