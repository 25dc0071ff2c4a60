"""The mutable half of the harness: a GPT, its optimizer, and a loop that trains until the harness's clock says stop.

    uv run train.py                       the same command on every machine; SEED=1 in front of it for another seed

This is the one file that changes during research. It must keep a few things: batches come from `make_dataloader`, time
from `clock`, the score from `evaluate_bpb`, and `model(idx)` returns logits (B, T, V) that depend on no later token.
Everything else may change: architecture, optimizer, schedules, sizes.

Sections: config → attention → model → optimizer → schedules → accounting → loop → main. Importing it does nothing.
"""

import ctypes
import fnmatch
import gc
import itertools
import math
import os
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial

# Such segments waste less memory. PyTorch 2.9 knows the first name, later releases read the second when imported
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ["PYTORCH_CUDA_ALLOC_CONF"])
# On a CPU: a thread that waits for others spins 100 times as long by default, which takes time from them where the
# machine is busy. (GNU's OpenMP, which PyTorch uses on Linux.) Then: pages of 2 MiB for large tensors
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from prepare import EvaluationError, PrepareError, Tokenizer, bfloat16_works, clock, evaluate_bpb, make_dataloader

# -----------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every hyperparameter. One without a value here depends on the scale: its values stand below."""

    # Model
    DEPTH: int  # blocks
    ASPECT_RATIO: int = 64  # width per block, so a deeper model is also wider
    HEAD_DIM: int  # channels of a head; the width is rounded up to a multiple of it
    N_KV_HEAD: int = 0  # heads of keys and values, a divisor of the query heads; 0: as many as query heads
    WINDOW_PATTERN: str = "SSSL"  # repeated over the layers: S sees SHORT_WINDOW, L everything; the last is always L
    SHORT_WINDOW: float = 0.5  # of the context
    ROPE_BASE: float = 10_000.0  # longest wavelength of the rotary embedding, in tokens / 2π
    SOFTCAP: float = 15.0  # bound of the logits
    RESID_LAMBDA: float = 1.0  # initial weight of the residual stream before each block
    X0_LAMBDA: float = 0.1  # initial weight of the embedding, which is added before each block
    VE_GATE_CHANNELS: int = 32  # input channels of the value embeddings' gate

    # Optimizer. The learning rates of embeddings and head are for width 768, and scale with (width / 768)^-1/2
    EMBEDDING_LR: float = 0.6  # token and value embeddings
    HEAD_LR: float = 0.004
    X0_LR: float = 0.5
    RESID_LR: float = 0.005  # a hundredth of X0_LR: this weight multiplies the whole stream in every layer
    ADAM_BETAS: tuple = (0.8, 0.95)
    X0_BETAS: tuple = (0.96, 0.95)  # more momentum, as the gradient of one scalar per layer is noisy
    ADAM_EPS: float = 1e-10
    MATRIX_LR: float = 0.04  # spectral norm per step
    MATRIX_WEIGHT_DECAY: float = 0.2  # per step, times the learning rate; falls to 0 over the run
    MUON_MOMENTUM: tuple = (0.85, 0.95)  # from, to
    MUON_MOMENTUM_STEPS: int = 300  # steps from the first to the second
    MUON_BETA2: float = 0.95  # of NorMuon's second moment

    # Schedule and batch
    WARMUP_RATIO: float = 0.0  # first part of the time, in which the learning rate rises from 0
    WARMDOWN_RATIO: float = 0.5  # last part of the time, in which the learning rate falls to its end
    FINAL_LR_FRAC: float = 0.0  # the end of the learning rate, as a share of its beginning
    TOTAL_BATCH_SIZE: int  # tokens per step
    DEVICE_BATCH_SIZE: int  # most rows per micro-batch; fewer if they don't fit the memory, the step stays the same

    @property
    def n_embd(self):  # width of the model
        return math.ceil(self.DEPTH * self.ASPECT_RATIO / self.HEAD_DIM) * self.HEAD_DIM

    @property
    def n_kv_head(self):
        n_head = self.n_embd // self.HEAD_DIM
        if n_head % (self.N_KV_HEAD or n_head):
            raise ValueError(f"N_KV_HEAD = {self.N_KV_HEAD} does not divide the {n_head} query heads")
        return self.N_KV_HEAD or n_head


# What `uv run prepare.py` prepared decides which one is used: `--scale full`, `desktop` or `laptop`
FULL = Config(DEPTH=8, HEAD_DIM=128, TOTAL_BATCH_SIZE=2**19, DEVICE_BATCH_SIZE=64)
DESKTOP = Config(DEPTH=4, HEAD_DIM=64, TOTAL_BATCH_SIZE=2**16, DEVICE_BATCH_SIZE=16)  # never measured on a GPU

