"""Text of our own, a small prepared cache, and a clock that starts anew with each test."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import prepare

ROOT = Path(prepare.__file__).parent
# T = 64, 400 tokens, 4,096 evaluated, 2 s of training: seconds instead of minutes
SMALL = ["--scale=laptop", "--seq-len=64", "--vocab-size=400", "--eval-tokens=4096", "--time-budget=2"]

NAMES = "Ada Emil Noor Tove the old miller a young pilot nobody her sister their captain the last of them".split()
VERBS = "finds loses carries forgets repairs paints counts sells hides draws".split()
THINGS = "a lamp/the letter/three stones/his map/an engine/the clock/seven pears/a violin/the bridge".split("/")
ENDS = "before dawn/in the harbour/and says so/— naïvely! while it rains/again? for 27 crowns/on 3 May 1911.".split("/")


def prose(seed, documents, longest=40):
    """Documents of made-up sentences: 1 to `longest` of them, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(documents):
        number = rng.randint(1, longest)
        yield " ".join(" ".join(map(rng.choice, (NAMES, VERBS, THINGS, ENDS))) + "." for _ in range(number))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of several kinds of file; validation is parquet."""
    folder = tmp_path_factory.mktemp("corpus")
    pq.write_table(pa.table({"text": list(prose(1, 600))}), folder / "a.parquet")
    lines = [json.dumps({"text": text, "more": 1}) for text in prose(2, 300)]
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (folder / "c.txt").write_text("\n\n".join(prose(3, 100)), encoding="utf-8")
    pq.write_table(pa.table({"text": list(prose(4, 150))}), folder / "val.parquet")
    return folder


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(folder))
        assert prepare.main([f"--corpus={corpus}", *SMALL]) == 0
    return folder


@pytest.fixture
def cache(session_cache, monkeypatch):
    """The prepared cache, in force for this test, which must not change it."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(session_cache))
    return session_cache


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small gain nothing from a second thread, and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float32(monkeypatch):
    """The numbers of a CPU without bfloat16, whatever this one has: the tolerances of these tests are float32's."""
    import train

    monkeypatch.setattr(train, "CPU_HAS_BFLOAT16", False)


@pytest.fixture(autouse=True)
def fresh_harness(monkeypatch):
    monkeypatch.setattr(prepare, "clock", prepare.Clock())
    monkeypatch.delenv("SEED", raising=False)
    prepare.open_cache.cache_clear()
    # A shell's background jobs start with it ignored, and so would what a test starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


def wait_until(condition, what="it", seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def run_python(*arguments, cache=None, cwd=ROOT, timeout=120, **environment):
    """Run this Python with what stands in the arguments; returns the finished process, its output as text."""
    env = {**os.environ, "PYTHONPATH": str(cwd), "CUDA_VISIBLE_DEVICES": "", **environment}
    env.setdefault("OMP_NUM_THREADS", "1")  # two threads of one step wait for each other where the machine is busy
    if cache is not None:
        env["AUTORESEARCH_CACHE"] = str(cache)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def now(monkeypatch):
    """[the time in seconds], which tests may set"""
    now = [100.0]
    monkeypatch.setattr(prepare.time, "monotonic", lambda: now[0])
    return now
