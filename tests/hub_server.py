"""The Hugging Face Hub, as much of it as huggingface_hub needs to download a repository, on the loopback."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories {"models/owner/name": {file: bytes}}, and what was asked of them."""

    def __init__(self, repositories):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.served: list[tuple[str, str]] = []  # (file, its Range or "") of each download
        self.cut: dict[str, int] = {}  # file -> bytes after which its next download breaks off
        self.down: set[str] = set()  # files that are not served at all
        self.url = ""

    @property
    def files(self) -> list[str]:
        """The files that were downloaded, or of which a part was."""
        return sorted({file for file, _ in self.served})


@contextmanager
def serve(repositories):
    """A Hub at `url`, for the time of the block."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head=False):
            path = self.path.split("?")[0]
            if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/([^/]+)|/tree/([^/]+))?", path):
                return self._describe(found[1], found[3] or found[4] or "main", tree=bool(found[4]))
            if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self._file(f"{'datasets' if found[1] else 'models'}/{found[2]}", found[4], head)
            self._send(404, {}, b"{}")

        def _describe(self, name, revision, tree):
            files = hub.repositories.get(name)
            if files is None:
                return self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}, b"{}")
            if name in hub.gated and not tree:
                return self._send(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, b"{}")
            if revision not in ("main", "v1", COMMIT):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            siblings = [{"rfilename": entry["path"], "size": entry["size"]} for entry in entries]
            about = {"id": name.partition("/")[2], "_id": "0", "sha": COMMIT, "private": False, "downloads": 0}
            about |= {"likes": 0, "tags": [], "gated": False, "siblings": siblings}
            self._send(200, {}, json.dumps(entries if tree else about).encode())

        def _file(self, name, file, head):
            data = hub.repositories.get(name, {}).get(file)
            if data is None or file in hub.down:
                return self._send(
                    404 if data is None else 410, {"X-Error-Code": "EntryNotFound"} if data is None else {}
                )
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
            if head:
                return self._send(200, headers | {"Content-Length": str(len(data))})
            wanted = self.headers.get("Range", "")
            hub.served.append((file, wanted))
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
            body = data[begin:]
            if (stop := hub.cut.pop(file, None)) is None:
                return self._send(206 if begin else 200, headers, body)
            self._send(200, headers | {"Content-Length": str(len(body))}, body[:stop])
            self.close_connection = True

        def _send(self, status, headers, body=b""):
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
