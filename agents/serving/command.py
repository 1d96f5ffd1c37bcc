"""The verb `serve`: what it takes, and what it says."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext, suppress
from pathlib import Path

NEEDS = ("torch", "rlsched.agents.serving.server")
SERVE = """\
Serve a policy over HTTP, to training runs in other processes and on other machines: they pass policy="http://HOST:PORT"
where they would pass its file. What they ask within a few milliseconds is decided in one call. The server keeps nothing
of a run, and may be restarted at any time: while it is gone, the controls of a run stay where they are, and its lr goes
on along the base schedule. Ctrl-C or SIGTERM end it, when what is in flight is answered.

It listens on this machine alone, unless there is a token, which every request has to bring. The token, like all of the
traffic, is sent as it is: beyond a network that you trust, put a proxy with TLS before it. docs/serve.md has more.

examples:
  rlsched serve default
  rlsched serve runs/mine/policy.safetensors --port 9000 --traces runs/traces
  RLSCHED_TOKEN=$(cat token) rlsched serve default --host 0.0.0.0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    from rlsched.policy import available

    parser.description = SERVE
    shipped = ", ".join(available()) or "none"
    parser.add_argument("policy", help=f"policy file, ONNX file of a policy, or a shipped policy ({shipped})")
    parser.add_argument("--host", default="127.0.0.1", help="name or address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="0 for one that is free (default: %(default)s)")
    parser.add_argument("--token", help="that requests have to bring (default: the environment variable RLSCHED_TOKEN)")
    parser.add_argument(
        "--engine",
        choices=["onnx", "torch"],
        default="onnx",
        help="what decides; for onnx a policy file is exported first, which takes seconds (default: %(default)s)",
    )
    parser.add_argument("--batch", type=int, default=256, help="runs in a batch at most (default: %(default)s)")
    parser.add_argument(
        "--wait", type=float, default=2.0, help="milliseconds that a batch waits for more runs (default: %(default)g)"
    )
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="keep what runs report of their decisions here")
    parser.add_argument(
        "--traces-limit", type=float, default=1000.0, metavar="MB", help="the oldest runs go (default: %(default)g MB)"
    )


def run(options: argparse.Namespace) -> None:
    """Serve until a signal ends it."""
    import torch

    from rlsched.agents.serving.batching import TorchEngine
    from rlsched.agents.serving.server import PolicyServer, listen
    from rlsched.agents.serving.traces import Traces
    from rlsched.connection import TOKEN, is_address
    from rlsched.files import locked
    from rlsched.onnx_policy import OnnxPolicy, load_policy
    from rlsched.policy import SchedulePolicy

    for name, value, at_least in (("batch", options.batch, 1), ("wait", options.wait, 0)):
        if not at_least <= value < float("inf"):
            raise ValueError(f"--{name} must be at least {at_least} and finite, got {value}")
    if not 0.01 <= options.traces_limit < float("inf"):
        raise ValueError(f"--traces-limit must be at least 0.01 MB and finite, got {options.traces_limit}")
    token = options.token if options.token is not None else os.environ.get(TOKEN) or None
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("--token must be printable ASCII characters without spaces")
    if is_address(options.policy):
        raise ValueError(f"policy: {options.policy} is a server already")
    policy = load_policy(options.policy)
    with listen(options.host, options.port, has_token=token is not None) as listening:
        torch.set_num_threads(1)  # the networks are small: more cost more than they give
        if isinstance(policy, SchedulePolicy) and options.engine == "onnx":
            from rlsched.formats import onnx_bytes

            policy = OnnxPolicy(onnx_bytes(policy), name=options.policy)
        engine = policy if isinstance(policy, OnnxPolicy) else TorchEngine(policy)
        with locked(options.traces) if options.traces else nullcontext():
            limit = int(options.traces_limit * 1e6)
            traces = Traces(options.traces, limit, policy) if options.traces else None
            server = PolicyServer(
                policy,
                engine,
                most=options.batch,
                wait=options.wait / 1e3,
                token=token,
                traces=traces,
            )
            host, port = listening.getsockname()[:2]
            place = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"serving {policy!r} at {place}{'' if token is None else ', with a token'}", flush=True)
            with suppress(KeyboardInterrupt):  # the usual end of a server: Ctrl-C, or SIGTERM
                server.run(listening)
            batcher = server.batcher
            print(f"ended after {batcher.decisions:,} decisions in {batcher.batches:,} batches")
            if traces is not None:
                print(f"{options.traces}: {traces.kept:,} decisions reported and kept, {traces.dropped:,} dropped")
