"""Policies on the Hub, against a server of our own that speaks what `huggingface_hub` asks."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import lively_policy, network

from rlsched import SchedulePolicy, attach
from rlsched.hub import CARD, POLICY
from rlsched.policy import PolicyFileError

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "somebody/mine"


class Repositories(ThreadingHTTPServer):
    """The Hub: repositories with commits, each of some files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.commits = {}  # of each repository, a list of {name: content}, the last one being its main branch
        self.stored = {}  # large files by their sha256, before they are committed
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def at(self, repository, revision):
        """The number of a commit, or None."""
        commits = self.commits[repository]
        names = {"main": len(commits) - 1} | {sha(repository, i): i for i in range(len(commits))}
        return names.get(revision)


def sha(repository, i):
    """The name of a commit."""
    return hashlib.sha1(f"{repository} {i}".encode()).hexdigest()


class Answers(BaseHTTPRequestHandler):
    """What the Hub answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, code):
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def content(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.server.asked.append((self.command, self.path))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if not found or found[1] not in self.server.commits:
            return self.fail("RepoNotFound")
        number = self.server.at(found[1], found[2])
        if number is None:
            return self.fail("RevisionNotFound")
        files = self.server.commits[found[1]][number]
        headers = {"X_Repo_Commit": sha(found[1], number)}
        if found[3] not in files:
            return self.answer(404, b"", X_Error_Code="EntryNotFound", **headers)
        return self.answer(200, files[found[3]], ETag=f'"{hashlib.sha1(files[found[3]]).hexdigest()}"', **headers)

    do_HEAD = do_GET

    def do_PUT(self):
        content = self.content()
        self.server.stored[hashlib.sha256(content).hexdigest()] = content
        self.answer(200)

    def do_POST(self):
        self.server.asked.append((self.command, self.path))
        server, body = self.server, self.content()
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            status = 409 if name in server.commits else 200
            server.commits.setdefault(name, [])
            return self.answer(status, {"url": f"{server.url}/{name}", "error": "it is there"})
        if found := re.fullmatch(r"/(.+?)\.git/info/lfs/objects/batch", self.path):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{server.url}/put/{o['oid']}"}}} for o in objects]
            return self.answer(200, {"transfer": "basic", "objects": upload})
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("tensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile":
                    files[value["path"]] = server.stored[value["oid"]]
            commits = server.commits[found[1]]
            commits.append(files)
            oid = sha(found[1], len(commits) - 1)
            return self.answer(200, {"commitUrl": f"{server.url}/{found[1]}/commit/{oid}", "commitOid": oid})
        return self.fail("RepoNotFound")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The Hub, which has one policy; the cache is empty, and the user is nobody."""
    server = Repositories()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)  # HF_ENDPOINT is read once, at the import
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between its retries
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    server.commits[NAME] = [{POLICY: lively_policy().content(), "notes.txt": b"of no use"}]
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_policy_comes_from_the_hub_and_then_from_the_cache(hub, monkeypatch):
    """Every run of a cluster would download it again, and none start while the Hub is down."""
    policy = SchedulePolicy.from_pretrained(NAME)
    assert policy.digest == lively_policy().digest
    assert [method for method, path in hub.asked if "/resolve/" in path] == ["HEAD", "GET"]
    asked = len(hub.asked)
    assert SchedulePolicy.from_pretrained(NAME, local_files_only=True).digest == policy.digest
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert SchedulePolicy.load(f"hf://{NAME}").digest == policy.digest
    assert len(hub.asked) == asked


def test_optimizer_takes_the_address_of_a_policy(hub):
    """What can be shared has to be usable by its name, in a loop and on the command line."""
    controller = attach(torch.optim.SGD(network().parameters(), 0.1), total_steps=10, policy=f"hf://{NAME}")
    assert controller.policy.digest == lively_policy().digest


def test_revision_is_the_one_that_was_asked_for(hub):
    """A result could not be repeated after somebody has pushed a better policy."""
    hub.commits[NAME].append({POLICY: lively_policy(seed=5).content()})
    first, last = sha(NAME, 0), lively_policy(seed=5).digest
    assert SchedulePolicy.from_pretrained(NAME).digest == last
    assert SchedulePolicy.from_pretrained(NAME, revision=first).digest == lively_policy().digest
    assert SchedulePolicy.load(f"hf://{NAME}@{first}").digest == lively_policy().digest


