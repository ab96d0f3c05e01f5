"""Who may do what: keys, certificates, signatures, the audit log, and files under a key."""

from memopt.onuse import names_on_use

_MODULES = {
    "manifest": ("KINDS", "NO_HASH", "VersionManifest", "Signed", "check_node", "parse_signed"),
    "nodes": ("Node", "ROLES", "Trust", "add_trusted"),
    "signing": ("SigningKey", "check_private", "signature_holds"),
}
__getattr__ = names_on_use(__name__, _MODULES)
