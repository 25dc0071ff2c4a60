"""prepare.py's command line, corpora and cache: what it refuses, what it redoes, what survives a kill."""

import bz2
import csv
import gzip
import io
import json
import os
import shutil
import sysconfig
from pathlib import Path

import numpy as np
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


def run(capsys, *options):
    """(exit status, standard output, standard error) of prepare.py with these options, in this process."""
    prepare.forget_cache()
    try:
        status = prepare.main([str(option) for option in options])
    except SystemExit as stop:  # argparse
        status = stop.code
    prepare.forget_cache()
    return status, *capsys.readouterr()


# -----------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--vocab-size=259"], "--vocab-size needs a whole number from 260 to 65,536, got 259"),
        (["--eval-tokens=10", "--seq-len=20"], "less than 16 rows"),
        (["--num-shards=-2"], "from -1 to 6,542, got -2"),
        (["--scale=huge"], "invalid choice"),
        (["--sclae=full"], "unrecognized arguments: --sclae=full"),
    ],
)
def test_an_impossible_value_is_one_line(own_cache, capsys, options, named):
    status, _, error = run(capsys, *options)
    assert status == 1 and named in error and error.count("\n") == 1
    assert not own_cache.exists()  # nothing was begun
    assert run(capsys, "--help")[0] == 0


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def parquet(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({}, ["needs files of .parquet, .jsonl, .csv, .txt", "there is: nothing"]),
        ({"index.html": b"no text here"}, ["there is: .html"]),
        ({"a.txt": b"all there is"}, ["1 file(s), validation is the last 5% of the text. This leaves no text for val"]),
        ({"a.txt": b"fine", "my test.txt": b""}, ["validation is, by their names, my test.txt. This leaves no text"]),
        ({"a.jsonl": b'{"text": "fine"}\n\n{"text": 5}\n'}, ["a.jsonl", "(row 2: text is int, not text: 5)"]),
        ({"a.jsonl": b'{"text": "fine"}\n{"text": "to'}, ['(row 2: one object a line is needed, not {"text": "to)']),
        ({"a.jsonl": b'"bare"\n'}, ['a.jsonl can\'t be used (row 1: one object a line is needed, not "bare")']),
        (
            {"a.jsonl": b'[\n {"text": "a"}\n]'},
            ["one object a line is needed (jq -c '.[]' makes them of an array), not ["],
        ),
        (
            {"a.jsonl": b'{"m": [{"role": "user"}]}'},
            ["1 of 1 rows have no text; there is m (a list of dict): choose by"],
        ),
        ({"a.parquet": b"<html>not found</html>"}, ["a.parquet can't be used (row 1: Parquet"]),
        ({"a.parquet": parquet(words=["a"], more=[1])}, ["there is words (str), more (int)", "--text-column"]),
        ({"a.parquet": parquet(text=[["a"]])}, ["(row 1: text is a list of str, not text: ['a'])"]),
        ({"a.txt": "naïve".encode("latin-1")}, ["a.txt", "utf-8"]),
        ({"a.txt.gz": gzip.compress(bytes(range(200)))[:-9]}, ["a.txt.gz", "Truncated"]),
        (
            {"a.txt": " ".join(prose(1, 30)).encode(), "b/dev.txt": b"too short"},
            ["names, b/dev.txt. It fills 0 rows of"],
        ),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_line(own_cache, tmp_path, capsys, files, named):
    (tmp_path / "text").mkdir()
    for name, content in files.items():
        (tmp_path / "text" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_bytes(content)
    status, _, error = run(capsys, f"--corpus={tmp_path / 'text'}", *SMALL)
    assert status == 1, error
    assert error.startswith("prepare.py: error:") and error.count("\n") == 1
    assert all(words in error for words in named), error
    with pytest.raises(prepare.PrepareError):
        prepare.open_cache(own_cache)


# -----------------------------------------------------------------------------
# Corpora


def test_every_kind_of_file_is_read_in_name_order(session_cache, cache):
    tokenizer = prepare.Tokenizer.from_directory()
    tokens = prepare.read_tokens("train")
    texts = [tokenizer.decode(document[1:].tolist()) for document in split_documents(tokens)]
    assert tokens[0] == tokenizer.get_bos_token_id()
    assert "".join(texts) == "".join([*prose(1, 600), *prose(2, 300), "\n\n".join(prose(3, 100))])  # nothing is lost
    assert max(map(len, texts)) <= 4 * prepare.MAX_SEQ_LEN  # cut for rows this short
    tokens = prepare.read_tokens("val")
    assert tokenizer.decode(tokens[tokens != tokens[0]].tolist()) == "".join(prose(4, 150))


def test_text_is_cut_at_lines_else_anywhere():
    def pieces(text):
        found = prepare.cut(text, 4000)
        assert "".join(found) == text
        return found

    assert [len(piece) for piece in pieces("a" * 9000)] == [4000, 4000, 1000]
    assert [len(piece) for piece in pieces("a" * 3000 + "\n" + "b" * 6000)] == [3001, 4000, 2000]
    assert [len(piece) for piece in pieces("a" * 3000 + "\n\n" + "b" * 500 + "\n" + "c" * 3000)] == [3503, 3000]


NAMES = "a.parquet b.PARQUET c.jsonl.zst d.csv d;.csv d\t.csv.lz4 e.TXT f.md.bz2 g.txt.GZ h.jsonl.gz".split(" ")


@pytest.mark.parametrize("name", NAMES)
def test_one_file_of_any_kind_is_a_corpus(tmp_path, name):
    """Nulls are left out. Arrow's string_view and dictionary (a category of pandas) are text."""
    texts = [*prose(5, 200), 'Ada says "so",\nand\u2028goes', *prose(6, 200), "<null>"]
    path, lower = tmp_path / name, name.lower()
    values = [None if text == "<null>" else text for text in texts]
    text = io.StringIO()
    if ".jsonl" in lower:
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


@pytest.mark.parametrize(
    ("names", "val"),
    [
        (["a.txt", "latest.txt", "attest/b.txt", "devil.txt", "evaluation.txt"], None),
        (["test.txt"], None),  # there is nothing else
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"], [2]),
        (["data/train/x.jsonl", "data/Validation/x.jsonl", "wiki.dev.txt", "val2.csv"], [1, 3, 2]),
    ],
)
def test_validation_is_what_is_named_so(tmp_path, names, val):
    folder = tmp_path / "test"  # only names below the folder count
    for name in [*names, ".cache/val.txt", "val/.hidden.txt", "val.html"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    paths = prepare.own_corpus(folder, "text").paths
    if val is None:
        assert paths["train"] == paths["val"] == sorted(folder / name for name in names)
    else:
        assert paths["val"] == [folder / names[i] for i in val]
        assert set(paths["train"]) == {folder / name for name in names} - set(paths["val"])


@pytest.mark.parametrize(("documents", "lines"), [(1, 80_000), (30, 200), (300, 150), (3000, 3)])
def test_else_the_last_twentieth_of_the_text_is_validation(tmp_path, documents, lines):
    """A book of millions of characters, some long documents, many long ones, and short ones, in twelve files."""
    texts = [
        "".join(f"document {i}, line {j}: Ada paints the clock, and says so.\n" for j in range(lines))
        for i in range(documents)
    ]
    for part in range(12):
        rows = texts[part * len(texts) // 12 : (part + 1) * len(texts) // 12]
        write(tmp_path / "text", f"part-{part}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))
    corpus = prepare.own_corpus(tmp_path / "text", "text")
    train, val = list(corpus.documents("train")), list(corpus.documents("val"))
    assert "".join(train + val) == "".join(texts)  # part-2 before part-10
    assert 0.04 < sum(map(len, val)) / sum(map(len, texts)) <= 0.0501
    assert max(map(len, train + val)) <= prepare.DOCUMENT_CHARS
    divided = {text.split(",")[0] for text in train} & {text.split(",")[0] for text in val}
    assert len(divided) <= 1


def links(folder):
    """Names of all kinds for three files."""
    for name in ("2024/a.txt", "2024/b.txt", "c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for link, target in {"latest": "2024", "self": ".", "again": ".", "2024/up": "..", "none": "gone"}.items():
        (folder / link).symlink_to(target)
    (folder / "loop").symlink_to("loop")
    (folder / "a.txt").symlink_to("2024/a.txt")
    (folder / "hard.txt").hardlink_to(folder / "c.txt")


def test_each_file_is_read_once_whatever_links_there_are(tmp_path):
    links(tmp_path)
    corpus = prepare.own_corpus(tmp_path, "text", None)
    assert corpus.paths["train"] == [tmp_path / name for name in ("2024/a.txt", "2024/b.txt", "c.txt")]
    (tmp_path / "val.txt").symlink_to("2024/b.txt")  # this name says what the file is for
    corpus = prepare.own_corpus(tmp_path, "text", None)
    assert corpus.paths["train"] == [tmp_path / "2024/a.txt", tmp_path / "c.txt"]
    assert corpus.paths["val"] == [tmp_path / "val.txt"]


def test_what_is_no_text_is_passed_over(tmp_path):
    names = ["README.md", "data/README.md", "data/train.txt", ".git/x.txt", ".hidden.txt", "data/picture.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert prepare.own_corpus(tmp_path, "text").paths["train"] == [tmp_path / name for name in names[1:3]]
    assert prepare.own_corpus(tmp_path / "README.md", "text").paths["train"] == [tmp_path / "README.md"]


def test_the_share_of_validation_that_is_also_training_is_always_said(own_cache, tmp_path, capsys):
    texts = list(prose(1, 300, 5))
    val = [*texts[:60], *prose(2, 140, 5), texts[0]]  # with chance doubles, in short documents of few words
    write(tmp_path, "a.txt", "<|endoftext|>".join(texts))
    write(tmp_path, "val.txt", "<|endoftext|>".join(val))
    share = sum(text in texts for text in val) / len(val)
    assert 0.3 < share < 0.5
    for _ in range(2):  # the second time nothing is read
        status, out, _ = run(capsys, f"--corpus={tmp_path}", *SMALL, "--eval-tokens=1024")
        assert status == 0 and f" {share:.1%} of the validation documents are also in training\n" in out
    assert out.count("up to date") == 3


def test_validation_that_is_training_is_refused(own_cache, tmp_path, capsys):
    text = "<|endoftext|>".join(prose(1, 900))
    write(tmp_path / "text", "a.txt", "<|endoftext|>".join(prose(3, 10)))
    write(tmp_path / "text", "b.txt", text)
    (tmp_path / "text" / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    for _ in range(2):
        status, _, error = run(capsys, f"--corpus={tmp_path / 'text'}", *SMALL, "--eval-tokens=1024")
        assert status == 1 and error.count("\n") == 1
        both = f"first in {tmp_path}/text/b.txt and {tmp_path}/text/b.txt.gz: remove what is there twice"
        assert f"error: 100% of the validation documents are also in training, {both}" in error
    with pytest.raises(prepare.PrepareError):
        prepare.open_cache(own_cache)


@pytest.mark.parametrize("lacking", [4, 5])
def test_rows_that_lack_the_text_are_counted_up_to_one_in_a_hundred(own_cache, tmp_path, capsys, lacking):
    rows = lacking * [{"meta": "of the file"}] + [{"text": text} for text in prose(1, 400, 20)]
    write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    status, out, error = run(capsys, f"--corpus={tmp_path}", *SMALL, "--eval-tokens=1024")
    if lacking == 4:  # of 404
        assert status == 0 and "note: 4 rows without text were passed over" in out
    else:
        assert status == 1 and "5 of 405 rows have no text; there is meta (str): choose by --text-column" in error


def test_climbmix_is_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "download_shards", lambda *_: None)
    for name in ("shard_00000.parquet", prepare.VAL_SHARD):
        pq.write_table(pa.table({"text": ["a line\n" * 2000, None, "short"]}), tmp_path / name)
    corpus = prepare.climbmix_corpus(tmp_path, 1, 1)
    assert list(corpus.documents("train")) == list(corpus.documents("val")) == ["a line\n" * 2000, "short"]


def test_another_column_is_another_corpus(own_cache, tmp_path, capsys):
    columns = {"text": list(prose(1, 900, 5)), "body": list(prose(2, 900, 5))}
    (tmp_path / "a.parquet").write_bytes(parquet(**columns))
    assert run(capsys, f"--corpus={tmp_path}/a.parquet", *SMALL, "--eval-tokens=1024", "--text-column=body")[0] == 0
    first = split_documents(prepare.read_tokens("train"))[0]
    assert prepare.Tokenizer.from_directory().decode(first[1:].tolist()) == columns["body"][0]
    assert "--text-column=body" in prepare.load_manifest(own_cache)["command"]


def test_the_key_of_a_text_has_all_that_it_depends_on(tmp_path):
    path, other = write(tmp_path, "a.txt", "a") / "a.txt", write(tmp_path, "b.txt", "b") / "b.txt"
    ways = [((path,), (path,)), ((path,), (other,)), ((path,), (path,), "", "body"), ((path,), (path,), "", "text", 9)]
    keys = {prepare.Corpus(*way[:2], "", *way[3:]).key("train") for way in ways}
    path.write_text("longer")
    assert len(keys | {prepare.Corpus((path,), (path,), "").key("train")}) == 5
    kept = prepare.Corpus((path,), (other,), "").key("val")
    path.write_text("longer still")
    assert prepare.Corpus((path,), (other,), "").key("val") == kept  # new text for training leaves validation


def test_source_splits_by_whole_packages_in_a_stable_order():
    corpus = prepare.source_corpus()
    roots = [Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "stdlib")]  # purelib may lie in stdlib

    def relative(path):
        return path.relative_to(next(root for root in roots if root in path.parents))

    for paths in corpus.paths.values():
        assert paths == sorted(paths, key=lambda path: prepare.cache_key(str(relative(path))))
    packages = [{relative(path).parts[0].removesuffix(".py") for path in paths} for paths in corpus.paths.values()]
    assert all(packages) and not packages[0] & packages[1]
    size = [sum(path.stat().st_size for path in paths) for paths in corpus.paths.values()]
    assert 0.03 < size[1] / sum(size) <= 0.05
    assert any(path.name == "argparse.py" for paths in corpus.paths.values() for path in paths)


def test_source_in_another_encoding_is_read_all_the_same(tmp_path):
    (tmp_path / "odd.py").write_bytes("name = 'naïve'\n".encode("latin-1"))
    corpus = prepare.Corpus([tmp_path / "odd.py"], [], "")
    assert list(corpus.documents("train")) == ["name = 'na\ufffdve'\n"]


# -----------------------------------------------------------------------------
# Tokenizer


TEXTS = ["", "naïve — 日本語 🦆", "\0 and \x7f", "<|bos|> spelled out", "a\r\n\tb  c\n\n\n", "12345", "e\u0301"]


def test_tokenizer_round_trips(cache):
    tokenizer = prepare.Tokenizer.from_directory()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.get_bos_token_id() not in ids and all(isinstance(i, int) for i in ids)
        assert tokenizer.encode(text, prepend=7) == [7, *ids]
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"  # no character, so not kept


def test_a_token_has_the_length_of_its_own_bytes(cache):
    tokenizer = prepare.Tokenizer.from_directory()
    lengths = prepare.get_token_bytes()
    assert lengths.dtype == prepare.torch.int32 and lengths.shape == (tokenizer.get_vocab_size(),)
    assert lengths[tokenizer.ranks.index(b"\xc3")] == 1  # half of an é, which decodes to the three bytes of U+FFFD
    assert lengths[-4:].tolist() == [0, 0, 0, 0]
    text = "Ada paints the clock — naïvely!"
    assert sum(lengths[i].item() for i in tokenizer.encode(text)) == len(text.encode())


@pytest.mark.parametrize("run", [" ", "a", "日"])
def test_long_runs_take_seconds_and_come_back(cache, run):
    """A regular expression without end, or a square: a million spaces broke the one, letters took the other."""
    text = f"before {run * 300_000} after"
    tokenizer = prepare.Tokenizer.from_directory()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_vocabulary_of_260_is_the_bytes():
    tokenizer = prepare.Tokenizer.train(iter(["any text"]), 260)
    assert tokenizer.get_vocab_size() == 260 and tokenizer.encode("é") == [0xC3, 0xA9]


def test_no_pickle_in_the_cache(cache):
    for path in cache.iterdir():
        assert path.suffix in (".json", ".bpe", ".bin") or path.name == ".autoresearch-lock"
    first = next(cache.glob("*.bpe")).read_text().splitlines()[0]
    assert first == "AA== 0"  # the byte 0 and its rank


# -----------------------------------------------------------------------------
# Again, with other options, after a kill, after damage


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name != ".autoresearch-lock"}


def test_twice_does_nothing_and_other_options_redo_what_depends_on_them(own_cache, corpus, capsys, monkeypatch):
    def again(*more):
        status, out, _ = run(capsys, f"--corpus={corpus}", *SMALL, *more)
        assert status == 0
        return out, stamps(own_cache), prepare.fingerprint()

    _, before, first = again()
    out, after, same = again()
    assert out.count("up to date") == 3 and same == first
    assert {name for name in before if after.get(name) != before[name]} == {prepare.MANIFEST}
    seen = {first}
    for more, constants in ((["--time-budget=7"], (7, 4096)), (["--eval-tokens=2048"], (2, 2048))):
        _, after, fingerprint = again(*more)
        assert {name for name in before if after.get(name) != before[name]} == {prepare.MANIFEST}
        assert constants == (prepare.TIME_BUDGET, prepare.EVAL_TOKENS)
        seen.add(fingerprint)
    _, after, fingerprint = again("--vocab-size=300")
    assert not set(after) & (set(before) - {prepare.MANIFEST})  # all new, and nothing old is left behind
    assert len(after) == len(before) and prepare.VOCAB_SIZE == 300
    seen.add(fingerprint)
    assert again()[2] == first and len(seen) == 4  # made anew from the same text, it is the same
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert prepare.fingerprint() not in seen


def test_small_validation_and_small_vocabulary_are_said(own_cache, corpus, capsys):
    status, out, _ = run(capsys, f"--corpus={corpus}", *SMALL, "--eval-tokens=10000000", "--vocab-size=60000")
    assert status == 0
    assert "--eval-tokens asks for more" in out and "60,000 were asked for" in out
    lengths = np.array([len(document) for document in split_documents(prepare.read_tokens("train"))])
    assert f"rows hold {np.minimum(lengths, 65).sum() / lengths.sum():.0%} at most" in out


def test_every_file_damaged_or_missing_is_found_and_mended(own_cache, corpus, capsys):
    with pytest.raises(prepare.PrepareError, match=r"nothing is prepared in .*own cache: run `uv run prepare\.py`"):
        prepare.Tokenizer.from_directory()
    options = [f"--corpus={corpus}", *SMALL]
    assert run(capsys, *options)[0] == 0
    good = {name: (own_cache / name).read_bytes() for name in stamps(own_cache)}
    assert len(good) == 4
    for name, content in good.items():
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 1
            odd = (b"[]", b'{"files": {}}') if name == prepare.MANIFEST else (bytes(damaged),)
            for bad in (*odd, content[:place], None):
                path = own_cache / name
                path.unlink() if bad is None else path.write_bytes(bad)
                prepare.forget_cache()
                with pytest.raises(prepare.PrepareError, match=r"uv run prepare\.py") as caught:
                    prepare.Tokenizer.from_directory()
                assert "\n" not in str(caught.value)
        assert run(capsys, *options)[0] == 0
        assert {name: (own_cache / name).read_bytes() for name in stamps(own_cache)} == good


def test_files_that_are_not_ours_stay(own_cache, corpus):
    """The hub names data sets so. A folder whose name begins as our files do is no obstacle either."""
    names = ["train-00000-of-00003.parquet", "val-1.bin", "tokenizer-x.bpe", "notes.tmp-1", "manifest.json", ".lock"]
    (own_cache / "data" / "incoming").mkdir(parents=True)
    for name in [*names, "data/incoming/a"]:
        (own_cache / name).write_text("mine")
    (own_cache / "train-logs").mkdir()
    (own_cache / "train-0123456789ab.bin.tmp-77").write_text("what a killed prepare.py left")
    assert prepare.main([f"--corpus={corpus}", *SMALL, "--vocab-size=300"]) == 0
    assert [(own_cache / name).read_text() for name in [*names, "data/incoming/a"]] == ["mine"] * 7
    assert (own_cache / "train-logs").is_dir() and not list(own_cache.glob("*.tmp-77"))


def test_a_step_that_was_done_before_a_kill_is_not_done_again(own_cache, corpus, capsys, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_manifest", killed)
        assert run(capsys, f"--corpus={corpus}", *SMALL)[0] == 1
    before = stamps(own_cache)
    status, out, _ = run(capsys, f"--corpus={corpus}", *SMALL)
    assert status == 0 and out.count("up to date") == 3
    assert before.items() <= stamps(own_cache).items()


def test_a_run_keeps_its_files_when_another_prepare_replaces_them(own_cache, corpus, capsys):
    assert run(capsys, f"--corpus={corpus}", *SMALL)[0] == 0
    prepare.start_run()
    before = prepare.read_tokens("val")[:100].tolist()
    again = run_python("prepare.py", f"--corpus={corpus}", *SMALL, "--vocab-size=300", cache=own_cache)
    assert again.returncode == 0
    tokenizer = prepare.Tokenizer.from_directory()
    assert tokenizer.get_vocab_size() == 400 == len(prepare.get_token_bytes())
    assert prepare.evaluate_bpb(lambda x: prepare.torch.zeros(*x.shape, 400), tokenizer, 16) > 0
    assert prepare.read_tokens("val")[:100].tolist() == before


def test_train_says_what_mends_a_cache_before_it_trains(tmp_path, corpus, cache):
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    path = next(damaged.glob("train-*.bin"))
    path.write_bytes(path.read_bytes()[:-2])
    found = run_python("train.py", cache=damaged)
    assert found.returncode == 1 and f"`uv run prepare.py --corpus={corpus} --text-column=text --scale" in found.stderr
    assert found.stdout == "" and found.stderr.count("\n") == 1


KILLER = """
import os, shutil, signal, sys
import prepare

def child(die):
    pid = os.fork()  # before any thread
    if not pid:
        os.replace = die
        os._exit(prepare.main(sys.argv[1:]))
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        prepare.forget_cache()
        return killed, bool(prepare.open_cache(prepare.cache_dir()))
    except prepare.PrepareError:
        return killed, False

def dying(n, moment, replace=os.replace):
    def die(*names):
        die.calls += 1
        if die.calls == n and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)
        if die.calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
    die.calls = 0
    return die

for n in range(1, 20):
    for moment in ("before", "after"):
        shutil.rmtree(prepare.cache_dir(), ignore_errors=True)
        first, second = child(dying(n, moment)), child(dying(0, ""))
        print("state", n, moment, *first, *second, len(list(prepare.cache_dir().glob("*.tmp-*"))), flush=True)
    if not first[0]:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of itself")
def test_killed_at_any_file_it_is_never_taken_for_whole_and_goes_on(tmp_path, corpus):
    """Killed just before and just after each file gets its name: half-made is seen as such, and mended by a rerun."""
    done = run_python("-c", KILLER, f"--corpus={corpus}", *SMALL, cache=tmp_path / "cache")
    states = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("state")]
    half, whole = ["True", "False", "False", "True", "0"], ["True", "True", "False", "True", "0"]
    # tokenizer, a file a split, and last the manifest
    expected = {(str(n), moment): half for n in range(1, 5) for moment in ("before", "after")}
    expected["4", "after"] = whole
    expected["5", "before"] = expected["5", "after"] = ["False", "True", "False", "True", "0"]
    assert {(n, moment): rest for n, moment, *rest in states} == expected, done.stderr
