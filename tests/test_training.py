"""Training without a data set: warm-up, steps, what ends a run, compilation."""

import gc
import itertools
import math
import runpy
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import run_python

import prepare
import train

V, T, CPU = 32, 8, torch.device("cpu")
TINY = replace(train.FULL, DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, N_KV_HEAD=1, VE_GATE_CHANNELS=8, TOTAL_BATCH_SIZE=4 * T)

pytestmark = pytest.mark.usefixtures("one_thread", "float32")


@pytest.fixture(autouse=True)
def garbage_collector():
    """`train` turns it off, and leaves it off where it raises an error: the process ends there."""
    yield
    gc.enable()
    gc.unfreeze()


def build(seed=0):
    torch.manual_seed(seed)
    return train.Run(TINY, V, T, CPU, train.sdpa_attention)


def losses(monkeypatch, seed=0, steps=12, warm_up=False, change=lambda n, loss: loss):
    """Train by a clock whose time is steps. Returns the loss of each micro-batch; `change` replaces the n-th."""
    torch.manual_seed(seed)
    if warm_up:
        train.warm_up(partial(build, seed), TINY, V, T, CPU)
    run, seen = build(seed), []

    def watch(module, inputs, loss):
        seen.append(loss.item())
        return change(len(seen), loss)

    run.model.register_forward_hook(watch)
    clock = SimpleNamespace(progress=lambda: len(seen) / (2 * steps), seconds=lambda: 0.0)
    clock.time_is_up = lambda: clock.progress() == 1
    monkeypatch.setattr(train, "clock", clock)
    # Tokens from torch's global random state: whoever draws from it changes what is learned
    loader = ((x, x.roll(-1, 1), 1) for x in iter(lambda: torch.randint(V, (2, T)), None))
    assert train.train(run, loader, 2, math.nan) == (steps, steps * TINY.TOTAL_BATCH_SIZE)
    assert len(seen) == 2 * steps and gc.isenabled()
    return seen


def check_that_the_warm_up_leaves_no_trace(config, V, T, device):
    """Whatever the warm-up did to the first model, which is gone, the second has the same weights and random state."""
    models, states = [], []

    def watched_build():
        assert not any(model() for model in models), "the model of an earlier attempt is still in memory"
        run = train.Run(config, V, T, device, train.sdpa_attention)
        models.append(weakref.ref(run.model))
        weights = [p.detach().cpu().clone() for p in run.model.parameters()]
        states.append([*weights, torch.get_rng_state(), *torch.cuda.get_rng_state_all()])
        return run

    torch.manual_seed(3)
    assert train.warm_up(watched_build, config, V, T, device) == 4
    watched_build()
    assert len(states) == 2 and all(map(torch.equal, *states))


def test_every_build_is_the_same_and_only_the_last_one_stays_in_memory():
    check_that_the_warm_up_leaves_no_trace(TINY, V, T, CPU)


def build_with_memory_for(rows, error=None):
    """`build` as on a GPU whose memory holds that many rows."""

    def allocate(module, inputs):
        if len(inputs[0]) > rows:
            raise error or torch.cuda.OutOfMemoryError("CUDA out of memory. As it says it")

    def build_it():
        run = build()
        run.model.register_forward_pre_hook(allocate)
        return run

    return build_it


@pytest.mark.parametrize("rows, most, fit, wanted", [(16, 64, 1, 1), (4, 64, 99, 4), (25, 25, 13, 5), (36, 24, 99, 18)])
def test_the_micro_batch_is_the_largest_divisor_of_the_step_that_fits_the_memory(rows, most, fit, wanted):
    config = replace(TINY, TOTAL_BATCH_SIZE=rows * T, DEVICE_BATCH_SIZE=most)
    assert train.warm_up(build_with_memory_for(fit), config, V, T, CPU) == wanted


