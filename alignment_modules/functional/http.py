"""Requests over HTTP that say what went wrong, and whether asking again may help; the standard library alone."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

# Answers that another attempt may change: too many requests, a server that is busy, restarting or slow.
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class RequestError(OSError):
    """A request without the answer that it asked for.

    Attributes:
        status: What the server answered; None: it did not answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered later."""
        return self.status is None or self.status in _PASSING


def fetch(
    url: str,
    body: bytes | None = None,
    *,
    timeout: float,
    headers: Mapping[str, str] | None = None,
    method: str | None = None,
) -> str:
    """What a server answers.

    Args:
        url: Of the route.
        body: JSON text; None: nothing is sent.
        timeout: Seconds without a sign of the server after which to give up.
        headers: More headers, such as the one with a key: redirects, which would carry it elsewhere, are not followed.
        method: The verb; None: GET without a body, else POST.

    Raises:
        RequestError: If there is no answer, or one that says that the request failed.
    """
    sent = {"Content-Type": "application/json", **(headers or {})}
    try:
        call = urllib.request.Request(url, body, sent, method=method)  # noqa: S310  http or https: `check_url`
        with _OPENER.open(call, timeout=timeout) as response:
            return response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        said = short(error.read(2000).decode("utf-8", "replace"))
        raise RequestError(f"{url} answered {error.code} {error.reason}: {said}", error.code) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise RequestError(f"{url} gave no answer within timeout={timeout:g} seconds") from None
        raise RequestError(f"{url} cannot be reached: {reason}") from None


def check_url(url: str) -> None:
    """Refuses what is no address of a server.

    Raises:
        ValueError: If it does not begin with http:// or https:// and a host.
    """
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"url={url!r} must begin with http:// or https:// and a host")


def pause_before(attempt: int) -> float:
    """Seconds to wait before a request is made again: 0.1, then four times as long each time, 30 at most.

    Args:
        attempt: Which repetition, from 1.

    >>> [pause_before(attempt) for attempt in (1, 2, 9)]
    [0.1, 0.4, 30.0]
    """
    return min(0.1 * 4.0 ** (attempt - 1), 30.0)


def short(value: Any) -> str:
    """A value as it stands in a message: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *given: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)