def test_another_policy_in_its_place_is_refused(hub):
    """Whoever takes over an account would decide over the training of all who trust it."""
    digest = lively_policy().digest
    for pinned in (digest, f"sha256:{digest}"):
        assert SchedulePolicy.from_pretrained(NAME, digest=pinned).digest == digest
    hub.commits[NAME].append({POLICY: lively_policy(seed=5).content()})
    with pytest.raises(ValueError, match=rf"hf://{NAME} has the digest sha256:{lively_policy(seed=5).digest}, and not"):
        SchedulePolicy.from_pretrained(NAME, digest=digest)
    with pytest.raises(ValueError, match=r"^digest must be 'sha256:' and 64 hexadecimal digits, got 'md5:12'"):
        SchedulePolicy.from_pretrained(NAME, digest="md5:12")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of huggingface_hub's own upload
def test_pushed_policy_comes_back_with_its_card(hub):
    """Nobody could use what was shared, or know what it is."""
    policy = lively_policy(seed=9)
    url = policy.push_to_hub("somebody/new", token="hf_right")
    assert url == f"{hub.url}/somebody/new/commit/{sha('somebody/new', 0)}"
    files = hub.commits["somebody/new"][-1]
    assert files.keys() == {POLICY, CARD}
    card = files[CARD].decode()
    assert card.startswith("---\nlibrary_name: rlsched\n") and policy.digest in card and "weight_decay" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"torch": torch, "model": network()}
    exec(code, names)
    assert names["policy"].digest == policy.digest
    policy.push_to_hub("somebody/new", card="# Mine\n", token="hf_right")
    assert hub.commits["somebody/new"][-1][CARD].decode().endswith("---\n\n# Mine\n")


ABSENT = "somebody/nothing"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"repo_id": ABSENT}, FileNotFoundError, f"policy: hf://{ABSENT}: there is no such repository on"),
        ({"repo_id": "somebody/empty"}, FileNotFoundError, f"policy: hf://somebody/empty has no {POLICY}"),
        ({"repo_id": NAME, "revision": "v9"}, FileNotFoundError, f"policy: hf://{NAME} has no revision 'v9'"),
        ({"repo_id": NAME, "local_files_only": True}, FileNotFoundError, f"policy: hf://{NAME} is not in the cache"),
        ({"repo_id": NAME, "endpoint": "http://127.0.0.1:9"}, FileNotFoundError, "is not in the cache, and http://127"),
        ({"repo_id": "no/such/name"}, ValueError, "policy: a repository is 'user/name', got 'no/such/name'"),
        ({"repo_id": "somebody/broken"}, PolicyFileError, "is not a whole policy file"),
    ],
)
def test_what_cannot_be_had_is_said_in_a_line(hub, arguments, error, message):
    """A page of a foreign library's inside would be all that a user hears of a slip of the pen."""
    hub.commits |= {"somebody/empty": [{"notes.txt": b""}], "somebody/broken": [{POLICY: b"not a policy"}]}
    with pytest.raises(error) as raised:
        SchedulePolicy.from_pretrained(**arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_push_without_a_token_is_said_in_a_line(hub):
    """The Hub's own answer has the address of an interface and an id of the request in it, and no remedy."""
    with pytest.raises(OSError, match=r"^policy: hf://somebody/new: http\S+ refuses") as raised:
        lively_policy().push_to_hub("somebody/new", token="hf_wrong")
    assert "\n" not in str(raised.value) and "token" in str(raised.value)


def test_core_needs_no_hub():
    """A training loop with a policy of its own would need a library for what it does not do."""
    code = "import sys; sys.modules['huggingface_hub'] = None\nfrom rlsched import SchedulePolicy\n"
    code += "SchedulePolicy.load('default')\n"
    code += "try:\n    SchedulePolicy.load('hf://a/b')\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "policy: the Hub needs huggingface_hub: pip install 'rlsched[hub]'\n"
