"""The fixed half of the harness: data, tokenizer, token files, loader, clock and metric.

    uv run prepare.py                     download climbmix, train the tokenizer, tokenize (once per machine)
    uv run prepare.py --corpus source     the same from the Python source on this machine, no download
    uv run prepare.py --corpus DIR        the same from your own .parquet, .jsonl or .txt files

The way of the data: corpus files → BPE ranks → token files + manifest → packed batches → bits per byte.
Nobody edits this file during research: its own bytes are part of the fingerprint under which numbers compare.
`train.py` imports from here; nothing here imports `train.py`.
"""

import argparse
import base64
import contextlib
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from array import array
from bisect import bisect_left, insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain, islice, pairwise, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import tiktoken
import torch
import torch.nn.functional as F
import urllib3
from tqdm import tqdm
from urllib3.util import Retry

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither: there, don't start two prepare.py at once
    fcntl = resource = None

IMPORTED_AT = time.monotonic()

# -----------------------------------------------------------------------------
# Constants

LAYOUT = 1  # of the cache; a cache of another layout is refused

SCALES = {  # what `--scale` stands for; each value has an option that overrides it
    "full": dict(seq_len=2048, time_budget=300, vocab_size=8192, eval_tokens=40 * 524_288),
    "laptop": dict(seq_len=256, time_budget=60, vocab_size=2048, eval_tokens=2**18),
}

# GPT-4's split, but at most two digits a token: a small vocabulary has none to spare for numbers.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]  # the first opens every document
TOKENIZER_CHARS = 100_000_000  # text the tokenizer learns from; twice as much compresses no better
TOKENIZER_DOC_CHARS = 10_000  # of one document, so that no long one dominates

DOCUMENT_CHARS = 4_000  # .txt and source files are cut into documents of about this length
SOURCE_VAL_SHARE = 0.05  # of the bytes of `--corpus source`
BUFFER_DOCS = 1_000  # documents a row is packed from
PREFETCH = 3  # batches made ahead

CAUSALITY_ROWS = 64  # validation rows on which the model's causality is checked, each at a place of its own
CAUSALITY_ROWS_AT_ONCE = 16  # of a batch: their logits are kept for the comparison
CAUSALITY_TOLERANCE = 1e-3  # logits; a leak under it is worth less than the noise of a seed
SCORED_AT_ONCE = 8  # rows of logits that are read together: fewer take more calls, more take more memory
RUN_GRACE = 300  # seconds beyond the budget that a run has until its first batch, before the watchdog ends it
END_GRACE = 240  # seconds beyond the budget that it has from there on


class PrepareError(Exception):
    """What the user can mend: one line that says what was got, what was wanted and which command mends it."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code  # exit status: 2 for an impossible option or corpus, else 1


class EvaluationError(Exception):
    """The model breaks the contract of `evaluate_bpb`; there is no number for it."""


# -----------------------------------------------------------------------------
# The cache


def cache_dir():
    """The folder of everything prepared, `~/.cache/autoresearch` unless AUTORESEARCH_CACHE names another."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").expanduser()


def digest(path, chunk=1 << 24, most=256):
    """sha256 over the sha256s of a file's 16 MiB chunks, as hex; over 4 GiB, of an even sample of them.

    Chunked so that every core helps: each run checks its whole cache before it trains.
    """
    size = os.path.getsize(path)
    count = -(-size // chunk)

    def part(i):
        with open(path, "rb") as f:
            f.seek(i * chunk)
            return hashlib.sha256(f.read(chunk)).digest()

    picked = range(count) if count <= most else sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(part, picked))
    return hashlib.sha256(b"".join([str(size).encode(), *parts])).hexdigest()


@contextlib.contextmanager
def written(path):
    """A binary file that appears under `path` whole or not at all: under another name until it is on disk."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def cache_lock(cache):
    """One prepare.py at a time in one cache; a second waits. The lock goes with its process, kill -9 included."""
    with open(cache / ".lock", "w") as f:
        try:
            if fcntl:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another prepare.py is at work in this cache: waiting for it to end", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


def readable(path):
    """Is there such a file? Raises PrepareError if there may be one that this user may not read."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise PrepareError(f"{path} can't be read ({error.strerror}): mend that, or set AUTORESEARCH_CACHE") from error
    return True


def _self_digest(manifest):
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@cache
def load_manifest(folder):
    """What is in force in the cache: constants, files with their digests, the options that made it.

    Raises PrepareError for a cache that is missing, half-made, of another layout or damaged.
    """
    path = folder / "manifest.json"
    if not readable(path):
        if (folder / "tokenizer" / "tokenizer.pkl").exists():
            raise PrepareError(f"{folder} was made by an older layout of this project: run `uv run prepare.py`")
        raise PrepareError(
            f"nothing is prepared in {folder}: run `uv run prepare.py` (without GPU or download: --corpus source)"
        )
    try:
        manifest = json.loads(path.read_bytes())
        layout = manifest["layout"]
        whole = manifest["digest"] == _self_digest(manifest)
    except (ValueError, KeyError, TypeError):
        layout = whole = None
    if not whole:
        raise PrepareError(f"{path} is damaged: run `uv run prepare.py` again, with the options you used before")
    if layout != LAYOUT:
        raise PrepareError(f"{folder} has layout {layout}, this prepare.py wants {LAYOUT}: run `{manifest['command']}`")
    return manifest


@cache
def open_cache(folder):
    """The manifest, after every file that it names has been found whole. Raises PrepareError otherwise."""
    manifest = load_manifest(folder)
    for entry in manifest["files"].values():
        path = folder / entry["name"]
        state = "missing" if not readable(path) else "damaged" if digest(path) != entry["digest"] else None
        if state:
            raise PrepareError(f"{path} is {state}: run `{manifest['command']}` to make it again")
    return manifest


def __getattr__(name):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE and SCALE: as prepared, read when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE", "SCALE"):
        return load_manifest(cache_dir())["constants"][name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint():
    """12 hex digits over this file, the constants, the tokenizer and the validation tokens.

    Two values of val_bpb compare only where it is the same.
    """
    manifest = open_cache(cache_dir())
    # Line endings aside, so that a checkout on another system is the same harness.
    code = Path(__file__).read_bytes().replace(b"\r\n", b"\n")
    files = [manifest["files"][kind]["digest"] for kind in ("tokenizer", "val_tokens", "val_offsets")]
    parts = json.dumps([hashlib.sha256(code).hexdigest(), manifest["constants"], files], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:12]


PROGRESS_SECONDS = 10  # between two lines of progress where nobody watches


class _Lines:
    """A stream for tqdm that turns each redraw of the bar into a whole line."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


def progress(total: int, desc: str, unit: str, initial: int = 0) -> tqdm:
    """A bar on stderr; where that is no terminal, a line every PROGRESS_SECONDS.

    `with progress(len(docs), "tokenize", "doc") as bar: bar.update(n)`. Counts are scaled: 1.2M.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, initial=initial, unit_scale=True, dynamic_ncols=True)
    line = "{desc}: {percentage:.0f}%, {n_fmt}{unit} of {total_fmt}{unit}, {rate_fmt}, {remaining} left"
    return tqdm(total=total, desc=desc, unit=unit, initial=initial, unit_scale=True, bar_format=line,
                file=_Lines(sys.stderr), mininterval=PROGRESS_SECONDS, delay=PROGRESS_SECONDS, miniters=1)  # fmt: skip


# -----------------------------------------------------------------------------
# Corpus: which files, and the documents in them


