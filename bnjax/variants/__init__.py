"""Variants of batch normalization, each built on the functional core."""
