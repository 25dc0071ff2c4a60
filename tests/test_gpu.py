"""What only a CUDA GPU can show: `uv run pytest tests/test_gpu.py -s` there. Without one every test skips itself."""

import json
import math
import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import run_python
from test_loader import arrives_as_packed, without_waiting
from test_training import agree, learning_curve, make, same, snapshot, use

import prepare
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.timeout(900),  # a compiler is at work
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.cuda.empty_cache()


# -----------------------------------------------------------------------------
# Attention

T, D = 256, 128
WINDOWS = (0, 1, 17, T // 2, T - 1, T)


def reference(q, k, v, window):
    """Attention as it is defined, in float64."""
    shared = q.size(2) // k.size(2)
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    distance = torch.arange(T, device=q.device)[:, None] - torch.arange(T, device=q.device)
    score = (q @ k.mT / D**0.5).masked_fill((distance < 0) | (distance > window), -math.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


def kernel(name):
    if name == "sdpa":
        return train.sdpa_attention
    if name == "flex":
        return torch.compile(train.flex_attention_for(T, WINDOWS, CUDA), dynamic=False, fullgraph=True)
    try:
        return train.flash3_attention()
    except Exception as error:  # no network, or no build for this GPU: the same reasons that leave it out of a run
        pytest.skip(f"no FlashAttention-3: {type(error).__name__}: {error}")


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("name", ["sdpa", "flex", "fa3"])
def test_each_kernel_against_float64(name, n_kv_head):
    attention = kernel(name)
    torch.manual_seed(0)
    leaves = [
        torch.randn(2, T, heads, D, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, n_kv_head, n_kv_head)
    ]
    above = torch.randn(2, T, 4, D, device=CUDA, dtype=torch.bfloat16)
    # bfloat16 keeps 8 bits: inputs and results of order 1 to 4 are off by up to 2^-7, weights are rounded too. A window
    # of one key more or less moves some output by more than 0.1 wherever the window is shorter than 100 keys.
    band = dict(atol=0.03, rtol=0.02)
    for window in WINDOWS:
        got, wanted = attention(*leaves, window), reference(*leaves, window)
        assert got.shape == wanted.shape and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, **band)
        for one, other in zip(torch.autograd.grad(got, leaves, above), torch.autograd.grad(wanted, leaves, above)):
            torch.testing.assert_close(one.double(), other.double(), **band)
    off_by_one = reference(*leaves, 18)
    assert (off_by_one - reference(*leaves, 17)).abs().max() > 0.1


def test_the_choice_is_made_once_and_said():
    name, _, reason = train.pick_attention(T, WINDOWS, D, CUDA)
    assert name in ("fa3", "flex") and reason
    print(f"attention: {name} ({reason})")


# -----------------------------------------------------------------------------
# Whole runs: the real model, loader, clock and evaluation, small

WATCHED_RUN = """
import json, sys, torch
from torch._dynamo.utils import counters
import prepare, train

seen, warm_up = {}, train.warm_up

def watched_warm_up(*arguments):
    micro = warm_up(*arguments)
    seen["graphs"] = counters["stats"]["unique_graphs"]
    return micro

def report(val_bpb, **values):
    print(json.dumps(values | {
        "val_bpb": val_bpb,
        "warm_graphs": seen["graphs"],
        "graphs": counters["stats"]["unique_graphs"],
        "compiled": counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
        "expandable": all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()),
        "seconds_outside": prepare.process_seconds() - prepare.clock.seconds(),
        "uuid": str(torch.cuda.get_device_properties(0).uuid),
    }))

train.warm_up, prepare.report = watched_warm_up, report
train.main()
"""


def watched_run(cache, compiler_cache, **environment):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    environment = {"CUDA_VISIBLE_DEVICES": visible, "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache), **environment}
    done = run_python("-c", WATCHED_RUN, cache=cache, timeout=600, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def runs(session_cache, tmp_path_factory):
    """The first run on a machine and the second."""
    folder = tmp_path_factory.mktemp("inductor")
    return [watched_run(session_cache, folder) for _ in range(2)]


def test_nothing_is_compiled_after_the_warm_up(runs):
    for run in runs:  # evaluation included
        assert run["graphs"] == run["warm_graphs"] > 3


def test_the_second_run_starts_from_the_compilers_cache(runs):
    first, second = runs
    assert first["compiled"] > 0 and second["compiled"] == 0
    assert second["seconds_outside"] < first["seconds_outside"]


def test_segments_grow(runs):
    assert all(run["expandable"] for run in runs)


def test_the_runs_learn(runs):
    for run in runs:
        assert run["num_steps"] > 20 and 0.1 < run["val_bpb"] < 4
    # one seed, one place to start from: kernels with atomic additions and the clock make the rest
    assert runs[0]["val_bpb"] == pytest.approx(runs[1]["val_bpb"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_visible_devices_picks_one(session_cache, tmp_path):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    for index in (0, 1):
        run = watched_run(session_cache, tmp_path, CUDA_VISIBLE_DEVICES=visible[index])
        assert run["uuid"] == str(torch.cuda.get_device_properties(index).uuid)


# -----------------------------------------------------------------------------
# Warm-up and memory


def test_put_back_bit_for_bit():
    with CUDA:
        model, optimizer = make()
        before = *snapshot(model, optimizer), torch.cuda.get_rng_state()
        with train.put_back(model, optimizer):
            use(model, optimizer)
            during = *snapshot(model, optimizer), torch.cuda.get_rng_state()
        after = *snapshot(model, optimizer), torch.cuda.get_rng_state()
    assert same(after, before)
    for part, other in zip(during[:4], before):  # weights, schedules, gradients, optimizer state had been moved
        assert not same(part, other)
    assert not torch.equal(during[-1], before[-1])


FIT = """
import json, sys, torch, prepare, train
limit, T, V, k = float(sys.argv[1]) * 2**30, 2048, 8192, train.FULL
device = torch.device("cuda")
torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
_, model, forward, optimizer = train.build(k, V, T, device)
micro = train.warm_up(model, forward, optimizer, k, V, T, device)
x = torch.randint(V, (micro, T), device=device)
micro_steps = k.TOTAL_BATCH // (micro * T)
losses = [train.train_step(forward, optimizer, lambda: (x, x), micro_steps).item() for _ in range(2)]
peak = torch.cuda.max_memory_reserved() / 2**30
print(json.dumps(dict(micro=micro, tokens=micro * T * micro_steps, peak=peak, losses=losses)))
"""


@pytest.mark.parametrize("gigabytes", [16, 24, 40])
def test_the_full_model_fits_itself_to(gigabytes):
    if torch.cuda.get_device_properties(0).total_memory < gigabytes * 2**30:
        pytest.skip("this GPU has less")
    # named here, as the limit is set before `build` could name it
    growing = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = run_python("-c", FIT, gigabytes, timeout=600, CUDA_VISIBLE_DEVICES=visible, **growing)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == train.FULL.TOTAL_BATCH and found["peak"] <= gigabytes
    assert found["losses"][1] < found["losses"][0]
    smaller = done.stdout.count("out of memory, trying")
    assert found["micro"] == train.FULL.MAX_MICRO_BATCH >> smaller  # each try is half of the last


# -----------------------------------------------------------------------------
# Precision


def test_the_residual_stream_has_16_bits():
    with CUDA:
        model, _ = make()
        for table in (model.wte, *model.value_embeds.values()):
            table.bfloat16()
        types = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: types.append((inputs[0].dtype, output.dtype)))
        tokens = torch.zeros(2, 8, dtype=torch.long)
        loss, logits = model(tokens, tokens), model(tokens)
    assert set(types) == {(torch.bfloat16, torch.bfloat16)} and loss.dtype == logits.dtype == torch.float32


def test_sixteen_bits_learn_as_32_do(monkeypatch):
    """The model of four layers and width 256 in bfloat16, as a run has it, and in float32: see test_training.py."""
    k = replace(train.FULL, DEPTH=4, HEAD_DIM=64, TOTAL_BATCH=16 * 256)
    half = learning_curve(k, 512, 256, 300, CUDA, tables=torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    full = learning_curve(k, 512, 256, 300, CUDA)
    agree(half, full, 512)


# -----------------------------------------------------------------------------
# Loader


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "without waiting for the event"])
def test_a_slow_stream_is_never_overtaken(monkeypatch, waits):
    if not waits:
        monkeypatch.setattr(prepare, "copy_to_gpu", without_waiting(prepare.copy_to_gpu))
    sleep = partial(torch.cuda._sleep, 1_000_000_000)  # clock ticks, half a second: every later copy waits behind it
    assert arrives_as_packed(CUDA, torch.cuda.synchronize, sleep) == waits
