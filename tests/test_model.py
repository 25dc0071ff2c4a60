"""Attention and model: float64 references, invariants, numbers worked by hand."""

import json
import math
import socket
import time
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_python
from torch.utils.flop_counter import FlopCounterMode

import train

V, T = 64, 16
TINY = replace(train.FULL, DEPTH=4, ASPECT_RATIO=8, HEAD_DIM=8, VE_GATE_CHANNELS=8)  # width 32, 4 heads
WINDOWS = (0, 1, T // 2, T - 2, T - 1, T)

# float32 rounds at 6e-8; a sum of tens of terms of order 1 to 10 stays ten times under this
FLOAT32 = dict(atol=1e-5, rtol=1e-5)


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(k=TINY, attention=train.sdpa_attention):
    torch.manual_seed(0)
    return train.GPT(k, V, T, attention)


def make_tokens(rows=3):
    return torch.randint(V, (rows, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def shaken(model):
    """Every parameter random: at its start a model is blind to all but the last token, and passes too easily."""
    for p in model.parameters():
        p.normal_(0, 0.3)
    return model


# -----------------------------------------------------------------------------
# Attention


def reference(q, k, v, window):
    """Attention as it is defined, one query and head at a time, in float64."""
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")  # slow, which is no matter here
@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flex_attention_forward(n_kv_head):
    attention = train.flex_attention_for(T, WINDOWS, torch.device("cpu"))
    for window in WINDOWS:
        check(attention, n_kv_head, window, FLOAT32, backward=False)  # PyTorch promises no backward on a CPU


# FlashAttention-3's own interface (hopper/flash_attn_interface.py), computed plainly: query i sees the keys
# i - left ≤ j ≤ i + right, -1 is no bound, causal is right = 0, and nothing wider than 16 bits is taken.
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
    """flash3_attention() on a local kernel package, as the hub's would be found: no hub, no GPU."""
    write_kernel(tmp_path, request.param)
    monkeypatch.setenv("LOCAL_KERNELS", f"{train.FLASH3}={tmp_path}")
    return train.flash3_attention()


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_flash3_attention_forward_and_backward(flash3, n_kv_head):
    for window in WINDOWS:
        # bfloat16 keeps 8 bits: inside the kernel all is float64, its results are rounded once
        check(flash3, n_kv_head, window, dict(atol=1e-4, rtol=2**-8), dtype=torch.bfloat16)


LOAD = """
import torch, train
q = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)
try:
    print(tuple(train.flash3_attention()(q, q, q, 2).shape))
except Exception as error:
    print(type(error).__name__)
"""


def load_flash3(folder, endpoint="http://127.0.0.1:9"):
    """What LOAD prints in a process of its own, in which the hub is `endpoint`: by default nobody."""
    names = {"HF_ENDPOINT": endpoint, "KERNELS_CACHE": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return run_python("-c", LOAD, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **names).stdout.strip()


def test_an_earlier_runs_kernel_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    assert load_flash3(tmp_path) == "ConnectionError"
    commit, downloaded = "0" * 40, tmp_path / "kernels--kernels-community--flash-attn3"
    write_kernel(downloaded / "snapshots" / commit, "out")
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "v1").write_text(commit)
    assert load_flash3(tmp_path) == "(1, 4, 1, 8)"
    # One whose download was cut off is fetched anew, here in vain
    next(downloaded.rglob("__init__.py")).write_text("import a_part_that_is_not_there")
    assert load_flash3(tmp_path) == "ConnectionError"


def test_a_firewall_that_answers_nothing_costs_seconds(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        assert load_flash3(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}") == "ReadTimeout"
        assert time.monotonic() - started > 5  # it was the time limit that ended it


def test_autocast_gives_the_kernel_bfloat16(flash3, monkeypatch):
    rms_norm = F.rms_norm  # newer PyTorch's autocast makes it float32
    monkeypatch.setattr(F, "rms_norm", lambda x, shape: rms_norm(x.float(), shape))
    x, model = make_tokens(), shaken(make_model(attention=flash3))
    for table in (model.wte, *model.value_embeds.values()):
        table.bfloat16()  # as they are held on a GPU
    stream = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: stream.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, x)
    assert stream == [torch.bfloat16] and loss.dtype == torch.float32
    loss.backward()
    # measured: 16 bits change this loss by 0.07 %, a window one key shorter by 1.1 %
    assert loss.item() == pytest.approx(shaken(make_model())(x, x).item(), rel=0.004)


def test_pick_attention_on_a_cpu():
    name, attention, _ = train.pick_attention(T, WINDOWS, 16, torch.device("cpu"))
    assert name == "sdpa" and attention is train.sdpa_attention


@pytest.mark.parametrize("capability, name", [((7, 5), "sdpa"), ((10, 0), "flex"), ((12, 0), "flex")])
def test_pick_attention_by_compute_capability(monkeypatch, capability, name):
    """FlashAttention-3 is for 8 and 9 alone: on consumer Blackwell, 12.0, it loads and then dies."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(train, "flex_attention_for", lambda *_: "flex's")
    picked, _, reason = train.pick_attention(T, WINDOWS, 16, torch.device("cuda"))
    assert picked == name and "{}.{}".format(*capability) in reason


@pytest.mark.parametrize(
    "error", [OSError("the hub is away\nsecond line"), ImportError()], ids=["a message", "no message"]
)
def test_falling_back_says_why(monkeypatch, error):
    def raises():
        raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(train, "flash3_attention", raises)
    monkeypatch.setattr(train, "flex_attention_for", lambda *_: "flex's")
    name, attention, reason = train.pick_attention(T, WINDOWS, 16, torch.device("cuda"))
    assert (name, attention) == ("flex", "flex's")
    assert type(error).__name__ in reason and str(error).partition("\n")[0] in reason
    assert "\n" not in reason  # it stands on one line of the log


# -----------------------------------------------------------------------------
# Rotation


def test_rotation_keeps_norms_and_sees_distances_only():
    torch.manual_seed(0)
    cos, sin = make_model().cos, make_model().sin  # (T, 1, D/2)
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, T, 1, 8)  # the same q and k at every position
    turned_q, turned_k = train.rotate(q, cos, sin), train.rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1), **FLOAT32)
    score = turned_q[0, :, 0] @ turned_k[0, :, 0].T  # (T, T)
    for distance in range(T):
        along = score.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), **FLOAT32)
    assert score[:, 0].std() > 0.1  # and distances it does see


def test_rotation_by_hand():
    # position 1, D = 4: channels (0, 2) turn by 1 radian, (1, 3) by 10,000^-1/2 = 0.01; base vectors go clockwise
    model = make_model(replace(TINY, HEAD_DIM=4))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, T, 1, 4)
    got = train.rotate(x, model.cos, model.sin)[0, 1, 0]
    torch.testing.assert_close(got, torch.tensor([math.cos(1), math.cos(0.01), -math.sin(1), -math.sin(0.01)]))


# -----------------------------------------------------------------------------
# Start


@pytest.fixture(scope="module")
def full():
    return train.GPT(train.FULL, 8192, 2048, train.sdpa_attention)


def test_full_size(full):
    C = train.model_width(train.FULL)
    assert C == 512 and full.blocks[0].attn.n_head == 4
    tables, matrices, gates, scalars = 6 * 8192 * C, 8 * 12 * C * C, 4 * 32 * 4, 2 * 8
    assert sum(p.numel() for p in full.parameters()) == tables + matrices + gates + scalars == 50_332_176


def test_width_is_rounded_up_to_whole_heads():
    assert train.model_width(replace(train.FULL, DEPTH=9, ASPECT_RATIO=64, HEAD_DIM=128)) == 640  # 576 is 4.5 heads


def test_every_parameter_has_its_start(full):
    s = 512**-0.5
    for name, p in full.named_parameters():
        part = name.split(".")
        if "c_proj" in part or "ve_gate" in part:
            assert p.count_nonzero() == 0, name
        elif name in ("resid_lambdas", "x0_lambdas"):
            assert p.tolist() == pytest.approx([{"resid_lambdas": 1.0, "x0_lambdas": 0.1}[name]] * 8), name
        else:
            std = {"wte": 1.0, "lm_head": 0.001}.get(part[0], s)
            # of n ≥ 262,144 draws the std is known to (2n)^-1/2 = 0.14 %, the mean to 0.2 % of it: five times that
            assert p.std().item() == pytest.approx(std, rel=0.007) and abs(p.mean().item()) < 0.01 * std, name
            if std == s:
                assert p.abs().max() <= 3**0.5 * s, name
            else:
                assert p.abs().max() > 4 * std, name  # a normal's tail, which a uniform has not


def test_at_the_start_the_blocks_add_nothing():
    model, x = make_model(), make_tokens()
    model.lm_head.weight.data.normal_(0, 2)  # logits of about 11, so that the soft-cap shows
    e = model.wte.weight[x].double()
    z = e / e.square().mean(-1, keepdim=True).sqrt() @ model.lm_head.weight.double().T
    logits = model(x)
    assert logits.dtype == torch.float32 and z.abs().max() > 20
    torch.testing.assert_close(logits.double(), 15 * torch.tanh(z / 15), **FLOAT32)


def test_initial_loss_is_a_uniform_guess():
    x = make_tokens()
    # logits of standard deviation σ = 0.001·√32 = 0.006: the mean over 48 targets is off by σ/√48 = 0.001
    assert make_model()(x, x.roll(-1, 1)).item() == pytest.approx(math.log(V), abs=0.004)


def test_the_loss_is_the_mean_cross_entropy_of_the_logits():
    model, x = shaken(make_model()), make_tokens()
    y = x.roll(-1, 1)
    wanted = -model(x).double().log_softmax(-1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(model(x, y).double(), wanted, **FLOAT32)


# -----------------------------------------------------------------------------
# The whole


def rms(x):
    return x / x.square().mean(-1, keepdim=True).sqrt()


def plain_logits(model, k, x):
    """The baseline's formulas once more, in float64, from the state dict alone."""
    p = {name: value.double() for name, value in model.state_dict().items()}
    B, D, width = len(x), k.HEAD_DIM, p["wte.weight"].size(1)
    frequency = k.ROPE_BASE ** (-torch.arange(D // 2).double() / (D // 2))
    turn = torch.exp(-1j * torch.arange(T).double()[:, None, None] * frequency)  # (T, 1, D/2), clockwise

    def heads(h, weight):  # (B, T, H, D), rotated and normed
        a, b = (h @ weight.T).view(B, T, -1, D).chunk(2, -1)
        turned = torch.complex(a, b) * turn
        return rms(torch.cat((turned.real, turned.imag), -1))

    h = h0 = rms(p["wte.weight"][x])
    for i in range(k.DEPTH):
        w = {name.removeprefix(f"blocks.{i}."): value for name, value in p.items() if name.startswith(f"blocks.{i}.")}
        h = p["resid_lambdas"][i] * h + p["x0_lambdas"][i] * h0
        n = rms(h)
        v = (n @ w["attn.c_v.weight"].T).view(B, T, -1, D)
        if f"value_embeds.{i}.weight" in p:
            gate = 2 / (1 + torch.exp(-n[..., : k.VE_GATE_CHANNELS] @ w["attn.ve_gate.weight"].T))
            v = v + gate[..., None] * p[f"value_embeds.{i}.weight"][x].view(v.shape)
        window = T if i == k.DEPTH - 1 or k.WINDOW_PATTERN[i % len(k.WINDOW_PATTERN)] == "L" else T // 2
        y = reference(heads(n, w["attn.c_q.weight"]), heads(n, w["attn.c_k.weight"]), v, window)
        h = h + y.reshape(B, T, width) @ w["attn.c_proj.weight"].T
        h = h + (rms(h) @ w["mlp.c_fc.weight"].T).clamp_min(0) ** 2 @ w["mlp.c_proj.weight"].T
    return 15 * torch.tanh(rms(h) @ p["lm_head.weight"].T / 15)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_the_model_against_its_formulas_in_float64(n_kv_head):
    k = replace(TINY, N_KV_HEAD=n_kv_head)
    model, x = shaken(make_model(k)), make_tokens()
    # four layers of sums of up to 128 terms, rounded at 6e-8 each, and RMSNorm's own 1e-7 under the root
    torch.testing.assert_close(model(x).double(), plain_logits(model, k, x), atol=1e-4, rtol=1e-4)


# -----------------------------------------------------------------------------
# Parameters: one edit adds one


def test_every_parameter_is_in_exactly_one_group():
    model = make_model()
    groups = train.make_optimizer(model, TINY).param_groups
    moved = [id(p) for group in groups for p in group["params"]]
    assert sorted(moved) == sorted(id(p) for p in model.parameters())
    by_muon = {id(p) for group in groups if group["kind"] == "muon" for p in group["params"]}
    assert by_muon == {id(p) for p in model.blocks.parameters()}
    for group in groups:
        if group["kind"] == "muon":  # stacked: one shape a group
            assert len({p.shape for p in group["params"]}) == 1


class Gated(train.MLP):
    """An MLP with one matrix more: the kind of edit that research is made of."""

    def __init__(self, k):
        super().__init__(k)
        self.c_gate = nn.Linear(train.model_width(k), 4 * train.model_width(k), bias=False)

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
        train.train_step(model, optimizer, lambda: (x, x.roll(-1, 1)), 1)
    for block, start in zip(model.blocks, before):
        assert start.isfinite().all() and start.std() > 0.1 and not torch.equal(block.mlp.c_gate.weight, start)
    assert train.flops_per_token(model, TINY, T) - plain == 4 * 6 * (4 * 32 * 32)


class Scaled(train.MLP):
    def __init__(self, k):
        super().__init__(k)
        self.scale = nn.Parameter(torch.ones(1))


class Normed(train.MLP):  # its parameter is a .weight, and no matrix
    def __init__(self, k):
        super().__init__(k)
        self.ln = nn.RMSNorm(train.model_width(k))


@pytest.mark.parametrize("mlp, name", [(Scaled, "blocks.0.mlp.scale"), (Normed, "blocks.0.mlp.ln.weight")])
def test_a_parameter_that_fits_no_rule_is_an_error_with_its_name(monkeypatch, mlp, name):
    monkeypatch.setattr(train, "MLP", mlp)
    with pytest.raises(ValueError, match=name):
        train.make_optimizer(make_model(), TINY)


# -----------------------------------------------------------------------------
# Windows, value embeddings, GQA, causality


@pytest.mark.parametrize(
    "depth, kinds", [(1, "L"), (2, "SL"), (3, "SSL"), (4, "SSSL"), (5, "SSSLL"), (8, "SSSLSSSL"), (9, "SSSLSSSLL")]
)
def test_windows_follow_the_pattern_and_end_in_a_long_one(depth, kinds):
    windows = train.layer_windows(replace(train.FULL, DEPTH=depth), 2048)
    assert windows == [{"S": 1024, "L": 2048}[kind] for kind in kinds]


def test_the_model_attends_through_its_windows():
    used = []

    def spy(q, k, v, window):
        used.append(window)
        return train.sdpa_attention(q, k, v, window)

    make_model(attention=spy)(make_tokens())
    assert used == [T // 2, T // 2, T // 2, T]


@pytest.mark.parametrize("depth, layers", [(1, "0"), (4, "13"), (5, "024"), (8, "1357")])
def test_value_embeddings_on_every_other_layer_and_the_last(depth, layers):
    model = make_model(replace(TINY, DEPTH=depth))
    assert sorted(model.value_embeds) == list(layers)
    assert [i for i, block in enumerate(model.blocks) if block.attn.ve_gate is not None] == [int(i) for i in layers]


def test_value_embeddings_are_added_to_v_with_a_gate_of_one():
    seen = {}

    def spy(q, k, v, window):
        seen.setdefault(len(seen), v)
        return train.sdpa_attention(q, k, v, window)

    model, x = make_model(attention=spy), make_tokens()
    model(x)
    h = F.rms_norm(model.wte(x), (32,))  # what each block sees at the start, norms of norms aside
    for i, block in enumerate(model.blocks):
        v = block.attn.c_v(h) + (model.value_embeds[str(i)](x) if i % 2 else 0)
        torch.testing.assert_close(seen[i].flatten(2), v, **FLOAT32)


def test_gqa_has_narrower_keys_values_and_tables():
    model, x = make_model(replace(TINY, N_KV_HEAD=2)), make_tokens()
    attn = model.blocks[1].attn
    assert attn.c_q.weight.shape == (32, 32) and attn.ve_gate.weight.shape == (2, 8)
    assert attn.c_k.weight.shape == attn.c_v.weight.shape == (16, 32)
    assert {tuple(table.weight.shape) for table in model.value_embeds.values()} == {(V, 16)}
    shaken(model)(x, x).backward()
    assert all(p.grad.count_nonzero() > 0 for p in model.parameters())


def test_key_heads_that_do_not_divide_the_query_heads():
    with pytest.raises(ValueError, match="N_KV_HEAD = 3 does not divide the 4"):
        make_model(replace(TINY, N_KV_HEAD=3))


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_causal_and_row_by_row(n_kv_head):
    model, x = shaken(make_model(replace(TINY, N_KV_HEAD=n_kv_head))), make_tokens()
    changed = x.clone()
    changed[0, 9:] = (x[0, 9:] + 1) % V
    before, after = model(x), model(changed)
    torch.testing.assert_close(after[0, :9], before[0, :9], **FLOAT32)
    torch.testing.assert_close(after[1:], before[1:], **FLOAT32)
    assert ((after - before)[0, 9:].abs().amax(-1) > 0.1).all()


def test_the_first_token_reaches_the_last_logits():
    model, x = shaken(make_model()), make_tokens()
    changed = x.clone()
    changed[:, 0] = (x[:, 0] + 1) % V
    assert (model(changed) - model(x))[:, -1].abs().amax() > 1e-2  # a thousand times the rounding


def test_overfits_one_batch():
    model, x = make_model(), make_tokens()
    optimizer = train.make_optimizer(model, TINY)
    for step in range(60):
        train.set_schedules(optimizer, TINY, step / 60, step)
        loss = train.train_step(model, optimizer, lambda: (x, x.roll(-1, 1)), 1)
    assert loss.item() < 0.05  # nats, from ln 64 = 4.2; 48 targets in 44,000 parameters


# -----------------------------------------------------------------------------
# FLOPs


def test_flops_of_the_full_model(full):
    C = 512
    linear = 8 * 12 * C * C + 4 * 32 * 4 + 8192 * C  # blocks, gates, head
    keys = 6 * 1024 + 2 * 2048
    assert train.flops_per_token(full, train.FULL, 2048) == 6 * linear + 12 * C * keys
    assert train.flops_per_token(full, train.FULL, 2048) == pytest.approx(239e6, abs=1e6)


@pytest.mark.parametrize("n_kv_head", [0, 2])
def test_flops_against_a_count_of_every_multiplication(n_kv_head):
    def counted(q, k, v, window):  # matrix products only, all keys: what the counter sees of attention at window T
        k, v = (t.repeat_interleave(4 // t.size(2), dim=2) for t in (k, v))
        score = torch.einsum("bihd,bjhd->bhij", q, k)
        return torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)

    k = replace(TINY, WINDOW_PATTERN="L", N_KV_HEAD=n_kv_head)
    model, x = make_model(k, counted), make_tokens()
    with FlopCounterMode(display=False) as counter:
        model(x, x).backward()
    assert counter.get_total_flops() == train.flops_per_token(model, k, T) * x.numel()
