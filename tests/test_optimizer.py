"""MuonAdamW against torch's AdamW, the SVD and steps worked by hand; param groups; schedules."""

from dataclasses import replace

import pytest
import torch

import train

SHAPES = [(48, 48), (16, 64), (64, 16)]  # square, wide, tall

pytestmark = pytest.mark.usefixtures("one_thread", "float32")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def adamw_group(params):
    return dict(kind="adamw", params=params, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)


def muon_group(params):
    return dict(kind="muon", params=params, lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.1)


def parameters(*shapes, seed=0):
    return [torch.nn.Parameter(torch.randn(shape, generator=rng(seed + i))) for i, shape in enumerate(shapes)]


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


def polynomials(s):
    """What Polar Express makes of singular values s (..., n)."""
    s = s / (1.02 * s.norm(dim=-1, keepdim=True) + 1e-6)
    for a, b, c in train.POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("shape", [*SHAPES, (3, 48, 48), (3, 16, 64), (2, 3, 64, 16)])
def test_polar_express_against_the_svd(shape):
    U, s, V = torch.linalg.svd(torch.randn(shape, generator=rng(), dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -4, s.size(-1), dtype=torch.float64).expand_as(s)
    P = train.polar_express((U @ torch.diag_embed(s) @ V).float()).double()
    # float32 rounds at 6e-8 and the polynomials enlarge a small singular value up to 8.2·4.0·3.9·3.3·2.3 = 990-fold
    torch.testing.assert_close(P, U @ torch.diag_embed(polynomials(s)) @ V, atol=1e-4, rtol=0)
    # the last of the five takes its values between these two for every singular value that was above 0.0015 of the
    # Frobenius norm (measured; a smaller one may end lower)
    ends = polynomials(s)[s > 0.0015 * s.norm(dim=-1, keepdim=True)]
    assert ends.min() > 0.8588 - 1e-4 and ends.max() < 1.1412 + 1e-4


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


def svd_muon_step(p, grad, momentum_buffer, second_moment, lr, momentum, beta2, weight_decay):
    """muon_step of one matrix again, in float64 from the papers' formulas, the polar step through the SVD."""
    m, n = p.shape
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * grad
    U, s, V = torch.linalg.svd(momentum * momentum_buffer + (1 - momentum) * grad, full_matrices=False)
    O = U @ torch.diag(polynomials(s)) @ V  # noqa: E741
    second_moment = beta2 * second_moment + (1 - beta2) * O.square().mean(1 if m >= n else 0, keepdim=True)
    O_hat = O / second_moment.sqrt()
    O_hat *= O.norm() / O_hat.norm()
    lr = lr * max(1, m / n) ** 0.5
    p = p - lr * O_hat - lr * weight_decay * torch.where(O_hat * p >= 0, p, 0)
    return p, momentum_buffer, second_moment


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_the_formulas_matrix_by_matrix(shape):
    """Three matrices of a group, which are updated as one stack."""
    params = parameters(shape, shape, shape)
    optimizer = train.MuonAdamW([muon_group(params)])
    exact = [(p.detach().double(), 0.0, 0.0) for p in params]
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape, generator=rng(10 * step + i))
            exact[i] = svd_muon_step(*exact[i][:1], p.grad.double(), *exact[i][1:], 0.02, 0.9, 0.95, 0.1)
        optimizer.step()
    state = optimizer.state[params[0]]
    for wanted, got in zip(zip(*exact), (params, state["momentum_buffer"], state["second_moment"])):
        # float32, enlarged a thousandfold in Polar Express (see above), times lr = 0.02 to 0.04 per step
        torch.testing.assert_close(torch.stack(list(got)).double(), torch.stack(wanted), atol=1e-5, rtol=1e-4)
    assert all((p - start).abs().max() > 0.01 for p, start in zip(params, parameters(shape, shape, shape)))


def test_parameters_without_a_gradient_stay_the_same():
    params = parameters((4, 8), (4, 8), (4, 8), (8, 8), (6,), (6,), (3,))
    groups = [muon_group(params[:3]), muon_group(params[3:4]), adamw_group(params[4:6]), adamw_group(params[6:])]
    optimizer = train.MuonAdamW(groups)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in (params[1], params[2], params[5]):
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p, start in zip(params, before):
        assert torch.equal(p, start) == (p.grad is None)


def test_param_groups_of_the_baseline():
    config = replace(train.FULL, DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, N_KV_HEAD=1, VE_GATE_CHANNELS=8)  # width 16
    model = train.GPT(config, 32, 8, train.sdpa_attention)
    groups = train.make_optimizer(model, config).param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, model.parameters()))
    for name, parameter in model.named_parameters():
        (group,) = (group for group in groups if any(p is parameter for p in group["params"]))
        assert group["kind"] == ("muon" if name.startswith("blocks.") else "adamw"), name
        if group["kind"] == "adamw" and "lambdas" not in name:  # learning rates for width 768
            lr = config.HEAD_LR if name == "lm_head.weight" else config.EMBEDDING_LR
            assert group["lr"] == pytest.approx(lr * 48**0.5), name


@pytest.mark.parametrize(
    "progress, step, ratio, multiplier, momentum, weight_decay",
    [
        (0, 0, 0.5, 1, 0.85, 0.2),
        (0.5, 9000, 0.5, 1, 0.95, 0.1),
        (0.75, 150, 0.5, 0.5, 0.90, 0.05),
        (0.9, 300, 0.5, 0.2, 0.95, 0.02),
        (1, 300, 0, 1, 0.95, 0),
    ],
)
def test_schedules_follow_the_time_and_the_steps(progress, step, ratio, multiplier, momentum, weight_decay):
    optimizer = train.MuonAdamW([adamw_group(parameters((3,))), muon_group(parameters((2, 2)))])
    config = replace(train.FULL, WARMDOWN_RATIO=ratio)
    train.set_schedules(optimizer, config, 0.95, 77)  # an earlier step leaves no trace
    train.set_schedules(optimizer, config, progress, step)
    adamw, muon = optimizer.param_groups
    assert [adamw["lr"], muon["lr"]] == pytest.approx([0.01 * multiplier, 0.02 * multiplier])
    assert [muon["momentum"], muon["weight_decay"]] == pytest.approx([momentum, weight_decay])
    assert adamw["weight_decay"] == 0.1 and adamw["betas"] == (0.8, 0.95)


@pytest.mark.parametrize("own", [True, False])
def test_the_learning_rate_may_rise_at_first_and_end_above_zero(own):
    """Also that of an optimizer of PyTorch's own."""
    optimizer = train.MuonAdamW([adamw_group(parameters((3,)))]) if own else torch.optim.SGD(parameters((3,)), lr=0.01)
    config = replace(train.FULL, WARMUP_RATIO=0.1, FINAL_LR_FRAC=0.2)
    for progress, multiplier in {0: 0, 0.05: 0.5, 0.1: 1, 0.5: 1, 0.75: 0.6, 1: 0.2}.items():
        train.set_schedules(optimizer, config, progress, 0)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * multiplier)
