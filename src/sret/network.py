"""Recognises a missing connection, and keeps the Hugging Face libraries from trying again for long without one."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

CHECK_SECONDS = 10.0  # to wait for the hub
# Names of classes of Python, urllib, requests and httpx; the last two need not be installed.
_UNREACHABLE = {"ConnectionError", "TimeoutError", "URLError", "gaierror", "Timeout", "TransportError"}


def is_unreachable(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that a host could not be reached."""
    chain: list[set[str]] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append({kind.__name__ for kind in type(cause).__mro__})
        cause = cause.__cause__ or cause.__context__
    is_refused = any("SSLError" in names for names in chain)  # reached, but its certificate was not accepted
    return not is_refused and any(names & _UNREACHABLE and "HTTPError" not in names for names in chain)


def hub_host() -> str:
    """The host of the Hugging Face Hub."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


@contextmanager
def hub_cache_if_unreachable() -> Iterator[None]:
    """Within this context the hub's libraries read only their cache if the hub cannot be reached.

    Otherwise they would try every request five times, for 23 seconds, and some of them print each try.
    """
    from huggingface_hub import constants, get_session

    libraries: list[Any] = [constants, *(sys.modules[name] for name in ("datasets.config",) if name in sys.modules)]
    before = [library.HF_HUB_OFFLINE for library in libraries]
    try:
        get_session().head(constants.ENDPOINT, timeout=CHECK_SECONDS)
    except Exception as error:  # of the client that huggingface_hub uses
        for library in libraries if is_unreachable(error) else ():
            library.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for library, value in zip(libraries, before, strict=True):
            library.HF_HUB_OFFLINE = value
