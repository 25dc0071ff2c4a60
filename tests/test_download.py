"""download_shards against a hub on loopback (hub.py) and its faults, one by one.

In each case: the right shards byte for byte, or the right error; and, checked by the `cache` fixture after
every test, no file under a shard's name that is not that shard.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import pydoc_data.topics
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import SMALL, run_python
from hub import Fault, Hub

import prepare

ROOT = Path(prepare.__file__).parent
A, B, C, VAL = NAMES = [
    "shard_00000.parquet",
    "shard_00001.parquet",
    "shard_00002.parquet",
    prepare.VAL_SHARD,
]

# What the command line makes of download_shards, with pauses that a test can wait for.
CLIENT = """
import signal, sys, pathlib, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
prepare.PAUSE_SECONDS = 0.01
try:
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with prepare.cache_lock(folder):  # as prepare.py does
        prepare.download_shards(sys.argv[2:], folder, 2)
except prepare.PrepareError as error:
    sys.exit(f"prepare.py: error: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


def write_shard(path: Path, seed: int, column: str = "text") -> Path:
    """A parquet shard of prose, Python's language reference in an order of its own; some 300 kB."""
    docs = [f"{title}\n\n{text}" for title, text in sorted(pydoc_data.topics.topics.items())]
    random.Random(seed).shuffle(docs)
    pq.write_table(pa.table({column: docs}), path, row_group_size=16)
    return path


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shards")
    return {name: write_shard(folder / name, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture
def hub(shards, monkeypatch):
    """The hub as HF_ENDPOINT, and the downloader's patience cut down to what a test can wait for."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("HF_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(prepare, "PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.4)
    with Hub(dict(shards)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def cache(tmp_path, hub):
    folder = tmp_path / "cache" / "data"
    yield folder
    for path in folder.glob("*.parquet"):
        assert path.read_bytes() == hub.files[path.name].read_bytes(), f"{path.name} is a bad file"
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "other"}, "something lies outside the cache"


def download(cache: Path, *names: str, workers: int = 4) -> None:
    prepare.download_shards(list(names or NAMES), cache, workers)


def error_of(cache: Path, *names: str) -> str:
    """The message of a download that has to fail: one line, and without the storage's signed addresses."""
    with pytest.raises(prepare.PrepareError) as caught:
        download(cache, *names)
    message = str(caught.value)
    assert "\n" not in message and "Signature" not in message
    assert caught.value.code == 1
    return message


def present(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*.parquet"))


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*.partial*"))


def ranges(hub: Hub, name: str) -> list[str | None]:
    """The Range header of each request for the bytes of a shard"""
    return [r.headers.get("Range") for r in hub.seen("storage", name)]


def client(cache: Path, *names: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CLIENT, str(cache), *(names or NAMES)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def in_whole_blocks(size: int) -> int:
    """What is kept of a stream that breaks after `size` bytes without saying that it ends"""
    return size // prepare.CHUNK_BYTES * prepare.CHUNK_BYTES


# -----------------------------------------------------------------------------
# Nothing goes wrong


def test_every_shard_arrives_byte_for_byte(hub, cache):
    download(cache)
    assert present(cache) == NAMES and leftovers(cache) == []
    assert {r.headers["Accept-Encoding"] for r in hub.requests} == {"identity"}


def test_what_is_there_costs_no_request_and_no_hash(hub, cache, monkeypatch):
    download(cache)
    hub.requests.clear()
    monkeypatch.setattr(prepare, "sha256_of", lambda path: pytest.fail(f"hashed {path.name} again"))
    download(cache)
    hub.close()  # nor a network
    download(cache)
    assert hub.requests == []


def test_a_shard_put_there_by_hand_is_hashed_once(hub, cache, shards, monkeypatch):
    hashed = []
    sha256_of = prepare.sha256_of
    monkeypatch.setattr(prepare, "sha256_of", lambda path: hashed.append(path.name) or sha256_of(path))
    cache.mkdir(parents=True)
    for name in NAMES:
        shutil.copyfile(shards[name], cache / name)
    download(cache)
    download(cache)
    assert sorted(hashed) == NAMES
    assert hub.seen("storage") == []


def test_a_copied_cache_needs_no_network(hub, cache):
    download(cache)
    hub.close()
    for name in NAMES:
        os.utime(cache / name)  # a copy's time is another
    download(cache)


@pytest.mark.parametrize("harm", [lambda b: b[:-1], lambda b: b[:5000] + b"X" + b[5001:], lambda b: b""])
@pytest.mark.parametrize("known", [True, False], ids=["verified before", "unknown"])
def test_a_damaged_shard_that_is_there_is_fetched_again(hub, cache, shards, harm, known, capsys):
    if known:
        download(cache, A, VAL)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / A).write_bytes(harm(shards[A].read_bytes()))
    hub.requests.clear()
    download(cache, A, VAL)
    assert present(cache) == [A, VAL]
    assert ranges(hub, A) == [None]
    assert f"{A}: " in capsys.readouterr().err


def test_a_damaged_shard_does_not_stay_where_it_cannot_be_replaced(hub, cache):
    cache.mkdir(parents=True)
    (cache / A).write_bytes(b"PAR1 and then nothing")
    hub.fail(A, Fault(status=404), always=True)
    error_of(cache, A)
    assert present(cache) == []


def test_a_plain_mirror(hub, cache, shards):
    """No redirect, no X-Linked headers: length, storage validator and a full decode are what is left."""
    hub.linked, hub.direct = False, True
    hub.fail(A, Fault(), Fault(), Fault(), Fault(cut=100_000), at="endpoint")  # probe, look and resolve: good
    download(cache, A, VAL)
    assert present(cache) == [A, VAL]
    assert [r.headers.get("Range") for r in hub.seen("endpoint", A) if r.method == "GET"] == [
        None,
        "bytes=100000-",
    ]


# -----------------------------------------------------------------------------
# The connection breaks


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("cut", [0, 1, 65536, 100_001, -1])
def test_a_cut_stream_goes_on_where_it_was_cut(hub, cache, shards, cut, reset):
    cut %= shards[A].stat().st_size  # -1: all but the last byte
    hub.fail(A, Fault(cut=cut, reset=reset))
    download(cache, A)
    assert present(cache) == [A] and leftovers(cache) == []
    first, second = ranges(hub, A)
    assert first is None
    if reset:  # the kernel may drop what it has not handed over
        kept = int(second[6:-1]) if second else 0
        assert kept <= cut
    else:
        assert second == (f"bytes={cut}-" if cut else None)


def test_a_stream_that_is_always_cut_still_arrives(hub, cache, shards):
    """Each attempt brings something, so the tries are counted afresh: there are more cuts than tries here."""
    size = shards[A].stat().st_size
    assert size // 20_000 > prepare.RETRIES + 1
    hub.fail(A, Fault(cut=20_000), always=True)
    download(cache, A)
    assert ranges(hub, A)[1:] == [f"bytes={n}-" for n in range(20_000, size, 20_000)]


def test_a_stream_that_never_brings_anything_is_given_up(hub, cache):
    hub.fail(B, Fault(cut=0), always=True)
    message = error_of(cache)
    assert f"1 of 4 shards could not be fetched: {B} (cut off at 0 of " in message
    assert f"{prepare.RETRIES + 1} times in a row" in message
    assert len(ranges(hub, B)) == prepare.RETRIES + 1
    assert present(cache) == [A, C, VAL]
    assert message.endswith("the same command with --num-shards 1")  # A; C has a gap before it


def test_what_was_fetched_before_giving_up_is_used_the_next_time(hub, cache):
    hub.fail(A, Fault(cut=70_000), *[Fault(cut=0)] * 2 * prepare.RETRIES)
    error_of(cache, A)
    assert (cache / f"{A}.partial").stat().st_size == 70_000
    hub.faults.clear()
    hub.requests.clear()
    download(cache, A)
    assert ranges(hub, A) == ["bytes=70000-"]


def test_a_stalled_stream_is_an_error(hub, cache):
    hub.fail(A, Fault(stall=200_000))
    start = time.monotonic()
    download(cache, A)
    assert time.monotonic() - start > prepare.STALL_SECONDS
    assert ranges(hub, A) == [None, f"bytes={in_whole_blocks(200_000)}-"]


def test_the_stall_limit_is_thirty_seconds():
    done = subprocess.run([sys.executable, "-c", "import prepare; print(prepare.STALL_SECONDS)"], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.strip() == "30"


def test_one_line_per_troubled_shard(hub, cache, capsys):
    hub.fail(A, *[Fault(cut=30_000)] * 5)
    download(cache)
    said = [line for line in capsys.readouterr().err.splitlines() if "parquet" in line]
    assert len(said) == 1 and said[0].startswith(f"{A}: cut off at 30,000 of ")


# -----------------------------------------------------------------------------
# The server is in trouble


@pytest.mark.parametrize("at", ["endpoint", "storage"])
@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_passing_trouble_passes(hub, cache, status, at):
    probe = [Fault()] if at == "endpoint" else []
    hub.fail(A, *probe, Fault(status=status), Fault(status=status), at=at)
    download(cache, A)
    assert present(cache) == [A]


@pytest.mark.parametrize("at", ["endpoint", "storage"])
def test_retry_after_is_honoured(hub, cache, at):
    probe = [Fault()] if at == "endpoint" else []
    hub.fail(A, *probe, Fault(status=429, headers={"Retry-After": "1"}), at=at)
    start = time.monotonic()
    download(cache, A)
    assert 1 <= time.monotonic() - start < 3


@pytest.mark.parametrize("value", ["86400", "soon", "9" * 5000, "-1", "Fri, 99 Foo 99999999999999999999 00:00:00 GMT"])
def test_a_retry_after_without_sense_harms_nothing(hub, cache, value, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_PAUSE_SECONDS", 0.1)
    hub.fail(A, Fault(status=429, headers={"Retry-After": value}))
    download(cache, A)


def test_pauses_grow(hub, cache, monkeypatch):
    """urllib3's Retry: none before the second try, then 2, 4, 8, ... times the factor, and jitter on top."""
    monkeypatch.setattr(prepare, "RETRIES", 4)
    monkeypatch.setattr(prepare, "PAUSE_SECONDS", 0.02)
    hub.fail(A, Fault(status=500), always=True)
    error_of(cache, A)
    times = [request.time for request in hub.seen("storage", A)]
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(pauses) == 4
    assert all(pause >= least for pause, least in zip(pauses, [0, 0.04, 0.08, 0.16], strict=True)), pauses


@pytest.mark.parametrize("at", ["endpoint", "storage"])
@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refusal_is_not_asked_twice(hub, cache, status, at):
    hub.fail(C, Fault(status=status), at=at, always=True)
    message = error_of(cache)
    assert f"{C} (HTTP {status}" in message
    assert len(hub.seen(at, C)) == 1
    assert present(cache) == [A, B, VAL] and leftovers(cache) == []
    assert message.endswith("To go on with what is here: the same command with --num-shards 2")
    assert ("HF_TOKEN" in message) == (status in (401, 403))


@pytest.mark.parametrize("lost", [A, VAL])
def test_no_way_on_without_the_first_or_the_validation_shard(hub, cache, lost):
    hub.fail(lost, Fault(status=404), always=True)
    message = error_of(cache)
    assert lost in message and "--num-shards" not in message


def test_the_same_trouble_with_many_shards_is_told_once(hub, cache):
    names = [f"shard_{n:05d}.parquet" for n in range(100, 120)]
    message = error_of(cache, *names)
    assert message.count("HTTP 404") == 1 and " and 16 more (" in message
    assert "20 of 20 shards" in message


@pytest.mark.parametrize("at", ["endpoint", "storage"])
def test_a_web_page_is_not_a_shard(hub, cache, at):
    page = {"Content-Type": "text/html; charset=utf-8", "Location": None, "Content-Length": None}
    hub.fail(B, Fault(status=200, headers=page), at=at, always=True)
    message = error_of(cache)
    assert f"{B} (a web page came instead" in message
    assert present(cache) == [A, C, VAL]


def test_a_web_page_in_place_of_the_bytes(hub, cache):
    hub.fail(B, Fault(body=lambda b: b"<!doctype html>".ljust(len(b))), always=True)
    assert f"{B} (its sha256" in error_of(cache)


# -----------------------------------------------------------------------------
# The bytes are wrong


def flipped(body: bytes) -> bytes:
    """One bit, in a page of text: the length and the footer stay right"""
    return body[:5000] + bytes([body[5000] ^ 1]) + body[5001:]


WRONG = {
    "wrong bytes of the right length": Fault(body=flipped),
    "shorter": Fault(body=lambda b: b[:-1000]),
    "longer": Fault(body=lambda b: b + bytes(1000)),
    "shorter, without a length": Fault(body=lambda b: b[:-1000], headers={"Content-Length": None}),
    "longer, without a length": Fault(body=lambda b: b + bytes(10**7), headers={"Content-Length": None}),
    "empty": Fault(body=lambda b: b""),
    "packed": Fault(headers={"Content-Encoding": "gzip"}, body=flipped),
}


@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_wrong_bytes_once(hub, cache, fault):
    hub.fail(A, fault)
    download(cache, A)
    assert present(cache) == [A] and leftovers(cache) == []


@pytest.mark.parametrize("fault", WRONG.values(), ids=WRONG)
def test_wrong_bytes_always(hub, cache, fault):
    hub.fail(B, fault, always=True)
    message = error_of(cache)
    assert f"1 of 4 shards could not be fetched: {B} (" in message
    assert present(cache) == [A, C, VAL]


@pytest.mark.parametrize("fault", ["shorter", "longer", "empty"])
def test_a_wrong_length_is_seen_before_the_bytes(hub, cache, fault):
    hub.fail(A, WRONG[fault], always=True)
    assert "the server's length is not the " in error_of(cache, A)
    assert leftovers(cache) == []


def test_a_stream_without_end_is_cut_off_at_the_length_the_hub_names(hub, cache, shards, monkeypatch):
    lengths = []
    count = prepare.Shard.count
    monkeypatch.setattr(prepare.Shard, "count", lambda self, have: lengths.append(have) or count(self, have))
    hub.fail(A, Fault(body=lambda b: b + bytes(10**7), headers={"Content-Length": None}), always=True)
    assert "more than the " in error_of(cache, A)
    assert max(lengths) <= shards[A].stat().st_size


def test_damage_in_the_middle_is_found_without_a_hash_too(hub, cache):
    """A mirror that names no sha256: zeros in the pages, under a good footer, show when they are decoded."""
    hub.linked, hub.direct = False, True
    hub.fail(A, *[Fault()] * 3, Fault(body=lambda b: b[:4] + bytes(20_000) + b[20_004:]), at="endpoint")
    download(cache, A)


@pytest.mark.parametrize(("make", "reason"), [
    (lambda path: path.write_bytes(b"these are words and no parquet " * 9999), "not a readable parquet file"),
    (lambda path: write_shard(path, 0, column="body"), "without a column `text` of strings"),
    (lambda path: pq.write_table(pa.table({"text": list(range(99999))}), path), "without a column `text`"),
    (lambda path: path.write_bytes(b"PAR1" + bytes(9999) + b"\xff\xff\xff\x7fPAR1"), "not a readable"),
])  # fmt: skip
def test_what_the_hub_vouches_for_must_be_a_shard_too(hub, cache, tmp_path, make, reason):
    (tmp_path / "other").mkdir()
    make(tmp_path / "other" / B)
    hub.files[B] = tmp_path / "other" / B
    assert reason in error_of(cache)
    assert present(cache) == [A, C, VAL]


# -----------------------------------------------------------------------------
# Going on from a partial file


def test_a_server_without_ranges(hub, cache):
    hub.fail(A, Fault(cut=100_000), Fault(ignore_range=True))
    download(cache, A)
    assert ranges(hub, A) == [None, "bytes=100000-"]


def test_another_range_than_was_asked_for(hub, cache):
    shifted = Fault(headers={"Content-Range": "bytes 7-9/10"}, body=lambda b: bytes(10) + b[:-10])
    hub.fail(A, *[Fault(cut=100_000), shifted] * 3)
    assert "sends another range than was asked for, 3 times" in error_of(cache, A)


def test_a_changed_etag_starts_again(hub, cache):
    """If-Range sees to it: all bytes come in one second request, without damage and a third."""
    hub.fail(A, Fault(cut=100_000))
    hub.etags[A] = '"one"'
    gate = threading.Event()
    hub.fail(A, Fault(gate=gate))
    thread = threading.Thread(target=download, args=(cache, A))
    thread.start()
    wait_until(lambda: len(ranges(hub, A)) == 2, "the second attempt")
    hub.etags[A] = '"two"'
    gate.set()
    thread.join()
    assert [r.headers.get("If-Range") for r in hub.seen("storage", A)] == [None, '"one"']
    assert present(cache) == [A]


@pytest.mark.parametrize("linked", [True, False], ids=["sha256", "no sha256"])
def test_a_file_that_changed_between_two_runs_is_never_mixed(hub, cache, shards, tmp_path, linked):
    """The same length, other bytes, a server that ignores If-Range: the hub's hash or the new ETag tells."""
    hub.linked = linked
    hub.files[A] = tmp_path / "other" / A
    hub.files[A].parent.mkdir()
    docs = ["The first edition. " * 20_000, "The last word."]
    pq.write_table(pa.table({"text": docs}), hub.files[A], compression="none", use_dictionary=False)
    body = hub.files[A].read_bytes()
    heads = [] if linked else [Fault(), Fault()]  # without X-Linked the storage answers the HEADs too
    hub.fail(A, *heads, Fault(cut=100_000))
    hub.fail(A, Fault(cut=0), always=True)
    error_of(cache, A)
    assert (cache / f"{A}.partial").read_bytes() == body[:100_000]
    changed = body.replace(b"first edition", b"other edition")
    assert len(changed) == len(body)
    hub.files[A].write_bytes(changed)
    hub.always.clear()
    hub.fail(A, Fault(ignore_if_range=True), always=True)
    hub.requests.clear()
    download(cache, A)
    assert (cache / A).read_bytes() == changed
    if linked:  # known before a byte is asked for
        assert ranges(hub, A) == [None]


def test_a_weak_etag_is_no_validator(hub, cache):
    hub.etags[A] = 'W/"weak"'
    hub.fail(A, Fault(cut=100_000))
    download(cache, A)
    assert "If-Range" not in hub.seen("storage", A)[1].headers
    assert ranges(hub, A) == [None, "bytes=100000-"]  # the hub's sha256 vouches for the whole
    hub.linked, hub.direct = False, True
    hub.etags[B] = 'W/"weak"'
    hub.fail(B, *[Fault()] * 3, Fault(cut=100_000), at="endpoint")
    download(cache, B)
    assert all(r.headers.get("Range") is None for r in hub.seen("endpoint", B))  # nothing vouches


def test_a_whole_partial_is_only_verified(hub, cache, shards):
    """Killed between the last byte and the rename: no byte is asked for again."""
    hub.fail(A, Fault(cut=1), *[Fault(cut=0)] * 60)
    error_of(cache, A)
    (cache / f"{A}.partial").write_bytes(shards[A].read_bytes())
    hub.requests.clear()
    download(cache, A)
    assert hub.seen("storage") == [] and present(cache) == [A]


def test_a_server_that_has_less_than_is_here(hub, cache):
    hub.fail(A, Fault(cut=100_000), Fault(body=lambda b: b[:50_000]))  # 416
    download(cache, A)
    assert ranges(hub, A) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("make", [lambda b: bytes(len(b)), lambda b: bytes(1000), lambda b: b + b"x", lambda b: b""])
def test_a_spoilt_partial_heals(hub, cache, shards, make):
    hub.fail(A, Fault(cut=1), *[Fault(cut=0)] * 60)
    error_of(cache, A)
    hub.faults.clear()
    (cache / f"{A}.partial").write_bytes(make(shards[A].read_bytes()))
    download(cache, A)


GARBAGE = [b"", b"null", b"[]", b"{}", b"\xff\xfe", b'[[], {}, 1, "x"]', b"[" * 100_000, b'["', b"1" * 9999]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_spoilt_notes_harm_nothing(hub, cache, garbage):
    hub.fail(A, Fault(cut=100_000), *[Fault(cut=0)] * 60)
    error_of(cache, A, B)
    hub.faults.clear()
    hub.requests.clear()
    (cache / f"{A}.partial.json").write_bytes(garbage)
    with open(cache / "verified.jsonl", "ab") as file:
        file.write(garbage)
    download(cache, A, B)
    assert ranges(hub, A) == [None]
    assert hub.seen("storage", B) == []
    hub.requests.clear()
    download(cache, A, B)
    assert hub.requests == []


@pytest.mark.parametrize("etag", ['"a"\r\nX-Evil: 1', '"a\r\nX-Evil: 1"', 5, None, {}, '"\u0660"'])
def test_a_note_cannot_smuggle_a_header(hub, cache, shards, etag):
    cache.mkdir(parents=True)
    (cache / f"{A}.partial").write_bytes(shards[A].read_bytes()[:1000])
    note = [shards[A].stat().st_size, prepare.sha256_of(shards[A]), etag]
    (cache / f"{A}.partial.json").write_text(json.dumps(note))
    download(cache, A)
    assert not {"X-Evil", "If-Range"} & set(hub.seen("storage", A)[0].headers)


# -----------------------------------------------------------------------------
# The client is stopped, or is not alone


def partial_size(cache: Path, name: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (cache / f"{name}.partial").stat().st_size
    return 0


def test_kill_9_and_a_second_run(hub, cache):
    hub.fail(A, Fault(stall=200_000))
    kept = in_whole_blocks(200_000)
    first = client(cache, A, VAL)
    wait_until(lambda: partial_size(cache, A) == kept and (cache / VAL).exists(), "half a shard")
    first.kill()
    first.communicate()
    assert present(cache) == [VAL]
    hub.requests.clear()
    second = client(cache, A, VAL)
    assert second.wait(20) == 0, second.stderr.read()
    second.communicate()
    assert ranges(hub, A) == [f"bytes={kept}-"] and ranges(hub, VAL) == []
    assert present(cache) == [A, VAL] and leftovers(cache) == []


def test_ctrl_c(hub, cache):
    """Ends at once although a stream stalls, without a trace; the next run goes on from the partials."""
    for name in NAMES:
        hub.fail(name, Fault(stall=200_000))
    kept = in_whole_blocks(200_000)
    process = client(cache)
    wait_until(lambda: all(partial_size(cache, name) == kept for name in (A, B)), "two partials")
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130 and "Traceback" not in said and "Exception" not in said, said
    assert present(cache) == []
    hub.faults.clear()
    hub.requests.clear()
    download(cache)
    assert ranges(hub, A) == ranges(hub, B) == [f"bytes={kept}-"]


def test_ctrl_c_during_a_pause(hub, cache):
    hub.fail(A, Fault(status=503, headers={"Retry-After": "60"}), always=True)
    process = client(cache, A)
    wait_until(lambda: hub.seen("storage", A), "the first refusal")
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=5)
    assert process.returncode == 130 and "Traceback" not in said, said


def test_what_stops_one_stops_all(hub, cache):
    """Ctrl-C and bugs: the event is set before the lock goes, and after that no thread adds to a partial."""
    cache.mkdir(parents=True)
    shard = prepare.Shard(A, cache, threading.Event())

    def step(shard: prepare.Shard) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prepare.in_parallel(step, [shard], 1)
    assert shard.stop.is_set()
    shard.hub = prepare.Hub()
    shard.remote = shard.hub.resolve(A)
    with pytest.raises(prepare.ShardError, match="stopped"):
        shard.receive()
    assert partial_size(cache, A) == 0


def test_two_at_once(hub, cache):
    """The second waits, then uses what the first has fetched: each shard crosses the network once."""
    gate = threading.Event()
    hub.fail(A, Fault(gate=gate))
    first = client(cache)
    wait_until(lambda: hub.seen("storage", A), "the first client")
    second = client(cache)
    assert second.stdout.readline() == "another prepare.py is at work in this cache: waiting for it to end\n"
    gate.set()
    assert (first.wait(20), second.wait(20)) == (0, 0), second.stderr.read()
    for process in (first, second):
        process.communicate()
    assert [len(hub.seen("storage", name)) for name in NAMES] == [1, 1, 1, 1]
    assert present(cache) == NAMES and leftovers(cache) == []


# -----------------------------------------------------------------------------
# The machine: network, proxy, disk, terminal


def test_a_closed_port_is_told_at_once(hub, cache, monkeypatch):
    hub.close()
    monkeypatch.setattr(prepare, "PAUSE_SECONDS", 60)
    start = time.monotonic()
    message = error_of(cache)
    assert time.monotonic() - start < 3
    assert hub.endpoint in message and "refused" in message and "`--corpus source` needs no network" in message


def test_no_network_says_how_to_go_on_with_what_is_there(hub, cache):
    download(cache, A, B, VAL)
    hub.close()
    assert error_of(cache).endswith("the same command with --num-shards 2")


def test_a_network_that_swallows_everything_is_told_in_seconds(hub, cache, monkeypatch):
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr(prepare, "STALL_SECONDS", 30)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert "no answer in 0.5 s" in error_of(cache)
    assert time.monotonic() - start < 3


def test_a_name_that_does_not_resolve(hub, cache, monkeypatch):
    monkeypatch.setattr(prepare, "PROBE_SECONDS", 3)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    assert "cannot reach http://hub.invalid (" in error_of(cache)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "file:///etc", "ftp://x"])
def test_an_endpoint_that_is_none(hub, cache, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert f"HF_ENDPOINT is '{endpoint}', and must begin with" in error_of(cache)


def test_a_network_that_goes_away_is_found_out_once(hub, cache, monkeypatch):
    """Not by every shard for itself: one of 40 uses up its tries, and the rest is not waited for."""
    monkeypatch.setattr(prepare, "RETRIES", 3)
    names = [f"shard_{n:05d}.parquet" for n in range(40)]
    hub.files |= dict.fromkeys(names, hub.files[A])
    gate = threading.Event()
    hub.fail(names[1], Fault(gate=gate, cut=0))

    def close_in_the_second_shard() -> None:
        wait_until(lambda: ranges(hub, names[1]), "the second shard")
        hub.close()
        gate.set()

    closer = threading.Thread(target=close_in_the_second_shard)
    closer.start()
    with pytest.raises(prepare.PrepareError) as caught:
        download(cache, *names, workers=1)
    closer.join()
    assert present(cache) == [names[0]]
    assert "39 of 40" in str(caught.value) and "and 34 more (not tried" in str(caught.value)


def test_the_token_goes_to_the_endpoint_only(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fail(A, Fault(cut=1000))
    download(cache)
    assert {r.headers.get("Authorization") for r in hub.seen("endpoint")} == {"Bearer hf_secret"}
    assert len(hub.seen("storage")) == 5
    assert "hf_secret" not in str([r.headers for r in hub.seen("storage")])


def test_the_token_does_not_follow_a_mirrors_redirects(hub, cache, monkeypatch):
    """The HEADs go on to the storage too, which then has to name the length: without the token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.linked = False
    download(cache, A)
    assert len(hub.seen("storage", A)) == 3
    assert "hf_secret" not in str([r.headers for r in hub.seen("storage")])


def test_a_token_that_is_none_is_not_repeated(hub, cache, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sec\nret")
    message = error_of(cache)
    assert "HF_TOKEN" in message and "hf_sec" not in message
    assert hub.requests == []


@pytest.fixture
def proxy(hub):
    """A forward proxy that knows where hub.invalid is; .paths are the addresses it was asked for."""

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            server.paths.append(self.path)
            address = hub.endpoint if "//hub.invalid/" in self.path else self.path
            connection = http.client.HTTPConnection(urlsplit(address).netloc)
            url = urlsplit(self.path)
            connection.request(self.command, f"{url.path}?{url.query}", headers=dict(self.headers))
            answer = connection.getresponse()
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(answer.read())

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.paths, server.daemon_threads = [], True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_proxy_is_used(hub, cache, proxy, monkeypatch):
    """The endpoint's name means nothing but to the proxy: without it, no shard arrives."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
    download(cache, A, VAL)
    assert present(cache) == [A, VAL]
    assert f"{hub.storage}/blobs/{A}?X-Signature=secret" in proxy.paths


def test_a_full_disk_is_told_before_the_first_byte(hub, cache, shards, monkeypatch):
    """Room for the shards and as much again for the token files: one byte less is refused."""
    need = 2 * sum(shards[name].stat().st_size for name in NAMES)
    usage = shutil.disk_usage(hub.files[A].parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    message = error_of(cache)
    assert "free" in message and "--num-shards" in message and "AUTORESEARCH_CACHE" in message
    assert hub.seen("storage") == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    download(cache)


def test_what_is_there_needs_no_room_but_for_its_tokens(hub, cache, shards, monkeypatch):
    sizes = {name: shards[name].stat().st_size for name in NAMES}
    download(cache, A, B)
    hub.fail(C, Fault(cut=100_000), *[Fault(cut=0)] * 60)
    error_of(cache, A, B, C)
    hub.faults.clear()
    usage = shutil.disk_usage(cache)
    need = sizes[C] - 100_000 + sizes[VAL] + sum(sizes.values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    error_of(cache)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=need))
    download(cache)


@pytest.mark.parametrize("size", ["99999999999", str(2**32 + 1), "-5", "0", "1e9", "9" * 5000, "", "٣٠"])
def test_an_absurd_length_is_refused(hub, cache, size):
    hub.fail(B, Fault(headers={"X-Linked-Size": size.encode().decode("latin-1")}), at="endpoint", always=True)
    hub.fail(B, Fault(headers={"Content-Length": None}), always=True)
    assert f"{B} (the server names no usable length" in error_of(cache)
    assert present(cache) == [A, C, VAL]


HOSTILE = ["file:///etc/passwd", "//", "http://[::1", "gopher://x/", "http://\x7f/", "::", "http://a..b/"]


@pytest.mark.parametrize("location", HOSTILE)
def test_a_hostile_redirect_leads_nowhere(hub, cache, location):
    hub.fail(B, Fault(headers={"Location": location}), at="endpoint", always=True)
    assert B in error_of(cache)
    assert present(cache) == [A, C, VAL]


def test_a_redirect_in_circles(hub, cache):
    here = f"/datasets/{prepare.REPO}/resolve/main/{B}"
    hub.fail(B, Fault(headers={"Location": here, "X-Linked-Size": None}), at="endpoint", always=True)
    assert B in error_of(cache)
    assert len(hub.seen("endpoint", B)) < 20


def test_names_from_headers_are_not_used(hub, cache):
    evil = {
        "Content-Disposition": 'attachment; filename="../../evil.parquet"',
        "X-Linked-Etag": '"../../evil"',
    }
    for at in ("endpoint", "storage"):
        hub.fail(A, Fault(headers=evil), at=at, always=True)
    download(cache, A)
    assert sorted(path.name for path in cache.iterdir()) == [A, "verified.jsonl"]


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare.main(["--num-shards=1", "--scale=laptop"]) == 1
    message = capsys.readouterr().err
    assert "AUTORESEARCH_CACHE" in message and "Not a directory" in message and message.count("\n") == 1


def test_redirected_progress_is_whole_lines(hub, cache, capsys, monkeypatch):
    monkeypatch.setattr(prepare, "PROGRESS_SECONDS", 0.05)
    with prepare.progress(1000, "tokenize", "doc") as bar:
        for _ in range(10):
            time.sleep(0.02)
            bar.update(100)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert 2 <= said.count("\n") <= 5, said  # the first when the first interval is over: short work says nothing
    *_, last = said.splitlines()
    assert re.fullmatch(r"tokenize: 100%, 1\.00kdoc of 1\.00kdoc, [\d.]+k?doc/s, 00:00 left", last)


def test_the_bar_counts_every_byte_once(hub, cache, shards, monkeypatch):
    """Also those that were thrown away and came again: it ends at the total."""
    bars = []
    progress = prepare.progress
    monkeypatch.setattr(prepare, "progress", lambda *a: bars.append(progress(*a)) or bars[-1])
    hub.fail(A, Fault(cut=100_000), Fault(ignore_range=True, cut=50_000))
    hub.fail(B, Fault(body=flipped))
    download(cache)
    assert bars[0].n == bars[0].total == sum(shards[name].stat().st_size for name in NAMES)
    (cache / A).rename(cache / f"{A}.partial")
    os.truncate(cache / f"{A}.partial", 100_000)
    note = [shards[A].stat().st_size, prepare.sha256_of(shards[A]), ""]
    (cache / f"{A}.partial.json").write_text(json.dumps(note))
    download(cache)
    assert bars[1].initial == 100_000
    assert bars[1].n == bars[1].total == shards[A].stat().st_size


# -----------------------------------------------------------------------------
# From the hub to a number


def test_prepare_then_train(hub, tmp_path):
    """The two commands of the README's real thing, small: what they print, and that the second needs no hub."""
    options = ["--num-shards=3", *SMALL, "--time-budget=2"]
    done = run_python("prepare.py", *options, cache=tmp_path / "home", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0, done.stderr
    assert "climbmix: 3 training shard(s), validation shard_06542.parquet" in done.stdout
    run = run_python("train.py", cache=tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert run.returncode == 0, run.stderr
    assert re.search(r"^---\nval_bpb: +\d\.\d{6}$", run.stdout, re.MULTILINE)
    again = run_python("prepare.py", *options, cache=tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_fewer_shards_go_on_from_what_is_there(hub, tmp_path):
    hub.fail(C, Fault(status=404), at="endpoint", always=True)
    failed = run_python("prepare.py", "--num-shards=3", *SMALL, cache=tmp_path / "home", HF_ENDPOINT=hub.endpoint)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].endswith("the same command with --num-shards 2")
    done = run_python("prepare.py", "--num-shards=2", *SMALL, cache=tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
