"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

The one thing not real is uv: a stand-in on PATH runs this Python, since a scratch clone would install everything anew.
"""

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, run_python

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(*words, page=ONE_GPU, but="nothing of this kind"):
    """The one command of program.md, without its section on several GPUs, that has all these words."""
    found = [text for text in blocks(page) if all(word in text for word in words) and but not in text]
    assert len(found) == 1, (words, found)
    return found[0]


DECIDE, RECORD = (command(f"run prepare.py {word}\n", but="git status").strip() for word in ("decide", "record"))
(TAIL,) = re.findall(r"`(tail -n 30 [^`]*)`", ONE_GPU)


class Clone:
    """A scratch repository in which an agent with no memory types commands."""

    def __init__(self, folder, cache):
        self.folder = folder
        folder.mkdir()
        for name in ("prepare.py", "train.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        prepare_py = (folder / "prepare.py").read_text(encoding="utf-8")
        assert prepare_py.count("DECIDE_WAIT = 45") == 1
        (folder / "prepare.py").write_text(prepare_py.replace("DECIDE_WAIT = 45", "DECIDE_WAIT = 1"), encoding="utf-8")
        tools = folder.parent / "bin"
        tools.mkdir()
        uv = tools / "uv"
        # like uv: one process more, which passes SIGTERM on
        uv.write_text(
            '#!/bin/bash\nshift; [ "$1" = python ] && shift\n'
            f'"{sys.executable}" "$@" & trap "kill $!" TERM; wait $!; status=$?; wait $! 2>/dev/null; exit $status\n'
        )
        uv.chmod(0o755)
        person = {f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.env = {
            **os.environ,
            **person,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        self.env |= {"AUTORESEARCH_CACHE": str(cache), "GIT_CONFIG_GLOBAL": os.devnull}
        self.sh("git init -q -b main && git add -A && git commit -qm start")

    def sh(self, text, ok=True):
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=120
        )
        assert not ok or done.returncode == 0, (text, done.stdout, done.stderr)
        return done.stdout

    def edit(self, old, new):
        path = self.folder / "train.py"
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1
        path.write_text(text.replace(old, new), encoding="utf-8")

    def run(self, seed=0, until="exit: "):
        self.sh(command("nohup").replace("SEED=0", f"SEED={seed}"))
        deadline = time.monotonic() + 90
        while until not in self.sh("cat run.log"):
            assert time.monotonic() < deadline, self.sh("cat run.log")
            time.sleep(0.2)
        return self.sh("cat run.log")

    def decide(self):
        """What `decide` prints, on one stream"""
        return self.sh(f"{DECIDE} 2>&1")

    def record(self, veto="", ok=True):
        return self.sh(f"{RECORD} {veto} 2>&1", ok)

    def processes(self):
        """The pids of what runs train.py in this clone"""
        for proc in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                here = Path(os.readlink(proc / "cwd")) == self.folder
                if here and (proc / "cmdline").read_bytes().split(b"\0")[1:2] == [b"train.py"]:
                    yield int(proc.name)

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("night")
    made = run_python("prepare.py", f"--corpus={corpus}", *SMALL, "--eval-tokens=1024", cache=folder / "cache")
    assert made.returncode == 0, made.stderr
    return Clone(folder / "clone", folder / "cache")


SCORE = "val_bpb = evaluate_bpb(run.compiled_model, tokenizer, batch_size)"  # half of it is an idea that is kept


def test_a_night_in_small(clone):
    # Set-up
    clone.sh("git config user.email agent@localhost")
    assert clone.sh(command("user.email")) == "agent@localhost\n"
    (clone.folder / "results.tsv").write_text("an earlier night")
    clone.sh(command("git switch -c"))
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}", branch)
    harness = re.search(r"harness ([0-9a-f]{12})$", clone.sh(command("open_cache")))[1]
    clone.sh(command("mv -n results.tsv"))
    assert [p.read_text() for p in clone.folder.glob("results-until-*.tsv")] == ["an earlier night"]
    # set-up again refuses the branch that is taken
    assert "already exists" in clone.sh(command("git switch -c").strip() + " 2>&1", ok=False)

    # The noise
    for seed in range(3):
        log = clone.run(seed)
        assert f"\nseed:             {seed}\n" in log and f"\nharness:          {harness}\n" in log
        clone.record()
    baseline = clone.sh("git rev-parse HEAD")[:7]
    scores = [float(row[1]) for row in clone.rows()[1:]]
    assert [row[0] for row in clone.rows()[1:]] == [baseline] * 3 and len(set(scores)) == 3
    head, margin = statistics.mean(scores), 1.5 * statistics.stdev(scores)
    assert f"head {head:.6f}, margin {margin:.6f}, n 0: " in clone.decide()  # nothing new

    # One that is kept. Asked twice, it has one row
    clone.edit(SCORE, f"{SCORE} / 2")
    clone.sh(command("git commit -qam").replace("WHAT CHANGES", "batch 2^9"))
    assert "not ended: run.log has no run of " in clone.decide() and "not ended" in clone.record(ok=False)
    clone.run()
    assert "\tkeep\tbatch 2^9, " in clone.decide() and len(clone.rows()) == 4
    clone.record()
    clone.record()
    kept = clone.sh("git rev-parse HEAD")[:7]
    assert len(clone.rows()) == 5 and clone.rows()[-1][0] == kept

    # One that is discarded: row, tag, reset. Nothing that has no commit is lost
    clone.edit(SCORE, f"{SCORE} * 2")
    clone.sh("git commit -qam 'checkpoint\tactivations'")
    clone.run()
    (clone.folder / "README.md").write_text("the human's own, not committed")
    discarded = clone.sh("git rev-parse HEAD")[:7]
    clone.edit("WARMDOWN_RATIO: float = 0.5", "WARMDOWN_RATIO: float = 0.6")  # the next idea, too early
    assert "train.py has changes without a commit" in clone.record(ok=False) and len(clone.rows()) == 5
    clone.sh("git stash push -q train.py")
    assert "\tdiscard\tcheckpoint activations, " in clone.record()
    assert clone.sh("git rev-parse HEAD")[:7] == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    clone.sh("git restore README.md && git stash drop -q")
    assert ", n 1: " in clone.decide()

    # One that crashes, with a line that is too long to show
    clone.edit("HEAD_DIM=32", "HEAD_DIM=31")
    clone.edit("def main():", "def main():\n    print('x' * 10**6)")
    clone.sh("git commit -qam 'odd heads'")
    assert "val_bpb" not in clone.run() and "exit: 1" in clone.sh(TAIL) and len(clone.sh(TAIL)) < 7000
    crashed = clone.sh("git rev-parse HEAD")[:7]
    assert f"{crashed}\t0.000000\t0.0\tcrash\todd heads: " in clone.record()

    # One whose time was exceeded: no commit stands for its number
    clone.edit(SCORE, f"time.sleep(5)\n    {SCORE} / 2")
    clone.sh("git commit -qam 'too late'")
    assert "\nrow:              -------\t" in clone.run()
    late = clone.sh("git rev-parse HEAD")[:7]
    assert f"{late}\t0.000000\t0.0\tcrash\ttoo late: training took" in clone.record()

    # One that was killed, and one that would be kept, but for the human's limits
    clone.edit("    gc.freeze()", "    print('hanging', end='', flush=True); time.sleep(500)\n    gc.freeze()")
    clone.sh("git commit -qam 'hang'")
    clone.run(until="hanging")
    assert "not ended: run.log: hanging" in clone.decide()
    for pid in clone.processes():
        os.kill(pid, signal.SIGKILL)
    hung = clone.sh("git rev-parse HEAD")[:7]
    while "exit: " not in clone.sh("cat run.log"):
        time.sleep(0.1)
    ended = clone.sh("cat run.log")
    (clone.folder / "run.log").write_text(ended.partition("exit: ")[0])  # as if the machine had gone down
    assert "not ended: run.log: was cut off, start it again: " in clone.decide()
    (clone.folder / "run.log").write_text(ended)
    assert "\tcrash\thang: " in clone.record()
    clone.edit(SCORE, f"{SCORE} / 2")
    clone.sh("git commit -qam 'simpler: batch 2^8'")
    clone.run()
    vetoed = clone.sh("git rev-parse HEAD")[:7]
    clone.record("discard")
    assert clone.rows()[-1][3] == "discard"

    # The check: the baseline on another seed, and back
    clone.sh(command("--detach"))
    assert clone.sh("git rev-parse HEAD")[:7] == baseline
    clone.run(100)
    before = clone.decide().splitlines()[0]
    assert f"{baseline}\t" in clone.record()
    assert clone.sh("git rev-parse HEAD")[:7] == baseline and clone.rows()[-1][4].startswith("check, seed 100, ")
    clone.sh(f"git switch -q {branch}")
    assert clone.decide().splitlines()[0] == before  # a check moves no bar
    assert clone.sh("git rev-parse HEAD")[:7] == kept

    # Picking up again, with everything but the files forgotten
    seen = clone.sh(command("git status -sb"))
    assert f"## {branch}" in seen and "batch 2^9" in seen and "check, seed 100" in seen

    # After the night
    rows = clone.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [(row[0], row[3]) for row in rows[1:]] == [
        *[(baseline, "keep")] * 3,
        (kept, "keep"),
        (discarded, "discard"),
        (crashed, "crash"),
        (late, "crash"),
        (hung, "crash"),
        (vetoed, "discard"),
        (baseline, "keep"),
    ]
    assert all(len(row) == 5 for row in rows)
    assert clone.sh("git status --porcelain") == ""
    assert clone.sh("git ls-files results.tsv run.log") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, baseline]
    tags = clone.sh("git tag").split()
    assert sorted(tags) == sorted(f"tried/{commit}" for commit in (discarded, crashed, late, hung, vetoed))
    assert all(clone.sh(f"git rev-parse tried/{commit}")[:7] == commit for commit in (discarded, crashed, hung))

    # On no branch of a night nothing is decided
    clone.sh("git switch -q main")
    assert "this is main: git switch to it" in clone.record(ok=False)


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(PAGE.splitlines()) <= 180
