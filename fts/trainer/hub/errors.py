"""What went wrong at the Hub, in words that hold no secret."""

from __future__ import annotations

import re
from typing import Any

REFUSED = (400, 401, 402, 403)
"""Answers that stay the same however often one asks."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer that became an error; None where there was no answer.

    >>> status_of(TimeoutError()) is None
    True
    """
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_refusal(error: BaseException) -> bool:
    """Whether no later upload can work either: the token is missing or wrong, may not write there, or a name is not allowed."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    return isinstance(error, (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)) or status_of(error) in REFUSED


def reason(error: BaseException, token: str | None = None) -> str:
    """An error of an upload in one line, without tokens and without the signatures that addresses of files hold.

    Args:
        error: what was raised; where it has a cause that says more, that is told, too.
        token: that was used.

    >>> reason(ConnectionRefusedError("https://hub.example/file?signature=abc with hf_abcdefghijklmnop"))
    'ConnectionRefusedError: https://hub.example/file with <token>'
    """
    status = status_of(error)
    if status is not None:
        response: Any = error.response  # type: ignore[attr-defined]  # it has a status
        told = getattr(error, "server_message", None) or ""
        text = f"{status} {getattr(response, 'reason_phrase', '')}".strip() + (f": {told}" if told else "")
    else:
        text = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None and status_of(error.__cause__) is not None:
            text += f" {reason(error.__cause__, token)}"
    return without_secrets(" ".join(text.split()), token)


def without_secrets(text: str, token: str | None = None) -> str:
    """A text without tokens of the Hub and without the queries of addresses, which may be signed."""
    if token:
        text = text.replace(token, "<token>")
    text = re.sub(r"\bhf_\w{8,}", "<token>", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
