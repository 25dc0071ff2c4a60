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
import fcntl
import hashlib
import io
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
from itertools import chain, count, groupby, islice, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

NIGHT = (["run"], ["decide"], ["record"], ["supervise"])
if __name__ != "__main__" or sys.argv[1:2] not in NIGHT:  # these commands need none of it: it takes seconds to import
    import numpy as np
    import pyarrow as pa
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
MOST_REPEATED = 0.5  # share of the validation documents that may be training documents too
BUFFER_DOCS, REFILL_DOCS = 1_000, 128  # documents from which a row is packed; documents read at a time
PREFETCH = 3  # batches made ahead


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


def checksum(path):
    """sha256 of a file as hex; over 2 GiB, of 128 chunks of 16 MiB, evenly spaced: every run checks the whole cache."""
    sha256, size = hashlib.sha256(), os.path.getsize(path)
    with open(path, "rb") as f:
        for start in range(0, size, max(2**24, size // 128)):
            f.seek(start)
            sha256.update(f.read(2**24))
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
    with contextlib.suppress(ValueError, AttributeError):  # no JSON, or another value than an object
        manifest = json.loads(path.read_bytes())
        if manifest.keys() >= {"command", "constants", "files"}:
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

KINDS = (".parquet", ".jsonl", ".csv", ".txt", ".md")  # of a user's own files
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}  # of all but .parquet
VAL_NAME = re.compile(r"(?i)(?<![a-z])(val|valid|validation|dev|test)(?![a-z])")  # not latest.txt


class Corpus:
    """Files of training and of validation text in reading order, and how they are read.

    If both are the same files, the last VAL_SHARE of the characters is validation: one document at most is divided.
    """

    def __init__(self, train, val, note, column="text", length=DOCUMENT_CHARS):
        self.paths, self.shared, self.note = {"train": train, "val": val}, train == val, note
        self.column, self.length = column, length
        self.lacking = {}  # {path: number of its rows without the column}

    def key(self, split):
        """Hex key of a split: other files (name, size, modification time) or another way to read them change it."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths[split]]
        return cache_key(files, self.column, self.length, [split, VAL_SHARE] if self.shared else [])

    @cached_property
    def chars(self):
        return sum(len(text) for _, text in self.texts("train"))

    def documents(self, split):
        """Yields the documents (str) of a split, none of them empty. Raises PrepareError for a file of no use."""
        return (piece for _, piece in self.pieces(split))

    def pieces(self, split):
        """Yields (path, document)."""
        start = 0
        for path, text in self.texts(split):
            for piece in cut(text, self.length):
                side = ("val" if start >= (1 - VAL_SHARE) * self.chars else "train") if self.shared else split
                if side == split and piece.strip():
                    yield path, piece
                start += len(piece)

    def texts(self, split):
        """Yields (path, text), the text of null being "". Rows without the column are passed over, up to 1 %."""
        for path in tqdm(self.paths[split], desc="reading", unit="file", leave=False, disable=None):
            number, lacking = 0, 0
            try:
                for row in read_rows(path, self.column):
                    if self.column not in row:
                        lacking, columns = lacking + 1, ", ".join(f"{name} ({kind_of(row[name])})" for name in row)
                    elif isinstance(text := row[self.column] or "", str):
                        yield path, text
                    else:
                        raise ValueError(f"{self.column} is {kind_of(text)}, not text: {str(text)[:60]}")
                    number += 1
                    if lacking > max(100, number / 100):  # the end of the file would not change it
                        break
            except Exception as error:  # of many kinds: every format has a library of its own
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise PrepareError(f"{path} can't be used (row {number + 1}: {reason}): fix or remove it") from error
            if lacking > number / 100:
                text = f"{path} can't be used: {lacking:,} of {number:,} rows have no {self.column}"
                raise PrepareError(f"{text}; there is {columns}: choose by --text-column NAME")
            self.lacking[path] = lacking

    def find_repeated(self):
        """(the first file of training with a document of validation, the file of validation that has it)"""
        places = {}
        for path, piece in self.pieces("val"):
            places.setdefault(piece, path)
        return next((path, places[piece]) for path, piece in self.pieces("train") if piece in places)


def cut(text, length):
    """Pieces of about `length` characters, each to the end of a line where there is one; [text] if length is None."""
    return re.findall(rf"(?s).{{1,{length - 1}}}(?:\n|\Z)|.{{{length}}}", text) if length else [text]


def kind_of(value):
    return f"a list of {kind_of(value[0])}" if isinstance(value, list) and value else type(value).__name__


def read_rows(path, column):
    """Yields the rows of a file as {column: value}. In a text file <|endoftext|> ends a row."""
    kind, compression = format_of(path)
    if kind == ".parquet":
        with pq.ParquetFile(path) as file:
            columns = [column] if column in file.schema_arrow.names else None  # all, for the message
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from batch.to_pylist()
        return
    errors = "replace" if kind == ".py" else "strict"  # the user can't change the encoding of an installed package
    with io.TextIOWrapper(pa.input_stream(path, compression), "utf-8-sig", errors) as file:
        if kind == ".jsonl":
            yield from (parse_object(line) for line in file if line.strip())
        elif kind == ".csv":
            csv.field_size_limit(sys.maxsize)
            header = file.readline()
            separator = next((mark for mark in ";\t" if mark in header and "," not in header), ",")
            yield from csv.DictReader(chain([header], file), delimiter=separator)
        else:
            rest = ""
            while block := file.read(2**26):  # memory for a document, not for the file
                *texts, rest = (rest + block).split("<|endoftext|>")
                yield from ({column: text} for text in texts)
            yield {column: rest}


def parse_object(line):
    with contextlib.suppress(ValueError):
        if isinstance(row := json.loads(line), dict):
            return row
    hint = " (jq -c '.[]' makes them of an array)" * line.startswith("[")
    raise ValueError(f"one object a line is needed{hint}, not {line.strip()[:60]}")


def format_of(path):
    """(".csv", "gzip") of a.CSV.gz, (".csv", None) of a.csv."""
    name, ending = os.path.splitext(path.name.lower())
    compression = COMPRESSIONS.get(ending)
    return (os.path.splitext(name)[1] if compression else ending), compression


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
    """The user's own file, or those of a folder, sub-folders included, each once; part-2 is read before part-10.

    A file that has several names, by links, is validation if one of them says so.
    """
    names = [str(file.relative_to(path)) for file in find_files(path)]
    numbered = {name: re.sub(r"\d+", lambda number: number[0].zfill(20), name) for name in names}
    names.sort(key=lambda name: (not VAL_NAME.search(name), numbered[name], name))
    files = {}  # {what all names of a file have in common: the first of them}
    for name in names:
        found = (path / name).stat()
        files.setdefault((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns), name)
    texts = [name for name in files.values() if format_of(path / name)[0] in KINDS]
    texts = [name for name in texts if name != "README.md"] or texts  # the card of a data set
    if not texts:
        seen = ", ".join(sorted({(path / name).suffix or (path / name).name for name in names})[:8]) or "nothing"
        kinds = f"{', '.join(KINDS)} (all but .parquet also with {', '.join(COMPRESSIONS)})"
        raise PrepareError(f"--corpus {path} needs files of {kinds}; there is: {seen}")
    train, val = ([name for name in texts if bool(VAL_NAME.search(name)) == side] for side in (False, True))
    note = f"validation is, by their names, {', '.join(val[:3])}" + f" and {len(val) - 3:,} more" * (len(val) > 3)
    if not train or not val:
        train = val = train + val
        note = f"validation is the last {VAL_SHARE:.0%} of the text"
    train, val = ([path / name for name in side] for side in (train, val))
    return Corpus(train, val, f"{path}: {len(texts):,} file(s), {note}", column, length)


def find_files(path, above=()):
    """Yields a file, or the files of a folder and its sub-folders, also behind links; none that is hidden."""
    if path.is_file():
        yield path
    elif path.is_dir() and path.resolve() not in above:  # a link to a folder above it would have no end
        for entry in path.iterdir():
            if not entry.name.startswith("."):
                yield from find_files(entry, {*above, path.resolve()})


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
INCOMING = ".autoresearch-incoming"  # what is being fetched
HUB_TIMEOUT = 5  # seconds until a hub that does not answer counts as unreachable
RETRY_PAUSES = (1, 5, 25)  # seconds before the second, third and fourth attempt


def require_hub():
    """The hub's address, after it answered. huggingface_hub takes half a minute to say that none does."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
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


def download_shards(names, folder, workers):
    """Make sure that every shard of `names` is in `folder`. What is there costs no request. What was fetched stays."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, utils

    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()  # its warnings have signed addresses

    def fetch(name):
        """Why this shard could not be fetched, or None."""
        where = dict(repo_type="dataset", endpoint=endpoint)
        try:
            expected = get_hf_file_metadata(hf_hub_url(REPO, name, **where)).etag  # the library compares only lengths
            file = hf_hub_download(REPO, name, local_dir=folder / INCOMING, **where)
            if checksum(file) != expected:
                os.unlink(file)  # else the next attempt would find it
                raise ValueError("its sha256 is not the one that the hub names; a bad mirror or proxy?")
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(file, folder / name)
        except Exception as error:  # of many kinds
            return f"{name} ({failure_reason(error)})"

    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for pause in (0, *RETRY_PAUSES):
        if problems:
            print(f"{len(problems)} shards are missing, {problems[0]}: next attempt in {pause} s", flush=True)
            time.sleep(pause)
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            break
        needed = SHARD_BYTES * (len(missing) + len(names))  # the token files take about as much as all shards
        if (free := shutil.disk_usage(folder).free) < needed:
            text = f"{folder} has {free / 1e9:.1f} GB free, shards and token files need about {needed / 1e9:.1f} GB"
            raise PrepareError(f"{text}: ask for fewer (--num-shards), or use another disk (AUTORESEARCH_CACHE=/path)")
        endpoint = require_hub()
        with ThreadPool(workers) as pool, tqdm(desc="download", total=len(missing), unit="shard", disable=None) as bar:
            fetched = [pool.apply_async(fetch, [name]) for name in missing]
            while not all(result.ready() for result in fetched):
                time.sleep(0.1)  # Ctrl-C ends a sleep; a lock that another thread holds may outlast it
                bar.update(sum(result.ready() for result in fetched) - bar.n)
        problems = sorted(filter(None, (result.get() for result in fetched)))
        if all(re.search(r"\(HTTP 40[134]\)", problem) for problem in problems):
            break  # there are none, or another attempt changes nothing
    shutil.rmtree(folder / INCOMING, ignore_errors=True)  # also what a killed download left
    if problems:
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
        options = dict(pat_str=SPLIT_PATTERN, mergeable_ranks=mergeable_ranks, special_tokens=specials)
        self.encoding = tiktoken.Encoding("autoresearch", **options)

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
        return len(self.ranks)

    def encode(self, text, prepend=None):
        """Token ids of a text, a list of int, after the id `prepend` if there is one."""
        ids = [i for piece in split_long_runs(text) for i in self.encoding.encode_ordinary(piece)]
        return ids if prepend is None else [prepend, *ids]

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
    """Tokenize on all cores into `path`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # those of this job
    documents, encode = iter(documents), partial(tokenizer.encode, prepend=tokenizer.get_bos_token_id())
    with ThreadPoolExecutor(cores) as pool, atomic_write(path) as tokens:
        while texts := list(islice(documents, 256 * cores)):
            for ids in pool.map(encode, texts):  # tiktoken releases Python's lock
                tokens.write(np.array(ids, np.uint16).tobytes())


@cache
def read_tokens(split):
    """The tokens of a prepared split, memory-mapped: uint16 (N,)."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    return map_tokens(cache_dir() / open_cache(cache_dir())["files"][f"{split}_tokens"][0])


def measure_documents(tokens):
    """(lengths, hashes) of the documents, int64 each. Equal documents have equal hashes in this process."""
    stream = document_stream(tokens, forever=False)
    facts = ((length, hash(tokens[start : start + length].tobytes())) for length, _, start in stream)
    return np.fromiter(facts, np.dtype((np.int64, 2))).T


def map_tokens(path):
    return np.memmap(path, np.uint16, "r").view(np.ndarray)  # slicing a plain array costs a tenth of a memmap's


# -----------------------------------------------------------------------------
# Device


def get_device():
    """Where training and evaluation run: DEVICE from the environment, else CUDA, else Apple's MPS, else the CPU.

    Raises PrepareError if DEVICE names no device of this machine.
    """
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = os.environ.get("DEVICE") or here[0]
    if name not in here:
        raise PrepareError(f"DEVICE={name!r} is not on this machine, which has: {', '.join(here)}")
    return torch.device(name)


def bfloat16_works(device):
    """Whether a run computes in bfloat16 on this device (CUDA of compute capability 8 or more), else in float32."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8  # compiled code may ask this


def check_gpu(device, scale, training):
    """Raises PrepareError if a run of this scale can't use the GPU of this machine.

    If PyTorch sees none where one is expected, that ends a training. Otherwise it is a note: a login node has no GPU.
    """
    driver = os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/dxg")  # NVIDIA's, the second in WSL2
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(map(int, re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))), default=0)
        if 10 * major + minor < oldest:
            text = f"PyTorch has no kernels for {device_name()}: its compute capability is under {oldest / 10}"
            raise PrepareError(f"{text}: install an older PyTorch, or use the CPU with DEVICE=cpu")
    if device.type != "cpu" and scale == "full" and not bfloat16_works(device):
        text = f"scale full needs a CUDA GPU of compute capability 8 or more, this is {device_name()}"
        raise PrepareError(f"{text}: `uv run prepare.py --scale desktop`")
    if device.type == "cpu" and not os.environ.get("DEVICE") and (driver or scale != "laptop"):
        text = f"scale {scale}, but PyTorch {torch.__version__} (CUDA: {torch.version.cuda}) sees no GPU"
        text += ", although NVIDIA's driver is here: README, Another PyTorch" * driver
        if training and scale != "laptop":
            raise PrepareError(f"{text}. To run on the CPU nevertheless: `DEVICE=cpu uv run train.py`")
        show("", f"note: {text}")


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
    name = f"CPU, {clock.threads or torch.get_num_threads()} thread(s)"
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
            length, number, start = buffer.pop(i)
            row.append((start, min(length, room)))
            room, epoch = max(room - length, 0), max(epoch, number)
        yield row, epoch


