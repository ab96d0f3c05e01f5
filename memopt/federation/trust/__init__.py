"""Who may do what: keys, certificates, signatures, the audit log, and files under a key."""
