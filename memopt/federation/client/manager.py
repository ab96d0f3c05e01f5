"""One node's side of one adapter, on disk: what the server has, what waits, what is under way.

    <state>/<adapter>/state.json          sequence, hash, digest, names of the two files below
    <state>/<adapter>/pending.json        the same for a push that is not acknowledged yet
    <state>/<adapter>/sealed              there when the files below are under a key
    <state>/<adapter>/<hash>.safetensors  weights the receivers hold
    <state>/<adapter>/<hash>.residual     what they still lack, as a lossless payload on top
    <state>/<adapter>/<hash>.carry        what was unsent when another's version came

A push writes its future state and ``pending.json`` first; the acknowledgement renames
``pending.json`` onto ``state.json``. After a crash in between the server's head tells which of
the two is true (:meth:`DeltaSyncManager.recover`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from memopt.errors import ConfigurationError, SyncError
from memopt.federation.delta.adapters import kept_parts, read_kept
from memopt.federation.delta.arrays import (
    FLOATS,
    Array,
    Weights,
    check_weights,
    dtype_name,
    require_same,
    weights_hash,
)
from memopt.federation.delta.codecs import difference
from memopt.federation.delta.compute import Delta, apply_delta, compute_delta, full_payload
from memopt.federation.delta.payload import unpack
from memopt.federation.delta.settings import DeltaSettings
from memopt.federation.limits import Limits, check_adapter, check_hash, check_keys, strict_json
from memopt.federation.trust.manifest import NO_HASH, Signed
from memopt.federation.trust.vault import Vault
from memopt.files import atomic_path, lock_plain

_STATE, _PENDING = "state.json", "pending.json"
_KEPT = (".safetensors", ".residual", ".carry")


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where this node stands; sequence 0 before the first sync."""

    sequence: int = 0
    weights_hash: str = NO_HASH
    digest: str = NO_HASH
    residual_sha256: str = ""  # of the residual file; empty when nothing waits
    carry_hash: str = ""  # weights hash of the carry file; empty when there is none