# The best that was found for 60 seconds of two CPU cores and rows of 256 tokens, Python source cut at 4,000 characters
# (now at about a row: the figures differ). val_bpb, mean of three seeds: 1.566; HEAD_LR 0.008 1.600, and with it
# MATRIX_LR 0.06 1.604; heads of 64 1.661; 2^11 tokens per step 1.672, with heads of 64 1.674, of 32 1.709; 2^13, heads
# of 64 1.665 (two seeds). The spread of 1.566 was 0.047.
LAPTOP = Config(DEPTH=2, HEAD_DIM=128, TOTAL_BATCH_SIZE=2**12, DEVICE_BATCH_SIZE=16)

LOG_LINES = 10  # of progress in a file, the same number for every budget

# -----------------------------------------------------------------------------
# Attention: attention(q, k, v, window), q (B, T, H, D), k and v (B, T, H_kv, D) → (B, T, H, D).
# Causal: the query at i sees the keys j with 0 ≤ i - j ≤ window.


def compiler():
    """torch.compile as a run wants it: for each shape that it meets, and kept for the next run."""
    os.environ.setdefault("USER", str(os.getuid()))  # names the compiler's cache; in a container it may be missing
    torch._dynamo.config.recompile_limit = 64  # shapes per function, 8 by default: later ones would run uncompiled
    # PyTorch 2.9 compiles this anew in every run, later releases do not. (The value is a part of the cache's key.)
    backward = "torch.ops.higher_order.flex_attention_backward"
    torch._inductor.config.unsafe_marked_cacheable_functions = {backward: torch.__version__}
    return partial(torch.compile, dynamic=False)


@cache
def window_mask(T, window, device, dtype):
    """What is added to the scores, (T, T): 0 where the query (row) sees the key (column), elsewhere -inf."""
    i = torch.arange(T, device=device)
    distance = i[:, None] - i[None, :]
    return torch.zeros(T, T, device=device, dtype=dtype).masked_fill((distance < 0) | (distance > window), -math.inf)


