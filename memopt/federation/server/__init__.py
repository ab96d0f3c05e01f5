"""The end that keeps the versions."""

from memopt.onuse import names_on_use

__getattr__ = names_on_use(__name__, {"server": ("SyncServer",)})
