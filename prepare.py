"""The fixed half of the harness: data, tokenizer, token files, loader, clock and metric.

    uv run prepare.py                     download climbmix, train the tokenizer, tokenize (once per machine)
    uv run prepare.py --corpus source     the same from the Python source on this machine, without a download
    uv run prepare.py --corpus DIR        the same from your own .parquet, .jsonl or .txt files

The data goes one way: corpus files → BPE ranks → token files + manifest → packed batches → bits per byte.
Nobody edits this file during research: its bytes are part of the fingerprint under which numbers compare.
`train.py` imports from here. Nothing here imports `train.py`.
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
import time
from array import array
from bisect import bisect_left, insort
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice, pairwise, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
import tiktoken
import torch
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
    import resource
except ImportError:  # Windows has neither. There, don't start two prepare.py at once.
    fcntl = resource = None

IMPORTED_AT = time.monotonic()

# -----------------------------------------------------------------------------
# Constants

LAYOUT = 2  # version of the cache's layout; a cache of another version is refused

SCALES = {  # what `--scale` stands for; each value has an option that overrides it
    "full": dict(time_budget=300, seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288),
    "laptop": dict(time_budget=60, seq_len=256, vocab_size=2048, eval_tokens=2**18),
}

# GPT-4's pattern, but with at most two digits a token: numbers must not fill a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]  # the first opens every document
TOKENIZER_CHARS = 100_000_000  # text that the tokenizer learns from; twice as much compresses no better
TOKENIZER_DOC_CHARS = 10_000  # of one document, so that no long document dominates

DOCUMENT_CHARS = 4_000  # .txt and source files are cut into documents of about this length
SOURCE_VAL_SHARE = 0.05  # share of the bytes of `--corpus source` that is validation
BUFFER_DOCS = 1_000  # documents from which a row is packed
PREFETCH = 3  # batches made ahead

CAUSALITY_ROWS = 64  # validation rows on which causality is checked, each at a random position of its own
CAUSALITY_ROWS_PER_BATCH = 16  # at most: their logits are kept for the comparison
CAUSALITY_TOLERANCE = 1e-3  # logits; a smaller leak is worth less than the noise of a seed
ROWS_PER_LOSS = 8  # rows of logits that are scored in one call: fewer take more calls, more take more memory
START_GRACE = 300  # seconds beyond the budget that a run has until its first batch, before the watchdog ends it
END_GRACE = 240  # seconds beyond the budget that a run has from its first batch on


class PrepareError(Exception):
    """An error that the user can fix. One line: what was found, what was expected, and the command that fixes it."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code  # exit status: 2 for an impossible option or corpus, else 1


class EvaluationError(Exception):
    """The model breaks the contract of `evaluate_bpb`, so it gets no number."""


# -----------------------------------------------------------------------------
# Cache: one folder for everything prepared, and a manifest that says what is in force


