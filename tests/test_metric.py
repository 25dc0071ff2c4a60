"""evaluate_bpb: exact on a model that can be worked out by hand, the same for every batch size, hard to cheat."""

import math
import re
import weakref
from itertools import islice

import pytest
import torch
from test_loader import slow_rows, split_documents

import prepare


@pytest.fixture
def tokenizer(cache):
    return prepare.Tokenizer.from_directory()


class Model(torch.nn.Module):
    """Logits (B, T, V) from a function of x, recording the shapes it was asked for."""

    def __init__(self, V, logits=None):
        super().__init__()
        self.V, self.logits, self.shapes = V, logits, []

    def forward(self, x):
        self.shapes.append(tuple(x.shape))
        return self.logits(x) if self.logits else torch.zeros(*x.shape, self.V)


def embedding_model(V, seed=0):
    """Logits that depend on the token stood at, different for each."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))
    return Model(V, lambda x: table[x])


def validation_rows(tokenizer):
    """The scored rows, packed by the slow packer: lists of T + 1 ids."""
    tokens = prepare.read_tokens("val")
    documents = [document.tolist() for document in split_documents(tokens)]
    count = prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN
    assert count == 64
    rows = islice(slow_rows(tokens, prepare.MAX_SEQ_LEN, passes=1), count)
    return documents, [[int(i) for at, n in row for i in tokens[at : at + n]] for row in rows]


def test_uniform_logits_score_log2_v_times_tokens_over_bytes(tokenizer):
    documents, rows = validation_rows(tokenizer)
    texts = [tokenizer.decode(document[1:]).encode() for document in documents]
    tokens = n_bytes = 0
    bos = tokenizer.get_bos_token_id()
    for row in rows:
        # A row is BOS, text, BOS, text, …: each piece of text is the beginning of a document
        pieces = " ".join(map(str, row)).split(str(bos))[1:]
        for ids in (list(map(int, piece.split())) for piece in pieces):
            text = b"".join(tokenizer.encoding.decode_single_token_bytes(i) for i in ids)
            assert any(document.startswith(text) for document in texts)
            tokens, n_bytes = tokens + len(ids), n_bytes + len(text)
    V = tokenizer.get_vocab_size()
    expected = math.log2(V) * tokens / n_bytes
    # float32 has 24 bits: the logarithm that each token costs is right to 2^-24 of itself
    assert prepare.evaluate_bpb(Model(V), tokenizer, 8) == pytest.approx(expected, rel=2**-23)


def test_the_number_is_the_cross_entropy_of_the_rows(tokenizer):
    _, rows = validation_rows(tokenizer)
    model = embedding_model(tokenizer.get_vocab_size())
    lengths = tokenizer.token_bytes()
    nats = n_bytes = 0.0
    for row in rows:
        logprob = model(torch.tensor(row[:-1])).double().log_softmax(-1)
        for t, target in enumerate(row[1:]):
            if lengths[target]:
                nats -= logprob[t, target].item()
                n_bytes += lengths[target]
    assert prepare.evaluate_bpb(model, tokenizer, 8) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)


def test_batch_size_changes_nothing(tokenizer):
    V = tokenizer.get_vocab_size()
    model = embedding_model(V)
    scores = [prepare.evaluate_bpb(model, tokenizer, batch_size) for batch_size in (1, 3, 7, 64, 100)]
    # the same rows added up in another order, in float64
    assert scores == [pytest.approx(scores[0], rel=1e-12)] * 5
    assert {shape[0] for shape in model.shapes} == {1, 3, 7, 64, 100}  # one shape a batch size: nothing recompiles


def test_a_bfloat16_model_is_scored_in_float32(tokenizer):
    V = tokenizer.get_vocab_size()
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).bfloat16()
    half, single = Model(V, lambda x: table[x]), Model(V, lambda x: table.float()[x])
    assert prepare.evaluate_bpb(half, tokenizer, 8) == prepare.evaluate_bpb(single, tokenizer, 8)


# -----------------------------------------------------------------------------
# Attacks


def peek(x, logits, source):
    """Add to the logits at each place a bonus for the token that stands at `source` of it."""
    return logits + 5 * torch.nn.functional.one_hot(source, logits.size(-1))


def cheats(V):
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
    ahead = lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1)  # noqa: E731
    return {
        "one token ahead": (lambda x: peek(x, table[x], ahead(x)), "not causal"),
        "a little of it": (lambda x: table[x] + 0.01 * torch.nn.functional.one_hot(ahead(x), V), "not causal"),
        "the whole row's mean": (lambda x: table[x] + table[x].mean(dim=1, keepdim=True), "not causal"),
        "the next row": (lambda x: peek(x, table[x], x.roll(-1, dims=0)), "mixes rows"),
        "the batch's mean": (lambda x: table[x] + 0.1 * table[x[:, :1]].mean(dim=0), "mixes rows"),
        "NaN": (lambda x: table[x] * math.nan, "not finite"),
        "NaN now and then": (lambda x: table[x].masked_fill((x == x[0, 5])[..., None], math.nan), "not finite"),
        "beyond float32": (lambda x: table[x].double() * 1e300, "not finite in float32"),
        "infinity for one token": (lambda x: table[x].index_fill(2, torch.tensor(3), -math.inf), "not finite"),
        "too few logits": (lambda x: table[x][..., :-1], "shape (8, 64, 400), it returned torch.float32 (8, 64, 399)"),
        "a loss": (lambda x: torch.tensor(0.1), "shape"),
        "whole numbers": (lambda x: table[x].long(), "floating-point"),
        "a tuple": (lambda x: (table[x], None), "returned tuple"),
    }


@pytest.mark.parametrize("name", cheats(260))
def test_a_model_that_cheats_gets_no_number(tokenizer, name):
    logits, message = cheats(tokenizer.get_vocab_size())[name]
    with pytest.raises(prepare.EvaluationError, match=re.escape(message)):
        prepare.evaluate_bpb(Model(tokenizer.get_vocab_size(), logits), tokenizer, 8)


class Reusing(torch.nn.Module):
    """Looks ahead, and always answers in the same memory: what was kept of the last answer changes with the next."""

    def __init__(self, V):
        super().__init__()
        self.V, self.memory = V, {}

    def forward(self, x):
        memory = self.memory.setdefault(x.shape, torch.empty(*x.shape, self.V))
        ahead = torch.cat([x[:, 1:], x[:, :1]], dim=1)
        return memory.copy_(5 * torch.nn.functional.one_hot(ahead, self.V))


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_one_memory_for_all_answers_hides_nothing(tokenizer, batch_size):
    with pytest.raises(prepare.EvaluationError, match="not causal"):
        prepare.evaluate_bpb(Reusing(tokenizer.get_vocab_size()), tokenizer, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_leak_at_every_tenth_place_is_found(tokenizer, batch_size):
    V = tokenizer.get_vocab_size()

    def tenth(x):
        ahead = torch.cat([x[:, 1:], x[:, :1]], dim=1)
        here = (torch.arange(x.size(1)) % 10 == 9)[:, None]
        return torch.where(here, 5.0 * torch.nn.functional.one_hot(ahead, V), 0.0)

    # Of 63 places 6 show it. With 3 rows a batch 22 places are tried, else 64: an evaluation misses it with a
    # probability of at most (57/63)^22 = 0.11, and six evaluations miss it once in 500,000 times.
    found = 0
    for _ in range(6):
        try:
            prepare.evaluate_bpb(Model(V, tenth), tokenizer, batch_size)
        except prepare.EvaluationError:
            found += 1
    assert found


def test_a_model_that_is_not_deterministic_is_told_so(tokenizer):
    V = tokenizer.get_vocab_size()
    with pytest.raises(prepare.EvaluationError, match="the same input gave other logits"):
        prepare.evaluate_bpb(Model(V, lambda x: torch.randn(*x.shape, V)), tokenizer, 8)


def test_the_bytes_are_those_of_the_prepared_tokenizer(tokenizer):
    class Longer(prepare.Tokenizer):
        def token_bytes(self):
            return 10 * super().token_bytes()

    V = tokenizer.get_vocab_size()
    assert prepare.evaluate_bpb(Model(V), Longer(tokenizer.ranks), 8) == prepare.evaluate_bpb(Model(V), tokenizer, 8)


def test_the_last_evaluation_counts_also_if_it_fails(tokenizer):
    V = tokenizer.get_vocab_size()
    for model in (Model(V), embedding_model(V)):
        assert prepare.evaluate_bpb(model, tokenizer, 8) == prepare.clock.val_bpb
    with pytest.raises(prepare.EvaluationError):
        prepare.evaluate_bpb(Model(V + 1), tokenizer, 8)
    assert prepare.clock.val_bpb is None


def test_a_score_that_is_no_number_is_refused(tokenizer):
    V = tokenizer.get_vocab_size()
    huge = torch.full((V,), -3e38)
    huge[0] = 3e38  # each is finite, their difference is not
    with pytest.raises(prepare.EvaluationError, match="so large"):
        prepare.evaluate_bpb(Model(V, lambda x: huge.expand(*x.shape, V)), tokenizer, 8)


def test_honest_context_is_no_cheat(tokenizer):
    table = torch.randn(tokenizer.get_vocab_size(), 400, generator=torch.Generator().manual_seed(0))
    model = Model(400, lambda x: table[x].cumsum(dim=1) / torch.arange(1, x.size(1) + 1)[:, None])  # all that came
    for batch_size in (1, 2, 8):
        assert prepare.evaluate_bpb(model, tokenizer, batch_size) > 0


def test_the_model_cannot_reach_or_change_the_targets(tokenizer):
    V = tokenizer.get_vocab_size()
    reached = []

    def scribble(x):
        reached.append(x.untyped_storage().nbytes() > x.numel() * x.element_size())
        logits = torch.zeros(*x.shape, V)
        x.zero_()
        return logits

    expected = prepare.evaluate_bpb(Model(V), tokenizer, 8)
    assert prepare.evaluate_bpb(Model(V, scribble), tokenizer, 8) == expected
    assert reached and not any(reached)  # x's memory holds nothing but x


def test_training_mode_is_left_and_given_back(tokenizer):
    modes = []
    model = Model(tokenizer.get_vocab_size())
    model.logits = lambda x: modes.append((model.training, torch.is_grad_enabled())) or torch.zeros(*x.shape, 400)
    assert model.training
    prepare.evaluate_bpb(model, tokenizer, 8)
    assert set(modes) == {(False, False)} and model.training


# -----------------------------------------------------------------------------
# The clock around it


def test_the_clock_runs_from_the_first_batch_to_evaluation(tokenizer, now, capsys):
    loader = prepare.make_dataloader(tokenizer, 2, 64, "train")
    now[0] += 50  # making the loader, compiling
    assert prepare.clock.seconds() == 0 and prepare.clock.progress() == 0
    next(loader)
    now[0] += 0.5
    assert prepare.clock.seconds() == 0.5 and prepare.clock.progress() == pytest.approx(0.5 / 2)
    assert not prepare.clock.time_is_up()
    now[0] += 2
    assert prepare.clock.time_is_up() and prepare.clock.progress() == 1
    prepare.evaluate_bpb(Model(400), tokenizer, 64)
    now[0] += 10
    assert prepare.clock.seconds() == 2.5 and capsys.readouterr().err == ""
    prepare.evaluate_bpb(Model(400), tokenizer, 64)  # whatever was learned between the two
    assert prepare.clock.seconds() == 12.5
    twice = "evaluate_bpb was called twice: the first evaluation counts as training"
    assert f"{twice}. training took 12.5 s of a budget of 2 s" in capsys.readouterr().err
    next(loader)  # learning after an evaluation is on the clock too, as if it had never stopped
    now[0] += 1
    assert prepare.clock.seconds() == 13.5


def test_one_answer_is_held_at_a_time(tokenizer):
    """Logits are the largest tensors of a run: two of them would take more memory than training did."""
    answers, alive = [], []

    class Counting(Model):
        def forward(self, x):
            alive.append(sum(answer() is not None for answer in answers))
            logits = super().forward(x)
            answers.append(weakref.ref(logits))
            return logits

    prepare.evaluate_bpb(Counting(tokenizer.get_vocab_size()), tokenizer, 4)
    assert len(alive) > 16 and set(alive) == {0}


# -----------------------------------------------------------------------------
# An Apple GPU, which has no float64. None is at hand: tensors that were moved to it stay on the CPU under another class


class OnMPS(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to:
            return move(*args, **(kwargs or {}))
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return out


plain_to = torch.Tensor.to


def move(tensor, *args, **kwargs):
    device = kwargs.get("device", args[0] if args else None)
    if not isinstance(device, torch.device):
        return plain_to(tensor, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        kind = OnMPS if device.type == "mps" else torch.Tensor
        return plain_to(tensor, dtype=kwargs.get("dtype", tensor.dtype)).clone().as_subclass(kind)


def test_an_apple_gpu_needs_no_float64(tokenizer, monkeypatch):
    V = tokenizer.get_vocab_size()
    expected = prepare.evaluate_bpb(embedding_model(V), tokenizer, 8)
    waits, seen, model = [], [], embedding_model(V)
    logits = model.logits
    model.logits = lambda x: seen.append(type(x)) or logits(x)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.Tensor, "to", move)
    monkeypatch.setattr(prepare, "work_rate", lambda device: 1.0)
    assert prepare.get_device().type == "mps"
    assert prepare.evaluate_bpb(model, tokenizer, 8) == expected
    assert set(seen) == {OnMPS} and waits
    with pytest.raises(TypeError, match="float64"):  # the stand-in does refuse it
        torch.zeros(2).to(torch.device("mps")).double()


def test_device_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    assert prepare.get_device() == torch.device("cpu")
    monkeypatch.setenv("DEVICE", "tpu")
    with pytest.raises(prepare.PrepareError, match=r"DEVICE='tpu' is not on this machine, which has: .*cpu"):
        prepare.get_device()
