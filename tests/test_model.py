"""Attention and model: float64 references, invariants, numbers worked by hand."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from bench_train import bounded_loss
from conftest import run_python, train_step
from torch.utils.flop_counter import FlopCounterMode

import train

V, T = 64, 16
TINY = replace(train.FULL, DEPTH=4, ASPECT_RATIO=8, HEAD_DIM=8, VE_GATE_CHANNELS=8)  # width 32, 4 heads
CPU, CUDA, MPS = map(torch.device, ("cpu", "cuda", "mps"))
WINDOWS = (0, 1, T // 2, T - 2, T - 1, T)

# float32 rounds at 6e-8; a sum of tens of terms of order 1 to 10 stays ten times under this
FLOAT32 = dict(atol=1e-5, rtol=1e-5)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(config=TINY, attention=train.sdpa_attention):
    torch.manual_seed(0)
    return train.GPT(config, V, T, attention)


def make_tokens(rows=3):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def randomized(model):
    """Every parameter random: a model at its start sees only the last token, and would pass too easily."""
    for p in model.parameters():
        p.normal_(0, 0.3)
    return model


# -----------------------------------------------------------------------------
# Attention


def reference(q, k, v, window):
    """Attention by its definition, one query and head at a time, in float64."""
    B, _, H, D = q.shape
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for i in range(T):
        seen = slice(max(0, i - window), i + 1)
        for h in range(H):
            kv = h // (H // k.size(2))
            weight = torch.softmax(torch.einsum("bd,bjd->bj", q[:, i, h], k[:, seen, kv]) / D**0.5, dim=-1)
            rows.append(torch.einsum("bj,bjd->bd", weight, v[:, seen, kv]))
    return torch.stack(rows, dim=1).view(B, T, H, D)


def check(attention, n_kv_head, window, tolerance, dtype=torch.float32, backward=True):
    torch.manual_seed(0)
    heads = (4, n_kv_head, n_kv_head)
    leaves = [torch.randn(2, T, h, 8).to(dtype).requires_grad_(backward) for h in heads]
    wanted = reference(*leaves, window)
    got = attention(*leaves, window)
    assert got.shape == wanted.shape and got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, **tolerance)
    if backward:
        above = torch.randn(wanted.shape).to(dtype)
        gradients = [torch.autograd.grad(out, leaves, above) for out in (got, wanted)]
        torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_sdpa_attention_forward_and_backward(window, n_kv_head):
    check(train.sdpa_attention, n_kv_head, window, FLOAT32)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, but here it does not matter
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flex_attention_forward(n_kv_head):
    attention = train.flex_attention_for(T, WINDOWS, CPU)
    for window in WINDOWS:
        check(attention, n_kv_head, window, FLOAT32, backward=False)  # PyTorch promises no backward on a CPU


# FlashAttention-3's own interface (hopper/flash_attn_interface.py) in plain PyTorch: query i sees the keys
# i - left ≤ j ≤ i + right, -1 means no bound, causal means right = 0, and the inputs must have 16 bits.
FLASH_ATTN_FUNC = """
import torch

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                    v_descale=None, window_size=(-1, -1)):
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float16}, {torch.bfloat16}):
        raise RuntimeError("FlashAttention only supports fp16, bf16, and fp8_e4m3 data type")
    left, right = window_size
    right = 0 if causal else right
    j_minus_i = torch.arange(k.size(1))[None, :] - torch.arange(q.size(1))[:, None]
    seen = torch.ones_like(j_minus_i, dtype=torch.bool)
    if left >= 0:
        seen &= j_minus_i >= -left
    if right >= 0:
        seen &= j_minus_i <= right
    k, v = (t.double().repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    score = torch.einsum("bihd,bjhd->bhij", q.double(), k) / q.size(3) ** 0.5
    score = score.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v).to(q.dtype)
    return RETURNED
