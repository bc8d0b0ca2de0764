"""Errors as OpenAI's clients know them: an object with message, type, param and code, and a status."""

from __future__ import annotations

from typing import Any

from bitfold.errors import BitfoldError, UsageError
from bitfold.serving.scheduler import Closed, QueueFull

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field of the request that it is about.
        code: for programs.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """The body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception, names: frozenset[str] = frozenset()) -> ApiError:
    """What an exception is to a client.

    Args:
        error: any.
        names: fields that a request may have, for the `where` of errors about one.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", code="rate_limit_exceeded")
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, UsageError):
        return ApiError(400, str(error), param=error.where if error.where in names else None, code="invalid_value")
    if isinstance(error, BitfoldError):
        return ApiError(500, str(error))
    return ApiError(500, f"unexpected error: {type(error).__name__}")
