"""A Hub for tests: a local server that answers the requests of huggingface_hub and stores what it gets."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_SesameSesameSesameSesame"
READER = "hf_ReaderReaderReaderReader"
LFS_FROM = 1000
"""Files of at least so many bytes are uploaded by LFS, and so are all weights."""
PART = 20_000
"""Larger files are uploaded in parts of this size."""


class Repo:
    """A repository: branches, each a list of commits; a commit is a message and all files of the tree."""

    def __init__(self, private):
        self.private = private
        self.branches = {"main": [("initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})]}

    def sha(self, branch="main"):
        return hashlib.sha1(f"{branch} {len(self.branches[branch])}".encode()).hexdigest()

    def tree(self, revision):
        """All files of a branch or a commit; None if it does not exist."""
        for name, commits in self.branches.items():
            if revision in (name, self.sha(name)):
                return commits[-1][1]
        return None

    def files(self, branch="main"):
        return {path: data for path, data in self.branches[branch][-1][1].items() if path != ".gitattributes"}

    def messages(self, branch="main"):
        return [message for message, _ in self.branches[branch][1:]]


class Hub:
    """The server. `faults` maps a pattern of "METHOD path" to a status, "hang", "drop", "echo" or a function that is called."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: dict[str, object] = {}
        self.created: list[dict] = []
        self.cards: dict[str, dict] = {}
        self.lfs = True
        self.ending = threading.Event()
        hub = self

        class Handler(Answers):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.ending.set()
        self.server.shutdown()
        self.server.server_close()

    def matching_requests(self, pattern):
        return [line for line in self.requests if re.search(pattern, line)]


