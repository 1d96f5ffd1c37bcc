"""A connection to the server of a policy, which is kept from one request to the next."""

from __future__ import annotations

import http.client
import json
import os
import threading
from typing import Any
from urllib.parse import urlsplit

TOKEN = "RLSCHED_TOKEN"  # environment variable with the token, of client and server


class RefusedError(ValueError):
    """The server answers, and does not want what it was asked: another token, another policy, a wrong shape."""


class _Http(http.client.HTTPConnection):
    """Closed when nobody has it any more."""

    def __del__(self) -> None:
        self.close()


class _Https(http.client.HTTPSConnection):
    """The same."""

    def __del__(self) -> None:
        self.close()


class Connection:
    """Requests and answers in JSON; each thread and process that asks has a connection of its own.

    Args:
        url: `http://host:port` or `https://…`, with a path or without.
        token: sent with each request, if there is one.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: the URL is none.
    """

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        is_plain = not (parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or not is_plain:
            shown = "one with a user in it" if parts.username else repr(url)
            raise ValueError(f"policy: a server's address is like http://host:port, got {shown}; a token is in {TOKEN}")
        self._kind = _Https if parts.scheme == "https" else _Http
        self._url, self._place, self._timeout = url, (parts.hostname, port), timeout
        self._path, self._token = parts.path.rstrip("/"), token
        self._own = threading.local()

    def exchange(self, method: str, path: str, request: Any = None) -> dict[str, Any]:
        """What the server answers.

        Raises:
            RefusedError: it refuses the request.
            OSError, http.client.HTTPException: it gives no answer in time, or one that cannot be read.
        """
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        body = None if request is None else json.dumps(request).encode()
        connection: http.client.HTTPConnection | None = None
        if getattr(self._own, "process", None) == os.getpid():  # a fork must not share it
            connection = self._own.connection
        try:
            if connection is not None and connection.sock is not None:
                try:
                    return self._exchange(connection, method, path, body, headers)
                except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                    connection.close()  # by the server, as it does after a while without requests: asked anew
            connection = self._kind(*self._place, timeout=self._timeout)
            self._own.process, self._own.connection = os.getpid(), connection
            return self._exchange(connection, method, path, body, headers)
        except RefusedError:
            raise
        except BaseException:
            if connection is not None:
                connection.close()
            raise

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
    ) -> dict[str, Any]:
        connection.request(method, self._path + path, body, headers)
        response = connection.getresponse()
        content, status = response.read(1 << 26), response.status
        try:
            said = json.loads(content)
        except ValueError:
            said = None
        if status >= 500:
            raise http.client.HTTPException(f"it answers {status} {response.reason}")
        if status != 200 or not isinstance(said, dict):
            reason = said.get("error") if isinstance(said, dict) else None
            told = (
                f"refuses: {reason}" if reason else f"answers {status} {response.reason}, and not as rlsched serve does"
            )
            raise RefusedError(f"policy: {self._url} {told}")
        return said

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _own=threading.local())


def is_address(policy: Any) -> bool:
    """Whether this names a server."""
    return isinstance(policy, str) and policy.startswith(("http://", "https://"))
