"""The loop without a data set: warm-up leaves no trace, accumulation is exact, a seed decides all, blow-ups end it."""

import gc
import math
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import prepare
import train

V, T, CPU = 32, 8, torch.device("cpu")
TINY = replace(train.FULL, DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, VE_GATE_CHANNELS=8, TOTAL_BATCH=4 * T)  # width 16


pytestmark = pytest.mark.usefixtures("one_thread")


def make(seed=0, k=TINY):
    torch.manual_seed(seed)
    model = train.GPT(k, V, T, train.sdpa_attention)
    return model, train.make_optimizer(model, k)


def random_batches(rows):
    """A loader of random tokens from torch's own random state: who touches that, changes what is learned."""
    while True:
        x = torch.randint(V, (rows, T))
        yield x, x.roll(-1, 1), 0


class StepClock:
    """A clock whose time is steps: `train` asks once before each whether time is up."""

    def __init__(self, steps):
        self.steps, self.done = steps, -1

    def time_is_up(self):
        self.done += 1
        return self.done == self.steps

    def progress(self):
        return self.done / self.steps

    def seconds(self):
        return float(self.done)


def losses(monkeypatch, seed=0, steps=12, warm=False, spoil=lambda step, loss: loss):
    """Train for some steps from a seed; the loss of each micro-batch."""
    model, optimizer = make(seed)
    seen = []
    if warm:
        train.warm_up(model, model, optimizer, TINY, V, T, CPU)

    def forward(x, y):
        loss = model(x, y)
        seen.append(loss.item())
        return spoil(len(seen), loss)

    monkeypatch.setattr(train, "clock", StepClock(steps))
    done = train.train(forward, optimizer, random_batches(2), TINY, 2, V, 1.0, math.nan)
    assert done == steps and len(seen) == 2 * steps
    return seen


# -----------------------------------------------------------------------------
# Warm-up


def snapshot(model, optimizer):
    """All that a run could tell a warm-up by."""
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    weights = [p.detach().clone() for p in (*model.parameters(), *model.buffers())]
    return weights, groups, [p.grad for p in model.parameters()], len(optimizer.state), torch.get_rng_state()


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return all(map(same, a, b)) if isinstance(a, (list, tuple)) and len(a) == len(b) else a == b


def use(model, optimizer):
    """Move everything that put_back is to put back."""
    batches = random_batches(3)
    for step in range(3):
        train.set_schedules(optimizer, TINY, 0.9, 200 + step)
        train.train_step(model, optimizer, lambda: next(batches)[:2], 2)
    model(*next(batches)[:2]).backward()  # gradients left behind


def test_put_back():
    model, optimizer = make()
    before = snapshot(model, optimizer)
    with train.put_back(model, optimizer):
        use(model, optimizer)
        during = snapshot(model, optimizer)
    assert same(snapshot(model, optimizer), before)
    for part, other in zip(during, before):  # each of the five had been moved
        assert not same(part, other)


def test_put_back_heeds_buffers():
    """The baseline's never change; a running mean that an experiment adds would."""
    model, optimizer = make()
    model.register_buffer("mean", torch.ones(3))
    before = snapshot(model, optimizer)
    with train.put_back(model, optimizer):
        model.mean.mul_(2)
        assert not same(snapshot(model, optimizer), before)
    assert same(snapshot(model, optimizer), before)


def test_put_back_after_an_error():
    model, optimizer = make()
    before = snapshot(model, optimizer)
    with pytest.raises(MemoryError), train.put_back(model, optimizer):
        use(model, optimizer)
        raise MemoryError
    assert same(snapshot(model, optimizer), before)


def test_a_run_after_warm_up_is_the_run_without(monkeypatch):
    assert losses(monkeypatch, warm=True) == losses(monkeypatch)


@pytest.mark.parametrize("total, wanted", [(100, 96), (5, 8)])
def test_a_step_that_is_no_whole_number_of_rows(total, wanted):
    model, optimizer = make()
    with pytest.raises(train.TrainingError, match=f"TOTAL_BATCH {total} .* 8 tokens: {wanted} is"):
        train.warm_up(model, model, optimizer, replace(TINY, TOTAL_BATCH=total), V, T, CPU)


def with_memory_for(model, fits, error=torch.cuda.OutOfMemoryError("as the allocator says it")):  # noqa: B008
    """The model on a GPU that holds that many rows at once."""

    def forward(x, y=None):
        if len(x) > fits:
            raise error
        return model(x, y)

    return forward


