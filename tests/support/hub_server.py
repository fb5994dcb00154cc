"""A stand-in of the Hugging Face hub on this machine, for its real client: repositories as folders."""

import base64
import functools
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from lightning.fabric.plugins.environments.lightning import find_free_network_port

TOKEN, READER = "hf_of_the_tests", "hf_reader"  # the second one may not write
_CREATE = re.compile(r"/api/repos/create")
_API = re.compile(r"/api/(?:models|datasets)/(?P<repo>[\w.-]+/[\w.-]+)(/(?P<what>\w+)/(?P<revision>[^/]+))?/?")
_FILE = re.compile(r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


class Hub(ThreadingHTTPServer):
    """Keeps every commit of every repository in memory.

    Attributes:
        commits: By repository and branch: the files of each commit, by their names.
        private: Whether a repository is private.
        requests: What was asked for, as method and path.
        down: Whether the hub answers nothing but errors.
        gated: The repositories whose terms nobody has accepted.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", _port()), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.commits, self.private, self.requests, self.down, self.gated = {}, {}, [], False, set()

    def files(self, repo, revision="main"):
        """The files of a branch or commit, by their names; ``None`` where there is none."""
        branches = self.commits[repo]
        by_hash = {sha(files): files for commits in branches.values() for files in commits}
        return branches[revision][-1] if revision in branches else by_hash.get(revision)

    def add(self, repo, files, revision="main", private=False):
        """Make a commit, in a repository that is made if it is not there."""
        self.private.setdefault(repo, private)
        self.commits.setdefault(repo, {}).setdefault(revision, [{}]).append(files)

    @property
    def downloaded(self):
        """The names of the files that were fetched."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


def sha(files):
    """The hash of a commit."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # no connection is kept, and so no thread: other tests fork

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    do_GET = do_POST = do_HEAD

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        if self.server.down:
            self.fail(500)
        elif self.headers.get("Authorization") and not self.is_known:
            self.fail(401, message="Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self.send({})
        elif _CREATE.fullmatch(path):
            self.create(json.loads(body))
        elif found := _API.fullmatch(path) or _FILE.fullmatch(path):
            self.about(body, **found.groupdict())
        else:
            self.fail(404)

    @property
    def is_known(self):
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READER}")

    @property
    def may_write(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self, asked):
        repo = f"{asked['organization']}/{asked['name']}"
        if not self.may_write:
            self.fail(403 if self.is_known else 401)
        else:
            is_new = repo not in self.server.commits
            if is_new:
                private = asked.get("private") or asked.get("visibility") == "private"
                self.server.add(repo, {".gitattributes": b""}, private=private)
            self.send({"url": f"{self.server.address}/{repo}"}, 200 if is_new else 409)

    def about(self, body, repo, revision=None, what=None, name=None):
        hub, revision = self.server, revision or "main"
        if repo not in hub.commits or (hub.private[repo] and not self.is_known):
            self.fail(404 if self.is_known else 401, "RepoNotFound")
        elif repo in hub.gated:
            self.fail(403, "GatedRepo")
        elif self.command == "POST" and not self.may_write:
            self.fail(403)
        elif what == "branch":
            hub.commits[repo].setdefault(revision, list(hub.commits[repo]["main"]))
            self.send({})
        elif (files := hub.files(repo, revision)) is None:
            self.fail(404, "RevisionNotFound")
        elif name is not None:
            self.file(files, name)
        elif what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            self.send({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif what == "commit":
            self.commit(repo, revision, body)
        elif what == "tree":
            self.send([{"type": "file", "path": n, "size": len(c), "oid": sha({n: c})} for n, c in files.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self.send({"id": repo, "sha": sha(files), "private": hub.private[repo], "siblings": siblings})

    def commit(self, repo, revision, body):
        files = dict(self.server.files(repo, revision))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self.server.add(repo, files, revision)
        self.send({"commitUrl": f"{self.server.address}/{repo}/commit/{sha(files)}", "commitOid": sha(files)})

    def file(self, files, name):
        if name not in files:
            self.fail(404, "EntryNotFound")
            return
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(files[name]).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha(files))
        self.finish_with(files[name])

    def send(self, answer, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.finish_with(json.dumps(answer).encode())

    def fail(self, status, code=None, message=None):
        self.send_response(status)
        for name, said in {"X-Error-Code": code, "X-Error-Message": message}.items():
            if said is not None:
                self.send_header(name, said)
        self.finish_with(b"{}")

    def finish_with(self, content):
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


# One port for all tests of this process, because libraries keep clients of their own with the first address.
_port = functools.cache(find_free_network_port)


@contextmanager
def stand_in(monkeypatch, tmp_path):
    """The stand-in, which the client of this process takes for the hub: without files or cache, and logged in."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": url,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no_token"),
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.address)  # of the functions without a client
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
