"""What needs a CUDA GPU: `uv run pytest tests/test_gpu.py -s` there. Without one every test is skipped."""

import json
import math
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import run_python
from test_loader import arrives_as_packed
from test_model import BFLOAT16, check, reference
from test_training import check_that_the_warm_up_leaves_no_trace

import prepare
import train

HAS_GPU = torch.cuda.is_available() and prepare.bfloat16_works(torch.device("cuda"))
pytestmark = [
    pytest.mark.xdist_group("gpu"),  # one at a time, also where tests run side by side
    pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU of compute capability 8 or more"),
    pytest.mark.timeout(900),  # a compiler is at work
]
CUDA, VISIBLE = torch.device("cuda"), os.environ.get("CUDA_VISIBLE_DEVICES", "0")
T, D = 256, 128
WINDOWS = (0, 1, 17, T // 2, T - 1, T)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.cuda.empty_cache()


def kernel(name):
    if name == "sdpa":
        return train.sdpa_attention
    if name == "flex":
        return torch.compile(train.flex_attention_for(T, WINDOWS, CUDA), dynamic=False, fullgraph=True)
    try:
        return train.flash3_attention()
    except Exception as error:  # no network, no build for this GPU: a run does without it too
        pytest.skip(f"no FlashAttention-3: {type(error).__name__}: {error}")


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("name", ["sdpa", "flex", "fa3"])
def test_attention_kernel_against_float64(name, n_kv_head):
    attention = kernel(name)
    for window in WINDOWS:
        check(attention, n_kv_head, window, BFLOAT16, torch.bfloat16, size=(T, D), device=CUDA)


def test_one_key_more_or_less_is_beyond_that_tolerance():
    torch.manual_seed(0)  # where the window is shorter than 100 keys
    q, k, v = (torch.randn(2, T, 4, D, dtype=torch.bfloat16) for _ in range(3))
    assert (reference(q, k, v, 18) - reference(q, k, v, 17)).abs().max() > 0.1


# A whole run: the real model, loader, clock and evaluation, small
WATCHED_RUN = """
import time
began = time.monotonic()
import train  # the first: it makes the allocator's settings
import json, sys, torch
from torch._dynamo.utils import counters
import prepare

seen, warm_up = {}, train.warm_up

def watched_warm_up(*arguments):
    batch_size = warm_up(*arguments)
    seen["warm_graphs"] = counters["stats"]["unique_graphs"]
    return batch_size

def report(val_bpb, **values):
    seen["graphs"] = counters["stats"]["unique_graphs"]
    seen["compiled"] = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"]
    seen["expandable"] = all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
    seen["seconds_outside"] = time.monotonic() - began - prepare.clock.seconds()
    print(json.dumps(dict(values, val_bpb=val_bpb, **seen)))

train.warm_up, prepare.report = watched_warm_up, report
train.main()
"""


def test_the_first_run_on_a_machine_and_the_second(session_cache, tmp_path):
    environment, runs = dict(CUDA_VISIBLE_DEVICES=VISIBLE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)), []
    for _ in range(2):
        done = run_python("-c", WATCHED_RUN, cache=session_cache, timeout=600, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    for run in runs:
        assert run["graphs"] == run["warm_graphs"] > 3  # nothing is compiled after the warm-up, evaluation included
        assert run["attention"] in ("fa3", "flex") and run["expandable"]
        assert run["num_steps"] > 20 and 0.1 < run["val_bpb"] < 4
    first, second = runs
    assert first["compiled"] > 0 and second["compiled"] == 0  # from the compiler's cache
    assert second["seconds_outside"] < first["seconds_outside"]
    # the same seed and weights: atomic additions in the kernels and the clock make the difference
    assert first["val_bpb"] == pytest.approx(second["val_bpb"], rel=0.05)


def test_the_warm_up_leaves_no_trace():
    config = replace(train.FULL, DEPTH=2, TOTAL_BATCH_SIZE=2**14, DEVICE_BATCH_SIZE=4)
    check_that_the_warm_up_leaves_no_trace(config, 8192, 2048, CUDA)


FIT = """
import train  # the first: it makes the allocator's settings
import itertools, json, sys, torch
from functools import partial
limit, V = float(sys.argv[1]) * 2**30, 8192
config, T = (train.FULL, 2048) if limit > 2**33 else (train.DESKTOP, 1024)
device = torch.device("cuda")
torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
_, attention, _ = train.pick_attention(T, train.window_sizes(config, T), config.HEAD_DIM, device)
build = partial(train.Run, config, V, T, device, attention)
batch_size = train.warm_up(build, config, V, T, device)
run = build()

x = torch.randint(V, (batch_size, T), device=device)
loader, steps = itertools.repeat((x, x.clone(), 1)), config.TOTAL_BATCH_SIZE // (batch_size * T)
losses = [run.step(loader, steps).item() for _ in range(2)]
peak = torch.cuda.max_memory_reserved() / 2**30
print(json.dumps(dict(batch_size=batch_size, tokens=batch_size * T * steps, peak=peak, losses=losses)))
"""


@pytest.mark.parametrize("gigabytes", [6, 16, 24, 40])  # 6: the desktop model
def test_the_model_fits_into(gigabytes):
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 2**30:
        pytest.skip("this GPU has less")
    config = train.FULL if gigabytes > 8 else train.DESKTOP
    done = run_python("-c", FIT, gigabytes, timeout=600, CUDA_VISIBLE_DEVICES=VISIBLE)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == config.TOTAL_BATCH_SIZE and found["peak"] <= gigabytes
    assert found["losses"][1] < found["losses"][0]
    assert found["batch_size"] == config.DEVICE_BATCH_SIZE >> done.stdout.count("out of memory with")  # halved


def learnable_batches(V, T, rows):
    """Batches in which nine of ten tokens follow a rule: each row counts in a step of its own."""
    rng = torch.Generator().manual_seed(1)
    while True:
        first, step = torch.randint(V, (2, rows, 1), generator=rng)
        noise, x = torch.randint(V, (rows, T + 1), generator=rng), (first + step * torch.arange(T + 1)) % V
        x = torch.where(torch.rand(rows, T + 1, generator=rng) < 0.1, noise, x)
        yield x[:, :-1].to(CUDA), x[:, 1:].to(CUDA), 1


def learning_curve(config, V, T, steps):
    run, curve = train.Run(config, V, T, CUDA, train.sdpa_attention, compiled=lambda function: function), []
    loader = learnable_batches(V, T, config.TOTAL_BATCH_SIZE // T)
    for step in range(steps):
        train.set_schedules(run.optimizer, config, step / steps, step)
        curve.append(run.step(loader, 1).item())
    return curve


def test_bfloat16_learns_as_much_as_float32(monkeypatch):
    """The model of four layers and width 256 in bfloat16, as a run has it, and in float32.

    The mean loss of the last 50 steps agrees to 2 % of what was learned, and more than 1 nat was learned. This finds
    only large faults: a sum or an optimizer state for which 16 bits are too few."""
    torch.manual_seed(0)  # every Run starts with it
    config = replace(train.FULL, DEPTH=4, HEAD_DIM=64, TOTAL_BATCH_SIZE=16 * 256)
    half = learning_curve(config, 512, 256, 300)
    monkeypatch.setattr(train, "computes_in_bfloat16", lambda device: False)
    full = learning_curve(config, 512, 256, 300)
    ends = [sum(curve[-50:]) / 50 for curve in (half, full)]
    learned = math.log(512) - ends[1]
    print(f"bfloat16 {ends[0]:.4f}, float32 {ends[1]:.4f}, learned {learned:.3f} nats")
    assert half != full and learned > 1
    assert abs(ends[0] - ends[1]) < 0.02 * learned


def test_a_slow_stream_is_never_overtaken():
    """prepare.py relies on PyTorch, which gives pinned memory to a new batch only after the copy from it was made."""
    sleep = partial(torch.cuda._sleep, 1_000_000_000)  # clock ticks, half a second: every later copy waits behind it
    assert arrives_as_packed(CUDA, sleep)
