"""download_shards against a hub on loopback (hub.py) and its faults, one by one.

In each case: the right shards byte for byte, or the right error. The `folder` fixture checks after every test that no
file under a shard's name differs from that shard.
"""

import os
import pydoc_data.topics
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, run_python
from hub import Fault, Hub

import prepare

A, B, C, VAL = NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", prepare.VAL_SHARD]

CLIENT = """
import pathlib, signal, sys, prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
try:
    prepare.download_shards(sys.argv[2:], pathlib.Path(sys.argv[1]), 2)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """Parquet shards of prose, Python's language reference: for training in different orders, 20 for validation."""
    folder = tmp_path_factory.mktemp("shards")
    documents = [f"{title}\n\n{text}" for title, text in sorted(pydoc_data.topics.topics.items())]
    for seed, name in enumerate(NAMES):
        texts = documents[:20] if name == VAL else random.Random(seed).sample(documents[20:], len(documents) - 20)
        pq.write_table(pa.table({"text": texts}), folder / name, row_group_size=16)
    return {name: folder / name for name in NAMES}


@pytest.fixture
def hub(shards, monkeypatch):
    """The hub as HF_ENDPOINT, and pauses that a test can wait for."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("HF_")]:
        monkeypatch.delenv(name)
    huggingface_hub.close_session()  # a new one reads the environment
    monkeypatch.setattr(prepare, "RETRY_PAUSES", (0.01, 0.02))
    with Hub(dict(shards)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


@pytest.fixture
def folder(tmp_path, hub):
    folder = tmp_path / "cache" / "data"
    yield folder
    for path in folder.glob("*.parquet"):
        assert path.read_bytes() == hub.files[path.name].read_bytes(), f"{path.name} is a bad file"


def download(folder, *names, workers=4):
    prepare.download_shards(list(names or NAMES), folder, workers)
    assert {*(names or NAMES)} <= {*present(folder)}
    assert {path.name for path in folder.iterdir()} <= {*NAMES}  # nothing half-fetched


def error_of(folder, *names):
    """The message of a download that has to fail: one line, without the storage's signed addresses."""
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.download_shards(list(names or NAMES), folder, 4)
    message = str(caught.value)
    assert "\n" not in message and "Signature" not in message
    return message


