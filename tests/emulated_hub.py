"""A hub on this machine: answers what huggingface_hub asks for when it creates, writes and reads a repository."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class Hub:
    """The files of each repository, by their paths.

    Attributes:
        address: of the server.
        is_open: whether tokens may write.
    """

    def __init__(self, address: str) -> None:
        self.address, self.is_open = address, True
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()


@contextmanager
def emulated_hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        hub, body = self.server.hub, self._body()
        if not (hub.is_open and self.headers.get("Authorization")):
            return self._reply(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            hub.repos.setdefault(repo, {})
            if wanted.get("private") or wanted.get("visibility") == "private":
                hub.private.add(repo)
            return self._reply(200, {"url": f"{hub.address}/{repo}"})
        if self.path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._reply(200, {"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{hub.address}/{repo}/commit/{COMMIT}"
            return self._reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})
        return self._reply(404, {"error": "not emulated"})

    def do_GET(self) -> None:
        hub, parts = self.server.hub, self.path.partition("?")[0].split("/")
        if len(parts) < 3:  # is there a hub?
            return self._reply(200, b"")
        if parts[1:3] == ["api", "models"]:
            repo = "/".join(parts[3:5])
            known = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.repos.get(repo, {})]}
            return self._reply(200, known) if repo in hub.repos else self._missing("RepoNotFound")
        repo, revision, name = "/".join(parts[1:3]), parts[4], "/".join(parts[5:])
        if repo not in hub.repos:
            return self._missing("RepoNotFound")
        if revision not in ("main", COMMIT):
            return self._missing("RevisionNotFound")
        if name not in hub.repos[repo]:
            return self._missing("EntryNotFound")
        content = hub.repos[repo][name]
        return self._reply(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET

    def _missing(self, what: str) -> None:
        self._reply(404, b"", **{"X-Error-Code": what})

    def _reply(self, code: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
