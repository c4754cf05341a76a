"""Fakes the Hugging Face hub on localhost: repos at one commit, and the part of the protocol that its clients use."""

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


def children(files: dict[str, bytes], folder: str) -> list[dict]:
    """Lists the files and folders directly below a folder of a repo."""
    found = {}
    for path, content in files.items():
        if path.startswith(folder and folder + "/"):
            name, *deeper = path.removeprefix(folder).strip("/").split("/")
            child = f"{folder}/{name}".strip("/")
            kind = {"type": "directory", "size": 0} if deeper else {"type": "file", "size": len(content)}
            found[child] = {"path": child, "oid": "0" * 40, **kind}
    return list(found.values())


def lfs(content: bytes) -> dict:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}


class Hub(ThreadingHTTPServer):
    """Serves repos: 'datasets/owner/name' (or 'owner/name' for a model) → path → content.

    break_after n cuts every n-th download short, like a bad connection; 0 cuts none. fault gets each request as 'GET /path'.
    If it returns (body, status, headers), these are the answer.
    """

    def __init__(self, repos: dict[str, dict[str, bytes]], break_after: int, fault: Callable[[str], tuple | None]):
        super().__init__(("127.0.0.1", 0), Request)
        self.repos, self.break_after, self.fault = repos, break_after, fault
        self.requests, self.downloads = [], 0


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, body: bytes, status: int = 200, headers: dict | None = None, send: int | None = None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else body[:send])
            if send is not None:
                self.close_connection = True

    def answer_json(self, content):
        self.answer(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        if refusal := self.server.fault(request):
            return self.answer(*refusal)
        for repo, files in self.server.repos.items():
            api = f"/api/{repo if repo.startswith('datasets/') else 'models/' + repo}"
            if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                siblings = [{"rfilename": name, "lfs": lfs(content)} for name, content in files.items()]
                about = {"id": repo.removeprefix("datasets/"), "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                return self.answer_json(about)
            if path.startswith(f"{api}/tree/{SHA}"):
                return self.answer_json(children(files, path.removeprefix(f"{api}/tree/{SHA}").strip("/")))
            for revision in (SHA, "main"):
                name = path.removeprefix(f"/{repo}/resolve/{revision}/")
                if name != path and name in files:
                    return self.send_file(files[name])
        self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def send_file(self, body: bytes):
        headers = {"ETag": f'"{hash(body) & 0xFFFFFFFF:08x}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        status, send = 200, None
        if "Range" in self.headers:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(body)), len(body) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
            body, status = body[first : last + 1], 206
        if self.command == "GET":
            self.server.downloads += 1
            if self.server.break_after and self.server.downloads % self.server.break_after == 0:
                send = len(body) // 2
        self.answer(body, status, headers, send)


@contextmanager
def serve(repos: dict[str, dict[str, bytes]], break_after: int = 0, fault: Callable[[str], tuple | None] = lambda request: None):
    """Runs a Hub inside the block and yields (url, requests)."""
    hub = Hub(repos, break_after, fault)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{hub.server_port}", hub.requests
    finally:
        hub.shutdown()
        hub.server_close()