def present(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def client(folder, *names):
    command = [sys.executable, "-c", CLIENT, str(folder), *(names or NAMES)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


# -----------------------------------------------------------------------------
# What is here already


def test_every_shard_arrives_byte_for_byte_and_then_costs_nothing(hub, folder, monkeypatch):
    download(folder)
    assert present(folder) == NAMES
    hub.close()  # no network from here on
    monkeypatch.setattr(prepare, "checksum", lambda path: pytest.fail(f"hashed {path.name} again"))
    download(folder)


# -----------------------------------------------------------------------------
# Faults


def flipped(body):
    """One bit, in a page of text: the length and the footer stay right."""
    return body[:5000] + bytes([body[5000] ^ 1]) + body[5001:]


NO_HASH = {"X-Linked-Etag": '"5d41402abc4b2a76b9719d911017c592"'}
HTML = {"Content-Type": "text/html", "Location": None, "X-Repo-Commit": None}
FAULTS = {  # name: (fault, where, what the message says if it never ends)
    "cut": (Fault(cut=100_000), "storage", None),
    "flipped bit": (Fault(body=flipped), "storage", "its sha256 is not the one"),
    "shorter": (Fault(body=lambda b: b[:-1000]), "storage", "should be of size"),
    "503 of the storage": (Fault(status=503), "storage", "HTTP 503"),
    "500 of the endpoint": (Fault(status=500), "endpoint", None),
    "no sha256": (Fault(headers=NO_HASH), "endpoint", "its sha256 is not the one"),
    "web page of the endpoint": (Fault(status=200, headers=HTML), "endpoint", ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_passes(hub, folder, name):
    fault, place, _ = FAULTS[name]
    hub.fail(A, fault, at=place)
    download(folder)


@pytest.mark.parametrize("name", [name for name, (*_, message) in FAULTS.items() if message is not None])
def test_a_fault_that_stays(hub, folder, name, capsys):
    fault, place, message = FAULTS[name]
    hub.fail(B, fault, at=place, always=True)
    told = error_of(folder)
    assert told.startswith(f"1 of 4 shards could not be fetched: {B} (") and message in told
    assert present(folder) == [A, C, VAL]
    assert "What was fetched stays, run it again" in told
    assert capsys.readouterr().out.count(f"missing, {B}") == len(prepare.RETRY_PAUSES)


def test_the_same_problem_of_many_shards_is_told_once(hub, folder):
    message = error_of(folder, *(f"shard_{n:05d}.parquet" for n in range(100, 120)))
    assert message.count("(HTTP 404)") == 4 and " and 16 more" in message and "20 of 20 shards" in message


def test_a_disk_without_symbolic_links(hub, folder, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    download(folder)


def test_a_full_disk_is_found_before_anything_is_fetched(hub, folder, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: SimpleNamespace(free=7e8))
    assert "has 0.7 GB free, shards and token files need about 0.8 GB" in error_of(folder)
    assert hub.requests == []


def test_a_stalled_stream_is_tried_again(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.fail(A, Fault(stall=100_000))
    download(folder, A)
    assert len(hub.seen("storage", A)) == 2


# -----------------------------------------------------------------------------
# The client is stopped, or is not alone


def test_kill_9_and_a_second_run(hub, folder):
    hub.fail(A, Fault(stall=100_000))
    first = client(folder, A, VAL)
    wait_until(lambda: hub.seen("storage", A) and present(folder) == [VAL], "one of two shards")
    first.kill()
    first.communicate()
    assert (folder / prepare.INCOMING).exists()  # half a shard, under another name
    hub.requests.clear()
    download(folder, VAL)  # misses nothing, and takes away what was left
    download(folder, A, VAL)
    assert hub.seen("storage", VAL) == []


def test_ctrl_c(hub, folder):
    """Ends at once although streams stall, without a traceback. The next run goes on."""
    for name in NAMES:
        hub.fail(name, Fault(stall=100_000))
    process = client(folder)
    wait_until(lambda: hub.seen("storage", A) and hub.seen("storage", B), "two stalled streams")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=5)  # the library would wait 10 s for the next byte
    assert process.returncode == 130 and "Traceback" not in error and "Exception" not in error, error
    assert present(folder) == []
    hub.faults.clear()
    download(folder)


def test_two_at_once(hub, folder, capsys):
    """The second waits, then uses what the first has fetched: each shard crosses the network once."""

    def locked_download():
        with prepare.cache_lock(folder.parent):
            download(folder)

    folder.parent.mkdir()
    gate = threading.Event()
    hub.fail(A, Fault(gate=gate))
    with ThreadPool(2) as pool:
        first = pool.apply_async(locked_download)
        wait_until(lambda: hub.seen("storage", A), "the first")
        second = pool.apply_async(locked_download)
        wait_until(lambda: "another prepare.py is at work" in capsys.readouterr().out, "the second")
        gate.set()
        first.get(60), second.get(60)
    assert [len(hub.seen("storage", name)) for name in NAMES] == [1, 1, 1, 1]


# -----------------------------------------------------------------------------
# The machine: network, token, proxy, disk


def test_no_network(hub, folder):
    download(folder, A, B, VAL)
    hub.close()
    message = error_of(folder)
    assert f"cannot reach {hub.endpoint} (" in message and "`--corpus source` needs no network" in message
    download(folder, A, B, VAL)  # with what is here it goes on


def test_a_network_that_swallows_everything(hub, folder, monkeypatch):
    monkeypatch.setattr(prepare, "HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "timed out" in error_of(folder)


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "huggingface.co"])
def test_an_endpoint_that_leads_nowhere(hub, folder, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert f"cannot reach {endpoint} (" in error_of(folder)


def test_a_network_that_goes_away_is_found_out_once(hub, folder, monkeypatch):
    """Not by every shard for itself: after the attempts of one shard, the others are not waited for."""
    names = [f"shard_{n:05d}.parquet" for n in range(40)]
    hub.files |= dict.fromkeys(names, hub.files[A])
    attempts, ask = [], huggingface_hub.get_hf_file_metadata

    def ask_twice(url):
        attempts.append(url)
        if len(attempts) > 2:
            hub.close()
            raise OSError("the network is gone")
        return ask(url)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask_twice)
    with pytest.raises(prepare.PrepareError, match="cannot reach"):
        prepare.download_shards(names, folder, 1)
    assert len(attempts) == len(names) and present(folder) == names[:2]  # one round, then the hub is asked


def test_the_token_goes_to_the_endpoint_only(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(folder)
    sent = {name: [headers.get("authorization") for headers in hub.seen("endpoint", name)] for name in NAMES}
    assert all(set(values) == {"Bearer hf_secret"} for values in sent.values()), sent
    stored = [headers for place, *_, headers in hub.requests if place == "storage"]
    assert len(stored) == 4 and "hf_secret" not in str(stored)


def test_the_proxy_is_used(hub, folder, monkeypatch):
    """The endpoint's name means nothing but to the proxy, here the hub itself: without it, no shard arrives."""
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    download(folder, A, VAL)


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare.main(["--num-shards=1", "--scale=laptop"]) == 1
    message = capsys.readouterr().err
    assert "AUTORESEARCH_CACHE" in message and "Not a directory" in message and message.count("\n") == 1


# -----------------------------------------------------------------------------
# From the hub to a number


def test_prepare_then_train(hub, tmp_path, monkeypatch, capsys):
    """The two commands of the README's real thing, small. A shard is missing, so fewer go on, without a hub."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "home"))
    hub.fail(C, Fault(status=404), at="endpoint", always=True)
    assert prepare.main(["--num-shards=3", *SMALL]) == 1
    assert f"{C} (HTTP 404)" in capsys.readouterr().err
    hub.close()
    assert prepare.main(["--num-shards=2", *SMALL]) == 0
    assert "climbmix: 2 training shard(s), validation shard_06542.parquet" in capsys.readouterr().out
    run = run_python("train.py")
    assert run.returncode == 0, run.stderr
    assert re.search(r"^---\nval_bpb: +\d\.\d{6}$", run.stdout, re.MULTILINE)
