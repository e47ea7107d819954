"""One HTTP connection to an endpoint that speaks OpenAI's API, kept open from request to request.

The standard library's client takes a sixth of the CPU time of OpenAI's (docs/performance.md), and what is done about
errors is all in this package.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

API_KEY = "OPENAI_API_KEY"  # the environment variable
CONNECT_S = 30.0  # seconds to connect; a longer time-out is for the answer
MAX_BODY = 64 << 20  # bytes; no chat completion is longer
CHUNK = 1 << 16


class NoAnswer(Exception):
    """No usable answer came. `kind` is for counting, such as "time-out"."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind


@dataclass(frozen=True)
class Answer:
    """Status, headers (names in lower case) and body of a response."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Connection:
    """Posts JSON to one address. A thread has its own."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout = urlsplit(url), timeout
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{API_KEY} has characters that no HTTP header can carry")
        self._key = key
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._http: http.client.HTTPConnection | None = None
        self._target = ""  # what paths are appended to

    def post(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Post and wait for the whole response, `timeout` seconds at most.

        Raises:
            NoAnswer: the time is over, or there is no connection, or it breaks.
        """
        deadline = time.monotonic() + self.timeout
        try:
            connection = self._http = self._http or self._connect()
            if connection.sock is None:
                connection.connect()
            sock: Any = connection.sock  # http.client forgets it where the response closes the connection
            sock.settimeout(self.timeout)
            connection.request("POST", self._target + path, json.dumps(body).encode(), self._headers)
            sock.settimeout(_left(deadline))
            response = connection.getresponse()
            content = _read(response, lambda: sock.settimeout(_left(deadline)))
        except NoAnswer:
            self.close()
            raise
        except TimeoutError:
            self.close()
            raise NoAnswer("time-out", f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise NoAnswer("broken connection", f"{type(error).__name__} {error}".strip()) from None
        return Answer(response.status, content, {k.lower(): v for k, v in response.getheaders()})

    def redact(self, text: str) -> str:
        """Take the API key out of what a server says."""
        return text.replace(self._key, "***") if self._key else text

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _connect(self) -> http.client.HTTPConnection:
        """Make the connection's object: direct, or through the proxy that the environment names."""
        is_https, timeout = self.url.scheme == "https", min(CONNECT_S, self.timeout)
        kind = http.client.HTTPSConnection if is_https else http.client.HTTPConnection
        host, self._target = self.url.hostname or "", self.url.path
        proxy = urllib.request.getproxies().get(self.url.scheme, "")
        if not proxy or urllib.request.proxy_bypass(self.url.netloc):
            return kind(host, self.url.port, timeout=timeout)
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        connection = kind(through.hostname or "", through.port or 80, timeout=timeout)
        if is_https:
            connection.set_tunnel(host, self.url.port or 443)
        else:
            self._target = self.url.geturl()
        return connection


def _read(response: http.client.HTTPResponse, before_each: Callable[[], None]) -> bytes:
    """Read a whole body, each part after a call of `before_each`.

    Raises:
        http.client.IncompleteRead: the connection was closed before its end.
        NoAnswer: it is too long.
    """
    length, content = response.length, bytearray()
    while length is None or len(content) < length:
        before_each()
        part = response.read1(CHUNK if length is None else min(CHUNK, length - len(content)))
        if not part:
            break
        content += part
        if len(content) > MAX_BODY:
            raise NoAnswer("too long a body", f"more than {MAX_BODY >> 20} MiB")
    if length is not None and len(content) < length:
        raise http.client.IncompleteRead(bytes(content), length - len(content))
    response.close()  # the next request may go out
    return bytes(content)


def _left(deadline: float) -> float:
    """Return the seconds that are left.

    Raises:
        TimeoutError: none.
    """
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left
