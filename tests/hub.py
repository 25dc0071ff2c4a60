"""A Hugging Face hub on loopback, with faults to order.

Two servers, as in life. The endpoint answers HEAD /datasets/<repo>/resolve/main/<name> with a redirect that names
commit, length and sha256 (X-Repo-Commit, X-Linked-Size, X-Linked-Etag). The storage behind it has the bytes and knows
ranges.
"""

import contextlib
import hashlib
import re
import sys
import threading
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Fault:
    """What goes wrong with one answer. A field that is not set leaves the answer as it should be."""

    status: int | None = None  # answer this, without a file
    headers: dict = field(default_factory=dict)  # over the right ones; None takes one away
    body: object = None  # function: the file's bytes -> the bytes to serve
    cut: int | None = None  # close the connection after so many bytes
    stall: int | None = None  # fall silent after so many bytes, until the hub closes
    gate: threading.Event | None = None  # answer when this is set


class Hub:
    """`with Hub({"shard_00000.parquet": path}) as hub:` serves the files at hub.endpoint.

    `hub.fail(name, Fault(cut=1000), Fault(status=500))` spoils the storage's next two answers for the name,
    `at="endpoint"` the endpoint's; `always=True` all of them. `hub.requests` has what was asked: (place, method, name,
    headers).
    """

    def __init__(self, files):
        self.files, self.requests, self.faults, self.always = files, [], {}, {}
        self.closing = threading.Event()
        self.servers = [make_server(self, place) for place in ("endpoint", "storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        if not self.closing.is_set():
            self.closing.set()
            for server in self.servers:
                server.shutdown()
                server.server_close()

    close = __exit__

    def fail(self, name, *faults, at="storage", always=False):
        if always:
            self.always[at, name] = faults[0]
        else:
            self.faults.setdefault((at, name), []).extend(faults)

    def next_fault(self, place, name):
        queued = self.faults.get((place, name))
        return queued.pop(0) if queued else self.always.get((place, name), Fault())

    def seen(self, place, name):
        return [headers for where, _, what, headers in self.requests if (where, what) == (place, name)]


def make_server(hub, place):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            name = self.path.split("?")[0].rsplit("/", 1)[-1]
            hub.requests.append((place, self.command, name, dict(self.headers)))
            fault, path = hub.next_fault(place, name), hub.files.get(name)
            if fault.gate:
                fault.gate.wait()
            with contextlib.suppress(ConnectionError):  # the client may hang up at any time
                if not name:  # the hub's own address
                    self.answer(200, {"Content-Length": "0"}, fault)
                elif fault.status or path is None:
                    self.answer(fault.status or 404, {"Content-Length": "0"}, fault)
                elif place == "endpoint":
                    self.redirect(name, path, fault)
                else:
                    self.serve(path, fault)

        do_HEAD = do_GET

        def answer(self, status, headers, fault):
            self.send_response(status)
            for key, value in (headers | fault.headers).items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()

        def redirect(self, name, path, fault):
            headers = {"Location": f"{hub.storage}/blobs/{name}?X-Signature=secret", "Content-Length": "0"}
            headers |= {"X-Repo-Commit": "0" * 40, "X-Linked-Size": str(path.stat().st_size)}
            headers["X-Linked-Etag"] = f'"{sha256_of(path, path.stat().st_mtime_ns)}"'
            self.answer(302, headers, fault)

        def serve(self, path, fault):
            body = path.read_bytes()
            body = fault.body(body) if fault.body else body
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body) - start)}
            if asked:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self.answer(206 if asked else 200, headers, fault)
            limits = [limit for limit in (fault.cut, fault.stall) if limit is not None]
            self.wfile.write(body[start : min([len(body), *(start + limit for limit in limits)])])
            self.wfile.flush()
            if fault.stall is not None:
                hub.closing.wait()
            if limits:
                self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

        def handle_error(self, *_):
            if not isinstance(sys.exc_info()[1], ConnectionError):  # a client was killed
                super().handle_error(*_)

    return Server(("127.0.0.1", 0), Handler)


@cache
def sha256_of(path, mtime):
    return hashlib.sha256(path.read_bytes()).hexdigest()
