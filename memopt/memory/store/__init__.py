"""One database of memories: its tables, lock and cells, reads, writes and upkeep."""

from memopt.onuse import names_on_use

# Its import path of before.
__getattr__ = names_on_use("memopt.memory", {"memory_store": ("MemoryStore",)})