"""


def write_kernel(folder, returned):
    """A kernel package of the hub's layout, for every PyTorch and device."""
    variant = folder / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "flash-attn3", "id": "flash_attn3_for_tests", "version": 1, "license": "BSD-3-Clause"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    (variant / "__init__.py").write_text(FLASH_ATTN_FUNC.replace("RETURNED", returned))


@pytest.fixture(params=["out", "(out, score.logsumexp(-1))"], ids=["tensor", "tuple"])
def flash3(request, tmp_path, monkeypatch):
    """flash3_attention() with a local kernel package in place of the hub's: no network, no GPU."""
    write_kernel(tmp_path, request.param)
    monkeypatch.setenv("LOCAL_KERNELS", f"{train.FLASH3}={tmp_path}")
    return train.flash3_attention()


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flash3_attention_forward_and_backward(flash3, n_kv_head):
    for window in WINDOWS:
        # bfloat16 keeps 8 bits: the kernel computes in float64 and rounds its results once
        check(flash3, n_kv_head, window, dict(atol=1e-4, rtol=2**-8), dtype=torch.bfloat16)


LOAD = """
import torch, prepare, train

def require_hub():
    raise prepare.PrepareError("the hub does not answer")

prepare.require_hub = require_hub
q = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)
try:
    print(tuple(train.flash3_attention()(q, q, q, 2).shape))
except prepare.PrepareError as error:
    print(error)
"""


def test_the_kernel_of_an_earlier_run_needs_no_network(tmp_path, monkeypatch):
    """And without one the hub is asked first whether it answers: the library alone would wait for minutes."""

    def load():
        return run_python("-c", LOAD, HF_ENDPOINT="http://127.0.0.1:9", KERNELS_CACHE=str(tmp_path)).stdout.strip()

    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    assert load() == "the hub does not answer"
    commit, downloaded = "0" * 40, tmp_path / "kernels--kernels-community--flash-attn3"
    write_kernel(downloaded / "snapshots" / commit, "out")
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "v1").write_text(commit)
    assert load() == "(1, 4, 1, 8)"
    # One whose download was cut off is downloaded again
    next(downloaded.rglob("__init__.py")).write_text("import a_part_that_is_not_there")
    assert load() == "the hub does not answer"


def test_autocast_gives_the_kernel_bfloat16(flash3, monkeypatch):
    rms_norm = F.rms_norm  # newer PyTorch's autocast makes it float32
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: rms_norm(x.float(), shape))
    x, model = make_tokens(), randomized(make_model(attention=flash3))
    for table in (model.wte, *model.value_embeds.values()):
        table.bfloat16()  # as they are held on a GPU
    stream = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: stream.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x)
    assert stream == [torch.bfloat16] and loss.dtype == torch.float32
    loss.backward()
    # measured: 16 bits change this loss by 0.07 %, a window that is one key shorter by 1.1 %
    assert loss.item() == pytest.approx(randomized(make_model())(x, x).item(), rel=0.004)


@pytest.mark.parametrize("device", [CPU, MPS])
def test_pick_attention_without_cuda(device):
    name, attention, _ = train.pick_attention(T, WINDOWS, 16, device)
    assert name == "sdpa" and attention is train.sdpa_attention


@pytest.mark.parametrize(
    "capability, hip, name, reason",
    [
        ((7, 5), None, "sdpa", "7.5"),
        ((9, 0), None, "flex", "OSError: the hub is away)"),  # one line of the log, whatever the error says
        ((10, 0), None, "flex", "10.0"),
        ((12, 0), None, "flex", "12.0"),  # consumer Blackwell, where FlashAttention-3 loads and then fails
        ((9, 4), "6.4", "flex", "ROCm"),  # MI300X: not a Hopper
    ],
)
def test_pick_attention_by_compute_capability(monkeypatch, capability, hip, name, reason):
    def no_network():
        assert capability == (9, 0) and not hip, "only Ampere to Hopper may ask for FlashAttention-3"
        raise OSError("the hub is away\nsecond line")

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(train, "flash3_attention", no_network)
    monkeypatch.setattr(train, "flex_attention_for", lambda *_: "flex's")
    picked, attention, why = train.pick_attention(T, WINDOWS, 16, CUDA)
    assert picked == name and reason in why and "\n" not in why
    assert attention == {"sdpa": train.sdpa_attention, "flex": "flex's"}[name]


