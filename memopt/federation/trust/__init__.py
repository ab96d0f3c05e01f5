"""Who may do what: keys, certificates, signatures, the audit log, and files under a key."""

import importlib
from typing import Any

_MODULES = {
    "manifest": ("KINDS", "NO_HASH", "Manifest", "Signed", "check_node", "parse_signed"),
    "nodes": ("Node", "ROLES", "Trust", "add_trusted"),
    "signing": ("SigningKey", "check_private", "signature_holds"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
