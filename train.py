"""The mutable half of the harness: a GPT, its optimizer, and a loop that trains until the harness's clock says stop.

    uv run train.py > run.log 2>&1        the same command on every machine; SEED=1 in front for another seed

This is the one file that changes during research. What it must keep: batches come from `make_dataloader`, time from
`clock`, the number from `evaluate_bpb`, and `model(x)` returns logits (B, T, V) that look at nothing beyond the token
they stand at. All else is free: architecture, optimizer, schedules, sizes.

It reads: knobs → attention → model → optimizer → schedules → accounting → loop → main. Importing it does nothing.
"""

import fnmatch
import gc
import math
import os
import re
import sys
import time
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from prepare import EvaluationError, PrepareError, Tokenizer, clock, evaluate_bpb, make_dataloader

# -----------------------------------------------------------------------------
# Knobs


@dataclass(frozen=True)
class Knobs:
    # Model
    DEPTH: int = 8  # blocks
    ASPECT_RATIO: int = 64  # width per block, so that a deeper model is a wider one
    HEAD_DIM: int = 128  # channels a head; the width is rounded up to a multiple
    N_KV_HEAD: int = 0  # key and value heads, a divisor of the query heads; 0: as many
    WINDOW_PATTERN: str = "SSSL"  # over the layers, again and again: S sees SHORT_WINDOW, L all; the last is always L
    SHORT_WINDOW: float = 0.5  # of the context
    ROPE_BASE: float = 10_000.0  # longest wavelength of the rotation, in tokens / 2π
    SOFTCAP: float = 15.0  # bound of the logits
    RESID_LAMBDA: float = 1.0  # start of the weight on the residual stream before each block
    X0_LAMBDA: float = 0.1  # start of the weight on the embedding, added before each block
    VE_GATE_CHANNELS: int = 32  # channels that the gate of the value embeddings sees

    # Optimizer. Learning rates of AdamW's tables are for width 768 and scale with (width / 768)^-1/2
    EMBEDDING_LR: float = 0.6  # token and value embeddings
    HEAD_LR: float = 0.004
    X0_LR: float = 0.5
    RESID_LR: float = 0.005  # a hundredth: this weight multiplies the whole stream, depth times
    ADAM_BETAS: tuple = (0.8, 0.95)
    X0_BETAS: tuple = (0.96, 0.95)  # more momentum: one noisy number a layer
    ADAM_EPS: float = 1e-10
    MATRIX_LR: float = 0.04  # spectral norm a step
    MATRIX_WEIGHT_DECAY: float = 0.2  # a step, times the learning rate; falls to 0 over the run
    MUON_MOMENTUM: tuple = (0.85, 0.95)  # from, to
    MUON_MOMENTUM_STEPS: int = 300  # steps it takes
    MUON_BETA2: float = 0.95  # of NorMuon's second moment

    # Schedule and sizes
    WARMDOWN: float = 0.5  # last share of the time, in which the learning rate falls to 0
    TOTAL_BATCH: int = 2**19  # tokens a step
    MAX_MICRO_BATCH: int = 64  # rows at once; fewer where these don't fit the memory, the step stays as it is


FULL = Knobs()

# Without a GPU: the most that two CPU cores learn in 60 seconds at rows of 256 tokens. Tried on Python source, val_bpb:
# depth 2, width 128, 2^11 tokens a step 1.831 (2^12: 1.847); width 64 1.862; depth 3, width 96 1.841; depth 4,
# width 128 1.978; wider or deeper ones take too few steps. On one core width 64 is the better one.
LAPTOP = replace(FULL, DEPTH=2, HEAD_DIM=32, TOTAL_BATCH=2**11, MAX_MICRO_BATCH=8)

KNOBS = {"full": FULL, "laptop": LAPTOP}  # by the scale that was prepared

LOG_SECONDS = 10  # between two lines where output is redirected

