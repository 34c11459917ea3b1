"""A Hugging Face hub on this machine: what its client asks for when it downloads a repository's files."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


class FakeHub:
    """One repository. `files` maps paths to bytes and may be changed; `asked` are the paths of all requests."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo, self.files = repo, files
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET(body=False)

            def do_GET(self, body: bool = True) -> None:
                path = self.path.split("?")[0]
                hub.asked.append(path)
                found = hub.answer(path)
                data, etag = found if found else (b"{}", None)
                self.send_response(200 if found else 404)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-Repo-Commit", COMMIT)
                if etag:
                    self.send_header("ETag", f'"{etag}"')
                else:
                    self.send_header("Content-Type", "application/json")
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path: str) -> tuple[bytes, str | None] | None:
        """Body and ETag of a file; a body alone for what the API tells; None for what is not there."""
        api = f"/api/models/{self.repo}"
        if path.startswith(f"{api}/tree/"):
            entries: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(self.files.items())
            ]
            return json.dumps(entries).encode(), None
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in sorted(self.files.items())]
            return json.dumps({"id": self.repo, "sha": COMMIT, "siblings": siblings}).encode(), None
        place, _, name = path.partition(f"/resolve/{COMMIT}/")
        if place == f"/{self.repo}" and name in self.files:
            return self.files[name], hashlib.sha1(self.files[name]).hexdigest()
        return None

    def close(self) -> None:
        """Stop answering, as if the network were gone."""
        self._server.shutdown()
        self._server.server_close()
