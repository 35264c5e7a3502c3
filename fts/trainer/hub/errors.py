"""Errors of the Hub as messages without secrets."""

from __future__ import annotations

import re
from typing import Any

REFUSED_STATUSES = (400, 401, 402, 403)
"""HTTP statuses that stay the same on every retry."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the response behind an error; None if there was no response.

    >>> status_of(TimeoutError()) is None
    True
    """
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_refusal(error: BaseException) -> bool:
    """Whether a retry cannot work: the token is missing, wrong or without write access, or a name is not allowed."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    return (
        isinstance(error, (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled))
        or status_of(error) in REFUSED_STATUSES
    )


def describe_error(error: BaseException, token: str | None = None) -> str:
    """An upload's error in one line, without tokens and without the signatures in URLs of files.

    Args:
        error: what was raised; a cause with an HTTP status is described, too.
        token: the one in use.

    >>> describe_error(ConnectionRefusedError("https://hub.example/file?signature=abc with hf_abcdefghijklmnop"))
    'ConnectionRefusedError: https://hub.example/file with <token>'
    """
    status = status_of(error)
    if status is not None:
        response: Any = error.response  # type: ignore[attr-defined]  # it has a status
        message = getattr(error, "server_message", None) or ""
        text = f"{status} {getattr(response, 'reason_phrase', '')}".strip() + (f": {message}" if message else "")
    else:
        text = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None and status_of(error.__cause__) is not None:
            text += f" {describe_error(error.__cause__, token)}"
    return redact_secrets(" ".join(text.split()), token)


def redact_secrets(text: str, token: str | None = None) -> str:
    """A text without tokens of the Hub and without the queries of URLs, which may be signed."""
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"\bhf_\w{8,}", "<token>", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
