"""MuonAdamW against torch's AdamW, the SVD and steps worked by hand; param groups; schedules."""

import math
from dataclasses import replace

import pytest
import torch

import train

SHAPES = [(48, 48), (16, 64), (64, 16)]  # square, wide, tall


pytestmark = pytest.mark.usefixtures("one_thread", "float32")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def adamw_group(params, **changes):
    return dict(dict(kind="adamw", params=params, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1), **changes)


def muon_group(params, **changes):
    return dict(dict(kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.1), **changes)


def parameters(*shapes, seed=0):
    return [torch.nn.Parameter(torch.randn(shape, generator=rng(seed + i))) for i, shape in enumerate(shapes)]


# -----------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("formula", [False, True])
def test_adamw_equals_torchs(monkeypatch, formula):
    """By the formula, which is compiled for a GPU, and by the kernel for a CPU."""
    if formula:
        monkeypatch.setattr(train, "fused_adamw_step", train.adamw_step)
    shapes = [(20, 8), (5,), (3, 4, 5)]
    ours, torchs = parameters(*shapes), parameters(*shapes)
    optimizer = train.MuonAdamW([adamw_group(ours)])
    oracle = torch.optim.AdamW(torchs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    generator = rng(1)
    for step in range(20):
        for a, b in zip(ours, torchs):
            a.grad = torch.randn(a.shape, generator=generator)
            a.grad[0], a.grad[1] = 0, a.grad[1] * 1e-10  # a token that never occurs, and gradients as small as eps
            b.grad = a.grad.clone()
        for group in (*optimizer.param_groups, *oracle.param_groups):
            group["lr"] = 0.01 * (1 - step / 20)
        optimizer.step()
        oracle.step()
    # torch keeps the betas and their powers in float64, here they are float32: 1 - 0.95^step is off by up to 1e-6, and
    # so is an update of 0.01. Twenty of them, and as many roundings of weights of about 1 (6e-8 each), add up to 1e-6
    for a, b in zip(ours, torchs):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][name], oracle.state[b][name], atol=1e-6, rtol=1e-5)


# -----------------------------------------------------------------------------
# Polar Express

# The last of the five polynomials takes its values between these two for every singular value that was above 0.0015 of
# the Frobenius norm (measured; a smaller one may end lower).
LOW, HIGH = 0.8588, 1.1412


def matrices(*shape, least=0.01):
    """Random matrices with singular values spread evenly in the logarithm from 1 down to `least`, float64."""
    U, S, V = torch.linalg.svd(torch.randn(shape, generator=rng(), dtype=torch.float64), full_matrices=False)
    return U @ torch.diag(torch.logspace(0, math.log10(least), S.size(-1), dtype=torch.float64)) @ V