@dataclass
class Corpus:
    """Files in reading order, training and validation. `note` says in a phrase what they are."""

    train: list
    val: list
    note: str
    skip_unreadable: bool = False  # other people's source files may be in any encoding
    skipped: set = field(default_factory=set)
    counts: dict = None

    def identity(self, files):
        """Hex key of a list of files: another file, name, size or time of change is another key."""
        lines = [f"{path}\t{path.stat().st_size}\t{path.stat().st_mtime_ns}" for path in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def documents(self, files):
        """The non-empty documents (str) of the files, one after another. Raises PrepareError for a broken file."""
        for path in files:
            for text in self.file_documents(path):
                if text.strip():
                    yield text

    def file_documents(self, path):
        read = {".parquet": read_parquet, ".jsonl": read_jsonl}.get(path.suffix, read_text)
        try:
            yield from read(path)
        except UnicodeDecodeError as error:
            if not self.skip_unreadable:
                raise PrepareError(f"{path} is not UTF-8 ({error.reason} at byte {error.start})", 2) from error
            self.skipped.add(path)
        except (OSError, pa.ArrowException) as error:
            if self.skip_unreadable:
                self.skipped.add(path)
                return
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PrepareError(f"{path} can't be read ({reason})", 2) from error

    def check(self):
        """{"train": documents, "val": documents}, empty ones included. Raises PrepareError that names broken files."""
        if self.counts is None:
            counts, broken = {"train": 0, "val": 0}, []
            for split, files in (("train", self.train), ("val", self.val)):
                for path in files:
                    try:
                        if path.suffix == ".parquet":
                            counts[split] += open_parquet(path).metadata.num_rows
                        else:
                            counts[split] += sum(1 for _ in self.file_documents(path))
                    except PrepareError as error:
                        broken.append(str(error))
                    except (OSError, pa.ArrowException):
                        broken.append(f"{path} is not a whole parquet file")
            if broken:
                more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
                raise PrepareError("; ".join(broken[:5]) + more + ": mend or remove, then run again", 2)
            self.counts = counts
        return self.counts


def open_parquet(path):
    """A ParquetFile with a `text` column of strings; PrepareError if it has none."""
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if "text" not in names:
        raise PrepareError(f"{path} has no column `text` (it has: {', '.join(names)})", 2)
    kind = file.schema_arrow.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise PrepareError(f"{path}: its column `text` holds {kind}, not strings", 2)
    return file


def read_parquet(path):
    with open_parquet(path) as file:
        for batch in file.iter_batches(columns=["text"], batch_size=256):
            yield from (text or "" for text in batch.column(0).to_pylist())


def read_jsonl(path):
    with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise PrepareError(f'{path} line {number} is not a JSON object with a string under "text"', 2)
            yield text


def read_text(path):
    """The file's text cut into documents of about DOCUMENT_CHARS, at blank lines where there are any.

    A row takes a document whole or its beginning: of a book in one piece, only the first page would be seen.
    """
    text = path.read_text(encoding="utf-8-sig")
    start = 0
    while len(text) - start > 1.5 * DOCUMENT_CHARS:
        low, high = start + DOCUMENT_CHARS // 2, start + DOCUMENT_CHARS
        cut = max(text.rfind("\n\n", low, high), text.rfind("\n", low, high) if "\n\n" not in text[low:high] else -1)
        cut = cut if cut >= 0 else high
        yield text[start:cut]
        start = cut
    yield text[start:]


def hash_order(name):
    return hashlib.sha256(name.encode()).digest()


def source_corpus():
    """Python source on this machine: standard library and installed packages, `.py` files that are UTF-8.

    Packages are taken for validation in the order of a hash of their name while their files stay within 5 % of the
    total, whole packages only. Files too come in the order of a hash, so that a short run sees something of each.
    """
    packages = {}  # name -> [(path below its root, path, size)]
    for root in dict.fromkeys(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")):
        for folder, subfolders, names in os.walk(root):
            # site-packages may lie within the standard library's folder: it is a root of its own
            subfolders[:] = sorted(set(subfolders) - {"__pycache__", "site-packages", "dist-packages"})
            for name in names:
                path = Path(folder, name)
                if path.suffix == ".py" and path.is_file():
                    below = path.relative_to(root).as_posix()
                    package = below.split("/")[0].removesuffix(".py")
                    packages.setdefault(package, []).append((below, path, path.stat().st_size))
    sizes = {name: sum(size for _, _, size in files) for name, files in packages.items()}
    room, val_names = SOURCE_VAL_SHARE * sum(sizes.values()), set()
    for name in sorted(packages, key=hash_order):
        if 0 < sizes[name] <= room:
            val_names.add(name)
            room -= sizes[name]

    def in_order(names):
        files = chain.from_iterable(packages[name] for name in names)
        return [path for below, path, _ in sorted(files, key=lambda entry: hash_order(entry[0]))]

    train, val = in_order(set(packages) - val_names), in_order(val_names)
    note = f"Python source: {len(train):,} files of {len(packages) - len(val_names):,} packages to train on"
    note += f", {len(val):,} files of {len(val_names):,} other packages to validate on"
    return Corpus(train, val, note, skip_unreadable=True)


def folder_corpus(folder):
    """The user's own files, sub-folders included; the last in name order is validation."""
    if not folder.is_dir():
        raise PrepareError(f"--corpus {folder}: no such folder (known names: climbmix, source)", 2)
    kinds = (".parquet", ".jsonl", ".txt")
    files = sorted(
        (path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if len(files) < 2:
        raise PrepareError(
            f"--corpus {folder} holds {len(files)} file(s) of {', '.join(kinds)}; it takes two or more, the last in "
            "name order is validation: split your text into several files",
            2,
        )
    files = [path.resolve() for path in files]
    return Corpus(files[:-1], files[-1:], f"{folder}: {len(files) - 1} training file(s), validation {files[-1].name}")


def climbmix_corpus(folder, num_shards, workers):
    """The first `num_shards` training shards of climbmix (-1: all) and VAL_SHARD, downloaded where they are missing."""
    count = LAST_SHARD if num_shards == -1 else num_shards
    names = [f"shard_{i:05d}.parquet" for i in range(count)] + [VAL_SHARD]
    download_shards(names, folder, workers)
    paths = [folder / name for name in names]
    return Corpus(paths[:-1], paths[-1:], f"climbmix: {count:,} training shard(s), validation {VAL_SHARD}")


# -----------------------------------------------------------------------------
# Download: a shard stands under its own name only when it is whole and verified
#
#   <name>                what was verified
#   <name>.partial        what has come so far; survives Ctrl-C and kill -9
#   <name>.partial.json   which file on the hub the partial belongs to
#   verified.jsonl        what was verified when, so that no start hashes again
# One process at a time: prepare.py holds the cache's lock.

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
VAL_SHARD = f"shard_{LAST_SHARD:05d}.parquet"  # pinned: never trained on
CONNECT_SECONDS = 10
STALL_SECONDS = 30  # a stream without a byte for so long counts as broken
PROBE_SECONDS = 12  # a machine without network is told after this at the latest
RETRIES = 7  # in a row without progress; with the pauses below, two minutes
PAUSE_SECONDS = 1.0  # doubled each time, plus as much at random
MAX_PAUSE_SECONDS = 300  # for Retry-After; the hub counts its rate limits over five minutes
MAX_DAMAGES = 2  # downloads thrown away: one begun from a bad partial, one for bad luck
MAX_SHARD_BYTES = 2**32  # no shard of climbmix comes near: a mirror that names more is wrong
MAX_REDIRECTS = 5
CHUNK_BYTES = 2**16

HTTP_MEANING = {
    401: "HTTP 401: a token is asked for, or HF_TOKEN is not valid",
    403: "HTTP 403: refused to this HF_TOKEN or this address",
    404: "HTTP 404: not there; is HF_ENDPOINT a full mirror?",
}
NETWORK_CURE = "check network, proxy (HTTPS_PROXY) and mirror (HF_ENDPOINT); `--corpus source` needs no network"
NOT_TRIED = f"not tried, as the hub can no longer be reached: {NETWORK_CURE}"
NETWORK_ERRORS = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError,
                  urllib3.exceptions.HTTPError)  # fmt: skip


class ShardError(Exception):
    """Why a shard can't be had."""


class TryAgain(Exception):
    """A failure that may pass. wait: seconds that the server asked for; progress: it brought bytes."""

    def __init__(self, reason: str, wait: float | None = None, progress: bool = False):
        super().__init__(reason)
        self.wait, self.progress = wait, progress


class Damaged(Exception):
    """Bytes that are not the shard's."""


def why(error: BaseException) -> str:
    """The innermost cause in one short printable line (the outer ones carry signed URLs)."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def refuse(answer: requests.Response) -> None:
    """Raise TryAgain or ShardError unless the answer is a file, a part of one or a redirect."""
    status = answer.status_code
    if status in (408, 429) or status >= 500:
        wait = None
        with contextlib.suppress(ValueError, OverflowError, urllib3.exceptions.HTTPError):
            wait = Retry().get_retry_after(answer.raw)
        raise TryAgain(f"HTTP {status}", wait)
    if answer.is_redirect:
        return
    if status not in (200, 206):
        raise ShardError(HTTP_MEANING.get(status, f"HTTP {status}"))
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        raise ShardError("a web page came instead: this network's log-in page, or a wrong HF_ENDPOINT")


class Remote(NamedTuple):
    """Where a shard's bytes are and what they must be. sha256 is None where the hub names none."""

    url: str
    size: int
    sha256: str | None


class Hub(requests.Session):
    """The endpoint, asked by one thread. Proxies and netrc are requests' own business."""

    def __init__(self):
        super().__init__()
        self.endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
        self.token = os.environ.get("HF_TOKEN", "").strip()
        if not re.fullmatch(r"https?://\S+", self.endpoint):
            raise PrepareError(f"HF_ENDPOINT is {self.endpoint!r}, and must begin with http:// or https://")
        if not re.fullmatch(r"[!-~]*", self.token):
            raise PrepareError("HF_TOKEN has characters that no token has: copy it again, or unset it")
        if self.token:
            self.auth = self.authorize
        self.max_redirects = MAX_REDIRECTS
        self.headers["Accept-Encoding"] = "identity"  # lengths and ranges are to be those of the file

    def authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Runs for every request: the token is for the endpoint's scheme, host and port, and no other."""
        endpoint = requests.Request("GET", self.endpoint).prepare().url  # normalised, as request.url is
        if urlsplit(request.url)[:2] == urlsplit(endpoint)[:2]:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request

    def ask(self, url: str) -> requests.Response:
        return self.head(url, allow_redirects=False, timeout=(CONNECT_SECONDS, STALL_SECONDS))

    def url(self, name: str) -> str:
        return f"{self.endpoint}/datasets/{REPO}/resolve/main/{name}"

    def unreachable(self, name: str) -> str | None:
        """Why nothing at all can be reached, or None; within PROBE_SECONDS.

        In a thread, because name resolution and a host of many addresses heed no time-out.
        """

        def probe() -> str | None:
            for _ in range(2):
                try:
                    self.ask(self.url(name))
                    return None
                except (requests.RequestException, ValueError) as error:
                    reason = why(error)
            return reason

        try:
            with ThreadPool(1) as pool:
                return pool.apply_async(probe).get(PROBE_SECONDS)
        except multiprocessing.TimeoutError:
            return f"no answer in {PROBE_SECONDS} s"

    def resolve(self, name: str) -> Remote:
        """Ask what the shard is. The endpoint's redirect names size and hash, the storage behind it neither.

        Raises TryAgain, ShardError and what requests raises.
        """
        url, size, etag = self.url(name), None, ""
        for _ in range(MAX_REDIRECTS):
            answer = self.ask(url)
            refuse(answer)
            size = size or answer.headers.get("X-Linked-Size")
            etag = etag or answer.headers.get("X-Linked-Etag", "")
            if not answer.is_redirect:  # a plain mirror
                size = size or answer.headers.get("Content-Length")
                break
            url = urljoin(url, self.get_redirect_target(answer))
            if size:
                break
        if not re.fullmatch("[0-9]{1,12}", size or "") or not 0 < int(size) <= MAX_SHARD_BYTES:
            raise ShardError("the server names no usable length for it")
        sha256 = re.fullmatch('(?:W/)?"?([0-9a-fA-F]{64})"?', etag)
        return Remote(url, int(size), sha256 and sha256[1].lower())


def sha256_of(path: Path) -> str:
    """64 hex digits"""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_shard(path: Path, remote: Remote) -> str:
    """The sha256 of a file that is the shard; raises Damaged for one that isn't."""
    if (size := path.stat().st_size) != remote.size:
        raise Damaged(f"{size:,} bytes instead of {remote.size:,}")
    if (digest := sha256_of(path)) != (remote.sha256 or digest):
        raise Damaged("its sha256 is not the one that the hub names")
    try:
        with open_parquet(path) as parquet:
            if not remote.sha256:  # decoding is all that is left to find damage in the middle
                for _ in parquet.iter_batches(columns=["text"]):
                    pass
    except PrepareError:
        raise Damaged("a parquet file without a column `text` of strings") from None
    except (pa.ArrowException, OSError, ValueError):
        raise Damaged("not a readable parquet file") from None
    return digest


def remember(path: Path, digest: str) -> None:
    """Note that path was verified, in one append: a torn line costs one check more, and no other line."""
    stat = path.stat()
    line = json.dumps([path.name, stat.st_size, stat.st_mtime_ns, digest])
    with open(path.parent / "verified.jsonl", "ab") as file:
        file.write(f"\n{line}\n".encode())


def remembered(folder: Path) -> dict[str, tuple[int, int, str]]:
    """name -> (bytes, mtime in ns, sha256) of what was verified. Lines that make no sense are passed over."""
    records = {}
    with contextlib.suppress(OSError):
        for line in (folder / "verified.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                name, size, mtime, digest = json.loads(line)
                records[name] = size, mtime, digest
    return records


def is_verified(path: Path, records: dict) -> bool:
    """Is path what was verified? Hashed only where its time is another, as in a copied cache."""
    size, mtime, digest = records.get(path.name, (None, None, None))
    if not path.is_file() or path.stat().st_size != size:
        return False
    if path.stat().st_mtime_ns != mtime:
        if sha256_of(path) != digest:
            return False
        remember(path, digest)
    return True


class Shard:
    """One shard that is not known to be good: looked up, then fetched, by one thread at a time.

    `problem` says why the last step failed, or is None. `have` counts bytes that are here, `damages` the
    downloads thrown away.
    """

    def __init__(self, name: str, folder: Path, stop: threading.Event):
        self.name, self.path, self.stop = name, folder / name, stop
        self.partial, self.note = folder / f"{name}.partial", folder / f"{name}.partial.json"
        self.problem: str | None = NOT_TRIED
        self.good = self.warned = False
        self.have = self.damages = 0
        self.bar: tqdm | None = None

    def say(self, text: str) -> None:
        if not self.stop.is_set():
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)

    def count(self, have: int) -> None:
        if self.bar:
            with self.bar.get_lock():  # update() reads, then writes
                self.bar.update(have - self.have)
        self.have = have

    def persist(self, step) -> None:
        """step(self), again after growing pauses while it fails in ways that may pass. Sets `problem`."""
        pause = PAUSE_SECONDS
        fresh = retry = Retry(RETRIES, backoff_factor=pause, backoff_jitter=pause, backoff_max=60)
        while not self.stop.is_set():
            unreachable = False
            try:
                with Hub() as self.hub:
                    step(self)
                self.problem = None
                return
            except TryAgain as error:
                failure = error
            except NETWORK_ERRORS as error:
                failure, unreachable = TryAgain(why(error)), True
            except ShardError as error:
                self.problem = str(error)
                return
            except (OSError, ValueError) as error:  # a full disk; requests' other errors: bad addresses
                self.problem = why(error)
                return
            if not self.warned:
                self.say(f"{failure}; trying again")
                self.warned = True
            try:
                retry = (fresh if failure.progress else retry).increment(error=failure)
            except urllib3.exceptions.MaxRetryError:
                self.problem = f"{failure}, {RETRIES + 1} times in a row"
                if unreachable and Hub().unreachable(self.name):
                    self.stop.set()  # the other shards need not find out for themselves
                return
            self.stop.wait(min(failure.wait or retry.get_backoff_time(), MAX_PAUSE_SECONDS))

    def look(self) -> None:
        """Ask the hub what the shard is; a file of this name that is already here stays if it is that."""
        self.remote = self.hub.resolve(self.name)
        if self.path.exists():
            try:
                remember(self.path, check_shard(self.path, self.remote))
                self.good = True
                return
            except Damaged as error:
                self.say(f"{error}; fetching it again")
                self.path.unlink()
        self.have, _ = self.resume_point()

    def resume_point(self) -> tuple[int, str]:
        """(bytes of the partial that are the remote file's, its storage's ETag); (0, '') to start again.

        Only a strong ETag is a validator for a range; without one the hub's sha256 must vouch for the whole.
        """
        try:
            size, sha256, etag = json.loads(self.note.read_bytes())
            strong = etag if re.fullmatch('"[!#-~]*"', etag) else ""
            have = self.partial.stat().st_size
        except (OSError, ValueError, TypeError, RecursionError):
            return 0, ""
        same = [size, sha256] == [self.remote.size, self.remote.sha256] and have <= size
        return (have, strong) if same and (strong or sha256) else (0, "")

    def receive(self) -> None:
        """Append to the partial what it lacks, or start it again.

        Raises TryAgain where the stream ends early, Damaged where it is not the rest of this file.
        """
        start, validator = self.resume_point()
        headers = {"Range": f"bytes={start}-"} if start else {}
        if validator:
            headers["If-Range"] = validator
        timeout = CONNECT_SECONDS, STALL_SECONDS
        with self.hub.get(self.remote.url, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code == 416:
                raise Damaged("the server has fewer bytes than are here")
            refuse(answer)
            etag = answer.headers.get("ETag", "")
            if answer.status_code == 200:
                start = 0
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise Damaged("the server sends another range than was asked for")
            elif validator and etag not in ("", validator):
                raise Damaged("the file changed on the server meanwhile")
            left = self.remote.size - start
            if answer.headers.get("Content-Length", str(left)) != str(left):
                raise Damaged(f"the server's length is not the {self.remote.size:,} bytes that the hub names")
            cut = "the connection was closed"
            with open(self.partial, "ab") as file:
                if not start:
                    file.truncate(0)  # before the note, or old bytes would lie under the new note
                    self.note.write_text(json.dumps([self.remote.size, self.remote.sha256, etag]))
                self.count(start)
                try:
                    for chunk in answer.raw.stream(CHUNK_BYTES, decode_content=False):
                        if self.stop.is_set():
                            raise ShardError("stopped")
                        if self.have + len(chunk) > self.remote.size:
                            raise Damaged(f"more than the {self.remote.size:,} bytes that the hub names")
                        file.write(chunk)
                        self.count(self.have + len(chunk))
                except urllib3.exceptions.HTTPError as error:
                    cut = why(error)
        if self.have < self.remote.size:
            progress = self.have - start > self.remote.size / 100  # less: a trickle could keep us for ever
            reason = f"cut off at {self.have:,} of {self.remote.size:,} bytes ({cut})"
            raise TryAgain(reason, progress=progress)

    def fetch(self) -> None:
        """One attempt at making the shard present and verified under its name."""
        self.remote = self.hub.resolve(self.name)  # each time: addresses of the storage expire
        try:
            if self.resume_point()[0] < self.remote.size:
                self.receive()
            digest = check_shard(self.partial, self.remote)
        except Damaged as error:
            self.partial.unlink(missing_ok=True)
            self.count(0)
            self.damages += 1
            if self.damages > MAX_DAMAGES:
                raise ShardError(f"{error}, {self.damages} times: a bad mirror or proxy?") from None
            raise TryAgain(str(error)) from None
        with open(self.partial, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut can leave the name without the bytes
        os.replace(self.partial, self.path)
        self.note.unlink(missing_ok=True)
        remember(self.path, digest)


def in_parallel(step, shards, workers):
    """step(shard) for every shard, each as often as `persist` sees fit. Ctrl-C stops all and passes through.

    The pool's threads are daemons: one that still waits for a byte dies with the process.
    """
    try:
        with ThreadPool(max(1, min(workers, len(shards)))) as pool:
            for _ in pool.imap_unordered(lambda shard: shard.persist(step), shards):
                pass
    except BaseException:
        shards[0].stop.set()  # one event for all
        raise


def require_space(folder: Path, to_fetch: int, shards: int) -> None:
    """Raise PrepareError unless the disk holds what is to be fetched and all token files. In bytes.

    The token files take about as much as all their shards.
    """
    need, free = to_fetch + shards, shutil.disk_usage(folder).free
    if free < need:
        raise PrepareError(
            f"{folder} has {free / 1e9:.1f} GB free and needs {need / 1e9:.1f} GB ({to_fetch / 1e9:.1f} GB "
            f"of shards, {shards / 1e9:.1f} GB of token files): free some, ask for fewer shards "
            "(--num-shards), or take another disk (AUTORESEARCH_CACHE=/path)"
        )


def go_on_hint(names: list[str], folder: Path) -> str:
    """How to go on with the shards that are there, of the training shards those before the first gap."""
    records = remembered(folder)
    if not is_verified(folder / VAL_SHARD, records):
        return ""
    training = (is_verified(folder / name, records) for name in names if name != VAL_SHARD)
    there = len(list(takewhile(bool, training)))
    return f" To go on with what is here: the same command with --num-shards {there}" if there else ""


def failure_report(failed: list[Shard], names: list[str], folder: Path) -> PrepareError:
    """One line: which shards, why, and what to do."""
    by_problem: dict[str, list[str]] = {}
    for shard in failed:
        by_problem.setdefault(shard.problem, []).append(shard.name)
    parts = []
    for problem, group in by_problem.items():
        more = f" and {len(group) - 4} more" if len(group) > 4 else ""
        parts.append(f"{', '.join(group[:4])}{more} ({problem})")
    return PrepareError(
        f"{len(failed)} of {len(names)} shards could not be fetched: {'; '.join(parts)}. "
        f"What has come stays: the same command goes on from there.{go_on_hint(names, folder)}"
    )


def download_shards(names, folder, workers):
    """Make every shard of `names` present and verified in `folder`; PrepareError says why not.

    What was verified before costs no request, no hash and no write. Ctrl-C leaves partials for the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records, stop = remembered(folder), threading.Event()
    shards = [Shard(name, folder, stop) for name in names if not is_verified(folder / name, records)]
    if not shards:
        return
    hub = Hub()
    if reason := hub.unreachable(shards[0].name):
        hint = go_on_hint(names, folder)
        raise PrepareError(f"cannot reach {hub.endpoint} ({reason}): {NETWORK_CURE}.{hint}")
    in_parallel(Shard.look, shards, workers)
    missing = [shard for shard in shards if not (shard.problem or shard.good)]
    if missing:
        total, here = sum(shard.remote.size for shard in missing), sum(shard.have for shard in missing)
        present = sum((folder / name).stat().st_size for name in names if (folder / name).exists())
        require_space(folder, total - here, total + present)
        with progress(total, "download", "B", here) as bar:
            for shard in missing:
                shard.bar, shard.problem = bar, NOT_TRIED
            in_parallel(Shard.fetch, missing, workers)
    if failed := [shard for shard in shards if shard.problem]:
        raise failure_report(failed, names, folder)


# -----------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """Byte-level BPE: trained with rustbpe, run by tiktoken, kept as plain ranks.

    Every text round-trips, NULs and the spelling of special tokens included (they are ordinary text here), with one
    exception: a lone surrogate is no character and becomes U+FFFD.

    >>> tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [b"ab"])
    >>> tokenizer.encode("abc"), tokenizer.decode([256, 99])
    ([256, 99], 'abc')
    """

    def __init__(self, ranks):  # ranks: list of bytes, a token's place is its id; special tokens follow
        self.ranks = ranks
        specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.encoding = tiktoken.Encoding(
            "autoresearch",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=specials,
        )
        self.bos_token_id = specials[SPECIAL_TOKENS[0]]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn `vocab_size` tokens, special ones included, from an iterator of str; fewer if the text has no more."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(map(well_formed, texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        pairs = sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])
        return cls([bytes(token) for token, _ in pairs])

    @classmethod
    def from_directory(cls, folder=None):
        """The prepared tokenizer. Raises PrepareError where the cache is not whole."""
        return load_tokenizer(Path(folder or cache_dir()))

    @classmethod
    def load(cls, path):
        return cls([base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()])

    def save(self, path):
        """One line a token, `base64 rank`: tiktoken's own format, so that loading executes nothing."""
        with written(path) as f:
            for rank, token in enumerate(self.ranks):
                f.write(b"%s %d\n" % (base64.b64encode(token), rank))

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def get_bos_token_id(self):
        return self.bos_token_id

    def encode(self, text, prepend=None, num_threads=8):
        """Ids of a str (list of int), or of a list of str (list of lists); `prepend` is an id or a special's name."""
        if prepend is not None and not isinstance(prepend, int):
            prepend = self.encoding.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return first + self.encode_text(text).tolist()
        with ThreadPoolExecutor(num_threads) as pool:
            return [first + ids.tolist() for ids in pool.map(self.encode_text, text)]

    def encode_text(self, text):
        """Token ids of a str, uint32 of shape (n,)."""
        encoded = (self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces(well_formed(text)))
        return np.concatenate(list(encoded))

    def encode_document(self, text):
        """Token ids of a document with BOS in front, uint16 of shape (n + 1,)."""
        return np.concatenate([[self.bos_token_id], self.encode_text(text)]).astype(np.uint16)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def token_bytes(self):
        """Length in bytes of each token's own bytes, int64 of shape (V,); special tokens have 0."""
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS))


LONG_RUN = re.compile(r"\s{10000}|\S{10000}")


def pieces(text):
    """The text, cut where a run of spaces or of anything else goes on for 10,000 characters: BPE takes the square."""
    start = 0
    if len(text) >= 10_000:
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def well_formed(text):
    """The text with lone surrogates, which UTF-8 can't hold, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@cache
def load_tokenizer(folder):
    return Tokenizer.load(folder / open_cache(folder)["files"]["tokenizer"]["name"])


def get_token_bytes(device="cpu"):
    """Bytes of each token of the prepared tokenizer, int32 tensor of shape (V,); special tokens have 0."""
    return torch.from_numpy(Tokenizer.from_directory().token_bytes()).to(device=device, dtype=torch.int32)


# -----------------------------------------------------------------------------
# Token files: per split, `.bin` holds uint16 ids end to end and `.idx` int64 offsets of the documents, (documents + 1,)


def write_tokens(tokenizer, corpus, split, path):
    """Tokenize a split into `path`.bin and `path`.idx, on every core. The `.bin` comes last: where it is, both are.

    Raises PrepareError if its files hold no text.
    """
    files = getattr(corpus, split)
    groups, lengths = batched(corpus.documents(files), 64), array("q", [0])  # 8 bytes each: there may be millions

    def encode_group(texts):
        return [tokenizer.encode_document(text) for text in texts]

    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,  # tiktoken lets go of the interpreter while it works
        progress(corpus.check()[split], f"tokenizing {split}", " documents") as bar,
        written(path.with_suffix(".bin")) as tokens,
    ):
        pending = deque(pool.submit(encode_group, group) for group in islice(groups, 4 * os.cpu_count()))
        while pending:
            encoded = pending.popleft().result()
            pending.extend(pool.submit(encode_group, group) for group in islice(groups, 1))
            tokens.write(np.concatenate(encoded).tobytes())
            lengths.extend(map(len, encoded))
            bar.update(len(encoded))
        if len(lengths) == 1:
            raise PrepareError(f"no text in {files[0]}{' …' if len(files) > 1 else ''}: every document is empty", 2)
        with written(path.with_suffix(".idx")) as offsets:
            offsets.write(np.cumsum(np.frombuffer(lengths, np.int64)).tobytes())


def batched(items, n):
    items = iter(items)
    while group := list(islice(items, n)):
        yield group


def read_tokens(split):
    """(tokens, offsets) of a prepared split, memory-mapped: uint16 (N,) and int64 (documents + 1,)."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    return map_tokens(cache_dir(), split)


@cache
def map_tokens(folder, split):
    files = open_cache(folder)["files"]
    tokens = np.memmap(folder / files[f"{split}_tokens"]["name"], np.uint16, "r")
    offsets = np.memmap(folder / files[f"{split}_offsets"]["name"], np.int64, "r")
    return tokens.view(np.ndarray), offsets.view(np.ndarray)  # slices of a plain array cost a tenth of a memmap's


def forget_cache():
    """Read everything anew at the next call: the cache has changed."""
    for function in (load_manifest, open_cache, load_tokenizer, map_tokens):
        function.cache_clear()


# -----------------------------------------------------------------------------
# Loader


def pack_rows(offsets, T, forever):
    """Best-fit packing: yields (row, epoch), a row being [(start, length), …] of T + 1 tokens together.

    A row is filled from a buffer of BUFFER_DOCS documents with the longest that fits whole; where none fits, with the
    beginning of the shortest, and the rest of that one is dropped. Among equals the one read first. No padding: the
    row that the end of the data leaves unfilled is dropped too. `epoch` counts passes over the data, from 1: that of
    the latest document used.
    """
    stream = document_stream(offsets, forever)
    starts, buffer = {}, []  # buffer: sorted keys, length << 40 | serial number of the document

    def read_one():
        for serial, start, length in islice(stream, 1):
            starts[serial] = start
            insort(buffer, length << 40 | serial)

    for _ in range(BUFFER_DOCS):
        read_one()
    documents, last = len(offsets) - 1, 0
    while buffer:
        row, room = [], T + 1
        while room and buffer:
            i = bisect_left(buffer, (room + 1) << 40)  # the first that is too long
            if i:
                i = bisect_left(buffer, buffer[i - 1] >> 40 << 40)  # the first of the longest that fit
            key = buffer.pop(i)
            serial, length = key & (1 << 40) - 1, min(key >> 40, room)
            row.append((starts.pop(serial), length))
            room, last = room - length, max(last, serial)
            read_one()
        if room == 0:
            yield row, last // documents + 1


def document_stream(offsets, forever):
    """(serial, start, length) of each document, in order, once or again and again."""
    serial = 0
    while True:
        for block in range(0, len(offsets) - 1, 4096):  # in blocks: a large index stays on disk
            bounds = offsets[block : block + 4097].tolist()
            for start, end in pairwise(bounds):
                yield serial, start, end - start
                serial += 1
        if not forever:
            return


def fill_rows(tokens, rows, out):
    """Copy the pieces of `rows` into `out`, (B, T + 1) of any integer type. Returns the last row's epoch."""
    epoch = 0
    for line, (row, epoch) in zip(out, rows):  # noqa: B007
        at = 0
        for start, length in row:
            line[at : at + length] = tokens[start : start + length]
            at += length
    return epoch


def get_device():
    """Where training and evaluation run: the first visible CUDA GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_dataloader(tokenizer, B, T, split):
    """Yields (x, y, epoch) forever: int64 tensors (B, T) on the device, y the tokens that follow x's.

    Every row starts with BOS and is packed as `pack_rows` says. Deterministic: the same split, B and T give the same
    batches. Batches are made ahead by a thread, and one handed out is never written to again: on the CPU it is new
    memory; for a GPU the copy's source is written only after an event says that the copy was made.
    Its first batch starts the clock. Raises PrepareError, or ValueError for an impossible B, T or split.
    """
    if B < 1 or T < 1:
        raise ValueError(f"make_dataloader wants B ≥ 1 and T ≥ 1, got B={B}, T={T}")
    tokens, offsets = read_tokens(split)
    if tokenizer.get_vocab_size() != load_manifest(cache_dir())["constants"]["VOCAB_SIZE"]:
        raise PrepareError("this tokenizer is not the one the tokens were made with: use Tokenizer.from_directory()")
    return on_the_clock(batches(tokens, offsets, B, T, get_device()))


def on_the_clock(items):
    for item in items:
        clock.start()
        yield item


def batches(tokens, offsets, B, T, device):
    """The generator behind `make_dataloader`, on any tokens (N,) and offsets (documents + 1,)."""
    rows = pack_rows(offsets, T, forever=True)
    cuda = device.type == "cuda"

    def fill(stage, copied):
        if copied is not None:
            copied.synchronize()  # the copy to the GPU that may still read this buffer
        page = np.empty((B, T + 1), np.uint16)
        epoch = fill_rows(tokens, islice(rows, B), page)
        stage = new_stage((2, B, T), pinned=cuda) if stage is None else stage
        stage.numpy()[0], stage.numpy()[1] = page[:, :-1], page[:, 1:]
        return stage, epoch

    # A pool's thread is joined when the generator or the process ends, Ctrl-C included.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = deque(pool.submit(fill, None, None) for _ in range(PREFETCH))
        while True:
            stage, epoch = pending.popleft().result()
            if cuda:
                (x, y), copied = copy_to_gpu(stage, device)
                pending.append(pool.submit(fill, stage, copied))
            else:
                x, y = stage
                pending.append(pool.submit(fill, None, None))
            yield x, y, epoch


def new_stage(shape, pinned):
    return torch.empty(shape, dtype=torch.int64, pin_memory=pinned)


def copy_to_gpu(stage, device):
    """Queue a copy of pinned memory on the GPU. Returns the copy, and an event that is over once it was made."""
    copy = stage.to(device, non_blocking=True)
    made = torch.cuda.Event(blocking=True)  # who waits for it sleeps, instead of keeping a core busy
    made.record()
    return copy, made


# -----------------------------------------------------------------------------
# Run: clock, watchdog, seed, report


class Clock:
    """The time a model has to learn in: from the first training batch to the beginning of evaluation.

    Everything in between counts. A batch asked for after an evaluation, or another evaluation, makes it as if it had
    never stopped, so nothing is learned off the clock.
    """

    def __init__(self):
        self.started = self.stopped = None
        self.limit = None  # seconds that are left to the process from the first batch on; start_run sets it

    def start(self):
        if self.started is None:
            self.started = time.monotonic()
            if self.limit is not None:
                watchdog(self.limit)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # what the warm-up tried is not what the run takes
        self.stopped = None

    def stop(self):
        """At each evaluation: what is done between two of them is training too."""
        if self.started is not None:
            self.stopped = time.monotonic()

    def seconds(self):
        """Seconds of training so far; 0.0 before the first batch."""
        if self.started is None:
            return 0.0
        return (self.stopped or time.monotonic()) - self.started

    def progress(self):
        """How much of the budget is used, 0 to 1."""
        return min(self.seconds() / load_manifest(cache_dir())["constants"]["TIME_BUDGET"], 1.0)

    def time_is_up(self):
        return self.progress() >= 1.0

    def complaint(self):
        """What is wrong with the time of training, in a phrase; None if nothing is. A last step may take a while."""
        budget = load_manifest(cache_dir())["constants"]["TIME_BUDGET"]
        if self.started is None:
            return "no batch of training data was asked for, so the clock never ran"
        if self.seconds() > 1.02 * budget + 1:
            return f"training took {self.seconds():.1f} s of a budget of {budget} s"
        return None


clock = Clock()


def watchdog(seconds):
    """End this process after that long, exit status 1 and the stack of every thread on stderr.

    Called again, the time counts from then; None turns it off. It works from a thread of C's, so that a hang in a
    kernel or a lock is ended too.
    """
    if seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def get_seed():
    """The seed of this run: the environment's SEED, 0 by default. Raises PrepareError if it is no whole number."""
    text = os.environ.get("SEED", "0")
    if not text.isdecimal() or int(text) >= 2**32:
        raise PrepareError(f"SEED={text!r} is no whole number from 0 to 4294967295: `SEED=1 uv run train.py`")
    return int(text)


def git(*arguments):
    """What git says, run beside this file; None where it fails or there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None


def running_commit():
    """(7 characters of the commit that has train.py as it is, None); else (None, why there is none)."""
    commit = git("rev-parse", "--short=7", "HEAD")
    changed = git("status", "--porcelain", "--ignored", "--", "train.py")
    if commit is None or changed is None:
        return None, "git names no commit here"
    return (commit[:7], None) if changed == "" else (None, "train.py differs from its commit")


started_from = None, "the run was begun without start_run()"  # running_commit() then: later edits are not this run's


def start_run():
    """Begin a run: check and open the cache, seed everything random, set the watchdog. Returns the device.

    Raises PrepareError before anything has been computed.
    """
    global started_from
    budget = open_cache(cache_dir())["constants"]["TIME_BUDGET"]
    watchdog(budget + RUN_GRACE)
    clock.limit = budget + END_GRACE
    for split in ("train", "val"):
        read_tokens(split)  # open from now on: another prepare.py can't take the files away
    get_token_bytes()
    seed = get_seed()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    started_from = running_commit()
    return get_device()


def process_seconds():
    """Seconds since this process began: the kernel's figure on Linux, elsewhere since this file was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot, field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic() - IMPORTED_AT


def peak_memory_mb():
    """MiB at the most: allocated on the GPU, or on a CPU resident in the process. nan where it can't be told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return math.nan
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} thread(s)"


def report(val_bpb, *, mfu_percent, total_tokens, num_steps, num_params, depth, attention):
    """Print the block that every tool greps. What the harness knows it adds itself; the run is over after it."""
    watchdog(None)
    memory = peak_memory_mb()
    commit, dirty = started_from
    for complaint in filter(None, (dirty, clock.complaint())):
        print(f"warning: {complaint}: no commit stands for this run")
        commit = None
    lines = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{clock.seconds():.1f}",
        "total_seconds": f"{process_seconds():.1f}",
        "peak_vram_mb": f"{memory:.1f}",
        "mfu_percent": f"{mfu_percent:.2f}",
        "total_tokens_M": f"{total_tokens / 1e6:.1f}",
        "num_steps": num_steps,
        "num_params_M": f"{num_params / 1e6:.1f}",
        "depth": depth,
        "seed": get_seed(),
        "attention": attention,
        "device": device_name(),
        "harness": fingerprint(),
        "row": f"{commit or '-------'}\t{val_bpb:.6f}\t{memory / 1024:.1f}",
    }
    print("---")
    for name, value in lines.items():
        print(f"{name + ':':<18}{value}")
    sys.stdout.flush()


# -----------------------------------------------------------------------------
# Metric


def evaluate_bpb(model, tokenizer, batch_size):
    """Bits per byte of the validation text: Σ nats / (ln 2 · Σ bytes). Stops the clock.

    `model(x)`, x int64 (batch_size, MAX_SEQ_LEN), returns the logits (batch_size, MAX_SEQ_LEN, V), finite, of any
    floating-point type. It never sees the targets; the softmax is done here, in float32, the sums in float64.
    The first EVAL_TOKENS / MAX_SEQ_LEN validation rows are scored, each exactly once whatever `batch_size` is: the last
    batch is filled up with rows that do not count. Special tokens count in neither sum.

    What a submission may not do is look beyond the tokens it predicts from. On several batches, at random places,
    tokens are changed from position t on, then whole other rows: what comes before t, and the rows left alone, must
    keep their logits. A model that fails in anything gets EvaluationError and no number.
    """
    device = get_device()
    if device.type == "cuda":
        torch.cuda.synchronize()  # what still computes is training
    clock.stop()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that training used goes back to what else takes some: libraries, kernels
    constants = open_cache(cache_dir())["constants"]
    T = constants["MAX_SEQ_LEN"]
    if clock.complaint():
        print(f"warning: {clock.complaint()}", file=sys.stderr)
    if batch_size < 1:
        raise ValueError(f"evaluate_bpb wants batch_size ≥ 1, got {batch_size}")
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        tokens, offsets = read_tokens("val")
        rows = list(islice(pack_rows(offsets, T, forever=False), constants["EVAL_TOKENS"] // T))
        token_bytes = get_token_bytes(device)  # the prepared tokenizer's, whatever was passed in
        with torch.no_grad():
            return score_rows(model, tokens, rows, T, token_bytes, batch_size, device)
    finally:
        if was_training:
            model.train()


def score_rows(model, tokens, rows, T, token_bytes, batch_size, device):
    """Bits per byte of packed `rows`; token_bytes (V,) on the device."""
    V = len(token_bytes)
    dice = random.SystemRandom()  # not the seeded generator: where the checks fall can't be foreseen
    starts = range(0, len(rows), batch_size)
    watched = max(1, min(CAUSALITY_ROWS_AT_ONCE, batch_size // 2))  # rows of a batch
    checked = set(dice.sample(starts, min(-(-CAUSALITY_ROWS // watched), len(starts))))
    nats = torch.zeros((), dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.int64, device=device)
    page = np.empty((batch_size, T + 1), np.int64)
    for start in starts:
        batch = rows[start : start + batch_size]
        # The shape never changes, so a compiled model is not compiled again for the last batch.
        fill_rows(tokens, (batch * batch_size)[:batch_size], page)
        x = torch.from_numpy(page[:, :-1].copy()).to(device)  # a copy of its own: y can't be reached through it
        y = torch.from_numpy(page[:, 1:].copy()).to(device)
        logits = checked_logits(model, x.clone(), V)
        parts = zip(logits[: len(batch)].split(SCORED_AT_ONCE), y[: len(batch)].split(SCORED_AT_ONCE))
        for part, part_y in parts:  # a float32 copy of all the logits would be the most memory of the run
            loss = F.cross_entropy(part.flatten(0, 1).float(), part_y.flatten(), reduction="none")  # (rows · T,)
            n_bytes = token_bytes[part_y.flatten()]
            nats += (loss.double() * (n_bytes > 0)).sum()
            count += n_bytes.sum()
        which = sorted(dice.sample(range(batch_size), watched))
        kept = logits[which] if start in checked else None  # a copy: the model may use its output's memory again
        del logits, part, parts  # before the next are made: twice their memory is more than training took
        if kept is not None:
            check_causality(model, x, which, kept, V, dice)
    result = nats.item() / (math.log(2) * count.item())
    if not math.isfinite(result):
        raise EvaluationError(f"the logits are so large that the score is {result}")
    return result


def checked_logits(model, x, V):
    """model(x), after its type, shape and finiteness have been looked at. Raises EvaluationError."""
    logits = model(x)
    wanted = (*x.shape, V)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or tuple(logits.shape) != wanted:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise EvaluationError(f"model(x) must return floating-point logits of shape {wanted}, it returned {got}")
    ends = [end for part in logits.split(SCORED_AT_ONCE) for end in part.float().aminmax()]  # a NaN is both
    if not torch.stack(ends).isfinite().all():
        raise EvaluationError("model(x) returned logits that are not finite in float32 (NaN or infinity)")
    return logits


def check_causality(model, x, which, logits, V, dice):
    """Raise EvaluationError if logits depend on tokens that come after them, or on other rows of x (B, T).

    logits (len(which), T, V) is what model(x) gave for the rows `which`. Only those are compared.
    """
    B, T = x.shape
    generator = torch.Generator().manual_seed(dice.getrandbits(63))

    def random_like(x):  # tokens that differ from x's everywhere
        return (x + torch.randint(1, V, x.shape, generator=generator).to(x.device)) % V

    def moved(changed, keep):
        """How far the logits of `changed` lie from what they were, at most, where keep (B, T) is true."""
        again = checked_logits(model, changed, V)
        pairs = ((again[i][keep[i]], before[keep[i]]) for i, before in zip(which, logits))
        return max((a - b).abs().max().item() if len(a) else 0.0 for a, b in pairs)

    def compare(changed, keep, fault):
        worst = moved(changed, keep)
        if worst > CAUSALITY_TOLERANCE:
            again = moved(x.clone(), torch.ones_like(keep))
            if again > CAUSALITY_TOLERANCE:
                fault = "the same input gave other logits (a state, or a kernel that is not deterministic)"
            raise EvaluationError(f"{fault}: a logit moved by {max(worst, again):.3g}, so there is no number")

    if B > 1:
        others = torch.ones(B, 1, dtype=torch.bool, device=x.device)
        others[which] = False
        changed = torch.where(others, random_like(x), x)
        compare(changed, ~others.expand(B, T), "the model mixes rows: other rows changed a row's logits")
    # Rows differ in where they are changed. T = 1 has no earlier place.
    t = torch.tensor([dice.randrange(1, T) if T > 1 else 1 for _ in range(B)], device=x.device)
    future = torch.arange(T, device=x.device) >= t[:, None]  # (B, T)
    changed = torch.where(future, random_like(x), x)
    compare(changed, ~future, "the model is not causal: later tokens changed earlier logits")


# -----------------------------------------------------------------------------
# Command line


def prepare(args):
    """Make what the options ask for, redo only what depends on what changed, and put it in force."""
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    with cache_lock(cache):
        forget_cache()  # another process may have changed it since
        try:
            before = load_manifest(cache)
        except PrepareError:
            before = {"files": {}}
        known = {entry["name"]: entry["digest"] for entry in before["files"].values()}  # file name -> digest
        with contextlib.suppress(OSError, ValueError, TypeError):
            known |= json.loads((cache / "unfinished.json").read_bytes())
        begun = time.monotonic()

        def need(path, parts, make):
            """Make `path` unless all its parts are there, each as it was when it was made."""
            paths = [path.with_suffix(part) for part in parts]
            if all(part.exists() and known.get(part.name) == digest(part) for part in paths):
                return "up to date"
            started = time.monotonic()
            corpus.check()
            make()
            known.update({part.name: digest(part) for part in paths})
            with written(cache / "unfinished.json") as f:  # until the manifest says it: this process may be killed
                f.write(json.dumps(known).encode())
            return f"made in {time.monotonic() - started:.1f} s"

        corpus = find_corpus(args, cache)
        say("corpus", corpus.note)

        how = [LAYOUT, SPLIT_PATTERN, SPECIAL_TOKENS, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS, DOCUMENT_CHARS]
        sample = tokenizer_files(corpus.train)
        path = cache / f"tokenizer-{key_of(corpus.identity(sample), args.vocab_size, how)}.bpe"
        texts = sample_texts(corpus.documents(sample))
        state = need(path, [".bpe"], lambda: Tokenizer.train(texts, args.vocab_size).save(path))
        tokenizer = Tokenizer.load(path)
        vocab_size = tokenizer.get_vocab_size()
        say("tokenizer", f"{vocab_size:,} tokens, {state}")
        if vocab_size < args.vocab_size:
            say("", f"note: the text has no more than that to merge, {args.vocab_size:,} were asked for")
        files = {"tokenizer": path}

        for split, paths in (("train", corpus.train), ("val", corpus.val)):
            path = cache / f"{split}-{key_of(corpus.identity(paths), digest(files['tokenizer']), how)}.bin"
            state = need(path, [".idx", ".bin"], partial(write_tokens, tokenizer, corpus, split, path))
            files[f"{split}_tokens"], files[f"{split}_offsets"] = path, path.with_suffix(".idx")
            offsets = np.fromfile(path.with_suffix(".idx"), np.int64)
            say(split, f"{offsets[-1]:,} tokens in {len(offsets) - 1:,} documents, {state}")
        if corpus.skipped:
            say("", f"note: {len(corpus.skipped)} file(s) are not readable as UTF-8 and were skipped")

        wanted = args.eval_tokens // args.seq_len
        rows = sum(1 for _ in islice(pack_rows(offsets, args.seq_len, forever=False), wanted))  # offsets of val
        if rows == 0:
            raise PrepareError(
                f"the validation text fills no row of --seq-len {args.seq_len}: a smaller one, or more text", 2
            )
        if rows < wanted:
            say("", f"note: validation has {rows * args.seq_len:,} tokens in whole rows; --eval-tokens asks for more")

        if put_in_force(cache, args, vocab_size, files) == before:
            say("", "everything was there already: nothing to do")
        say(
            "ready",
            f"scale {args.scale}: rows of {args.seq_len:,} tokens, {args.time_budget} s a run, "
            f"{rows * args.seq_len:,} validation tokens",
        )
        say("", f"in {cache}, harness {fingerprint()}, after {time.monotonic() - begun:.1f} s")
        if args.scale == "full" and not torch.cuda.is_available():
            say("", "note: there is no CUDA GPU here, and without one a run of this scale does not end in time")
        say("next", "uv run train.py")


def put_in_force(cache, args, vocab_size, files):
    """Write the manifest over these files, {kind: path}, and remove what an earlier one named. Returns it."""
    manifest = {
        "layout": LAYOUT,
        "command": args.command,
        "constants": {
            "SCALE": args.scale,
            "MAX_SEQ_LEN": args.seq_len,
            "TIME_BUDGET": args.time_budget,
            "VOCAB_SIZE": vocab_size,
            "EVAL_TOKENS": args.eval_tokens,
        },
        "files": {kind: {"name": path.name, "digest": digest(path)} for kind, path in files.items()},
    }
    manifest["digest"] = _self_digest(manifest)
    text = json.dumps(manifest, indent=1).encode()
    path = cache / "manifest.json"
    if not path.exists() or path.read_bytes() != text:
        with written(path) as f:
            f.write(text)
    (cache / "unfinished.json").unlink(missing_ok=True)
    forget_cache()
    # downloads stay
    keep = {path.name, *(path.name for path in files.values())}
    for pattern in ("tokenizer-*", "train-*", "val-*", "manifest.json*", "unfinished.json*"):
        for path in cache.glob(pattern):
            if path.name not in keep:
                path.unlink()
    return manifest


def say(what, text):
    print(f"{what:<10} {text}", flush=True)


def key_of(*parts):
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def find_corpus(args, cache):
    if args.corpus == "climbmix":
        return climbmix_corpus(cache / "data", args.num_shards, args.download_workers)
    return source_corpus() if args.corpus == "source" else folder_corpus(Path(args.corpus))


def tokenizer_files(files):
    """As many of the first training files as hold TOKENIZER_CHARS: more files leave the tokenizer as it is."""
    total = 0
    for i, path in enumerate(files):
        if total >= TOKENIZER_CHARS:
            return files[:i]
        total += path.stat().st_size
    return files


def sample_texts(documents):
    """The beginnings of the documents, until there are TOKENIZER_CHARS."""
    total = 0
    for text in documents:
        text = text[:TOKENIZER_DOC_CHARS]
        yield text
        total += len(text)
        if total >= TOKENIZER_CHARS:
            return


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"prepare.py: error: {message} (see `uv run prepare.py --help`)\n")


def whole(low, high=None, also=None):
    """An argparse type: whole numbers from low to high, or `also`."""

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or (value != also and (value < low or (high is not None and value > high))):
            limits = f"from {low:,} to {high:,}" if high is not None else f"of {low:,} or more"
            raise argparse.ArgumentTypeError(
                f"wants a whole number {limits}{f', or {also}' if also is not None else ''}, got {text!r}"
            )
        return value

    return parse


def budget(text):
    """An argparse type: seconds, a positive number up to a week; int where it is one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 7 * 24 * 3600:
        raise argparse.ArgumentTypeError(f"wants a positive number of seconds, up to a week, got {text!r}")
    return int(value) if value == int(value) else value


def parse_arguments(argv):
    by_scale = {key: ", ".join(f"{name} {scale[key]:,}" for name, scale in SCALES.items()) for key in SCALES["full"]}
    parser = Parser(
        prog="prepare.py",
        usage="uv run prepare.py [options]",
        description="Make data, tokenizer and token files ready, once per machine. What was prepared stays in force "
        "until this is run again; a second run with the same options does nothing.",
        epilog=f"Everything is kept in {cache_dir()} (AUTORESEARCH_CACHE names another folder).",
    )
    add = parser.add_argument
    add(
        "--corpus",
        default="climbmix",
        metavar="climbmix|source|DIR",
        help="climbmix: download prose from the Hugging Face hub (default); source: the Python source files on this "
        "machine, no download; DIR: your own .parquet (column text), .jsonl (key text) or .txt files, the last in "
        "name order is validation",
    )
    add(
        "--scale",
        choices=list(SCALES),
        help="defaults for what follows (default: full with a CUDA GPU, else laptop)",
    )
    add("--time-budget", type=budget, metavar="S", help=f"seconds a run trains ({by_scale['time_budget']})")
    add("--seq-len", type=whole(1), metavar="N", help=f"tokens a row ({by_scale['seq_len']})")
    add("--vocab-size", type=whole(260, 65_536), metavar="N", help=f"tokens known ({by_scale['vocab_size']})")
    add("--eval-tokens", type=whole(1), metavar="N", help=f"validation tokens scored ({by_scale['eval_tokens']})")
    add(
        "--num-shards",
        type=whole(1, LAST_SHARD, also=-1),
        default=10,
        metavar="N",
        help=f"training shards of climbmix, about 100 MB each, 1 to {LAST_SHARD:,} or -1 for all (default 10)",
    )
    add("--download-workers", type=whole(1, 64), default=8, metavar="N", help="shards fetched at a time (default 8)")
    args = parser.parse_args(argv)
    if args.corpus not in ("climbmix", "source"):
        args.corpus = str(Path(args.corpus).expanduser().resolve())
    args.scale = args.scale or ("full" if torch.cuda.is_available() else "laptop")
    # The command that makes this cache again, on any machine: nothing is left to a default that depends on it.
    given = [f"--{name}={value}" for name, value in (("corpus", args.corpus), ("scale", args.scale))]
    for name, default in SCALES[args.scale].items():
        value = getattr(args, name)
        if value is None:
            setattr(args, name, default)
        elif value != default:
            given.append(f"--{name.replace('_', '-')}={value}")
    if args.corpus == "climbmix":
        given.append(f"--num-shards={args.num_shards}")
    args.command = shlex.join(["uv", "run", "prepare.py", *given])
    if args.eval_tokens < args.seq_len:
        parser.error(f"--eval-tokens {args.eval_tokens} is less than one row of --seq-len {args.seq_len}")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    try:
        prepare(args)
    except PrepareError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:  # a full disk, a folder that may not be written
        cure = "mend that, or name another folder by AUTORESEARCH_CACHE, and run it again; what is done stays"
        print(f"prepare.py: error: {error}: {cure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
