"""Training without a data set: warm-up, steps, what ends a run, precision, what MPS lacks, MFU, compilation."""

import gc
import itertools
import math
import os
import platform
import runpy
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import run_python, train_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import prepare
import train

V, T, CPU = 32, 8, torch.device("cpu")
TINY = replace(train.FULL, DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, VE_GATE_CHANNELS=8, TOTAL_BATCH_SIZE=4 * T)  # width 16


pytestmark = pytest.mark.usefixtures("one_thread", "float32")


@pytest.fixture(autouse=True)
def garbage_collector():
    """`train` turns it off, and leaves it off where it raises an error: the process ends there."""
    yield
    gc.enable()
    gc.unfreeze()


def build(config=TINY, seed=0):
    torch.manual_seed(seed)
    return train.Run(config, V, T, CPU, train.sdpa_attention)


def random_batches(rows):
    """A loader of random tokens from torch's global random state: whoever draws from it changes what is learned."""
    while True:
        x = torch.randint(V, (rows, T))
        yield x, x.roll(-1, 1), 1


class StepClock:
    """A clock whose time is steps: before each step `train` asks once whether the time is up."""

    def __init__(self, steps):
        self.steps, self.done = steps, -1

    def time_is_up(self):
        self.done += 1
        return self.done == self.steps

    def progress(self):
        return self.done / self.steps

    def seconds(self):
        return float(self.done)


def losses(monkeypatch, seed=0, steps=12, warm_up=False, change=lambda n, loss: loss):
    """Train for some steps. Returns the loss of each micro-batch; `change` replaces the n-th."""
    torch.manual_seed(seed)
    if warm_up:
        train.warm_up(partial(build, seed=seed), TINY, V, T, CPU)
    run, seen = build(seed=seed), []
    model = run.compiled_model

    def forward(x, y):
        loss = model(x, y)
        seen.append(loss.item())
        return change(len(seen), loss)

    run.compiled_model = forward

    monkeypatch.setattr(train, "clock", StepClock(steps))
    assert train.train(run, random_batches(2), 2, math.nan) == (steps, steps * TINY.TOTAL_BATCH_SIZE)
    assert len(seen) == 2 * steps and gc.isenabled()
    return seen


# -----------------------------------------------------------------------------
# Warm-up


def test_a_run_after_the_warm_up_equals_a_run_without_it(monkeypatch):
    assert losses(monkeypatch, warm_up=True) == losses(monkeypatch)


def check_that_the_warm_up_leaves_no_trace(config, V, T, device):
    """Whatever the warm-up did to the first model, which is gone, the second has the same weights and random state."""
    models, states = [], []

    def watched_build():
        assert not any(model() for model in models), "the model of an earlier attempt is still in memory"
        run = train.Run(config, V, T, device, train.sdpa_attention)
        models.append(weakref.ref(run.model))
        states.append([*(p.detach().cpu().clone() for p in run.model.parameters()), torch.get_rng_state()])
        if device.type == "cuda":
            states[-1].append(torch.cuda.get_rng_state())
        return run

    torch.manual_seed(3)
    assert train.warm_up(watched_build, config, V, T, device) == 4
    watched_build()
    assert len(states) == 2 and all(map(torch.equal, *states))


def test_every_build_is_the_same_and_only_the_last_one_stays_in_memory():
    check_that_the_warm_up_leaves_no_trace(TINY, V, T, CPU)


@pytest.mark.parametrize("total, possible", [(100, 96), (5, 8)])
def test_a_step_that_is_not_a_whole_number_of_rows(total, possible):
    with pytest.raises(train.TrainingError, match=f"multiple of a row, 8 tokens: {possible} is one"):
        train.warm_up(build, replace(TINY, TOTAL_BATCH_SIZE=total), V, T, CPU)
    with pytest.raises(train.TrainingError, match="DEVICE_BATCH_SIZE is 0 rows: it must be 1 or more"):
        train.warm_up(build, replace(TINY, DEVICE_BATCH_SIZE=0), V, T, CPU)


def build_with_memory_for(rows, error=torch.cuda.OutOfMemoryError("CUDA out of memory. As it says it")):  # noqa: B008
    """`build` as on a GPU whose memory holds that many rows."""

    def build_it():
        run = build()
        model = run.compiled_model

        def forward(x, y=None):
            if len(x) > rows:
                raise error
            return model(x, y)

        run.compiled_model = forward
        return run

    return build_it


