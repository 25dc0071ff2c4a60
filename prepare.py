"""The fixed half of the harness: data, tokenizer, token files, loader, clock and metric.

    uv run prepare.py                     download climbmix, train the tokenizer, tokenize (once per machine)
    uv run prepare.py --corpus source     the same from the Python source on this machine, without a download
    uv run prepare.py --corpus DIR        the same from your own files of text
    uv run prepare.py run|decide|record   a night: start a run, is it kept?, its row in results.tsv (program.md)

The data goes one way: corpus files → BPE ranks → token files + manifest → packed batches → bits per byte.
Nobody edits this file during research: its bytes are part of the fingerprint under which numbers compare.
`train.py` imports from here. Nothing here imports `train.py`.
"""

import argparse
import base64
import contextlib
import csv
import ctypes
import fcntl
import glob
import gzip
import hashlib
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
from bisect import bisect_left
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from itertools import count, groupby, islice, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

NIGHT = __name__ == "__main__" and sys.argv[1:2] in (["run"], ["decide"], ["record"], ["supervise"])
if not NIGHT:  # these commands need none of it, and importing it takes seconds
    import numpy as np
    import pyarrow.parquet as pq
    import requests
    import tiktoken
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

IMPORTED_AT = time.monotonic()

# -----------------------------------------------------------------------------
# Constants

SCALES = ("full", "desktop", "laptop")
OPTIONS = {  # option of the command line: (lowest, highest, default at each of the SCALES, meaning)
    "time_budget": (1, 7 * 24 * 3600, (300, 300, 60), "seconds a run trains"),
    "seq_len": (1, 2**20, (2048, 1024, 256), "tokens a row"),
    "vocab_size": (260, 65_536, (8192, 8192, 2048), "tokens in the vocabulary"),
    "eval_tokens": (1, 2**40, (40 * 524_288, 2**22, 2**18), "validation tokens scored"),
    "num_shards": (-1, 6542, (10, 10, 10), "training shards of climbmix, 100 MB each, or -1 for all"),
    "download_workers": (1, 64, (8, 8, 8), "shards fetched at a time"),
}

# GPT-4's pattern, but with at most two digits a token: numbers must not fill a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ["<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>"]  # the first opens every document
TOKENIZER_CHARS = 100_000_000  # text that the tokenizer learns from; twice as much compresses no better
TOKENIZER_DOC_CHARS = 10_000  # of one document, so that no long document dominates

DOCUMENT_CHARS = 4_000  # a longer document is cut (not in climbmix): a row takes a document whole or its beginning
VAL_SHARE = 0.05  # share of the text that is validation, if nothing is named so
MIN_VAL_ROWS = 16  # fewer validation rows say nothing
BUFFER_DOCS, REFILL_DOCS = 1_000, 128  # documents from which a row is packed; documents read at a time
PREFETCH = 3  # batches made ahead

CAUSALITY_ROWS = 64  # validation rows on which causality is checked, each at a random position of its own
CAUSALITY_ROWS_PER_BATCH = 16  # at most: their logits are kept for the comparison
CAUSALITY_TOLERANCE = 1e-3  # logits; a smaller leak is worth less than the noise of a seed
ROWS_PER_LOSS = 8  # rows of logits that are scored in one call: fewer take more calls, more take more memory


class PrepareError(Exception):
    """An error that the user can fix. One line: what was found, what was expected, and the command that fixes it."""


class EvaluationError(Exception):
    """The model breaks the contract of `evaluate_bpb`, so it gets no number."""


# -----------------------------------------------------------------------------
# Cache: one folder for everything prepared, and a manifest that says what is in force

MANIFEST = "autoresearch-manifest.json"


