"""The end that trains or uses the weights: its state, its connection, push and pull."""

from memopt.onuse import names_on_use

__getattr__ = names_on_use(__name__, {"client": ("SyncClient",)})
