"""Data sets as arrays, and the batches drawn from them.

This package serves train.py and eval.py and promises no stable interface.
"""