def cache_dir():
    """The folder of everything prepared: `~/.cache/autoresearch`, or AUTORESEARCH_CACHE."""
    folder = Path(os.path.expanduser(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"))
    if not folder.is_absolute():  # a worktree would look elsewhere; without HOME a "~" stays
        raise PrepareError(f"{folder} is a relative path: set AUTORESEARCH_CACHE to the whole path of a folder")
    return folder


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


def write_json(path, facts):
    with atomic_write(path) as f:
        f.write(json.dumps(facts, indent=1).encode())


@contextlib.contextmanager
def cache_lock(cache):
    """Lets one prepare.py at a time work in a folder. The lock ends with its process, also after kill -9."""
    with open(cache / ".autoresearch-lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another prepare.py is at work: waiting for it to end", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


@cache
def load_manifest(cache):
    """What is in force in the cache folder: constants, files with their checksums, the command that made it."""
    path = cache / MANIFEST
    if not path.exists():
        raise PrepareError(f"nothing is prepared in {cache}: run `uv run prepare.py` (no download: --corpus source)")
    with contextlib.suppress(ValueError, KeyError, AttributeError, TypeError):  # no JSON, or of another shape
        manifest = json.loads(path.read_bytes())
        if manifest.pop("checksum") == cache_key(manifest):
            return manifest
    raise PrepareError(f"{path} is damaged or of another version: run `uv run prepare.py` with the options used before")


@cache
def open_cache(cache):
    """The manifest, after a check of every file that it names. Raises PrepareError for a missing or damaged file."""
    manifest = load_manifest(cache)
    for name, expected in manifest["files"].values():
        if not (cache / name).exists() or checksum(cache / name) != expected:
            raise PrepareError(f"{cache / name} is missing or damaged: `{manifest['command']}` makes it again")
    return manifest


def forget_cache():
    """Read everything anew at the next call, since the cache has changed."""
    for function in (load_manifest, open_cache, Tokenizer.from_directory, read_tokens):
        function.cache_clear()


def constants():
    """{name: value} of the constants in force."""
    return open_cache(cache_dir())["constants"]


def __getattr__(name):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE and SCALE: as prepared, read when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE", "SCALE"):
        return constants()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint():
    """12 hex digits over all that val_bpb depends on. Two values of val_bpb compare only if it is the same."""
    files = open_cache(cache_dir())["files"]
    made = [expected for _, expected in (files["tokenizer"], files["val_tokens"])]
    return cache_key(checksum(__file__), torch.__version__, constants(), made)


# -----------------------------------------------------------------------------
# Corpus: files in reading order, the documents in them, and which of these are validation

KINDS = (".parquet", ".jsonl", ".csv", ".txt", ".md")  # of a user's own files, each also with .gz
VAL_NAME = re.compile(r"(?i)(?<![a-z])(val|valid|validation|dev|test)(?![a-z])")  # not latest.txt


class Corpus:
    """Files of training and of validation text in reading order, and how they are read.

    If both are the same files, the last VAL_SHARE of the characters is validation: one document at most is divided.
    """

    def __init__(self, train, val, note, column="text", length=DOCUMENT_CHARS):
        self.paths, self.shared, self.note = {"train": train, "val": val}, train == val, note
        self.column, self.length = column, length

    def key(self, split):
        """Hex key of a split: other files (name, size, modification time) or another way to read them change it."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths[split]]
        return cache_key(files, self.column, self.length, [split, VAL_SHARE] if self.shared else [])

    @cached_property
    def chars(self):
        return sum(map(len, read_texts(self.paths["train"], self.column)))

    def documents(self, split):
        """Yields the documents (str) of a split, none of them empty. Raises PrepareError for a file of no use."""
        start = 0
        for text in read_texts(self.paths[split], self.column):
            for piece in cut(text, self.length):
                side = ("val" if start >= (1 - VAL_SHARE) * self.chars else "train") if self.shared else split
                if side == split and piece.strip():
                    yield piece
                start += len(piece)


def cut(text, length):
    """Pieces of about `length` characters, each to the end of a line where there is one; [text] if length is None."""
    return re.findall(rf"(?s).{{1,{length - 1}}}(?:\n|\Z)|.{{{length}}}", text) if length else [text]


def read_texts(paths, column):
    """Yields the texts (str, "" for null) of these files. Raises PrepareError for a file of no use."""
    for path in tqdm(paths, desc="reading", unit="file", leave=False, disable=None):
        number = 1
        try:
            for row in read_rows(path, column):
                text = row.get(column, row) or ""
                if not isinstance(text, str):
                    columns = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items())
                    raise ValueError(f"no text in column {column}; there is {columns}: choose by --text-column NAME")
                yield text
                number += 1
        except Exception as error:  # of many kinds: every format has a library of its own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise PrepareError(f"{path} can't be used (row {number}: {reason}): fix or remove it") from error


def read_rows(path, column):
    """Yields the rows of a file as {column: text}. In a text file <|endoftext|> ends a row."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        with pq.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None  # all, for the message
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
        return
    errors = "replace" if kind == ".py" else "strict"  # the user can't change the encoding of an installed package
    with (gzip.open if name.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", errors=errors) as file:
        if kind == ".jsonl":
            yield from (json.loads(line) for line in file if line.strip())
        elif kind == ".csv":
            csv.field_size_limit(sys.maxsize)
            yield from csv.DictReader(file)
        else:
            rest = ""
            while block := file.read(2**26):  # memory for a document, not for the file
                *texts, rest = (rest + block).split("<|endoftext|>")
                yield from ({column: text} for text in texts)
            yield {column: rest}


def source_corpus():
    """The Python source on this machine: `.py` files of the standard library and of installed packages.

    Whole packages are taken for validation, in the order of a hash of their name, up to 5 % of the bytes. Files come
    in the order of a hash too, so that a short run sees something of every package.
    """
    packages = defaultdict(dict)  # package -> {name below its root: path}
    for root in dict.fromkeys(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")):
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            # site-packages may lie inside the standard library's folder, but is a root of its own
            if path.is_file() and not {"site-packages", "dist-packages"} & set(name.parts):
                packages[name.parts[0].removesuffix(".py")][str(name)] = path
    sizes = {package: sum(path.stat().st_size for path in files.values()) for package, files in packages.items()}
    room, train, val = VAL_SHARE * sum(sizes.values()), {}, {}
    for package in sorted(packages, key=cache_key):
        if 0 < sizes[package] <= room:
            val.update(packages[package])
            room -= sizes[package]
        else:
            train.update(packages[package])
    train, val = ([side[name] for name in sorted(side, key=cache_key)] for side in (train, val))
    return Corpus(train, val, f"Python source: {len(train):,} files, validation {len(val):,} files of other packages")


def own_corpus(path, column, length=DOCUMENT_CHARS):
    """The user's own file, or those of a folder, sub-folders included; part-2 is read before part-10."""
    found = [name for name in glob.glob("**", root_dir=path, recursive=True) or ["."] if (path / name).is_file()]
    found.sort(key=lambda name: (re.sub(r"\d+", lambda number: number[0].zfill(20), name), name))
    found = {os.path.realpath(path / name): name for name in reversed(found)}.values()  # once, whatever links there are
    found = [*found][::-1]
    names = [name for name in found if str(path / name).lower().removesuffix(".gz").endswith(KINDS)]
    if not names:
        seen = ", ".join(sorted({(path / name).suffix or (path / name).name for name in found})[:8]) or "nothing"
        raise PrepareError(f"--corpus {path} needs files of {', '.join(KINDS)}, gzipped or not; there is: {seen}")
    train, val = ([path / name for name in names if bool(VAL_NAME.search(name)) == side] for side in (False, True))
    note = f"{len(train):,} file(s) for training, {len(val):,} for validation"
    if not train or not val:
        train = val = train + val
        note = f"{len(train):,} file(s), the last {VAL_SHARE:.0%} of the text for validation"
    return Corpus(train, val, f"{path}: {note}", column, length)


def climbmix_corpus(folder, num_shards, workers):
    """The first `num_shards` training shards of climbmix (-1: all) and VAL_SHARD, downloaded where they are missing."""
    count = LAST_SHARD if num_shards == -1 else num_shards
    names = [f"shard_{i:05d}.parquet" for i in range(count)] + [VAL_SHARD]
    download_shards(names, folder, workers)
    paths = [folder / name for name in names]
    note = f"climbmix: {count:,} training shard(s), validation {VAL_SHARD}"
    return Corpus(paths[:-1], paths[-1:], note, length=None)  # whole documents, as the original has them


# -----------------------------------------------------------------------------
# Download. A shard appears under its name when its sha256 has been verified, so a shard that is there is a good one

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
VAL_SHARD = f"shard_{LAST_SHARD:05d}.parquet"  # pinned: never trained on
SHARD_BYTES = 100_000_000  # about
INCOMING = ".autoresearch-incoming"  # what is being fetched; emptied after each attempt
HUB_TIMEOUT = 5  # seconds until a hub that does not answer counts as unreachable
RETRY_PAUSES = (1, 5, 25)  # seconds before the second, third and fourth attempt


def require_hub():
    """The hub's address (HF_ENDPOINT or huggingface.co), after it answered. Raises PrepareError within seconds.

    huggingface_hub by itself takes half a minute to say that nothing answers.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        if HF_HUB_OFFLINE:
            raise requests.ConnectionError("HF_HUB_OFFLINE is set")
        requests.head(endpoint, timeout=HUB_TIMEOUT)
    except requests.RequestException as error:
        check = "check network, proxy (HTTPS_PROXY) and mirror (HF_ENDPOINT); `--corpus source` needs no network"
        raise PrepareError(f"cannot reach {endpoint} ({failure_reason(error)}): {check}") from error
    return endpoint


def failure_reason(error):
    """Why a request failed, in a short line without the signed URLs of the libraries' messages."""
    while (response := getattr(error, "response", None)) is None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    if response is not None:
        return f"HTTP {response.status_code}"
    return re.sub(r"https?://\S+| \(\(…\)\S+", "", str(error) or type(error).__name__).splitlines()[0][:200]


def fetch_shard(path, endpoint):
    """One attempt to have the verified shard under `path`. Returns None, or why it could not be fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = dict(repo_type="dataset", endpoint=endpoint)
    try:
        announced = get_hf_file_metadata(hf_hub_url(REPO, path.name, **where)).etag  # the library compares only lengths
        file = hf_hub_download(REPO, path.name, local_dir=path.parent / INCOMING, **where)
        if checksum(file) != announced:
            os.unlink(file)
            return f"{path.name} (its sha256 is not the one that the hub names; a bad mirror or proxy?)"
        with open(file, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(file, path)
    except Exception as error:  # of many kinds
        return f"{path.name} ({failure_reason(error)})"


def download_shards(names, folder, workers):
    """Make sure that every shard of `names` is in `folder`. What is there costs no request. What was fetched stays."""
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # its warnings have signed addresses

    folder.mkdir(parents=True, exist_ok=True)
    for pause in (*RETRY_PAUSES, None):
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            return
        needed = SHARD_BYTES * (len(missing) + len(names))  # the token files take about as much as all shards
        if (free := shutil.disk_usage(folder).free) < needed:
            text = f"{folder} has {free / 1e9:.1f} GB free, shards and token files need about {needed / 1e9:.1f} GB"
            raise PrepareError(f"{text}: ask for fewer (--num-shards), or use another disk (AUTORESEARCH_CACHE=/path)")
        endpoint = require_hub()
        bar, done = tqdm(desc="download", total=len(missing), unit="shard", disable=None), 0
        with bar, ThreadPool(min(workers, len(missing))) as pool:  # its threads don't survive Ctrl-C
            fetched = [pool.apply_async(fetch_shard, [folder / name, endpoint]) for name in missing]
            while done < len(missing):
                time.sleep(0.1)  # Ctrl-C ends a sleep; a lock that another thread holds may outlast it
                done = sum(result.ready() for result in fetched)
                bar.update(done - bar.n)
            problems = sorted(filter(None, (result.get() for result in fetched)))
        shutil.rmtree(folder / INCOMING, ignore_errors=True)
        if not problems:
            return
        if pause is None or all(re.search(r"\(HTTP 40[134]\)", problem) for problem in problems):
            break  # another attempt changes nothing
        print(f"{len(problems)} shards are missing, {problems[0]}: next attempt in {pause} s", flush=True)
        time.sleep(pause)
    text = "; ".join(problems[:4]) + f" and {len(problems) - 4} more" * (len(problems) > 4)
    mend = "What was fetched stays, run it again (HTTP 401, 403: HF_TOKEN; 404: is HF_ENDPOINT a full mirror?)"
    raise PrepareError(f"{len(problems)} of {len(names)} shards could not be fetched: {text}. {mend}")


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
        mergeable_ranks = {token: rank for rank, token in enumerate(ranks)}
        self.encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens=specials
        )
        self.bos_token_id = specials[SPECIAL_TOKENS[0]]

    @classmethod
    def train(cls, texts, vocab_size):
        """Learn `vocab_size` tokens, special ones included, from an iterator of str; fewer if the text has no more."""
        import rustbpe

        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(map(well_formed, texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls([bytes(token) for token, _rank in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])])

    @classmethod
    @cache
    def from_directory(cls, folder=None):
        """The prepared tokenizer. Raises PrepareError if the cache is missing or damaged."""
        folder = Path(folder or cache_dir())
        return cls.load(folder / open_cache(folder)["files"]["tokenizer"][0])

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

    def encode(self, text):
        return [i for piece in split_long_runs(text) for i in self.encoding.encode_ordinary(piece)]

    def encode_document(self, text):
        """Token ids of a document after a BOS, uint16 of shape (n + 1,)."""
        return np.array([self.bos_token_id, *self.encode(text)], np.uint16)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def token_bytes(self):
        """Length in bytes of each token's own bytes, int64 of shape (V,); special tokens have 0."""
        return np.array([len(token) for token in self.ranks] + [0] * len(SPECIAL_TOKENS))


def split_long_runs(text):
    """Cut the text inside runs of 10,000 spaces or non-spaces: BPE's time grows with the square of a run's length."""
    start = 0
    for run in re.finditer(r"\s{10000}|\S{10000}", text):
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
        yield text[:TOKENIZER_DOC_CHARS]
        total += len(text[:TOKENIZER_DOC_CHARS])
        if total >= TOKENIZER_CHARS:
            return


def get_token_bytes(device="cpu"):
    """Length in bytes of each token of the prepared tokenizer, int32 tensor of shape (V,); special tokens have 0."""
    return torch.from_numpy(Tokenizer.from_directory().token_bytes()).to(device=device, dtype=torch.int32)


# -----------------------------------------------------------------------------
# Token files: all token ids of a split, uint16. Each document begins with a BOS, and so does the file


def write_tokens(tokenizer, documents, path):
    """Tokenize on all cores into `path`. Raises PrepareError if there is no text."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those of this job
    documents = iter(documents)
    with ThreadPoolExecutor(cores) as pool, atomic_write(path) as tokens:
        while texts := list(islice(documents, 256 * cores)):
            for ids in pool.map(tokenizer.encode_document, texts):  # tiktoken releases Python's lock
                tokens.write(ids.tobytes())
        if tokens.tell() == 0:
            raise PrepareError("the files hold no text, or too little for a validation part: add text")


@cache
def read_tokens(split):
    """The tokens of a prepared split, memory-mapped: uint16 (N,)."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    return map_tokens(cache_dir() / open_cache(cache_dir())["files"][f"{split}_tokens"][0])


def map_tokens(path):
    return np.memmap(path, np.uint16, "r").view(np.ndarray)  # slicing a plain array costs a tenth of a memmap's


# -----------------------------------------------------------------------------
# Device


def get_device():
    """Where training and evaluation run: DEVICE from the environment, else CUDA, else Apple's MPS, else the CPU.

    Raises PrepareError if DEVICE names no device of this machine.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [name for name in available if available[name]]
    name = os.environ.get("DEVICE") or here[0]
    if name not in here:
        raise PrepareError(f"DEVICE={name!r} is not on this machine, which has: {', '.join(here)}")
    return torch.device(name)


def bfloat16_works(device):
    """Whether a run computes in bfloat16 on this device (CUDA of compute capability 8 or more), else in float32."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8  # compiled code may ask this


def default_scale(device):
    if device.type == "cpu":
        return "laptop"
    large = bfloat16_works(device) and torch.cuda.get_device_properties(device).total_memory >= 38e9
    return "full" if large else "desktop"


def check_gpu(device, scale):
    """Raises PrepareError if this GPU can't do what a run of this scale needs."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(map(int, re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))), default=0)
        if 10 * major + minor < oldest:
            text = f"PyTorch has no kernels for {device_name()}: its compute capability is under {oldest / 10}"
            raise PrepareError(f"{text}: install an older PyTorch, or use the CPU with DEVICE=cpu")
    if scale == "full" and device.type != "cpu" and not bfloat16_works(device):
        text = f"scale full needs a CUDA GPU of compute capability 8 or more, this is {device_name()}"
        raise PrepareError(f"{text}: `uv run prepare.py --scale desktop`")


def missing_gpu(device, scale):
    """What to say if a GPU is expected here and PyTorch sees none, or None. DEVICE=cpu says that none is expected."""
    driver = os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/dxg")  # NVIDIA's, the second in WSL2
    if device.type != "cpu" or os.environ.get("DEVICE") or (scale == "laptop" and not driver):
        return None
    text = f"scale {scale}, but PyTorch {torch.__version__} (CUDA: {torch.version.cuda}) sees no GPU"
    return text + ", although NVIDIA's driver is here: README, Another PyTorch" * driver


def peak_memory_mb():
    """Peak memory in MiB: allocated on a CUDA GPU, held by the driver for MPS, resident on a CPU."""
    device = get_device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # it keeps what it had at the peak
    unit = 1 if platform.system() == "Darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def device_name():
    name = f"CPU, {torch.get_num_threads()} thread(s)"
    if get_device().type == "cuda":
        name = torch.cuda.get_device_name()
    elif get_device().type == "mps":
        name = f"Apple GPU, {platform.machine()}"
    return f"{name}, torch {torch.__version__}"


# -----------------------------------------------------------------------------
# Loader


def pack_rows(tokens, T, forever):
    """Best-fit packing: yields (row, epoch), a row being [(start, length), …] of T + 1 tokens together.

    A row is filled from a buffer of documents with the longest one that fits whole. Where none fits, it takes the
    beginning of the shortest one, whose rest is dropped. Among equals the one read first is taken. The buffer takes in
    REFILL_DOCS documents whenever it has fewer than BUFFER_DOCS: one by one, documents longer than a row would fill it.
    No padding: a row that the end of the data leaves unfilled is dropped. `epoch` counts passes over the data from 1.
    """
    stream, buffer, epoch = document_stream(tokens, forever), [], 1
    while True:
        row, room = [], T + 1
        while room:
            while len(buffer) < BUFFER_DOCS and (more := list(islice(stream, REFILL_DOCS))):
                buffer = sorted(buffer + more)
            if not buffer:
                return
            i = bisect_left(buffer, (room + 1,))  # the first that is too long
            if i:
                i = bisect_left(buffer, (buffer[i - 1][0],))  # the first of the longest that fit
            length, passed, start = buffer.pop(i)
            row.append((start, min(length, room)))
            room, epoch = max(room - length, 0), max(epoch, passed)
        yield row, epoch


def document_stream(tokens, forever):
    """Yields (length, pass over the data from 1, start) of each document in order, once or again and again."""
    for passed in count(1) if forever else [1]:
        start = 0
        for block in range(1, len(tokens), 2**20):  # in blocks: a large file stays on disk
            for end in (block + np.flatnonzero(tokens[block : block + 2**20] == tokens[0])).tolist():
                yield end - start, passed, start
                start = end
        yield len(tokens) - start, passed, start


def fill_rows(tokens, rows, out):
    """Copy the pieces of `rows` into `out`, (B, T + 1) of any integer type. Returns the last row's epoch."""
    for line, (row, epoch) in zip(out, rows):  # noqa: B007
        np.concatenate([tokens[start : start + length] for start, length in row], out=line)
    return epoch


def make_dataloader(tokenizer, B, T, split):
    """Yields (x, y, epoch) forever: int64 tensors (B, T) on the device, y being the tokens that follow x's.

    Every row starts with BOS and is packed as `pack_rows` says. The same split, B and T give the same batches. A batch
    that was handed out never changes. The first one starts the clock. Raises PrepareError, or ValueError for an
    impossible B, T or split.
    """
    if B < 1 or T < 1:
        raise ValueError(f"make_dataloader needs B ≥ 1 and T ≥ 1, got B={B}, T={T}")
    tokens = read_tokens(split)
    if tokenizer.get_vocab_size() != constants()["VOCAB_SIZE"]:
        raise PrepareError("this tokenizer is not the one that made the tokens: use Tokenizer.from_directory()")
    return on_the_clock(batches(tokens, B, T, get_device()))


def on_the_clock(items):
    for item in items:
        clock.start()
        yield item


def batches(tokens, B, T, device):
    """The generator behind `make_dataloader`, on any tokens (N,). A thread makes batches ahead."""
    rows = pack_rows(tokens, T, forever=True)
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
# Run: clock, seed, report


class Clock:
    """The time that a model has to learn in, from the first training batch to the beginning of evaluation.

    Everything in between counts. Another batch or evaluation after that continues the time as if it had never stopped.
    """

    def __init__(self):
        self.started = self.stopped = None
        self.asked = [0.0, 0.0, 0.0]  # seconds() at the last three calls of time_is_up()

    def start(self):
        if self.started is None:
            self.started = time.monotonic()
            if get_device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the warm-up's attempts are not the run's memory
        self.stopped = None

    def stop(self):
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

    def limit(self):
        """Seconds after which a run is void: the last step may end a little after the budget."""
        return 1.02 * constants()["TIME_BUDGET"] + 1

    def time_is_up(self):
        """Asked before each step: is the budget used, or would another step end beyond the limit?"""
        self.asked = [*self.asked[1:], self.seconds()]
        step = 1.1 * max(after - before for before, after in pairwise(self.asked))  # no two take the same time
        return self.progress() >= 1.0 or self.asked[-1] + step > self.limit()

    def problem(self):
        """Why the time of training breaks the rules, or None."""
        if self.started is None:
            return "no batch of training data was asked for, so the clock never ran"
        if self.seconds() > self.limit():
            return f"training took {self.seconds():.1f} s of a budget of {constants()['TIME_BUDGET']} s"
        return None


clock = Clock()


def get_seed():
    """The seed of this run: the environment's SEED, 0 by default. Raises PrepareError if it is not a whole number."""
    text = os.environ.get("SEED", "0")
    if not text.isdecimal() or int(text) >= 2**32:
        raise PrepareError(f"SEED={text!r} is not a whole number from 0 to 4294967295: `SEED=1 uv run train.py`")
    return int(text)


def start_run():
    """Begin a run: check and open the cache, set all seeds. Returns the device.

    Raises PrepareError before anything has been computed.
    """
    device, scale = get_device(), constants()["SCALE"]
    check_gpu(device, scale)
    if scale != "laptop" and (problem := missing_gpu(device, scale)):
        raise PrepareError(f"{problem}. To run on the CPU nevertheless: `DEVICE=cpu uv run train.py`")
    for split in ("train", "val"):
        read_tokens(split)  # open from now on: another prepare.py can't take the files away
    get_token_bytes()
    random.seed(get_seed())
    np.random.seed(get_seed())
    torch.manual_seed(get_seed())  # on every device
    return device


def report(val_bpb, *, mfu_percent, total_tokens, num_steps, num_params, depth, attention):
    """Print the block that every tool greps. The harness adds what it knows itself. `run` finds it in run.json too."""
    memory, seed = peak_memory_mb(), torch.initial_seed()
    other = seed != get_seed() and f"train.py set torch's seed to {seed}, the harness set it to SEED={get_seed()}"
    problems = [problem for problem in (clock.problem(), other) if problem]
    for problem in problems:
        print(f"warning: this number does not count: {problem}")
    lines = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{clock.seconds():.1f}",
        "total_seconds": f"{time.monotonic() - IMPORTED_AT:.1f}",
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
    }
    print("---")
    for name, value in lines.items():
        print(f"{name + ':':<18}{value}")
    sys.stdout.flush()
    if name := os.environ.get("AUTORESEARCH_RUN"):  # the harness started this run and waits for its number
        facts = {**lines, "memory_gb": f"{memory / 1024:.1f}", "problems": problems}
        write_json(Path(name), {**json.loads(Path(name).read_bytes()), "report": facts})


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
    T = constants()["MAX_SEQ_LEN"]
    if clock.problem():
        print(f"warning: {clock.problem()}", file=sys.stderr)
    if batch_size < 1:
        raise ValueError(f"evaluate_bpb needs batch_size ≥ 1, got {batch_size}")
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        tokens = read_tokens("val")
        rows = list(islice(pack_rows(tokens, T, forever=False), constants()["EVAL_TOKENS"] // T))
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
# Night: a run is started and watched over by prepare.py. Its result is run.json, beside run.log

GRACE = 540  # seconds that a run has besides its budget, for compilation and evaluation, before it is ended
BEAT, WATCH = 3, 15  # seconds between two signs of life of a run; seconds without one after which it was cut off
BASELINES = 3  # runs of the baseline before the first idea, at least; with several GPUs one more
CHECK_SEEDS = (100, 101, 102)  # seeds that had no part in the choice of what was kept
ERROR = re.compile(r"Fatal Python error|train\.py: error|[\w.]*(Error|Exception|Interrupt)\b")


def git(*arguments, tree=".", text=None):
    """What git prints. The user's settings and locale change nothing in it."""
    settings = ["-c", "log.showSignature=false", "-c", "i18n.logOutputEncoding=UTF-8"]
    options = dict(encoding="utf-8", errors="replace", stderr=subprocess.PIPE, stdout=subprocess.PIPE, check=True)
    return subprocess.run(["git", "-C", str(tree), *settings, *arguments], input=text, **options).stdout.strip()


def open_night():
    """(branch, trees, rows): the trees are the worktrees in .waves, or the clone alone. Raises PrepareError."""
    branch = git("branch", "--show-current")
    if not branch.startswith("autoresearch/"):
        raise PrepareError(f"a night has a branch autoresearch/…, this is {branch or 'none'}: git switch to it")
    waves = [path.parent for path in Path(".waves").glob("[0-9]*/.git")]
    trees = sorted(waves, key=lambda tree: (len(tree.name), tree)) or [Path()]  # 10 after 9
    return branch, trees, read_results(Path("results.tsv"), branch)


def find_idea(tree, head):
    """The last commit after `head` that changes train.py, or "". What the human commits in the night is no idea."""
    changed = git("diff", "--name-only", head, "HEAD", "--", "train.py", tree=tree)
    return changed and git("log", "-1", "--format=%H", f"{head}..", "--", "train.py", tree=tree)


def check_idea(idea, head):
    """Raises PrepareError for an idea that is not one commit on top of the head, which changes train.py alone."""
    if git("diff", "--name-only", head, f"{idea}~1", "--", "train.py"):
        raise PrepareError(f"{idea[:7]} must be one commit on top of {head[:7]}: make it that, and run it again")
    if git("diff", "--name-only", f"{idea}~1", idea, "--", ".", ":!train.py"):
        raise PrepareError(f"{idea[:7]} changes more than train.py: take that back with git commit --amend")


def plan_runs(trees, rows, check=False):
    """{tree: (commit, kind, seed)} of the runs that the night needs now. Raises PrepareError for an impossible idea.

    Baseline and check need several seeds: the first tree takes the first one that has no row, the second tree the
    second. So every job of a cluster finds its own without a word from the others, and the same one if it starts again.
    """
    kept, ran = kept_commits(rows) or ["HEAD"], recorded(rows)
    base, head = git("rev-parse", kept[0], kept[-1]).split()
    if check:
        jobs = [(commit, "check", seed) for seed in CHECK_SEEDS for commit in dict.fromkeys([base, head])]
    elif base == head and len(rows) < BASELINES + (len(trees) > 1):
        jobs = [(base, "baseline", seed) for seed in range(len(rows) + len(trees))]
    else:
        plan = {}
        for tree in trees:
            idea = find_idea(tree, head)
            if idea and (idea[:7], 0) not in ran and (idea, "idea", 0) not in plan.values():
                check_idea(idea, head)
                plan[tree] = idea, "idea", 0
        return plan
    return dict(zip(trees, [job for job in jobs if (job[0][:7], job[2]) not in ran]))


def read_run(tree):
    """(what run.json of a tree says, the time of its last sign of life), or ({}, 0) without one."""
    try:
        with open(tree / "run.json", "rb") as f:  # opening it asks a network disk for its time of now
            return json.load(f), os.fstat(f.fileno()).st_mtime_ns
    except (FileNotFoundError, ValueError):
        return {}, 0


def is_new(run, job, branch, rows):
    """Whether run.json is of the run that its tree is for, or of a check that has no row yet."""
    if run.get("branch") != branch:  # none, or of another night
        return False
    commit, kind, seed = run["commit"], run["kind"], run["seed"]
    return job == (commit, kind, seed) or (kind == "check" and (commit[:7], seed) not in recorded(rows))


def find_quiet(trees):
    """{tree: time of its last sign of life} of the trees in which no run lives: only that the time stands still counts.

    So no clock and no lock of another machine is trusted. Takes WATCH seconds if a run was cut off.
    """
    runs, deadline = {tree: read_run(tree) for tree in trees}, time.monotonic() + WATCH
    quiet = {tree: sign for tree, (_, sign) in runs.items()}
    unsure = {tree for tree, (run, _) in runs.items() if run and "exit" not in run}
    while unsure & quiet.keys() and time.monotonic() < deadline:
        time.sleep(0.5)
        quiet = {tree: sign for tree, sign in quiet.items() if read_run(tree)[1] == sign}
    return quiet


def run(*words):
    """Start what the night needs next, in the background: a run in the clone, or one in each worktree.

    `run 2` is worktree 2 alone, in the foreground: a job of Slurm. `run check`: baseline and branch on fresh seeds.
    `run again`: what has ended too. Returns the exit status. Raises PrepareError if there is nothing to start.
    """
    numbers = [word for word in words if word.isdecimal()]
    if {*words} - {"check", "again", *numbers[:1]}:
        raise PrepareError("it is `prepare.py run`, `run check` or `run again`, and the number of a worktree at most")
    load_manifest(cache_dir())  # if nothing is prepared, this says so
    chosen = [tree for tree in open_night()[1] if tree.name in (numbers or [tree.name])]
    quiet, started, problems = find_quiet(chosen), [], []
    with one_at_a_time():
        branch, trees, rows = open_night()
        plan = plan_runs(trees, rows, "check" in words)
        for tree in chosen:
            job, (before, sign) = plan.get(tree), read_run(tree)
            if sign != quiet.get(tree):
                problems.insert(0, f"{tree / 'run.json'}: a run is going on: `uv run prepare.py decide` waits for it")
            elif is_new(before, job, branch, rows) and "exit" in before and "again" not in words:
                problems.append(f"the run of {before['commit'][:7]} has ended: `uv run prepare.py record`")
            elif (not job or job[1] == "idea") and git("status", "--porcelain", "-uno", "--", "train.py", tree=tree):
                problems.append(f"{tree / 'train.py'} has changes without a commit: git commit it first")
            elif job:
                begin(tree, job, branch)
                started.append(tree)
    if not started:
        raise PrepareError([*problems, "nothing new to run: commit an idea (for a check: `run check`)"][0])
    if numbers:
        return supervise(*started)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(trees))))).split(",")
    for tree in started:
        gpu = {} if trees == [Path()] else {"CUDA_VISIBLE_DEVICES": "".join(gpus[trees.index(tree) :][:1])}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, __file__, "supervise", str(tree)]
        subprocess.Popen(command, env={**os.environ, **gpu}, start_new_session=True, **streams)
    return 0


def begin(tree, job, branch):
    """Write the files of a run. What runs is a copy of the commit, so nobody edits it meanwhile."""
    commit, kind, seed = job
    (tree / "run.py").write_text(git("show", f"{commit}:./train.py", tree=tree), encoding="utf-8")
    (tree / "run.log").unlink(missing_ok=True)  # a process that an earlier run left behind writes on into the old one
    facts = {"commit": commit, "kind": kind, "seed": seed, "branch": branch, "started": time.strftime("%F %T")}
    write_json(tree / "run.json", facts)
    print(f"started {name_of(tree, *job)}", flush=True)


def name_of(tree, commit, kind, seed):
    return f"{'' if tree == Path() else f'{tree}: '}{kind} {commit[:7]}, seed {seed}"


def supervise(tree):
    """Run run.py to its end, and renew the time of run.json meanwhile. Then write into it how the run ended.

    Who ends the supervisor ends the run too, and nothing is written: such a run was cut off.
    """
    path, log = tree / "run.json", tree / "run.log"
    limit = load_manifest(cache_dir())["constants"]["TIME_BUDGET"] + GRACE
    env = {**os.environ, "SEED": str(read_run(tree)[0]["seed"]), "AUTORESEARCH_RUN": str(path.resolve())}
    env |= {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    options = dict(cwd=tree, env=env, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with open(log, "xb") as output:
        process = subprocess.Popen([sys.executable, "run.py"], stdout=output, stderr=output, **options)
        os.dup2(output.fileno(), 2)  # a fault of the supervisor itself is read there too
    try:
        deadline = time.monotonic() + limit
        while process.poll() is None and time.monotonic() < deadline:
            os.utime(path)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(BEAT)
        reason = "" if process.poll() is not None else f"it hung: ended by the harness after {limit} s"
        process.send_signal(signal.SIGABRT)  # Python prints where it hangs; nothing happens to what has ended
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(BEAT)
        if process.returncode == -signal.SIGTERM:
            time.sleep(2)  # a cluster ends the whole job: the next signal is ours
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    status = process.wait()
    write_json(path, {**read_run(tree)[0], "exit": status, "reason": reason or last_words(log, status)})
    return 0


def end_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a run that was cut off leaves nothing behind


def last_words(log, status=0):
    """The last line of a log that looks like an error, else the last line; of a run that was killed, the signal too."""
    text = log.read_text(encoding="utf-8", errors="replace")[-20_000:] if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    errors = [line for line in lines if ERROR.match(line)] if status else []
    killed = f"killed by {signal.Signals(-status).name}: " if status < 0 and not errors else ""
    return one_line(killed + (errors or lines)[-1])


# -----------------------------------------------------------------------------
# Night: results.tsv, and the rule that says which run is kept. program.md says when to call it

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
KEEP_MARGIN = 1.5  # standard deviations of the baseline by which an idea must be better
KEEP_WAVES = 50  # waves without a keep after which the margin is 0: a kept number is partly luck
DESCRIPTION = re.compile(r"(?:wave (?P<wave>\d+): )?(?:(?P<simpler>simpler)|(?:baseline|check), seed (?P<seed>\d+))?")
DECIDE_WAIT = 40  # seconds that `decide` waits for runs: many agents' shells end a command after a minute


def bars(rows):
    """([the bar of each row], head, margin, n): what each run had to beat, and what the next one has to beat.

    rows: (commit, val_bpb, status, description) of one night in order. It begins with the runs of the baseline, one
    commit with several seeds. Of each wave ("wave 2: …"; on one GPU each run is a wave) the best is kept if it is below

        head - margin · (1 - n/KEEP_WAVES)

    head    the mean of the baseline, later the number of the last kept run
    margin  KEEP_MARGIN standard deviations of the baseline
    n       waves since the last keep, at most KEEP_WAVES

    A change whose description begins with `simpler` has the bar head + margin, and never raises head. A kept commit
    that runs again (a check) has no bar (nan) and moves none. Nothing has one while the baseline has fewer than three
    numbers. tests/test_decision_rule.py is the evidence for this rule.
    """
    found, kept, ideas = [math.nan] * len(rows), {row[0] for row in rows[:1]}, []
    for i, (commit, _, status, _) in enumerate(rows):
        if commit not in kept:
            ideas.append(i)
        if status == "keep":
            kept.add(commit)
    baseline = rows[: ideas[0]] if ideas else rows
    noise = [value for _, value, status, _ in baseline if status == "keep"]
    if len(noise) < 3:
        return found, math.nan, math.nan, 0
    head, margin, n = statistics.mean(noise), KEEP_MARGIN * statistics.stdev(noise), 0
    notes = [DESCRIPTION.match(row[3]) for row in rows]
    for _, wave in groupby(ideas, key=lambda i: notes[i]["wave"] or -i):
        wave = list(wave)
        for i in wave:
            found[i] = head + margin if notes[i]["simpler"] else head - margin * (1 - n / KEEP_WAVES)
        statuses = [rows[i][2] for i in wave]
        if "keep" in statuses:
            value, i = min((rows[i][1], i) for i in wave if rows[i][2] == "keep")
            head, n = min(head, value) if notes[i]["simpler"] else value, 0
        elif "discard" in statuses:  # a crash says nothing about the number
            n = min(n + 1, KEEP_WAVES)
    return found, head, margin, n


def read_results(table, branch):
    """The rows of results.tsv, or if it is lost of the notes in git, five str each. Raises PrepareError."""
    lines = table.read_text(encoding="utf-8-sig", errors="replace").splitlines() if table.exists() else []
    commits = [] if table.exists() else git("notes", f"--ref={branch}", "list").split()[1::2]
    if commits:  # a line of a note is a row with its number in front
        notes = git("log", "--no-walk", f"--notes={branch}", "--format=%N", *commits).splitlines()
        lines = [note.partition("\t")[2] for note in sorted(filter(None, notes), key=lambda note: int(note.split()[0]))]
    rows = [line.split("\t", 4) for line in lines if line.strip() not in (HEADER, "")]
    for row in rows:
        if len(row) != 5 or not re.fullmatch(r"\d+\.\d+", row[1]):
            raise PrepareError(f"{table} has a line that is no row, mend it by hand: {one_line(' '.join(row))}")
    return rows


def one_line(text):
    """At most 120 printable characters: a row or a message must not flood the agent that reads it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:120]


def kept_commits(rows):
    """The baseline and the kept ideas in order, each once."""
    return list(dict.fromkeys(commit for commit, _, _, status, _ in rows if status == "keep"))


def recorded(rows):
    """{(commit, seed)} of the rows. An idea has the seed 0."""
    return {(row[0], int(DESCRIPTION.match(row[4])["seed"] or 0)) for row in rows}


def wait_for_runs(branch, trees, rows):
    """The runs that have no row yet, or None if some have not ended: it has said which."""
    plan, quiet, deadline = plan_runs(trees, rows), None, time.monotonic() + DECIDE_WAIT
    while True:
        ended, waiting, going_on = [], [], trees != [Path()]  # a job may be in Slurm's queue
        for tree in trees:
            job, run = plan.get(tree), read_run(tree)[0]
            if not is_new(run, job, branch, rows):
                if job:
                    waiting.append(f"{name_of(tree, *job)} has not run: `uv run prepare.py run`")
                continue
            name = name_of(tree, run["commit"], run["kind"], run["seed"])
            if "exit" in run:
                ended.append(run)
            elif quiet is not None and tree in quiet:
                text = f"{name} was cut off: `uv run prepare.py run` again"
                waiting.append(f"{text} (its last line: {last_words(tree / 'run.log')})")
            else:
                going_on = True
                waiting.append(f"{name}: {last_words(tree / 'run.log')}")
        if not waiting:
            return ended
        if not going_on or time.monotonic() > deadline:
            print("not ended:", *waiting, sep="\n  ")
            return None
        if quiet is None:
            print(f"waits at most {DECIDE_WAIT} s: {waiting[0]}", flush=True)
        quiet = find_quiet(trees)
        time.sleep(0.5)


def new_row(run, rows):
    """The row of a run that has ended, five str. An idea is discarded until `decide` compares it with the others.

    Raises PrepareError for a baseline without a number, and for another harness than the baseline's.
    """
    commit, kind, report = run["commit"][:7], run["kind"], run.get("report", {"problems": [run["reason"]]})
    subject = one_line(git("log", "-1", "--format=%s", commit)) if kind == "idea" else f"{kind}, seed {run['seed']}"
    if report["problems"]:
        if kind != "idea":
            raise PrepareError(f"{subject} of {commit} has no number: {report['problems'][0]}: mend that, `run again`")
        return [commit, "0.000000", "0.0", "crash", f"{subject}: {one_line(report['problems'][0])}"]
    harness, status = f"harness {report['harness']}", "discard" if kind == "idea" else "keep"
    if kind == "baseline":
        subject += f", {harness}, {report['attention']}"
    if rows and "harness" in rows[0][4] and harness not in rows[0][4]:
        text = f"{commit} ran with {harness}, but {rows[0][4]}: prepare as for the baseline"
        raise PrepareError(f"{text}, then `uv run prepare.py run again`")
    return [commit, report["val_bpb"], report["memory_gb"], status, f"{subject}, {report['num_steps']} steps"]


def decide(record=False, veto=False):
    """Wait for the runs, and say what becomes of them. `record`: write their rows too, and move the branch.

    `veto` keeps nothing. Returns the exit status. Raises PrepareError, or CalledProcessError of git.
    """
    branch, trees, rows = open_night()
    runs = wait_for_runs(branch, trees, rows)
    if runs is None:
        return int(record)
    new = []
    for run in runs:
        new.append(new_row(run, rows + new))
        say_if_odd(run.get("report", {}), rows, new[-1][0])
    if trees != [Path()]:
        wave = 1 + max((int(DESCRIPTION.match(row[4])["wave"] or 0) for row in rows), default=0)
        for row in new:
            row[4] = f"wave {wave}: {row[4]}"
    facts = [(commit, float(value), status, text) for commit, value, _, status, text in rows + new]
    limits = bars(facts)[0][len(rows) :]
    _, head, margin, n = bars(facts[: len(rows)])
    if not math.isnan(head):
        bar = f"keep below {head - margin * (1 - n / KEEP_WAVES):.6f}, simpler code below {head + margin:.6f}"
        print(f"head {head:.6f}, margin {margin:.6f}, n {n}: {bar}")
    passed = [row for row, limit in zip(new, limits) if row[3] == "discard" and float(row[1]) < limit]
    passed.sort(key=lambda row: float(row[1]))
    if passed and not veto:
        passed[0][3] = "keep"
    for row in new:
        print("\t".join(row))
    if passed[1:]:
        print("one of the next ideas, on the new head:", *(f"tried/{row[0]}" for row in passed[1:]))
    if record:
        write_rows(rows, new, branch, trees)
        print(f"recorded: {branch} is at", git("log", "-1", "--format=%h %s")[:100])
    elif not new:
        print("nothing new: commit an idea and run it")
    return 0


def say_if_odd(report, rows, commit):
    """One line if a run had another attention kernel than the baseline, or a tenth fewer steps than the head."""
    made = [re.search(r"(\d+) steps$", row[4]) for row in rows if row[3] == "keep"]
    if made and made[-1] and report.get("num_steps", math.inf) < 0.9 * int(made[-1][1]):
        print(f"note: {commit} made {report['num_steps']} steps, the head {made[-1][1]}: a slow idea? A busy machine?")
    if rows and "harness" in rows[0][4] and report.get("attention", "") not in rows[0][4]:
        print(f"note: {commit} used the attention kernel {report['attention']}, not the one of the baseline")


def write_rows(rows, new, branch, trees):
    """Write the notes of the commits, the table, and then tags, branch and worktrees."""
    for tree in {Path(), *trees}:
        if git("status", "--porcelain", "-uno", "--", "train.py", tree=tree):
            raise PrepareError(f"{tree / 'train.py'} has changes without a commit: git stash, record, git stash pop")
    lines = ["\t".join(row) for row in rows + new]
    for commit in {row[0] for row in new}:
        notes = [f"{i}\t{line}\n" for i, line in enumerate(lines) if line.startswith(commit)]
        git("notes", f"--ref={branch}", "add", "-f", "-F", "-", commit, text="".join(notes))
    with atomic_write(Path("results.tsv")) as f:
        f.write("".join(f"{line}\n" for line in [HEADER, *lines]).encode())
    follow(rows + new, trees)


def follow(rows, trees):
    """Bring tags, branch and worktrees in line with the table. Where it was cut off, it goes on."""
    kept = kept_commits(rows)
    tried = {row[0] for row in rows} - {*kept}
    for commit in tried - {tag.removeprefix("tried/") for tag in git("tag", "--list", "tried/*").split()}:
        git("tag", "--no-sign", f"tried/{commit}", commit)
    if not kept:
        return
    idea = find_idea(".", kept[-1])
    if idea[:7] in tried and idea == git("rev-parse", "HEAD"):
        git("reset", "-q", "--keep", "HEAD~1")
    elif idea[:7] in tried:  # the human has committed something on top of it
        git("revert", "--no-edit", idea)
    git("merge", "-q", "--no-edit", kept[-1])  # no fast-forward if the human has committed program.md
    for tree in {*trees} - {Path()}:
        if find_idea(tree, kept[-1])[:7] in {"", *tried}:  # an idea that has not run yet stays
            git("reset", "-q", "--keep", git("rev-parse", "HEAD"), tree=tree)


def one_at_a_time():
    return cache_lock(Path(git("rev-parse", "--absolute-git-dir")))  # two at once would lose a row or a kept commit


def night(command, *words):
    """`run`, `decide`, `record`. Returns the exit status. Raises PrepareError, or CalledProcessError of git."""
    sys.stdout.reconfigure(errors="backslashreplace")
    if command == "run":
        return run(*words)
    if (command, *words) == ("decide",):
        return decide()
    if command == "record" and words in ((), ("discard",)):
        with one_at_a_time():
            return decide(record=True, veto=bool(words))
    raise PrepareError("the commands of a night are `prepare.py run`, `decide`, `record` and `record discard`")


# -----------------------------------------------------------------------------
# Preparation


def prepare(args):
    """Make what the options ask for, redo only what depends on a change, and put it in force."""
    cache, started = cache_dir(), time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    with cache_lock(cache):
        forget_cache()  # another process may have changed it
        known, trusted = {}, not (cache / MANIFEST).exists()  # a damaged manifest can't tell which files are good
        with contextlib.suppress(PrepareError):
            known, trusted = dict(load_manifest(cache)["files"].values()), True

        def make(path, function):
            """Make a file, unless it is there: its name has the key of what it is made from."""
            if trusted and path.exists() and known.get(path.name) in (None, checksum(path)):
                return "up to date"
            function(path)
            return "made"

        if args.corpus == "climbmix":
            corpus = climbmix_corpus(cache / "data", args.num_shards, args.download_workers)
        elif args.corpus == "source":
            corpus = source_corpus()
        else:
            length = min(DOCUMENT_CHARS, 4 * args.seq_len)  # about a row: what a short row can't hold would be lost
            corpus = own_corpus(Path(args.corpus), args.text_column, length)
        show("corpus", corpus.note)

        def train_tokenizer(path):
            Tokenizer.train(sample_texts(corpus.documents("train")), args.vocab_size).save(path)

        recipe = [3, SPLIT_PATTERN, SPECIAL_TOKENS, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS]
        path = cache / f"tokenizer-{cache_key(corpus.key('train'), args.vocab_size, recipe)}.bpe"
        files, made = {"tokenizer": path}, make(path, train_tokenizer)
        tokenizer = Tokenizer.load(path)
        vocab_size = tokenizer.get_vocab_size()
        more = f", {args.vocab_size:,} were asked for: the text has no more to learn" * (vocab_size < args.vocab_size)
        show("tokenizer", f"{vocab_size:,} tokens, {made}{more}")

        for split in ("train", "val"):
            path = cache / f"{split}-{cache_key(corpus.key(split), checksum(files['tokenizer']), recipe)}.bin"
            files[f"{split}_tokens"] = path
            made = make(path, partial(write_tokens, tokenizer, corpus.documents(split)))
            tokens = map_tokens(path)
            lengths = np.fromiter((length for length, *_ in document_stream(tokens, forever=False)), np.int64)
            held = np.minimum(lengths, args.seq_len + 1).sum() / len(tokens)
            show(split, f"{len(tokens):,} tokens in {len(lengths):,} documents, rows hold {held:.0%} at most, {made}")

        wanted = args.eval_tokens // args.seq_len
        rows = sum(1 for _ in islice(pack_rows(tokens, args.seq_len, forever=False), wanted))  # of val
        scored = f"{rows * args.seq_len:,} validation tokens"
        if rows < MIN_VAL_ROWS:
            text = f"the validation text fills {rows} rows of --seq-len {args.seq_len}, {MIN_VAL_ROWS} are needed"
            raise PrepareError(f"{text}: add text, add a file named val, or choose a smaller --seq-len")
        if rows < wanted:
            show("", f"note: there are {scored} in whole rows; --eval-tokens asks for more")

        write_manifest(cache, args, vocab_size, files)
        show("ready", f"scale {args.scale}: rows of {args.seq_len:,} tokens, {args.time_budget} s a run, {scored}")
        show("", f"in {cache}, harness {fingerprint()}, after {time.monotonic() - started:.1f} s")
        if problem := missing_gpu(get_device(), args.scale):
            show("", f"note: {problem}")
        show("next", "uv run train.py")


def show(what, text):
    print(f"{what:<10} {text}", flush=True)


def write_manifest(cache, args, vocab_size, files):
    """Put these files, {kind: path}, in force and remove those of an earlier manifest."""
    constants = {"SCALE": args.scale, "MAX_SEQ_LEN": args.seq_len, "TIME_BUDGET": args.time_budget}
    constants |= {"VOCAB_SIZE": vocab_size, "EVAL_TOKENS": args.eval_tokens}
    checksums = {kind: [path.name, checksum(path)] for kind, path in files.items()}
    manifest = {"command": args.command, "constants": constants, "files": checksums}
    text = json.dumps({**manifest, "checksum": cache_key(manifest)}, indent=1).encode()
    path = cache / MANIFEST
    if not path.exists() or path.read_bytes() != text:
        with atomic_write(path) as f:
            f.write(text)
    forget_cache()
    in_force = {MANIFEST, *(path.name for path in files.values())}
    made_here = re.compile(rf"((tokenizer|train|val)-[0-9a-f]{{12}}\.(bpe|bin|idx)|{re.escape(MANIFEST)})(\.tmp-\d+)?")
    for path in cache.iterdir():  # the folder may hold files that are not ours
        if made_here.fullmatch(path.name) and path.name not in in_force and path.is_file():
            path.unlink()


# -----------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    about = "Prepare data, tokenizer and token files. They are in force until this is run again with other options."
    where = f"Everything is kept in {cache_dir()} (AUTORESEARCH_CACHE names another folder)."
    parser = argparse.ArgumentParser("prepare.py", "uv run prepare.py [options]", about, where)
    corpora = (
        "climbmix: download prose from the Hugging Face hub (default); source: the Python source files on this "
        f"machine, no download; DIR: your own {', '.join(KINDS)} files, gzipped or not, or one of them; validation is "
        "what is named val, valid, validation, dev or test, else the last 5 %% of the text"
    )
    parser.add_argument("--corpus", default="climbmix", metavar="climbmix|source|DIR", help=corpora)
    scales = "defaults for what follows (full: a CUDA GPU of 38 GB; desktop: any other GPU; laptop: none)"
    parser.add_argument("--scale", choices=SCALES, help=scales)
    column = "column (.jsonl: key) of your own files that has the text (text)"
    parser.add_argument("--text-column", default="text", metavar="NAME", help=column)
    for name, (*_, defaults, meaning) in OPTIONS.items():
        each = ", ".join(f"{scale} {default:,}" for scale, default in zip(SCALES, defaults))
        parser.add_argument(option(name), type=int, metavar="N", help=f"{meaning} ({each})")
    args = parser.parse_args(argv)
    if args.corpus not in ("climbmix", "source"):
        args.corpus = str(Path(args.corpus).expanduser().resolve())
    args.scale = args.scale or default_scale(get_device())
    check_gpu(get_device(), args.scale)
    for name, (low, high, defaults, _) in OPTIONS.items():
        value = getattr(args, name)
        if value is None:
            value = defaults[SCALES.index(args.scale)]
        if not low <= value <= high or value == 0:  # only num_shards has a limit below 0
            but = ", not 0" * (low < 0)
            parser.error(f"{option(name)} needs a whole number from {low:,} to {high:,}{but}, got {value:,}")
        setattr(args, name, value)
    if args.eval_tokens < MIN_VAL_ROWS * args.seq_len:
        parser.error(f"--eval-tokens {args.eval_tokens} is less than {MIN_VAL_ROWS} rows of --seq-len {args.seq_len}")
    args.command = shlex.join(["uv", "run", "prepare.py", *(f"{option(k)}={v}" for k, v in vars(args).items())])
    return args


def option(name):
    return f"--{name.replace('_', '-')}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["supervise"]:
            return supervise(Path(argv[1]))
        if argv[:1] in (["run"], ["decide"], ["record"]):
            return night(*argv)
        prepare(parse_arguments(argv))
        return 0
    except subprocess.CalledProcessError as error:
        problem = f"git: {error.stderr.strip()}"
    except PrepareError as error:
        problem = error
    except OSError as error:  # a full disk, a folder without write permission
        problem = f"{error}: fix that (AUTORESEARCH_CACHE names another folder), run it again; what is done stays"
    except KeyboardInterrupt:
        problem = "interrupted; run it again to go on"
    print(f"prepare.py: error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