@pytest.mark.parametrize("shape", [*SHAPES, (3, 48, 48), (3, 16, 64), (2, 3, 64, 16)])
def test_polar_express_against_the_svd(shape):
    G = matrices(*shape)
    P = train.polar_express(G.float()).double()
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    s = torch.linalg.svdvals(P)
    # float32 rounds at 6e-8 and the polynomials enlarge a small singular value up to 8.2·4.0·3.9·3.3·2.3 = 990-fold
    assert s.min() > LOW - 1e-4 and s.max() < HIGH + 1e-4
    # singular vectors and signs stay: a direction differs from the polar factor UVᵀ only by its singular value from 1
    assert torch.linalg.matrix_norm(P - U @ V, ord=2).max() < 1 - LOW + 1e-4
    # Kantorovich: singular values within [a, b] have a cosine with all-equal ones of at least 2·√(ab) / (a + b)
    cosine = (P * (U @ V)).sum((-2, -1)) / (P.norm(dim=(-2, -1)) * S.size(-1) ** 0.5)
    assert cosine.min() > 2 * (LOW * HIGH) ** 0.5 / (LOW + HIGH) - 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_is_its_polynomials_of_the_singular_values(shape):
    G = matrices(*shape, least=1e-4)  # some are too small to end near 1
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / (1.02 * G.norm() + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(train.polar_express(G.float()).double(), U @ torch.diag(s) @ V, atol=1e-4, rtol=0)


def test_polar_express_of_zeros_is_zeros():
    assert torch.equal(train.polar_express(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


# -----------------------------------------------------------------------------
# NorMuon


def test_normuon_by_hand():
    # The mean squares of the rows are 12.5 and 0.125. With β2 = 0.5 the running ones become 6.25 and 0.0625, their
    # inverse roots 0.4 and 4: (1.2, 1.6) and (0, 2), norm √8. The norm was √25.25.
    second_moment = torch.zeros(1, 2, 1)
    out = train.normuon(torch.tensor([[[3.0, 4.0], [0.0, 0.5]]]), second_moment, 0.5)
    wanted = torch.tensor([[[1.2, 1.6], [0.0, 2.0]]]) * (25.25 / 8) ** 0.5
    torch.testing.assert_close(out, wanted)
    assert second_moment.flatten().tolist() == pytest.approx([6.25, 0.0625])
    # The second matrix has mean squares 1 and 1, which make the running ones 3.625 and 0.53125.
    out = train.normuon(torch.ones(1, 2, 2), second_moment, 0.5)
    assert (out[0, 0, 0] / out[0, 1, 0]).item() == pytest.approx((0.53125 / 3.625) ** 0.5)
    assert out.norm().item() == pytest.approx(2)


# -----------------------------------------------------------------------------
# Muon


def svd_muon_step(p, grad, momentum_buffer, second_moment, lr, momentum, beta2, weight_decay):
    """muon_step of one matrix again, in float64 from the papers' formulas, the polar step through the SVD."""
    m, n = p.shape
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
    U, s, V = torch.linalg.svd(momentum * momentum_buffer + (1 - momentum) * grad, full_matrices=False)
    s = s / (1.02 * s.norm() + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    O = U @ torch.diag(s) @ V  # noqa: E741
    second_moment = beta2 * second_moment + (1 - beta2) * O.square().mean(1 if m >= n else 0, keepdim=True)
    O_hat = O / second_moment.sqrt()
    O_hat *= O.norm() / O_hat.norm()
    lr = lr * max(1, m / n) ** 0.5
    p = p - lr * O_hat - lr * weight_decay * torch.where(O_hat * p >= 0, p, 0)
    return p, momentum_buffer, second_moment


@pytest.mark.parametrize("shape", SHAPES)
def test_a_stacked_muon_step_equals_single_ones_and_the_svds(shape):
    N, dim = 3, 1 if shape[0] >= shape[1] else 0
    p = torch.randn(N, *shape, generator=rng())
    second_moment = torch.zeros_like(p.select(dim + 1, 0).unsqueeze(dim + 1))
    stack = [p, torch.zeros_like(p), second_moment]
    alone = [[t[i : i + 1].clone() for t in stack] for i in range(N)]
    exact = [[t[i].double() for t in stack] for i in range(N)]
    numbers = dict(lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.1)

    for step in range(4):
        grad = torch.randn(N, *shape, generator=rng(step + 1))
        train.muon_step(stack[0], grad.clone(), *stack[1:], **numbers)
        for i in range(N):
            train.muon_step(alone[i][0], grad[i : i + 1].clone(), *alone[i][1:], **numbers)
            exact[i] = svd_muon_step(exact[i][0], grad[i].double(), *exact[i][1:], **numbers)

    assert (stack[0] - torch.randn(N, *shape, generator=rng())).abs().max() > 0.01  # they moved
    for i in range(N):
        for a, b, c in zip(stack, alone[i], exact[i]):
            # float32, enlarged a thousandfold in Polar Express (see above), times lr = 0.02 to 0.04 per step
            torch.testing.assert_close(a[i], b[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a[i].double(), c, atol=1e-5, rtol=1e-4)


def test_the_optimizer_stacks_the_matrices_of_a_group():
    together, apart = parameters((8, 16), (8, 16)), parameters((8, 16), (8, 16))
    one, two = train.MuonAdamW([muon_group(together)]), train.MuonAdamW([muon_group([p]) for p in apart])
    for step in range(3):
        for i, (a, b) in enumerate(zip(together, apart)):
            a.grad = torch.randn(8, 16, generator=rng(10 * step + i))
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b, start in zip(together, apart, parameters((8, 16), (8, 16))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # as above
        assert (a - start).abs().max() > 0.01


# -----------------------------------------------------------------------------
# Param groups


def test_parameters_without_a_gradient_stay_the_same():
    muon, adamw = parameters((4, 8), (4, 8), (4, 8)), parameters((6,), (6,))
    unused = parameters((8, 8), (3,))
    groups = [muon_group(muon), adamw_group(adamw), muon_group(unused[:1]), adamw_group(unused[1:])]
    optimizer = train.MuonAdamW(groups)
    before = [[p.detach().clone() for p in group["params"]] for group in groups]
    for _ in range(2):
        for p in (muon[1], muon[2], adamw[1]):
            p.grad = torch.ones_like(p)
        optimizer.step()
    for group, starts in zip(groups, before):
        for p, start in zip(group["params"], starts):
            assert torch.equal(p, start) == (p.grad is None)


def test_param_groups_of_the_baseline():
    config = replace(train.FULL, DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, N_KV_HEAD=1, VE_GATE_CHANNELS=8)  # width 16
    model = train.GPT(config, 32, 8, train.sdpa_attention)
    groups = train.make_optimizer(model, config).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    for name, parameter in model.named_parameters():
        (group,) = (group for group in groups if any(p is parameter for p in group["params"]))
        assert group["kind"] == ("muon" if name.startswith("blocks.") else "adamw"), name
        if group["kind"] == "muon":
            assert len({p.shape for p in group["params"]}) == 1, name  # they are stacked
        elif "lambdas" not in name:  # learning rates for width 768
            lr = config.HEAD_LR if name == "lm_head.weight" else config.EMBEDDING_LR
            assert group["lr"] == pytest.approx(lr * 48**0.5), name


# -----------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("progress, ratio, multiplier", [(0, 0.5, 1), (0.5, 0.5, 1), (0.9, 0.5, 0.2), (1, 0, 1)])
def test_learning_rate_over_time(progress, ratio, multiplier):
    optimizer = train.MuonAdamW([adamw_group(parameters((3,))), muon_group(parameters((2, 2)))])
    config = replace(train.FULL, WARMDOWN_RATIO=ratio)
    train.set_schedules(optimizer, config, 0.9, 77)  # an earlier step leaves no trace
    train.set_schedules(optimizer, config, progress, 0)
    adamw, muon = optimizer.param_groups
    assert adamw["lr"] == pytest.approx(0.01 * multiplier) and muon["lr"] == pytest.approx(0.02 * multiplier)


@pytest.mark.parametrize(
    "progress, step, momentum, weight_decay",
    [(0, 0, 0.85, 0.2), (0.75, 150, 0.90, 0.05), (1, 300, 0.95, 0), (0.5, 9000, 0.95, 0.1)],
)
def test_muons_momentum_over_steps_and_weight_decay_over_time(progress, step, momentum, weight_decay):
    optimizer = train.MuonAdamW([adamw_group(parameters((3,))), muon_group(parameters((2, 2)))])
    train.set_schedules(optimizer, train.FULL, progress, step)
    adamw, muon = optimizer.param_groups
    assert muon["momentum"] == pytest.approx(momentum) and muon["weight_decay"] == pytest.approx(weight_decay)
    assert adamw["weight_decay"] == 0.1 and adamw["betas"] == (0.8, 0.95)