@pytest.mark.parametrize(
    "message, smaller_batch_helps",
    [
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`", True),
        ("MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB).", True),
        ("an illegal memory access", False),
        ("OutOfMemoryError: out of resource: triton_tem_fused_0 Required: 118784 Hardware limit: 101376", False),
    ],
)
def test_out_of_memory_in_the_words_of_each_library(message, smaller_batch_helps):
    with nullcontext() if smaller_batch_helps else pytest.raises(RuntimeError, match=r"illegal|out of resource"):
        assert train.warm_up(build_with_memory_for(2, RuntimeError(message)), TINY, V, T, CPU) == 2


@pytest.mark.parametrize(
    "change, fit, message",
    [
        (dict(TOTAL_BATCH_SIZE=100), 64, "multiple of a row, 8 tokens: 96 is one"),
        (dict(TOTAL_BATCH_SIZE=5), 64, "multiple of a row, 8 tokens: 8 is one"),
        (dict(DEVICE_BATCH_SIZE=0), 64, "DEVICE_BATCH_SIZE is 0 rows: it must be 1 or more"),
        (dict(), 0, r"one row.*\(CUDA out of memory. As it says it\)"),
    ],
)
def test_a_batch_that_is_impossible(change, fit, message):
    with pytest.raises(train.TrainingError, match=message):
        train.warm_up(build_with_memory_for(fit), replace(TINY, **change), V, T, CPU)


@pytest.mark.parametrize("rows, budget, steps", [(64, 24, 48), (64, 26, None), (1, 49, 49), (1, 51, None)])
def test_a_run_of_few_steps_is_told(monkeypatch, capsys, rows, budget, steps):
    """A pass of the warm-up takes half a second. It has at most two micro-batches, of `rows` of the four rows."""
    now = itertools.count(step=0.5)
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    train.warm_up(build, replace(TINY, DEVICE_BATCH_SIZE=rows), V, T, CPU, budget)
    said = capsys.readouterr().out
    assert said == "" if steps is None else f"note: about {steps} steps fit: lower TOTAL_BATCH_SIZE" in said


def test_four_micro_batches_equal_one_batch():
    x = torch.randint(V, (8, T), generator=torch.Generator().manual_seed(1))
    after = []
    for grad_accum_steps in (0, 1, 4):
        model = build().model
        for p in model.parameters():
            p.data.normal_(0, 0.3)
        # Plain descent: its step is the gradient. Adam's first step is only the sign, Muon's the orthogonal factor
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = ((part, part.roll(-1, 1), 1) for part in x.chunk(max(1, grad_accum_steps)))
        loss = train.Run.step(SimpleNamespace(compiled_model=model, optimizer=optimizer), loader, grad_accum_steps)
        assert all(p.grad is None for p in model.parameters())
        after.append([*model.parameters(), loss])
    # the same sums of 64 tokens' terms in another order, float32; they are rounded with weights of about 1
    torch.testing.assert_close(after[2], after[1], atol=2e-6, rtol=1e-6)
    assert all((p - start).abs().max() > 1e-4 for p, start in zip(after[1], after[0]))


def test_a_seed_decides_the_loss_curve_and_a_warm_up_does_not(monkeypatch):
    first = losses(monkeypatch, seed=1)
    assert losses(monkeypatch, seed=1, warm_up=True) == first != losses(monkeypatch, seed=2)


# the limit is twice the first loss, 2·ln 32 = 6.93; micro-batch 5 is the first of step 3
@pytest.mark.parametrize(
    "first, factor, message",
    [(5, math.nan, "step 3: .* nan"), (1, math.inf, "step 1: .* inf"), (5, 3.0, r"step 3: .* 10\.\d*, the limit 6\.9")],
)
def test_a_loss_that_explodes_ends_the_run_and_names_the_step(monkeypatch, first, factor, message):
    with pytest.raises(train.TrainingError, match=message):
        losses(monkeypatch, change=lambda n, loss: loss * factor if n >= first else loss)
    losses(monkeypatch, change=lambda n, loss: loss * (1 if n <= 2 else 1.5))  # bad, but below the limit


@pytest.mark.parametrize("free", [8, 4, 1])
def test_threads_are_as_many_as_make_a_step_quickest(monkeypatch, free):
    used, spent = [], Counter()
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    threads = train.quickest_threads(8)
    next(threads)
    for _ in range(5000):
        seconds = 0.1 / used[-1] * max(1, used[-1] / free) ** 2  # of a step, the fewest with `free` threads
        spent[used[-1]] += seconds
        threads.send(seconds)
    assert spent[free] > 0.6 * spent.total() and set(used) <= {1, 2, 4, 8}


def test_a_file_gets_the_first_step_and_each_tenth_of_the_time(monkeypatch, capsys):
    losses(monkeypatch, steps=20)
    assert capsys.readouterr().out.count("step") == 11


@pytest.mark.parametrize(
    "error, said",
    [
        (prepare.PrepareError("in one line"), "^train.py: error: in one line$"),
        (prepare.EvaluationError("in one line"), "^train.py: error: in one line$"),
        (NotImplementedError("'aten::new' is not for the MPS device. If so"), "^(?!.*If).*'aten::new'.*DEVICE=cpu"),
        (NotImplementedError("a method of a class"), "^a method of a class$"),
    ],
)
def test_an_error_ends_the_run_in_one_line(monkeypatch, error, said):
    monkeypatch.setattr(prepare, "start_run", Mock(side_effect=error))
    with pytest.raises(NotImplementedError if "method" in said else SystemExit, match=said):
        runpy.run_path(train.__file__, run_name="__main__")


IMPORT = """
import random, socket, torch
socket.socket.connect = socket.create_connection = socket.getaddrinfo = None  # an import that calls one fails
before = torch.get_rng_state(), random.getstate()
import train
assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
"""


def test_importing_does_nothing(tmp_path):
    done = run_python("-c", IMPORT, cache=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools")
def test_nothing_is_compiled_after_the_warm_up(cache):
    """The second build, the loader's batches, schedules, steps, evaluation: the compiler's counters stay the same.

    With backend "eager", the compiler's front end alone, which decides on recompilation. There is no graph break."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    tokenizer, T = prepare.Tokenizer.from_directory(), prepare.MAX_SEQ_LEN
    V = tokenizer.get_vocab_size()
    config = replace(TINY, DEPTH=3, TOTAL_BATCH_SIZE=8 * T, DEVICE_BATCH_SIZE=4)
    compiled = partial(torch.compile, backend="eager", dynamic=False)
    build = partial(train.Run, config, V, T, CPU, train.sdpa_attention, compiled)
    batch_size = train.warm_up(build, config, V, T, CPU)
    before = dict(counters["stats"]), dict(counters["frames"])
    assert before[0]["unique_graphs"] > 3  # model for training and for evaluation, Muon, AdamW
    run = build()
    loader = prepare.make_dataloader(tokenizer, batch_size, T, "train")
    for step in range(3):
        train.set_schedules(run.optimizer, config, step / 3, step)
        run.step(loader, 2)
    prepare.evaluate_bpb(run.compiled_model, tokenizer, batch_size)
    run.step(loader, 2)
    assert (dict(counters["stats"]), dict(counters["frames"])) == before
    assert not counters["graph_break"]
