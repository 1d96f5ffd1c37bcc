"""A policy that is served: what its runs get, what becomes of them without it, and whom it refuses."""

import copy
import http.client
import http.server
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, suppress

import pytest
import torch
from helpers import assert_same_weights, lively_policy, network, train

from rlsched import OnnxPolicy, RemotePolicy, ScheduledOptimizer, SchedulePolicy
from rlsched.actors import Recurrent
from rlsched.cli import main
from rlsched.connection import TOKEN
from rlsched.decisions import NAME, read
from rlsched.domain import Domain
from rlsched.formats import onnx_bytes
from rlsched.signals import OBSERVATION_NAMES

pytest.importorskip("starlette")
from rlsched.agents.explain.decisions import of_runs
from rlsched.agents.serving.batching import TorchEngine
from rlsched.agents.serving.server import PolicyServer, listen
from rlsched.agents.serving.traces import Traces

STEPS, DECISIONS = 40, 10


def recurrent_policy():
    """One that remembers."""
    actor = Recurrent(len(OBSERVATION_NAMES), 2, (8,))
    generator = torch.Generator().manual_seed(3)
    actor.load_state_dict({k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in actor.state_dict().items()})
    return SchedulePolicy(actor, OBSERVATION_NAMES, ("lr", "momentum"))


def hesitant_policy():
    """One that trusts itself in part."""
    size = len(OBSERVATION_NAMES)
    return lively_policy(domain=Domain(torch.zeros(size), torch.eye(size), torch.tensor(1.5)))


POLICIES = {"perceptron": lively_policy, "recurrent": recurrent_policy}


