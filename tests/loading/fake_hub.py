"""A hub on this machine: enough of the protocol for ``hf_hub_download``, and a record of what was asked."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

__all__ = ["FakeHub"]


class FakeHub:
    """Serves ``root/<owner>/<name>/<revision>/<file>``; every other request is a 404 with the hub's error code."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str]] = []
        """(method, "owner/name/file") of every request."""
        self.tokens: set[str | None] = set()
        self.status: int | None = None
        """Answer every request of ``broken_methods`` with this status instead."""
        self.error_code = ""
        """The hub's own name of that error."""
        self.broken_methods = ("HEAD", "GET")
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *args: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def folder(self, repo: str, revision: str = "main") -> Path:
        path = self.root / repo / revision
        path.mkdir(parents=True, exist_ok=True)
        return path

    def files(self, method: str = "GET") -> list[str]:
        return [name for how, name in self.asked if how == method]

    def _answer(self, handler: BaseHTTPRequestHandler, body: bool) -> None:
        self.tokens.add(handler.headers.get("authorization"))
        parts = handler.path.strip("/").split("/")
        status, code, data = 404, "RepoNotFound", b""
        if len(parts) == 5 and parts[2] == "resolve":
            owner, name, _, revision, file = parts
            self.asked.append((handler.command, f"{owner}/{name}/{file}"))
            repo = self.root / owner / name
            commits = (
                {self.commit(f"{owner}/{name}", path.name): path for path in repo.iterdir()} if repo.is_dir() else {}
            )
            folder = commits.get(revision, repo / revision)
            if repo.is_dir():
                code = "EntryNotFound" if folder.is_dir() else "RevisionNotFound"
                if folder.is_dir():
                    handler.headers["x-commit"] = self.commit(f"{owner}/{name}", folder.name)
                if (folder / file).is_file():
                    status, code, data = 200, "", (folder / file).read_bytes()
        if self.status is not None and handler.command in self.broken_methods:
            status, code, data = self.status, self.error_code, b""
        handler.send_response(status)
        if code:
            handler.send_header("X-Error-Code", code)
        if handler.headers.get("x-commit"):
            handler.send_header("X-Repo-Commit", handler.headers["x-commit"])
        handler.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if body:
            handler.wfile.write(data)

    def commit(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()
