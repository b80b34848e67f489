"""A stand-in for the Hugging Face Hub: it keeps the files of repositories, and knows the calls of huggingface_hub."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            return self._json({"url": f"{self.server.url}/{name}"})
        if found := re.fullmatch(r"/api/models/(.+?/.+?)/preupload/.+", self.path):
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json({"files": [{"path": each["path"], **mode} for each in json.loads(body)["files"]]})
        if found := re.fullmatch(r"/api/models/(.+?/.+?)/commit/[^?]+(\?.*)?", self.path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.repositories[found[1]][value["path"]] = base64.b64decode(value["content"])
            commit = _commit(self.server.repositories[found[1]])
            address = f"{self.server.url}/{found[1]}/commit/{commit}"
            return self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})
        if self.path.startswith("/api/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        return self._missing("EntryNotFound")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": []})
        if found := re.fullmatch(r"/api/models/(.+?/.+?)(/revision/[^/]+|/tree/.+)?", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                return self._missing("RepoNotFound")
            if (found[2] or "").startswith("/tree"):
                return self._json([{"type": "file", "path": n, "size": len(d), "oid": _hash(d)} for n, d in files.items()])
            about = {"id": found[1], "sha": _commit(files), "private": False, "siblings": [{"rfilename": name} for name in files]}
            return self._json({**about, "modelId": found[1], "tags": [], "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/(.+?/.+?)/resolve/[^/]+/(.+)", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                return self._missing("RepoNotFound")
            if found[2] not in files:
                return self._missing("EntryNotFound")
            return self._send(files[found[2]], {"ETag": f'"{_hash(files[found[2]])}"', "X-Repo-Commit": _commit(files)})
        return self._missing("EntryNotFound")

    do_HEAD = do_GET

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str) -> None:
        self._send(b"", {"X-Error-Code": code, "X-Error-Message": "not here"}, 404)

    def _send(self, data: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _hash(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return _hash("".join(f"{name} {_hash(data)}" for name, data in sorted(files.items())).encode())


@contextmanager
def small_hub() -> Iterator[Any]:
    """A server with `url` and `repositories`: the files' content by path, by name of the repository."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.repositories = {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