# -----------------------------------------------------------------------------
# Rotary embedding


def test_rotary_embedding_keeps_norms_and_depends_on_distances_only():
    torch.manual_seed(0)
    cos, sin = make_model().cos, make_model().sin  # (T, 1, D/2)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, T, 1, 8)  # the same q and k at every position
    rotated_q, rotated_k = train.apply_rotary_emb(q, cos, sin), train.apply_rotary_emb(k, cos, sin)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1), **FLOAT32)
    score = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T  # (T, T)
    for distance in range(T):
        along = score.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), **FLOAT32)
    assert score[:, 0].std() > 0.1  # it does depend on them


def test_rotary_embedding_by_hand():
    # position 1, D = 4: channels (0, 2) turn by 1 radian, (1, 3) by 10,000^-1/2 = 0.01, both clockwise
    model = make_model(replace(TINY, HEAD_DIM=4))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, T, 1, 4)
    got = train.apply_rotary_emb(x, model.cos, model.sin)[0, 1, 0]
    torch.testing.assert_close(got, torch.tensor([math.cos(1), math.cos(0.01), -math.sin(1), -math.sin(0.01)]))


# -----------------------------------------------------------------------------
# Initial weights


@pytest.fixture(scope="module")
def full():
    return train.GPT(train.FULL, 8192, 2048, train.sdpa_attention)


def test_size_of_the_full_model(full):
    C = train.FULL.n_embd
    assert C == 512 and train.FULL.n_kv_head == 4
    embeddings, matrices, gates, scalars = 6 * 8192 * C, 8 * 12 * C * C, 4 * 32 * 4, 2 * 8
    assert sum(p.numel() for p in full.parameters()) == embeddings + matrices + gates + scalars == 50_332_176
    assert replace(train.FULL, DEPTH=9, ASPECT_RATIO=64, HEAD_DIM=128).n_embd == 640  # whole heads: 576 is 4.5


def test_initial_weights(full):
    s = 512**-0.5
    for name, p in full.named_parameters():
        part = name.split(".")
        if "c_proj" in part or "ve_gate" in part:
            assert p.count_nonzero() == 0, name
        elif name in ("resid_lambdas", "x0_lambdas"):
            assert p.tolist() == pytest.approx([{"resid_lambdas": 1.0, "x0_lambdas": 0.1}[name]] * 8), name
        else:
            std = {"wte": 1.0, "lm_head": 0.001}.get(part[0], s)
            # n ≥ 262,144 draws give the std to (2n)^-1/2 = 0.14 % and the mean to 0.2 % of it: five times that
            assert p.std().item() == pytest.approx(std, rel=0.007) and abs(p.mean().item()) < 0.01 * std, name
            if std == s:
                assert p.abs().max() <= 3**0.5 * s, name
            else:
                assert p.abs().max() > 4 * std, name  # only a normal has such a tail


def test_initial_loss_is_that_of_a_uniform_guess():
    x = make_tokens()
    # logits of standard deviation σ = 0.001·√32 = 0.006: the mean over 48 targets is off by σ/√48 = 0.001
    assert make_model()(x, x.roll(-1, 1)).item() == pytest.approx(math.log(V), abs=0.004)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, x = randomized(make_model()), make_tokens()
    y = x.roll(-1, 1)
    wanted = -model(x).double().log_softmax(-1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(model(x, y).double(), wanted, **FLOAT32)


def test_the_bounded_loss_of_the_benchmark_is_the_cross_entropy():
    logits, y = (15 * torch.tanh(torch.randn(48, V))).requires_grad_(), torch.arange(48)
    losses = bounded_loss(logits, y), F.cross_entropy(logits.double(), y)
    torch.testing.assert_close(losses[0].double(), losses[1], **FLOAT32)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses), **FLOAT32)


