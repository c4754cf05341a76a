"""A stand-in for the Hugging Face hub on localhost: repos at one commit, as much of the protocol as its clients use."""

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


def children(files: dict[str, bytes], folder: str) -> list[dict]:
    """Files and folders right below a folder of a repo."""
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


@contextmanager
def serve(repos: dict[str, dict[str, bytes]], break_after: int = 0, fault: Callable[[str], tuple | None] = lambda request: None):
    """Yields (url, requests). repos: 'datasets/owner/name' or, for a model, 'owner/name' → path → content.
    break_after: every such n-th download is cut short, as by a bad line. fault: asked at each request, 'GET /path'; the
    (body, status, headers) that it gives are the answer."""
    requests, downloads = [], []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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

        def answer_json(self, content, status: int = 200):
            self.answer(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            if refusal := fault(requests[-1]):
                return self.answer(*refusal)
            for repo, files in repos.items():
                api = f"/api/{repo if repo.startswith('datasets/') else 'models/' + repo}"
                if path in (api, f"{api}/revision/main", f"{api}/revision/{SHA}"):
                    siblings = [{"rfilename": name, "lfs": lfs(content)} for name, content in files.items()]
                    return self.answer_json(
                        {"id": repo.removeprefix("datasets/"), "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                    )
                if path.startswith(f"{api}/tree/{SHA}"):
                    return self.answer_json(children(files, path.removeprefix(f"{api}/tree/{SHA}").strip("/")))
                for revision in (SHA, "main"):
                    name = path.removeprefix(f"/{repo}/resolve/{revision}/")
                    if name != path and name in files:
                        return self.send_file(files[name])
            self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})

        do_HEAD = do_GET

        def send_file(self, body):
            headers = {"ETag": f'"{hash(body) & 0xFFFFFFFF:08x}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
            status = 200
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                first, last = int(first), min(int(last or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
                body, status = body[first : last + 1], 206
            if self.command == "GET":
                downloads.append(len(body))
            broken = break_after and self.command == "GET" and len(downloads) % break_after == 0
            self.answer(body, status, headers, send=len(body) // 2 if broken else None)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
