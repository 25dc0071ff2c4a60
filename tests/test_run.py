"""Whole runs of train.py: the block they end with, what ends them early, and who keeps time and seed."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool

import pytest
from conftest import ROOT, run_python

import prepare

BLOCK = (
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps num_params_M depth "
    "seed attention device harness row"
).split()


def block(text):
    """{name: value} of the lines after `---`, in their order."""
    return dict(re.match(r"(\w+): +(.*)", line).groups() for line in text.split("\n---\n")[1].splitlines())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("project"))


def make_project(folder):
    """A repository of its own with prepare.py and train.py committed."""
    folder.mkdir(exist_ok=True)
    for name in ("prepare.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    commit(folder, "baseline")
    return folder


def commit(folder, message):
    git = ["git", "-C", folder, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    if not (folder / ".git").exists():
        subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-qm", message], check=True)


def train(folder, cache, **environment):
    return run_python("train.py", cache=cache, cwd=folder, **environment)


@pytest.fixture(scope="module")
def finished(project, session_cache):
    return train(project, session_cache, SEED="7")


def test_the_block_has_every_line_in_order(finished, project, session_cache):
    assert finished.returncode == 0, finished.stderr
    values = block(finished.stdout)
    assert list(values) == BLOCK
    assert re.fullmatch(r"\d\.\d{6}", values["val_bpb"]) and 0.1 < float(values["val_bpb"]) < 4
    head = subprocess.run(["git", "-C", project, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    commit, val_bpb, memory = values["row"].split("\t")
    assert commit == head[:7] and val_bpb == values["val_bpb"]
    assert memory == f"{float(values['peak_vram_mb']) / 1024:.1f}" and float(memory) > 0
    assert values["seed"] == "7" and values["depth"] == "2" and values["attention"] == "sdpa"
    assert re.fullmatch(r"[0-9a-f]{12}", values["harness"])
    assert "warning" not in finished.stdout + finished.stderr


def test_the_budget_is_kept_within_a_step_and_reported(finished):
    values = block(finished.stdout)
    seconds, steps = float(values["training_seconds"]), int(values["num_steps"])
    assert 5 <= seconds <= 5 + 3 * seconds / steps + 0.1  # the steps are not all of one length
    assert float(values["total_seconds"]) > seconds
    assert float(values["total_tokens_M"]) == pytest.approx(steps * 2048 / 1e6, abs=0.05)


def test_redirected_output_is_short_whole_lines(finished):
    assert "\r" not in finished.stdout and len(finished.stdout.splitlines()) < 40
    assert finished.stderr == ""
    steps = [line for line in finished.stdout.splitlines() if line.startswith("step")]
    assert steps and all("loss" in line for line in steps)


def test_two_worktrees_run_at_once_on_one_cache(session_cache, tmp_path):
    project, other = make_project(tmp_path / "project"), tmp_path / "other"
    subprocess.run(["git", "-C", project, "worktree", "add", "-q", "-b", "agent2", other], check=True)
    text = (other / "train.py").read_text()
    (other / "train.py").write_text(text.replace("DEPTH=2", "DEPTH=1"))
    commit(other, "one layer")
    before = {path: path.stat().st_mtime_ns for path in session_cache.iterdir()}
    with ThreadPool(2) as pool:
        runs = pool.starmap(train, [(project, session_cache), (other, session_cache)])
    one, two = (block(run.stdout) for run in runs)
    assert (one["depth"], two["depth"]) == ("2", "1") and one["harness"] == two["harness"]
    assert one["row"].split("\t")[0] != two["row"].split("\t")[0]
    assert {path: path.stat().st_mtime_ns for path in session_cache.iterdir()} == before


def test_a_changed_train_py_has_no_commit_to_its_name(project, session_cache, tmp_path):
    folder = shutil.copytree(project, tmp_path / "changed")
    (folder / "train.py").write_text((folder / "train.py").read_text() + "\n# changed\n")
    done = train(folder, session_cache)
    before, after = done.stdout.split("\n---\n")
    assert before.splitlines()[-1].startswith("warning: train.py differs from its commit")
    assert block(done.stdout)["row"].startswith("-------\t"), after


def test_a_run_over_its_time_has_no_commit_to_its_name(cache, monkeypatch, capsys):

    now = [100.0]
    monkeypatch.setattr(prepare.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(prepare, "run_commit", ("abc1234", None))
    facts = dict(mfu_percent=1, total_tokens=1, num_steps=1, num_params=1, depth=1, attention="sdpa")
    prepare.report(1.0, **facts)
    assert "the clock never ran" in capsys.readouterr().out
    next(prepare.make_dataloader(prepare.Tokenizer.from_directory(), 1, 8, "train"))
    now[0] += 5.9
    prepare.report(1.0, **facts)
    text = capsys.readouterr().out
    assert "warning" not in text and block("\n" + text)["row"].startswith("abc1234\t")
    now[0] += 0.5
    prepare.report(1.0, **facts)
    text = capsys.readouterr().out
    assert "warning: training took 6.4 s of a budget of 5 s" in text and block("\n" + text)["row"].startswith(
        "-------\t"
    )


DRIVER = """
import sys, prepare, train
exec(sys.argv[1])
try:
    train.main()
except train.TrainingError as error:
    sys.exit(f"train.py: error: {error}")
"""


def test_nan_ends_the_run_without_a_number(session_cache):
    poison = """
step = train.Run.step
def poisoned(*arguments, calls=[]):
    calls.append(1)
    return step(*arguments) * (float("nan") if len(calls) > 3 else 1)
train.Run.step = poisoned
"""
    done = run_python("-c", DRIVER, poison, cache=session_cache)
    assert done.returncode == 1 and "val_bpb" not in done.stdout
    assert "step 3: the loss is nan" in done.stderr  # the first call was the warm-up
    assert done.stderr.count("\n") == 1


def test_an_exploding_loss_ends_the_run(session_cache):
    explode = "import dataclasses; train.LAPTOP = dataclasses.replace(train.LAPTOP, HEAD_LR=1e3, SOFTCAP=1e3)"
    done = run_python("-c", DRIVER, explode, cache=session_cache)
    assert done.returncode == 1 and "val_bpb" not in done.stdout
    assert re.search(r"step \d+: the loss is .* training blew up", done.stderr)


def test_a_run_that_hangs_is_ended_with_its_stack(session_cache):
    hang = """
import time
def hang_here(*arguments):
    time.sleep(60)
train.train = hang_here
prepare.GRACE = 3  # after a budget of 5 seconds
"""
    started = time.monotonic()
    done = run_python("-c", DRIVER, hang, cache=session_cache)
    assert done.returncode == 1 and time.monotonic() - started < 50
    assert "hang_here" in done.stderr and "Timeout" in done.stderr and "val_bpb" not in done.stdout


def test_a_seed_that_is_none_is_refused(session_cache):
    done = run_python("train.py", cache=session_cache, SEED="lucky")
    assert done.returncode == 1 and "SEED='lucky'" in done.stderr and done.stderr.count("\n") == 1


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
