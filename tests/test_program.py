"""program.md's commands, run as they stand, through a night in small: every kind of experiment once.

Runs are a stand-in, but for one of the real train.py. uv is one too: a scratch clone would install everything anew.
"""

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
from conftest import ROOT

PAGE = (ROOT / "program.md").read_text(encoding="utf-8")
ONE_GPU, SEVERAL_GPUS = PAGE.split("\n## Several GPUs\n")


def blocks(text):
    return re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)


def command(*words, page=ONE_GPU, but="nothing of this kind"):
    """The one command of program.md, without its section on several GPUs, that has all these words."""
    found = [text for text in blocks(page) if all(word in text for word in words) and but not in text]
    assert len(found) == 1, (words, found)
    return found[0]


RUN, DECIDE, RECORD, CHECK = (
    command(f"run prepare.py {word}\n", but="git status").strip() for word in ("run", "decide", "record", "run check")
)
LOOK = command("tail -n 30")

NOISE = [0.003, 0, -0.001, 0.002, 0.001, -0.003, -0.002, 0]  # of seeds 0 to 7; others by their last digit
STAND_IN = f"""
VALUE = 1.0
#
MORE = 0
#
FAULT = ""
import json, os, pathlib, signal, subprocess, sys, time
where, began = os.environ.get("SLURMD_NODENAME", "here") + ":" + os.environ.get("CUDA_VISIBLE_DEVICES", ""), time.time()
path, seed = pathlib.Path(os.environ["AUTORESEARCH_RUN"]), int(os.environ["SEED"])
run = json.loads(path.read_text())
with open("../starts", "a") as starts:
    starts.write(f"{{run['commit'][:7]}} {{seed}} {{os.getpid()}}\\n")
report = dict(memory_gb="0.5", num_steps=9, attention="sdpa", harness="0123456789ab", problems=[])
print("step 1", flush=True)
time.sleep(0.5)
exec(FAULT)
value = VALUE + MORE + {NOISE}[seed % 10 % 8]
print(f"ran: {{where}} {{began}} {{time.time()}}")
new = path.with_name("run.json.new")
new.write_text(json.dumps(run | {{"report": report | {{"val_bpb": f"{{value:.6f}}"}}}}))
new.replace(path)
"""
CONSTANTS = {"DECIDE_WAIT = 40": "DECIDE_WAIT = 1", "BEAT, WATCH = 3, 15": "BEAT, WATCH = 1, 5"}


class Clone:
    """A scratch repository in which an agent with no memory types commands."""

    def __init__(self, folder, cache, train=STAND_IN, **constants):
        self.folder = folder
        folder.mkdir()
        for name in ("prepare.py", "program.md", "README.md", ".gitignore"):
            shutil.copy(ROOT / name, folder)
        prepare_py = (folder / "prepare.py").read_text(encoding="utf-8")
        for old, new in (CONSTANTS | constants).items():
            assert prepare_py.count(old) == 1
            prepare_py = prepare_py.replace(old, new)
        (folder / "prepare.py").write_text(prepare_py, encoding="utf-8")
        (folder / "train.py").write_text(train, encoding="utf-8")
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
        self.env = {**os.environ, **person, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.env |= {"AUTORESEARCH_CACHE": str(cache), "GIT_CONFIG_GLOBAL": os.devnull}
        self.sh("git init -q -b main && git add -A && git commit -qm start")

    def sh(self, text, ok=True, **env):
        done = subprocess.run(
            ["bash", "-c", text], cwd=self.folder, env=self.env | env, capture_output=True, timeout=120
        )
        done.stdout, done.stderr = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
        assert not ok or done.returncode == 0, (text, done.stdout, done.stderr)
        return done.stdout

    def edit(self, value, fault="", tree=".", name="VALUE"):
        path = self.folder / tree / "train.py"
        text = re.sub(f"^{name} = .*", f"{name} = {value}", path.read_text(), flags=re.M)
        path.write_text(re.sub("^FAULT = .*", lambda _: f"FAULT = {fault!r}", text, flags=re.M))

    def idea(self, value, what, fault=""):
        """An idea that has been committed and started"""
        self.edit(value, fault)
        self.sh(f"git commit -qam '{what}'")
        return self.run()

    def run(self, command=RUN):
        """Start what is next; its commit"""
        return re.fullmatch(r"started \w+ (\w{7}), seed \d+\n", self.sh(command))[1]

    def decide(self, **env):
        """What `decide` prints in the end, on one stream"""
        deadline = time.monotonic() + 60
        while "not ended" in (printed := self.sh(f"{DECIDE} 2>&1", ok=False, **env)) and "cut off" not in printed:
            assert time.monotonic() < deadline, printed
        return printed

    def record(self, veto="", **env):
        self.decide()
        return self.sh(f"{RECORD} {veto} 2>&1", ok=False, **env)

    def head(self, tree="."):
        return self.sh(f"git -C {tree} rev-parse HEAD")[:7]

    def starts(self, commit=None):
        """[[commit, seed, pid] of each start]"""
        path = next(
            (path for path in (self.folder / ".waves/starts", self.folder.parent / "starts") if path.exists()), None
        )
        lines = [line.split() for line in path.read_text().splitlines()] if path else []
        return [line for line in lines if commit in (None, line[0])]

    def wait(self, condition, seconds=90):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.starts()
            time.sleep(0.1)

    def rows(self):
        return [line.split("\t") for line in (self.folder / "results.tsv").read_text(encoding="utf-8").splitlines()]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()[1])


