"""The fixed half of the harness: data, tokenizer, token files, loader, clock and metric.

    uv run prepare.py                     download climbmix, train the tokenizer, tokenize (once per machine)
    uv run prepare.py --corpus source     the same from the Python source on this machine, without a download
    uv run prepare.py --corpus DIR        the same from your own files of text
    uv run prepare.py run                 the one command of a night of research (program.md)

The data goes one way: corpus files → BPE ranks → token files + manifest → packed batches → bits per byte.
Nobody edits this file during research. `train.py` imports from here, never the other way. A run prints a fingerprint of
all in this file but the night, and of what was prepared: two numbers compare only if theirs are equal.
"""

import argparse
import base64
import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import math
import os
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
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from itertools import count, cycle, groupby, islice, pairwise, takewhile
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

NIGHT = {"run", "discard", "supervise"}
if __name__ != "__main__" or not NIGHT.intersection(sys.argv[1:2]):  # a night needs none of it, and it takes seconds
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import requests
    import tiktoken
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm

IMPORTED_AT = time.monotonic()
SOURCE = Path(__file__).read_text(encoding="utf-8").partition("\n# Night")[0]  # what a number depends on

# -----------------------------------------------------------------------------
# Constants

SCALES = {  # seconds a run trains, tokens a row, tokens in the vocabulary, validation tokens scored
    "full": dict(time_budget=300, seq_len=2048, vocab_size=8192, eval_tokens=40 * 524_288),
    "desktop": dict(time_budget=300, seq_len=1024, vocab_size=8192, eval_tokens=2**22),
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

DOCUMENT_CHARS = 4_000  # a longer document is cut into pieces (not in climbmix): what a row can't hold would be lost
VAL_FRACTION = 0.05  # share of the text that is validation, unless files are named as VAL_NAME says
MIN_VAL_ROWS = 16  # fewer validation rows say nothing
MOST_REPEATED = 0.5  # share of the validation documents that may be training documents too
BUFFER_DOCS, REFILL_DOCS = 1_000, 128  # documents from which a row is packed; documents read at a time
PREFETCH = 3  # batches made ahead


class PrepareError(Exception):
    """An error that the user can fix. One line: what was found, what was expected, and the command that fixes it."""


class EvaluationError(Exception):
    """The model breaks the contract of `evaluate_bpb`, so it gets no number."""


def one_line(text):
    """At most 160 printable characters: a message must not flood the agent that reads it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:1000]).split())[:160]


def show(what, text):
    print(f"{what:<10} {text}", flush=True)


# -----------------------------------------------------------------------------
# Cache: one folder for everything prepared, and a manifest that says what is in force

MANIFEST = "autoresearch-prepared.json"


def cache_dir():
    """The folder of everything prepared: `~/.cache/autoresearch`, or AUTORESEARCH_CACHE."""
    return Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser().absolute()


def checksum(path):
    """sha256 of a file, as hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
            print("another prepare.py is at work: waiting for it to end", file=sys.stderr)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def is_locked(path):
    with open(path, "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def load_manifest(cache):
    """What is in force in the cache folder: {"command", "constants", "files": {kind: path}, "seal"}."""
    try:
        manifest = json.loads((cache / MANIFEST).read_bytes())
        files = {kind: cache / name for kind, name in manifest["files"].items()}
        return {key: manifest[key] for key in ("command", "constants", "seal")} | {"files": files}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PrepareError(f"nothing is prepared in {cache}: run `uv run prepare.py [--corpus source]`") from error


def seal(paths):
    """12 hex digits over files, {kind: path}; None if one is missing. Of the training tokens, which may be many, only
    the size counts."""
    if all(path.exists() for path in paths.values()):
        return cache_key(checksum(paths["tokenizer"]), checksum(paths["val"]), os.path.getsize(paths["train"]))
    return None


@cache
def open_cache(folder):
    """The manifest, and what it names: "tokenizer", and "train" and "val", the tokens (memory-mapped, uint16).

    Opened once in a process: it stays readable if another prepare.py deletes it. Raises PrepareError for damage."""
    manifest = load_manifest(folder)
    paths = manifest["files"]
    if seal(paths) != manifest["seal"]:
        raise PrepareError(f"a file in {folder} is missing or damaged: `{manifest['command']}` makes it again")
    tokens = {split: map_tokens(paths[split]) for split in ("train", "val")}
    return {**manifest, **tokens, "tokenizer": Tokenizer.load(paths["tokenizer"])}


def constants():
    return open_cache(cache_dir())["constants"]


def __getattr__(name):
    """MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE and SCALE: as prepared, read when first asked for."""
    if name in ("MAX_SEQ_LEN", "TIME_BUDGET", "EVAL_TOKENS", "VOCAB_SIZE", "SCALE"):
        return constants()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def fingerprint():
    """12 hex digits over all that a number depends on: this file but the night, PyTorch, device, constants and text."""
    folder, device = open_cache(cache_dir()), device_name().split(",")[0]  # without the threads of a CPU
    return cache_key(SOURCE, torch.__version__, device, folder["constants"], folder["seal"])


# -----------------------------------------------------------------------------
# Corpus: files in reading order, the documents in them, and which of these are validation

KINDS = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md")  # of a user's own files
COMPRESSIONS = (".gz", ".zst", ".bz2", ".lz4")  # of all but .parquet
VAL_NAME = r"(?i)(?<![a-z])(val|valid(ation|ate)?|dev|devel|test|eval(uation)?|held-?out)(?![a-z])"  # not latest.txt


class Corpus:
    """Files of training and of validation text in reading order, and how they are read. If both are the same files, the
    last VAL_FRACTION of the characters is validation: one document at most is divided."""

    def __init__(self, train, val, note, column="text", length=DOCUMENT_CHARS):
        self.paths, self.shared, self.note = {"train": train, "val": val}, train == val, note
        self.column, self.length = column, length  # where rows have the text, and where it is cut (None: nowhere)
        self.lacking = {}  # {path: number of its rows without the column}, of the files read so far

    def key(self, split):
        """Hex key of a split: other files (name, size, modification time) or another way to read them change it."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths[split]]
        return cache_key(files, self.column, self.length, split, self.shared and VAL_FRACTION)

    def documents(self, split):
        """Yields the documents (str) of a split, none of them empty. Raises PrepareError for a file of no use."""
        position = 0  # of a piece in the whole text, in characters: cut() loses none
        for text in self.texts(split):
            for piece in cut(text, self.length):
                side = ("train" if position < self.val_begins_at else "val") if self.shared else split
                if side == split and piece.strip():
                    yield piece
                position += len(piece)

    @cached_property
    def val_begins_at(self):  # needs a pass of its own over the text
        return (1 - VAL_FRACTION) * sum(map(len, self.texts("train")))

    def texts(self, split):
        """Yields the text of each row, "" for null and where the column is missing."""
        for path in tqdm(self.paths[split], desc="reading", unit="file", leave=False, disable=None):
            row, number, lacking = {}, 0, 0
            try:
                for row in read_rows(path, self.column):
                    text = row.get(self.column) or ""
                    if not isinstance(text, str):
                        raise ValueError(f"{self.column} is not text: {text}")
                    yield text
                    number, lacking = number + 1, lacking + (self.column not in row)
            except Exception as error:  # of many kinds: every format has a library of its own
                reason = one_line(f"{type(error).__name__}: {error}")
                reason += " (JSON lines: an object a line)" * isinstance(error, (AttributeError, json.JSONDecodeError))
                raise PrepareError(f"{path} can't be used (row {number + 1}: {reason}): fix or remove it") from error
            if number and lacking == number:
                there = f"no row has {self.column}, there is {one_line(', '.join(map(str, row)))}"
                raise PrepareError(f"{path} can't be used: {there}: choose by --text-column NAME")
            self.lacking[path] = lacking


def cut(text, length):
    """Pieces of at most `length` characters, which end with a line where possible; [text] if `length` is None."""
    return re.findall(rf"(?s).{{1,{length - 1}}}(?:\n|\Z)|.{{{length}}}", text) if length else [text]


def read_rows(path, column):
    """Yields the rows of a file as {column: value}. In a text file <|endoftext|> ends a row."""
    kind = endings(path)[0]
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError("this is a git-lfs pointer, `git lfs pull` gets the file")
    if kind == ".parquet":
        with pq.ParquetFile(path) as file:
            names = [file.schema.column(i).path for i in range(len(file.schema))]
            columns = [column] if column in names else None  # all, for the message
            for batch in file.iter_batches(batch_size=256, columns=columns):
                yield from map(flat, batch.to_pylist())
    elif kind in (".jsonl", ".ndjson"):
        yield from (flat(json.loads(line)) for line in read_lines(path) if line.strip())
    elif kind in (".csv", ".tsv"):
        yield from read_table_file(path, kind)
    else:
        errors = "replace" if kind == ".py" else "strict"  # nobody can change the encoding of an installed package
        with io.TextIOWrapper(pa.input_stream(path), "utf-8-sig", errors) as file:
            rest = ""
            while block := file.read(2**26):  # memory for a document, not for the file
                *texts, rest = (rest + block).split("<|endoftext|>")
                yield from ({column: text} for text in texts)
            yield {column: rest}


def flat(row, prefix=""):
    """{"a.b": 1} of {"a": {"b": 1}}."""
    cells = {}
    for key, value in row.items():
        cells |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return cells


def read_lines(path):
    """Yields the lines of a file, decompressed by its name. Each is decoded by itself, so that an error has its row."""
    with io.BufferedReader(pa.input_stream(path)) as file:
        yield from (line.decode("utf-8-sig").replace("\r\n", "\n") for line in file)


def read_table_file(path, kind):
    """Yields the rows of a .csv or .tsv file, whose first line names the columns. Quotation marks enclose cells.
    Where tabs separate, marks that do not close, or that enclose whole rows, are text."""
    csv.field_size_limit(sys.maxsize)  # a document may have more than its 131,072 characters
    header = next(read_lines(path), "")
    separator = "\t" if kind == ".tsv" else max(",;\t", key=header.count)
    delimiter = separator if separator in header else "\x1f"  # a single column: commas are text
    width = header.count(delimiter) or -1  # delimiters in a row; -1 matches none

    def rows(quoting):
        for row in csv.DictReader(read_lines(path), delimiter=delimiter, quoting=quoting, strict=True):
            if any(row.pop(None, ())):
                raise ValueError("it has more cells than the first line has names")
            cells = {name: cell for name, cell in row.items() if cell is not None}
            inner = [cell.split("\n")[1:-1] for cell in cells.values()]  # the whole lines inside a cell
            if any(len(part) > 10 and all(line.count(delimiter) == width for line in part) for part in inner):
                raise ValueError("quotation marks enclose whole rows: one may not be closed")
            yield cells

    quoting = csv.QUOTE_MINIMAL
    if separator == "\t":
        try:
            deque(rows(quoting), maxlen=0)
        except (csv.Error, ValueError):
            quoting = csv.QUOTE_NONE
    yield from rows(quoting)


def endings(path):
    """[".json", ".gz"] of a.JSON.gz, [".pdf"] of v1.2.pdf, [""] of Makefile."""
    return [end.lower() for end in path.suffixes[-2 if path.suffix in COMPRESSIONS else -1 :]] or [""]


def source_corpus(length=DOCUMENT_CHARS):
    """The Python source on this machine: `.py` files of the standard library and of installed packages.

    A sixteenth of the packages is validation, by a hash of their names. Files come in the order of a hash too, so that
    a short run sees something of every package."""
    files = {}  # name below its root: path
    for root in dict.fromkeys(Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "purelib", "platlib")):
        for path in root.rglob("*.py"):
            name = path.relative_to(root)
            # site-packages may lie inside the standard library's folder, but is a root of its own
            if path.is_file() and not {"site-packages", "dist-packages"} & set(name.parts):
                files[str(name)] = path
    names = sorted(files, key=cache_key)
    in_val = {name for name in names if cache_key(Path(name).parts[0].removesuffix(".py"))[0] == "1"}
    train, val = ([files[name] for name in names if (name in in_val) == side] for side in (False, True))
    note = f"Python source: {len(train):,} files, validation {len(val):,} files of other packages"
    return Corpus(train, val, note, length=length)


def own_corpus(path, column, length=DOCUMENT_CHARS):
    """The user's own file, or those of a folder and its sub-folders by name, each once; hidden ones are left out.

    A file that the user names is read as text if its ending is not known."""
    found = [""] if path.is_file() else sorted(glob.glob("**", root_dir=path, recursive=True))
    found = [name for name in found if (path / name).is_file()]
    known = [name for name in found if path.is_file() or endings(path / name)[0] in KINDS]
    chosen = {(path / name).resolve(): name for name in known}  # each file once, whatever links there are
    others = [path / name for name in found if (path / name).resolve() not in chosen]
    others = Counter("".join(endings(other)) or "no ending" for other in others)
    others = ", ".join(f"{number} {kind}" for kind, number in others.most_common(5))
    names, passed_over = list(chosen.values()), f", passed over: {others}" if others else ""
    if not names:
        kinds = f"{', '.join(KINDS)} (all but .parquet also with {', '.join(COMPRESSIONS)})"
        raise PrepareError(f"--corpus {path} is no file of text, nor a folder with one: {kinds}{passed_over}")
    train, val = ([name for name in names if bool(re.search(VAL_NAME, name)) == side] for side in (False, True))
    note = f"validation is, by their names, {', '.join(val[:3])}{', …' * (len(val) > 3)}"
    if not train or not val:
        train = val = names
        note = f"validation is the last {VAL_FRACTION:.0%} of the text"
    train, val = ([path / name for name in side] for side in (train, val))
    return Corpus(train, val, f"{path}: {len(names):,} file(s), {note}{passed_over}", column, length)


def climbmix_corpus(folder, num_shards, workers):
    """The first `num_shards` training shards of climbmix (-1: all) and VAL_SHARD, downloaded where they are missing."""
    numbers = range(LAST_SHARD)[: num_shards if num_shards >= 0 else None]
    names = [f"shard_{number:05d}.parquet" for number in numbers] + [VAL_SHARD]
    download_shards(names, folder, workers)
    note = f"climbmix: {len(numbers):,} training shard(s), validation {VAL_SHARD}"
    *train, val = [folder / name for name in names]
    return Corpus(train, [val], note, length=None)  # whole documents, as the original has them


# -----------------------------------------------------------------------------
# Download. A shard gets its name only after its sha256 was verified, so a file with that name is good

REPO = "karpathy/climbmix-400b-shuffle"
LAST_SHARD = 6542
VAL_SHARD = f"shard_{LAST_SHARD:05d}.parquet"  # pinned: never trained on
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
        raise PrepareError(f"cannot reach {endpoint} ({type(error).__name__}): {check}") from error
    return endpoint


def download_shards(names, folder, workers):
    """Make sure that every shard of `names` is in `folder`. What is there costs no request. What was fetched stays."""
    folder.mkdir(parents=True, exist_ok=True)
    problems = []
    for pause in (0, *RETRY_PAUSES):
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            break
        if problems:
            print(f"{len(missing)} shards are missing, {problems[0]}: next attempt in {pause} s", flush=True)
            time.sleep(pause)
        fetch = partial(fetch_shard, folder=folder, endpoint=require_hub())
        with ThreadPool(workers) as pool:
            fetched = pool.imap_unordered(fetch, missing)
            problems = list(filter(None, tqdm(fetched, "download", len(missing), unit="shard", disable=None)))
        if any(re.search(r"\(HTTP 40[134]\)", problem) for problem in problems):
            break  # another attempt would get the same answer
    shutil.rmtree(folder / INCOMING, ignore_errors=True)  # also what a killed download left
    if problems:
        mend = "What was fetched stays, run it again (HTTP 401, 403: HF_TOKEN; 404: is HF_ENDPOINT a full mirror?)"
        raise PrepareError(f"{len(problems)} of {len(names)} shards could not be fetched: {problems[0]}. {mend}")


def fetch_shard(name, folder, endpoint):
    """Fetch a shard, verify it, give it its name. Returns None, or what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, utils

    utils.disable_progress_bars()
    utils.logging.set_verbosity_error()  # its warnings have signed addresses
    where = dict(repo_type="dataset", endpoint=endpoint)
    try:
        expected = get_hf_file_metadata(hf_hub_url(REPO, name, **where)).etag  # the library compares only lengths
        file = hf_hub_download(REPO, name, local_dir=folder / INCOMING, **where)
        if checksum(file) != expected:
            os.unlink(file)  # else the next attempt would find it
            raise ValueError("its sha256 is not the one that the hub names; a bad mirror or proxy?")
        os.replace(file, folder / name)
    except Exception as error:  # of many kinds
        if (response := getattr(error, "response", None)) is not None:
            return f"{name} (HTTP {response.status_code})"
        reason = re.sub(r"\S+\?\S+", "…", str(error).split("\n")[0])  # addresses are signed
        return f"{name} ({reason})"


# -----------------------------------------------------------------------------
# Tokenizer and token files


class Tokenizer:
    """Byte-level BPE, trained with rustbpe, run by tiktoken, stored as plain ranks.

    Every text comes back from its tokens, but for lone surrogates (U+FFFD). What spells a special token is text."""

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
        # UTF-8 can't hold lone surrogates, which JSON may have: U+FFFD in their place, as tiktoken does it
        texts = (text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts)
        trainer.train_from_iterator(texts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        return cls([bytes(token) for token, _rank in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])])

    @classmethod
    def from_directory(cls, folder=None):
        """The prepared tokenizer. Raises PrepareError if the cache is missing or damaged."""
        return open_cache(Path(folder or cache_dir()))["tokenizer"]

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


def sample_texts(documents):
    """The beginnings of the documents, TOKENIZER_CHARS characters together."""
    left = TOKENIZER_CHARS
    for text in documents:
        yield text[:TOKENIZER_DOC_CHARS]
        if (left := left - len(text[:TOKENIZER_DOC_CHARS])) <= 0:
            return


def get_token_bytes(device="cpu"):
    """Length in bytes of each token of the prepared tokenizer, int32 tensor of shape (V,); special tokens have 0."""
    return torch.from_numpy(Tokenizer.from_directory().token_bytes()).to(device=device, dtype=torch.int32)


def write_tokens(tokenizer, documents, path):
    """Tokenize on all cores into `path`: all token ids of a split, uint16. Each document begins with a BOS."""
    documents, encode = iter(documents), partial(tokenizer.encode, prepend=tokenizer.get_bos_token_id())
    with ThreadPoolExecutor(os.cpu_count()) as pool, atomic_write(path) as tokens:
        while texts := list(islice(documents, 256 * os.cpu_count())):
            for ids in pool.map(encode, texts):  # tiktoken releases Python's lock
                tokens.write(np.array(ids, np.uint16).tobytes())


def map_tokens(path):
    return np.memmap(path, np.uint16, "r").view(np.ndarray)  # slicing a plain array costs a tenth of a memmap's


def read_tokens(split):
    """The tokens of a prepared split, memory-mapped: uint16 (N,)."""
    if split not in ("train", "val"):
        raise ValueError(f'split must be "train" or "val", not {split!r}')
    return open_cache(cache_dir())[split]


# -----------------------------------------------------------------------------
# Device, clock


def get_device():
    """Where training and evaluation run: DEVICE from the environment, else CUDA, else Apple's MPS, else the CPU. Raises
    PrepareError if DEVICE names no device of this machine."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    name = os.environ.get("DEVICE") or here[0]
    if name not in here:
        raise PrepareError(f"DEVICE={name!r} is not on this machine, which has: {', '.join(here)}")
    return torch.device(name)


def bfloat16_works(device):
    """Whether a run computes in bfloat16 on this device (CUDA of compute capability 8 or more), else in float32."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).major >= 8  # torch.compile can trace this


def check_gpu(device, scale, training):
    """Raises PrepareError if a run of this scale can't use the GPU of this machine. If PyTorch sees none where one is
    expected, a training ends; a preparation says so and goes on: a login node has no GPU."""
    driver = os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/dxg")  # NVIDIA's, the second in WSL2
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(map(int, re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))), default=0)
        if 10 * major + minor < oldest:
            text = f"PyTorch has no kernels for {device_name()}: its compute capability is under {oldest / 10}"
            raise PrepareError(f"{text}: install an older PyTorch, or use the CPU with DEVICE=cpu")
    if device.type == "cpu" and not os.environ.get("DEVICE") and (driver or scale != "laptop"):
        text = f"scale {scale}, but PyTorch {torch.__version__} (CUDA: {torch.version.cuda}) sees no GPU"
        text += ", although NVIDIA's driver is here: README, Another PyTorch" * driver
        if training and scale != "laptop":
            raise PrepareError(f"{text}. To run on the CPU nevertheless: `DEVICE=cpu uv run train.py`")
        show("", f"note: {text}")