@pytest.mark.parametrize("rows, most, fits, micro", [(16, 8, 99, 8), (16, 16, 5, 4), (16, 64, 1, 1), (4, 64, 99, 4)])
def test_the_micro_batch_fits_itself_to_the_memory(rows, most, fits, micro):
    model, optimizer = make()
    before = snapshot(model, optimizer)
    k = replace(TINY, TOTAL_BATCH=rows * T, MAX_MICRO_BATCH=most)
    assert train.warm_up(model, with_memory_for(model, fits), optimizer, k, V, T, CPU) == micro
    assert same(snapshot(model, optimizer), before) and model.training


@pytest.mark.parametrize("rows, most, fits", [(25, 25, 13), (12, 12, 5), (7, 7, 4), (36, 24, 99)])
def test_the_step_stays_whole_whatever_fits(rows, most, fits):
    model, optimizer = make()
    k = replace(TINY, TOTAL_BATCH=rows * T, MAX_MICRO_BATCH=most)
    micro = train.warm_up(model, with_memory_for(model, fits), optimizer, k, V, T, CPU)
    assert micro <= min(most, fits) and rows % micro == 0


@pytest.mark.parametrize(
    "says",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "No valid triton configs. OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
        "Triton Error [CUDA]: out of memory",
        "CUDA error: out of memory",
    ],
)
def test_libraries_run_out_of_memory_in_their_own_words(says):
    model, optimizer = make()
    forward = with_memory_for(model, 2, RuntimeError(says))
    assert train.warm_up(model, forward, optimizer, TINY, V, T, CPU) == 2


def test_another_error_is_not_taken_for_too_little_memory():
    model, optimizer = make()
    forward = with_memory_for(model, 2, RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        train.warm_up(model, forward, optimizer, TINY, V, T, CPU)


def test_too_little_memory_for_one_row():
    model, optimizer = make()
    with pytest.raises(train.TrainingError, match=r"one row.*\(as the allocator says it\)"):
        train.warm_up(model, with_memory_for(model, 0), optimizer, TINY, V, T, CPU)


# -----------------------------------------------------------------------------
# Steps


def test_four_micro_batches_are_one_batch():
    torch.manual_seed(1)
    x = torch.randint(V, (8, T))
    y = x.roll(-1, 1)
    after = []
    for micro_steps in (1, 4):
        model, _ = make()
        for p in model.parameters():
            p.data.normal_(0, 0.3)
        start = [p.detach().clone() for p in model.parameters()]
        # Plain descent: the step is the gradient itself. Adam's first step is its sign, Muon's its orthogonal factor
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        parts = zip(x.chunk(micro_steps), y.chunk(micro_steps))
        loss = train.train_step(model, optimizer, partial(next, parts), micro_steps)
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


def test_the_collector_is_on_again_after_training(monkeypatch):
    losses(monkeypatch, steps=1)
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("factor, says", [(math.nan, "nan"), (math.inf, "inf"), (3.0, "beyond 6.9")])
def test_a_loss_that_explodes_ends_the_run_and_says_at_which_step(monkeypatch, factor, says):
    # 2·ln 32 = 6.93, of which a loss of 3.4 is half; micro-batch 5 is the first of step 3
    with pytest.raises(train.TrainingError, match=f"step 3: .*{says}"):
        losses(monkeypatch, spoil=lambda n, loss: loss * factor if n >= 5 else loss)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_bad_loss_below_the_limit_does_not_end_it(monkeypatch):
    losses(monkeypatch, spoil=lambda n, loss: loss * 1.5)


# -----------------------------------------------------------------------------
# Precision


def sentences(V, T, rows):
    """Batches that can be learned: nine tokens of ten follow from the two before them."""
    dice = torch.Generator().manual_seed(1)
    follow = torch.randint(V, (16, 16), generator=dice)
    while True:
        x = torch.randint(V, (rows, T + 1), generator=dice)
        chance = torch.rand(rows, T + 1, generator=dice) < 0.1
        for t in range(2, T + 1):
            x[:, t] = torch.where(chance[:, t], x[:, t], follow[x[:, t - 1] % 16, x[:, t - 2] % 16])
        yield x[:, :-1], x[:, 1:]


def learning_curve(k, V, T, steps, device, tables=torch.float32, around=nullcontext):
    """The loss of each step, with the token tables held in that type and each pass inside `around()`."""
    torch.manual_seed(0)
    with device:
        model = train.GPT(k, V, T, train.sdpa_attention)
    for table in (model.wte, *model.value_embeds.values()):
        table.to(tables)
    optimizer, batches, curve = train.make_optimizer(model, k), sentences(V, T, k.TOTAL_BATCH // T), []

    def forward(x, y):
        with around():
            return model(x.to(device), y.to(device))

    for step in range(steps):
        train.set_schedules(optimizer, k, step / steps, step)
        curve.append(train.train_step(forward, optimizer, lambda: next(batches), 1).item())
    return curve


def agree(half, full, V):
    """The mean loss of the last 50 steps agrees to 2 % of what was learned, and more than 1 nat was."""
    ends = [sum(curve[-50:]) / 50 for curve in (half, full)]
    learned = math.log(V) - ends[1]
    print(f"bfloat16 {ends[0]:.4f}, float32 {ends[1]:.4f}, learned {learned:.3f} nats")
    assert half != full and learned > 1
    assert abs(ends[0] - ends[1]) < 0.02 * learned


def test_sixteen_bits_learn_as_32_do():
    """300 steps with autocast and tables in bfloat16, as a GPU takes them, against float32.

    They differ by 0.002 of 3.3 nats learned, and 2 % of these are 0.065: it is gross faults that this catches, a sum or
    an optimizer's state that 16 bits don't hold.
    """
    k = replace(TINY, ASPECT_RATIO=32, HEAD_DIM=32, TOTAL_BATCH=16 * 32)
    full = learning_curve(k, 64, 32, 300, CPU)
    half = learning_curve(k, 64, 32, 300, CPU, torch.bfloat16, lambda: torch.autocast("cpu", torch.bfloat16))
    agree(half, full, 64)


# -----------------------------------------------------------------------------
# Accounting, import


def test_peak_flops_of_a_cpu_is_nan():
    assert math.isnan(train.peak_flops(CPU))


@pytest.mark.parametrize(
    "name, teraflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA A10G", math.nan),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", math.nan),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", math.nan),
        ("NVIDIA GeForce RTX 3090 Ti", math.nan),
        ("NVIDIA GeForce GTX 1080", math.nan),
    ],
)
def test_peak_flops_by_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    assert train.peak_flops(torch.device("cuda")) == pytest.approx(teraflops * 1e12, nan_ok=True)


