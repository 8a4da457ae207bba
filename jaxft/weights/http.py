"""Sends one HTTP request for a range of a file, and classifies its failure for the retry."""

import socket
import ssl
from collections.abc import Iterator
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

TIMEOUT = 30.0  # seconds without any data
_CHUNK_BYTES = 1 << 18
_TRANSIENT_STATUSES = (408, 429, 500, 502, 503, 504)
_LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost")


class TransferError(Exception):
    """A request that did not deliver the whole file.

    Attributes:
      is_permanent: A further request would fail too.
      is_unreachable: The server did not reply at all.
      must_restart: The next request must begin at byte 0.
    """

    def __init__(
        self,
        cause: str,
        *,
        is_permanent: bool = False,
        is_unreachable: bool = False,
        must_restart: bool = False,
    ) -> None:
        super().__init__(cause)
        self.is_permanent = is_permanent
        self.is_unreachable = is_unreachable
        self.must_restart = must_restart


def open_url(url: str, start: int, etag: str | None) -> HTTPResponse:
    """Requests the bytes of a URL from `start` to the end.

    Args:
      url: URL of the file.
      start: First byte.
      etag: ETag of the version that the bytes before `start` belong to. If the file has changed,
        the server sends it from byte 0.

    Raises:
      TransferError: There is no successful reply.
    """
    headers = {"User-Agent": "jaxft"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if etag:
            headers["If-Range"] = etag
    try:
        opener = build_opener(_Redirects)  # per request, because it reads the proxy variables
        return opener.open(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        status = f"(HTTP {error.code} {error.reason})"
        if error.code == 416:
            cause = f"the server cannot resume at byte {start:,} {status}"
            raise TransferError(cause, must_restart=True) from error
        if error.code in _TRANSIENT_STATUSES:
            raise TransferError(f"the server is unavailable {status}") from error
        if error.code in (404, 410):
            cause = f"there is no such file {status}: check the URL"
        elif error.code in (401, 403):
            cause = f"the server refuses access {status}: it may require a login"
        else:
            cause = f"the server does not send the file {status}"
        raise TransferError(cause, is_permanent=True) from error
    except (OSError, HTTPException) as error:
        raise _connection_error(url, error) from error


def _connection_error(url: str, error: Exception) -> TransferError:
    reason = error.reason if isinstance(error, URLError) else error
    host = urlsplit(url).netloc
    if isinstance(reason, socket.gaierror):
        cause = f"the host {host} is not known ({reason}): check the network and the URL"
    elif isinstance(reason, ssl.SSLCertVerificationError):
        cause = (
            f"the certificate of {host} cannot be verified ({reason.verify_message}): behind a "
            "proxy with a private certificate authority, set SSL_CERT_FILE to its certificates"
        )
    elif isinstance(reason, TimeoutError):
        return TransferError(f"{host} did not answer within {TIMEOUT:g} seconds")
    else:
        cause = f"no connection to {host} ({reason})"
    is_transient = isinstance(reason, ConnectionResetError | HTTPException)
    return TransferError(cause, is_unreachable=not is_transient)


class _Redirects(HTTPRedirectHandler):
    """Follows redirects, except from an encrypted to an unencrypted URL."""

    def redirect_request(
        self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any
    ) -> Any:
        """Raises TransferError for an unencrypted URL."""
        if not is_secure(newurl):
            fp.close()
            raise TransferError(
                f"the server redirects to {newurl}, which is not encrypted", is_permanent=True
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_secure(url: str) -> bool:
    """Returns whether a URL is encrypted or on this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL_HOSTS)


def starts_at(response: HTTPResponse, start: int) -> bool:
    """Returns whether a response begins at byte `start` of the file, as requested."""
    content_range = response.headers.get("Content-Range", "")
    return response.status == 206 and content_range.startswith(f"bytes {start}-")


def strong_etag(response: HTTPResponse) -> str | None:
    """Returns the strong ETag, which identifies a version of the file byte for byte."""
    etag = response.headers.get("ETag")
    return None if etag is None or etag.startswith("W/") else etag


def read_chunks(response: HTTPResponse) -> Iterator[bytes]:
    """Yields the body of a response in chunks.

    Raises:
      TransferError: The connection broke.
    """
    try:
        while chunk := response.read(_CHUNK_BYTES):
            yield chunk
    except (OSError, HTTPException) as error:
        raise TransferError(f"the connection broke ({error})") from error