def cache_dir():
    """The folder of everything prepared: `~/.cache/autoresearch`, or AUTORESEARCH_CACHE."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or Path.home() / ".cache" / "autoresearch").expanduser()


def checksum(path, chunk=1 << 24, most=128):
    """sha256 of a file, as hex. Of a file over 2 GiB, sha256 of 128 chunks of 16 MiB, evenly spaced.

    Every run checks the whole cache before it trains, so the check must stay fast for a large corpus.
    """
    sha256, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as f:
        for start in range(0, size, max(chunk, size // most)):
            f.seek(start)
            sha256.update(f.read(chunk))
    return sha256.hexdigest()


def cache_key(*parts):
    """12 hex digits that stand for these values (anything that JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@contextlib.contextmanager
def atomic_write(path):
    """A binary file that appears under `path` complete or not at all. Until then it has a temporary name."""
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
    """Lets one prepare.py at a time work in a cache. The lock ends with its process, also after kill -9."""
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


@cache
def load_manifest(cache):
    """What is in force in the cache folder: constants, files with their checksums, the command that made it.

    Raises PrepareError if the manifest is missing, damaged or of another layout.
    """
    path = cache / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        layout, command = manifest["layout"], manifest["command"]
        intact = layout != LAYOUT or manifest.pop("checksum") == cache_key(manifest)
    except OSError as error:
        hint = "run `uv run prepare.py` (without GPU or download: --corpus source)"
        raise PrepareError(f"nothing is prepared in {cache} ({error.strerror}): {hint}") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise PrepareError(f"{path} is damaged: run `uv run prepare.py` again, with the options you used before")
    if layout != LAYOUT:
        raise PrepareError(f"{cache} has layout {layout}, this prepare.py needs {LAYOUT}: run `{command}`")
    return manifest


def file_problem(path, expected):
    """None if the file has the expected checksum, else "missing", "damaged" or why it can't be read."""
    try:
        return None if checksum(path) == expected else "damaged"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"not readable ({error.strerror})"


@cache
def open_cache(cache):
    """The manifest, after a check of every file that it names. Raises PrepareError for a missing or damaged file."""
    manifest = load_manifest(cache)
    for entry in manifest["files"].values():
        if problem := file_problem(cache / entry["name"], entry["checksum"]):
            raise PrepareError(f"{cache / entry['name']} is {problem}: run `{manifest['command']}` to make it again")
    return manifest


def constants():
    """{name: value} of the constants in force, checked only for themselves."""
    return load_manifest(cache_dir())["constants"]


def __getattr__(name):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE and SCALE: as prepared, read when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE", "SCALE"):
        return constants()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint():
    """12 hex digits over this file, the constants, the tokenizer and the validation tokens.

    Two values of val_bpb compare only if it is the same.
    """
    manifest = open_cache(cache_dir())
    code = Path(__file__).read_bytes().replace(b"\r\n", b"\n")  # a Windows checkout is the same harness
    files = [manifest["files"][kind]["checksum"] for kind in ("tokenizer", "val_tokens", "val_offsets")]
    return cache_key(hashlib.sha256(code).hexdigest(), manifest["constants"], files)


# -----------------------------------------------------------------------------
# Corpus: which files, and the documents in them


class BadFile(Exception):
    """A file of the corpus can't be used. The message names the file and says why."""


@dataclass
class Corpus:
    """Training and validation files in reading order. `note` says in a phrase what they are."""

    train: list
    val: list
    note: str

    def identity(self, split):
        """Hex key of a split's files. Another name, size or modification time gives another key."""
        stats = ((path, path.stat()) for path in getattr(self, split))
        return cache_key(*(f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}" for path, stat in stats))

    def documents(self, split):
        """Yields the non-empty documents (str) of a split. Raises PrepareError at the end that names the bad files."""
        problems = []
        for path in tqdm(getattr(self, split), desc=f"reading {split}", unit="file", leave=False, disable=None):
            try:
                yield from (text for text in read_documents(path) if text.strip())
            except BadFile as error:
                problems.append(str(error))
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise PrepareError(f"{'; '.join(problems[:5])}{more}: fix or remove, then run again", 2)


def read_documents(path):
    """Yields the documents (str) of one file. Raises BadFile."""
    try:
        yield from {".parquet": read_parquet, ".jsonl": read_jsonl}.get(path.suffix, read_text)(path)
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except (OSError, pa.ArrowException) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BadFile(f"{path} can't be read ({reason})") from error


def read_parquet(path):
    with pq.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise BadFile(f"{path} has no column `text` (it has: {', '.join(file.schema_arrow.names)})")
        kind = file.schema_arrow.field("text").type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise BadFile(f"{path}: its column `text` holds {kind}, not strings")
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
                raise BadFile(f'{path} line {number} is not a JSON object with a string under "text"')
            yield text


def read_text(path):
    """Cuts a file's text into documents of about DOCUMENT_CHARS, at a blank line, else at a line, else anywhere.

    A row takes a document whole or its beginning. Without cuts only a book's first page would be seen.
    """
    # Installed packages have files in other encodings, and the user cannot change them.
    text, start = path.read_text(encoding="utf-8-sig", errors="replace" if path.suffix == ".py" else "strict"), 0
    while len(text) - start > 1.5 * DOCUMENT_CHARS:
        window = start + DOCUMENT_CHARS // 2, start + DOCUMENT_CHARS
        found = [at for mark in ("\n\n", "\n") if (at := text.rfind(mark, *window)) >= 0]
        end = found[0] if found else window[1]
        yield text[start:end]
        start = end
    yield text[start:]


def hash_order(name):
    return hashlib.sha256(name.encode()).digest()


def source_corpus():
    """The Python source on this machine: `.py` files of the standard library and of installed packages.

    Whole packages are taken for validation, in the order of a hash of their name, up to 5 % of the bytes. Files come
    in the order of a hash too, so that a short run sees something of every package.
    """
    packages = {}  # name -> [(path below its root, path, size)]
    for root in dict.fromkeys(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).parts
            # site-packages may lie inside the standard library's folder, but is a root of its own
            if path.is_file() and not {"site-packages", "dist-packages"} & set(parts):
                files = packages.setdefault(parts[0].removesuffix(".py"), [])
                files.append(("/".join(parts), path, path.stat().st_size))
    sizes = {name: sum(size for _, _, size in files) for name, files in packages.items()}
    room, val_names = SOURCE_VAL_SHARE * sum(sizes.values()), set()
    for name in sorted(packages, key=hash_order):
        if 0 < sizes[name] <= room:
            val_names.add(name)
            room -= sizes[name]

    def in_order(names):
        files = chain.from_iterable(packages[name] for name in names)
        return [path for below, path, _ in sorted(files, key=lambda file: hash_order(file[0]))]

    train, val = in_order(set(packages) - val_names), in_order(val_names)
    note = f"Python source: {len(train):,} files of {len(packages) - len(val_names):,} packages to train on"
    return Corpus(train, val, f"{note}, {len(val):,} files of {len(val_names):,} other packages to validate on")


def folder_corpus(folder):
    """The user's own files, sub-folders included. The last in name order is validation."""
    if not folder.is_dir():
        raise PrepareError(f"--corpus {folder}: no such folder (known names: climbmix, source)", 2)
    kinds = (".parquet", ".jsonl", ".txt")
    files = [path for path in folder.rglob("*") if path.suffix in kinds and path.is_file()]
    files.sort(key=lambda path: path.relative_to(folder).as_posix())
    if len(files) < 2:
        text = f"--corpus {folder} holds {len(files)} file(s) of {', '.join(kinds)}; it needs two or more"
        raise PrepareError(f"{text}, the last in name order is validation: split your text into several files", 2)
    return Corpus(files[:-1], files[-1:], f"{folder}: {len(files) - 1} training file(s), validation {files[-1].name}")


def climbmix_corpus(folder, num_shards, workers):
    """The first `num_shards` training shards of climbmix (-1: all) and VAL_SHARD, downloaded where they are missing."""
    count = LAST_SHARD if num_shards == -1 else num_shards
    names = [f"shard_{i:05d}.parquet" for i in range(count)] + [VAL_SHARD]
    download_shards(names, folder, workers)
    paths = [folder / name for name in names]
    return Corpus(paths[:-1], paths[-1:], f"climbmix: {count:,} training shard(s), validation {VAL_SHARD}")


# -----------------------------------------------------------------------------
# Download: huggingface_hub fetches; this section knows what is missing and accepts nothing that it has not verified
#
#   <name>           a verified shard
#   incoming/        what is being fetched; emptied at the next start
#   verified.jsonl   [name, bytes, mtime in ns, sha256] of what was verified, so that no start hashes it again

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
VAL_SHARD = f"shard_{LAST_SHARD:05d}.parquet"  # pinned: never trained on
SHARD_BYTES = 100_000_000  # about, until the hub has said it
HUB_TIMEOUT = 5  # seconds until a hub that does not answer counts as unreachable
RETRY_PAUSES = (1, 5, 25)  # seconds before the second, third and fourth attempt at a shard
FINAL = {  # HTTP statuses that another attempt does not change
    401: ": a token is needed, or HF_TOKEN is not valid",
    403: ": this token or this address is refused",
    404: ": it is not there; is HF_ENDPOINT a full mirror?",
}


def require_hub():
    """The hub's address (HF_ENDPOINT or huggingface.co), after it answered. Raises PrepareError within seconds.

    huggingface_hub by itself takes half a minute to say that nothing answers.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise requests.ConnectionError("HF_HUB_OFFLINE is set")
        requests.head(endpoint, timeout=HUB_TIMEOUT)
    except requests.RequestException as error:
        raise PrepareError(
            f"cannot reach {endpoint} ({failure_reason(error)[0]}): check network, proxy (HTTPS_PROXY) and mirror "
            "(HF_ENDPOINT); `--corpus source` needs no network"
        ) from error
    return endpoint


def failure_reason(error):
    """(why a request failed, HTTP status or None). A short line, without the signed URLs of the libraries' messages."""
    while (response := getattr(error, "response", None)) is None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    if response is not None:
        return f"HTTP {response.status_code}{FINAL.get(response.status_code, '')}", response.status_code
    text = (str(error) or type(error).__name__).splitlines()[0]
    return re.sub(r"https?://\S+| \(\(…\)\S+", "", text)[:200], None


def read_verified(folder):
    """{name: [bytes, mtime in ns, sha256]} of the shards that were verified. Damaged lines are skipped."""
    records = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "verified.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError, TypeError):
                name, *records[name] = json.loads(line)
    return records


def add_verified(path, sha256):
    record = [path.name, path.stat().st_size, path.stat().st_mtime_ns, sha256]
    with open(path.parent / "verified.jsonl", "a") as f:
        f.write(f"\n{json.dumps(record)}\n")  # on a line of its own, even after one that a kill cut off


def is_verified(path, records):
    """Whether the shard is what was verified. It is hashed only if its time has changed, as in a copied cache."""
    size, mtime, sha256 = records.get(path.name, (None, None, None))
    if not path.is_file() or path.stat().st_size != size:
        return False
    if path.stat().st_mtime_ns != mtime:
        if checksum(path) != sha256:
            return False
        add_verified(path, sha256)
    return True


def fetch_shard(path, endpoint, sizes):
    """One attempt to have the verified shard under `path`. Notes its size in `sizes`. Raises errors of many kinds."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(REPO, path.name, repo_type="dataset", endpoint=endpoint)
    remote = get_hf_file_metadata(url, endpoint=endpoint, retry_on_errors=True)
    if not remote.size or not re.fullmatch("[0-9a-f]{64}", remote.etag or ""):
        raise ValueError("the server names no length and sha256 for it; is HF_ENDPOINT a full mirror?")
    sizes[path.name] = remote.size
    if path.exists() and checksum(path) != remote.etag:
        tqdm.write(f"{path.name}: the file here is not the hub's; fetching it again", file=sys.stderr)
        path.unlink()
    if not path.exists():
        incoming = path.parent / "incoming"
        fetched = hf_hub_download(REPO, path.name, repo_type="dataset", endpoint=endpoint, local_dir=incoming)
        if checksum(fetched) != remote.etag:  # over plain HTTP the library compares lengths only
            os.unlink(fetched)
            raise ValueError("its sha256 is not the one that the hub names; a bad mirror or proxy?")
        with open(fetched, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(fetched, path)
    add_verified(path, remote.etag)


def download_shards(names, folder, workers):
    """Make sure that every shard of `names` is in `folder` and verified. Raises PrepareError that says why not.

    What was verified before costs no request and no hash. What was fetched stays, whatever happens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    incoming, records = folder / "incoming", read_verified(folder)
    shutil.rmtree(incoming, ignore_errors=True)
    missing = [name for name in names if not is_verified(folder / name, records)]
    if not missing:
        return
    # The token files take about as much as all shards.
    needed = SHARD_BYTES * (len(names) + sum(not (folder / name).exists() for name in missing))
    if (free := shutil.disk_usage(folder).free) < needed:
        raise PrepareError(
            f"{folder} has {free / 1e9:.1f} GB free, shards and token files need about {needed / 1e9:.1f} GB: free "
            "some, ask for fewer shards (--num-shards), or use another disk (AUTORESEARCH_CACHE=/path)"
        )
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # its warnings have signed addresses
    sizes, problems = {}, {}

    def fetch(name):
        for pause in (*RETRY_PAUSES, None):
            try:
                return fetch_shard(folder / name, endpoint, sizes)
            except Exception as error:
                problem, status = failure_reason(error)
            if status in FINAL or pause is None:
                break
            tqdm.write(f"{name}: {problem}; next attempt in {pause} s", file=sys.stderr)
            time.sleep(pause)
        problems[name] = problem
        if status not in FINAL:
            require_hub()  # ends the whole download if the network is gone

    def bytes_here():
        for path in chain(incoming.rglob("*.incomplete"), (folder / name for name in missing)):
            with contextlib.suppress(FileNotFoundError):
                yield path.stat().st_size

    try:
        endpoint = require_hub()
        with (
            tqdm(desc="download", unit="B", unit_scale=True, disable=None) as bar,
            ThreadPool(max(1, min(workers, len(missing)))) as pool,  # its threads don't survive Ctrl-C
        ):
            results, left = pool.imap_unordered(fetch, missing), len(missing)
            while left:
                with contextlib.suppress(multiprocessing.TimeoutError):
                    results.next(0.2)
                    left -= 1
                bar.total, bar.n = sum(sizes.get(name, SHARD_BYTES) for name in missing), sum(bytes_here())
                bar.refresh()
        if problems:
            groups = {problem: sorted(n for n in problems if problems[n] == problem) for problem in problems.values()}
            more = {problem: f" and {len(group) - 4} more" for problem, group in groups.items() if len(group) > 4}
            reasons = "; ".join(f"{', '.join(group[:4])}{more.get(p, '')} ({p})" for p, group in groups.items())
            raise PrepareError(f"{len(problems)} of {len(names)} shards could not be fetched: {reasons}")
    except PrepareError as error:
        records = read_verified(folder)
        *train, val = (is_verified(folder / name, records) for name in names)
        count = len(list(takewhile(bool, train))) if val else 0  # training shards before the first gap
        other = f", or go on with what is here: --num-shards {count}" if count else ""
        raise PrepareError(f"{error}. What was fetched stays. Run the same command again{other}") from error
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


# -----------------------------------------------------------------------------
# Tokenizer


class Tokenizer:
    """Byte-level BPE, trained with rustbpe, run by tiktoken, stored as plain ranks.

    Every text comes back from its tokens, NULs and the spelling of special tokens included (they are ordinary text
    here). The one exception is a lone surrogate: it is no character, and becomes U+FFFD.

    >>> tokenizer = Tokenizer([bytes([i]) for i in range(256)] + [b"ab"])
    >>> tokenizer.encode("abc"), tokenizer.decode([256, 99])
    ([256, 99], 'abc')
    """

    def __init__(self, ranks):  # ranks: list of bytes; a token's index is its id; special tokens follow
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
        """The prepared tokenizer. Raises PrepareError if the cache is missing or damaged."""
        return load_tokenizer(Path(folder or cache_dir()))

    @classmethod
    def load(cls, path):
        return cls([base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()])

    def save(self, path):
        """One line a token, `base64 rank`. This is tiktoken's own format: loading it executes nothing."""
        with atomic_write(path) as f:
            for rank, token in enumerate(self.ranks):
                f.write(b"%s %d\n" % (base64.b64encode(token), rank))

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def get_bos_token_id(self):
        return self.bos_token_id

    def encode(self, text, prepend=None, num_threads=8):
        """Ids of a str (list of int) or of a list of str (list of lists). `prepend`: an id or a special token."""
        if prepend is not None and not isinstance(prepend, int):
            prepend = self.encoding.encode_single_token(prepend)
        first = [] if prepend is None else [prepend]
        if isinstance(text, str):
            return first + self.encode_text(text).tolist()
        return [first + self.encode_text(part).tolist() for part in text]

    def encode_text(self, text):
        """Token ids of a str, uint32 of shape (n,)."""
        pieces = split_long_runs(well_formed(text))
        return np.concatenate([self.encoding.encode_to_numpy(piece, disallowed_special=()) for piece in pieces])

    def encode_document(self, text):
        """Token ids of a document after a BOS, uint16 of shape (n + 1,)."""
        return np.concatenate([[self.bos_token_id], self.encode_text(text)]).astype(np.uint16)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def token_bytes(self):
        """Length in bytes of each token's own bytes, int64 of shape (V,); special tokens have 0."""
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS))


