"""Weights as arrays, what changed between them, and the bytes that say so."""

from memopt.onuse import names_on_use

__getattr__ = names_on_use(__name__, {"compute": ("apply_delta", "compute_delta")})
