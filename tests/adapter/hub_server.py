"""A local stand-in of the hub's HTTP API: creates repositories and receives one commit."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


class Hub:
    """The state of a local stand-in of the hub with one repository, and the requests it received.

    `created`: bodies of requests to create the repository. `validated`: cards that were checked.
    `large`: SHA-256 -> content of files uploaded by LFS. `files`: path -> content of each committed
    file. `status`: HTTP status with which the server answers a commit. `exists`: whether the
    repository exists before it is created. `is_private`: its visibility.
    """

    def __init__(self):
        self.created, self.files, self.large, self.validated = [], {}, {}, []
        self.status = 200
        self.exists = self.is_private = False
        self.address = ""


@contextmanager
def local_hub():  # noqa: C901 - a branch for each endpoint
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, value, status=200):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def body(self):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self):
            if "/tree/" in self.path:
                files = [{"type": "file", "path": path, "oid": "0" * 40, "size": 1}
                         for path in hub.files]  # fmt: skip
                self.answer(files)
            else:
                card = hub.files.get("README.md", b"").decode()
                tags = re.findall("^- (.*)$", card, re.MULTILINE)
                self.answer({"sha": "0" * 40, "id": "org/name", "private": hub.is_private,
                             "siblings": [{"rfilename": path} for path in hub.files],
                             "tags": tags})  # fmt: skip

        def do_PUT(self):
            content = self.body()
            hub.large[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def do_POST(self):  # noqa: C901 - a branch for each endpoint
            data = self.body()
            if self.path.endswith("/repos/create"):
                repository = json.loads(data)
                hub.created.append(repository)
                if not hub.exists:
                    is_private = repository.get("visibility") == "private"
                    hub.is_private = repository.get("private") or is_private
                status = 409 if hub.exists else 200
                self.answer({"url": f"{hub.address}/org/name"}, status)
            elif self.path.endswith("/validate-yaml"):
                hub.validated.append(json.loads(data)["content"])
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(data)["files"]
                modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular"
                         for f in files}  # fmt: skip
                self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False}
                                       for p, m in modes.items()]})  # fmt: skip
            elif self.path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{hub.address}/put/{o['oid']}"}}}
                    for o in json.loads(data)["objects"]
                ]  # fmt: skip
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in self.path and hub.status == 200:
                for line in data.splitlines():
                    item = json.loads(line)
                    if item["key"] == "file":
                        content = base64.b64decode(item["value"]["content"])
                        hub.files[item["value"]["path"]] = content
                    elif item["key"] == "deletedFile":
                        del hub.files[item["value"]["path"]]
                    elif item["key"] == "lfsFile":
                        hub.files[item["value"]["path"]] = hub.large[item["value"]["oid"]]
                self.answer({"commitUrl": f"{hub.address}/org/name/commit/1", "commitOid": "1",
                             "success": True})  # fmt: skip
            else:
                self.answer({"error": "refused"}, hub.status if hub.status != 200 else 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