LONG_RUN = re.compile(r"\s{10000}|\S{10000}")


def split_long_runs(text):
    """Cuts the text inside runs of 10,000 spaces or non-spaces: BPE's time grows with the square of a run's length."""
    start = 0
    if len(text) >= 10_000:
        for run in LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def well_formed(text):
    """The text with U+FFFD in place of lone surrogates, which UTF-8 can't hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def sample_texts(documents):
    """The beginnings of the documents, TOKENIZER_CHARS characters together."""
    total = 0
    for text in documents:
        text = text[:TOKENIZER_DOC_CHARS]
        yield text
        total += len(text)
        if total >= TOKENIZER_CHARS:
            return


@cache
def load_tokenizer(cache):
    return Tokenizer.load(cache / open_cache(cache)["files"]["tokenizer"]["name"])


def get_token_bytes(device="cpu"):
    """Length in bytes of each token of the prepared tokenizer, int32 tensor of shape (V,); special tokens have 0."""
    return torch.from_numpy(Tokenizer.from_directory().token_bytes()).to(device=device, dtype=torch.int32)


# -----------------------------------------------------------------------------
# Token files. Of each split: .bin has all token ids (uint16), .idx the offsets of the documents, int64 (documents + 1,)


def write_tokens(tokenizer, corpus, split, path):
    """Tokenize a split on all cores into `path` (.bin) and its .idx. The .bin appears last: if it is there, both are.

    Raises PrepareError if the split holds no text.
    """
    groups, lengths = batched(corpus.documents(split), 64), array("q", [0])  # 8 bytes each: there may be millions

    def encode_group(texts):
        return [tokenizer.encode_document(text) for text in texts]

    # tiktoken releases Python's lock while it works. A bounded queue: the corpus is larger than the memory.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those of this job
    with ThreadPoolExecutor(cores) as pool, atomic_write(path) as tokens:
        pending = deque(pool.submit(encode_group, group) for group in islice(groups, 4 * cores))
        while pending:
            encoded = pending.popleft().result()
            pending.extend(pool.submit(encode_group, group) for group in islice(groups, 1))
            tokens.write(np.concatenate(encoded).tobytes())
            lengths.extend(map(len, encoded))
        if len(lengths) == 1:
            raise PrepareError(f"the {split} files hold no text, every document is empty: {corpus.note}", 2)
        with atomic_write(path.with_suffix(".idx")) as offsets:
            offsets.write(np.cumsum(np.frombuffer(lengths, np.int64)).tobytes())


def have_tokens(path):
    """Whether `path` (.bin) and its .idx are there and fit each other, which half a copy of a cache would not."""
    try:
        return path.stat().st_size == 2 * np.fromfile(path.with_suffix(".idx"), np.int64)[-1]
    except (FileNotFoundError, IndexError):
        return False


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
def map_tokens(cache, split):
    files = open_cache(cache)["files"]
    tokens = np.memmap(cache / files[f"{split}_tokens"]["name"], np.uint16, "r")
    offsets = np.memmap(cache / files[f"{split}_offsets"]["name"], np.int64, "r")
    return tokens.view(np.ndarray), offsets.view(np.ndarray)  # slicing a plain array costs a tenth of a memmap's


def forget_cache():
    """Read everything anew at the next call, since the cache has changed."""
    for function in (load_manifest, open_cache, load_tokenizer, map_tokens):
        function.cache_clear()


# -----------------------------------------------------------------------------
# Device


def get_device():
    """Where training and evaluation run: DEVICE from the environment, else CUDA, else Apple's MPS, else the CPU.

    Raises PrepareError if DEVICE names no device of this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = os.environ.get("DEVICE") or next(name for name in available if available[name])
    if not available.get(name):
        here = ", ".join(name for name in available if available[name])
        raise PrepareError(f"DEVICE={name!r} is not on this machine, which has: {here}")
    return torch.device(name)


