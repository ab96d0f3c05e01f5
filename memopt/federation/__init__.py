"""Adapter weights as signed deltas over Arrow Flight.

A room for each of what takes part: ``delta`` makes and reads what travels, ``trust`` says who may
do what and keeps keys, ``wire`` is the form of the messages, ``server`` and ``client`` are the two
ends. The names below are imported on use, so that ``import memopt.federation`` stays cheap.
"""

from __future__ import annotations

from memopt.extras import require
from memopt.onuse import names_on_use

for _module in ("pyarrow.flight", "cryptography", "zstandard"):
    require(_module, extra="federation", why="sync weights")

_MODULES = {
    "client.client": ("SyncClient",),
    "client.manager": ("DeltaSyncManager",),
    "delta.adapters": ("read_weights", "write_weights"),
    "delta.aggregate": ("aggregate",),
    "delta.arrays": ("fp32_bytes", "weights_hash"),
    "delta.compute": ("apply_delta", "compute_delta"),
    "delta.factors": ("AggregateSettings",),
    "delta.payload": ("train_dictionary",),
    "delta.settings": ("DeltaSettings",),
    "failures": ("SyncFailure",),
    "limits": ("Limits",),
    "wire.tls": ("TlsFiles",),
    "server.server": ("SyncServer",),
    "trust.audit": ("check_audit",),
    "trust.authority": ("init_ca", "issue"),
    "trust.nodes": ("Trust", "add_trusted"),
    "trust.signing": ("SigningKey",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)
__getattr__ = names_on_use(__name__, _MODULES)
