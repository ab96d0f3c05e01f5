"""What a client is told when its request cannot be answered."""

from __future__ import annotations

from collections.abc import Mapping

from memopt.errors import (
    BundleError,
    ConfigurationError,
    DeviceError,
    InputError,
    MemoptError,
    MissingExtra,
)
from memopt.runtimes.batcher import Full

# Status and OpenAI's type of an error, the most special first.
_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (InputError, 400, "invalid_request_error"),
    (ConfigurationError, 400, "invalid_request_error"),
    (BundleError, 400, "invalid_request_error"),
    (DeviceError, 503, "overloaded_error"),
    (MissingExtra, 501, "not_implemented_error"),
    (MemoptError, 500, "server_error"),
)


class Refusal(MemoptError):
    """A request that is refused, with its HTTP status.

    >>> Refusal(404, "no model 'x'").status
    404
    """

    def __init__(
        self,
        status: int,
        problem: str,
        *,
        kind: str = "invalid_request_error",
        fix: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(problem, fix=fix)
        self.status = status
        self.kind = kind
        self.headers = dict(headers or {})


def refusal_of(error: Exception) -> Refusal:
    """Return what a client is told of an error; of an unforeseen one no details.

    >>> refusal_of(InputError("input 3 is empty")).status
    400
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, TimeoutError):
        return Refusal(503, "the request waited too long", kind="timeout_error",
                       headers={"Retry-After": "1"})  # fmt: skip
    if isinstance(error, Full):
        return Refusal(
            429,
            error.problem,
            kind="overloaded_error",
            headers={"Retry-After": str(error.seconds)},
        )
    for kind, status, name in _STATUS:
        if isinstance(error, kind):
            return Refusal(status, str(error), kind=name)
    return Refusal(500, "internal error; the server's log has it", kind="server_error")