def peak_memory_mb():
    """Peak memory in MiB: allocated on a CUDA GPU, held by the driver for MPS, resident on a CPU."""
    if get_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if get_device().type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20  # it keeps what it had at the peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # or KiB


def device_name():
    name = {"cpu": f"CPU, {torch.get_num_threads()} thread(s)", "mps": "Apple GPU"}.get(get_device().type)
    return f"{name or torch.cuda.get_device_name()}, torch {torch.__version__}"


class Clock:
    """The time that a model has to learn in, from the first batch of make_dataloader to the beginning of evaluation.

    If training or evaluation goes on, the time between counts too. What a run computes before its first batch is not
    seen. `val_bpb` is the number of the last evaluation, None before it and if it failed."""

    def __init__(self):
        self.started = self.stopped = self.val_bpb = None
        self.val_seen = self.val_seen_too_early = False  # validation text was handed out; before an evaluation began
        self.step_ends, self.batch_since = [0.0], False  # seconds() at the last ends of steps; a batch came since then?

    def start(self):
        if self.started is None:
            self.started = time.monotonic()
            if get_device().type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the warm-up's attempts are not the run's memory
        self.stopped, self.batch_since = None, True

    def begin_evaluation(self):
        self.val_bpb, self.val_seen_too_early = None, self.val_seen
        if self.started is not None:
            self.stopped = time.monotonic()

    def seconds(self):
        """Seconds of training so far; 0.0 before the first batch."""
        return 0.0 if self.started is None else (self.stopped or time.monotonic()) - self.started

    def progress(self):
        """The used share of the budget, 0 to 1."""
        return min(self.seconds() / constants()["TIME_BUDGET"], 1.0)

    def limit(self):
        """Seconds after which a run is void: the last step may end a little after the budget."""
        return 1.02 * constants()["TIME_BUDGET"] + 1

    def time_is_up(self):
        """Asked before each step: is the budget used, or would another step end beyond the limit?

        The next step should take as long as the quicker one of the last two, as one may have compiled."""
        if self.batch_since:
            self.step_ends, self.batch_since = [*self.step_ends[-2:], self.seconds()], False
        steps = [after - before for before, after in pairwise(self.step_ends)]
        step = 1.1 * min(steps) if len(steps) == 2 else 0.0  # a tenth more, as steps differ
        return self.progress() >= 1.0 or self.seconds() + step > self.limit()

    def violation(self):
        """Why the training breaks the rules, or None."""
        if self.started is None:
            return "no batch of make_dataloader was asked for, so the clock never ran"
        if self.val_seen_too_early:
            return 'make_dataloader(…, "val") handed out validation text before the evaluation'
        if self.seconds() > self.limit():
            budget = f"a budget of {constants()['TIME_BUDGET']} s"
            return f"training took {self.seconds():.1f} s of {budget} (all up to the last evaluation counts)"
        return None


