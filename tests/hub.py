"""A Hugging Face hub on loopback, with faults to order.

Two servers, as in life. The endpoint answers HEAD /datasets/<repo>/resolve/main/<name> with a redirect that names
commit, length and sha256 (X-Repo-Commit, X-Linked-Size, X-Linked-Etag). The storage behind it has the bytes and knows
ranges.
"""

import contextlib
import hashlib
import re
import threading
from dataclasses import dataclass, field
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What goes wrong with one answer. A field that is not set leaves the answer as it should be."""

    status: int | None = None  # answer this, without a file
    headers: dict = field(default_factory=dict)  # over the right ones
    body: object = None  # function: the file's bytes -> the bytes to serve
    cut: int | None = None  # send so many bytes, then close the connection
    stall: bool = False  # before that, fall silent until the hub closes


class Hub:
    """`with Hub({"shard_00000.parquet": path}) as hub:` serves the files at hub.endpoint.

    `hub.fail(name, Fault(cut=1000))` spoils the storage's next answer for the name, `at="endpoint"` the endpoint's;
    `always=True` all of them. `hub.requests` has what was asked: (place, name, headers)."""

    def __init__(self, files):
        self.files, self.requests, self.faults, self.always = files, [], {}, {}
        self.closing = threading.Event()
        places = ("endpoint", "storage")
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self, place)) for place in places]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    close = __exit__

    def fail(self, name, fault, at="storage", always=False):
        (self.always if always else self.faults)[at, name] = fault

    def seen(self, place, name):
        return [headers for where, what, headers in self.requests if (where, what) == (place, name)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub, place, *connection):
        self.hub, self.place = hub, place
        super().__init__(*connection)  # answers, too

    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        self.hub.requests.append((self.place, name, dict(self.headers)))
        key, path = (self.place, name), self.hub.files.get(name)
        fault = self.hub.faults.pop(key, None) or self.hub.always.get(key, Fault())
        with contextlib.suppress(ConnectionError):  # the client may hang up at any time
            if fault.status or path is None:
                self.answer(fault.status or 404, {"Content-Length": "0"}, fault)
            elif self.place == "endpoint":
                headers = {"Location": f"{self.hub.storage}/blobs/{name}?X-Signature=secret", "Content-Length": "0"}
                headers |= {"X-Repo-Commit": "0" * 40, "X-Linked-Size": str(path.stat().st_size)}
                self.answer(302, headers | {"X-Linked-Etag": f'"{sha256_of(path)}"'}, fault)
            else:
                self.serve(path, fault)

    do_HEAD = do_GET

    def answer(self, status, headers, fault):
        self.send_response(status)
        for key, value in (headers | fault.headers).items():
            self.send_header(key, value)
        self.end_headers()

    def serve(self, path, fault):
        body = path.read_bytes()
        body = fault.body(body) if fault.body else body
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body) - start)}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206 if asked else 200, headers, fault)
        self.wfile.write(body[start:] if fault.cut is None else body[start : start + fault.cut])
        self.wfile.flush()
        if fault.stall:
            self.hub.closing.wait()
        self.close_connection |= fault.cut is not None


@cache
def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
