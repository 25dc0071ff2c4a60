"""Whole runs of train.py: the block they end with, what ends them early, and who keeps time and seed."""

import contextlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, SMALL, run_python

import prepare
import train

BLOCK = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth "
    "seed attention device harness"
).split()


@pytest.fixture(scope="module")
def both(session_cache):
    """Two experiments run at once on one cache, which stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in session_cache.iterdir()}
    with ThreadPool(2) as pool:
        runs = pool.map(lambda seed: run_python("train.py", cache=session_cache, SEED=seed), "70")
    assert {path: path.stat().st_mtime_ns for path in session_cache.iterdir()} == before
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    return runs


def test_the_block_has_every_line_in_order(both):
    finished = both[0]
    blocks = [run.stdout.split("\n---\n")[1] for run in both]
    values, other = (dict(re.findall(r"^(\w+): +(.*)", text, re.M)) for text in blocks)
    assert list(values) == BLOCK
    assert re.fullmatch(r"\d\.\d{6}", values["val_bpb"]) and 0.1 < float(values["val_bpb"]) < 4
    assert float(values["peak_vram_mb"]) > 0
    assert values["seed"] == "7" and values["depth"] == "2" and values["attention"] == "sdpa"
    assert values["device"] == f"CPU, 1 thread(s), torch {torch.__version__}"
    assert re.fullmatch(r"[0-9a-f]{12}", values["harness"]) and other["harness"] == values["harness"]
    assert finished.stderr == "" and "warning" not in finished.stdout
    assert "\r" not in finished.stdout and len(finished.stdout.splitlines()) < 40
    assert "no MFU" in both[0].stdout and re.search(r"^step .* loss", finished.stdout, re.M)
    # The budget is kept within a step
    seconds, steps = float(values["training_seconds"]), int(values["num_steps"])
    assert 2 <= seconds <= 2 + 3 * seconds / steps + 0.1  # the steps are not all of one length
    assert float(values["total_seconds"]) > seconds
    assert float(values["total_tokens_M"]) == pytest.approx(steps * train.LAPTOP.TOTAL_BATCH_SIZE / 1e6, abs=0.05)


def test_a_run_that_breaks_a_rule_has_no_number(cache, now, monkeypatch, tmp_path, capsys):
    path = tmp_path / "run.json"
    monkeypatch.setenv("AUTORESEARCH_REPORT", str(path))

    def report(val_bpb=1.0):
        facts = dict(mfu_percent=1, total_tokens=1, num_steps=7, num_params=1, depth=1, attention="sdpa")
        prepare.report(val_bpb, **facts)
        facts, text = json.loads(path.read_text()), capsys.readouterr().out
        assert facts["num_steps"] == 7 and facts["val_bpb"] == "1.000000" and float(facts["memory_gb"]) > 0
        assert text.count("warning: ") == len(facts["problems"])
        return " ".join(facts["problems"])

    def evaluate():
        error = None
        try:
            prepare.evaluate_bpb(None, tokenizer, 8)
        except prepare.EvaluationError as caught:
            error = str(caught)
        assert error == prepare.clock.violation()  # in a night such a run ends here
        with monkeypatch.context() as patch:
            patch.delenv("AUTORESEARCH_REPORT")
            prepare.evaluate_bpb(None, tokenizer, 8)

    monkeypatch.setattr(prepare, "score_rows", lambda *_: 1.0)
    tokenizer = prepare.Tokenizer.from_directory()
    train, val = (prepare.make_dataloader(tokenizer, 1, 8, split) for split in ("train", "val"))
    torch.manual_seed(0)
    with pytest.raises(prepare.PrepareError, match=r"report\(\) got 1.0, the last evaluate_bpb\(\) returned None"):
        report()
    evaluate()
    assert "the clock never ran" in report()
    next(train)
    now[0] += 2.9
    evaluate()
    assert report() == report(1.0000001) == ""  # what a format of six digits keeps
    for other in (0.5, math.nan):
        with pytest.raises(prepare.PrepareError, match=f"got {other}, the last .* returned 1.0: pass that on"):
            report(other)
    torch.manual_seed(137)
    assert "torch's seed to 137, the harness set it to SEED=0" in report()
    torch.manual_seed(0)
    next(val)  # whoever looks at it after the evaluation has learned nothing from it
    assert report() == ""
    now[0] += 0.5
    evaluate()
    assert 'make_dataloader(…, "val") handed out validation text before the evaluation' in report()


def test_a_loop_on_validation_text_ends_and_has_no_number(cache, now):
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 1, 8, "val", device="cpu")
    while not prepare.clock.time_is_up():
        next(loader)
        now[0] += 0.3
    assert prepare.clock.seconds() >= 2
    prepare.clock.begin_evaluation()
    assert "validation text" in prepare.clock.violation()
    next(loader)
    now[0] += 9
    assert prepare.clock.seconds() < 3  # after an evaluation it teaches nothing


# A train.py written before this harness: a batch fetched before the loop, a compiled model that also answers without
# targets, its own block. OWN_CLOCK is replaced below
OLDER = """
import os, sys, time
import torch
import torch.nn as nn
import prepare
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, clock, evaluate_bpb, get_token_bytes, make_dataloader