# -----------------------------------------------------------------------------
# Attention: attention(q, k, v, window), q (B, T, H, D), k and v (B, T, H_kv, D) → (B, T, H, D).
# Causal: the query at i sees the keys j with 0 ≤ i - j ≤ window.


@cache
def window_mask(T, window, device):
    """True where the query (row) sees the key (column), (T, T)."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance <= window)


def sdpa_attention(q, k, v, window):
    """PyTorch's scaled-dot-product attention with an exact mask: everywhere, CPU included."""
    T, shared = q.size(1), q.size(2) // k.size(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if shared > 1:  # each key head serves `shared` query heads in a row
        k, v = (t.repeat_interleave(shared, dim=1) for t in (k, v))
    mask = None if window >= T - 1 else window_mask(T, window, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def flex_attention_for(T, windows, device):
    """FlexAttention (arXiv 2412.05496) for rows of T tokens and these windows. It is fast only inside torch.compile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(window):
        return lambda b, h, i, j: (i >= j) & (i - j <= window)

    # Made ahead of compilation, once per window
    masks = {window: create_block_mask(sees(window), None, None, T, T, device=device) for window in set(windows)}

    def attention(q, k, v, window):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        return flex_attention(q, k, v, block_mask=masks[window], enable_gqa=True).transpose(1, 2)

    return attention


FLASH3 = "kernels-community/flash-attn3"


def flash3_attention():
    """FlashAttention-3: the build that LOCAL_KERNELS names, else the one of an earlier run, else the kernel hub's.

    Raises whatever keeps it away. An earlier run's needs no network, so that a night has one kernel from end to end.
    """
    import requests
    from kernels import get_kernel, get_local_kernel, install_kernel

    wanted = dict(revision="v1", trust_remote_code=[FLASH3])  # without a revision the library refuses
    if "LOCAL_KERNELS" in os.environ:
        flash = get_kernel(FLASH3, **wanted)
    else:
        try:
            flash = get_local_kernel(install_kernel(FLASH3, local_files_only=True, **wanted))
        except Exception:  # there is none yet, or a part of one
            # Behind a firewall that answers nothing the library would wait for minutes
            requests.head(os.environ.get("HF_ENDPOINT") or "https://huggingface.co", timeout=5)
            flash = get_kernel(FLASH3, **wanted)

    def attention(q, k, v, window):
        out = flash.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # some builds return the softmax sums too

    return attention


def pick_attention(T, windows, head_dim, device):
    """(name, attention, reason): the fastest kernel that works here, found out once."""
    if device.type != "cuda":
        return "sdpa", sdpa_attention, "exact mask: there is no CUDA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return "sdpa", sdpa_attention, f"exact mask: nothing compiles bfloat16 for compute capability {major}.{minor}"
    if major in (8, 9):
        try:
            attention = flash3_attention()
            # Some builds load and then fail, or would break the compiled model in pieces
            trial = torch.compile(attention, dynamic=False, fullgraph=True)
            q = torch.randn(1, 128, 1, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            trial(q, q, q, 64).sum().backward()
            torch.cuda.synchronize()
            return "fa3", attention, "FlashAttention-3 from the kernel hub"
        except Exception as error:  # the hub away, no build for this PyTorch, a broken import: all leave the next one
            reason = f"no FlashAttention-3 ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]})"
    else:
        reason = f"no FlashAttention-3 for compute capability {major}.{minor}"
    return "flex", flex_attention_for(T, windows, device), reason


# -----------------------------------------------------------------------------
# Model


def norm(x):
    """RMSNorm without weights over the last dimension (arXiv 1910.07467), in the type of x.

    Newer PyTorch's autocast makes it float32, which the residual stream would then be: twice the traffic.
    """
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding (arXiv 2104.09864), half-split: x (B, T, H, D); cos, sin (T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def model_width(k):
    return math.ceil(k.DEPTH * k.ASPECT_RATIO / k.HEAD_DIM) * k.HEAD_DIM


def kv_heads(k):
    """Heads of keys and values: N_KV_HEAD, 0 for as many as query heads. Raises ValueError if those don't divide."""
    heads = model_width(k) // k.HEAD_DIM
    if heads % (k.N_KV_HEAD or heads):
        raise ValueError(f"N_KV_HEAD = {k.N_KV_HEAD} does not divide the {heads} query heads")
    return k.N_KV_HEAD or heads


def layer_windows(k, T):
    """Per layer, how many keys to the left of its own a query sees."""
    if not k.WINDOW_PATTERN or set(k.WINDOW_PATTERN) - {"S", "L"}:
        raise ValueError(f"WINDOW_PATTERN is {k.WINDOW_PATTERN!r}: it takes the letters S and L, at least one")
    kinds = [k.WINDOW_PATTERN[i % len(k.WINDOW_PATTERN)] for i in range(k.DEPTH - 1)] + ["L"]
    return [int(k.SHORT_WINDOW * T) if kind == "S" else T for kind in kinds]


class Attention(nn.Module):
    def __init__(self, k, has_value_embedding, attention):
        super().__init__()
        width = model_width(k)
        self.n_head, self.head_dim = width // k.HEAD_DIM, k.HEAD_DIM
        self.n_kv_head = kv_heads(k)
        kv_width = self.n_kv_head * self.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.gate_channels = min(k.VE_GATE_CHANNELS, width)
        self.ve_gate = nn.Linear(self.gate_channels, self.n_kv_head, bias=False) if has_value_embedding else None
        self.attention = attention

    def forward(self, x, ve, cos, sin, window):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if ve is not None:  # value residual, from a table of its own (ResFormer, arXiv 2410.17897)
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # (B, T, H_kv), 1 at the start
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        # QK-norm (arXiv 2302.05442). A rotation keeps the norm, so either may come first; this way the compiler makes
        # one pass of both. Back to the type of the projections: the kernels want 16 bits, and cos is float32
        kernel_type = q.dtype
        q, k, v = (t.to(kernel_type) for t in (rotate(norm(q), cos, sin), rotate(norm(k), cos, sin), v))
        y = self.attention(q, k, v, window)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, k):
        super().__init__()
        width = model_width(k)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())  # ReLU² (Primer, arXiv 2109.08668)


