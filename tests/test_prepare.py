"""prepare.py's command line, corpora and cache: what it refuses, what it redoes, what survives a kill."""

import bz2
import csv
import gzip
import io
import json
import os
import shutil
import sysconfig
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import SMALL, prose, run_python
from test_loader import split_documents

import prepare


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "own cache"
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(folder))
    return folder


@pytest.fixture
def own_copy(own_cache, session_cache):
    """What the options --corpus={corpus} and SMALL have prepared, which this test may change."""
    return shutil.copytree(session_cache, own_cache)


def run(capsys, *options):
    """(exit status, standard output, standard error) of prepare.py with these options, in this process."""
    return prepare.main(list(options)), *capsys.readouterr()


@pytest.fixture
def tokenizer(cache):
    return prepare.Tokenizer.from_directory()


def write(folder, files):
    """Makes files, {name: str or bytes}, in the folder and below it. Returns the folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--vocab-size=259", "--vocab-size needs a whole number from 260 to 65,536, got 259"),
        ("--num-shards=-3", "--num-shards needs a positive whole number, or -1 for all, got -3"),
        ("--download-workers=1.5", "--download-workers: invalid positive value: '1.5'"),
    ],
)
def test_an_impossible_value_is_refused(own_cache, capsys, option, named):
    with pytest.raises(SystemExit, match="2"):
        prepare.main([option])
    assert named in capsys.readouterr().err.splitlines()[-1]
    assert not own_cache.exists()  # nothing was begun


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def table(others, separator=","):
    """3,000 rows of two cells; {20: "20,other"} replaces the 20th."""
    rows = (others.get(n, f"{n}{separator}row {n}") for n in range(1, 3001))
    return "\n".join([f"n{separator}text", *rows])


BOOK = "<|endoftext|>".join(prose(1, 300)).encode()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ["is no file of text, nor a folder with one: .parquet, .jsonl, .ndjson, .csv, .tsv, .txt"]),
        ({"index.html": b"no text here", "a.json.gz": b""}, ["is no file of text", "passed over: 1 .", " .json.gz"]),
        ({"a.csv": table({20: '20,"open'})}, ["a.csv can't be used (row 20: Error: unexpected end of data)"]),
        ({"a.csv": table({20: '20,"open', 90: '90,closed"'})}, ["quotation marks enclose whole rows"]),
        ({"a.csv": table({20: r'20,"he says \"so\"."'})}, ["a.csv can't be used (row 20: Error: ',' expected"]),
        ({"a.csv": table({20: "20,naïve"}).encode("latin-1")}, ["a.csv can't be used (row 20: UnicodeDecodeError: "]),
        ({"a.csv": table({20: "20,one,two"})}, ["a.csv can't be used (row 20: ValueError: it has more cells than"]),
        ({"a.csv": "no header, " + 700 * "x" + "\na,b\n"}, ["no row has text, there is no header, xx", "x: choose"]),
        ({"a.txt": b"all there is"}, ["1 file(s), validation is the last 5% of the text. This leaves no text for val"]),
        ({"a.txt": b"fine", "my test.txt": b""}, ["validation is, by their names, my test.txt. This leaves no text"]),
        ({"a.jsonl": b'{"text": "fine"}\n\n{"text": 5}\n'}, ["a.jsonl", "(row 2: ValueError: text is not text: 5)"]),
        ({"a.jsonl": b'{"text": "fine"}\n{"text": "to'}, ["(row 2: JSONDecodeError: Unterminated string"]),
        ({"a.jsonl": b'"bare"\n'}, ["a.jsonl can't be used (row 1: AttributeError: 'str'"]),
        ({"a.jsonl": b'{\n "text": "a"\n}'}, ["(row 1: JSONDecodeError: ", "(JSON lines: an object a line)"]),
        ({"a.jsonl": b'{"text": "so"}\n' * 30 + b'{"text": "na\xefve"}\n' * 50}, ["(row 31: UnicodeDecodeError: "]),
        ({"a.jsonl": b'{"data": {"text": "so"}}'}, ["no row has text, there is data.text: choose by --text-column"]),
        ({"a.parquet": b"<html>not found</html>"}, ["a.parquet can't be used (row 1: ArrowInvalid: Parquet"]),
        ({"a.parquet": parquet(n=[1], a=[{"b": {"c": "d"}}])}, ["no row has text, there is n, a.b.c: choose by"]),
        ({"a.parquet": parquet(text=[["a"]])}, ["(row 1: ValueError: text is not text: ['a'])"]),
        ({"a.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}, ["`git lfs pull` gets the file"]),
        ({"a.txt": "naïve".encode("latin-1")}, ["a.txt", "utf-8"]),
        ({"a.txt.gz": gzip.compress(bytes(range(200)))[:-9]}, ["a.txt.gz", "Truncated"]),
        ({"a.txt": BOOK, "b/dev.txt": b"too short"}, ["names, b/dev.txt. It fills 0 rows of"]),
        (
            {"a.txt": b"all is well", "b.txt": BOOK, "b.txt.gz": gzip.compress(BOOK)},
            ["100.0% of the validation documents are also in training (", "this is one that repeats: '"],
        ),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_line(own_cache, tmp_path, capsys, files, named):
    (tmp_path / "text").mkdir()
    write(tmp_path / "text", files)
    for _ in range(2):  # the second time some of it is tokenized
        status, _, error = run(capsys, f"--corpus={tmp_path / 'text'}", *SMALL)
        assert status == 1, error
        assert error.startswith("prepare.py: error:") and error.count("\n") == 1
        assert len(error) < 330 + len(str(tmp_path)), error
        assert all(words in error for words in named), error
    with pytest.raises(prepare.PrepareError):
        prepare.open_cache(own_cache)


def test_every_kind_of_file_is_read_in_name_order(tokenizer):
    tokens = prepare.read_tokens("train")
    texts = [tokenizer.decode(document[1:].tolist()) for document in split_documents(tokens)]
    assert tokens[0] == tokenizer.get_bos_token_id()
    assert "".join(texts) == "".join([*prose(1, 600), *prose(2, 300), "\n\n".join(prose(3, 100))])  # nothing is lost
    assert max(map(len, texts)) <= 4 * prepare.MAX_SEQ_LEN  # cut for rows this short
    tokens = prepare.read_tokens("val")
    assert tokenizer.decode(tokens[tokens != tokens[0]].tolist()) == "".join(prose(4, 150))


def test_text_is_cut_at_lines_else_anywhere():
    examples = {"a" * 90: [40, 40, 10], "a" * 30 + "\n" + "b" * 60: [31, 40, 20]}
    examples["a" * 30 + "\n\n" + "b" * 5 + "\n" + "c" * 30] = [38, 30]
    for text, lengths in examples.items():
        pieces = prepare.cut(text, 40)
        assert "".join(pieces) == text and [len(piece) for piece in pieces] == lengths


NAMES = "a.parquet b.PARQUET c.jsonl.zst d.csv d;.csv.lz4 e.TXT f.md.bz2 g.txt.gz h.ndjson.gz i j.text"


@pytest.mark.parametrize("name", NAMES.split(" "))
def test_one_file_of_any_kind_is_a_corpus(tmp_path, name):
    """Nulls are left out. Arrow's string_view and dictionary (a category of pandas) are text."""
    texts = [*prose(5, 200), 'Ada says "so",\nand\u2028goes', *prose(6, 200), "<null>"]
    path, lower = tmp_path / name, name.lower()
    values = [None if text == "<null>" else text for text in texts]
    text = io.StringIO()
    if "json" in lower:
        text.write("\n\n".join(json.dumps({"n": 1, "body": value}) for value in values))
    elif ".csv" in lower:
        writer = csv.writer(text, delimiter="," if lower[1] == "." else lower[1])
        writer.writerows([["n", "body"], *([1, value] for value in values)])
    else:
        text.write("<|endoftext|>".join(value or "" for value in values))
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": pa.Codec("zstd").compress}
    pack[".lz4"] = pa.Codec("lz4").compress
    halves = text.getvalue().encode()[:5000], text.getvalue().encode()[5000:]  # tools write several frames
    path.write_bytes(b"".join(map(pack.get(path.suffix.lower(), bytes), halves)))
    if "parquet" in lower:
        kind = pa.string_view() if name == "a.parquet" else pa.dictionary(pa.int32(), pa.string())
        pq.write_table(pa.table({"n": [1] * len(values), "body": pa.array(values).cast(kind)}), path)
    corpus = prepare.own_corpus(path, "body")
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert train + val == texts[:-1]
    assert 0.04 < sum(map(len, val)) / sum(map(len, texts)) <= 0.05