class Bigram(nn.Embedding):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx).float()
        if targets is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

tokenizer = Tokenizer.from_directory()
V = tokenizer.get_vocab_size()
assert get_token_bytes().shape == (V,)
model = torch.compile(Bigram(V, V), dynamic=False, backend="eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
loader = make_dataloader(tokenizer, 16, MAX_SEQ_LEN, "train", device="cpu")
x, y, epoch = next(loader)  # and only then everything is compiled
total, step = 0, 0
while OWN_CLOCK:
    t0 = time.time()
    loss = model(x, y, reduction="none").mean()
    x, y, epoch = next(loader)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    if step > 10:
        total += time.time() - t0
model.eval()
with torch.autocast("cpu", torch.bfloat16):
    val_bpb = evaluate_bpb(model, tokenizer, 16, device="cpu")
print(f"---\\nval_bpb:          {val_bpb:.6f}")
for i, code in enumerate(sys.argv[1:]):
    try:
        exec(code)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    if os.path.exists("report.json"):
        open(f"{i}.json", "w").write(open("report.json").read())
"""
REPORT = "prepare.report(val_bpb, mfu_percent=1, total_tokens=1, num_steps=7, num_params=1, depth=1, attention='sdpa')"
# What such a train.py does next: what then is wrong with its number, or None without a number
AFTERWARDS = {
    "pass": [],
    REPORT.replace("val_bpb", "val_bpb / 2"): [],
    REPORT: [],
    "evaluate_bpb(lambda x: None, tokenizer, 8)": None,
    "evaluate_bpb(model, tokenizer, 8)": [],
    f"next(loader), time.sleep(2), {REPORT}": ["training took"],
    "next(make_dataloader(tokenizer, 2, 8, 'val')), evaluate_bpb(model, tokenizer, 8)": None,
}


def run_older(folder, cache, own_clock, *arguments, **environment):
    shutil.copy(ROOT / "prepare.py", folder)
    (folder / "train.py").write_text(OLDER.replace("OWN_CLOCK", own_clock))
    return run_python("train.py", *arguments, cwd=folder, cache=cache, **environment)


def test_an_older_train_py_works_unchanged_and_is_told_that_its_time_ran_over(tmp_path, session_cache):
    done = run_older(tmp_path, session_cache, "time.sleep(2 * (step == 0)) or total < TIME_BUDGET")
    assert done.returncode == 0, done.stderr
    assert 0.1 < float(re.search(r"^val_bpb: +(\d+\.\d{6})$", done.stdout, re.M)[1]) < 4
    assert re.search(r"warning: training took \d+\.\d s of a budget of 2 s", done.stderr)


def test_evaluation_leaves_the_number_for_the_harness(session_cache, tmp_path):
    environment = dict(SEED="5", AUTORESEARCH_REPORT="report.json")
    done = run_older(tmp_path, session_cache, "time_is_up", **environment | {"DEVICE": "tpu"})  # the machine's fault
    assert done.returncode == 1 and re.fullmatch("prepare.py: error: DEVICE='tpu' is not on .*\n", done.stderr)
    done = run_older(tmp_path, session_cache, "not clock.time_is_up()", *AFTERWARDS, **environment)
    errors = re.findall(r"^(\w+Error): (.*)", done.stdout, re.M)
    assert [name for name, _ in errors] == ["PrepareError", "EvaluationError", "EvaluationError"], done.stderr
    assert "validation text" in errors[2][1]
    val_bpb = float(re.search("val_bpb: +(.*)", done.stdout)[1])
    for i, (code, problems) in enumerate(AFTERWARDS.items()):
        path = tmp_path / f"{i}.json"
        assert path.exists() == (problems is not None), code
        if problems is not None:
            facts = json.loads(path.read_text())
            assert float(facts["val_bpb"]) == pytest.approx(val_bpb, abs=2e-6)
            assert [problem[:13] for problem in facts["problems"]] == problems
            assert facts.keys() >= {"memory_gb", "harness", "training_seconds"}
            assert ("num_steps" in facts) == (REPORT in code)


UNIFORM = random.Random(0).uniform
LENGTHS = [[length * UNIFORM(0.95, 1.04) for _ in range(400)] for length in (1, 29, 110)]
LENGTHS += [[200] + 1100 * [0.1], 2300 * [0.1] + [40] + 999 * [0.1]]  # one that compiles, at the start or later


@pytest.mark.parametrize("lengths", LENGTHS, ids=["1", "29", "110", "first", "later"])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_run_ends_with_the_last_step_that_ends_within_the_limit(cache, now, monkeypatch, lengths, calls):
    """Budget 300 s, limit 307 s. `calls`: how often time_is_up is asked before a step."""
    monkeypatch.setitem(prepare.open_cache(cache)["constants"], "TIME_BUDGET", 300)
    clock, steps = prepare.Clock(), iter(lengths)
    while not any(clock.time_is_up() for _ in range(calls)):
        clock.start()
        now[0] += next(steps)
    assert clock.violation() is None and abs(clock.seconds() - 300) < 1.1 * lengths[-1]


def test_a_seed_that_is_none_is_refused(cache, monkeypatch):
    monkeypatch.setenv("SEED", "lucky")
    with pytest.raises(prepare.PrepareError, match="SEED='lucky'"):
        prepare.start_run()


def test_ctrl_c_says_that_there_is_no_number(session_cache):
    env = {**os.environ, "AUTORESEARCH_CACHE": str(session_cache)}
    command = [sys.executable, "-u", "train.py"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None
    for _ in range(6):  # once in some thirty trials the first signal was not enough
        process.send_signal(subprocess.signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, error = process.communicate(timeout=10)
            break
    assert process.returncode == 1 and error == "train.py: interrupted, no val_bpb\n" and "val_bpb" not in out


# -----------------------------------------------------------------------------
# The machine: which device, which scale, and what is said if something is missing


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, gigabytes): a stand-in for a CUDA GPU of this machine; gpu(None): there is none."""

    def install(capability, gigabytes=80):
        monkeypatch.delenv("DEVICE", raising=False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        major, minor = capability or (0, 0)
        said = dict(is_available=capability is not None, get_device_capability=capability, get_device_name="GPU")
        said["get_device_properties"] = SimpleNamespace(major=major, minor=minor, total_memory=gigabytes * 10**9)
        said["get_arch_list"] = "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120".split()
        for name, value in said.items():
            monkeypatch.setattr(torch.cuda, name, Mock(return_value=value))

    return install


def test_the_gpu_decides_the_scale(gpu, monkeypatch):
    sizes = {"full": 2048, "desktop": 1024}
    for capability, gigabytes, scale in ((9, 80, "full"), (8, 42, "full"), (12, 34, "desktop"), (7, 40, "desktop")):
        gpu((capability, 0), gigabytes)
        args = prepare.parse_arguments([])
        assert (args.scale, args.seq_len, args.time_budget) == (scale, sizes[scale], 300)
        assert prepare.bfloat16_works(prepare.get_device()) == (capability >= 8)
        assert prepare.parse_arguments(["--scale=laptop"]).scale == "laptop"
    gpu(None)
    assert prepare.parse_arguments([]).scale == "laptop"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = prepare.parse_arguments([])
    assert (args.scale, args.vocab_size, args.eval_tokens) == ("desktop", 8192, 2**22)
    assert not prepare.bfloat16_works(torch.device("mps"))


def test_a_gpu_without_kernels_is_refused_in_one_line(cache, gpu, capsys):
    gpu((6, 1))
    message = r"no kernels for .* compute capability is under 7\.0.* DEVICE=cpu"
    with pytest.raises(prepare.PrepareError, match=message):
        prepare.start_run()
    assert prepare.main(["--scale=desktop"]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)


def test_prepare_says_that_pytorch_does_not_see_the_gpu(corpus, session_cache, gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(shutil.copytree(session_cache, tmp_path / "cache")))
    gpu(None)
    exists = os.path.exists
    for driver in ("/dev/dxg", "/nothing"):
        monkeypatch.setattr(os.path, "exists", lambda path, driver=driver: path == driver or exists(path))
        assert prepare.main([f"--corpus={corpus}", *SMALL]) == 0
        found = re.search(r"^ +note: .* sees no GPU, although NVIDIA's driver is here", capsys.readouterr().out, re.M)
        assert bool(found) == (driver != "/nothing")


@pytest.mark.parametrize("scale", ["full", "desktop"])
def test_a_run_whose_gpu_is_gone_says_so(cache, gpu, monkeypatch, scale):
    gpu(None)
    monkeypatch.setitem(prepare.open_cache(cache)["constants"], "SCALE", scale)
    with pytest.raises(prepare.PrepareError, match=f"scale {scale}, but .* sees no GPU.*`DEVICE=cpu uv run train.py`"):
        prepare.start_run()
    monkeypatch.setenv("DEVICE", "cpu")
    assert prepare.start_run().type == "cpu"


def test_a_run_on_the_cpu_leaves_the_gpu_alone(cache, gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("DEVICE", "cpu")
    for name in ("_lazy_init", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, Mock(side_effect=AssertionError("a CUDA context")))
    device = prepare.start_run()
    next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 1, 8, "train"))
    assert device.type == "cpu" and prepare.clock.started