clock = Clock()


# -----------------------------------------------------------------------------
# Loader


def pack_rows(tokens, T, forever):
    """Best-fit packing: yields (row, epoch), a row being [(start, length), …] of T + 1 tokens together.

    A row is filled from a buffer of documents with the longest one that fits whole. Where none fits, it takes the
    beginning of the shortest one, whose rest is dropped. Among equals the one read first is taken. The buffer takes in
    REFILL_DOCS documents whenever it has fewer than BUFFER_DOCS. A row that the end of the data
    leaves unfilled is dropped, so there is no padding. `epoch` counts passes over the data from 1."""
    stream, buffer, epoch = document_stream(tokens, forever), [], 1
    while True:
        row, room = [], T + 1
        while room:
            while len(buffer) < BUFFER_DOCS and (more := list(islice(stream, REFILL_DOCS))):
                buffer = sorted(buffer + more)  # (length, epoch, start): by length, then by age
            if not buffer:
                return
            n_fitting = bisect_left(buffer, (room + 1,))  # (n,) sorts before every (n, …)
            length = buffer[max(n_fitting - 1, 0)][0]  # of the longest that fits, else of the shortest
            _, its_epoch, start = buffer.pop(bisect_left(buffer, (length,)))  # the oldest one of that length
            row.append((start, min(length, room)))
            room, epoch = max(room - length, 0), max(epoch, its_epoch)
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


def make_dataloader(tokenizer, B, T, split, device=None):
    """Yields (x, y, epoch) forever: int64 tensors (B, T) on `device`, by default get_device(); y follows x by a token.

    Every row starts with BOS and is packed as `pack_rows` says. The same split, B and T give the same batches. A batch
    that was handed out never changes. The first one starts the clock, and a training batch after an evaluation does so
    again. Validation batches before the evaluation make a run void. Raises PrepareError, ValueError for B, T, split."""
    if B < 1 or T < 1:
        raise ValueError(f"make_dataloader needs B ≥ 1 and T ≥ 1, got B={B}, T={T}")
    tokens = read_tokens(split)
    if tokenizer.get_vocab_size() != constants()["VOCAB_SIZE"]:
        raise PrepareError("this tokenizer is not the one that made the tokens: use Tokenizer.from_directory()")

    def hand_out():
        for batch in batches(tokens, B, T, torch.device(device or get_device())):
            clock.val_seen |= split == "val"
            if split == "train" or clock.started is None:  # validation text starts the clock, but continues it never
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
# Run: seed, report


def get_seed():
    """The seed of this run: the environment's SEED, 0 by default. Raises PrepareError if it is not a whole number."""
    text = os.environ.get("SEED", "0")
    if not text.isdecimal() or int(text) >= 2**32:
        raise PrepareError(f"SEED={text!r} is not a whole number from 0 to 4294967295: `SEED=1 uv run train.py`")
    return int(text)