class Block(nn.Module):
    def __init__(self, k, has_value_embedding, attention):
        super().__init__()
        self.attn = Attention(k, has_value_embedding, attention)
        self.mlp = MLP(k)

    def forward(self, x, ve, cos, sin, window):
        x = x + self.attn(norm(x), ve, cos, sin, window)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only transformer. `model(x)`: logits (B, T, V), float32; `model(x, y)`: mean cross-entropy, a scalar."""

    def __init__(self, k, vocab_size, T, attention):
        super().__init__()
        width = model_width(k)
        kv_width = kv_heads(k) * k.HEAD_DIM
        with_ve = [i for i in range(k.DEPTH) if i % 2 == (k.DEPTH - 1) % 2]  # every other layer, the last included
        self.softcap = k.SOFTCAP
        self.windows = layer_windows(k, T)
        self.wte = nn.Embedding(vocab_size, width)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(vocab_size, kv_width) for i in with_ve})
        self.blocks = nn.ModuleList(Block(k, i in with_ve, attention) for i in range(k.DEPTH))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.empty(k.DEPTH))
        self.x0_lambdas = nn.Parameter(torch.empty(k.DEPTH))
        frequency = k.ROPE_BASE ** (-torch.arange(0, k.HEAD_DIM, 2, dtype=torch.float32) / k.HEAD_DIM)
        angle = torch.outer(torch.arange(T, dtype=torch.float32), frequency)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        initialise(self, k)

    def forward(self, x, y=None):
        # Around one pass only: autocast keeps its 16-bit copies of the weights until it is left, and a longer one would
        # compute with those of the first step for ever.
        with torch.autocast("cuda", torch.bfloat16) if x.is_cuda else nullcontext():
            logits = self.logits(x)
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())

    def logits(self, x):
        T = x.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        h = h0 = norm(self.wte(x))  # (B, T, C)
        for i, (block, window) in enumerate(zip(self.blocks, self.windows)):
            h = self.resid_lambdas[i] * h + self.x0_lambdas[i] * h0
            ve = self.value_embeds[str(i)](x) if str(i) in self.value_embeds else None  # (B, T, C_kv)
            h = block(h, ve, cos, sin, window)
        logits = self.lm_head(norm(h)).float()  # (B, T, V)
        return self.softcap * torch.tanh(logits / self.softcap)  # Gemma 2, arXiv 2408.00118


# What each parameter starts as and which optimizer group moves it: the first line whose pattern fits its name.
# A matrix added to a block needs no line here; a parameter that no line fits is an error with its name.
#   pattern              start                     group
PARAMETERS = (
    ("wte.weight", ("normal", 1.0), "embedding"),
    ("value_embeds.*", ("uniform", 1.0), "embedding"),  # in units of width^-1/2
    ("lm_head.weight", ("normal", 0.001), "head"),
    ("resid_lambdas", ("constant", "RESID_LAMBDA"), "resid"),
    ("x0_lambdas", ("constant", "X0_LAMBDA"), "x0"),
    ("blocks.*.c_proj.weight", ("constant", 0.0), "matrix"),  # so that every block starts as the identity
    ("blocks.*.ve_gate.weight", ("constant", 0.0), "matrix"),
    ("blocks.*.weight", ("uniform", 1.0), "matrix"),
)


def rule(name):
    """(start, group) of the parameter of that name. Raises ValueError if PARAMETERS has no line for it."""
    for pattern, start, group in PARAMETERS:
        if fnmatch.fnmatchcase(name, pattern):
            return start, group
    raise ValueError(f"parameter {name} fits no line of PARAMETERS: add one that says how it starts and what moves it")


@torch.no_grad()
def initialise(model, k):
    """Give every parameter its start. Raises ValueError, with its name, for one left out or that Muon can't move."""
    for name, p in model.named_parameters():
        p.fill_(math.nan)
        (kind, value), group = rule(name)
        value = getattr(k, value) if isinstance(value, str) else value  # a string names a knob
        if group == "matrix" and p.ndim != 2:
            raise ValueError(f"parameter {name} has shape {tuple(p.shape)}, and Muon moves matrices: give it a line")
        if kind == "normal":
            p.normal_(0.0, value)
        elif kind == "uniform":
            bound = value * math.sqrt(3 / model_width(k))  # of uniform ±√3·s the standard deviation is s
            p.uniform_(-bound, bound)
        elif kind == "constant":
            p.fill_(value)
        if not p.isfinite().all():
            raise ValueError(f"parameter {name} was left without a start by {kind!r}")


