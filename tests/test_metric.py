"""evaluate_bpb: exact on a model that can be worked out by hand, the same for every batch size, hard to cheat."""

import math
import re
import weakref
from itertools import islice

import pytest
import torch
from test_loader import slow_rows

import prepare

V = 400  # tokens in the vocabulary of the small cache
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))  # logits for each token stood at


@pytest.fixture
def tokenizer(cache):
    tokenizer = prepare.Tokenizer.from_directory()
    assert tokenizer.get_vocab_size() == V
    return tokenizer


class Model(torch.nn.Module):
    """Logits (B, T, V) from a function of x, by default all 0."""

    def __init__(self, logits=None):
        super().__init__()
        self.logits = logits or (lambda x: torch.zeros(*x.shape, V))

    def forward(self, x):
        return self.logits(x)


def validation_rows():
    """The scored rows, packed by the slow packer: lists of T + 1 ids."""
    tokens, T, count = prepare.read_tokens("val"), prepare.MAX_SEQ_LEN, prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN
    assert count == 64
    return [[int(i) for at, n in row for i in tokens[at : at + n]] for row in islice(slow_rows(tokens, T, 1), count)]


def test_uniform_logits_score_log2_v_times_tokens_over_bytes(tokenizer):
    bos = tokenizer.get_bos_token_id()
    ids = [i for row in validation_rows() for i in row[1:] if i != bos]
    n_bytes = sum(len(tokenizer.encoding.decode_single_token_bytes(i)) for i in ids)
    # float32 has 24 bits: the logarithm that each token costs is right to 2^-24 of itself
    expected = pytest.approx(math.log2(V) * len(ids) / n_bytes, rel=2**-23)
    assert prepare.evaluate_bpb(Model(), tokenizer, 8) == expected


def test_the_number_is_the_cross_entropy_of_the_rows(tokenizer):
    lengths = tokenizer.token_bytes()
    nats = n_bytes = 0.0
    for row in validation_rows():
        logprob = TABLE[row[:-1]].double().log_softmax(-1)
        for t, target in enumerate(row[1:]):
            if lengths[target]:
                nats -= logprob[t, target].item()
                n_bytes += lengths[target]
    expected = pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert prepare.evaluate_bpb(Model(lambda x: TABLE[x]), tokenizer, 8) == expected


def test_batch_size_changes_nothing(tokenizer):
    sizes = []
    model = Model(lambda x: sizes.append(len(x)) or TABLE[x])
    scores = [prepare.evaluate_bpb(model, tokenizer, batch_size) for batch_size in (1, 3, 7, 64, 100)]
    # the same rows added up in another order, in float64
    assert scores == [pytest.approx(scores[0], rel=1e-12)] * 5
    assert set(sizes) == {1, 3, 7, 64, 100}  # one shape a batch size: nothing recompiles


def test_a_bfloat16_model_is_scored_in_float32(tokenizer):
    half, single = Model(lambda x: TABLE.bfloat16()[x]), Model(lambda x: TABLE.bfloat16().float()[x])
    assert prepare.evaluate_bpb(half, tokenizer, 8) == prepare.evaluate_bpb(single, tokenizer, 8)


def peek(x, logits, source):
    """Add to the logits at each place a bonus for the token that stands at `source` of it."""
    return logits + 5 * torch.nn.functional.one_hot(source, V)


def ahead(x):
    return torch.cat([x[:, 1:], x[:, :1]], dim=1)


HUGE = torch.full((V,), -3e38).index_fill(0, torch.tensor(0), 3e38)  # each is finite, their difference is not
CHEATS = {
    "one token ahead": (lambda x: peek(x, TABLE[x], ahead(x)), "not causal"),
    "a little of it": (lambda x: TABLE[x] + 0.01 * torch.nn.functional.one_hot(ahead(x), V), "not causal"),
    "the whole row's mean": (lambda x: TABLE[x] + TABLE[x].mean(dim=1, keepdim=True), "not causal"),
    "the next row": (lambda x: peek(x, TABLE[x], x.roll(-1, dims=0)), "mixes rows"),
    "the batch's mean": (lambda x: TABLE[x] + 0.1 * TABLE[x[:, :1]].mean(dim=0), "mixes rows"),
    "NaN": (lambda x: TABLE[x] * math.nan, "not finite"),
    "NaN now and then": (lambda x: TABLE[x].masked_fill((x == x[0, 5])[..., None], math.nan), "not finite"),
    "beyond float32": (lambda x: TABLE[x].double() * 1e300, "not finite in float32"),
    "infinity for one token": (lambda x: TABLE[x].index_fill(2, torch.tensor(3), -math.inf), "not finite"),
    "so large that the score is none": (lambda x: HUGE.expand(*x.shape, V), "so large"),
    "too few logits": (lambda x: TABLE[x][..., :-1], "shape (8, 64, 400), it returned torch.float32 (8, 64, 399)"),
    "a loss": (lambda x: torch.tensor(0.1), "shape"),
    "whole numbers": (lambda x: TABLE[x].long(), "floating-point"),
    "a tuple": (lambda x: (TABLE[x], None), "returned tuple"),
    "not deterministic": (lambda x: torch.randn(*x.shape, V), "the same input gave other logits"),
}