def start_run():
    """Begin a run: check and open the cache, set all seeds. Returns the device. Raises PrepareError."""
    device, scale = get_device(), constants()["SCALE"]  # all is open now: another prepare.py can't take it away
    check_gpu(device, scale, training=True)
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):  # the last one on every device
        set_seed(get_seed())
    return device


if __name__ != "__main__" and "AUTORESEARCH_REPORT" in os.environ:
    try:
        start_run()  # in a night also for a train.py that does not call it
    except Exception as error:  # also CUDA's: a fault of the machine is not the idea's, says judged_row()
        sys.exit(f"prepare.py: error: {one_line(str(error))}")


def facts_of_run():
    """What the harness wants to know of a run after its last evaluation. AUTORESEARCH_REPORT says where it looks."""
    problems, seed = [clock.violation()], torch.initial_seed()
    if seed != get_seed():
        problems.append(f"train.py set torch's seed to {seed}, the harness set it to SEED={get_seed()} in start_run()")
    return {
        "val_bpb": f"{clock.val_bpb:.6f}",
        "training_seconds": f"{clock.seconds():.1f}",
        "memory_gb": f"{peak_memory_mb() / 1024:.1f}",
        "harness": fingerprint(),
        "problems": [problem for problem in problems if problem],
    }


def report(val_bpb, *, mfu_percent, total_tokens, num_steps, num_params, depth, attention):
    """Print the block that every tool greps. The number itself was left for the harness by `evaluate_bpb`: PrepareError
    if val_bpb is another."""
    if clock.val_bpb is None or f"{val_bpb:.6f}" != f"{clock.val_bpb:.6f}":
        raise PrepareError(f"report() got {val_bpb}, the last evaluate_bpb() returned {clock.val_bpb}: pass that on")
    facts = facts_of_run()
    for problem in facts["problems"]:
        print(f"warning: this number does not count: {problem}")
    lines = {
        "val_bpb": facts["val_bpb"],
        "training_seconds": facts["training_seconds"],
        "total_seconds": f"{time.monotonic() - IMPORTED_AT:.1f}",
        "peak_vram_mb": f"{peak_memory_mb():.1f}",
        "mfu_percent": f"{mfu_percent:.2f}",
        "total_tokens_M": f"{total_tokens / 1e6:.1f}",
        "num_steps": num_steps,
        "num_params_M": f"{num_params / 1e6:.1f}",
        "depth": depth,
        "seed": get_seed(),
        "attention": attention,
        "device": device_name(),
        "harness": facts["harness"],
    }
    print("\n".join(["---", *(f"{name + ':':<18}{value}" for name, value in lines.items())]), flush=True)
    if name := os.environ.get("AUTORESEARCH_REPORT"):
        write_json(Path(name), {**lines, **facts})


# -----------------------------------------------------------------------------
# Metric


