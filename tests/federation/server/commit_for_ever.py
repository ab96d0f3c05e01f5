"""Run by test_faults in a process of its own: commits versions until it is killed."""

from __future__ import annotations

import hashlib
import sys
import time

import numpy as np

from memopt.federation.delta.compute import compute_delta
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.server.store import Store
from memopt.federation.trust.manifest import VersionManifest
from memopt.federation.trust.signing import SigningKey

if __name__ == "__main__":
    store, key = Store(sys.argv[1]), SigningKey.generate()
    print("ready", flush=True)
    while True:
        head = store.head("lora")
        base = store.weights("lora", head.sequence)
        rng = np.random.default_rng(head.sequence)
        weights = {"w": rng.normal(size=50_000).astype("float32")}
        delta = compute_delta(base, weights, DeltaSettings(codec="int8"))
        manifest = VersionManifest(
            adapter="lora",
            node="x",
            kind=delta.kind,
            sequence=head.sequence + 1,
            base_hash=head.weights_hash,
            new_hash=delta.new_hash,
            previous=head.digest,
            payload_sha256=hashlib.sha256(delta.payload).hexdigest(),
            payload_bytes=len(delta.payload),
            time=int(time.time()),
        )
        path = store.incoming / "x.part"
        path.write_bytes(delta.payload)
        with store.locked("lora"):
            store.commit(key.sign(manifest), path, delta.received)
        print(head.sequence + 1, flush=True)