def sdpa_attention(q, k, v, window):
    """Scaled-dot-product attention with an exact mask. It works on every device."""
    T, group_size = q.size(1), q.size(2) // k.size(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if group_size > 1:  # each key head serves a group of neighbouring query heads
        k, v = (t.repeat_interleave(group_size, dim=1) for t in (k, v))
    mask = partial(window_mask, T, window, q.device, q.dtype)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:  # PyTorch's own takes more than twice the time there
        scores = (q / math.sqrt(q.size(-1))) @ k.mT + mask()  # (B, H, T, T)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2)
    mask = None if window >= T - 1 else mask()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def flex_attention_for(T, windows, device):
    """FlexAttention (arXiv 2412.05496) for rows of T tokens and these windows. It is fast only inside torch.compile."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @torch.compiler.disable  # once per window, outside of the compiled model
    def make_mask(window):
        return create_block_mask(lambda b, h, i, j: (i >= j) & (i - j <= window), None, None, T, T, device=device)

    masks = {window: make_mask(window) for window in set(windows)}

    def attention(q, k, v, window):
        if window not in masks:  # windows may change in a run
            masks[window] = make_mask(window)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        return flex_attention(q, k, v, block_mask=masks[window], enable_gqa=True).transpose(1, 2)

    return attention


FLASH3 = "kernels-community/flash-attn3"


def flash3_attention():
    """FlashAttention-3: the build that LOCAL_KERNELS names, else the one of an earlier run, else from the kernel hub.

    Raises an error if there is none. The one of an earlier run needs no network, so a night uses one kernel."""
    from kernels import get_kernel, get_local_kernel, install_kernel

    wanted = dict(revision="v1", trust_remote_code=[FLASH3])  # the library demands a revision
    if "LOCAL_KERNELS" in os.environ:
        flash = get_kernel(FLASH3, **wanted)
    else:
        try:
            flash = get_local_kernel(install_kernel(FLASH3, local_files_only=True, **wanted))
        except Exception:  # not downloaded yet, or only in part
            prepare.require_hub()  # the library would wait for minutes if nothing answers
            flash = get_kernel(FLASH3, **wanted)

    def attention(q, k, v, window):
        out = flash.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return out[0] if isinstance(out, tuple) else out  # some builds return the softmax sums too

    return attention


def pick_attention(T, windows, head_dim, device):
    """(name, attention, why_not): the fastest kernel that works on this device. A run calls this once."""
    if not bfloat16_works(device):
        return "sdpa", sdpa_attention, "PyTorch's own; the other kernels want a CUDA GPU that has bfloat16"
    kernels = {"fa3": flash3_attention, "flex": partial(flex_attention_for, T, windows, device)}
    why_not = "FlashAttention-3 from the kernel hub"
    # An AMD GPU has the type "cuda" too, but compute capabilities of its own
    if torch.version.hip or torch.cuda.get_device_capability(device)[0] not in (8, 9):
        why_not = f"no FlashAttention-3 for {torch.cuda.get_device_name(device)}"
        del kernels["fa3"]
    for name, make in kernels.items():
        try:
            attention = make()
            # Some load and then fail, want too much shared memory, or would split the model into several graphs
            q = torch.randn(1, T, 1, head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
            compiler()(attention, fullgraph=True)(q, q, q, windows[0]).sum().backward()
            torch.cuda.synchronize()
            return name, attention, why_not
        except Exception as error:  # no network, no build for this PyTorch, a failed import: the next one may work
            why_not = f"no {name} ({type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]})"
    return "sdpa", sdpa_attention, f"exact mask: {why_not}"


# -----------------------------------------------------------------------------
# Model

# Whether the processor multiplies in bfloat16. (AMX implies it. ARM processors that do were not measured.)
CPU_HAS_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def computes_in_bfloat16(device):
    """Whether a run does, on this device. Else it computes in float32."""
    return CPU_HAS_BFLOAT16 if device.type == "cpu" else bfloat16_works(device)


def norm(x):
    """RMSNorm without weights over the last dimension (arXiv 1910.07467), in the type of x.

    With newer PyTorch, autocast returns float32 here. The residual stream would then be float32: twice the traffic."""
    return F.rms_norm(x, (x.size(-1),)).to(x.dtype)


def apply_rotary_emb(x, cos, sin):
    """Rotary embedding (arXiv 2104.09864), half-split: x (B, T, H, D); cos, sin (T, 1, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def window_sizes(config, T):
    """Per layer, how many keys to the left of its own position a query sees."""
    pattern = config.WINDOW_PATTERN
    if not pattern or set(pattern) - {"S", "L"}:
        raise ValueError(f"WINDOW_PATTERN is {pattern!r}: it must consist of the letters S and L")
    layers = [pattern[i % len(pattern)] for i in range(config.DEPTH - 1)] + ["L"]
    return [int(config.SHORT_WINDOW * T) if layer == "S" else T for layer in layers]


def ve_layers(config):
    """The layers that have a value embedding: every other one, the last one included."""
    return range((config.DEPTH - 1) % 2, config.DEPTH, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer, attention):
        super().__init__()
        n_embd, kv_dim, has_ve = config.n_embd, config.n_kv_head * config.HEAD_DIM, layer in ve_layers(config)
        self.head_dim = config.HEAD_DIM
        self.c_q = nn.Linear(n_embd, n_embd, bias=False)
        self.c_k = nn.Linear(n_embd, kv_dim, bias=False)
        self.c_v = nn.Linear(n_embd, kv_dim, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)
        self.ve_gate_channels = min(config.VE_GATE_CHANNELS, n_embd)
        self.ve_gate = nn.Linear(self.ve_gate_channels, config.n_kv_head, bias=False) if has_ve else None
        self.attention = attention

    def forward(self, x, ve, cos, sin, window):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)  # (B, T, H_kv, D)
        v = self.c_v(x).view(B, T, -1, self.head_dim)  # (B, T, H_kv, D)
        if ve is not None:  # value residual from an embedding of its own (ResFormer, arXiv 2410.17897)
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate_channels]))  # (B, T, H_kv), 1 at the start
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        # QK-norm (arXiv 2302.05442). A rotation keeps the norm, so either may come first; in this order the compiler
        # makes one pass of both. Then back to the type of the projections: the kernels want 16 bits, cos is float32
        dtype = q.dtype
        q, k = apply_rotary_emb(norm(q), cos, sin).to(dtype), apply_rotary_emb(norm(k), cos, sin).to(dtype)
        y = self.attention(q, k, v.to(dtype), window)  # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())  # ReLU² (Primer, arXiv 2109.08668)