def document_stream(tokens, forever):
    """Yields (length, pass over the data from 1, start) of each document in order, once or again and again."""
    for epoch in count(1) if forever else [1]:
        start = 0
        for block in range(1, len(tokens), 2**20):  # in blocks: a large file stays on disk
            for end in (block + np.flatnonzero(tokens[block : block + 2**20] == tokens[0])).tolist():
                yield end - start, epoch, start
                start = end
        yield len(tokens) - start, epoch, start


def fill_rows(tokens, rows, out):
    """Copy the pieces of `rows` into `out`, (B, T + 1) of any integer type. Returns the last row's epoch."""
    for line, (row, epoch) in zip(out, rows):  # noqa: B007
        np.concatenate([tokens[start : start + length] for start, length in row], out=line)
    return epoch


def make_dataloader(tokenizer, B, T, split):
    """Yields (x, y, epoch) forever: int64 tensors (B, T) on the device, y being the tokens that follow x's.

    Every row starts with BOS and is packed as `pack_rows` says. The same split, B and T give the same batches. A batch
    that was handed out never changes. The first one of training starts the clock. One of validation before the
    evaluation makes the run void. Raises PrepareError, or ValueError for an impossible B, T or split.
    """
    if B < 1 or T < 1:
        raise ValueError(f"make_dataloader needs B ≥ 1 and T ≥ 1, got B={B}, T={T}")
    tokens = read_tokens(split)
    if tokenizer.get_vocab_size() != constants()["VOCAB_SIZE"]:
        raise PrepareError("this tokenizer is not the one that made the tokens: use Tokenizer.from_directory()")

    def hand_out():
        for batch in batches(tokens, B, T, get_device()):
            if split == "val":
                clock.val_seen = True
            else:
                clock.start()
            yield batch

    return hand_out()


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
    `val_bpb` is the number of the last evaluation, None before it and if it failed.
    """

    def __init__(self):
        self.started = self.stopped = self.val_bpb = None
        self.work = self.worked = 0.0  # CPU seconds of this process at the start, and from start to stop
        self.threads = 0  # of a CPU, at the start: train.py may use fewer for a time
        self.rates = []  # of an accelerator, see work_rate()
        self.evaluations = 0  # since the start
        self.val_seen = self.val_seen_before = False  # was validation text handed out, and before the evaluation?
        self.asked = [0.0, 0.0, 0.0]  # seconds() at the last three calls of time_is_up()

    def start(self):
        if self.started is None:
            self.started, self.work, self.threads = time.monotonic(), time.process_time(), torch.get_num_threads()
            if get_device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the warm-up's attempts are not the run's memory
        self.stopped = None

    def stop(self):
        self.val_bpb, self.val_seen_before = None, self.val_seen
        if self.started is not None:
            self.stopped, self.worked = time.monotonic(), time.process_time() - self.work
            self.evaluations += 1

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
        """Why the training breaks the rules, or None."""
        if self.started is None:
            return "no batch of training data was asked for, so the clock never ran"
        if self.val_seen_before:
            return 'make_dataloader(…, "val") handed out validation text before the evaluation'
        if self.seconds() > self.limit():
            twice = "evaluate_bpb was called twice: the first evaluation counts as training. " * (self.evaluations > 1)
            return f"{twice}training took {self.seconds():.1f} s of a budget of {constants()['TIME_BUDGET']} s"
        return None


clock = Clock()


def work_rate(device):
    """Products of two 2048 × 2048 matrices per second on this device: fewer if others use it too."""
    from torch.utils.benchmark import Timer

    matrix = torch.ones(2048, 2048, device=device)
    return 1 / Timer("matrix @ matrix", globals={"matrix": matrix}).blocked_autorange().median


def machine_speed():
    """How fast the machine was for this run, whatever the model is. Only a comparison with another run has a meaning.

    On a CPU the share of its threads' time that the process got while the clock ran: 1 if nothing else is at work. On
    an accelerator the mean of work_rate() before and after the clock ran.
    """
    if clock.rates:
        return statistics.mean(clock.rates)
    return clock.worked / ((clock.seconds() or math.inf) * (clock.threads or 1))


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
    check_gpu(device, scale, training=True)
    for split in ("train", "val"):
        read_tokens(split)  # open from now on: another prepare.py can't take the files away
    get_token_bytes()
    random.seed(get_seed())
    np.random.seed(get_seed())
    torch.manual_seed(get_seed())  # on every device
    if device.type != "cpu":
        clock.rates.append(work_rate(device))
    return device


def report(val_bpb, *, mfu_percent, total_tokens, num_steps, num_params, depth, attention):
    """Print the block that every tool greps. The harness adds what it knows itself. `run` gets it as a file too.

    Raises PrepareError if val_bpb is not the number that `evaluate_bpb` returned last.
    """
    if clock.val_bpb is None or f"{val_bpb:.6f}" != f"{clock.val_bpb:.6f}":
        raise PrepareError(f"report() got {val_bpb}, the last evaluate_bpb() returned {clock.val_bpb}: pass that on")
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
        "machine": f"{machine_speed():.3g}",
    }
    print("---")
    for name, value in lines.items():
        print(f"{name + ':':<18}{value}")
    sys.stdout.flush()
    if name := os.environ.get("AUTORESEARCH_REPORT"):  # the harness started this run and waits for its number
        facts = {**lines, "memory_gb": f"{memory / 1024:.1f}", "machine": machine_speed(), "problems": problems}
        write_json(Path(name), {**facts, "prepared": open_cache(cache_dir())["command"]})


# -----------------------------------------------------------------------------
# Metric


def evaluate_bpb(model, tokenizer, batch_size):
    """Bits per byte of the validation text: Σ nats / (ln 2 · Σ bytes). Stops the clock. The last call counts.

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
    if device.type != "cpu":
        clock.rates = [*clock.rates[:1], work_rate(device)]
    T = constants()["MAX_SEQ_LEN"]
    if clock.problem() and "AUTORESEARCH_REPORT" in os.environ:
        raise EvaluationError(clock.problem())  # in a night such a number counts for nothing, so it costs no time
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
            clock.val_bpb = score_rows(model, tokens, rows, T, token_bytes, batch_size, device)
        return clock.val_bpb
    finally:
        if was_training:
            model.train()