def lives(pid):
    return Path(f"/proc/{pid}").exists() and ") Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def clone(tmp_path, session_cache):
    return Clone(tmp_path / "clone", session_cache, **{"GRACE = 540": "GRACE = 4"})


def baseline(clone):
    clone.sh("git switch -q -c autoresearch/t")
    for _ in range(3):
        clone.run()
        clone.record()
    return clone.head()


def test_a_night_in_small(clone):
    # Set-up
    (clone.folder / ".claude").mkdir()
    (clone.folder / ".claude/settings").write_text("the agent's own")
    lines = clone.sh(command("GIT_AUTHOR_IDENT")).splitlines()
    assert len(lines) == 2 and "a@example.org" in lines[0] and re.search(r"harness [0-9a-f]{12}$", lines[1])
    (clone.folder / "results.tsv").write_text("an earlier night")
    clone.sh(command("git switch -c"))
    branch = clone.sh("git branch --show-current").strip()
    assert re.fullmatch(r"autoresearch/\d{8}", branch)
    assert [p.read_text() for p in clone.folder.glob("results-until-*.tsv")] == ["an earlier night"]

    # The noise: the harness chooses the seeds
    for seed in range(3):
        base = clone.run()
        assert f"baseline, seed {seed}, harness 0123456789ab, sdpa, 9 steps" in clone.record()
    scores = [float(row[1]) for row in clone.rows()[1:]]
    assert [row[0] for row in clone.rows()[1:]] == [base] * 3 == [clone.head()] * 3
    head, margin = statistics.mean(scores), 1.5 * statistics.stdev(scores)
    assert f"head {head:.6f}, margin {margin:.6f}, n 0: " in clone.decide()
    assert "nothing new to run: commit an idea" in clone.sh(f"{RUN} 2>&1", ok=False)

    # One that is kept. Asked twice, it has one row
    clone.edit(0.9)
    assert "train.py has changes without a commit" in clone.sh(f"{RUN} 2>&1", ok=False)
    clone.sh(command("git commit -qam").replace("WHAT CHANGES", "batch 2^9"))
    assert "has not run: `uv run prepare.py run`" in clone.sh(DECIDE)
    clone.run()
    assert "a run is going on" in clone.sh(f"{RUN} 2>&1", ok=False)
    assert "\tkeep\tbatch 2^9, " in clone.decide() and len(clone.rows()) == 4
    assert "has ended: `uv run prepare.py record`" in clone.sh(f"{RUN} 2>&1", ok=False)
    clone.record()
    clone.record()
    kept = clone.head()
    assert len(clone.rows()) == 5 and clone.rows()[-1][0] == kept

    # One that is discarded: row, tag, reset. Nothing that has no commit is lost
    discarded = clone.idea(0.95, "checkpoint\tactivations")
    (clone.folder / "README.md").write_text("the human's own, not committed")
    clone.edit(0.6)  # the next idea, too early
    assert "train.py has changes without a commit" in clone.record() and len(clone.rows()) == 5
    clone.sh("git stash push -q train.py")
    assert "\tdiscard\tcheckpoint activations, " in clone.record()
    assert clone.head() == kept
    assert (clone.folder / "README.md").read_text() == "the human's own, not committed"
    clone.sh("git restore README.md && git stash drop -q")
    assert ", n 1: " in clone.decide()

    # Crashes: with a line that is too long to show, with noise after it; time exceeded; killed; a hang
    tried = [clone.idea(0.9, "odd heads", "print('x' * 10**6); import atexit; atexit.register(print, 'leaked'); 1 / 0")]
    assert f"{tried[0]}\t0.000000\t0.0\tcrash\todd heads: ZeroDivisionError: division by zero" in clone.record()
    assert len(clone.sh(LOOK)) < 7000
    tried.append(clone.idea(0.8, "too late", "report['problems'] = ['training took 9 s']"))
    assert "\tcrash\ttoo late: training took 9 s" in clone.record()
    tried.append(clone.idea(0.8, "killed", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert "\tcrash\tkilled: killed by SIGKILL: step 1" in clone.record()
    tried.append(clone.idea(0.8, "hang", "time.sleep(500)"))
    assert "\tcrash\thang: it hung: ended by the harness after 6 s" in clone.record()
    assert 'run.py", line ' in clone.sh("cat run.log")  # where it hung
    # One that would be kept, but for the human's limits
    tried.append(clone.idea(0.6, "simpler: batch 2^8"))
    clone.record("discard")
    assert clone.rows()[-1][3] == "discard"

    # The check finds commits and seeds, three each, and moves no bar
    before = clone.decide()
    for seed, commit in [(seed, commit) for seed in (100, 101, 102) for commit in (base, kept)]:
        assert clone.run(CHECK) == commit
        assert f"{commit}\t" in clone.record() and clone.rows()[-1][4].startswith(f"check, seed {seed}, ")
    assert "nothing new to run" in clone.sh(f"{CHECK} 2>&1", ok=False)
    assert clone.decide() == before and clone.head() == kept

    # Picking up again, with everything but the files forgotten
    seen = clone.sh(command("git status -sb"))
    assert f"## {branch}" in seen and "batch 2^9" in seen and "check, seed 100" in seen and before in seen

    # After the night
    rows = clone.rows()
    assert rows[0] == ["commit", "val_bpb", "memory_gb", "status", "description"] and {len(row) for row in rows} == {5}
    assert [row[0] for row in rows[1:]] == [base] * 3 + [kept, discarded, *tried] + [base, kept] * 3
    assert "".join(row[3][0] for row in rows[1:]) == "kkkkdccccdkkkkkk"
    assert clone.sh("git status --porcelain -uno") == "" and clone.sh("git ls-files results.tsv run.*") == ""
    assert clone.sh("git log --format=%h -n 2").split() == [kept, base]
    assert sorted(clone.sh("git tag").split()) == sorted(f"tried/{commit}" for commit in [discarded, *tried])

    # The table is lost
    text = (clone.folder / "results.tsv").read_text()
    clone.sh("rm results.tsv run.json")
    clone.record()
    assert (clone.folder / "results.tsv").read_text() == text

    # On no branch of a night nothing is done
    clone.sh("git switch -q main")
    for words in (RUN, DECIDE, RECORD):
        assert "this is main: git switch to it" in clone.sh(f"{words} 2>&1", ok=False)


def test_a_real_run(tmp_path, session_cache):
    clone = Clone(tmp_path / "clone", session_cache, (ROOT / "train.py").read_text(encoding="utf-8"))
    clone.env["CUDA_VISIBLE_DEVICES"] = ""
    clone.sh("git switch -q -c autoresearch/t")
    commit = clone.run()
    assert re.search(
        rf"{commit}\t\d\.\d+\t\d\.\d\tkeep\tbaseline, seed 0, harness \w+, sdpa, \d+ steps\n", clone.record()
    )
    assert "\nharness: " in clone.sh(LOOK) and "attention: sdpa" in clone.sh(LOOK)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_was_cut_off_starts_again(clone, how):
    baseline(clone)
    commit = clone.idea(0.9, "slow", "time.sleep(3)")
    clone.wait(lambda: clone.starts(commit))
    pid = int(clone.starts(commit)[0][2])
    os.kill(parent(pid), how)
    clone.wait(lambda: not lives(pid))  # it goes with its supervisor
    assert f"{commit}, seed 0 was cut off: `uv run prepare.py run` again" in clone.decide()
    assert clone.run() == commit
    assert f"{commit}\t0.903000\t0.5\tkeep" in clone.record() and len(clone.starts(commit)) == 2


def test_nothing_of_a_run_lives_on(clone):
    baseline(clone)
    clone.idea(
        0.9, "a child", "subprocess.Popen(['bash', '-c', 'echo $$ > ../child; while sleep 0.1; do echo gpu; done'])"
    )
    assert "\tkeep\ta child" in clone.record()
    clone.wait(lambda: not lives(int((clone.folder.parent / "child").read_text())))


def test_a_terminal_that_is_closed_and_a_run_typed_twice(clone):
    baseline(clone)
    clone.edit(0.9, "time.sleep(2)")
    clone.sh("git commit -qam twice")
    typed = f"script -qec 'bash --norc -ic \"{RUN} & {RUN}; wait; exit\"' /dev/null"  # a terminal, which then hangs up
    printed = clone.sh(f"{typed} 2>&1", ok=False)
    assert printed.count("started idea") == 1 and "a run is going on" in printed
    assert "\tkeep\ttwice, 9 steps" in clone.record() and len(clone.starts(clone.head())) == 1


def test_two_records_at_once(clone):
    baseline(clone)
    commit = clone.idea(0.95, "two", "time.sleep(1)")
    for _ in range(2):
        clone.sh(f"({RECORD} & {RECORD} & wait) 2>&1")
    assert [row[0] for row in clone.rows()].count(commit) == 1 and clone.rows()[-1][0] == commit


def test_the_human_commits_in_the_night(clone):
    base = baseline(clone)
    for value, kept in ((1.2, []), (0.9, ["under"])):
        clone.sh("echo >> program.md && git commit -qam before")
        clone.idea(value, "under", "time.sleep(1)")
        clone.sh("echo >> program.md && git commit -qam after")
        clone.record()
        assert clone.rows()[-1][3] == ("keep" if kept else "discard")
        assert clone.sh("git log --format=%s -n 1") in ("after\n", 'Revert "under"\n')
        assert bool(clone.sh(f"git diff {base} -- train.py")) == bool(kept)
    clone.idea(1.2, "next")
    clone.record()
    assert clone.rows()[-1][3] == "discard" and clone.sh("git log --format=%s -n 1") == "after\n"


def test_what_is_refused(clone):
    base = baseline(clone)
    commit = clone.idea(0.9, "another cache", "report['harness'] = 'ba9876543210'")
    assert f"{commit} ran with harness ba9876543210, but baseline, seed 0, harness 0123456789ab" in clone.record()
    assert len(clone.rows()) == 4
    clone.run(f"{RUN} again")
    clone.sh("git reset -q --hard HEAD~1 && echo >> README.md")
    clone.edit(0.9)
    clone.sh("git commit -qam 'and another file'")
    assert "changes more than train.py" in clone.sh(f"{RUN} 2>&1", ok=False) + clone.decide()
    clone.sh("git reset -q --hard HEAD~1")
    for value in (0.9, 0.8):
        clone.edit(value)
        clone.sh("git commit -qam 'a step'")
    assert f"must be one commit on top of {base}" in clone.sh(f"{RUN} 2>&1", ok=False)
    clone.sh("git reset -q --hard HEAD~2")
    assert "it is `prepare.py run`" in clone.sh(f"{RUN} twice 2>&1", ok=False)
    for words in ("record discard x", "decide x", "record x"):
        assert "the commands of a night are" in clone.sh(f"uv run prepare.py {words} 2>&1", ok=False)


def test_few_steps_and_another_kernel_are_said(clone):
    baseline(clone)
    commit = clone.idea(0.9, "slow", "report |= dict(num_steps=7, attention='flex')")
    printed = clone.decide()
    assert (
        f"note: {commit} made 7 steps, the head 9" in printed
        and f"note: {commit} used the attention kernel flex" in printed
    )


def test_settings_and_locale_change_nothing(clone):
    baseline(clone)
    for key in ("log.showSignature true", "color.ui always", "commit.encoding ISO-8859-1"):
        clone.sh(f"git config {key}")
    for env in ({"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}):
        clone.idea(1.2, "größer 0.4→0.3 🚀")
        clone.record(**env)
        assert clone.rows()[-1][4] == "größer 0.4→0.3 🚀, 9 steps"


def test_no_command_can_lose_work():
    for text in blocks(PAGE):
        for word in ("git clean", "--hard", "rm ", "git checkout", "git push", "stash"):
            assert word not in text
    assert not any("timeout" in text for text in blocks(ONE_GPU))  # a Mac has no such command
    assert len(PAGE.splitlines()) <= 150