class Block(nn.Module):
    def __init__(self, config, layer, attention):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attention)
        self.mlp = MLP(config)

    def forward(self, x, *inputs):
        x = x + self.attn(norm(x), *inputs)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Decoder-only transformer. `model(idx)`: logits (B, T, V), float32; `model(idx, targets)`: mean cross-entropy."""

    def __init__(self, config, vocab_size, T, attention):
        super().__init__()
        kv_dim = config.n_kv_head * config.HEAD_DIM
        self.softcap = config.SOFTCAP
        self.window_sizes = window_sizes(config, T)
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(vocab_size, kv_dim) for i in ve_layers(config)})
        self.blocks = nn.ModuleList(Block(config, layer, attention) for layer in range(config.DEPTH))
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        self.resid_lambdas = nn.Parameter(torch.empty(config.DEPTH))
        self.x0_lambdas = nn.Parameter(torch.empty(config.DEPTH))
        inv_freq = config.ROPE_BASE ** (-torch.arange(0, config.HEAD_DIM, 2, dtype=torch.float32) / config.HEAD_DIM)
        freqs = torch.outer(torch.arange(T, dtype=torch.float32), inv_freq)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", freqs.cos(), persistent=False)
        self.register_buffer("sin", freqs.sin(), persistent=False)
        init_weights(self, config)

    def forward(self, idx, targets=None):
        # autocast keeps its 16-bit copies of the weights until it ends. So it must end with each pass: a longer one
        # would go on with the weights of the first step.
        with torch.autocast(idx.device.type, torch.bfloat16) if computes_in_bfloat16(idx.device) else nullcontext():
            x = self.trunk(idx)
            logits = self.lm_head(x).float()  # (B, T, V)
            logits = self.softcap * torch.tanh(logits / self.softcap)  # Gemma 2, arXiv 2408.00118
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def trunk(self, idx):
        """What the head reads, (B, T, C)."""
        T = idx.size(1)
        cos, sin = self.cos[:T], self.sin[:T]
        x = x0 = norm(self.wte(idx))  # (B, T, C)
        for i, (block, window) in enumerate(zip(self.blocks, self.window_sizes)):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None  # (B, T, C_kv)
            x = block(x, ve, cos, sin, window)
        return norm(x)


def parameter_table(config):
    """(pattern, init, optimizer's settings): what fits a parameter's name first says all about it.

    A new matrix in a block needs no line here, as "blocks.*.weight" fits it."""
    bound = math.sqrt(3 / config.n_embd)  # the standard deviation is then n_embd^-1/2
    lr_scale = (config.n_embd / 768) ** -0.5
    adamw = dict(kind="adamw", betas=config.ADAM_BETAS, eps=config.ADAM_EPS, weight_decay=0.0)
    embedding, head = dict(adamw, lr=config.EMBEDDING_LR * lr_scale), dict(adamw, lr=config.HEAD_LR * lr_scale)
    muon = dict(kind="muon", lr=config.MATRIX_LR, momentum=0.0, beta2=config.MUON_BETA2, weight_decay=0.0)
    return (
        ("wte.weight", lambda p: p.normal_(std=1.0), embedding),
        ("value_embeds.*", lambda p: p.uniform_(-bound, bound), embedding),
        ("lm_head.weight", lambda p: p.normal_(std=0.001), head),
        ("resid_lambdas", lambda p: p.fill_(config.RESID_LAMBDA), dict(adamw, lr=config.RESID_LR)),
        ("x0_lambdas", lambda p: p.fill_(config.X0_LAMBDA), dict(adamw, lr=config.X0_LR, betas=config.X0_BETAS)),
        ("blocks.*.c_proj.weight", lambda p: p.zero_(), muon),  # so every block starts as the identity
        ("blocks.*.ve_gate.weight", lambda p: p.zero_(), muon),
        ("blocks.*.weight", lambda p: p.uniform_(-bound, bound), muon),
    )


def parameters_by_rule(model, config):
    """Yields (name, parameter, *its line of the table) for every one. Raises ValueError for one that has no line."""
    table = (*parameter_table(config), ("*", None, None))
    for name, p in model.named_parameters():
        pattern, init, settings = next(line for line in table if fnmatch.fnmatchcase(name, line[0]))
        if settings is None or (settings["kind"] == "muon" and p.ndim != 2):
            why = "a line" if settings is None else "a line of kind adamw, as Muon takes matrices only,"
            raise ValueError(f"parameter {name}, shape {tuple(p.shape)}, needs {why} in parameter_table")
        yield name, p, pattern, init, settings


@torch.no_grad()
def init_weights(model, config):
    for name, p, _pattern, init, _settings in parameters_by_rule(model, config):
        p.fill_(math.nan)
        init(p)
        if not p.isfinite().all():
            raise ValueError(f"parameter {name} is not finite after its init in parameter_table")


# -----------------------------------------------------------------------------
# Optimizer

# The best polynomial for each of five steps towards singular values of 1 (Polar Express, arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G):
    """The orthogonal factor of G (..., m, n), approximately: every singular value becomes about 1."""
    X = G.bfloat16() if computes_in_bfloat16(G.device) else G.float()
    X = X / (1.02 * X.norm(dim=(-2, -1), keepdim=True) + 1e-6)
    tall = G.size(-2) > G.size(-1)
    X = X.mT if tall else X  # A is then the smaller Gram matrix
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if tall else X


def normuon(G, second_moment, beta2):
    """NorMuon (arXiv 2510.05491): scale rows (columns if G is wide) to the same size over time. Keeps the norm of G.

    G (N, m, n), second_moment (N, m, 1) or (N, 1, n): running mean square of each row or column, updated in place."""
    dim = -1 if G.size(-2) >= G.size(-1) else -2
    mean_square = G.float().square().mean(dim=dim, keepdim=True)  # the shape of second_moment
    second_moment.mul_(beta2).add_(mean_square * (1 - beta2))
    scale = second_moment.clamp_min(1e-10).rsqrt()
    norm_before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    norm_after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return G * (scale * norm_before / norm_after.clamp_min(1e-10))


def muon_step(p, grad, momentum_buffer, second_moment, lr, momentum, beta2, weight_decay):
    """One step of Muon for N matrices of one shape: p, grad and momentum_buffer (N, m, n). Updates p in place.

    Muon is steepest descent in the spectral norm: https://kellerjordan.github.io/posts/muon"""
    momentum_buffer.mul_(momentum).add_(grad * (1 - momentum))
    update = grad * (1 - momentum) + momentum_buffer * momentum  # Nesterov
    update = normuon(polar_express(update), second_moment, beta2).to(p.dtype)
    lr = lr * max(1, p.size(-2) / p.size(-1)) ** 0.5
    mask = (update * p) >= 0  # cautious: decay only where the step shrinks the weight too (arXiv 2411.16085)
    p.sub_(lr * (update + weight_decay * p * mask))


def adamw_step(p, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """One step of AdamW (arXiv 1711.05101), the same as torch.optim.AdamW's. `step` counts from 1."""
    p.mul_(1 - lr * weight_decay)
    exp_avg.mul_(beta1).add_(grad * (1 - beta1))
    exp_avg_sq.mul_(beta2).add_(grad.square() * (1 - beta2))
    denom = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    p.sub_(lr / (1 - beta1**step) * exp_avg / denom)


def fused_adamw_step(p, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay):
    """The same by PyTorch's own kernel, in one pass over the memory: for a CPU, where nothing is compiled."""
    numbers = dict(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    torch._fused_adamw_([p], [grad], [exp_avg], [exp_avg_sq], [], [step], amsgrad=False, maximize=False, **numbers)


class MuonAdamW:
    """Param groups of `kind` "muon" (matrices of one shape, updated as one stack) and "adamw".

    `compiled` wraps the two step functions: torch.compile on CUDA. Numbers that change from step to step are passed as
    tensors, because a compiled function is compiled again for each new Python number. It has the fields of a
    torch.optim.Optimizer but is not a subclass: that would import the compiler, two seconds that a CPU can save."""

    def __init__(self, param_groups, compiled=lambda function: function):
        self.param_groups = param_groups
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
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            numbers = as_tensors(state["step"], group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            adamw_step = fused_adamw_step if p.device.type == "cpu" else self.adamw_step
            adamw_step(p, p.grad, state["exp_avg"], state["exp_avg_sq"], *numbers)

    def step_muon(self, group):
        params = group["params"]
        if all(p.grad is None for p in params):
            return
        state = self.state[params[0]]
        stack = torch.stack(params)  # (N, m, n)
        if not state:
            state["momentum_buffer"] = torch.zeros_like(stack)
            column, row = stack[:, :, :1], stack[:, :1]
            state["second_moment"] = torch.zeros_like(column if stack.size(1) >= stack.size(2) else row)
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        numbers = as_tensors(group["lr"], group["momentum"], group["beta2"], group["weight_decay"])
        self.muon_step(stack, grads, state["momentum_buffer"], state["second_moment"], *numbers)
        updated = [(p, new) for p, new in zip(params, stack) if p.grad is not None]
        torch._foreach_copy_(*map(list, zip(*updated)))


def as_tensors(*numbers):
    return [torch.tensor(number, dtype=torch.float32) for number in numbers]


def make_optimizer(model, config, compiled=lambda function: function):
    """MuonAdamW over every parameter, by parameter_table. A group of Muon's has matrices of one shape."""
    groups = {}
    for _name, p, _pattern, _init, settings in parameters_by_rule(model, config):
        key = str(settings), p.shape if settings["kind"] == "muon" else None
        groups.setdefault(key, dict(settings, params=[]))["params"].append(p)
    return MuonAdamW(list(groups.values()), compiled)


# -----------------------------------------------------------------------------
# Schedules


def set_schedules(optimizer, config, progress, step):
    """Learning rates (returns their multiplier) and weight decay follow the time, 0 to 1; Muon's momentum the steps."""
    rise = progress / config.WARMUP_RATIO if config.WARMUP_RATIO > 0 else 1.0
    fall = (1 - progress) / config.WARMDOWN_RATIO if config.WARMDOWN_RATIO > 0 else 1.0
    lr_multiplier = min(1.0, rise, config.FINAL_LR_FRAC + (1 - config.FINAL_LR_FRAC) * fall)
    low, high = config.MUON_MOMENTUM
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * lr_multiplier
        if group.get("kind") == "muon":  # an optimizer of PyTorch's own has no kinds
            group["momentum"] = low + (high - low) * min(step / config.MUON_MOMENTUM_STEPS, 1)
            group["weight_decay"] = config.MATRIX_WEIGHT_DECAY * (1 - progress)
    return lr_multiplier


# -----------------------------------------------------------------------------
# Accounting

# Dense bfloat16 peaks with float32 accumulation, TFLOP/s, from the data sheets (half of a figure for 2:4 sparsity), by
# the whole name of the device, as variants differ.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 5090": 209,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 3090": 71,
    "AMD Instinct MI300X": 1307.4,
}


def peak_flops(device):
    """Peak FLOP/s of this GPU; nan for one that is not in the table and for other devices."""
    return 1e12 * PEAK_TFLOPS.get(torch.cuda.get_device_name(device) if device.type == "cuda" else "", math.nan)


def flops_per_token(model, config, T):
    """FLOPs of training on one token, forward and backward, counted from the modules that do them.

    A weight of a linear layer costs 6: a multiplication and an addition, once forward and twice backward (arXiv
    2204.02311, appendix B). Attention costs 12 per channel and key in the window. Embedding lookups cost nothing."""
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    keys = sum(min(window, T) for window in window_sizes(config, T))
    return 6 * linear + 12 * config.n_embd * keys


# -----------------------------------------------------------------------------
# Loop


class TrainingError(Exception):
    """The run can't end in a score. The message says what happened, and at which step."""


class Run:
    """Everything that learns in a run. Each one built has the same weights. The warm-up builds one and throws it
    away: what an experiment adds here (an average of the weights, a second optimizer) is warmed up and starts anew."""

    def __init__(self, config, vocab_size, T, device, attention, compiled=None):
        torch.manual_seed(torch.initial_seed())  # the run's seed again, which start_run() has set
        compiled = compiled or (compiler() if device.type == "cuda" else lambda function: function)
        with device:
            self.model = GPT(config, vocab_size, T, attention)
        if computes_in_bfloat16(device):
            for embedding in (self.model.wte, *self.model.value_embeds.values()):
                embedding.bfloat16()  # half the traffic; autocast casts the other weights
        self.config = config
        self.compiled_model = compiled(self.model)
        self.optimizer = make_optimizer(self.model, config, compiled)

    def step(self, loader, grad_accum_steps, look=False):
        """One step. Returns the mean loss of `grad_accum_steps` batches; a `look` leaves what_moved() in `moved`."""
        total_loss = 0.0
        for _ in range(grad_accum_steps):
            x, y, _epoch = next(loader)
            loss = self.compiled_model(x, y) / grad_accum_steps
            loss.backward()
            total_loss = total_loss + loss.detach()
        before = [p.detach().clone() for p in self.model.parameters()] if look else None
        self.optimizer.step()
        self.moved = what_moved(self.model, self.config, before) if look else None
        self.optimizer.zero_grad()
        return total_loss


def what_moved(model, config, before):
    """{line of parameter_table: [‖gradient‖², ‖update‖², ‖weight before‖²]} of a step."""
    moved = defaultdict(lambda: [0.0, 0.0, 1e-20])
    for (_name, p, pattern, *_), old in zip(parameters_by_rule(model, config), before):
        for i, x in enumerate((p.grad, p.detach() - old, old)):
            moved[pattern][i] += 0.0 if x is None else x.float().square().sum().item()
    return moved


def quickest_threads(most):
    """Finds the number of threads, up to `most`, that makes a step quickest: `send` it the seconds of each step.

    Beside other busy processes fewer are quicker, because all wait for the one that has no core. So now and then half
    or twice as many are tried for two steps."""
    number, wait = most, 1
    for factor in itertools.cycle((0.5, 2)):
        torch.set_num_threads(number)
        times = []
        while len(times) < 2 or sum(times) < wait:
            times.append((yield))
        usual, wait = sum(times) / len(times), min(2 * wait, 6)  # seconds to the next trial, sooner at the start
        other = min(max(1, int(number * factor)), most)
        torch.set_num_threads(other)
        trial = yield
        if trial < 2 * usual and trial + (yield) < 2 * usual:
            number = other


def train(run, loader, grad_accum_steps, peak_rate):
    """Train until the time is up. Returns (steps, tokens). Raises TrainingError if the loss explodes."""
    step, tokens, smooth_loss, max_loss, lines, looks = 0, 0, 0.0, math.inf, 0, []
    gc.collect()
    gc.freeze()  # Python's garbage collector would stop the loop for half a second now and then
    gc.disable()
    threads = quickest_threads(torch.get_num_threads())
    next(threads)
    while not clock.time_is_up():
        began, tokens_per_step = time.monotonic(), run.config.TOTAL_BATCH_SIZE
        lr_multiplier = set_schedules(run.optimizer, run.config, clock.progress(), step)
        look = clock.progress() * LOG_LINES >= len(looks)
        total_loss = run.step(loader, grad_accum_steps, look)
        looks += [run.moved] * look
        loss = total_loss.item()  # waits for the GPU
        if total_loss.device.type == "cpu":
            threads.send(time.monotonic() - began)
        step, tokens = step + 1, tokens + tokens_per_step
        max_loss = 2 * loss if step == 1 else max_loss  # the first loss is that of a model without knowledge
        if not math.isfinite(loss) or loss > max_loss:
            raise TrainingError(f"step {step}: the loss is {loss:.4g}, the limit {max_loss:.4g}: training blew up")
        smooth_loss += 0.1 * (loss - smooth_loss)
        terminal, progress = sys.stdout.isatty(), clock.progress()
        if terminal or progress * LOG_LINES >= lines:
            lines, rate = int(progress * LOG_LINES) + 1, tokens_per_step / (time.monotonic() - began)
            line = f"step {step:5d} | {100 * progress:5.1f} % | loss {smooth_loss / (1 - 0.9**step):.4f}"
            line += f" | {rate:,.0f} tokens/s" + f" | MFU {100 * rate / peak_rate:.1f} %" * math.isfinite(peak_rate)
            line += f" | lr x {lr_multiplier:.2f} | {clock.seconds():.0f} s"
            print("\033[F\033[K" + line if terminal and step > 1 else line, flush=True)  # replaces the line
    gc.enable()
    show_what_moved(run.model, [looks[min(1, len(looks) - 1)], looks[len(looks) // 2], looks[-1]])
    return step, tokens


def show_what_moved(model, looks):
    """Print what teaches more than the loss: of three steps, for each line of parameter_table; and learned scalars."""
    print("norm of the gradient, update / weight: early, in the middle, late")
    learned = {name: p.tolist() for name, p in model.named_parameters() if p.ndim == 1 and len(p) <= 16}
    for pattern in looks[-1]:
        numbers = ((math.sqrt(grad), math.sqrt(new / old)) for grad, new, old in (look[pattern] for look in looks))
        line = f"  {pattern:24}" + " |".join(f"{grad:8.2g} {ratio:8.2g}" for grad, ratio in numbers)
        print(line + " |" + "".join(f" {x:.2f}" for x in learned.get(pattern, ())), flush=True)


def is_out_of_memory(error):
    """Whether a RuntimeError says that the GPU's memory is full: from the allocator, a library or the compiler."""
    message = str(error).lower()
    signs = ("out of memory", "outofmemory", "alloc_failed", "blas_status_not_initialized")
    # "out of resource": a kernel wants more shared memory than this GPU has, and no smaller batch helps
    return "out of resource" not in message and any(sign in message for sign in signs)


def step_seconds(build, vocab_size, rows, batch_size, T, device):
    """Train and evaluate once on random tokens. Returns the seconds that a step of `rows` rows takes."""
    run, micro_batches = build(), min(2, rows // batch_size)
    x, y = torch.randint(vocab_size, (2, batch_size, T), device=device)
    # On CUDA two compile: from the second on, the optimizer has its state and the gradients their final layout
    for _ in range(3 if device.type == "cuda" else 2):
        began = time.monotonic()
        run.step(itertools.repeat((x, y, 1)), micro_batches, look=True).item()  # waits for the GPU
    seconds = (time.monotonic() - began) * rows / (batch_size * micro_batches)
    run.model.eval()
    with torch.no_grad():
        run.compiled_model(x)
    return seconds


def warm_up(build, config, vocab_size, T, device, budget=math.inf):
    """Compile, allocate and find the micro-batch: steps on random tokens, with models that are then thrown away.

    It runs before the clock starts. `build()` returns a Run. Returns the rows of the micro-batch: the most that fit the
    memory, up to DEVICE_BATCH_SIZE, and divide the step evenly. Says if fewer than 50 steps fit `budget` (seconds)."""
    rows, rest = divmod(config.TOTAL_BATCH_SIZE, T)
    if rest or not rows:
        raise TrainingError(f"TOTAL_BATCH_SIZE must be a multiple of a row, {T} tokens: {max(rows, 1) * T:,} is one")
    if config.DEVICE_BATCH_SIZE < 1:
        raise TrainingError(f"DEVICE_BATCH_SIZE is {config.DEVICE_BATCH_SIZE} rows: it must be 1 or more")

    for batch_size in (n for n in range(min(rows, config.DEVICE_BATCH_SIZE), 0, -1) if rows % n == 0):
        try:
            seconds = step_seconds(build, vocab_size, rows, batch_size, T, device)
            if budget < 50 * seconds:
                print(f"note: about {budget / seconds:.0f} steps fit: lower TOTAL_BATCH_SIZE or `prepare.py --scale`")
            return batch_size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            message = str(error).partition("\n")[0][:200]
        finally:
            gc.collect()  # frees the model, which is part of reference cycles
        print(f"out of memory with {batch_size} rows per micro-batch", flush=True)
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        torch.compiler.reset()  # each size is compiled anew, and after eight the compiler gives up without a word
    raise TrainingError(f"out of GPU memory with one row per micro-batch: make the model smaller ({message})")


# -----------------------------------------------------------------------------
# Main


def keep_freed_memory():
    """On a CPU: glibc gives large blocks back to the system, which has to find and clear new ones in every step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)  # other C libraries have none
    mallopt(-4, 0)  # M_MMAP_MAX: no block comes from the system directly
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing goes back


def main():
    device = prepare.start_run()
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    config, T = {"full": FULL, "desktop": DESKTOP, "laptop": LAPTOP}[prepare.SCALE], prepare.MAX_SEQ_LEN
    tokenizer = Tokenizer.from_directory()
    vocab_size = tokenizer.get_vocab_size()

    attention_name, attention, why_not = pick_attention(T, window_sizes(config, T), config.HEAD_DIM, device)
    print(f"attention: {attention_name} ({why_not})")
    precision = "bfloat16 (fast" if computes_in_bfloat16(device) else "float32 (bfloat16 is not fast"
    print(f"precision: {precision} on this {device.type})", flush=True)
    build = partial(Run, config, vocab_size, T, device, attention)
    batch_size = warm_up(build, config, vocab_size, T, device, prepare.TIME_BUDGET)
    run = build()
    num_params, flops = sum(p.numel() for p in run.model.parameters()), flops_per_token(run.model, config, T)
    size = f"{num_params / 1e6:.1f} M parameters, {flops / 1e6:.1f} MFLOPs per token"
    no_mfu = ", no MFU (the peak of this device is not known)" * math.isnan(peak_flops(device))
    print(f"model: depth {config.DEPTH}, width {config.n_embd}, {size}{no_mfu}")
    print(f"batch: {config.TOTAL_BATCH_SIZE:,} tokens per step, {batch_size} rows of {T} per micro-batch", flush=True)

    peak_rate = peak_flops(device) / flops  # tokens per second at the GPU's peak
    loader = make_dataloader(tokenizer, batch_size, T, "train")
    num_steps, total_tokens = train(run, loader, config.TOTAL_BATCH_SIZE // (batch_size * T), peak_rate)
    val_bpb = evaluate_bpb(run.compiled_model, tokenizer, batch_size)
    mfu_percent = 100 * total_tokens / clock.seconds() / peak_rate
    facts = dict(num_steps=num_steps, num_params=num_params, depth=config.DEPTH, attention=attention_name)
    prepare.report(val_bpb, mfu_percent=mfu_percent, total_tokens=total_tokens, **facts)


if __name__ == "__main__":
    try:
        main()
    except (PrepareError, EvaluationError, TrainingError) as error:
        sys.exit(f"train.py: error: {error}")
    except NotImplementedError as error:
        if "MPS" not in str(error):
            raise
        sys.exit(f"train.py: error: {str(error).partition('. ')[0]}. Run it on the CPU: `DEVICE=cpu uv run train.py`")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted, no val_bpb")