@pytest.mark.parametrize("rows, most, fit, wanted", [(16, 64, 1, 1), (4, 64, 99, 4), (25, 25, 13, 5), (36, 24, 99, 18)])
def test_the_micro_batch_is_the_largest_divisor_of_the_step_that_fits_the_memory(rows, most, fit, wanted):
    config = replace(TINY, TOTAL_BATCH_SIZE=rows * T, DEVICE_BATCH_SIZE=most)
    assert train.warm_up(build_with_memory_for(fit), config, V, T, CPU) == wanted


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 8.00 GB, other allocations: 1.00 GB, max allowed: 9.07 GB).",
    ],
)
def test_out_of_memory_in_the_words_of_each_library(message):
    assert train.warm_up(build_with_memory_for(2, RuntimeError(message)), TINY, V, T, CPU) == 2


SHARED = "out of resource: triton_tem_fused_0 Required: 118784 Hardware limit: 101376 Reducing block sizes may help."


@pytest.mark.parametrize("message", ["an illegal memory access", f"No valid configs. OutOfMemoryError: {SHARED}"])
def test_another_error_is_not_taken_for_out_of_memory(message):
    with pytest.raises(RuntimeError, match=r"illegal|out of resource"):
        train.warm_up(build_with_memory_for(2, RuntimeError(message)), TINY, V, T, CPU)


@pytest.mark.parametrize("rows, budget, steps", [(64, 24, 48), (64, 26, None), (1, 49, 49), (1, 51, None)])
def test_a_run_of_few_steps_is_told(monkeypatch, capsys, rows, budget, steps):
    """A pass of the warm-up takes half a second. It has at most two micro-batches, of `rows` of the four rows."""
    now = itertools.count(step=0.5)
    monkeypatch.setattr(train.time, "monotonic", lambda: next(now))
    train.warm_up(build, replace(TINY, DEVICE_BATCH_SIZE=rows), V, T, CPU, budget)
    said = capsys.readouterr().out
    assert said == "" if steps is None else f"note: about {steps} steps fit: lower TOTAL_BATCH_SIZE" in said


def test_out_of_memory_with_one_row():
    with pytest.raises(train.TrainingError, match=r"one row.*\(CUDA out of memory. As it says it\)"):
        train.warm_up(build_with_memory_for(0), TINY, V, T, CPU)


# -----------------------------------------------------------------------------
# Steps


def test_four_micro_batches_equal_one_batch():
    torch.manual_seed(1)
    x = torch.randint(V, (8, T))
    y = x.roll(-1, 1)
    after = []
    for grad_accum_steps in (1, 4):
        model = build().model
        for p in model.parameters():
            p.data.normal_(0, 0.3)
        start = [p.detach().clone() for p in model.parameters()]
        # Plain descent: its step is the gradient. Adam's first step is only the sign, Muon's the orthogonal factor
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loader = zip(x.chunk(grad_accum_steps), y.chunk(grad_accum_steps), itertools.count())
        loss = train_step(model, optimizer, loader, grad_accum_steps)
        assert all(p.grad is None for p in model.parameters())
        after.append((loss, [p - before for p, before in zip(model.parameters(), start)]))
    (loss, steps), (loss_of_four, steps_of_four) = after
    # the same sums of 64 tokens' terms in another order, float32; steps are rounded with weights of about 1
    torch.testing.assert_close(loss_of_four, loss, atol=0, rtol=1e-6)
    for a, b in zip(steps_of_four, steps):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)
        assert b.abs().max() > 1e-4


def test_a_seed_decides_the_loss_curve(monkeypatch):
    first = losses(monkeypatch, seed=1)
    assert losses(monkeypatch, seed=1) == first
    assert losses(monkeypatch, seed=2) != first


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
    assert capsys.readouterr().out.count("step") == train.LOG_LINES == 10
    monkeypatch.setattr(train.sys.stdout, "isatty", lambda: True, raising=False)
    losses(monkeypatch, steps=5)
    text = capsys.readouterr().out
    assert text.count("step") == 5 and text.count("\033[F\033[K") == 4


# -----------------------------------------------------------------------------
# MPS


