"""Variants of batch normalization, each on the functional core."""