def peak_memory_mb():
    """Peak memory in MiB: allocated on a CUDA GPU, held by the driver for MPS, resident on a CPU. nan if unknown."""
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # it keeps what it had at the peak
    if resource is None:
        return math.nan
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name():
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"Apple GPU, {platform.machine()}" if device.type == "mps" else f"CPU, {torch.get_num_threads()} thread(s)"


# -----------------------------------------------------------------------------
# Loader


def pack_rows(offsets, T, forever):
    """Best-fit packing: yields (row, epoch), a row being [(start, length), …] of T + 1 tokens together.

    A row is filled from a buffer of BUFFER_DOCS documents with the longest document that fits whole. Where none fits,
    it takes the beginning of the shortest one, whose rest is dropped. Among equals the one read first is taken.
    No padding: a row that the end of the data leaves unfilled is dropped. `epoch` counts passes over the data from 1.
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
    """Yields (serial, start, length) of each document in order, once or again and again."""
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
        np.concatenate([tokens[start : start + length] for start, length in row], out=line)
    return epoch


def make_dataloader(tokenizer, B, T, split):
    """Yields (x, y, epoch) forever: int64 tensors (B, T) on the device, y being the tokens that follow x's.

    Every row starts with BOS and is packed as `pack_rows` says. The same split, B and T give the same batches. A thread
    makes batches ahead. Every batch is memory of its own, so one that was handed out never changes.
    The first batch starts the clock. Raises PrepareError, or ValueError for an impossible B, T or split.
    """
    if B < 1 or T < 1:
        raise ValueError(f"make_dataloader needs B ≥ 1 and T ≥ 1, got B={B}, T={T}")
    tokens, offsets = read_tokens(split)
    if tokenizer.get_vocab_size() != constants()["VOCAB_SIZE"]:
        raise PrepareError("this tokenizer is not the one that made the tokens: use Tokenizer.from_directory()")
    return on_the_clock(batches(tokens, offsets, B, T, get_device()))


def on_the_clock(items):
    for item in items:
        clock.start()
        yield item


def batches(tokens, offsets, B, T, device):
    """The generator behind `make_dataloader`, on any tokens (N,) and offsets (documents + 1,)."""
    rows = pack_rows(offsets, T, forever=True)
    pinned = device.type == "cuda"  # a copy overlaps with the GPU's work only from pinned memory

    def make_batch():
        packed = np.empty((B, T + 1), np.uint16)
        epoch = fill_rows(tokens, islice(rows, B), packed)
        batch = torch.empty((2, B, T), dtype=torch.int64, pin_memory=pinned)
        batch.numpy()[0], batch.numpy()[1] = packed[:, :-1], packed[:, 1:]
        return batch, epoch

    # The pool's thread is joined when the generator or the process ends, also by Ctrl-C.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = deque(pool.submit(make_batch) for _ in range(PREFETCH))
        while True:
            batch, epoch = pending.popleft().result()
            pending.append(pool.submit(make_batch))
            # PyTorch gives pinned memory to a new batch only after the copy from it has been made.
            x, y = batch.to(device, non_blocking=pinned)
            yield x, y, epoch


# -----------------------------------------------------------------------------
# Run: clock, watchdog, seed, report


class Clock:
    """The time that a model has to learn in, from the first training batch to the beginning of evaluation.

    Everything in between counts. Another batch or another evaluation after an evaluation continues the time as if it
    had never stopped, so nothing is learned off the clock.
    """

    def __init__(self):
        self.started = self.stopped = None
        self.limit = None  # seconds that the process has from the first batch on; start_run sets it

    def start(self):
        if self.started is None:
            self.started = time.monotonic()
            if self.limit is not None:
                watchdog(self.limit)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()  # the warm-up's attempts are not the run's memory
        self.stopped = None

    def stop(self):
        """Called by each evaluation. The time between two evaluations counts as training."""
        if self.started is not None:
            self.stopped = time.monotonic()

    def seconds(self):
        """Seconds of training so far; 0.0 before the first batch."""
        if self.started is None:
            return 0.0
        return (self.stopped or time.monotonic()) - self.started

    def progress(self):
        """The used share of the budget, 0 to 1."""
        return min(self.seconds() / constants()["TIME_BUDGET"], 1.0)

    def time_is_up(self):
        return self.progress() >= 1.0

    def problem(self):
        """Why the time of training breaks the rules, or None. The last step may end after the budget."""
        budget = constants()["TIME_BUDGET"]
        if self.started is None:
            return "no batch of training data was asked for, so the clock never ran"
        if self.seconds() > 1.02 * budget + 1:
            return f"training took {self.seconds():.1f} s of a budget of {budget} s"
        return None


clock = Clock()


def watchdog(seconds):
    """End this process after `seconds`, with exit status 1 and the stack of every thread on stderr.

    Another call starts the time anew; None turns it off. It runs in a thread of C, so it also ends a process that
    hangs in a kernel or a lock.
    """
    if seconds is None:
        faulthandler.cancel_dump_traceback_later()
    else:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)


def get_seed():
    """The seed of this run: the environment's SEED, 0 by default. Raises PrepareError if it is not a whole number."""
    text = os.environ.get("SEED", "0")
    if not text.isdecimal() or int(text) >= 2**32:
        raise PrepareError(f"SEED={text!r} is not a whole number from 0 to 4294967295: `SEED=1 uv run train.py`")
    return int(text)