QUOTED = [f'{n}:\tshe says "so",\n\n"" and \'goes\'\t' for n in range(100)]
TABLES = {  # file: (what stands in it, the texts that are read, by default the second cells of all lines)
    "an open mark.tsv": (table({20: '20\t"open'}, "\t"), None),
    "few rows.tsv": ('n\ttext\n1\t"open\n2\tso\n', None),
    "two marks.csv": (table({20: '20\t"open', 90: '90\tclosed"'}, "\t"), None),
    "by pandas.tsv": (pd.DataFrame({"n": 1, "text": QUOTED}).to_csv(sep="\t", index=False), QUOTED),
    "one column.tsv": ("text\none, two\nthree\n", ["one, two", "three"]),
    "one column.csv": ("text\none, two\nthree, four, five\n", ["one, two", "three, four, five"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_as_it_was_meant(tmp_path, name):
    content, texts = TABLES[name]
    corpus = prepare.own_corpus(write(tmp_path, {name: content}), "text")
    assert [*corpus.texts("train")] == (texts or [line.split("\t")[1] for line in content.splitlines()[1:]])


@pytest.mark.parametrize(
    ("names", "val"),
    [
        (["a.txt", "latest.txt", "attest/b.txt", "devil.txt", "medieval.txt"], None),
        (["test.txt"], None),  # there is nothing else
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], [2]),
        (["data/train/x.jsonl", "data/Validation/x.jsonl", "val2.csv", "wiki.dev.txt"], [1, 2, 3]),
        (["x.txt", *"devel.txt eval.txt evaluation.txt held-out.txt heldout.txt validate.txt".split()], range(1, 7)),
    ],
)
def test_validation_is_what_is_named_so(tmp_path, names, val):
    folder = tmp_path / "test"  # only names below the folder count
    write(folder, dict.fromkeys([*names, ".cache/val.txt", "val/.hidden.txt", "val.html"], ""))
    paths = prepare.own_corpus(folder, "text").paths
    if val is None:
        assert paths["train"] == paths["val"] == sorted(folder / name for name in names)
    else:
        assert paths["val"] == [folder / names[i] for i in val]
        assert set(paths["train"]) == {folder / name for name in names} - set(paths["val"])


@pytest.mark.parametrize(("documents", "lines"), [(1, 80_000), (30, 200), (300, 150), (3000, 3)])
def test_else_the_last_twentieth_of_the_text_is_validation(tmp_path, documents, lines):
    """A book of millions of characters, some long documents, many long ones, and short ones, in twelve files."""
    line = "document {}, line {}: Ada paints the clock, and says so.\n"
    texts = ["".join(line.format(i, j) for j in range(lines)) for i in range(documents)]
    borders = [part * documents // 12 for part in range(13)]
    for part, (first, end) in enumerate(pairwise(borders)):
        write(tmp_path, {f"part-{part:02}.jsonl": jsonl({"text": text} for text in texts[first:end])})
    corpus = prepare.own_corpus(tmp_path, "text")
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert "".join(train + val) == "".join(texts)
    assert 0.04 < sum(map(len, val)) / sum(map(len, texts)) <= 0.0501
    assert max(map(len, train + val)) <= prepare.DOCUMENT_CHARS
    divided = {text.split(",")[0] for text in train} & {text.split(",")[0] for text in val}
    assert len(divided) <= 1


def test_each_file_is_read_once_whatever_links_there_are(tmp_path):
    names = ["2024/a.txt", "2024/b.txt", "c.txt"]
    write(tmp_path, {name: name for name in names})
    for link, target in {"latest": "2024", "none": "gone", "loop": "loop", "a.txt": "2024/a.txt"}.items():
        (tmp_path / link).symlink_to(target)
    corpus = prepare.own_corpus(tmp_path, "text", None)
    assert [path.resolve() for path in corpus.paths["train"]] == [tmp_path / name for name in names]


def test_a_hub_cache_is_read_by_its_snapshot(tmp_path):
    write(tmp_path, {"blobs/0": '{"text": "so"}', "blobs/1": "{}", "snapshots/README": ""})
    for number, name in enumerate(("train.jsonl", "test.jsonl")):
        (tmp_path / "snapshots" / name).symlink_to(f"../blobs/{number}")
    corpus = prepare.own_corpus(tmp_path, "text")
    assert corpus.paths == {"train": [tmp_path / "snapshots/train.jsonl"], "val": [tmp_path / "snapshots/test.jsonl"]}
    assert ": 2 file(s), " in corpus.note and corpus.note.endswith("passed over: 1 no ending")
    assert [*prepare.own_corpus(tmp_path / "snapshots/train.jsonl", "text").texts("train")] == ["so"]


def test_what_is_no_text_is_passed_over_and_said_but_not_what_is_hidden(tmp_path):
    names = "README.md data/a.txt b.py data/c.py v1.2.pdf d.json.gz Makefile .hidden.py .hidden.txt .git/x.txt".split()
    corpus = prepare.own_corpus(write(tmp_path, {name: name for name in names}), "text")
    assert corpus.paths["train"] == [tmp_path / name for name in names[:2]]
    said = sorted(corpus.note.split("passed over: ")[1].split(", "))
    assert said == ["1 .json.gz", "1 .pdf", "1 no ending", "2 .py"]
    alone = prepare.own_corpus(tmp_path / "README.md", "text")
    assert alone.paths["train"] == [tmp_path / "README.md"] and "passed over" not in alone.note


def test_what_is_odd_about_the_rows_is_said(own_cache, tmp_path, capsys):
    texts = list(prose(1, 300, 5))
    val = [*texts[:60], *prose(2, 140, 5), texts[0]]  # with chance doubles, in short documents of few words
    rows = 5 * [{"meta": "of the file"}] + [{"text": text} for text in texts]
    write(tmp_path, {"a.jsonl": jsonl(rows), "val.txt": "<|endoftext|>".join(val)})
    share = sum(text in texts for text in val) / len(val)
    assert 0.3 < share < 0.5
    for read in (True, False):  # the second time nothing is read
        status, out, _ = run(capsys, f"--corpus={tmp_path}", *SMALL, "--eval-tokens=1024")
        assert status == 0 and f" {share:.1%} of the validation documents are also in training\n" in out
        assert ("note: 5 rows without text were passed over" in out) == read


def test_climbmix_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "download_shards", lambda *_: None)
    for name in ("shard_00000.parquet", prepare.VAL_SHARD):
        pq.write_table(pa.table({"text": ["a line\n" * 2000, None, "short"]}), tmp_path / name)
    corpus = prepare.climbmix_corpus(tmp_path, 1, 1)
    assert list(corpus.documents("train")) == list(corpus.documents("val")) == ["a line\n" * 2000, "short"]


def test_a_column_inside_an_object_is_read(own_cache, tmp_path):
    inner = [{"text": text} for text in prose(2, 900, 5)]
    tables = {"a.parquet": parquet(text=["no"] * 900, data=inner), "b.jsonl": jsonl({"data": row} for row in inner)}
    write(tmp_path, tables)
    assert prepare.main([f"--corpus={tmp_path}/a.parquet", *SMALL, "--text-column=data.text"]) == 0
    first = split_documents(prepare.read_tokens("train"))[0]
    assert prepare.Tokenizer.from_directory().decode(first[1:].tolist()) == inner[0]["text"]
    assert [*prepare.own_corpus(tmp_path / "b.jsonl", "data.text").texts("val")] == [row["text"] for row in inner]
    assert "--text-column=data.text" in prepare.load_manifest(own_cache)["command"]


def test_the_key_of_a_text_has_all_that_it_depends_on(tmp_path):
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    path, other = [tmp_path / "a.txt"], [tmp_path / "b.txt"]
    ways = [(path, path, ""), (path, other, ""), (path, path, "", "body"), (path, path, "", "text", 9)]
    keys, val = {prepare.Corpus(*way).key("train") for way in ways}, prepare.Corpus(path, other, "").key("val")
    write(tmp_path, {"a.txt": "longer"})
    assert len(keys | {prepare.Corpus(path, path, "").key("train")}) == 5
    assert prepare.Corpus(path, other, "").key("val") == val  # new text for training leaves validation


def test_source_splits_by_whole_packages_in_a_stable_order():
    paths = prepare.source_corpus().paths
    roots = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "stdlib")]  # purelib may lie in stdlib
    names = [[p.relative_to(next(r for r in roots if r in p.parents)) for p in side] for side in paths.values()]
    assert all(side == sorted(side, key=lambda name: prepare.cache_key(str(name))) for side in names)
    packages = [{name.parts[0].removesuffix(".py") for name in side} for side in names]
    assert all(packages) and not packages[0] & packages[1]
    size = [sum(path.stat().st_size for path in side) for side in paths.values()]
    assert 0.02 < size[1] / sum(size) < 0.15  # as packages are installed here