# -----------------------------------------------------------------------------
# The whole model


def rms(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def reference_logits(model, config, x):
    """The baseline's formulas again, in float64, from the state dict alone."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    B, D, width, pattern = len(x), config.HEAD_DIM, p["wte.weight"].size(1), config.WINDOW_PATTERN
    inv_freq = config.ROPE_BASE ** (-torch.arange(D // 2).double() / (D // 2))
    rotation = torch.exp(-1j * torch.arange(T).double()[:, None, None] * inv_freq)  # (T, 1, D/2), clockwise

    def heads(h, weight):  # (B, T, H, D), rotated and normed
        a, b = (h @ weight.T).view(B, T, -1, D).chunk(2, -1)
        rotated = torch.complex(a, b) * rotation
        return rms(torch.cat((rotated.real, rotated.imag), -1))

    h = h0 = rms(p["wte.weight"][x])
    for i in range(config.DEPTH):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        h = p["resid_lambdas"][i] * h + p["x0_lambdas"][i] * h0
        n = rms(h)
        v = (n @ w["attn.c_v.weight"].T).view(B, T, -1, D)
        if f"value_embeds.{i}.weight" in p:
            gate = 2 / (1 + torch.exp(-n[..., : config.VE_GATE_CHANNELS] @ w["attn.ve_gate.weight"].T))
            v = v + gate[..., None] * p[f"value_embeds.{i}.weight"][x].view(v.shape)
        window = T if i == config.DEPTH - 1 or pattern[i % len(pattern)] == "L" else T // 2
        y = reference(heads(n, w["attn.c_q.weight"]), heads(n, w["attn.c_k.weight"]), v, window)
        h = h + y.reshape(B, T, width) @ w["attn.c_proj.weight"].T
        h = h + (rms(h) @ w["mlp.c_fc.weight"].T).clamp_min(0) ** 2 @ w["mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(h) @ p["lm_head.weight"].T / 15)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_model_against_its_formulas_in_float64(n_kv_head):
    config = replace(TINY, N_KV_HEAD=n_kv_head)
    model, x = randomized(make_model(config)), make_tokens()
    # four layers of sums of up to 128 terms, rounded at 6e-8 each, and RMSNorm's own 1e-7 under the root
    torch.testing.assert_close(model(x).double(), reference_logits(model, config, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_model_is_causal_and_keeps_rows_apart(n_kv_head):
    model, x = randomized(make_model(replace(TINY, N_KV_HEAD=n_kv_head))), make_tokens()
    changed = x.clone()
    changed[0, 9:] = (x[0, 9:] + 1) % V
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[0, :9], before[0, :9], **FLOAT32)
    torch.testing.assert_close(after[1:], before[1:], **FLOAT32)
    assert ((after - before)[0, 9:].abs().amax(-1) > 0.1).all()


def test_model_overfits_one_batch():
    model, x = make_model(), make_tokens()
    optimizer = train.make_optimizer(model, TINY)
    for step in range(60):
        train.set_schedules(optimizer, TINY, step / 60, step)
        loss = train_step(model, optimizer, itertools.repeat((x, x.roll(-1, 1), 1)), 1)
    assert loss.item() < 0.05  # nats, from ln 64 = 4.2; 48 targets in 44,000 parameters


@pytest.mark.parametrize(
    "depth, windows, ve_layers",
    [
        (1, "L", "0"),
        (2, "SL", "1"),
        (3, "SSL", "02"),
        (4, "SSSL", "13"),
        (5, "SSSLL", "024"),
        (8, "SSSLSSSL", "1357"),
        (9, "SSSLSSSLL", "02468"),
    ],
)
def test_windows_and_value_embeddings_of_the_layers(depth, windows, ve_layers):
    """The last layer has a long window and a value embedding, whatever the depth."""
    model = make_model(replace(TINY, DEPTH=depth))
    assert model.window_sizes == [{"S": T // 2, "L": T}[window] for window in windows]
    assert sorted(model.value_embeds) == list(ve_layers)
    assert [i for i, block in enumerate(model.blocks) if block.attn.ve_gate is not None] == [int(i) for i in ve_layers]


@pytest.mark.parametrize("change, message", [
    (dict(N_KV_HEAD=3), "N_KV_HEAD = 3 does not divide the 4"),
    (dict(WINDOW_PATTERN="SXL"), "'SXL'"),
    (dict(WINDOW_PATTERN=""), "letters S and L"),
])  # fmt: skip
def test_impossible_config(change, message):
    with pytest.raises(ValueError, match=message):
        make_model(replace(TINY, **change))


# -----------------------------------------------------------------------------
# Parameters: a new one takes one edit


class Gated(train.MLP):
    """An MLP with one more matrix: a typical edit of research."""

    def __init__(self, config):
        super().__init__(config)
        self.c_gate = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square() * self.c_gate(x))


def test_a_new_matrix_needs_no_other_edit(monkeypatch):
    plain = train.flops_per_token(make_model(), TINY, T)
    monkeypatch.setattr(train, "MLP", Gated)
    model, x = make_model(), make_tokens()
    optimizer = train.make_optimizer(model, TINY)
    train.set_schedules(optimizer, TINY, 0.0, 0)
    before = [block.mlp.c_gate.weight.clone() for block in model.blocks]
    for _ in range(2):  # behind a c_proj of zeros it has no gradient in the first step
        train_step(model, optimizer, itertools.repeat((x, x.roll(-1, 1), 1)), 1)
    for block, start in zip(model.blocks, before):
        assert start.isfinite().all() and start.std() > 0.1 and not torch.equal(block.mlp.c_gate.weight, start)
    assert train.flops_per_token(model, TINY, T) - plain == 4 * 6 * (4 * 32 * 32)


class Scaled(train.MLP):
    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))


class Normed(train.MLP):  # its parameter is called .weight but is not a matrix
    def __init__(self, config):
        super().__init__(config)
        self.ln = nn.RMSNorm(config.n_embd)


@pytest.mark.parametrize("mlp, name", [(Scaled, "blocks.0.mlp.scale"), (Normed, "blocks.0.mlp.ln.weight")])
def test_a_parameter_without_a_rule_is_an_error_with_its_name(monkeypatch, mlp, name):
    monkeypatch.setattr(train, "MLP", mlp)
    with pytest.raises(ValueError, match=name):
        train.make_optimizer(make_model(), TINY)


# -----------------------------------------------------------------------------
# FLOPs


def test_flops_of_the_full_model(full):
    C = 512
    linear = 8 * 12 * C * C + 4 * 32 * 4 + 8192 * C  # blocks, gates, head
    keys = 6 * 1024 + 2 * 2048
    assert train.flops_per_token(full, train.FULL, 2048) == 6 * linear + 12 * C * keys
    assert train.flops_per_token(full, train.FULL, 2048) == pytest.approx(239e6, abs=1e6)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_flops_against_pytorchs_counter(n_kv_head):
    def attention(q, k, v, window):  # all keys and only matrix products: the counter knows no windows
        k, v = (t.repeat_interleave(4 // t.size(2), dim=2) for t in (k, v))
        score = torch.einsum("bihd,bjhd->bhij", q, k)
        return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)

    config = replace(TINY, WINDOW_PATTERN="L", N_KV_HEAD=n_kv_head)
    model, x = make_model(config, attention), make_tokens()
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    assert counter.get_total_flops() == train.flops_per_token(model, config, T) * x.numel()
