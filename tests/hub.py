"""A Hugging Face hub on loopback, with faults to order.

Two servers, as in life: the endpoint answers /datasets/<repo>/resolve/main/<name> with a redirect that names
length and sha256 (X-Linked-Size, X-Linked-Etag); the storage that it leads to has the bytes, knows ranges and
validators, and names neither. By hand, for an end-to-end run:

    python tests/hub.py FOLDER      # serves its *.parquet, prints the HF_ENDPOINT to use, until Ctrl-C
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

VAL_SHARD = "shard_06542.parquet"
BLOCK = 2**16


@dataclass
class Fault:
    """What goes wrong with one answer. Fields combine; those left alone leave the answer as it should be."""

    status: int | None = None  # answer this, without a file
    headers: dict = field(default_factory=dict)  # over the right ones; None takes one away
    body: Callable[[bytes], bytes] | None = None  # the file's bytes -> the bytes to serve in their place
    cut: int | None = None  # close the connection after so many bytes of the answer
    reset: bool = False  # and not in an orderly way
    stall: int | None = None  # fall silent after so many bytes of the answer, until the hub closes
    gate: threading.Event | None = None  # answer when this is set
    ignore_range: bool = False  # 200 and the whole file
    ignore_if_range: bool = False  # 206 though the validator is another


class Request(NamedTuple):
    """One request as it came. place is 'endpoint' or 'storage', time that of a monotonic clock in seconds."""

    place: str
    method: str
    name: str
    headers: dict
    time: float


class Hub:
    """`with Hub({"shard_00000.parquet": path}) as hub:` serves the files at hub.endpoint.

    `hub.fail(name, Fault(cut=1000), Fault(status=500))` spoils the storage's next two answers for the name,
    `at="endpoint"` the endpoint's; `always=True` all of them. `hub.etags[name]` sets the storage's validator.
    With `hub.linked = False` the endpoint names no length and no hash, with `hub.direct = True` it serves the
    bytes itself: plain mirrors do both. `hub.requests` is what was asked so far.
    """

    def __init__(self, files: dict[str, Path]):
        self.files, self.etags = files, {}
        self.linked, self.direct = True, False
        self.requests: list[Request] = []
        self.faults: dict[tuple[str, str], list[Fault]] = {}
        self.always: dict[tuple[str, str], Fault] = {}
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.servers = [self._server("endpoint"), self._server("storage")]
        self.endpoint, self.storage = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def __enter__(self):
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering; both ports refuse from now on."""
        if not self.closing.is_set():
            self.closing.set()
            for server in self.servers:
                server.shutdown()
                server.server_close()

    def fail(self, name: str, *faults: Fault, at: str = "storage", always: bool = False) -> None:
        if always:
            self.always[at, name] = faults[0]
        else:
            self.faults.setdefault((at, name), []).extend(faults)

    def seen(self, place: str, name: str | None = None) -> list[Request]:
        return [r for r in list(self.requests) if r.place == place and name in (None, r.name)]

    def _server(self, place: str) -> ThreadingHTTPServer:
        class Handler(_Handler):
            hub = self

        Handler.place = place
        return _Server(("127.0.0.1", 0), Handler)

    def _fault(self, place: str, name: str) -> Fault:
        with self.lock:
            queued = self.faults.get((place, name))
            return queued.pop(0) if queued else self.always.get((place, name), Fault())


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, *args) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no news
            super().handle_error(*args)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    place: str

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        request = Request(self.place, self.command, name, dict(self.headers), time.monotonic())
        self.hub.requests.append(request)
        fault, path = self.hub._fault(self.place, name), self.hub.files.get(name)
        if fault.gate:
            fault.gate.wait()
        with contextlib.suppress(ConnectionError):  # the client may hang up whenever it likes
            if fault.status or path is None:
                self._send(fault.status or 404, {"Content-Length": "0"}, fault)
            elif self.place == "endpoint" and not self.hub.direct:
                self._redirect(name, path, fault)
            else:
                self._serve(name, path, fault)

    do_HEAD = do_GET

    def _send(self, status: int, headers: dict, fault: Fault) -> None:
        self.send_response(status)
        for key, value in (headers | fault.headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()

    def _redirect(self, name: str, path: Path, fault: Fault) -> None:
        headers = {"Location": f"{self.hub.storage}/blobs/{name}?X-Signature=secret", "Content-Length": "0"}
        if self.hub.linked:
            headers["X-Linked-Size"] = str(path.stat().st_size)
            headers["X-Linked-Etag"] = f'"{_sha256(path, path.stat().st_mtime_ns)}"'
        self._send(302, headers, fault)

    def _serve(self, name: str, path: Path, fault: Fault) -> None:
        etag = self.hub.etags.get(name) or f'"{_sha256(path, path.stat().st_mtime_ns)[:32]}"'
        total, start, status = path.stat().st_size, 0, 200
        altered = None
        if fault.body:
            altered = fault.body(path.read_bytes())
            total = len(altered)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = fault.ignore_if_range or self.headers.get("If-Range", etag) == etag
        if asked and current and not fault.ignore_range:
            start, status = int(asked[1]), 206
            if start >= total:
                return self._send(416, {"Content-Range": f"bytes */{total}", "Content-Length": "0"}, fault)
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        headers["Content-Length"] = str(total - start)
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self._send(status, headers, fault)
        if fault.headers.get("Content-Length", "") is None:
            self.close_connection = True  # its end is the end of the body
        if self.command == "HEAD":
            return
        limits = [limit for limit in (fault.cut, fault.stall) if limit is not None]
        left = min([total - start, *limits])
        if altered is not None:
            self.wfile.write(altered[start : start + left])
        else:
            with open(path, "rb") as file:
                file.seek(start)
                while left and (block := file.read(min(left, BLOCK))):
                    self.wfile.write(block)
                    left -= len(block)
        self.wfile.flush()
        if fault.stall is not None:
            self.hub.closing.wait()
        if limits:
            self.close_connection = True
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()


_DIGESTS: dict[tuple[Path, int], str] = {}


def _sha256(path: Path, mtime: int) -> str:
    if (path, mtime) not in _DIGESTS:
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        _DIGESTS[path, mtime] = digest.hexdigest()
    return _DIGESTS[path, mtime]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    files = {path.name: path for path in sorted(folder.glob("*.parquet"))}
    if not files:
        sys.exit(f"{folder} has no *.parquet")
    files.setdefault(VAL_SHARD, files[max(files)])  # the last one, where none bears the name
    with Hub(files) as hub:
        print(f"HF_ENDPOINT={hub.endpoint}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