# -----------------------------------------------------------------------------
# Optimizer

# The best polynomial of each of five steps towards singular values of 1 (Polar Express, arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G):
    """The orthogonal factor of G (..., m, n), roughly: every singular value is moved to about 1.

    In bfloat16 on a GPU; a CPU has no fast one, there in float32.
    """
    X = G.bfloat16() if G.is_cuda else G.float()
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = G.size(-2) > G.size(-1)
    X = X.mT if tall else X  # the Gram matrix below is then the smaller one
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def averaged_dim(G):
    """The dimension over which NorMuon averages G (..., m, n): along the rows, of a wide matrix along the columns."""
    return -1 if G.size(-2) >= G.size(-1) else -2


def equalise(G, second, beta2):
    """NorMuon (arXiv 2510.05491): rows (columns, where G is wide) scaled to the same size over time, the norm kept.

    G (N, m, n), `second` the running mean square of each row or column, updated in place.
    """
    dim = averaged_dim(G)
    square = G.float().square().mean(dim=dim, keepdim=True)  # (N, m, 1) or (N, 1, n)
    second.mul_(beta2).add_(square * (1 - beta2))
    scale = second.clamp_min(1e-10).rsqrt()
    before = square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return G * (scale * before / after.clamp_min(1e-10))


def muon_step(p, grad, buffer, second, lr, momentum, beta2, weight_decay):
    """One step of Muon for N matrices of one shape: p, grad and buffer (N, m, n), changed in place.

    Muon is steepest descent in the spectral norm: https://kellerjordan.github.io/posts/muon
    """
    buffer.mul_(momentum).add_(grad * (1 - momentum))
    update = grad * (1 - momentum) + buffer * momentum  # Nesterov
    update = equalise(polar_express(update), second, beta2).to(p.dtype)
    lr = lr * max(1, p.size(-2) / p.size(-1)) ** 0.5
    agree = (update * p) >= 0  # cautious: decay only where the step shrinks the weight too (arXiv 2411.16085)
    p.sub_(lr * (update + weight_decay * p * agree))


