"""Weights as arrays, what changed between them, and the bytes that say so."""
