"""Data sets as arrays, and batches of their examples.

This package serves train.py and eval.py and promises no stable interface.
"""