def evaluate_bpb(model, tokenizer, batch_size, device=None):
    """Bits per byte of the validation text: Σ nats / (ln 2 · Σ bytes). Stops the clock. The last call counts.

    `model(x)`, x int64 (batch_size, MAX_SEQ_LEN), returns the logits (batch_size, MAX_SEQ_LEN, V), finite, of any
    floating-point type. It never sees the targets: the softmax is done here, in float32, the sums in float64.
    The first EVAL_TOKENS / MAX_SEQ_LEN validation rows are scored, each exactly once whatever `batch_size` is: the last
    batch is filled up with rows that do not count. Special tokens count in neither sum.

    A submission may not look beyond the tokens that it predicts from. On several batches `check_causality` looks for
    that. A model that is seen to fail gets EvaluationError and no number."""
    device = torch.device(device or get_device())
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()  # what is still being computed is training
    clock.begin_evaluation()
    if report_file := os.environ.get("AUTORESEARCH_REPORT"):  # in a night
        Path(report_file).unlink(missing_ok=True)  # what an earlier evaluation left
    if violation := clock.violation():
        if report_file:
            raise EvaluationError(violation)  # such a number counts for nothing, so it costs no time
        print(f"warning: {violation}", file=sys.stderr)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # libraries and kernels need memory of their own
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        tokens, T = read_tokens("val"), constants()["MAX_SEQ_LEN"]
        rows = list(islice(pack_rows(tokens, T, forever=False), constants()["EVAL_TOKENS"] // T))
        token_bytes = get_token_bytes(device)  # of the prepared tokenizer, whatever was passed in
        with torch.no_grad():
            clock.val_bpb = score_rows(model, tokens, rows, T, token_bytes, batch_size, device)
        if report_file:
            write_json(Path(report_file), facts_of_run())
        return clock.val_bpb
    finally:
        if was_training:
            model.train()


CAUSALITY_ROWS, CAUSALITY_ROWS_PER_BATCH = 64, 16  # rows checked in all, and at most of one batch
CAUSALITY_TOLERANCE = 1e-3  # logits; a smaller leak is worth less than the noise of a seed
ROWS_PER_LOSS = 8  # rows of logits that are scored in one call: fewer take more calls, more take more memory


def score_rows(model, tokens, rows, T, token_bytes, batch_size, device):
    """Bits per byte of packed `rows`; token_bytes (V,) on the device."""
    V, rng = len(token_bytes), random.SystemRandom()  # not the seeded generator: a model can't foresee what is checked
    starts = range(0, len(rows), batch_size)
    rows_checked = max(1, min(CAUSALITY_ROWS_PER_BATCH, batch_size // 2))
    checked = set(rng.sample(starts, min(math.ceil(CAUSALITY_ROWS / rows_checked), len(starts))))
    sums, packed = 0.0, np.empty((batch_size, T + 1), np.int64)
    for start in starts:
        batch = rows[start : start + batch_size]
        # Filled up, so the shape never changes, and a compiled model is not compiled again for the last batch.
        fill_rows(tokens, cycle(batch), packed)
        x = torch.from_numpy(packed[:, :-1].copy()).to(device)  # its own memory: y can't be reached through it
        y = torch.from_numpy(packed[:, 1:].copy()).to(device)
        logits = checked_logits(model, x.clone(), V)
        sums += nats_and_bytes(logits[: len(batch)], y[: len(batch)], token_bytes)
        if start in checked:
            row_ids = sorted(rng.sample(range(batch_size), rows_checked))
            logits = logits[row_ids]  # a list copies: the model may reuse its output's memory
            check_causality(model, x, row_ids, logits, rng)
        del logits  # before the next ones exist: two of them take more memory than training
    nats, total_bytes = sums.tolist()
    if not math.isfinite(nats):
        raise EvaluationError(f"the logits are so large that the score is {nats}")
    return nats / (math.log(2) * total_bytes)


def nats_and_bytes(logits, y, token_bytes):
    """Sums over the targets y (B, T) that have bytes, float64 of shape (2,): nats and bytes."""
    device = "cpu" if y.device.type == "mps" else y.device  # MPS has no float64
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part, part_y in zip(logits.split(ROWS_PER_LOSS), y.split(ROWS_PER_LOSS)):
        loss = F.cross_entropy(part.flatten(0, 1).float(), part_y.flatten(), reduction="none")  # (rows · T,)
        n_bytes = token_bytes[part_y.flatten()].to(device)
        sums += torch.stack([loss.to(device).double() * (n_bytes > 0), n_bytes.double()]).sum(dim=1)
    return sums


def checked_logits(model, x, V):
    """model(x), after a check of its type, shape and finiteness. Raises EvaluationError."""
    logits = model(x)
    expected = (*x.shape, V)
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or tuple(logits.shape) != expected:
        got = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise EvaluationError(f"model(x) must return floating-point logits of shape {expected}, it returned {got}")
    extremes = [end for part in logits.split(ROWS_PER_LOSS) for end in part.float().aminmax()]  # NaN if there is one
    if not torch.stack(extremes).isfinite().all():
        raise EvaluationError("model(x) returned logits that are not finite in float32 (NaN or infinity)")
    return logits


def check_causality(model, x, row_ids, ref_logits, rng):
    """Raise EvaluationError if logits depend on tokens that come after them, or on other rows of x (B, T). ref_logits
    (len(row_ids), T, V) is what model(x) gave for the rows `row_ids`.

    These rows are changed from a random position t on, the other rows wholly. The logits before t must stay."""
    (B, T), V = x.shape, ref_logits.shape[-1]
    t = [0] * B
    for i in row_ids:
        t[i] = rng.randrange(1, T) if T > 1 else 1  # one token has none after it
    noise = torch.randint(1, V, x.shape, generator=torch.Generator().manual_seed(rng.getrandbits(63)))
    noise[torch.arange(T) < torch.tensor(t)[:, None]] = 0
    changed = (x + noise.to(x.device)) % V  # differs from x where the noise is not 0

    def difference(tokens):
        logits = checked_logits(model, tokens, V)
        return max((logits[i, : t[i]] - ref[: t[i]]).abs().max().item() for i, ref in zip(row_ids, ref_logits))

    if (worst := difference(changed)) > CAUSALITY_TOLERANCE:
        problem = "the model is not causal, or it mixes rows: later tokens or other rows changed its logits"
        if (again := difference(x)) > CAUSALITY_TOLERANCE:
            problem = "the same input gave other logits (a state, or a kernel that is not deterministic)"
        raise EvaluationError(f"{problem}: a logit changed by {max(worst, again):.3g}, so there is no number")


# -----------------------------------------------------------------------------
# Preparation and command line


def prepare(args):
    """Make what the options ask for, redo only what depends on a change of text or options, and put it in force."""
    cache, started = cache_dir(), time.monotonic()
    cache.mkdir(parents=True, exist_ok=True)
    show("device", device_name())
    check_gpu(get_device(), args.scale, training=False)
    with cache_lock(cache):
        with contextlib.suppress(PrepareError):  # if nothing is in force
            manifest = load_manifest(cache)
            if seal(manifest["files"]) != manifest["seal"]:  # damaged, so it is made again
                for path in manifest["files"].values():
                    path.unlink(missing_ok=True)
        corpus = open_corpus(args, cache)
        show("corpus", corpus.note)
        paths = make_files(cache, corpus, args.vocab_size)
        rows = check_validation(paths, args, corpus.note)
        write_manifest(cache, args, paths)
        scored = f"{rows * args.seq_len:,} validation tokens"
        show("ready", f"scale {args.scale}: rows of {args.seq_len:,} tokens, {args.time_budget} s a run, {scored}")
        show("", f"in {cache}, harness {fingerprint()}, after {time.monotonic() - started:.1f} s")
        show("next", "uv run train.py")


def open_corpus(args, cache):
    length = min(DOCUMENT_CHARS, 4 * args.seq_len)  # about a row: what a short row can't hold would be lost
    if args.corpus == "climbmix":
        return climbmix_corpus(cache / "data", args.num_shards, args.download_workers)
    if args.corpus == "source":
        return source_corpus(length)
    return own_corpus(Path(args.corpus).expanduser().absolute(), args.text_column, length)


def make_files(cache, corpus, vocab_size):
    """{kind: path} of tokenizer and token files. What is there is not made again: a name has the key of its sources."""
    recipe = [SPLIT_PATTERN, SPECIAL_TOKENS, TOKENIZER_CHARS, TOKENIZER_DOC_CHARS, vocab_size]
    path = cache / f"tokenizer-{cache_key(corpus.key('train'), recipe)}.bpe"
    if not path.exists():
        Tokenizer.train(sample_texts(corpus.documents("train")), vocab_size).save(path)
    tokenizer, paths = Tokenizer.load(path), {"tokenizer": path}
    show("tokenizer", f"{tokenizer.get_vocab_size():,} tokens")
    for split in ("train", "val"):
        path = paths[split] = cache / f"{split}-{cache_key(corpus.key(split), checksum(paths['tokenizer']))}.bin"
        if not path.exists():
            write_tokens(tokenizer, corpus.documents(split), path)
        if not path.stat().st_size:
            raise PrepareError(f"{corpus.note}. This leaves no text for {split}: add text")
        show(split, f"{path.stat().st_size // 2:,} tokens")
    if lacking := sum(corpus.lacking.values()):
        show("", f"note: {lacking:,} rows without {corpus.column} were passed over")
    return paths


def check_validation(paths, args, note):
    """The number of rows that an evaluation scores. Raises PrepareError if it would say nothing about a model."""
    train, val = map_tokens(paths["train"]), map_tokens(paths["val"])
    hashes = list(map(hash, document_bytes(val)))
    known = {*hashes}.intersection(map(hash, document_bytes(train)))  # its own hashes are not held
    repeated = np.mean([number in known for number in hashes])
    text = f"{repeated:.1%} of the validation documents are also in training"
    show("", text)
    if repeated > MOST_REPEATED:
        example = next(document for document in document_bytes(val) if hash(document) in known)
        example = Tokenizer.load(paths["tokenizer"]).decode(np.frombuffer(example, np.uint16)[1:].tolist())
        pieces = f"documents are pieces of about a row; this is one that repeats: {one_line(example)!r}"
        raise PrepareError(f"{text} ({pieces}): remove the files, rows or parts of rows that are there twice")
    wanted = args.eval_tokens // args.seq_len
    rows = sum(1 for _ in islice(pack_rows(val, args.seq_len, forever=False), wanted))
    if rows < MIN_VAL_ROWS:
        text = f"{note}. It fills {rows} rows of --seq-len {args.seq_len}, {MIN_VAL_ROWS} are needed"
        raise PrepareError(f"{text}: add text, rename or name a file val, or change --seq-len or --eval-tokens")
    return rows


def document_bytes(tokens):
    for length, _, start in document_stream(tokens, forever=False):
        yield tokens[start : start + length].tobytes()


def write_manifest(cache, args, paths):
    """Put these files, {kind: path}, in force and remove all others of these kinds."""
    facts = {"SCALE": args.scale, "MAX_SEQ_LEN": args.seq_len, "TIME_BUDGET": args.time_budget}
    facts |= {"EVAL_TOKENS": args.eval_tokens, "VOCAB_SIZE": Tokenizer.load(paths["tokenizer"]).get_vocab_size()}
    manifest = {"command": args.command, "constants": facts, "seal": seal(paths)}
    write_json(cache / MANIFEST, {**manifest, "files": {kind: path.name for kind, path in paths.items()}})
    open_cache.cache_clear()
    for kind, in_force in paths.items():
        for path in cache.glob(f"{kind}-{'[0-9a-f]' * 12}.b*"):  # the folder may hold files that are not ours
            if path != in_force:
                path.unlink()


def positive(text):
    """A whole number of 1 or more. argparse makes an error of a ValueError."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments(argv):
    """The options, by default those of the scale, and `command`, the line that was typed."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, formatter_class=layout)
    device = get_device()
    large = bfloat16_works(device) and torch.cuda.get_device_properties(device).total_memory >= 38e9
    scale = "laptop" if device.type == "cpu" else "full" if large else "desktop"
    parser.add_argument("--corpus", default="climbmix", metavar="source|PATH", help="text instead of climbmix")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column or key of your text (text)")
    parser.add_argument("--scale", choices=SCALES, default=scale, help=f"defaults of the next four (here {scale})")
    parser.add_argument("--time-budget", type=positive, metavar="SECONDS", help="how long a run trains")
    parser.add_argument("--seq-len", type=positive, metavar="TOKENS", help="length of a row")
    parser.add_argument("--vocab-size", type=positive, metavar="TOKENS", help="260 to 65,536")
    parser.add_argument("--eval-tokens", type=positive, metavar="TOKENS", help="validation text that is scored")
    parser.add_argument("--num-shards", type=int, default=10, metavar="N", help="of climbmix; -1: all (10)")
    parser.add_argument("--download-workers", type=positive, default=8, metavar="N", help="shards at a time (8)")
    parser.set_defaults(**SCALES[parser.parse_known_args(argv)[0].scale])
    args = parser.parse_args(argv)
    if not 260 <= args.vocab_size <= 2**16:  # the bytes and the special tokens; uint16
        parser.error(f"--vocab-size needs a whole number from 260 to 65,536, got {args.vocab_size:,}")
    if args.num_shards < 1 and args.num_shards != -1:
        parser.error(f"--num-shards needs a positive whole number, or -1 for all, got {args.num_shards}")
    args.command = shlex.join(["uv", "run", "prepare.py", *argv])
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    try:
        if NIGHT.intersection(argv[:1]):
            return night_command(argv)
        prepare(parse_arguments(argv))
        return 0
    except subprocess.CalledProcessError as error:  # of git or sbatch
        problem = f"{error.cmd[0]}: {(error.stderr or error.stdout or '').strip()}"
    except PrepareError as error:
        problem = error
    except OSError as error:  # a full disk, a folder without write permission
        where = "" if NIGHT.intersection(argv[:1]) else " (AUTORESEARCH_CACHE names another folder)"
        problem = f"{error}: fix that{where}, run it again; what is done stays"
    except KeyboardInterrupt:
        problem = "interrupted; run it again to go on"
    print(f"prepare.py: error: {problem}", file=sys.stderr)
    return 1


# -----------------------------------------------------------------------------
# Night: the loop. The table first; git follows from it, the plan from both, and the same loop after any interruption.
# An idea is a commit of train.py, made in a tree: the clone, or with several GPUs a worktree .waves/1, .waves/2, …
# A wave is a run in each tree that has something to run. Its runs are planned together (run.json has a Row without a
# number), started, ended (run.ID.end has the number or the problem), and judged together (the table has their Rows).
# Once one has started, nothing else is planned. A planned run without an end or a supervisor is started, also again.
#
#   results.tsv        the Rows of what was judged; branch, tags and worktrees follow from it
#   TREE/run.json      the planned Row; of the last start its id, how many there were, and the job of Slurm
#   TREE/run.py, .log  the train.py of its commit, and what it prints; run.lock: locked while a local supervisor lives
#   TREE/run.ID.end    null by start(), at the end {problems, hangs, and with a number val_bpb, memory_gb, harness, …}

TABLE = Path("results.tsv")
EDIT = "status --porcelain -uno -- train.py".split()  # git says whether train.py has an edit without a commit
BASELINES = 3  # runs of the baseline, at least; with several GPUs one more. Seeds 0, 1, 2, … An idea has seed 0
CHECK_RUNS, CHECK_SEED = 3, 100  # a check has the seeds 100, 101, 102, the next one 103, …
GRACE = 540  # seconds that a run has besides its budget, for compilation and evaluation, before it is ended
STARTS = 3  # of a run. If each time something ends its supervisor, it is a crash
WAIT = 45  # seconds that `run` waits: many agents' shells end a command after a minute
PAUSE, BEAT = 10, 3  # seconds between two passes of the loop; between two looks of a supervisor


def run_night(check, wait, sbatch):
    """Start, watch and judge runs for about `wait` seconds; sbatch: options for Slurm, or None. Returns what to print:
    its first word is `wait` (the same command again) or `idea` (commit the next one)."""
    deadline = time.monotonic() + wait
    while True:
        with open_night() as night:
            runs = planned_runs(night)
            if not any(run["starts"] for run in runs.values()):
                align_git(night)
                plan = plan_runs(night, check)
                if not plan:
                    return check_text(night) if check else idea_text(night)
                for tree in (Path(), *night.trees):
                    write_json(tree / "run.json", {"row": plan[tree]} if tree in plan else {})
                runs = planned_runs(night)
            left = [tree for tree, run in runs.items() if not run["end"]]
            if not left:
                record(night, runs)
                continue
            for tree in left:
                if not runs[tree]["going"]:
                    start(tree, runs[tree], night.trees, sbatch)
        if time.monotonic() >= deadline:
            return f"wait: {len(left)} of {len(runs)} runs, start {read_run(left[0])['starts']}: {last_words(left[0])}"
        until = min(deadline, time.monotonic() + PAUSE)
        while time.monotonic() < until and not any(read_run(tree)["end"] for tree in left):
            time.sleep(0.5)


# -----------------------------------------------------------------------------
# Night: the table, and git


class Row(NamedTuple):
    commit: str
    val_bpb: float
    memory_gb: float
    status: str  # keep, discard or crash
    description: str
    seed: int
    wave: int  # runs that were judged together have one number
    harness: str  # fingerprint() of the run, "" without one
    branch: str  # the night
    time: str  # UTC, when it was judged

    def line(self, columns=None):
        return "\t".join([self.commit, f"{self.val_bpb:.6f}", f"{self.memory_gb:.1f}", *map(str, self[3:])][:columns])


def is_simpler(row):
    return row.description.lower().startswith("simpler")


def is_check(row):
    return row.seed >= CHECK_SEED


def read_table():
    """The rows of all nights. Raises PrepareError if results.tsv is another table."""
    kinds, names = Row.__annotations__.values(), "\t".join(Row._fields)
    lines = TABLE.read_text(encoding="utf-8", errors="replace").splitlines() if TABLE.exists() else [names]
    if lines[:1] != [names]:
        raise PrepareError(f"{TABLE} is no table of this prepare.py: give it another name, results-….tsv")
    try:
        return [Row(*(kind(cell) for kind, cell in zip(kinds, line.split("\t"), strict=True))) for line in lines[1:]]
    except ValueError as error:
        raise PrepareError(f"{TABLE} has a damaged line ({error}): mend it, nothing else has its numbers") from error


def write_table(rows):
    with atomic_write(TABLE) as f:
        f.write("".join(f"{line}\n" for line in ["\t".join(Row._fields), *(row.line() for row in rows)]).encode())


class Night(NamedTuple):
    branch: str
    trees: list  # the worktrees .waves/1, .waves/2, …, or the clone alone
    rows: list  # of this branch, in order
    base: str | None  # commit of the baseline, None before its first number
    head: str | None  # commit that was kept last, the baseline at first
    rejected: set  # the commits that have run and are not kept
    wave: int  # of what runs next

    def planned_row(self, kind, commit, seed, description=""):
        """A Row before its run. Until record() decides, the status is its kind: baseline, check or idea."""
        return Row(commit, 0.0, 0.0, kind, description or f"{kind}, seed {seed}", seed, self.wave, "", self.branch, "")


@contextlib.contextmanager
def open_night():
    """The Night of this branch, as the table has it, for one process at a time. Raises PrepareError if it is none."""
    with cache_lock(Path(git("rev-parse", "--git-common-dir"))):  # one for all worktrees
        branch = git("branch", "--show-current")
        if not branch.startswith("autoresearch/"):
            here = branch or "none, or a rebase that waits for `git rebase --continue` (or `--abort`)"
            raise PrepareError(f"a night has a branch autoresearch/…, this is {here}: git switch to it")
        trees = [path.parent for path in Path(".waves").glob("[0-9]*/.git")] or [Path()]
        trees.sort(key=lambda tree: (len(tree.name), tree))  # 10 after 9
        rows = [row for row in read_table() if row.branch == branch]
        kept = [row.commit for row in rows if row.status == "keep" and not is_check(row)]
        base, head = (kept[0], kept[-1]) if kept else (None, None)
        rejected = {row.commit for row in rows}.difference(kept)
        yield Night(branch, trees, rows, base, head, rejected, 1 + max((row.wave for row in rows), default=0))


def git(*arguments, tree=".", stdout=subprocess.PIPE):
    """What git prints, unless it goes to a file. The user's settings, hooks and locale change nothing in it."""
    settings = "log.showSignature=false i18n.logOutputEncoding=UTF-8 commit.gpgSign=false merge.verifySignatures=false"
    settings += " rebase.rebaseMerges=false rebase.updateRefs=false core.hooksPath=/dev/null"
    settings = [word for setting in settings.split() for word in ("-c", setting)]
    options = dict(encoding="utf-8", errors="replace", stderr=subprocess.PIPE, stdout=stdout, check=True)
    return (subprocess.run(["git", "-C", str(tree), *settings, *arguments], **options).stdout or "").strip()


def commit_of(tree, name="HEAD"):
    """7 digits, as everywhere here: the commit at which a tree is, or another."""
    return git("rev-parse", name, tree=tree)[:7]


def idea_commits(tree, night):
    """The commits above the head, the last one first, without a human's: they change other files of the clone."""
    only = ["--", "train.py"] if Path(tree) == Path() else ["--not", commit_of(".")]
    found = git("log", "--format=%H", f"{night.head}..HEAD", *only, tree=tree)
    return [commit[:7] for commit in found.split()]


def align_git(night):
    """Make git say what the table says: the clone's branch is base, kept ideas, head, then an idea without a row, if
    there is one. A human's commits of other files may lie anywhere between."""
    # 1. What is rejected has a tag
    for commit in night.rejected.difference(git("tag", "--list", "--format=%(refname:lstrip=3)", "tried/*").split()):
        git("tag", "--no-sign", f"tried/{commit}", commit)
    if not night.head:
        return
    # 2. The clone's branch loses it, also from below commits of a human
    if (tip := commit_of(".")) in night.rejected:
        move(".", "HEAD~1")
    ideas = idea_commits(".", night)
    if not night.rejected.issuperset(ideas):
        return  # the last one is new: it runs first (or, in waves, shape_fix() refuses it)
    if ideas:
        lay_aside(".")
        git("rebase", "-q", "--autostash", "--onto", f"{ideas[0]}~1", ideas[0])
    # 3. What was kept in a worktree comes into the branch
    if git("merge-base", "HEAD", night.head)[:7] != night.head:
        lay_aside(".")
        git("merge", "-q", "--no-edit", "--ff", night.head)
    # 4. The trees follow the branch
    for tree in night.trees:
        if commit_of(tree) == tip or night.rejected.issuperset(idea_commits(tree, night)):
            move(tree, commit_of("."))


def move(tree, target):
    """Reset a tree to another commit, after an edit of train.py was laid aside."""
    if commit_of(tree, target) != commit_of(tree):
        lay_aside(tree)
        git("reset", "-q", "--keep", target, tree=tree)


def lay_aside(tree):
    """If train.py has an edit without a commit, put it into a patch beside it. The same edit has the same name."""
    if git(*EDIT, tree=tree):
        git("add", "--all", "train.py", tree=tree)  # with the marks of a conflict, if there is one
        draft = Path(tree) / "edit.patch"
        with atomic_write(draft) as f:
            git("diff-index", "--cached", "--patch", "--binary", "HEAD", "train.py", tree=tree, stdout=f)
        draft.rename(draft.with_name(f"edit-{checksum(draft)[:7]}.patch"))
        git("checkout", "-q", "HEAD", "train.py", tree=tree)


# -----------------------------------------------------------------------------
# Night: what runs next


def plan_runs(night, check):
    """{tree: Row} of the next wave: the baseline while it lacks numbers, else the ideas, else a check if it was asked
    for; {} if the night needs an idea. Raises PrepareError for an idea of the wrong shape, with what mends it."""
    seeds = [row.seed for row in night.rows if row.commit == night.base and not is_check(row)]
    if night.head == night.base and len(seeds) < BASELINES + (len(night.trees) > 1):
        base, new = night.base or commit_of("."), (seed for seed in count() if seed not in seeds)
        return {tree: night.planned_row("baseline", base, seed) for tree, seed in zip(night.trees, new)}
    return plan_ideas(night) or (dict(zip(night.trees, plan_check(night))) if check else {})


def plan_check(night):
    """The Rows that a check still needs: head and baseline in turn, on CHECK_RUNS seeds that were new to both."""
    fresh = max(CHECK_SEED, 1 + max(row.seed for row in night.rows))
    first = min((row.seed for row in night.rows if row.commit == night.head and is_check(row)), default=fresh)
    commits = (night.head, night.base) if night.head != night.base else ()
    ran = {(row.commit, row.seed) for row in night.rows}
    wanted = [(commit, seed) for seed in range(first, first + CHECK_RUNS) for commit in commits]
    return [night.planned_row("check", *pair) for pair in wanted if pair not in ran]


def plan_ideas(night):
    """{tree: Row} of the ideas that have no row in the table. One commit in two trees runs once."""
    plan = {}
    for tree in sorted({Path(), *night.trees}):
        found = idea_commits(tree, night)
        if found and found[0] not in [row.commit for row in plan.values()]:
            git("update-ref", f"refs/ideas/{found[0]}", found[0])  # no idea is lost, whatever becomes of its tree
            if fix := shape_fix(tree, found, night):
                what = f"an idea is one commit on top of {night.head} that changes only train.py"
                raise PrepareError(f"{found[0]}: {what}: {fix}")
            plan[tree] = night.planned_row("idea", found[0], 0, one_line(git("log", "-1", "--format=%s", found[0])))
    return plan


def shape_fix(tree, found, night):
    """The commands that mend an idea of the wrong shape, None if it is right. found: what idea_commits() says."""
    new, old, typed = found[0], found[-1], f"git -C {tree}"
    if tree not in night.trees:  # in the clone, but ideas belong into worktrees
        return f"`git -C .waves/1 cherry-pick {old}`, then `{typed} rebase --onto {old}~1 {old}`"
    if old in night.rejected:  # on top of what was not kept
        return f"`{typed} rebase --onto {old}~1 {old}`"
    if git("merge-base", "HEAD", night.head, tree=tree)[:7] != night.head:  # on another base
        return f"`{typed} rebase --onto {night.head} {old}~1`"
    if len(found) > 1 or git("diff", "--name-only", f"{new}~1", new, ".", ":!train.py", tree=tree):
        return f"`{typed} reset --soft {old}~1`, then `{typed} commit -m WHAT train.py`"
    return None


# -----------------------------------------------------------------------------
# Night: the runs

ERROR = re.compile(r"Fatal Python error|\w+\.py: error|[\w.]*(Error|Exception|Interrupt)\b")


def read_run(tree):
    """run.json of a tree, and as "end" what supervise() left of that run: None if it has not ended."""
    run = {"row": None, "id": None, "starts": 0, "slurm": None, "end": None}
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        facts = json.loads((tree / "run.json").read_bytes())
        run |= {**facts, "row": Row(*facts["row"])}  # all or nothing: it may be from another prepare.py
        run["end"] = json.loads((tree / f"run.{run['id']}.end").read_bytes())
    return run


def planned_runs(night):
    """{tree: what read_run() says} of this wave. "going": has it a supervisor? A local one locks run.lock, Slurm knows
    the job of another. It is asked twice for a job that it does not know. While it does not answer, all are going."""
    runs, now = {tree: read_run(tree) for tree in (Path(), *night.trees)}, (night.branch, night.wave)
    runs = {tree: run for tree, run in runs.items() if run["row"] and (run["row"].branch, run["row"].wave) == now}
    jobs, known = {run["slurm"] for run in runs.values() if run["slurm"] and not run["end"]}, set()
    for pause in (0, BEAT):
        if jobs - known:
            time.sleep(pause)
            answer = subprocess.run(["squeue", "--me", "--noheader", "--format=%A"], capture_output=True, text=True)
            known |= jobs if answer.returncode else {*answer.stdout.split()}
    going = {tree: run["slurm"] in known or is_locked(tree / "run.lock") for tree, run in runs.items()}
    return {tree: {**read_run(tree), "going": going[tree]} for tree in runs}  # its end may have come since


def start(tree, run, trees, sbatch):
    """Start a planned run in the background, as a process or as a job of Slurm. run: what read_run() says."""
    if run["starts"] == STARTS:
        text = f"its supervisor was ended {STARTS} times (by your shell? Then `--wait 900`): {last_words(tree)}"
        return write_json(tree / f"run.{run['id']}.end", {"problems": [text]})
    for file in (tree / "run.log", tree / "run.lock", *tree.glob("run.[0-9]*")):
        file.unlink(missing_ok=True)  # processes of an earlier run may still write there
    with open(tree / "run.py", "wb") as f:
        git("show", f"{run['row'].commit}:./train.py", tree=tree, stdout=f)
    limit = load_manifest(cache_dir())["constants"]["TIME_BUDGET"] + GRACE
    run = {"row": run["row"], "id": str(time.time_ns()), "starts": run["starts"] + 1}
    write_json(tree / f"run.{run['id']}.end", None)  # now: a network disk may hide a new name for a while
    command = [sys.executable, __file__, "supervise", str(tree), run["id"], str(run["row"].seed), str(limit)]
    if sbatch is not None:
        return start_job(tree, run, command, [f"--time={limit // 60 + 5}", *sbatch])
    env = os.environ | own_gpu(tree, trees)
    write_json(tree / "run.json", run)
    with open(tree / "run.lock", "wb") as lock, open(tree / "run.log", "wb") as log:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the supervisor inherits it, and the run does not
        streams = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
        subprocess.Popen(command, env=env, start_new_session=True, **streams)


def own_gpu(tree, trees):
    """{"CUDA_VISIBLE_DEVICES": the GPU of a worktree}; {} for the clone, and where all GPUs are hidden."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(trees))))).split(",")
    if tree == Path() or gpus == [""]:
        return {}
    if len(gpus) < len(trees):
        raise PrepareError(f"{len(trees)} worktrees, {len(gpus)} visible GPU(s): `git worktree remove {trees[-1]}`")
    return {"CUDA_VISIBLE_DEVICES": gpus[trees.index(tree)]}


def start_job(tree, run, command, sbatch):
    write_json(tree / "run.json", {**run, "starts": run["starts"] - 1})  # a job that Slurm refuses is no start
    options = ["--gres=gpu:1", "--no-requeue", f"--output={tree / 'run.log'}"]
    command = ["sbatch", "--parsable", *options, *sbatch, f"--wrap={shlex.join(command)}"]
    job = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    write_json(tree / "run.json", {**run, "slurm": job.strip().split(";")[0]})


def supervise(tree, run_id, seed, limit):
    """Run run.py to its end or its limit. Then write its number, even if it failed after that, or the problem."""
    report_file = (tree / f"run.{run_id}.report").resolve()
    env = os.environ | dict(SEED=seed, AUTORESEARCH_REPORT=str(report_file))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    popen = partial(subprocess.Popen, start_new_session=True)  # a process group of its own
    run = popen([sys.executable, "-u", "-Xfaulthandler", "run.py"], cwd=tree, env=env, stdin=subprocess.DEVNULL)
    # If this process dies, however it does, the pipe closes. Then the shell kills the run and its children
    killer = popen(["sh", "-c", f"read line; kill -9 -{run.pid}"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + limit
    while run.poll() is None and time.monotonic() < deadline:
        if read_run(tree)["id"] != run_id:
            sys.exit("this run ends, as another one was started here")
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(BEAT)
    if hangs := run.poll() is None:
        problem = f"hang: no end after {limit} s"
        run.send_signal(signal.SIGABRT)  # Python prints where it hangs
        time.sleep(BEAT)
    else:
        problem = last_words(tree, run.returncode)
        if run.returncode == -signal.SIGTERM:
            time.sleep(2)  # if a cluster ends the job, it now ends this process too, and the run is no crash
    killer.communicate()
    facts = json.loads(report_file.read_bytes()) if report_file.exists() else {"problems": [problem]}
    write_json(report_file.with_suffix(".end"), {**facts, "hangs": hangs})


def last_words(tree, status=0):
    """The last line of run.log that looks like an error, else the last line, and the signal that killed the run."""
    log = tree / "run.log"
    with open(log, "rb") if log.exists() else io.BytesIO() as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - 20_000))
        lines = [line for line in f.read().decode(errors="replace").splitlines() if one_line(line)] or ["no output"]
    errors = [line for line in lines if ERROR.match(line)] if status else []
    killed = f"killed by {signal.Signals(-status).name}: " if status < 0 and not errors else ""
    return one_line(killed + (errors or lines)[-1])


# -----------------------------------------------------------------------------
# Night: the rule that says which run is kept, and the record

KEEP_MARGIN = 1.5  # standard deviations of the baseline by which an idea must be better
KEEP_WAVES = 50  # waves without a keep after which the margin is 0: half a night of one GPU


class Bar(NamedTuple):
    """What the next idea has to beat. Of each wave (on one GPU a wave is one run) the best below its bar is kept."""

    head: float = math.nan  # val_bpb of the last kept run, at first the baseline's mean; `simpler` code never raises it
    margin: float = math.nan  # KEEP_MARGIN standard deviations of the baseline
    n: int = 0  # waves since the last keep, without those that only crashed, at most KEEP_WAVES
    known: frozenset = frozenset()  # the commits of the baseline and of what was kept

    def value(self, simpler):
        """nan, which nothing beats, while the baseline has fewer than three numbers."""
        return self.head + self.margin if simpler else self.head - self.margin * (1 - self.n / KEEP_WAVES)

    def of(self, row):
        """The bar of a run after these: nan for a known commit that runs again."""
        return math.nan if row.commit in self.known else self.value(is_simpler(row))


def next_bar(rows):
    """The Bar after these rows of one night, in order. They begin with the baseline, one commit with several seeds.

    An idea is kept below head - margin · (1 - n/KEEP_WAVES), one whose description begins with `simpler` below
    head + margin, and it never raises head. A check moves no bar: its seeds are others, while all ideas share the luck
    of seed 0. tests/test_decision_rule.py is the evidence for this rule."""
    rows = [row for row in rows if not is_check(row)]
    baseline = takewhile(lambda row: row.commit == rows[0].commit, rows)
    noise = [row.val_bpb for row in baseline if row.status == "keep"]
    if len(noise) < 3:
        return Bar()
    bar = Bar(statistics.mean(noise), KEEP_MARGIN * statistics.stdev(noise), 0, frozenset({rows[0].commit}))
    for _, wave in groupby(rows, key=lambda row: row.wave):
        ideas = [row for row in wave if row.commit not in bar.known]
        keeps = [row for row in ideas if row.status == "keep"]
        if keeps:
            best = min(keeps, key=lambda row: row.val_bpb)
            head = min(bar.head, best.val_bpb) if is_simpler(best) else best.val_bpb
            bar = bar._replace(head=head, n=0, known=bar.known | {row.commit for row in keeps})
        elif any(row.status == "discard" for row in ideas):  # a crash says nothing about the number
            bar = bar._replace(n=min(bar.n + 1, KEEP_WAVES))
    return bar


def record(night, runs):
    """Write the rows of a wave that has ended: of the ideas below their bar the best is kept. Raises PrepareError if
    runs give no row: the next calls write the rows of the others, then start these anew."""
    names = [row.harness for row in night.rows] + [run["end"].get("harness") for run in runs.values()]
    harness, bar, new = next(filter(None, names), None), next_bar(night.rows), []
    for tree, run in runs.items():
        try:
            new.append(judged_row(run["row"], run["end"], harness))
        except PrepareError:
            (tree / "run.json").unlink()
            raise
    below = [row for row in new if row.status == "discard" and row.val_bpb < bar.of(row)]
    best = min(below, key=lambda row: row.val_bpb, default=None)
    for i, row in enumerate(new):
        near = row.status == "discard" and row.val_bpb < bar.head
        note = ", also below the bar" if row in below else ", near miss" if near else ""
        new[i] = row._replace(status="keep") if row is best else row._replace(description=row.description + note)
    write_table(read_table() + new)


def judged_row(row, end, harness):
    """The Row of a run that has ended, an idea as "discard". Raises PrepareError for a baseline without a number, for
    a fault of the machine that start_run() found, and for another harness than the baseline's."""
    row = row._replace(time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    problem = one_line(end["problems"][0]) if end["problems"] else ""
    if problem and (row.status == "baseline" or problem.startswith("prepare.py: error")):
        raise PrepareError(f"the {row.status} has no number ({problem}): mend that, run again, or begin a new branch")
    if problem:
        return row._replace(status="crash", description=f"{row.description}: {problem}")
    if end["harness"] != harness:
        why = "undo what has changed in prepare.py, PyTorch, the device or the prepared text, or begin a new branch"
        raise PrepareError(f"the harness is {end['harness']}, that of the baseline {harness}: {why}")
    text = f", {end['num_steps']} steps" if "num_steps" in end else ""
    text += ", did not end by itself" if end["hangs"] else ""
    numbers = dict(val_bpb=float(end["val_bpb"]), memory_gb=float(end["memory_gb"]), harness=end["harness"])
    status = "discard" if row.status == "idea" else "keep"
    return row._replace(status=status, description=row.description + text, **numbers)


# -----------------------------------------------------------------------------
# Night: what is printed, and the command


def idea_text(night):
    """What an agent must know before its next idea: the bar, the rows of the last wave, and edits without a commit."""
    bar = next_bar(night.rows)
    bars = f"keep below {bar.value(simpler=False):.6f}, simpler code below {bar.value(simpler=True):.6f}"
    lines = [f"idea: head {bar.head:.6f}, margin {bar.margin:.6f}, n {bar.n}: {bars}"]
    lines += [row.line(5) for row in night.rows if row.wave == night.rows[-1].wave]
    for tree in sorted({Path(), *night.trees}):
        if git(*EDIT, tree=tree):
            lines.append(f"note: {tree / 'train.py'} has an edit without a commit: it did not run")
        for patch in tree.glob("edit-*.patch"):
            back = f"`git -C {tree} apply --3way {patch.name}`"
            lines.append(f"note: an edit without a commit was laid aside: {back} brings it back, then remove {patch}")
    return "\n".join(lines)


def check_text(night):
    """What baseline and branch are worth by a check that is complete."""
    if night.head == night.base:
        return "idea: nothing was kept, so there is nothing to check"
    lines, checks = ["idea: the check is complete"], [row for row in night.rows if is_check(row)]
    seeds = {row.seed for row in checks if row.commit == night.head}
    for what, commit in ("baseline", night.base), ("branch", night.head):
        numbers = [row.val_bpb for row in checks if row.commit == commit and row.seed in seeds and row.status == "keep"]
        text = f"{statistics.mean(numbers):.6f} ({min(numbers)} to {max(numbers)})" if numbers else "no number"
        lines.append(f"{what} {commit}, {len(numbers)} of {CHECK_RUNS} fresh seeds: {text}")
    return "\n".join(lines)


def discard():
    """Take back what the last wave of ideas has kept. Returns what to print. Raises PrepareError if that is nothing."""
    with open_night() as night:
        align_git(night)
        ideas = [row for row in night.rows if not is_check(row)]
        kept = [row for row in ideas if row.wave == ideas[-1].wave and row.commit == night.head]
        if not kept or night.head == night.base or any(idea_commits(tree, night) for tree in (".", *night.trees)):
            raise PrepareError("only a keep of the last wave can be taken back, before the next idea is committed")
        write_table([row._replace(status="discard") if row in kept else row for row in read_table()])
    with open_night() as night:
        align_git(night)
        return idea_text(night)


def night_command(argv):
    """`run`, `discard` and `supervise`. Returns the exit status. Raises PrepareError, or CalledProcessError of git."""
    sys.stdout.reconfigure(errors="backslashreplace")
    os.environ["AUTORESEARCH_CACHE"] = str(cache_dir())  # absolute, before the folder changes
    here = Path(__file__).resolve().parent  # the same from every folder
    os.chdir(here.parent.parent if here.parent.name == ".waves" else here)
    if argv[0] == "supervise":
        supervise(Path(argv[1]), argv[2], seed=argv[3], limit=int(argv[4]))
        return 0
    parser = argparse.ArgumentParser("prepare.py", description="A night of research: see program.md")
    parser.add_argument("command", choices=["run", "discard"])
    parser.add_argument("check", nargs="?", choices=["check"], help="run head and baseline on fresh seeds")
    parser.add_argument("--wait", type=int, default=WAIT, metavar="SECONDS", help=f"return after these ({WAIT})")
    parser.add_argument("--sbatch", nargs=argparse.REMAINDER, metavar="…", help="use Slurm, with all that follows")
    args = parser.parse_intermixed_args(argv)
    sbatch = None if args.sbatch is None else shlex.split(" ".join(args.sbatch))
    print(discard() if args.command == "discard" else run_night(bool(args.check), args.wait, sbatch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