IMPORT = """
import socket
def away(*_, **__):
    raise AssertionError("import reached for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = away
import random, torch
before = torch.get_rng_state(), random.getstate()
import train
assert not torch.cuda.is_initialized()
assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
assert train.flops_per_token and train.main
"""


def test_importing_does_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=Path(train.__file__).parent,
        env=os.environ | {"AUTORESEARCH_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools")
def test_nothing_is_compiled_after_the_warm_up(cache):
    """The loader's batches, changing schedules, both optimizer steps, evaluation: the compiler's counter stands still.

    With the compiler's front end alone (backend "eager"), which is what decides on recompilation. It finds no break.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    tokenizer, T = prepare.Tokenizer.from_directory(), prepare.MAX_SEQ_LEN
    V = tokenizer.get_vocab_size()
    k = replace(TINY, DEPTH=3, TOTAL_BATCH=8 * T, MAX_MICRO_BATCH=4)
    compiled = partial(torch.compile, backend="eager", dynamic=False)
    model = train.GPT(k, V, T, train.sdpa_attention)
    optimizer = train.make_optimizer(model, k, compiled)
    forward = compiled(model)
    micro = train.warm_up(model, forward, optimizer, k, V, T, CPU)
    before = dict(counters["stats"]), dict(counters["frames"])
    assert before[0]["unique_graphs"] > 3  # model for training and for evaluation, Muon, AdamW
    loader = prepare.make_dataloader(tokenizer, micro, T, "train")
    for step in range(3):
        train.set_schedules(optimizer, k, step / 3, step)
        train.train_step(forward, optimizer, lambda: next(loader)[:2], 2)
    prepare.evaluate_bpb(forward, tokenizer, micro)
    train.train_step(forward, optimizer, lambda: next(loader)[:2], 2)
    assert (dict(counters["stats"]), dict(counters["frames"])) == before
    assert not counters["graph_break"]


@pytest.fixture
def compiler_as_it_was(monkeypatch):
    """What `compiler()` sets is put back after the test."""
    import torch._dynamo.config as dynamo
    import torch._inductor.config as inductor

    monkeypatch.setenv("USER", os.environ.get("USER", "somebody"))
    with dynamo.patch(recompile_limit=8), inductor.patch(unsafe_marked_cacheable_functions={}):
        yield


def test_flex_attentions_backward_is_kept_for_the_next_run(compiler_as_it_was):
    from torch._higher_order_ops.flex_attention import flex_attention_backward

    train.compiler()
    assert flex_attention_backward.cacheable()


def test_many_shapes_are_all_compiled(compiler_as_it_was):
    """PyTorch gives up in silence after eight shapes of one function, and the optimizer has one function for all."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled = train.compiler()(lambda x: x + 1, backend="eager")
    before = counters["stats"]["unique_graphs"]
    for n in range(1, 21):
        compiled(torch.zeros(n))
    assert counters["stats"]["unique_graphs"] - before == 20