@contextmanager
def served(policy, port=0, traces=None, engine=None, **options):
    """The address of a server of the policy, in a thread."""
    listening = listen("127.0.0.1", port, has_token=False)
    kept = None if traces is None else Traces(traces, 10**7, policy)
    server = PolicyServer(policy, engine or TorchEngine(policy), traces=kept, **options)
    thread = threading.Thread(target=server.run, args=(listening,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.stop()
        thread.join()
        listening.close()


def scheduled(policy, model, **options):
    """An optimizer with DECISIONS decisions, or one less."""
    inner = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    return ScheduledOptimizer(inner, total_steps=STEPS, decisions=DECISIONS, policy=policy, **options)


def free_port():
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_run_under_a_server_is_the_run_under_the_file(make, tmp_path):
    """The policy that was measured would not be the one that is in use.

    To the bit, through a checkpoint that goes from one to the other; and what the run reports is what it decided.
    """
    policy = make()
    here, there = network(), network()
    expected = train(here, scheduled(policy, here, log_dir=tmp_path / "log"), range(STEPS))
    with served(policy, traces=tmp_path / "traces") as url:
        optimizer = scheduled(url, there)
        hyperparameters = train(there, optimizer, range(20))
        again = scheduled(policy, there)
        again.load_state_dict(optimizer.state_dict())
        back = scheduled(SchedulePolicy.load(url), there)
        back.load_state_dict(again.state_dict())
        hyperparameters += train(there, back, range(20, STEPS))
    assert hyperparameters == expected
    assert_same_weights(here, there)
    counts = [one.controller.policy.answered for one in (optimizer, back)]
    assert sum(counts) == DECISIONS and min(counts) > 0
    parts = [read(folder.parent) for folder in (tmp_path / "traces").glob(f"*/{NAME}")]
    reported = sorted((decision for part in parts for decision in part.groups[""]), key=lambda d: d.step)
    expected = read(tmp_path / "log").groups[""]
    del expected[
        counts[0] - 1
    ]  # the last before the first of them was left, whose report would have come with the next
    assert reported == expected and {part.policy for part in parts} == {policy.digest}


def test_policy_on_onnx_runtime_decides_as_its_file():
    """What is served is another program than what was measured."""
    pytest.importorskip("onnxscript")
    policy = recurrent_policy()
    exported = OnnxPolicy(onnx_bytes(policy))
    observations = torch.randn(5, len(OBSERVATION_NAMES), generator=torch.Generator().manual_seed(8))
    with served(exported, engine=exported) as url:
        remote = RemotePolicy(url)
        assert remote.digest == policy.digest and remote.safe_start is policy.safe_start
        memory = None
        for observation in observations:
            action, later = remote.act(observation, memory)
            expected = policy.act(observation, policy.begin() if memory is None else memory)
            torch.testing.assert_close((action, later), expected, rtol=0, atol=1e-6)
            memory = later


def test_what_runs_ask_at_once_is_decided_at_once():
    """A thousand runs would wait for a thousand calls, or get each other's decisions."""
    policy, runs, answers = recurrent_policy(), 24, {}
    with served(policy, wait=0.05) as url:
        about = http.client.HTTPConnection(url.removeprefix("http://"))

        def work(run):
            remote = RemotePolicy(url)
            for step in range(3):
                generator = torch.Generator().manual_seed(100 * step + run)
                observation = torch.randn(len(policy.observations), generator=generator)
                answers[run, step] = observation, remote.act(observation)

        threads = [threading.Thread(target=work, args=(run,)) for run in range(runs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        about.request("GET", "/")
        said = json.loads(about.getresponse().read())
        about.close()
    assert len(answers) == said["decisions"] == 3 * runs
    assert said["batches"] < runs
    for observation, (action, memory) in answers.values():
        torch.testing.assert_close((action, memory), policy.act(observation, policy.begin()), rtol=0, atol=1e-6)


def test_run_goes_on_without_its_server_and_comes_back_to_it():
    """A run of days would end with a server that is restarted; or wait for it at each decision; or never come back."""
    policy, observation = lively_policy(), torch.ones(len(OBSERVATION_NAMES))
    expected, _ = policy.act(observation)
    with served(policy) as url:
        remote = RemotePolicy(url)
        assert torch.equal(remote.act(observation)[0], expected)
        assert remote.influence(observation) == 1
    with pytest.warns(UserWarning, match="is gone .*: controls stand still"):
        assert not remote.act(observation)[0].any()
    for _ in range(100):  # and no other warning
        assert not remote.act(observation)[0].any()
    assert (remote.answered, remote.missed) == (1, 101)
    assert remote.influence(observation) == 0
    with served(policy, port=int(url.rpartition(":")[2])):
        assert not remote.act(observation)[0].any(), "it asked before the time that it waits"
        end = time.monotonic() + 10
        while not remote.act(observation)[0].any():
            assert time.monotonic() < end
            time.sleep(0.02)
    assert remote.answered == 2


def test_influence_comes_with_the_decision():
    """What is logged of a run would say that the policy trusts itself where it does not."""
    policy, observation = hesitant_policy(), torch.ones(len(OBSERVATION_NAMES))
    with served(policy) as url:
        remote = RemotePolicy(url)
        action, _ = remote.act(observation)
        torch.testing.assert_close(action, policy.act(observation)[0], rtol=0, atol=1e-6)
        expected = policy.influence(observation)
        assert 0 < expected < 1 and float(remote.influence(observation)) == pytest.approx(expected)
        assert remote.influence(observation + 1).isnan()


def test_memory_outlives_a_server_that_is_gone():
    """The policy would have forgotten the run, or remembered what it never saw."""
    policy = recurrent_policy()
    observations = torch.randn(3, len(OBSERVATION_NAMES), generator=torch.Generator().manual_seed(5))
    with served(policy) as url:
        remote = RemotePolicy(url)
        _, memory = remote.act(observations[0], remote.begin())
    with pytest.warns(UserWarning, match="is gone"):
        _, kept = remote.act(observations[1], memory)
    assert torch.equal(kept, memory) and memory.any()
    with served(policy, port=int(url.rpartition(":")[2])):
        action, _ = RemotePolicy(url).act(observations[2], kept)
    assert torch.equal(action, policy.act(observations[2], memory)[0])


def test_server_that_hangs_costs_a_timeout_and_not_one_for_each_decision():
    """A hundred decisions would wait for minutes."""
    policy, observation = lively_policy(), torch.ones(len(OBSERVATION_NAMES))
    with served(policy) as url:
        remote = RemotePolicy(url, timeout=0.3)
        remote.act(observation)
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))):
        start = time.monotonic()
        with pytest.warns(UserWarning, match=r"is gone \(no answer in time\)"):
            for _ in range(50):
                remote.act(observation)
        assert time.monotonic() - start < 0.9


def test_decisions_of_a_fallback_can_be_told_from_the_policys(tmp_path):
    """An explanation would take standing still for what the policy wanted, or refuse the whole run."""
    policy, model = lively_policy(), network()
    with served(policy) as url:
        optimizer = scheduled(url, model, log_dir=tmp_path)
        train(model, optimizer, range(20))
    with pytest.warns(UserWarning, match="is gone"):
        train(model, optimizer, range(20, STEPS))
    remote = optimizer.controller.policy
    assert remote.answered + remote.missed == len(read(tmp_path).groups[""]) == DECISIONS
    assert len(of_runs(policy, [tmp_path]).steps) == remote.answered > 0


def test_copies_ask_on_their_own():
    """A population copies its optimizers; copies that share a connection would read each other's answers."""
    policy, model = lively_policy(), network()
    with served(policy) as url:
        optimizer = scheduled(url, model)
        train(model, optimizer, range(20))
        other, copied = copy.deepcopy((model, optimizer))
        assert train(other, copied, range(20, STEPS)) == train(model, optimizer, range(20, STEPS))
        assert copied.controller.policy.answered == optimizer.controller.policy.answered == DECISIONS


# --- Whom it refuses --------------------------------------------------------------------------------------------------


def asked(url, body=None, **headers):
    """The status and what is said."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request("GET" if body is None else "POST", "/" if body is None else "/act", body, given)
    response = connection.getresponse()
    said = response.status, json.loads(response.read())
    connection.close()
    return said


@pytest.fixture(scope="module")
def address():
    """A server without a token, and the digest of its policy."""
    policy = lively_policy()
    with served(policy) as url:
        yield url, policy.digest


def request(digest, **changed):
    """The body of a request for one decision."""
    return json.dumps({"policy": digest, "observations": [[0.0] * len(OBSERVATION_NAMES)], **changed}).encode()


@pytest.mark.parametrize(
    ("changed", "status", "message"),
    [
        (
            {"observations": [[1.0, 2.0]]},
            422,
            r"observations must be a list of at most 1024 lists of \d+ numbers, got .*\(1, 2\)",
        ),
        ({"observations": [[1.0], [1.0, 2.0]]}, 422, "observations must be a list"),
        ({"observations": "abc"}, 422, "observations must be a list"),
        ({"observations": {"a": 1}}, 422, "observations must be a list"),
        ({"observations": [[float("nan")] * len(OBSERVATION_NAMES)]}, 422, "observations must be finite"),
        ({"observations": [[10**400] * len(OBSERVATION_NAMES)]}, 422, "observations must be"),
        ({"observations": [[0.0] * len(OBSERVATION_NAMES)] * 1025}, 422, "at most 1024"),
        ({"policy": "0" * 64}, 409, "another policy is served"),
        ({"policy": None}, 409, "another policy is served"),
    ],
)
def test_wrong_request_is_refused_in_clear_words(changed, status, message, address):
    """Whoever writes a client of their own would look at a number and guess."""
    url, digest = address
    code, said = asked(url, request(digest, **changed))
    assert code == status
    assert re.search(message, said["error"])


def test_request_of_no_form_or_end_is_refused(address):
    """One client could fill the memory of all; a page in a browser could ask in its user's name."""
    url, digest = address
    assert asked(url, b"{")[0] == 400 and asked(url, b"[]")[0] == 400
    assert asked(url, b"[" * 10_000)[0] == 400
    assert asked(url, request(digest), Content_Type="text/plain")[0] == 415
    assert asked(url, b"x", Content_Length=str(10**12))[0] == 413
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
        head = "POST /act HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        chunk = b"%x\r\n" % 10**6 + b" " * 10**6 + b"\r\n"
        with pytest.raises(OSError):  # closed, long before it has all of it
            for _ in range(100):
                connection.sendall(chunk)
    assert asked(url, request(digest))[0] == 200, "and it serves on"


def test_wrong_token_is_the_users_error_at_once(monkeypatch):
    """Taken for a dead server, it would let a run go on without its policy, to the end."""
    policy, secret = lively_policy(), "s3cret"
    monkeypatch.delenv(TOKEN, raising=False)
    with served(policy, token=secret) as url:
        for token, what in ((None, "brings no token"), ("guess", "has the wrong token"), ("s3cret1", "wrong token")):
            with pytest.raises(ValueError, match=f"^policy: {url} refuses: the request .*{what}.*{TOKEN}"):
                RemotePolicy(url, token=token)
        assert asked(url, request(policy.digest))[0] == 401
        monkeypatch.setenv(TOKEN, secret)
        assert scheduled(url, network()).controller.policy.digest == policy.digest
        assert secret not in repr(RemotePolicy(url))


def test_wrong_shape_is_the_users_error_at_both_ends(address):
    """As above; and an answer about half of what was asked is none."""
    remote = RemotePolicy(address[0])
    size = len(OBSERVATION_NAMES)
    for wrong in (torch.ones(size + 1), torch.ones(()), torch.ones(2, 1)):
        with pytest.raises(ValueError, match=rf"^observation must be a tensor \(.*{size},?\), as http"):
            remote.act(wrong)
    remote.served = remote.served._replace(most=5000)
    with pytest.raises(ValueError, match="refuses: observations must be a list of at most 1024"):
        remote.act(torch.ones(2000, size))


def test_large_population_asks_in_parts(address):
    """What is too large for a request would be refused in the midst of a run."""
    observations = torch.randn(1500, len(OBSERVATION_NAMES), generator=torch.Generator().manual_seed(1))
    action, _ = RemotePolicy(address[0]).act(observations)
    torch.testing.assert_close(action, lively_policy().act(observations)[0], rtol=0, atol=1e-6)


def test_address_of_something_else_is_told():
    """A mistyped port often leads to another server."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever).start()
        with pytest.raises(ValueError, match="not as rlsched serve does"):
            SchedulePolicy.load(f"http://127.0.0.1:{other.server_port}")
        other.shutdown()
    with pytest.raises(ConnectionError, match=r"^policy: no server answers at http://127.0.0.1:.*: Connection refused"):
        SchedulePolicy.load(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["http://", "http://host:port", "http://me:secret@host:80", "http://host:80/?a=b"])
def test_address_that_is_none_is_refused(url):
    """A token in an address ends in every log."""
    with pytest.raises(ValueError, match=r"^policy: a server's address is like http://host:port") as error:
        RemotePolicy(url)
    assert "secret" not in str(error.value)


def test_port_in_use_is_said():
    """The traceback of an event loop names no port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^--port {port} of 127.0.0.1 is in use; give another"):
            listen("127.0.0.1", port, has_token=False)


# --- Traces -----------------------------------------------------------------------------------------------------------


def report(job, step=1, group="", **changed):
    """A decision of a run, as it is reported."""
    decision = {
        "step": step,
        "total_steps": 1000,
        "group": group,
        "loss": 1.0,
        "observation": dict.fromkeys(OBSERVATION_NAMES, 0.0),
        "action": dict.fromkeys(lively_policy().controls, 0.5),
        "influence": 1.0,
        "proposed": {"lr": 0.1},
    }
    return {"job": job, "decision": {**decision, **changed}}


def test_traces_keep_to_their_bound_and_to_their_folder(tmp_path):
    """Users' runs would fill the disk of the server, and a client could write where it likes."""
    policy, folder = lively_policy(), tmp_path / "traces"
    names = [f"{i:032x}" for i in range(40)]
    size = len(json.dumps(report(names[0]))) + 200
    traces = Traces(folder, 12 * size, policy)
    for name in names:
        traces.add([report(name)])
    left = sorted(path.name for path in folder.iterdir())
    assert left == names[-len(left) :] and 5 < len(left) < 20
    assert sum(path.stat().st_size for path in folder.rglob(NAME)) <= 12 * size
    Traces(folder, 3 * size, policy).add([report("f" * 32)])
    assert 1 <= len(list(folder.iterdir())) <= 3 and (folder / ("f" * 32)).is_dir()
    wrong = [report("../../etc"), report("a" * 31), report(names[0], step=-1), report(names[0], action={}), {}, 3, None]
    before = traces.kept
    traces.add(wrong)
    assert (traces.kept, traces.dropped) == (before, len(wrong))
    assert list(tmp_path.iterdir()) == [folder]


def test_report_that_comes_twice_is_one_decision(tmp_path):
    """A server that is killed before it has answered gets the same again."""
    traces = Traces(tmp_path, 10**6, lively_policy())
    for steps in ((1, 2), (2, 3)):
        traces.add([report("a" * 32, step) for step in steps])
    again = Traces(tmp_path, 10**6, lively_policy())
    again.add([report("a" * 32, step) for step in (3, 4)])
    assert [d.step for d in read(tmp_path / ("a" * 32)).groups[""]] == [1, 2, 3, 4]


# --- The command ------------------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported all, once
FORKS.set_forkserver_preload(["rlsched.agents.serving.server", "rlsched.cli"])


def start(*arguments, port):
    """A process that serves, as soon as it does."""
    process = FORKS.Process(target=main, args=(["serve", *map(str, arguments), "--port", str(port)],))
    process.start()
    end = time.monotonic() + 60
    while time.monotonic() < end and process.is_alive():
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return process
        time.sleep(0.02)
    raise AssertionError("it does not serve")


def test_nothing_is_lost_when_the_server_is_killed_and_restarted(tmp_path):
    """Each run gets all of its decisions: the policy's, to the number, or while that is gone those of the fallback."""
    policy, runs, enough = recurrent_policy(), 6, threading.Event()
    file, port = policy.save(tmp_path / "policy.safetensors"), free_port()
    arguments = (file, "--engine", "torch", "--traces", tmp_path / "traces", "--wait", 1)
    decided, errors = {run: [] for run in range(runs)}, []

    def work(run):
        memory, generator = None, torch.Generator().manual_seed(run)
        try:
            remote = RemotePolicy(f"http://127.0.0.1:{port}")
            while not enough.is_set():
                observation = torch.randn(len(policy.observations), generator=generator)
                action, later = remote.act(observation, memory)
                decided[run].append((observation, memory, action, later, remote.answered, remote.missed))
                memory = later
                time.sleep(0.02)
        except BaseException as error:
            errors.append(error)

    def wait(condition):
        end = time.monotonic() + 60
        while not all(of_run and condition(*of_run[-1][-2:]) for of_run in decided.values()):
            assert time.monotonic() < end and not errors
            time.sleep(0.01)

    first = start(*arguments, port=port)
    threads = [threading.Thread(target=work, args=(run,)) for run in range(runs)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            for thread in threads:
                thread.start()
            wait(lambda answered, missed: answered > 10)
            first.kill()
            wait(lambda answered, missed: missed > 5)
            second = start(*arguments, port=port)
            most = max(of_run[-1][-2] for of_run in decided.values())
            wait(lambda answered, missed: answered > most + 10)
        finally:
            enough.set()
            for thread in threads:
                thread.join()
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
    assert not errors and first.exitcode == -signal.SIGKILL and second.exitcode == -signal.SIGKILL
    assert len(said) == runs and all("is gone" in str(each.message) for each in said)
    for of_run in decided.values():
        before = 0
        for i, (observation, memory, action, later, answered, missed) in enumerate(of_run, 1):
            assert answered + missed == i
            memory = policy.begin() if memory is None else memory
            expected = (torch.zeros(2), memory) if missed > before else policy.act(observation, memory)
            torch.testing.assert_close((action, later), expected, rtol=0, atol=1e-6)
            before = missed
        assert before > 5


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_server_and_answers_what_is_in_flight(how, tmp_path):
    """A deployment would cost runs a decision each, or wait until it is killed."""
    policy = lively_policy()
    file = policy.save(tmp_path / "policy.safetensors")
    command = [sys.executable, "-m", "rlsched", "serve", file, "--engine", "torch", "--port", "0", "--wait", "400"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or it would ignore it, begun in the background
    with subprocess.Popen(list(map(str, command)), **pipes) as process:
        signal.signal(signal.SIGINT, before)
        url = process.stdout.readline().split(" at ")[1].strip()
        remote, idle, answers = RemotePolicy(url), RemotePolicy(url), []
        assert idle.digest == policy.digest  # a connection that stays open
        thread = threading.Thread(target=lambda: answers.append(remote.act(torch.ones(len(OBSERVATION_NAMES)))))
        thread.start()
        time.sleep(0.2)
        os.kill(process.pid, how)
        thread.join()
        said, _ = process.communicate(timeout=60)  # a line more, if it had to break off what is open
    assert process.returncode == 0 and said.strip() == "ended after 1 decisions in 1 batches"
    assert remote.answered == 1 and answers[0][0].any()