@pytest.mark.parametrize(("logits", "message"), CHEATS.values(), ids=CHEATS)
def test_a_model_that_cheats_gets_no_number(tokenizer, logits, message):
    with pytest.raises(prepare.EvaluationError, match=re.escape(message)):
        prepare.evaluate_bpb(Model(logits), tokenizer, 8)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_one_memory_for_all_answers_hides_nothing(tokenizer, batch_size):
    """It looks ahead, and what was kept of its last answer changes with the next."""
    memory = torch.empty(batch_size, 64, V)
    with pytest.raises(prepare.EvaluationError, match="not causal"):
        prepare.evaluate_bpb(Model(lambda x: memory.copy_(peek(x, 0, ahead(x)))), tokenizer, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_leak_at_every_tenth_place_is_found(tokenizer, batch_size):
    def tenth(x):
        here = (torch.arange(x.size(1)) % 10 == 9)[:, None]
        return torch.where(here, peek(x, 0.0, ahead(x)), 0.0)

    # Of 63 places 6 show it. With 3 rows a batch 22 places are tried, else 64: an evaluation misses it with a
    # probability of at most (57/63)^22 = 0.11, and six evaluations miss it once in 500,000 times.
    with pytest.raises(prepare.EvaluationError):
        for _ in range(6):
            prepare.evaluate_bpb(Model(tenth), tokenizer, batch_size)


def test_the_bytes_are_those_of_the_prepared_tokenizer(tokenizer):
    class Longer(prepare.Tokenizer):
        def token_bytes(self):
            return 10 * super().token_bytes()

    assert prepare.evaluate_bpb(Model(), Longer(tokenizer.ranks), 8) == prepare.evaluate_bpb(Model(), tokenizer, 8)


def test_the_last_evaluation_counts_also_if_it_fails(tokenizer):
    for model in (Model(), Model(lambda x: TABLE[x])):
        assert prepare.evaluate_bpb(model, tokenizer, 8) == prepare.clock.val_bpb
    with pytest.raises(prepare.EvaluationError):
        prepare.evaluate_bpb(Model(torch.zeros_like), tokenizer, 8)
    assert prepare.clock.val_bpb is None


def test_honest_context_is_no_cheat(tokenizer):
    model = Model(lambda x: TABLE[x].cumsum(dim=1) / torch.arange(1, x.size(1) + 1)[:, None])  # all that came
    for batch_size in (1, 2, 8):
        assert prepare.evaluate_bpb(model, tokenizer, batch_size) > 0


def test_the_model_cannot_reach_or_change_the_targets(tokenizer):
    reached = []

    def scribble(x):
        reached.append(x.untyped_storage().nbytes() > x.numel() * x.element_size())
        return torch.zeros(*x.zero_().shape, V)

    expected = prepare.evaluate_bpb(Model(), tokenizer, 8)
    assert prepare.evaluate_bpb(Model(scribble), tokenizer, 8) == expected
    assert reached and not any(reached)  # x's memory holds nothing but x


def test_training_mode_is_left_and_given_back(tokenizer):
    modes, model = [], Model()
    model.logits = lambda x: modes.append((model.training, torch.is_grad_enabled())) or torch.zeros(*x.shape, V)
    assert model.training
    prepare.evaluate_bpb(model, tokenizer, 8)
    assert set(modes) == {(False, False)} and model.training


def test_one_answer_is_held_at_a_time(tokenizer, monkeypatch):
    """Logits are the largest tensors of a run: two of them would take more memory than training did."""
    monkeypatch.setattr(prepare, "CAUSALITY_ROWS", 4)  # so most batches are scored alone
    answers, alive = [], []

    def counted(x):
        alive.append(sum(answer() is not None for answer in answers))
        logits = torch.zeros(*x.shape, V)
        answers.append(weakref.ref(logits))
        return logits

    prepare.evaluate_bpb(Model(counted), tokenizer, 4)
    assert len(alive) > 16 and set(alive) == {0}


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
    prepare.evaluate_bpb(Model(), tokenizer, 64)
    now[0] += 10
    assert prepare.clock.seconds() == 2.5 and capsys.readouterr().err == ""
    prepare.evaluate_bpb(Model(), tokenizer, 64)  # whatever was learned between the two
    assert prepare.clock.seconds() == 12.5
    problem = "training took 12.5 s of a budget of 2 s (all up to the last evaluation counts)"
    assert problem in capsys.readouterr().err
    next(loader)  # learning after an evaluation is on the clock too, as if it had never stopped
    now[0] += 1
    assert prepare.clock.seconds() == 13.5


class OnMPS(torch.Tensor):
    """A tensor on an Apple GPU, which has no float64. None is at hand: it stays on the CPU under another class."""

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")


def move(tensor, device=None, dtype=None, to=torch.Tensor.to):
    with torch._C.DisableTorchFunctionSubclass():
        kind = OnMPS if device.type == "mps" else torch.Tensor
        return to(tensor, dtype=dtype or tensor.dtype).as_subclass(kind)


def test_an_apple_gpu_needs_no_float64(tokenizer, monkeypatch):
    waits, seen, expected = [], [], prepare.evaluate_bpb(Model(lambda x: TABLE[x]), tokenizer, 8)
    model = Model(lambda x: seen.append(type(x)) or TABLE[x])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.Tensor, "to", move)
    assert prepare.get_device().type == "mps"
    assert prepare.evaluate_bpb(model, tokenizer, 8) == expected
    assert set(seen) == {OnMPS} and waits


def test_device_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    assert prepare.get_device() == torch.device("cpu")
    for name in ("tpu", "cuda:1"):
        monkeypatch.setenv("DEVICE", name)
        with pytest.raises(prepare.PrepareError, match=rf"DEVICE='{name}' is not on this machine, which has: .*cpu"):
            prepare.get_device()
