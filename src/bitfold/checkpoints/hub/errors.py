"""Patience with the Hub, and its failures in words.

`huggingface_hub` raises some twenty kinds of exception, often one wrapped in another, over an HTTP library that has
changed twice. What matters is at the end of the chain: an HTTP status, or that the network failed. That is read off
here without naming the HTTP library.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from bitfold.errors import BitfoldError, HubError

T = TypeVar("T")
logger = logging.getLogger("bitfold.hub")

ATTEMPTS = 5
LONGEST_WAIT = 300.0  # seconds; a server that asks for more is reported, not waited for
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_NETWORK_ERRORS = {"TransportError", "Timeout", "ConnectionError", "ChunkedEncodingError", "OfflineModeIsEnabled"}
_NO_CONNECTION = {"ConnectError", "ConnectTimeout", "ConnectionRefusedError", "OfflineModeIsEnabled"}
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class Unreachable(HubError):
    """No connection to the Hub at all; an earlier download may serve instead."""


class NotFound(HubError):
    """No such repository, as far as this token may see."""


@dataclass(frozen=True)
class Patience:
    """For whom and for what the Hub is asked, to word an error with."""

    where: str
    has_token: bool
    writing: bool = False


def patiently(action: Callable[[], T], patience: Patience) -> T:
    """Run `action`; again, a bounded number of times, when the failure may pass (rate limit, 5xx, lost connection).

    Raises:
        HubError: the action failed for good or too often.
    """
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except BitfoldError:
            raise
        except Exception as error:  # the library's own, the HTTP library's, OSError: all end as one HubError
            wait = retry_after(error)
            wait = float(2**attempt) if wait is None else wait
            tries = 3 if is_unreachable(error) else ATTEMPTS
            if not is_transient(error) or attempt + 1 >= tries or wait > LONGEST_WAIT:
                raise explain(error, patience) from error
            reason = f"HTTP status {status_of(error)}" if status_of(error) else "the connection failed"
            logger.warning("%s: %s; trying again in %.0f s (%d/%d)", patience.where, reason, wait, attempt + 1, tries)
            time.sleep(wait)
    raise AssertionError("unreachable")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _response(error: BaseException) -> Any:
    for link in chain(error):
        response = getattr(link, "response", None)
        if getattr(response, "status_code", None) is not None:
            return response
    return None


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an exception, None if there is none."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asked to wait, None if it did not say."""
    response = _response(error)
    value = None if response is None else response.headers.get("Retry-After")
    return float(value) if value is not None and str(value).strip().isdigit() else None


def _is_any(error: BaseException, names: set[str]) -> bool:
    return any(kind.__name__ in names for link in chain(error) for kind in type(link).__mro__)


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all."""
    return status_of(error) is None and _is_any(error, _NO_CONNECTION)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed later."""
    status = status_of(error)
    if status is not None:
        return status in _TRANSIENT
    short = isinstance(error, OSError) and "Consistency check failed" in str(error)
    return short or _is_any(error, _NETWORK_ERRORS | {"JSONDecodeError"})


def explain(error: BaseException, patience: Patience) -> HubError:
    """The HubError that says what happened and what to do."""
    status = status_of(error)
    names = {type(link).__name__ for link in chain(error)}
    if status is not None:
        return _explain_status(status, names, error, patience)
    where = patience.where
    if "HFValidationError" in names:
        return HubError(f"not a valid repository name: {_line(error)}", where=where)
    if is_unreachable(error):
        hint = "check the connection and any proxy; HF_HUB_OFFLINE=1 uses only what was fetched earlier"
        return Unreachable("the Hub cannot be reached", where=where, hint=hint)
    if is_transient(error):
        hint = "run the command again: files that are complete are kept"
        return HubError(f"the connection broke {ATTEMPTS} times", where=where, hint=hint)
    numbers = {link.errno for link in chain(error) if isinstance(link, OSError)}
    if errno.ENOSPC in numbers:
        return HubError("the disk is full", where=where, hint="free space, or set HF_HOME to a larger disk")
    return HubError(f"{type(error).__name__}: {_line(error)}", where=where)


def _explain_status(status: int, names: set[str], error: BaseException, patience: Patience) -> HubError:
    where = patience.where
    if "GatedRepoError" in names:
        hint = "accept its terms on its page on the Hub" + ("" if patience.has_token else f", then {_LOGIN}")
        return HubError("the repository is gated and this account has no access", where=where, hint=hint)
    if "RevisionNotFoundError" in names:
        return HubError("the repository has no such revision", where=where, hint="a branch, a tag or a commit")
    if status == 401 and patience.has_token and "RepositoryNotFoundError" not in names:
        return HubError("the access token is invalid or has expired", where=where, hint=f"make a new one and {_LOGIN}")
    if status == 403:
        need = "a token with the right to write there" if patience.writing else "a token with the right to read it"
        return HubError("the Hub forbids it", where=where, hint=f"use {need}: https://huggingface.co/settings/tokens")
    if status in (401, 404):
        return _not_found(patience)
    if status == 429:
        wait = retry_after(error)
        when = "later" if wait is None else f"in {wait:.0f} s"
        login = "" if patience.has_token else f"; {_LOGIN} for a higher limit"
        return HubError("too many requests: the Hub limits the rate", where=where, hint=f"try again {when}{login}")
    if status >= 500:
        hint = "try again later; https://status.huggingface.co says whether it is down"
        return HubError(f"the Hub failed with status {status}, {ATTEMPTS} times", where=where, hint=hint)
    return HubError(f"the Hub answered with status {status}: {_line(error)}", where=where)


def _not_found(patience: Patience) -> NotFound:
    if patience.has_token:
        what, hint = "no such repository on the Hub, or this token may not see it", "check the name"
    else:
        what, hint = "no such repository on the Hub, or it is private", f"check the name; if it is private, {_LOGIN}"
    return NotFound(what, where=patience.where, hint=f"{hint}; no file or folder has this name either")


def _line(error: BaseException) -> str:
    """The error's text on one line, without the request ids that the library puts around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