class LikeMPS(TorchDispatchMode):
    """Refuses what MPS lacks: tensors of float64, and pinned memory. It also counts the operations."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        out = func(*args, **(kwargs or {}))
        assert "pin_memory" not in str(func) and not (kwargs or {}).get("pin_memory"), func
        for tensor in tree_iter((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype not in (torch.float64, torch.complex128), func
        return out


def test_a_run_uses_neither_float64_nor_pinned_memory():
    config = replace(TINY, N_KV_HEAD=1)
    with LikeMPS() as mode:
        parts = partial(build, config)
        train.warm_up(parts, config, V, T, CPU)
        run = parts()
        for step in range(3):
            train.set_schedules(run.optimizer, config, step / 3, step)
            run.step(random_batches(2), 2)
        run.compiled_model(torch.zeros(2, T, dtype=torch.long))
        with pytest.raises(AssertionError):  # the stand-in does refuse it
            torch.ones(2, dtype=torch.float64)
    assert mode.calls > 1000


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

    def start_run():
        raise error

    monkeypatch.setattr(prepare, "start_run", start_run)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(train.__file__, run_name="__main__")
    return caught.value.code


def test_an_operation_that_mps_lacks_ends_the_run_in_one_line(monkeypatch):
    message = "The operator 'aten::new' is not currently implemented for the MPS device. If you want this op, comment"
    said = run_train_py(monkeypatch, NotImplementedError(message))
    assert "DEVICE=cpu" in said and message.partition(".")[0] in said and "If you want" not in said
    with pytest.raises(NotImplementedError, match="a method of a class"):
        run_train_py(monkeypatch, NotImplementedError("a method of a class"))
    for error in (prepare.PrepareError, prepare.EvaluationError):
        assert run_train_py(monkeypatch, error("in one line")) == "train.py: error: in one line"


# -----------------------------------------------------------------------------
# MFU, import, compilation


def test_peak_flops_by_name(monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 80GB HBM3 MIG 3g.40gb": math.nan}
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        assert train.peak_flops(torch.device("cuda")) == pytest.approx(flops, nan_ok=True)
        assert math.isnan(train.peak_flops(torch.device("mps")))


IMPORT = """
import socket
def no_network(*_, **__):
    raise AssertionError("import uses the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
import random, torch
before = torch.get_rng_state(), random.getstate()
import train
assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
"""


BEFORE_TORCH = """
import os, sys
names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "GOMP_SPINCOUNT"
for name in names:
    os.environ[name] or os.environ.pop(name)
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            sys.exit(" ".join(os.environ.get(name, "") for name in names))
sys.meta_path.insert(0, Watch)
import train
"""


@pytest.mark.parametrize(
    "own, spin, wanted, spins", [("", "", "expandable_segments:True", "3000"), ("max_split_size_mb:64", "7") * 2]
)
def test_settings_that_pytorch_reads_when_it_is_imported(own, spin, wanted, spins):
    done = run_python("-c", BEFORE_TORCH, PYTORCH_ALLOC_CONF="", PYTORCH_CUDA_ALLOC_CONF=own, GOMP_SPINCOUNT=spin)
    assert done.stderr.split() == [wanted, wanted, spins]


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
    done = run_python("-c", FAULTS, THP_MEM_ALLOC_ENABLE="0")
    before, after = map(int, done.stdout.split())
    assert before > 1000 and after < before / 10


def test_importing_does_nothing(tmp_path):
    done = run_python("-c", IMPORT, cache=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


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


@pytest.fixture
def compiler_settings(monkeypatch):
    """Puts back what `compiler()` sets."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    monkeypatch.setenv("USER", os.environ.get("USER", "somebody"))
    with dynamo.patch(recompile_limit=8), inductor.patch(unsafe_marked_cacheable_functions={}):
        yield


def test_flex_attentions_backward_is_kept_for_the_next_run(compiler_settings):
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    train.compiler()
    assert flex_attention_backward.cacheable()


def test_twenty_shapes_are_all_compiled(compiler_settings):
    """PyTorch gives up without a word after eight shapes of one function, and the optimizer has one for all shapes."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = train.compiler()(lambda x: x + 1, backend="eager")
    before = counters["stats"]["unique_graphs"]
    for n in range(1, 21):
        compiled(torch.zeros(n))
    assert counters["stats"]["unique_graphs"] - before == 20