def find_commit():
    """(7 characters of the commit that has train.py as it is now, None), or (None, why there is no such commit)."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, "status", "--porcelain", "--ignored", "--", "train.py"])
    except (OSError, subprocess.CalledProcessError):
        return None, "git names no commit here"
    return (None, "train.py differs from its commit") if changed else (commit[:7], None)


run_commit = None, "the run did not call start_run()"  # find_commit() at the start: later edits are not this run's


def start_run():
    """Begin a run: check and open the cache, set all seeds and the watchdog. Returns the device.

    Raises PrepareError before anything has been computed.
    """
    global run_commit
    device, budget = get_device(), open_cache(cache_dir())["constants"]["TIME_BUDGET"]
    watchdog(budget + START_GRACE)
    clock.limit = budget + END_GRACE
    for split in ("train", "val"):
        read_tokens(split)  # open from now on: another prepare.py can't take the files away
    get_token_bytes()
    for seed_generators in (random.seed, np.random.seed, torch.manual_seed):  # the last one on every device
        seed_generators(get_seed())
    run_commit = find_commit()
    return device


def process_seconds():
    """Seconds since this process began: from the kernel on Linux, elsewhere since this file was imported."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # seconds after boot, field 22 of proc(5)
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, AttributeError, IndexError, ValueError):
        return time.monotonic() - IMPORTED_AT