def test_source_in_another_encoding_is_read_all_the_same(tmp_path):
    write(tmp_path, {"odd.py": "name = 'naïve'\n".encode("latin-1")})
    corpus = prepare.Corpus([tmp_path / "odd.py"], [], "")
    assert list(corpus.documents("train")) == ["name = 'na\ufffdve'\n"]


TEXTS = ["", "naïve — 日本語 🦆", "\0 and \x7f", "<|bos|> spelled out", "a\r\n\tb  c\n\n\n", "12345", "e\u0301"]


def test_tokenizer_round_trips(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.get_bos_token_id() not in ids and all(isinstance(i, int) for i in ids)
        assert tokenizer.encode(text, prepend=7) == [7, *ids]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # no character, so not kept


def test_a_token_has_the_length_of_its_own_bytes(tokenizer):
    lengths = prepare.get_token_bytes()
    assert lengths.dtype == prepare.torch.int32 and lengths.shape == (tokenizer.get_vocab_size(),)
    assert lengths[tokenizer.ranks.index(b"\xc3")] == 1  # half of an é, which decodes to the three bytes of U+FFFD
    assert lengths[-4:].tolist() == [0, 0, 0, 0]
    text = "Ada paints the clock — naïvely!"
    assert sum(lengths[i].item() for i in tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize("letter", [" ", "a", "日"])
def test_long_runs_take_seconds_and_come_back(tokenizer, letter):
    """A regular expression without end, or a square: a million spaces broke the one, letters took the other."""
    text = f"before {letter * 300_000} after"
    assert tokenizer.decode(tokenizer.encode(text)) == text


# -----------------------------------------------------------------------------
# Again, with other options, after a kill, after damage


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".autoresearch-lock"}


def test_twice_does_nothing_and_other_options_redo_what_depends_on_them(own_copy, corpus, monkeypatch):
    def again(*more):
        assert prepare.main([f"--corpus={corpus}", *SMALL, *more]) == 0
        return stamps(own_copy), prepare.fingerprint()

    before, first = stamps(own_copy), prepare.fingerprint()
    fingerprints = {first}
    for more, constants in ([], (2, 4096)), (["--time-budget=7"], (7, 4096)), (["--eval-tokens=2048"], (2, 2048)):
        after, fingerprint = again(*more)
        assert {name for name in before if after.get(name) != before[name]} == {prepare.MANIFEST}
        assert constants == (prepare.TIME_BUDGET, prepare.EVAL_TOKENS)
        assert (fingerprint == first) == (not more)
        fingerprints.add(fingerprint)
    after, fingerprint = again("--vocab-size=300")
    assert set(after) & set(before) == {prepare.MANIFEST}  # all new, and nothing old is left behind
    assert len(after) == len(before) and prepare.VOCAB_SIZE == 300
    assert len(fingerprints | {fingerprint}) == 4
    assert again()[1] == first  # made anew from the same text, it is the same
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert prepare.fingerprint() not in fingerprints


def test_small_validation_and_small_vocabulary_are_said(own_cache, corpus, capsys):
    status, out, _ = run(capsys, f"--corpus={corpus}", *SMALL, "--eval-tokens=10000000", "--vocab-size=60000")
    assert status == 0
    assert f"tokenizer  {prepare.VOCAB_SIZE:,} tokens" in out and prepare.VOCAB_SIZE < 60_000
    rows = sum(1 for _ in prepare.pack_rows(prepare.read_tokens("val"), 64, forever=False))
    assert f", {64 * rows:,} validation tokens\n" in out


OTHER_MANIFESTS = [b"{}", b"[]", b'{"files": {}, "command": "", "constants": {}}', b'{"files": 1}']


@pytest.mark.parametrize("kind", ["tokenizer", "train", "val", "manifest"])
def test_every_file_damaged_or_missing_is_found_and_mended(own_copy, corpus, kind):
    good = {name: (own_copy / name).read_bytes() for name in stamps(own_copy)}
    (name,) = (name for name in good if kind in name or (kind, name) == ("manifest", prepare.MANIFEST))
    flipped = bytearray(good[name])
    flipped[len(flipped) // 2] ^= 1
    others = {"train": [], "manifest": OTHER_MANIFESTS}.get(kind, [flipped])  # of train only the size is checked
    problem = "nothing is prepared in .*own cache: run `uv" if kind == "manifest" else "missing or damaged: `uv"
    for bad in (good[name][:-2], None, *others):
        (own_copy / name).unlink() if bad is None else (own_copy / name).write_bytes(bad)
        prepare.open_cache.cache_clear()
        with pytest.raises(prepare.PrepareError, match=rf"{problem} run prepare\.py"):
            prepare.Tokenizer.from_directory()
        assert prepare.main([f"--corpus={corpus}", *SMALL]) == 0
        assert {name: (own_copy / name).read_bytes() for name in stamps(own_copy)} == good


def test_files_that_are_not_ours_stay(own_cache, corpus):
    """The hub names data sets so. A folder whose name begins as our files do is no obstacle either."""
    names = ["train-00000-of-00003.parquet", "val-1.bin", "tokenizer-x.bpe", "notes.tmp-1", "manifest.json", ".lock"]
    names += ["data/incoming/a", "train-logs/log"]
    write(own_cache, dict.fromkeys(names, "mine"))
    write(own_cache, {"train-0123456789ab.bin.tmp-77": "what a killed prepare.py left"})
    assert prepare.main([f"--corpus={corpus}", *SMALL, "--vocab-size=300"]) == 0
    assert {(own_cache / name).read_text() for name in names} == {"mine"}
    assert not list(own_cache.glob("*.tmp-77"))


def test_a_run_keeps_its_files_when_another_prepare_replaces_them(own_copy, corpus):
    prepare.start_run()
    before = prepare.read_tokens("val")[:100].tolist()
    again = run_python("prepare.py", f"--corpus={corpus}", *SMALL, "--vocab-size=300", cache=own_copy)
    assert again.returncode == 0
    tokenizer = prepare.Tokenizer.from_directory()
    assert tokenizer.get_vocab_size() == 400 == len(prepare.get_token_bytes())
    assert prepare.evaluate_bpb(lambda x: torch.zeros(*x.shape, 400), tokenizer, 16) > 0
    assert prepare.read_tokens("val")[:100].tolist() == before


KILLER = """
import itertools, os, shutil, signal, sys
import prepare

def child(n, moment, replace=os.replace):
    calls = itertools.count(1)

    def replace_and_die(*names):
        last = next(calls) == n
        if not last or moment == "after":
            replace(*names)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()  # before any thread
    if not pid:
        os.replace = replace_and_die
        os._exit(prepare.main(sys.argv[1:]))
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        prepare.open_cache.cache_clear()
        whole = bool(prepare.open_cache(prepare.cache_dir()))
    except prepare.PrepareError:
        whole = False
    return killed, whole, {path: path.stat().st_mtime_ns for path in prepare.cache_dir().glob("*.b??")}

for n, moment in itertools.product(range(1, 6), ("before", "after")):
    shutil.rmtree(prepare.cache_dir(), ignore_errors=True)
    (*first, done), (*second, kept) = child(n, moment), child(0, "")
    left = len(list(prepare.cache_dir().glob("*.b*.tmp-*")))
    print("state", n, moment, *first, len(done), *second, left, done.items() <= kept.items(), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of itself")
def test_killed_at_any_file_it_is_never_taken_for_whole_and_goes_on(tmp_path, corpus):
    """Killed just before and just after each file gets its name: half-made is seen as such, and mended by a rerun.

    A state is: killed, whole, files made; after the rerun killed, whole, half-made files left, files not made again."""
    run = run_python("-c", KILLER, f"--corpus={corpus}", *SMALL, cache=tmp_path / "cache")
    states = [line.split(maxsplit=3) for line in run.stdout.splitlines() if line.startswith("state")]
    mended = "False True 0 True"
    half = [f"True False {files} {mended}" for files in (0, 1, 1, 2, 2, 3, 3)]  # tokenizer, training, validation
    whole = [f"True True 3 {mended}", *2 * [f"False True 3 {mended}"]]  # last the manifest
    assert [rest for *_, rest in states] == half + whole, run.stderr
