"""Training without a data set: warm-up, steps, what ends a run, what MPS lacks, MFU, compilation."""

import gc
import itertools
import math
import os
import platform
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
from conftest import ROOT, run_python, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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


def random_batches(rows):
    """A loader of random tokens from torch's global random state: whoever draws from it changes what is learned."""
    while True:
        x = torch.randint(V, (rows, T))
        yield x, x.roll(-1, 1), 1


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
    assert train.train(run, random_batches(2), 2, math.nan) == (steps, steps * TINY.TOTAL_BATCH_SIZE)
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


# -----------------------------------------------------------------------------
# Steps, and what MPS lacks


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
        loss = train_step(model, optimizer, loader, grad_accum_steps)
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


def test_progress_on_a_terminal_and_in_a_file(monkeypatch, capsys):
    losses(monkeypatch, steps=20)
    assert (
        capsys.readouterr().out.count("step") == train.LOG_LINES + 1 == 11
    )  # the first step, and each tenth of the time
    monkeypatch.setattr(train.sys.stdout, "isatty", lambda: True, raising=False)
    losses(monkeypatch, steps=5)
    text = capsys.readouterr().out
    assert text.count("step") == 5 and text.count("\033[F\033[K") == 4


class LikeMPS(TorchDispatchMode):
    """Refuses what MPS lacks: tensors of float64, and pinned memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert "pin_memory" not in str(func) and not (kwargs or {}).get("pin_memory"), func
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype not in (torch.float64, torch.complex128), func
        return out


def test_a_run_uses_neither_float64_nor_pinned_memory(monkeypatch):
    with LikeMPS():
        losses(monkeypatch, steps=3, warm_up=True)
        with pytest.raises(AssertionError):  # the stand-in does refuse it
            torch.ones(2, dtype=torch.float64)


def test_a_step_mixes_no_devices():
    """On the device "meta", where an operation with a CPU tensor is an error, as on MPS."""
    model = build().model.to("meta")
    optimizer = train.make_optimizer(model, TINY)
    train.set_schedules(optimizer, TINY, 0.5, 1)
    x = torch.zeros(2, T, dtype=torch.long, device="meta")
    for _ in range(2):
        assert train_step(model, optimizer, itertools.repeat((x, x, 1)), 2).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        model(x.cpu())


def run_train_py(monkeypatch, error):
    """What `python train.py` says, or raises, where its run fails so."""
    monkeypatch.setattr(prepare, "start_run", Mock(side_effect=error))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(train.__file__, run_name="__main__")
    return caught.value.code


def test_an_error_ends_the_run_in_one_line(monkeypatch):
    for error in (prepare.PrepareError, prepare.EvaluationError):
        assert run_train_py(monkeypatch, error("in one line")) == "train.py: error: in one line"
    message = "The operator 'aten::new' is not currently implemented for the MPS device. If you want this op, comment"
    said = run_train_py(monkeypatch, NotImplementedError(message))
    assert "DEVICE=cpu" in said and message.partition(".")[0] in said and "If you want" not in said
    with pytest.raises(NotImplementedError, match="a method of a class"):
        run_train_py(monkeypatch, NotImplementedError("a method of a class"))


# -----------------------------------------------------------------------------
# MFU, import, compilation


def test_peak_flops_by_name(monkeypatch):
    for name, flops in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", math.nan)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert train.peak_flops(torch.device("cuda")) == pytest.approx(flops, nan_ok=True)
    assert math.isnan(train.peak_flops(torch.device("mps")))


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


@pytest.mark.parametrize("own", [{}, dict(PYTORCH_CUDA_ALLOC_CONF="a:1", GOMP_SPINCOUNT="7")])
def test_settings_that_pytorch_reads_when_it_is_imported(monkeypatch, tmp_path, own):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "torch.py").write_text(f"import os, sys; sys.exit(' '.join(os.environ[name] for name in {names}))")
    done = run_python("-c", "import train", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}", **own)
    allocator, spin = own.values() or ("expandable_segments:True", "3000")
    assert done.stderr.split() == [allocator, allocator, spin]


FAULTS = """
import resource, torch, train
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(page_faults())
train.keep_freed_memory()
page_faults()  # the blocks find their places, by their alignment
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept_for_the_next_step():
    """64 MiB of ones, five times: 16,384 pages of 4 KiB each time by default, or fewer large ones."""
    before, after = map(int, run_python("-c", FAULTS, THP_MEM_ALLOC_ENABLE="0").stdout.split())
    assert before > 1000 and after < before / 10


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools")
def test_nothing_is_compiled_after_the_warm_up(cache):
    """The second build, the loader's batches, schedules, steps, evaluation: the compiler's counters stay the same.

    With backend "eager", the compiler's front end alone, which decides on recompilation. There is no graph break.
    """
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


def test_the_settings_of_the_compiler(monkeypatch):
    """By default eight shapes of one function are compiled, and FlexAttention's backward anew in every run."""
    from torch._dynamo.utils import counters
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    torch._dynamo.reset()
    monkeypatch.setenv("USER", os.environ.get("USER", "somebody"))  # these three are put back
    cacheable = torch._inductor.config.patch(unsafe_marked_cacheable_functions={})
    with torch._dynamo.config.patch(recompile_limit=8), cacheable:
        compiled = train.compiler()(lambda x: x + 1, backend="eager")
        before = counters["stats"]["unique_graphs"]
        for n in range(1, 21):
            compiled(torch.zeros(n))
        assert counters["stats"]["unique_graphs"] - before == 20
        assert flex_attention_backward.cacheable()
