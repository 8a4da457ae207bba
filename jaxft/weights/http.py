"""One request to a server, and what its failure means for the next."""

import socket
import ssl
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

TIMEOUT = 30.0  # seconds in which nothing comes
_CHUNK = 1 << 18
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP states
_LOCAL = ("127.0.0.1", "::1", "localhost")


class BrokenError(Exception):
    """A try that brought no whole file, and what it means for the next."""

    def __init__(
        self,
        cause: str,
        *,
        lasts: bool = False,
        without_reply: bool = False,
        starts_over: bool = False,
    ) -> None:
        super().__init__(cause)
        self.lasts, self.without_reply, self.starts_over = lasts, without_reply, starts_over


def open_from(url: str, start: int, validator: str | None) -> HTTPResponse:
    """The reply that sends a URL's bytes from `start` on; raises BrokenError if there is none."""
    headers = {"User-Agent": "jaxft"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if validator:
            headers["If-Range"] = validator
    try:
        opener = build_opener(_Redirects)  # not once and for all: it reads the proxies' variables
        return opener.open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        status = f"(HTTP {error.code} {error.reason})"
        if error.code == 416:
            cause = f"the server does not go on at byte {start:,} {status}"
            raise BrokenError(cause, starts_over=True) from error
        if error.code in _PASSING:
            raise BrokenError(f"the server has trouble {status}") from error
        if error.code in (404, 410):
            said = f"there is no such file {status}: check the URL"
        elif error.code in (401, 403):
            said = f"the server refuses it {status}: it may want a login"
        else:
            said = f"the server does not send it {status}"
        raise BrokenError(said, lasts=True) from error
    except (OSError, HTTPException) as error:
        raise _without_reply(url, error) from error


def _without_reply(url: str, error: Exception) -> BrokenError:
    reason = error.reason if isinstance(error, URLError) else error
    host = urlsplit(url).netloc
    if isinstance(reason, socket.gaierror):
        cause = f"the host {host} is not known ({reason}): no network here, or a slip in the URL"
    elif isinstance(reason, ssl.SSLCertVerificationError):
        cause = (
            f"{host} does not prove who it is ({reason.verify_message}): behind a proxy that signs "
            "for others, SSL_CERT_FILE names its certificates"
        )
    elif isinstance(reason, TimeoutError):
        return BrokenError(f"{host} does not answer within {TIMEOUT:g} seconds")
    else:
        cause = f"no connection to {host} ({reason})"
    passing = isinstance(reason, ConnectionResetError | HTTPException)
    return BrokenError(cause, without_reply=not passing)


class _Redirects(HTTPRedirectHandler):
    """Follows a server, but not out of encryption."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> Any:
        """As the base class."""
        if not is_safe(newurl):
            fp.close()
            raise BrokenError(
                f"the server sends on to {newurl}, which is not encrypted", lasts=True
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_safe(url: str) -> bool:
    """Whether nobody on the way can change what a URL sends."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL)


def goes_on(response: HTTPResponse, start: int) -> bool:
    """Whether a reply begins at byte `start` of the file, as was asked for."""
    said = response.headers.get("Content-Range", "")
    return response.status == 206 and said.startswith(f"bytes {start}-")


def validator_of(response: HTTPResponse) -> str | None:
    """What tells one version of the file from the next."""
    etag = response.headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag


def chunks(response: HTTPResponse) -> Iterator[bytes]:
    """A reply's bytes, piece by piece; raises BrokenError where they end too soon."""
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, HTTPException) as error:
        raise BrokenError(f"the connection broke ({error})") from error
