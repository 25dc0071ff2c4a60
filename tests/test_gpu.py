"""What needs a CUDA GPU: `uv run pytest tests/test_gpu.py -s` there. Without one every test is skipped."""

import json
import math
import os
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import run_python
from test_loader import arrives_as_packed
from test_training import check_that_precision_costs_nothing, learning_curve

import prepare
import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not prepare.bfloat16_works(torch.device("cuda")),
        reason="needs a CUDA GPU of compute capability 8 or more",
    ),
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
    """Attention by its definition, in float64."""
    group_size = q.size(2) // k.size(2)
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
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
    except Exception as error:  # no network, no build for this GPU: a run does without it too
        pytest.skip(f"no FlashAttention-3: {type(error).__name__}: {error}")


@pytest.mark.parametrize("n_kv_head", [4, 2])
@pytest.mark.parametrize("name", ["sdpa", "flex", "fa3"])
def test_attention_kernel_against_float64(name, n_kv_head):
    attention = kernel(name)
    torch.manual_seed(0)
    leaves = [
        torch.randn(2, T, heads, D, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        for heads in (4, n_kv_head, n_kv_head)
    ]
    above = torch.randn(2, T, 4, D, device=CUDA, dtype=torch.bfloat16)
    # bfloat16 keeps 8 bits: inputs and results of order 1 to 4 are off by up to 2^-7, weights are rounded too. One key
    # more or less changes some output by more than 0.1 where the window is shorter than 100 keys.
    tolerance = dict(atol=0.03, rtol=0.02)
    for window in WINDOWS:
        got, wanted = attention(*leaves, window), reference(*leaves, window)
        assert got.shape == wanted.shape and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), wanted, **tolerance)
        for one, other in zip(torch.autograd.grad(got, leaves, above), torch.autograd.grad(wanted, leaves, above)):
            torch.testing.assert_close(one.double(), other.double(), **tolerance)
    off_by_one = reference(*leaves, 18)
    assert (off_by_one - reference(*leaves, 17)).abs().max() > 0.1


def test_pick_attention():
    name, _, reason = train.pick_attention(T, WINDOWS, D, CUDA)
    assert name in ("fa3", "flex") and reason
    print(f"attention: {name} ({reason})")


# -----------------------------------------------------------------------------
# Whole runs: the real model, loader, clock and evaluation, small

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
    seen["graphs"] = counters["stats"]["unique_graphs"]
    return batch_size

def report(val_bpb, **values):
    print(json.dumps(values | {
        "val_bpb": val_bpb,
        "warm_graphs": seen["graphs"],
        "graphs": counters["stats"]["unique_graphs"],
        "compiled": counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
        "expandable": all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot()),
        "seconds_outside": time.monotonic() - began - prepare.clock.seconds(),
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


def test_the_second_run_uses_the_compilers_cache(runs):
    first, second = runs
    assert first["compiled"] > 0 and second["compiled"] == 0
    assert second["seconds_outside"] < first["seconds_outside"]


def test_memory_segments_are_expandable(runs):
    assert all(run["expandable"] for run in runs)


def test_the_runs_learn(runs):
    for run in runs:
        assert run["num_steps"] > 20 and 0.1 < run["val_bpb"] < 4
    # the same seed and weights: atomic additions in the kernels and the clock make the difference
    assert runs[0]["val_bpb"] == pytest.approx(runs[1]["val_bpb"], rel=0.05)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_visible_devices_picks_one(session_cache, tmp_path):
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    for index in (0, 1):
        run = watched_run(session_cache, tmp_path, CUDA_VISIBLE_DEVICES=visible[index])
        assert run["uuid"] == str(torch.cuda.get_device_properties(index).uuid)


# -----------------------------------------------------------------------------
# Warm-up and memory


def test_the_warm_up_leaves_no_trace():
    """The model that trains has the weights and the random state that it would have without a warm-up."""
    config, models, states = replace(train.FULL, DEPTH=2, TOTAL_BATCH_SIZE=2**14, DEVICE_BATCH_SIZE=4), [], []

    def build():
        assert not any(model() for model in models), "the model of the warm-up is still in memory"
        run = train.Run(config, 8192, 2048, CUDA, train.sdpa_attention)
        models.append(weakref.ref(run.model))
        states.append([p.detach().cpu() for p in run.model.parameters()])
        states[-1] += [torch.get_rng_state(), torch.cuda.get_rng_state()]
        return run

    torch.manual_seed(3)
    assert train.warm_up(build, config, 8192, 2048, CUDA) == 4
    build()
    assert len(states) == 2 and all(map(torch.equal, *states))


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
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    done = run_python("-c", FIT, gigabytes, timeout=600, CUDA_VISIBLE_DEVICES=visible)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] == config.TOTAL_BATCH_SIZE and found["peak"] <= gigabytes
    assert found["losses"][1] < found["losses"][0]
    assert found["batch_size"] == config.DEVICE_BATCH_SIZE >> done.stdout.count("out of memory with")  # halved


# -----------------------------------------------------------------------------
# Precision


def test_the_residual_stream_has_16_bits():
    config = replace(train.FULL, DEPTH=2)
    model = train.Run(config, 32, 8, CUDA, train.sdpa_attention).model
    types = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: types.append((inputs[0].dtype, output.dtype)))
    tokens = torch.zeros(2, 8, dtype=torch.long, device=CUDA)
    loss, logits = model(tokens, tokens), model(tokens)
    assert set(types) == {(torch.bfloat16, torch.bfloat16)} and loss.dtype == logits.dtype == torch.float32


def test_bfloat16_learns_as_much_as_float32(monkeypatch):
    """The model of four layers and width 256 in bfloat16, as a run has it, and in float32: see test_training.py."""
    config = replace(train.FULL, DEPTH=4, HEAD_DIM=64, TOTAL_BATCH_SIZE=16 * 256)
    half = learning_curve(config, 512, 256, 300, CUDA, embeddings=torch.bfloat16)
    monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    full = learning_curve(config, 512, 256, 300, CUDA)
    check_that_precision_costs_nothing(half, full, 512)


# -----------------------------------------------------------------------------
# Loader


class OwnBuffer:
    """Pinned memory that is written again although a copy from it may be pending: the classic fault."""

    def __init__(self):
        self.buffers, self.count = {}, 0

    def empty(self, shape, dtype, pin_memory):
        self.count += 1
        if pin_memory and self.count > prepare.PREFETCH:
            return self.buffers[self.count % prepare.PREFETCH]
        self.buffers[self.count % prepare.PREFETCH] = EMPTY(shape, dtype=dtype, pin_memory=pin_memory)
        return self.buffers[self.count % prepare.PREFETCH]


EMPTY = torch.empty


@pytest.mark.parametrize("waits", [True, False], ids=["as it is", "with buffers of its own"])
def test_a_slow_stream_is_never_overtaken(monkeypatch, waits):
    """prepare.py relies on PyTorch, which gives pinned memory to a new batch only after the copy from it was made."""
    if not waits:
        own = OwnBuffer()
        monkeypatch.setattr(
            prepare.torch, "empty", lambda *a, **k: own.empty(*a, **k) if "pin_memory" in k else EMPTY(*a, **k)
        )
    sleep = partial(torch.cuda._sleep, 1_000_000_000)  # clock ticks, half a second: every later copy waits behind it
    assert arrives_as_packed(CUDA, sleep) == waits
