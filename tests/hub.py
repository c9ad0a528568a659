"""A stand-in for the Hub: serves checkpoint folders over HTTP on this machine, and logs what was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serve repositories of the Hub's API that snapshot_download uses.

    Attributes:
        repos: id to folder.
        gated: ids that ask for a token.
        revisions: branches and commits that exist.
        downloads: paths whose content was sent, as "repo/file".
        cut_after: bytes of a weight file after which the connection breaks.
    """

    def __init__(self, repos: dict[str, Path], gated: dict[str, str] | None = None):
        self.repos = repos
        self.gated = gated or {}
        self.revisions = {"main", "v1", COMMIT}
        self.downloads: list[str] = []
        self.cut_after: int | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                if "Content_Length" not in headers:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                url = urlparse(self.path)
                parts = unquote(url.path).strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                repo = "/".join(parts[2:4] if api else parts[:2])
                if repo not in hub.repos:
                    self.answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
                    return
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if hub.gated.get(repo, token) != token:
                    self.answer(401, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
                    return
                revision = parts[5] if api and len(parts) > 5 else (parts[3] if not api else "main")
                if revision not in hub.revisions:
                    self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
                    return
                files = sorted(p.relative_to(hub.repos[repo]) for p in hub.repos[repo].rglob("*") if p.is_file())
                if api and "tree" in parts:
                    entries = [
                        {
                            "type": "file",
                            "path": file.as_posix(),
                            "size": (hub.repos[repo] / file).stat().st_size,
                            "oid": hashlib.sha1(file.as_posix().encode()).hexdigest(),
                        }
                        for file in files
                    ]
                    self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")
                elif api:
                    info = {
                        "id": repo,
                        "sha": COMMIT,
                        "private": False,
                        "tags": [],
                        "downloads": 0,
                        "siblings": [{"rfilename": file.as_posix()} for file in files],
                    }
                    self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                else:
                    file = Path(*parts[4:])
                    if file not in files:
                        self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
                        return
                    content = (hub.repos[repo] / file).read_bytes()
                    if self.command == "GET":
                        hub.downloads.append(f"{repo}/{file.as_posix()}")
                    body = content[: hub.cut_after] if file.suffix == ".safetensors" else content
                    self.close_connection = len(body) < len(content)
                    self.answer(
                        200,
                        body,
                        Content_Length=str(len(content)),
                        ETag=f'"{hashlib.sha1(content).hexdigest()}"',
                        X_Repo_Commit=COMMIT,
                        Accept_Ranges="bytes",
                    )

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Hub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
