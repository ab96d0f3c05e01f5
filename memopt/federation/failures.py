"""Why a sync was refused: one code per reason, the same on the wire and in the exception."""

from __future__ import annotations

from memopt.errors import SyncError

# code -> may the same request succeed when it is simply sent again?
CODES: dict[str, bool] = {
    "malformed": False,  # a message that is not what the protocol allows
    "corrupt": True,  # a checksum did not match: the wire or the disk changed a byte
    "out-of-order": True,  # a message or chunk out of its turn: the wire lost or doubled one
    "too-large": False,  # a declared size is over a limit
    "unknown-codec": False,
    "unknown-version": False,
    "unknown-dictionary": False,
    "bad-signature": False,
    "unknown-signer": False,
    "forbidden": False,  # known, but lacks the role
    "unauthenticated": False,
    "replay": False,  # a sequence number that was used already
    "stale": False,  # signed too long ago, or in the future
    "need-full": False,  # made for another base: the client answers by sending everything
    "conflict": True,  # another version came in between; look again and retry
    "wrong-result": False,  # decoded fine, and the weights are not those that were signed
    "not-found": False,
    "storage": True,  # the disk is full or failed
    "busy": True,
    "timeout": True,
    "unavailable": True,
}


class SyncFailure(SyncError):
    """A refusal with a machine-readable ``code`` (a key of :data:`CODES`).

    >>> SyncFailure("busy", "100 transfers are running").retryable
    True
    """

    def __init__(self, code: str, problem: str, *, fix: str | None = None) -> None:
        super().__init__(problem, fix=fix)
        self.code = code if code in CODES else "malformed"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return CODES[self.code]