def adamw_step(p, grad, mean, square, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW (arXiv 1711.05101), as torch.optim.AdamW takes it. `step` counts from 1."""
    p.mul_(1 - lr * weight_decay)
    mean.mul_(beta1).add_(grad * (1 - beta1))
    square.mul_(beta2).add_(grad.square() * (1 - beta2))
    root = (square / (1 - beta2**step)).sqrt() + eps
    p.sub_(lr / (1 - beta1**step) * mean / root)


class MuonAdamW:
    """Groups of `kind` "muon" (matrices of one shape, stepped as one stack) and "adamw".

    `compiled` wraps the two step functions: torch.compile on CUDA. Numbers that change from step to step reach them as
    tensors, since a compiled function is compiled again for each new Python number. It has the fields of a
    torch.optim.Optimizer and is none: to make one imports the compiler, two seconds that a CPU would wait for nothing.
    """

    def __init__(self, groups, compiled=lambda function: function):
        self.param_groups = [dict(group, initial_lr=group["lr"]) for group in groups]
        self.state = defaultdict(dict)
        self.muon_step, self.adamw_step = compiled(muon_step), compiled(adamw_step)

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (self.step_muon if group["kind"] == "muon" else self.step_adamw)(group)

    def step_adamw(self, group):
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            numbers = as_tensors(state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            self.adamw_step(p, p.grad, state["mean"], state["square"], *numbers)

    def step_muon(self, group):
        params = group["params"]
        if all(p.grad is None for p in params):
            return
        state = self.state[params[0]]
        stack = torch.stack(params)  # (N, m, n)
        if not state:
            dim = averaged_dim(stack)
            state["buffer"] = torch.zeros_like(stack)
            state["second"] = torch.zeros_like(stack.select(dim, 0).unsqueeze(dim))
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        numbers = as_tensors(group["lr"], group["momentum"], group["beta2"], group["weight_decay"])
        self.muon_step(stack, grads, state["buffer"], state["second"], *numbers)
        moved = [(p, new) for p, new in zip(params, stack) if p.grad is not None]
        torch._foreach_copy_(*map(list, zip(*moved)))


def as_tensors(*numbers):
    return [torch.tensor(number, dtype=torch.float32) for number in numbers]


def make_optimizer(model, k, compiled=lambda function: function):
    """MuonAdamW over every parameter of the model, each in the group that PARAMETERS names."""
    members = {}
    for name, p in model.named_parameters():
        _, group = rule(name)
        members.setdefault((group, p.shape if group == "matrix" else None), []).append(p)
    by_width = (model_width(k) / 768) ** -0.5
    adamw = dict(kind="adamw", betas=k.ADAM_BETAS, eps=k.ADAM_EPS, weight_decay=0.0)
    kinds = {
        "embedding": dict(adamw, lr=k.EMBEDDING_LR * by_width),
        "head": dict(adamw, lr=k.HEAD_LR * by_width),
        "resid": dict(adamw, lr=k.RESID_LR),
        "x0": dict(adamw, lr=k.X0_LR, betas=k.X0_BETAS),
        "matrix": dict(kind="muon", lr=k.MATRIX_LR, momentum=0.0, beta2=k.MUON_BETA2, weight_decay=0.0),
    }
    groups = [dict(kinds[group], params=params) for (group, _), params in members.items()]
    return MuonAdamW(groups, compiled)


# -----------------------------------------------------------------------------
# Schedules


def learning_rate_factor(progress, warmdown):
    """1, then falling to 0 over the last `warmdown` of the time. Progress runs from 0 to 1."""
    return min(1.0, (1 - progress) / warmdown) if warmdown > 0 else 1.0


def set_schedules(optimizer, k, progress, step):
    """Set what changes: by time the learning rates and the weight decay, by steps Muon's momentum."""
    factor = learning_rate_factor(progress, k.WARMDOWN)
    low, high = k.MUON_MOMENTUM
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"] = low + (high - low) * min(step / k.MUON_MOMENTUM_STEPS, 1)
            group["weight_decay"] = k.MATRIX_WEIGHT_DECAY * (1 - progress)


# -----------------------------------------------------------------------------
# Accounting

# Dense bfloat16 peaks with float32 accumulation: a pattern of the device's name, TFLOP/s, where NVIDIA says so (half of
# a figure that is given for 2:4 sparsity). The first pattern that is found in the name counts.
PEAK_TFLOPS = (
    (r"\bB200\b", 2250, "HGX B200 data sheet"),
    (r"\bGH200\b", 989, "GH200 data sheet"),
    (r"\bH200 NVL\b", 835, "H200 data sheet"),
    (r"\bH200\b", 989, "H200 data sheet"),
    (r"\bH100 PCIe\b", 756, "H100 data sheet"),
    (r"\bH100 NVL\b", 835, "H100 data sheet"),
    (r"\bH100\b", 989, "H100 data sheet, SXM5"),
    (r"\bA100\b", 312, "A100 data sheet"),
    (r"\bA30\b", 165, "A30 data sheet"),
    (r"\bA10\b", 125, "A10 data sheet"),
    (r"\bL40S\b", 362, "L40S data sheet"),
    (r"\bL40\b", 181, "L40 data sheet"),
    (r"\bL4\b", 121, "L4 data sheet"),
    (r"\bRTX A6000$", 155, "GA102 white paper, appendix"),
    (r"\bRTX 5090$", 209, "RTX Blackwell white paper, appendix"),
    (r"\bRTX 4090$", 165, "Ada white paper, appendix"),
    (r"\bRTX 3090$", 71, "GA102 white paper, appendix"),
)


def peak_flops(device):
    """FLOP/s at the most of the GPU at hand; nan for a CPU, a GPU that is not in the table and a part of one (MIG)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = (peak * 1e12 for pattern, peak, _ in PEAK_TFLOPS if re.search(pattern, name))
    return math.nan if "MIG" in name else next(found, math.nan)


def flops_per_token(model, k, T):
    """FLOPs of training on one token, forward and backward, counted from the modules that do them.

    A weight of a linear layer costs 6: a multiplication and an addition, forward once and backward twice (arXiv
    2204.02311, appendix B). Attention costs 12 per channel and key in the window. Embeddings are looked up: nothing.
    """
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    keys = sum(min(window, T) for window in layer_windows(k, T))
    return 6 * linear + 12 * model_width(k) * keys


class Log:
    """Progress: one line that renews itself for a person, whole lines now and then for a file."""

    def __init__(self):
        self.watched = sys.stdout.isatty()
        self.last = -math.inf

    def line(self, text):
        if self.watched:
            print(f"\r{text:<100}", end="", flush=True)
        elif time.monotonic() - self.last >= LOG_SECONDS:
            self.last = time.monotonic()
            print(text, flush=True)

    def close(self):
        if self.watched:
            print()


# -----------------------------------------------------------------------------
# Loop


class TrainingError(Exception):
    """The run can't end in a number: the message says at which step, and what was seen."""


@contextmanager
def put_back(model, optimizer):
    """Whatever is done inside, weights, buffers, schedules and random state are afterwards what they were, bit for bit.

    Gradients and the optimizer's state are gone: this is for before the first step, when there are none.
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
                tensor.grad = None
        optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, groups):
            group.update(before)
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def train_step(forward, optimizer, batch, micro_steps):
    """Accumulate the gradients of `micro_steps` batches from `batch()` and step. Returns the mean loss, a tensor."""
    total = 0.0
    for _ in range(micro_steps):
        loss = forward(*batch()) / micro_steps
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    return total


def is_out_of_memory(error):
    """Whether a RuntimeError is of the GPU's memory: the allocator's own, or one of a library's or the compiler's."""
    says = str(error).lower()
    signs = ("out of memory", "outofmemory", "alloc_failed", "cublas_status_not_initialized")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in says for sign in signs)


def warm_up(model, forward, optimizer, k, vocab_size, T, device):
    """Compile, allocate and find the micro-batch, on random tokens, off the clock; then all is as it was.

    Returns the rows of the micro-batch: the most, MAX_MICRO_BATCH at first, that fit the memory.
    """
    rows = k.TOTAL_BATCH // T
    if rows * T != k.TOTAL_BATCH:
        fits = max(rows, 1) * T
        raise TrainingError(
            f"TOTAL_BATCH {k.TOTAL_BATCH:,} is no multiple of a row, {T} tokens: {fits:,} is (train.py)"
        )
    sizes = [n for n in range(min(rows, k.MAX_MICRO_BATCH), 0, -1) if rows % n == 0]  # that share the step out evenly
    dice = torch.Generator().manual_seed(0)  # of its own: the run's random state is not touched
    for micro, smaller in zip(sizes, [*sizes[1:], None]):
        tokens = torch.randint(vocab_size, (2, micro, T), generator=dice).to(device)
        batch = partial(tuple, tokens)
        try:
            with put_back(model, optimizer):
                # twice: the second pass meets the optimizer's state and the gradients' layout as they stay
                for _ in range(2 if device.type == "cuda" else 1):
                    train_step(forward, optimizer, batch, min(2, rows // micro))
                model.eval()
                with torch.no_grad():
                    forward(tokens[0])
                model.train()
            return micro
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            says = str(error).partition("\n")[0][:200]
            if smaller:
                print(f"{micro} rows at once are out of memory, trying {smaller}", flush=True)
        gc.collect()  # an error's traceback holds tensors in circles
        torch.cuda.empty_cache()
        torch.compiler.reset()  # each size is compiled anew, and after eight the compiler would give up in silence
    raise TrainingError(f"out of GPU memory with one row at a time: make the model smaller ({says})")


def train(forward, optimizer, loader, k, micro_steps, vocab_size, flops, peak):
    """Train until the time is up. Returns the number of steps. Raises TrainingError where the loss explodes."""
    limit = 2 * math.log(vocab_size)  # nats; a uniform guess costs half of that
    step, smooth, log = 0, 0.0, Log()
    gc.collect()
    gc.freeze()  # Python's collector would stop the loop for half a second now and then
    gc.disable()
    try:
        while not clock.time_is_up():
            started = time.monotonic()
            set_schedules(optimizer, k, clock.progress(), step)
            loss = train_step(forward, optimizer, lambda: next(loader)[:2], micro_steps).item()  # waits for the GPU
            step += 1
            if not loss <= limit:
                raise TrainingError(f"step {step}: the loss is {loss:.4g}, beyond {limit:.1f}: training blew up")
            smooth += 0.1 * (loss - smooth)
            rate = k.TOTAL_BATCH / (time.monotonic() - started)
            mfu = "" if math.isnan(peak) else f" | MFU {100 * flops * rate / peak:.1f} %"
            log.line(
                f"step {step:5d} | {100 * clock.progress():5.1f} % | loss {smooth / (1 - 0.9**step):.4f} | "
                f"{rate:,.0f} tokens/s{mfu} | {clock.seconds():.0f} s"
            )
    finally:
        log.close()
        gc.enable()
        gc.unfreeze()
    return step


# -----------------------------------------------------------------------------
# Main


def compiler():
    """torch.compile as a run wants it: for the shapes it meets, each of them, and kept for the next run."""
    if hasattr(os, "getuid"):  # the cache is named for the user, and a container's may have no name: an error
        os.environ.setdefault("USER", str(os.getuid()))
    torch._dynamo.config.recompile_limit = 64  # shapes of one function, 8 by default: the rest would run uncompiled
    # PyTorch 2.9 compiles this anew in every run, later releases do not. (The value is a part of the cache's key.)
    torch._inductor.config.unsafe_marked_cacheable_functions = {
        "torch.ops.higher_order.flex_attention_backward": torch.__version__
    }
    return partial(torch.compile, dynamic=False)


def build(k, vocab_size, T, device):
    """(name of the attention kernel, model, the model as it is called, optimizer) of a run on this device."""
    cuda = device.type == "cuda"
    if cuda:  # read at the first allocation: segments that grow waste less. PyTorch 2.9 heeds only this older name
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.set_float32_matmul_precision("high")
    compiled = compiler() if cuda else (lambda function: function)

    name, attention, reason = pick_attention(T, layer_windows(k, T), k.HEAD_DIM, device)
    print(f"attention: {name} ({reason})")
    with device:
        model = GPT(k, vocab_size, T, attention)
    if cuda:
        for table in (model.wte, *model.value_embeds.values()):
            table.bfloat16()  # half the traffic; the rest is cast by autocast
    return name, model, compiled(model), make_optimizer(model, k, compiled)


def main():
    device = prepare.start_run()
    k, T = KNOBS[prepare.SCALE], prepare.MAX_SEQ_LEN
    tokenizer = Tokenizer.from_directory()
    V = tokenizer.get_vocab_size()
    name, model, forward, optimizer = build(k, V, T, device)
    params, flops, peak = sum(p.numel() for p in model.parameters()), flops_per_token(model, k, T), peak_flops(device)
    print(
        f"model: depth {k.DEPTH}, width {model_width(k)}, {params / 1e6:.1f} M parameters, "
        f"{flops / 1e6:.1f} MFLOPs a token"
    )
    if device.type == "cuda" and math.isnan(peak):
        print(f"MFU: nan, PEAK_TFLOPS has no peak of {prepare.device_name()}")

    micro = warm_up(model, forward, optimizer, k, V, T, device)
    print(f"batch: {k.TOTAL_BATCH:,} tokens a step, {micro} rows of {T} at once", flush=True)
    loader = make_dataloader(tokenizer, micro, T, "train")
    steps = train(forward, optimizer, loader, k, k.TOTAL_BATCH // (micro * T), V, flops, peak)
    val_bpb = evaluate_bpb(forward, tokenizer, micro)
    tokens = steps * k.TOTAL_BATCH
    prepare.report(
        val_bpb,
        mfu_percent=100 * flops * tokens / clock.seconds() / peak,
        total_tokens=tokens,
        num_steps=steps,
        num_params=params,
        depth=k.DEPTH,
        attention=name,
    )


if __name__ == "__main__":
    try:
        main()
    except (PrepareError, EvaluationError, TrainingError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted, no val_bpb")