CAUSALITY_ROWS = 64  # validation rows on which causality is checked, each at a random position of its own
CAUSALITY_ROWS_PER_BATCH = 16  # at most: their logits are kept for the comparison
CAUSALITY_TOLERANCE = 1e-3  # logits; a smaller leak is worth less than the noise of a seed
ROWS_PER_LOSS = 8  # rows of logits that are scored in one call: fewer take more calls, more take more memory


def score_rows(model, tokens, rows, T, token_bytes, batch_size, device):
    """Bits per byte of packed `rows`; token_bytes (V,) on the device."""
    V = len(token_bytes)
    rng = random.SystemRandom()  # not the seeded generator: a model can't foresee what is checked
    starts = range(0, len(rows), batch_size)
    rows_checked = max(1, min(CAUSALITY_ROWS_PER_BATCH, batch_size // 2))
    checked = set(rng.sample(starts, min(-(-CAUSALITY_ROWS // rows_checked), len(starts))))
    accumulator = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    nats = torch.zeros((), dtype=torch.float64, device=accumulator)
    total_bytes = torch.zeros((), dtype=torch.int64, device=accumulator)
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
            total_bytes += n_bytes.sum()
        del part, parts
        if start in checked:
            row_ids = sorted(rng.sample(range(batch_size), rows_checked))
            logits = logits[row_ids]  # a copy: the model may reuse its output's memory
            check_causality(model, x, row_ids, logits, V, rng)
        del logits  # before the next ones exist: two of them take more memory than training
    result = nats.item() / (math.log(2) * total_bytes.item())
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
    noise = (x + torch.randint(1, V, x.shape, generator=generator).to(x.device)) % V  # differs from x everywhere
    others = torch.ones_like(x, dtype=torch.bool)
    others[row_ids] = False
    # Each row is changed from a position of its own on. A row of one token has no earlier position.
    t = torch.tensor([rng.randrange(1, T) if T > 1 else 1 for _ in range(B)], device=x.device)
    future = torch.arange(T, device=x.device) >= t[:, None]  # (B, T)

    def difference(changed):
        """The largest change of a logit where `changed` (B, T) is false, if the tokens where it is true are others."""
        logits = checked_logits(model, torch.where(changed, noise, x), V)
        pairs = ((logits[i][~changed[i]], ref[~changed[i]]) for i, ref in zip(row_ids, ref_logits))
        return max((a - b).abs().max().item() if len(a) else 0.0 for a, b in pairs)

    mixes, looks = "the model mixes rows: other rows", "the model is not causal: later tokens"
    for changed, problem in ((others, f"{mixes} changed a row's logits"), (future, f"{looks} changed earlier logits")):
        if (worst := difference(changed)) > CAUSALITY_TOLERANCE:
            if (again := difference(torch.zeros_like(changed))) > CAUSALITY_TOLERANCE:
                problem = "the same input gave other logits (a state, or a kernel that is not deterministic)"
            raise EvaluationError(f"{problem}: a logit changed by {max(worst, again):.3g}, so there is no number")


# -----------------------------------------------------------------------------
# Night: the rule that says which run is kept, and the rows of a night, which git keeps

HEADER = "commit\tval_bpb\tmemory_gb\tstatus\tdescription"
KEEP_MARGIN = 1.5  # standard deviations of the baseline by which an idea must be better
KEEP_WAVES = 50  # waves without a keep after which the margin is 0: a kept number is partly luck
MACHINE_TOLERANCE = 0.1  # by which the machine of a run may be slower or faster than the baseline's
DESCRIPTION = re.compile(r"(?:wave (?P<wave>\d+): )?(?P<simpler>simpler)?")


def bars(rows):
    """([the bar of each row], head, margin, n): what each run had to beat, and what the next one has to beat.

    rows: (commit, val_bpb, status, description) of one night in order. It begins with the runs of the baseline, one
    commit with several seeds. Of each wave ("wave 2: …"; on one GPU each run is a wave) the best is kept if it is below

        head - margin · (1 - n/KEEP_WAVES)

    head    the mean of the baseline, later the number of the last kept run
    margin  KEEP_MARGIN standard deviations of the baseline
    n       waves since the last keep, without those that only crashed, at most KEEP_WAVES

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
    words = [DESCRIPTION.match(row[3]) for row in rows]
    for _, wave in groupby(ideas, key=lambda i: words[i]["wave"] or -i):
        wave = list(wave)
        for i in wave:
            found[i] = head + margin if words[i]["simpler"] else head - margin * (1 - n / KEEP_WAVES)
        statuses = [rows[i][2] for i in wave]
        if "keep" in statuses:
            value, i = min((rows[i][1], i) for i in wave if rows[i][2] == "keep")
            head, n = min(head, value) if words[i]["simpler"] else value, 0
        elif "discard" in statuses:  # a crash says nothing about the number
            n = min(n + 1, KEEP_WAVES)
    return found, head, margin, n


def git(*arguments, tree=".", text=None, stdout=subprocess.PIPE):
    """What git prints, unless it goes to a file. The user's settings and locale change nothing in it."""
    settings = "log.showSignature=false i18n.logOutputEncoding=UTF-8 commit.gpgSign=false".split()
    options = dict(encoding="utf-8", errors="replace", stderr=subprocess.PIPE, stdout=stdout, check=True)
    command = ["git", "-C", str(tree), *(word for setting in settings for word in ("-c", setting)), *arguments]
    return (subprocess.run(command, input=text, **options).stdout or "").strip()


class Night(NamedTuple):
    branch: str
    trees: list  # the worktrees .waves/1, .waves/2, …, or the clone alone
    rows: list  # the runs that were recorded, in order, each a dict of the table's columns and more


def open_night():
    """The Night of the branch at hand. Raises PrepareError."""
    branch = git("branch", "--show-current")
    if not branch.startswith("autoresearch/"):
        raise PrepareError(f"a night has a branch autoresearch/…, this is {branch or 'none'}: git switch to it")
    waves = [path.parent for path in Path(".waves").glob("[0-9]*/.git")]
    ledger = git("for-each-ref", "--format=%(objectname)", f"refs/rows/{branch}")
    rows = [json.loads(line) for line in git("cat-file", "blob", ledger).splitlines()] if ledger else []
    return Night(branch, sorted(waves, key=lambda tree: (len(tree.name), tree)) or [Path()], rows)  # 10 after 9


def write_rows(night, new):
    """Write the rows of the night and the new ones, one JSON a line: all of them or none."""
    text = "".join(json.dumps(row) + "\n" for row in night.rows + new)
    git("update-ref", f"refs/rows/{night.branch}", git("hash-object", "-w", "--stdin", text=text))


def write_table(rows):
    """Write results.tsv, by which people see the rows. What else has this name gets another one first."""
    lines = [HEADER, *("\t".join(row[name] for name in HEADER.split("\t")) for row in rows)]
    table, text = Path("results.tsv"), "".join(f"{line}\n" for line in lines).encode()
    if table.exists() and not text.startswith(table.read_bytes()):
        other = table.rename(time.strftime("results-until-%Y%m%d-%H%M%S.tsv"))
        print(f"note: the results.tsv that was here is now {other}")
    with atomic_write(table) as f:
        f.write(text)


def kept_commits(rows):
    """The baseline and the kept ideas in order, each once."""
    return list(dict.fromkeys(row["commit"] for row in rows if row["status"] == "keep"))


# -----------------------------------------------------------------------------
# Night: the runs. `run` writes run.json and run.py, a copy of the commit, and starts a supervisor, which runs run.py.
# The supervisor renews the time of run.json, and at the end adds to it how the run ended and what report() wrote.
# A run is NEW, then ALIVE, then ENDED. CUT_OFF: its supervisor has died, and so has the run. AGAIN: ended, but no good.

BASELINES = 3  # runs of the baseline before the first idea, at least; with several GPUs one more
CHECK_RUNS, CHECK_SEED = 3, 100  # of baseline and branch in a check; the lowest of its seeds, which no run had before
GRACE = 540  # seconds that a run has besides its budget, for compilation and evaluation, before it is ended
BEAT, WATCH = 3, 15  # seconds between two signs of life of a run; seconds without one after which it was cut off
DECIDE_WAIT = 45  # seconds that `decide` waits for runs: many agents' shells end a command after a minute
NEW, ALIVE, ENDED = "has not started", "goes on", "has ended"
CUT_OFF, AGAIN = "was cut off", "must run once more"
ERROR = re.compile(r"Fatal Python error|train\.py: error|[\w.]*(Error|Exception|Interrupt)\b")


class Job(NamedTuple):
    commit: str
    kind: str  # "baseline", "idea" or "check"
    seed: int

    def name(self, tree):
        return f"{'' if tree == Path() else f'{tree}: '}{self.kind} {self.commit[:7]}, seed {self.seed}"


def plan_runs(night, check=False):
    """{tree: Job} of what the night needs now. Raises PrepareError for an impossible idea.

    Baseline and check need several seeds: the first tree takes the first one that has no row, the second tree the
    second. So every job of a cluster finds its own without a word from the others, and the same one if it starts again.
    A check that was begun is completed before other ideas run. Each has a baseline of its own hour.
    """
    ran = {(row["commit"], row["seed"]) for row in night.rows}
    begun = [job for job, *_ in (read_run(tree, night.branch) for tree in night.trees) if job]
    start = next((job.commit for job in begun if job.kind == "baseline"), "HEAD")  # an idea may be on top already
    kept = kept_commits(night.rows) or [start]
    base, head = git("rev-parse", kept[0], kept[-1]).split()
    seeds = [row["seed"] for row in night.rows if (row["kind"], row["commit"]) == ("check", head[:7])]
    first = min(seeds, default=1 + max([CHECK_SEED - 1, *(row["seed"] for row in night.rows)]))
    seeds = range(first, first + CHECK_RUNS) if head != base else []
    checks = [Job(commit, "check", seed) for seed in seeds for commit in (head, base)]
    unrecorded = [job.kind for job in begun if (job.commit[:7], job.seed) not in ran]
    in_check = check or "check" in [row["kind"] for row in night.rows[-1:]] + unrecorded
    jobs = checks if in_check else []
    if base == head and len(night.rows) < BASELINES + (len(night.trees) > 1):
        jobs = [Job(base, "baseline", seed) for seed in range(len(night.rows) + len(night.trees))]
    jobs = [job for job in jobs if (job.commit[:7], job.seed) not in ran]
    for tree, job in plan_runs(night).items() if check else ():
        if job.kind == "idea" and job == read_run(tree, night.branch)[0]:
            raise PrepareError(f"{job.name(tree)} has no row: `uv run prepare.py decide` before a check")
    if jobs or check:
        return dict(zip(night.trees, jobs))
    if night.trees != [Path()] and (idea := find_idea(Path(), head)):
        raise PrepareError(f"{idea[:7]} is an idea in the clone: cherry-pick it in .waves/1, git reset --keep HEAD~1")
    plan = {}
    for tree in night.trees:
        job = Job(find_idea(tree, head), "idea", 0)
        if job.commit and (job.commit[:7], 0) not in ran and job not in plan.values():
            check_idea(job.commit, tree, head)
            plan[tree] = job
    return plan


def find_idea(tree, head):
    """The last commit after `head` that changes train.py, or "". What the human commits in the night is no idea."""
    changed = git("diff", "--name-only", head, "HEAD", "--", "train.py", tree=tree)
    return changed and git("log", "-1", "--format=%H", f"{head}..", "--", "train.py", tree=tree)


def check_idea(idea, tree, head):
    """Raises PrepareError for an idea that is not one commit on top of the head, which changes train.py alone."""
    where = "" if tree == Path() else f" (in {tree})"
    if git("diff", "--name-only", head, f"{idea}~1", "--", "train.py"):
        mend = "git reset --soft HEAD~1, and if the commit below has run, record that first"
        raise PrepareError(f"{idea[:7]}{where} must be one commit on top of {head[:7]}: {mend}")
    if git("diff", "--name-only", f"{idea}~1", idea, "--", ".", ":!train.py"):
        raise PrepareError(f"{idea[:7]}{where} changes more than train.py: take that back with git commit --amend")


def read_run(tree, branch):
    """(its Job, what run.json says, its time) of a tree's last run; (None, {}, 0) if there is none of this night."""
    with contextlib.suppress(FileNotFoundError, ValueError), open(tree / "run.json", "rb") as f:
        run = json.load(f)  # opening the file asks a network disk for its time of now
        if run.get("branch") == branch:
            return Job(run["commit"], run["kind"], run["seed"]), run, os.fstat(f.fileno()).st_mtime_ns
    return None, {}, 0


def look(night, plan, wait_for, seconds):
    """{tree: (state, run, time)} of the trees in the plan, after `seconds`, or when no state is in `wait_for`.

    A run is cut off if the time of its run.json stands still while we watch. So no clock and no lock of another machine
    is trusted.
    """
    began, first = time.monotonic(), {tree: read_run(tree, night.branch)[2] for tree in plan}
    while True:
        found, passed = {}, time.monotonic() - began
        for tree, planned in plan.items():
            job, run, renewed = read_run(tree, night.branch)
            if job != planned:
                state = NEW
            elif "exit" in run:
                state = AGAIN if why_again(run, night.rows) else ENDED
            else:
                state = ALIVE if renewed != first[tree] or passed < WATCH else CUT_OFF
            found[tree] = state, run, renewed
        states = {state for state, *_ in found.values()}
        if not states & {*wait_for} or CUT_OFF in states or passed > seconds:
            return found
        time.sleep(0.5)


def start_runs(*words):
    """Start in the background what the night needs next: a run in the clone, or one in each worktree.

    `run 2` is worktree 2 alone, in the foreground: a job of Slurm. `run check`: baseline and branch on fresh seeds.
    Returns the exit status. Raises PrepareError if there is nothing to start.
    """
    numbers, check = [word for word in words if word.isdecimal()], "check" in words
    if [*words] != ["check"] * check + numbers[:1]:
        raise PrepareError("it is `prepare.py run` or `prepare.py run check`, and the number of a worktree at most")
    load_manifest(cache_dir())  # if nothing is prepared, this says so
    night = open_night()
    chosen = [tree for tree in night.trees if not numbers or tree.name in numbers]
    plan = {tree: job for tree, job in plan_runs(night, check).items() if tree in chosen}
    found, started = look(night, plan, [ALIVE], WATCH), []
    with changing(night):
        for tree, (state, run, renewed) in found.items():
            # The time: another command may have started it while we looked
            if state in (NEW, CUT_OFF, AGAIN) and read_run(tree, night.branch)[2] == renewed:
                if state == NEW and run and "exit" not in run:
                    print(f"note: the run of {run['commit'][:7]} did not end, and has no row")
                begin(tree, plan[tree], night.branch, None if state == NEW else run.get("report") or run["earlier"])
                started.append(tree)
    if not started:
        ended = f"it is going on or has ended: `uv run prepare.py decide{' check' * check}`"
        reason = ended if plan or check else "commit an idea"
        raise PrepareError(f"nothing new to run: {reason if chosen else f'there is no .waves/{numbers[0]}'}")
    print("started", some([plan[tree].name(tree) for tree in started]), flush=True)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(night.trees))))).split(",")
    for tree in started:
        gpu = {"CUDA_VISIBLE_DEVICES": "".join(gpus[night.trees.index(tree) :][:1])}
        env = os.environ if numbers or night.trees == [Path()] else {**os.environ, **gpu}
        with open(tree / "run.log", "wb") as log:  # what the supervisor itself has to say is read there too
            streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            command = [sys.executable, __file__, "supervise", str(tree)]
            supervisor = subprocess.Popen(command, env=env, start_new_session=not numbers, **streams)
    return supervisor.wait() if numbers else 0


def begin(tree, job, branch, earlier):
    """Write the files of a run. What runs is a copy of the commit, so nobody edits it meanwhile."""
    with open(tree / "run.py", "wb") as f:
        git("show", f"{job.commit}:./train.py", tree=tree, stdout=f)
    (tree / "run.log").unlink(missing_ok=True)  # a process that an earlier run left behind writes on into the old one
    write_json(tree / "run.json", {**job._asdict(), "branch": branch, "earlier": earlier, "started": time.time()})
    if git("status", "--porcelain", "-uno", "--", "train.py", tree=tree):
        print(f"note: {tree / 'train.py'} has changes that are not in this commit")


def supervise(tree):
    """Run run.py to its end, and renew the time of run.json meanwhile. Then write into it how the run ended."""
    path, limit = tree / "run.json", load_manifest(cache_dir())["constants"]["TIME_BUDGET"] + GRACE
    first = json.loads(path.read_bytes())
    report = path.with_name(f"run.{first['started']}")

    def still_mine():
        run = json.loads(path.read_bytes())
        return run if run == first else sys.exit("this run ends, as another one was started here")

    env = {**os.environ, "SEED": str(first["seed"]), "AUTORESEARCH_REPORT": str(report.resolve())}
    env |= {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    popen = partial(subprocess.Popen, start_new_session=True)  # a process group of its own
    run = popen([sys.executable, "run.py"], cwd=tree, env=env, stdin=subprocess.DEVNULL)
    # If this process dies, however it does, the pipe closes. Then the shell kills the run and its children
    end = popen(["sh", "-c", f"read line; kill -9 -{run.pid}"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + limit
    while run.poll() is None and time.monotonic() < deadline:
        still_mine()
        os.utime(path)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(BEAT)
    reason = "" if run.poll() is not None else f"hang: no end after {limit} s"
    if reason:
        run.send_signal(signal.SIGABRT)  # Python prints where it hangs
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(BEAT)
    elif run.returncode == -signal.SIGTERM:
        time.sleep(2)  # a cluster ends the whole job: the next signal is for this process
    end.communicate()
    facts = {"exit": run.wait(), "reason": reason or last_words(tree, run.wait())}
    if report.exists():
        facts["report"] = json.loads(report.read_bytes())
        report.unlink()
    with one_at_a_time():
        write_json(path, {**still_mine(), **facts})
    return 0


def last_words(tree, status=0):
    """The last line of run.log that looks like an error, else the last line, and the signal that killed the run."""
    log = tree / "run.log"
    with open(log, "rb") if log.exists() else io.BytesIO() as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 20_000))
        lines = [line for line in f.read().decode(errors="replace").splitlines() if line.strip()] or [""]
    errors = [line for line in lines if ERROR.match(line)] if status else []
    killed = f"killed by {signal.Signals(-status).name}: " if status < 0 and not errors else ""
    return one_line(killed + (errors or lines)[-1]) or "no output"


def one_line(text):
    """At most 120 printable characters: a row or a message must not flood the agent that reads it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:120]


def some(texts):
    return "; ".join(texts[:3]) + f"; and {len(texts) - 3} more" * (len(texts) > 3)


# -----------------------------------------------------------------------------
# Night: what becomes of the runs


def machine_change(report, rows):
    """How much faster the machine of a run was than the baseline's; 0.2 is a fifth."""
    speeds = [row["machine"] for row in rows if row["kind"] == "baseline"]
    return report["machine"] / statistics.mean(speeds) - 1 if speeds else 0.0


def machine_text(change):
    """What is to be said of it: "" within the tolerance."""
    text = f"machine {abs(change):.0%} {'slower' if change < 0 else 'faster'} than the baseline's"
    return text * (abs(change) > MACHINE_TOLERANCE)


def why_again(run, rows):
    """Why a run that has ended must run once more before it is judged, or None."""
    report = run.get("report")
    if report and rows and report["harness"] != rows[0]["harness"]:
        undo = "undo what has changed in prepare.py, the text or PyTorch"
        first = undo if report["prepared"] == rows[0]["prepared"] else f"`{rows[0]['prepared']}`"
        return f"its harness is {report['harness']}, the baseline's {rows[0]['harness']}: first {first}"
    if not report or report["problems"]:
        problem = report["problems"][0] if report else run["reason"]
        return f"it has no number ({problem})" if run["kind"] == "baseline" else None
    if not run["earlier"] and rows and not machine_text(rows[-1]["change"]):  # once; if the change lasts, not at all
        return machine_text(machine_change(report, rows)) or None


def new_row(run, rows):
    """The row of a run that has ended, a dict. An idea is discarded until `judge` compares it with the others.

    Of two tries the one counts whose machine was more like the baseline's.
    """
    commit, kind, reports = run["commit"][:7], run["kind"], [run.get("report"), run["earlier"]]
    what = one_line(git("log", "-1", "--format=%s", commit)) if kind == "idea" else f"{kind}, seed {run['seed']}"
    row = {"commit": commit, "kind": kind, "seed": run["seed"], "change": 0.0}
    good = [report for report in reports if report and not report["problems"]]
    good = [report for report in good if report["harness"] == (rows or good)[0]["harness"]]
    report = min(good, key=lambda report: abs(machine_change(report, rows)), default={})
    row |= {name: report.get(name) for name in ("harness", "prepared", "attention", "machine")}
    if good:
        change, status = machine_change(report, rows), "discard" if kind == "idea" else "keep"
        text = ", ".join(filter(None, [what, f"{report['num_steps']} steps", machine_text(change)]))
        row |= {"val_bpb": report["val_bpb"], "memory_gb": report["memory_gb"], "change": change}
    else:
        problems = run["report"]["problems"] if "report" in run else [run["reason"]]
        status, text = "crash", f"{what}: {one_line(problems[0])}"
        row |= {"val_bpb": "0.000000", "memory_gb": "0.0"}
    return row | {"status": status, "description": text}


def decide(check=False, record=False, veto=()):
    """Wait for the runs, and say what becomes of them. `record`: write their rows too, and move the branch.

    The first word that it prints is what comes next: wait, run, record, or idea. With `check`, idea comes when the
    check is complete. `veto` has the commits that are not kept, or "discard" for all. Returns the exit status. Raises
    PrepareError, or CalledProcessError of git.
    """
    night = open_night()
    plan = plan_runs(night, check)
    in_queue = night.trees != [Path()] and waits_in_slurm()
    words = {CUT_OFF: "run", AGAIN: "run", NEW: "wait" if in_queue else "run", ALIVE: "wait"}
    found = look(night, plan, [state for state in words if words[state] == "wait"], DECIDE_WAIT)
    command = "uv run prepare.py run" + " check" * any(job.kind == "check" for job in plan.values())
    for word, remedy in ("run", f" → {command}"), ("wait", ""):  # a tree that needs a start comes first
        states = [(tree, state, run) for tree, (state, run, _) in found.items() if words.get(state) == word]
        if states:
            texts = [describe(tree, plan[tree], state, run, night.rows) for tree, state, run in states]
            print(f"{word}: {some(texts)}{remedy}")
            return int(record)
    if check and not plan:
        return report_check(night.rows)
    new = [new_row(run, night.rows) for _, run, _ in found.values()]
    wave = 1 + max((row["wave"] for row in night.rows), default=0)
    page = hashlib.sha256(Path("program.md").read_bytes()).hexdigest() if Path("program.md").exists() else None
    for row in new:
        row |= {"wave": wave, "page": page}
        if night.trees != [Path()]:
            row["description"] = f"wave {wave}: {row['description']}"
    ideas = [row["commit"] for row in new if row["kind"] == "idea"]
    known = {"discard", *ideas} if ideas else set()
    if new and not known.issuperset(veto):  # none is new if a record goes on that was cut off
        raise PrepareError(f"{' '.join(veto)}: the ideas that have no row are {some(ideas) or 'none'}")
    judge(night.rows, new, ideas if "discard" in veto else veto)
    if record:
        with changing(night):
            if new:
                write_rows(night, new)
            follow(night, night.rows + new)
        tried, head = sum(row["kind"] == "idea" for row in night.rows + new), git("log", "-1", "--format=%h %s")[:100]
        print(f"{'recorded' if new else 'nothing to record'}: {night.branch} has tried {tried} ideas, and is at {head}")
        if night.rows and page != night.rows[-1].get("page", page):
            print('note: program.md has changed since the last record: read its section "From the human" again')
    return 0


def waits_in_slurm():
    """Whether a job from this folder waits in Slurm's queue, so that what has not started needs no other start."""
    command = ["squeue", "--me", "--noheader", "--states=PENDING,CONFIGURING", "--format=%Z"]
    queue = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("squeue") else ""
    return os.getcwd() in map(os.path.realpath, queue.splitlines())


def describe(tree, job, state, run, rows):
    text = f"{job.name(tree)} {state}"
    if state == AGAIN:
        return f"{text}: {why_again(run, rows)}"
    return text if state == NEW else f"{text} ({last_words(tree)})"


def report_check(rows):
    """Print what baseline and branch are worth. Returns the exit status."""
    base, *kept = kept_commits(rows)
    if not kept:
        print("idea: nothing was kept, so there is nothing to check")
        return 0
    print("idea: the check is complete")
    checks = [row for row in rows if row["kind"] == "check"]
    seeds = {row["seed"] for row in checks if row["commit"] == kept[-1]}
    for name, commit in ("baseline", base), ("branch", kept[-1]):
        found = [row for row in checks if row["commit"] == commit and row["seed"] in seeds]
        numbers = [float(row["val_bpb"]) for row in found if row["status"] == "keep"]
        text = f"{statistics.mean(numbers):.6f} ({min(numbers)} to {max(numbers)})" if numbers else "no number"
        print(f"{name} {commit}, {len(numbers)} of {len(found)} fresh seeds: {text}")
    return 0


def judge(rows, new, veto):
    """Say which of the new rows is kept, none of the commits in `veto`, and by which bar; its status becomes keep."""
    facts = [(row["commit"], float(row["val_bpb"]), row["status"], row["description"]) for row in rows + new]
    limits = bars(facts)[0][len(rows) :]
    ideas = any(row["kind"] == "idea" for row in new)  # else the bar shown is that of the next idea
    _, head, margin, n = bars(facts[: len(rows)] if ideas else facts)
    bar = f"keep below {head - margin * (1 - n / KEEP_WAVES):.6f}, simpler code below {head + margin:.6f}"
    bar = f"head {head:.6f}, margin {margin:.6f}, n {n}: {bar}"
    bar = f"no bar before {BASELINES} numbers of the baseline" if math.isnan(head) else bar
    print(f"{'record' if new else 'idea'}: {bar}")
    passed = [row for row, limit in zip(new, limits) if row["status"] == "discard" and float(row["val_bpb"]) < limit]
    passed = [row for row in passed if row["change"] <= MACHINE_TOLERANCE and row["commit"] not in veto]
    passed.sort(key=lambda row: float(row["val_bpb"]))
    if passed:
        passed[0]["status"] = "keep"
    for row in new:
        print("\t".join(row[name] for name in HEADER.split("\t")))
        if row["attention"] not in (None, (rows + new)[0]["attention"]):
            print(f"note: this run used the attention kernel {row['attention']}, not the one of the baseline")
        if row["change"] > MACHINE_TOLERANCE and row["kind"] == "idea":
            print("note: a faster machine keeps nothing. If it stays so, begin a new night from this head")
    if passed[1:]:
        print("one of the next ideas, on the new head:", *(f"tried/{row['commit']}" for row in passed[1:]))
    speeds = [row["machine"] for row in rows + new if row["kind"] == "baseline"]
    if new and new[-1]["kind"] == "baseline" and max(speeds) > (1 + MACHINE_TOLERANCE) * min(speeds):
        text = f"the machine's speed was {min(speeds):.3g} to {max(speeds):.3g}, so the noise is partly the machine's"
        print(f"note: {text}: before an idea, begin a new night when nothing else is at work")


def follow(night, rows):
    """Bring table, tags, branch and worktrees in line with the rows. Where it was cut off, it goes on."""
    write_table(rows)
    kept = kept_commits(rows)
    tried = {row["commit"] for row in rows} - {*kept}
    for commit in tried - {tag.removeprefix("tried/") for tag in git("tag", "--list", "tried/*").split()}:
        git("tag", "--no-sign", f"tried/{commit}", commit)
    if not kept:
        return
    with edit_aside(Path()):
        idea = find_idea(".", kept[-1])
        if idea[:7] in tried and idea == git("rev-parse", "HEAD"):
            git("reset", "-q", "--keep", "HEAD~1")
        elif idea[:7] in tried:  # the human has committed something on top of it
            git("revert", "--no-edit", idea)
        git("merge", "-q", "--no-edit", "--ff", kept[-1])  # no fast-forward if the human has committed program.md
    for tree in {*night.trees} - {Path()}:
        if find_idea(tree, kept[-1])[:7] in {"", *tried}:  # an idea that has not run yet stays
            with edit_aside(tree):
                git("reset", "-q", "--keep", git("rev-parse", "HEAD"), tree=tree)


@contextlib.contextmanager
def edit_aside(tree):
    """Puts an edit of train.py that has no commit into git's stash while the tree moves, and then back."""
    edited = git("status", "--porcelain", "-uno", "--", "train.py", tree=tree)
    if edited:
        git("stash", "push", "-q", "--", "train.py", tree=tree)
    try:
        yield
    finally:
        if edited:
            try:
                git("stash", "pop", "-q", tree=tree)
            except subprocess.CalledProcessError:
                git("checkout", "-q", "HEAD", "--", "train.py", tree=tree)
                print(f"note: the edit of {tree / 'train.py'} does not fit the new head. It is kept: git stash show -p")


def one_at_a_time():
    return cache_lock(Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")))  # one for all worktrees


@contextlib.contextmanager
def changing(night):
    with one_at_a_time():
        if open_night() != night:
            raise PrepareError("another command has changed the night meanwhile: run this again")
        yield


def night_command(command, *words):
    """`run`, `decide`, `record`. Returns the exit status. Raises PrepareError, or CalledProcessError of git."""
    sys.stdout.reconfigure(errors="backslashreplace")
    here = Path(__file__).resolve().parent  # the same from every folder
    os.chdir(here.parent.parent if here.parent.name == ".waves" else here)
    if command == "run":
        return start_runs(*words)
    if command == "supervise":
        return supervise(Path(*words))
    if command == "decide" and words in ((), ("check",)):
        return decide(check=bool(words))
    if command == "record" and words[:1] in ((), ("discard",)):
        return decide(record=True, veto=words[1:] or words)
    raise PrepareError("the commands of a night are `prepare.py run`, `decide` and `record`: see program.md")


# -----------------------------------------------------------------------------
# Preparation


def prepare(args):
    """Make what the options ask for, redo only what depends on a change, and put it in force."""
    check_gpu(get_device(), args.scale, training=False)
    cache, started = cache_dir(), time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    with cache_lock(cache):
        forget_cache()  # another process may have changed it
        known = {}  # {name: checksum}
        with contextlib.suppress(PrepareError):
            known = dict(load_manifest(cache)["files"].values())

        def make(path, function):
            """Make a file, unless it is there: its name has the key of what it is made from."""
            if path.exists() and known.get(path.name) in (None, checksum(path)):
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

        recipe = [4, SPLIT_PATTERN, SPECIAL_TOKENS, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS]
        path = cache / f"tokenizer-{cache_key(corpus.key('train'), args.vocab_size, recipe)}.bpe"
        files, made = {"tokenizer": path}, make(path, train_tokenizer)
        tokenizer = Tokenizer.load(path)
        vocab_size = tokenizer.get_vocab_size()
        more = f", {args.vocab_size:,} were asked for: the text has no more to learn" * (vocab_size < args.vocab_size)
        show("tokenizer", f"{vocab_size:,} tokens, {made}{more}")

        hashes = {}
        for split in ("train", "val"):
            path = cache / f"{split}-{cache_key(corpus.key(split), checksum(files['tokenizer']), recipe)}.bin"
            files[f"{split}_tokens"] = path
            made = make(path, partial(write_tokens, tokenizer, corpus.documents(split)))
            if not path.stat().st_size:
                raise PrepareError(f"{corpus.note}. This leaves no text for {split}: add text")
            tokens = map_tokens(path)
            lengths, hashes[split] = measure_documents(tokens)
            held = np.minimum(lengths, args.seq_len + 1).sum() / len(tokens)
            show(split, f"{len(tokens):,} tokens in {len(lengths):,} documents, rows hold {held:.0%} at most, {made}")
        repeated = np.isin(hashes["val"], hashes["train"]).mean()
        show("", f"{repeated:.1%} of the validation documents are also in training")
        if repeated > MOST_REPEATED:
            text = "first in {} and {}: remove what is there twice".format(*corpus.find_repeated())
            raise PrepareError(f"{repeated:.0%} of the validation documents are also in training, {text}")
        if skipped := sum(corpus.lacking.values()):
            show("", f"note: {skipped:,} rows without {corpus.column} were passed over")

        wanted = args.eval_tokens // args.seq_len
        rows = sum(1 for _ in islice(pack_rows(tokens, args.seq_len, forever=False), wanted))  # of val
        scored = f"{rows * args.seq_len:,} validation tokens"
        if rows < MIN_VAL_ROWS:
            text = f"{corpus.note}. It fills {rows} rows of --seq-len {args.seq_len}, {MIN_VAL_ROWS} are needed"
            raise PrepareError(f"{text}: add text, rename or name a file val, or choose a smaller --seq-len")
        if rows < wanted:
            show("", f"note: there are {scored} in whole rows; --eval-tokens asks for more")

        write_manifest(cache, args, vocab_size, files)
        show("ready", f"scale {args.scale}: rows of {args.seq_len:,} tokens, {args.time_budget} s a run, {scored}")
        show("", f"in {cache}, harness {fingerprint()}, after {time.monotonic() - started:.1f} s")
        show("next", "uv run train.py")


def show(what, text):
    print(f"{what:<10} {text}", flush=True)


def write_manifest(cache, args, vocab_size, files):
    """Put these files, {kind: path}, in force and remove those of an earlier manifest."""
    constants = {"SCALE": args.scale, "MAX_SEQ_LEN": args.seq_len, "TIME_BUDGET": args.time_budget}
    constants |= {"VOCAB_SIZE": vocab_size, "EVAL_TOKENS": args.eval_tokens}
    checksums = {kind: [path.name, checksum(path)] for kind, path in files.items()}
    manifest = {"command": args.command, "constants": constants, "files": checksums}
    write_json(cache / MANIFEST, manifest)
    forget_cache()
    in_force = {MANIFEST, *(path.name for path in files.values())}
    made_here = re.compile(rf"((tokenizer|train|val)-[0-9a-f]{{12}}\.(bpe|bin)|{re.escape(MANIFEST)})(\.tmp-\d+)?")
    for path in cache.iterdir():  # the folder may hold files that are not ours
        if made_here.fullmatch(path.name) and path.name not in in_force and path.is_file():
            path.unlink()


# -----------------------------------------------------------------------------
# Command line


def parse_arguments(argv):
    def refuse(message):
        raise PrepareError(f"{message} (all options: uv run prepare.py --help)")

    about = "Prepare data, tokenizer and token files. They are in force until this is run again with other options."
    usage = (
        "uv run prepare.py [options]\n       uv run prepare.py run | decide | record    a night of research: program.md"
    )
    parser = argparse.ArgumentParser("prepare.py", usage, about)
    parser.error = refuse
    corpora = "prose from the Hugging Face hub (default), the Python source of this machine, or your own files (README)"
    parser.add_argument("--corpus", default="climbmix", metavar="climbmix|source|DIR", help=corpora)
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column or key of your text (text)")
    device = get_device()
    large = bfloat16_works(device) and torch.cuda.get_device_properties(device).total_memory >= 38e9
    scale = "laptop" if device.type == "cpu" else "full" if large else "desktop"
    parser.add_argument("--scale", choices=SCALES, default=scale, help=f"defaults of what follows (here {scale})")
    for name, (*_, defaults, meaning) in OPTIONS.items():
        each = ", ".join(f"{scale} {default:,}" for scale, default in zip(SCALES, defaults))
        parser.add_argument(option(name), type=int, metavar="N", help=f"{meaning} ({each})")
    args = parser.parse_args(argv)
    if args.corpus not in ("climbmix", "source"):
        args.corpus = str(Path(args.corpus).expanduser().resolve())
    for name, (low, high, defaults, _) in OPTIONS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[SCALES.index(args.scale)])
        if not low <= getattr(args, name) <= high or getattr(args, name) == 0:
            refuse(f"{option(name)} needs a whole number from {low:,} to {high:,}, got {getattr(args, name):,}")
    if args.eval_tokens < MIN_VAL_ROWS * args.seq_len:
        refuse(f"--eval-tokens {args.eval_tokens} is less than {MIN_VAL_ROWS} rows of --seq-len {args.seq_len}")
    args.command = shlex.join(["uv", "run", "prepare.py", *(f"{option(k)}={v}" for k, v in vars(args).items())])
    return args


def option(name):
    return f"--{name.replace('_', '-')}"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] in NIGHT:
            return night_command(*argv)
        prepare(parse_arguments(argv))
        return 0
    except subprocess.CalledProcessError as error:
        problem = f"git: {(error.stderr or error.stdout or '').strip()}"
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