def report(val_bpb, *, mfu_percent, total_tokens, num_steps, num_params, depth, attention):
    """Print the block that every tool greps. The harness adds what it knows itself. The run is over after it."""
    watchdog(None)
    memory = peak_memory_mb()
    commit, changed = run_commit
    for problem in filter(None, (changed, clock.problem())):
        print(f"warning: {problem}: no commit stands for this run")
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
    floating-point type. It never sees the targets: the softmax is done here, in float32, the sums in float64.
    The first EVAL_TOKENS / MAX_SEQ_LEN validation rows are scored, each exactly once whatever `batch_size` is: the last
    batch is filled up with rows that do not count. Special tokens count in neither sum.

    A submission may not look beyond the tokens that it predicts from. On several batches, at random positions, tokens
    are changed from position t on, then whole other rows. The logits before t, and those of the rows left alone, must
    stay. A model that fails in anything gets EvaluationError and no number.
    """
    device = get_device()
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()  # what is still being computed is training
    clock.stop()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # libraries and kernels need memory of their own
    settings = open_cache(cache_dir())["constants"]
    T = settings["MAX_SEQ_LEN"]
    if clock.problem():
        print(f"warning: {clock.problem()}", file=sys.stderr)
    if batch_size < 1:
        raise ValueError(f"evaluate_bpb needs batch_size ≥ 1, got {batch_size}")
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        tokens, offsets = read_tokens("val")
        rows = list(islice(pack_rows(offsets, T, forever=False), settings["EVAL_TOKENS"] // T))
        token_bytes = get_token_bytes(device)  # the prepared tokenizer's, not those of the one passed in
        with torch.no_grad():
            return score_rows(model, tokens, rows, T, token_bytes, batch_size, device)
    finally:
        if was_training:
            model.train()


def score_rows(model, tokens, rows, T, token_bytes, batch_size, device):
    """Bits per byte of packed `rows`; token_bytes (V,) on the device."""
    V = len(token_bytes)
    rng = random.SystemRandom()  # not the seeded generator: a model can't foresee what is checked
    starts = range(0, len(rows), batch_size)
    rows_checked = max(1, min(CAUSALITY_ROWS_PER_BATCH, batch_size // 2))
    checked = set(rng.sample(starts, min(-(-CAUSALITY_ROWS // rows_checked), len(starts))))
    accumulator = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    nats = torch.zeros((), dtype=torch.float64, device=accumulator)
    count = torch.zeros((), dtype=torch.int64, device=accumulator)
    packed = np.empty((batch_size, T + 1), np.int64)
    for start in starts:
        batch = rows[start : start + batch_size]
        # The shape never changes, so a compiled model is not compiled again for the last batch.
        fill_rows(tokens, (batch * batch_size)[:batch_size], packed)
        x = torch.from_numpy(packed[:, :-1].copy()).to(device)  # its own memory: y can't be reached through it
        y = torch.from_numpy(packed[:, 1:].copy()).to(device)
        logits = checked_logits(model, x.clone(), V)
        parts = zip(logits[: len(batch)].split(ROWS_PER_LOSS), y[: len(batch)].split(ROWS_PER_LOSS))
        for part, part_y in parts:  # a float32 copy of all logits would be the largest tensor of the run
            loss = F.cross_entropy(part.flatten(0, 1).float(), part_y.flatten(), reduction="none")  # (rows · T,)
            n_bytes = token_bytes[part_y.flatten()].to(accumulator)
            nats += (loss.to(accumulator).double() * (n_bytes > 0)).sum()
            count += n_bytes.sum()
        row_ids = sorted(rng.sample(range(batch_size), rows_checked))
        ref_logits = logits[row_ids] if start in checked else None  # a copy: the model may reuse its output's memory
        del logits, part, parts  # before the next logits exist: two of them take more memory than training
        if ref_logits is not None:
            check_causality(model, x, row_ids, ref_logits, V, rng)
    result = nats.item() / (math.log(2) * count.item())
    if not math.isfinite(result):
        raise EvaluationError(f"the logits are so large that the score is {result}")
    return result


def checked_logits(model, x, V):
    """model(x), after a check of its type, shape and finiteness. Raises EvaluationError."""
    logits = model(x)
    expected = (*x.shape, V)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or tuple(logits.shape) != expected:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise EvaluationError(f"model(x) must return floating-point logits of shape {expected}, it returned {got}")
    extremes = [end for part in logits.split(ROWS_PER_LOSS) for end in part.float().aminmax()]  # a NaN is both
    if not torch.stack(extremes).isfinite().all():
        raise EvaluationError("model(x) returned logits that are not finite in float32 (NaN or infinity)")
    return logits


def check_causality(model, x, row_ids, ref_logits, V, rng):
    """Raise EvaluationError if logits depend on tokens that come after them, or on other rows of x (B, T).

    ref_logits (len(row_ids), T, V) is what model(x) gave for the rows `row_ids`. Only these rows are compared.
    """
    B, T = x.shape
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def random_like(x):  # tokens that differ from x's everywhere
        return (x + torch.randint(1, V, x.shape, generator=generator).to(x.device)) % V

    def difference(changed, keep):
        """The largest change of a logit where keep (B, T) is true."""
        logits = checked_logits(model, changed, V)
        pairs = ((logits[i][keep[i]], ref[keep[i]]) for i, ref in zip(row_ids, ref_logits))
        return max((a - b).abs().max().item() if len(a) else 0.0 for a, b in pairs)

    def compare(changed, keep, problem):
        worst = difference(changed, keep)
        if worst > CAUSALITY_TOLERANCE:
            again = difference(x.clone(), torch.ones_like(keep))
            if again > CAUSALITY_TOLERANCE:
                problem = "the same input gave other logits (a state, or a kernel that is not deterministic)"
            raise EvaluationError(f"{problem}: a logit changed by {max(worst, again):.3g}, so there is no number")

    if B > 1:
        others = torch.ones(B, 1, dtype=torch.bool, device=x.device)
        others[row_ids] = False
        changed = torch.where(others, random_like(x), x)
        compare(changed, ~others.expand(B, T), "the model mixes rows: other rows changed a row's logits")
    # Each row is changed from a position of its own on. A row of one token has no earlier position.
    t = torch.tensor([rng.randrange(1, T) if T > 1 else 1 for _ in range(B)], device=x.device)
    future = torch.arange(T, device=x.device) >= t[:, None]  # (B, T)
    changed = torch.where(future, random_like(x), x)
    compare(changed, ~future, "the model is not causal: later tokens changed earlier logits")


# -----------------------------------------------------------------------------
# Preparation


def prepare(args):
    """Make what the options ask for, redo only what depends on a change, and put it in force."""
    cache, started = cache_dir(), time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    with cache_lock(cache):
        forget_cache()  # another process may have changed it
        before = remove_damaged(cache)
        if args.corpus == "climbmix":
            corpus = climbmix_corpus(cache / "data", args.num_shards, args.download_workers)
        else:
            corpus = source_corpus() if args.corpus == "source" else folder_corpus(Path(args.corpus))
        show("corpus", corpus.note)

        # A file's name has the key of what it was made from. A file that exists is complete.
        recipe = [LAYOUT, SPLIT_PATTERN, SPECIAL_TOKENS, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS, DOCUMENT_CHARS]
        path = cache / f"tokenizer-{cache_key(corpus.identity('train'), args.vocab_size, recipe)}.bpe"
        files, new = {"tokenizer": path}, not path.exists()
        if new:
            Tokenizer.train(sample_texts(corpus.documents("train")), args.vocab_size).save(path)
        tokenizer = Tokenizer.load(path)
        vocab_size = tokenizer.get_vocab_size()
        show("tokenizer", f"{vocab_size:,} tokens, {'made' if new else 'up to date'}")
        if vocab_size < args.vocab_size:
            show("", f"note: the text has no more tokens to learn, {args.vocab_size:,} were asked for")

        for split in ("train", "val"):
            path = cache / f"{split}-{cache_key(corpus.identity(split), checksum(files['tokenizer']), recipe)}.bin"
            files[f"{split}_tokens"], files[f"{split}_offsets"] = path, path.with_suffix(".idx")
            if new := not have_tokens(path):
                write_tokens(tokenizer, corpus, split, path)
            offsets = np.fromfile(path.with_suffix(".idx"), np.int64)
            documents = f"{offsets[-1]:,} tokens in {len(offsets) - 1:,} documents"
            show(split, f"{documents}, {'made' if new else 'up to date'}")

        wanted = args.eval_tokens // args.seq_len
        rows = sum(1 for _ in islice(pack_rows(offsets, args.seq_len, forever=False), wanted))  # offsets of val
        if rows == 0:
            text = f"the validation text fills no row of --seq-len {args.seq_len}: choose a smaller one, or add text"
            raise PrepareError(text, 2)
        if rows < wanted:
            show("", f"note: validation has {rows * args.seq_len:,} tokens in whole rows; --eval-tokens asks for more")

        if write_manifest(cache, args, vocab_size, files) == before:
            show("", "everything was there already: nothing to do")
        tokens = f"{rows * args.seq_len:,} validation tokens"
        show("ready", f"scale {args.scale}: rows of {args.seq_len:,} tokens, {args.time_budget} s a run, {tokens}")
        show("", f"in {cache}, harness {fingerprint()}, after {time.monotonic() - started:.1f} s")
        if args.scale == "full" and get_device().type != "cuda":
            show("", "note: there is no CUDA GPU here, and without one a run of this scale does not end in time")
        show("next", "uv run train.py")


def show(what, text):
    print(f"{what:<10} {text}", flush=True)


def remove_damaged(cache):
    """Remove files that are not what the manifest says, so that they are made again. Returns the manifest or None."""
    try:
        manifest = load_manifest(cache)
    except PrepareError:
        return None
    for entry in manifest["files"].values():
        if file_problem(cache / entry["name"], entry["checksum"]) == "damaged":
            (cache / entry["name"]).unlink()
    return manifest


def write_manifest(cache, args, vocab_size, files):
    """Put these files, {kind: path}, in force and remove those of an earlier manifest. Returns the manifest."""
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
        "files": {kind: {"name": path.name, "checksum": checksum(path)} for kind, path in files.items()},
    }
    text = json.dumps({**manifest, "checksum": cache_key(manifest)}, indent=1).encode()
    path = cache / "manifest.json"
    if not path.exists() or path.read_bytes() != text:
        with atomic_write(path) as f:
            f.write(text)
    forget_cache()
    in_force = {path.name for path in files.values()}
    for pattern in ("tokenizer-*", "train-*", "val-*", "*.tmp-*", "unfinished.json"):  # the last is of layout 1
        for path in cache.glob(pattern):
            if path.name not in in_force:
                path.unlink()
    return manifest


# -----------------------------------------------------------------------------
# Command line

NUMBERS = {  # option: (lowest, highest, default or None for the scale's, metavar, meaning)
    "time_budget": (1, 7 * 24 * 3600, None, "S", "seconds a run trains"),
    "seq_len": (1, 2**20, None, "N", "tokens a row"),
    "vocab_size": (260, 65_536, None, "N", "tokens in the vocabulary"),
    "eval_tokens": (1, 2**40, None, "N", "validation tokens scored"),
    "num_shards": (-1, LAST_SHARD, 10, "N", "training shards of climbmix, 100 MB each, or -1 for all"),
    "download_workers": (1, 64, 8, "N", "shards fetched at a time"),
}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="prepare.py",
        usage="uv run prepare.py [options]",
        description="Prepare data, tokenizer and token files, once per machine. What was prepared is in force until "
        "this is run again. A second run with the same options does nothing.",
        epilog=f"Everything is kept in {cache_dir()} (AUTORESEARCH_CACHE names another folder).",
    )
    parser.add_argument(
        "--corpus",
        default="climbmix",
        metavar="climbmix|source|DIR",
        help="climbmix: download prose from the Hugging Face hub (default); source: the Python source files on this "
        "machine, no download; DIR: your own .parquet (column text), .jsonl (key text) or .txt files, the last in "
        "name order is validation",
    )
    scales = "defaults for what follows (default: full with a CUDA GPU, else laptop)"
    parser.add_argument("--scale", choices=list(SCALES), help=scales)
    for name, (_, _, default, metavar, meaning) in NUMBERS.items():
        defaults = default or ", ".join(f"{scale} {values[name]:,}" for scale, values in SCALES.items())
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, metavar=metavar, help=f"{meaning} ({defaults})")
    args = parser.parse_args(argv)
    if args.corpus not in ("climbmix", "source"):
        args.corpus = str(Path(args.corpus).expanduser().resolve())
    args.scale = args.scale or ("full" if get_device().type == "cuda" else "laptop")
    # The command that makes this cache again on any machine: no default in it depends on the machine.
    given = [(name, value) for name, value in vars(args).items() if value != parser.get_default(name)]
    args.command = shlex.join(["uv", "run", "prepare.py", *(f"--{k.replace('_', '-')}={v}" for k, v in given)])
    for name, (low, high, *_) in NUMBERS.items():
        value = SCALES[args.scale].get(name) if getattr(args, name) is None else getattr(args, name)
        if not low <= value <= high or value == args.num_shards == 0:
            limits = f"from {low:,} to {high:,}" + ", not 0" * (low < 0)
            parser.error(f"--{name.replace('_', '-')} needs a whole number {limits}, got {value:,}")
        setattr(args, name, value)
    if args.eval_tokens < args.seq_len:
        parser.error(f"--eval-tokens {args.eval_tokens} is less than one row of --seq-len {args.seq_len}")
    return args


def main(argv=None):
    try:
        prepare(parse_arguments(argv))
    except PrepareError as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:  # a full disk, a folder without write permission
        hint = "fix that, or set AUTORESEARCH_CACHE to another folder, then run it again; what is done stays"
        print(f"prepare.py: error: {error}: {hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
