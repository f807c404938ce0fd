"""A hub on this machine: an HTTP server that takes and gives what huggingface_hub sends to huggingface.co."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_double"


class Hub(ThreadingHTTPServer):
    """Models with their files, in memory.

    Attributes:
        repos: files by path, by OWNER/NAME.
        private: names of the repositories that were made so.
        commits: how many there were.
        spoils: a file that is not returned as it came; None: all are.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits, self.spoils = 0, None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """For a process that is to push there."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *given):
        pass

    def say(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def files(self, repo: str) -> dict[str, bytes]:
        return self.server.repos.setdefault(repo, {})

    def do_GET(self):
        path = unquote(urlparse(self.path).path).split("/")[1:]
        if path[:2] == ["api", "whoami-v2"]:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.say({"error": "Invalid user token."}, 401)
            return self.say({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})
        if path[:2] == ["api", "models"]:
            repo, files = "/".join(path[2:4]), self.files("/".join(path[2:4]))
            if path[4:5] == ["tree"]:
                return self.say(
                    [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
                )
            siblings = [{"rfilename": name} for name in files]
            return self.say({"id": repo, "sha": self.sha(), "siblings": siblings, "private": False, "tags": []})
        if path[2:3] == ["resolve"]:
            name = "/".join(path[4:])
            data = self.files("/".join(path[:2])).get(name)
            if data is None:
                return self.say({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            if name == self.server.spoils:
                data = data[:-1] + b"?"
            etag = hashlib.sha256(data).hexdigest()
            return self.say(data, ETag=f'"{etag}"', X_Repo_Commit=self.sha())
        return self.say({"error": "no such route"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        path, body = unquote(urlparse(self.path).path).split("/")[1:], self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and path[0] != "api":
            return self.say({"error": "Invalid user token."}, 401)
        if path[:3] == ["api", "repos", "create"]:
            given = json.loads(body)
            repo = f"{given.get('organization') or 'me'}/{given['name']}"
            self.files(repo)
            if given.get("private") or given.get("visibility") == "private":
                self.server.private.add(repo)
            return self.say({"url": f"{self.server.address}/{repo}", "name": repo, "id": repo})
        if path[:2] == ["api", "validate-yaml"]:
            return self.say({"errors": [], "warnings": []})
        if path[4:5] == ["preupload"]:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return self.say({"files": files})
        if path[1].endswith(".git"):
            objects = [
                {
                    **one,
                    "authenticated": True,
                    "actions": {"upload": {"href": f"{self.server.address}/upload/{one['oid']}", "header": {}}},
                }
                for one in json.loads(body)["objects"]
            ]
            return self.say({"transfer": "basic", "objects": objects})
        if path[4:5] == ["commit"]:
            return self.commit("/".join(path[2:4]), body)
        return self.say({"error": "no such route"}, 404)

    def do_PUT(self):
        body = self.body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.say(b"")

    def commit(self, repo: str, body: bytes):
        for line in body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                self.files(repo)[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            elif told["key"] == "lfsFile":
                self.files(repo)[told["value"]["path"]] = self.server.objects[told["value"]["oid"]]
        self.server.commits += 1
        url = f"{self.server.address}/{repo}/commit/{self.sha()}"
        self.say({"success": True, "commitOid": self.sha(), "commitUrl": url, "hookOutput": ""})

    def sha(self) -> str:
        return f"{self.server.commits:040d}"
