"""Adapter weights as signed deltas over Arrow Flight."""
