"""Attention and model: float64 references, invariants, numbers worked by hand."""

import itertools
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import prepare
import train

V, T = 64, 16
TINY = replace(train.FULL, DEPTH=4, ASPECT_RATIO=8, HEAD_DIM=8, VE_GATE_CHANNELS=8)  # width 32, 4 heads
CPU = torch.device("cpu")
WINDOWS = (0, 1, T // 2, T - 2, T - 1, T)

# float32 rounds at 6e-8; a sum of tens of terms of order 1 to 10 stays ten times under this
FLOAT32 = dict(atol=1e-5, rtol=1e-5)
# bfloat16 keeps 8 bits: inputs and results of order 1 to 4 are off by up to 2^-7, weights are rounded too
BFLOAT16 = dict(atol=0.03, rtol=0.02)

pytestmark = pytest.mark.usefixtures("one_thread", "float32")


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


def reference(q, k, v, window):
    """Attention by its definition, one query and head at a time, in float64."""
    B, T, H, D = q.shape
    q, k, v = q.double(), k.double(), v.double()
    rows = []
    for i in range(T):
        seen = slice(max(0, i - window), i + 1)
        for h in range(H):
            kv = h // (H // k.size(2))
            weight = torch.softmax(torch.einsum("bd,bjd->bj", q[:, i, h], k[:, seen, kv]) / D**0.5, dim=-1)
            rows.append(torch.einsum("bj,bjd->bd", weight, v[:, seen, kv]))
    return torch.stack(rows, dim=1).view(B, T, H, D)


def check(attention, n_kv_head, window, tolerance, dtype=torch.float32, backward=True, size=(T, 8), device=CPU):
    torch.manual_seed(0)
    (rows, D), heads = size, (4, n_kv_head, n_kv_head)
    leaves = [torch.randn(2, rows, h, D, device=device).to(dtype).requires_grad_(backward) for h in heads]
    wanted = reference(*leaves, window)
    got = attention(*leaves, window)
    assert got.shape == wanted.shape and got.dtype == dtype
    torch.testing.assert_close(got.double(), wanted, **tolerance)
    if backward:
        above = torch.randn(wanted.shape, device=device).to(dtype)
        gradients = [torch.autograd.grad(out, leaves, above) for out in (got, wanted)]
        torch.testing.assert_close(*gradients, **tolerance)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, but here it does not matter
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_attention_forward_and_backward(n_kv_head):
    flex_attention = train.flex_attention_for(T, WINDOWS, CPU)
    for window in WINDOWS:
        check(train.sdpa_attention, n_kv_head, window, FLOAT32)
        check(train.sdpa_attention, n_kv_head, window, BFLOAT16, dtype=torch.bfloat16)
        check(flex_attention, n_kv_head, window, FLOAT32, backward=False)  # PyTorch promises no backward on a CPU


def test_windows_may_change_during_a_compiled_run():
    flex_attention = train.flex_attention_for(T, WINDOWS, CPU)
    compiled = torch.compile(flex_attention, backend="eager", dynamic=False)
    for window in (*WINDOWS, 3, WINDOWS[0], 7):
        check(compiled, 2, window, FLOAT32, backward=False)


# FlashAttention-3's own interface (hopper/flash_attn_interface.py): query i sees the keys i - left ≤ j ≤ i + right
FLASH_ATTN_FUNC = """
import torch
from test_model import reference

def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    left, right = window_size
    if {q.dtype, k.dtype, v.dtype} not in ({torch.float16}, {torch.bfloat16}) or not causal or left < 0 or right > 0:
        raise RuntimeError("this stand-in has 16 bits and a causal window only")
    out = reference(q, k, v, left).to(q.dtype)
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


@pytest.fixture(params=["out", "(out, None)"], ids=["tensor", "tuple"])
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


@pytest.mark.parametrize("earlier", ["none", "whole", "cut off"])
def test_the_kernel_of_an_earlier_run_needs_no_network(tmp_path, monkeypatch, earlier):
    """And without one the hub is asked first whether it answers: the library alone would wait for minutes."""
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    monkeypatch.setattr(prepare, "require_hub", Mock(side_effect=prepare.PrepareError("the hub does not answer")))
    for module in ("install", "resolver"):
        monkeypatch.setattr(f"kernels.{module}.CACHE_DIR", str(tmp_path))
    commit, downloaded = "0" * 40, tmp_path / "kernels--kernels-community--flash-attn3"
    if earlier != "none":
        write_kernel(downloaded / "snapshots" / commit, "out")
        (downloaded / "refs").mkdir()
        (downloaded / "refs" / "v1").write_text(commit)
    if earlier == "cut off":
        next(downloaded.rglob("__init__.py")).write_text("import a_part_that_is_not_there")
    asks = pytest.raises(prepare.PrepareError, match="the hub does not answer")
    with nullcontext() if earlier == "whole" else asks:
        q = torch.randn(1, T, 1, 8, dtype=torch.bfloat16)
        assert train.flash3_attention()(q, q, q, 2).shape == q.shape


@pytest.mark.parametrize(
    "capability, hip, flex, name, reason",
    [
        ((7, 5), None, True, "sdpa", "bfloat16"),
        ((9, 0), None, True, "flex", "OSError: the hub is away)"),  # one line of the log, whatever the error says
        ((12, 0), None, True, "flex", "for the GPU"),  # consumer Blackwell, where FlashAttention-3 loads and then fails
        ((9, 4), "6.4", True, "flex", "for the GPU"),  # MI300X: not a Hopper
        ((12, 0), None, False, "sdpa", "exact mask: no flex (RuntimeError: out of resource: shared memory)"),
    ],
)
def test_pick_attention_by_compute_capability(monkeypatch, capability, hip, flex, name, reason):
    flash3 = Mock(side_effect=OSError("the hub is away\nsecond line"))
    no_resources = RuntimeError("out of resource: shared memory\nsecond line")
    flex_attention = Mock(wraps=train.sdpa_attention, side_effect=None if flex else no_resources)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "the GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(train, "bfloat16_works", lambda device: capability[0] >= 8)
    monkeypatch.setattr(train, "compiler", lambda: lambda function, fullgraph: function)
    monkeypatch.setattr(train, "flash3_attention", flash3)
    monkeypatch.setattr(train, "flex_attention_for", lambda *_: flex_attention)
    picked, attention, why = train.pick_attention(T, WINDOWS, 16, CPU)  # as if this were a GPU
    assert picked == name and reason in why and "\n" not in why
    assert attention == {"sdpa": train.sdpa_attention, "flex": flex_attention}[name]
    assert flash3.called == (capability == (9, 0) and not hip)  # only Ampere to Hopper may ask for FlashAttention-3


@pytest.mark.parametrize("works", [True, False])
def test_one_answer_decides_about_bfloat16(flash3, monkeypatch, works):
    """Embeddings, autocast, what the kernel gets, and Muon: a GPU of compute capability 7 has float32 everywhere."""
    rms_norm = F.rms_norm  # newer PyTorch's autocast makes it float32
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: rms_norm(x.float(), shape))
    monkeypatch.setattr(train, "CPU_HAS_BFLOAT16", works)
    model, x = train.Run(TINY, V, T, CPU, flash3 if works else train.sdpa_attention).model, make_tokens()
    wanted = torch.bfloat16 if works else torch.float32
    tables = {model.wte.weight, *(table.weight for table in model.value_embeds.values())}
    assert {p.dtype for p in tables} == {wanted}
    assert {p.dtype for p in model.parameters() if p not in tables} == {torch.float32}
    assert train.polar_express(torch.randn(4, 4)).dtype == wanted
    seen = []
    for module in (model.blocks[0].mlp, model.blocks[-1]):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = randomized(model)(x, x)
    assert seen == [wanted, wanted] and loss.dtype == model(x).dtype == torch.float32
    loss.backward()


def test_rotary_embedding_by_hand():
    # position 1, D = 4: channels (0, 2) turn by 1 radian, (1, 3) by 10,000^-1/2 = 0.01, both clockwise
    model = make_model(replace(TINY, HEAD_DIM=4))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, T, 1, 4)
    got = train.apply_rotary_emb(x, model.cos, model.sin)[0, 1, 0]
    torch.testing.assert_close(got, torch.tensor([math.cos(1), math.cos(0.01), -math.sin(1), -math.sin(0.01)]))


@pytest.fixture(scope="module")
def full():
    return train.GPT(train.FULL, 8192, 2048, train.sdpa_attention)


def test_initial_weights(full):
    normal, constant = {"wte.weight": 1.0, "lm_head.weight": 0.001}, {"resid_lambdas": 1.0, "x0_lambdas": 0.1}
    for name, p in full.named_parameters():
        if name in constant or "c_proj" in name or "ve_gate" in name:
            assert p.unique().tolist() == pytest.approx([constant.get(name, 0.0)]), name
            continue
        std = normal.get(name, 512**-0.5)
        # n ≥ 262,144 draws give the std to (2n)^-1/2 = 0.14 % and the mean to 0.2 % of it: five times that
        assert p.std().item() == pytest.approx(std, rel=0.007) and abs(p.mean().item()) < 0.01 * std, name
        if name in normal:
            assert p.abs().max() > 4 * std, name  # only a normal has such a tail
        else:
            assert p.abs().max() <= 3**0.5 * std, name


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
    wanted, y = reference_logits(model, config, x), x.roll(-1, 1)
    # four layers of sums of up to 128 terms, rounded at 6e-8 each, and RMSNorm's own 1e-7 under the root
    torch.testing.assert_close(model(x).double(), wanted, atol=1e-4, rtol=1e-4)
    loss = -wanted.log_softmax(-1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(model(x, y).double(), loss, atol=1e-4, rtol=1e-4)


def test_model_overfits_one_batch():
    run, x = train.Run(TINY, V, T, CPU, train.sdpa_attention), make_tokens()
    for step in range(60):
        train.set_schedules(run.optimizer, TINY, step / 60, step)
        loss = run.step(itertools.repeat((x, x.roll(-1, 1), 1)), 1)
    assert loss.item() < 0.05  # nats, from ln 64 = 4.2; 48 targets in 44,000 parameters
    head, before = run.model.lm_head.weight.detach(), run.model.lm_head.weight.detach().clone()
    run.step(itertools.repeat((x, x.roll(-1, 1), 1)), 1, look=True)
    assert run.moved["lm_head.weight"][1:] == pytest.approx([float(w.square().sum()) for w in (head - before, before)])


@pytest.mark.parametrize(
    "depth, windows, ve_layers", [(1, "L", "0"), (2, "SL", "1"), (5, "SSSLL", "024"), (8, "SSSLSSSL", "1357")]
)
def test_windows_and_value_embeddings_of_the_layers(depth, windows, ve_layers):
    """The last layer has a long window and a value embedding, whatever the depth."""
    model = make_model(replace(TINY, DEPTH=depth))
    assert model.window_sizes == [{"S": T // 2, "L": T}[window] for window in windows]
    assert sorted(model.value_embeds) == list(ve_layers)
    assert [i for i, block in enumerate(model.blocks) if block.attn.ve_gate is not None] == [int(i) for i in ve_layers]


@pytest.mark.parametrize("change", [dict(N_KV_HEAD=3), dict(WINDOW_PATTERN="SX")])
def test_impossible_config(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make_model(replace(TINY, **change))


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
    run, x = train.Run(TINY, V, T, CPU, train.sdpa_attention), make_tokens()
    before = [block.mlp.c_gate.weight.clone() for block in run.model.blocks]
    for _ in range(2):  # behind a c_proj of zeros it has no gradient in the first step
        run.step(itertools.repeat((x, x.roll(-1, 1), 1)), 1)
    for block, start in zip(run.model.blocks, before):
        assert start.isfinite().all() and start.std() > 0.1 and not torch.equal(block.mlp.c_gate.weight, start)
    assert train.flops_per_token(run.model, TINY, T) - plain == 4 * 6 * (4 * 32 * 32)


@pytest.mark.parametrize(
    "part, name, why",
    [
        (nn.Linear(32, 32), "bias", "needs a line in parameter_table"),
        (nn.RMSNorm(32), "weight", "Muon takes matrices only"),
        (nn.Conv1d(32, 32, 3, bias=False), "weight", "Muon takes matrices only"),
    ],
)
def test_a_parameter_without_a_rule_is_an_error_with_its_name(part, name, why):
    model = make_model()
    model.blocks[0].mlp.extra = part
    with pytest.raises(ValueError, match=f"blocks.0.mlp.extra.{name}.*{why}"):
        train.make_optimizer(model, TINY)


def test_a_block_knows_its_layer(monkeypatch):
    """For a scale by depth, for example."""
    made = Mock(wraps=train.Block)
    monkeypatch.setattr(train, "Block", made)
    make_model(replace(TINY, DEPTH=3))
    assert [call.args[1] for call in made.call_args_list] == [0, 1, 2]


def test_size_and_flops_of_the_full_model_by_hand(full):
    C = 512
    linear = 8 * 12 * C * C + 4 * 32 * 4 + 8192 * C  # blocks, gates, head
    embeddings, scalars, keys = 5 * 8192 * C, 2 * 8, 6 * 1024 + 2 * 2048
    assert sum(p.numel() for p in full.parameters()) == linear + embeddings + scalars == 50_332_176
    assert train.flops_per_token(full, train.FULL, 2048) == 6 * linear + 12 * C * keys
    assert replace(train.FULL, DEPTH=9, ASPECT_RATIO=64, HEAD_DIM=128).n_embd == 640  # whole heads: 576 is 4.5


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_flops_against_pytorchs_counter(n_kv_head):
    config = replace(TINY, WINDOW_PATTERN="L", N_KV_HEAD=n_kv_head)  # all keys: the counter knows no windows
    model, x = make_model(config), make_tokens()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # by matrix products alone
        model(x, x).backward()
    assert counter.get_total_flops() == train.flops_per_token(model, config, T) * x.numel()
