"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

The one thing not real is uv: a stand-in on PATH runs this Python, since a scratch clone would install everything anew.
"""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL, run_python

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(*words, page=ONE_GPU):
    """The one command of program.md, without its section on several GPUs, that has all these words."""
    found = [text for text in blocks(page) if all(word in text for word in words)]
    assert len(found) == 1, (words, found)
    return found[0]


class Clone:
    """A scratch repository in which an agent with no memory types commands."""

    def __init__(self, folder, cache):
        self.folder = folder
        folder.mkdir()
        for name in ("prepare.py", "train.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
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
        look = command("seq 50").replace("seq 50", "seq 1").replace("sleep 1", "sleep 0.3")
        while until not in self.sh(look, ok=False):
            assert time.monotonic() < deadline, self.sh("cat run.log")
        return self.sh(command("/^---$/"))

    def record(self, status, description):
        self.sh(command("s/^row: *//p").replace("STATUS", status).replace("DESCRIPTION", description))

    def record_crash(self, description):
        self.sh(command("0.000000").replace("DESCRIPTION: why it crashed", description))

    def take_back(self):
        self.sh(command("tried/"))

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text().splitlines()]

    def decide(self):
        """((best, M, n, keep below, simpler below), what to do)"""
        return bar_and_verdict(self.sh(command("margin M")))


def bar_and_verdict(printed):
    figures, verdict = printed.splitlines()
    return tuple(map(float, re.findall(r"\d+\.\d+|(?<= )\d+(?= d)", figures))), verdict.split(": ")[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("night")
    made = run_python(
        "prepare.py", f"--corpus={corpus}", *SMALL, "--time-budget=1", "--eval-tokens=1024", cache=folder / "cache"
    )
    assert made.returncode == 0, made.stderr
    return Clone(folder / "clone", folder / "cache")


def test_a_night_in_small(clone):
    # Set-up
    assert clone.sh("git status --porcelain") == ""
    (clone.folder / "results.tsv").write_text("an earlier night")
    clone.sh(command("git switch -c"))
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}", branch)
    harness = re.search(r"harness ([0-9a-f]{12})$", clone.sh(command("open_cache")))[1]
    clone.sh(command("commit\\tval_bpb"))
    assert [p.read_text() for p in clone.folder.glob("results-until-*.tsv")] == ["an earlier night"]
    # set-up again refuses the branch that is taken
    assert "already exists" in clone.sh(command("git switch -c").strip() + " 2>&1", ok=False)

    # The noise
    for seed in range(3):
        block = clone.run(seed)
        assert f"\nseed:             {seed}\n" in block and f"\nharness:          {harness}\n" in block
        clone.record("keep", f"baseline, seed {seed}")
    baseline = clone.sh("git rev-parse HEAD")[:7]
    scores = [float(row[1]) for row in clone.rows()[1:]]
    assert [row[0] for row in clone.rows()[1:]] == [baseline] * 3 and len(set(scores)) == 3
    M = 2 / 3 * (max(scores) - min(scores))
    assert clone.decide()[0] == pytest.approx((min(scores), M, 0, min(scores) - M, min(scores) + M), abs=2e-6)

    # One that is kept
    clone.edit("MATRIX_LR: float = 0.04", "MATRIX_LR: float = 0.03")
    clone.sh("git commit -qam 'matrix lr 0.03'")
    assert "val_bpb" in clone.run()
    clone.record("keep", "matrix lr 0.03")
    kept = clone.sh("git rev-parse HEAD")[:7]

    # One that is discarded: row, tag, reset
    clone.edit("SOFTCAP: float = 15.0", "SOFTCAP: float = 3.0")
    clone.sh("git commit -qam 'softcap 3'")
    assert "val_bpb" in clone.run()
    clone.record("discard", "softcap 3")
    (clone.folder / "README.md").write_text("the human's own, not committed")
    discarded = clone.sh("git rev-parse HEAD")[:7]
    clone.take_back()
    assert clone.sh("git rev-parse HEAD")[:7] == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    clone.sh("git checkout -q README.md")
    assert clone.decide()[0][2] == 1

    # One that crashes
    clone.edit("HEAD_DIM=32", "HEAD_DIM=31")
    clone.sh("git commit -qam 'odd heads'")
    assert "val_bpb" not in clone.run() and "exit: 1" in clone.sh("tail -n 30 run.log")
    clone.record_crash("heads of 31: rotation needs an even number")
    crashed = clone.sh("git rev-parse HEAD")[:7]
    clone.take_back()

    # One that hangs and is killed
    clone.edit("    gc.freeze()", "    print('hanging', flush=True); time.sleep(500)\n    gc.freeze()")
    clone.sh("git commit -qam 'hang'")
    clone.run(until="hanging")
    pid = clone.sh("sed -n 's/^pid: //p' run.log").strip()
    clone.sh(command("kill"))
    deadline = time.monotonic() + 10
    while "exit: 143" not in clone.sh("tail -n 1 run.log"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert clone.sh(f"ps -p {pid} -o pid= || true").strip() == ""
    clone.record_crash("hang")
    hung = clone.sh("git rev-parse HEAD")[:7]
    clone.take_back()

    # An honest look: the baseline on another seed, and back
    clone.sh(command("--detach"))
    assert clone.sh("git rev-parse HEAD")[:7] == baseline
    clone.run(100)
    clone.record("keep", "check, seed 100")
    before = clone.decide()[0]
    clone.sh(command('git switch -q "autoresearch/TAG').replace("autoresearch/TAG", branch))
    assert clone.decide()[0] == before  # a check moves no bar
    assert f"{baseline} {clone.rows()[-1][1]} (1 runs)" in clone.sh(command("runs"))
    assert clone.sh("git rev-parse HEAD")[:7] == kept

    # Picking up again, with everything but the files forgotten
    seen = clone.sh(command("git status -sb"))
    assert f"## {branch}" in seen and "matrix lr 0.03" in seen and "check, seed 100" in seen

    # After the night
    rows = clone.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert [(row[0], row[3]) for row in rows[1:]] == [
        *[(baseline, "keep")] * 3,
        (kept, "keep"),
        (discarded, "discard"),
        (crashed, "crash"),
        (hung, "crash"),
        (baseline, "keep"),
    ]
    assert all(len(row) == 5 for row in rows)
    assert clone.sh("git status --porcelain") == ""
    assert clone.sh("git ls-files results.tsv run.log") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, baseline]
    tags = clone.sh("git tag").split()
    assert sorted(tags) == sorted(f"tried/{commit}" for commit in (discarded, crashed, hung))
    assert all(clone.sh(f"git rev-parse tried/{commit}")[:7] == commit for commit in (discarded, crashed, hung))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        # best, M, n, keep below, simpler below, by hand
        (["1.000 keep b", "1.003 keep b", "1.006 keep b"], (1.0, 0.004, 0, 0.996, 1.004)),
        (["1.006 keep b", "1.000 keep b", "1.003 keep b", "0.99 keep x"], (0.99, 0.004, 0, 0.986, 0.994)),
        (["1.000 keep b", "1.003 keep b", "1.006 keep b", *["1.1 discard x"] * 25], (1.0, 0.004, 25, 0.998, 1.004)),
        (["1.000 keep b", "1.003 keep b", "1.006 keep b", *["1.1 discard x"] * 80], (1.0, 0.004, 50, 1.0, 1.004)),
        (["1.000 keep b", "1.003 keep b", "1.006 keep b", "0 crash x", "2 discard x"], (1.0, 0.004, 1, 0.99608, 1.004)),
        (["1.000 keep b", "1.003 keep b", "1.006 keep b", "1.002 keep simpler"], (1.0, 0.004, 0, 0.996, 1.004)),
        (["1.000 keep b", "1.003 keep b", "1.006 keep b", "0.9 keep check"], (1.0, 0.004, 0, 0.996, 1.004)),
        (["10.0 keep b", "9.9 keep b", "9.8 keep b"], (9.8, 0.133333, 0, 9.666667, 9.933333)),  # numbers, not letters
    ],
)
def test_the_bar_by_hand(tmp_path, rows, expected):
    lines = ["commit\tval_bpb\tmemory_gb\tstatus\tdescription"]
    (tmp_path / "run.log").write_text("---\nval_bpb:          1.0\n")
    lines += ["abc1234\t{}\t1.0\t{}\t{}".format(*row.split(" ")) for row in rows]
    (tmp_path / "results.tsv").write_text("\n".join(lines) + "\n")
    figures, _ = decided(tmp_path)
    assert figures == pytest.approx(expected, abs=1e-6)


def decided(folder):
    done = subprocess.run(["bash", "-c", command("margin M")], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return bar_and_verdict(done.stdout)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ("0.995999", "keep"),
        ("0.996000", "discard, unless it is simpler code"),
        ("1.003999", "discard, unless it is simpler code"),
        ("1.004001", "discard"),
        ("10.00000", "discard"),
        (None, "crash"),
    ],
)
def test_the_verdict_by_hand(tmp_path, now, verdict):
    rows = "".join(f"abc1234\t{number}\t1.0\tkeep\tbaseline\n" for number in ("1.006000", "1.003000", "1.000000"))
    (tmp_path / "results.tsv").write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n" + rows)
    block = f"---\nval_bpb:          {now}\ntraining_seconds: 5\nexit: 0\n" if now else "exit: 1\n"
    (tmp_path / "run.log").write_text(f"step 1\n{block}")
    assert decided(tmp_path) == (pytest.approx((1.0, 0.004, 0, 0.996, 1.004)), verdict)


def test_the_check_by_hand(tmp_path):
    rows = ("1.0 keep check, seed 100", "2.0 keep check, seed 101", "0.0 crash check, seed 102", "9.0 keep an idea")
    (tmp_path / "results.tsv").write_text(
        "".join("abc1234\t{}\t1.0\t{}\t{}\n".format(*row.split(" ", 2)) for row in rows)
    )
    done = subprocess.run(["bash", "-c", command("runs)")], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "abc1234 1.500000 (2 runs)\n"


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(ONE_GPU.splitlines()) <= 190 and len(SEVERAL_GPUS.splitlines()) <= 160
    assert "git status --porcelain` must print nothing" in ONE_GPU
