"""Asking the Hub again when it was busy, and telling that from being refused.

The client itself asks up to six times for what it sends in pieces: upload modes, large files and their checks. What it sends only once is
asked for through `retrying`, with the same patience.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

from hfcompress.measurement.provenance import hide_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 6
_CLIENT_LOG = "huggingface_hub.utils._http"
_LONGEST_WAIT_S = 300.0
# Connecting, waiting for an answer, sending a piece, waiting for a free connection. The client by itself waits forever.
TIME_LIMITS_S: tuple[float, float, float, float] = (10.0, 120.0, 120.0, 120.0)


def status_of(error: BaseException) -> int:
    """The status that the Hub answered; 0 if it is no answer of the Hub."""
    return int(getattr(getattr(error, "response", None), "status_code", 0)) if isinstance(error, HfHubHTTPError) else 0


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the Hub was busy or down, or the connection broke."""
    if isinstance(error, HfHubHTTPError):
        return status_of(error) in (408, 429) or status_of(error) >= 500
    return isinstance(error, HTTPError | json.JSONDecodeError)  # an error page of a proxy is no JSON


def retrying(ask: Callable[[], Result], what: str, *, tries: int = TRIES) -> Result:
    """Call `ask` until it succeeds, waiting longer each time, or as long as the Hub says.

    Args:
        ask: Must be safe to repeat: whoever writes looks first whether an earlier try arrived.
        what: What it does, for the log: "creating user/name".
        tries: How often at most.

    Returns:
        What `ask` returned.

    Raises:
        HfHubHTTPError: It was refused, which repeating does not mend, or is still busy after the last try.
        HTTPError: The Hub cannot be reached.
    """
    for number in range(1, tries + 1):
        try:
            return ask()
        except (HTTPError, json.JSONDecodeError) as error:
            wait_s = _wait_s(error, number)
            if not is_passing(error) or number == tries or wait_s > _LONGEST_WAIT_S:
                raise
            reason = f"the Hub answered {status_of(error)}" if status_of(error) else _first_line(error)
            logger.warning("%s: %s; trying again in %.1f s (%d of %d)", what, reason, wait_s, number, tries - 1)
            time.sleep(wait_s)
    raise AssertionError("unreachable")


def _wait_s(error: Exception, number: int) -> float:
    """Seconds: as the Hub asks, else doubling from one to eight, a little more or less, so that many do not come back at once."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    if asked.isdecimal():
        return float(asked) + random.uniform(0, 1)
    return min(8.0, 2.0 ** (number - 1)) * random.uniform(0.75, 1.25)


def _first_line(error: BaseException) -> str:
    return hide_secrets((str(error).strip().splitlines() or [type(error).__name__])[0]).rstrip(".")


class _WithoutSecrets(logging.Filter):
    """The client logs where a request failed, and addresses of storage are signed: who has one needs no token."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide_secrets(record.getMessage()), ()
        return True


@contextmanager
def careful_client() -> Iterator[None]:
    """Let no request of this block wait for an answer forever, and no signed address into the log."""
    session, client_log, without_secrets = get_session(), logging.getLogger(_CLIENT_LOG), _WithoutSecrets()
    before = session.timeout
    session.timeout = TIME_LIMITS_S
    client_log.addFilter(without_secrets)
    try:
        yield
    finally:
        session.timeout = before
        client_log.removeFilter(without_secrets)