class DeltaSyncManager:
    """Computes deltas against what the receivers hold and remembers what they still lack.

    Args:
        folder: where states are kept; one subfolder per adapter.
        adapter: the adapter's id.
        settings: how deltas are made.
        limits: sizes believed of a peer.
        dictionaries: zstd dictionaries by SHA-256, for receiving.
        vault: keeps the weights, the residual and what is arriving as they are, or sealed.

    Raises:
        ConfigurationError: the state is sealed and the key is missing or wrong.

    >>> import tempfile, numpy as np
    >>> manager = DeltaSyncManager(tempfile.mkdtemp(), "lora")
    >>> manager.delta({"w": np.ones(8, "float32")}).kind
    'full'
    """

    def __init__(
        self,
        folder: str | Path,
        adapter: str,
        settings: DeltaSettings | None = None,
        *,
        limits: Limits | None = None,
        dictionaries: Mapping[str, bytes] | None = None,
        vault: Vault | None = None,
    ) -> None:
        self.vault = vault or Vault()
        self.adapter = check_adapter(adapter)
        self.settings = settings or DeltaSettings()
        self.limits = limits or Limits()
        self._dictionaries = dict(dictionaries or {})
        if self.settings.dictionary:
            key = hashlib.sha256(self.settings.dictionary).hexdigest()
            self._dictionaries[key] = self.settings.dictionary
        self.folder = Path(folder) / adapter
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = lock_plain(self.folder / "lock")
        if lock is None:
            raise SyncError(
                f"state {self.folder} is in use by another process", fix="wait for it to finish"
            )
        self._lock_file = lock
        try:
            kept = (p for p in self.folder.iterdir() if p.suffix in _KEPT)
            self.vault.admit(self.folder, kept)
            self.state = self._read(_STATE) or State()
        except BaseException:
            self._lock_file.close()
            raise
        self._weights: dict[str, Array] | None = None

    def __enter__(self) -> DeltaSyncManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process use this state."""
        self._lock_file.close()

    # --------------------------------------------------------------------------------- sending

    def weights(self) -> dict[str, Array]:
        """Return the weights that the receivers hold (empty before the first sync)."""
        if self._weights is None:
            self._weights = self._load(self.state)
        return self._weights

    def delta(
        self, new: Weights, *, full: bool = False, settings: DeltaSettings | None = None
    ) -> Delta:
        """Return the delta from what the receivers hold to ``new``; nothing is stored.

        After another node's version was received, ``new`` continues from it; what this node had
        not sent by then is added, so that nothing is lost.
        """
        settings, new = settings or self.settings, self._with_carry(new)
        if full:
            return full_payload(new, settings, base=self.weights())
        return compute_delta(self.weights(), new, settings)

    def begin(self, signed: Signed, delta: Delta, new: Weights) -> None:
        """Write down the state that holds once the server acknowledges ``signed``."""
        manifest = signed.manifest
        pending = State(
            sequence=manifest.sequence,
            weights_hash=manifest.new_hash,
            digest=manifest.digest(),
            carry_hash=self.state.carry_hash,
        )
        rest = self._with_residual(pending, delta.received, self._with_carry(new))
        self._save(_PENDING, rest, delta.received)

    def confirm(self) -> None:
        """Make the pending state the state: one rename, after the acknowledgement."""
        pending = self._read(_PENDING)
        if pending is None:
            raise SyncError("there is no push under way to confirm")
        (self.folder / _PENDING).replace(self.folder / _STATE)
        self.state, self._weights = pending, None
        self._clean()

    def discard(self) -> None:
        """Forget a push that the server does not have."""
        (self.folder / _PENDING).unlink(missing_ok=True)
        self._clean()

    def recover(self, server_digest: str) -> bool:
        """Settle a push whose acknowledgement was lost; return whether it had arrived."""
        pending = self._read(_PENDING)
        if pending is None:
            return False
        if pending.digest == server_digest:
            self.confirm()
            return True
        self.discard()
        return False

    def keep(self, new: Weights) -> None:
        """Record what the receivers lack of ``new`` without sending: nothing was over threshold."""
        weights, state = self.weights(), replace(self.state, residual_sha256="")
        rest = self._with_residual(state, weights, self._with_carry(new))
        self._save(_STATE, rest, weights)
        self.state = self._read(_STATE) or self.state
        self._clean()

    # ------------------------------------------------------------------------------- receiving

    def receive(self, signed: Signed, payload: bytes | memoryview) -> dict[str, Array]:
        """Apply a verified version and make it the state; return the new weights.

        The caller has verified the signature. Nothing is stored unless the decoded weights have
        the signed hash.

        Raises:
            SyncFailure: the payload does not give the weights that were signed.
        """
        weights = self.decode(signed, payload, self.weights())
        self.adopt(signed, weights)
        return weights

    def decode(
        self, signed: Signed, payload: bytes | memoryview, base: Weights, *, kind: str | None = None
    ) -> dict[str, Array]:
        """Return what a version's payload makes of ``base``, checked against the signed hash.

        Args:
            kind: what the payload must be; by default either, as it carries its own hash.
        """
        weights = unpack(payload, base, self.limits, self._dictionaries, kind=kind)
        require_same(signed.manifest.new_hash, weights, what="the received weights")
        return weights

    def adopt(self, signed: Signed, weights: dict[str, Array]) -> None:
        """Make received, checked weights the state; what was not sent yet is carried on."""
        manifest = signed.manifest
        carry = {n: a for n, a in self.residual().items() if np.any(a)}
        carry_hash = weights_hash(carry) if carry else ""
        if carry:
            self.vault.write(self.folder / f"{carry_hash}.carry", kept_parts(carry))
        state = State(
            sequence=manifest.sequence,
            weights_hash=manifest.new_hash,
            digest=manifest.digest(),
            carry_hash=carry_hash,
        )
        self._save(_STATE, state, weights)
        (self.folder / _PENDING).unlink(missing_ok=True)
        self.state, self._weights = state, weights
        self._clean()

    # -------------------------------------------------------------------------------- residual

    def target(self) -> dict[str, Array]:
        """Return the weights of the last push as the caller gave them, residual included."""
        weights = self.weights()
        if not self.state.residual_sha256:
            return weights
        path = self.folder / f"{self.state.residual_sha256}.residual"
        data = self.vault.read(path)
        if hashlib.sha256(data).hexdigest() != self.state.residual_sha256:
            raise SyncError(f"residual {path} is damaged", fix="push the full weights again")
        return apply_delta(weights, data, limits=self.limits)

    def residual(self) -> dict[str, Array]:
        """Return what the receivers still lack, name -> difference (float32 or float64)."""
        weights, target = self.weights(), self.target()
        return {
            name: difference(weights[name], target[name]).reshape(target[name].shape)
            for name in target
            if name in weights
            and weights[name].shape == target[name].shape
            and weights[name].dtype == target[name].dtype
            and dtype_name(target[name]) in FLOATS
        }

    def _with_carry(self, new: Weights) -> dict[str, Array]:
        result = check_weights(new)
        if not self.state.carry_hash:
            return result
        path = self.folder / f"{self.state.carry_hash}.carry"
        carry = read_kept(path, self.vault)
        if weights_hash(carry) != self.state.carry_hash:
            raise SyncError(f"a carry file in {self.folder} is damaged", fix="remove the folder")
        for name, rest in carry.items():
            array = result.get(name)
            if array is not None and array.shape == rest.shape and array.dtype.name in FLOATS:
                with np.errstate(over="ignore", invalid="ignore"):
                    total: Any = np.add(array.astype(rest.dtype), rest)
                result[name] = np.asarray(total).astype(array.dtype)
        return result

    def _with_residual(self, state: State, received: Weights, new: Weights) -> State:
        rest = compute_delta(
            received,
            new,
            DeltaSettings(codec="lossless", delta_threshold=0, full_ratio=float("inf"), level=1),
        )
        if rest.new_hash == state.weights_hash:
            return state
        sha256 = hashlib.sha256(rest.payload).hexdigest()
        self.vault.write(self.folder / f"{sha256}.residual", [rest.payload])
        return replace(state, residual_sha256=sha256)

    # ----------------------------------------------------------------------------------- files

    def _save(self, name: str, state: State, weights: Weights) -> None:
        path = self.folder / f"{state.weights_hash}.safetensors"
        if not path.exists():
            self.vault.write(path, kept_parts(weights))
        with atomic_path(self.folder / name) as temporary:
            temporary.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")

    def _read(self, name: str) -> State | None:
        path = self.folder / name
        if not path.is_file():
            return None
        raw = check_keys(
            str(path), strict_json(path.read_bytes(), what=str(path)), list(asdict(State()))
        )
        check_hash("weights_hash", raw["weights_hash"])
        return State(**raw)

    def _load(self, state: State) -> dict[str, Array]:
        if state.sequence == 0:
            return {}
        path = self.folder / f"{state.weights_hash}.safetensors"
        weights = read_kept(path, self.vault) if path.is_file() else {}
        if not weights or weights_hash(weights) != state.weights_hash:
            raise ConfigurationError(
                f"state {path} is missing or damaged",
                fix=f"remove {self.folder}: the next sync is a full one",
            )
        return weights

    def _clean(self) -> None:
        used = set()
        for name in (_STATE, _PENDING):
            state = self._read(name)
            if state is not None:
                used |= {f"{state.weights_hash}.safetensors", f"{state.residual_sha256}.residual"}
                used.add(f"{state.carry_hash}.carry")
        for path in self.folder.iterdir():
            if path.suffix in _KEPT and path.name not in used:
                path.unlink(missing_ok=True)
