"""The server: an application of Starlette, run by uvicorn.

The two are what FastAPI and LitServe are made of, and all that two paths with plain JSON need. Ray Serve and LitServe
hand each request to another process, which costs more than a decision does; to decide in batches takes a few lines of
asyncio (`batching`).
"""

from __future__ import annotations

import asyncio
import errno
import hmac
import ipaddress
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from rlsched.agents.serving.batching import Array, Batcher, Engine
from rlsched.agents.serving.traces import Traces
from rlsched.connection import TOKEN
from rlsched.policy import Policy
from rlsched.remote import ABOUT, ACT, MOST_REPORTS, PROTOCOL, Served

MOST_RUNS = 1024  # in a request
NUMBER, REPORT = 32, 16_384  # bytes at most of a number, and of a report, in JSON
SLOW = 10.0  # seconds in which a request has to arrive
GRACE = 5  # seconds that requests in flight have once the server is to end


class PolicyServer:
    """Serves one policy.

    Args:
        policy: which is served; what it remembers has to be a tensor that begins as zeros, or None.
        engine: decides as the policy does.
        most: runs in a batch.
        wait: seconds that the first of a batch waits for others.
        token: that requests have to bring, if there is one.
        traces: where reports are kept, if they are.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Engine,
        *,
        most: int = 256,
        wait: float = 0.002,
        token: str | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.batcher = Batcher(engine, most=most, wait=wait)
        self.traces, self._token = traces, token
        memory = policy.begin((1,))
        self.served = Served(
            protocol=PROTOCOL,
            policy=policy.digest,
            observations=policy.observations,
            controls=policy.controls,
            safe_start=policy.safe_start,
            base_schedule=policy.base_schedule.name,
            memory=0 if memory is None else memory.shape[-1],
            most=MOST_RUNS,
            traces=traces is not None,
        )
        numbers = len(policy.observations) + self.served.memory
        self.most_bytes = NUMBER * MOST_RUNS * numbers + REPORT * MOST_REPORTS
        self._writer = ThreadPoolExecutor(1)  # one after the other, and beside the decisions
        routes = [Route(ABOUT, self._about, methods=["GET"]), Route(ACT, self._act, methods=["POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes, exception_handlers={HTTPException: _refusal}),
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=90,  # a training run may well take a minute from one decision to the next
            timeout_graceful_shutdown=GRACE,
        )
        self._server = uvicorn.Server(config)

    def run(self, listening: socket.socket) -> None:
        """Serve until SIGINT or SIGTERM, which are raised again once what is in flight is done."""
        try:
            self._server.run(sockets=[listening])
        finally:
            self._writer.shutdown()

    def stop(self) -> None:
        """End it as a signal does, from another thread."""
        self._server.should_exit = True

    async def _about(self, request: Request) -> JSONResponse:
        self._authenticate(request)
        counts = {"decisions": self.batcher.decisions, "batches": self.batcher.batches}
        if self.traces is not None:
            counts |= {"reports_kept": self.traces.kept, "reports_dropped": self.traces.dropped}
        return JSONResponse({**self.served._asdict(), **counts})

    async def _act(self, request: Request) -> JSONResponse:
        self._authenticate(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "Content-Type must be application/json")  # which no page of a browser may send
        said = await self._read(request)
        if said.get("policy") != self.served.policy:
            asked, served = str(said.get("policy"))[:12], self.served.policy[:12]
            raise HTTPException(409, f"another policy is served, sha256={served}; the request is of sha256={asked}")
        observations = _numbers("observations", said.get("observations"), len(self.served.observations))
        memory = None
        if self.served.memory:
            memory = _numbers("memory", said.get("memory"), self.served.memory)
            if len(memory) != len(observations):
                raise HTTPException(422, f"memory must be of {len(observations)} runs, got {len(memory)}")
        reports = said.get("reports")
        writing = None
        if self.traces is not None and isinstance(reports, list) and reports:
            writing = asyncio.get_running_loop().run_in_executor(self._writer, self.traces.add, reports[:MOST_REPORTS])
        answer: dict[str, Any] = {"actions": [], "influence": [], "memory": [] if self.served.memory else None}
        if len(observations):
            actions, influence, later = await self.batcher.decide(observations, memory)
            answer = {"actions": actions.tolist(), "influence": influence.tolist()}
            answer["memory"] = None if later is None else later.tolist()
        if writing is not None:
            await writing  # so that what is answered is kept
        return JSONResponse(answer)

    def _authenticate(self, request: Request) -> None:
        if self._token is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            what = "has the wrong token" if given else "brings no token"
            raise HTTPException(401, f"the request {what}: set {TOKEN} to that of the server")

    async def _read(self, request: Request) -> dict[str, Any]:
        async def body() -> bytes:
            content = bytearray()
            async for chunk in request.stream():
                content += chunk
                if len(content) > self.most_bytes:
                    raise too_large
            return bytes(content)

        too_large = HTTPException(413, f"a request has at most {self.most_bytes:,} bytes")
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
            raise too_large
        try:
            said = json.loads(await asyncio.wait_for(body(), SLOW))
        except asyncio.TimeoutError:
            raise HTTPException(408, f"the request did not arrive in {SLOW:g} seconds") from None
        except (ValueError, RecursionError):
            raise HTTPException(400, "the request is not JSON") from None
        if not isinstance(said, dict):
            raise HTTPException(400, f"the request must be a JSON object, got {type(said).__name__}")
        return said


def listen(host: str, port: int, *, has_token: bool) -> socket.socket:
    """A socket that waits for connections.

    Args:
        host: name or address.
        port: 0 for one that is free.
        has_token: whether requests have to bring a token; without one, only this machine may be served.

    Raises:
        ValueError: the port is in use or out of range, the host unknown, or not for a server without a token.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be between 0 and 65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host: {host!r} is not known: {error}") from None
    family, *_, address = found[0]
    if not has_token and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(
            f"--host {host} can be reached from other machines: give a token that requests have to bring, by --token "
            f"or the environment variable {TOKEN}"
        )
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
        raise ValueError(f"--port {port} of {host} {reason}; give another, or 0 for one that is free") from None


def _numbers(name: str, given: Any, width: int) -> Array:
    """Rows of finite numbers."""
    try:
        array = np.array(given, dtype=np.float32) if given else np.zeros((0, width), np.float32)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(0, np.float32)
    if array.ndim != 2 or array.shape[1] != width or len(array) > MOST_RUNS or not isinstance(given, list):
        raise HTTPException(
            422, f"{name} must be a list of at most {MOST_RUNS} lists of {width} numbers, got {_shape(given, array)}"
        )
    if not np.isfinite(array).all():
        raise HTTPException(422, f"{name} must be finite")
    return array


def _shape(given: Any, array: Array) -> str:
    return f"the shape {array.shape}" if array.size else f"{type(given).__name__}"


def _refusal(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    headers = {"Connection": "close"}  # with what is left of the request
    if error.status_code == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": error.detail}, error.status_code, headers)