def oid_of(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Answers(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def answer(self, method):
        hub = self.server_hub
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self._chunk, b""))
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        line = f"{method} {url.path}"
        hub.requests.append(line)
        for pattern, fault in hub.faults.items():
            if re.search(pattern, line):
                if fault == "hang":
                    hub.ending.wait()
                if fault in ("hang", "drop"):
                    self.close_connection = True
                    return
                if callable(fault):
                    fault = fault()
                if fault == "echo":
                    self.respond({"error": f"what is {self.headers.get('Authorization')}?"}, 400)
                    return
                if fault:
                    self.respond({"error": f"a fault of {line}"}, fault)
                    return
        for verb, pattern, handle, needs_token in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and method in verb:
                given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                if needs_token and given not in (TOKEN, READER):
                    self.respond({"error": "Invalid credentials in Authorization header"}, 401)
                elif needs_token == "write" and given != TOKEN:
                    self.respond({"error": "You don't have the rights to do this"}, 403)
                else:
                    handle(self, hub, *map(unquote, found.groups()))
                return
        self.respond({"error": f"no such route: {line}"}, 404)

    def _chunk(self):
        size = int(self.rfile.readline().strip() or b"0", 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def respond(self, value, status=200, headers=None):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if isinstance(value, dict) and "error" in value:
            self.send_header("X-Error-Message", value["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, name):
        found = self.server_hub.repos.get(name)
        if found is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        return found

    def tree(self, name, revision):
        repo = self.repo(name)
        if repo is None:
            return None
        if repo.tree(revision) is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RevisionNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return repo.tree(revision)


def whoami(self, hub):
    self.respond({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})


def create(self, hub):
    request = json.loads(self.body)
    name = f"{request['organization'] or 'me'}/{request['name']}"
    answer = {"url": f"{hub.url}/{name}", "name": name, "id": "0"}
    if request["organization"] == "theirs":
        self.respond({"error": 'You don\'t have the rights to create a model under the namespace "theirs"'}, 403)
    elif name in hub.repos:
        self.respond({"error": "You already created this model repo", **answer}, 409)
    else:
        hub.created.append(request)
        hub.repos[name] = Repo(request.get("visibility") == "private")
        self.respond(answer)


def auth_check(self, hub, name):
    if self.repo(name) is not None:
        self.respond({})


def info(self, hub, name, revision="main"):
    if name in hub.cards:
        self.respond({"id": name, "cardData": hub.cards[name], "siblings": [], "tags": [], "private": False})
        return
    tree = self.tree(name, revision)
    if tree is not None:
        sha = self.repo(name).sha(revision)
        self.respond({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in tree], "tags": [], "private": False})


def listing(self, hub, name, revision):
    tree = self.tree(name, revision)
    if tree is not None:
        self.respond([{"type": "file", "path": path, "size": len(data), "oid": oid_of(data)} for path, data in tree.items()])


def branch(self, hub, name, new):
    repo = self.repo(name)
    if repo is not None:
        if new in repo.branches:
            self.respond({"error": "Reference already exists"}, 409)
        else:
            repo.branches[new] = list(repo.branches["main"])
            self.respond({})


def validate(self, hub):
    content = json.loads(self.body)["content"]
    head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    try:
        data = yaml.safe_load(head[1]) if head else {}
        errors = [] if isinstance(data, dict) else ["no mapping"]
    except yaml.YAMLError as error:
        errors = [str(error)]
    self.respond({"errors": [{"message": text} for text in errors], "warnings": []}, 400 if errors else 200)


def preupload(self, hub, name, revision):
    tree = self.tree(name, revision)
    if tree is None:
        return
    answers = []
    for file in json.loads(self.body)["files"]:
        sample = base64.b64decode(file["sample"])
        assert len(sample) == min(512, file["size"])
        lfs = hub.lfs and (file["path"].endswith(".safetensors") or file["size"] >= LFS_FROM)
        old = tree.get(file["path"])
        oid = None if old is None else hashlib.sha256(old).hexdigest() if lfs else oid_of(old)
        answers.append({"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    self.respond({"files": answers})


def lfs_batch(self, hub, name):
    request = json.loads(self.body)
    assert request["operation"] == "upload"
    objects = []
    for item in request["objects"]:
        oid, size = item["oid"], item["size"]
        if oid in hub.blobs:
            objects.append({"oid": oid, "size": size})
            continue
        upload = {"href": f"{hub.url}/storage/{oid}?X-Amz-Signature=topsecret"}
        if size > PART:
            count = -(-size // PART)
            urls = {str(number): f"{hub.url}/storage/{oid}/{number}?X-Amz-Signature=topsecret" for number in range(1, count + 1)}
            upload = {"href": f"{hub.url}/complete/{oid}", "header": {"chunk_size": str(PART), **urls}}
        verify = {"href": f"{hub.url}/verify/{oid}"}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    self.respond({"transfer": "basic", "objects": objects})


def store(self, hub, oid):
    if hashlib.sha256(self.body).hexdigest() != oid:
        self.respond({"error": "the content is not that of its name"}, 400)
        return
    hub.blobs[oid] = self.body
    self.respond({})


def store_part(self, hub, oid, number):
    hub.parts[f"{oid}/{number}"] = self.body
    self.respond({}, headers={"ETag": hashlib.md5(self.body).hexdigest()})


def complete(self, hub, oid):
    data = b"".join(hub.parts[f"{oid}/{part['partNumber']}"] for part in json.loads(self.body)["parts"])
    assert hashlib.sha256(data).hexdigest() == oid
    hub.blobs[oid] = data
    self.respond({})


def verify(self, hub, oid):
    self.respond({}, 200 if len(hub.blobs[oid]) == json.loads(self.body)["size"] else 400)


def commit(self, hub, name, revision):
    tree = self.tree(name, revision)
    if tree is None:
        return
    files, message = dict(tree), ""
    for line in self.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            message = value["summary"]
        elif item["key"] == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = base64.b64decode(value["content"])
        elif item["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif item["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise AssertionError(item["key"])
    hub.repos[name].branches[revision].append((message, files))
    oid = hub.repos[name].sha(revision)
    self.respond({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}", "hookOutput": ""})


def resolve(self, hub, name, revision, path):
    tree = self.tree(name, revision)
    if tree is None:
        return
    if path not in tree:
        self.respond({"error": "Entry not found"}, 404)
        return
    data = tree[path]
    self.respond(
        data,
        headers={
            "ETag": f'"{oid_of(data)}"',
            "X-Repo-Commit": self.repo(name).sha(revision) if revision in self.repo(name).branches else revision,
        },
    )


NAME = r"([\w.-]+/[\w.-]+)"
MODEL = rf"/api/models/{NAME}"
ROUTES = [
    ("GET", r"/api/whoami-v2", whoami, "read"),
    ("POST", r"/api/repos/create", create, "write"),
    ("POST", r"/api/validate-yaml", validate, None),
    ("GET", rf"{MODEL}/auth-check/write", auth_check, "write"),
    ("GET", rf"{MODEL}/revision/([^/]+)", info, None),
    ("GET", rf"{MODEL}/tree/([^/]+)", listing, None),
    ("GET", MODEL, info, None),
    ("POST", rf"{MODEL}/branch/([^/]+)", branch, "write"),
    ("POST", rf"{MODEL}/preupload/([^/]+)", preupload, "write"),
    ("POST", rf"{MODEL}/commit/([^/]+)", commit, "write"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", lfs_batch, "write"),
    ("PUT", r"/storage/(\w+)", store, None),
    ("PUT", r"/storage/(\w+)/(\d+)", store_part, None),
    ("POST", r"/complete/(\w+)", complete, None),
    ("POST", r"/verify/(\w+)", verify, "write"),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", resolve, None),
]
