"""download_shards against a hub on loopback (hub.py) and its faults, one by one.

In each case: the right shards byte for byte, or the right error. The `folder` fixture checks after every test that no
file under a shard's name differs from that shard.
"""

import os
import pydoc_data.topics
import random
import signal
import socket
import subprocess
import sys
from multiprocessing.pool import ThreadPool

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, SMALL, wait_until
from hub import Fault, Hub

import prepare

A, B, C, VAL = NAMES = ["shard_00000.parquet", "shard_00001.parquet", "shard_00002.parquet", prepare.VAL_SHARD]


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


def download(folder, *names):
    prepare.download_shards(list(names or NAMES), folder, 4)
    assert {*(names or NAMES)} <= {path.name for path in folder.iterdir()} <= {*NAMES}  # nothing half-fetched


def error_of(folder, *names):
    """The message of a download that has to fail: one line, without the storage's signed addresses."""
    with pytest.raises(prepare.PrepareError) as caught:
        prepare.download_shards(list(names or NAMES), folder, 4)
    assert "\n" not in str(caught.value) and "Signature" not in str(caught.value)
    return str(caught.value)


def present(folder):
    return sorted(path.name for path in folder.glob("*.parquet"))


def client(folder, shards):
    command = [sys.executable, "prepare.py", f"--num-shards={shards}", "--download-workers=2", *SMALL]
    env = {**os.environ, "AUTORESEARCH_CACHE": str(folder.parent)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_every_shard_arrives_byte_for_byte_and_then_costs_nothing(hub, folder, monkeypatch):
    hub.fail(A, Fault(cut=100_000))  # both are the library's to overcome
    hub.fail(B, Fault(status=500), at="endpoint")
    download(folder)
    assert present(folder) == NAMES
    hub.close()  # no network from here on
    monkeypatch.setattr(prepare, "checksum", lambda path: pytest.fail(f"hashed {path.name} again"))
    download(folder)


def flipped(body):
    """One bit, in a page of text: the length and the footer stay right."""
    return body[:5000] + bytes([body[5000] ^ 1]) + body[5001:]


NO_HASH = {"X-Linked-Etag": '"5d41402abc4b2a76b9719d911017c592"'}
FAULTS = {  # name: (fault, where, what the message says if it never ends)
    "flipped bit": (Fault(body=flipped), "storage", "its sha256 is not the one"),
    "shorter": (Fault(body=lambda b: b[:-1000]), "storage", "should be of size"),
    "503 of the storage": (Fault(status=503), "storage", "HTTP 503"),
    "no sha256": (Fault(headers=NO_HASH), "endpoint", "its sha256 is not the one"),
    "web page of the endpoint": (Fault(status=200, headers={"Content-Type": "text/html"}), "endpoint", ""),
}


@pytest.mark.parametrize(("fault", "place", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_is_overcome_and_one_that_stays_is_told(hub, folder, capsys, fault, place, message):
    hub.fail(A, fault, at=place)
    hub.fail(B, fault, at=place, always=True)
    told = error_of(folder)
    assert told.startswith(f"1 of 4 shards could not be fetched: {B} (") and message in told
    assert present(folder) == [A, C, VAL]
    assert "What was fetched stays, run it again" in told
    assert capsys.readouterr().out.count("shards are missing") == len(prepare.RETRY_PAUSES)


def test_the_same_problem_of_many_shards_is_told_once(hub, folder, capsys):
    message = error_of(folder, *(f"shard_{n:05d}.parquet" for n in range(100, 120)))
    assert message.count("(HTTP 404)") == 1 and "20 of 20 shards" in message
    assert "next attempt" not in capsys.readouterr().out  # it would get the same answer


def test_a_stalled_stream_is_tried_again(hub, folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.fail(A, Fault(cut=100_000, stall=True))
    download(folder, A)
    assert len(hub.seen("storage", A)) == 2


def test_kill_9_and_a_second_run(hub, folder):
    hub.fail(A, Fault(cut=100_000, stall=True))
    first = client(folder, 1)
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
        hub.fail(name, Fault(cut=100_000, stall=True))
    process = client(folder, 3)
    wait_until(lambda: hub.seen("storage", A) and hub.seen("storage", B), "two stalled streams")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=5)  # the library would wait 10 s for the next byte
    assert process.returncode == 1 and "prepare.py: error: interrupted; run it again to go on\n" in error
    assert "Traceback" not in error and "Exception" not in error, error
    assert present(folder) == []
    hub.faults.clear()
    download(folder)


def test_two_at_once(hub, folder, capsys):
    """The second waits, then uses what the first has fetched: each shard crosses the network once."""

    def locked_download():
        with prepare.cache_lock(folder.parent):
            download(folder)

    folder.parent.mkdir()
    with ThreadPool(1) as pool:
        with prepare.cache_lock(folder.parent):
            second = pool.apply_async(locked_download)
            wait_until(lambda: "another prepare.py is at work" in capsys.readouterr().err, "the second")
            assert not hub.requests
            download(folder)
        second.get(60)
    assert [len(hub.seen("storage", name)) for name in NAMES] == [1, 1, 1, 1]


def test_without_a_network_what_is_here_goes_on(hub, folder):
    download(folder, A, B, VAL)
    hub.close()
    message = error_of(folder)
    assert f"cannot reach {hub.endpoint} (" in message and "`--corpus source` needs no network" in message
    download(folder, A, B, VAL)


def test_an_endpoint_that_leads_nowhere_is_named(hub, folder, monkeypatch):
    monkeypatch.setattr(prepare, "HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # swallows everything
        silent_hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        nowhere = {"http://hub.invalid": "", "huggingface.co": "MissingSchema)", silent_hub: "ReadTimeout)"}
        for endpoint, problem in nowhere.items():
            monkeypatch.setenv("HF_ENDPOINT", endpoint)
            assert f"cannot reach {endpoint} ({problem}" in error_of(folder)


def test_a_network_that_goes_away_is_found_out_once(hub, folder, monkeypatch):
    """After an attempt of each shard the hub is asked, and no shard is tried again."""
    attempts = []

    def fail(url):
        attempts.append(url)
        hub.close()
        raise OSError("the network is gone")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    assert "cannot reach" in error_of(folder)
    assert len(attempts) == len(NAMES)


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "file" / "cache"))
    assert prepare.main(["--num-shards=1", "--scale=laptop"]) == 1
    message = capsys.readouterr().err
    assert "AUTORESEARCH_CACHE" in message and "Not a directory" in message and message.count("\n") == 1


def test_where_a_shard_is_missing_fewer_go_on_without_a_hub(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "home"))
    hub.fail(C, Fault(status=404), at="endpoint", always=True)
    assert prepare.main(["--num-shards=3", *SMALL]) == 1
    assert f"{C} (HTTP 404)" in capsys.readouterr().err
    hub.close()
    assert prepare.main(["--num-shards=2", *SMALL]) == 0
    assert "climbmix: 2 training shard(s), validation shard_06542.parquet" in capsys.readouterr().out
    assert len(prepare.read_tokens("train")) > len(prepare.read_tokens("val")) > 0
